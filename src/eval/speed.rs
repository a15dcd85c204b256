//! How fast a model runs, in the manner of `llama-bench`.

use std::hint::black_box;
use std::time::Instant;

use crate::gguf::Map;
use crate::kernels::Runtime;
use crate::model::{CacheType, KvCache, Model, ModelError, Scratch, Unobserved};

/// Tokens of a prompt that go through the model together, as in a session.
const BATCH: usize = 512;

/// What is timed: a prompt, or tokens one by one, behind `depth` tokens that are already in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpeedTest {
    pub prompt: usize,
    pub generate: usize,
    pub depth: usize,
    /// How keys and values are stored.
    pub cache_type: CacheType,
}

/// A model with the buffers for one test. Making it fills the cache to the depth and runs the test's kind of work once.
#[derive(Debug)]
pub struct SpeedRun<'m> {
    model: &'m Model,
    runtime: &'m Runtime,
    test: SpeedTest,
    cache: KvCache,
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
        let mut run = Self {
            model,
            runtime,
            test,
            cache: KvCache::with_type(
                model,
                test.depth + test.prompt + test.generate,
                test.cache_type,
            )?,
            scratch: Scratch::new(),
            logits: Vec::new(),
        };
        for first in (0..test.depth).step_by(BATCH) {
            run.pass(BATCH.min(test.depth - first), first)?;
        }
        if test.prompt > 0 {
            run.pass(BATCH.min(test.prompt), test.depth)?;
        } else {
            run.pass(1, test.depth)?;
        }
        Ok(run)
    }

    /// Runs the test once; tokens per second.
    ///
    /// # Errors
    /// Those of a forward pass.
    pub fn sample(&mut self) -> Result<f64, ModelError> {
        self.cache.truncate(self.test.depth);
        let SpeedTest {
            prompt,
            generate,
            depth,
            ..
        } = self.test;
        let start = Instant::now();
        for first in (0..prompt).step_by(BATCH) {
            self.pass(BATCH.min(prompt - first), depth + first)?;
        }
        for step in 0..generate {
            self.pass(1, depth + prompt + step)?;
        }
        Ok((prompt + generate) as f64 / start.elapsed().as_secs_f64())
    }

    /// One forward pass with the logits of its last token.
    fn pass(&mut self, tokens: usize, position: usize) -> Result<(), ModelError> {
        let Self {
            model,
            runtime,
            cache,
            scratch,
            logits,
            ..
        } = self;
        // Which tokens does not matter for the time, but they should not all be the same row of the embedding.
        let vocabulary = model.config.vocabulary;
        let batch: Vec<u32> = (0..tokens)
            .map(|i| ((position + i) * 7919 % vocabulary) as u32)
            .collect();
        runtime.region(|team| {
            model.forward(team, &batch, cache, scratch, &mut Unobserved)?;
            model.logits(team, tokens - 1..tokens, scratch, logits);
            black_box(&logits);
            Ok(())
        })
    }
}

/// Bytes per second at which all threads together read the first `bytes` of a map, doing next to nothing with them: what
/// generation cannot exceed. Every thread reads several streams side by side, which memory gives faster than one.
pub fn read_bandwidth(map: &Map, bytes: usize, runtime: &Runtime) -> f64 {
    const STREAMS: usize = 8;
    const LINE: usize = 64;
    let data = &map.bytes()[..bytes.min(map.bytes().len())];
    let start = Instant::now();
    runtime.region(|team| {
        let threads = team.threads();
        team.each(|worker| {
            let part = &data[data.len() * worker / threads..data.len() * (worker + 1) / threads];
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
    data.len() as f64 / start.elapsed().as_secs_f64()
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
