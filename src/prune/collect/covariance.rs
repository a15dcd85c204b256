//! Covariances of the inputs of a projection, accumulated by the crate's own matrix product.

use half::bf16;

use crate::kernels::{Activations, MatrixView, Product, Team, Tokens, matmul};
use crate::quant::{BlockType, Layout};

/// What is added to the diagonal of a covariance before it is inverted, in shares of the mean variance: λ of the least
/// squares.
pub const RIDGE: f64 = 1e-2;

/// Rows of the covariance that are computed together. Only panels at and below the diagonal are, which saves nearly half.
const PANEL: usize = 256;

/// The running second moments of c features about a fixed point, one sample per token.
///
/// Inputs are shifted by the mean of the first batch, so that nothing cancels when the mean is large, and rounded to
/// bfloat16, which the matrix units of CPUs take: the sums are then exactly those of inputs off by at most 2⁻⁹ of
/// themselves, and so still those of a covariance (positive semidefinite). The rounding adds at most 2⁻¹⁸ of a feature's
/// mean square about the shift to its variance, four orders of magnitude below the ridge of the least squares that use it.
#[derive(Debug, Clone)]
pub struct Covariance {
    /// Tokens seen.
    count: u64,
    /// The fixed point, `[c]`; empty before the first batch.
    shift: Vec<f32>,
    /// The sums Σ (x − shift), `[c]`.
    sums: Vec<f64>,
    /// The sums of products Σ (x − shift)(x − shift)ᵀ, `[c, c]`. Only the lower triangle means anything; above it lies what panels
    /// have computed along the way.
    products: Vec<f32>,
}

/// Compares what means something: what lies above the diagonal does not.
impl PartialEq for Covariance {
    fn eq(&self, other: &Self) -> bool {
        let ((shift, sums, rows), (shift_2, sums_2, rows_2)) = (self.parts(), other.parts());
        self.count == other.count && shift == shift_2 && sums == sums_2 && rows.eq(rows_2)
    }
}

/// Buffers that the covariances of many layers share.
#[derive(Debug, Default)]
pub struct GramScratch {
    /// A panel of the transposed inputs, `[PANEL, n]`.
    panel: Activations,
    /// The transposed inputs, `[c, n]`.
    transposed: Vec<bf16>,
    /// A panel of products, `[PANEL, c]`.
    out: Vec<f32>,
}

impl Covariance {
    pub fn new(features: usize) -> Self {
        Self {
            count: 0,
            shift: Vec::new(),
            sums: vec![0.0; features],
            products: vec![0.0; features * features],
        }
    }

    /// Bytes that the covariance of so many features takes.
    pub fn bytes(features: usize) -> usize {
        features * features * size_of::<f32>()
    }

    pub fn features(&self) -> usize {
        self.sums.len()
    }

    /// What [`Covariance::from_parts`] takes: the shift `[c]`, the sums `[c]`, and the rows of the products up to the
    /// diagonal.
    pub(in crate::prune) fn parts(&self) -> (&[f32], &[f64], impl Iterator<Item = &[f32]>) {
        let c = self.features();
        let rows = (0..c).map(move |i| &self.products[i * c..][..=i]);
        (&self.shift, &self.sums, rows)
    }

    /// The covariance that had these [`parts`](Covariance::parts); `row` fills row i of the products up to the diagonal.
    pub(in crate::prune) fn from_parts(
        count: u64,
        shift: Vec<f32>,
        sums: Vec<f64>,
        mut row: impl FnMut(&mut [f32]),
    ) -> Self {
        let c = sums.len();
        let mut products = vec![0.0; c * c];
        for i in 0..c {
            row(&mut products[i * c..][..=i]);
        }
        Self {
            count,
            shift,
            sums,
            products,
        }
    }

    /// Adds a batch x `[n, features]`, row-major.
    ///
    /// # Panics
    /// If x is not a whole number of rows.
    pub fn add(&mut self, team: &Team, x: &[f32], scratch: &mut GramScratch) {
        let c = self.features();
        if c == 0 || x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(c), "whole rows");
        let n = x.len() / c;
        if self.count == 0 {
            self.shift = (0..c)
                .map(|j| x.iter().skip(j).step_by(c).sum::<f32>() / n as f32)
                .collect();
        }
        let GramScratch {
            panel,
            transposed,
            out,
        } = scratch;
        transposed.resize(c * n, bf16::ZERO);
        let shift = &self.shift;
        // Blocks of features, so that both sides of the transposition stay in the cache.
        const BLOCK: usize = 16;
        team.chunks_mut(transposed, BLOCK * n, |block, rows| {
            let first = block * BLOCK;
            for (t, x) in x.chunks_exact(c).enumerate() {
                for (i, row) in rows.chunks_exact_mut(n).enumerate() {
                    row[t] = bf16::from_f32(x[first + i] - shift[first + i]);
                }
            }
        });
        team.chunks_mut(&mut self.sums, PANEL, |block, sums| {
            for (i, sum) in sums.iter_mut().enumerate() {
                let row = &transposed[(block * PANEL + i) * n..][..n];
                *sum += f64::from(row.iter().map(|v| v.to_f32()).sum::<f32>());
            }
        });
        for first in (0..c).step_by(PANEL) {
            let end = (first + PANEL).min(c);
            let values = panel.begin(Tokens::prefill(end - first), n);
            let source = &transposed[first * n..end * n];
            team.chunks_mut(values, n, |i, row| {
                for (to, from) in row.iter_mut().zip(&source[i * n..]) {
                    *to = from.to_f32();
                }
            });
            out.resize((end - first) * end, 0.0);
            let weights = MatrixView::new(
                BlockType::BF16,
                Layout::Native,
                end,
                n,
                bytemuck::cast_slice(&transposed[..end * n]),
            );
            matmul(
                team,
                panel,
                &mut [Product {
                    weights,
                    out: &mut out[..],
                }],
            );
            team.chunks_mut(&mut self.products[first * c..end * c], c, |i, row| {
                for (sum, product) in row.iter_mut().zip(&out[i * end..][..end]) {
                    *sum += product;
                }
            });
        }
        self.count += n as u64;
    }

    /// The mean of the product of two features; 0 before the first token.
    pub fn second_moment(&self, i: usize, j: usize) -> f64 {
        if self.count == 0 {
            return 0.0;
        }
        let (row, column) = (i.max(j), i.min(j));
        let n = self.count as f64;
        let product = f64::from(self.products[row * self.features() + column]);
        let (a, b) = (f64::from(self.shift[i]), f64::from(self.shift[j]));
        (product + a * self.sums[j] + b * self.sums[i]) / n + a * b
    }

    /// The sample covariance of two features, with n − 1; 0 for fewer than two tokens.
    pub fn get(&self, i: usize, j: usize) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let (row, column) = (i.max(j), i.min(j));
        let n = self.count as f64;
        let product = f64::from(self.products[row * self.features() + column]);
        (product - self.sums[i] * self.sums[j] / n) / (n - 1.0)
    }
}
