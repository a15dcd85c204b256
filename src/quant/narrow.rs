//! The narrow layout: packed 16-bit floats in 12 bits, all of their bits included.
//!
//! Most models were trained in bfloat16, and nearly all of their weights are bfloat16 numbers between 2⁻¹⁵ and 2, also where a file has
//! them in F16. The layout, defined in `vendor/flapkern/include/flapkern.h`, leaves out the bits that all such numbers share and lists the few
//! other numbers: nothing is lost, and a generated token reads a quarter fewer bytes.

use std::ops::Range;

use super::index::{LINE, TAIL, index_entry, index_len, write_index};
use super::{BlockType, GROUP, decode_row, pack};

/// Columns of a block.
const BLOCK: usize = 32;
/// Columns that lie together, and how many bytes of them.
const EIGHT: usize = 8;
const EIGHT_BYTES: usize = 3 * 4 * GROUP;
/// Columns of a word.
const TWO: usize = 2;
/// Bytes of a listed number, and of what comes before the first.
const LISTED: usize = 8;
/// Rows have no more columns than this.
const MOST_COLS: usize = 65536;

/// How much of the bytes must be spared for it to be worth the while.
const LEAST_GAIN: f64 = 0.05;

/// Of a number in bfloat16 the bits that are stored in a block, and the others, as all of them have them.
const STORED: u16 = 0x87ff;
const COMMON: u16 = 0x3800;

/// Numbers of eight columns: of the 16 rows in each.
type Eight = [[u16; GROUP]; EIGHT];

impl BlockType {
    /// Whether weights of this type can be narrow.
    pub const fn has_narrow(self) -> bool {
        matches!(self, BlockType::F16 | BlockType::BF16)
    }
}

/// The bits of a number that are stored in a block, and whether it can be brought back from them.
///
/// # Panics
/// If weights of this type cannot be narrow.
#[inline(always)]
fn stored_bits(block_type: BlockType, number: u16) -> (u16, bool) {
    match block_type {
        BlockType::F16 => {
            // Numbers from 2⁻¹⁵ to 2⁻¹⁴ are subnormal in F16: their leading one is the first bit of the fraction. Smaller ones do not fit.
            let normal = number & 0x3c00 != 0;
            let bits = if normal {
                (number & 0x3fff) >> 3
            } else {
                (number & 0x1ff) >> 2
            };
            let mask = if normal { 0x4007 } else { 0x4203 };
            let wanted = if normal { 0 } else { 0x200 };
            (number & 0x8000 | bits, number & mask == wanted)
        }
        BlockType::BF16 => (number & STORED, number & !STORED == COMMON),
        _ => panic!("weights of type {} have no narrow form", block_type.name()),
    }
}

/// The number of this type whose [`stored_bits`] these are.
fn number_of(block_type: BlockType, stored: u16) -> u16 {
    let (sign, bits) = (stored & 0x8000, stored & 0x7ff);
    match block_type {
        BlockType::F16 if bits & 0x780 == 0 => sign | 0x200 | bits << 2,
        BlockType::F16 => sign | bits << 3,
        _ => sign | COMMON | bits,
    }
}

/// The columns of a row that fill blocks.
fn in_blocks(cols: usize) -> usize {
    cols / BLOCK * BLOCK
}

/// Where in a group the columns begin that fill no block, and where the list does.
fn places(cols: usize) -> (usize, usize) {
    let rest = in_blocks(cols) / EIGHT * EIGHT_BYTES;
    (rest, rest + 2 * GROUP * (cols % BLOCK))
}

/// The words of eight columns' stored bits: those of the last two columns lie in bits that the other six leave free.
fn to_words(stored: &Eight) -> [[u32; GROUP]; 3] {
    let mut words = [[0; GROUP]; 3];
    for row in 0..GROUP {
        let two =
            |first: usize| u32::from(stored[first][row]) | u32::from(stored[first + 1][row]) << 16;
        let last = two(6);
        words[0][row] = two(0) | (last & 0x000f_000f) << 11;
        words[1][row] = two(2) | (last & 0x00f0_00f0) << 7;
        words[2][row] = two(4) | (last & 0x0700_0700) << 3 | (last & 0x8000_8000) >> 1;
    }
    words
}

