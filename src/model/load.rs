//! From a GGUF file to a model: finding tensors and checking their shapes.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::rope::{Factors, Scaling};
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
        let [rope, window_rope] = tensors.ropes(&config)?;

        let family = config.family();
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
            let ([q, k, v], [gate, up]) = match family.fused {
                false => (
                    [
                        linear("attn_q", queries, queries, d)?,
                        linear("attn_k", queries, keys, d)?,
                        linear("attn_v", queries, keys, d)?,
                    ],
                    [
                        linear("ffn_gate", channels, channels, d)?,
                        linear("ffn_up", channels, channels, d)?,
                    ],
                ),
                true => (
                    parts(
                        &file,
                        linear("attn_qkv", queries, queries + 2 * keys, d)?,
                        [queries, keys, keys],
                    )?,
                    parts(
                        &file,
                        linear("ffn_up", channels, 2 * channels, d)?,
                        [channels, channels],
                    )?,
                ),
            };
            let o = linear("attn_output", queries, d, queries)?;
            let down = linear("ffn_down", channels, d, channels)?;
            let mut norm = |name: &str, width| {
                if absent(width) {
                    return Ok(vec![1.0; d]);
                }
                tensors.vector(&format!("blk.{l}.{name}.weight"), d)
            };
            let (attention_norm, mlp_norm) =
                (norm("attn_norm", queries)?, norm("ffn_norm", channels)?);
            let mut norm_if = |there: bool, name: &str, width| match there {
                true => {
                    let name = format!("blk.{l}.{name}.weight");
                    tensors.vector(&name, width).map(Some)
                }
                false => Ok(None),
            };
            let group = config.heads[l].checked_div(config.kv_heads[l]).unwrap_or(0);
            for linear in [&q, &k, &v, &o, &gate, &up, &down] {
                check(&file, &linear.weight)?;
            }
            layers.push(Layer {
                attention_norm,
                q,
                k,
                v,
                o,
                q_norm: norm_if(family.head_norms, "attn_q_norm", config.head_dim)?,
                k_norm: norm_if(family.head_norms, "attn_k_norm", config.head_dim)?,
                attention_post_norm: norm_if(family.post_norms, "post_attention_norm", d)?,
                rope: match (config.windows[l], &window_rope) {
                    _ if !config.rotates(l) => None,
                    (Some(_), Some(window_rope)) => Some(window_rope.clone()),
                    _ => rope.clone(),
                },
                window: config.windows[l],
                group_sizes: vec![group; config.kv_heads[l]],
                mlp_norm,
                gate,
                up,
                down,
                mlp_post_norm: norm_if(family.post_norms, "post_ffw_norm", d)?,
            });
        }
        tensors.refuse_unused()?;

        Ok(Self {
            path: file.path().to_owned(),
            config,
            map: file.into_map(),
            embedding,
            layers,
            output_norm,
            output,
            warnings,
        })
    }
}

const NOT_SPARSE: &str = "is in flapjack's sparse form, which only projections of layers may have";

/// The parts of a projection, of so many rows each.
fn parts<const N: usize>(
    file: &GgufFile,
    whole: Linear,
    rows: [usize; N],
) -> Result<[Linear; N], GgufError> {
    let Linear { weight, bias } = whole;
    if weight.is_sparse() {
        return Err(file.tensor_error(&weight.name, NOT_SPARSE));
    }
    let mut first = 0;
    Ok(rows.map(|rows| {
        let these = first..first + rows;
        first = these.end;
        let at = |row: usize| weight.range.start + row * weight.row_bytes();
        Linear {
            weight: Weight {
                rows,
                range: at(these.start)..at(these.end),
                ..weight.clone()
            },
            bias: bias.as_ref().map(|bias| bias[these].to_vec()),
        }
    }))
}

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

    /// How the layers without and those with a window turn queries and keys; `None` for the latter if they do it as the others.
    fn ropes(&mut self, config: &Config) -> Result<[Option<Arc<Rope>>; 2], GgufError> {
        let pairs = config.rope_dim / 2;
        let mut factors = |name: &str| -> Result<Option<Vec<f32>>, GgufError> {
            let factors = self.optional_vector(name, pairs)?;
            let mut bad = factors.iter().flatten();
            match bad.find(|f| !(f.is_finite() && **f > 0.0)) {
                Some(bad) => {
                    let problem = format!("a frequency factor is {bad}");
                    Err(self.file.tensor_error(name, problem))
                }
                None => Ok(factors),
            }
        };
        let all = factors("rope_freqs.weight")?;
        let short = factors("rope_factors_short.weight")?;
        let long = factors("rope_factors_long.weight")?;
        let factors = match (&all, &short, &long) {
            (Some(all), None, None) => Factors::All(all),
            (None, Some(short), Some(long)) => Factors::ByContext { short, long },
            (None, None, None) => Factors::None,
            (Some(_), ..) => {
                let problem = "is there beside factors for short or long contexts";
                return Err(self.file.tensor_error("rope_freqs.weight", problem));
            }
            (None, short, _) => {
                let missing = match short {
                    Some(_) => "rope_factors_long.weight",
                    None => "rope_factors_short.weight",
                };
                return Err(self.missing(missing));
            }
        };
        let (dim, base) = (config.rope_dim, config.rope_base);
        let rope = Rope::new(dim, base, &config.rope_scaling, factors);
        let window_rope = config
            .window_rope_base
            .map(|base| Arc::new(Rope::new(dim, base, &Scaling::NONE, Factors::None)));
        Ok([Some(Arc::new(rope)), window_rope])
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
