//! The K-quants: super-blocks of 256 values, divided into sub-blocks of 16 or 32. The scales (and minima) of the sub-blocks
//! are small integers; what they multiply is a half-precision number that the whole super-block shares.
//!
//! | type | w | bytes, in order |
//! | --- | --- | --- |
//! | Q2_K | d s q − dmin m | 16 scales (s low, m high nibble), 64 codes, d, dmin |
//! | Q3_K | d (s − 32) (q − 4) | 32 third bits, 64 lower bits, 12 scales, d |
//! | Q4_K | d s q − dmin m | d, dmin, 12 scales and minima, 128 codes |
//! | Q5_K | d s q − dmin m | d, dmin, 12 scales and minima, 32 fifth bits, 128 lower bits |
//! | Q6_K | d s (q − 32) | 128 lower bits, 64 upper bits, 16 signed scales, d |
//!
//! A sub-block is 16 values in Q2_K, Q3_K and Q6_K and 32 in Q4_K and Q5_K. The formats are ggml's; how codes lie in
//! bytes is described in [`bits`](super::bits).

use std::array;

use half::f16;

use super::bits::{half_at, pack, unpack};
use super::encode::{
    dot, each, fit_line, fit_scale, half_scale, half_scale_of_scales, inverse_of, low_bits,
    nearest_codes, rounded, squared_error, times, total,
};

/// The number of values in a super-block.
pub(super) const SUPER: usize = 256;

/// Decodes a super-block of Q2_K.
///
/// Bytes 0–15: scale (low nibble) and minimum of each sub-block; 16–79: codes, 128 in 32 bytes; 80–83: d, dmin.
pub(super) fn decode_q2_k(block: &[u8], out: &mut [f32; SUPER]) {
    let (scales, codes) = block[..80].split_at(16);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    let mut q = [0; SUPER];
    unpack::<2, 32>(codes, 0, &mut q);
    decode_sub_blocks::<16>(&q, out, |sub| {
        let (scale, minimum) = (scales[sub] & 15, scales[sub] >> 4);
        (d * f32::from(scale), 0.0, dmin * f32::from(minimum))
    });
}

/// Decodes a super-block of Q3_K.
///
/// Bytes 0–31: bit 2 of the codes; 32–95: bits 0 and 1, 128 values in 32 bytes; 96–103: the low nibbles of the
/// scales, the first eight in the low halves; 104–107: bits 4 and 5 of the scales, four to a byte; 108–109: d.
pub(super) fn decode_q3_k(block: &[u8], out: &mut [f32; SUPER]) {
    let d = half_at(block, 108);
    let mut q = [0; SUPER];
    unpack::<2, 32>(&block[32..96], 0, &mut q);
    unpack::<1, 32>(&block[..32], 2, &mut q);
    let mut scales = [0; 16];
    unpack::<4, 8>(&block[96..104], 0, &mut scales);
    unpack::<2, 4>(&block[104..108], 4, &mut scales);
    decode_sub_blocks::<16>(&q, out, |sub| {
        (d * (f32::from(scales[sub]) - 32.0), 4.0, 0.0)
    });
}

/// Decodes a super-block of Q4_K.
///
/// Bytes 0–15: see [`decode_scales_and_minima`]; 16–143: codes, 64 in 32 bytes.
pub(super) fn decode_q4_k(block: &[u8], out: &mut [f32; SUPER]) {
    let mut q = [0; SUPER];
    unpack::<4, 32>(&block[16..], 0, &mut q);
    decode_scales_and_minima(block, &q, out);
}

/// Decodes a super-block of Q5_K.
///
/// Bytes 0–15: see [`decode_scales_and_minima`]; 16–47: bit 4 of the codes; 48–175: bits 0 to 3, 64 values in 32 bytes.
pub(super) fn decode_q5_k(block: &[u8], out: &mut [f32; SUPER]) {
    let mut q = [0; SUPER];
    unpack::<4, 32>(&block[48..], 0, &mut q);
    unpack::<1, 32>(&block[16..48], 4, &mut q);
    decode_scales_and_minima(block, &q, out);
}