/// The reverse of [`to_words`] for one row.
fn from_words([a, b, c]: [u32; 3]) -> [u16; EIGHT] {
    let last = a >> 11 & 0x000f_000f
        | b >> 7 & 0x00f0_00f0
        | c >> 3 & 0x0700_0700
        | (c & 0x4000_4000) << 1;
    let mut stored = [0; EIGHT];
    for (two, word) in stored.chunks_exact_mut(TWO).zip([a, b, c, last]) {
        two[0] = word as u16 & STORED;
        two[1] = (word >> 16) as u16 & STORED;
    }
    stored
}

/// The numbers of eight packed columns.
type PackedEight = [u8; 2 * GROUP * EIGHT];

/// How many numbers of eight columns do not fit.
#[inline(always)]
fn misfits(block_type: BlockType, eight: &PackedEight) -> u16 {
    let numbers = eight.as_chunks().0.iter();
    let fits = numbers.map(|bytes| stored_bits(block_type, u16::from_le_bytes(*bytes)).1);
    fits.map(|fits| u16::from(!fits)).sum()
}

/// The stored bits of eight columns, those of the placeholder where a number does not fit, and whether all of them do.
#[inline(always)]
fn stored_of(block_type: BlockType, eight: &PackedEight) -> (Eight, bool) {
    let mut stored = [[0; GROUP]; EIGHT];
    let mut all = u16::MAX;
    for (stored, bytes) in stored
        .as_flattened_mut()
        .iter_mut()
        .zip(eight.as_chunks().0)
    {
        let (bits, fits) = stored_bits(block_type, u16::from_le_bytes(*bytes));
        let mask = if fits { u16::MAX } else { 0 };
        *stored = bits & mask;
        all &= mask;
    }
    (stored, all != 0)
}

/// The numbers of the first `rows` rows of eight packed columns that do not fit: column, row and number.
fn listed_in(
    block_type: BlockType,
    rows: usize,
    eight: &PackedEight,
) -> impl Iterator<Item = (usize, usize, u16)> {
    let numbers = eight.as_chunks().0.iter().enumerate();
    let placed = numbers.map(|(place, bytes)| {
        let number = u16::from_le_bytes(*bytes);
        (place / GROUP, place % GROUP, number)
    });
    placed.filter(move |&(_, row, number)| row < rows && !stored_bits(block_type, number).1)
}

/// The columns of a packed group that lie in blocks, in eights, and the others.
fn split(cols: usize, packed: &[u8]) -> (&[PackedEight], &[u8]) {
    let (whole, rest) = packed.split_at(2 * GROUP * in_blocks(cols));
    (whole.as_chunks().0, rest)
}

/// Bytes of one group in the narrow layout, given in the packed one, of whose rows the first `rows` exist.
///
/// # Panics
/// If weights of this type cannot be narrow, or `packed` is not a group of rows of `cols` values.
pub(crate) fn narrow_len(block_type: BlockType, cols: usize, rows: usize, packed: &[u8]) -> usize {
    assert_eq!(packed.len(), GROUP * block_type.row_bytes(cols), "a group");
    let mut listed = 0;
    for eight in split(cols, packed).0 {
        let all = misfits(block_type, eight);
        listed += match all == 0 || rows == GROUP {
            true => usize::from(all),
            false => listed_in(block_type, rows, eight).count(),
        };
    }
    (places(cols).1 + LISTED * (1 + listed)).next_multiple_of(LINE)
}

