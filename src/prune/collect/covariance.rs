//! Covariances of the inputs of a projection, accumulated by the crate's own matrix product.

use crate::kernels::{Factor, Team, add_gram};

/// What is added to the diagonal of a covariance before it is inverted, in shares of the mean variance: λ of the least
/// squares where text is long.
pub const RIDGE: f64 = 1e-2;

/// Features that a thread sums at a time.
const SUMMED: usize = 64;

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
    /// The sums of products Σ (x − shift)(x − shift)ᵀ, `[c, c]`. Only the lower triangle means anything; above it lies what was
    /// computed along the way.
    products: Vec<f32>,
}

/// Compares what means something: what lies above the diagonal does not.
impl PartialEq for Covariance {
    fn eq(&self, other: &Self) -> bool {
        let ((shift, sums, rows), (shift_2, sums_2, rows_2)) = (self.parts(), other.parts());
        self.count == other.count && shift == shift_2 && sums == sums_2 && rows.eq(rows_2)
    }
}

/// A buffer that the covariances of many layers share.
#[derive(Debug, Default)]
pub struct GramScratch {
    /// The shifted inputs, rounded, `[n, c]`.
    shifted: Vec<f32>,
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
        let shifted = &mut scratch.shifted;
        shifted.resize(x.len(), 0.0);
        let shift = &self.shift;
        team.chunks_mut(shifted, c, |t, row| {
            for ((to, from), shift) in row.iter_mut().zip(&x[t * c..]).zip(shift) {
                *to = round_to_bf16(from - shift);
            }
        });
        team.chunks_mut(&mut self.sums, SUMMED, |block, sums| {
            let mut totals = [0.0f32; SUMMED];
            for row in shifted.chunks_exact(c) {
                let row = &row[block * SUMMED..][..sums.len()];
                for (total, value) in totals.iter_mut().zip(row) {
                    *total += value;
                }
            }
            for (sum, total) in sums.iter_mut().zip(totals) {
                *sum += f64::from(total);
            }
        });
        add_gram(team, Factor::new(shifted, n, c), &mut self.products);
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

/// The nearest number that bfloat16 has, of two that are as near the even one.
fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}
