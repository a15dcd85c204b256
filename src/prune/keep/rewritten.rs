//! Weights of a model that were written anew behind pruning, for putting them in their place again.

use crate::kernels::Runtime;
use crate::model::{Linear, Model};
use crate::prune::error::PruneErrorKind;
use crate::quant::{GROUP, Layout, pack, unpack};

/// All norms and biases of a model, and all projections of its layers or none.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rewritten {
    /// The bytes of the projections in the native layout, seven of each layer; empty where they stay as they are.
    pub matrices: Vec<Vec<u8>>,
    /// Of each layer the attention norm, the MLP norm and the biases of its projections; then the output norm.
    vectors: Vec<f32>,
}

impl Rewritten {
    /// The norms and biases of a model, and no projections.
    pub fn vectors_of(model: &Model) -> Self {
        let mut vectors = Vec::new();
        for layer in &model.layers {
            vectors.extend_from_slice(&layer.attention_norm);
            vectors.extend_from_slice(&layer.mlp_norm);
            for bias in layer
                .linears()
                .into_iter()
                .filter_map(|linear| linear.bias.as_ref())
            {
                vectors.extend_from_slice(bias);
            }
        }
        vectors.extend_from_slice(&model.output_norm);
        Self {
            matrices: Vec::new(),
            vectors,
        }
    }

    /// All that there is of a model.
    pub fn of(model: &Model) -> Self {
        let take = |linear: &Linear| {
            let weight = &linear.weight;
            let mut bytes = model.map.bytes()[weight.range.clone()].to_vec();
            if weight.layout == Layout::Packed {
                unpack(weight.block_type, weight.cols, &mut bytes);
            }
            bytes
        };
        Self {
            matrices: model
                .layers
                .iter()
                .flat_map(|layer| layer.linears().map(take))
                .collect(),
            ..Self::vectors_of(model)
        }
    }

    pub fn vectors(&self) -> &[f32] {
        &self.vectors
    }

    /// # Panics
    /// If there are not as many.
    pub fn set_vectors(&mut self, values: &[f32]) {
        self.vectors.copy_from_slice(values);
    }

    /// From what a file has.
    pub(super) fn from_parts(matrices: Vec<Vec<u8>>, vectors: Vec<f32>) -> Self {
        Self { matrices, vectors }
    }

    pub fn bytes(&self) -> usize {
        self.matrices.iter().map(Vec::len).sum::<usize>() + size_of_val(&self.vectors[..])
    }

    /// Puts all in its place, in a model of the same widths and types.
    ///
    /// # Errors
    /// [`PruneErrorKind::OtherShape`] if they are not this model's, before anything has changed.
    pub fn apply(&self, model: &mut Model, runtime: &Runtime) -> Result<(), PruneErrorKind> {
        let weights: Vec<_> = model
            .layers
            .iter()
            .flat_map(|layer| layer.linears().map(|linear| linear.weight.clone()))
            .collect();
        let fits = |(weight, bytes): (&crate::model::Weight, &Vec<u8>)| {
            !weight.is_sparse() && weight.range.len() == bytes.len()
        };
        let whole = self.matrices.is_empty()
            || self.matrices.len() == weights.len() && weights.iter().zip(&self.matrices).all(fits);
        if !whole || self.vectors.len() != Self::vectors_of(model).vectors.len() {
            return Err(PruneErrorKind::OtherShape("it has other widths".to_owned()));
        }
        for (weight, bytes) in weights.iter().zip(&self.matrices) {
            let to = &mut model.map.bytes_mut()[weight.range.clone()];
            to.copy_from_slice(bytes);
            if weight.layout == Layout::Packed {
                let group = GROUP * weight.block_type.row_bytes(weight.cols);
                runtime.region(|team| {
                    team.chunks_mut(to, group.max(1), |_, rows| {
                        pack(weight.block_type, weight.cols, rows);
                    });
                });
            }
        }
        let mut rest = &self.vectors[..];
        let mut put = |to: &mut [f32]| {
            let (these, behind) = rest.split_at(to.len());
            to.copy_from_slice(these);
            rest = behind;
        };
        for layer in &mut model.layers {
            put(&mut layer.attention_norm);
            put(&mut layer.mlp_norm);
            for linear in layer.linears_mut() {
                linear.bias.iter_mut().for_each(|bias| put(bias));
            }
        }
        put(&mut model.output_norm);
        Ok(())
    }
}