/// Writes one group in the narrow layout, given in the packed one, of whose rows the first `rows` exist.
///
/// # Panics
/// If `group` has not [`narrow_len`] bytes.
pub(crate) fn narrow_group(
    block_type: BlockType,
    cols: usize,
    rows: usize,
    packed: &[u8],
    group: &mut [u8],
) {
    let (rest_from, list_from) = places(cols);
    let (eights, rest) = split(cols, packed);
    let (lines, others) = group.split_at_mut(list_from);
    let (count, others) = others.split_at_mut(LISTED);
    let mut listed = 0;
    let to = lines.as_chunks_mut::<EIGHT_BYTES>().0;
    for (i, (eight, to)) in eights.iter().zip(to).enumerate() {
        let (stored, all_fit) = stored_of(block_type, eight);
        let words = to_words(&stored);
        let places = to.as_chunks_mut::<4>().0.iter_mut();
        for (place, word) in places.zip(words.as_flattened()) {
            *place = word.to_le_bytes();
        }
        if all_fit {
            continue;
        }
        for (column, row, number) in listed_in(block_type, rows, eight) {
            let other = [(EIGHT * i + column) as u16, row as u16, number, 0];
            let place = others[LISTED * listed..][..LISTED].as_chunks_mut::<2>().0;
            for (place, part) in place.iter_mut().zip(other) {
                *place = part.to_le_bytes();
            }
            listed += 1;
        }
    }
    lines[rest_from..].copy_from_slice(rest);
    count.copy_from_slice(&(listed as u64).to_le_bytes());
    let unused = &mut others[LISTED * listed..];
    assert!(unused.len() < LINE, "bytes of a narrow group");
    unused.fill(0);
}

/// The listed numbers of a narrow group: column, row and number.
fn listed_of(cols: usize, group: &[u8]) -> impl Iterator<Item = (usize, usize, u16)> {
    let (head, others) = group[places(cols).1..].split_at(LISTED);
    let count = u32::from_le_bytes(head[..4].try_into().expect("four bytes"));
    let numbers = others.as_chunks::<LISTED>().0.iter().take(count as usize);
    numbers.map(|bytes| {
        let at = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
        (usize::from(at(0)), usize::from(at(1)), at(2))
    })
}

/// The words of a row of eight columns.
fn words_of(bytes: &[u8; EIGHT_BYTES], row: usize) -> [u32; 3] {
    let words = bytes.as_chunks::<4>().0;
    std::array::from_fn(|line| u32::from_le_bytes(words[GROUP * line + row]))
}

/// Brings a narrow group back into the packed layout.
///
/// # Panics
/// If weights of this type cannot be narrow, `packed` is not a group of rows of `cols` values, or `group` is damaged.
pub(crate) fn widen_group(block_type: BlockType, cols: usize, group: &[u8], packed: &mut [u8]) {
    assert_eq!(packed.len(), GROUP * block_type.row_bytes(cols), "a group");
    let (rest_from, list_from) = places(cols);
    let (whole, rest) = packed.split_at_mut(2 * GROUP * in_blocks(cols));
    let eights = group.as_chunks::<EIGHT_BYTES>().0.iter();
    let places = whole.as_chunks_mut::<{ 2 * GROUP * EIGHT }>().0;
    for (place, eight) in places.iter_mut().zip(eights) {
        for row in 0..GROUP {
            let stored = from_words(words_of(eight, row));
            for (column, stored) in stored.into_iter().enumerate() {
                let number = number_of(block_type, stored).to_le_bytes();
                place[2 * (GROUP * column + row)..][..2].copy_from_slice(&number);
            }
        }
    }
    for (column, row, number) in listed_of(cols, group) {
        whole[2 * (GROUP * column + row)..][..2].copy_from_slice(&number.to_le_bytes());
    }
    rest.copy_from_slice(&group[rest_from..list_from]);
}

/// Whether a matrix of this type and shape can be narrow.
pub fn can_be_narrow(block_type: BlockType, cols: usize) -> bool {
    block_type.has_narrow() && cols <= MOST_COLS
}

