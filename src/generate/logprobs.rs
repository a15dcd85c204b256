//! How likely the model holds tokens: logarithms of probabilities, from its logits as they are, before anything about sampling.

use std::ops::Range;

use super::GenerateError;
use crate::kernels::{Phase, Team};
use crate::model::{Model, Scratch};

/// Rows of logits that are there at a time: those of a long prompt together would take more memory than the model.
const ROWS: usize = 32;

/// How likely the model held a token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The tokens that were most likely in its place and their logarithms, from the most likely on; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// The distribution that a row of logits stands for.
#[derive(Debug)]
pub(super) struct Distribution {
    /// The logarithm of the sum of the logits' exponentials.
    total: f64,
    top: Vec<(u32, f32)>,
}

impl Distribution {
    /// `None` if a logit is not a number.
    pub fn new(logits: &[f32], top: usize) -> Option<Self> {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // `max` passes over what is not a number, the sum does not.
        let sum: f64 = logits
            .iter()
            .map(|logit| match *logit == best {
                true => 1.0,
                false => f64::from((logit - best).exp()),
            })
            .sum();
        if sum.is_nan() {
            return None;
        }
        let total = f64::from(best) + sum.ln();
        let top = most_likely(logits, top)
            .into_iter()
            .map(|(token, logit)| (token, logarithm(logit, total)))
            .collect();
        Some(Self { total, top })
    }

    /// How likely it holds a token, whose logit this is.
    pub fn of(self, token: u32, logit: f32) -> TokenLogprob {
        TokenLogprob {
            token,
            logprob: logarithm(logit, self.total),
            top: self.top,
        }
    }
}

fn logarithm(logit: f32, total: f64) -> f32 {
    // Of equal infinities the difference is not a number.
    match f64::from(logit) == total {
        true => 0.0,
        false => (f64::from(logit) - total) as f32,
    }
}

/// The n tokens with the greatest logits, in their order; of equals the first.
fn most_likely(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n.min(logits.len()) + 1);
    for (token, logit) in logits.iter().enumerate() {
        if top.len() == n && top.last().is_none_or(|(_, least)| logit <= least) {
            continue;
        }
        let place = top.partition_point(|(_, other)| other >= logit);
        top.insert(place, (token as u32, *logit));
        top.truncate(n);
    }
    top
}

/// How likely the model holds the tokens of a prompt, taken down while it goes through the model.
#[derive(Debug)]
pub(super) struct PromptScores {
    prompt: Vec<u32>,
    /// The position of the prompt's first token.
    position: usize,
    top: usize,
    /// Those of the prompt's second token and of those behind it, as far as it has gone.
    scores: Vec<TokenLogprob>,
    /// Whether a logit was not a number.
    failed: bool,
    logits: Vec<f32>,
}

impl PromptScores {
    pub fn new(prompt: Vec<u32>, position: usize, top: usize) -> Self {
        Self {
            prompt,
            position,
            top,
            scores: Vec::new(),
            failed: false,
            logits: Vec::new(),
        }
    }

    /// Forgets what there is of a prompt that has not gone through the model as a whole, and now begins anew.
    pub fn restart(&mut self) {
        if self.scores.len() + 1 < self.prompt.len() {
            self.scores.clear();
        }
    }

    pub fn scores(&self) -> &[TokenLogprob] {
        &self.scores
    }

    /// # Errors
    /// If a logit was not a number.
    pub fn check(&self) -> Result<(), GenerateError> {
        let position = self.position + self.scores.len();
        match self.failed {
            true => Err(GenerateError::NotANumber { position }),
            false => Ok(()),
        }
    }

    /// Takes the next rows of the prompt, which are these of those rows of the last batch whose logits are wanted. Behind the
    /// prompt's last token there is none to score, and none behind a logit that is not a number.
    pub fn take(&mut self, model: &Model, team: &Team, scratch: &mut Scratch, rows: Range<usize>) {
        let vocabulary = model.config.vocabulary;
        for first in rows.clone().step_by(ROWS) {
            let next = 1 + self.scores.len();
            let targets = &self.prompt[next.min(self.prompt.len())..];
            let count = targets.len().min(ROWS).min(rows.end - first);
            if count == 0 || self.failed {
                break;
            }
            let piece = first..first + count;
            model.logits(team, Phase::Prefill, piece, scratch, &mut self.logits);
            let (logits, top) = (&self.logits, self.top);
            let scores = team.map(count, |i| {
                let logits = &logits[i * vocabulary..][..vocabulary];
                let distribution = Distribution::new(logits, top)?;
                Some(distribution.of(targets[i], logits[targets[i] as usize]))
            });
            self.failed = scores.contains(&None);
            self.scores
                .extend(scores.into_iter().map_while(|score| score));
        }
    }
}
