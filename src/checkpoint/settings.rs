//! A model's shape and constants, from `config.json`, as the metadata that a GGUF file has for them.

use serde_json::Value as Json;

use super::{CONFIG, Folder, names};
use crate::gguf::{GgufError, Value, ValueType};
use crate::model::{Architecture, ROTATION_KEY};

/// The types of models (`model_type`), and what runs them.
const TYPES: [(&str, Architecture); 9] = [
    ("llama", Architecture::Llama),
    ("mistral", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("gemma", Architecture::Gemma),
    ("gemma2", Architecture::Gemma2),
    ("gemma3_text", Architecture::Gemma3),
    ("smollm3", Architecture::SmolLm3),
    ("phi3", Architecture::Phi3),
];

/// What a model of the family is if `config.json` does not say, as in the published code.
struct Defaults {
    tied: bool,
    head_dim: Option<usize>,
    epsilon: f64,
    rope_base: f64,
}

fn defaults(architecture: Architecture) -> Defaults {
    use Architecture::{Gemma, Gemma2, Gemma3, SmolLm3};
    let gemma = names::norms_lack_one(architecture);
    Defaults {
        tied: gemma || architecture == SmolLm3,
        head_dim: match architecture {
            Gemma | Gemma2 | Gemma3 => Some(256),
            _ => None,
        },
        epsilon: if architecture == Architecture::Phi3 {
            1e-5
        } else {
            1e-6
        },
        rope_base: match architecture {
            Gemma3 => 1_000_000.0,
            SmolLm3 => 2_000_000.0,
            _ => 10_000.0,
        },
    }
}

/// What `config.json` says.
pub(super) struct Settings {
    pub architecture: Architecture,
    pub layers: usize,
    /// The output head is the embedding.
    pub tied: bool,
    /// Norms are stored without the 1 that belongs to them.
    pub norms_lack_one: bool,
    /// Factors of rotation, as GGUF's tensors of these names.
    pub factors: Vec<(&'static str, Vec<f32>)>,
    pub metadata: Vec<(String, Value)>,
}

/// Reads `config.json`.
struct Reader<'a> {
    folder: &'a Folder,
    json: &'a Json,
}

impl Reader<'_> {
    fn error(&self, key: &str, problem: impl std::fmt::Display) -> GgufError {
        self.folder.error(CONFIG, format!("{key}: {problem}"))
    }

    /// The value of a key; `None` without it, and where it is null.
    fn get(&self, key: &str) -> Option<&Json> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<usize>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        // What GGUF has 32 bits for.
        let number = number.filter(|n| u32::try_from(*n).is_ok());
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(key, format!("expected a number of things, found {value}"))),
        }
    }

    fn required(&self, key: &str) -> Result<usize, GgufError> {
        self.number(key)?
            .ok_or_else(|| self.error(key, "is missing"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        float_of(self.get(key)).map_err(|problem| self.error(key, problem))
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }
}

fn float_of(value: Option<&Json>) -> Result<Option<f64>, String> {
    match value {
        None | Some(Json::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(format!("expected a number, found {value}")),
        },
    }
}

fn u32_value(n: usize) -> Value {
    Value::U32(n as u32)
}

impl Settings {
    /// Reads the settings of a folder.
    ///
    /// # Errors
    /// If a key is missing or of no use, or asks for what we do not run.
    pub(super) fn read(folder: &Folder, json: &Json) -> Result<Self, GgufError> {
        let reader = Reader { folder, json };
        let architecture = architecture(&reader)?;
        let family = architecture.family();
        let defaults = defaults(architecture);
        if let Some(found) = reader.get("quantization_config") {
            let method = found.get("quant_method").and_then(Json::as_str);
            let method = method.unwrap_or("some method");
            return Err(reader.error(
                "quantization_config",
                format!("weights quantised by {method} are not supported; take the model in F32, F16 or BF16, or as GGUF"),
            ));
        }
        gate(&reader, architecture)?;

        let layers = reader.required("num_hidden_layers")?;
        let width = reader.required("hidden_size")?;
        let heads = reader.required("num_attention_heads")?;
        if layers == 0 || heads == 0 || width == 0 {
            return Err(reader.error("num_hidden_layers", "a model has layers, heads and a width"));
        }
        let kv_heads = reader.number("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = match reader.number("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if width % heads == 0 => width / heads,
            None => {
                let problem =
                    format!("{heads} do not divide hidden_size {width}, and head_dim is missing");
                return Err(reader.error("num_attention_heads", problem));
            }
        };
        let context = reader.number("max_position_embeddings")?;
        // Newer programs write all about rotation in one place.
        let scaling = reader.get("rope_scaling").or(reader.get("rope_parameters"));
        // Where layers differ, those for each kind of them.
        let local = scaling.and_then(|s| s.get("sliding_attention"));
        let scaling = scaling.map(|s| s.get("full_attention").unwrap_or(s));
        let rope_base = match reader.float("rope_theta")? {
            Some(base) => base,
            None => float_of(scaling.and_then(|s| s.get("rope_theta")))
                .map_err(|problem| reader.error("rope_theta", problem))?
                .unwrap_or(defaults.rope_base),
        };
        let partial = reader.float("partial_rotary_factor")?.unwrap_or(1.0);
        let rope_dim = (head_dim as f64 * partial) as usize;

        let mut own: Vec<(&str, Value)> = vec![
            ("block_count", u32_value(layers)),
            ("embedding_length", u32_value(width)),
            (
                "feed_forward_length",
                u32_value(reader.required("intermediate_size")?),
            ),
            ("attention.head_count", u32_value(heads)),
            ("attention.head_count_kv", u32_value(kv_heads)),
            ("attention.key_length", u32_value(head_dim)),
            ("attention.value_length", u32_value(head_dim)),
            ("rope.dimension_count", u32_value(rope_dim)),
            ("rope.freq_base", Value::F32(rope_base as f32)),
        ];
        if let Some(context) = context {
            own.push(("context_length", u32_value(context)));
        }
        let epsilon = reader.float("rms_norm_eps")?.unwrap_or(defaults.epsilon);
        own.push((
            "attention.layer_norm_rms_epsilon",
            Value::F32(epsilon as f32),
        ));
        if family.caps {
            for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
                if let Some(cap) = reader.float(key)? {
                    own.push((key, Value::F32(cap as f32)));
                }
            }
        }
        if let Some(scalar) = reader.float("query_pre_attn_scalar")?
            && scalar > 0.0
        {
            own.push(("attention.scale", Value::F32((1.0 / scalar.sqrt()) as f32)));
        }
        unrotated(&reader, family.unrotated_every, layers)?;
        let local_base = match reader.float("rope_local_base_freq")? {
            Some(base) => Some(base),
            None => float_of(local.and_then(|s| s.get("rope_theta")))
                .map_err(|problem| reader.error("rope_parameters", problem))?,
        };
        if let Some(base) = local_base
            && architecture == Architecture::Gemma3
        {
            own.push(("rope.freq_base_swa", Value::F32(base as f32)));
        }
        windows(&reader, architecture, layers, &mut own)?;
        let rotation = Rotated {
            base: rope_base,
            dim: rope_dim,
            context,
        };
        let mut factors = Vec::new();
        if let Some(scaling) = scaling {
            rotation.scaling(&reader, scaling, &mut own, &mut factors)?;
        }

        let name = folder
            .path
            .canonicalize()
            .unwrap_or_else(|_| folder.path.clone());
        let name = name
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mut metadata = vec![
            (
                "general.architecture".to_owned(),
                Value::String(architecture.name().into()),
            ),
            ("general.type".to_owned(), Value::String("model".into())),
            ("general.name".to_owned(), Value::String(name)),
            // All files of this form have them so, whatever GGUF has.
            (ROTATION_KEY.to_owned(), Value::String("halves".into())),
        ];
        let prefix = architecture.name();
        metadata.extend(
            own.into_iter()
                .map(|(key, value)| (format!("{prefix}.{key}"), value)),
        );
        Ok(Self {
            architecture,
            layers,
            tied: reader.flag("tie_word_embeddings").unwrap_or(defaults.tied),
            norms_lack_one: names::norms_lack_one(architecture),
            factors,
            metadata,
        })
    }
}

