//! The 4-bit formats IQ4_NL and IQ4_XS, whose codes stand for unevenly spaced levels. The levels are denser around zero,
//! where most weights are.
//!
//! IQ4_NL is a block of 32 values in 18 bytes: d f16, 16 bytes of nibbles; w = d · level(q). IQ4_XS is a super-block of 256
//! values in 136 bytes: d f16, 2 bytes with the upper 2 bits of eight scales, 4 bytes with their lower 4 bits, 128
//! bytes of nibbles, 16 for each sub-block of 32; w = d (s − 32) · level(q). The formats and the levels are ggml's.

use half::f16;

use super::bits::{half_at, pack, unpack};
use super::encode::{fit_scale, half_scale, low_bits};
use super::kquants::{SUPER, Scaled};

/// The levels that the codes 0 to 15 stand for.
const LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

pub(super) fn decode_iq4_nl(block: &[u8], out: &mut [f32; 32]) {
    decode_levels(half_at(block, 0), &block[2..], out);
}

pub(super) fn decode_iq4_xs(block: &[u8], out: &mut [f32; SUPER]) {
    let d = half_at(block, 0);
    let mut scales = [0; 8];
    unpack::<4, 1>(&block[4..8], 0, &mut scales);
    unpack::<2, 1>(&block[2..4], 4, &mut scales);
    let sub_blocks = block[8..]
        .as_chunks::<16>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<32>().0);
    for ((packed, out), scale) in sub_blocks.zip(scales) {
        decode_levels(d * (f32::from(scale) - 32.0), packed, out);
    }
}

/// Decodes 32 nibbles: each value is `step` times the level of its code.
fn decode_levels(step: f32, packed: &[u8], out: &mut [f32; 32]) {
    let mut q = [0; 32];
    unpack::<4, 16>(packed, 0, &mut q);
    for (o, q) in out.iter_mut().zip(q) {
        *o = step * f32::from(LEVELS[usize::from(q & 15)]);
    }
}

/// The levels that are tried for the value of largest magnitude; see [`fit_scale`].
const STAND_INS: [f32; 7] = [-127.0, -118.0, -110.0, -136.0, 113.0, 104.0, 122.0];

pub(super) fn encode_iq4_nl(x: &[f32; 32], weights: &[f32; 32], out: &mut [u8]) {
    let fit = fit_scale(x, weights, &STAND_INS, nearest_level, |d| {
        half_scale(d).to_f32()
    });
    out[..2].copy_from_slice(&f16::from_f32(fit.scale).to_le_bytes());
    pack::<4, 16>(&fit.q.map(code_of), 0, &mut out[2..]);
}

pub(super) fn encode_iq4_xs(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let scaled = Scaled::<8, 32>::fit(x, weights, &STAND_INS, nearest_level, -32.0);
    out[..2].copy_from_slice(&scaled.d.to_le_bytes());
    let scales = scaled.scales.map(|s| low_bits(s + 32.0) as u8);
    pack::<2, 1>(&scales, 4, &mut out[2..4]);
    pack::<4, 1>(&scales, 0, &mut out[4..8]);
    let codes = scaled.q.map(code_of);
    pack::<4, 16>(&codes, 0, &mut out[8..]);
}

/// The nearest level for each of the numbers from −128 to 127.5 in steps of a half. Finer steps are not needed, because the
/// middle between two levels is always one of these numbers.
const NEAREST: [f32; 512] = {
    let mut nearest = [0.0; 512];
    let mut i = 0;
    while i < 512 {
        // Entry i is for the numbers from i / 2 − 128 up to the next half. A number in the middle gets the upper level.
        let mut code = 0;
        while code < 15 && LEVELS[code] as i32 + LEVELS[code + 1] as i32 <= i as i32 - 256 {
            code += 1;
        }
        nearest[i] = LEVELS[code] as f32;
        i += 1;
    }
    nearest
};

/// The level nearest to `v`.
#[inline(always)]
fn nearest_level(v: f32) -> f32 {
    let entry = low_bits((v * 2.0 + 255.5).clamp(0.0, 511.0));
    NEAREST[entry as usize % 512]
}

/// The code that stands for `level`, which must be one of [`LEVELS`].
fn code_of(level: f32) -> u8 {
    LEVELS.iter().map(|l| u8::from(f32::from(*l) < level)).sum()
}
