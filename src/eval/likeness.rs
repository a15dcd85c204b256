//! What a model predicts on a text, and how far another is from it.

use std::ops::Range;

use super::perplexity::PerplexityError;
use crate::kernels::{Phase, Runtime, Team};
use crate::model::{
    Batch, CacheType, KvPool, Model, Predictions, Scratch, Unobserved, negative_log_likelihoods,
};
use crate::progress::{Progress, report};

/// Rows of logits that are held at a time.
const LOGIT_ROWS: usize = 64;
/// Positions at the end of each sequence whose whole predictions are kept: a vocabulary of 128k takes 16 MiB for them.
const ENDS: usize = 32;

/// What a model predicts on a text, in sequences that start afresh.
pub struct Predicted {
    sequence: usize,
    losses: Vec<f64>,
    /// The most likely token of every position.
    best: Vec<u32>,
    /// The whole predictions of the last positions of every sequence.
    ends: Predictions,
}

/// How a model predicts a text beside another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likeness {
    /// The perplexity of the other model, and of this one.
    pub other: f64,
    pub this: f64,
    /// The mean KL(other ‖ this) at the ends of sequences, in nats.
    pub divergence: f64,
    /// The share of positions at which both hold the same token most likely.
    pub agreement: f64,
}

impl Predicted {
    /// Runs a text through a model in whole sequences of so many tokens, of which all positions but the first are predicted. Where the model
    /// wants a token in front, `bos`, it takes the place of each sequence's first.
    ///
    /// `progress` counts sequences.
    ///
    /// # Errors
    /// [`PerplexityError`].
    pub fn new(
        model: &Model,
        runtime: &Runtime,
        tokens: &[u32],
        bos: Option<u32>,
        sequence: usize,
        progress: &mut Progress,
    ) -> Result<Self, PerplexityError> {
        let mut predicted = Self {
            sequence,
            losses: Vec::new(),
            best: Vec::new(),
            ends: Predictions::default(),
        };
        let Self {
            losses, best, ends, ..
        } = &mut predicted;
        let vocabulary = model.config.vocabulary;
        each(
            model,
            runtime,
            tokens,
            bos,
            sequence,
            progress,
            &mut |team, rows| {
                losses.extend(negative_log_likelihoods(team, rows.logits, rows.targets));
                best.extend(most_likely(team, rows.logits, vocabulary));
                ends.add(team, rows.of_ends(vocabulary), vocabulary);
            },
        )?;
        Ok(predicted)
    }

    /// Runs the same text through another model.
    ///
    /// # Errors
    /// [`PerplexityError`].
    pub fn compare(
        &self,
        model: &Model,
        runtime: &Runtime,
        tokens: &[u32],
        bos: Option<u32>,
        progress: &mut Progress,
    ) -> Result<Likeness, PerplexityError> {
        let (mut loss, mut same, mut done) = (0.0, 0, 0);
        let (mut divergence, mut ends) = (0.0, 0);
        let vocabulary = model.config.vocabulary;
        each(
            model,
            runtime,
            tokens,
            bos,
            self.sequence,
            progress,
            &mut |team, rows| {
                // Summed in order, so that the result does not depend on the threads.
                let losses = negative_log_likelihoods(team, rows.logits, rows.targets);
                loss += losses.iter().sum::<f64>();
                let best = most_likely(team, rows.logits, vocabulary);
                same += best
                    .iter()
                    .zip(&self.best[done..])
                    .filter(|(a, b)| a == b)
                    .count();
                done += best.len();
                let divergences = self.ends.divergences(team, ends, rows.of_ends(vocabulary));
                divergence += divergences.iter().sum::<f64>();
                ends += divergences.len();
            },
        )?;
        let mean = |sum: f64, count: usize| sum / count.max(1) as f64;
        Ok(Likeness {
            other: mean(self.losses.iter().sum(), self.losses.len()).exp(),
            this: mean(loss, done).exp(),
            divergence: mean(divergence, ends).max(0.0),
            agreement: mean(same as f64, done),
        })
    }
}

/// Rows of logits, and what comes behind.
struct Rows<'a> {
    logits: &'a [f32],
    targets: &'a [u32],
    /// Which of the rows are at the end of a sequence.
    ends: Range<usize>,
}

impl<'a> Rows<'a> {
    fn of_ends(&self, vocabulary: usize) -> &'a [f32] {
        &self.logits[self.ends.start * vocabulary..self.ends.end * vocabulary]
    }
}

/// Shows the logits of every position of a text that has another behind it in its sequence.
fn each(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    bos: Option<u32>,
    sequence: usize,
    progress: &mut Progress,
    show: &mut (dyn FnMut(&Team, Rows) + Send),
) -> Result<(), PerplexityError> {
    let count = tokens.len() / sequence.max(1);
    if sequence < 4 {
        return Err(PerplexityError::Context(sequence));
    }
    if count == 0 {
        return Err(PerplexityError::TooShort {
            tokens: tokens.len(),
            context: sequence,
        });
    }
    let pool = KvPool::new(model, CacheType::F16)?;
    let (mut batch, mut scratch, mut logits) = (Batch::new(), Scratch::new(), Vec::new());
    let predicted = sequence - 1;
    for (chunk, number) in tokens.chunks_exact(sequence).zip(0..) {
        let mut input = chunk[..predicted].to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        let mut cache = pool.cache(sequence);
        batch.clear();
        batch.add_prompt(0, 0, &input, 0..predicted);
        runtime.region(|team| {
            let sequences = &mut [&mut cache];
            model.forward(team, batch.rows(), sequences, &mut scratch, &mut Unobserved)?;
            for first in (0..predicted).step_by(LOGIT_ROWS) {
                let end = (first + LOGIT_ROWS).min(predicted);
                model.logits(team, Phase::Prefill, first..end, &mut scratch, &mut logits);
                if logits.iter().any(|l| l.is_nan()) {
                    return Err(PerplexityError::NotANumber { chunk: number });
                }
                let of_ends = predicted.saturating_sub(ENDS).clamp(first, end);
                let rows = Rows {
                    logits: &logits,
                    targets: &chunk[first + 1..end + 1],
                    ends: of_ends - first..end - first,
                };
                show(team, rows);
            }
            Ok::<_, PerplexityError>(())
        })?;
        report(progress, number + 1, count)?;
    }
    Ok(())
}

/// The most likely token of every row; of equals the first.
fn most_likely(team: &Team, logits: &[f32], vocabulary: usize) -> Vec<u32> {
    team.map(logits.len() / vocabulary, |i| {
        let row = &logits[i * vocabulary..][..vocabulary];
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter().position(|l| *l == best).unwrap_or(0) as u32
    })
}
