//! Weights as the kernels see them.

use std::ops::Range;

use super::{sys, type_of};
use crate::quant::{BlockType, GROUP, Layout};

/// A stored weight matrix W `[rows, cols]`, row-major: a view on bytes that lie elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    block_type: BlockType,
    layout: Layout,
    rows: usize,
    cols: usize,
    data: &'a [u8],
}

impl<'a> MatrixView<'a> {
    /// # Panics
    /// If `data` is not exactly the bytes of such a matrix.
    pub fn new(
        block_type: BlockType,
        layout: Layout,
        rows: usize,
        cols: usize,
        data: &'a [u8],
    ) -> Self {
        assert_eq!(
            data.len(),
            rows * block_type.row_bytes(cols),
            "a matrix of {rows} x {cols} {}",
            block_type.name()
        );
        Self {
            block_type,
            layout,
            rows,
            cols,
            data,
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

    /// Bytes of all rows.
    pub(super) fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.block_type.row_bytes(self.cols)
    }

    /// Some of its rows. Of packed rows they must begin at a group, and end at one or with the matrix.
    pub(super) fn rows_in(self, rows: Range<usize>) -> Self {
        let size = self.row_bytes();
        Self {
            rows: rows.len(),
            data: &self.data[rows.start * size..rows.end * size],
            ..self
        }
    }

    /// Whether it is packed and all of its rows are in groups.
    pub(super) fn is_packed_whole(&self) -> bool {
        self.layout == Layout::Packed && self.rows.is_multiple_of(GROUP)
    }

    pub(super) fn to_sys(self) -> sys::fk_weights {
        sys::fk_weights {
            type_: type_of(self.block_type),
            layout: match self.layout {
                Layout::Native => sys::fk_layout::FK_LAYOUT_NATIVE,
                Layout::Packed => sys::fk_layout::FK_LAYOUT_PACKED,
            },
            data: self.data.as_ptr(),
            row_bytes: self.row_bytes(),
            rows: self.rows,
            cols: self.cols,
        }
    }
}
