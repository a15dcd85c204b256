//! The sparse layout: groups of rows as in the packed layout, without the weights that were removed.
//!
//! The layout is defined in `vendor/flapkern/include/flapkern.h`, and byte by byte in `docs/format.md`. Every row of a matrix
//! loses another number of weights, so that its bytes begin with an index of where each group begins.

use std::ops::Range;

use super::index::{ENTRY, LINE, TAIL, index_entry, index_len, least_indexed_len, write_index};
use super::packed::take_fields;
use super::{BlockType, GROUP, KeepMask, decode_row, pack};

/// The version of the layout.
pub(crate) const SPARSE_VERSION: u32 = 1;
/// The upper half of the number of a sparse tensor's type in GGUF files, "FJ".
const FILE_TYPE: u32 = 0x464a;

/// What the number of a tensor's type says, if it is that of a sparse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SparseType {
    /// Its values are of this type.
    Of(BlockType),
    /// It is of another version of the layout, or of a type that has no sparse form.
    Unknown { version: u32, values: u32 },
}

impl SparseType {
    /// The number in GGUF files of a type's sparse form: "FJ", the version of the layout, and the number of the type.
    pub fn id(block_type: BlockType) -> u32 {
        FILE_TYPE << 16 | SPARSE_VERSION << 8 | block_type.id()
    }

    /// `None` if it is of no sparse tensor.
    pub fn from_id(id: u32) -> Option<Self> {
        let (version, values) = (id >> 8 & 255, id & 255);
        let known =
            BlockType::from_id(values).filter(|t| t.has_sparse() && version == SPARSE_VERSION);
        (id >> 16 == FILE_TYPE).then_some(match known {
            Some(block_type) => SparseType::Of(block_type),
            None => SparseType::Unknown { version, values },
        })
    }
}

/// Columns whose masks lie together.
const PART: usize = 32;
/// Lines of 64 weights in as many columns.
const LINES: usize = 8;
/// Bytes of their masks.
const MASKS: usize = 8 * LINES;

/// Why bytes are no sparse matrix of a type and shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SparseError {
    #[error("weights of type {} have no sparse form", .0.name())]
    Type(BlockType),
    #[error("rows of {cols} values are not whole blocks of {}", block_type.name())]
    Columns { block_type: BlockType, cols: usize },
    /// It is shorter than the index, and what comes behind the last group, would be.
    #[error("{found} bytes are too few for an index of {rows} rows, which takes {least}")]
    Short {
        rows: usize,
        least: usize,
        found: usize,
    },
    #[error("entry {entry} of the index is {found} where a group can only begin at {expected}")]
    Index {
        entry: usize,
        found: u64,
        expected: u64,
    },
    #[error(
        "the masks of rows {} to {} say more values than their bytes hold, which end at byte {end}",
        rows.start, rows.end - 1
    )]
    Values { rows: Range<usize>, end: usize },
    #[error(
        "the masks of rows {} to {} have weights beyond the last row or column",
        rows.start, rows.end - 1
    )]
    Outside { rows: Range<usize> },
    #[error("byte {at} holds nothing and is not 0")]
    Padding { at: usize },
    #[error("{found} bytes follow where {expected} do")]
    Length { expected: usize, found: usize },
}

impl BlockType {
    /// Whether weights of this type can be sparse.
    pub const fn has_sparse(self) -> bool {
        matches!(
            self,
            BlockType::F16
                | BlockType::BF16
                | BlockType::Q8_0
                | BlockType::Q4_0
                | BlockType::Q4_1
                | BlockType::IQ4_NL
                | BlockType::Q4_K
        )
    }
}

/// What the layout of a type follows from.
#[derive(Debug, Clone, Copy)]
struct Form {
    block_type: BlockType,
    /// Columns of a block: 32 for plain floats too.
    cols: usize,
    /// Bytes of a row's block before its codes.
    fields: usize,
    /// Bits of a value.
    bits: usize,
}

