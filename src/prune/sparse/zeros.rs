//! Taking single weights out of a projection. In the sparse form they have no place any more (`model/sparse.rs`); as zeros they
//! become exactly 0 in their tensor's own type. Those that stay keep their codes either way.
//!
//! Types with a minimum (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) and with uneven levels (IQ4_NL, IQ4_XS, IQ1, IQ2, IQ3) have no code that always stands for 0,
//! and TQ1_0 none that could be set by itself.
//! Where a projection of such a type cannot be sparse, it is encoded anew in Q8_0, which takes more bytes than it had: the map then
//! moves to a larger one.

use std::ops::Range;

use super::choice::{Pattern, SparseForm};
use super::projection::LayerProjection;
use crate::gguf::Map;
use crate::kernels::{Kernels, Runtime, Team};
use crate::model::{Layer, Model, SparseWeightError, Weight};
use crate::prune::error::PruneErrorKind;
use crate::quant::{
    BlockType, GROUP, KeepMask, Layout, decode_narrow_row, decode_packed_row, decode_row,
    decode_sparse_row, encode_row, encode_row_by_importance, expected_sparse_len, is_kept, pack,
    unpack,
};

/// The type of projections whose own has no code for 0.
const WITH_ZERO: BlockType = BlockType::Q8_0;
/// Where new tensors begin.
const ALIGNMENT: usize = 64;
/// Bytes that move to a larger map at a time.
const PIECE: usize = 1 << 24;

/// Whether a type has a code that stands for exactly 0 whatever the scale.
pub fn has_zero(block_type: BlockType) -> bool {
    !matches!(zero_code(block_type), Zero::None)
}

/// Whether a projection of a type, which could be sparse, is dense with zeros instead, because these kernels generate more slowly
/// with sparse ones. Types without a code for 0 would have to become Q8_0, which is slower still, and so are sparse all the same.
pub fn stays_dense(form: SparseForm, kernels: Kernels, block_type: BlockType) -> bool {
    form == SparseForm::Auto && has_zero(block_type) && kernels.prefers_dense(block_type)
}

/// Whether a projection of a type is to be sparse, if it can.
fn wants_sparse(form: SparseForm, kernels: Kernels, block_type: BlockType) -> bool {
    form != SparseForm::Zeros && !stays_dense(form, kernels, block_type)
}

/// Bytes of weights that are the process's own once single weights are removed: those of the layers, or of the whole model where it has
/// to move to a larger map.
pub fn weight_bytes(model: &Model, form: SparseForm) -> u64 {
    let layers: usize = model.layers.iter().map(Layer::bytes).sum();
    let bytes = match room(model, form) {
        0 => layers,
        more => model.bytes() + more,
    };
    bytes as u64
}

/// About as many bytes as a projection takes once single weights are taken out of it.
pub fn expected_bytes(
    form: SparseForm,
    kernels: Kernels,
    pattern: Pattern,
    (block_type, rows, cols): (BlockType, usize, usize),
) -> usize {
    let dense = |block_type: BlockType| rows * block_type.row_bytes(cols);
    let sparse = |block_type: BlockType| match wants_sparse(form, kernels, block_type) {
        true => expected_sparse_len(block_type, rows, cols, pattern.share()),
        false => None,
    };
    match sparse(block_type) {
        Some(bytes) if bytes < dense(block_type) => bytes,
        _ if has_zero(block_type) => dense(block_type),
        _ => sparse(WITH_ZERO)
            .unwrap_or(usize::MAX)
            .min(dense(WITH_ZERO)),
    }
}

/// Bytes for the projections that will need more than they have.
fn room(model: &Model, form: SparseForm) -> usize {
    let linears = model.layers.iter().flat_map(Layer::linears);
    let weights = linears.map(|linear| &linear.weight);
    let stays = |weight: &Weight| {
        let block_type = weight.block_type;
        let sparse = form != SparseForm::Zeros && block_type.has_sparse();
        has_zero(block_type) || weight.is_sparse() || sparse
    };
    let larger = weights.filter(|weight| !stays(weight));
    larger
        .map(|weight| new_bytes(weight).next_multiple_of(ALIGNMENT))
        .sum()
}

