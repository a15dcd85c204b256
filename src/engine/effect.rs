//! What pruning does to predictions: perplexity, divergence and the most likely tokens before and after, on text of the mixture that is
//! held back, and on text of the calibration's source.

use super::Engine;
use super::error::{Doing, EngineError};
use super::events::{Events, Stage};
use super::mixture::JUDGED;
use super::report::{Notice, PruneReport};
use super::text::first_tokens;
use crate::eval::{self, PerplexityOptions, Predicted};
use crate::kernels::Runtime;
use crate::model::{CacheType, Model};
use crate::progress::Progress;
use crate::prune::bits::TypeChanges;
use crate::prune::{Effect, EffectText, Target, calibrate};

/// Tokens below which a perplexity tells nothing.
const LEAST_TOKENS: usize = 128;
/// Where the perplexity becomes more than so many times as high, whoever pruned is warned.
pub const NOTABLE_RISE: f64 = 1.5;
/// Where it becomes more than so many times as high, most of what the model writes makes no sense.
pub const NONSENSE_RISE: f64 = 4.0;
/// Ratios that are named are whole multiples of one over this.
const STEPS: f64 = 100.0;

/// The perplexity of a model on a text, in sequences of 256 tokens of which all positions but the first count.
pub(super) fn perplexity(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    bos: Option<u32>,
    progress: &mut Progress,
) -> Result<f64, EngineError> {
    let options = PerplexityOptions {
        context: JUDGED.min(model.config.context_length).min(tokens.len()),
        chunks: None,
        all_positions: true,
        cache_type: CacheType::F16,
    };
    let measured = eval::perplexity(model, runtime, tokens, bos, options, progress)?;
    Ok(measured.perplexity)
}

/// Texts, and how the model predicted them when it was dense.
pub(super) struct Probe {
    texts: Vec<ProbeText>,
    bos: Option<u32>,
}

struct ProbeText {
    text: EffectText,
    /// What messages call it.
    name: String,
    tokens: Vec<u32>,
    dense: Predicted,
}

/// What the texts of a probe are made of.
pub(super) struct Unseen<'a> {
    /// The name of the calibration's source.
    pub source: &'a str,
    /// Tokens of the source that nothing was taken from.
    pub tokens: &'a [u32],
    /// Tokens of the mixture that nothing was taken from.
    pub mixture: &'a [u32],
    /// How many tokens of a built-in text stand in for them where there are none.
    pub stand_in: usize,
}

impl Probe {
    /// Measures the dense model. There may be no text for it: then nothing is measured.
    pub fn new(
        engine: &Engine,
        unseen: Unseen,
        bos: Option<u32>,
        events: &mut Events,
    ) -> Result<Self, EngineError> {
        let mut texts = Vec::new();
        if unseen.tokens.len() >= LEAST_TOKENS {
            let name = unseen.source.to_owned();
            texts.push((EffectText::Unseen, name, unseen.tokens.to_vec()));
        }
        if unseen.mixture.len() >= LEAST_TOKENS {
            let name = "the mixture".to_owned();
            texts.push((EffectText::Mixture, name, unseen.mixture.to_vec()));
        } else if let Ok(tokenizer) = engine.tokenizer() {
            let name = "a built-in text".to_owned();
            let tokens = first_tokens(tokenizer, calibrate::HELD_BACK, unseen.stand_in)?;
            texts.push((EffectText::HeldBack, name, tokens));
        }
        let mut probe = Self {
            texts: Vec::new(),
            bos,
        };
        for (text, name, tokens) in texts {
            let sequence = JUDGED.min(engine.model.config.context_length);
            let sequence = sequence.min(tokens.len());
            let doing = Doing::EffectBefore { text: name.clone() };
            let progress = &mut Stage::Effects.progress(events);
            let (model, runtime) = (&engine.model, &engine.runtime);
            let dense = Predicted::new(model, runtime, &tokens, bos, sequence, progress)
                .map_err(EngineError::from)
                .map_err(EngineError::at(doing))?;
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
            let progress = &mut Stage::Effects.progress(events);
            let (model, runtime) = (&engine.model, &engine.runtime);
            let likeness = text
                .dense
                .compare(model, runtime, &text.tokens, self.bos, progress)
                .map_err(EngineError::from)
                .map_err(EngineError::at(doing))?;
            effects.push(Effect {
                text: text.text,
                tokens: text.tokens.len(),
                before: likeness.other,
                after: likeness.this,
                divergence: likeness.divergence,
                agreement: likeness.agreement,
            });
        }
        Ok(effects)
    }
}

/// Tells if predictions have become much worse, and a ratio at which they should not.
pub(super) fn notice(report: &PruneReport) -> Option<Notice> {
    let effects = report.effects.iter();
    let worst = effects.max_by(|a, b| a.rise().total_cmp(&b.rise()))?;
    let allowed = match report.target {
        // It was asked for.
        Target::PerplexityRise(rise) => NOTABLE_RISE.max(1.0 + rise),
        _ => NOTABLE_RISE,
    };
    if worst.rise() <= allowed {
        return None;
    }
    // What is not of the ratio alone cannot be mended by it.
    let types = report.types.as_ref();
    let retyped = types.is_some_and(|types| types.changes != TypeChanges::default());
    Some(Notice::MuchWorse {
        effect: worst.clone(),
        ratio: match report.sparse.is_some() || retyped {
            false => gentler(report.ratio, worst.rise()),
            true => None,
        },
    })
}

/// A ratio at which the perplexity should rise by [`NOTABLE_RISE`] at most, where this one has made it so many times as high. Its logarithm
/// rises from 0, and the faster the more is gone already, so that a proportional part of the ratio costs less than that part.
fn gentler(ratio: f64, rise: f64) -> Option<f64> {
    let ratio = (ratio * NOTABLE_RISE.ln() / rise.ln() * STEPS).floor() / STEPS;
    (ratio > 0.0).then_some(ratio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gentler_ratio_takes_a_proportional_part_of_the_logarithm() {
        // 1.5 to the power of 2 at 0.4 is 1.5 at half of it.
        assert_eq!(gentler(0.41, 2.25), Some(0.2));
        assert_eq!(gentler(0.3, 1.6), Some(0.25));
        // Of what is hardly pruned, or is ruined at once, nothing is left to name.
        assert_eq!(gentler(0.02, 100.0), None);
        assert_eq!(gentler(0.5, f64::INFINITY), None);
    }
}
