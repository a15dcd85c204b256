//! The model that is trained: its parameters in single precision, beside the embedding and the output head, which stay as they are.

use std::ops::Range;

use super::What;
use super::batches::LENGTH;
use super::layout::{FactorPlaces, Places};
use super::low_rank;
use crate::kernels::{Runtime, Team};
use crate::model::Model;
use crate::prune::Rewritten;
use crate::quant::{encode_row, encode_row_by_importance};

/// Rows that a thread encodes at a time.
const ROWS: usize = 16;

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

    /// The parameters in the types of the model. `importance`, for each layer and projection, is the mean square of each input; empty
    /// where it is not known.
    pub fn encode(&self, runtime: &Runtime, importance: &[[Vec<f32>; 7]]) -> Rewritten {
        let mut rewritten = Rewritten::vectors_of(self.model);
        rewritten.set_vectors(&self.parameters[self.places.vectors.clone()]);
        if !self.changes_matrices() {
            return rewritten;
        }
        for (l, (layer, places)) in self
            .model
            .layers
            .iter()
            .zip(&self.places.layers)
            .enumerate()
        {
            for (i, linear) in layer.linears().into_iter().enumerate() {
                let (block_type, cols) = (linear.weight.block_type, linear.weight.cols);
                let values = self.at(&places.weights[i]);
                let row_bytes = block_type.row_bytes(cols);
                let mut bytes = vec![0; linear.weight.rows * row_bytes];
                let known = importance.get(l).map_or(&[][..], |layer| &layer[i]);
                runtime.region(|team| {
                    team.chunks_mut(&mut bytes, (ROWS * row_bytes).max(1), |chunk, rows| {
                        let rows = rows.chunks_exact_mut(row_bytes.max(1));
                        for (row, out) in (chunk * ROWS..).zip(rows) {
                            let values = &values[row * cols..(row + 1) * cols];
                            match known {
                                [] => encode_row(block_type, values, out),
                                _ => encode_row_by_importance(block_type, values, known, out),
                            }
                        }
                    });
                });
                rewritten.matrices.push(bytes);
            }
        }
        rewritten
    }
}

/// Whether the passes of training compute what the model does: that of LLaMA's layers, in either order of rows of queries and keys, as long
/// as no layer looks back less far than a sequence.
pub fn can_train(model: &Model) -> bool {
    let sees_all = |window: &Option<usize>| window.is_none_or(|window| window >= LENGTH);
    let family = model.config.family();
    family.is_llama_in_another_order() && model.config.windows.iter().all(sees_all)
}
