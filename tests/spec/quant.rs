//! The block formats: decoding against values computed from the format definitions, encoding against plain encoders and
//! stated error bounds.

use crate::common::blocks::{decode, encode, squared_error, there_and_back};
use flapjack::quant::{BlockType, decode_row, encode_row, encode_row_by_importance};
use half::f16;

/// The types whose values share a scale.
const BLOCK_TYPES: [BlockType; 3] = [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1];

/// The smallest half-precision number above zero, 2⁻²⁴.
const TINY: f32 = 1.0 / 16_777_216.0;

// ---------------------------------------------------------------------------------------------------------------------
// Helpers
// ---------------------------------------------------------------------------------------------------------------------

/// A linear congruential generator (Knuth's MMIX constants), read from the top.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        self.bits() % n
    }

    /// In [0, 1).
    fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / 16_777_216.0
    }

    /// Nearly Gaussian, with mean 0 and variance 1: twelve uniform numbers added up.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    fn normals(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| scale * self.normal()).collect()
    }
}

/// The root of the mean squared error of `a`, relative to that of `b` itself.
fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    let size = squared_error(b, &vec![0.0; b.len()]);
    assert!(size > 0.0, "nothing to be relative to");
    (squared_error(a, b) / size).sqrt()
}

/// One block: its halves, then its codes.
fn block(halves: &[f32], codes: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for half in halves {
        let stored = f16::from_f32(*half);
        assert_eq!(stored.to_f32(), *half, "the test's scale must be a half");
        bytes.extend_from_slice(&stored.to_le_bytes());
    }
    bytes.extend_from_slice(codes);
    bytes
}

/// Nibbles of 32 codes as the formats lay them out: value j low, value j + 16 high.
fn packed(codes: &[u8; 32]) -> Vec<u8> {
    (0..16).map(|j| codes[j] + 16 * codes[j + 16]).collect()
}

