//! The packed layout: groups of rows interleaved block by block, for the vector units.
//!
//! The layout is defined in `vendor/flapkern/include/flapkern.h`. A group takes exactly the bytes that its rows took, so that
//! packing and unpacking happen in place. The last rows, if they do not fill a group, stay native and lie behind the groups.

use super::{BlockType, decode_row};

/// The number of rows in a group.
pub const GROUP: usize = 16;

/// A run of equal elements in a block: the size of an element in bytes, and the number of elements.
type Field = (usize, usize);

impl BlockType {
    /// The fields of a block in the order of its bytes: half-precision numbers of 2 bytes, packed scales of 1 byte, and codes
    /// (with the bits that extend them) in words of 4 bytes. For plain floats a block is one value.
    pub(super) const fn fields(self) -> &'static [Field] {
        const HALF: usize = 2;
        const BYTE: usize = 1;
        const WORD: usize = 4;
        match self {
            BlockType::F32 => &[(WORD, 1)],
            BlockType::F16 | BlockType::BF16 => &[(HALF, 1)],
            BlockType::Q8_0 => &[(HALF, 1), (WORD, 8)],
            BlockType::Q4_0 | BlockType::IQ4_NL => &[(HALF, 1), (WORD, 4)],
            BlockType::Q4_1 => &[(HALF, 2), (WORD, 4)],
            BlockType::Q5_0 => &[(HALF, 1), (WORD, 1), (WORD, 4)],
            BlockType::Q5_1 => &[(HALF, 2), (WORD, 1), (WORD, 4)],
            BlockType::Q2_K => &[(BYTE, 16), (WORD, 16), (HALF, 2)],
            BlockType::Q3_K => &[(WORD, 8), (WORD, 16), (BYTE, 12), (HALF, 1)],
            BlockType::Q4_K => &[(HALF, 2), (BYTE, 12), (WORD, 32)],
            BlockType::Q5_K => &[(HALF, 2), (BYTE, 12), (WORD, 8), (WORD, 32)],
            BlockType::Q6_K => &[(WORD, 32), (WORD, 16), (BYTE, 16), (HALF, 1)],
            BlockType::IQ4_XS => &[(HALF, 1), (HALF, 1), (BYTE, 4), (WORD, 32)],
            // They are not packed.
            BlockType::MXFP4
            | BlockType::Q8_1
            | BlockType::TQ1_0
            | BlockType::TQ2_0
            | BlockType::IQ1_S
            | BlockType::IQ1_M
            | BlockType::IQ2_XXS
            | BlockType::IQ2_XS
            | BlockType::IQ2_S
            | BlockType::IQ3_XXS
            | BlockType::IQ3_S => &[],
        }
    }
}

/// Turns native rows of `cols` values into packed groups, in place. Rows of a type that does not [pack](BlockType::packs) stay.
///
/// # Panics
/// If `bytes` is not a whole number of rows.
pub fn pack(block_type: BlockType, cols: usize, bytes: &mut [u8]) {
    let block = block_type.block_bytes();
    let mut native = Vec::new();
    for group in groups(block_type, cols, bytes) {
        native.clear();
        native.extend_from_slice(group);
        let row_bytes = group.len() / GROUP;
        for (i, packed) in group.chunks_exact_mut(GROUP * block).enumerate() {
            let mut at = 0;
            for &(size, count) in block_type.fields() {
                let from = &native[i * block + at..];
                let to = &mut packed[at * GROUP..(at + size * count) * GROUP];
                match size {
                    1 => interleave::<1>(from, row_bytes, to),
                    2 => interleave::<2>(from, row_bytes, to),
                    _ => interleave::<4>(from, row_bytes, to),
                }
                at += size * count;
            }
        }
    }
}

/// Fills one field of a packed block: element 0 of every row, then element 1 of every row, and so on. `native` starts at the
/// field in the first row; the rows are `row_bytes` apart.
fn interleave<const N: usize>(native: &[u8], row_bytes: usize, packed: &mut [u8]) {
    let lines = packed.as_chunks_mut::<N>().0.chunks_exact_mut(GROUP);
    for (element, line) in lines.enumerate() {
        for (row, place) in line.iter_mut().enumerate() {
            let from = row * row_bytes + element * N;
            place.copy_from_slice(&native[from..from + N]);
        }
    }
}

/// Turns packed groups back into native rows of `cols` values, in place.
///
/// # Panics
/// If `bytes` is not a whole number of rows.
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