/// What runs the model.
fn architecture(reader: &Reader) -> Result<Architecture, GgufError> {
    let known = || {
        let names: Vec<&str> = TYPES.iter().map(|(name, _)| *name).collect();
        names.join(", ")
    };
    let named = |name: &str| {
        TYPES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, a)| *a)
    };
    if let Some(model_type) = reader.text("model_type") {
        return named(model_type).ok_or_else(|| {
            let problem = format!("{model_type:?} is not supported; flapjack runs {}", known());
            reader.error("model_type", problem)
        });
    }
    // Of the form "LlamaForCausalLM".
    let class = reader
        .get("architectures")
        .and_then(|list| list.get(0)?.as_str());
    let model_type = class.and_then(|class| class.strip_suffix("ForCausalLM"));
    let found = model_type.and_then(|name| named(&name.to_lowercase()));
    found.ok_or_else(|| match class {
        Some(class) => {
            let problem = format!("{class:?} is not supported; flapjack runs {}", known());
            reader.error("architectures", problem)
        }
        None => reader.error("model_type", "is missing"),
    })
}

/// Refuses what is applied to gates in no model of the family.
fn gate(reader: &Reader, architecture: Architecture) -> Result<(), GgufError> {
    let gemma = names::norms_lack_one(architecture);
    let expected: &[&str] = match gemma {
        true => &["gelu_pytorch_tanh", "gelu"],
        false => &["silu", "swish"],
    };
    // Gemma's own key counts before the other one.
    for key in ["hidden_activation", "hidden_act"] {
        if let Some(found) = reader.text(key) {
            if !expected.contains(&found) {
                let problem = format!(
                    "{found:?} is not supported in a model of type {} ({} is)",
                    architecture.name(),
                    expected[0]
                );
                return Err(reader.error(key, problem));
            }
            break;
        }
    }
    Ok(())
}

