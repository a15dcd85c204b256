//! The inverse of the second moments of a projection's inputs, as a triangle: what tells how an error in one column of its weights is made up
//! for by the columns behind (Frantar, Singh and Alistarh, "Optimal Brain Compression", arXiv 2208.11580).

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

/// What is added to the diagonal of H, in shares of its mean.
const DAMPENING: f64 = 0.01;

/// The upper triangular U `[columns, columns]` of UᵀU = H⁻¹. H are the second moments of the inputs, with a hundredth of the mean of the diagonal
/// added to the diagonal. An error e of column j is best made up for by changing each column k behind it by −(e / U_jj) U_jk, and costs
/// e² / U_jj² then.
#[derive(Debug)]
pub struct InverseFactor {
    columns: usize,
    /// U, `[columns, columns]`, row by row; 0 below the diagonal.
    upper: Vec<f64>,
    /// Columns whose input is always 0.
    dead: Vec<usize>,
}

impl InverseFactor {
    /// By the second moments of the inputs: `moment(i, j)` for i ≥ j. `None` if they are not those of any inputs.
    pub fn new(columns: usize, moment: impl Fn(usize, usize) -> f64) -> Option<Self> {
        let n = columns;
        if n == 0 {
            return Some(Self {
                columns,
                upper: Vec::new(),
                dead: Vec::new(),
            });
        }
        let dead: Vec<usize> = (0..n).filter(|j| moment(*j, *j) == 0.0).collect();
        let diagonal = |j: usize| match moment(j, j) {
            0.0 => 1.0,
            square => square,
        };
        let damp = DAMPENING * (0..n).map(diagonal).sum::<f64>() / n as f64;
        // With the columns in reverse H = L Lᵀ; turned around again L⁻¹ is U.
        let reversed = Mat::from_fn(n, n, |i, j| match i.cmp(&j) {
            std::cmp::Ordering::Less => 0.0, // Only the lower triangle is read.
            std::cmp::Ordering::Equal => diagonal(n - 1 - i) + damp,
            std::cmp::Ordering::Greater => moment(n - 1 - j, n - 1 - i),
        });
        let factor = reversed.llt(Side::Lower).ok()?;
        drop(reversed);
        let mut inverse = Mat::zeros(n, n);
        invert_lower_triangular(inverse.as_mut(), factor.L(), Par::Seq);
        drop(factor);
        let mut upper = vec![0.0; n * n];
        for (j, row) in upper.chunks_exact_mut(n).enumerate() {
            for (k, u) in row.iter_mut().enumerate().skip(j) {
                *u = inverse[(n - 1 - j, n - 1 - k)];
            }
        }
        let sound = (0..n).all(|j| upper[j * n + j].is_normal());
        sound.then_some(Self {
            columns,
            upper,
            dead,
        })
    }

    /// Inputs of the projection.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Columns whose input is always 0.
    pub fn dead(&self) -> &[usize] {
        &self.dead
    }

    /// Row j of U.
    pub fn row(&self, j: usize) -> &[f64] {
        &self.upper[j * self.columns..(j + 1) * self.columns]
    }

    /// Changes all columns of W `[rows, columns]` that lie behind `columns`, so that they make up for what these err: W −= E U, with E
    /// `[rows, columns.len()]` these errors, each divided by its U_jj.
    pub fn make_up(&self, weights: &mut [f64], errors: &[f64], columns: std::ops::Range<usize>) {
        let (cols, width, end) = (self.columns, columns.len(), columns.end);
        if end == cols {
            return;
        }
        let rows = weights.len() / cols;
        // (The function for mutable matrices of rows with a stride takes columns for rows, in faer 0.24, and writes past the end.)
        let behind = &mut weights[end..];
        let behind =
            MatMut::from_column_major_slice_with_stride_mut(behind, cols - end, rows, cols);
        let errors = MatRef::from_row_major_slice(errors, rows, width);
        let upper = &self.upper[columns.start * cols + end..end * cols];
        let upper = MatRef::from_row_major_slice_with_stride(upper, width, cols - end, cols);
        matmul(
            behind.transpose_mut(),
            Accum::Add,
            errors,
            upper,
            -1.0,
            Par::Seq,
        );
    }
}
