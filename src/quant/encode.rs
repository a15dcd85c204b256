//! Least-squares searches for the scale, or the scale and base, of the values of a block; all encoders use them.
//!
//! Every value has a weight, by which its squared error is multiplied.
//!
//! All searches work in the same way. A few candidates for the scale are tried. For each, the values get their nearest
//! codes, then the scale is fitted to these codes, and then the values get their nearest codes again, once or twice. The
//! candidate with the least squared error is taken.
//!
//! The loops over values are functions of their own and are never inlined: inside a larger function the compiler keeps the
//! values of small arrays in scalar registers and uses no vector instructions, which makes a search several times slower.

use half::f16;

/// 1.5 · 2²³. Adding and then subtracting it rounds a number of at most 2²² in magnitude to a whole number, ties to even, and
/// is many times faster than `round`.
const ROUNDER: f32 = 12_582_912.0;

/// The number of partial sums, or partial extremes, that loops over values keep, so that they can use vectors.
const LANES: usize = 8;

/// The whole number nearest to `v`, ties to even, for |v| up to 2²².
#[inline(always)]
pub(super) fn rounded(v: f32) -> f32 {
    (v + ROUNDER) - ROUNDER
}

/// The low 16 bits of a whole number between −2²² and 2²², in two's complement. They are taken from the bits of the
/// floating-point number, because Rust's conversions saturate, which is slower.
#[inline(always)]
pub(super) fn low_bits(whole: f32) -> u32 {
    (whole + ROUNDER).to_bits() & 0xFFFF
}

/// `v` as a finite number: 0 for NaN, and limited in magnitude. One bad value then does not spoil the sums from which the
/// scale of its block is found.
pub(super) fn within_reach(v: f32) -> f32 {
    // Larger than any value that a block can hold: more than 128 · 32 times the largest half-precision number.
    const FAR: f32 = 3e8;
    if v.is_nan() { 0.0 } else { v.clamp(-FAR, FAR) }
}