/// Refuses other layers without rotation than every so manyth.
fn unrotated(reader: &Reader, every: Option<usize>, layers: usize) -> Result<(), GgufError> {
    let Some(list) = reader.get("no_rope_layers").and_then(Json::as_array) else {
        return Ok(());
    };
    // 1 where a layer rotates.
    let rotates = |l: usize| every.is_none_or(|every| !(l + 1).is_multiple_of(every));
    let same = list.len() == layers
        && list
            .iter()
            .enumerate()
            .all(|(l, item)| item.as_i64() == Some(i64::from(rotates(l))));
    match same {
        true => Ok(()),
        false => Err(reader.error(
            "no_rope_layers",
            "other layers than usual do not rotate, which is not supported",
        )),
    }
}

/// Which layers look back how far.
fn windows(
    reader: &Reader,
    architecture: Architecture,
    layers: usize,
    own: &mut Vec<(&str, Value)>,
) -> Result<(), GgufError> {
    use Architecture::{Qwen2, Qwen3};
    let Some(window) = reader.number("sliding_window")? else {
        return Ok(());
    };
    // They name one that is not used.
    let optional =
        matches!(architecture, Qwen2 | Qwen3) || reader.get("use_sliding_window").is_some();
    if optional && reader.flag("use_sliding_window") != Some(true) {
        return Ok(());
    }
    let each: Option<Vec<bool>> = match reader.get("layer_types").and_then(Json::as_array) {
        Some(list) if list.len() == layers => Some(
            list.iter()
                .map(|item| item.as_str() == Some("sliding_attention"))
                .collect(),
        ),
        Some(list) => {
            let problem = format!("has {} for {layers} layers", list.len());
            return Err(reader.error("layer_types", problem));
        }
        None => match reader.number("max_window_layers")? {
            Some(first) if optional => Some((0..layers).map(|l| l >= first).collect()),
            _ => None,
        },
    };
    if let Some(each) = each {
        if !each.contains(&true) {
            return Ok(());
        }
        let items = each.into_iter().map(Value::Bool).collect();
        own.push((
            "attention.sliding_window_pattern",
            Value::Array(ValueType::Bool, items),
        ));
    } else if let Some(every) = reader.number("sliding_window_pattern")? {
        own.push(("attention.sliding_window_pattern", u32_value(every)));
    }
    own.push(("attention.sliding_window", u32_value(window)));
    Ok(())
}

/// How positions turn queries and keys.
struct Rotated {
    base: f64,
    /// Values of a head that are turned.
    dim: usize,
    context: Option<usize>,
}