/// A half-precision number by its definition: sign, 5 bits of exponent with bias 15, 10 bits of fraction.
fn half_by_definition(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from(bits >> 10 & 0x1F);
    let fraction = f64::from(bits & 0x3FF) / 1024.0;
    match exponent {
        0 => sign * fraction * 2f64.powi(-14),
        31 if fraction == 0.0 => sign * f64::INFINITY,
        31 => f64::NAN,
        _ => sign * (1.0 + fraction) * 2f64.powi(exponent - 15),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes and numbers
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn types_have_the_numbers_and_names_of_gguf() {
    let expected = [
        (BlockType::F32, 0, "F32"),
        (BlockType::F16, 1, "F16"),
        (BlockType::Q4_0, 2, "Q4_0"),
        (BlockType::Q4_1, 3, "Q4_1"),
        (BlockType::Q8_0, 8, "Q8_0"),
        (BlockType::BF16, 30, "BF16"),
        (BlockType::Q5_0, 6, "Q5_0"),
        (BlockType::Q5_1, 7, "Q5_1"),
        (BlockType::Q2_K, 10, "Q2_K"),
        (BlockType::Q3_K, 11, "Q3_K"),
        (BlockType::Q4_K, 12, "Q4_K"),
        (BlockType::Q5_K, 13, "Q5_K"),
        (BlockType::Q6_K, 14, "Q6_K"),
        (BlockType::IQ4_NL, 20, "IQ4_NL"),
        (BlockType::IQ4_XS, 23, "IQ4_XS"),
        (BlockType::Q8_1, 9, "Q8_1"),
        (BlockType::IQ2_XXS, 16, "IQ2_XXS"),
        (BlockType::IQ2_XS, 17, "IQ2_XS"),
        (BlockType::IQ3_XXS, 18, "IQ3_XXS"),
        (BlockType::IQ1_S, 19, "IQ1_S"),
        (BlockType::IQ3_S, 21, "IQ3_S"),
        (BlockType::IQ2_S, 22, "IQ2_S"),
        (BlockType::IQ1_M, 29, "IQ1_M"),
        (BlockType::TQ1_0, 34, "TQ1_0"),
        (BlockType::TQ2_0, 35, "TQ2_0"),
        (BlockType::MXFP4, 39, "MXFP4"),
    ];
    assert_eq!(expected.len(), BlockType::ALL.len());
    for (block_type, id, name) in expected {
        assert_eq!(block_type.id(), id);
        assert_eq!(block_type.name(), name);
        assert_eq!(BlockType::from_id(id), Some(block_type));
        assert!(BlockType::ALL.contains(&block_type));
    }
}

#[test]
fn other_numbers_are_no_type() {
    let known: Vec<u32> = BlockType::ALL.iter().map(|t| t.id()).collect();
    for id in (0..1000).chain([u32::MAX, u32::MAX - 1, 1 << 31]) {
        assert_eq!(
            BlockType::from_id(id).is_some(),
            known.contains(&id),
            "type number {id}"
        );
    }
}

#[test]
fn blocks_have_the_sizes_of_their_definitions() {
    for (block_type, len, bytes, float) in [
        (BlockType::F32, 1, 4, true),
        (BlockType::F16, 1, 2, true),
        (BlockType::BF16, 1, 2, true),
        (BlockType::Q8_0, 32, 2 + 32, false),
        (BlockType::Q4_0, 32, 2 + 16, false),
        (BlockType::Q4_1, 32, 2 + 2 + 16, false),
    ] {
        assert_eq!(block_type.block_len(), len, "{block_type:?}");
        assert_eq!(block_type.block_bytes(), bytes, "{block_type:?}");
        assert_eq!(block_type.is_float(), float, "{block_type:?}");
        for blocks in [0, 1, 2, 3, 64, 1000] {
            assert_eq!(block_type.row_bytes(blocks * len), blocks * bytes);
            assert_eq!(
                block_type.checked_row_bytes(blocks * len),
                Some(blocks * bytes)
            );
        }
    }
}

#[test]
fn a_row_that_is_not_a_whole_number_of_blocks_has_no_size() {
    for block_type in BLOCK_TYPES {
        for columns in [1, 31, 33, 63, 65, usize::MAX] {
            assert_eq!(block_type.checked_row_bytes(columns), None, "{columns}");
        }
    }
}

#[test]
fn a_row_too_large_for_memory_has_no_size() {
    assert_eq!(BlockType::F32.checked_row_bytes(usize::MAX), None);
    assert_eq!(BlockType::F32.checked_row_bytes(usize::MAX / 4 + 1), None);
    assert_eq!(
        BlockType::F32.checked_row_bytes(usize::MAX / 4),
        Some(usize::MAX / 4 * 4)
    );
    assert_eq!(BlockType::BF16.checked_row_bytes(usize::MAX), None);
    // More bytes than values: 34 for 32.
    assert_eq!(BlockType::Q8_0.checked_row_bytes(usize::MAX - 31), None);
    // Fewer bytes than values: it fits.
    let columns = usize::MAX - 31;
    assert_eq!(
        BlockType::Q4_1.checked_row_bytes(columns),
        Some(columns / 32 * 20)
    );
}

#[test]
#[should_panic(expected = "whole number of blocks")]
fn asking_for_the_size_of_a_broken_row_panics() {
    let _ = BlockType::Q4_0.row_bytes(33);
}

#[test]
#[should_panic(expected = "row length")]
fn decoding_into_a_row_of_another_length_panics() {
    decode_row(BlockType::Q8_0, &[0; 34], &mut [0.0; 64]);
}

#[test]
#[should_panic(expected = "row length")]
fn encoding_into_a_row_of_another_length_panics() {
    encode_row(BlockType::Q4_0, &[0.0; 32], &mut [0; 20]);
}

#[test]
fn an_empty_row_is_a_row() {
    for block_type in BlockType::ALL {
        assert!(encode(block_type, &[]).is_empty());
        assert!(decode(block_type, &[]).is_empty());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding, by the definitions
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn f32_is_little_endian_single_precision() {
    let bytes = [
        0x00, 0x00, 0xC0, 0x3F, // 1.5
        0x00, 0x00, 0x00, 0x80, // −0
        0x01, 0x00, 0x00, 0x00, // the smallest of all, 2⁻¹⁴⁹
        0xFF, 0xFF, 0x7F, 0xFF, // the most negative one
        0x00, 0x00, 0x80, 0x7F, // infinity
        0x00, 0x00, 0xC0, 0x7F, // not a number
    ];
    let values = decode(BlockType::F32, &bytes);
    assert_eq!(values[0], 1.5);
    assert_eq!(values[1].to_bits(), 1 << 31);
    assert_eq!(values[2], 2f32.powi(-149));
    assert_eq!(values[3], f32::MIN);
    assert_eq!(values[4], f32::INFINITY);
    assert!(values[5].is_nan());
}

#[test]
fn every_f16_decodes_to_its_definition() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let values = decode(BlockType::F16, &bytes);
    for (bits, value) in (0..=u16::MAX).zip(&values) {
        let expected = half_by_definition(bits);
        if expected.is_nan() {
            assert!(value.is_nan(), "{bits:04x}");
        } else {
            assert_eq!(f64::from(*value), expected, "{bits:04x}");
            assert_eq!(value.is_sign_negative(), bits >> 15 == 1, "{bits:04x}");
        }
    }
    // A few that anybody can check.
    let value = |bits: u16| values[usize::from(bits)];
    assert_eq!(value(0x3C00), 1.0);
    assert_eq!(value(0xC000), -2.0);
    assert_eq!(value(0x3555), 0.333_251_95);
    assert_eq!(value(0x7BFF), 65504.0);
    assert_eq!(value(0x0001), TINY);
    assert_eq!(value(0xFC00), f32::NEG_INFINITY);
}

#[test]
fn every_bf16_decodes_to_the_upper_half_of_a_single() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (bits, value) in (0..=u16::MAX).zip(decode(BlockType::BF16, &bytes)) {
        let expected = f32::from_bits(u32::from(bits) << 16);
        if expected.is_nan() {
            assert!(value.is_nan(), "{bits:04x}");
        } else {
            assert_eq!(value.to_bits(), expected.to_bits(), "{bits:04x}");
        }
    }
}

/// Scales of every kind: plain, negative, zero, the smallest of all, one with a full fraction, the largest.
const SCALES: [f32; 8] = [
    0.5,
    -0.25,
    0.0,
    TINY,
    -3.0 * TINY,
    1.0 / 1024.0,
    0.099_975_586,
    65504.0,
];

#[test]
fn q8_0_is_the_scale_times_the_signed_byte() {
    for d in SCALES {
        // All 256 codes, in eight blocks.
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for first in (-128i32..128).step_by(32) {
            let codes: Vec<u8> = (first..first + 32).map(|c| c as i8 as u8).collect();
            bytes.extend(block(&[d], &codes));
            expected.extend((first..first + 32).map(|c| d * c as f32));
        }
        assert_eq!(decode(BlockType::Q8_0, &bytes), expected, "scale {d}");
    }
}

#[test]
fn q8_0_by_hand() {
    let mut codes = [0u8; 32];
    codes[..6].copy_from_slice(&[1, 0xFF, 127, 0x80, 0x81, 64]);
    // 0x3800 is one half, stored low byte first.
    let bytes: Vec<u8> = [0x00, 0x38].into_iter().chain(codes).collect();
    let values = decode(BlockType::Q8_0, &bytes);
    assert_eq!(values[..7], [0.5, -0.5, 63.5, -64.0, -63.5, 32.0, 0.0]);
}

#[test]
fn q4_0_is_the_scale_times_the_nibble_less_eight() {
    for d in SCALES {
        // Byte j holds j in its low half and 15 − j in its high half: value j is d (j − 8), value j + 16 is d (7 − j).
        let codes: Vec<u8> = (0..16).map(|j| j | (15 - j) << 4).collect();
        let expected: Vec<f32> = (0..16)
            .map(|j| d * (j as f32 - 8.0))
            .chain((0..16).map(|j| d * (7.0 - j as f32)))
            .collect();
        assert_eq!(
            decode(BlockType::Q4_0, &block(&[d], &codes)),
            expected,
            "scale {d}"
        );
    }
}

#[test]
fn q4_0_by_hand() {
    // 0xC000 is −2. Low nibbles come first, then high ones.
    let mut bytes = vec![0x00, 0xC0, 0x10, 0xF8, 0x7F];
    bytes.resize(18, 0x88);
    let values = decode(BlockType::Q4_0, &bytes);
    assert_eq!(values[..4], [16.0, 0.0, -14.0, 0.0]);
    assert_eq!(values[16..20], [14.0, -14.0, 2.0, 0.0]);
}

#[test]
fn q4_1_is_the_scale_times_the_nibble_plus_the_minimum() {
    for d in SCALES {
        for m in [0.0, -1.5, 0.75, TINY, -65504.0] {
            let codes: Vec<u8> = (0..16).map(|j| (15 - j) | j << 4).collect();
            let expected: Vec<f32> = (0..16)
                .map(|j| d * (15 - j) as f32 + m)
                .chain((0..16).map(|j| d * j as f32 + m))
                .collect();
            assert_eq!(
                decode(BlockType::Q4_1, &block(&[d, m], &codes)),
                expected,
                "scale {d}, minimum {m}"
            );
        }
    }
}

#[test]
fn q4_1_by_hand() {
    // The scale 0x3400 is a quarter, the minimum 0xBC00 is −1.
    let mut bytes = vec![0x00, 0x34, 0x00, 0xBC, 0x40, 0x0F];
    bytes.resize(20, 0x04);
    let values = decode(BlockType::Q4_1, &bytes);
    assert_eq!(values[..3], [-1.0, 2.75, 0.0]);
    assert_eq!(values[16..19], [0.0, -1.0, -1.0]);
}

#[test]
fn each_block_of_a_row_has_its_own_scale() {
    let halves: [&[f32]; 3] = [&[0.5, 1.0], &[-2.0, 0.0], &[0.0, -3.0]];
    for block_type in BLOCK_TYPES {
        let of_type: Vec<Vec<u8>> = halves
            .iter()
            .map(|h| match block_type {
                BlockType::Q8_0 => block(&h[..1], &[3; 32]),
                BlockType::Q4_0 => block(&h[..1], &[0xBB; 16]),
                _ => block(h, &[0x33; 16]),
            })
            .collect();
        let row = decode(block_type, &of_type.concat());
        for (i, h) in halves.iter().enumerate() {
            let m = if block_type == BlockType::Q4_1 {
                h[1]
            } else {
                0.0
            };
            assert_eq!(row[32 * i..32 * (i + 1)], [3.0 * h[0] + m; 32]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding what can be represented
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn f32_keeps_every_bit() {
    let mut random = Random(1);
    let values: Vec<f32> = (0..4096).map(|_| f32::from_bits(random.bits())).collect();
    let bytes = encode(BlockType::F32, &values);
    let expected: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(bytes, expected);
}

#[test]
fn every_half_survives_decoding_and_encoding() {
    for block_type in [BlockType::F16, BlockType::BF16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let values = decode(block_type, &bytes);
        let again = encode(block_type, &values);
        for ((value, old), new) in values.iter().zip(bytes.chunks(2)).zip(again.chunks(2)) {
            // A NaN may lose its payload but must stay a NaN.
            if value.is_nan() {
                assert!(decode(block_type, new)[0].is_nan());
            } else {
                assert_eq!(old, new, "{block_type:?} {value}");
            }
        }
    }
}

#[test]
fn halves_round_to_nearest_and_ties_to_even() {
    let ulp = 2f32.powi(-10);
    for (value, expected) in [
        (1.0 + 0.5 * ulp, 1.0),
        (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
        (1.0 + 0.501 * ulp, 1.0 + ulp),
        (-1.0 - 0.499 * ulp, -1.0),
        (0.5 * TINY, 0.0),
        (0.51 * TINY, TINY),
        (65519.0, 65504.0),
        (65520.0, f32::INFINITY),
        (-1e30, f32::NEG_INFINITY),
    ] {
        assert_eq!(
            there_and_back(BlockType::F16, &[value]),
            [expected],
            "{value}"
        );
    }
    let ulp = 2f32.powi(-7);
    for (value, expected) in [
        (1.0 + 0.5 * ulp, 1.0),
        (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
        (1.0 + 0.501 * ulp, 1.0 + ulp),
        (-1.0 - 0.499 * ulp, -1.0),
        (f32::MAX, f32::INFINITY),
        (2f32.powi(-133), 2f32.powi(-133)),
    ] {
        assert_eq!(
            there_and_back(BlockType::BF16, &[value]),
            [expected],
            "{value}"
        );
    }
}

#[test]
fn q8_0_blocks_that_use_the_largest_code_encode_exactly() {
    let mut random = Random(2);
    for trial in 0..2000 {
        let d = f16::from_bits(1 + random.below(0x7BFF) as u16).to_f32();
        let mut codes: Vec<u8> = (0..32)
            .map(|_| (random.below(255) as i32 - 127) as i8 as u8)
            .collect();
        codes[random.below(32) as usize] = if trial % 2 == 0 { 127 } else { 129 };
        let bytes = block(&[d], &codes);
        assert_eq!(
            encode(BlockType::Q8_0, &decode(BlockType::Q8_0, &bytes)),
            bytes
        );
    }
}

#[test]
fn q4_0_blocks_with_a_code_five_or_more_from_zero_encode_exactly() {
    let mut random = Random(3);
    for trial in 0..5000 {
        let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
        let d = sign * f16::from_bits(0x1000 + random.below(0x6000) as u16).to_f32();
        // Codes up to `reach` away from the 8 that stands for zero.
        let reach = 5 + trial % 4;
        let mut codes =
            [0; 32].map(|_: u8| (8 - reach + random.below(16.min(2 * reach + 1))) as u8);
        codes[random.below(32) as usize] = (8 - reach) as u8;
        let values = decode(BlockType::Q4_0, &block(&[d], &packed(&codes)));
        assert_eq!(there_and_back(BlockType::Q4_0, &values), values);
    }
}

#[test]
fn q4_1_blocks_that_use_the_whole_range_of_codes_encode_exactly() {
    let mut random = Random(4);
    for _ in 0..5000 {
        let d = f16::from_f32(2f32.powi(random.below(10) as i32 - 9) * (1.0 + random.uniform()));
        let m = f16::from_f32(d.to_f32() * 20.0 * (random.uniform() - 0.7));
        let mut codes = [0; 32].map(|_: u8| random.below(16) as u8);
        codes[random.below(16) as usize] = 0;
        codes[16 + random.below(16) as usize] = 15;
        let bytes = block(&[d.to_f32(), m.to_f32()], &packed(&codes));
        let values = decode(BlockType::Q4_1, &bytes);
        assert_eq!(there_and_back(BlockType::Q4_1, &values), values);
    }
}

#[test]
fn q4_1_blocks_of_negative_scale_come_back_closely() {
    let mut random = Random(5);
    for _ in 0..1000 {
        let d = -f16::from_f32(1e-3 * (1.0 + random.uniform()));
        let m = f16::from_f32(-8.0 * d.to_f32() * (1.0 + 0.1 * random.uniform()));
        let mut codes = [0; 32].map(|_: u8| random.below(16) as u8);
        (codes[7], codes[24]) = (0, 15);
        let bytes = block(&[d.to_f32(), m.to_f32()], &packed(&codes));
        let values = decode(BlockType::Q4_1, &bytes);
        assert!(relative_rms(&there_and_back(BlockType::Q4_1, &values), &values) < 1e-3);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding what cannot: error bounds
// ---------------------------------------------------------------------------------------------------------------------

/// Relative root mean square errors on Gaussian values. Each bound is about 2 % above what the encoders reach, and well
/// below what plain ones do (Q4_0 0.085, Q4_1 0.077).
const GAUSSIAN_BOUNDS: [(BlockType, f64); 6] = [
    (BlockType::F32, 0.0),
    (BlockType::F16, 2.2e-4),
    (BlockType::BF16, 1.75e-3),
    (BlockType::Q8_0, 5.4e-3),
    (BlockType::Q4_0, 0.0815),
    (BlockType::Q4_1, 0.0722),
];

#[test]
fn gaussian_values_keep_within_the_stated_errors_at_any_size() {
    let mut random = Random(6);
    for size in [1e-3, 0.02, 1.0, 37.0, 1000.0] {
        let values = random.normals(1 << 16, size);
        for (block_type, bound) in GAUSSIAN_BOUNDS {
            let error = relative_rms(&there_and_back(block_type, &values), &values);
            assert!(
                error <= bound,
                "{block_type:?} at size {size}: {error} is more than {bound}"
            );
        }
    }
}

/// What a straightforward encoder makes of a block: the scale that covers the range, and rounding. Written from the
/// definitions, in double precision; only the stored halves are rounded.
fn plain(block_type: BlockType, x: &[f32]) -> Vec<f32> {
    let half = |v: f64| f64::from(f16::from_f64(v));
    let low = x.iter().fold(f64::INFINITY, |m, v| m.min(f64::from(*v)));
    let high = x
        .iter()
        .fold(f64::NEG_INFINITY, |m, v| m.max(f64::from(*v)));
    let (d, m, codes) = match block_type {
        BlockType::Q8_0 => (half(low.abs().max(high.abs()) / 127.0), 0.0, -127.0..=127.0),
        BlockType::Q4_0 if low.abs() > high => (half(low / -8.0), 0.0, -8.0..=7.0),
        BlockType::Q4_0 => (half(high / -8.0), 0.0, -8.0..=7.0),
        _ => (half((high - low) / 15.0), half(low), 0.0..=15.0),
    };
    x.iter()
        .map(|v| {
            let q = if d == 0.0 {
                0.0
            } else {
                (f64::from(*v) - m) / d
            };
            let q: f64 = q.round().clamp(*codes.start(), *codes.end());
            (d * q + m) as f32
        })
        .collect()
}

/// Blocks of many kinds: wide and narrow, shifted, one-sided, heavy-tailed, sparse, with few distinct values.
fn assorted_blocks(random: &mut Random) -> Vec<(String, Vec<f32>)> {
    let mut blocks = Vec::new();
    for _ in 0..300 {
        for exponent in [-20, -12, -6, 0, 8] {
            let size = 2f32.powi(exponent);
            let mut add = |kind: &str, values: Vec<f32>| {
                blocks.push((format!("{kind} at 2^{exponent}"), values));
            };
            add("gaussian", random.normals(32, size));
            add(
                "uniform",
                (0..32).map(|_| size * random.uniform()).collect(),
            );
            add(
                "shifted",
                (0..32)
                    .map(|_| size * (3.0 + 0.1 * random.normal()))
                    .collect(),
            );
            add(
                "negative",
                (0..32).map(|_| -size * random.uniform()).collect(),
            );
            add(
                "heavy-tailed",
                (0..32).map(|_| size * random.normal().powi(3)).collect(),
            );
            add(
                "sparse",
                (0..32)
                    .map(|_| {
                        if random.below(8) == 0 {
                            size * random.normal()
                        } else {
                            0.0
                        }
                    })
                    .collect(),
            );
            add(
                "of few values",
                (0..32).map(|_| size * random.below(3) as f32).collect(),
            );
        }
    }
    blocks
}

#[test]
fn no_block_is_encoded_worse_than_plainly() {
    let mut random = Random(7);
    for (kind, values) in assorted_blocks(&mut random) {
        for block_type in BLOCK_TYPES {
            let ours = squared_error(&there_and_back(block_type, &values), &values);
            let plain = squared_error(&plain(block_type, &values), &values);
            // Sums in single precision may take two equally good candidates for each other.
            let size = squared_error(&values, &[0.0; 32]);
            assert!(
                ours <= plain * (1.0 + 1e-5) + size * 1e-12,
                "{block_type:?}, {kind}: {ours:e} is more than {plain:e} for {values:?}"
            );
        }
    }
}

#[test]
fn the_search_pays_on_gaussian_blocks() {
    let mut random = Random(8);
    let values = random.normals(32 * 512, 0.02);
    for (block_type, gain) in [(BlockType::Q4_0, 0.96), (BlockType::Q4_1, 0.94)] {
        let ours = relative_rms(&there_and_back(block_type, &values), &values);
        let plainly: Vec<f32> = values
            .chunks(32)
            .flat_map(|x| plain(block_type, x))
            .collect();
        let plain = relative_rms(&plainly, &values);
        assert!(
            ours < gain * plain,
            "{block_type:?}: {ours} against {plain}"
        );
    }
}

#[test]
fn zeros_encode_to_zeros() {
    for block_type in BlockType::ALL {
        for zero in [0.0, -0.0] {
            assert_eq!(there_and_back(block_type, &[zero; 512]), [0.0; 512]);
        }
    }
}

#[test]
fn a_block_of_zeros_beside_others_stays_zero() {
    let mut random = Random(9);
    for block_type in BLOCK_TYPES {
        let mut values = random.normals(96, 1.0);
        values[32..64].fill(0.0);
        let back = there_and_back(block_type, &values);
        assert_eq!(back[32..64], [0.0; 32]);
        assert_ne!(back[..32], [0.0; 32]);
        assert_ne!(back[64..], [0.0; 32]);
    }
}

#[test]
fn blocks_are_encoded_independently_of_their_neighbours() {
    let mut random = Random(10);
    let values = random.normals(32 * 8, 1.0);
    for block_type in BLOCK_TYPES {
        let apart: Vec<u8> = values
            .chunks(32)
            .flat_map(|x| encode(block_type, x))
            .collect();
        assert_eq!(encode(block_type, &values), apart);
    }
}

#[test]
fn a_constant_block_errs_by_no_more_than_its_scale_is_rounded() {
    // Rounding to a half errs by at most 2⁻¹¹ of the value.
    for value in [1.0, -1.0, 0.1, -0.3, 777.7, -12_345.6, 0.01, 60_000.0] {
        for block_type in BLOCK_TYPES {
            for back in there_and_back(block_type, &[value; 32]) {
                assert!(
                    (back - value).abs() <= value.abs() * 1.001 / 2048.0,
                    "{block_type:?}: {value} became {back}"
                );
            }
        }
    }
}

#[test]
fn one_outlier_survives_and_the_rest_goes_to_the_nearest_step() {
    let mut random = Random(11);
    for at in [0, 15, 16, 31] {
        for outlier in [1000.0, -1000.0] {
            let mut values = random.normals(32, 0.01);
            values[at] = outlier;
            for block_type in BLOCK_TYPES {
                let back = there_and_back(block_type, &values);
                assert!(
                    (back[at] - outlier).abs() <= 1000.0 / 1024.0,
                    "{block_type:?}: {outlier} became {}",
                    back[at]
                );
                for (i, v) in back.iter().enumerate().filter(|(i, _)| *i != at) {
                    assert!(v.abs() <= 1.0, "{block_type:?}: {} became {v}", values[i]);
                }
            }
        }
    }
}

#[test]
fn an_outlier_does_not_coarsen_other_blocks() {
    let mut random = Random(12);
    let calm = random.normals(96, 0.01);
    let mut wild = calm.clone();
    wild[40] = 1e4;
    for block_type in BLOCK_TYPES {
        let (a, b) = (encode(block_type, &calm), encode(block_type, &wild));
        let size = block_type.block_bytes();
        assert_eq!(a[..size], b[..size]);
        assert_eq!(a[2 * size..], b[2 * size..]);
    }
}

#[test]
fn opposite_values_encode_to_opposite_values() {
    let mut random = Random(13);
    for _ in 0..500 {
        let values = random.normals(32, 1.0);
        let opposite: Vec<f32> = values.iter().map(|v| -v).collect();
        for block_type in [BlockType::Q8_0, BlockType::Q4_0] {
            let back = there_and_back(block_type, &values);
            let opposite_back = there_and_back(block_type, &opposite);
            // Exact ties may be rounded either way, and then either is as good.
            let size = squared_error(&values, &[0.0; 32]);
            let (a, b) = (
                squared_error(&back, &values),
                squared_error(&opposite_back, &opposite),
            );
            assert!((a - b).abs() <= 1e-6 * size, "{block_type:?}: {a} and {b}");
        }
    }
}

#[test]
fn tiny_values_keep_to_the_grid_of_the_smallest_scales() {
    let mut random = Random(14);
    for largest in [2e-8, 1e-7, 2e-7, 4e-7, 1e-6, 5e-6, 2e-5, 1e-4, 1e-3] {
        for _ in 0..50 {
            let mut values: Vec<f32> = (0..32)
                .map(|_| largest * (2.0 * random.uniform() - 1.0))
                .collect();
            values[5] = largest;
            let rms = |back: &[f32]| (squared_error(back, &values) / 32.0).sqrt();
            let tiny = f64::from(TINY);
            let largest = f64::from(largest);
            // Half a step everywhere, where a step is at most the next half above the one that covers the range.
            let back = there_and_back(BlockType::Q8_0, &values);
            for (a, b) in back.iter().zip(&values) {
                assert!(
                    f64::from(a - b).abs() <= 0.5001 * (largest / 127.0 + tiny),
                    "largest {largest}: {b} became {a}"
                );
            }
            // Half a step on average, clipping included.
            let error = rms(&there_and_back(BlockType::Q4_0, &values));
            assert!(
                error <= 0.5 * (largest / 8.0 + tiny),
                "Q4_0, largest {largest}: {error}"
            );
            let error = rms(&there_and_back(BlockType::Q4_1, &values));
            assert!(
                error <= 0.5 * (2.0 * largest / 15.0 + tiny) + 0.5 * tiny,
                "Q4_1, largest {largest}: {error}"
            );
        }
    }
}

#[test]
fn values_below_every_half_become_zero() {
    for block_type in BLOCK_TYPES {
        for value in [1e-9, -1e-12, f32::MIN_POSITIVE, f32::from_bits(1)] {
            let mut values = [0.0; 32];
            values[3] = value;
            values[20] = -value;
            assert_eq!(there_and_back(block_type, &values), [0.0; 32], "{value}");
        }
    }
}

#[test]
fn the_largest_values_of_each_format_are_exact() {
    let top = 65504.0;
    let mut values = [0.0; 32];
    (values[0], values[31]) = (127.0 * top, -127.0 * top);
    assert_eq!(there_and_back(BlockType::Q8_0, &values), values);
    (values[0], values[31]) = (7.0 * top, -8.0 * top);
    assert_eq!(there_and_back(BlockType::Q4_0, &values), values);
    (values[0], values[31]) = (15.0 * top, 0.0);
    assert_eq!(there_and_back(BlockType::Q4_1, &values), values);
}

#[test]
fn values_too_large_for_a_block_become_its_largest_and_never_infinite() {
    let top = 65504.0;
    for huge in [1e7, 1e12, 1e20, 3e38, f32::MAX] {
        let mut values = [0.0; 32];
        (values[2], values[17]) = (huge, -huge);
        let back = there_and_back(BlockType::Q8_0, &values);
        assert_eq!((back[2], back[17]), (127.0 * top, -127.0 * top), "{huge}");
        // Eight steps one way and seven the other; which way is which is free.
        let back = there_and_back(BlockType::Q4_0, &values);
        let mut reach = [back[2], -back[17]];
        reach.sort_by(f32::total_cmp);
        assert_eq!(reach, [7.0 * top, 8.0 * top], "{huge}");
        let back = there_and_back(BlockType::Q4_1, &values);
        assert_eq!((back[2], back[17]), (14.0 * top, -top), "{huge}");
    }
    for huge in [2e6, 1e7, f32::MAX, -2e7, f32::MIN] {
        for block_type in BLOCK_TYPES {
            for back in there_and_back(block_type, &[huge; 32]) {
                assert!(back.is_finite(), "{block_type:?}: {huge} became {back}");
                assert_eq!(
                    back > 0.0,
                    huge > 0.0,
                    "{block_type:?}: {huge} became {back}"
                );
            }
        }
    }
}

#[test]
fn a_huge_value_beside_small_ones_leaves_them_finite() {
    let mut random = Random(15);
    for huge in [1e5, 1e6, 1e8, 1e30, f32::MAX] {
        for at in 0..32 {
            let mut values = random.normals(32, 1.0);
            values[at] = if at % 2 == 0 { huge } else { -huge };
            for block_type in BLOCK_TYPES {
                let back = there_and_back(block_type, &values);
                assert!(
                    back.iter().all(|v| v.is_finite()),
                    "{block_type:?}: {back:?}"
                );
            }
        }
    }
}

#[test]
fn encoding_again_changes_nothing_to_speak_of() {
    let mut random = Random(16);
    for (kind, values) in assorted_blocks(&mut random) {
        for block_type in BLOCK_TYPES {
            let once = there_and_back(block_type, &values);
            if once.iter().all(|v| *v == 0.0) {
                continue;
            }
            let twice = there_and_back(block_type, &once);
            // Scales among the smallest halves have few digits and may be missed by a whole step.
            let codes = match block_type {
                BlockType::Q8_0 => 127.0,
                BlockType::Q4_0 => 8.0,
                _ => 15.0,
            };
            let largest = once.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let bound = 1e-3 + f64::from(codes * TINY / largest);
            let error = relative_rms(&twice, &once);
            assert!(
                error <= bound,
                "{block_type:?}, {kind}: {error} for {once:?}, then {twice:?}"
            );
        }
    }
}

/// Q4_K has 16 steps in each of its parts of 32 values, and Q4_1 and Q5_1 have as many or more.
#[test]
fn values_decoded_from_one_type_keep_their_steps_in_another() {
    let values = Random(17).normals(1 << 13, 1.0);
    let decoded = there_and_back(BlockType::Q4_K, &values);
    for block_type in [BlockType::Q4_1, BlockType::Q5_1] {
        let error = relative_rms(&there_and_back(block_type, &decoded), &decoded);
        // What half precision rounds of a scale and a minimum.
        assert!(error < 1e-3, "{block_type:?}: {error}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is not finite
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn floats_keep_what_is_not_finite() {
    for block_type in [BlockType::F32, BlockType::F16, BlockType::BF16] {
        let back = there_and_back(block_type, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        assert!(back[0].is_nan(), "{block_type:?}");
        assert_eq!(
            back[1..],
            [f32::INFINITY, f32::NEG_INFINITY],
            "{block_type:?}"
        );
    }
}

#[test]
fn blocks_never_panic_and_always_decode_to_something_finite() {
    let odd = [
        f32::NAN,
        -f32::NAN,
        f32::from_bits(0x7F80_0001),
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        65504.0,
        65520.0,
        -0.0,
        1.0,
    ];
    let mut random = Random(17);
    for block_type in BLOCK_TYPES {
        for value in odd {
            let back = there_and_back(block_type, &[value; 32]);
            assert!(
                back.iter().all(|v| v.is_finite()),
                "{block_type:?} {value}: {back:?}"
            );
        }
        for _ in 0..5000 {
            let values: Vec<f32> = (0..32)
                .map(|_| match random.below(3) {
                    0 => odd[random.below(odd.len() as u32) as usize],
                    1 => f32::from_bits(random.bits()),
                    _ => random.normal(),
                })
                .collect();
            let back = there_and_back(block_type, &values);
            assert!(
                back.iter().all(|v| v.is_finite()),
                "{block_type:?} {values:?}: {back:?}"
            );
        }
    }
}

#[test]
fn a_nan_counts_as_zero_and_leaves_the_rest_of_its_block_alone() {
    let mut random = Random(18);
    for block_type in BLOCK_TYPES {
        let mut values = random.normals(32, 1.0);
        values[9] = 0.0;
        let expected = encode(block_type, &values);
        values[9] = f32::NAN;
        assert_eq!(encode(block_type, &values), expected, "{block_type:?}");
    }
}

#[test]
fn blocks_with_a_scale_that_is_not_finite_decode_without_a_panic() {
    for scale in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        for block_type in BLOCK_TYPES {
            let mut bytes = vec![0x21; block_type.block_bytes()];
            bytes[..2].copy_from_slice(&scale.to_le_bytes());
            let values = decode(block_type, &bytes);
            assert!(
                values.iter().all(|v| !v.is_finite()),
                "{block_type:?} {scale}"
            );
            // And such values can be encoded again.
            assert!(
                there_and_back(block_type, &values)
                    .iter()
                    .all(|v| v.is_finite())
            );
        }
    }
}

// ---- by importance ----

/// Every type that chooses a scale by its error.
const SEARCHED: [BlockType; 11] = [
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q2_K,
    BlockType::Q3_K,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
    BlockType::IQ4_NL,
    BlockType::IQ4_XS,
];

fn encoded_by(block_type: BlockType, values: &[f32], importance: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; block_type.row_bytes(values.len())];
    encode_row_by_importance(block_type, values, importance, &mut bytes);
    bytes
}

#[test]
fn errors_of_important_values_become_smaller_at_the_cost_of_others() {
    let mut random = Random(77);
    let values = random.normals(16 * 1024, 0.02);
    // As uneven as inputs of a projection are.
    let importance: Vec<f32> = random
        .normals(values.len(), 1.5)
        .iter()
        .map(|v| v.exp())
        .collect();
    let weighted = |decoded: &[f32]| -> f64 {
        let errors = values.iter().zip(decoded).zip(&importance);
        errors
            .map(|((x, y), w)| f64::from(*w) * f64::from(x - y).powi(2))
            .sum()
    };
    for block_type in SEARCHED {
        let plain = there_and_back(block_type, &values);
        let by = decode(block_type, &encoded_by(block_type, &values, &importance));
        let gain = weighted(&by) / weighted(&plain);
        assert!(gain < 0.95, "{block_type:?}: {gain}");
        assert!(squared_error(&values, &by) > squared_error(&values, &plain));
    }
}

#[test]
fn where_importance_says_nothing_values_are_encoded_as_without() {
    let values = Random(5).normals(1024, 1.0);
    for block_type in BlockType::ALL {
        for importance in [0.0, 2.0, (-100f32).exp2(), f32::NAN, f32::INFINITY, -1.0] {
            assert!(
                encoded_by(block_type, &values, &[importance; 1024]) == encode(block_type, &values),
                "{block_type:?} {importance}"
            );
        }
    }
    // What is unimportant is not given up altogether.
    let mut importance = [0.0; 32];
    importance[3] = 1.0;
    let decoded = decode(
        BlockType::Q4_1,
        &encoded_by(BlockType::Q4_1, &values[..32], &importance),
    );
    assert!(
        squared_error(&values[..32], &decoded) < 0.1 * squared_error(&values[..32], &[0.0; 32])
    );
}
