//! Encoding by which the weights of a row make up for each other's rounding: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323).
//!
//! Where weights were moved by less than half a step of their type, as by a short training, rounding each by itself undoes what was
//! done. What counts is the output: the columns behind take over what a column errs, as their inputs go with its own, until that is worth a
//! step to one of them.

use std::ops::Range;

use super::inverse::InverseFactor;
use crate::kernels::Team;
use crate::quant::{BlockType, decode_row, encode_row_by_importance};

/// Rows that a thread works on at a time.
const ROWS: usize = 16;
/// How often a block is encoded on the way through its columns, each time with what the columns before have left to the others.
const TIMES: usize = 4;

/// Encodes a matrix `[rows, columns]` in a block type, `[rows, row bytes]`. What comes out is the same for any number of threads.
///
/// # Panics
/// If the columns are no whole blocks, or the lengths do not fit.
pub fn encode(team: &Team, factor: &InverseFactor, to: BlockType, weights: &[f32], out: &mut [u8]) {
    let cols = factor.columns();
    let (row_bytes, width) = (to.row_bytes(cols), to.block_len());
    if out.is_empty() {
        return;
    }
    assert_eq!(out.len() / row_bytes * cols, weights.len(), "rows");
    let costs: Vec<f32> = (0..cols)
        .map(|j| factor.row(j)[j].powi(-2) as f32)
        .collect();
    team.chunks_mut(out, ROWS * row_bytes, |chunk, out| {
        let here = out.len() / row_bytes * cols;
        let weights = &weights[chunk * ROWS * cols..][..here];
        let mut weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
        let mut errors = vec![0.0; here / cols * width];
        let mut block = Block {
            factor,
            to,
            columns: 0..width,
            values: vec![0.0; width],
            decoded: vec![0.0; width],
        };
        for (number, begin) in (0..cols).step_by(width).enumerate() {
            block.columns = begin..begin + width;
            let rows = weights.chunks_exact_mut(cols);
            let each = rows.zip(errors.chunks_exact_mut(width));
            for ((row, errors), out) in each.zip(out.chunks_exact_mut(row_bytes)) {
                let row = &mut row[block.columns.clone()];
                let out = &mut out[number * to.block_bytes()..][..to.block_bytes()];
                block.encode(row, &costs[block.columns.clone()], errors, out);
            }
            factor.make_up(&mut weights, &errors, block.columns.clone());
        }
    });
}

/// A block of a row while it is encoded.
struct Block<'f> {
    factor: &'f InverseFactor,
    to: BlockType,
    columns: Range<usize>,
    values: Vec<f32>,
    decoded: Vec<f32>,
}

impl Block<'_> {
    /// Encodes the weights of a block. `costs` are what a square error of each column costs, and `errors` becomes what each errs, divided by
    /// its U_jj, beyond what it makes up for.
    fn encode(&mut self, weights: &[f64], costs: &[f32], errors: &mut [f64], out: &mut [u8]) {
        let width = weights.len();
        let mut left = weights.to_vec();
        let piece = width.div_ceil(TIMES);
        for begin in (0..width).step_by(piece) {
            for (value, weight) in self.values.iter_mut().zip(&left) {
                *value = *weight as f32;
            }
            encode_row_by_importance(self.to, &self.values, costs, out);
            decode_row(self.to, out, &mut self.decoded);
            for j in begin..(begin + piece).min(width) {
                self.pass_on(j, &mut left);
                left[j] = f64::from(self.decoded[j]);
            }
        }
        // The last time may have changed columns that were taken for done.
        left.copy_from_slice(weights);
        for (j, error) in errors.iter_mut().enumerate() {
            *error = self.pass_on(j, &mut left);
        }
    }

    /// Leaves what a column errs to the columns of the block behind it, and returns it, divided by U_jj.
    fn pass_on(&self, j: usize, left: &mut [f64]) -> f64 {
        let upper = &self.factor.row(self.columns.start + j)[self.columns.clone()];
        let error = (left[j] - f64::from(self.decoded[j])) / upper[j];
        for (weight, u) in left.iter_mut().zip(upper).skip(j + 1) {
            *weight -= error * u;
        }
        error
    }
}
