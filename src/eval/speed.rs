//! How fast a model runs, in the manner of `llama-bench`.

use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use crate::gguf::Map;
use crate::kernels::{Phase, Runtime};
use crate::model::{Batch, CacheType, KvCache, KvPool, Model, ModelError, Scratch, Unobserved};

/// Tokens of a prompt that go through the model together, as in a session.
const BATCH: usize = 512;

/// What is timed: a prompt, or tokens one by one, behind `depth` tokens that are already in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpeedTest {
    pub prompt: usize,
    pub generate: usize,
    pub depth: usize,
    /// Sequences that do so side by side, each with a cache of its own. Their tokens are counted together.
    pub parallel: usize,
    /// How keys and values are stored.
    pub cache_type: CacheType,
}

impl SpeedTest {
    /// Positions that each sequence may have in the end.
    pub fn positions(&self) -> usize {
        let behind = self.prompt.saturating_add(self.generate.max(1));
        self.depth.saturating_add(behind)
    }
}

/// A model with the buffers for one test. Making it fills the caches to the depth and runs the test's kind of work once.
#[derive(Debug)]
pub struct SpeedRun<'m> {
    model: &'m Model,
    runtime: &'m Runtime,
    test: SpeedTest,
    caches: Vec<KvCache>,
    batch: Batch,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl<'m> SpeedRun<'m> {
    /// # Errors
    /// Those of a forward pass.
    pub fn new(
        model: &'m Model,
        runtime: &'m Runtime,
        test: SpeedTest,
    ) -> Result<Self, ModelError> {
        let pool = KvPool::new(model, test.cache_type)?;
        let capacity = test.positions();
        let mut run = Self {
            model,
            runtime,
            test,
            caches: (0..test.parallel).map(|_| pool.cache(capacity)).collect(),
            batch: Batch::new(),
            scratch: Scratch::new(),
            logits: Vec::new(),
        };
        run.prompt(test.depth)?;
        if test.prompt > 0 {
            run.prompt(BATCH.min(test.prompt))?;
        } else {
            run.generate()?;
        }
        Ok(run)
    }

    /// Runs the test once; tokens per second.
    ///
    /// # Errors
    /// Those of a forward pass.
    pub fn sample(&mut self) -> Result<f64, ModelError> {
        let SpeedTest {
            prompt,
            generate,
            depth,
            parallel,
            ..
        } = self.test;
        for cache in &mut self.caches {
            cache.truncate(depth);
        }
        let start = Instant::now();
        self.prompt(prompt)?;
        for _ in 0..generate {
            self.generate()?;
        }
        Ok((parallel * (prompt + generate)) as f64 / start.elapsed().as_secs_f64())
    }

    /// A prompt of so many tokens for each sequence, one sequence after the other, with the logits of the last token of each
    /// pass.
    fn prompt(&mut self, tokens: usize) -> Result<(), ModelError> {
        for s in 0..self.caches.len() {
            for first in (0..tokens).step_by(BATCH) {
                let count = BATCH.min(tokens - first);
                let position = self.caches[s].len();
                let tokens: Vec<u32> = (position..position + count)
                    .map(|position| self.token(position))
                    .collect();
                self.batch.clear();
                self.batch
                    .add_prompt(0, position, &tokens, count - 1..count);
                self.pass(s..s + 1)?;
            }
        }
        Ok(())
    }

    /// The next token of every sequence.
    fn generate(&mut self) -> Result<(), ModelError> {
        self.batch.clear();
        for (s, cache) in self.caches.iter().enumerate() {
            let position = cache.len();
            self.batch.add_generated(s, position, self.token(position));
        }
        self.pass(0..self.caches.len())
    }

    /// Which token it is does not matter for the time, but they should not all be the same row of the embedding.
    fn token(&self, position: usize) -> u32 {
        (position * 7919 % self.model.config.vocabulary) as u32
    }

    /// One forward pass of the batch, which is of these sequences.
    fn pass(&mut self, sequences: Range<usize>) -> Result<(), ModelError> {
        let Self {
            model,
            runtime,
            caches,
            batch,
            scratch,
            logits,
            ..
        } = self;
        let mut caches: Vec<&mut KvCache> = caches[sequences].iter_mut().collect();
        let wanted = batch.rows().iter().filter(|row| row.wants_logits).count();
        runtime.region(|team| {
            model.forward(team, batch.rows(), &mut caches, scratch, &mut Unobserved)?;
            model.logits(team, Phase::Decode, 0..wanted, scratch, logits);
            black_box(&logits);
            Ok(())
        })
    }
}

/// Bytes per second at which all threads together read the first `bytes` of a map, doing next to nothing with them: what
/// generation cannot exceed. Memory gives some machines more where every thread reads several streams side by side, others less, so
/// that both are tried and the faster one counts.
pub fn read_bandwidth(map: &Map, bytes: usize, runtime: &Runtime) -> f64 {
    let data = &map.bytes()[..bytes.min(map.bytes().len())];
    let seconds = read_in::<2>(data, runtime).min(read_in::<8>(data, runtime));
    data.len() as f64 / seconds
}

/// The seconds that reading takes where every thread reads so many streams side by side.
fn read_in<const STREAMS: usize>(data: &[u8], runtime: &Runtime) -> f64 {
    const LINE: usize = 64;
    let start = Instant::now();
    runtime.region(|team| {
        let threads = team.threads();
        team.shares(|share| {
            let part = &data[data.len() * share / threads..data.len() * (share + 1) / threads];
            let mut streams = part.chunks((part.len() / STREAMS).max(LINE)).take(STREAMS);
            let streams: [&[[u8; LINE]]; STREAMS] =
                std::array::from_fn(|_| streams.next().unwrap_or_default().as_chunks().0);
            // One byte of a line brings all of it.
            let mut sums = [0u64; STREAMS];
            for line in 0..streams.iter().map(|s| s.len()).min().unwrap_or(0) {
                for (sum, stream) in sums.iter_mut().zip(&streams) {
                    *sum = sum.wrapping_add(u64::from(stream[line][0]));
                }
            }
            black_box(sums);
        });
    });
    start.elapsed().as_secs_f64()
}

/// The middle value; the mean of the two middle ones where there is no middle.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n == 0 {
        return f64::NAN;
    }
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

/// Mean and sample standard deviation.
pub fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n;
    if samples.len() < 2 {
        return (mean, 0.0);
    }
    let variance = samples.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / (n - 1.0);
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_deviations() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(mean_and_deviation(&[1.0, 3.0]), (2.0, 2f64.sqrt()));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
    }
}
