//! A model's shape, from the metadata.

use super::Architecture;
use super::family::{Family, Rotation};
use super::rope::{Scaling, Yarn};
use crate::count::count;
use crate::gguf::{FromValue, GgufError, GgufFile, MetadataWarning, Value};

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
    pub rope_scaling: Scaling,
    /// Which values of a head are turned together: as the family has it in GGUF, or as other files have them in all families.
    pub rotation: Rotation,
    /// The base of the layers with a window, which do not scale then; `None` if they rotate like the others.
    pub window_rope_base: Option<f32>,
    /// The last positions that each layer's attention sees; `None` where it sees all.
    pub windows: Vec<Option<usize>>,
    /// What scores of attention are multiplied by.
    pub score_scale: f32,
    /// Scores of attention, and logits, become cap · tanh(x / cap); `None` where they stay.
    pub score_cap: Option<f32>,
    pub logit_cap: Option<f32>,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
}

/// The key that says that values are turned in halves, whatever the family does in GGUF ("halves"). It is in no file.
pub(crate) const ROTATION_KEY: &str = "flapjack.rotation";

/// What LLaMA-1 was trained with, for files that do not say.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;
const DEFAULT_CONTEXT_LENGTH: usize = 2048;
/// The layouts of tensors that we expect: rows of queries and keys in the order of LLaMA's first release.
const LAYOUTS: [&str; 2] = ["reference", "Meta AI original pth"];
/// The version of ggml's block formats that we read, the only one that GGUF files have had.
const QUANTIZATION_VERSION: usize = 2;

/// Keys, behind the architecture's name, that change what a model computes in ways that are not supported, with the values that
/// change nothing.
const UNSUPPORTED: [(&str, &[f64]); 10] = [
    ("attention.causal", &[1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.output_scale", &[0.0, 1.0]),
    ("attention.temperature_scale", &[0.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
    ("use_parallel_residual", &[0.0]),
];

/// Those of families that cap.
const CAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];

impl Config {
    /// Reads the keys of an architecture. What of no great consequence is missing or unusable becomes a warning.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, has a value that no model can have, or asks for something that is not supported.
    pub fn from_gguf(
        file: &GgufFile,
        architecture: Architecture,
        warnings: &mut Vec<MetadataWarning>,
    ) -> Result<Self, GgufError> {
        let key = |name: &str| format!("{}.{name}", architecture.name());
        let positive = |name: &str| -> Result<usize, GgufError> {
            match file.require::<usize>(&key(name))? {
                0 => Err(file.metadata_error(&key(name), "must not be 0")),
                n => Ok(n),
            }
        };

        let layers = positive("block_count")?;
        // More layers than this cannot have tensors in any file; a wild count must not allocate.
        if layers > file.tensors().len() {
            return Err(file.metadata_error(
                &key("block_count"),
                format!(
                    "{} cannot be made of {}",
                    count(layers, "layer"),
                    count(file.tensors().len(), "tensor")
                ),
            ));
        }
        let embedding_length = positive("embedding_length")?;
        let heads = required_per_layer(file, &key("attention.head_count"), layers)?;
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
                    format!(
                        "{} cannot be shared evenly by {} in layer {layer}",
                        count(kv, "KV head"),
                        count(q, "query head")
                    ),
                ));
            }
        }
        let channels = required_per_layer(file, &key("feed_forward_length"), layers)?;

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
        let rope_base = match file.get::<f32>(&key("rope.freq_base"))? {
            Some(base) => base,
            None => {
                let key = key("rope.freq_base");
                warnings.push(MetadataWarning::missing(&key, DEFAULT_ROPE_BASE));
                DEFAULT_ROPE_BASE
            }
        };
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

        let context_length = context_length(file, &key("context_length"), warnings);
        let family = architecture.family();
        let head_width = match family.scale_by_width_with == Some(layers) {
            true => embedding_length / heads[0].max(1),
            false => head_dim,
        };
        refuse_unsupported(file, architecture, head_width)?;
        let [score_cap, logit_cap] = caps(file, architecture)?;
        let windows = windows(file, architecture, layers, warnings)?;
        let own_base = file
            .get::<f32>(&key("rope.freq_base_swa"))?
            .filter(|_| windows.contains(&None));
        let window_rope_base = own_base
            .or(family.windows.base)
            .filter(|_| windows.iter().any(Option::is_some));
        if let Some(base) = window_rope_base
            && !(base.is_finite() && base > 0.0)
        {
            return Err(file.metadata_error(
                &key("rope.freq_base_swa"),
                format!("must be a positive number, found {base}"),
            ));
        }
        warn_of_layout(file, &key("tensor_data_layout"), warnings);
        warn_of_quantization(file, warnings);

        Ok(Self {
            architecture,
            embedding_length,
            vocabulary,
            head_dim,
            heads,
            kv_heads,
            channels,
            context_length,
            rms_epsilon,
            rope_dim,
            rope_base,
            rope_scaling: scaling(file, architecture, context_length)?,
            rotation: match file.get::<&str>(ROTATION_KEY)? {
                None => family.rotation,
                Some("halves") => Rotation::Halves,
                Some(other) => {
                    let problem = format!("{other:?} is not known (\"halves\" is)");
                    return Err(file.metadata_error(ROTATION_KEY, problem));
                }
            },
            window_rope_base,
            windows,
            score_scale: 1.0 / (head_width as f32).sqrt(),
            score_cap,
            logit_cap,
            embedding_scale: match family.scaled_embedding {
                true => (embedding_length as f32).sqrt(),
                false => 1.0,
            },
        })
    }

    /// What the model computes: what its architecture does, with its own rotation.
    pub fn family(&self) -> Family {
        Family {
            rotation: self.rotation,
            ..self.architecture.family()
        }
    }

    /// Whether layer l, by its number in the file, turns queries and keys.
    pub(super) fn rotates(&self, l: usize) -> bool {
        let every = self.family().unrotated_every;
        every.is_none_or(|every| !(l + 1).is_multiple_of(every))
    }

    pub fn layers(&self) -> usize {
        self.heads.len()
    }
}

