//! Kernels by instruction set and weight type, on shapes near the default model's: weights times one token and times a
//! prompt, attention, and a forward pass.
//!
//! `cargo bench` runs all, `cargo bench -- matmul/avx2` some. Throughput is in bytes of weights for single tokens, which
//! memory bounds, and in multiplications for prompts, which the multipliers bound.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flapjack::gguf::GgufFile;
use flapjack::kernels::{
    Activations, AttentionShape, CachePlane, Isa, Kernels, MatrixView, Pool, Product, Runtime,
    Team, attention, matmul,
};
use flapjack::model::{KvCache, Model, Scratch, Unobserved};
use flapjack::progress::ignore;
use flapjack::prune::{Calibration, calibrate};
use flapjack::quant::{BlockType, Layout, encode_row};
use half::f16;

const COLS: usize = 768;
const ROWS: usize = 1536;

/// Reproducible values in [−1, 1).
fn values(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn matrix(block_type: BlockType) -> Vec<u8> {
    let row_bytes = block_type.row_bytes(COLS);
    let mut bytes = vec![0; ROWS * row_bytes];
    for (row, values) in bytes
        .chunks_exact_mut(row_bytes)
        .zip(values(ROWS * COLS).chunks_exact(COLS))
    {
        encode_row(block_type, values, row);
    }
    bytes
}

fn matmuls(c: &mut Criterion) {
    for kernels in Isa::available().filter_map(Kernels::for_isa) {
        let team = Team::solo(kernels);
        let mut group = c.benchmark_group(format!("matmul/{}", kernels.isa().name()));
        for block_type in BlockType::ALL {
            let bytes = matrix(block_type);
            let weights = MatrixView::new(block_type, Layout::Native, ROWS, COLS, &bytes);
            for tokens in [1, 4, 16, 128] {
                group.throughput(match tokens {
                    1 => Throughput::Bytes(bytes.len() as u64),
                    _ => Throughput::Elements((tokens * ROWS * COLS) as u64),
                });
                let input = values(tokens * COLS);
                let mut activations = Activations::default();
                let mut out = vec![0.0; tokens * ROWS];
                group.bench_function(BenchmarkId::new(block_type.name(), tokens), |b| {
                    b.iter(|| {
                        activations.begin(tokens, COLS).copy_from_slice(&input);
                        let product = Product {
                            weights,
                            out: &mut out,
                        };
                        matmul(&team, &mut activations, &mut [product]);
                        black_box(&out);
                    });
                });
            }
        }
        group.finish();
    }
}

fn attentions(c: &mut Criterion) {
    const HEAD_DIM: usize = 64;
    const GROUPS: [usize; 3] = [3; 3];
    for kernels in Isa::available().filter_map(Kernels::for_isa) {
        let team = Team::solo(kernels);
        let mut group = c.benchmark_group(format!("attention/{}", kernels.isa().name()));
        for (tokens, depth) in [(1, 128), (1, 4096), (512, 0)] {
            let capacity = depth + tokens;
            let q = values(tokens * 9 * HEAD_DIM);
            let cache: Vec<f16> = values(3 * capacity * HEAD_DIM)
                .into_iter()
                .map(f16::from_f32)
                .collect();
            let mut out = vec![0.0; q.len()];
            let shape = AttentionShape {
                head_dim: HEAD_DIM,
                group_sizes: &GROUPS,
                capacity,
                first_position: depth,
                tokens,
            };
            group.bench_function(BenchmarkId::new(tokens.to_string(), depth), |b| {
                b.iter(|| {
                    let plane = CachePlane::Half(&cache);
                    attention(&team, shape, &q, plane, plane, &mut out);
                    black_box(&out);
                });
            });
        }
        group.finish();
    }
}

fn forward_passes(c: &mut Criterion) {
    let path = match flapjack::hub::default_model() {
        Ok(path) => path,
        Err(error) => {
            eprintln!("forward passes are left out: {error}");
            return;
        }
    };
    let model = GgufFile::open(path)
        .map_err(|e| e.to_string())
        .and_then(|file| Model::load(file).map_err(|e| e.to_string()))
        .expect("the default model loads");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = Runtime {
        kernels: Kernels::get().expect("an instruction set"),
        pool: Pool::new(threads).expect("threads"),
    };
    let mut group = c.benchmark_group("forward");
    group.sample_size(10);
    for tokens in [1usize, 8, 512] {
        let batch = vec![100u32; tokens];
        let mut cache = KvCache::new(&model, tokens);
        let mut scratch = Scratch::new();
        let mut logits = Vec::new();
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter(|| {
                cache.truncate(0);
                runtime.region(|team| {
                    model
                        .forward(team, &batch, &mut cache, &mut scratch, &mut Unobserved)
                        .expect("the batch fits");
                    model.logits(team, tokens - 1..tokens, &mut scratch, &mut logits);
                });
                black_box(&logits);
            });
        });
    }
    // What FLAP's statistics add to a pass, which covariances and curves do not count as.
    let text: Vec<u32> = (0..2048).map(|i| 100 + i % 1000).collect();
    group.throughput(Throughput::Elements(text.len() as u64));
    group.bench_function("calibrating", |b| {
        b.iter(|| {
            let text = Calibration {
                tokens: &text,
                bos: None,
                covariance: false,
            };
            black_box(calibrate(&model, &runtime, text, &mut ignore).expect("a profile"))
        });
    });
    group.finish();
}

criterion_group!(benches, matmuls, attentions, forward_passes);
criterion_main!(benches);
