//! Sparse weights: the layout, what of it is refused, products on every instruction set, and models that have some.

use crate::common::products::product;
use crate::common::synthetic::{
    Shape, Synthetic, each_runtime, logits_in_batches, logits_in_pieces, logits_of_rows, runtime,
};
use crate::common::{Random, doubles, relative_error};
use flapjack::kernels::{ACTIVATION_BLOCK, Isa, Kernels, MatrixView, Phase, Pool, Runtime, Team};
use flapjack::model::{Batch, CacheType, KvCache, KvPool, Model, SparseWeightError};
use flapjack::prune::{LayerPlan, LayerRestoration, PruneErrorKind, apply_layer};
use flapjack::quant::{
    BlockType, GROUP, KeepMask, Layout, SparseError, check_sparse, decode_row, decode_sparse_row,
    encode_sparse, pack, sparse_kept, sparse_len,
};
use half::{bf16, f16};

fn sparse_types() -> impl Iterator<Item = BlockType> {
    BlockType::ALL.into_iter().filter(|t| t.has_sparse())
}

/// Where a native block begins with half-precision numbers, and how many.
fn halves_of(block_type: BlockType) -> usize {
    match block_type {
        BlockType::Q4_1 | BlockType::Q4_K => 2,
        t if t.is_float() => 0,
        _ => 1,
    }
}

/// Random rows in the native layout, with every code and scales of ordinary size.
fn random_rows(random: &mut Random, block_type: BlockType, rows: usize, cols: usize) -> Vec<u8> {
    let mut bytes = vec![0; rows * block_type.row_bytes(cols)];
    for block in bytes.chunks_exact_mut(block_type.block_bytes()) {
        let half = |random: &mut Random, size| f16::from_f64(random.normal() * size).to_le_bytes();
        match block_type {
            BlockType::F16 => block.copy_from_slice(&half(random, 1.0)),
            BlockType::BF16 => {
                block.copy_from_slice(&bf16::from_f64(random.normal()).to_le_bytes());
            }
            _ => {
                block.iter_mut().for_each(|b| *b = random.next() as u8);
                for i in 0..halves_of(block_type) {
                    block[2 * i..2 * i + 2].copy_from_slice(&half(random, 0.01));
                }
            }
        }
    }
    bytes
}

/// Whether a weight stays, by its row and column.
type Keeps = Box<dyn FnMut(&mut Random, usize, usize) -> bool>;

/// Which weights stay: half, two of four, none, all, few, or rows and blocks of all or none and between.
fn patterns(random: &mut Random, rows: usize, cols: usize) -> Vec<(&'static str, KeepMask)> {
    let mut of = |name, mut keeps: Keeps| {
        let keep = KeepMask::from_fn(rows, cols, |row, col| keeps(random, row, col));
        (name, keep)
    };
    let mut pair = (0, 0);
    vec![
        of("half", Box::new(|random, _, _| random.below(2) == 0)),
        of(
            "two of four",
            Box::new(move |random, _, col| {
                if col % 4 == 0 {
                    let first = random.below(4);
                    pair = (first, (first + 1 + random.below(3)) % 4);
                }
                col % 4 == pair.0 || col % 4 == pair.1
            }),
        ),
        of("none", Box::new(|_, _, _| false)),
        of("all", Box::new(|_, _, _| true)),
        of("few", Box::new(|random, _, _| random.below(30) == 0)),
        of(
            "blocks",
            Box::new(
                |random, row, col| match (row % 5, (row / GROUP + col / 32) % 3) {
                    (0, _) | (_, 0) => false,
                    (1, _) | (_, 1) => true,
                    _ => random.below(2) == 0,
                },
            ),
        ),
    ]
}

/// Odd heights, a single block, and for plain floats odd widths.
fn shapes(block_type: BlockType) -> Vec<(usize, usize)> {
    let block = block_type.block_len();
    match block {
        1 => vec![
            (1, 1),
            (3, 31),
            (16, 32),
            (17, 33),
            (40, 70),
            (48, 97),
            (33, 577),
            (35, 1030),
        ],
        32 => vec![
            (1, 32),
            (15, 64),
            (16, 32),
            (17, 96),
            (40, 160),
            (48, 544),
            (33, 2080),
        ],
        _ => vec![(1, 256), (15, 256), (16, 512), (40, 768), (33, 2304)],
    }
}

