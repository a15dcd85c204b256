//! Many texts at once, of what the model itself finds likely.

use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::{GenerateError, Sampler, SamplerConfig};
use crate::kernels::{KV_BLOCK, Phase, Runtime};
use crate::memory::Memory;
use crate::model::{Batch, CacheType, KvCache, KvPool, Model, Scratch, Unobserved};
use crate::progress::{Progress, report};

/// Texts that go through the model together at most: with more, reading the weights no longer counts.
const AT_ONCE: usize = 64;
/// What their caches may take, in bytes, if the model itself is not larger than twice this, and half of the memory that is there not
/// smaller.
const CACHES: usize = 512 << 20;

/// What to write.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    pub count: usize,
    /// Tokens of each, all included. A text goes on behind the tokens that end turns or documents.
    pub tokens: usize,
    /// Stands in front of every text, where the model wants one.
    pub bos: Option<u32>,
    /// Each text begins with one of these, drawn evenly. From the same beginning a model tells the same few stories; from any
    /// token of its vocabulary it tells of everything (Liu et al., "LLM-QAT", arXiv 2305.17888, section 3.1).
    pub starts: &'a [u32],
    /// Tokens that stand for something: what the model's output has behind them is never chosen.
    pub vocabulary: usize,
    /// The same seed gives the same texts, whatever the number of threads.
    pub seed: u64,
}

impl Texts<'_> {
    /// Lets the model write, each token drawn with the probability that the model gives it (temperature 1).
    ///
    /// `progress` is called with the number of tokens done and their total.
    ///
    /// # Errors
    /// If a token is not in the model's vocabulary; if a logit is not a number; if it was cancelled.
    ///
    /// # Panics
    /// If there is no token to begin with.
    pub fn write(
        &self,
        model: &Model,
        runtime: &Runtime,
        progress: &mut Progress,
    ) -> Result<Vec<Vec<u32>>, GenerateError> {
        let pool = KvPool::new(model, CacheType::F16)?;
        let cache = pool.block_bytes() * self.tokens.div_ceil(KV_BLOCK);
        let half = Memory::now().map_or(u64::MAX, |memory| memory.for_new() / 2);
        let half = usize::try_from(half).unwrap_or(usize::MAX);
        let room = CACHES.max(model.bytes() / 2).min(half) / cache.max(1);
        let at_once = room.clamp(1, AT_ONCE);
        let mut texts = Vec::with_capacity(self.count);
        while texts.len() < self.count {
            let first = texts.len();
            let numbers = first..self.count.min(first + at_once);
            let done = first * self.tokens;
            let total = self.count * self.tokens;
            texts.extend(
                self.write_some(model, runtime, &pool, numbers, &mut |tokens, _| {
                    progress(done + tokens, total)
                })?,
            );
        }
        Ok(texts)
    }

    /// Some of the texts, by their numbers, in step.
    fn write_some(
        &self,
        model: &Model,
        runtime: &Runtime,
        pool: &KvPool,
        numbers: Range<usize>,
        progress: &mut Progress,
    ) -> Result<Vec<Vec<u32>>, GenerateError> {
        let count = numbers.len();
        let mut texts: Vec<Text> = numbers.map(|i| Text::new(self, i)).collect();
        let mut caches: Vec<KvCache> = (0..count).map(|_| pool.cache(self.tokens)).collect();
        let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
        let (mut batch, mut scratch, mut logits) = (Batch::new(), Scratch::new(), Vec::new());
        for position in 0..self.tokens.saturating_sub(1) {
            batch.clear();
            for (i, text) in texts.iter().enumerate() {
                batch.add_generated(i, position, text.tokens[position]);
            }
            runtime.region(|team| -> Result<(), GenerateError> {
                model.forward(
                    team,
                    batch.rows(),
                    &mut caches,
                    &mut scratch,
                    &mut Unobserved,
                )?;
                model.logits(team, Phase::Decode, 0..count, &mut scratch, &mut logits);
                let rows = logits.chunks_exact_mut(model.config.vocabulary);
                let mut rows: Vec<(&mut Text, &mut [f32])> = texts.iter_mut().zip(rows).collect();
                team.chunks_mut(&mut rows, 1, |_, row| {
                    let (text, logits) = &mut row[0];
                    let known = self.vocabulary.min(logits.len());
                    text.go_on(position, &mut logits[..known]);
                });
                Ok(())
            })?;
            if texts.iter().any(|text| text.failed) {
                return Err(GenerateError::NotANumber { position });
            }
            report(progress, (position + 2) * count, self.tokens * count)?;
        }
        Ok(texts.into_iter().map(|text| text.tokens).collect())
    }
}

/// A text in the making.
struct Text {
    tokens: Vec<u32>,
    sampler: Sampler,
    failed: bool,
}

impl Text {
    fn new(texts: &Texts, number: usize) -> Self {
        // Neighbouring seeds give unrelated numbers.
        let seed = texts.seed.wrapping_add(number as u64);
        let mut random = ChaCha8Rng::seed_from_u64(!seed);
        let start = texts.starts[(random.next_u64() % texts.starts.len() as u64) as usize];
        let mut tokens: Vec<u32> = texts.bos.into_iter().chain([start]).collect();
        tokens.truncate(texts.tokens);
        Self {
            tokens,
            sampler: Sampler::new(SamplerConfig::plain(seed)),
            failed: false,
        }
    }

    /// Takes the token behind `position`, if there is none yet.
    fn go_on(&mut self, position: usize, logits: &mut [f32]) {
        if position + 1 < self.tokens.len() {
            return;
        }
        match self.sampler.sample(logits, &[]) {
            Some(token) => self.tokens.push(token),
            None => self.failed = true,
        }
    }
}
