//! Which weights of a matrix stay.

/// A bit for every weight of a matrix `[rows, cols]`: 1 where it stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepMask {
    rows: usize,
    cols: usize,
    /// `[rows, row_words]`; column j of a row is bit j % 64 of word j / 64, and bits behind the last column are 0.
    words: Vec<u64>,
}

impl KeepMask {
    /// All weights stay.
    pub fn new_full(rows: usize, cols: usize) -> Self {
        let mut words = vec![u64::MAX; rows * row_words(cols)];
        let rest = cols % 64;
        if rest > 0 {
            for row in words.chunks_exact_mut(row_words(cols)) {
                row[cols / 64] = (1 << rest) - 1;
            }
        }
        Self { rows, cols, words }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether a weight stays.
    pub fn keep(&self, row: usize, col: usize) -> bool {
        is_kept(self.row(row), col)
    }

    /// Lets a weight go.
    pub fn remove(&mut self, row: usize, col: usize) {
        let width = self.row_words();
        remove(&mut self.words[row * width..(row + 1) * width], col);
    }

    /// The words of a row.
    pub fn row(&self, row: usize) -> &[u64] {
        let width = self.row_words();
        &self.words[row * width..(row + 1) * width]
    }

    /// How many words a row has.
    pub fn row_words(&self) -> usize {
        row_words(self.cols)
    }

    /// The words of all rows.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// How many weights go.
    pub fn removed(&self) -> usize {
        let kept: u32 = self.words.iter().map(|word| word.count_ones()).sum();
        self.rows * self.cols - kept as usize
    }
}

/// Whether a weight of a row stays, given the row's words.
pub fn is_kept(row: &[u64], col: usize) -> bool {
    row[col / 64] >> (col % 64) & 1 == 1
}

/// Lets a weight of a row go, given the row's words.
pub fn remove(row: &mut [u64], col: usize) {
    row[col / 64] &= !(1 << (col % 64));
}

fn row_words(cols: usize) -> usize {
    cols.div_ceil(64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_mask_keeps_everything_and_loses_what_is_removed() {
        for cols in [1, 63, 64, 65, 128, 200] {
            let mut mask = KeepMask::new_full(3, cols);
            assert_eq!(mask.removed(), 0, "{cols} columns");
            mask.remove(1, cols - 1);
            mask.remove(2, 0);
            mask.remove(2, 0);
            assert_eq!(mask.removed(), 2, "{cols} columns");
            assert!(mask.keep(0, 0) && !mask.keep(2, 0) && !mask.keep(1, cols - 1));
        }
    }
}
