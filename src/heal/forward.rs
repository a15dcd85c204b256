//! The forward pass in training: that of the model, with what the derivatives will need kept.
//!
//! Shapes in the comments: n rows, d the width of the residual stream, h heads, g KV heads, e values per head, c channels.

use super::attention::{Angles, Heads};
use super::layout::{DOWN, GATE, K, LayerPlaces, O, Q, UP, V};
use super::student::Student;
use super::{gate, norm};
use crate::kernels::{Factor, Store, Team, add_gram, multiply};
use crate::model::Model;
use crate::prune::InverseFactor;

/// What is kept of a layer.
#[derive(Debug, Default)]
pub(super) struct LayerTape {
    /// The residual stream before the layer, `[n, d]`.
    pub before: Vec<f32>,
    /// By heads and turned: `[sequences, h, length, e]`, `[sequences, g, length, e]`.
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// The input of the attention's output projection, `[n, h e]`.
    pub attended: Vec<f32>,
    /// The residual stream before the MLP, `[n, d]`.
    pub middle: Vec<f32>,
    /// `[n, c]`
    pub gate: Vec<f32>,
    /// `[n, c]`
    pub up: Vec<f32>,
}

/// What a forward pass leaves for the backward pass.
#[derive(Debug, Default)]
pub struct Tape {
    pub(super) layers: Vec<LayerTape>,
    /// The residual stream behind the last layer, `[n, d]`.
    pub(super) last: Vec<f32>,
    /// Positions of each sequence.
    pub(super) length: usize,
    pub(super) angles: Angles,
    /// A buffer of the length of its layer's largest, for what is computed again.
    normed: Vec<f32>,
    wide: Vec<f32>,
}

/// Which of the four inputs of a layer each projection reads: that behind the attention norm, the attention's output, that behind the MLP norm,
/// the gated channels.
pub(super) const INPUTS: [usize; 7] = [0, 0, 0, 1, 2, 2, 3];

/// Second moments of what the projections of each layer read.
#[derive(Debug, Default)]
pub(super) struct InputMoments {
    /// Σ x xᵀ of each of the inputs, `[width, width]`: the lower triangle. Empty where nothing reads them.
    pub layers: Vec<[Vec<f32>; 4]>,
}

impl InputMoments {
    /// Bytes that they take for all layers of a model.
    pub fn bytes(model: &Model) -> u64 {
        let layers = model.layers.iter().flat_map(|layer| {
            let linears = layer.linears();
            [Q, O, GATE, DOWN].map(|projection| linears[projection].weight.cols)
        });
        layers.map(|width| 4 * (width * width) as u64).sum()
    }

    /// What tells how weights make up for each other; `None` where nothing is known of the input.
    pub fn factor(&self, layer: usize, input: usize) -> Option<InverseFactor> {
        let sums = self.layers.get(layer).map(|inputs| &inputs[input])?;
        let width = sums.len().isqrt();
        if width == 0 {
            return None;
        }
        InverseFactor::new(width, |i, j| f64::from(sums[i * width + j]))
    }

    fn add(&mut self, team: &Team, layer: usize, projection: usize, x: &[f32], width: usize) {
        let sums = &mut self.layers[layer][INPUTS[projection]];
        sums.resize(width * width, 0.0);
        add_gram(team, Factor::new(x, x.len() / width, width), sums);
    }
}

/// A buffer of a length, whose contents are arbitrary.
pub(super) fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    buffer.truncate(len);
    buffer
}

impl Tape {
    /// Bytes that it takes for so many rows.
    pub fn bytes(model: &Model, rows: usize) -> u64 {
        let (d, e) = (model.config.embedding_length, model.config.head_dim);
        let layers = model.layers.iter();
        let each = layers.map(|l| 2 * d + 2 * e * (l.heads() + l.kv_heads()) + 2 * l.channels());
        let widest = model
            .layers
            .iter()
            .map(|l| l.channels().max(l.heads() * e))
            .max();
        let values = each.sum::<usize>() + 2 * d + widest.unwrap_or(0);
        4 * (rows * values) as u64
    }
}

