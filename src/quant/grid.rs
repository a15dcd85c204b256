//! The formats IQ1, IQ2 and IQ3, which store groups of values by the number of one of the groups in a grid. The grids (`grids`) hold
//! the groups that occur most in weights; the formats and the numbers are ggml's.
//!
//! All are super-blocks of 256 values. A value of IQ2 and IQ3 is w = d f(s) · ± level, and one of IQ1 is w = d f(s) (level ± 1/8), where
//! d is in half precision, s a number of 3 or 4 bits for every 16 or 32 values, and f(s) a line.
//!
//! | type | bytes | groups of | groups in the grid | values with one s | f(s) | signs |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | IQ1_S | 50 | 8 | 2048 | 32 | 1 + 2 s | one of the eighth for 32 values |
//! | IQ1_M | 56 | 8 | 2048 | 16 | 1 + 2 s | one of the eighth for 8 values |
//! | IQ2_XXS | 66 | 8 | 256 | 32 | 1/8 + s/4 | 7 bits for 8 values: an even number is negative |
//! | IQ2_XS | 74 | 8 | 512 | 16 | 1/8 + s/4 | the same |
//! | IQ2_S | 82 | 8 | 1024 | 16 | 1/8 + s/4 | 8 bits for 8 values |
//! | IQ3_XXS | 98 | 4 | 256 | 32 | 1/4 + s/2 | 7 bits for 8 values |
//! | IQ3_S | 110 | 4 | 512 | 32 | 1 + 2 s | 8 bits for 8 values |

use std::array;
use std::sync::LazyLock;

use half::f16;

use super::encode::{finite_half, half_scale_of_scales, inverse_of};
use super::grids;
use super::kquants::SUPER;

/// Values whose signs stand together.
const OCTET: usize = 8;
const OCTETS: usize = SUPER / OCTET;
/// Values that have a scale, at least.
const SCALED: usize = 16;
/// Groups of the grid among which the best for some values is sought: those that are nearest to the levels that these would have by
/// themselves.
const NEAR: usize = 16;
/// What is added to levels of IQ1, or taken from them.
const EIGHTH: f32 = 0.125;

/// How signs of eight values are stored.
#[derive(Clone, Copy, PartialEq)]
enum Signs {
    /// There are none, but levels are moved up or down by an eighth, so many values together.
    Moved(usize),
    /// The eighth follows from the others: an even number is negative.
    Even,
    Free,
}

/// What a type's numbers mean.
struct Format {
    /// Values of a group, 8 or 4.
    group: usize,
    levels: &'static [f32],
    grid: &'static [u16],
    signs: Signs,
    /// Values that have one scale, 16 or 32.
    scaled: usize,
    /// f(s) = `base` + `step` s, for s up to `top`.
    base: f32,
    step: f32,
    top: u8,
    /// For every group of levels there could be, by its number in the base of the number of levels, the groups of the grid that are nearest.
    near: fn() -> &'static [[u16; NEAR]],
}

const IQ1_LEVELS: [f32; 3] = [-1.0, 0.0, 1.0];
const IQ2_LEVELS: [f32; 3] = [8.0, 25.0, 43.0];
const IQ3_XXS_LEVELS: [f32; 8] = [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0];
const IQ3_S_LEVELS: [f32; 8] = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0];

const IQ1_S: Format = Format {
    group: 8,
    levels: &IQ1_LEVELS,
    grid: &grids::IQ1,
    signs: Signs::Moved(32),
    scaled: 32,
    base: 1.0,
    step: 2.0,
    top: 7,
    near: iq1_near,
};
const IQ1_M: Format = Format {
    signs: Signs::Moved(8),
    scaled: 16,
    ..IQ1_S
};
const IQ2_XXS: Format = Format {
    group: 8,
    levels: &IQ2_LEVELS,
    grid: &grids::IQ2_XXS,
    signs: Signs::Even,
    scaled: 32,
    base: 0.125,
    step: 0.25,
    top: 15,
    near: iq2_xxs_near,
};
const IQ2_XS: Format = Format {
    grid: &grids::IQ2_XS,
    scaled: 16,
    near: iq2_xs_near,
    ..IQ2_XXS
};
const IQ2_S: Format = Format {
    grid: &grids::IQ2_S,
    signs: Signs::Free,
    near: iq2_s_near,
    ..IQ2_XS
};
const IQ3_XXS: Format = Format {
    group: 4,
    levels: &IQ3_XXS_LEVELS,
    grid: &grids::IQ3_XXS,
    signs: Signs::Even,
    scaled: 32,
    base: 0.25,
    step: 0.5,
    top: 15,
    near: iq3_xxs_near,
};
const IQ3_S: Format = Format {
    levels: &IQ3_S_LEVELS,
    grid: &grids::IQ3_S,
    signs: Signs::Free,
    base: 1.0,
    step: 2.0,
    near: iq3_s_near,
    ..IQ3_XXS
};

