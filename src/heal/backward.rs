//! The backward pass: the derivatives of the loss by all that is trained, layer by layer from the last.

use std::ops::Range;

use super::forward::{LayerTape, Tape, fit};
use super::layout::{DOWN, GATE, K, O, Q, UP, V};
use super::student::Student;
use super::{gate, low_rank, norm};
use crate::kernels::{Factor, Store, Team, multiply};
use crate::model::ModuleId;

/// Is shown the input of each module's last projection, and the derivative by its output.
pub type Watch<'w> = dyn FnMut(&Team, ModuleId, &[f32], &[f32]) + 'w;

/// Buffers of a backward pass.
#[derive(Debug, Default)]
pub struct Work {
    /// The derivative by the residual stream, `[n, d]`.
    pub(super) dx: Vec<f32>,
    /// That by what a norm leaves, `[n, d]`, and what it left.
    pub(super) dy: Vec<f32>,
    pub(super) y: Vec<f32>,
    wide: [Vec<f32>; 6],
}

impl Work {
    /// Bytes that it takes for so many rows.
    pub fn bytes(model: &crate::model::Model, rows: usize) -> u64 {
        let (d, e) = (model.config.embedding_length, model.config.head_dim);
        let layers = model.layers.iter();
        let widest = layers.map(|l| {
            (3 * l.channels()).max(2 * e * (l.heads() + l.kv_heads()) + 2 * e * l.heads())
        });
        4 * (rows * (3 * d + widest.max().unwrap_or(0))) as u64
    }
}

/// The derivatives that are wanted.
pub enum Gradients<'g> {
    /// Of all parameters from a place on.
    From(usize, &'g mut [f32]),
    /// Of some places, one behind the other.
    Of(&'g [Range<usize>], &'g mut [f32]),
}

impl Gradients<'_> {
    /// Those of a place; `None` if they are not wanted.
    pub(super) fn at(&mut self, place: &Range<usize>) -> Option<&mut [f32]> {
        match self {
            Gradients::From(first, values) => {
                let start = place.start.checked_sub(*first)?;
                Some(&mut values[start..start + place.len()])
            }
            Gradients::Of(places, values) => {
                let at = places.iter().position(|p| p == place)?;
                let start: usize = places[..at].iter().map(Range::len).sum();
                Some(&mut values[start..start + place.len()])
            }
        }
    }
}

