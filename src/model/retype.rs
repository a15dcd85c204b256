//! Matrices in other types: encoded anew in place, or beside the model, for trying out what that does while the model stays as it is.

use std::io;
use std::ops::Range;

use super::{Model, Weight};
use crate::gguf::Map;
use crate::kernels::{Runtime, Team};
use crate::quant::{BlockType, Layout, encode_row, encode_row_by_importance, pack};

/// Matrices begin at multiples of this in a map of their own.
const ALIGNMENT: usize = 64;
/// Rows that a thread encodes at a time.
const ROWS: usize = 16;

/// One of a model's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixId {
    /// The embedding, which is the output head too where it is tied to it.
    Embedding,
    /// The output head, where it is a matrix of its own.
    Output,
    /// A projection of a layer, by its place in [`Layer::linears`](super::Layer::linears).
    Projection { layer: usize, projection: usize },
}

/// A type to encode a matrix in, and how much each of its columns matters; empty where all matter alike.
#[derive(Debug, Clone, Copy)]
pub struct NewType<'a> {
    pub block_type: BlockType,
    pub importance: &'a [f32],
}

impl Model {
    /// The matrix that logits are made by.
    pub fn head_id(&self) -> MatrixId {
        match self.output {
            Some(_) => MatrixId::Output,
            None => MatrixId::Embedding,
        }
    }

    /// # Panics
    /// If there is no such matrix.
    pub fn matrix(&self, id: MatrixId) -> &Weight {
        match id {
            MatrixId::Embedding => &self.embedding,
            MatrixId::Output => self.output.as_ref().expect("a head of its own"),
            MatrixId::Projection { layer, projection } => {
                &self.layers[layer].linears()[projection].weight
            }
        }
    }

    /// Encodes a matrix in another type, in the bytes that it has in the private map; the pages behind them go back to the system.
    /// Scratch memory is the matrix in its new type.
    ///
    /// # Errors
    /// If the system does not take memory back; the matrix has its new type then.
    ///
    /// # Panics
    /// If there is no such matrix, it is sparse, or the new type does not fit its rows and its bytes.
    pub(crate) fn retype(
        &mut self,
        runtime: &Runtime,
        id: MatrixId,
        new: NewType,
    ) -> io::Result<()> {
        let (weight, old) = (self.matrix(id), self.matrix(id).range.clone());
        let mut bytes = encode(self, runtime, weight, new);
        assert!(bytes.len() <= old.len(), "a smaller type");
        if weight.layout == Layout::Packed {
            pack(new.block_type, weight.cols, &mut bytes);
        }
        let range = old.start..old.start + bytes.len();
        self.map.bytes_mut()[range.clone()].copy_from_slice(&bytes);
        let weight = match id {
            MatrixId::Embedding => &mut self.embedding,
            MatrixId::Output => self.output.as_mut().expect("a head of its own"),
            MatrixId::Projection { layer, projection } => {
                &mut self.layers[layer].linears_mut()[projection].weight
            }
        };
        weight.block_type = new.block_type;
        weight.range = range.clone();
        self.map.release(range.end..old.end)
    }

    /// A model of layer l alone, without embedding and head, of which projections have other types; those without a new one are as
    /// they are.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub(crate) fn layer_in_types(
        &self,
        runtime: &Runtime,
        l: usize,
        new: [Option<NewType>; 7],
    ) -> io::Result<Self> {
        let mut layer = self.layers[l].clone();
        let mut end = 0;
        for (linear, new) in layer.linears_mut().into_iter().zip(&new) {
            let weight = &mut linear.weight;
            if let Some(new) = new {
                weight.block_type = new.block_type;
            }
            end = place(weight, end);
        }
        let mut map = Map::anonymous(end.max(1))?;
        for ((linear, source), new) in layer
            .linears()
            .into_iter()
            .zip(self.layers[l].linears())
            .zip(new)
        {
            let bytes = &mut map.bytes_mut()[linear.weight.range.clone()];
            self.put_matrix(runtime, &source.weight, new, bytes);
        }
        Ok(self.beside(map, vec![layer], None))
    }

    /// A model of a matrix of the vocabulary alone, without layers, in another type: it embeds tokens, and makes logits.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub(crate) fn vocabulary_in_type(
        &self,
        runtime: &Runtime,
        id: MatrixId,
        new: NewType,
    ) -> io::Result<Self> {
        let source = self.matrix(id);
        let mut weight = Weight {
            block_type: new.block_type,
            ..source.clone()
        };
        let end = place(&mut weight, 0);
        let mut map = Map::anonymous(end.max(1))?;
        self.put_matrix(
            runtime,
            source,
            Some(new),
            &mut map.bytes_mut()[weight.range.clone()],
        );
        Ok(self.beside(map, Vec::new(), Some(weight)))
    }

    /// Puts a matrix into bytes of its size, in its layout.
    fn put_matrix(&self, runtime: &Runtime, source: &Weight, new: Option<NewType>, to: &mut [u8]) {
        match new {
            Some(new) => {
                to.copy_from_slice(&encode(self, runtime, source, new));
                if source.layout == Layout::Packed {
                    pack(new.block_type, source.cols, to);
                }
            }
            None => to.copy_from_slice(&self.map.bytes()[source.range.clone()]),
        }
    }

    /// A model of some matrices in a map of their own, without an embedding if none is given.
    fn beside(&self, map: Map, layers: Vec<super::Layer>, embedding: Option<Weight>) -> Self {
        Self {
            path: self.path.clone(),
            config: self.config.clone(),
            map,
            embedding: embedding.unwrap_or(Weight {
                rows: 0,
                range: 0..0,
                ..self.embedding.clone()
            }),
            layers,
            output_norm: self.output_norm.clone(),
            output: None,
            warnings: Vec::new(),
        }
    }
}

/// Gives a weight its bytes in a map where those before it end at `end`; returns where its own end.
fn place(weight: &mut Weight, end: usize) -> usize {
    let start = end.next_multiple_of(ALIGNMENT);
    let range: Range<usize> = start..start + weight.rows * weight.row_bytes();
    weight.range = range.clone();
    range.end
}

/// A matrix in another type, in the native layout.
fn encode(model: &Model, runtime: &Runtime, weight: &Weight, new: NewType) -> Vec<u8> {
    let row_bytes = new.block_type.row_bytes(weight.cols);
    let mut bytes = vec![0; weight.rows * row_bytes];
    if bytes.is_empty() {
        return bytes;
    }
    runtime.region(|team: &Team| {
        team.chunks_mut(&mut bytes, ROWS * row_bytes, |chunk, rows| {
            let mut values = vec![0.0; weight.cols];
            for (i, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
                weight.decode_row(&model.map, chunk * ROWS + i, &mut values);
                match new.importance {
                    [] => encode_row(new.block_type, &values, row),
                    all => encode_row_by_importance(new.block_type, &values, all, row),
                }
            }
        });
    });
    bytes
}