/// The rows' values, 0 where none stay.
fn masked(block_type: BlockType, native: &[u8], keep: &KeepMask) -> Vec<f32> {
    let (rows, cols) = (keep.rows(), keep.cols());
    let mut values = vec![0.0; rows * cols];
    for (row, values) in values.chunks_exact_mut(cols).enumerate() {
        let size = block_type.row_bytes(cols);
        decode_row(block_type, &native[row * size..][..size], values);
        for (col, value) in values.iter_mut().enumerate() {
            *value = if keep.keep(row, col) { *value } else { 0.0 };
        }
    }
    values
}

#[test]
fn what_stays_decodes_to_what_it_was_and_the_rest_to_nothing() {
    let mut random = Random::new(1);
    for block_type in sparse_types() {
        for (rows, cols) in shapes(block_type) {
            let native = random_rows(&mut random, block_type, rows, cols);
            for (name, keep) in patterns(&mut random, rows, cols) {
                let place = format!("{block_type:?} {rows}x{cols} {name}");
                let bytes = encode_sparse(block_type, &native, &keep);
                assert_eq!(bytes.len(), sparse_len(block_type, &keep), "{place}");
                check_sparse(block_type, rows, cols, &bytes).expect(&place);
                assert_eq!(
                    sparse_kept(block_type, rows, cols, &bytes),
                    keep.kept(),
                    "{place}"
                );
                let expected = masked(block_type, &native, &keep);
                let mut got = vec![f32::NAN; cols];
                for (row, expected) in expected.chunks_exact(cols).enumerate() {
                    decode_sparse_row(block_type, rows, &bytes, row, &mut got);
                    assert_eq!(got, expected, "{place}, row {row}");
                }
            }
        }
    }
}

#[test]
fn half_of_the_weights_take_about_half_of_the_bits_and_a_mask() {
    let mut random = Random::new(2);
    let (rows, cols) = (512, 2048);
    let keep = KeepMask::from_fn(rows, cols, |_, _| random.below(2) == 0);
    for (block_type, expected) in [
        (BlockType::F16, 9.0),
        (BlockType::BF16, 9.0),
        (BlockType::Q8_0, 5.5),
        (BlockType::Q4_0, 3.5),
        (BlockType::IQ4_NL, 3.5),
        (BlockType::Q4_K, 3.5),
        (BlockType::Q4_1, 4.0),
    ] {
        let bits = 8.0 * sparse_len(block_type, &keep) as f64 / (rows * cols) as f64;
        // Where codes share bytes, the longer half of a block decides.
        assert!(
            (bits - expected).abs() < 0.11,
            "{block_type:?}: {bits} bits a weight"
        );
    }
    // Of two of four, both halves have the same number.
    let keep = KeepMask::from_fn(rows, cols, |row, col| (row + col) % 4 < 2);
    let bits = 8.0 * sparse_len(BlockType::Q4_0, &keep) as f64 / (rows * cols) as f64;
    assert!((bits - 3.5).abs() < 0.03, "{bits} bits a weight");
}