/// Decodes a super-block of Q6_K.
///
/// Bytes 0–127: bits 0 to 3 of the codes, 128 in 64 bytes; 128–191: bits 4 and 5, 128 in 32 bytes; 192–207: scales;
/// 208–209: d.
pub(super) fn decode_q6_k(block: &[u8], out: &mut [f32; SUPER]) {
    let (scales, d) = (&block[192..208], half_at(block, 208));
    let mut q = [0; SUPER];
    unpack::<4, 64>(&block[..128], 0, &mut q);
    unpack::<2, 32>(&block[128..192], 4, &mut q);
    decode_sub_blocks::<16>(&q, out, |sub| (d * f32::from(scales[sub] as i8), 32.0, 0.0));
}

/// Decodes the codes `q` of a super-block of Q4_K or Q5_K. Both begin with the same 16 bytes: d, dmin, and the scales and
/// minima, for which see [`unpack_scales_and_minima`].
fn decode_scales_and_minima(block: &[u8], q: &[u8; SUPER], out: &mut [f32; SUPER]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, minima) = unpack_scales_and_minima(&block[4..16]);
    decode_sub_blocks::<32>(q, out, |sub| {
        (
            d * f32::from(scales[sub]),
            0.0,
            dmin * f32::from(minima[sub]),
        )
    });
}

/// Reads the eight scales and eight minima of 6 bits each from the 12 bytes `a`.
///
/// The first four of each lie in the low 6 bits: scale j in a(j), minimum j in a(4 + j). The low 4 bits of scale 4 + j
/// and minimum 4 + j share a(8 + j), the scale's in the low nibble; their upper 2 bits are the upper bits of a(j) and
/// of a(4 + j).
fn unpack_scales_and_minima(a: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = a[j] & 63;
        minima[j] = a[4 + j] & 63;
        scales[4 + j] = a[8 + j] & 15 | a[j] >> 6 << 4;
        minima[4 + j] = a[8 + j] >> 4 | a[4 + j] >> 6 << 4;
    }
    (scales, minima)
}