impl Form {
    fn new(block_type: BlockType) -> Result<Self, SparseError> {
        let (bytes, len) = (block_type.block_bytes(), block_type.block_len());
        if !block_type.has_sparse() {
            return Err(SparseError::Type(block_type));
        }
        let bits = match block_type {
            BlockType::F16 | BlockType::BF16 => 16,
            BlockType::Q8_0 => 8,
            _ => 4,
        };
        Ok(Self {
            block_type,
            cols: len.max(PART),
            fields: bytes - len * bits / 8,
            bits,
        })
    }

    /// # Panics
    /// If weights of this type cannot be sparse.
    fn of(block_type: BlockType) -> Self {
        Self::new(block_type).unwrap_or_else(|error| panic!("{error}"))
    }

    fn is_float(self) -> bool {
        self.bits == 16
    }

    /// Blocks of a row.
    fn blocks(self, cols: usize) -> usize {
        cols.div_ceil(self.cols)
    }

    /// Parts of a block.
    fn parts(self) -> usize {
        self.cols / PART
    }

    /// The line and the bit there of a column (of 32) of a row of the group.
    fn place(self, row: usize, col: usize) -> (usize, usize) {
        let bit = match self.is_float() {
            true => GROUP * (col % 4) + row,
            false => 4 * row + col % 4,
        };
        (col / 4, bit)
    }

    /// The masks of the lines of 32 columns of a group.
    fn masks(self, keep: &KeepMask, group: usize, part: usize) -> [u64; LINES] {
        let mut masks = [0; LINES];
        for row in 0..GROUP {
            let bits = u64::from(keep.bits(GROUP * group + row, part));
            for (line, mask) in masks.iter_mut().enumerate() {
                let four = bits >> (4 * line) & 15;
                *mask |= match self.is_float() {
                    // Its bits come 16 apart; the products do not overlap, since the multiplier's bits are 15 apart.
                    true => ((four * 0x0000_2000_4000_8001) & 0x0001_0001_0001_0001) << row,
                    false => four << (4 * row),
                };
            }
        }
        masks
    }

    /// Where the values of each line begin, counted in values, and bytes of all: 4-bit codes of the first and the last four lines
    /// are counted apart, for they share bytes.
    fn starts(self, masks: &[u64; LINES]) -> ([usize; LINES], usize) {
        let mut starts = [0; LINES];
        let (mut next, mut longest) = (0, 0);
        for (line, mask) in masks.iter().enumerate() {
            if self.bits == 4 && line == LINES / 2 {
                (longest, next) = (next, 0);
            }
            starts[line] = next;
            next += mask.count_ones() as usize;
        }
        (starts, next.max(longest) * self.bits.max(8) / 8)
    }
}

/// How long a sparse matrix says that it is, of which these are the first bytes; `None` if they end within its index, or there is no
/// such length.
pub(crate) fn told_len(rows: usize, bytes: &[u8]) -> Option<usize> {
    if bytes.len() < index_len(rows)? {
        return None;
    }
    let end = usize::try_from(index_entry(bytes, rows.div_ceil(GROUP))).ok()?;
    end.checked_add(TAIL)
}

/// Where the groups of a sparse matrix lie in its bytes.
///
/// # Panics
/// If weights of this type cannot be sparse.
pub fn sparse_groups(block_type: BlockType, keep: &KeepMask) -> Vec<Range<usize>> {
    let form = Form::of(block_type);
    let mut end = index_len(keep.rows()).expect("a matrix in memory has an index");
    let groups = 0..keep.rows().div_ceil(GROUP);
    groups
        .map(|group| {
            let blocks = form.blocks(keep.cols());
            let mut len = GROUP * form.fields * blocks;
            for part in 0..blocks * form.parts() {
                let (_, values) = form.starts(&form.masks(keep, group, part));
                len += MASKS + values;
            }
            let start = end;
            end = (start + len).next_multiple_of(LINE);
            start..end
        })
        .collect()
}

/// Bytes of a sparse matrix of which these weights stay.
///
/// # Panics
/// If weights of this type cannot be sparse.
pub fn sparse_len(block_type: BlockType, keep: &KeepMask) -> usize {
    let end = sparse_groups(block_type, keep)
        .last()
        .map(|group| group.end);
    end.unwrap_or_else(|| index_len(0).expect("a few bytes")) + TAIL
}