/// Makes the functions that find what is near in a grid once, when it is first needed.
macro_rules! near {
    ($($name:ident = $format:ident;)*) => {
        $(fn $name() -> &'static [[u16; NEAR]] {
            static FOUND: LazyLock<Vec<[u16; NEAR]>> = LazyLock::new(|| $format.find_near());
            &FOUND
        })*
    };
}

near! {
    iq1_near = IQ1_S;
    iq2_xxs_near = IQ2_XXS;
    iq2_xs_near = IQ2_XS;
    iq2_s_near = IQ2_S;
    iq3_xxs_near = IQ3_XXS;
    iq3_s_near = IQ3_S;
}

/// The numbers of a super-block.
struct Numbers {
    d: f16,
    /// s of every 16 values; where 32 have one, both are the same.
    scales: [u8; SUPER / SCALED],
    /// The groups, of which there are 64 where they have four values and 32 where they have eight.
    groups: [u16; SUPER / 4],
    /// For every eight values the bits of those that are negative; in IQ1 all bits or none: whether levels are moved down.
    signs: [u8; OCTETS],
}

impl Default for Numbers {
    fn default() -> Self {
        Self {
            d: f16::ZERO,
            scales: [0; SUPER / SCALED],
            groups: [0; SUPER / 4],
            signs: [0; OCTETS],
        }
    }
}

/// The bits of eight signs, given seven: an even number is set.
fn even(seven: u8) -> u8 {
    seven | ((seven.count_ones() as u8 & 1) << 7)
}

fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from(u16_at(block, at)) | u32::from(u16_at(block, at + 2)) << 16
}

impl Format {
    /// The level of value j of a group.
    fn level(&self, group: u16, j: usize) -> f32 {
        let bits = 16 / self.group.max(5);
        self.levels[usize::from(group) >> (bits * j) & ((1 << bits) - 1)]
    }

    fn find_near(&self) -> Vec<[u16; NEAR]> {
        let base = self.levels.len();
        let of_point = |point: usize| {
            let mut rest = point;
            let levels: Vec<f32> = (0..self.group)
                .map(|_| {
                    let level = self.levels[rest % base];
                    rest /= base;
                    level
                })
                .collect();
            let mut all: Vec<(f32, u16)> = (0u16..)
                .zip(self.grid)
                .map(|(entry, group)| {
                    let apart = |(j, level): (usize, &f32)| (level - self.level(*group, j)).powi(2);
                    (levels.iter().enumerate().map(apart).sum(), entry)
                })
                .collect();
            let order = |a: &(f32, u16), b: &(f32, u16)| a.partial_cmp(b).expect("numbers");
            all.select_nth_unstable_by(NEAR - 1, order);
            all[..NEAR].sort_unstable_by(order);
            array::from_fn(|i| all[i].1)
        };
        (0..base.pow(self.group as u32)).map(of_point).collect()
    }

    /// The number of the level that is nearest to a value in units of the scale.
    fn nearest_level(&self, unit: f32) -> usize {
        let pairs = self.levels.windows(2);
        pairs
            .filter(|pair| unit > 0.5 * (pair[0] + pair[1]))
            .count()
    }

    fn factor(&self, s: u8) -> f32 {
        self.base + self.step * f32::from(s)
    }

