//! SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1): columns are decided from the first to the last, and
//! what a weight that goes leaves undone is made up for by the weights of its row that are not decided yet.
//!
//! With the second moment H = X Xᵀ of the inputs, damped by 1 % of its mean diagonal, and the upper triangular U of UᵀU = H⁻¹, removing w_j
//! costs w_j² / U_jj², and the columns k > j then change by −(w_j / U_jj) U_jk. Masks are chosen in blocks of 128 columns, by what the
//! weights have become when a block's turn comes: over all rows of the block for a share, or group by group.

use std::sync::atomic::{AtomicBool, Ordering};

use super::choice::Pattern;
use super::score::lowest;
use crate::kernels::{Runtime, Team};
use crate::prune::inverse::InverseFactor;
use crate::quant::{KeepMask, is_kept, remove_from};

/// Columns that are decided together.
const BLOCK: usize = 128;
/// Rows that a thread works on at a time.
const ROWS: usize = 16;

/// What becomes of a matrix.
#[derive(Debug)]
pub struct Surgery {
    pub mask: KeepMask,
    /// All weights, `[rows, columns]`; 0 where they go.
    pub weights: Vec<f32>,
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
    factor: &InverseFactor,
    weights: &[f32],
    rows: usize,
    pattern: Pattern,
) -> Option<Surgery> {
    let cols = factor.columns();
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
        factor.dead().iter().for_each(|j| row[*j] = 0.0);
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
fn score(factor: &InverseFactor, row: &[f64], j: usize) -> f64 {
    let ratio = row[j] / factor.row(j)[j];
    ratio * ratio
}

/// Decides some columns of some rows, and lets the columns behind make up for them. Where the mask goes by groups it is chosen here. Says
/// whether all scores are numbers.
fn decide(
    factor: &InverseFactor,
    columns: std::ops::Range<usize>,
    pattern: Pattern,
    chunk: &mut Chunk,
) -> bool {
    let (cols, width) = (factor.columns(), columns.len());
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
    factor.make_up(weights, &errors, columns);
    true
}
