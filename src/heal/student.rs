//! The model that is trained: its parameters in single precision, beside the embedding and the output head, which stay as they are.

use std::ops::Range;

use super::What;
use super::batches::LENGTH;
use super::forward::{INPUTS, InputMoments};
use super::layout::{FactorPlaces, Places};
use super::low_rank;
use crate::kernels::{Runtime, Team};
use crate::model::{Model, Weight};
use crate::prune::{InverseFactor, Rewritten, rounding};
use crate::quant::encode_row;

/// Parameters in training.
#[derive(Debug)]
pub struct Student<'m> {
    /// The shape, the embedding and the output head; its layers are what training began with.
    pub model: &'m Model,
    pub places: Places,
    /// All parameters of the layers, and the output norm. Matrices have what their factors change in them.
    pub parameters: Vec<f32>,
    /// What is trained begins here.
    pub first: usize,
    /// What of it is trained.
    what: What,
    /// The output head `[vocabulary, d]`.
    pub(super) head: Vec<f32>,
}

impl<'m> Student<'m> {
    pub fn new(model: &'m Model, runtime: &Runtime, what: What) -> Self {
        Self::in_places(model, runtime, what, Places::to_train(model, what))
    }

    /// The same with places of one's own.
    pub(super) fn in_places(
        model: &'m Model,
        runtime: &Runtime,
        what: What,
        places: Places,
    ) -> Self {
        let mut student = Self {
            model,
            first: places.first(what),
            what,
            parameters: vec![0.0; places.total],
            places,
            head: Vec::new(),
        };
        student.reset(runtime);
        let (head, d) = (model.head(), model.config.embedding_length);
        student.head.resize(head.rows * d, 0.0);
        runtime.region(|team| {
            team.chunks_mut(&mut student.head, d, |row, out| {
                head.decode_row(&model.map, row, out)
            });
        });
        student
    }

    /// Makes all parameters what they are in the model.
    pub fn reset(&mut self, runtime: &Runtime) {
        let model = self.model;
        low_rank::begin(&self.places, &mut self.parameters);
        runtime.region(|team| self.make_matrices(team));
        for (layer, places) in model.layers.iter().zip(&self.places.layers) {
            for (linear, bias) in layer.linears().into_iter().zip(&places.biases) {
                if let (Some(bias), Some(place)) = (&linear.bias, bias) {
                    self.parameters[place.clone()].copy_from_slice(bias);
                }
            }
            self.parameters[places.attention_norm.clone()].copy_from_slice(&layer.attention_norm);
            self.parameters[places.mlp_norm.clone()].copy_from_slice(&layer.mlp_norm);
        }
        self.parameters[self.places.output_norm.clone()].copy_from_slice(&model.output_norm);
    }

    /// Makes the matrices what they are in the model and what their factors change.
    fn make_matrices(&mut self, team: &Team) {
        let model = self.model;
        let (matrices, rest) = self.parameters.split_at_mut(self.places.vectors.start);
        let start = self.places.vectors.start;
        let factor = |place: &Range<usize>| &rest[place.start - start..place.end - start];
        for (layer, places) in model.layers.iter().zip(&self.places.layers) {
            for (i, linear) in layer.linears().into_iter().enumerate() {
                let weight = &linear.weight;
                let (rows, cols) = (weight.rows, weight.cols);
                let to = &mut matrices[places.weights[i].clone()];
                team.chunks_mut(to, cols.max(1), |row, out| {
                    weight.decode_row(&model.map, row, out);
                });
                if let Some(FactorPlaces { a, b }) = &places.factors[i] {
                    low_rank::add(team, factor(a), factor(b), rows, cols, to);
                }
            }
        }
    }

    /// Lets the matrices follow what a step has trained.
    pub fn follow(&mut self, team: &Team) {
        if self.places.total > self.places.vectors.end {
            self.make_matrices(team);
        }
    }

    /// The parameters of a place.
    pub fn at(&self, place: &Range<usize>) -> &[f32] {
        &self.parameters[place.clone()]
    }

    /// Whether the matrices change.
    pub fn changes_matrices(&self) -> bool {
        self.what != What::Norms
    }

    /// What is trained.
    pub fn trained(&self) -> &[f32] {
        &self.parameters[self.first..]
    }

    /// The parameters in the types of the model. Where `moments` of a projection's inputs are known, its weights make up for each other's
    /// rounding.
    pub(super) fn encode(&self, runtime: &Runtime, moments: &InputMoments) -> Rewritten {
        let mut rewritten = Rewritten::vectors_of(self.model);
        rewritten.set_vectors(&self.parameters[self.places.vectors.clone()]);
        if !self.changes_matrices() {
            return rewritten;
        }
        // The widest factor of a layer takes longer than the others together, and is made by one thread.
        let together = runtime.pool.threads();
        let layers: Vec<_> = self.model.layers.iter().zip(&self.places.layers).collect();
        for (group, layers) in layers.chunks(together).enumerate() {
            let first = group * together;
            let factors = runtime.region(|team| {
                let inputs = 4 * layers.len();
                team.map(inputs, |i| {
                    moments.factor(first + i % layers.len(), 3 - i / layers.len())
                })
            });
            for (l, (layer, places)) in layers.iter().enumerate() {
                for (projection, linear) in layer.linears().into_iter().enumerate() {
                    let values = self.at(&places.weights[projection]);
                    let factor = &factors[(3 - INPUTS[projection]) * layers.len() + l];
                    let bytes = encode(runtime, &linear.weight, values, factor.as_ref());
                    rewritten.matrices.push(bytes);
                }
            }
        }
        rewritten
    }
}

/// Values in the type of a weight of the same shape.
fn encode(
    runtime: &Runtime,
    like: &Weight,
    values: &[f32],
    factor: Option<&InverseFactor>,
) -> Vec<u8> {
    let (block_type, rows, cols) = (like.block_type, like.rows, like.cols);
    let row_bytes = block_type.row_bytes(cols);
    let mut bytes = vec![0; rows * row_bytes];
    runtime.region(|team| match factor.filter(|_| !block_type.is_float()) {
        Some(factor) => rounding::encode(team, factor, block_type, values, &mut bytes),
        None => team.chunks_mut(&mut bytes, row_bytes.max(1), |row, out| {
            encode_row(block_type, &values[row * cols..(row + 1) * cols], out);
        }),
    });
    bytes
}

/// Whether the passes of training compute what the model does: that of LLaMA's layers, in either order of rows of queries and keys, as long
/// as no layer looks back less far than a sequence.
pub fn can_train(model: &Model) -> bool {
    let sees_all = |window: &Option<usize>| window.is_none_or(|window| window >= LENGTH);
    let family = model.config.family();
    family.is_llama_in_another_order() && model.config.windows.iter().all(sees_all)
}
