//! How fast a model will generate when it has fewer weights, from how fast it is.

use std::hint::black_box;
use std::time::Instant;

use super::{SpeedRun, SpeedTest};
use crate::kernels::{Activations, Product, Runtime, Tokens, matmul};
use crate::model::{CacheType, Model, ModelError, Weight};

/// Tokens of a sample, and samples, of which the quickest counts: what disturbs a measurement only ever slows it down.
const TOKENS: usize = 16;
const SAMPLES: usize = 3;

/// The time of a token in two parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenTime {
    /// Seconds that a token takes.
    pub seconds: f64,
    /// Seconds of it for each byte of weights.
    pub per_byte: f64,
    /// [Bytes of weights](Model::bytes_per_token) that it reads.
    pub bytes: usize,
}

impl TokenTime {
    /// Measures a short generation, and in between the products with all weights alone, as generation makes them.
    ///
    /// # Errors
    /// Those of a forward pass.
    pub fn measure(model: &Model, runtime: &Runtime) -> Result<Self, ModelError> {
        let test = SpeedTest {
            prompt: 0,
            generate: TOKENS,
            depth: 0,
            parallel: 1,
            cache_type: CacheType::F16,
        };
        let mut run = SpeedRun::new(model, runtime, test)?;
        let (mut seconds, mut weights) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..SAMPLES {
            seconds = seconds.min(1.0 / run.sample()?);
            // As long as the sample, so that other load disturbs both alike.
            let all: f64 = (0..TOKENS).map(|_| multiply_all(model, runtime)).sum();
            weights = weights.min(all / TOKENS as f64);
        }
        let bytes = model.bytes_per_token();
        Ok(Self {
            seconds,
            per_byte: weights.min(seconds) / bytes.max(1) as f64,
            bytes,
        })
    }

    /// Tokens per second.
    pub fn speed(&self) -> f64 {
        1.0 / self.seconds
    }

    /// Tokens per second with so many bytes of weights, all else being equal.
    pub fn speed_at(&self, bytes: usize) -> f64 {
        let spared = self.bytes as f64 - bytes as f64;
        1.0 / (self.seconds - spared * self.per_byte)
    }
}

/// Seconds for one token's product with every weight.
fn multiply_all(model: &Model, runtime: &Runtime) -> f64 {
    let start = Instant::now();
    runtime.region(|team| {
        let mut x = Activations::default();
        let mut outs: Vec<Vec<f32>> = Vec::new();
        let mut multiply = |weights: &[&Weight]| {
            let there = weights.iter().filter(|w| w.bytes() > 0);
            let weights: Vec<&Weight> = there.copied().collect();
            let Some(first) = weights.first() else { return };
            for (i, value) in x
                .begin(Tokens::decode(1), first.cols)
                .iter_mut()
                .enumerate()
            {
                *value = (i % 7) as f32 - 3.0;
            }
            outs.resize_with(outs.len().max(weights.len()), Vec::new);
            let mut products = Vec::new();
            for (weight, out) in weights.iter().zip(&mut outs) {
                out.resize(weight.rows, 0.0);
                products.push(Product {
                    weights: weight.view(&model.map),
                    out,
                });
            }
            matmul(team, &mut x, &mut products);
            black_box(&products);
        };
        for layer in &model.layers {
            let [q, k, v, o, gate, up, down] = layer.linears().map(|linear| &linear.weight);
            for together in [&[q, k, v][..], &[o], &[gate, up], &[down]] {
                multiply(together);
            }
        }
        multiply(&[model.head()]);
    });
    start.elapsed().as_secs_f64()
}
