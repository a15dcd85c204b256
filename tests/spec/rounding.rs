//! Encoding in which the weights of a row make up for each other's rounding: less error where it counts, what small changes are worth, and
//! the edges.

use flapjack::prune::{InverseFactor, rounding};
use flapjack::quant::{BlockType, encode_row_by_importance};

use crate::common::Random;
use crate::common::blocks::{LONG_BLOCKS, decode, encode, there_and_back};
use crate::common::pruning::correlated;
use crate::common::synthetic::runtime;

const COLS: usize = 256;
const ROWS: usize = 19;

/// Types of short blocks and of long ones.
fn types() -> impl Iterator<Item = BlockType> {
    use BlockType::{IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let short = [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL];
    short.into_iter().chain(LONG_BLOCKS)
}

fn factor(moment: &[f64]) -> InverseFactor {
    InverseFactor::new(COLS, |i, j| moment[i * COLS + j]).expect("a factor")
}

fn rounded(threads: usize, moment: &[f64], to: BlockType, weights: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; weights.len() / COLS * to.row_bytes(COLS)];
    let factor = factor(moment);
    runtime(threads).region(|team| rounding::encode(team, &factor, to, weights, &mut bytes));
    bytes
}

/// The squared error of all outputs over the inputs that `moment` is of.
fn error(weights: &[f32], to: BlockType, bytes: &[u8], moment: &[f64]) -> f64 {
    let decoded = decode(to, bytes);
    let errors: Vec<f64> = weights
        .iter()
        .zip(&decoded)
        .map(|(w, d)| f64::from(w - d))
        .collect();
    let of_row = |e: &[f64]| -> f64 {
        let through = |i: usize| (0..COLS).map(|j| moment[i * COLS + j] * e[j]).sum::<f64>();
        (0..COLS).map(|i| e[i] * through(i)).sum()
    };
    errors.chunks(COLS).map(of_row).sum()
}

#[test]
fn outputs_err_less_than_where_each_weight_is_rounded_by_itself() {
    let (_, moment) = correlated(600, COLS);
    let squares: Vec<f32> = (0..COLS).map(|j| moment[j * COLS + j] as f32).collect();
    let weights = Random::new(5).normals(ROWS * COLS, 0.1);
    for to in types() {
        let mut alone = vec![0; ROWS * to.row_bytes(COLS)];
        encode_row_by_importance(to, &weights, &squares.repeat(ROWS), &mut alone);
        let alone = error(&weights, to, &alone, &moment);
        let together = error(&weights, to, &rounded(2, &moment, to, &weights), &moment);
        assert!(together < 0.8 * alone, "{to:?}: {together} for {alone}");
    }
}

#[test]
fn changes_of_less_than_half_a_step_are_not_lost() {
    let (_, moment) = correlated(600, COLS);
    let mut random = Random::new(6);
    for to in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q4_K] {
        let before = encode(to, &random.normals(ROWS * COLS, 0.1));
        // Of one direction, as a few steps of training change weights: a twentieth of what they are.
        let (a, b) = (random.normals(COLS, 0.1), random.normals(ROWS, 0.05));
        let mut weights = decode(to, &before);
        for (row, b) in weights.chunks_mut(COLS).zip(&b) {
            row.iter_mut().zip(&a).for_each(|(w, a)| *w += a * b);
        }
        let undone = error(&weights, to, &before, &moment);
        let rounded = error(&weights, to, &rounded(1, &moment, to, &weights), &moment);
        assert!(rounded < 0.7 * undone, "{to:?}: {rounded} for {undone}");
    }
}

#[test]
fn what_is_of_the_type_already_stays() {
    let (_, moment) = correlated(600, COLS);
    for to in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
        let weights = there_and_back(to, &Random::new(7).normals(ROWS * COLS, 0.1));
        let after = decode(to, &rounded(1, &moment, to, &weights));
        let worst = weights.iter().zip(&after).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0f32, f32::max);
        assert!(worst < 1e-3, "{to:?}: {worst}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing_and_inputs_may_be_always_zero() {
    let (_, mut moment) = correlated(600, COLS);
    for j in 0..COLS {
        moment[7 * COLS + j] = 0.0;
        moment[j * COLS + 7] = 0.0;
    }
    let weights = Random::new(8).normals(40 * COLS, 0.1);
    for to in types() {
        let one = rounded(1, &moment, to, &weights);
        assert_eq!(rounded(3, &moment, to, &weights), one, "{to:?}");
        assert!(decode(to, &one).iter().all(|w| w.is_finite()), "{to:?}");
    }
    assert!(rounded(2, &moment, BlockType::Q4_1, &[]).is_empty());
}
