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

    /// Those weights stay for which `keeps(row, col)` holds.
    pub fn from_fn(rows: usize, cols: usize, mut keeps: impl FnMut(usize, usize) -> bool) -> Self {
        let width = row_words(cols);
        let mut words = vec![0; rows * width];
        for row in 0..rows {
            for col in 0..cols {
                words[row * width + col / 64] |= u64::from(keeps(row, col)) << (col % 64);
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
        assert!(col < self.cols, "column {col} of {}", self.cols);
        is_kept(self.row(row), col)
    }

    /// Lets a weight go.
    pub fn remove(&mut self, row: usize, col: usize) {
        assert!(col < self.cols, "column {col} of {}", self.cols);
        let width = self.row_words();
        remove_from(&mut self.words[row * width..(row + 1) * width], col);
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
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// How many weights go.
    pub fn removed(&self) -> usize {
        self.rows * self.cols - self.kept()
    }

    /// How many weights stay.
    pub fn kept(&self) -> usize {
        let kept = self.words.iter().map(|word| word.count_ones() as usize);
        kept.sum()
    }

    /// The bits of columns 32 `block` to 32 `block` + 31 of a row, the first one lowest; 0 for what is not there.
    pub(super) fn bits(&self, row: usize, block: usize) -> u32 {
        if row >= self.rows {
            return 0;
        }
        let word = self.row(row).get(block / 2).copied().unwrap_or(0);
        (word >> (block % 2 * 32)) as u32
    }
}

/// Whether a weight of a row stays, given the row's words.
pub(crate) fn is_kept(row: &[u64], col: usize) -> bool {
    row[col / 64] >> (col % 64) & 1 == 1
}

/// Lets a weight of a row go, given the row's words.
pub(crate) fn remove_from(row: &mut [u64], col: usize) {
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
            assert_eq!(mask.kept(), 3 * cols);
            mask.remove(1, cols - 1);
            mask.remove(2, 0);
            mask.remove(2, 0);
            assert_eq!(mask.kept(), 3 * cols - 2);
            assert!(mask.keep(0, 0) && !mask.keep(2, 0) && !mask.keep(1, cols - 1));
            let same =
                KeepMask::from_fn(3, cols, |r, c| (r, c) != (1, cols - 1) && (r, c) != (2, 0));
            assert_eq!(mask, same);
        }
    }

    #[test]
    fn bits_are_those_of_32_columns() {
        let mask = KeepMask::from_fn(2, 70, |row, col| row == 1 && col % 3 == 0);
        assert_eq!([0, 1, 2].map(|block| mask.bits(0, block)), [0; 3]);
        for block in 0..3 {
            let bits = (0..32).filter(|i| 32 * block + i < 70 && (32 * block + i) % 3 == 0);
            let expected = bits.map(|i| 1u32 << i).sum::<u32>();
            assert_eq!(mask.bits(1, block), expected, "block {block}");
        }
        assert_eq!(
            (mask.bits(1, 3), mask.bits(1, 9), mask.bits(2, 0)),
            (0, 0, 0)
        );
    }
}
