//! Scalar decoders and encoders.

use half::{bf16, f16};

use super::bits::{half_at, pack, unpack};
use super::encode::{
    block_weights, each, finite_half, fit_line, fit_scale, half_scale, inverse_of, low_bits,
    rounded, squared_error, within_reach,
};
use super::{BlockType, iq4, kquants};

const BLOCK: usize = 32;

/// Decodes one stored row into `out`.
///
/// # Panics
/// If `bytes` is not exactly the row of `out.len()` values.
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
    }
}

/// Encodes `values` as one stored row, choosing for each block the scale (and minimum) of least squared error among the
/// candidates tried.
///
/// F16 and BF16 round as IEEE 754 does, to infinity beyond their range. The block types cannot hold what is not finite:
/// there NaN counts as zero, and what is too large becomes the largest value that the block can hold.
///
/// # Panics
/// If `out` is not exactly the row of `values.len()` values.
pub fn encode_row(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    encode(block_type, values, None, out);
}

/// As [`encode_row`], where the squared error of value j counts in proportion to `importance[j]`, at least 0: the mean square of
/// what it will be multiplied with. Types of values that are stored one by one, and Q8_0, have no choice to make.
///
/// # Panics
/// As [`encode_row`]; also if there are not as many importances as values.
pub fn encode_row_by_importance(
    block_type: BlockType,
    values: &[f32],
    importance: &[f32],
    out: &mut [u8],
) {
    assert_eq!(importance.len(), values.len(), "one importance per value");
    encode(block_type, values, Some(importance), out);
}

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
    }
}

fn decode_each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *o = decode(*b);
    }
}

fn encode_each<const N: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    for (b, v) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *b = encode(*v);
    }
}

/// Block by block, N values at a time.
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

/// What is to be encoded block by block.
struct Row<'a> {
    block_type: BlockType,
    values: &'a [f32],
    importance: Option<&'a [f32]>,
}

impl Row<'_> {
    /// `encode` takes the values of a block and their weights.
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

/// Four bytes with the fifth bits in order, then the nibbles.
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
    // The smallest half-precision numbers lie so far apart that the nearest one can clip the largest value.
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

/// What the value of largest magnitude is tried to stand for. Beyond −8 it is clipped, which serves the rest better. The
/// smaller ones find values that were decoded from a block again exactly.
const STAND_INS_Q4_0: [f32; 8] = [-8.0, -7.0, -6.0, -5.0, -8.33, -8.7, -9.1, -9.5];

fn encode_q4_0(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_scale(x, weights, 8.0, &STAND_INS_Q4_0, out);
    pack::<4, 16>(&q, 0, &mut out[2..]);
}

const STAND_INS_Q5_0: [f32; 5] = [-16.0, -15.0, -16.6, -17.2, -14.0];

fn encode_q5_0(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_scale(x, weights, 16.0, &STAND_INS_Q5_0, out);
    pack_five_bits(&q, &mut out[2..]);
}

/// Writes the best scale; returns the codes, which stand for −`zero` to `zero` − 1.
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

/// How many steps the range from the smallest to the largest value is tried to span.
const SPANS_Q4_1: [f32; 6] = [15.0, 14.0, 15.63, 16.3, 17.05, 17.86];

fn encode_q4_1(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_line(x, weights, 15.0, &SPANS_Q4_1, out);
    pack::<4, 16>(&q, 0, &mut out[4..]);
}

const SPANS_Q5_1: [f32; 5] = [31.0, 30.0, 31.6, 32.2, 32.9];

fn encode_q5_1(x: &[f32; BLOCK], weights: &[f32; BLOCK], out: &mut [u8]) {
    let q = encode_line(x, weights, 31.0, &SPANS_Q5_1, out);
    pack_five_bits(&q, &mut out[4..]);
}

/// Writes the best scale and minimum; returns the codes.
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

fn pack_five_bits(q: &[u8; BLOCK], packed: &mut [u8]) {
    let (fifth, nibbles) = packed.split_at_mut(4);
    pack::<1, 1>(q, 4, fifth);
    pack::<4, 16>(q, 0, nibbles);
}
