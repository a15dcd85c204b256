//! Kernels by instruction set and weight type, on shapes near the default model's: weights times generated tokens and times a
//! prompt, sparse weights beside dense ones, attention, a forward pass of a prompt, and a step of several sequences.
//!
//! `cargo bench` runs all, `cargo bench -- matmul/avx2` some. Throughput is in bytes of weights for generated tokens,
//! which memory bounds, and in multiplications for prompts, which the multipliers bound. Sparse weights are the exception: theirs
//! is in weights, removed ones included, so that it compares with the dense one's.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flapjack::gguf::GgufFile;
use flapjack::kernels::{
    Activations, AttentionShape, Isa, KV_BLOCK, Keep, Kernels, KvBlocks, KvLayout, MatrixView,
    Phase, Pool, Product, Runtime, Scores, Span, Team, Tokens, attention, matmul,
};
use flapjack::model::{Batch, KvCache, Model, Scratch, Unobserved};
use flapjack::progress::ignore;
use flapjack::prune::{Calibration, calibrate};
use flapjack::quant::{BlockType, KeepMask, Layout, encode_row, encode_sparse, pack};
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
            for (name, tokens) in [
                ("generated", Tokens::decode(1)),
                ("generated", Tokens::decode(4)),
                ("prompt", Tokens::prefill(16)),
                ("prompt", Tokens::prefill(128)),
            ] {
                let count = tokens.count;
                group.throughput(match tokens.phase {
                    Phase::Decode => Throughput::Bytes(bytes.len() as u64),
                    Phase::Prefill => Throughput::Elements((count * ROWS * COLS) as u64),
                });
                let input = values(count * COLS);
                let mut activations = Activations::default();
                let mut out = vec![0.0; count * ROWS];
                let id = BenchmarkId::new(format!("{}/{name}", block_type.name()), count);
                group.bench_function(id, |b| {
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

/// Bytes that begin at a line of the cache, as those of a model's weights do.
struct Lines {
    bytes: Vec<u8>,
    start: usize,
}

impl Lines {
    fn new(content: &[u8]) -> Self {
        const LINE: usize = 64;
        let mut bytes = vec![0; content.len() + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        bytes[start..start + content.len()].copy_from_slice(content);
        bytes.truncate(start + content.len());
        Self { bytes, start }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

/// Dense matrices, those that lost half of their weights anywhere, and those that lost two of each four; with all threads. A generated
/// token meets as many of them as no cache holds, a prompt one.
fn sparse_matmuls(c: &mut Criterion) {
    const DENSE_BYTES: usize = 128 << 20;
    let chances = values(ROWS * COLS + 1);
    let half = KeepMask::from_fn(ROWS, COLS, |row, col| chances[row * COLS + col + 1] < 0.0);
    let two_of_four = KeepMask::from_fn(ROWS, COLS, |row, col| {
        let chance = |col| chances[row * COLS + col + 1];
        let four = col / 4 * 4..col / 4 * 4 + 4;
        // Places of equal chances come in order.
        let before = |other: &usize| (chance(*other), *other) < (chance(col), col);
        four.filter(before).count() < 2
    });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for kernels in Isa::available().filter_map(Kernels::for_isa) {
        let runtime = Runtime {
            kernels,
            pool: Pool::new(threads).expect("threads"),
        };
        let mut group = c.benchmark_group(format!("sparse/{}", kernels.isa().name()));
        for block_type in BlockType::ALL.into_iter().filter(|t| t.has_sparse()) {
            let native = matrix(block_type);
            let copies = DENSE_BYTES.div_ceil(native.len());
            let mut packed = native.clone();
            pack(block_type, COLS, &mut packed);
            let weights = [
                ("dense", Layout::Packed, packed),
                (
                    "half",
                    Layout::Sparse,
                    encode_sparse(block_type, &native, &half),
                ),
                (
                    "2:4",
                    Layout::Sparse,
                    encode_sparse(block_type, &native, &two_of_four),
                ),
            ];
            for (name, layout, bytes) in &weights {
                let matrices: Vec<Lines> = (0..copies).map(|_| Lines::new(bytes)).collect();
                for (phase, tokens, matrices) in [
                    ("generated", Tokens::decode(1), &matrices[..]),
                    ("prompt", Tokens::prefill(512), &matrices[..1]),
                ] {
                    let count = tokens.count;
                    let elements = count * matrices.len() * ROWS * COLS;
                    group.throughput(Throughput::Elements(elements as u64));
                    let input = values(count * COLS);
                    let mut activations = Activations::default();
                    let mut out = vec![0.0; count * ROWS];
                    let id = BenchmarkId::new(format!("{}/{phase}", block_type.name()), name);
                    group.bench_function(id, |b| {
                        b.iter(|| {
                            activations.begin(tokens, COLS).copy_from_slice(&input);
                            runtime.region(|team| {
                                for matrix in matrices {
                                    let product = Product {
                                        weights: MatrixView::new(
                                            block_type,
                                            *layout,
                                            ROWS,
                                            COLS,
                                            matrix.get(),
                                        ),
                                        out: &mut out,
                                    };
                                    matmul(team, &mut activations, &mut [product]);
                                }
                            });
                            black_box(&out);
                        });
                    });
                }
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
        for (phase, tokens, depth) in [
            (Phase::Decode, 1, 128),
            (Phase::Decode, 1, 4096),
            (Phase::Prefill, 512, 0),
        ] {
            let q = values(tokens * 9 * HEAD_DIM);
            let plane = 3 * KV_BLOCK * BlockType::F16.row_bytes(HEAD_DIM);
            let blocks = (depth + tokens).div_ceil(KV_BLOCK);
            let cache: Vec<u8> = values(blocks * plane)
                .into_iter()
                .flat_map(|v| f16::from_f32(v).to_le_bytes())
                .collect();
            let spans = [Span {
                blocks: &KvBlocks::new(cache.chunks_exact(2 * plane)),
                tokens: 0..tokens,
                first_position: depth,
            }];
            let shape = AttentionShape {
                head_dim: HEAD_DIM,
                group_sizes: &GROUPS,
                layout: KvLayout {
                    block_type: BlockType::F16,
                    keys: 0,
                    values: plane,
                },
                spans: &spans,
                phase,
                scores: Scores::plain(HEAD_DIM),
            };
            let mut out = Activations::default();
            group.bench_function(BenchmarkId::new(tokens.to_string(), depth), |b| {
                b.iter(|| {
                    attention(&team, shape, &q, &mut out, &[], Keep::Values);
                    black_box(out.values());
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
        let mut batch = Batch::new();
        batch.add_prompt(0, 0, &vec![100; tokens], tokens - 1..tokens);
        let mut cache = KvCache::new(&model, tokens);
        let mut scratch = Scratch::new();
        let mut logits = Vec::new();
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter(|| {
                cache.truncate(0);
                runtime.region(|team| {
                    let sequences = &mut [&mut cache];
                    model
                        .forward(team, batch.rows(), sequences, &mut scratch, &mut Unobserved)
                        .expect("the batch fits");
                    model.logits(team, Phase::Decode, 0..1, &mut scratch, &mut logits);
                });
                black_box(&logits);
            });
        });
    }
    // A step of several sequences, each of which has a token behind a prompt.
    for sequences in [1usize, 2, 4, 8] {
        const PROMPT: usize = 128;
        let mut caches: Vec<KvCache> = (0..sequences)
            .map(|_| KvCache::new(&model, PROMPT + 1))
            .collect();
        let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
        let mut scratch = Scratch::new();
        let mut logits = Vec::new();
        let (mut prompts, mut step) = (Batch::new(), Batch::new());
        for sequence in 0..sequences {
            prompts.add_prompt(sequence, 0, &[100; PROMPT], 0..0);
            step.add_generated(sequence, PROMPT, 100);
        }
        runtime.region(|team| {
            model
                .forward(
                    team,
                    prompts.rows(),
                    &mut caches,
                    &mut scratch,
                    &mut Unobserved,
                )
                .expect("the prompts fit");
        });
        group.throughput(Throughput::Elements(sequences as u64));
        group.bench_function(BenchmarkId::new("step", sequences), |b| {
            b.iter(|| {
                caches.iter_mut().for_each(|cache| cache.truncate(PROMPT));
                runtime.region(|team| {
                    model
                        .forward(
                            team,
                            step.rows(),
                            &mut caches,
                            &mut scratch,
                            &mut Unobserved,
                        )
                        .expect("the step fits");
                    model.logits(team, Phase::Decode, 0..sequences, &mut scratch, &mut logits);
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

criterion_group!(benches, matmuls, sparse_matmuls, attentions, forward_passes);
criterion_main!(benches);
