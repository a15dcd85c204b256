//! Scalar decoders and encoders.

use half::{bf16, f16};

use super::BlockType;

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
        BlockType::Q8_0 => {
            for (block, out) in blocks(block_type, bytes, out) {
                let d = half_at(block, 0);
                for (o, q) in out.iter_mut().zip(&block[2..]) {
                    *o = d * f32::from(*q as i8);
                }
            }
        }
        BlockType::Q4_0 => {
            for (block, out) in blocks(block_type, bytes, out) {
                let d = half_at(block, 0);
                nibbles(&block[2..], out, |q| d * (f32::from(q) - 8.0));
            }
        }
        BlockType::Q4_1 => {
            for (block, out) in blocks(block_type, bytes, out) {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..], out, |q| d * f32::from(q) + m);
            }
        }
    }
}

/// Encodes `values` as one stored row, choosing for each block the scale (and minimum) of least squared error among the
/// candidates tried.
///
/// # Panics
/// If `out` is not exactly the row of `values.len()` values.
pub fn encode_row(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), block_type.row_bytes(values.len()), "row length");
    match block_type {
        BlockType::F32 => encode_each(values, out, f32::to_le_bytes),
        BlockType::F16 => encode_each(values, out, |v| f16::from_f32(v).to_le_bytes()),
        BlockType::BF16 => encode_each(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        BlockType::Q8_0 => encode_blocks(block_type, values, out, encode_q8_0),
        BlockType::Q4_0 => encode_blocks(block_type, values, out, encode_q4_0),
        BlockType::Q4_1 => encode_blocks(block_type, values, out, encode_q4_1),
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

fn blocks<'a>(
    block_type: BlockType,
    bytes: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8], &'a mut [f32; BLOCK])> {
    bytes
        .chunks_exact(block_type.block_bytes())
        .zip(out.as_chunks_mut::<BLOCK>().0)
}

fn encode_blocks(
    block_type: BlockType,
    values: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; BLOCK], &mut [u8]),
) {
    for (values, out) in values
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(out.chunks_exact_mut(block_type.block_bytes()))
    {
        encode(values, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Byte j of the packed nibbles holds value j in its low half and value j + 16 in its high half.
fn nibbles(packed: &[u8], out: &mut [f32; BLOCK], value: impl Fn(u8) -> f32) {
    for (j, byte) in packed.iter().enumerate() {
        out[j] = value(byte & 15);
        out[j + BLOCK / 2] = value(byte >> 4);
    }
}

fn pack_nibbles(q: &[u8; BLOCK], packed: &mut [u8]) {
    for (j, byte) in packed.iter_mut().enumerate() {
        *byte = q[j] | q[j + BLOCK / 2] << 4;
    }
}

fn encode_q8_0(x: &[f32; BLOCK], out: &mut [u8]) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let d = f16::from_f32(largest / 127.0);
    let inverse = inverse_of(d.to_f32());
    out[..2].copy_from_slice(&d.to_le_bytes());
    for (o, v) in out[2..].iter_mut().zip(x) {
        *o = (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
    }
}

fn inverse_of(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The scales tried around the one that just covers the range, as multiples of it. A slightly smaller one clips the
/// extreme value and serves the rest better.
const SHRINK: [f32; 5] = [1.0, 0.96, 0.92, 0.88, 0.84];

fn encode_q4_0(x: &[f32; BLOCK], out: &mut [u8]) {
    // The value of largest magnitude gets the code 0, which stands for −8 d, so that d takes its sign.
    let extreme = x
        .iter()
        .fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let mut best = (f32::INFINITY, f16::ZERO, [8u8; BLOCK]);
    for shrink in SHRINK {
        let mut d = f16::from_f32(extreme / -8.0 * shrink);
        // Codes for the scale, then the scale that suits the codes best, then its codes.
        for _ in 0..2 {
            let inverse = inverse_of(d.to_f32());
            let q = x.map(|v| ((v * inverse).round() + 8.0).clamp(0.0, 15.0) as u8);
            let error = squared_error(x, &q, |q| d.to_f32() * (f32::from(q) - 8.0));
            if error < best.0 {
                best = (error, d, q);
            }
            let (mut qq, mut qx) = (0.0f32, 0.0f32);
            for (&v, &q) in x.iter().zip(&q) {
                let q = f32::from(q) - 8.0;
                qq += q * q;
                qx += q * v;
            }
            if qq > 0.0 {
                d = f16::from_f32(qx / qq);
            }
        }
    }
    out[..2].copy_from_slice(&best.1.to_le_bytes());
    pack_nibbles(&best.2, &mut out[2..]);
}

fn encode_q4_1(x: &[f32; BLOCK], out: &mut [u8]) {
    let low = x.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let high = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let middle = 0.5 * (low + high);
    let mut best = (f32::INFINITY, f16::ZERO, f16::from_f32(low), [0u8; BLOCK]);
    for shrink in SHRINK {
        let mut d = f16::from_f32((high - low) / 15.0 * shrink);
        let mut m = f16::from_f32(middle - 0.5 * (high - low) * shrink);
        for _ in 0..2 {
            let (inverse, base) = (inverse_of(d.to_f32()), m.to_f32());
            let q = x.map(|v| ((v - base) * inverse).round().clamp(0.0, 15.0) as u8);
            let error = squared_error(x, &q, |q| d.to_f32() * f32::from(q) + base);
            if error < best.0 {
                best = (error, d, m, q);
            }
            // The straight line through (q, x) of least squared error.
            let (mut q1, mut q2, mut x1, mut qx) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
            for (&v, &q) in x.iter().zip(&q) {
                let q = f32::from(q);
                q1 += q;
                q2 += q * q;
                x1 += v;
                qx += q * v;
            }
            let n = BLOCK as f32;
            let determinant = n * q2 - q1 * q1;
            if determinant > 0.0 {
                let slope = (n * qx - q1 * x1) / determinant;
                d = f16::from_f32(slope);
                m = f16::from_f32((x1 - slope * q1) / n);
            }
        }
    }
    out[..2].copy_from_slice(&best.1.to_le_bytes());
    out[2..4].copy_from_slice(&best.2.to_le_bytes());
    pack_nibbles(&best.3, &mut out[4..]);
}

fn squared_error(x: &[f32; BLOCK], q: &[u8; BLOCK], value: impl Fn(u8) -> f32) -> f32 {
    x.iter()
        .zip(q)
        .map(|(v, &q)| (v - value(q)) * (v - value(q)))
        .sum()
}
