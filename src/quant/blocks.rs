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
/// F16 and BF16 round as IEEE 754 does, to infinity beyond their range. The block types cannot hold what is not finite:
/// there NaN counts as zero, and what is too large becomes the largest value that the block can hold.
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
        encode(&values.map(within_reach), out);
    }
}

/// Finite, so that one bad value does not spoil the sums that choose its block's scale.
fn within_reach(v: f32) -> f32 {
    // Further than any block reaches: 127 times the largest half-precision number.
    const FAR: f32 = 1e7;
    if v.is_nan() { 0.0 } else { v.clamp(-FAR, FAR) }
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

/// The half-precision number nearest to `v`, and never an infinite one.
fn finite_half(v: f32) -> f16 {
    f16::from_f32(v.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// The half-precision scale nearest to `v`. It never vanishes: the smallest scale serves a block of tiny values better
/// than none.
fn half_scale(v: f32) -> f16 {
    let d = finite_half(v);
    if d.to_f32() == 0.0 && v != 0.0 {
        return f16::MIN_POSITIVE_SUBNORMAL.copysign(d);
    }
    d
}

fn encode_q8_0(x: &[f32; BLOCK], out: &mut [u8]) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let nearest = half_scale(largest / 127.0);
    let codes = |d: f16| {
        let inverse = inverse_of(d.to_f32());
        x.map(|v| (v * inverse).round().clamp(-127.0, 127.0))
    };
    let mut best = (nearest, codes(nearest));
    // The smallest half-precision numbers lie so far apart that the nearest one can clip the largest value.
    if nearest.to_f32() * 127.5 < largest && nearest < f16::MAX {
        let above = f16::from_bits(nearest.to_bits() + 1);
        let q = codes(above);
        if squared_error(x, &q, above.to_f32(), 0.0)
            < squared_error(x, &best.1, nearest.to_f32(), 0.0)
        {
            best = (above, q);
        }
    }
    out[..2].copy_from_slice(&best.0.to_le_bytes());
    for (o, q) in out[2..].iter_mut().zip(best.1) {
        *o = q as i8 as u8;
    }
}

fn inverse_of(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The scales tried, as multiples of the one that just covers the range. A slightly smaller one clips the extreme value
/// and serves the rest better. The larger ones let it stand for −7 d, −6 d or −5 d, so that values which were decoded
/// from a block are found again exactly.
const SCALES_Q4_0: [f32; 8] = [1.0, 8.0 / 7.0, 8.0 / 6.0, 8.0 / 5.0, 0.96, 0.92, 0.88, 0.84];

fn encode_q4_0(x: &[f32; BLOCK], out: &mut [u8]) {
    // The value of largest magnitude gets the code 0, which stands for −8 d, so that d takes its sign.
    let extreme = x
        .iter()
        .fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let mut best = (f32::INFINITY, f16::ZERO, [0.0f32; BLOCK]);
    for multiple in SCALES_Q4_0 {
        if extreme == 0.0 || best.0 == 0.0 {
            break;
        }
        let mut d = half_scale(extreme / -8.0 * multiple);
        // Codes for the scale, then the scale that suits the codes best, then its codes.
        for _ in 0..2 {
            let scale = d.to_f32();
            let q = nearest_codes(x, scale, 8.0).map(|q| q - 8.0);
            let error = squared_error(x, &q, scale, 0.0);
            if error < best.0 {
                best = (error, d, q);
            }
            let (qq, qx) = (sum(|i| q[i] * q[i]), sum(|i| q[i] * x[i]));
            if qq > 0.0 {
                d = half_scale(qx / qq);
            }
        }
    }
    out[..2].copy_from_slice(&best.1.to_le_bytes());
    pack_nibbles(&best.2.map(|q| (q + 8.0) as u8), &mut out[2..]);
}

/// The same for the range from the smallest to the largest value, which has 15 steps; a larger scale makes it 14.
const SCALES_Q4_1: [f32; 6] = [1.0, 15.0 / 14.0, 0.96, 0.92, 0.88, 0.84];

fn encode_q4_1(x: &[f32; BLOCK], out: &mut [u8]) {
    let low = x.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let high = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let range = high - low;
    let mut best = (f32::INFINITY, f16::ZERO, finite_half(low), [0.0f32; BLOCK]);
    for multiple in SCALES_Q4_1 {
        if best.0 == 0.0 {
            break;
        }
        let mut d = half_scale(range / 15.0 * multiple);
        // A range that is clipped is clipped alike at both ends.
        let mut m = finite_half(low + 0.5 * range * (1.0 - multiple).max(0.0));
        for _ in 0..2 {
            let (scale, base) = (d.to_f32(), m.to_f32());
            let q = nearest_codes(&x.map(|v| v - base), scale, 0.0);
            let error = squared_error(x, &q, scale, base);
            if error < best.0 {
                best = (error, d, m, q);
            }
            // The straight line through (q, x) of least squared error.
            let (q1, q2) = (sum(|i| q[i]), sum(|i| q[i] * q[i]));
            let (x1, qx) = (sum(|i| x[i]), sum(|i| q[i] * x[i]));
            let n = BLOCK as f32;
            let determinant = n * q2 - q1 * q1;
            if determinant > 0.0 {
                let slope = (n * qx - q1 * x1) / determinant;
                d = half_scale(slope);
                m = finite_half((x1 - slope * q1) / n);
            }
        }
    }
    out[..2].copy_from_slice(&best.1.to_le_bytes());
    out[2..4].copy_from_slice(&best.2.to_le_bytes());
    pack_nibbles(&best.3.map(|q| q as u8), &mut out[4..]);
}

/// x / scale + zero, rounded to the codes 0 to 15.
fn nearest_codes(x: &[f32; BLOCK], scale: f32, zero: f32) -> [f32; BLOCK] {
    let inverse = inverse_of(scale);
    // Converting truncates, which is rounding once a half has been added, and many times faster than `round`.
    x.map(|v| (v * inverse + (zero + 0.5)).clamp(0.0, 15.0) as i32 as f32)
}

/// Σ (x − (scale q + base))².
fn squared_error(x: &[f32; BLOCK], q: &[f32; BLOCK], scale: f32, base: f32) -> f32 {
    sum(|i| {
        let difference = x[i] - (scale * q[i] + base);
        difference * difference
    })
}

/// The sum over a block, in lanes, so that it can be done with vectors.
fn sum(term: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 8;
    let mut lanes = [0.0f32; LANES];
    for start in (0..BLOCK).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(start + lane);
        }
    }
    lanes.iter().sum()
}
