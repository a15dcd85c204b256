//! A model's shape, from the metadata.

use crate::gguf::{FromValue, GgufError, GgufFile};

/// The architectures that we run. They share keys, tensors and arithmetic. In `deci` files (DeciLM and the Nemotron models
/// that NVIDIA cut out of Llama 3; `src/models/deci.cpp` in llama.cpp) widths differ from layer to layer, and a layer
/// without heads or channels has no tensors for them, not even the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Deci,
}

impl Architecture {
    /// As `general.architecture` names it; its keys begin with the same word.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Deci => "deci",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Architecture::Llama, Architecture::Deci]
            .into_iter()
            .find(|a| a.name() == name)
    }
}

/// Layers, widths and constants of a LLaMA-family model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub embedding_length: usize,
    pub vocabulary: usize,
    pub head_dim: usize,
    /// Query heads, KV heads and MLP channels of each layer, as the file states them.
    pub heads: Vec<usize>,
    pub kv_heads: Vec<usize>,
    pub channels: Vec<usize>,
    /// The longest context that the model was trained for.
    pub context_length: usize,
    pub rms_epsilon: f32,
    /// Values of a head that are rotated (an even number, at most `head_dim`).
    pub rope_dim: usize,
    pub rope_base: f32,
    /// Positions are divided by this (linear scaling); 1 for none.
    pub rope_scale: f32,
}

/// What LLaMA-1 was trained with, for files that do not say.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

impl Config {
    /// Reads the keys of an architecture.
    ///
    /// # Errors
    /// If a key is missing, of the wrong type, or has a value that no model can have.
    pub fn from_gguf(file: &GgufFile, architecture: Architecture) -> Result<Self, GgufError> {
        let key = |name: &str| format!("{}.{name}", architecture.name());
        let positive = |name: &str| -> Result<usize, GgufError> {
            match file.require::<usize>(&key(name))? {
                0 => Err(file.metadata_error(&key(name), "must not be 0")),
                n => Ok(n),
            }
        };

        if let Some(experts) = file.get::<usize>(&key("expert_count"))?
            && experts > 0
        {
            return Err(file.metadata_error(
                &key("expert_count"),
                format!("{experts} experts: mixture-of-experts models are not supported"),
            ));
        }

        let layers = positive("block_count")?;
        // More layers than this cannot have tensors in any file; a wild count must not allocate.
        if layers > file.tensors().len() {
            return Err(file.metadata_error(
                &key("block_count"),
                format!(
                    "{layers} layers cannot be made of {} tensors",
                    file.tensors().len()
                ),
            ));
        }
        let embedding_length = positive("embedding_length")?;
        let heads = per_layer(file, &key("attention.head_count"), layers)?
            .ok_or_else(|| file.metadata_error(&key("attention.head_count"), "is missing"))?;
        let kv_heads = per_layer(file, &key("attention.head_count_kv"), layers)?
            .unwrap_or_else(|| heads.clone());
        for (layer, (&q, &kv)) in heads.iter().zip(&kv_heads).enumerate() {
            if kv == 0 && q > 0 && architecture == Architecture::Deci {
                return Err(file.metadata_error(
                    &key("attention.head_count_kv"),
                    format!("layer {layer} has a matrix in the place of attention, which is not supported"),
                ));
            }
            if (kv == 0) != (q == 0) || (kv > 0 && q % kv != 0) {
                return Err(file.metadata_error(
                    &key("attention.head_count_kv"),
                    format!("{kv} KV heads cannot be shared evenly by the {q} query heads of layer {layer}"),
                ));
            }
        }
        let channels = per_layer(file, &key("feed_forward_length"), layers)?
            .ok_or_else(|| file.metadata_error(&key("feed_forward_length"), "is missing"))?;

        let head_dim = match file.get::<usize>(&key("attention.key_length"))? {
            Some(0) => {
                return Err(file.metadata_error(&key("attention.key_length"), "must not be 0"));
            }
            Some(dim) => dim,
            None => {
                let most = heads.iter().copied().max().unwrap_or(0);
                if most == 0 || !embedding_length.is_multiple_of(most) {
                    return Err(file.metadata_error(
                        &key("attention.head_count"),
                        format!(
                            "{most} heads do not divide the embedding length {embedding_length}, and {} is missing",
                            key("attention.key_length")
                        ),
                    ));
                }
                embedding_length / most
            }
        };
        if let Some(value_dim) = file.get::<usize>(&key("attention.value_length"))?
            && value_dim != head_dim
        {
            return Err(file.metadata_error(
                &key("attention.value_length"),
                format!("values of {value_dim} with keys of {head_dim} are not supported"),
            ));
        }

        let rope_dim = file
            .get::<usize>(&key("rope.dimension_count"))?
            .unwrap_or(head_dim);
        if rope_dim > head_dim || !rope_dim.is_multiple_of(2) {
            return Err(file.metadata_error(
                &key("rope.dimension_count"),
                format!("{rope_dim} is not an even number up to the head size {head_dim}"),
            ));
        }
        let rope_base = file
            .get::<f32>(&key("rope.freq_base"))?
            .unwrap_or(DEFAULT_ROPE_BASE);
        if !(rope_base.is_finite() && rope_base > 0.0) {
            return Err(file.metadata_error(
                &key("rope.freq_base"),
                format!("must be a positive number, found {rope_base}"),
            ));
        }

        let vocabulary = match file.tensor("token_embd.weight") {
            Some(tensor) if tensor.shape.len() == 2 => tensor.shape[0],
            _ => {
                return Err(file.tensor_error("token_embd.weight", "is missing or not a matrix"));
            }
        };
        let rms_epsilon = file.require::<f32>(&key("attention.layer_norm_rms_epsilon"))?;
        if !(rms_epsilon.is_finite() && rms_epsilon >= 0.0) {
            return Err(file.metadata_error(
                &key("attention.layer_norm_rms_epsilon"),
                format!("must be a number of at least 0, found {rms_epsilon}"),
            ));
        }

        Ok(Self {
            architecture,
            embedding_length,
            vocabulary,
            head_dim,
            heads,
            kv_heads,
            channels,
            context_length: positive("context_length")?,
            rms_epsilon,
            rope_dim,
            rope_base,
            rope_scale: rope_scale(file, architecture)?,
        })
    }

