//! SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1): columns are decided from the first to the last, and
//! what a weight that goes leaves undone is made up for by the weights of its row that are not decided yet.
//!
//! With the second moment H = X Xᵀ of the inputs, damped by 1 % of its mean diagonal, and the upper triangular U of UᵀU = H⁻¹, removing w_j
//! costs w_j² / U_jj², and the columns k > j then change by −(w_j / U_jj) U_jk. Masks are chosen in blocks of 128 columns, by what the
//! weights have become when a block's turn comes: over all rows of the block for a share, or group by group.

use std::sync::atomic::{AtomicBool, Ordering};

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

use super::choice::Pattern;
use super::score::lowest;
use crate::kernels::{Runtime, Team};
use crate::quant::{KeepMask, is_kept, remove_from};

/// What is added to the diagonal of H, in shares of its mean.
const DAMPENING: f64 = 0.01;
/// Columns that are decided together.
const BLOCK: usize = 128;
/// Rows that a thread works on at a time.
const ROWS: usize = 16;

/// What the inputs of a projection say about its columns.
#[derive(Debug)]
pub struct Factor {
    columns: usize,
    /// U, `[columns, columns]`, row by row; 0 below the diagonal.
    upper: Vec<f64>,
    /// Columns whose input is always 0.
    dead: Vec<usize>,
}

/// What becomes of a matrix.
#[derive(Debug)]
pub struct Surgery {
    pub mask: KeepMask,
    /// All weights, `[rows, columns]`; 0 where they go.
    pub weights: Vec<f32>,
}

impl Factor {
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

    /// Row j of U.
    fn row(&self, j: usize) -> &[f64] {
        &self.upper[j * self.columns..(j + 1) * self.columns]
    }
}

/// Some rows on their way through the columns.
struct Chunk<'a> {
    weights: &'a mut [f64],
    mask: &'a mut [u64],
}

/// Prunes a matrix `[rows, columns]`; `None` if its weights are not all numbers.
///
/// # Panics
/// If the factor was made for another number of columns, or groups do not fill the rows.
pub fn prune(
    runtime: &Runtime,
    factor: &Factor,
    weights: &[f32],
    rows: usize,
    pattern: Pattern,
) -> Option<Surgery> {
    let cols = factor.columns;
    assert!(weights.len() == rows * cols && cols.is_multiple_of(pattern.group()));
    let mut mask = KeepMask::new_full(rows, cols);
    if weights.is_empty() {
        return Some(Surgery {
            mask,
            weights: Vec::new(),
        });
    }
    let mut w: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    for row in w.chunks_exact_mut(cols) {
        factor.dead.iter().for_each(|j| row[*j] = 0.0);
    }
    // Groups are not cut in two.
    let group = pattern.group();
    let block = (BLOCK / group).max(1) * group;
    let sound = AtomicBool::new(true);
    for begin in (0..cols).step_by(block) {
        let columns = begin..(begin + block).min(cols);
        if let Pattern::Share(share) = pattern {
            let mut scores: Vec<(f64, u32)> = Vec::with_capacity(rows * columns.len());
            for (i, row) in w.chunks_exact(cols).enumerate() {
                scores.extend(columns.clone().map(|j| {
                    let number = i * columns.len() + (j - begin);
                    (score(factor, row, j), number as u32)
                }));
            }
            if scores.iter().any(|(score, _)| score.is_nan()) {
                return None;
            }
            let gone = (share * scores.len() as f64) as usize;
            for (_, number) in lowest(&mut scores, gone) {
                let number = *number as usize;
                mask.remove(number / columns.len(), begin + number % columns.len());
            }
        }
        let width = mask.row_words();
        let mut chunks: Vec<Chunk> = w
            .chunks_mut(ROWS * cols)
            .zip(mask.words_mut().chunks_mut(ROWS * width))
            .map(|(weights, mask)| Chunk { weights, mask })
            .collect();
        runtime.region(|team: &Team| {
            team.chunks_mut(&mut chunks, 1, |_, chunk| {
                if !decide(factor, columns.clone(), pattern, &mut chunk[0]) {
                    sound.store(false, Ordering::Relaxed);
                }
            });
        });
        if !sound.load(Ordering::Relaxed) {
            return None;
        }
    }
    let weights: Vec<f32> = w.iter().map(|w| *w as f32).collect();
    let sound = weights.iter().all(|w| w.is_finite());
    sound.then_some(Surgery { mask, weights })
}

/// What removing the weight of a column costs.
fn score(factor: &Factor, row: &[f64], j: usize) -> f64 {
    let ratio = row[j] / factor.row(j)[j];
    ratio * ratio
}

/// Decides some columns of some rows, and lets the columns behind make up for them. Where the mask goes by groups it is chosen here. Says
/// whether all scores are numbers.
fn decide(
    factor: &Factor,
    columns: std::ops::Range<usize>,
    pattern: Pattern,
    chunk: &mut Chunk,
) -> bool {
    let (cols, width) = (factor.columns, columns.len());
    let Chunk { weights, mask } = chunk;
    let rows = weights.len() / cols;
    let row_words = mask.len() / rows;
    let mut errors = vec![0.0f64; rows * width];
    let mut scores: Vec<(f64, u32)> = Vec::new();
    let each = weights
        .chunks_exact_mut(cols)
        .zip(mask.chunks_exact_mut(row_words))
        .zip(errors.chunks_exact_mut(width));
    for ((row, mask), errors) in each {
        for j in columns.clone() {
            if let Pattern::OfGroup { stay, group } = pattern
                && (j - columns.start).is_multiple_of(group)
            {
                scores.clear();
                scores.extend((j..j + group).map(|j| (score(factor, row, j), j as u32)));
                if scores.iter().any(|(score, _)| score.is_nan()) {
                    return false;
                }
                for (_, j) in lowest(&mut scores, group - stay) {
                    remove_from(mask, *j as usize);
                }
            }
            if is_kept(mask, j) {
                continue;
            }
            let upper = factor.row(j);
            let error = row[j] / upper[j];
            let behind = j + 1..columns.end;
            for (w, u) in row[behind.clone()].iter_mut().zip(&upper[behind]) {
                *w -= error * u;
            }
            row[j] = 0.0;
            errors[j - columns.start] = error;
        }
    }
    if columns.end < cols {
        // The other columns all at once: W −= E U.
        let end = columns.end;
        let behind = &mut weights[end..];
        // (The function for mutable matrices of rows with a stride takes columns for rows, in faer 0.24, and writes past the end.)
        let behind =
            MatMut::from_column_major_slice_with_stride_mut(behind, cols - end, rows, cols);
        let behind = behind.transpose_mut();
        let errors = MatRef::from_row_major_slice(&errors, rows, width);
        let upper = &factor.upper[columns.start * cols + end..end * cols];
        let upper = MatRef::from_row_major_slice_with_stride(upper, width, cols - end, cols);
        matmul(behind, Accum::Add, errors, upper, -1.0, Par::Seq);
    }
    true
}
