//! Weights that lose single values, in place: what stays is written in the sparse layout into the bytes that all took.

use std::ops::Range;

use super::{Model, Weight};
use crate::kernels::Runtime;
use crate::quant::{
    BlockType, GROUP, KeepMask, Layout, encode_group, encode_sparse, sparse_groups, sparse_len,
    write_index,
};

/// Groups begin at multiples of this in memory, which are lines of the cache.
const ALIGNMENT: usize = 64;

/// Why a weight was not made sparse, or what went wrong then.
#[derive(Debug, thiserror::Error)]
pub enum SparseWeightError {
    #[error("{name} is of type {}, which has no sparse form", block_type.name())]
    Type { name: String, block_type: BlockType },
    #[error("{name} is sparse already")]
    Sparse { name: String },
    /// The weight is as it was.
    #[error("{name} would take {sparse} bytes, which is more than the {dense} that it takes")]
    Larger {
        name: String,
        sparse: usize,
        dense: usize,
    },
    /// The weight is sparse.
    #[error("giving memory back to the system failed: {0}")]
    Release(#[from] std::io::Error),
}

impl Model {
    /// Makes a projection of a layer, by its place in [`Layer::linears`](super::Layer::linears), sparse: those of its weights stay
    /// that `keep` has, with their codes, and the others are 0. It happens inside the private map, whose pages behind it
    /// go back to the system. Scratch memory is the sparse bytes.
    ///
    /// # Errors
    /// If the type has no sparse form, the weight is sparse, or nothing is gained; it is then as it was.
    ///
    /// # Panics
    /// If there is no such projection, or `keep` is of another shape.
    pub fn make_sparse(
        &mut self,
        runtime: &Runtime,
        layer: usize,
        projection: usize,
        keep: &KeepMask,
    ) -> Result<(), SparseWeightError> {
        let weight = &self.layers[layer].linears()[projection].weight;
        assert_eq!(
            (keep.rows(), keep.cols()),
            (weight.rows, weight.cols),
            "a bit for every weight of {}",
            weight.name
        );
        let (block_type, old) = (weight.block_type, weight.range.clone());
        let name = || weight.name.clone();
        if !block_type.has_sparse() {
            return Err(SparseWeightError::Type {
                name: name(),
                block_type,
            });
        }
        if weight.is_sparse() {
            return Err(SparseWeightError::Sparse { name: name() });
        }
        let start = first_line(&old);
        let new = start..start + sparse_len(block_type, keep);
        if new.end > old.end {
            return Err(SparseWeightError::Larger {
                name: name(),
                sparse: new.len(),
                dense: old.len(),
            });
        }
        let bytes = encode(runtime, weight, &self.map.bytes()[old.clone()], keep);
        self.map.bytes_mut()[new.clone()].copy_from_slice(&bytes);
        let weight = &mut self.layers[layer].linears_mut()[projection].weight;
        weight.layout = Layout::Sparse;
        weight.range = new.clone();
        self.map.release(new.end..old.end)?;
        Ok(())
    }

    /// Bytes that a weight could take if it were sparse.
    pub(crate) fn room_for_sparse(&self, weight: &Weight) -> usize {
        weight.range.end.saturating_sub(first_line(&weight.range))
    }

    /// Puts the bytes of a sparse matrix in the place of a projection of its type and shape, which they were checked for.
    ///
    /// # Panics
    /// If there is no such projection, or no room for them.
    pub(crate) fn put_sparse(&mut self, layer: usize, projection: usize, bytes: &[u8]) {
        let weight = &self.layers[layer].linears()[projection].weight;
        assert!(bytes.len() <= self.room_for_sparse(weight), "room");
        let (start, end) = (first_line(&weight.range), weight.range.end);
        let new = start..start + bytes.len();
        self.map.bytes_mut()[new.clone()].copy_from_slice(bytes);
        let weight = &mut self.layers[layer].linears_mut()[projection].weight;
        (weight.layout, weight.range) = (Layout::Sparse, new.clone());
        // Memory that the system does not take back is no reason to stop.
        if let Err(error) = self.map.release(new.end..end) {
            tracing::debug!("the bytes behind a sparse weight stay: {error}");
        }
    }

    /// The weights that are sparse.
    pub fn sparse_weights(&self) -> impl Iterator<Item = &Weight> {
        let linears = self.layers.iter().flat_map(|layer| layer.linears());
        linears.map(|l| &l.weight).filter(|w| w.is_sparse())
    }
}

/// Where the first group can begin in some bytes of the map.
fn first_line(range: &Range<usize>) -> usize {
    range.start.next_multiple_of(ALIGNMENT)
}

/// The sparse bytes of a weight, whose own are `dense`.
fn encode(runtime: &Runtime, weight: &Weight, dense: &[u8], keep: &KeepMask) -> Vec<u8> {
    let (block_type, row_bytes) = (weight.block_type, weight.row_bytes());
    let groups = sparse_groups(block_type, keep);
    let Some(first) = groups.first() else {
        return encode_sparse(block_type, dense, keep);
    };
    let mut bytes = vec![0; sparse_len(block_type, keep)];
    let (index, mut rest) = bytes.split_at_mut(first.start);
    write_index(&groups, index);
    let mut pieces = Vec::with_capacity(groups.len());
    for group in &groups {
        let (piece, after) = rest.split_at_mut(group.len());
        pieces.push(piece);
        rest = after;
    }
    runtime.region(|team| {
        team.chunks_mut(&mut pieces, 1, |g, piece| {
            let end = (GROUP * (g + 1)).min(weight.rows);
            // Rows that fill no group are native in the packed layout too.
            let packed = weight.layout == Layout::Packed && end == GROUP * (g + 1);
            let rows = &dense[GROUP * g * row_bytes..end * row_bytes];
            encode_group(block_type, rows, packed, keep, g, piece[0]);
        });
    });
    bytes
}
