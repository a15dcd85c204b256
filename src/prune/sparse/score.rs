//! Masks by scores that are compared within each row: |W_ij| · ‖X_j‖₂ (Wanda), or |W_ij|.

use super::choice::Pattern;
use crate::kernels::{Runtime, Team};
use crate::quant::{KeepMask, remove_from};

/// Rows that a thread scores at a time.
const ROWS: usize = 16;

/// The weights of a matrix, row by row.
pub trait Rows: Sync {
    fn rows(&self) -> usize;
    fn cols(&self) -> usize;
    /// Puts a row into `out`, `[cols]`.
    fn row(&self, row: usize, out: &mut [f32]);
}

/// What is to go where scores do not decide: nothing, for a weight is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotANumber;

/// The mask by |W_ij| · norms_j: of each row the lowest ⌊share · cols⌋ go, or of each group the lowest. Of equals those with the
/// lower number go first.
///
/// # Errors
/// If a score is not a number.
///
/// # Panics
/// If there is not a norm for every column, or groups do not fill the rows.
pub fn by_row(
    runtime: &Runtime,
    weights: &impl Rows,
    norms: &[f64],
    pattern: Pattern,
) -> Result<KeepMask, NotANumber> {
    let cols = weights.cols();
    assert!(norms.len() == cols && cols.is_multiple_of(pattern.group()));
    let mut mask = KeepMask::new_full(weights.rows(), cols);
    if weights.rows() == 0 || cols == 0 {
        return Ok(mask);
    }
    let width = mask.row_words();
    let mut chunks: Vec<(&mut [u64], bool)> = mask
        .words_mut()
        .chunks_mut(ROWS * width)
        .map(|words| (words, true))
        .collect();
    runtime.region(|team: &Team| {
        team.chunks_mut(&mut chunks, 1, |chunk, chunks| {
            let (words, sound) = &mut chunks[0];
            let mut row = vec![0.0f32; cols];
            let mut scores = Vec::with_capacity(cols);
            for (i, words) in words.chunks_exact_mut(width).enumerate() {
                weights.row(chunk * ROWS + i, &mut row);
                scores.clear();
                scores.extend(row.iter().zip(norms).enumerate().map(|(j, (w, norm))| {
                    let score = f64::from(w.abs()) * norm;
                    *sound &= !score.is_nan();
                    (score, j as u32)
                }));
                let (length, gone) = match pattern {
                    Pattern::Share(share) => (cols, (share * cols as f64) as usize),
                    Pattern::OfGroup { stay, group } => (group, group - stay),
                };
                for scores in scores.chunks_mut(length) {
                    for (_, j) in lowest(scores, gone) {
                        remove_from(words, *j as usize);
                    }
                }
            }
        });
    });
    match chunks.iter().all(|(_, sound)| *sound) {
        true => Ok(mask),
        false => Err(NotANumber),
    }
}

/// The lowest `count` of some scores; of equals those with the lower numbers.
pub(super) fn lowest(scores: &mut [(f64, u32)], count: usize) -> &[(f64, u32)] {
    if (1..scores.len()).contains(&count) {
        scores.select_nth_unstable_by(count - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    }
    &scores[..count]
}
