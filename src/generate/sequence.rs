//! A text that a model goes on with.

use super::GenerateError;
use super::logprobs::PromptScores;
use crate::kernels::{Phase, Runtime};
use crate::model::{Batch, KvCache, Model, Scratch, Unobserved};

/// Tokens of a prompt that go through the model together: enough to use every decoded weight often, few enough that
/// their activations stay in the cache.
pub(super) const PROMPT_BATCH: usize = 512;

/// A text, as far as a model has seen it. A clone shares what is there with the original, and goes its own way from then on.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub(super) cache: KvCache,
    /// The tokens that the cache holds.
    tokens: Vec<u32>,
    /// Generated tokens that the model has not seen yet, because nothing was asked for behind them.
    unseen: Vec<u32>,
}

/// Buffers of forward passes, which are used again.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    batch: Batch,
    scratch: Scratch,
    /// The logits behind the last token, `[vocabulary]`.
    pub logits: Vec<f32>,
    /// How likely the prompt's tokens are; `None` if nobody wants to know.
    pub scores: Option<PromptScores>,
}

impl Buffers {
    pub fn new(scores: Option<PromptScores>) -> Self {
        Self {
            scores,
            ..Self::default()
        }
    }
}

impl Sequence {
    /// An empty text on an empty cache.
    ///
    /// # Panics
    /// If the cache holds positions, whose tokens nobody knows.
    pub fn new(cache: KvCache) -> Self {
        assert!(cache.is_empty(), "an empty cache");
        Self {
            cache,
            tokens: Vec::new(),
            unseen: Vec::new(),
        }
    }

    /// The tokens that the model has seen.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that the model has seen.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Positions that are left.
    pub fn room(&self) -> usize {
        self.cache.capacity() - self.cache.len()
    }

    /// Positions in all.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
        self.tokens.truncate(len);
        self.unseen.clear();
    }

    /// What a prompt adds to: the generated tokens that the model has not seen, and the prompt.
    pub(super) fn continued_by(&self, prompt: &[u32]) -> Vec<u32> {
        [&self.unseen, prompt].concat()
    }

    /// Notes a generated token that the model has not seen.
    pub(super) fn leave_unseen(&mut self, token: u32) {
        self.unseen.push(token);
    }

    /// Takes a piece of a prompt in, of at most [`PROMPT_BATCH`] tokens; where it is the last one, the logits behind its last
    /// token are then in `buffers`.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or there is no room for it.
    pub(super) fn feed_prompt(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        piece: &[u32],
        is_last: bool,
        buffers: &mut Buffers,
    ) -> Result<(), GenerateError> {
        let wanted = match &buffers.scores {
            Some(_) => 0,
            None => piece.len() - usize::from(is_last),
        };
        buffers.batch.clear();
        let position = self.cache.len();
        let wanted = wanted..piece.len();
        buffers.batch.add_prompt(0, position, piece, wanted);
        self.feed(model, runtime, piece, buffers)
    }

    /// Takes a generated token in; the logits behind it are then in `buffers`.
    ///
    /// # Errors
    /// If it is not in the vocabulary, or there is no room for it.
    pub(super) fn feed_generated(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        token: u32,
        buffers: &mut Buffers,
    ) -> Result<(), GenerateError> {
        buffers.batch.clear();
        buffers.batch.add_generated(0, self.cache.len(), token);
        self.feed(model, runtime, &[token], buffers)
    }

    /// Runs the batch in `buffers`, which has these tokens.
    fn feed(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        tokens: &[u32],
        buffers: &mut Buffers,
    ) -> Result<(), GenerateError> {
        let Buffers {
            batch,
            scratch,
            logits,
            scores,
        } = buffers;
        let rows = batch.rows();
        let wanted = rows.iter().filter(|row| row.wants_logits).count();
        let sequences = &mut [&mut self.cache];
        runtime.region(|team| {
            model.forward(team, rows, sequences, scratch, &mut Unobserved)?;
            if let Some(scores) = scores {
                scores.take(model, team, scratch, 0..wanted);
                scores.check()?;
            }
            if wanted > 0 {
                model.logits(team, Phase::Decode, wanted - 1..wanted, scratch, logits);
            }
            Ok::<_, GenerateError>(())
        })?;
        self.tokens.extend_from_slice(tokens);
        self.unseen.clear();
        Ok(())
    }
}