impl Rotated {
    fn scaling(
        &self,
        reader: &Reader,
        scaling: &Json,
        own: &mut Vec<(&str, Value)>,
        factors: &mut Vec<(&'static str, Vec<f32>)>,
    ) -> Result<(), GgufError> {
        const KEY: &str = "rope_scaling";
        let kind = scaling
            .get("rope_type")
            .or(scaling.get("type"))
            .and_then(Json::as_str);
        let float = |key: &str| {
            float_of(scaling.get(key))
                .map_err(|problem| reader.error(KEY, format!("{key}: {problem}")))
        };
        let needed = |key: &str| {
            let value = float(key)?.filter(|v| v.is_finite() && *v > 0.0);
            value.ok_or_else(|| {
                reader.error(KEY, format!("{key} is missing, or no positive number"))
            })
        };
        // Phi has it outside.
        let original = match float("original_max_position_embeddings")? {
            Some(length) => Some(length),
            None => reader.float("original_max_position_embeddings")?,
        };
        let text = |text: &str| Value::String(text.into());
        let put_original = |own: &mut Vec<(&str, Value)>| {
            if let Some(length) = original {
                own.push((
                    "rope.scaling.original_context_length",
                    Value::U32(length as u32),
                ));
            }
        };
        match kind {
            None | Some("default") => {}
            Some("linear") => {
                own.push(("rope.scaling.type", text("linear")));
                own.push(("rope.scaling.factor", Value::F32(needed("factor")? as f32)));
            }
            Some("yarn") => {
                own.push(("rope.scaling.type", text("yarn")));
                let factor = needed("factor")?;
                own.push(("rope.scaling.factor", Value::F32(factor as f32)));
                put_original(own);
                for (key, name) in [
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(value) = float(key)? {
                        own.push((name, Value::F32(value as f32)));
                    }
                }
                if let Some(magnitude) = float("attention_factor")? {
                    // The factor by itself, where GGUF has what it is more than YaRN's own.
                    let usual = if factor > 1.0 {
                        1.0 + 0.1 * factor.ln()
                    } else {
                        1.0
                    };
                    own.push((
                        "rope.scaling.yarn_attn_factor",
                        Value::F32((magnitude / usual) as f32),
                    ));
                }
                if ["mscale", "mscale_all_dim"]
                    .iter()
                    .any(|key| scaling.get(key).is_some())
                {
                    return Err(reader.error(KEY, "mscale is not supported"));
                }
            }
            Some("llama3") => {
                let (factor, low, high) = (
                    needed("factor")?,
                    needed("low_freq_factor")?,
                    needed("high_freq_factor")?,
                );
                let original = needed("original_max_position_embeddings")?;
                factors.push((
                    "rope_freqs.weight",
                    self.llama3(factor, low, high, original),
                ));
            }
            Some("longrope" | "su") => {
                own.push(("rope.scaling.type", text("longrope")));
                put_original(own);
                for (key, name) in [
                    ("long_factor", "rope_factors_long.weight"),
                    ("short_factor", "rope_factors_short.weight"),
                ] {
                    let list = scaling.get(key).and_then(Json::as_array);
                    let values: Option<Vec<f32>> = list.and_then(|list| {
                        list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect()
                    });
                    let values = values.filter(|values| values.len() == self.dim / 2);
                    let values = values.ok_or_else(|| {
                        reader.error(
                            KEY,
                            format!("{key} is missing, or not {} numbers", self.dim / 2),
                        )
                    })?;
                    factors.push((name, values));
                }
                let magnitude = match (float("attention_factor")?, self.context, original) {
                    (Some(magnitude), ..) => magnitude,
                    (None, Some(context), Some(original)) if context as f64 > original => {
                        let stretched = context as f64 / original;
                        (1.0 + stretched.ln() / original.ln()).sqrt()
                    }
                    _ => 1.0,
                };
                own.push(("rope.scaling.attn_factor", Value::F32(magnitude as f32)));
            }
            Some(other) => {
                let problem = format!(
                    "{other:?} is not supported (default, linear, yarn, llama3 and longrope are)"
                );
                return Err(reader.error(KEY, problem));
            }
        }
        Ok(())
    }

    /// What frequencies are divided by: short waves by nothing, long ones by the factor, and between them by something between.
    fn llama3(&self, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
        let of_pair = |i: usize| {
            let frequency = self.base.powf(-2.0 * i as f64 / self.dim as f64);
            let wave = 2.0 * std::f64::consts::PI / frequency;
            if wave < original / high {
                1.0
            } else if wave > original / low {
                factor
            } else {
                let smooth = (original / wave - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        (0..self.dim / 2).map(|i| of_pair(i) as f32).collect()
    }
}