    pub fn layers(&self) -> usize {
        self.heads.len()
    }
}

/// A key that is either one number for all layers or an array with one number each; `None` if it is absent.
fn per_layer(file: &GgufFile, key: &str, layers: usize) -> Result<Option<Vec<usize>>, GgufError> {
    let Some(value) = file.metadata().get(key) else {
        return Ok(None);
    };
    if let Some(one) = usize::from_value(value) {
        return Ok(Some(vec![one; layers]));
    }
    match Vec::<usize>::from_value(value) {
        Some(many) if many.len() == layers => Ok(Some(many)),
        Some(many) => Err(file.metadata_error(
            key,
            format!("has {} numbers for {layers} layers", many.len()),
        )),
        None => Err(file.metadata_error(
            key,
            format!("expected a non-negative integer or an array of them, found {value}"),
        )),
    }
}

/// The divisor of positions under linear scaling.
fn rope_scale(file: &GgufFile, architecture: Architecture) -> Result<f32, GgufError> {
    let key = |name: &str| format!("{}.{name}", architecture.name());
    let kind_key = key("rope.scaling.type");
    let factor_key = key("rope.scaling.factor");
    // The older key of the same meaning.
    let old_key = key("rope.scale_linear");
    let kind = file.get::<&str>(&kind_key)?;
    let (key, factor) = match (file.get::<f32>(&factor_key)?, file.get::<f32>(&old_key)?) {
        (Some(factor), _) => (&factor_key, factor),
        (None, Some(factor)) => (&old_key, factor),
        (None, None) => (&factor_key, 1.0),
    };
    match kind {
        Some("none") => Ok(1.0),
        None | Some("linear") if factor.is_finite() && factor > 0.0 => Ok(factor),
        None | Some("linear") if factor == 0.0 => Ok(1.0),
        None | Some("linear") => {
            Err(file.metadata_error(key, format!("must be a positive number, found {factor}")))
        }
        Some(other) => Err(file.metadata_error(
            &kind_key,
            format!("RoPE scaling {other:?} is not supported (\"none\" and \"linear\" are, and frequency factors)"),
        )),
    }
}