    fn decode(&self, numbers: &Numbers, out: &mut [f32; SUPER]) {
        let d = numbers.d.to_f32();
        for (i, out) in out.iter_mut().enumerate() {
            let scale = d * self.factor(numbers.scales[i / SCALED]);
            let group = self.grid[usize::from(numbers.groups[i / self.group]) % self.grid.len()];
            let level = self.level(group, i % self.group);
            let negative = numbers.signs[i / OCTET] >> (i % OCTET) & 1 == 1;
            *out = scale
                * match (self.signs, negative) {
                    (Signs::Moved(_), true) => level - EIGHTH,
                    (Signs::Moved(_), false) => level + EIGHTH,
                    (_, true) => -level,
                    (_, false) => level,
                };
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Bytes
// ---------------------------------------------------------------------------------------------------------------------

/// IQ1_S: d; the lower 8 bits of 32 groups; for every 32 values 16 bits: the upper 3 bits of four groups, s in 3 bits, and a bit for
/// down.
pub(super) fn decode_iq1_s(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers {
        d: f16::from_bits(u16_at(block, 0)),
        ..Numbers::default()
    };
    for part in 0..8 {
        let high = u16_at(block, 34 + 2 * part);
        numbers.scales[2 * part..][..2].fill((high >> 12 & 7) as u8);
        let down = if high >> 15 == 1 { 0xFF } else { 0 };
        for l in 0..4 {
            let i = 4 * part + l;
            numbers.groups[i] = u16::from(block[2 + i]) | (high >> (3 * l) & 7) << 8;
            numbers.signs[i] = down;
        }
    }
    IQ1_S.decode(&numbers, out);
}

pub(super) fn encode_iq1_s(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ1_S.encode(x, weights);
    out[..2].copy_from_slice(&numbers.d.to_le_bytes());
    for part in 0..8 {
        let mut high = u16::from(numbers.scales[2 * part]) << 12;
        high |= u16::from(numbers.signs[4 * part] & 1) << 15;
        for l in 0..4 {
            let group = numbers.groups[4 * part + l];
            out[2 + 4 * part + l] = group as u8;
            high |= (group >> 8) << (3 * l);
        }
        out[34 + 2 * part..][..2].copy_from_slice(&high.to_le_bytes());
    }
}

/// IQ1_M: the lower 8 bits of 32 groups; 4 bits for each, of which 3 are its upper bits and one is for down; four words of 16 bits, each
/// with s of four times 16 values in 3 bits and 4 bits of d.
pub(super) fn decode_iq1_m(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers::default();
    let mut d = 0;
    for word in 0..4 {
        let bits = u16_at(block, 48 + 2 * word);
        d |= (bits >> 12) << (4 * word);
        for k in 0..4 {
            numbers.scales[4 * word + k] = (bits >> (3 * k) & 7) as u8;
        }
    }
    numbers.d = f16::from_bits(d);
    for i in 0..OCTETS {
        let high = block[32 + i / 2] >> (4 * (i % 2)) & 15;
        numbers.groups[i] = u16::from(block[i]) | u16::from(high & 7) << 8;
        numbers.signs[i] = if high >> 3 == 1 { 0xFF } else { 0 };
    }
    IQ1_M.decode(&numbers, out);
}

pub(super) fn encode_iq1_m(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ1_M.encode(x, weights);
    out[32..48].fill(0);
    for i in 0..OCTETS {
        let group = numbers.groups[i];
        out[i] = group as u8;
        let high = (group >> 8) as u8 | (numbers.signs[i] & 1) << 3;
        out[32 + i / 2] |= high << (4 * (i % 2));
    }
    for word in 0..4 {
        let mut bits = (numbers.d.to_bits() >> (4 * word)) << 12;
        for k in 0..4 {
            bits |= u16::from(numbers.scales[4 * word + k]) << (3 * k);
        }
        out[48 + 2 * word..][..2].copy_from_slice(&bits.to_le_bytes());
    }
}

/// IQ2_XXS: d; for every 32 values four groups of 8 bits, and 32 bits with four times 7 signs and s.
pub(super) fn decode_iq2_xxs(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers {
        d: f16::from_bits(u16_at(block, 0)),
        ..Numbers::default()
    };
    for part in 0..8 {
        let at = 2 + 8 * part;
        let rest = u32_at(block, at + 4);
        numbers.take_signs(part, rest);
        for l in 0..4 {
            numbers.groups[4 * part + l] = u16::from(block[at + l]);
        }
    }
    IQ2_XXS.decode(&numbers, out);
}

pub(super) fn encode_iq2_xxs(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ2_XXS.encode(x, weights);
    out[..2].copy_from_slice(&numbers.d.to_le_bytes());
    for part in 0..8 {
        let at = 2 + 8 * part;
        for l in 0..4 {
            out[at + l] = numbers.groups[4 * part + l] as u8;
        }
        out[at + 4..][..4].copy_from_slice(&numbers.signs_and_scale(part).to_le_bytes());
    }
}

impl Numbers {
    /// Reads four times 7 signs and a scale of 4 bits.
    fn take_signs(&mut self, part: usize, bits: u32) {
        for l in 0..4 {
            self.signs[4 * part + l] = even((bits >> (7 * l) & 127) as u8);
        }
        self.scales[2 * part..][..2].fill((bits >> 28) as u8);
    }

    /// What [`Numbers::take_signs`] reads.
    fn signs_and_scale(&self, part: usize) -> u32 {
        let mut bits = u32::from(self.scales[2 * part]) << 28;
        for l in 0..4 {
            bits |= u32::from(self.signs[4 * part + l] & 127) << (7 * l);
        }
        bits
    }

    /// Reads scales of 4 bits, the first in the low half of a byte.
    fn take_scales(&mut self, bytes: &[u8]) {
        for (pair, byte) in self.scales.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *pair = [byte & 15, byte >> 4];
        }
    }

    /// What [`Numbers::take_scales`] reads.
    fn put_scales(&self, bytes: &mut [u8]) {
        for (byte, [low, high]) in bytes.iter_mut().zip(self.scales.as_chunks::<2>().0) {
            *byte = low | high << 4;
        }
    }
}

/// IQ2_XS: d; 16 bits for each group: its number in 9, and 7 signs; s of every 16 values in 4 bits.
pub(super) fn decode_iq2_xs(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers {
        d: f16::from_bits(u16_at(block, 0)),
        ..Numbers::default()
    };
    for i in 0..OCTETS {
        let bits = u16_at(block, 2 + 2 * i);
        numbers.groups[i] = bits & 511;
        numbers.signs[i] = even((bits >> 9) as u8);
    }
    numbers.take_scales(&block[66..74]);
    IQ2_XS.decode(&numbers, out);
}

pub(super) fn encode_iq2_xs(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ2_XS.encode(x, weights);
    out[..2].copy_from_slice(&numbers.d.to_le_bytes());
    for i in 0..OCTETS {
        let bits = numbers.groups[i] | u16::from(numbers.signs[i] & 127) << 9;
        out[2 + 2 * i..][..2].copy_from_slice(&bits.to_le_bytes());
    }
    numbers.put_scales(&mut out[66..74]);
}

/// IQ2_S: d; the lower 8 bits of 32 groups; 32 bytes of signs; the upper 2 bits of four groups in a byte; s as in IQ2_XS.
pub(super) fn decode_iq2_s(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers {
        d: f16::from_bits(u16_at(block, 0)),
        ..Numbers::default()
    };
    for i in 0..OCTETS {
        let high = block[66 + i / 4] >> (2 * (i % 4)) & 3;
        numbers.groups[i] = u16::from(block[2 + i]) | u16::from(high) << 8;
        numbers.signs[i] = block[34 + i];
    }
    numbers.take_scales(&block[74..82]);
    IQ2_S.decode(&numbers, out);
}

pub(super) fn encode_iq2_s(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ2_S.encode(x, weights);
    out[..2].copy_from_slice(&numbers.d.to_le_bytes());
    out[66..74].fill(0);
    for i in 0..OCTETS {
        out[2 + i] = numbers.groups[i] as u8;
        out[34 + i] = numbers.signs[i];
        out[66 + i / 4] |= ((numbers.groups[i] >> 8) as u8) << (2 * (i % 4));
    }
    numbers.put_scales(&mut out[74..82]);
}

/// IQ3_XXS: d; 64 groups of 8 bits; for every 32 values 32 bits as in IQ2_XXS.
pub(super) fn decode_iq3_xxs(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers {
        d: f16::from_bits(u16_at(block, 0)),
        groups: array::from_fn(|i| u16::from(block[2 + i])),
        ..Numbers::default()
    };
    for part in 0..8 {
        numbers.take_signs(part, u32_at(block, 66 + 4 * part));
    }
    IQ3_XXS.decode(&numbers, out);
}

pub(super) fn encode_iq3_xxs(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ3_XXS.encode(x, weights);
    out[..2].copy_from_slice(&numbers.d.to_le_bytes());
    for (byte, group) in out[2..66].iter_mut().zip(numbers.groups) {
        *byte = group as u8;
    }
    for part in 0..8 {
        out[66 + 4 * part..][..4].copy_from_slice(&numbers.signs_and_scale(part).to_le_bytes());
    }
}

/// IQ3_S: d; the lower 8 bits of 64 groups; the ninth bits of eight groups in a byte; 32 bytes of signs; s of every 32 values in 4
/// bits.
pub(super) fn decode_iq3_s(block: &[u8], out: &mut [f32; SUPER]) {
    let mut numbers = Numbers {
        d: f16::from_bits(u16_at(block, 0)),
        groups: array::from_fn(|i| {
            u16::from(block[2 + i]) | u16::from(block[66 + i / 8] >> (i % 8) & 1) << 8
        }),
        signs: array::from_fn(|i| block[74 + i]),
        ..Numbers::default()
    };
    for part in 0..8 {
        let scale = block[106 + part / 2] >> (4 * (part % 2)) & 15;
        numbers.scales[2 * part..][..2].fill(scale);
    }
    IQ3_S.decode(&numbers, out);
}

pub(super) fn encode_iq3_s(x: &[f32; SUPER], weights: &[f32; SUPER], out: &mut [u8]) {
    let numbers = IQ3_S.encode(x, weights);
    out[..2].copy_from_slice(&numbers.d.to_le_bytes());
    out[66..74].fill(0);
    for (i, group) in numbers.groups.iter().enumerate() {
        out[2 + i] = *group as u8;
        out[66 + i / 8] |= ((group >> 8) as u8) << (i % 8);
    }
    out[74..106].copy_from_slice(&numbers.signs);
    for part in 0..4 {
        out[106 + part] = numbers.scales[4 * part] | numbers.scales[4 * part + 2] << 4;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding
// ---------------------------------------------------------------------------------------------------------------------

/// The scales that are tried for some values: their largest magnitude becomes the highest level times one of these.
const STAND_INS: [f32; 3] = [1.0, 0.8, 1.25];

/// Values that have one scale, with what is stored for them at some scale.
#[derive(Clone, Default)]
struct Part {
    error: f32,
    groups: Vec<u16>,
    signs: Vec<u8>,
    /// The stored values in units of the scale.
    units: Vec<f32>,
}

impl Format {
    /// Finds the numbers for the values of a super-block: for every scale the best of a few candidates, refined once by least squares; then
    /// what is stored at the scales that d and s leave.
    fn encode(&self, x: &[f32; SUPER], weights: &[f32; SUPER]) -> Numbers {
        let parts = || x.chunks(self.scaled).zip(weights.chunks(self.scaled));
        let free: Vec<f32> = parts().map(|(x, w)| self.free_scale(x, w)).collect();
        let largest = free.iter().fold(0.0f32, |a, b| a.max(*b));
        let d = half_scale_of_scales(largest / self.factor(self.top)).to_f32();
        if d == 0.0 {
            return Numbers::default();
        }
        let mut numbers = Numbers::default();
        let (mut xu, mut uu) = (0.0, 0.0);
        for (p, ((x, w), free)) in parts().zip(free).enumerate() {
            let s = ((free / d - self.base) / self.step).round();
            let s = s.clamp(0.0, f32::from(self.top)) as u8;
            let part = self.nearest(x, w, d * self.factor(s));
            for ((x, w), u) in x.iter().zip(w).zip(&part.units) {
                let u = u * self.factor(s);
                xu += w * x * u;
                uu += w * u * u;
            }
            let first = p * self.scaled;
            numbers.scales[first / SCALED..][..self.scaled / SCALED].fill(s);
            numbers.groups[first / self.group..][..part.groups.len()].copy_from_slice(&part.groups);
            numbers.signs[first / OCTET..][..part.signs.len()].copy_from_slice(&part.signs);
        }
        // The d that is best for these codes.
        let best = finite_half(xu * inverse_of(uu));
        numbers.d = match best.to_f32() > 0.0 {
            true => best,
            false => half_scale_of_scales(d),
        };
        numbers
    }

    /// The best scale for some values, if it could be any.
    fn free_scale(&self, x: &[f32], weights: &[f32]) -> f32 {
        let largest = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        let top = self.levels[self.levels.len() - 1];
        if largest == 0.0 {
            return 0.0;
        }
        let mut best = (f32::INFINITY, 0.0);
        for stand_in in STAND_INS {
            let scale = largest / (top * stand_in);
            let part = self.nearest(x, weights, scale);
            let (mut xu, mut uu, mut xx) = (0.0, 0.0, 0.0);
            for ((x, w), u) in x.iter().zip(weights).zip(&part.units) {
                xu += w * x * u;
                uu += w * u * u;
                xx += w * x * x;
            }
            // What is left at the best scale for these codes.
            let error = xx - xu * xu * inverse_of(uu);
            if xu > 0.0 && error < best.0 {
                best = (error, xu * inverse_of(uu));
            }
        }
        best.1
    }

    /// What is stored for some values at this scale with the least squared error.
    fn nearest(&self, x: &[f32], weights: &[f32], scale: f32) -> Part {
        let mut whole = Part::default();
        let moved = match self.signs {
            Signs::Moved(together) => together,
            Signs::Even | Signs::Free => OCTET,
        };
        for (x, w) in x.chunks(moved).zip(weights.chunks(moved)) {
            let part = match self.signs {
                Signs::Moved(_) => {
                    let [up, down] = [0, 0xFF].map(|signs| self.nearest_with(x, w, scale, signs));
                    if down.error < up.error { down } else { up }
                }
                Signs::Free => self.nearest_with(x, w, scale, negatives(x)),
                Signs::Even => {
                    let mut signs = negatives(x);
                    if signs.count_ones() % 2 == 1 {
                        let cost = |j: &usize| w[*j] * x[*j] * x[*j];
                        let least = (0..OCTET).min_by(|a, b| cost(a).total_cmp(&cost(b)));
                        signs ^= 1 << least.unwrap_or(0);
                    }
                    self.nearest_with(x, w, scale, signs)
                }
            };
            whole.error += part.error;
            whole.groups.extend(part.groups);
            whole.signs.extend(part.signs);
            whole.units.extend(part.units);
        }
        whole
    }

    /// The same with signs that are given, the same for every eight values.
    fn nearest_with(&self, x: &[f32], weights: &[f32], scale: f32, signs: u8) -> Part {
        let mut part = Part {
            signs: vec![signs; x.len() / OCTET],
            ..Part::default()
        };
        let moves = matches!(self.signs, Signs::Moved(_));
        let negative = |i: usize| signs >> (i % OCTET) & 1 == 1;
        let base = self.levels.len();
        for g in 0..x.len() / self.group {
            let first = g * self.group;
            // What the levels times the scale should be.
            let wanted: [f32; OCTET] = array::from_fn(|j| match (moves, j < self.group) {
                (_, false) => 0.0,
                (true, _) if negative(first + j) => x[first + j] + scale * EIGHTH,
                (true, _) => x[first + j] - scale * EIGHTH,
                (false, _) if negative(first + j) => -x[first + j],
                (false, _) => x[first + j],
            });
            let levels = (0..self.group).rev();
            let point = levels.fold(0, |point, j| {
                point * base + self.nearest_level(wanted[j] / scale)
            });
            let (mut best, mut error) = (0, f32::INFINITY);
            for entry in (self.near)()[point] {
                let group = self.grid[usize::from(entry)];
                let errors = (0..self.group).map(|j| {
                    let difference = wanted[j] - scale * self.level(group, j);
                    weights[first + j] * difference * difference
                });
                let e: f32 = errors.sum();
                if e < error {
                    (best, error) = (usize::from(entry), e);
                }
            }
            part.error += error;
            part.groups.push(best as u16);
            for j in 0..self.group {
                let level = self.level(self.grid[best], j);
                let unit = match (moves, negative(first + j)) {
                    (true, true) => level - EIGHTH,
                    (true, false) => level + EIGHTH,
                    (false, true) => -level,
                    (false, false) => level,
                };
                part.units.push(unit);
            }
        }
        part
    }
}

/// The bits of those of eight values that are negative.
fn negatives(x: &[f32]) -> u8 {
    x.iter()
        .enumerate()
        .fold(0, |bits, (j, v)| bits | u8::from(*v < 0.0) << j)
}