/// Where single weights of a model are taken out.
#[derive(Debug)]
pub struct Zeros {
    form: SparseForm,
    /// The first byte of the map that is free for a tensor that needs more bytes than it had.
    next: usize,
}

impl Zeros {
    /// Makes room for the projections that will need more bytes. What the model computes stays the same.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub fn new(model: &mut Model, form: SparseForm) -> Result<Self, PruneErrorKind> {
        let next = model.map.bytes().len().next_multiple_of(ALIGNMENT);
        grow(model, next, room(model, form))?;
        Ok(Self { form, next })
    }

    /// Takes out the weights of a projection that go. Those that stay keep their codes, unless there is no place for zeros in its type
    /// and it cannot be sparse.
    ///
    /// # Errors
    /// If the system has no memory for a larger map.
    ///
    /// # Panics
    /// If the mask is of another shape.
    pub fn take_out(
        &mut self,
        model: &mut Model,
        runtime: &Runtime,
        which: LayerProjection,
        mask: &KeepMask,
    ) -> Result<(), PruneErrorKind> {
        if self.make_sparse(model, runtime, which, mask) {
            return Ok(());
        }
        let weight = which.weight(model).clone();
        if !has_zero(weight.block_type) {
            let from = Source::Old(&weight);
            self.encode(model, runtime, which, mask, from, &[])?;
            // Its new type may be one that can be sparse.
            self.make_sparse(model, runtime, which, mask);
            return Ok(());
        }
        set_zero(model, runtime, &weight, mask);
        Ok(())
    }

    /// Makes a projection sparse, if that is asked for and takes fewer bytes. Says whether it did.
    fn make_sparse(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        which: LayerProjection,
        mask: &KeepMask,
    ) -> bool {
        let (layer, place) = (which.layer, which.projection.index());
        let block_type = which.weight(model).block_type;
        let sparse = wants_sparse(self.form, runtime.kernels, block_type);
        match sparse.then(|| model.make_sparse(runtime, layer, place, mask)) {
            Some(Ok(())) => true,
            // The weight is sparse; memory that the system does not take back is no reason to stop.
            Some(Err(SparseWeightError::Release(error))) => {
                tracing::debug!("the old bytes of {which} stay: {error}");
                true
            }
            Some(Err(_)) | None => false,
        }
    }

    /// Puts new values `[rows, cols]` in the place of a projection's weights, encoded by the mean squares of its inputs, `[cols]`. Those
    /// that go are 0 whatever their value.
    ///
    /// # Errors
    /// If the system has no memory for a larger map.
    ///
    /// # Panics
    /// If mask, values or mean squares are of another shape.
    pub fn put(
        &mut self,
        model: &mut Model,
        runtime: &Runtime,
        which: LayerProjection,
        mask: &KeepMask,
        values: &[f32],
        importance: &[f32],
    ) -> Result<(), PruneErrorKind> {
        let weight = which.weight(model).clone();
        let shape = (weight.rows, weight.cols);
        assert!((mask.rows(), mask.cols()) == shape && values.len() == shape.0 * shape.1);
        assert_eq!(importance.len(), shape.1, "a mean square for each column");
        let from = Source::New(values);
        if has_zero(weight.block_type) {
            self.encode(model, runtime, which, mask, from, importance)?;
            self.make_sparse(model, runtime, which, mask);
            return Ok(());
        }
        let sparse = wants_sparse(self.form, runtime.kernels, weight.block_type);
        if sparse && weight.block_type.has_sparse() {
            let bytes = &mut model.map.bytes_mut()[weight.range.clone()];
            encode_rows(runtime, &weight, bytes, mask, importance, |row, out| {
                out.copy_from_slice(&values[row * weight.cols..][..weight.cols]);
            });
            if self.make_sparse(model, runtime, which, mask) {
                return Ok(());
            }
        }
        self.encode(model, runtime, which, mask, from, importance)?;
        self.make_sparse(model, runtime, which, mask);
        Ok(())
    }

    /// Encodes a projection anew, in its own type if that has a code for 0.
    fn encode(
        &mut self,
        model: &mut Model,
        runtime: &Runtime,
        which: LayerProjection,
        mask: &KeepMask,
        from: Source,
        importance: &[f32],
    ) -> Result<(), PruneErrorKind> {
        let old = which.weight(model).clone();
        let stays = has_zero(old.block_type);
        let new = match stays {
            true => old.clone(),
            false => Weight {
                block_type: WITH_ZERO,
                range: self.next..self.next + new_bytes(&old),
                ..old.clone()
            },
        };
        let ranges: [Range<usize>; 2] = match stays {
            true => [0..0, new.range.clone()],
            false => {
                // All that may need it, so that the map moves once.
                let needed = new_bytes(&old).next_multiple_of(ALIGNMENT);
                if new.range.end > model.map.bytes().len() {
                    grow(model, self.next, room(model, SparseForm::Zeros).max(needed))?;
                }
                [old.range.clone(), new.range.clone()]
            }
        };
        let mut pieces = model.map.disjoint_mut(&ranges);
        let bytes = std::mem::take(&mut pieces[1]);
        let before: &[u8] = pieces[0];
        encode_rows(
            runtime,
            &new,
            bytes,
            mask,
            importance,
            |row, out| match from {
                Source::Old(old) => decode(old, before, row, out),
                Source::New(all) => out.copy_from_slice(&all[row * old.cols..][..old.cols]),
            },
        );
        if !stays {
            self.next = new.range.end.next_multiple_of(ALIGNMENT);
            // Memory that the system does not take back is no reason to stop: the weights are in their new place.
            if let Err(error) = model.map.release(old.range.clone()) {
                tracing::debug!("the old bytes of {} stay: {error}", old.name);
            }
        }
        let linears = model.layers[which.layer].linears_mut();
        linears[which.projection.index()].weight = new;
        Ok(())
    }
}