impl Student<'_> {
    /// The heads of a layer.
    pub(super) fn heads(&self, l: usize, length: usize) -> Heads<'_> {
        Heads {
            length,
            head_dim: self.model.config.head_dim,
            groups: &self.model.layers[l].group_sizes,
        }
    }

    /// y (+)= x Wᵀ + b of a projection.
    #[allow(clippy::too_many_arguments)] // a projection, its input and its output
    fn project(
        &self,
        team: &Team,
        places: &LayerPlaces,
        which: usize,
        l: usize,
        x: &[f32],
        store: Store,
        y: &mut [f32],
    ) {
        let weight = &self.model.layers[l].linears()[which].weight;
        let (rows, cols) = (weight.rows, weight.cols);
        if rows == 0 {
            return;
        }
        let w = Factor::new(self.at(&places.weights[which]), rows, cols);
        multiply(team, Factor::new(x, y.len() / rows, cols), w.t(), store, y);
        if let Some(bias) = &places.biases[which] {
            norm::add_bias(team, self.at(bias), y);
        }
    }

    /// Takes sequences of `length` tokens each through the layers. `moments` gather what projections read.
    ///
    /// # Panics
    /// If the tokens are not whole sequences, or not of the vocabulary.
    pub(super) fn forward(
        &self,
        team: &Team,
        tokens: &[u32],
        length: usize,
        tape: &mut Tape,
        mut moments: Option<&mut InputMoments>,
    ) {
        assert!(
            length > 0 && tokens.len().is_multiple_of(length),
            "whole sequences"
        );
        let (model, n) = (self.model, tokens.len());
        let (d, e, epsilon) = (
            model.config.embedding_length,
            model.config.head_dim,
            model.config.rms_epsilon,
        );
        if tape.length != length {
            tape.length = length;
            tape.angles = model.angles(length);
        }
        tape.layers
            .resize_with(model.layers.len(), LayerTape::default);
        if let Some(moments) = &mut moments {
            moments
                .layers
                .resize_with(model.layers.len(), Default::default);
        }
        let Tape {
            layers,
            last: x,
            angles,
            normed,
            wide,
            ..
        } = tape;
        team.chunks_mut(fit(x, n * d), d, |i, row| {
            model
                .embedding
                .decode_row(&model.map, tokens[i] as usize, row);
        });
        for (l, (saved, places)) in layers.iter_mut().zip(&self.places.layers).enumerate() {
            let layer = &model.layers[l];
            let (h, g, c) = (layer.heads(), layer.kv_heads(), layer.channels());
            let heads = self.heads(l, length);
            fit(&mut saved.before, n * d).copy_from_slice(x);
            if h > 0 {
                let y = fit(normed, n * d);
                norm::forward(team, x, self.at(&places.attention_norm), epsilon, y);
                for (which, count, angles, out) in [
                    (Q, h, Some(&*angles), &mut saved.q),
                    (K, g, Some(&*angles), &mut saved.k),
                    (V, g, None, &mut saved.v),
                ] {
                    let rows = fit(wide, n * count * e);
                    self.project(team, places, which, l, y, Store::Replace, rows);
                    heads.gather(team, rows, count, angles, fit(out, n * count * e));
                }
                let out = fit(wide, n * h * e);
                heads.forward(team, &saved.q, &saved.k, &saved.v, out);
                heads.scatter(team, out, h, None, fit(&mut saved.attended, n * h * e));
                if let Some(moments) = &mut moments {
                    moments.add(team, l, Q, y, d);
                    moments.add(team, l, O, &saved.attended, h * e);
                }
            }
            self.project(
                team,
                places,
                O,
                l,
                fit(&mut saved.attended, n * h * e),
                Store::Add,
                x,
            );
            fit(&mut saved.middle, n * d).copy_from_slice(x);
            if c > 0 {
                let y = fit(normed, n * d);
                norm::forward(team, x, self.at(&places.mlp_norm), epsilon, y);
                for (which, out) in [(GATE, &mut saved.gate), (UP, &mut saved.up)] {
                    self.project(team, places, which, l, y, Store::Replace, fit(out, n * c));
                }
                if let Some(moments) = &mut moments {
                    moments.add(team, l, GATE, y, d);
                }
            }
            let hidden = fit(wide, n * c);
            gate::forward(
                team,
                fit(&mut saved.gate, n * c),
                fit(&mut saved.up, n * c),
                hidden,
            );
            if let Some(moments) = moments.as_mut().filter(|_| c > 0) {
                moments.add(team, l, DOWN, hidden, c);
            }
            self.project(team, places, DOWN, l, hidden, Store::Add, x);
        }
    }
}

impl Model {
    /// The angles of the first positions.
    fn angles(&self, length: usize) -> Angles {
        let mut angles = Angles {
            rotation: self.config.family().rotation,
            ..Angles::default()
        };
        // All layers of what is trained turn alike.
        let Some(rope) = self.layers.iter().find_map(|layer| layer.rope.as_ref()) else {
            return angles;
        };
        for position in 0..length {
            let (cosines, sines) = rope.within(length).at(position);
            angles.pairs = cosines.len();
            angles.cosines.extend_from_slice(cosines);
            angles.sines.extend_from_slice(sines);
            angles.negative.extend(sines.iter().map(|s| -s));
        }
        angles
    }
}