/// About as many bytes as a sparse matrix takes of which this share of the weights is gone, at random places; `None` if the type has no
/// sparse form.
pub(crate) fn expected_sparse_len(
    block_type: BlockType,
    rows: usize,
    cols: usize,
    share: f64,
) -> Option<usize> {
    let form = Form::new(block_type).ok()?;
    let (blocks, groups) = (form.blocks(cols), rows.div_ceil(GROUP));
    let kept = (1.0 - share) * (GROUP * PART) as f64;
    let values = match form.bits {
        4 => {
            // The longer of two halves: their mean, and what the larger of two normal numbers is above it.
            let deviation = (kept / 2.0 * share).sqrt();
            kept / 2.0 + deviation / std::f64::consts::PI.sqrt()
        }
        bits => kept * (bits / 8) as f64,
    };
    let parts = (blocks * form.parts()) as f64;
    let group = (GROUP * form.fields * blocks) as f64 + parts * (MASKS as f64 + values);
    let line = (LINE / 2) as f64;
    Some(least_indexed_len(rows)? + (groups as f64 * (group + line)) as usize)
}

/// Encodes one group. `rows` are the bytes of its rows, of which the last group may have fewer, in the native layout; or all of
/// them packed, if `packed`.
///
/// # Panics
/// If weights of this type cannot be sparse, `rows` is not whole rows, or `out` not where [`sparse_groups`] puts the group.
pub(crate) fn encode_group(
    block_type: BlockType,
    rows: &[u8],
    packed: bool,
    keep: &KeepMask,
    group: usize,
    out: &mut [u8],
) {
    let (form, cols) = (Form::of(block_type), keep.cols());
    let full = GROUP * block_type.row_bytes(cols);
    let mut padded;
    let lines = if packed {
        assert_eq!(rows.len(), full, "a group");
        rows
    } else {
        padded = rows.to_vec();
        padded.resize(full, 0);
        pack(block_type, cols, &mut padded);
        &padded
    };
    out.fill(0);
    let (fields, block_bytes) = (
        GROUP * form.fields,
        GROUP * form.cols / block_type.block_len() * block_type.block_bytes(),
    );
    let mut at = 0;
    for (b, block) in lines.chunks(block_bytes).enumerate() {
        out[at..at + fields].copy_from_slice(&block[..fields]);
        at += fields;
        for part in 0..form.parts() {
            let masks = form.masks(keep, group, b * form.parts() + part);
            let (starts, len) = form.starts(&masks);
            let (head, values) = out[at..at + MASKS + len].split_at_mut(MASKS);
            for (place, mask) in head.as_chunks_mut::<8>().0.iter_mut().zip(masks) {
                *place = mask.to_le_bytes();
            }
            for (line, (mut mask, mut next)) in masks.into_iter().zip(starts).enumerate() {
                while mask != 0 {
                    let bit = mask.trailing_zeros() as usize;
                    form.put(&block[fields..], part, line, bit, next, values);
                    (mask, next) = (mask & (mask - 1), next + 1);
                }
            }
            at += MASKS + len;
        }
    }
    assert_eq!(at.next_multiple_of(LINE), out.len(), "room for a group");
}

impl Form {
    /// Copies the value at a bit of a line of `codes`, those of a packed block, to place `next` of the values of its part.
    fn put(
        self,
        codes: &[u8],
        part: usize,
        line: usize,
        bit: usize,
        next: usize,
        values: &mut [u8],
    ) {
        match self.block_type {
            BlockType::F16 | BlockType::BF16 => {
                let from = 2 * (64 * line + bit);
                values[2 * next..2 * next + 2].copy_from_slice(&codes[from..from + 2]);
            }
            BlockType::Q8_0 => values[next] = codes[64 * line + bit],
            BlockType::Q4_K => {
                let both = codes[64 * (part / 2 * LINES + line) + bit];
                values[next] |= (both >> (4 * (part % 2)) & 15) << (4 * (line / 4));
            }
            _ => {
                let code = codes[64 * (line % 4) + bit] >> (4 * (line / 4)) & 15;
                values[next] |= (code ^ self.absent()) << (4 * (line / 4));
            }
        }
    }

