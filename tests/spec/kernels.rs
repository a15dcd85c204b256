//! Every kernel, on every instruction set that this machine has, against naive code.

use crate::common::{Random, doubles};
use flapjack::kernels::{
    ACTIVATION_BLOCK, Activations, AttentionShape, Gate, Isa, KV_BLOCK, Keep, Kernels, KvBlocks,
    KvLayout, MatrixView, Moments, Phase, Pool, Precision, Product, Reading, Scores, Span, Team,
    Tokens, attention, matmul, matmul_add, matmul_gated, matmul_then,
};
use flapjack::quant::{
    BlockType, GROUP, KeepMask, Layout, decode_row, encode_row, encode_sparse, pack,
};
use half::{bf16, f16};

fn every_isa() -> Vec<Kernels> {
    let all: Vec<Kernels> = Isa::available().filter_map(Kernels::for_isa).collect();
    println!("instruction sets tested: {all:?}");
    all
}

/// Widths that are whole blocks, and for float types also odd ones.
fn widths(block_type: BlockType) -> Vec<usize> {
    match block_type.block_len() {
        1 => vec![
            32, 64, 96, 160, 576, 1056, 1, 2, 3, 7, 17, 45, 65, 131, 577, 1030,
        ],
        32 => vec![32, 64, 96, 160, 576, 1056],
        _ => vec![256, 768, 1280],
    }
}

/// Where a block of a type has its half-precision numbers.
fn halves_of(block_type: BlockType) -> &'static [usize] {
    match block_type {
        BlockType::Q8_0
        | BlockType::Q4_0
        | BlockType::Q5_0
        | BlockType::IQ4_NL
        | BlockType::IQ4_XS
        | BlockType::IQ1_S
        | BlockType::IQ2_XXS
        | BlockType::IQ2_XS
        | BlockType::IQ2_S
        | BlockType::IQ3_XXS
        | BlockType::IQ3_S => &[0],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q8_1 | BlockType::Q4_K | BlockType::Q5_K => {
            &[0, 2]
        }
        BlockType::TQ1_0 => &[52],
        BlockType::TQ2_0 => &[64],
        BlockType::Q2_K => &[80, 82],
        BlockType::Q3_K => &[108],
        BlockType::Q6_K => &[208],
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => &[],
        // See `set_scale`.
        BlockType::MXFP4 | BlockType::IQ1_M => &[],
    }
}

/// Sets the scale of a block of a type that has it neither in two bytes nor as a number in half precision.
fn set_scale(block_type: BlockType, block: &mut [u8], scale: f16) {
    match block_type {
        BlockType::MXFP4 => block[0] = 119 + (scale.to_bits() % 5) as u8,
        BlockType::IQ1_M => {
            for word in 0..4 {
                let high = (scale.to_bits() >> (4 * word) & 15) as u8;
                let byte = &mut block[49 + 2 * word];
                *byte = *byte & 15 | high << 4;
            }
        }
        _ => {}
    }
}

/// Random rows in a block format, and what they decode to. Blocks are random bytes, so that every code and packed scale
/// occurs, with half-precision numbers of ordinary size, and some blocks have scales of 0.
fn random_matrix(
    random: &mut Random,
    block_type: BlockType,
    rows: usize,
    cols: usize,
) -> (Vec<u8>, Vec<f32>) {
    let row_bytes = block_type.row_bytes(cols);
    let mut bytes = vec![0u8; rows * row_bytes];
    let mut decoded = vec![0.0; rows * cols];
    for (row, decoded) in bytes
        .chunks_exact_mut(row_bytes)
        .zip(decoded.chunks_exact_mut(cols))
    {
        if block_type.is_float() {
            encode_row(block_type, &random.normals(cols, 1.0), row);
        } else {
            for block in row.chunks_exact_mut(block_type.block_bytes()) {
                block.iter_mut().for_each(|b| *b = random.next() as u8);
                let zero = random.below(7) == 0;
                for &at in halves_of(block_type) {
                    let half = f16::from_f32(if zero {
                        0.0
                    } else {
                        random.normal() as f32 * 0.01
                    });
                    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
                }
                set_scale(
                    block_type,
                    block,
                    f16::from_f32(random.normal() as f32 * 0.01),
                );
            }
        }
        decode_row(block_type, row, decoded);
    }
    (bytes, decoded)
}

/// W · x in double precision, and the sum of the terms' sizes, which rounding errors are in proportion to.
fn naive_product(row: &[f32], x: &[f64]) -> (f64, f64) {
    row.iter()
        .zip(x)
        .map(|(w, x)| f64::from(*w) * x)
        .fold((0.0, 0.0), |(sum, size), term| {
            (sum + term, size + term.abs())
        })
}

fn to_bf16(x: f64) -> f64 {
    bf16::from_f32(x as f32).to_f64()
}

/// Whether `got` is W · x with W in bfloat16. What is decoded with one rounding less may fall to the other side of a
/// boundary once in a while.
fn fits_in_bf16(row: &[f32], x: &[f64], got: f64) -> bool {
    let row: Vec<f32> = row.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
    let (expected, size) = naive_product(&row, x);
    let largest = row
        .iter()
        .zip(x)
        .map(|(w, x)| (f64::from(*w) * x).abs())
        .fold(0.0, f64::max);
    (got - expected).abs() <= 4e-6 * size + largest / 256.0 + 1e-12
}

/// What an activation row is after its trip through 8 bits, as the kernels themselves quantise it.
fn through_8_bits(kernels: Kernels, x: &[f32]) -> Vec<f64> {
    let blocks = x.len() / ACTIVATION_BLOCK;
    let (mut q, mut scales, mut sums) = (vec![0; x.len()], vec![0.0; blocks], vec![0.0; blocks]);
    let mut code_sums = vec![0; 2 * blocks];
    kernels.quantize(x, &mut q, &mut scales, &mut sums, &mut code_sums);
    q.iter()
        .enumerate()
        .map(|(i, q)| f64::from(*q) * f64::from(scales[i / ACTIVATION_BLOCK]))
        .collect()
}

/// The matrix in every layout that its type has.
fn layouts(block_type: BlockType, cols: usize, native: &[u8]) -> Vec<(Layout, Vec<u8>)> {
    let mut packed = native.to_vec();
    pack(block_type, cols, &mut packed);
    let mut layouts = vec![(Layout::Native, native.to_vec()), (Layout::Packed, packed)];
    if block_type.has_sparse() {
        // No weight is missing; those of which some are, `sparse.rs` has.
        let rows = native.len() / block_type.row_bytes(cols);
        let sparse = encode_sparse(block_type, native, &KeepMask::new_full(rows, cols));
        layouts.push((Layout::Sparse, sparse));
    }
    layouts
}

const PHASES: [Phase; 2] = [Phase::Prefill, Phase::Decode];

fn tokens_of(phase: Phase, count: usize) -> Tokens {
    Tokens { count, phase }
}

/// Rows of so many values as the input of a matrix.
fn activations(x: &[f32], cols: usize, phase: Phase) -> Activations {
    let mut activations = Activations::default();
    activations
        .begin(tokens_of(phase, x.len() / cols), cols)
        .copy_from_slice(x);
    activations
}

/// W X for one matrix, `[tokens, rows]`.
fn product_of(team: &Team, weights: MatrixView, x: &mut Activations) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.tokens().count * weights.rows()];
    let product = Product {
        weights,
        out: &mut out,
    };
    matmul(team, x, &mut [product]);
    out
}

/// W X for one matrix on one thread, `[tokens, rows]`.
fn product(kernels: Kernels, weights: MatrixView, x: &[f32], phase: Phase) -> Vec<f32> {
    let mut x = activations(x, weights.cols(), phase);
    product_of(&Team::solo(kernels), weights, &mut x)
}

