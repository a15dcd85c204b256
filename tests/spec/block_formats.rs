//! Every block format, bit by bit: decoding against a second decoder that looks each value up on its own, and against
//! blocks out of model files; encoding against stated error bounds.
//!
//! The second decoder is the readable definition of the formats (ggml's): for value i it says at which bits of the block
//! everything lies that makes the value. Bits are numbered from the lowest of the first byte on.

use crate::common::blocks::{decode, encode, squared_error, there_and_back};
use flapjack::quant::BlockType;
use half::f16;

/// All types whose values share scales.
const BLOCK_TYPES: [BlockType; 12] = [
    BlockType::Q8_0,
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

// ---------------------------------------------------------------------------------------------------------------------
// Helpers
// ---------------------------------------------------------------------------------------------------------------------

/// Marsaglia's xorshift of 64 bits.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 11) % n
    }

    /// A whole number from `low` to `high`, both included.
    fn between(&mut self, low: i32, high: i32) -> i32 {
        low + self.below((high - low + 1) as u64) as i32
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Gaussian with mean 0 and variance 1 (Box and Muller).
    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    fn normals(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| size * self.normal()).collect()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.bits().to_le_bytes()[3]).collect()
    }
}

fn squares(a: &[f32]) -> f64 {
    squared_error(a, &vec![0.0; a.len()])
}

/// The root of the mean squared error of `a`, relative to that of `b` itself.
fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    (squared_error(a, b) / squares(b)).sqrt()
}

/// Where the half-precision numbers of a block lie.
fn halves(block_type: BlockType) -> &'static [usize] {
    match block_type {
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4_K | BlockType::Q5_K => &[0, 2],
        BlockType::Q2_K => &[80, 82],
        BlockType::Q3_K => &[108],
        BlockType::Q6_K => &[208],
        _ => &[0],
    }
}

/// A block of random bits, but for the halves, which are finite and not zero.
fn random_block(block_type: BlockType, random: &mut Random) -> Vec<u8> {
    let mut block = random.bytes(block_type.block_bytes());
    for at in halves(block_type) {
        let sign = random.below(2) << 15;
        let half = sign | (1 + random.below(0x7BFF));
        block[*at..at + 2].copy_from_slice(&(half as u16).to_le_bytes());
    }
    block
}

// ---------------------------------------------------------------------------------------------------------------------
// The second decoder
// ---------------------------------------------------------------------------------------------------------------------

