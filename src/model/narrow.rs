//! Weights of 16-bit floats in 12 bits, in place: every generated token reads them, and memory bounds that.

use std::borrow::Cow;
use std::ops::Range;

use super::{Model, Weight};
use crate::gguf::own_pages;
use crate::kernels::Runtime;
use crate::quant::{
    GROUP, Layout, can_be_narrow, narrow_bytes_of, narrow_group, narrow_groups, narrow_len,
    packed_group, unpack, widen_group, write_index,
};

/// Bytes of packed groups that are made narrow together.
const WAVE: usize = 4 << 20;

/// Bytes that a thread copies at a time.
const COPIED: usize = 256 << 10;

impl Model {
    /// Brings every packed weight matrix of 16-bit floats that takes fewer bytes by it into the narrow layout, inside the private map, whose
    /// pages behind it go back to the system. Every bit of the weights stays. Returns the bytes spared.
    pub fn narrow(&mut self, runtime: &Runtime) -> usize {
        let wide = self.weights_in(Layout::Packed, |w| can_be_narrow(w.block_type, w.cols));
        let mut scratch = Vec::new();
        let narrow_one = |weight| self.narrow_one(runtime, weight, &mut scratch);
        wide.iter().map(narrow_one).sum()
    }

    /// Brings narrow weight matrices back into the packed layout, in place too. Scratch memory is the bytes of the largest.
    pub fn widen(&mut self, runtime: &Runtime) {
        for weight in self.weights_in(Layout::Narrow, |_| true) {
            self.widen_one(runtime, &weight);
        }
    }

    /// The weight matrices that multiply, lie so and are not empty.
    fn weights_in(&mut self, layout: Layout, which: impl Fn(&Weight) -> bool) -> Vec<Weight> {
        let weights = self.multiplied_weights();
        let these = weights.filter(|w| w.layout == layout && !w.range.is_empty() && which(w));
        these.map(|weight| weight.clone()).collect()
    }

    /// [`narrow`](Self::narrow) for one weight. `scratch` is kept from one to the next.
    fn narrow_one(&mut self, runtime: &Runtime, weight: &Weight, scratch: &mut Vec<u8>) -> usize {
        let (block_type, cols) = (weight.block_type, weight.cols);
        let group_bytes = GROUP * weight.row_bytes();
        let all = weight.rows.div_ceil(GROUP);
        let bytes = &self.map.bytes()[weight.range.clone()];
        let lens = runtime.region(|team| {
            team.map(all, |g| {
                let group = packed_rows(weight, bytes, g);
                narrow_len(block_type, cols, rows_of(weight, g), &group)
            })
        });
        let Some((groups, len)) = narrow_groups(block_type, (weight.rows, cols), lens) else {
            return 0;
        };
        // A wave of groups takes the place of packed ones that were read before or with it.
        let wave = (WAVE / group_bytes).max(1);
        let overtakes = |end: usize| groups[end - 1].end > end * group_bytes;
        if (wave..all).step_by(wave).any(overtakes) {
            return 0;
        }
        let bytes = &mut self.map.bytes_mut()[weight.range.clone()];
        for (i, groups) in groups.chunks(wave).enumerate() {
            narrow_wave(runtime, weight, bytes, wave * i, groups, scratch);
        }
        write_index(&groups, &mut bytes[..groups[0].start]);
        let start = weight.range.start;
        let new = start..start + len;
        self.put(weight, Layout::Narrow, new.clone());
        // Memory that the system does not take back is no reason to stop.
        if let Err(error) = self.map.release(new.end..weight.range.end) {
            tracing::debug!("the bytes behind a narrow weight stay: {error}");
        }
        weight.range.len() - len
    }

    fn widen_one(&mut self, runtime: &Runtime, weight: &Weight) {
        let (block_type, cols) = (weight.block_type, weight.cols);
        let narrow = self.map.bytes()[weight.range.clone()].to_vec();
        let start = weight.range.start;
        let wide = start..start + weight.bytes();
        let group_bytes = GROUP * block_type.row_bytes(cols);
        let to = &mut self.map.bytes_mut()[wide.clone()];
        runtime.region(|team| {
            team.chunks_mut(to, group_bytes, |g, rows| {
                own_pages(rows);
                let group = narrow_bytes_of(&narrow, g);
                if rows.len() == group_bytes {
                    return widen_group(block_type, cols, group, rows);
                }
                let mut whole = vec![0; group_bytes];
                widen_group(block_type, cols, group, &mut whole);
                unpack(block_type, cols, &mut whole);
                rows.copy_from_slice(&whole[..rows.len()]);
            });
        });
        self.put(weight, Layout::Packed, wide);
    }

    /// Takes down how a weight lies now, and where.
    fn put(&mut self, weight: &Weight, layout: Layout, range: Range<usize>) {
        let place = self
            .multiplied_weights()
            .find(|w| w.range == weight.range)
            .expect("it is one of them");
        (place.layout, place.range) = (layout, range);
    }
}

/// Makes the groups from number `first` on narrow, of a weight whose bytes are `bytes`. They lie at `groups` afterwards.
fn narrow_wave(
    runtime: &Runtime,
    weight: &Weight,
    bytes: &mut [u8],
    first: usize,
    groups: &[Range<usize>],
    scratch: &mut Vec<u8>,
) {
    let place = groups[0].start..groups[groups.len() - 1].end;
    scratch.resize(place.len().max(scratch.len()), 0);
    let mut parts: Vec<&mut [u8]> = Vec::with_capacity(groups.len());
    let mut rest = &mut scratch[..place.len()];
    for group in groups {
        let (part, after) = rest.split_at_mut(group.len());
        parts.push(part);
        rest = after;
    }
    let packed = &*bytes;
    runtime.region(|team| {
        team.chunks_mut(&mut parts, 1, |i, part| {
            let (g, rows) = (first + i, rows_of(weight, first + i));
            let group = packed_rows(weight, packed, g);
            narrow_group(weight.block_type, weight.cols, rows, &group, part[0]);
        });
    });
    let (to, from) = (&mut bytes[place.clone()], &scratch[..place.len()]);
    runtime.region(|team| {
        team.chunks_mut(to, COPIED, |i, to| {
            to.copy_from_slice(&from[COPIED * i..][..to.len()]);
        });
    });
}

/// Rows of a group.
fn rows_of(weight: &Weight, group: usize) -> usize {
    (weight.rows - GROUP * group).min(GROUP)
}

/// A whole packed group of a weight whose bytes are `bytes`. Rows that fill no group are native there, and are packed for it.
fn packed_rows<'b>(weight: &Weight, bytes: &'b [u8], group: usize) -> Cow<'b, [u8]> {
    let (block_type, cols) = (weight.block_type, weight.cols);
    let group_bytes = GROUP * block_type.row_bytes(cols);
    let rows = &bytes[group * group_bytes..((group + 1) * group_bytes).min(bytes.len())];
    match rows.len() == group_bytes {
        true => Cow::Borrowed(rows),
        false => Cow::Owned(packed_group(block_type, cols, rows)),
    }
}