    /// The code that is stored as 0, and stands where there is no weight.
    fn absent(self) -> u8 {
        match self.block_type {
            BlockType::Q4_0 => 8,
            _ => 0,
        }
    }

    /// Puts value `next` of a part's values into a native block, as its column `col`.
    fn get(self, values: &[u8], next: usize, part: usize, col: usize, block: &mut [u8]) {
        let high = 4 * (col / 16);
        match self.block_type {
            BlockType::F16 | BlockType::BF16 => {
                block[2 * col..2 * col + 2].copy_from_slice(&values[2 * next..2 * next + 2]);
            }
            BlockType::Q8_0 => block[self.fields + col] = values[next],
            BlockType::Q4_K => {
                let code = values[next] >> high & 15;
                block[self.fields + part / 2 * PART + col] |= code << (4 * (part % 2));
            }
            // The code of an absent weight is there, and makes way.
            _ => block[self.fields + col % 16] ^= (values[next] >> high & 15) << high,
        }
    }
}

/// The bytes of a sparse matrix of those weights of `native`, rows in the native layout, that stay.
///
/// # Panics
/// If weights of this type cannot be sparse, or `native` is not the bytes of a matrix of this shape.
pub fn encode_sparse(block_type: BlockType, native: &[u8], keep: &KeepMask) -> Vec<u8> {
    let row_bytes = block_type.row_bytes(keep.cols());
    assert_eq!(native.len(), keep.rows() * row_bytes, "bytes of a matrix");
    let groups = sparse_groups(block_type, keep);
    let start = index_len(keep.rows()).expect("a matrix in memory has an index");
    let mut bytes = vec![0; groups.last().map_or(start, |group| group.end) + TAIL];
    write_index(&groups, &mut bytes[..start]);
    for (g, range) in groups.into_iter().enumerate() {
        let rows = GROUP * g * row_bytes..(GROUP * (g + 1) * row_bytes).min(native.len());
        encode_group(block_type, &native[rows], false, keep, g, &mut bytes[range]);
    }
    bytes
}

/// The parts of a group: where each block's fields begin, and for each of its parts the masks and where the values begin.
struct Walk<'b> {
    form: Form,
    bytes: &'b [u8],
    at: usize,
}

/// 32 columns of a group.
struct Part {
    masks: [u64; LINES],
    starts: [usize; LINES],
    /// The bytes of the values.
    values: Range<usize>,
}

impl Walk<'_> {
    /// Goes past the fields of a block; `None` if the bytes end before.
    fn fields(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        self.at = start.checked_add(GROUP * self.form.fields)?;
        (self.at <= self.bytes.len()).then_some(start..self.at)
    }

    /// Goes past a part.
    fn part(&mut self) -> Option<Part> {
        let bytes = self.bytes.get(self.at..)?;
        let (head, _) = bytes.get(..MASKS)?.as_chunks::<8>();
        let mut masks = [0; LINES];
        for (mask, bytes) in masks.iter_mut().zip(head) {
            *mask = u64::from_le_bytes(*bytes);
        }
        let (starts, len) = self.form.starts(&masks);
        let values = self.at + MASKS..self.at + MASKS + len;
        self.at = values.end;
        (self.at <= self.bytes.len()).then_some(Part {
            masks,
            starts,
            values,
        })
    }
}

/// Decodes row `row` of a sparse matrix of `rows` rows of `out.len()` columns.
///
/// # Panics
/// If there is no such row, or if [`check_sparse`] refuses the bytes for a reason that matters here.
pub fn decode_sparse_row(
    block_type: BlockType,
    rows: usize,
    bytes: &[u8],
    row: usize,
    out: &mut [f32],
) {
    assert!(row < rows, "row {row} of {rows}");
    let mut native = vec![0; block_type.row_bytes(out.len())];
    let mut kept = vec![false; out.len()];
    sparse_row_to_native(block_type, bytes, row, &mut native, |col| kept[col] = true);
    decode_row(block_type, &native, out);
    for (value, kept) in out.iter_mut().zip(kept) {
        *value = if kept { *value } else { 0.0 };
    }
}