/// The longest context that the model was trained for; a short one that every LLaMA has, where the file does not say.
fn context_length(file: &GgufFile, key: &str, warnings: &mut Vec<MetadataWarning>) -> usize {
    match file.optional::<usize>(key, warnings) {
        Some(0) => warnings.push(MetadataWarning::ignored(key, "must not be 0")),
        Some(length) => return length,
        None => {}
    }
    warnings.push(MetadataWarning::missing(key, DEFAULT_CONTEXT_LENGTH));
    DEFAULT_CONTEXT_LENGTH
}

/// Refuses keys that change what the model computes. Passing over them would give wrong results.
fn refuse_unsupported(
    file: &GgufFile,
    architecture: Architecture,
    head_width: usize,
) -> Result<(), GgufError> {
    let own_scale = 1.0 / (head_width as f64).sqrt();
    let scale = ("attention.scale", &[0.0, own_scale][..]);
    let caps = CAPS.map(|name| (name, &[0.0][..]));
    let caps = caps.into_iter().filter(|_| !architecture.family().caps);
    for (name, neutral) in UNSUPPORTED.into_iter().chain([scale]).chain(caps) {
        let key = format!("{}.{name}", architecture.name());
        let Some(value) = file.metadata().get(&key) else {
            continue;
        };
        let number = match value {
            Value::Bool(yes) => f64::from(u8::from(*yes)),
            value => f64::from_value(value)
                .or(value.as_i128().map(|n| n as f64))
                .unwrap_or(f64::NAN),
        };
        let close = |to: &f64| (number - to).abs() <= 1e-4 * to.abs();
        if !neutral.iter().any(close) {
            return Err(file.metadata_error(
                &key,
                format!("{value} is not supported; running without it would give wrong results"),
            ));
        }
    }
    Ok(())
}

/// The caps of scores and of logits, in a family that has any.
fn caps(file: &GgufFile, architecture: Architecture) -> Result<[Option<f32>; 2], GgufError> {
    let mut caps = [None; 2];
    if !architecture.family().caps {
        return Ok(caps);
    }
    for (cap, name) in caps.iter_mut().zip(CAPS) {
        let key = format!("{}.{name}", architecture.name());
        *cap = file.get::<f32>(&key)?.filter(|cap| *cap != 0.0);
        if let Some(bad) = cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(
                file.metadata_error(&key, format!("must be a number of at least 0, found {bad}"))
            );
        }
    }
    Ok(caps)
}

/// The window of each layer. Which layers have one the family says, or the file: the length of a period whose last layer has none, or
/// for each layer whether it has.
fn windows(
    file: &GgufFile,
    architecture: Architecture,
    layers: usize,
    warnings: &mut Vec<MetadataWarning>,
) -> Result<Vec<Option<usize>>, GgufError> {
    let key = |name: &str| format!("{}.attention.{name}", architecture.name());
    let family = architecture.family().windows;
    let stated = file.optional::<usize>(&key("sliding_window"), warnings);
    let window = stated.or(family.default).filter(|window| *window > 0);
    let pattern = key("sliding_window_pattern");
    let every = match file.metadata().get(&pattern) {
        Some(Value::Array(_, items)) => {
            let items: Option<Vec<bool>> = items.iter().map(bool::from_value).collect();
            let items = items.filter(|items| items.len() == layers).ok_or_else(|| {
                file.metadata_error(&pattern, "must say for each layer whether it has a window")
            })?;
            let each = items.into_iter().map(|has| window.filter(|_| has));
            return Ok(each.collect());
        }
        // 0: every layer has one.
        Some(_) => file.get::<usize>(&pattern)?.filter(|every| *every > 0),
        None => family.global_every,
    };
    let global = |l: usize| every.is_some_and(|every| (l + 1).is_multiple_of(every));
    Ok((0..layers).map(|l| window.filter(|_| !global(l))).collect())
}

