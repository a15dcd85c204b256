//! How tokens are chosen, from the fields of a request.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::Model;
use super::body::OneOrMany;
use super::error::ApiError;
use crate::generate::{Request, SamplerConfig};

/// Answers to one prompt that may be asked for at once.
const MOST_CHOICES: usize = 16;
/// Texts that may stop an answer.
const MOST_STOPS: usize = 16;
/// Alternatives that can be told of each token.
pub(super) const MOST_ALTERNATIVES: usize = 20;

/// The fields that all ways to ask have in common. What is not there is as the model recommends it.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct SamplingFields {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    #[serde(alias = "repetition_penalty")]
    repeat_penalty: Option<f32>,
    repeat_last_n: Option<i64>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    /// Token ids to what is added to their logits.
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    stop: Option<OneOrMany<String>>,
    n: Option<usize>,
    /// As in llama.cpp: go on after the model ends its text.
    #[serde(default)]
    ignore_eos: bool,
}

/// What came of the fields.
#[derive(Debug, Clone)]
pub(super) struct Sampling {
    pub config: SamplerConfig,
    pub stop: Vec<String>,
    pub choices: usize,
    pub ignore_end: bool,
}

impl SamplingFields {
    /// # Errors
    /// If a number is out of its range, or there are too many of something.
    pub fn read(self, model: &Model) -> Result<Sampling, ApiError> {
        let mut config = match self.temperature {
            Some(0.0) => model.sampling.clone().without_penalties(),
            _ => model.sampling.clone(),
        };
        let within = |name: &'static str, value: Option<f32>, low: f32, high: f32| match value {
            Some(v) if !(v >= low && v <= high) => Err(ApiError::field(
                name,
                format!("{name} must be from {low} to {high}, and not {v}"),
            )),
            value => Ok(value),
        };
        set(
            &mut config.temperature,
            within("temperature", self.temperature, 0.0, 100.0)?,
        );
        set(&mut config.top_p, within("top_p", self.top_p, 0.0, 1.0)?);
        set(&mut config.min_p, within("min_p", self.min_p, 0.0, 1.0)?);
        set(
            &mut config.typical_p,
            within("typical_p", self.typical_p, 0.0, 1.0)?,
        );
        set(
            &mut config.presence_penalty,
            within("presence_penalty", self.presence_penalty, -2.0, 2.0)?,
        );
        set(
            &mut config.frequency_penalty,
            within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?,
        );
        set(
            &mut config.repetition_penalty,
            within("repeat_penalty", self.repeat_penalty, 0.01, 100.0)?,
        );
        // A negative number means no bound, here as elsewhere.
        set(
            &mut config.top_k,
            self.top_k.map(|k| usize::try_from(k).unwrap_or(0)),
        );
        set(
            &mut config.repetition_window,
            self.repeat_last_n
                .map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        );
        config.logit_bias = biases(self.logit_bias.unwrap_or_default(), model.vocabulary)?;
        config.seed = match self.seed {
            Some(seed) if seed >= 0 => seed as u64,
            _ => rand::random(),
        };
        let choices = self.n.unwrap_or(1);
        if !(1..=MOST_CHOICES).contains(&choices) {
            return Err(ApiError::field(
                "n",
                format!("n must be from 1 to {MOST_CHOICES}"),
            ));
        }
        let stop = self.stop.map(OneOrMany::into_vec).unwrap_or_default();
        if stop.len() > MOST_STOPS {
            return Err(ApiError::field(
                "stop",
                format!("at most {MOST_STOPS} texts can stop an answer"),
            ));
        }
        Ok(Sampling {
            config,
            stop,
            choices,
            ignore_end: self.ignore_eos,
        })
    }
}

impl Sampling {
    /// A request for each choice, whose seeds follow each other.
    pub fn requests(&self, request: &Request) -> Vec<Request> {
        let choice = |i: usize| {
            let mut request = request.clone();
            request.sampler = self.config.clone();
            request.sampler.seed = self.config.seed.wrapping_add(i as u64);
            request.stop = self.stop.clone();
            request.ignore_end = self.ignore_end;
            request
        };
        (0..self.choices).map(choice).collect()
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn biases(fields: BTreeMap<String, f32>, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let bias = |(token, bias): (String, f32)| match token.parse::<u32>() {
        Ok(id) if (id as usize) < vocabulary && bias.is_finite() => Ok((id, bias)),
        _ => Err(ApiError::field(
            "logit_bias",
            format!("{token:?}: {bias} is no token id below {vocabulary} with a number"),
        )),
    };
    fields.into_iter().map(bias).collect()
}

/// How many tokens an answer may have: what is asked for, and what is left behind the prompt.
pub(super) fn answer_tokens(
    asked: Option<i64>,
    prompt: usize,
    context: usize,
) -> Result<usize, ApiError> {
    if prompt > context {
        return Err(ApiError::too_long(prompt, context));
    }
    let left = context - prompt;
    match asked {
        // As llama.cpp's clients say it: until the answer ends by itself.
        None | Some(-1) => Ok(left),
        Some(n) => match usize::try_from(n) {
            Ok(n) => Ok(n.min(left)),
            Err(_) => Err(ApiError::field(
                "max_tokens",
                format!("max_tokens must not be {n}"),
            )),
        },
    }
}

/// What JSON the answer must be, from `response_format`; `None` for any text.
pub(super) fn schema(format: Option<&Value>) -> Result<Option<Value>, ApiError> {
    let Some(format) = format.filter(|format| !format.is_null()) else {
        return Ok(None);
    };
    let wrong = |what: &str| Err(ApiError::field("response_format", what));
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        // llama.cpp takes a schema here too.
        Some("json_object") => {
            let any = serde_json::json!({ "type": "object" });
            Ok(Some(format.get("schema").cloned().unwrap_or(any)))
        }
        Some("json_schema") => {
            let schema = format
                .pointer("/json_schema/schema")
                .or(format.get("schema"));
            match schema {
                Some(schema) => Ok(Some(schema.clone())),
                None => wrong("a format of the type json_schema has json_schema.schema"),
            }
        }
        _ => wrong("the type must be text, json_object or json_schema"),
    }
}