/// Puts a row into `native`, in the native layout, with the code that comes closest to 0 where there is no weight, and calls
/// `kept` with the columns of those that there are.
fn sparse_row_to_native(
    block_type: BlockType,
    bytes: &[u8],
    row: usize,
    native: &mut [u8],
    mut kept: impl FnMut(usize),
) {
    let form = Form::of(block_type);
    let group = row / GROUP;
    let offset = |entry| usize::try_from(index_entry(bytes, entry)).unwrap_or(usize::MAX);
    let mut walk = Walk {
        form,
        bytes: &bytes[..offset(group + 1)],
        at: offset(group),
    };
    const DAMAGED: &str = "a group ends where the index says";
    let block_bytes = form.cols / block_type.block_len() * block_type.block_bytes();
    for (b, block) in native.chunks_mut(block_bytes).enumerate() {
        let fields = walk.fields().expect(DAMAGED);
        take_fields(block_type, form.fields, &bytes[fields], row % GROUP, block);
        block[form.fields..].fill(form.absent() * 17);
        for p in 0..form.parts() {
            let part = walk.part().expect(DAMAGED);
            let values = &bytes[part.values];
            for col in 0..PART {
                let (line, bit) = form.place(row % GROUP, col);
                let mask = part.masks[line];
                if mask >> bit & 1 == 1 {
                    let before = (mask & ((1 << bit) - 1)).count_ones() as usize;
                    form.get(values, part.starts[line] + before, p, col, block);
                    kept(form.cols * b + PART * p + col);
                }
            }
        }
    }
}

