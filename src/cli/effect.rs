//! What pruning does to predictions: perplexity before and after, on the user's kind of text and on the built-in one.

use anyhow::{Context, Result};
use flapjack::eval::{self, PerplexityOptions};
use flapjack::kernels::Runtime;
use flapjack::model::{CacheType, Model};
use flapjack::prune::calibrate;

use super::calibration::{Calibrated, EFFECT_TOKENS, first_tokens};
use super::options::Loaded;

/// Tokens of a sequence that perplexities are measured on here.
const CONTEXT: usize = 256;
/// Fewer tokens than this tell nothing.
const LEAST_TOKENS: usize = 128;

/// The perplexity of a model on a text, in sequences of 256 tokens of which all positions but the first count.
pub fn perplexity(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    bos: Option<u32>,
) -> Result<f64> {
    let context = CONTEXT.min(model.config.context_length).min(tokens.len());
    let options = PerplexityOptions {
        context,
        chunks: None,
        all_positions: true,
        cache_type: CacheType::F16,
    };
    Ok(eval::perplexity(
        model,
        runtime,
        tokens,
        bos,
        options,
        &mut flapjack::progress::ignore,
    )?
    .perplexity)
}

/// The texts that the effect is measured on.
pub struct Probe {
    texts: Vec<Text>,
    bos: Option<u32>,
}

struct Text {
    name: String,
    tokens: Vec<u32>,
    dense: f64,
}

/// The perplexity on one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Effect {
    /// What text.
    pub text: String,
    pub tokens: usize,
    pub before: f64,
    pub after: f64,
}

impl Probe {
    /// Measures the dense model, if it was calibrated on a text of the user's of which enough is left that statistics have not
    /// seen.
    pub fn new(loaded: &Loaded, calibrated: &Calibrated) -> Result<Option<Self>> {
        let own = &calibrated.unseen;
        if own.len() < LEAST_TOKENS {
            return Ok(None);
        }
        let source = &calibrated.stored.origin.source;
        let built_in = first_tokens(&loaded.tokenizer, calibrate::TEXT, EFFECT_TOKENS)?;
        let own = (format!("{source}, not seen by statistics"), own.clone());
        let bos = calibrated.bos;
        let measure = |(name, tokens): (String, Vec<u32>)| {
            let dense = perplexity(&loaded.model, &loaded.runtime, &tokens, bos)
                .with_context(|| format!("measuring the dense model on {name}"))?;
            Ok(Text {
                name,
                tokens,
                dense,
            })
        };
        let texts = [own, ("the built-in text".to_owned(), built_in)];
        let texts = texts.into_iter().map(measure).collect::<Result<_>>()?;
        Ok(Some(Self { texts, bos }))
    }

    /// Measures the pruned model.
    pub fn effects(self, model: &Model, runtime: &Runtime) -> Result<Vec<Effect>> {
        let bos = self.bos;
        let effect = |text: Text| {
            let after = perplexity(model, runtime, &text.tokens, bos)
                .with_context(|| format!("measuring the pruned model on {}", text.name))?;
            Ok(Effect {
                tokens: text.tokens.len(),
                text: text.name,
                before: text.dense,
                after,
            })
        };
        self.texts.into_iter().map(effect).collect()
    }
}
