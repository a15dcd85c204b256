//! What pruning does to predictions: perplexity before and after, on text of the calibration's source and on the built-in one.

use super::Engine;
use super::collection::EFFECT_TOKENS;
use super::error::{Doing, EngineError};
use super::events::{Events, Stage};
use super::report::{Effect, EffectText};
use super::text::first_tokens;
use crate::eval::{self, PerplexityOptions};
use crate::kernels::Runtime;
use crate::model::{CacheType, Model};
use crate::progress::Progress;
use crate::prune::calibrate;

/// Tokens of a sequence that perplexities are measured on here.
const CONTEXT: usize = 256;
/// Tokens below which a perplexity tells nothing.
const LEAST_TOKENS: usize = 128;

/// The perplexity of a model on a text, in sequences of 256 tokens of which all positions but the first count.
pub(super) fn perplexity(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    bos: Option<u32>,
    progress: &mut Progress,
) -> Result<f64, EngineError> {
    let options = PerplexityOptions {
        context: CONTEXT.min(model.config.context_length).min(tokens.len()),
        chunks: None,
        all_positions: true,
        cache_type: CacheType::F16,
    };
    let measured = eval::perplexity(model, runtime, tokens, bos, options, progress)?;
    Ok(measured.perplexity)
}

/// Texts, and how well the model predicted them when it was dense.
pub(super) struct Probe {
    texts: Vec<ProbeText>,
    bos: Option<u32>,
}

struct ProbeText {
    text: EffectText,
    /// What messages call it.
    name: String,
    tokens: Vec<u32>,
    dense: f64,
}

impl Probe {
    /// Measures the dense model on tokens of a source that statistics have `unseen`. Where there are too few of them, there is nothing
    /// to measure.
    pub fn new(
        engine: &Engine,
        unseen: &[u32],
        source: &str,
        bos: Option<u32>,
        events: &mut Events,
    ) -> Result<Self, EngineError> {
        let mut probe = Self {
            texts: Vec::new(),
            bos,
        };
        if unseen.len() < LEAST_TOKENS {
            return Ok(probe);
        }
        let built_in = first_tokens(engine.tokenizer()?, calibrate::TEXT, EFFECT_TOKENS)?;
        for (text, name, tokens) in [
            (EffectText::Unseen, source.to_owned(), unseen.to_vec()),
            (
                EffectText::BuiltIn,
                "the built-in text".to_owned(),
                built_in,
            ),
        ] {
            let doing = Doing::EffectBefore { text: name.clone() };
            let dense = probe.measure(engine, &tokens, doing, events)?;
            probe.texts.push(ProbeText {
                text,
                name,
                tokens,
                dense,
            });
        }
        Ok(probe)
    }

    /// Measures the pruned model.
    pub fn effects(
        &self,
        engine: &Engine,
        events: &mut Events,
    ) -> Result<Vec<Effect>, EngineError> {
        let mut effects = Vec::new();
        for text in &self.texts {
            let doing = Doing::EffectAfter {
                text: text.name.clone(),
            };
            effects.push(Effect {
                text: text.text,
                tokens: text.tokens.len(),
                before: text.dense,
                after: self.measure(engine, &text.tokens, doing, events)?,
            });
        }
        Ok(effects)
    }

    fn measure(
        &self,
        engine: &Engine,
        tokens: &[u32],
        doing: Doing,
        events: &mut Events,
    ) -> Result<f64, EngineError> {
        let progress = &mut Stage::Effects.progress(events);
        perplexity(&engine.model, &engine.runtime, tokens, self.bos, progress)
            .map_err(EngineError::at(doing))
    }
}