/// Decodes row `row` of a packed matrix of `out.len()` columns into `out`.
///
/// # Panics
/// If there is no such row, or if `out.len()` is not a whole number of blocks.
pub fn decode_packed_row(block_type: BlockType, bytes: &[u8], row: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let row_bytes = block_type.row_bytes(out.len());
    let rows = bytes.len() / row_bytes;
    assert!(row < rows, "row {row} of {rows}");
    if row >= rows / GROUP * GROUP || !block_type.packs() {
        return decode_row(block_type, &bytes[row * row_bytes..][..row_bytes], out);
    }
    let group = &bytes[row / GROUP * GROUP * row_bytes..][..GROUP * row_bytes];
    let mut native = vec![0u8; row_bytes];
    take_row(block_type, group, row % GROUP, &mut native);
    decode_row(block_type, &native, out);
}

/// The groups of a matrix, without the rows that fill no group.
fn groups(block_type: BlockType, cols: usize, bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    let row_bytes = block_type.row_bytes(cols);
    // A matrix without columns has no bytes and therefore no groups.
    assert!(
        bytes.len().checked_rem(row_bytes).unwrap_or(bytes.len()) == 0,
        "whole rows"
    );
    let bytes = if block_type.packs() { bytes } else { &mut [] };
    bytes.chunks_exact_mut((GROUP * row_bytes).max(1))
}

/// Copies row `row` of a packed group into `native`, in the native layout.
fn take_row(block_type: BlockType, group: &[u8], row: usize, native: &mut [u8]) {
    let bytes = block_type.block_bytes();
    for (packed, native) in group
        .chunks_exact(GROUP * bytes)
        .zip(native.chunks_exact_mut(bytes))
    {
        take_fields(block_type, bytes, packed, row, native);
    }
}

/// Copies row `row`'s elements of the fields in the first `len` bytes of a block into `native`, the row's block.
pub(super) fn take_fields(
    block_type: BlockType,
    len: usize,
    packed: &[u8],
    row: usize,
    native: &mut [u8],
) {
    let mut at = 0;
    for &(size, count) in block_type.fields() {
        if at == len {
            return;
        }
        let to = &mut native[at..at + size * count];
        let from = &packed[at * GROUP..(at + size * count) * GROUP];
        match size {
            1 => take::<1>(from, to, row),
            2 => take::<2>(from, to, row),
            _ => take::<4>(from, to, row),
        }
        at += size * count;
    }
}

/// Copies row `row`'s elements of one packed field into `native`.
fn take<const N: usize>(packed: &[u8], native: &mut [u8], row: usize) {
    let places = packed.as_chunks::<N>().0.iter().skip(row).step_by(GROUP);
    native
        .as_chunks_mut::<N>()
        .0
        .iter_mut()
        .zip(places)
        .for_each(|(element, place)| *element = *place);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    #[test]
    fn packing_and_unpacking_gives_back_the_bytes_whatever_the_number_of_rows() {
        for block_type in BlockType::ALL {
            for (rows, blocks) in [(16, 1), (48, 3), (15, 2), (0, 1), (37, 5), (16, 0)] {
                let cols = blocks * block_type.block_len();
                let native = numbered(rows * block_type.row_bytes(cols));
                let mut bytes = native.clone();
                pack(block_type, cols, &mut bytes);
                assert_eq!(
                    bytes == native,
                    // With one column of plain floats, packing changes nothing.
                    rows < GROUP || cols <= 1 || !block_type.packs(),
                    "{block_type:?} {rows}x{cols}"
                );
                unpack(block_type, cols, &mut bytes);
                assert_eq!(bytes, native);
            }
        }
    }

    #[test]
    fn a_packed_row_decodes_to_what_the_native_one_does() {
        for block_type in BlockType::ALL {
            let (rows, cols) = (37, 768);
            let native = numbered(rows * block_type.row_bytes(cols));
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
                // Compared by their bits, because some of the scales in these made-up blocks are NaN.
                assert!(
                    a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{block_type:?} row {row}"
                );
            }
        }
    }

    #[test]
    fn fields_fill_blocks() {
        for block_type in BlockType::ALL.into_iter().filter(|t| t.packs()) {
            let sum: usize = block_type
                .fields()
                .iter()
                .map(|(size, count)| size * count)
                .sum();
            assert_eq!(sum, block_type.block_bytes(), "{block_type:?}");
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
