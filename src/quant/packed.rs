//! The packed layout: groups of rows interleaved block by block, for the vector units.
//!
//! `vendor/flapkern/include/flapkern.h` defines it. A group takes the bytes that its rows took, so packing and unpacking
//! happen in place; rows that fill no group stay native, behind the groups.

use super::{BlockType, decode_row};

/// Rows of a group.
pub const GROUP: usize = 16;

/// Bytes of each row in a line of codes.
const WORD: usize = 4;

impl BlockType {
    /// Whether the type has a packed form.
    pub const fn can_be_packed(self) -> bool {
        self.header_halves() > 0
    }

    /// Half-precision numbers (scale, minimum) in front of a block's codes; 0 for types without blocks.
    const fn header_halves(self) -> usize {
        match self {
            BlockType::Q8_0 | BlockType::Q4_0 => 1,
            BlockType::Q4_1 => 2,
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => 0,
        }
    }
}

/// Native rows of `cols` values to packed groups, in place.
///
/// # Panics
/// If the type has no packed form or `bytes` is not a whole number of rows.
pub fn pack(block_type: BlockType, cols: usize, bytes: &mut [u8]) {
    let mut native = Vec::new();
    for group in groups(block_type, cols, bytes) {
        native.clear();
        native.extend_from_slice(group);
        let row_bytes = group.len() / GROUP;
        for (row, from) in native.chunks_exact(row_bytes).enumerate() {
            let blocks = from.chunks_exact(block_type.block_bytes());
            let packed = group.chunks_exact_mut(GROUP * block_type.block_bytes());
            for (from, to) in blocks.zip(packed) {
                place_block(block_type, from, to, row);
            }
        }
    }
}

/// Packed groups back to native rows of `cols` values, in place.
///
/// # Panics
/// As [`pack`].
pub fn unpack(block_type: BlockType, cols: usize, bytes: &mut [u8]) {
    let mut packed = Vec::new();
    for group in groups(block_type, cols, bytes) {
        packed.clear();
        packed.extend_from_slice(group);
        let row_bytes = group.len() / GROUP;
        for (row, to) in group.chunks_exact_mut(row_bytes).enumerate() {
            take_row(block_type, &packed, row, to);
        }
    }
}

/// Decodes row `row` of a packed matrix of `out.len()` columns.
///
/// # Panics
/// If there is no such row or `bytes` is not a whole number of rows.
pub fn decode_packed_row(block_type: BlockType, bytes: &[u8], row: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let row_bytes = block_type.row_bytes(out.len());
    let rows = bytes.len() / row_bytes;
    assert!(row < rows, "row {row} of {rows}");
    if row >= rows / GROUP * GROUP {
        return decode_row(block_type, &bytes[row * row_bytes..][..row_bytes], out);
    }
    let group = &bytes[row / GROUP * GROUP * row_bytes..][..GROUP * row_bytes];
    let mut native = vec![0u8; row_bytes];
    take_row(block_type, group, row % GROUP, &mut native);
    decode_row(block_type, &native, out);
}

/// The whole groups of a matrix.
fn groups(block_type: BlockType, cols: usize, bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    assert!(
        block_type.can_be_packed(),
        "{} has no packed form",
        block_type.name()
    );
    let row_bytes = block_type.row_bytes(cols);
    // A matrix without columns has no bytes either, and its groups none to walk.
    assert!(
        bytes.len().checked_rem(row_bytes).unwrap_or(bytes.len()) == 0,
        "whole rows"
    );
    bytes.chunks_exact_mut((GROUP * row_bytes).max(1))
}

/// Puts a native block where its row has its place in a packed block.
fn place_block(block_type: BlockType, native: &[u8], packed: &mut [u8], row: usize) {
    let halves = block_type.header_halves();
    let (header, codes) = native.split_at(2 * halves);
    let (headers, lines) = packed.split_at_mut(2 * halves * GROUP);
    for (half, to) in header
        .as_chunks::<2>()
        .0
        .iter()
        .zip(headers.as_chunks_mut::<{ 2 * GROUP }>().0)
    {
        to.as_chunks_mut::<2>().0[row] = *half;
    }
    for (word, line) in codes
        .as_chunks::<WORD>()
        .0
        .iter()
        .zip(lines.as_chunks_mut::<{ WORD * GROUP }>().0)
    {
        line.as_chunks_mut::<WORD>().0[row] = *word;
    }
}

/// Collects a native row from a packed group.
fn take_row(block_type: BlockType, group: &[u8], row: usize, native: &mut [u8]) {
    let size = block_type.block_bytes();
    let halves = block_type.header_halves();
    for (packed, native) in group
        .chunks_exact(GROUP * size)
        .zip(native.chunks_exact_mut(size))
    {
        let (headers, lines) = packed.split_at(2 * halves * GROUP);
        let (header, codes) = native.split_at_mut(2 * halves);
        for (half, from) in header
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(headers.as_chunks::<{ 2 * GROUP }>().0)
        {
            *half = from.as_chunks::<2>().0[row];
        }
        for (word, line) in codes
            .as_chunks_mut::<WORD>()
            .0
            .iter_mut()
            .zip(lines.as_chunks::<{ WORD * GROUP }>().0)
        {
            *word = line.as_chunks::<WORD>().0[row];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [BlockType; 3] = [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1];

    fn numbered(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    #[test]
    fn packing_and_unpacking_gives_back_the_bytes_whatever_the_number_of_rows() {
        for block_type in TYPES {
            for (rows, cols) in [(16, 32), (48, 96), (15, 64), (0, 32), (37, 160), (16, 0)] {
                let native = numbered(rows * block_type.row_bytes(cols));
                let mut bytes = native.clone();
                pack(block_type, cols, &mut bytes);
                assert_eq!(
                    bytes == native,
                    rows < GROUP || cols == 0,
                    "{block_type:?} {rows}x{cols}"
                );
                unpack(block_type, cols, &mut bytes);
                assert_eq!(bytes, native);
            }
        }
    }

    #[test]
    fn a_packed_row_decodes_to_what_the_native_one_does() {
        for block_type in TYPES {
            let (rows, cols) = (37, 96);
            let mut native = numbered(rows * block_type.row_bytes(cols));
            // Scales of ordinary size, so that no value is NaN.
            for block in native.chunks_exact_mut(block_type.block_bytes()) {
                block[1] = 0x20 | block[1] & 0x83;
                block[3] = 0x20;
            }
            let mut packed = native.clone();
            pack(block_type, cols, &mut packed);
            let (mut a, mut b) = (vec![0.0; cols], vec![1.0; cols]);
            for row in 0..rows {
                decode_row(
                    block_type,
                    &native[row * block_type.row_bytes(cols)..][..block_type.row_bytes(cols)],
                    &mut a,
                );
                decode_packed_row(block_type, &packed, row, &mut b);
                assert_eq!(a, b);
            }
        }
    }

    #[test]
    fn lines_hold_four_bytes_of_each_row() {
        let block_type = BlockType::Q4_1;
        let native: Vec<u8> = (0..GROUP * 20)
            .map(|i| (i / 20 * 16 + i % 20) as u8)
            .collect();
        let mut packed = native.clone();
        pack(block_type, 32, &mut packed);
        assert_eq!(packed[..4], [0, 1, 16, 17], "scales");
        assert_eq!(packed[32..36], [2, 3, 18, 19], "minima");
        assert_eq!(packed[64..72], [4, 5, 6, 7, 20, 21, 22, 23], "line 0");
        assert_eq!(packed[128..132], [8, 9, 10, 11], "line 1");
    }
}