/// Where the groups of a narrow matrix lie in its bytes, given how long each is, and how many bytes it takes; `None` if that is not
/// clearly less than it takes packed.
pub(crate) fn narrow_groups(
    block_type: BlockType,
    (rows, cols): (usize, usize),
    lens: impl IntoIterator<Item = usize>,
) -> Option<(Vec<Range<usize>>, usize)> {
    let mut end = index_len(rows)?;
    let groups: Vec<Range<usize>> = lens
        .into_iter()
        .map(|len| {
            let start = end;
            end += len;
            start..end
        })
        .collect();
    let (len, packed) = (end + TAIL, rows * block_type.row_bytes(cols));
    (len as f64 <= (1.0 - LEAST_GAIN) * packed as f64).then_some((groups, len))
}

/// The bytes of a narrow matrix, given its rows in the native layout; `None` if it cannot be narrow, or nothing is gained.
///
/// # Panics
/// If `native` is not the bytes of a matrix of this shape.
pub fn encode_narrow(
    block_type: BlockType,
    (rows, cols): (usize, usize),
    native: &[u8],
) -> Option<Vec<u8>> {
    let group_bytes = GROUP * block_type.row_bytes(cols);
    assert_eq!(
        native.len(),
        rows * group_bytes / GROUP,
        "bytes of a matrix"
    );
    if !can_be_narrow(block_type, cols) || native.is_empty() {
        return None;
    }
    let rows_of = |rows: &[u8]| GROUP * rows.len() / group_bytes;
    let packed = native.chunks(group_bytes);
    let packed: Vec<_> = packed
        .map(|rows| (rows_of(rows), packed_group(block_type, cols, rows)))
        .collect();
    let lens = packed
        .iter()
        .map(|(rows, group)| narrow_len(block_type, cols, *rows, group));
    let (groups, len) = narrow_groups(block_type, (rows, cols), lens)?;
    let mut bytes = vec![0; len];
    write_index(&groups, &mut bytes[..groups[0].start]);
    for (range, (rows, group)) in groups.into_iter().zip(packed) {
        narrow_group(block_type, cols, rows, &group, &mut bytes[range]);
    }
    Some(bytes)
}

/// A whole packed group of native rows, of which the last group may have fewer.
pub(crate) fn packed_group(block_type: BlockType, cols: usize, rows: &[u8]) -> Vec<u8> {
    let mut group = rows.to_vec();
    group.resize(GROUP * block_type.row_bytes(cols), 0);
    pack(block_type, cols, &mut group);
    group
}

/// The bytes of a group of a narrow matrix.
///
/// # Panics
/// If the index is damaged.
pub(crate) fn narrow_bytes_of(bytes: &[u8], group: usize) -> &[u8] {
    let offset = |entry| usize::try_from(index_entry(bytes, entry)).unwrap_or(usize::MAX);
    &bytes[offset(group)..offset(group + 1)]
}

