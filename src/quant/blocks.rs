//! Scalar decoders and encoders of rows, and of the blocks of 32 values.

use half::{bf16, f16};

use super::bits::{half_at, pack, unpack};
use super::encode::{
    block_weights, each, finite_half, fit_line, fit_scale, half_scale, inverse_of, low_bits,
    rounded, squared_error, within_reach,
};
use super::{BlockType, grid, iq4, kquants, small};

/// Values in a block of the types in this file.
const BLOCK: usize = 32;

/// Decodes one row in the native layout into `out`.
///
/// # Panics
/// If the length of `bytes` is not that of a row of `out.len()` values.
pub fn decode_row(block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), block_type.row_bytes(out.len()), "row length");
    match block_type {
        BlockType::F32 => decode_each(bytes, out, f32::from_le_bytes),
        BlockType::F16 => decode_each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        BlockType::BF16 => decode_each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        BlockType::Q8_0 => decode_blocks(block_type, bytes, out, decode_q8_0),
        BlockType::Q4_0 => decode_blocks(block_type, bytes, out, decode_q4_0),
        BlockType::Q4_1 => decode_blocks(block_type, bytes, out, decode_q4_1),
        BlockType::Q5_0 => decode_blocks(block_type, bytes, out, decode_q5_0),
        BlockType::Q5_1 => decode_blocks(block_type, bytes, out, decode_q5_1),
        BlockType::Q2_K => decode_blocks(block_type, bytes, out, kquants::decode_q2_k),
        BlockType::Q3_K => decode_blocks(block_type, bytes, out, kquants::decode_q3_k),
        BlockType::Q4_K => decode_blocks(block_type, bytes, out, kquants::decode_q4_k),
        BlockType::Q5_K => decode_blocks(block_type, bytes, out, kquants::decode_q5_k),
        BlockType::Q6_K => decode_blocks(block_type, bytes, out, kquants::decode_q6_k),
        BlockType::IQ4_NL => decode_blocks(block_type, bytes, out, iq4::decode_iq4_nl),
        BlockType::IQ4_XS => decode_blocks(block_type, bytes, out, iq4::decode_iq4_xs),
        BlockType::MXFP4 => decode_blocks(block_type, bytes, out, small::decode_mxfp4),
        BlockType::Q8_1 => decode_blocks(block_type, bytes, out, small::decode_q8_1),
        BlockType::TQ1_0 => decode_blocks(block_type, bytes, out, small::decode_tq1_0),
        BlockType::TQ2_0 => decode_blocks(block_type, bytes, out, small::decode_tq2_0),
        BlockType::IQ1_S => decode_blocks(block_type, bytes, out, grid::decode_iq1_s),
        BlockType::IQ1_M => decode_blocks(block_type, bytes, out, grid::decode_iq1_m),
        BlockType::IQ2_XXS => decode_blocks(block_type, bytes, out, grid::decode_iq2_xxs),
        BlockType::IQ2_XS => decode_blocks(block_type, bytes, out, grid::decode_iq2_xs),
        BlockType::IQ2_S => decode_blocks(block_type, bytes, out, grid::decode_iq2_s),
        BlockType::IQ3_XXS => decode_blocks(block_type, bytes, out, grid::decode_iq3_xxs),
        BlockType::IQ3_S => decode_blocks(block_type, bytes, out, grid::decode_iq3_s),
    }
}

/// Encodes `values` as one row in the native layout. For each block several scales (and minima) are tried, and the one with
/// the least squared error is taken.
///
/// F16 and BF16 round as IEEE 754 does: values beyond their range become infinite. The block types cannot hold values that
/// are not finite: NaN is stored as zero, and a value that is too large as the largest that the block can hold.
///
/// # Panics
/// If the length of `out` is not that of a row of `values.len()` values.
pub fn encode_row(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    encode(block_type, values, None, out);
}

/// Encodes `values` as [`encode_row`] does, but weights the squared error of value j by `importance[j]`: the mean square of
/// the inputs that the value will be multiplied by, at least 0. For plain floats and for Q8_0 the result is nearly always the
/// same as without, because their encoders have (almost) nothing to choose.
///
/// # Panics
/// If the length of `out` is not that of a row of `values.len()` values, or if `importance` and `values` differ in length.
pub fn encode_row_by_importance(
    block_type: BlockType,
    values: &[f32],
    importance: &[f32],
    out: &mut [u8],
) {
    assert_eq!(importance.len(), values.len(), "one importance per value");
    encode(block_type, values, Some(importance), out);
}