/// Decodes sub-blocks of SUB values: w = step (q − zero) − minimum. `parameters` returns (step, zero, minimum) for the number
/// of a sub-block.
fn decode_sub_blocks<const SUB: usize>(
    q: &[u8; SUPER],
    out: &mut [f32; SUPER],
    parameters: impl Fn(usize) -> (f32, f32, f32),
) {
    let sub_blocks = q
        .as_chunks::<SUB>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<SUB>().0);
    for (sub, (q, out)) in sub_blocks.enumerate() {
        let (step, zero, minimum) = parameters(sub);
        for (o, q) in out.iter_mut().zip(q) {
            *o = step * (f32::from(*q) - zero) - minimum;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding
// ---------------------------------------------------------------------------------------------------------------------

// The numbers of steps that are tried for the range of a sub-block's values; see `fit_line`.
const SPANS_Q2_K: [f32; 6] = [3.0, 2.5, 3.5, 4.0, 4.5, 2.0];
const SPANS_Q4_K: [f32; 6] = [15.0, 14.3, 13.5, 15.6, 16.3, 17.0];
const SPANS_Q5_K: [f32; 4] = [31.0, 30.0, 31.7, 32.5];

pub(super) fn encode_q2_k(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let lines = Lines::<16, 16>::fit(x, weights, 3.0, 15.0, &SPANS_Q2_K);
    for (o, (s, m)) in out.iter_mut().zip(lines.scales.iter().zip(lines.minima)) {
        *o = s | m << 4;
    }
    pack::<2, 32>(&lines.q, 0, &mut out[16..80]);
    out[80..82].copy_from_slice(&lines.d.to_le_bytes());
    out[82..84].copy_from_slice(&lines.dmin.to_le_bytes());
}

pub(super) fn encode_q4_k(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let lines = Lines::<8, 32>::fit(x, weights, 15.0, 63.0, &SPANS_Q4_K);
    lines.write_scales_and_minima(out);
    pack::<4, 32>(&lines.q, 0, &mut out[16..]);
}

pub(super) fn encode_q5_k(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let lines = Lines::<8, 32>::fit(x, weights, 31.0, 63.0, &SPANS_Q5_K);
    lines.write_scales_and_minima(out);
    pack::<1, 32>(&lines.q, 4, &mut out[16..48]);
    pack::<4, 32>(&lines.q, 0, &mut out[48..]);
}

// The codes that are tried for the value of largest magnitude in a sub-block; see `fit_scale`.
const STAND_INS_Q3_K: [f32; 7] = [-4.0, -3.6, -3.2, -4.4, -4.9, 3.0, 3.5];
const STAND_INS_Q6_K: [f32; 4] = [-32.0, -31.0, -32.6, -30.0];

pub(super) fn encode_q3_k(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let nearest = |v: f32| rounded(v.clamp(-4.0, 3.0));
    let scaled = Scaled::<16, 16>::fit(x, weights, &STAND_INS_Q3_K, nearest, -32.0);
    let q = scaled.q.map(|q| low_bits(q + 4.0) as u8);
    pack::<1, 32>(&q, 2, &mut out[..32]);
    pack::<2, 32>(&q, 0, &mut out[32..96]);
    let scales = scaled.scales.map(|s| low_bits(s + 32.0) as u8);
    pack::<4, 8>(&scales, 0, &mut out[96..104]);
    pack::<2, 4>(&scales, 4, &mut out[104..108]);
    out[108..].copy_from_slice(&scaled.d.to_le_bytes());
}

pub(super) fn encode_q6_k(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let nearest = |v: f32| rounded(v.clamp(-32.0, 31.0));
    let scaled = Scaled::<16, 16>::fit(x, weights, &STAND_INS_Q6_K, nearest, -128.0);
    let q = scaled.q.map(|q| low_bits(q + 32.0) as u8);
    pack::<4, 64>(&q, 0, &mut out[..128]);
    pack::<2, 32>(&q, 4, &mut out[128..192]);
    for (o, s) in out[192..208].iter_mut().zip(scaled.scales) {
        *o = low_bits(s) as u8;
    }
    out[208..].copy_from_slice(&scaled.d.to_le_bytes());
}

/// A super-block of COUNT sub-blocks of SUB values, w = d s q, where s and q may be negative.
pub(super) struct Scaled<const COUNT: usize, const SUB: usize> {
    pub d: f16,
    pub scales: [f32; COUNT],
    pub q: [f32; SUPER],
}

impl<const COUNT: usize, const SUB: usize> Scaled<COUNT, SUB> {
    /// Finds d, scales and codes for the values of a super-block. Scales are from `least`, which is negative, to −`least` − 1;
    /// the other parameters are those of [`fit_scale`].
    pub(super) fn fit(
        x: &[f32; SUPER],
        weights: &[f32; SUPER],
        stand_ins: &[f32],
        nearest: impl Fn(f32) -> f32,
        least: f32,
    ) -> Self {
        let x = x.as_chunks::<SUB>().0;
        let weights = weights.as_chunks::<SUB>().0;
        // First each sub-block by itself, with a scale of any value.
        let free: [_; COUNT] = array::from_fn(|sub| {
            fit_scale(&x[sub], &weights[sub], stand_ins, &nearest, |scale| scale)
        });
        let largest = free.iter().map(|f| f.scale).fold(0.0f32, farther);
        let mut d = half_scale_of_scales(largest / least);
        let mut codes: [_; COUNT] = free.map(|f| f.q);
        let mut best = None;
        for _ in 0..ROUNDS {
            let parts: [_; COUNT] = array::from_fn(|sub| {
                Part::with_scale(
                    &x[sub],
                    &weights[sub],
                    &codes[sub],
                    d.to_f32(),
                    least,
                    &nearest,
                )
            });
            if !improve(&mut best, d, d, &parts) {
                break;
            }
            codes = parts.map(|p| p.q);
            // The d with the least squared error for these scales and codes.
            let (mut aa, mut ax) = (0.0, 0.0);
            for ((x, weights), p) in x.iter().zip(weights).zip(&parts) {
                let q = times(weights, &p.q);
                aa += p.scale * p.scale * dot(&q, &p.q);
                ax += p.scale * dot(&q, x);
            }
            d = half_scale(ax * inverse_of(aa));
        }
        let best = best.expect("at least one round");
        let mut q = [0.0; SUPER];
        for (q, part) in q.as_chunks_mut::<SUB>().0.iter_mut().zip(&best.parts) {
            *q = part.q;
        }
        Self {
            d: best.d,
            scales: best.parts.map(|p| p.scale),
            q,
        }
    }
}

/// A super-block of COUNT sub-blocks of SUB values, w = d s q − dmin m.
struct Lines<const COUNT: usize, const SUB: usize> {
    d: f16,
    dmin: f16,
    scales: [u8; COUNT],
    minima: [u8; COUNT],
    q: [u8; SUPER],
}

impl<const COUNT: usize, const SUB: usize> Lines<COUNT, SUB> {
    /// Finds d, dmin, scales, minima and codes for the values of a super-block. Codes are from 0 to `top`, scales and minima
    /// from 0 to `most`; the other parameters are those of [`fit_line`].
    fn fit(x: &[f32; SUPER], weights: &[f32; SUPER], top: f32, most: f32, spans: &[f32]) -> Self {
        let x = x.as_chunks::<SUB>().0;
        let weights = weights.as_chunks::<SUB>().0;
        // First each sub-block by itself, with a scale and a base of any value; only the sign of the base is fixed.
        let free: [_; COUNT] = array::from_fn(|sub| {
            fit_line(&x[sub], &weights[sub], top, spans, 0.0, |scale, base| {
                (scale, base)
            })
        });
        let largest = free.iter().map(|f| f.scale).fold(0.0f32, farther);
        let lowest = free.iter().map(|f| f.base).fold(0.0f32, farther);
        let mut d = half_scale_of_scales(largest / most);
        let mut dmin = half_scale_of_scales(-lowest / most);
        let mut codes: [_; COUNT] = free.map(|f| f.q);
        let mut best = None;
        for _ in 0..ROUNDS {
            let parts: [_; COUNT] = array::from_fn(|sub| {
                Part::with_minimum(
                    &x[sub],
                    &weights[sub],
                    &codes[sub],
                    d.to_f32(),
                    dmin.to_f32(),
                    top,
                    most,
                )
            });
            if !improve(&mut best, d, dmin, &parts) {
                break;
            }
            codes = parts.map(|p| p.q);
            // The d and dmin with the least squared error for these scales, minima and codes: w = d a + dmin b, where a = s q
            // and b = −m.
            let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0, 0.0, 0.0, 0.0, 0.0);
            for ((x, weights), p) in x.iter().zip(weights).zip(&parts) {
                let q = times(weights, &p.q);
                aa += p.scale * p.scale * dot(&q, &p.q);
                ab -= p.scale * p.minimum * total(&q);
                bb += p.minimum * p.minimum * total(weights);
                ax += p.scale * dot(&q, x);
                bx -= p.minimum * dot(weights, x);
            }
            let determinant = aa * bb - ab * ab;
            if determinant > 0.0 {
                d = half_scale((ax * bb - bx * ab) / determinant);
                dmin = half_scale((aa * bx - ab * ax) / determinant);
            } else {
                d = half_scale(ax * inverse_of(aa));
            }
        }
        let best = best.expect("at least one round");
        let mut q = [0; SUPER];
        for (q, part) in q.as_chunks_mut::<SUB>().0.iter_mut().zip(&best.parts) {
            *q = part.q.map(|q| low_bits(q) as u8);
        }
        Self {
            d: best.d,
            dmin: best.dmin,
            scales: best.parts.map(|p| low_bits(p.scale) as u8),
            minima: best.parts.map(|p| low_bits(p.minimum) as u8),
            q,
        }
    }
}

impl Lines<8, 32> {
    /// Writes the first 16 bytes of a super-block of Q4_K or Q5_K; see [`unpack_scales_and_minima`].
    fn write_scales_and_minima(&self, out: &mut [u8]) {
        out[..2].copy_from_slice(&self.d.to_le_bytes());
        out[2..4].copy_from_slice(&self.dmin.to_le_bytes());
        let a = &mut out[4..16];
        for j in 0..4 {
            let (s, m) = (self.scales[4 + j], self.minima[4 + j]);
            a[j] = self.scales[j] | s >> 4 << 6;
            a[4 + j] = self.minima[j] | m >> 4 << 6;
            a[8 + j] = s & 15 | m << 4;
        }
    }
}

/// How many times d (and dmin), the half-precision numbers of a super-block, are fitted and the sub-blocks encoded with them.
const ROUNDS: usize = 2;

/// A sub-block whose scale and minimum are whole numbers, and its weighted squared error.
#[derive(Clone, Copy)]
struct Part<const SUB: usize> {
    error: f32,
    scale: f32,
    minimum: f32,
    q: [f32; SUB],
}

impl<const SUB: usize> Part<SUB> {
    /// A placeholder that any real sub-block is better than.
    const NONE: Self = Self {
        error: f32::INFINITY,
        scale: 0.0,
        minimum: 0.0,
        q: [0.0; SUB],
    };

    /// Fits values as d · scale · q. The search starts from the codes `q`, which may have been chosen for another d.
    fn with_scale(
        x: &[f32; SUB],
        weights: &[f32; SUB],
        q: &[f32; SUB],
        d: f32,
        least: f32,
        nearest: impl Fn(f32) -> f32,
    ) -> Self {
        let mut best = Self::NONE;
        let mut q = *q;
        for _ in 0..2 {
            let weighted = times(weights, &q);
            let scale = dot(&weighted, x) * inverse_of(dot(&weighted, &q)) * inverse_of(d);
            let scale = rounded(scale.clamp(least, -least - 1.0));
            if scale == best.scale && best.error.is_finite() {
                break;
            }
            let inverse = inverse_of(d * scale);
            q = each(x, |v| nearest(v * inverse));
            let error = squared_error(x, weights, &q, d * scale, 0.0);
            if error < best.error {
                best = Self {
                    error,
                    scale,
                    minimum: 0.0,
                    q,
                };
            }
        }
        best
    }

    /// Fits values as d · scale · q − dmin · minimum. The search starts from the codes `q`, which may have been chosen for
    /// another d and dmin.
    fn with_minimum(
        x: &[f32; SUB],
        weights: &[f32; SUB],
        q: &[f32; SUB],
        d: f32,
        dmin: f32,
        top: f32,
        most: f32,
    ) -> Self {
        let n = total(weights);
        let x1 = dot(weights, x);
        let whole = |v: f32| rounded(v.clamp(0.0, most));
        let mut best = Self::NONE;
        let mut q = *q;
        for _ in 0..3 {
            let weighted = times(weights, &q);
            let (q1, q2, qx) = (total(&weighted), dot(&weighted, &q), dot(&weighted, x));
            let determinant = n * q2 - q1 * q1;
            let base = if determinant > 0.0 {
                (q2 * x1 - q1 * qx) / determinant
            } else {
                x1 / n
            };
            let minimum = whole(-base * inverse_of(dmin));
            // The best scale for this minimum.
            let scale = (qx + dmin * minimum * q1) * inverse_of(q2);
            let scale = whole(scale * inverse_of(d));
            if (scale, minimum) == (best.scale, best.minimum) && best.error.is_finite() {
                break;
            }
            q = nearest_codes(x, d * scale, -dmin * minimum, top);
            let error = squared_error(x, weights, &q, d * scale, -dmin * minimum);
            if error < best.error {
                best = Self {
                    error,
                    scale,
                    minimum,
                    q,
                };
            }
        }
        best
    }
}

/// The super-block with the least error so far.
struct Best<const COUNT: usize, const SUB: usize> {
    error: f32,
    d: f16,
    dmin: f16,
    parts: [Part<SUB>; COUNT],
}

/// Replaces `best` if these parts have a smaller error; returns whether they have.
fn improve<const COUNT: usize, const SUB: usize>(
    best: &mut Option<Best<COUNT, SUB>>,
    d: f16,
    dmin: f16,
    parts: &[Part<SUB>; COUNT],
) -> bool {
    let error = parts.iter().map(|p| p.error).sum();
    if best.as_ref().is_some_and(|b| b.error <= error) {
        return false;
    }
    *best = Some(Best {
        error,
        d,
        dmin,
        parts: *parts,
    });
    true
}

/// The one of two numbers that is farther from zero; `a` if they are equally far.
fn farther(a: f32, b: f32) -> f32 {
    if b.abs() > a.abs() { b } else { a }
}