fn warn_of_layout(file: &GgufFile, key: &str, warnings: &mut Vec<MetadataWarning>) {
    if let Some(layout) = file.optional::<&str>(key, warnings)
        && !LAYOUTS.contains(&layout)
    {
        let problem = format!(
            "the layout {layout:?} is not known, and tensors are read as in {:?}",
            LAYOUTS[0]
        );
        warnings.push(MetadataWarning::ignored(key, problem));
    }
}

fn warn_of_quantization(file: &GgufFile, warnings: &mut Vec<MetadataWarning>) {
    const KEY: &str = "general.quantization_version";
    if file.tensors().iter().all(|t| t.block_type.is_float()) {
        return;
    }
    if let Some(version) = file.optional::<usize>(KEY, warnings)
        && version != QUANTIZATION_VERSION
    {
        let problem = format!(
            "quantised weights of version {version} are read as those of version {QUANTIZATION_VERSION}"
        );
        warnings.push(MetadataWarning::ignored(KEY, problem));
    }
}

/// [`per_layer`] of a key that the file must have.
fn required_per_layer(file: &GgufFile, key: &str, layers: usize) -> Result<Vec<usize>, GgufError> {
    match per_layer(file, key, layers)? {
        Some(numbers) => Ok(numbers),
        None => file.require::<usize>(key).map(|one| vec![one; layers]),
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
            format!(
                "has {} for {}",
                count(many.len(), "number"),
                count(layers, "layer")
            ),
        )),
        None => Err(file.metadata_error(
            key,
            format!("expected a non-negative integer or an array of them, found {value}"),
        )),
    }
}

/// How rotary embedding is stretched beyond the context that it was trained for.
fn scaling(
    file: &GgufFile,
    architecture: Architecture,
    context_length: usize,
) -> Result<Scaling, GgufError> {
    let key = |name: &str| format!("{}.rope.scaling.{name}", architecture.name());
    let positive = |name: &str| -> Result<Option<f32>, GgufError> {
        let value = file.get::<f32>(&key(name))?;
        match value.filter(|v| !(v.is_finite() && *v > 0.0)) {
            Some(bad) => Err(file.metadata_error(
                &key(name),
                format!("must be a positive number, found {bad}"),
            )),
            None => Ok(value),
        }
    };
    let kind = file.get::<&str>(&key("type"))?;
    // The older key of the same meaning as the factor's.
    let old_key = format!("{}.rope.scale_linear", architecture.name());
    let (factor_key, factor) = match (file.get::<f32>(&key("factor"))?, file.get::<f32>(&old_key)?)
    {
        (Some(factor), _) => (key("factor"), factor),
        (None, Some(factor)) => (old_key, factor),
        (None, None) => (key("factor"), 1.0),
    };
    let original_context = file
        .get::<usize>(&key("original_context_length"))?
        .filter(|length| *length > 0)
        .unwrap_or(context_length);
    let plain = Scaling {
        factor: 1.0,
        yarn: None,
        magnitude: positive("attn_factor")?.unwrap_or(1.0),
        original_context,
    };
    let factor = match factor {
        0.0 => 1.0,
        factor if factor.is_finite() && factor > 0.0 => factor,
        bad => {
            let problem = format!("must be a positive number, found {bad}");
            return match kind {
                Some("none" | "longrope" | "su") => Ok(plain),
                _ => Err(file.metadata_error(&factor_key, problem)),
            };
        }
    };
    match kind {
        // The factors of long contexts are tensors.
        Some("none" | "longrope" | "su") => Ok(plain),
        None | Some("linear") => Ok(Scaling { factor, ..plain }),
        Some("yarn") => {
            let extrapolated = file.get::<f32>(&key("yarn_ext_factor"))?.unwrap_or(1.0);
            let own = positive("yarn_attn_factor")?.unwrap_or(1.0);
            // YaRN's temperature belongs to its ramp.
            let temperature = match extrapolated == 0.0 || factor <= 1.0 {
                true => 1.0,
                false => 1.0 + 0.1 * factor.ln(),
            };
            Ok(Scaling {
                factor,
                yarn: Some(Yarn {
                    extrapolated,
                    beta_fast: positive("yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: positive("yarn_beta_slow")?.unwrap_or(1.0),
                }),
                magnitude: plain.magnitude * own * temperature,
                ..plain
            })
        }
        Some(other) => Err(file.metadata_error(
            &key("type"),
            format!("RoPE scaling {other:?} is not supported (\"none\", \"linear\", \"yarn\" and \"longrope\" are, and frequency factors)"),
        )),
    }
}