/// The bytes as `docs/format.md` has them, on a matrix that can be written down.
#[test]
fn the_bytes_are_those_of_the_document() {
    // Two rows of Q8_0, of which row 0 keeps columns 0, 5 and 31, and row 1 column 1.
    let keep = KeepMask::from_fn(2, 32, |row, col| match row {
        0 => [0, 5, 31].contains(&col),
        _ => col == 1,
    });
    let mut native = Vec::new();
    for (row, scale) in [[0x11u8, 0x22], [0x33, 0x44]].into_iter().enumerate() {
        native.extend(scale);
        native.extend((0..32u8).map(|col| 100 * row as u8 + col));
    }
    let bytes = encode_sparse(BlockType::Q8_0, &native, &keep);
    let mut expected = vec![0u8; 64];
    expected[0] = 64; // where the only group begins
    expected[8..10].copy_from_slice(&192u16.to_le_bytes()); // and where it ends
    expected.extend([0x11, 0x22, 0x33, 0x44]); // a scale of each row
    expected.extend([0; 28]); // rows that are not there
    for (line, mask) in [(0, 1u64 | 1 << 5), (1, 1 << 1), (7, 1 << 3)] {
        expected.resize(64 + 32 + 8 * line, 0);
        expected.extend(mask.to_le_bytes());
    }
    expected.extend([0, 101, 5, 31]);
    expected.resize(192 + 1152, 0);
    assert_eq!(bytes, expected);

    // A row of Q4_0: columns 1 and 2 in the low halves, 17 in a high one, all exclusive-or 8.
    let keep = KeepMask::from_fn(1, 32, |_, col| [1, 2, 17].contains(&col));
    let mut native = vec![0x55, 0x66];
    native.extend((0..16u8).map(|i| i | (15 - i) << 4));
    let bytes = encode_sparse(BlockType::Q4_0, &native, &keep);
    assert_eq!(bytes[64..66], [0x55, 0x66]);
    assert_eq!(bytes[96], 0b0110);
    assert_eq!(bytes[96 + 32], 0b0010);
    assert_eq!(bytes[160..163], [(1 ^ 8) | (14 ^ 8) << 4, 2 ^ 8, 0]);

    // Three columns of one row of F16, of which the last is removed: bits of columns are 16 apart.
    let keep = KeepMask::from_fn(1, 3, |_, col| col < 2);
    let bytes = encode_sparse(BlockType::F16, &[1, 2, 3, 4, 5, 6], &keep);
    assert_eq!(bytes[64..72], [1, 0, 1, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[128..134], [1, 2, 3, 4, 0, 0]);
}

/// A matrix with a partial last group and, for plain floats, a partial last block.
fn small(block_type: BlockType) -> (usize, usize, Vec<u8>) {
    let mut random = Random::new(3);
    let (rows, cols) = match block_type.block_len() {
        1 => (19, 40),
        32 => (19, 64),
        _ => (19, 256),
    };
    let native = random_rows(&mut random, block_type, rows, cols);
    let keep = KeepMask::from_fn(rows, cols, |_, _| random.below(2) == 0);
    (rows, cols, encode_sparse(block_type, &native, &keep))
}

#[test]
fn damaged_bytes_are_refused_or_are_another_matrix() {
    for block_type in sparse_types() {
        let (rows, cols, sound) = small(block_type);
        let kept = sparse_kept(block_type, rows, cols, &sound);
        let mut bytes = sound.clone();
        let mut refused = 0;
        for at in 0..sound.len() {
            for change in [0x01, 0x10, 0x80, 0xff] {
                bytes[at] ^= change;
                match check_sparse(block_type, rows, cols, &bytes) {
                    Err(error) => {
                        assert!(!error.to_string().is_empty());
                        refused += 1;
                    }
                    Ok(()) => {
                        // A value or a scale is another one; that or a bit of a mask came elsewhere.
                        let now = sparse_kept(block_type, rows, cols, &bytes);
                        assert!(now.abs_diff(kept) <= 8, "{block_type:?} byte {at}");
                        let mut values = vec![0.0; cols];
                        (0..rows).for_each(|row| {
                            decode_sparse_row(block_type, rows, &bytes, row, &mut values);
                        });
                    }
                }
                bytes[at] = sound[at];
            }
        }
        // The index, zeros at its end and at the end of all.
        assert!(refused >= 4 * (64 + 1152), "{block_type:?}: {refused}");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let (rows, cols, sound) = small(BlockType::Q8_0);
    let check = |bytes: &[u8]| check_sparse(BlockType::Q8_0, rows, cols, bytes);
    let changed = |at: usize, to: u8| {
        let mut bytes = sound.clone();
        bytes[at] = to;
        check(&bytes).unwrap_err()
    };
    let group = 64;
    let masks = group + 32;
    let end = sound.len() - 1152;
    let error = changed(8, sound[8] ^ 1);
    assert!(
        matches!(error, SparseError::Index { entry: 1, .. }),
        "{error}"
    );
    // An entry far beyond the end, of which nothing may come of.
    let error = changed(15, 0xff);
    assert!(
        matches!(error, SparseError::Index { entry: 1, .. }),
        "{error}"
    );
    let error = changed(24, 1);
    assert_eq!(error, SparseError::Padding { at: 24 });
    let error = changed(end + 700, 7);
    assert_eq!(error, SparseError::Padding { at: end + 700 });
    // Masks that say more than there is: all of both blocks.
    let mut bytes = sound.clone();
    bytes[masks..masks + 64].fill(0xff);
    let error = check(&bytes).unwrap_err();
    assert!(
        matches!(
            error,
            SparseError::Index { .. } | SparseError::Values { .. } | SparseError::Outside { .. }
        ),
        "{error}"
    );
    // Rows 16 to 18 are the last ones; row 19 has bits 12 to 15.
    let second = u64::from_le_bytes(sound[8..16].try_into().unwrap()) as usize;
    let error = changed(second + 32 + 1, 0xf0);
    assert_eq!(error, SparseError::Outside { rows: 16..19 });
    // A scale of a row that is not there.
    let error = changed(second + 2 * 3, 1);
    assert_eq!(error, SparseError::Padding { at: second + 6 });
    // Cut anywhere, or longer.
    for len in 0..sound.len() {
        assert!(check(&sound[..len]).is_err(), "{len} bytes");
    }
    let longer = [&sound[..], &[0; 64]].concat();
    assert!(matches!(check(&longer), Err(SparseError::Length { .. })));
    // Another shape or type.
    assert!(check_sparse(BlockType::Q8_0, rows + 16, cols, &sound).is_err());
    assert!(check_sparse(BlockType::Q8_0, rows, cols + 32, &sound).is_err());
    assert!(check_sparse(BlockType::Q4_0, rows, cols, &sound).is_err());
    for (rows, cols) in [
        (usize::MAX, 32),
        (usize::MAX / 8, 32),
        (19, usize::MAX / 64 * 32),
    ] {
        assert!(check_sparse(BlockType::Q8_0, rows, cols, &sound).is_err());
    }
    assert!(matches!(
        check_sparse(BlockType::Q8_0, rows, 33, &sound),
        Err(SparseError::Columns { cols: 33, .. })
    ));
    assert_eq!(
        check_sparse(BlockType::Q6_K, rows, 256, &sound),
        Err(SparseError::Type(BlockType::Q6_K))
    );
    // Columns beyond the last one, and codes in the half of a byte that has none.
    let (rows, cols, sound) = small(BlockType::BF16);
    let mut bytes = sound.clone();
    bytes[64 + 8..64 + 16].fill(0);
    assert!(check_sparse(BlockType::BF16, rows, cols, &bytes).is_err());
    let native = random_rows(&mut Random::new(4), BlockType::Q4_1, 1, 32);
    let keep = KeepMask::from_fn(1, 32, |_, col| col < 3);
    let mut bytes = encode_sparse(BlockType::Q4_1, &native, &keep);
    bytes[64 + 64 + 64 + 2] |= 0x30;
    assert_eq!(
        check_sparse(BlockType::Q4_1, 1, 32, &bytes),
        Err(SparseError::Padding {
            at: 64 + 64 + 64 + 2
        })
    );
}

fn every_isa() -> impl Iterator<Item = Kernels> {
    Isa::available().filter_map(Kernels::for_isa)
}

/// What 8 bits leave of a token's activations.
fn through_8_bits(kernels: Kernels, x: &[f32]) -> Vec<f64> {
    let blocks = x.len() / ACTIVATION_BLOCK;
    let (mut q, mut scales, mut sums) = (vec![0; x.len()], vec![0.0; blocks], vec![0.0; blocks]);
    kernels.quantize(x, &mut q, &mut scales, &mut sums, &mut vec![0; 2 * blocks]);
    let scale = |i: usize| f64::from(scales[i / ACTIVATION_BLOCK]);
    q.iter()
        .enumerate()
        .map(|(i, q)| f64::from(*q) * scale(i))
        .collect()
}

#[test]
fn products_are_those_of_the_weights_that_stay() {
    let mut random = Random::new(5);
    for kernels in every_isa() {
        for block_type in sparse_types() {
            for (rows, cols) in shapes(block_type) {
                let native = random_rows(&mut random, block_type, rows, cols);
                for (name, keep) in patterns(&mut random, rows, cols) {
                    let bytes = encode_sparse(block_type, &native, &keep);
                    let values = masked(block_type, &native, &keep);
                    let weights = MatrixView::new(block_type, Layout::Sparse, rows, cols, &bytes);
                    for (tokens, phase) in [
                        (1, Phase::Decode),
                        (3, Phase::Decode),
                        (1, Phase::Prefill),
                        (18, Phase::Prefill),
                    ] {
                        let x = random.normals(tokens * cols, 1.0);
                        let out = product(&Team::solo(kernels), weights, &x, phase);
                        for t in 0..tokens {
                            let x = &x[t * cols..][..cols];
                            let exact = doubles(x);
                            let form = match block_type.is_float() {
                                true => exact.clone(),
                                false => through_8_bits(kernels, x),
                            };
                            for row in 0..rows {
                                let got = f64::from(out[t * rows + row]);
                                let row_values = &values[row * cols..][..cols];
                                let fits = |x: &[f64], tolerance: f64| {
                                    let terms = row_values.iter().zip(x);
                                    let (sum, size) = terms
                                        .map(|(w, x)| f64::from(*w) * x)
                                        .fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                                    // Codes and minimum are summed apart, and may nearly cancel.
                                    (got - sum).abs() <= tolerance * size + 1e-5
                                };
                                // bfloat16 rounds weights and activations by up to 2⁻⁸ each.
                                let tiles = phase == Phase::Prefill
                                    && matches!(kernels.isa(), Isa::Avx512Bf16 | Isa::Amx);
                                assert!(
                                    fits(&form, 8e-6) || (tiles && fits(&exact, 8e-3)),
                                    "{kernels:?} {block_type:?} {rows}x{cols} {name} {phase:?}, token {t} of {tokens}, row {row}: {got}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The rows with a code for 0 in the place of every weight that is removed, of types that have one.
fn with_zeros(block_type: BlockType, native: &[u8], keep: &KeepMask) -> Vec<u8> {
    let mut bytes = native.to_vec();
    let row_bytes = block_type.row_bytes(keep.cols());
    for row in 0..keep.rows() {
        for col in (0..keep.cols()).filter(|col| !keep.keep(row, *col)) {
            let block = &mut bytes[row * row_bytes + col / 32 * block_type.block_bytes()..];
            match block_type {
                BlockType::F16 | BlockType::BF16 => {
                    bytes[row * row_bytes + 2 * col..][..2].fill(0);
                }
                BlockType::Q8_0 => block[2 + col % 32] = 0,
                BlockType::Q4_0 => {
                    let shift = col % 32 / 16 * 4;
                    let byte = &mut block[2 + col % 16];
                    *byte = *byte & !(15 << shift) | 8 << shift;
                }
                _ => panic!("{block_type:?} has no code for 0"),
            }
        }
    }
    bytes
}

/// Types that can hold 0 exactly.
const WITH_ZERO: [BlockType; 4] = [
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q8_0,
    BlockType::Q4_0,
];

#[test]
fn products_are_to_the_bit_those_of_packed_weights_with_zeros() {
    let mut random = Random::new(6);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    for kernels in every_isa() {
        for block_type in WITH_ZERO {
            let cols = if block_type.is_float() { 1070 } else { 2144 };
            for (rows, tokens) in [(48, 1), (16, 2), (80, 5), (96, 13), (112, 33)] {
                let native = random_rows(&mut random, block_type, rows, cols);
                let x = random.normals(tokens * cols, 1.0);
                for (name, keep) in patterns(&mut random, rows, cols) {
                    let sparse = encode_sparse(block_type, &native, &keep);
                    let sparse = MatrixView::new(block_type, Layout::Sparse, rows, cols, &sparse);
                    let mut packed = with_zeros(block_type, &native, &keep);
                    pack(block_type, cols, &mut packed);
                    let packed = MatrixView::new(block_type, Layout::Packed, rows, cols, &packed);
                    for phase in [Phase::Prefill, Phase::Decode] {
                        for pool in &pools {
                            let of = |w| pool.region(kernels, |team| product(team, w, &x, phase));
                            assert!(
                                of(sparse) == of(packed),
                                "{kernels:?} {block_type:?} {rows}x{cols} {name} {phase:?} {tokens}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_is_the_same_alone_and_among_others_and_however_rows_are_shared_out() {
    let mut random = Random::new(7);
    let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
    for kernels in every_isa() {
        for block_type in sparse_types() {
            let cols = match block_type.block_len() {
                1 => 583,
                32 => 2176,
                _ => 2304,
            };
            for rows in [9, 48, 71] {
                let native = random_rows(&mut random, block_type, rows, cols);
                let x = random.normals(17 * cols, 1.0);
                let (_, keep) = patterns(&mut random, rows, cols).swap_remove(0);
                let bytes = encode_sparse(block_type, &native, &keep);
                let weights = MatrixView::new(block_type, Layout::Sparse, rows, cols, &bytes);
                for phase in [Phase::Prefill, Phase::Decode] {
                    let alone: Vec<Vec<f32>> = x
                        .chunks_exact(cols)
                        .map(|x| product(&Team::solo(kernels), weights, x, phase))
                        .collect();
                    for (pool, tokens) in pools.iter().zip([[1, 2, 4], [5, 8, 9], [3, 16, 17]]) {
                        for count in tokens {
                            let together = pool.region(kernels, |team| {
                                product(team, weights, &x[..count * cols], phase)
                            });
                            assert!(
                                together == alone[..count].concat(),
                                "{kernels:?} {block_type:?} {rows} rows, {phase:?}, {count} tokens"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Kernels that went by damaged masks or offsets would read from anywhere. That they do not, `vendor/flapkern/tests/check.c`
/// makes sure of with memory that ends where the bytes end.
#[test]
fn kernels_compute_something_of_damaged_bytes() {
    let mut random = Random::new(8);
    for block_type in sparse_types() {
        let (rows, cols, sound) = small(block_type);
        let x = random.normals(2 * cols, 1.0);
        for _ in 0..200 {
            let mut bytes = sound.clone();
            let from = random.below(bytes.len());
            let len = 1 + random.below(40).min(bytes.len() - from - 1);
            bytes[from..from + len]
                .iter_mut()
                .for_each(|b| *b = random.next() as u8);
            let weights = MatrixView::new(block_type, Layout::Sparse, rows, cols, &bytes);
            for kernels in every_isa() {
                for phase in [Phase::Prefill, Phase::Decode] {
                    product(&Team::solo(kernels), weights, &x, phase);
                    product(&Team::solo(kernels), weights, &x[..cols], phase);
                }
            }
        }
    }
}

/// Widths that fill groups, and heads of whole blocks.
fn synthetic(block_type: BlockType) -> Synthetic {
    let long = block_type.block_len() == 256;
    Synthetic::new(Shape {
        block_type,
        embedding: if long { 256 } else { 128 },
        head_dim: if long { 64 } else { 32 },
        rope_dim: if long { 64 } else { 32 },
        channels: if long { vec![256, 512] } else { vec![256, 352] },
        biases: true,
        ..Shape::default()
    })
}

/// Half of a projection's weights.
fn half_of(model: &Model, l: usize, projection: usize) -> KeepMask {
    let weight = &model.layers[l].linears()[projection].weight;
    let mut random = Random::new((100 * l + projection) as u64);
    KeepMask::from_fn(weight.rows, weight.cols, |_, _| random.below(2) == 0)
}

/// The least bytes of a sparse matrix are many for a small one, so that the smallest stay dense.
fn make_sparse(model: &mut Model, runtime: &Runtime) -> usize {
    let mut count = 0;
    for l in 0..model.layers.len() {
        for projection in 0..7 {
            let keep = half_of(model, l, projection);
            match model.make_sparse(runtime, l, projection, &keep) {
                Ok(()) => count += 1,
                Err(SparseWeightError::Larger { sparse, dense, .. }) => {
                    assert!(sparse > dense - 64)
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    count
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_model_with_sparse_weights_computes_what_it_computes_with_zeros() {
    for block_type in [BlockType::F16, BlockType::Q8_0] {
        let source = synthetic(block_type);
        let tokens = Random::new(9).tokens(70, source.shape.vocabulary);
        for (runtime, _) in each_runtime(2, 0.0) {
            for packed_before in [false, true] {
                let mut sparse = source.load_packed_if(packed_before);
                let before = (sparse.bytes(), sparse.layer_parameters());
                assert!(make_sparse(&mut sparse, &runtime) >= 6, "{block_type:?}");
                assert!(sparse.bytes() < before.0 && sparse.bytes_per_token() <= sparse.bytes());
                assert_eq!(sparse.layer_parameters(), before.1);
                let named: Vec<String> = sparse.sparse_weights().map(|w| w.name.clone()).collect();
                sparse.pack(&runtime);

                let mut zeros = source.load();
                for l in 0..2 {
                    for projection in 0..7 {
                        let weight = zeros.layers[l].linears()[projection].weight.clone();
                        let is = &sparse.layers[l].linears()[projection].weight;
                        assert_eq!(is.is_sparse(), named.contains(&is.name));
                        if !is.is_sparse() {
                            assert_eq!(is.kept(&sparse.map), is.parameters());
                            continue;
                        }
                        let keep = half_of(&zeros, l, projection);
                        assert_eq!(is.kept(&sparse.map), keep.kept());
                        let bytes = &mut zeros.map.bytes_mut()[weight.range.clone()];
                        let replaced = with_zeros(block_type, bytes, &keep);
                        bytes.copy_from_slice(&replaced);
                        assert_eq!(is.decode(&sparse.map), weight.decode(&zeros.map));
                    }
                }
                zeros.pack(&runtime);
                for pieces in [
                    vec![(70, Phase::Prefill)],
                    vec![
                        (40, Phase::Prefill),
                        (20, Phase::Prefill),
                        (10, Phase::Decode),
                    ],
                    vec![(1, Phase::Decode); 70],
                ] {
                    let pieces: Vec<(usize, Phase)> = pieces
                        .into_iter()
                        .flat_map(|(n, phase)| match phase {
                            Phase::Prefill => vec![(n, phase)],
                            Phase::Decode => vec![(1, phase); n],
                        })
                        .collect();
                    let of = |model| bits(&logits_in_pieces(model, &runtime, &tokens, &pieces));
                    assert!(
                        of(&sparse) == of(&zeros),
                        "{block_type:?} {:?} packed before: {packed_before}",
                        runtime.kernels.isa()
                    );
                }
                // What is sparse is neither packed nor unpacked.
                sparse.unpack(&runtime);
                assert_eq!(sparse.sparse_weights().count(), named.len());
            }
        }
    }
}

#[test]
fn a_model_of_every_sparse_type_computes_what_its_weights_say() {
    for block_type in sparse_types() {
        let mut source = synthetic(block_type);
        let tokens = Random::new(10).tokens(24, source.shape.vocabulary);
        let mut model = source.load();
        let made = make_sparse(&mut model, &runtime(2));
        assert!(made >= 2, "{block_type:?}: {made}");
        for (layer, reference) in model.layers.iter().zip(&mut source.reference.layers) {
            let references = [
                &mut reference.q,
                &mut reference.k,
                &mut reference.v,
                &mut reference.o,
                &mut reference.gate,
                &mut reference.up,
                &mut reference.down,
            ];
            for (linear, reference) in layer.linears().into_iter().zip(references) {
                let values = doubles(&linear.weight.decode(&model.map));
                let stay = values.iter().zip(&reference.weight);
                assert!(stay.clone().all(|(new, old)| new == old || *new == 0.0));
                reference.weight = values;
            }
        }
        let (expected, _) = source.reference.forward(&tokens);
        for (runtime, _) in each_runtime(2, 0.0) {
            for split in [vec![24], vec![1; 24]] {
                let got = logits_in_batches(&model, &runtime, &tokens, &split);
                let error = relative_error(&got, &expected);
                let isa = runtime.kernels.isa();
                assert!(error < 3e-2, "{block_type:?} {isa:?} {split:?}: {error}");
            }
        }
    }
}

#[test]
fn sequences_of_a_sparse_model_do_not_change_each_other() {
    for block_type in [BlockType::F16, BlockType::Q4_1, BlockType::Q8_0] {
        let mut model = synthetic(block_type).load();
        make_sparse(&mut model, &runtime(2));
        let vocabulary = model.config.vocabulary;
        let texts: Vec<Vec<u32>> = (0..5)
            .map(|i| Random::new(20 + i).tokens(3 + 9 * i as usize + 6, vocabulary))
            .collect();
        for (runtime, _) in each_runtime(2, 0.0) {
            let pool = KvPool::new(&model, CacheType::F16).unwrap();
            let mut caches: Vec<KvCache> = texts.iter().map(|_| pool.cache(100)).collect();
            let mut together = vec![Vec::new(); texts.len()];
            let mut batch = Batch::new();
            for (s, text) in texts.iter().enumerate() {
                batch.add_prompt(s, 0, &text[..text.len() - 6], 0..0);
            }
            let mut sequences: Vec<&mut KvCache> = caches.iter_mut().collect();
            logits_of_rows(
                &model,
                &runtime,
                batch.rows(),
                &mut sequences,
                Phase::Decode,
            );
            for step in 0..6 {
                batch.clear();
                for (s, text) in texts.iter().enumerate() {
                    let at = text.len() - 6 + step;
                    batch.add_generated(s, at, text[at]);
                }
                let logits = logits_of_rows(
                    &model,
                    &runtime,
                    batch.rows(),
                    &mut sequences,
                    Phase::Decode,
                );
                for (s, logits) in logits.chunks_exact(vocabulary).enumerate() {
                    together[s].extend(bits(logits));
                }
            }
            for (s, text) in texts.iter().enumerate() {
                let mut pieces = vec![(text.len() - 6, Phase::Prefill)];
                pieces.extend([(1, Phase::Decode); 6]);
                let alone = logits_in_pieces(&model, &runtime, text, &pieces);
                assert!(
                    bits(&alone[(text.len() - 6) * vocabulary..]) == together[s],
                    "{block_type:?} {:?} sequence {s}",
                    runtime.kernels.isa()
                );
            }
        }
    }
}

#[test]
fn a_weight_that_cannot_be_sparse_stays_as_it_was() {
    let runtime = runtime(2);
    let refused = |block_type: BlockType, keep: fn(usize, usize) -> KeepMask| {
        let mut model = synthetic(block_type).load();
        let up = model.layers[1].up.weight.clone();
        let bytes = model.map.bytes().to_vec();
        let error = model
            .make_sparse(&runtime, 1, 5, &keep(up.rows, up.cols))
            .unwrap_err();
        assert_eq!(model.layers[1].up.weight, up);
        assert!(model.map.bytes() == bytes);
        error
    };
    let error = refused(BlockType::F32, KeepMask::new_full);
    assert_eq!(
        error.to_string(),
        "blk.1.ffn_up.weight is of type F32, which has no sparse form"
    );
    let error = refused(BlockType::Q8_0, KeepMask::new_full);
    assert!(
        matches!(&error, SparseWeightError::Larger { sparse, dense, .. } if sparse > dense),
        "{error}"
    );

    let mut model = synthetic(BlockType::F16).load();
    let keep = half_of(&model, 1, 5);
    model.make_sparse(&runtime, 1, 5, &keep).unwrap();
    let error = model.make_sparse(&runtime, 1, 5, &keep).unwrap_err();
    assert_eq!(error.to_string(), "blk.1.ffn_up.weight is sparse already");
    // Widths are pruned before.
    let layer = &model.layers[0];
    let plan = LayerPlan {
        heads: (0..layer.heads()).collect(),
        channels: (0..layer.channels() - 32).collect(),
        types: [None; 2],
    };
    let before = model.map.bytes().to_vec();
    let restored = LayerRestoration::default();
    let error = apply_layer(&mut model, &runtime, 0, &plan, &restored).unwrap_err();
    assert!(
        matches!(&error.kind, PruneErrorKind::Sparse(name) if name == "blk.1.ffn_up.weight"),
        "{error}"
    );
    assert!(error.touched.is_empty() && model.map.bytes() == before);
    assert_eq!(model.layers[0].channels(), plan.channels.len() + 32);
}
