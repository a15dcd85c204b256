//! What the encoders share: least-squares searches for the scale, or the scale and base, of a few values.
//!
//! Every value has a weight, by which its squared error counts.
//!
//! Every search goes the same way. A few candidates are tried; for each the values get their nearest codes, then the
//! codes get the scale that suits them best, then the values their nearest codes again. The least squared error wins.
//!
//! The loops over values are functions of their own, never inlined: inside a larger function the compiler keeps the
//! values of small arrays in scalar registers and misses the vector instructions, which makes a search several times
//! slower.

use half::f16;

/// Adding and subtracting this rounds numbers up to 2²² to whole ones, ties to even, many times faster than `round`.
const ROUNDER: f32 = 12_582_912.0;

/// Sums and extremes are taken in so many lanes.
const LANES: usize = 8;

#[inline(always)]
pub(super) fn rounded(v: f32) -> f32 {
    (v + ROUNDER) - ROUNDER
}

/// The low bits of a whole number between −2²² and 2²², cut from its bits: conversions of Rust saturate, which costs
/// more.
#[inline(always)]
pub(super) fn low_bits(whole: f32) -> u32 {
    (whole + ROUNDER).to_bits() & 0xFFFF
}

/// Finite, so that one bad value does not spoil the sums that choose its block's scale.
pub(super) fn within_reach(v: f32) -> f32 {
    // Further than any block reaches: 128 · 32 times the largest half-precision number.
    const FAR: f32 = 3e8;
    if v.is_nan() { 0.0 } else { v.clamp(-FAR, FAR) }
}

/// The half-precision number nearest to `v`, and never an infinite one.
pub(super) fn finite_half(v: f32) -> f16 {
    f16::from_f32(v.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// The half-precision scale nearest to `v`. It never vanishes: the smallest scale serves a block of tiny values better
/// than none.
pub(super) fn half_scale(v: f32) -> f16 {
    let d = finite_half(v);
    if d.to_f32() == 0.0 && v != 0.0 {
        return f16::MIN_POSITIVE_SUBNORMAL.copysign(d);
    }
    d
}

/// The same for the scale of scales, which may have to be larger: the smallest halves lie so far apart that the
/// nearest one can leave the largest scale out of reach, while the scales between are fine enough to make up for a
/// larger one.
pub(super) fn half_scale_of_scales(v: f32) -> f16 {
    let d = half_scale(v);
    if d.to_f32().abs() < v.abs() * (1.0 - 1.0 / 1024.0) && d.to_f32().abs() < f16::MAX.to_f32() {
        return f16::from_bits(d.to_bits() + 1);
    }
    d
}

/// Weights of the values of a block in proportion to their importance, 1 on average. Where nothing is known of it (it is 0, or no
/// finite number) all values count alike; and none counts for nothing, since its importance was only estimated.
pub(super) fn block_weights<const N: usize>(importance: &[f32; N]) -> [f32; N] {
    const LEAST: f32 = 1e-3;
    let known = importance.iter().all(|v| v.is_finite() && *v >= 0.0);
    let mean = total(importance) / N as f32;
    if !known || !mean.is_normal() {
        return [1.0; N];
    }
    each(importance, |v| (1.0 - LEAST) * (v / mean) + LEAST)
}

/// 1 / d, and 0 for 0 and for what is so small that its inverse would be infinite.
pub(super) fn inverse_of(d: f32) -> f32 {
    if d.abs() < f32::MIN_POSITIVE {
        0.0
    } else {
        1.0 / d
    }
}

/// Values as scale · q + base. Where q may be negative the base is 0.
pub(super) struct Fit<const N: usize> {
    pub error: f32,
    pub scale: f32,
    pub base: f32,
    pub q: [f32; N],
}

/// Searches the scale for values that become scale · q.
///
/// The squared error of each value counts `weights` times. `nearest` is the q nearest to a value that is given in units of the scale. The value of largest magnitude is tried as each
/// of `stand_ins` times the scale. `stored` is the scale as it will be after storing.
pub(super) fn fit_scale<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    stand_ins: &[f32],
    nearest: impl Fn(f32) -> f32,
    stored: impl Fn(f32) -> f32,
) -> Fit<N> {
    let (low, high) = range_of(x);
    let extreme = if -low > high { low } else { high };
    // All zeros, which is the best for what is smaller than the smallest scale.
    let mut best = Fit {
        error: dot(&times(weights, x), x),
        scale: 0.0,
        base: 0.0,
        q: [0.0; N],
    };
    for stand_in in stand_ins {
        if best.error == 0.0 {
            break;
        }
        let mut scale = stored(extreme / stand_in);
        for _ in 0..2 {
            let inverse = inverse_of(scale);
            let q = each(x, |v| nearest(v * inverse));
            let error = squared_error(x, weights, &q, scale, 0.0);
            let weighted = times(weights, &q);
            let (qq, qx) = (dot(&weighted, &q), dot(&weighted, x));
            if error < best.error {
                best = Fit {
                    error,
                    scale,
                    base: 0.0,
                    q,
                };
            }
            if qq > 0.0 {
                scale = stored(qx / qq);
            }
        }
    }
    best
}

/// Searches scale and base for values that become scale · q + base, q from 0 to `top`.
///
/// The squared error of each value counts `weights` times. The range from the smallest to the largest value is tried as each of `spans` steps of the scale; a range of more
/// than `top` steps is clipped alike at both ends. The base will be at most `highest_base`. `stored` is the scale and
/// the base as they will be after storing.
pub(super) fn fit_line<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    top: f32,
    spans: &[f32],
    highest_base: f32,
    stored: impl Fn(f32, f32) -> (f32, f32),
) -> Fit<N> {
    let n = total(weights);
    let (low, high) = range_of(x);
    let low = low.min(highest_base);
    let range = (high - low).max(0.0);
    let x1 = dot(weights, x);
    let mut best = Fit {
        error: f32::INFINITY,
        scale: 0.0,
        base: stored(0.0, low).1,
        q: [0.0; N],
    };
    for span in spans {
        if best.error == 0.0 {
            break;
        }
        let clipped = range * (1.0 - top / span).max(0.0);
        let (mut scale, mut base) = stored(range / span, low + 0.5 * clipped);
        for _ in 0..2 {
            let q = nearest_codes(x, scale, base, top);
            let error = squared_error(x, weights, &q, scale, base);
            let weighted = times(weights, &q);
            let (q1, q2, qx) = (total(&weighted), dot(&weighted, &q), dot(&weighted, x));
            if error < best.error {
                best = Fit {
                    error,
                    scale,
                    base,
                    q,
                };
            }
            // The straight line through (q, x) of least squared error.
            let determinant = n * q2 - q1 * q1;
            if determinant > 0.0 {
                let mut slope = (n * qx - q1 * x1) / determinant;
                let mut start = (x1 - slope * q1) / n;
                if start > highest_base {
                    start = highest_base;
                    slope = (qx - start * q1) / q2;
                }
                (scale, base) = stored(slope, start);
            }
        }
    }
    best
}

