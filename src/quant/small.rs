//! Formats with few levels: MXFP4, whose scale is a power of two, and TQ1_0 and TQ2_0, whose weights are -1, 0 and 1 times a scale; and
//! Q8_1, the form of activations, which is Q8_0 with a sum. The formats are ggml's, MXFP4 that of the Open Compute Project.
//!
//! MXFP4 is a block of 32 values in 17 bytes: e, 16 bytes of nibbles; w = 2^(e - 128) level(q). TQ1_0 is a super-block of 256 values in 54
//! bytes: 48 with five digits of base 3 each, 4 with four, d f16. TQ2_0 has 2 bits for each: 64 bytes, d f16. Q8_1 is a block of 32 values in 36
//! bytes: d f16, the sum d Σ q f16, 32 signed bytes.

use half::f16;

use super::bits::{half_at, pack, unpack};
use super::encode::{fit_scale, half_scale, rounded};
use super::kquants::SUPER;

// ---- MXFP4 ----

/// Twice what the codes 0 to 7 of four bits of floating point stand for; the eighth bit is the sign.
const LEVELS: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];

/// 2^(e - 128).
fn power(e: u8) -> f32 {
    match e {
        // These are subnormal.
        0 | 1 => f32::from_bits(0x0020_0000 << e),
        _ => f32::from_bits(u32::from(e - 1) << 23),
    }
}

pub(super) fn decode_mxfp4(block: &[u8], out: &mut [f32; 32]) {
    let scale = power(block[0]);
    let mut q = [0; 32];
    unpack::<4, 16>(&block[1..], 0, &mut q);
    *out = q.map(|q| {
        let level = LEVELS[usize::from(q & 7)];
        scale * if q & 8 == 0 { level } else { -level }
    });
}

pub(super) fn encode_mxfp4(x: &[f32; 32], weights: &[f32; 32], out: &mut [u8]) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let mut best = (f32::INFINITY, 0, [0; 32]);
    // The least power with which nothing is clipped, and two below it.
    let fits = (0..=254u8)
        .find(|e| power(*e) * 12.0 >= largest)
        .unwrap_or(254);
    for e in fits.saturating_sub(2)..=fits {
        let inverse = 1.0 / power(e);
        let mut error = 0.0;
        let codes = std::array::from_fn(|i| {
            let magnitude = x[i].abs() * inverse;
            let code = (0..7)
                .filter(|c| magnitude > 0.5 * (LEVELS[*c] + LEVELS[c + 1]))
                .count();
            let difference = x[i].abs() - power(e) * LEVELS[code];
            error += weights[i] * difference * difference;
            // There is no other zero than the one without a sign.
            code as u8 | u8::from(x[i] < 0.0 && code > 0) << 3
        });
        if error < best.0 {
            best = (error, e, codes);
        }
    }
    out[0] = best.1;
    pack::<4, 16>(&best.2, 0, &mut out[1..]);
}

// ---- TQ1_0 and TQ2_0 ----

/// Runs of bytes of TQ1_0 whose digits lie as planes: the first byte, how many bytes, and how many digits each has.
const RUNS: [(usize, usize, usize); 3] = [(0, 32, 5), (32, 16, 5), (48, 4, 4)];

pub(super) fn decode_tq1_0(block: &[u8], out: &mut [f32; SUPER]) {
    let d = half_at(block, 52);
    let mut out = out.iter_mut();
    for (first, bytes, digits) in RUNS {
        for n in 0..digits {
            for byte in &block[first..first + bytes] {
                // A byte is a fraction in 256ths; its digits come out one after the other, the highest first.
                let rest = byte.wrapping_mul(3u8.pow(n as u32));
                let digit = (u16::from(rest) * 3) >> 8;
                if let Some(out) = out.next() {
                    *out = d * (f32::from(digit) - 1.0);
                }
            }
        }
    }
}

pub(super) fn encode_tq1_0(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let (d, codes) = ternary(x, weights);
    let mut at = 0;
    for (first, bytes, digits) in RUNS {
        for i in 0..bytes {
            let digit = |n: usize| match n < digits {
                true => u32::from(codes[at + n * bytes + i]),
                false => 0,
            };
            let number = (0..5).fold(0, |number, n| number * 3 + digit(n));
            // Rounded up, so that the digits of the fraction are those of the number.
            out[first + i] = (number * 256).div_ceil(243) as u8;
        }
        at += bytes * digits;
    }
    out[52..54].copy_from_slice(&d.to_le_bytes());
}

pub(super) fn decode_tq2_0(block: &[u8], out: &mut [f32; SUPER]) {
    let d = half_at(block, 64);
    let mut q = [0; SUPER];
    unpack::<2, 32>(&block[..64], 0, &mut q);
    *out = q.map(|q| d * (f32::from(q) - 1.0));
}

pub(super) fn encode_tq2_0(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let (d, codes) = ternary(x, weights);
    pack::<2, 32>(&codes, 0, &mut out[..64]);
    out[64..66].copy_from_slice(&d.to_le_bytes());
}

/// The scale, and codes 0, 1 and 2 for -1, 0 and 1.
fn ternary(x: &[f32; SUPER], weights: &[f32; SUPER]) -> (f16, [u8; SUPER]) {
    const STAND_INS: [f32; 5] = [1.0, 1.4, 1.9, 2.5, 3.2];
    let nearest = |v: f32| rounded(v.clamp(-1.0, 1.0));
    let fit = fit_scale(x, weights, &STAND_INS, nearest, |d| half_scale(d).to_f32());
    (f16::from_f32(fit.scale), fit.q.map(|q| (q + 1.0) as u8))
}

// ---- Q8_1 ----

pub(super) fn decode_q8_1(block: &[u8], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (o, q) in out.iter_mut().zip(&block[4..]) {
        *o = d * f32::from(*q as i8);
    }
}

/// Writes a block whose scale and codes are those of a block of Q8_0.
pub(super) fn encode_q8_1(q8_0: &[u8], out: &mut [u8]) {
    let codes = &q8_0[2..];
    out[..2].copy_from_slice(&q8_0[..2]);
    let sum: i32 = codes.iter().map(|q| i32::from(*q as i8)).sum();
    let sum = super::encode::finite_half(half_at(q8_0, 0) * sum as f32);
    out[2..4].copy_from_slice(&sum.to_le_bytes());
    out[4..].copy_from_slice(codes);
}