/// Decodes row `row` of a narrow matrix of `out.len()` columns.
///
/// # Panics
/// If there is no such row, or the bytes are not those of such a matrix.
pub fn decode_narrow_row(block_type: BlockType, bytes: &[u8], row: usize, out: &mut [f32]) {
    let (group, row) = (narrow_bytes_of(bytes, row / GROUP), row % GROUP);
    let cols = out.len();
    let (rest_from, list_from) = places(cols);
    let eights = group[..rest_from].as_chunks::<EIGHT_BYTES>().0.iter();
    let stored = eights.flat_map(|eight| from_words(words_of(eight, row)));
    let mut numbers: Vec<u16> = stored.map(|stored| number_of(block_type, stored)).collect();
    for (column, _, number) in listed_of(cols, group).filter(|listed| listed.1 == row) {
        numbers[column] = number;
    }
    let rest = group[rest_from..list_from].as_chunks::<2>().0.iter();
    let rest = rest.skip(row).step_by(GROUP);
    numbers.extend(rest.map(|bytes| u16::from_le_bytes(*bytes)));
    let native: Vec<u8> = numbers.into_iter().flat_map(u16::to_le_bytes).collect();
    decode_row(block_type, &native, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{decode_packed_row, unpack};

    fn random(state: &mut u32) -> u32 {
        *state ^= *state << 13;
        *state ^= *state >> 17;
        *state ^= *state << 5;
        *state
    }

    /// Numbers of which `odd` of 1000 are any, and the others those that fit.
    fn numbers(block_type: BlockType, count: usize, odd: u32) -> Vec<u8> {
        let mut state = 0x9e37_79b9;
        (0..count)
            .flat_map(|_| {
                let any = random(&mut state) as u16;
                let number = match random(&mut state) % 1000 < odd {
                    true => any,
                    false => number_of(block_type, any & STORED),
                };
                number.to_le_bytes()
            })
            .collect()
    }

    #[test]
    fn numbers_of_bfloat16_between_the_limits_fit_and_no_others() {
        for block_type in [BlockType::F16, BlockType::BF16] {
            for number in 0..=u16::MAX {
                let mut value = [0.0];
                decode_row(block_type, &number.to_le_bytes(), &mut value);
                let [value] = value;
                let is_one = value.to_bits() & 0xffff == 0;
                let inside = (2f32.powi(-15)..2.0).contains(&value.abs());
                let (stored, fits) = stored_bits(block_type, number);
                assert_eq!(fits, is_one && inside, "{block_type:?} {number:#x} {value}");
                if fits {
                    assert_eq!(stored, (value.to_bits() >> 16) as u16 & STORED);
                    assert_eq!(
                        number_of(block_type, stored),
                        number,
                        "{block_type:?} {value}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_narrow_matrix_gives_back_every_bit_whatever_its_numbers() {
        for block_type in [BlockType::F16, BlockType::BF16] {
            for (rows, cols) in [(16, 576), (64, 2080), (37, 171), (5, 4096), (48, 65536)] {
                for odd in [0, 1, 5, 30, 200] {
                    let row_bytes = block_type.row_bytes(cols);
                    let native = numbers(block_type, rows * cols, odd);
                    let Some(bytes) = encode_narrow(block_type, (rows, cols), &native) else {
                        let small = rows * cols < 50_000;
                        assert!(odd >= 30 || small, "{block_type:?} {rows}x{cols} {odd}");
                        continue;
                    };
                    assert!(odd < 200 && bytes.len() < native.len());
                    let mut all = Vec::new();
                    for group in 0..rows.div_ceil(GROUP) {
                        let mut packed = vec![1; GROUP * row_bytes];
                        let group = narrow_bytes_of(&bytes, group);
                        widen_group(block_type, cols, group, &mut packed);
                        unpack(block_type, cols, &mut packed);
                        all.extend(packed);
                    }
                    assert!(
                        all[..native.len()] == native,
                        "{block_type:?} {rows}x{cols} {odd}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_row_decodes_to_what_the_packed_one_does() {
        for block_type in [BlockType::F16, BlockType::BF16] {
            let (rows, cols) = (64, 1000);
            let native = numbers(block_type, rows * cols, 3);
            let bytes = encode_narrow(block_type, (rows, cols), &native).expect("it is narrow");
            let mut packed = native.clone();
            pack(block_type, cols, &mut packed);
            let (mut a, mut b) = (vec![0.0; cols], vec![1.0; cols]);
            for row in 0..rows {
                decode_packed_row(block_type, &packed, row, &mut a);
                decode_narrow_row(block_type, &bytes, row, &mut b);
                let same = a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{block_type:?} row {row}");
            }
        }
    }

    #[test]
    fn weights_that_come_from_bfloat16_take_three_quarters() {
        for block_type in [BlockType::F16, BlockType::BF16] {
            let (rows, cols) = (512, 2048);
            let native = numbers(block_type, rows * cols, 1);
            let narrow = encode_narrow(block_type, (rows, cols), &native).expect("it is narrow");
            let share = narrow.len() as f64 / native.len() as f64;
            assert!((0.75..0.76).contains(&share), "{block_type:?} {share}");
            let any = numbers(block_type, rows * cols, 1000);
            assert_eq!(encode_narrow(block_type, (rows, cols), &any), None);
        }
    }
}