/// (x − base) / scale, rounded to the codes 0 to `top`.
pub(super) fn nearest_codes<const N: usize>(
    x: &[f32; N],
    scale: f32,
    base: f32,
    top: f32,
) -> [f32; N] {
    let inverse = inverse_of(scale);
    each(x, |v| rounded(((v - base) * inverse).clamp(0.0, top)))
}

/// Σ w (x − (scale q + base))².
#[inline(never)]
pub(super) fn squared_error<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    q: &[f32; N],
    scale: f32,
    base: f32,
) -> f32 {
    sum::<N>(|i| {
        let difference = x[i] - (scale * q[i] + base);
        weights[i] * (difference * difference)
    })
}

/// a b, one by one.
#[inline(never)]
pub(super) fn times<const N: usize>(a: &[f32; N], b: &[f32; N]) -> [f32; N] {
    let mut out = [0.0; N];
    for (o, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *o = a * b;
    }
    out
}

/// Σ a.
pub(super) fn total<const N: usize>(a: &[f32; N]) -> f32 {
    sum::<N>(|i| a[i])
}

/// Σ a b.
#[inline(never)]
pub(super) fn dot<const N: usize>(a: &[f32; N], b: &[f32; N]) -> f32 {
    sum::<N>(|i| a[i] * b[i])
}

/// The sum over N values, in lanes, so that it can be done with vectors.
#[inline(always)]
pub(super) fn sum<const N: usize>(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for chunk in 0..N / LANES {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(chunk * LANES + lane);
        }
    }
    lanes.iter().sum()
}

/// `f` of each value, as a loop that becomes vector instructions, which `map` of arrays often does not.
#[inline(never)]
pub(super) fn each<const N: usize>(x: &[f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for (o, v) in out.iter_mut().zip(x) {
        *o = f(*v);
    }
    out
}

/// The smallest and the largest of N values, none of them NaN.
#[inline(never)]
pub(super) fn range_of<const N: usize>(x: &[f32; N]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            low[lane] = if x[lane] < low[lane] {
                x[lane]
            } else {
                low[lane]
            };
            high[lane] = if x[lane] > high[lane] {
                x[lane]
            } else {
                high[lane]
            };
        }
    }
    let low = low.into_iter().fold(f32::INFINITY, f32::min);
    let high = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (low, high)
}
