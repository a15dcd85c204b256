//! Perplexity, by the protocol of llama.cpp's `llama-perplexity`.

use crate::count::count;
use crate::kernels::{Phase, Runtime, Team};
use crate::model::{
    Batch, CacheType, KvPool, Model, ModelError, Scratch, Unobserved, negative_log_likelihoods,
};
use crate::progress::{Cancelled, Progress, report};

/// Rows of logits that are held at a time; a vocabulary of 128k makes 32 MiB of them.
const LOGIT_ROWS: usize = 64;
/// Tokens of a chunk that go through the model together.
const BATCH: usize = 512;

/// What to score.
#[derive(Debug, Clone, Copy)]
pub struct PerplexityOptions {
    /// Tokens of a chunk; every chunk is scored on its own.
    pub context: usize,
    /// Score only so many chunks from the start.
    pub chunks: Option<usize>,
    /// Score every position of a chunk but the first, as the pruning papers do; else the second half, as llama.cpp does.
    pub all_positions: bool,
    /// How keys and values are stored.
    pub cache_type: CacheType,
}

impl PerplexityOptions {
    /// Tokens of a text that are looked at; [`usize::MAX`] where all of it is scored.
    pub fn most_tokens(&self) -> usize {
        let chunks = self.chunks.map_or(usize::MAX, |chunks| chunks.max(1));
        chunks.saturating_mul(self.context)
    }
}

/// The result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// e to the mean negative log-likelihood.
    pub perplexity: f64,
    /// Its standard error, from the spread of the log-likelihoods.
    pub stderr: f64,
    /// Predictions that were scored.
    pub tokens: usize,
    pub chunks: usize,
}

/// Why there is no perplexity.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the context must be at least 4 tokens, found {0}")]
    Context(usize),
    #[error(
        "the text has {}, and one chunk takes {context}",
        count(tokens, "token")
    )]
    TooShort { tokens: usize, context: usize },
    /// It was called off behind some of the chunks; this is what they came to.
    #[error("cancelled after {}", count(.0.chunks, "chunk"))]
    Stopped(Perplexity),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error("the model's output in chunk {chunk} is not a number (NaN); its weights are damaged")]
    NotANumber { chunk: usize },
}

/// Scores `tokens`, a text that was tokenised whole. It is cut into chunks of `context`; what is left over is not used. In
/// each chunk the predictions for positions context / 2 + 1 to context − 1 count (with `all_positions`, 1 to context − 1).
/// Where the model wants a beginning-of-sequence token, `bos`, it takes the place of each chunk's first token.
///
/// `progress` is called after every chunk with the number of chunks done and their total; the figure so far is logged.
///
/// # Errors
/// [`PerplexityError`].
pub fn perplexity(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    bos: Option<u32>,
    options: PerplexityOptions,
    progress: &mut Progress,
) -> Result<Perplexity, PerplexityError> {
    let context = options.context;
    if context < 4 {
        return Err(PerplexityError::Context(context));
    }
    let available = tokens.len() / context;
    if available == 0 {
        return Err(PerplexityError::TooShort {
            tokens: tokens.len(),
            context,
        });
    }
    let chunks = options.chunks.map_or(available, |n| n.clamp(1, available));
    let first = if options.all_positions {
        0
    } else {
        context / 2
    };

    let pool = KvPool::new(model, options.cache_type)?;
    let (mut batch, mut scratch, mut logits) = (Batch::new(), Scratch::new(), Vec::new());
    let mut losses = Losses::default();
    for (c, chunk) in tokens.chunks_exact(context).take(chunks).enumerate() {
        let mut input = chunk.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        let mut cache = pool.cache(context);
        runtime.region(|team| {
            for (b, tokens) in input.chunks(BATCH).enumerate() {
                // Token i of the batch predicts position b · BATCH + i + 1.
                let start = b * BATCH;
                let end = (start + tokens.len()).min(context - 1);
                let scored = start.max(first)..end.max(start.max(first));
                batch.clear();
                let wanted = scored.start - start..scored.end - start;
                batch.add_prompt(0, start, tokens, wanted);
                let sequences = &mut [&mut cache];
                model.forward(team, batch.rows(), sequences, &mut scratch, &mut Unobserved)?;
                for row in scored.clone().step_by(LOGIT_ROWS) {
                    let rows = row..(row + LOGIT_ROWS).min(end);
                    let these = rows.start - scored.start..rows.end - scored.start;
                    model.logits(team, Phase::Prefill, these, &mut scratch, &mut logits);
                    losses.add(team, &logits, &chunk[rows.start + 1..rows.end + 1]);
                }
            }
            Ok::<_, PerplexityError>(())
        })?;
        if !losses.sum.is_finite() {
            return Err(PerplexityError::NotANumber { chunk: c });
        }
        let so_far = losses.perplexity(c + 1).perplexity;
        tracing::info!("chunk {}: perplexity {so_far:.4}", c + 1);
        if report(progress, c + 1, chunks).is_err() {
            return Err(PerplexityError::Stopped(losses.perplexity(c + 1)));
        }
    }
    Ok(losses.perplexity(chunks))
}

#[derive(Default)]
struct Losses {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Losses {
    /// Adds the negative log-likelihoods of `targets` under logits `[targets.len(), vocabulary]`.
    fn add(&mut self, team: &Team, logits: &[f32], targets: &[u32]) {
        // Summed in order, so that the result does not depend on the threads.
        for loss in negative_log_likelihoods(team, logits, targets) {
            self.count += 1;
            self.sum += loss;
            self.squares += loss * loss;
        }
    }

    fn perplexity(&self, chunks: usize) -> Perplexity {
        let n = self.count as f64;
        let mean = self.sum / n;
        let variance = (self.squares / n - mean * mean).max(0.0);
        let perplexity = mean.exp();
        Perplexity {
            perplexity,
            stderr: if self.count > 1 {
                perplexity * (variance / (n - 1.0)).sqrt()
            } else {
                0.0
            },
            tokens: self.count,
            chunks,
        }
    }
}