/// The finite half-precision number nearest to `v`.
pub(super) fn finite_half(v: f32) -> f16 {
    f16::from_f32(v.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// The half-precision scale nearest to `v`. It is 0 only if `v` is: for a block of tiny values the smallest possible scale is
/// better than none.
pub(super) fn half_scale(v: f32) -> f16 {
    let d = finite_half(v);
    if d.to_f32() == 0.0 && v != 0.0 {
        return f16::MIN_POSITIVE_SUBNORMAL.copysign(d);
    }
    d
}

/// The half-precision scale for `v` where it is the scale of a super-block's scales: the nearest one, or the next larger one
/// if the nearest is too small by more than 1/1024.
///
/// The smallest half-precision numbers are so far apart that with the nearest one the largest scale of the super-block could
/// be out of reach. A scale that is a little too large does no harm, because the small integers that it multiplies adapt.
pub(super) fn half_scale_of_scales(v: f32) -> f16 {
    let d = half_scale(v);
    if d.to_f32().abs() < v.abs() * (1.0 - 1.0 / 1024.0) && d.to_f32().abs() < f16::MAX.to_f32() {
        return f16::from_bits(d.to_bits() + 1);
    }
    d
}

/// The weights of a block's values, in proportion to their importance and 1 on average.
///
/// If the importances are unusable (all 0, negative, or not finite) all weights are 1. No weight is smaller than 0.001, because
/// importances are only estimates.
pub(super) fn block_weights<const N: usize>(importance: &[f32; N]) -> [f32; N] {
    const LEAST: f32 = 1e-3;
    let known = importance.iter().all(|v| v.is_finite() && *v >= 0.0);
    let mean = total(importance) / N as f32;
    if !known || !mean.is_normal() {
        return [1.0; N];
    }
    each(importance, |v| (1.0 - LEAST) * (v / mean) + LEAST)
}

/// 1 / d, or 0 if d is 0 or so small (subnormal) that the inverse could be infinite.
pub(super) fn inverse_of(d: f32) -> f32 {
    if d.abs() < f32::MIN_POSITIVE {
        0.0
    } else {
        1.0 / d
    }
}

/// N values as scale · q + base, and their weighted squared error. For formats with signed q the base is 0.
pub(super) struct Fit<const N: usize> {
    pub error: f32,
    pub scale: f32,
    pub base: f32,
    pub q: [f32; N],
}

/// Finds the scale for values that are stored as scale · q.
///
/// The squared error of each value is multiplied by its weight. `nearest` returns the q nearest to a value that is given in
/// units of the scale. Each of `stand_ins` gives one candidate: the scale by which the value of largest magnitude becomes
/// that q. `stored` returns a scale as it will be after storing.
pub(super) fn fit_scale<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    stand_ins: &[f32],
    nearest: impl Fn(f32) -> f32,
    stored: impl Fn(f32) -> f32,
) -> Fit<N> {
    let (low, high) = range_of(x);
    let extreme = if -low > high { low } else { high };
    // The first candidate is all zeros, which is best for values that are much smaller than the smallest scale.
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

/// Finds the scale and base for values that are stored as scale · q + base, with q from 0 to `top`.
///
/// The squared error of each value is multiplied by its weight. Each of `spans` gives a scale, by which the range from the
/// smallest to the largest value is that many steps. If these are more than `top`, the range is clipped equally at both ends;
/// where less than a step is clipped, clipping it all at one end is tried too. The base is at most `highest_base`. `stored`
/// returns a scale and a base as they will be after storing. Values that were decoded from a block get its scale again.
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
    // Tries a line, then the line fitted to its codes, then the line fitted to the codes of that.
    let attempt = |best: &mut Fit<N>, scale: f32, base: f32| {
        let (mut scale, mut base) = stored(scale, base);
        for _ in 0..3 {
            let q = nearest_codes(x, scale, base, top);
            let error = squared_error(x, weights, &q, scale, base);
            let weighted = times(weights, &q);
            let (q1, q2, qx) = (total(&weighted), dot(&weighted, &q), dot(&weighted, x));
            if error < best.error {
                *best = Fit {
                    error,
                    scale,
                    base,
                    q,
                };
            }
            // The straight line of least squared error through the points (q, x).
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
    };
    let own = own_lines(x, low, range, top);
    // How far storing moves the values of a line.
    let moved = |(scale, base): &(f32, f32)| {
        let stored = stored(*scale, *base);
        (stored.0 - scale).abs() * top + (stored.1 - base).abs()
    };
    if let Some((scale, base)) = own.min_by(|a, b| moved(a).total_cmp(&moved(b))) {
        attempt(&mut best, scale, base);
    }
    for span in spans {
        if best.error == 0.0 {
            break;
        }
        let scale = range / span;
        let clipped = range * (1.0 - top / span).max(0.0);
        attempt(&mut best, scale, low + 0.5 * clipped);
        if clipped > 0.0 && clipped < scale {
            attempt(&mut best, scale, low);
            attempt(&mut best, scale, low + clipped);
        }
    }
    best
}

/// The scales and bases of all lines scale · q + base, with whole q from 0 to `top`, that all values lie on. The smallest
/// value, `low`, need not have code 0. Most blocks have no such line, unless their values were decoded from a block.
fn own_lines<const N: usize>(
    x: &[f32; N],
    low: f32,
    range: f32,
    top: f32,
) -> impl Iterator<Item = (f32, f32)> {
    let top = top as u32;
    let is_whole = move |scale: f32| {
        let inverse = inverse_of(scale);
        x.iter().all(|v| {
            let q = (v - low) * inverse;
            // Decoded values are off by their rounding to single precision.
            (q - rounded(q)).abs() < 0.01
        })
    };
    // Equal values have one line; every number of steps would give it again.
    let least = if range > 0.0 { 1 } else { top };
    let scales = (least..=top)
        .rev()
        .map(move |steps| (steps, range / steps as f32));
    scales
        .filter(move |(_, scale)| is_whole(*scale))
        .flat_map(move |(steps, scale)| {
            (0..=top - steps).map(move |below| (scale, low - below as f32 * scale))
        })
}

/// The codes from 0 to `top` nearest to (x − base) / scale.
pub(super) fn nearest_codes<const N: usize>(
    x: &[f32; N],
    scale: f32,
    base: f32,
    top: f32,
) -> [f32; N] {
    let inverse = inverse_of(scale);
    each(x, |v| rounded(((v - base) * inverse).clamp(0.0, top)))
}

/// The weighted squared error Σ w (x − (scale q + base))².
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

/// The products of `a` and `b`, element by element.
#[inline(never)]
pub(super) fn times<const N: usize>(a: &[f32; N], b: &[f32; N]) -> [f32; N] {
    let mut out = [0.0; N];
    for (o, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *o = a * b;
    }
    out
}

/// The sum Σ a.
pub(super) fn total<const N: usize>(a: &[f32; N]) -> f32 {
    sum::<N>(|i| a[i])
}

/// The dot product Σ a b.
#[inline(never)]
pub(super) fn dot<const N: usize>(a: &[f32; N], b: &[f32; N]) -> f32 {
    sum::<N>(|i| a[i] * b[i])
}

/// The sum of N terms, as [`LANES`] partial sums, so that vectors can be used. N must be a multiple of [`LANES`].
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

/// `f` of each value. This loop is compiled to vector instructions, which `map` of arrays often is not.
#[inline(never)]
pub(super) fn each<const N: usize>(x: &[f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for (o, v) in out.iter_mut().zip(x) {
        *o = f(*v);
    }
    out
}

/// The smallest and the largest of N values, none of which may be NaN.
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
