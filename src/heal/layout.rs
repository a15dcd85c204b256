//! Where each parameter of a model lies in one long vector: all matrices of the layers first, then norms and biases, so that what is
//! trained is either all of it or its end.

use std::ops::Range;

use crate::model::{Linear, Model};

/// The projections of a layer, in the order of [`Layer::linears`](crate::model::Layer::linears).
pub const Q: usize = 0;
pub const K: usize = 1;
pub const V: usize = 2;
pub const O: usize = 3;
pub const GATE: usize = 4;
pub const UP: usize = 5;
pub const DOWN: usize = 6;

/// The places of a layer's parameters.
#[derive(Debug, Clone)]
pub struct LayerPlaces {
    /// `[rows, cols]` each.
    pub weights: [Range<usize>; 7],
    /// `[rows]` each; `None` where there is none.
    pub biases: [Option<Range<usize>>; 7],
    pub attention_norm: Range<usize>,
    pub mlp_norm: Range<usize>,
}

/// The places of all parameters that can be trained.
#[derive(Debug, Clone)]
pub struct Places {
    pub layers: Vec<LayerPlaces>,
    pub output_norm: Range<usize>,
    /// Where norms and biases begin.
    pub vectors: usize,
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
        let vectors = take(0).end;
        let layers = model
            .layers
            .iter()
            .zip(weights)
            .map(|(layer, weights)| LayerPlaces {
                weights,
                attention_norm: take(layer.attention_norm.len()),
                mlp_norm: take(layer.mlp_norm.len()),
                biases: layer.linears().map(|linear| bias(linear).map(&mut take)),
            });
        let layers = layers.collect();
        let output_norm = take(model.output_norm.len());
        Self {
            layers,
            vectors,
            total: output_norm.end,
            output_norm,
        }
    }
}