/// A sparse matrix in the native layout, with the codes that come closest to 0 where there is no weight, and which weights there are.
///
/// # Panics
/// If [`check_sparse`] refuses the bytes for a reason that matters here.
pub(crate) fn sparse_to_native(
    block_type: BlockType,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> (Vec<u8>, KeepMask) {
    let row_bytes = block_type.row_bytes(cols);
    let mut native = vec![0; rows * row_bytes];
    let mut kept = vec![false; rows * cols];
    for row in 0..rows {
        let to = &mut native[row * row_bytes..][..row_bytes];
        sparse_row_to_native(block_type, bytes, row, to, |col| {
            kept[row * cols + col] = true
        });
    }
    let keep = KeepMask::from_fn(rows, cols, |row, col| kept[row * cols + col]);
    (native, keep)
}

/// How many weights of a sparse matrix there are.
///
/// # Panics
/// If [`check_sparse`] refuses the bytes for a reason that matters here.
pub fn sparse_kept(block_type: BlockType, rows: usize, cols: usize, bytes: &[u8]) -> usize {
    let mut kept = 0;
    walk_groups(block_type, rows, cols, bytes, |_, part| {
        let ones = part.masks.iter().map(|mask| mask.count_ones() as usize);
        kept += ones.sum::<usize>();
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error}"));
    kept
}

/// Whether bytes are a sparse matrix of a type and shape, in which nothing can lead beyond its end.
///
/// # Errors
/// What is wrong with them first.
pub fn check_sparse(
    block_type: BlockType,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<(), SparseError> {
    let form = Form::new(block_type)?;
    let zeros = |range: Range<usize>| match range.clone().find(|at| bytes[*at] != 0) {
        None => Ok(()),
        Some(at) => Err(SparseError::Padding { at }),
    };
    walk_groups(block_type, rows, cols, bytes, |walk, part| {
        let (group, number) = (walk.group, walk.part);
        let rows_there = (rows - GROUP * group).min(GROUP);
        let cols_there = (cols - PART * number).min(PART);
        let all = KeepMask::new_full(rows_there, cols_there);
        let inside = form.masks(&all, 0, 0);
        if part
            .masks
            .iter()
            .zip(inside)
            .any(|(mask, inside)| mask & !inside != 0)
        {
            return Err(SparseError::Outside {
                rows: walk.rows(rows),
            });
        }
        if form.bits == 4 {
            // Where one half of the codes has ended, the other half of the bytes is empty.
            let counts = [&part.masks[..LINES / 2], &part.masks[LINES / 2..]]
                .map(|masks| masks.iter().map(|m| m.count_ones() as usize).sum::<usize>());
            for (i, byte) in bytes[part.values.clone()].iter().enumerate() {
                if (i >= counts[0] && byte & 15 != 0) || (i >= counts[1] && byte >> 4 != 0) {
                    let at = part.values.start + i;
                    return Err(SparseError::Padding { at });
                }
            }
        }
        Ok(())
    })?;
    // What is behind the entries, between groups, of rows that are not there, and at the end.
    let groups = rows.div_ceil(GROUP);
    let offset = |entry: usize| index_entry(bytes, entry) as usize;
    zeros(ENTRY * (groups + 1)..offset(0))?;
    for group in 0..groups {
        let mut walk = Walk {
            form,
            bytes,
            at: offset(group),
        };
        for _ in 0..form.blocks(cols) {
            let fields = walk.fields().expect("it was walked before");
            let missing = GROUP - (rows - GROUP * group).min(GROUP);
            for at in unused_fields(block_type, form.fields, GROUP - missing) {
                zeros(fields.start + at.start..fields.start + at.end)?;
            }
            (0..form.parts()).for_each(|_| {
                walk.part().expect("it was walked before");
            });
        }
        zeros(walk.at..offset(group + 1))?;
    }
    zeros(offset(groups)..bytes.len())
}

/// Where fields of 16 rows have the elements of rows from `rows` on.
fn unused_fields(block_type: BlockType, fields: usize, rows: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    for &(size, count) in block_type.fields() {
        for element in 0..count {
            let start = GROUP * (at + element * size);
            if at < fields && rows < GROUP {
                ranges.push(start + rows * size..start + GROUP * size);
            }
        }
        at += size * count;
    }
    ranges
}

/// Where in a matrix a part lies.
struct At {
    group: usize,
    /// Which 32 columns.
    part: usize,
}

impl At {
    /// The rows of the group, of as many.
    fn rows(&self, rows: usize) -> Range<usize> {
        GROUP * self.group..(GROUP * (self.group + 1)).min(rows)
    }
}

/// Goes through all parts of a sparse matrix, as far as its index and masks are sound.
fn walk_groups(
    block_type: BlockType,
    rows: usize,
    cols: usize,
    bytes: &[u8],
    mut each: impl FnMut(&At, &Part) -> Result<(), SparseError>,
) -> Result<(), SparseError> {
    let form = Form::new(block_type)?;
    if block_type.checked_row_bytes(cols).is_none() {
        return Err(SparseError::Columns { block_type, cols });
    }
    let least = least_indexed_len(rows).unwrap_or(usize::MAX);
    if bytes.len() < least {
        return Err(SparseError::Short {
            rows,
            least,
            found: bytes.len(),
        });
    }
    let mut expected = index_len(rows).unwrap_or(usize::MAX);
    let check = |entry, expected: usize| match index_entry(bytes, entry) {
        found if found == expected as u64 => Ok(()),
        found => Err(SparseError::Index {
            entry,
            found,
            expected: expected as u64,
        }),
    };
    check(0, expected)?;
    let last = bytes.len() - TAIL;
    for group in 0..rows.div_ceil(GROUP) {
        let mut walk = Walk {
            form,
            bytes: &bytes[..last],
            at: expected,
        };
        let mut at = At { group, part: 0 };
        let too_many = SparseError::Values {
            rows: at.rows(rows),
            end: last,
        };
        for _ in 0..form.blocks(cols) {
            walk.fields().ok_or_else(|| too_many.clone())?;
            for _ in 0..form.parts() {
                let part = walk.part().ok_or_else(|| too_many.clone())?;
                each(&at, &part)?;
                at.part += 1;
            }
        }
        expected = walk.at.next_multiple_of(LINE);
        check(group + 1, expected)?;
    }
    if bytes.len() - TAIL != expected {
        return Err(SparseError::Length {
            expected: expected + TAIL,
            found: bytes.len(),
        });
    }
    Ok(())
}