#[test]
fn products_of_every_type_width_and_batch() {
    let mut random = Random::new(1);
    for kernels in every_isa() {
        for block_type in BlockType::ALL {
            for cols in widths(block_type) {
                for (rows, tokens) in [
                    (1, 1),
                    (2, 2),
                    (15, 7),
                    (31, 8),
                    (33, 9),
                    (70, 1),
                    (40, 13),
                    (16, 16),
                    (65, 31),
                    (48, 32),
                    (35, 65),
                ] {
                    let (bytes, decoded) = random_matrix(&mut random, block_type, rows, cols);
                    let x = random.normals(tokens * cols, 1.0);
                    let layouts = layouts(block_type, cols, &bytes);
                    for (phase, (layout, bytes)) in PHASES
                        .into_iter()
                        .flat_map(|phase| layouts.iter().map(move |layout| (phase, layout)))
                    {
                        let weights = MatrixView::new(block_type, *layout, rows, cols, bytes);
                        let out = product(kernels, weights, &x, phase);
                        for t in 0..tokens {
                            let exact = doubles(&x[t * cols..][..cols]);
                            let rounded = (!block_type.is_float())
                                .then(|| through_8_bits(kernels, &x[t * cols..][..cols]));
                            let half: Vec<f64> = exact.iter().map(|x| to_bf16(*x)).collect();
                            for r in 0..rows {
                                let row = &decoded[r * cols..][..cols];
                                let got = f64::from(out[t * rows + r]);
                                let fits = |x: &[f64]| {
                                    let (expected, size) = naive_product(row, x);
                                    (got - expected).abs() <= 4e-6 * size + 1e-12
                                };
                                // A phase may use any form of the activations; all are exact products of what they use.
                                assert!(
                                    fits(&exact)
                                        || rounded.as_deref().is_some_and(fits)
                                        || fits_in_bf16(row, &half, got),
                                    "{kernels:?} {block_type:?} {layout:?} {phase:?} {rows}x{cols}, {t} of {tokens}, row {r}: {got}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn several_products_of_one_input_on_several_threads_equal_one_by_one() {
    let mut random = Random::new(2);
    for kernels in every_isa() {
        for (phase, tokens) in PHASES
            .into_iter()
            .flat_map(|phase| [1, 3, 20].map(|tokens| (phase, tokens)))
        {
            let cols = 96;
            let shapes = [
                (70, BlockType::Q4_1),
                (1, BlockType::F16),
                (129, BlockType::Q8_0),
                (0, BlockType::F32),
            ];
            let matrices: Vec<_> = shapes
                .iter()
                .map(|(rows, t)| random_matrix(&mut random, *t, *rows, cols).0)
                .collect();
            let x = random.normals(tokens * cols, 1.0);
            let packed: Vec<_> = shapes
                .iter()
                .zip(&matrices)
                .map(|((_, t), bytes)| layouts(*t, cols, bytes).pop().expect("one layout at least"))
                .collect();
            let run = |team: &Team, together: bool| -> Vec<Vec<f32>> {
                let mut outs: Vec<Vec<f32>> = shapes
                    .iter()
                    .map(|(r, _)| vec![f32::NAN; r * tokens])
                    .collect();
                let mut input = activations(&x, cols, phase);
                let mut products: Vec<Product> = shapes
                    .iter()
                    .zip(&packed)
                    .zip(&mut outs)
                    .map(|(((rows, t), (layout, bytes)), out)| Product {
                        weights: MatrixView::new(*t, *layout, *rows, cols, bytes),
                        out,
                    })
                    .collect();
                if together {
                    matmul(team, &mut input, &mut products);
                } else {
                    for product in products {
                        matmul(team, &mut input, &mut [product]);
                    }
                }
                outs
            };
            let expected = run(&Team::solo(kernels), false);
            for threads in [2, 3, 7] {
                let pool = Pool::new(threads).unwrap();
                assert_eq!(
                    pool.region(kernels, |team| run(team, true)),
                    expected,
                    "{kernels:?} {phase:?} {threads} threads"
                );
            }
        }
    }
}

#[test]
fn extreme_scales_and_denormals() {
    for kernels in every_isa() {
        for block_type in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
            // Scales: the least denormal, the largest finite, negative, zero; every code.
            for scale in [0x0001u16, 0x03ff, 0x0400, 0x7bff, 0xbc00, 0x0000, 0x8001] {
                let cols = 96;
                let row_bytes = block_type.row_bytes(cols);
                let mut bytes = vec![0u8; row_bytes];
                for (i, block) in bytes.chunks_exact_mut(block_type.block_bytes()).enumerate() {
                    let header = if block_type == BlockType::Q4_1 { 4 } else { 2 };
                    block[..2].copy_from_slice(&scale.to_le_bytes());
                    if header == 4 {
                        block[2..4].copy_from_slice(&0xc000u16.to_le_bytes());
                    }
                    for (j, code) in block[header..].iter_mut().enumerate() {
                        *code = (i * 89 + j * 37) as u8;
                    }
                    // −128 is a code that encoders do not write but files may hold.
                    block[header] = 0x80;
                }
                let mut decoded = vec![0.0; cols];
                decode_row(block_type, &bytes, &mut decoded);
                for size in [1e-40f32, 1e-20, 1.0, 1e20] {
                    let x: Vec<f32> = (0..cols).map(|i| size * ((i as f32) - 40.5)).collect();
                    for (phase, tokens) in [
                        (Phase::Decode, 1),
                        (Phase::Prefill, 1),
                        (Phase::Prefill, 12),
                    ] {
                        let many: Vec<f32> = (0..tokens).flat_map(|_| x.clone()).collect();
                        let rows: Vec<u8> = (0..GROUP).flat_map(|_| bytes.clone()).collect();
                        let out: Vec<f32> = layouts(block_type, cols, &rows)
                            .iter()
                            .flat_map(|(layout, bytes)| {
                                product(
                                    kernels,
                                    MatrixView::new(block_type, *layout, GROUP, cols, bytes),
                                    &many,
                                    phase,
                                )
                            })
                            .collect();
                        let exact = doubles(&x);
                        let (expected, sizes) = naive_product(&decoded, &exact);
                        for got in out {
                            // 8-bit activations are off by half a step of the largest value, and denormal ones may pass for 0.
                            let allowed = if size < 1e-36 { sizes } else { 0.02 * sizes };
                            let error = (f64::from(got) - expected).abs();
                            assert!(
                                error <= allowed + 1e-38,
                                "{kernels:?} {block_type:?} {scale:#06x}, x {size:e}, {phase:?}, {tokens}: {got} for {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_does_not_come_out_finite() {
    for kernels in every_isa() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for block_type in BlockType::ALL {
                let (bytes, _) = random_matrix(&mut Random::new(3), block_type, 20, 256);
                for (phase, tokens) in [
                    (Phase::Decode, 1),
                    (Phase::Decode, 9),
                    (Phase::Prefill, 1),
                    (Phase::Prefill, 9),
                ] {
                    let mut x = vec![0.5f32; tokens * 256];
                    x[37] = bad;
                    for (layout, bytes) in layouts(block_type, 256, &bytes) {
                        let out = product(
                            kernels,
                            MatrixView::new(block_type, layout, 20, 256, &bytes),
                            &x,
                            phase,
                        );
                        assert!(
                            out[..20].iter().all(|v| !v.is_finite()),
                            "{kernels:?} {block_type:?} {layout:?} {phase:?} {bad}: {:?}",
                            &out[..20]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn decoding_equals_the_scalar_definition() {
    let mut random = Random::new(4);
    for kernels in every_isa() {
        for block_type in BlockType::ALL {
            for cols in widths(block_type) {
                let (bytes, decoded) = random_matrix(&mut random, block_type, 1, cols);
                let mut out = vec![f32::NAN; cols];
                kernels.dequantize(block_type, &bytes, &mut out);
                for (a, b) in out.iter().zip(&decoded) {
                    // A fused multiplication and addition may round once less.
                    assert!(
                        (a - b).abs() <= 1e-6 * b.abs().max(1e-3),
                        "{kernels:?} {block_type:?}"
                    );
                }
            }
        }
        // Every half-precision number.
        let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut out = vec![0.0; 1 << 16];
        kernels.dequantize(BlockType::F16, &halves, &mut out);
        for (bits, got) in out.iter().enumerate() {
            let expected = f16::from_bits(bits as u16).to_f32();
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()),
                "{kernels:?} half {bits:#06x}"
            );
        }
    }
}

#[test]
fn rounding_to_half_precision_is_to_nearest_even() {
    let mut random = Random::new(5);
    let mut values: Vec<f32> = (0..=u16::MAX)
        .map(|bits| f16::from_bits(bits).to_f32())
        .filter(|v| !v.is_nan())
        .collect();
    // Between neighbours, and exactly half-way.
    let between: Vec<f32> = values
        .iter()
        .filter(|v| v.is_finite())
        .flat_map(|v| {
            let next = f16::from_bits(f16::from_f32(*v).to_bits().wrapping_add(1)).to_f32();
            let middle = (f64::from(*v) + f64::from(next)) / 2.0;
            [middle as f32, v + (next - v) * random.uniform() as f32]
        })
        .filter(|v| !v.is_nan())
        .collect();
    values.extend(between);
    values.extend([
        65519.9,
        65520.0,
        1e30,
        -1e30,
        1e-30,
        f32::MIN_POSITIVE,
        1e-45,
    ]);
    values.truncate(values.len() / 16 * 16 + 3);
    for kernels in every_isa() {
        let mut out = vec![f16::ZERO; values.len()];
        kernels.to_half(&values, &mut out);
        for (v, got) in values.iter().zip(&out) {
            assert_eq!(
                got.to_bits(),
                f16::from_f32(*v).to_bits(),
                "{kernels:?} {v:e}"
            );
        }
    }
}

#[test]
fn activations_are_quantised_to_within_half_a_step() {
    let mut random = Random::new(6);
    for kernels in every_isa() {
        for scale in [1.0, 1e-30, 1e30] {
            let mut x = random.normals(ACTIVATION_BLOCK * 9, scale);
            x[..ACTIVATION_BLOCK].fill(0.0);
            let blocks = x.len() / ACTIVATION_BLOCK;
            let (mut q, mut scales, mut sums) = (
                vec![1i8; x.len()],
                vec![f32::NAN; blocks],
                vec![f32::NAN; blocks],
            );
            let mut code_sums = vec![-1; 2 * blocks];
            kernels.quantize(&x, &mut q, &mut scales, &mut sums, &mut code_sums);
            assert!(
                q[..ACTIVATION_BLOCK].iter().all(|q| *q == 0) && scales[0] == 0.0 && sums[0] == 0.0
            );
            for b in 0..blocks {
                let block = b * ACTIVATION_BLOCK..(b + 1) * ACTIVATION_BLOCK;
                let step = f64::from(scales[b]);
                for (x, q) in x[block.clone()].iter().zip(&q[block.clone()]) {
                    let error = (f64::from(*x) - step * f64::from(*q)).abs();
                    assert!(
                        error <= 0.5001 * step,
                        "{kernels:?}: {x} as {q} steps of {step}"
                    );
                    assert_ne!(*q, -128);
                }
                let sum: i32 = q[block].iter().map(|q| i32::from(*q)).sum();
                assert_eq!(code_sums[2 * b] + code_sums[2 * b + 1], sum);
                let expected = step * f64::from(sum);
                assert!((f64::from(sums[b]) - expected).abs() <= 1e-6 * expected.abs());
            }
        }
    }
}

#[test]
fn root_mean_square_normalisation() {
    let mut random = Random::new(7);
    for kernels in every_isa() {
        for n in [1, 2, 7, 16, 31, 45, 576, 1000] {
            let (x, weight) = (random.normals(n, 3.0), random.normals(n, 1.0));
            let mut out = vec![f32::NAN; n];
            kernels.rms_norm(&x, &weight, 1e-5, &mut out);
            let mean: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            for i in 0..n {
                let expected =
                    f64::from(x[i]) / (mean + f64::from(1e-5f32)).sqrt() * f64::from(weight[i]);
                assert!(
                    (f64::from(out[i]) - expected).abs() <= 1e-5 * expected.abs().max(1e-3),
                    "{kernels:?} n {n}"
                );
            }
        }
    }
}

/// Types whose products take each of the forms of activations on some instruction set.
const FORMS: [BlockType; 6] = [
    BlockType::F32,
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q4_1,
    BlockType::Q8_0,
    BlockType::Q4_K,
];

#[test]
fn a_product_added_to_what_is_there_is_the_product_added() {
    let mut random = Random::new(21);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    for kernels in every_isa() {
        for block_type in FORMS {
            let cols = block_type.block_len().max(96);
            for (phase, rows, tokens) in [
                (Phase::Decode, 5, 1),
                (Phase::Decode, 200, 1),
                (Phase::Decode, 70, 6),
                (Phase::Prefill, 33, 3),
                (Phase::Prefill, 300, 16),
                (Phase::Prefill, 577, 35),
            ] {
                let (bytes, _) = random_matrix(&mut random, block_type, rows, cols);
                let x = random.normals(tokens * cols, 1.0);
                let before = random.normals(tokens * rows, 1.0);
                let bias = random.normals(rows, 1.0);
                for (layout, bytes) in layouts(block_type, cols, &bytes) {
                    let weights = MatrixView::new(block_type, layout, rows, cols, &bytes);
                    let products = product(kernels, weights, &x, phase);
                    for (pool, bias) in pools.iter().zip([None, Some(&bias[..])]) {
                        let mut expected = before.clone();
                        for (i, e) in expected.iter_mut().enumerate() {
                            *e += products[i];
                            *e += bias.map_or(0.0, |b| b[i % rows]);
                        }
                        let mut input = activations(&x, cols, phase);
                        let mut out = before.clone();
                        pool.region(kernels, |team| {
                            matmul_add(team, &mut input, weights, bias, &mut out);
                        });
                        assert_eq!(out, expected, "{kernels:?} {block_type:?} {layout:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_product_over_nothing_adds_the_bias_alone() {
    for kernels in every_isa() {
        let weights = MatrixView::new(BlockType::Q4_0, Layout::Native, 40, 0, &[]);
        let mut input = Activations::default();
        input.begin(Tokens::prefill(2), 0);
        let mut out = vec![1.0; 80];
        let bias = vec![0.5; 40];
        matmul_add(
            &Team::solo(kernels),
            &mut input,
            weights,
            Some(&bias),
            &mut out,
        );
        assert_eq!(out, [1.5; 80]);
    }
}

/// gate and up are multiplied, activated and brought into the next matrix's form in one step; the result is that of the
/// steps by themselves.
#[test]
fn gate_and_up_in_one_step_are_the_steps_by_themselves() {
    let mut random = Random::new(22);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    for kernels in every_isa() {
        for (block_type, next_type) in FORMS.into_iter().zip(FORMS.into_iter().cycle().skip(3)) {
            let cols = block_type.block_len().max(64);
            let odd = if next_type.is_float() { 45 } else { 0 };
            for (phase, channels, tokens) in [
                (Phase::Decode, 256 + odd, 1),
                (Phase::Decode, 256 + odd, 5),
                (Phase::Prefill, 512 + odd, 3),
                (Phase::Prefill, 256 + odd, 35),
                (Phase::Prefill, 768, 16),
            ] {
                let (gate, _) = random_matrix(&mut random, block_type, channels, cols);
                let (up, _) = random_matrix(&mut random, block_type, channels, cols);
                let (next, _) = random_matrix(&mut random, next_type, 40, channels);
                let next = MatrixView::new(next_type, Layout::Native, 40, channels, &next);
                let x = random.normals(tokens * cols, 0.1);
                let bias = random.normals(channels, 1.0);
                let gates = layouts(block_type, cols, &gate);
                for ((layout, gate), (_, up)) in gates.iter().zip(layouts(block_type, cols, &up)) {
                    let view = |bytes| MatrixView::new(block_type, *layout, channels, cols, bytes);
                    let (gate, up) = (view(gate), view(&up));
                    let mut expected = product(kernels, gate, &x, phase);
                    for (i, value) in expected.iter_mut().enumerate() {
                        *value += bias[i % channels];
                    }
                    // Row by row: where the vectors end decides the last bits.
                    let ups = product(kernels, up, &x, phase);
                    let activation = [Gate::Silu, Gate::Gelu][channels % 2];
                    for (row, up) in expected.chunks_mut(channels).zip(ups.chunks(channels)) {
                        match activation {
                            Gate::Silu => kernels.silu_mul(row, up),
                            Gate::Gelu => kernels.gelu_mul(row, up),
                        }
                    }
                    let keeps = [Keep::Nothing, Keep::Moments, Keep::Values];
                    for (pool, keep) in pools.iter().cycle().zip(keeps) {
                        let mut input = activations(&x, cols, phase);
                        let mut hidden = Activations::default();
                        let out = pool.region(kernels, |team| {
                            let gate = (gate, Some(&bias[..]));
                            let readers = [next];
                            matmul_gated(
                                team,
                                &mut input,
                                activation,
                                gate,
                                (up, None),
                                &mut hidden,
                                &readers,
                                keep,
                            );
                            product_of(team, next, &mut hidden)
                        });
                        let place = format!(
                            "{kernels:?} {block_type:?} {layout:?} {phase:?} {channels} {tokens}"
                        );
                        assert_eq!(out.len(), tokens * 40, "{place}");
                        assert_eq!(hidden.moments().is_some(), keep == Keep::Moments);
                        if let Some(moments) = hidden.moments() {
                            let team = Team::solo(kernels);
                            let of_values = Moments::of(&team, &expected, channels);
                            assert_same_moments(moments, &of_values, 1e-5);
                        }
                        if keep == Keep::Values {
                            for (found, expected) in hidden.values().iter().zip(&expected) {
                                let error = (found - expected).abs();
                                assert!(error <= 4e-7 * expected.abs() + 1e-35, "{place}");
                            }
                            let again = product(kernels, next, hidden.values(), phase);
                            assert_eq!(out, again, "{place}");
                        } else {
                            let whole = product(kernels, next, &expected, phase);
                            let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                            for (found, expected) in out.iter().zip(&whole) {
                                let error = (found - expected).abs();
                                assert!(
                                    error <= 0.02 * scale.max(expected.abs()),
                                    "{place}: {found} for {expected}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn activations_written_for_a_matrix_are_those_that_it_would_make_itself() {
    let mut random = Random::new(23);
    let pool = Pool::new(3).unwrap();
    for kernels in every_isa() {
        for block_type in FORMS {
            let cols = block_type.block_len().max(96);
            for (phase, count) in PHASES
                .into_iter()
                .flat_map(|phase| [1, 5, 16, 37].map(|count| (phase, count)))
            {
                let tokens = tokens_of(phase, count);
                let (bytes, _) = random_matrix(&mut random, block_type, 40, cols);
                let x = random.normals(count * cols, 1.0);
                for (layout, bytes) in layouts(block_type, cols, &bytes) {
                    let weights = MatrixView::new(block_type, layout, 40, cols, &bytes);
                    let expected = product(kernels, weights, &x, phase);
                    let mut input = Activations::default();
                    let out = pool.region(kernels, |team| {
                        input.produce(
                            team,
                            tokens,
                            cols,
                            &[weights],
                            Precision::Normal,
                            |t, row| {
                                row.copy_from_slice(&x[t * cols..][..cols]);
                            },
                        );
                        product_of(team, weights, &mut input)
                    });
                    assert_eq!(
                        out, expected,
                        "{kernels:?} {block_type:?} {layout:?} {tokens:?}"
                    );
                }
            }
        }
    }
}

/// x in 8 bits, with a scale for every `len` values, as numbers again.
fn in_8_bits(x: &[f32], len: usize) -> Vec<f32> {
    let parts = x.chunks(len).flat_map(|part| {
        let peak = part.iter().fold(0.0f32, |peak, v| peak.max(v.abs()));
        part.iter()
            .map(move |v| (v * (127.0 / peak)).round_ties_even() * (peak / 127.0))
    });
    parts.collect()
}

#[test]
fn halves_of_blocks_have_scales_of_their_own_where_more_precision_is_asked_for() {
    let mut random = Random::new(26);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    for kernels in every_isa() {
        for block_type in FORMS {
            let cols = block_type.block_len().max(96);
            for (phase, rows, tokens) in [
                (Phase::Decode, 48, 1),
                (Phase::Decode, 48, 3),
                (Phase::Prefill, 48, 1),
                (Phase::Prefill, 160, 5),
                (Phase::Prefill, 32, 16),
                (Phase::Prefill, 40, 37),
            ] {
                let (bytes, decoded) = random_matrix(&mut random, block_type, rows, cols);
                // An outlier in every block, beside which 8 bits leave little of the rest of what shares its scale.
                let mut x = random.normals(tokens * cols, 1.0);
                x.iter_mut().step_by(32).for_each(|v| *v = 50.0);
                for (layout, bytes) in layouts(block_type, cols, &bytes) {
                    let weights = MatrixView::new(block_type, layout, rows, cols, &bytes);
                    let of = |precision, pool: &Pool| {
                        let mut input = Activations::default();
                        pool.region(kernels, |team| {
                            let readers = [weights];
                            let tokens = tokens_of(phase, tokens);
                            input.produce(team, tokens, cols, &readers, precision, |t, row| {
                                row.copy_from_slice(&x[t * cols..][..cols]);
                            });
                            product_of(team, weights, &mut input)
                        })
                    };
                    // The rows that fill no group may be multiplied by plain values.
                    let grouped = match layout {
                        Layout::Native => 0,
                        Layout::Packed if !block_type.packs() => 0,
                        Layout::Packed => rows / GROUP * GROUP,
                        Layout::Sparse | Layout::Narrow => rows,
                    };
                    let exact = |x: &[f32]| -> Vec<f64> {
                        let rows = |t| {
                            let x = &x[t * cols..][..cols];
                            decoded.chunks(cols).take(grouped).map(move |row| {
                                let pairs = row.iter().zip(x);
                                pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
                            })
                        };
                        (0..tokens).flat_map(rows).collect()
                    };
                    let apart = |a: &[f64], b: &[f64]| -> f64 {
                        let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
                        squares.sum::<f64>().sqrt()
                    };
                    let [normal, high] =
                        [Precision::Normal, Precision::High].map(|p| of(p, &pools[0]));
                    let place =
                        format!("{kernels:?} {block_type:?} {layout:?} {phase:?} {rows} {tokens}");
                    assert_eq!(high, of(Precision::High, &pools[1]), "{place}");
                    // With minima, 8 bits take two products for each that a tile takes.
                    let tiled = kernels.isa() == Isa::Avx512Bf16
                        && layout == Layout::Sparse
                        && matches!(block_type, BlockType::Q4_1 | BlockType::Q4_K);
                    let quantized = !block_type.is_float()
                        && phase == Phase::Prefill
                        && kernels.isa() != Isa::Amx
                        && !tiled
                        && grouped > 0;
                    if !quantized {
                        assert_eq!(normal, high, "{place}");
                        continue;
                    }
                    let (blocks, halves) = (exact(&in_8_bits(&x, 32)), exact(&in_8_bits(&x, 16)));
                    let far = apart(&blocks, &halves);
                    for (found, expected) in [(&normal, &blocks), (&high, &halves)] {
                        let found = found.chunks(rows).flat_map(|row| &row[..grouped]);
                        let found: Vec<f64> = found.map(|v| f64::from(*v)).collect();
                        let error = apart(&found, expected);
                        assert!(error < 0.01 * far, "{place}: {error} of {far}");
                    }
                }
            }
        }
    }
}

#[test]
fn attention_written_for_a_matrix_is_what_it_would_make_of_plain_values() {
    let mut random = Random::new(24);
    let pool = Pool::new(3).unwrap();
    for kernels in every_isa() {
        for block_type in FORMS {
            for (head_dim, groups) in [(32, vec![3, 2, 3]), (64, vec![2, 2]), (48, vec![1, 15, 16])]
            {
                let heads: usize = groups.iter().sum();
                let width = heads * head_dim;
                for (phase, first_position, tokens) in [
                    (Phase::Decode, 0, 1),
                    (Phase::Decode, 600, 3),
                    (Phase::Prefill, 3, 5),
                    (Phase::Prefill, 0, 37),
                    (Phase::Prefill, 40, 100),
                ] {
                    let q = random.normals(tokens * width, 1.0);
                    let seen = first_position + tokens;
                    let cache =
                        Cache::random(&mut random, BlockType::F16, head_dim, groups.len(), seen);
                    let blocks = cache.blocks();
                    let spans = [Span {
                        blocks: &blocks,
                        tokens: 0..tokens,
                        first_position,
                    }];
                    let (bytes, _) = random_matrix(&mut random, block_type, 40, width);
                    let weights = MatrixView::new(block_type, Layout::Native, 40, width, &bytes);
                    let shape = AttentionShape {
                        head_dim,
                        group_sizes: &groups,
                        layout: cache.layout,
                        spans: &spans,
                        phase,
                        scores: Scores::plain(head_dim),
                    };
                    let plain = attend(&Team::solo(kernels), shape, &q);
                    let expected = product(kernels, weights, &plain, phase);
                    for keep in [Keep::Nothing, Keep::Moments, Keep::Values] {
                        let mut input = Activations::default();
                        let out = pool.region(kernels, |team| {
                            let readers = [weights];
                            attention(team, shape, &q, &mut input, &readers, keep);
                            product_of(team, weights, &mut input)
                        });
                        assert_eq!(
                            out, expected,
                            "{kernels:?} {block_type:?} {phase:?} {head_dim} {tokens}"
                        );
                        if let Some(moments) = input.moments() {
                            let of_values = Moments::of(&Team::solo(kernels), &plain, width);
                            assert_same_moments(moments, &of_values, 0.0);
                        } else if keep != Keep::Nothing {
                            assert_eq!(input.values(), plain);
                        }
                    }
                }
            }
        }
    }
}

fn assert_same_moments(found: &Moments, expected: &Moments, tolerance: f32) {
    assert_eq!(
        (found.tokens(), found.cols()),
        (expected.tokens(), expected.cols())
    );
    for (found, expected) in found.parts().zip(expected.parts()) {
        assert_eq!(found.tokens, expected.tokens);
        for i in 0..expected.near.len() {
            let scale = expected.squares[i].sqrt() + expected.near[i].abs();
            let close = |a: f32, b: f32, scale: f32| (a - b).abs() <= tolerance * scale + 1e-30;
            assert!(close(found.near[i], expected.near[i], scale), "near {i}");
            let many = expected.tokens as f32;
            assert!(
                close(found.sums[i], expected.sums[i], many * scale),
                "sum {i}"
            );
            let squares = (found.squares[i], expected.squares[i]);
            assert!(
                close(squares.0, squares.1, many * scale * scale),
                "square {i}"
            );
        }
    }
}

#[test]
fn moments_are_sums_of_differences_from_a_token() {
    let mut random = Random::new(25);
    for kernels in every_isa() {
        for cols in [1, 3, 16, 31, 64, 65, 200] {
            for tokens in [1, 2, 15, 16, 17, 64, 150] {
                let x: Vec<f32> = random.normals(tokens * cols, 1.0);
                let x: Vec<f32> = x.into_iter().map(|v| 1000.0 + v).collect();
                let team = Team::solo(kernels);
                let moments = Moments::of(&team, &x, cols);
                assert_eq!((moments.tokens(), moments.cols()), (tokens, cols));
                let mut first = 0;
                for part in moments.parts() {
                    let rows = &x[first * cols..(first + part.tokens) * cols];
                    first += part.tokens;
                    assert!(rows.chunks(cols).any(|row| row == part.near));
                    for c in 0..cols {
                        let differences: Vec<f64> = rows
                            .chunks(cols)
                            .map(|row| f64::from(row[c]) - f64::from(part.near[c]))
                            .collect();
                        let size: f64 = differences.iter().map(|d| d.abs()).sum();
                        let sum: f64 = differences.iter().sum();
                        let square: f64 = differences.iter().map(|d| d * d).sum();
                        let place = format!("{kernels:?} {tokens} x {cols}, column {c}");
                        assert!(
                            (f64::from(part.sums[c]) - sum).abs() <= 2e-6 * size,
                            "{place}"
                        );
                        let error = (f64::from(part.squares[c]) - square).abs();
                        assert!(error <= 4e-6 * square, "{place}");
                    }
                }
                assert_eq!(first, tokens);
            }
        }
    }
}

#[test]
fn silu_of_the_gate_times_up() {
    let mut random = Random::new(8);
    for kernels in every_isa() {
        for n in [1, 5, 15, 16, 17, 33, 200] {
            let mut gate = random.normals(n, 8.0);
            gate[0] = [-200.0, 200.0, -88.0, 0.0, -0.0, 1e-30, 95.0][n % 7];
            let up = random.normals(n, 1.0);
            let mut out = gate.clone();
            kernels.silu_mul(&mut out, &up);
            for i in 0..n {
                let g = f64::from(gate[i]);
                let expected = g / (1.0 + (-g).exp()) * f64::from(up[i]);
                let error = (f64::from(out[i]) - expected).abs();
                assert!(
                    error <= 2e-6 * expected.abs() + 1e-35,
                    "{kernels:?} gate {g}: {} for {expected}",
                    out[i]
                );
            }
        }
        let mut out = [f32::NAN, f32::INFINITY, 1.0];
        kernels.silu_mul(&mut out, &[1.0; 3]);
        assert!(out[0].is_nan() && out[1] == f32::INFINITY && out[2] > 0.73);
    }
}

#[test]
fn gelu_of_the_gate_times_up() {
    let mut random = Random::new(18);
    for kernels in every_isa() {
        for n in [1, 5, 15, 16, 17, 33, 200] {
            let mut gate = random.normals(n, 3.0);
            gate[0] = [-200.0, 200.0, -8.0, 0.0, -0.0, 1e-30, 9.0][n % 7];
            let up = random.normals(n, 1.0);
            let mut out = gate.clone();
            kernels.gelu_mul(&mut out, &up);
            for i in 0..n {
                let g = f64::from(gate[i]);
                let u = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                let expected = 0.5 * g * (1.0 + u.tanh()) * f64::from(up[i]);
                let error = (f64::from(out[i]) - expected).abs();
                assert!(
                    error <= 2e-6 * expected.abs() + 1e-7,
                    "{kernels:?} gate {g}: {} for {expected}",
                    out[i]
                );
            }
        }
        let mut out = [f32::NAN, f32::INFINITY, 1.0];
        kernels.gelu_mul(&mut out, &[1.0; 3]);
        assert!(out[0].is_nan() && out[1] == f32::INFINITY && out[2] > 0.84);
    }
}

#[test]
fn rotation_of_halves_turns_those_and_leaves_the_rest() {
    let mut random = Random::new(19);
    for kernels in every_isa() {
        for (n, pairs) in [
            (2, 1),
            (10, 5),
            (64, 32),
            (64, 8),
            (45, 20),
            (7, 0),
            (256, 128),
        ] {
            let x = random.normals(n, 1.0);
            let angles: Vec<f64> = (0..pairs).map(|_| random.uniform() * 7.0).collect();
            let (cosines, sines): (Vec<f32>, Vec<f32>) = angles
                .iter()
                .map(|a| (a.cos() as f32, a.sin() as f32))
                .unzip();
            let mut out = x.clone();
            kernels.rope_halves(&mut out, &cosines, &sines);
            assert_eq!(out[2 * pairs..], x[2 * pairs..]);
            for (i, angle) in angles.iter().enumerate() {
                let (a, b) = (f64::from(x[i]), f64::from(x[i + pairs]));
                for (got, expected) in [
                    (out[i], a * angle.cos() - b * angle.sin()),
                    (out[i + pairs], a * angle.sin() + b * angle.cos()),
                ] {
                    let error = (f64::from(got) - expected).abs();
                    assert!(error < 1e-6 * (1.0 + expected.abs()), "{kernels:?}");
                }
            }
        }
    }
}

#[test]
fn rotation_turns_pairs_and_leaves_the_rest() {
    let mut random = Random::new(9);
    for kernels in every_isa() {
        for (n, pairs) in [(2, 1), (10, 5), (64, 32), (64, 8), (45, 20), (7, 0)] {
            let x = random.normals(n, 1.0);
            let angles: Vec<f64> = (0..pairs).map(|_| random.uniform() * 7.0).collect();
            let (cosines, sines): (Vec<f32>, Vec<f32>) = angles
                .iter()
                .map(|a| (a.cos() as f32, a.sin() as f32))
                .unzip();
            let mut out = x.clone();
            kernels.rope(&mut out, &cosines, &sines);
            assert_eq!(out[2 * pairs..], x[2 * pairs..]);
            for (i, angle) in angles.iter().enumerate() {
                let (a, b) = (f64::from(x[2 * i]), f64::from(x[2 * i + 1]));
                let expected = [
                    a * angle.cos() - b * angle.sin(),
                    a * angle.sin() + b * angle.cos(),
                ];
                for (got, expected) in out[2 * i..].iter().zip(expected) {
                    assert!(
                        (f64::from(*got) - expected).abs() < 1e-6 * (1.0 + expected.abs()),
                        "{kernels:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn addition() {
    let mut random = Random::new(10);
    for kernels in every_isa() {
        for n in [0, 1, 15, 16, 47, 100] {
            let (x, y) = (random.normals(n, 1.0), random.normals(n, 1.0));
            let mut out = x.clone();
            kernels.add(&mut out, &y);
            assert!(
                out.iter()
                    .zip(x.iter().zip(&y))
                    .all(|(o, (x, y))| *o == x + y)
            );
        }
    }
}

/// Keys and values of a sequence in the middle layer of a KV cache, and what they decode to, `[kv_heads, positions, head_dim]`.
/// Its blocks lie in memory in no order, and what holds no key or value is not a number.
struct Cache {
    memory: Vec<u8>,
    /// The place of every block in memory, and its bytes.
    places: Vec<usize>,
    block_bytes: usize,
    layout: KvLayout,
    head_dim: usize,
    positions: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cache {
    fn random(
        random: &mut Random,
        block_type: BlockType,
        head_dim: usize,
        kv_heads: usize,
        positions: usize,
    ) -> Self {
        let row_bytes = block_type.row_bytes(head_dim);
        let mut plane = |scale| {
            let values = random.normals(kv_heads * positions * head_dim, scale);
            let mut bytes = vec![0u8; kv_heads * positions * row_bytes];
            let mut decoded = vec![0.0; values.len()];
            for ((row, values), decoded) in bytes
                .chunks_exact_mut(row_bytes)
                .zip(values.chunks_exact(head_dim))
                .zip(decoded.chunks_exact_mut(head_dim))
            {
                encode_row(block_type, values, row);
                decode_row(block_type, row, decoded);
            }
            (bytes, decoded)
        };
        let ((key_bytes, keys), (value_bytes, values)) = (plane(1.5), plane(1.0));
        let whole = kv_heads * KV_BLOCK * row_bytes;
        let layout = KvLayout {
            block_type,
            keys: 2 * whole,
            values: 3 * whole,
        };
        let block_bytes = 6 * whole;
        let blocks = positions.div_ceil(KV_BLOCK);
        let mut places: Vec<usize> = (0..blocks).collect();
        for i in (1..blocks).rev() {
            places.swap(i, random.below(i + 1));
        }
        let mut memory = vec![0xffu8; blocks * block_bytes];
        for (start, bytes) in [(layout.keys, &key_bytes), (layout.values, &value_bytes)] {
            for (i, row) in bytes.chunks_exact(row_bytes).enumerate() {
                let (head, position) = (i / positions, i % positions);
                let at = places[position / KV_BLOCK] * block_bytes
                    + start
                    + (head * KV_BLOCK + position % KV_BLOCK) * row_bytes;
                memory[at..at + row_bytes].copy_from_slice(row);
            }
        }
        Self {
            memory,
            places,
            block_bytes,
            layout,
            head_dim,
            positions,
            keys,
            values,
        }
    }

    fn blocks(&self) -> KvBlocks<'_> {
        let block = |place: &usize| &self.memory[place * self.block_bytes..][..self.block_bytes];
        KvBlocks::new(self.places.iter().map(block))
    }

    /// The keys and the values of a KV head that a token at a position sees.
    fn seen(&self, kv_head: usize, position: usize) -> [Vec<Vec<f64>>; 2] {
        [&self.keys, &self.values].map(|plane| {
            plane
                .chunks_exact(self.head_dim)
                .skip(kv_head * self.positions)
                .take(position + 1)
                .map(doubles)
                .collect()
        })
    }
}

/// Attention of every token and query head.
fn attend(team: &Team, shape: AttentionShape, q: &[f32]) -> Vec<f32> {
    let mut out = Activations::default();
    attention(team, shape, q, &mut out, &[], Keep::Values);
    out.values().to_vec()
}

/// The same of tokens of one sequence, from a position on.
fn attend_from(
    team: &Team,
    phase: Phase,
    cache: &Cache,
    group_sizes: &[usize],
    first_position: usize,
    q: &[f32],
) -> Vec<f32> {
    let scores = Scores::plain(cache.head_dim);
    attend_with(team, phase, cache, group_sizes, first_position, q, scores)
}

/// The same with other scores.
fn attend_with(
    team: &Team,
    phase: Phase,
    cache: &Cache,
    group_sizes: &[usize],
    first_position: usize,
    q: &[f32],
    scores: Scores,
) -> Vec<f32> {
    let width = group_sizes.iter().sum::<usize>() * cache.head_dim;
    let spans = [Span {
        blocks: &cache.blocks(),
        tokens: 0..q.len() / width,
        first_position,
    }];
    let shape = AttentionShape {
        head_dim: cache.head_dim,
        group_sizes,
        layout: cache.layout,
        spans: &spans,
        phase,
        scores,
    };
    attend(team, shape, q)
}

/// softmax(q · Kᵀ / √head_dim) · V in double precision; with every value the sum of the terms' sizes.
fn naive_attention(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<(f64, f64)> {
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (q.len() as f64).sqrt())
        .collect();
    let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - peak).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..q.len())
        .map(|d| {
            weights
                .iter()
                .zip(values)
                .map(|(w, v)| w / total * v[d])
                .fold((0.0, 0.0), |(sum, size), term| {
                    (sum + term, size + term.abs())
                })
        })
        .collect()
}

#[test]
fn attention_of_every_shape() {
    let mut random = Random::new(11);
    for kernels in every_isa() {
        for head_dim in [2, 10, 16, 33, 64, 80, 128] {
            for (phase, groups, first, tokens) in [
                (Phase::Prefill, vec![1], 0, 1),
                (Phase::Decode, vec![1], 0, 1),
                (Phase::Prefill, vec![3, 3], 0, 5),
                (Phase::Decode, vec![2, 0, 5, 1], 70, 1),
                (Phase::Decode, vec![8, 17], 62, 4),
                (Phase::Prefill, vec![4], 130, 17),
                (Phase::Prefill, vec![1, 1], 0, 100),
                (Phase::Prefill, vec![9], 5, 40),
                (Phase::Prefill, vec![3], 0, 150),
            ] {
                let heads: usize = groups.iter().sum();
                let q = random.normals(tokens * heads * head_dim, 1.0);
                let (kv_heads, seen) = (groups.len(), first + tokens);
                let cache = Cache::random(&mut random, BlockType::F16, head_dim, kv_heads, seen);
                let out = attend_from(&Team::solo(kernels), phase, &cache, &groups, first, &q);
                let group_of: Vec<usize> = groups
                    .iter()
                    .enumerate()
                    .flat_map(|(g, size)| std::iter::repeat_n(g, *size))
                    .collect();
                for t in 0..tokens {
                    for (h, g) in group_of.iter().enumerate() {
                        let at = (t * heads + h) * head_dim;
                        let query = doubles(&q[at..][..head_dim]);
                        let [keys, values] = cache.seen(*g, first + t);
                        let exact = naive_attention(&query, &keys, &values);
                        let half = |row: &Vec<f64>| -> Vec<f64> {
                            row.iter().map(|v| to_bf16(*v)).collect()
                        };
                        let rounded = naive_attention(
                            &half(&query),
                            &keys.iter().map(half).collect::<Vec<_>>(),
                            &values.iter().map(half).collect::<Vec<_>>(),
                        );
                        for d in 0..head_dim {
                            let got = f64::from(out[at + d]);
                            // Products in bfloat16 round their factors, of which the weights of the values are one.
                            let fits = (got - exact[d].0).abs() < 2e-5 * (1.0 + exact[d].0.abs())
                                || (got - rounded[d].0).abs() < rounded[d].1 / 256.0;
                            assert!(
                                fits,
                                "{kernels:?} {head_dim} {groups:?} {phase:?} at {first}, token {t}, head {h}: {got} for {:?}",
                                exact[d]
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Whether products of queries, keys and values are taken in bfloat16, else in single precision.
fn attends_in_bf16(kernels: Kernels, phase: Phase) -> bool {
    phase == Phase::Prefill && [Isa::Amx, Isa::Avx512Bf16].contains(&kernels.isa())
}

/// A token at position p sees those from p + 1 − window on, in a prompt that is cut anywhere as in one piece; scores are scaled and
/// capped.
#[test]
fn attention_looks_back_as_far_as_its_window() {
    let mut random = Random::new(21);
    let (head_dim, groups) = (32, [1, 3]);
    let heads: usize = groups.iter().sum();
    for kernels in every_isa() {
        for (phase, first, tokens) in [
            (Phase::Prefill, 0, 150),
            (Phase::Prefill, 230, 70),
            (Phase::Decode, 0, 3),
            (Phase::Decode, 126, 3),
            (Phase::Decode, 1300, 2),
        ] {
            for (window, cap) in [(1, None), (64, None), (100, Some(1.5)), (600, None)] {
                let q = random.normals(tokens * heads * head_dim, 1.0);
                let cache = Cache::random(&mut random, BlockType::F16, head_dim, 2, first + tokens);
                let scores = Scores {
                    scale: 0.3,
                    cap,
                    window: Some(window),
                };
                let team = Team::solo(kernels);
                let out = attend_with(&team, phase, &cache, &groups, first, &q, scores);
                for (t, h, g) in (0..tokens).flat_map(|t| [(t, 0, 0), (t, 2, 1)]) {
                    let at = (t * heads + h) * head_dim;
                    let query = doubles(&q[at..][..head_dim]);
                    let [keys, values] = cache.seen(g, first + t);
                    let from = keys.len().saturating_sub(window);
                    let weights: Vec<f64> = keys[from..]
                        .iter()
                        .map(|k| {
                            let dot: f64 = query.iter().zip(k).map(|(a, b)| a * b).sum();
                            let score = 0.3 * dot;
                            cap.map_or(score, |cap| {
                                f64::from(cap) * (score / f64::from(cap)).tanh()
                            })
                            .exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..head_dim {
                        let terms = weights.iter().zip(&values[from..]);
                        let expected: f64 = terms.map(|(w, v)| w / total * v[d]).sum();
                        let allowed = match attends_in_bf16(kernels, phase) {
                            true => 5e-2,
                            false => 2e-4,
                        };
                        let error = (f64::from(out[at + d]) - expected).abs();
                        assert!(
                            error < allowed * (1.0 + expected.abs()),
                            "{kernels:?} {phase:?} window {window} from {first}, token {t}: off by {error}"
                        );
                    }
                }
                let width = heads * head_dim;
                for cut in [1, 7, 64] {
                    let mut pieces = Vec::new();
                    for (i, q) in q.chunks(cut * width).enumerate() {
                        let first = first + i * cut;
                        pieces.extend(attend_with(&team, phase, &cache, &groups, first, q, scores));
                    }
                    assert_eq!(pieces, out, "{kernels:?} {phase:?} {window} cut by {cut}");
                }
            }
        }
    }
}

#[test]
fn attention_to_many_positions_and_to_a_cache_in_8_bits() {
    let mut random = Random::new(12);
    let (head_dim, groups) = (64, [3, 1, 5]);
    let heads: usize = groups.iter().sum();
    for kernels in every_isa() {
        for (phase, first, tokens) in [
            (Phase::Decode, 40, 1),
            (Phase::Decode, 1300, 1),
            (Phase::Decode, 1023, 2),
            (Phase::Prefill, 200, 5),
            (Phase::Prefill, 90, 70),
        ] {
            let q = random.normals(tokens * heads * head_dim, 1.0);
            for block_type in [BlockType::F16, BlockType::Q8_0] {
                let seen = first + tokens;
                let cache = Cache::random(&mut random, block_type, head_dim, groups.len(), seen);
                for threads in [1, 3] {
                    let pool = Pool::new(threads).unwrap();
                    let out = pool.region(kernels, |team| {
                        attend_from(team, phase, &cache, &groups, first, &q)
                    });
                    for t in 0..tokens {
                        for h in [0, 2, 3, 8] {
                            let g = [0, 0, 0, 1, 2, 2, 2, 2, 2][h];
                            let at = (t * heads + h) * head_dim;
                            let query = doubles(&q[at..][..head_dim]);
                            let [keys, values] = cache.seen(g, first + t);
                            let expected = naive_attention(&query, &keys, &values);
                            for (d, (expected, size)) in expected.into_iter().enumerate() {
                                let allowed = match attends_in_bf16(kernels, phase) {
                                    true => size / 20.0,
                                    false => size / 500.0,
                                };
                                assert!(
                                    (f64::from(out[at + d]) - expected).abs() <= allowed,
                                    "{kernels:?} {block_type:?} {phase:?} {tokens} at {first}, head {h}: {} for {expected}",
                                    out[at + d]
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn attention_does_not_overflow_with_large_scores() {
    let (head_dim, kv_heads) = (16, 1);
    for kernels in every_isa() {
        for (phase, tokens) in [
            (Phase::Decode, 1),
            (Phase::Prefill, 1),
            (Phase::Prefill, 20),
        ] {
            let row_bytes = BlockType::F16.row_bytes(head_dim);
            let plane = kv_heads * KV_BLOCK * row_bytes;
            let keys = (0..KV_BLOCK * head_dim)
                .map(|i| if i / head_dim % 2 == 0 { 50.0 } else { -50.0 })
                .map(f16::from_f32);
            let values = std::iter::repeat_n(f16::from_f32(2.0), KV_BLOCK * head_dim);
            let block: Vec<u8> = keys.chain(values).flat_map(f16::to_le_bytes).collect();
            let spans = [Span {
                blocks: &KvBlocks::new([&block[..]]),
                tokens: 0..tokens,
                first_position: 0,
            }];
            let shape = AttentionShape {
                head_dim,
                group_sizes: &[1],
                layout: KvLayout {
                    block_type: BlockType::F16,
                    keys: 0,
                    values: plane,
                },
                spans: &spans,
                phase,
                scores: Scores::plain(head_dim),
            };
            let q = vec![1000.0f32; tokens * head_dim];
            let out = attend(&Team::solo(kernels), shape, &q);
            assert!(
                out.iter().all(|v| (v - 2.0).abs() < 1e-5),
                "{kernels:?} {phase:?}"
            );
        }
    }
}

/// How many tokens are computed together, below, at and above the sizes of tiles.
const COUNTS: [usize; 13] = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 33];

/// Asserts that what `compute(tokens, pool)` makes of tokens together, `[tokens, width]`, is for each of them what it makes of
/// it alone, whatever the number of threads.
fn assert_each_as_alone(
    place: &str,
    pools: &[Pool],
    compute: impl Fn(std::ops::Range<usize>, &Pool) -> Vec<f32>,
) {
    let all = COUNTS[COUNTS.len() - 1];
    let alone: Vec<Vec<f32>> = (0..all).map(|t| compute(t..t + 1, &pools[0])).collect();
    for (i, count) in COUNTS.into_iter().enumerate() {
        for pool in [&pools[i % pools.len()], &pools[(i + 1) % pools.len()]] {
            // Somewhere among the tokens.
            let tokens = (all - count) / 2..(all - count) / 2 + count;
            let expected = alone[tokens.clone()].concat();
            assert!(expected.iter().all(|v| v.is_finite()), "{place}");
            let together = compute(tokens, pool);
            assert!(
                together == expected,
                "{place}: {count} tokens on {} threads",
                pool.threads()
            );
        }
    }
}

#[test]
fn products_of_a_token_are_the_same_alone_and_among_others() {
    let mut random = Random::new(31);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    let all = COUNTS[COUNTS.len() - 1];
    for kernels in every_isa() {
        for block_type in BlockType::ALL {
            // Widths beyond what is decoded at a time; heights of whole groups, of groups and some rows, and of no group.
            let shapes = match block_type.block_len() {
                1 => [(48, 577), (37, 45), (5, 131), (16, 1030)],
                32 => [(48, 96), (37, 1056), (5, 160), (16, 2080)],
                _ => [(48, 256), (37, 768), (5, 256), (16, 2304)],
            };
            for (rows, cols) in shapes {
                let (bytes, _) = random_matrix(&mut random, block_type, rows, cols);
                let x = random.normals(all * cols, 1.0);
                for (layout, bytes) in layouts(block_type, cols, &bytes) {
                    let weights = MatrixView::new(block_type, layout, rows, cols, &bytes);
                    for (phase, precision) in [
                        (Phase::Prefill, Precision::Normal),
                        (Phase::Prefill, Precision::High),
                        (Phase::Decode, Precision::Normal),
                        (Phase::Decode, Precision::High),
                    ] {
                        let place = format!(
                            "{kernels:?} {block_type:?} {layout:?} {rows}x{cols} {phase:?} {precision:?}"
                        );
                        assert_each_as_alone(&place, &pools, |tokens, pool| {
                            let mut input = Activations::default();
                            pool.region(kernels, |team| {
                                let (first, count) = (tokens.start, tokens_of(phase, tokens.len()));
                                let write = |t: usize, row: &mut [f32]| {
                                    row.copy_from_slice(&x[(first + t) * cols..][..cols]);
                                };
                                input.produce(team, count, cols, &[weights], precision, write);
                                product_of(team, weights, &mut input)
                            })
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_a_token_are_the_same_however_weights_are_read() {
    let mut random = Random::new(47);
    for kernels in every_isa() {
        for block_type in BlockType::ALL {
            // More groups than are ever read side by side, some rows beyond them, and fewer groups than that.
            for (rows, cols) in [(16 * 13 + 5, 256), (48, 768)] {
                let (bytes, _) = random_matrix(&mut random, block_type, rows, cols);
                let x = random.normals(cols, 1.0);
                for (layout, bytes) in layouts(block_type, cols, &bytes) {
                    let weights = MatrixView::new(block_type, layout, rows, cols, &bytes);
                    let usual = product(kernels, weights, &x, Phase::Decode);
                    for streams in 1..=6 {
                        for fetches in [false, true] {
                            let reading = Reading { streams, fetches };
                            let found =
                                product(kernels.reading(reading), weights, &x, Phase::Decode);
                            let place = format!("{kernels:?} {block_type:?} {layout:?} {rows}");
                            assert!(found == usual, "{place}: {reading:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_done_with_products_of_a_token_is_the_same_alone_and_among_others() {
    let mut random = Random::new(32);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    let all = COUNTS[COUNTS.len() - 1];
    for kernels in every_isa() {
        for block_type in FORMS {
            let cols = block_type.block_len().max(96);
            // Not whole vectors, so that these end elsewhere for every token.
            for rows in [64, 77] {
                let (bytes, _) = random_matrix(&mut random, block_type, rows, cols);
                let (other, _) = random_matrix(&mut random, block_type, rows, cols);
                let x = random.normals(all * cols, 0.3);
                let before = random.normals(all * rows, 1.0);
                let bias = random.normals(rows, 1.0);
                let stored = layouts(block_type, cols, &bytes);
                for ((layout, bytes), (_, other)) in
                    stored.iter().zip(layouts(block_type, cols, &other))
                {
                    let weights = MatrixView::new(block_type, *layout, rows, cols, bytes);
                    let other = MatrixView::new(block_type, *layout, rows, cols, &other);
                    for phase in PHASES {
                        let input = |tokens: std::ops::Range<usize>| {
                            activations(&x[tokens.start * cols..tokens.end * cols], cols, phase)
                        };
                        let place =
                            format!("{kernels:?} {block_type:?} {layout:?} {rows} rows {phase:?}");
                        assert_each_as_alone(&format!("add {place}"), &pools, |tokens, pool| {
                            let mut out = before[tokens.start * rows..tokens.end * rows].to_vec();
                            let mut x = input(tokens);
                            pool.region(kernels, |team| {
                                matmul_add(team, &mut x, weights, Some(&bias), &mut out);
                            });
                            out
                        });
                        assert_each_as_alone(&format!("silu {place}"), &pools, |tokens, pool| {
                            let (mut x, mut out) = (input(tokens), Activations::default());
                            let (gate, up) = ((weights, Some(&bias[..])), (other, None));
                            pool.region(kernels, |team| {
                                matmul_gated(
                                    team,
                                    &mut x,
                                    Gate::Silu,
                                    gate,
                                    up,
                                    &mut out,
                                    &[],
                                    Keep::Values,
                                );
                            });
                            out.values().to_vec()
                        });
                        assert_each_as_alone(&format!("then {place}"), &pools, |tokens, pool| {
                            let mut outs = [0, 1].map(|_| vec![f32::NAN; tokens.len() * rows]);
                            let mut x = input(tokens);
                            let [out, second] = &mut outs;
                            let mut products = [
                                Product { weights, out },
                                Product {
                                    weights: other,
                                    out: second,
                                },
                            ];
                            let halve = |_, _, _, values: &mut [f32]| {
                                values.iter_mut().for_each(|v| *v *= 0.5);
                            };
                            pool.region(kernels, |team| {
                                matmul_then(team, &mut x, &mut products, halve);
                            });
                            let pairs = outs[0].chunks(rows).zip(outs[1].chunks(rows));
                            pairs.flat_map(|(a, b)| [a, b].concat()).collect()
                        });
                    }
                }
            }
        }
    }
}

/// Cache types and sizes of heads that these suit.
fn caches() -> impl Iterator<Item = (BlockType, usize)> {
    let types = [BlockType::F16, BlockType::Q8_0];
    let all = types.map(|block_type| [32, 48, 64, 80, 128usize].map(|dim| (block_type, dim)));
    all.into_iter()
        .flatten()
        .filter(|(block_type, dim)| dim.is_multiple_of(block_type.block_len()))
}

#[test]
fn attention_of_a_prompt_is_the_same_however_it_is_cut() {
    let mut random = Random::new(33);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    let groups = [1, 3, 8, 16];
    let tokens = 140;
    // Where the pieces end; behind the last one the rest follows.
    let cuts: [Vec<usize>; 7] = [
        vec![1],
        (1..9).map(|i| 16 * i).collect(),
        vec![63],
        vec![64],
        vec![65],
        vec![63, 64, 65, 127, 130],
        (1..tokens).collect(),
    ];
    for kernels in every_isa() {
        for (block_type, head_dim) in caches() {
            let cache = Cache::random(&mut random, block_type, head_dim, groups.len(), tokens);
            let width = groups.iter().sum::<usize>() * head_dim;
            let q = random.normals(tokens * width, 1.0);
            let attend = |tokens: std::ops::Range<usize>, pool: &Pool| {
                pool.region(kernels, |team| {
                    let q = &q[tokens.start * width..tokens.end * width];
                    attend_from(team, Phase::Prefill, &cache, &groups, tokens.start, q)
                })
            };
            let whole = attend(0..tokens, &pools[0]);
            assert!(whole.iter().all(|v| v.is_finite()));
            for (cut, pool) in cuts.iter().zip(pools.iter().cycle()) {
                let mut begin = 0;
                for end in cut.iter().copied().chain([tokens]) {
                    assert!(
                        attend(begin..end, pool) == whole[begin * width..end * width],
                        "{kernels:?} {block_type:?} {head_dim}, tokens {begin}..{end}"
                    );
                    begin = end;
                }
            }
        }
    }
}

#[test]
fn attention_of_several_sequences_is_that_of_each_alone() {
    let mut random = Random::new(34);
    let pools = [Pool::new(1).unwrap(), Pool::new(3).unwrap()];
    let groups = [1, 3, 8, 16];
    // The first position and the tokens of each sequence; of generated ones some look back on several parts.
    let prompts = [(0, 37), (60, 5), (10, 70), (130, 1), (0, 16)];
    let generated = [
        (0, 1),
        (63, 1),
        (511, 1),
        (512, 1),
        (62, 4),
        (64, 1),
        (700, 1),
        (1300, 1),
    ];
    for kernels in every_isa() {
        for (block_type, head_dim) in caches() {
            let width = groups.iter().sum::<usize>() * head_dim;
            let (weights, _) = random_matrix(&mut random, BlockType::Q8_0, 16, width);
            let reader = MatrixView::new(BlockType::Q8_0, Layout::Native, 16, width, &weights);
            for (phase, sequences) in [
                (Phase::Prefill, &prompts[..]),
                (Phase::Decode, &generated[..]),
            ] {
                let caches: Vec<Cache> = sequences
                    .iter()
                    .map(|(first, tokens)| {
                        let (kv_heads, seen) = (groups.len(), first + tokens);
                        Cache::random(&mut random, block_type, head_dim, kv_heads, seen)
                    })
                    .collect();
                let blocks: Vec<KvBlocks> = caches.iter().map(Cache::blocks).collect();
                let mut tokens = 0;
                let spans: Vec<Span> = sequences
                    .iter()
                    .zip(&blocks)
                    .map(|((first_position, count), blocks)| {
                        tokens += count;
                        Span {
                            blocks,
                            tokens: tokens - count..tokens,
                            first_position: *first_position,
                        }
                    })
                    .collect();
                let q = random.normals(tokens * width, 1.0);
                let solo = Team::solo(kernels);
                let alone: Vec<f32> = spans
                    .iter()
                    .zip(&caches)
                    .flat_map(|(span, cache)| {
                        let q = &q[span.tokens.start * width..span.tokens.end * width];
                        attend_from(&solo, phase, cache, &groups, span.first_position, q)
                    })
                    .collect();
                assert!(alone.iter().all(|v| v.is_finite()));
                let shape = AttentionShape {
                    head_dim,
                    group_sizes: &groups,
                    layout: caches[0].layout,
                    spans: &spans,
                    phase,
                    scores: Scores::plain(head_dim),
                };
                for pool in &pools {
                    let place = format!("{kernels:?} {block_type:?} {head_dim} {phase:?}");
                    let together = pool.region(kernels, |team| attend(team, shape, &q));
                    assert!(together == alone, "{place}");
                    // In the form for a matrix.
                    let mut input = Activations::default();
                    let out = pool.region(kernels, |team| {
                        attention(team, shape, &q, &mut input, &[reader], Keep::Nothing);
                        product_of(team, reader, &mut input)
                    });
                    assert_eq!(out, product(kernels, reader, &alone, phase), "{place}");
                }
            }
        }
    }
}
