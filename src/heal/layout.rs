//! Where each parameter of a model lies in one long vector: all matrices of the layers first, then norms and biases, then the factors of
//! low-rank changes, if there are any, so that what is trained is either all of it or its end.

use std::ops::Range;

use super::low_rank::RANK;
use super::options::What;
use crate::model::{Linear, Model};

/// The projections of a layer, in the order of [`Layer::linears`](crate::model::Layer::linears).
pub const Q: usize = 0;
pub const K: usize = 1;
pub const V: usize = 2;
pub const O: usize = 3;
pub const GATE: usize = 4;
pub const UP: usize = 5;
pub const DOWN: usize = 6;

/// The places of the factors of a change W + B A of a matrix `[rows, cols]`.
#[derive(Debug, Clone)]
pub struct FactorPlaces {
    /// `[rank, cols]`
    pub a: Range<usize>,
    /// `[rows, rank]`
    pub b: Range<usize>,
}

/// The places of a layer's parameters.
#[derive(Debug, Clone)]
pub struct LayerPlaces {
    /// `[rows, cols]` each.
    pub weights: [Range<usize>; 7],
    /// `[rows]` each; `None` where there is none.
    pub biases: [Option<Range<usize>>; 7],
    pub attention_norm: Range<usize>,
    pub mlp_norm: Range<usize>,
    /// `None` where nothing changes by factors.
    pub factors: [Option<FactorPlaces>; 7],
}

/// The places of all parameters that can be trained.
#[derive(Debug, Clone)]
pub struct Places {
    pub layers: Vec<LayerPlaces>,
    pub output_norm: Range<usize>,
    /// Norms and biases.
    pub vectors: Range<usize>,
    pub total: usize,
}

impl Places {
    pub fn of(model: &Model) -> Self {
        Self::with(model, |linear| linear.bias.as_ref().map(Vec::len))
    }

    /// The same with a bias for every projection, also where the model has none.
    pub fn with_biases(model: &Model) -> Self {
        Self::with(model, |linear| Some(linear.weight.rows))
    }

    /// The same for what is trained: with factors, if these are.
    pub fn to_train(model: &Model, what: What) -> Self {
        let mut places = Self::of(model);
        if what != What::LowRank {
            return places;
        }
        let mut end = places.total;
        let mut take = |len: usize| {
            end += len;
            end - len..end
        };
        for (layer, there) in model.layers.iter().zip(&mut places.layers) {
            there.factors = layer.linears().map(|linear| {
                let (rows, cols) = (linear.weight.rows, linear.weight.cols);
                (rows * cols > 0).then(|| FactorPlaces {
                    a: take(RANK * cols),
                    b: take(rows * RANK),
                })
            });
        }
        places.total = end;
        places
    }

    /// Where what is trained begins.
    pub fn first(&self, what: What) -> usize {
        match what {
            What::All => 0,
            What::LowRank | What::Norms => self.vectors.start,
        }
    }

    /// `bias` says how long that of a projection is; `None` for none.
    fn with(model: &Model, bias: impl Fn(&Linear) -> Option<usize>) -> Self {
        let mut end = 0;
        let mut take = |len: usize| {
            end += len;
            end - len..end
        };
        let weights: Vec<[Range<usize>; 7]> = model
            .layers
            .iter()
            .map(|layer| {
                layer
                    .linears()
                    .map(|linear| take(linear.weight.parameters()))
            })
            .collect();
        let first = take(0).end;
        let layers = model
            .layers
            .iter()
            .zip(weights)
            .map(|(layer, weights)| LayerPlaces {
                weights,
                attention_norm: take(layer.attention_norm.len()),
                mlp_norm: take(layer.mlp_norm.len()),
                biases: layer.linears().map(|linear| bias(linear).map(&mut take)),
                factors: [const { None }; 7],
            });
        let layers = layers.collect();
        let output_norm = take(model.output_norm.len());
        Self {
            layers,
            vectors: first..output_norm.end,
            total: output_norm.end,
            output_norm,
        }
    }
}
