//! The index of sparse and of narrow matrices, whose groups differ in length: it says where each group begins.
//!
//! It is defined in `vendor/flapkern/include/flapkern.h`.

use std::ops::Range;

use super::GROUP;

/// Zeros at the end, which vector units may read, and which the last block cannot outgrow.
pub(super) const TAIL: usize = 1152;
/// What groups are aligned to: a line of the cache.
pub(super) const LINE: usize = 64;
/// Bytes of an entry.
pub(super) const ENTRY: usize = 8;

/// Bytes of the index of a matrix, up to where the first group begins; `None` if there is no such number.
pub(super) fn index_len(rows: usize) -> Option<usize> {
    let entries = rows.div_ceil(GROUP).checked_add(1)?;
    entries.checked_mul(ENTRY)?.checked_next_multiple_of(LINE)
}

/// The least bytes that such a matrix can take: an index and what comes behind the last group; `None` if no number is as large.
pub(crate) fn least_indexed_len(rows: usize) -> Option<usize> {
    index_len(rows)?.checked_add(TAIL)
}

/// An entry of the index: where a group begins, counted from the index; one behind the last group where that ends.
///
/// # Panics
/// If there is no such entry.
pub(crate) fn index_entry(bytes: &[u8], entry: usize) -> u64 {
    let bytes = &bytes[ENTRY * entry..][..ENTRY];
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

/// Writes the index of groups that lie there.
///
/// # Panics
/// If `bytes` is not the bytes before the first of them.
pub(crate) fn write_index(groups: &[Range<usize>], bytes: &mut [u8]) {
    let first = groups.first().map_or(bytes.len(), |group| group.start);
    assert_eq!(bytes.len(), first, "an index lies before the groups");
    bytes.fill(0);
    let entries = std::iter::once(first).chain(groups.iter().map(|group| group.end));
    for (place, offset) in bytes.as_chunks_mut::<ENTRY>().0.iter_mut().zip(entries) {
        *place = (offset as u64).to_le_bytes();
    }
}
