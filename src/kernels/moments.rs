//! What means and variances of activations follow from.

use std::ops::Range;

use super::team::SharedSlice;
use super::{Kernels, Team};

/// Sums over the tokens of activations X `[tokens, cols]`, some tokens at a time.
#[derive(Debug, Default)]
pub struct Moments {
    tokens: usize,
    cols: usize,
    /// Tokens of a part.
    part_tokens: usize,
    /// `[parts, 3, cols]`: near, sums, squares.
    parts: Vec<f32>,
}

/// Sums over some tokens, `[cols]` each, relative to one of them, so that a large mean does not swallow a small variance.
#[derive(Debug, Clone, Copy)]
pub struct MomentsPart<'a> {
    /// Tokens of this part.
    pub tokens: usize,
    /// A token of X.
    pub near: &'a [f32],
    /// Σ (x − near)
    pub sums: &'a [f32],
    /// Σ (x − near)²
    pub squares: &'a [f32],
}

impl Moments {
    /// Those of x `[n, cols]`.
    ///
    /// # Panics
    /// If x is not a whole number of rows.
    pub fn of(team: &Team, x: &[f32], cols: usize) -> Self {
        let kernels = team.kernels();
        let tokens = x.len().checked_div(cols).unwrap_or(0);
        assert_eq!(x.len(), tokens * cols, "whole rows");
        let mut moments = Self::default();
        let writer = moments.begin(kernels, tokens, cols);
        let each = writer.part_tokens;
        team.items(tokens.div_ceil(each), |part| {
            let tokens = part * each..((part + 1) * each).min(tokens);
            let x = &x[tokens.start * cols..tokens.end * cols];
            // SAFETY: every part is handed out once.
            unsafe { writer.put(tokens, 0..cols, x) };
        });
        moments
    }

    /// Takes on a new shape, to be filled part by part.
    pub(super) fn begin(&mut self, kernels: Kernels, tokens: usize, cols: usize) -> Writer<'_> {
        // As attention writes them.
        let part_tokens = kernels.table().attend_tokens;
        let len = tokens.div_ceil(part_tokens) * 3 * cols;
        if self.parts.len() < len {
            self.parts.resize(len, 0.0);
        }
        (self.tokens, self.cols, self.part_tokens) = (tokens, cols, part_tokens);
        Writer {
            kernels,
            cols,
            part_tokens,
            parts: SharedSlice::new(&mut self.parts),
        }
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns of X.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Part by part, in the order of the tokens.
    pub fn parts(&self) -> impl Iterator<Item = MomentsPart<'_>> {
        (0..self.tokens.div_ceil(self.part_tokens.max(1))).map(|part| {
            let at = |which: usize| {
                let first = (3 * part + which) * self.cols;
                &self.parts[first..first + self.cols]
            };
            MomentsPart {
                tokens: self.part_tokens.min(self.tokens - part * self.part_tokens),
                near: at(0),
                sums: at(1),
                squares: at(2),
            }
        })
    }
}

/// Where several threads put parts of [`Moments`].
pub(super) struct Writer<'a> {
    kernels: Kernels,
    cols: usize,
    part_tokens: usize,
    parts: SharedSlice<'a, f32>,
}

impl Writer<'_> {
    /// Sums over x `[tokens.len(), cols.len()]`, in parts; tokens must begin at one and end at one or with all.
    ///
    /// # Safety
    /// No other thread may hold any of these columns of these parts.
    pub(super) unsafe fn put(&self, tokens: Range<usize>, cols: Range<usize>, x: &[f32]) {
        debug_assert!(tokens.start.is_multiple_of(self.part_tokens), "whole parts");
        let width = cols.len();
        for (i, x) in x.chunks(self.part_tokens * width.max(1)).enumerate() {
            let part = tokens.start / self.part_tokens + i;
            let at = |which: usize| {
                let first = (3 * part + which) * self.cols;
                // SAFETY: the caller vouches for it.
                unsafe { self.parts.range(first + cols.start..first + cols.end) }
            };
            self.kernels.moments(x, width, at(0), at(1), at(2));
        }
    }
}