/// Makes room for so many bytes from a place of the map on, if they are any.
fn grow(model: &mut Model, from: usize, needed: usize) -> Result<(), PruneErrorKind> {
    if from + needed <= model.map.bytes().len() || needed == 0 {
        return Ok(());
    }
    let larger = Map::anonymous(from + needed).map_err(PruneErrorKind::Room)?;
    move_to(&mut model.map, larger);
    Ok(())
}

/// Where projections get their bytes that change their type once more as they did before: behind everything else in the map.
#[derive(Debug)]
pub(in crate::prune) struct Behind {
    /// The first byte that is free.
    next: usize,
}

impl Behind {
    /// Makes room for projections of so many bytes each. What the model computes stays the same.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub fn new(
        model: &mut Model,
        sizes: impl Iterator<Item = usize>,
    ) -> Result<Self, PruneErrorKind> {
        let next = model.map.bytes().len().next_multiple_of(ALIGNMENT);
        let needed = sizes.map(|size| size.next_multiple_of(ALIGNMENT)).sum();
        grow(model, next, needed)?;
        Ok(Self { next })
    }

    /// Gives a projection another type, in the layout that it has, and a place for its bytes. What these are is for the caller to write.
    ///
    /// # Panics
    /// If there is no room for it.
    pub fn change_type(
        &mut self,
        model: &mut Model,
        which: LayerProjection,
        block_type: BlockType,
    ) {
        let linears = model.layers[which.layer].linears_mut();
        let weight = &mut linears[which.projection.index()].weight;
        let bytes = weight.rows * block_type.row_bytes(weight.cols);
        let new = self.next..self.next + bytes;
        assert!(new.end <= model.map.bytes().len(), "room for {which}");
        self.next = new.end.next_multiple_of(ALIGNMENT);
        weight.block_type = block_type;
        let old = std::mem::replace(&mut weight.range, new);
        // Memory that the system does not take back is no reason to stop.
        if let Err(error) = model.map.release(old) {
            tracing::debug!("the old bytes of {which} stay: {error}");
        }
    }
}

/// Sets the weights of a projection that go to 0, in a type that has a code for it.
fn set_zero(model: &mut Model, runtime: &Runtime, weight: &Weight, mask: &KeepMask) {
    assert!(mask.rows() == weight.rows && mask.cols() == weight.cols);
    let bytes = &mut model.map.bytes_mut()[weight.range.clone()];
    in_groups(runtime, weight, bytes, |row, bytes| {
        zero_row(weight.block_type, bytes, weight.cols, mask.row(row));
    });
}

