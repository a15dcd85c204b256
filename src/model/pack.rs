//! Packing weights in place, for speed, and unpacking them.

use std::ops::Range;

use super::{Layer, Model, Weight};
use crate::gguf::own_pages;
use crate::kernels::Runtime;
use crate::quant::{BlockType, GROUP, Layout, pack, unpack};

/// Bytes that a thread rearranges at a time.
const PIECE: usize = 1 << 20;

impl Model {
    /// Brings every weight matrix that multiplies, is not sparse, and whose type has one, into the packed layout. This happens
    /// inside the private map: the pages become this process's own, and the file stays as it is. Returns the bytes packed.
    pub fn pack(&mut self, runtime: &Runtime) -> usize {
        self.arrange(runtime, true)
    }

    /// Brings every weight matrix that is not sparse back into the native layout, in place too. Returns the bytes unpacked.
    pub fn unpack(&mut self, runtime: &Runtime) -> usize {
        self.widen(runtime);
        self.arrange(runtime, false)
    }

    /// Brings every weight matrix of a model that is as its file has it back into the native layout, by letting go of the pages that
    /// packing has written: they are then the file's again, and take no memory of this process.
    pub(crate) fn forget_packing(&mut self, runtime: &Runtime) {
        let sparse = self.multiplied_weights().any(|weight| weight.is_sparse());
        debug_assert!(!sparse, "a sparse weight is not as its file has it");
        if !sparse && self.map.reset().is_ok() {
            for weight in self.multiplied_weights() {
                weight.range.end = weight.range.start + weight.bytes();
                weight.layout = Layout::Native;
            }
        } else {
            self.unpack(runtime);
        }
    }

    fn arrange(&mut self, runtime: &Runtime, packed: bool) -> usize {
        let layout = if packed {
            Layout::Packed
        } else {
            Layout::Native
        };
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut shapes: Vec<(BlockType, usize)> = Vec::new();
        for weight in self.multiplied_weights() {
            let stays = matches!(weight.layout, Layout::Sparse | Layout::Narrow);
            if weight.layout == layout || stays || !weight.block_type.packs() {
                continue;
            }
            weight.layout = layout;
            let group = GROUP * weight.row_bytes();
            let whole = weight.range.start..weight.range.start + weight.rows / GROUP * group;
            for start in whole
                .clone()
                .step_by((PIECE / group.max(1)).max(1) * group.max(1))
            {
                let end = (start + (PIECE / group).max(1) * group).min(whole.end);
                ranges.push(start..end);
                shapes.push((weight.block_type, weight.cols));
            }
        }
        let bytes = ranges.iter().map(Range::len).sum();
        let mut pieces = self.map.disjoint_mut(&ranges);
        runtime.region(|team| {
            team.chunks_mut(&mut pieces, 1, |i, piece| {
                let (block_type, cols) = shapes[i];
                own_pages(piece[0]);
                match packed {
                    true => pack(block_type, cols, piece[0]),
                    false => unpack(block_type, cols, piece[0]),
                }
            });
        });
        bytes
    }

    /// The layers' projections and the output head.
    pub(super) fn multiplied_weights(&mut self) -> impl Iterator<Item = &mut Weight> {
        let head = match &mut self.output {
            Some(output) => output,
            None => &mut self.embedding,
        };
        self.layers
            .iter_mut()
            .flat_map(Layer::linears_mut)
            .map(|l| &mut l.weight)
            .chain(std::iter::once(head))
    }
}