/// Encodes a row; without `importance` all values count alike.
fn encode(block_type: BlockType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    assert_eq!(out.len(), block_type.row_bytes(values.len()), "row length");
    let row = Row {
        block_type,
        values,
        importance,
    };
    match block_type {
        BlockType::F32 => encode_each(values, out, f32::to_le_bytes),
        BlockType::F16 => encode_each(values, out, |v| f16::from_f32(v).to_le_bytes()),
        BlockType::BF16 => encode_each(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        BlockType::Q8_0 => row.encode(out, encode_q8_0),
        BlockType::Q4_0 => row.encode(out, encode_q4_0),
        BlockType::Q4_1 => row.encode(out, encode_q4_1),
        BlockType::Q5_0 => row.encode(out, encode_q5_0),
        BlockType::Q5_1 => row.encode(out, encode_q5_1),
        BlockType::Q2_K => row.encode(out, kquants::encode_q2_k),
        BlockType::Q3_K => row.encode(out, kquants::encode_q3_k),
        BlockType::Q4_K => row.encode(out, kquants::encode_q4_k),
        BlockType::Q5_K => row.encode(out, kquants::encode_q5_k),
        BlockType::Q6_K => row.encode(out, kquants::encode_q6_k),
        BlockType::IQ4_NL => row.encode(out, iq4::encode_iq4_nl),
        BlockType::IQ4_XS => row.encode(out, iq4::encode_iq4_xs),
        BlockType::MXFP4 => row.encode(out, small::encode_mxfp4),
        BlockType::Q8_1 => row.encode(out, encode_q8_1),
        BlockType::TQ1_0 => row.encode(out, small::encode_tq1_0),
        BlockType::TQ2_0 => row.encode(out, small::encode_tq2_0),
        BlockType::IQ1_S => row.encode(out, grid::encode_iq1_s),
        BlockType::IQ1_M => row.encode(out, grid::encode_iq1_m),
        BlockType::IQ2_XXS => row.encode(out, grid::encode_iq2_xxs),
        BlockType::IQ2_XS => row.encode(out, grid::encode_iq2_xs),
        BlockType::IQ2_S => row.encode(out, grid::encode_iq2_s),
        BlockType::IQ3_XXS => row.encode(out, grid::encode_iq3_xxs),
        BlockType::IQ3_S => row.encode(out, grid::encode_iq3_s),
    }
}

/// Decodes values that are stored one by one, N bytes each.
fn decode_each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *o = decode(*b);
    }
}

/// Encodes values that are stored one by one, N bytes each.
fn encode_each<const N: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    for (b, v) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *b = encode(*v);
    }
}

/// Decodes a row block by block; a block holds N values.
fn decode_blocks<const N: usize>(
    block_type: BlockType,
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8], &mut [f32; N]),
) {
    let blocks = bytes.chunks_exact(block_type.block_bytes());
    for (block, out) in blocks.zip(out.as_chunks_mut::<N>().0) {
        decode(block, out);
    }
}

/// A row of values that is to be encoded block by block.
struct Row<'a> {
    block_type: BlockType,
    values: &'a [f32],
    /// The weight of each value's squared error; `None` if all count alike.
    importance: Option<&'a [f32]>,
}

impl Row<'_> {
    /// Encodes all blocks, N values each. `encode` gets a block's values, their weights and the bytes to write.
    fn encode<const N: usize>(
        &self,
        out: &mut [u8],
        encode: impl Fn(&[f32; N], &[f32; N], &mut [u8]),
    ) {
        let blocks = out.chunks_exact_mut(self.block_type.block_bytes());
        for (i, (values, out)) in self
            .values
            .as_chunks::<N>()
            .0
            .iter()
            .zip(blocks)
            .enumerate()
        {
            let importance = self.importance.map(|all| &all.as_chunks::<N>().0[i]);
            let weights = importance.map_or([1.0; N], block_weights);
            encode(&each(values, within_reach), &weights, out);
        }
    }
}

fn decode_q8_0(block: &[u8], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    for (o, q) in out.iter_mut().zip(&block[2..]) {
        *o = d * f32::from(*q as i8);
    }
}

fn decode_q4_0(block: &[u8], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    let mut q = [0; BLOCK];
    unpack::<4, 16>(&block[2..], 0, &mut q);
    *out = q.map(|q| d * (f32::from(q) - 8.0));
}

fn decode_q4_1(block: &[u8], out: &mut [f32; BLOCK]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let mut q = [0; BLOCK];
    unpack::<4, 16>(&block[4..], 0, &mut q);
    *out = q.map(|q| d * f32::from(q) + m);
}

fn decode_q5_0(block: &[u8], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    let q = five_bits(&block[2..]);
    *out = q.map(|q| d * (f32::from(q) - 16.0));
}

fn decode_q5_1(block: &[u8], out: &mut [f32; BLOCK]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let q = five_bits(&block[4..]);
    *out = q.map(|q| d * f32::from(q) + m);
}

/// Reads 32 codes of 5 bits: 4 bytes with their fifth bits, in order, and then 16 bytes of nibbles.
fn five_bits(packed: &[u8]) -> [u8; BLOCK] {
    let mut q = [0; BLOCK];
    unpack::<4, 16>(&packed[4..], 0, &mut q);
    unpack::<1, 1>(&packed[..4], 4, &mut q);
    q
}

