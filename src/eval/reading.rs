//! Which way of reading weights is the fastest one here.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::median;
use crate::kernels::{Activations, Product, Reading, Runtime, Tokens, matmul};
use crate::model::{Model, Weight};
use crate::quant::{BlockType, Layout};

/// Bytes of weights that each turn of a measurement reads at the most: more than caches keep until the next turn.
const MOST: usize = 64 << 20;
/// A model with fewer packed bytes of a type is not measured: they might come from a cache, whose speed says nothing about memory.
pub const LEAST: usize = 40 << 20;
/// When this has passed, no further round begins; three take place in any case.
const TIME: Duration = Duration::from_millis(80);
/// Rounds, in each of which every way has its turn.
const ROUNDS: usize = 7;
/// How much of the time another way than the usual one must spare. What other programs and other guests do to memory makes one way or
/// another up to a quarter faster for a while.
const GAIN: f64 = 0.15;

/// The type that most bytes of the packed matrices of the layers have, and these matrices.
fn main_type(model: &Model) -> Option<(BlockType, Vec<&Weight>)> {
    let linears = model.layers.iter().flat_map(|layer| layer.linears());
    let packed: Vec<&Weight> = linears
        .map(|linear| &linear.weight)
        .filter(|weight| matches!(weight.layout, Layout::Packed | Layout::Narrow))
        .collect();
    let bytes = |t: BlockType| -> usize {
        let these = packed.iter().filter(|weight| weight.block_type == t);
        these.map(|weight| weight.bytes()).sum()
    };
    let main = BlockType::ALL.into_iter().max_by_key(|t| bytes(*t))?;
    let of_type = packed.into_iter().filter(|w| w.block_type == main);
    Some((main, of_type.collect()))
}

/// The type by which the reading of a model is chosen: that of most of its layers' bytes; `None` where there are not `least` packed
/// bytes of it, or no more than caches hold.
pub fn reading_type(model: &Model, least: usize) -> Option<BlockType> {
    let (main, weights) = main_type(model)?;
    let bytes: usize = weights.iter().map(|weight| weight.bytes()).sum();
    (bytes >= least).then_some(main)
}

/// The way in which products of one token with a model's packed weights are the fastest, the usual one unless another one is
/// clearly faster; `None` where [`reading_type`] is. Takes a tenth of a second. Beside other programs chance decides more.
pub fn fastest_reading(model: &Model, runtime: &Runtime, least: usize) -> Option<Reading> {
    reading_type(model, least)?;
    let (_, mut weights) = main_type(model)?;
    let mut bytes = 0;
    weights.retain(|weight| {
        bytes += weight.bytes();
        bytes <= MOST
    });
    let ways = ways();
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
    let mut read = Pass::new(model, &weights);
    // The first time brings pages and activations.
    read.run(runtime, ways[0]);
    let begin = Instant::now();
    for round in 0..ROUNDS {
        if round > 2 && begin.elapsed() > TIME {
            break;
        }
        for (way, times) in ways.iter().zip(&mut times) {
            times.push(read.run(runtime, *way));
        }
    }
    let times: Vec<f64> = times.iter().map(|times| median(times)).collect();
    let fastest = (0..ways.len()).min_by(|a, b| times[*a].total_cmp(&times[*b]))?;
    tracing::debug!("seconds of reading by {ways:?}: {times:?}");
    Some(match times[fastest] < times[0] * (1.0 - GAIN) {
        true => ways[fastest],
        false => ways[0],
    })
}

/// What is tried: first the usual way.
fn ways() -> Vec<Reading> {
    let mut ways = vec![Reading::usual()];
    for (streams, fetches) in [(2, false), (3, false), (2, true), (4, true), (6, true)] {
        let way = Reading { streams, fetches };
        if !ways.contains(&way) {
            ways.push(way);
        }
    }
    ways
}

/// One token's products with some matrices.
struct Pass<'m> {
    model: &'m Model,
    weights: &'m [&'m Weight],
    /// An input for each number of columns.
    inputs: Vec<Activations>,
    out: Vec<f32>,
}

impl<'m> Pass<'m> {
    fn new(model: &'m Model, weights: &'m [&'m Weight]) -> Self {
        let mut inputs: Vec<Activations> = Vec::new();
        for weight in weights {
            if inputs.iter().all(|x| x.cols() != weight.cols) {
                let mut x = Activations::default();
                for (i, value) in x
                    .begin(Tokens::decode(1), weight.cols)
                    .iter_mut()
                    .enumerate()
                {
                    // What it is does not matter for the time.
                    *value = (i % 17) as f32 - 8.0;
                }
                inputs.push(x);
            }
        }
        let rows = weights.iter().map(|weight| weight.rows).max().unwrap_or(0);
        Self {
            model,
            weights,
            inputs,
            out: vec![0.0; rows],
        }
    }

    /// The seconds that it takes in this way.
    fn run(&mut self, runtime: &Runtime, way: Reading) -> f64 {
        let start = Instant::now();
        runtime.pool.region(runtime.kernels.reading(way), |team| {
            for weight in self.weights {
                let x = self.inputs.iter_mut().find(|x| x.cols() == weight.cols);
                let product = Product {
                    weights: weight.view(&self.model.map),
                    out: &mut self.out[..weight.rows],
                };
                matmul(team, x.expect("an input of each width"), &mut [product]);
            }
        });
        black_box(&self.out);
        start.elapsed().as_secs_f64()
    }
}
