//! What models predict of sequences, by the forward pass that they are used with.

use crate::kernels::{Phase, Team};
use crate::model::{Batch, CacheType, KvCache, KvPool, Model, ModelError, Scratch, Unobserved};

/// Rows whose logits are held at a time.
pub const LOGIT_ROWS: usize = 256;

/// A model that predicts, and the memory that it takes for that.
pub struct Predictor<'m> {
    model: &'m Model,
    caches: Vec<KvCache>,
    batch: Batch,
    scratch: Scratch,
}

impl<'m> Predictor<'m> {
    /// For so many sequences of so many tokens at a time.
    ///
    /// # Errors
    /// If there is no memory for keys and values.
    pub fn new(model: &'m Model, sequences: usize, length: usize) -> Result<Self, ModelError> {
        let pool = KvPool::new(model, CacheType::F16)?;
        Ok(Self {
            model,
            caches: (0..sequences).map(|_| pool.cache(length)).collect(),
            batch: Batch::new(),
            scratch: Scratch::new(),
        })
    }

    /// Reads sequences of `length` tokens, at most as many as it was made for.
    ///
    /// # Errors
    /// Those of [`Model::forward`].
    pub fn read(&mut self, team: &Team, tokens: &[u32], length: usize) -> Result<(), ModelError> {
        self.batch.clear();
        for (i, tokens) in tokens.chunks(length).enumerate() {
            self.caches[i].truncate(0);
            self.batch.add_prompt(i, 0, tokens, 0..length);
        }
        let sequences = tokens.len() / length;
        let mut caches: Vec<&mut KvCache> = self.caches[..sequences].iter_mut().collect();
        let (rows, scratch) = (self.batch.rows(), &mut self.scratch);
        self.model
            .forward(team, rows, &mut caches, scratch, &mut Unobserved)
    }

    /// The logits of some of the tokens that were read.
    pub fn logits(&mut self, team: &Team, rows: std::ops::Range<usize>, out: &mut Vec<f32>) {
        self.model
            .logits(team, Phase::Prefill, rows, &mut self.scratch, out);
    }
}