/// What the codes of IQ4_NL and IQ4_XS stand for.
const LEVELS: [i32; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// A value as two exact products: scale and code less what is subtracted.
struct Value {
    product: f64,
    minimum: f64,
}

/// Value `i` of a block.
fn value(block_type: BlockType, block: &[u8], i: usize) -> Value {
    // The number in `count` bits from bit `first` of byte `byte` on.
    let bits = |byte: usize, first: usize, count: usize| {
        (0..count)
            .map(|k| 8 * byte + first + k)
            .map(|at| i32::from(block[at / 8]) >> (at % 8) & 1)
            .enumerate()
            .map(|(k, bit)| bit << k)
            .sum::<i32>()
    };
    let half = |byte: usize| f16::from_bits(bits(byte, 0, 16) as u16).to_f64();
    let signed = |byte: usize| bits(byte, 0, 7) - 128 * bits(byte, 7, 1);
    // In the formats of 32 values: nibble i, from byte `start` on.
    let nibble = |start: usize| bits(start + i % 16, 4 * (i / 16), 4);
    // In the super-blocks: a quarter of a byte, for 128 values in 32 bytes; half a byte, for 64 values in 32 bytes.
    let quarter = |start: usize| bits(start + i / 128 * 32 + i % 32, i / 32 % 4 * 2, 2);
    let half_byte = |start: usize| bits(start + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4);
    let single = |start: usize| bits(start + i % 32, i / 32, 1);
    // Scale and minimum of 6 bits.
    let packed_scale = |j: usize| match j {
        0..4 => bits(4 + j, 0, 6),
        _ => bits(8 + j, 0, 4) + 16 * bits(j, 6, 2),
    };
    let packed_minimum = |j: usize| match j {
        0..4 => bits(8 + j, 0, 6),
        _ => bits(8 + j, 4, 4) + 16 * bits(4 + j, 6, 2),
    };
    let (d, scale, code, dmin, minimum) = match block_type {
        BlockType::Q8_0 => (half(0), 1, signed(2 + i), 0.0, 0),
        BlockType::Q4_0 => (half(0), 1, nibble(2) - 8, 0.0, 0),
        BlockType::Q4_1 => (half(0), 1, nibble(4), half(2), -1),
        BlockType::Q5_0 => (half(0), 1, nibble(6) + 16 * bits(2, i, 1) - 16, 0.0, 0),
        BlockType::Q5_1 => (half(0), 1, nibble(8) + 16 * bits(4, i, 1), half(2), -1),
        BlockType::Q2_K => {
            let (scale, minimum) = (bits(i / 16, 0, 4), bits(i / 16, 4, 4));
            (half(80), scale, quarter(16), half(82), minimum)
        }
        BlockType::Q3_K => {
            let j = i / 16;
            let scale = bits(96 + j % 8, j / 8 * 4, 4) + 16 * bits(104 + j % 4, j / 4 * 2, 2);
            let code = quarter(32) + 4 * single(0) - 4;
            (half(108), scale - 32, code, 0.0, 0)
        }
        BlockType::Q4_K => {
            let (scale, minimum) = (packed_scale(i / 32), packed_minimum(i / 32));
            (half(0), scale, half_byte(16), half(2), minimum)
        }
        BlockType::Q5_K => {
            let (scale, minimum) = (packed_scale(i / 32), packed_minimum(i / 32));
            let code = half_byte(48) + 16 * single(16);
            (half(0), scale, code, half(2), minimum)
        }
        BlockType::Q6_K => {
            let low = bits(i / 128 * 64 + i % 64, i / 64 % 2 * 4, 4);
            let code = low + 16 * quarter(128) - 32;
            (half(208), signed(192 + i / 16), code, 0.0, 0)
        }
        BlockType::IQ4_NL => (half(0), 1, LEVELS[nibble(2) as usize], 0.0, 0),
        BlockType::IQ4_XS => {
            let j = i / 32;
            let scale = bits(4 + j / 2, j % 2 * 4, 4) + 16 * bits(2, 2 * j, 2) - 32;
            let code = bits(8 + 16 * j + i % 16, i / 16 % 2 * 4, 4);
            (half(0), scale, LEVELS[code as usize], 0.0, 0)
        }
        // Those of few bits have tests of their own.
        _ => unreachable!("not one of these"),
    };
    Value {
        product: d * f64::from(scale) * f64::from(code),
        minimum: dmin * f64::from(minimum),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes and numbers
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn types_have_the_numbers_names_and_sizes_of_gguf() {
    for (block_type, id, name, len, bytes) in [
        (BlockType::Q5_0, 6, "Q5_0", 32, 2 + 4 + 16),
        (BlockType::Q5_1, 7, "Q5_1", 32, 2 + 2 + 4 + 16),
        (BlockType::Q2_K, 10, "Q2_K", 256, 16 + 64 + 2 + 2),
        (BlockType::Q3_K, 11, "Q3_K", 256, 32 + 64 + 12 + 2),
        (BlockType::Q4_K, 12, "Q4_K", 256, 2 + 2 + 12 + 128),
        (BlockType::Q5_K, 13, "Q5_K", 256, 2 + 2 + 12 + 32 + 128),
        (BlockType::Q6_K, 14, "Q6_K", 256, 128 + 64 + 16 + 2),
        (BlockType::IQ4_NL, 20, "IQ4_NL", 32, 2 + 16),
        (BlockType::IQ4_XS, 23, "IQ4_XS", 256, 2 + 2 + 4 + 128),
    ] {
        assert_eq!(block_type.id(), id);
        assert_eq!(block_type.name(), name);
        assert_eq!(BlockType::from_id(id), Some(block_type));
        assert_eq!(block_type.block_len(), len);
        assert_eq!(block_type.block_bytes(), bytes);
        assert_eq!(block_type.checked_row_bytes(3 * len), Some(3 * bytes));
        assert_eq!(block_type.checked_row_bytes(3 * len + len / 2), None);
        assert!(!block_type.is_float());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn random_blocks_decode_to_their_definition() {
    let mut random = Random(0x5EED_0001);
    for block_type in BLOCK_TYPES {
        for _ in 0..200 {
            let row: Vec<Vec<u8>> = (0..3)
                .map(|_| random_block(block_type, &mut random))
                .collect();
            let decoded = decode(block_type, &row.concat());
            for (block, decoded) in row.iter().zip(decoded.chunks(block_type.block_len())) {
                for (i, got) in decoded.iter().enumerate() {
                    let Value { product, minimum } = value(block_type, block, i);
                    // Single precision rounds the product and the difference.
                    let slack = (product.abs() + minimum.abs()) * f64::from(f32::EPSILON);
                    let difference = (f64::from(*got) - (product - minimum)).abs();
                    assert!(
                        difference <= slack,
                        "{block_type:?}, value {i}: {got} instead of {product} − {minimum}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_bit_of_a_block_counts() {
    let mut random = Random(0x5EED_0002);
    for block_type in BLOCK_TYPES {
        let mut counts = vec![false; 8 * block_type.block_bytes()];
        // More than one block, since in one a scale may be zero and hide codes.
        for _ in 0..10 {
            let block = random_block(block_type, &mut random);
            let values = decode(block_type, &block);
            for (bit, counts) in counts.iter_mut().enumerate() {
                let mut other = block.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                *counts |= decode(block_type, &other) != values;
            }
        }
        let idle = counts.iter().position(|counts| !counts);
        assert_eq!(idle, None, "a bit of {block_type:?}");
    }
}

#[test]
fn blocks_with_halves_that_are_not_finite_decode_without_a_panic() {
    let mut random = Random(0x5EED_0003);
    for block_type in BLOCK_TYPES {
        for half in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
            let mut block = random_block(block_type, &mut random);
            for at in halves(block_type) {
                block[*at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
            let values = decode(block_type, &block);
            assert!(values.iter().any(|v| !v.is_finite()), "{block_type:?}");
            // And such values can be encoded again.
            let back = there_and_back(block_type, &values);
            assert!(back.iter().all(|v| v.is_finite()), "{block_type:?}");
        }
    }
}

/// A block of a language model's weights as ggml's encoders left it, and some of its values.
struct Fixture {
    block_type: BlockType,
    hex: &'static str,
    expected: &'static [(usize, f32)],
}

const FIXTURES: [Fixture; 9] = [
    Fixture {
        block_type: BlockType::Q5_0,
        hex: "18a8f329c9fc20d27d2ed4000200e2de7db20b402e05",
        expected: &[
            (0, -0.0),
            (1, -0.063964844),
            (15, 0.35180664),
            (16, -0.063964844),
            (17, 0.095947266),
            (31, -0.0),
        ],
    },
    Fixture {
        block_type: BlockType::Q5_1,
        hex: "df2458b4f9b0697c5fe80c314b1111e5c8e81e961d155c65",
        expected: &[
            (0, 0.31837463),
            (1, -0.119262695),
            (15, 0.12809753),
            (16, 0.12809753),
            (17, -0.0050964355),
            (31, -0.15731812),
        ],
    },
    Fixture {
        block_type: BlockType::Q2_K,
        hex: "884e5fc7788898cc29b9b87615fbb7a9115596549151d88955b1a1a461d7a50149645ca980a9ac285d9e5cfc64ac5d694894c89484e9f9991be5e685dc99dae0e97ea2de9a7ab57d9c96a56f2d69839a3f258b27",
        expected: &[
            (0, -0.071777344),
            (1, -0.071777344),
            (15, -0.071777344),
            (16, 0.16903687),
            (31, 0.16903687),
            (32, -0.14732361),
            (47, -0.14732361),
            (63, -0.06668091),
            (64, -0.042312622),
            (100, 0.062698364),
            (127, -0.107666016),
            (128, -0.058929443),
            (150, -0.13967896),
            (191, 0.039657593),
            (192, -0.029464722),
            (224, -0.18066406),
            (255, 0.07421875),
        ],
    },
    Fixture {
        block_type: BlockType::Q3_K,
        hex: "a745839d3787ec55d6433fd7da17da3853b656a78ff2b21d61b46b9faae304478409925986f00899d7d89520137d4f5139d0de645497e748dcc315114fe6bfa676dedbbfb4ad822d303c86c8484c0de4f89a7833fb90f0fc1084d2bcda366ed33d92ac2d83e118c03c077082d21c",
        expected: &[
            (0, -0.0),
            (1, -0.08943939),
            (15, 0.26831818),
            (16, 0.084732056),
            (31, 0.16946411),
            (32, -0.09414673),
            (47, 0.3765869),
            (63, 0.061195374),
            (64, 0.0),
            (100, 0.22595215),
            (127, 0.30126953),
            (128, -0.17887878),
            (150, -0.0),
            (191, 0.5648804),
            (192, 0.112976074),
            (224, -0.07061005),
            (255, -0.056488037),
        ],
    },
    Fixture {
        block_type: BlockType::Q4_K,
        hex: "b5141820a7e7e572aae8ed60deff20be58c583c56387cfb66a3865778a1609fea970c4888795865867258a7ab69b659c99c9923a896f598b6a620acc53be3023fa6777c536bd6b188d784e471f7c93958364456c8752746807608a4747566886a742a768a86766966f566a974a5b9bf84a950d3aaa2b38f471e0af0847df778c529c2268c9a5b95806ad56a9bb732a55",
        expected: &[
            (0, 0.022727966),
            (1, -0.11172581),
            (15, 0.2916355),
            (16, 0.06754589),
            (31, 0.20199966),
            (32, -0.095734596),
            (47, 0.35244465),
            (63, 0.0835371),
            (64, 0.022873878),
            (100, 0.20381165),
            (127, 0.26127052),
            (128, -0.20121574),
            (150, -0.042629242),
            (191, 0.58224964),
            (192, 0.15182495),
            (224, -0.07798004),
            (255, -0.043504715),
        ],
    },
    Fixture {
        block_type: BlockType::Q5_K,
        hex: "9b104d21a6ffbdad9e65bf9f38f98568ec1c554c9edad44550d5e2dc0474b037cf5c03c805d1cdc4c64051d88f15ccc026ca86ee4c08c88a6aec2ee6ccaea0282aaa064ceea6c6862e4c86caea048a8a80e004084e2ac2a0aec08c42a6e4aca04444406ec8ee04c080ccc82e6666044ee4a488462680c082666e04a22822640648e0446e2c6c84aace888a6a6caaa00844e606c00a8e00a84c2668464e6aaea8408c8c2a80f8a66ec662e62e228e888a",
        expected: &[
            (0, -0.1824131),
            (1, -0.09696007),
            (15, 0.20212555),
            (16, 0.24485207),
            (31, -0.09696007),
            (32, -0.3122282),
            (47, 0.25446033),
            (63, -0.09972),
            (64, -0.10354614),
            (100, 0.18502617),
            (127, -0.21975136),
            (128, -0.27240753),
            (150, -0.27240753),
            (191, -0.32094574),
            (192, 0.0018978119),
            (224, 0.05633545),
            (255, 0.14628601),
        ],
    },
    Fixture {
        block_type: BlockType::Q6_K,
        hex: "4fa04abd680da81a42b2374a3d485dfcaed212bea686d1c61e2981b11e6df26e3e0d7e1dc5a25d5bcee4055d0e04300462bd6eb611b61d136e0b66191d6268bb14d11e5e51de5454579b14d1d79e945bd390585a9ada1e945e5e1117d3dc901815c807fe80b0ce0c000e4c45b540700e2754702014a77430707f9c300078c804a314a0c5459d5548628ab664b1a9919a9a9ac6abd2aa9887e53568a9aab84fd50a5d959a5aa15a564a61b5788a9899a1ed93d9ea2a1a6942d9599448a94377b5424f3f7bb170b63180456885a8a854b8ad09",
        expected: &[
            (0, 0.3543899),
            (1, -0.36582184),
            (15, 0.13718319),
            (16, 0.19157147),
            (31, -0.027367353),
            (32, -0.19642138),
            (47, 0.043649197),
            (63, -0.106524825),
            (64, -0.054734707),
            (100, 0.051270485),
            (127, 0.22915828),
            (128, -0.08868408),
            (150, -0.023903131),
            (191, 0.25565958),
            (192, 0.47251987),
            (224, -0.4510417),
            (255, -0.0),
        ],
    },
    Fixture {
        block_type: BlockType::IQ4_NL,
        hex: "7b98e54bc074337558b8b88a59d3a3357725",
        expected: &[
            (0, 0.07657051),
            (1, -0.0831337),
            (15, 0.07657051),
            (16, -0.19470787),
            (17, 0.107198715),
            (31, 0.1815815),
        ],
    },
    Fixture {
        block_type: BlockType::IQ4_XS,
        hex: "cd88c300dbb9e0aaa44480373c78b688824988594a68c38a27752f7135acd9ba769a9ac93999d9a0fbabac1577f8dacdd1454db0b83e2858d8b4d2957aba8a7cbbae8a8dfdb29aff9e8c4a787968c60eca7c8a8597d896aa5cee7e3c625ca35c76caea0a7b630973aa8a5e636aa5cda5e5a6785328dc0c7aaa7b5582ef8306a8361e4fa47887b87e",
        expected: &[
            (0, 0.19383037),
            (1, 0.19383037),
            (15, -0.09889305),
            (16, -0.09889305),
            (31, -0.003955722),
            (32, -0.027836561),
            (47, -0.35352433),
            (63, 0.0695914),
            (64, 0.12804818),
            (100, -0.09889305),
            (127, -0.44699657),
            (128, 0.4172554),
            (150, 0.24847794),
            (191, -0.026371479),
            (192, 0.08057952),
            (224, 0.08057952),
            (255, -0.032231808),
        ],
    },
];

#[test]
fn blocks_of_model_files_decode_to_known_values() {
    for fixture in FIXTURES {
        let block: Vec<u8> = (0..fixture.hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&fixture.hex[at..at + 2], 16).expect("hexadecimal"))
            .collect();
        let values = decode(fixture.block_type, &block);
        for (i, expected) in fixture.expected {
            assert_eq!(values[*i], *expected, "{:?}, value {i}", fixture.block_type);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding what can be represented
// ---------------------------------------------------------------------------------------------------------------------

/// Values that a block can hold, in which the extremes occur that tell the encoder its scales: in each sub-block the
/// outermost codes, in each super-block the outermost scale and minimum.
fn representable(block_type: BlockType, random: &mut Random) -> Vec<f32> {
    let half =
        |random: &mut Random, size: f64| f16::from_f64(size * (1.0 + random.uniform())).to_f64();
    let d = half(random, 1e-3);
    let dmin = half(random, 2e-3);
    // Sub-blocks: how many, of how many values; scales and codes: the outermost, the others; whether there is a minimum.
    let (count, len, scales, codes, minima) = match block_type {
        BlockType::Q8_0 => (1, 32, (1, 1), (-127, 127), 0),
        BlockType::Q4_0 => (1, 32, (1, 1), (-8, 7), 0),
        BlockType::Q5_0 => (1, 32, (1, 1), (-16, 15), 0),
        BlockType::Q4_1 => (1, 32, (1, 1), (0, 15), 1),
        BlockType::Q5_1 => (1, 32, (1, 1), (0, 31), 1),
        BlockType::Q2_K => (16, 16, (15, 0), (0, 3), 15),
        BlockType::Q3_K => (16, 16, (-32, 31), (-4, 3), 0),
        BlockType::Q4_K => (8, 32, (63, 0), (0, 15), 63),
        BlockType::Q5_K => (8, 32, (63, 0), (0, 31), 63),
        BlockType::Q6_K => (16, 16, (-128, 127), (-32, 31), 0),
        BlockType::IQ4_NL => (1, 32, (1, 1), (-127, 113), 0),
        BlockType::IQ4_XS => (8, 32, (-32, 31), (-127, 113), 0),
        _ => unreachable!("not a block"),
    };
    let outermost = (random.below(count), random.below(count));
    let mut values = Vec::new();
    for sub in 0..count {
        let mut scale = random.between(scales.0.min(scales.1), scales.0.max(scales.1));
        let mut minimum = random.between(0, minima);
        if sub == outermost.0 {
            scale = scales.0;
        }
        if sub == outermost.1 {
            minimum = minima;
        }
        let mut q: Vec<i32> = (0..len)
            .map(|_| match block_type {
                BlockType::IQ4_NL | BlockType::IQ4_XS => LEVELS[random.below(16) as usize],
                _ => random.between(codes.0, codes.1),
            })
            .collect();
        let half = len / 2;
        q[random.below(half) as usize] = codes.0;
        q[(half + random.below(half)) as usize] = codes.1;
        let step = d * f64::from(scale);
        let base = dmin * f64::from(minimum);
        values.extend(q.iter().map(|q| (step * f64::from(*q) - base) as f32));
    }
    values
}

#[test]
fn representable_values_with_their_extremes_present_come_back_exactly() {
    let mut random = Random(0x5EED_0004);
    for block_type in BLOCK_TYPES {
        for trial in 0..300 {
            let values = representable(block_type, &mut random);
            let back = there_and_back(block_type, &values);
            assert_eq!(back, values, "{block_type:?}, trial {trial}");
        }
    }
}

#[test]
fn zeros_encode_to_zeros() {
    for block_type in BLOCK_TYPES {
        let len = 2 * block_type.block_len();
        for zero in [0.0, -0.0] {
            assert_eq!(there_and_back(block_type, &vec![zero; len]), vec![0.0; len]);
        }
    }
}

#[test]
fn values_below_every_half_become_zero() {
    for block_type in BLOCK_TYPES {
        let len = block_type.block_len();
        for size in [1e-10, 1e-12, 1e-30, f32::MIN_POSITIVE, f32::from_bits(1)] {
            let values: Vec<f32> = (0..len).map(|i| [0.0, size, -size][i % 3]).collect();
            let back = there_and_back(block_type, &values);
            assert_eq!(back, vec![0.0; len], "{block_type:?} at {size:e}");
        }
    }
}

#[test]
fn blocks_are_encoded_independently_of_their_neighbours() {
    let mut random = Random(0x5EED_0005);
    for block_type in BLOCK_TYPES {
        let len = block_type.block_len();
        let mut values = random.normals(4 * len, 1.0);
        values[2 * len..3 * len].fill(0.0);
        let apart: Vec<u8> = values
            .chunks(len)
            .flat_map(|x| encode(block_type, x))
            .collect();
        assert_eq!(encode(block_type, &values), apart, "{block_type:?}");
        assert_eq!(decode(block_type, &apart)[2 * len..3 * len], vec![0.0; len]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding what cannot: error bounds
// ---------------------------------------------------------------------------------------------------------------------

/// Relative root mean square errors on Gaussian values, about 1 % above what the encoders reach.
const GAUSSIAN_BOUNDS: [(BlockType, f64); 12] = [
    (BlockType::Q8_0, 0.0054),
    (BlockType::Q4_0, 0.0820),
    (BlockType::Q4_1, 0.0723),
    (BlockType::Q5_0, 0.0407),
    (BlockType::Q5_1, 0.0349),
    (BlockType::Q2_K, 0.2675),
    (BlockType::Q3_K, 0.1450),
    (BlockType::Q4_K, 0.0719),
    (BlockType::Q5_K, 0.0358),
    (BlockType::Q6_K, 0.0171),
    (BlockType::IQ4_NL, 0.0743),
    (BlockType::IQ4_XS, 0.0749),
];

#[test]
fn gaussian_values_keep_within_the_stated_errors() {
    let mut random = Random(0x5EED_0006);
    for size in [0.02, 1.0, 300.0] {
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

#[test]
fn more_bits_err_less() {
    let mut random = Random(0x5EED_0007);
    let values = random.normals(1 << 14, 0.05);
    let error = |block_type| squared_error(&there_and_back(block_type, &values), &values);
    for order in [
        &[
            BlockType::Q2_K,
            BlockType::Q3_K,
            BlockType::Q4_K,
            BlockType::Q5_K,
            BlockType::Q6_K,
            BlockType::Q8_0,
        ][..],
        &[BlockType::Q4_0, BlockType::Q5_0, BlockType::Q8_0],
        &[BlockType::Q4_1, BlockType::Q5_1, BlockType::Q8_0],
        &[BlockType::Q4_0, BlockType::IQ4_XS, BlockType::IQ4_NL],
    ] {
        for pair in order.windows(2) {
            assert!(error(pair[0]) > error(pair[1]), "{pair:?}");
        }
    }
}

/// Blocks of 256 values of many kinds and sizes.
fn assorted_blocks(random: &mut Random) -> Vec<(String, Vec<f32>)> {
    let mut blocks = Vec::new();
    for exponent in [-28, -25, -22, -18, -14, -8, 0, 9, 16, 20] {
        let size = 2f32.powi(exponent);
        for _ in 0..20 {
            let mut add = |kind: &str, value: &mut dyn FnMut(usize) -> f32| {
                let values = (0..256).map(|i| size * value(i)).collect();
                blocks.push((format!("{kind} at 2^{exponent}"), values));
            };
            add("gaussian", &mut |_| random.normal());
            add("positive", &mut |_| random.uniform() as f32);
            add("negative", &mut |_| -random.uniform() as f32);
            add("shifted up", &mut |_| 3.0 + 0.1 * random.normal());
            add("shifted down", &mut |_| -3.0 + 0.1 * random.normal());
            add("heavy-tailed", &mut |_| random.normal().powi(3));
            add("sparse", &mut |_| {
                if random.below(16) == 0 {
                    random.normal()
                } else {
                    0.0
                }
            });
            add("of few values", &mut |_| random.below(3) as f32);
            add("uneven", &mut |i| {
                random.normal() * 2f32.powi(-((i / 16) as i32))
            });
            add("half empty", &mut |i| {
                if i / 32 % 2 == 0 {
                    random.normal()
                } else {
                    0.0
                }
            });
            add("alternating", &mut |i| if i % 2 == 0 { 1.0 } else { -1.0 });
        }
    }
    blocks
}

#[test]
fn no_block_is_encoded_worse_than_by_zeros() {
    let mut random = Random(0x5EED_0008);
    for (kind, values) in assorted_blocks(&mut random) {
        for block_type in BLOCK_TYPES {
            let back = there_and_back(block_type, &values);
            let (error, zeros) = (squared_error(&back, &values), squares(&values));
            assert!(
                error <= zeros * (1.0 + 1e-5),
                "{block_type:?}, {kind}: {error:e} is more than {zeros:e}"
            );
        }
    }
}

#[test]
fn constants_err_by_no_more_than_their_scale_is_rounded() {
    for block_type in BLOCK_TYPES {
        // A half errs by at most 2⁻¹¹, but the smallest ones have fewer digits.
        for (value, bound) in [
            (1.0, 5e-4),
            (-1.0, 5e-4),
            (777.7, 5e-4),
            (-12_345.6, 5e-4),
            (0.01, 1e-2),
            (-0.003, 2e-2),
        ] {
            for back in there_and_back(block_type, &vec![value; block_type.block_len()]) {
                assert!(
                    (back - value).abs() <= bound * value.abs(),
                    "{block_type:?}: {value} became {back}"
                );
            }
        }
    }
}

#[test]
fn one_outlier_survives_and_the_rest_stays_small() {
    let mut random = Random(0x5EED_0009);
    for block_type in BLOCK_TYPES {
        let len = block_type.block_len();
        for at in [0, 15, 16, 31, len / 2, len - 1] {
            for outlier in [1000.0, -1000.0] {
                let mut values = random.normals(len, 0.01);
                values[at] = outlier;
                for (i, back) in there_and_back(block_type, &values).into_iter().enumerate() {
                    // In steps of the level 1 of the uneven formats, which have no zero, 1000 / 127; else as the
                    // halves round.
                    let bound = match block_type {
                        BlockType::IQ4_NL | BlockType::IQ4_XS => 10.0,
                        _ => 1.0,
                    };
                    assert!(
                        (back - values[i]).abs() <= bound,
                        "{block_type:?}, outlier {outlier} at {at}: {} became {back} at {i}",
                        values[i]
                    );
                }
            }
        }
    }
}

#[test]
fn huge_values_saturate() {
    for block_type in BLOCK_TYPES {
        let len = block_type.block_len();
        for huge in [1e6, 1e8, 1e12, 1e30, f32::MAX, f32::INFINITY] {
            for sign in [1.0, -1.0] {
                let back = there_and_back(block_type, &vec![sign * huge; len]);
                assert!(
                    back.iter().all(|v| v.is_finite() && sign * v > 6e4),
                    "{block_type:?}: {huge} became {back:?}"
                );
            }
            let values: Vec<f32> = (0..len).map(|i| [huge, 1.0, -huge][i % 3]).collect();
            let back = there_and_back(block_type, &values);
            for (value, back) in values.iter().zip(back) {
                assert!(back.is_finite(), "{block_type:?}: {value} became {back}");
                assert!(
                    value.abs() == 1.0 || value * back > 0.0,
                    "{block_type:?}: {value} became {back}"
                );
            }
        }
    }
}

#[test]
fn a_nan_counts_as_zero_and_leaves_the_rest_of_its_block_alone() {
    let mut random = Random(0x5EED_000A);
    for block_type in BLOCK_TYPES {
        let mut values = random.normals(block_type.block_len(), 1.0);
        values[9] = 0.0;
        let expected = encode(block_type, &values);
        values[9] = f32::NAN;
        assert_eq!(encode(block_type, &values), expected, "{block_type:?}");
        values.fill(f32::NAN);
        assert_eq!(there_and_back(block_type, &values), vec![0.0; values.len()]);
    }
}

#[test]
fn whatever_is_encoded_decodes_to_something_finite() {
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        65504.0,
        -0.0,
        1.0,
    ];
    let mut random = Random(0x5EED_000B);
    for block_type in BLOCK_TYPES {
        for trial in 0..600 {
            let values: Vec<f32> = (0..block_type.block_len())
                .map(|_| match (trial % 3, random.below(3)) {
                    (0, _) | (1, 0) => f32::from_bits(random.bits() as u32),
                    (_, 1) => random.normal(),
                    _ => odd[random.below(odd.len() as u64) as usize],
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
