//! From a GGUF file to a model: finding tensors and checking their shapes.

use std::collections::BTreeSet;

use super::{Architecture, Config, Layer, Linear, Model, ModelError, Rope, Weight, kind};
use crate::gguf::{GgufError, GgufFile, TensorInfo};
use crate::quant::{check_sparse, decode_row};

impl Model {
    /// Takes views on the weights of `file`.
    ///
    /// # Errors
    /// If the file is not a whole model of an architecture that we run, or metadata or a tensor is missing, unknown, or of the wrong
    /// shape or type.
    pub fn load(file: GgufFile) -> Result<Self, ModelError> {
        let architecture = kind::architecture(&file)?;
        let mut warnings = Vec::new();
        let config = Config::from_gguf(&file, architecture, &mut warnings)?;
        let mut tensors = Tensors {
            file: &file,
            used: BTreeSet::new(),
        };
        let d = config.embedding_length;

        let embedding = tensors.matrix("token_embd.weight", config.vocabulary, d)?;
        let output = tensors.optional_matrix("output.weight", config.vocabulary, d)?;
        for weight in [Some(&embedding), output.as_ref()].into_iter().flatten() {
            if weight.is_sparse() {
                return Err(file.tensor_error(&weight.name, NOT_SPARSE).into());
            }
        }
        let output_norm = tensors.vector("output_norm.weight", d)?;
        let factors = tensors.optional_vector("rope_freqs.weight", config.rope_dim / 2)?;
        if let Some(bad) = factors
            .iter()
            .flatten()
            .find(|f| !(f.is_finite() && **f > 0.0))
        {
            return Err(file
                .tensor_error("rope_freqs.weight", format!("a frequency factor is {bad}"))
                .into());
        }

        let mut layers = Vec::with_capacity(config.layers());
        for l in 0..config.layers() {
            let queries = config.heads[l] * config.head_dim;
            let keys = config.kv_heads[l] * config.head_dim;
            let channels = config.channels[l];
            // What a `deci` layer has no tensors of adds nothing to the residual stream, not even a bias.
            let absent = |width| architecture == Architecture::Deci && width == 0;
            let mut linear = |name: &str, width, rows, cols| -> Result<Linear, GgufError> {
                let name = format!("blk.{l}.{name}");
                if absent(width) {
                    return Ok(Linear::empty(name + ".weight", rows, cols));
                }
                Ok(Linear {
                    weight: tensors.matrix(&format!("{name}.weight"), rows, cols)?,
                    bias: tensors.optional_vector(&format!("{name}.bias"), rows)?,
                })
            };
            let (q, k) = (
                linear("attn_q", queries, queries, d)?,
                linear("attn_k", queries, keys, d)?,
            );
            let (v, o) = (
                linear("attn_v", queries, keys, d)?,
                linear("attn_output", queries, d, queries)?,
            );
            let (gate, up) = (
                linear("ffn_gate", channels, channels, d)?,
                linear("ffn_up", channels, channels, d)?,
            );
            let down = linear("ffn_down", channels, d, channels)?;
            let mut norm = |name: &str, width| {
                if absent(width) {
                    return Ok(vec![1.0; d]);
                }
                tensors.vector(&format!("blk.{l}.{name}.weight"), d)
            };
            let group = config.heads[l].checked_div(config.kv_heads[l]).unwrap_or(0);
            for linear in [&q, &k, &v, &o, &gate, &up, &down] {
                check(&file, &linear.weight)?;
            }
            layers.push(Layer {
                attention_norm: norm("attn_norm", queries)?,
                q,
                k,
                v,
                o,
                group_sizes: vec![group; config.kv_heads[l]],
                mlp_norm: norm("ffn_norm", channels)?,
                gate,
                up,
                down,
            });
        }
        tensors.refuse_unused()?;

        let rope = Rope::new(
            config.rope_dim,
            config.rope_base,
            config.rope_scale,
            factors.as_deref(),
        );
        Ok(Self {
            path: file.path().to_owned(),
            config,
            map: file.into_map(),
            embedding,
            layers,
            output_norm,
            output,
            rope,
            warnings,
        })
    }
}

const NOT_SPARSE: &str = "is in flapjack's sparse form, which only projections of layers may have";

/// Refuses a sparse weight whose bytes are not what they should be, before anything is read through them.
fn check(file: &GgufFile, weight: &Weight) -> Result<(), GgufError> {
    if !weight.is_sparse() {
        return Ok(());
    }
    let bytes = &file.map().bytes()[weight.range.clone()];
    check_sparse(weight.block_type, weight.rows, weight.cols, bytes).map_err(|error| {
        let problem = format!("{error} (from byte {} of the file on); the file is damaged, fetch it again or make it anew", weight.range.start);
        file.tensor_error(&weight.name, problem)
    })
}

struct Tensors<'a> {
    file: &'a GgufFile,
    used: BTreeSet<String>,
}

impl Tensors<'_> {
    fn find(&mut self, name: &str, shape: &[usize]) -> Result<Option<&TensorInfo>, GgufError> {
        let Some(tensor) = self.file.tensor(name) else {
            return Ok(None);
        };
        if tensor.shape != shape {
            return Err(self.file.tensor_error(
                name,
                format!(
                    "has shape {:?} where the metadata asks for {shape:?}",
                    tensor.shape
                ),
            ));
        }
        self.used.insert(tensor.name.clone());
        Ok(Some(tensor))
    }

    fn missing(&self, name: &str) -> GgufError {
        self.file.tensor_error(name, "is missing from the file")
    }

    fn optional_matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Option<Weight>, GgufError> {
        Ok(self.find(name, &[rows, cols])?.map(|tensor| Weight {
            name: tensor.name.clone(),
            block_type: tensor.block_type,
            layout: tensor.layout,
            rows,
            cols,
            range: tensor.range.clone(),
        }))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight, GgufError> {
        self.optional_matrix(name, rows, cols)?
            .ok_or_else(|| self.missing(name))
    }

    fn optional_vector(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, GgufError> {
        let file = self.file;
        let tensor = self.find(name, &[len])?;
        Ok(tensor.map(|tensor| {
            let mut values = vec![0.0; len];
            decode_row(tensor.block_type, file.bytes(tensor), &mut values);
            values
        }))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
        self.optional_vector(name, len)?
            .ok_or_else(|| self.missing(name))
    }

    /// A tensor that nothing reads would change what the model computes, so it must not be passed over.
    fn refuse_unused(&self) -> Result<(), GgufError> {
        match self
            .file
            .tensors()
            .iter()
            .find(|t| !self.used.contains(&t.name))
        {
            None => Ok(()),
            Some(tensor) => Err(self.file.tensor_error(
                &tensor.name,
                "is not part of a model of this architecture and of the widths and number of layers that the metadata states; running without it would give wrong results",
            )),
        }
    }
}
