//! Products of two matrices of floats, in all directions that training needs: Y = X Wᵀ, dX = dY W, dW = dYᵀ X.

use super::team::SharedSlice;
use super::{Kernels, Team, call, sys, with_scratch};

/// Rows and columns of a product that a thread computes at a time, at the most.
const PIECE: usize = 256;
/// Pieces begin at multiples of this.
const GRANULE: usize = 32;

/// A matrix `[rows, cols]` of floats, or the transposed of one, as a factor of a product.
#[derive(Debug, Clone, Copy)]
pub struct Factor<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    /// How far rows lie apart, and columns; one of the two is 1.
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Factor<'a> {
    /// A matrix whose rows follow each other.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "values of a matrix");
        Self::strided(values, rows, cols, cols)
    }

    /// A matrix whose rows lie `stride` values apart.
    ///
    /// # Panics
    /// If rows overlap, or there are too few values.
    pub fn strided(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let needed = match rows == 0 || cols == 0 {
            true => 0,
            false => (rows - 1) * stride + cols,
        };
        assert!(
            stride >= cols && values.len() >= needed,
            "values of a matrix"
        );
        Self {
            values,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// The transposed matrix.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// As the left factor, from a row on.
    fn left(&self, row: usize) -> sys::fk_factor {
        self.lines(row * self.row_stride, self.row_stride, self.col_stride)
    }

    /// As the right factor, from a column on.
    fn right(&self, col: usize) -> sys::fk_factor {
        self.lines(col * self.col_stride, self.col_stride, self.row_stride)
    }

    fn lines(&self, first: usize, line_stride: usize, sum_stride: usize) -> sys::fk_factor {
        sys::fk_factor {
            values: self.values[first.min(self.values.len())..].as_ptr(),
            line_stride,
            sum_stride,
        }
    }
}

/// Whether a product is added to what is there, or takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    Replace,
    Add,
}

/// out (+)= A B, with out `[rows, cols]`. What comes out is the same whoever computes what.
///
/// # Panics
/// If the shapes do not fit.
pub fn multiply(team: &Team, a: Factor, b: Factor, into: Store, out: &mut [f32]) {
    multiply_part(team, a, b, into, out, Part::All);
}

/// out += Xᵀ X of a matrix X `[n, c]`, with out `[c, c]`: its lower triangle. What comes above it is of no meaning.
///
/// # Panics
/// If the shapes do not fit.
pub fn add_gram(team: &Team, x: Factor, out: &mut [f32]) {
    multiply_part(team, x.t(), x, Store::Add, out, Part::Lower);
}

/// What is wanted of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    /// The diagonal and what is below it, of a square.
    Lower,
}

/// [`multiply`], as far as it is wanted.
fn multiply_part(team: &Team, a: Factor, b: Factor, into: Store, out: &mut [f32], part: Part) {
    let (rows, cols) = (a.rows, b.cols);
    assert_eq!(out.len(), rows * cols, "room for a product");
    assert_eq!(a.cols, b.rows, "what the factors share");
    let (high, wide) = (piece(rows), piece(cols));
    let wanted = |row: usize, col: usize| part == Part::All || col < (row + high).min(rows);
    let pieces: Vec<(usize, usize)> = (0..cols)
        .step_by(wide)
        .flat_map(|col| (0..rows).step_by(high).map(move |row| (row, col)))
        .filter(|&(row, col)| wanted(row, col))
        .collect();
    let out = SharedSlice::new(out);
    let kernels = team.kernels();
    team.items(pieces.len(), |i| {
        let (row, col) = pieces[i];
        let (high, wide) = (high.min(rows - row), wide.min(cols - col));
        let reach = match part {
            Part::All => usize::MAX,
            Part::Lower => row.saturating_sub(col),
        };
        // SAFETY: the pieces of an output do not overlap, and every one is handed out once; this one lies in it.
        unsafe {
            let to = out.as_mut_ptr().add(row * cols + col);
            run(
                kernels,
                &a.left(row),
                &b.right(col),
                (high, wide, a.cols),
                reach,
                into,
                to,
                cols,
            );
        }
    });
}

/// The length of pieces of about equal length.
fn piece(len: usize) -> usize {
    let pieces = len.div_ceil(PIECE).max(1);
    len.div_ceil(pieces).next_multiple_of(GRANULE).max(1)
}

impl Kernels {
    /// out (+)= A B on this thread, with the rows of out `stride` values apart.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn multiply(&self, a: Factor, b: Factor, into: Store, out: &mut [f32], stride: usize) {
        let (rows, cols) = (a.rows, b.cols);
        assert_eq!(a.cols, b.rows, "what the factors share");
        if rows == 0 || cols == 0 {
            return;
        }
        let needed = (rows - 1) * stride + cols;
        assert!(stride >= cols && out.len() >= needed, "room for a product");
        let (shape, to) = ((rows, cols, a.cols), out.as_mut_ptr());
        // SAFETY: out has room for rows that do not overlap.
        unsafe {
            run(
                *self,
                &a.left(0),
                &b.right(0),
                shape,
                usize::MAX,
                into,
                to,
                stride,
            )
        };
    }
}

/// Elements whose column is by more than `reach` greater than their row may be left out.
///
/// # Safety
/// `out` must have room for `rows` by `cols` values at this stride, which nobody else holds; the factors must have as many lines, and
/// `depth` places of the sum.
#[allow(clippy::too_many_arguments)] // two factors, a shape, an output, and who computes
unsafe fn run(
    kernels: Kernels,
    a: &sys::fk_factor,
    b: &sys::fk_factor,
    (rows, cols, depth): (usize, usize, usize),
    reach: usize,
    into: Store,
    out: *mut f32,
    stride: usize,
) {
    let add = (into == Store::Add).into();
    with_scratch(kernels.table().multiply_scratch, |scratch| {
        let scratch = scratch.as_mut_ptr();
        // SAFETY: the caller vouches for the shapes, and the scratch is as long as the kernel asks for.
        unsafe {
            call!(
                kernels,
                multiply(a, b, rows, cols, depth, reach, add, out, stride, scratch)
            )
        };
    });
}