impl Student<'_> {
    /// The derivatives through all layers, of a forward pass that left `tape`. `work.dx` is that by the residual stream behind the last.
    pub(super) fn backward(
        &self,
        team: &Team,
        tape: &mut Tape,
        work: &mut Work,
        gradients: &mut Gradients,
        watch: &mut Watch,
    ) {
        for l in (0..self.model.layers.len()).rev() {
            let length = tape.length;
            let (saved, angles) = (&tape.layers[l], &tape.angles);
            self.mlp_backward(team, l, saved, work, gradients, watch);
            self.attention_backward(team, l, (length, angles), saved, work, gradients, watch);
        }
    }

    /// Of y = x Wᵀ + b: dW = dyᵀ x and db, where they are trained; and dx (+)= dy W.
    #[allow(clippy::too_many_arguments)] // a projection, its input and output, and what comes of each
    fn linear_backward(
        &self,
        team: &Team,
        (l, which): (usize, usize),
        x: &[f32],
        dy: &[f32],
        dx: Option<(Store, &mut [f32])>,
        gradients: &mut Gradients,
    ) {
        let places = &self.places.layers[l];
        let weight = &self.model.layers[l].linears()[which].weight;
        let (rows, cols) = (weight.rows, weight.cols);
        if rows == 0 {
            return;
        }
        let n = dy.len() / rows;
        if let Some(db) = places.biases[which]
            .as_ref()
            .and_then(|place| gradients.at(place))
        {
            norm::sum_rows(team, dy, db);
        }
        if let Some(factors) = &places.factors[which] {
            low_rank::backward(team, self, factors, (x, dy), n, gradients);
        }
        let dy = Factor::new(dy, n, rows);
        if let Some(dw) = gradients.at(&places.weights[which]) {
            multiply(team, dy.t(), Factor::new(x, n, cols), Store::Replace, dw);
        }
        if let Some((store, dx)) = dx {
            let w = Factor::new(self.at(&places.weights[which]), rows, cols);
            multiply(team, dy, w, store, dx);
        }
    }

    /// Through x += down(silu(gate(y)) up(y)) of y = norm(x).
    fn mlp_backward(
        &self,
        team: &Team,
        l: usize,
        saved: &LayerTape,
        work: &mut Work,
        gradients: &mut Gradients,
        watch: &mut Watch,
    ) {
        let places = &self.places.layers[l];
        let (d, epsilon) = (
            self.model.config.embedding_length,
            self.model.config.rms_epsilon,
        );
        let n = saved.middle.len() / d;
        let len = n * self.model.layers[l].channels();
        let Work { dx, dy, y, wide } = work;
        let [hidden, dhidden, dgate, ..] = wide;
        let (hidden, dhidden, dgate) = (fit(hidden, len), fit(dhidden, len), fit(dgate, len));
        gate::forward(team, &saved.gate, &saved.up, hidden);
        watch(team, ModuleId::mlp(l), hidden, dx);
        self.linear_backward(
            team,
            (l, DOWN),
            hidden,
            dx,
            Some((Store::Replace, dhidden)),
            gradients,
        );
        if len == 0 {
            gradients
                .at(&places.mlp_norm)
                .into_iter()
                .for_each(|dw| dw.fill(0.0));
            return;
        }
        gate::backward(team, &saved.gate, &saved.up, dhidden, dgate);
        let (weight, y, dy) = (self.at(&places.mlp_norm), fit(y, n * d), fit(dy, n * d));
        norm::forward(team, &saved.middle, weight, epsilon, y);
        self.linear_backward(
            team,
            (l, GATE),
            y,
            dgate,
            Some((Store::Replace, dy)),
            gradients,
        );
        self.linear_backward(team, (l, UP), y, dhidden, Some((Store::Add, dy)), gradients);
        let dw = gradients.at(&places.mlp_norm);
        norm::backward(team, &saved.middle, weight, epsilon, dy, dx, dw);
    }

    /// Through x += o(attention(rope(q), rope(k), v)) of norm(x).
    #[allow(clippy::too_many_arguments)] // a layer as it was, and what comes of it
    fn attention_backward(
        &self,
        team: &Team,
        l: usize,
        (length, angles): (usize, &super::attention::Angles),
        saved: &LayerTape,
        work: &mut Work,
        gradients: &mut Gradients,
        watch: &mut Watch,
    ) {
        let (layer, places) = (&self.model.layers[l], &self.places.layers[l]);
        let (d, e, epsilon) = (
            self.model.config.embedding_length,
            self.model.config.head_dim,
            self.model.config.rms_epsilon,
        );
        let n = saved.before.len() / d;
        let (h, g) = (layer.heads(), layer.kv_heads());
        let (q_len, kv_len) = (n * h * e, n * g * e);
        let Work { dx, dy, y, wide } = work;
        let [rows, dout, dq, dk, dv, _] = wide;
        let rows = fit(rows, q_len);
        watch(team, ModuleId::attention(l), &saved.attended, dx);
        self.linear_backward(
            team,
            (l, O),
            &saved.attended,
            dx,
            Some((Store::Replace, rows)),
            gradients,
        );
        if h == 0 {
            gradients
                .at(&places.attention_norm)
                .into_iter()
                .for_each(|dw| dw.fill(0.0));
            return;
        }
        let heads = self.heads(l, length);
        let (dout, dq) = (fit(dout, q_len), fit(dq, q_len));
        let (dk, dv) = (fit(dk, kv_len), fit(dv, kv_len));
        heads.gather(team, rows, h, None, dout);
        heads.backward(team, (&saved.q, &saved.k, &saved.v), dout, (dq, dk, dv));
        let (weight, y, dy) = (
            self.at(&places.attention_norm),
            fit(y, n * d),
            fit(dy, n * d),
        );
        norm::forward(team, &saved.before, weight, epsilon, y);
        for (which, count, values, angles, store) in [
            (Q, h, dq, Some(angles), Store::Replace),
            (K, g, dk, Some(angles), Store::Add),
            (V, g, dv, None, Store::Add),
        ] {
            let rows = &mut rows[..n * count * e];
            heads.scatter(team, values, count, angles, rows);
            self.linear_backward(team, (l, which), y, rows, Some((store, dy)), gradients);
        }
        let dw = gradients.at(&places.attention_norm);
        norm::backward(team, &saved.before, weight, epsilon, dy, dx, dw);
    }
}
