//! What pruning does to predictions, as data; it is kept with the [outcome](super::Outcome).

use serde::{Deserialize, Serialize};

use super::exact;

/// How a pruned model predicts a text, beside the dense one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effect {
    pub text: EffectText,
    pub tokens: usize,
    /// The perplexity of the dense and of the pruned model.
    pub before: f64,
    pub after: f64,
    /// The mean KL(dense ‖ pruned) of the predictions at the ends of the sequences, in nats.
    pub divergence: f64,
    /// The share of positions at which both hold the same token most likely.
    pub agreement: f64,
}

impl Effect {
    /// How many times as high the perplexity has become.
    pub fn rise(&self) -> f64 {
        self.after / self.before
    }
}

/// What text that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EffectText {
    /// Text of the calibration's source that nothing was taken from.
    Unseen,
    /// Text of the mixture that nothing was taken from.
    Mixture,
    /// A built-in text that no model is calibrated on.
    HeldBack,
}

/// An [`Effect`] with the bits of its numbers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredEffect {
    text: EffectText,
    tokens: usize,
    #[serde(with = "exact::list")]
    numbers: Vec<f64>,
}

impl StoredEffect {
    pub fn new(effect: &Effect) -> Self {
        let Effect {
            text,
            tokens,
            before,
            after,
            divergence,
            agreement,
        } = *effect;
        Self {
            text,
            tokens,
            numbers: vec![before, after, divergence, agreement],
        }
    }

    /// `None` if numbers are missing.
    pub fn effect(&self) -> Option<Effect> {
        let [before, after, divergence, agreement] = self.numbers[..] else {
            return None;
        };
        Some(Effect {
            text: self.text,
            tokens: self.tokens,
            before,
            after,
            divergence,
            agreement,
        })
    }
}
