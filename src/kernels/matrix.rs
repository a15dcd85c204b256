//! Weights as the kernels see them.

use std::ops::Range;

use super::{sys, type_of};
use crate::quant::{BlockType, GROUP, Layout, can_be_narrow, index_entry, least_indexed_len};

/// A stored weight matrix W `[rows, cols]`, row-major: a view on bytes that lie elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    block_type: BlockType,
    layout: Layout,
    rows: usize,
    cols: usize,
    data: &'a [u8],
    /// The first group in `data`, of sparse and of narrow weights.
    first_group: usize,
}

impl<'a> MatrixView<'a> {
    /// Of sparse and narrow weights nothing is looked at but the length: the kernels read nothing beyond `data`, whatever it holds, and
    /// [`check_sparse`](crate::quant::check_sparse) tells what does not hold a sparse matrix.
    ///
    /// # Panics
    /// If `data` is not exactly the bytes of such a matrix; of sparse and narrow weights, if it is too short for their index, or weights of
    /// this type and width cannot be such.
    pub fn new(
        block_type: BlockType,
        layout: Layout,
        rows: usize,
        cols: usize,
        data: &'a [u8],
    ) -> Self {
        let dense = rows * block_type.row_bytes(cols);
        let fits = match layout {
            Layout::Native | Layout::Packed => data.len() == dense,
            Layout::Sparse | Layout::Narrow => {
                let least = least_indexed_len(rows).unwrap_or(usize::MAX);
                let possible = match layout {
                    Layout::Narrow => can_be_narrow(block_type, cols),
                    _ => block_type.has_sparse(),
                };
                possible && data.len() >= least
            }
        };
        assert!(
            fits,
            "{} bytes for a matrix of {rows} x {cols} {} {layout:?}",
            data.len(),
            block_type.name()
        );
        let layout = match layout {
            // What does not pack lies in native rows.
            Layout::Packed if !block_type.packs() => Layout::Native,
            layout => layout,
        };
        Self {
            block_type,
            layout,
            rows,
            cols,
            data,
            first_group: 0,
        }
    }

    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether an index says where its groups are.
    fn is_indexed(&self) -> bool {
        matches!(self.layout, Layout::Sparse | Layout::Narrow)
    }

    /// Bytes of all rows, about as many if an index says where they are and is damaged.
    pub(super) fn bytes(&self) -> usize {
        if !self.is_indexed() {
            return self.data.len();
        }
        let offset = |group| index_entry(self.data, self.first_group + group);
        let bytes = offset(self.rows.div_ceil(GROUP)).saturating_sub(offset(0));
        usize::try_from(bytes).map_or(self.data.len(), |bytes| bytes.min(self.data.len()))
    }

    /// Some of its rows. If they are not native they must begin at a group, and end at one or with the matrix.
    pub(super) fn rows_in(self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows of a matrix"
        );
        let len = rows.len();
        if self.is_indexed() {
            assert!(rows.start.is_multiple_of(GROUP), "groups begin at {GROUP}");
            return Self {
                rows: len,
                first_group: self.first_group + rows.start / GROUP,
                ..self
            };
        }
        let size = self.block_type.row_bytes(self.cols);
        Self {
            rows: len,
            data: &self.data[rows.start * size..rows.end * size],
            ..self
        }
    }

    /// Whether all of its rows are in groups.
    pub(super) fn is_grouped_whole(&self) -> bool {
        match self.layout {
            Layout::Native => false,
            Layout::Packed => self.rows.is_multiple_of(GROUP),
            Layout::Sparse | Layout::Narrow => true,
        }
    }

    pub(super) fn to_sys(self) -> sys::fk_weights {
        sys::fk_weights {
            type_: type_of(self.block_type),
            layout: match self.layout {
                Layout::Native => sys::fk_layout::FK_LAYOUT_NATIVE,
                Layout::Packed => sys::fk_layout::FK_LAYOUT_PACKED,
                Layout::Sparse => sys::fk_layout::FK_LAYOUT_SPARSE,
                Layout::Narrow => sys::fk_layout::FK_LAYOUT_NARROW,
            },
            data: self.data.as_ptr(),
            row_bytes: self.block_type.row_bytes(self.cols),
            rows: self.rows,
            cols: self.cols,
            bytes: self.data.len(),
            // 8 bytes for each group.
            index: self.data[8 * self.first_group..].as_ptr(),
        }
    }
}