fn encode_q8_0(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let nearest = half_scale(largest / 127.0);
    let codes = |d: f16| {
        let inverse = inverse_of(d.to_f32());
        each(x, |v| rounded((v * inverse).clamp(-127.0, 127.0)))
    };
    let mut best = (nearest, codes(nearest));
    // The smallest half-precision numbers are so far apart that with the nearest one the largest value may be clipped.
    // The next larger scale is then tried as well.
    if nearest.to_f32() * 127.5 < largest && nearest < f16::MAX {
        let above = f16::from_bits(nearest.to_bits() + 1);
        let q = codes(above);
        if squared_error(x, weights, &q, above.to_f32(), 0.0)
            < squared_error(x, weights, &best.1, nearest.to_f32(), 0.0)
        {
            best = (above, q);
        }
    }
    out[..2].copy_from_slice(&best.0.to_le_bytes());
    for (o, q) in out[2..].iter_mut().zip(best.1) {
        *o = low_bits(q) as u8;
    }
}

fn encode_q8_1(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let mut q8_0 = [0; 2 + BLOCK];
    encode_q8_0(x, weights, &mut q8_0);
    small::encode_q8_1(&q8_0, out);
}

/// The codes that are tried for the value of largest magnitude; each gives one candidate for the scale (see [`fit_scale`]).
///
/// A stand-in beyond −8 clips that value, which can make the error of the others smaller. Those of smaller magnitude make
/// sure that values decoded from a block are encoded as the same block again.
const STAND_INS_Q4_0: [f32; 8] = [-8.0, -7.0, -6.0, -5.0, -8.33, -8.7, -9.1, -9.5];

fn encode_q4_0(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_scale(x, weights, 8.0, &STAND_INS_Q4_0, out);
    pack::<4, 16>(&q, 0, &mut out[2..]);
}

/// The codes that are tried for the value of largest magnitude, as in [`STAND_INS_Q4_0`].
const STAND_INS_Q5_0: [f32; 5] = [-16.0, -15.0, -16.6, -17.2, -14.0];

fn encode_q5_0(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_scale(x, weights, 16.0, &STAND_INS_Q5_0, out);
    pack_five_bits(&q, &mut out[2..]);
}

/// Finds the best scale for a block, writes it, and returns the codes: code q stands for the multiple q − `zero` of the
/// scale, from −`zero` to `zero` − 1.
fn encode_scale(
    x: &[f32; BLOCK],
    weights: &[f32; BLOCK],
    zero: f32,
    stand_ins: &[f32],
    out: &mut [u8],
) -> [u8; BLOCK] {
    let nearest = |v: f32| rounded(v.clamp(-zero, zero - 1.0));
    let fit = fit_scale(x, weights, stand_ins, nearest, |d| half_scale(d).to_f32());
    out[..2].copy_from_slice(&f16::from_f32(fit.scale).to_le_bytes());
    fit.q.map(|q| low_bits(q + zero) as u8)
}

/// The numbers of steps that are tried for the range from the smallest to the largest value; each gives one candidate for
/// the scale (see [`fit_line`]).
const SPANS_Q4_1: [f32; 6] = [15.0, 14.0, 15.63, 16.3, 17.05, 17.86];

fn encode_q4_1(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_line(x, weights, 15.0, &SPANS_Q4_1, out);
    pack::<4, 16>(&q, 0, &mut out[4..]);
}

/// The numbers of steps that are tried for the range of values, as in [`SPANS_Q4_1`].
const SPANS_Q5_1: [f32; 5] = [31.0, 30.0, 31.6, 32.2, 32.9];

fn encode_q5_1(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_line(x, weights, 31.0, &SPANS_Q5_1, out);
    pack_five_bits(&q, &mut out[4..]);
}

/// Finds the best scale and minimum for a block, writes them, and returns the codes from 0 to `top`.
fn encode_line(
    x: &[f32; BLOCK],
    weights: &[f32; BLOCK],
    top: f32,
    spans: &[f32],
    out: &mut [u8],
) -> [u8; BLOCK] {
    let fit = fit_line(x, weights, top, spans, f32::INFINITY, |d, m| {
        (half_scale(d).to_f32(), finite_half(m).to_f32())
    });
    out[..2].copy_from_slice(&f16::from_f32(fit.scale).to_le_bytes());
    out[2..4].copy_from_slice(&f16::from_f32(fit.base).to_le_bytes());
    fit.q.map(|q| low_bits(q) as u8)
}

/// Writes 32 codes of 5 bits as [`five_bits`] reads them.
fn pack_five_bits(q: &[u8; BLOCK], packed: &mut [u8]) {
    let (fifth, nibbles) = packed.split_at_mut(4);
    pack::<1, 1>(q, 4, fifth);
    pack::<4, 16>(q, 0, nibbles);
}