/// Encodes all rows of a weight in its type, by the mean squares of its inputs, or for their own sake if these are none. What goes is 0, as
/// exactly as the type has it.
fn encode_rows(
    runtime: &Runtime,
    weight: &Weight,
    bytes: &mut [u8],
    mask: &KeepMask,
    importance: &[f32],
    values_of: impl Fn(usize, &mut [f32]) + Sync,
) {
    in_groups(runtime, weight, bytes, |row, bytes| {
        let mut values = vec![0.0f32; weight.cols];
        values_of(row, &mut values);
        for (j, value) in values.iter_mut().enumerate() {
            if !is_kept(mask.row(row), j) {
                *value = 0.0;
            }
        }
        match importance {
            [] => encode_row(weight.block_type, &values, bytes),
            all => encode_row_by_importance(weight.block_type, &values, all, bytes),
        }
        if has_zero(weight.block_type) {
            zero_row(weight.block_type, bytes, weight.cols, mask.row(row));
        }
    });
}

/// Where values that are encoded come from.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// The projection as it was.
    Old(&'a Weight),
    /// New values, `[rows, cols]`.
    New(&'a [f32]),
}

/// Bytes of a weight in the type with a code for 0.
fn new_bytes(weight: &Weight) -> usize {
    weight.rows * WITH_ZERO.row_bytes(weight.cols)
}

/// Decodes a row, given all bytes of its matrix.
fn decode(weight: &Weight, bytes: &[u8], row: usize, out: &mut [f32]) {
    match weight.layout {
        Layout::Native => {
            let size = weight.row_bytes();
            decode_row(weight.block_type, &bytes[row * size..][..size], out);
        }
        Layout::Packed => decode_packed_row(weight.block_type, bytes, row, out),
        Layout::Sparse => decode_sparse_row(weight.block_type, weight.rows, bytes, row, out),
        Layout::Narrow => decode_narrow_row(weight.block_type, bytes, row, out),
    }
}

/// Shows `change` every row of a matrix in the native layout, group by group as threads take them, and brings it back into its own.
fn in_groups(
    runtime: &Runtime,
    weight: &Weight,
    bytes: &mut [u8],
    change: impl Fn(usize, &mut [u8]) + Sync,
) {
    let block_type = weight.block_type;
    let size = block_type.row_bytes(weight.cols);
    if bytes.is_empty() {
        return;
    }
    let packed = weight.layout == Layout::Packed;
    runtime.region(|team: &Team| {
        team.chunks_mut(bytes, GROUP * size, |group, bytes| {
            if packed {
                unpack(block_type, weight.cols, bytes);
            }
            for (i, row) in bytes.chunks_exact_mut(size).enumerate() {
                change(group * GROUP + i, row);
            }
            if packed {
                pack(block_type, weight.cols, bytes);
            }
        });
    });
}

/// Lets everything of a map move to the beginning of a larger one, piece by piece, so that there are never two of it.
fn move_to(map: &mut Map, mut larger: Map) {
    let bytes = map.bytes().len();
    for start in (0..bytes).step_by(PIECE) {
        let piece = start..(start + PIECE).min(bytes);
        larger.bytes_mut()[piece.clone()].copy_from_slice(&map.bytes()[piece.clone()]);
        // The map goes in any case.
        let _ = map.release(piece);
    }
    *map = larger;
}

/// How 0 is stored.
enum Zero {
    /// As so many bytes of 0.
    Bytes(usize),
    /// As a code in a block, in fields of some bits.
    Code(&'static [Field]),
    None,
}

/// Bits of a code: where they lie in a block, as the formats of `quant` have it. The bytes from `at` on are stretches of `run` bytes; the
/// first `run` values of a stretch are the lowest bits of its bytes, the next ones those above.
struct Field {
    at: usize,
    bits: usize,
    run: usize,
    zero: u8,
}

const fn field(at: usize, bits: usize, run: usize, zero: u8) -> Field {
    Field {
        at,
        bits,
        run,
        zero,
    }
}

fn zero_code(block_type: BlockType) -> Zero {
    match block_type {
        BlockType::F32 => Zero::Bytes(4),
        BlockType::F16 | BlockType::BF16 => Zero::Bytes(2),
        BlockType::Q8_0 => Zero::Code(const { &[field(2, 8, 32, 0)] }),
        // Code 8.
        BlockType::Q4_0 => Zero::Code(const { &[field(2, 4, 16, 8)] }),
        BlockType::MXFP4 => Zero::Code(const { &[field(1, 4, 16, 0)] }),
        // Code 1.
        BlockType::TQ2_0 => Zero::Code(const { &[field(0, 2, 32, 1)] }),
        // Code 16: the fifth bit alone.
        BlockType::Q5_0 => Zero::Code(const { &[field(2, 1, 1, 1), field(6, 4, 16, 0)] }),
        // Code 4: the third bit alone.
        BlockType::Q3_K => Zero::Code(const { &[field(0, 1, 32, 1), field(32, 2, 32, 0)] }),
        // Code 32: the sixth bit alone.
        BlockType::Q6_K => Zero::Code(const { &[field(0, 4, 64, 0), field(128, 2, 32, 2)] }),
        BlockType::Q4_1
        | BlockType::Q5_1
        | BlockType::Q2_K
        | BlockType::Q4_K
        | BlockType::Q5_K
        | BlockType::IQ4_NL
        | BlockType::IQ4_XS
        | BlockType::Q8_1
        | BlockType::TQ1_0
        | BlockType::IQ1_S
        | BlockType::IQ1_M
        | BlockType::IQ2_XXS
        | BlockType::IQ2_XS
        | BlockType::IQ2_S
        | BlockType::IQ3_XXS
        | BlockType::IQ3_S => Zero::None,
    }
}

/// Sets the values of a row that go to 0, given the row in the native layout and the words of its mask.
fn zero_row(block_type: BlockType, bytes: &mut [u8], cols: usize, mask: &[u64]) {
    let gone = (0..cols).filter(|j| !is_kept(mask, *j));
    match zero_code(block_type) {
        Zero::Bytes(size) => gone.for_each(|j| bytes[j * size..][..size].fill(0)),
        Zero::Code(fields) => {
            let (len, size) = (block_type.block_len(), block_type.block_bytes());
            for j in gone {
                let block = &mut bytes[j / len * size..][..size];
                fields.iter().for_each(|field| field.set(block, j % len));
            }
        }
        Zero::None => unreachable!("{} has no code for 0", block_type.name()),
    }
}

impl Field {
    /// Sets the field of value i of a block to that of 0.
    fn set(&self, block: &mut [u8], i: usize) {
        let in_stretch = self.run * 8 / self.bits;
        let byte = self.at + self.run * (i / in_stretch) + i % self.run;
        let shift = self.bits * (i / self.run % (8 / self.bits));
        let mask = (u8::MAX >> (8 - self.bits)) << shift;
        block[byte] = block[byte] & !mask | self.zero << shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::encode_row;

    #[test]
    fn values_that_go_are_0_and_the_others_are_as_they_were() {
        let mut seed = 1u32;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for block_type in BlockType::ALL.into_iter().filter(|t| has_zero(*t)) {
            let cols = 512;
            let values: Vec<f32> = (0..cols).map(|_| next()).collect();
            let mut bytes = vec![0; block_type.row_bytes(cols)];
            encode_row(block_type, &values, &mut bytes);
            let (mut before, mut after) = (vec![0.0; cols], vec![0.0; cols]);
            decode_row(block_type, &bytes, &mut before);
            let mut mask = KeepMask::new_full(1, cols);
            (0..cols)
                .filter(|_| next() < 0.0)
                .for_each(|j| mask.remove(0, j));
            zero_row(block_type, &mut bytes, cols, mask.row(0));
            decode_row(block_type, &bytes, &mut after);
            for j in 0..cols {
                match mask.keep(0, j) {
                    true => assert_eq!(after[j].to_bits(), before[j].to_bits()),
                    false => assert_eq!(after[j], 0.0, "{} {j}", block_type.name()),
                }
            }
        }
    }
}
