//! Small random models, as GGUF files.

use flapjack::gguf::{GgufFile, Value, ValueType, Writer};
use flapjack::kernels::{Isa, Kernels, Phase, Pool, Runtime};
use flapjack::model::{KvCache, Model, Row, Scratch, Unobserved};
use flapjack::quant::{BlockType, decode_row, encode_row};

use super::Random;
use super::reference::{ReferenceLayer, ReferenceLinear, ReferenceModel};

/// What a random model looks like.
#[derive(Clone)]
pub struct Shape {
    pub vocabulary: usize,
    pub embedding: usize,
    pub head_dim: usize,
    pub heads: Vec<usize>,
    pub kv_heads: Vec<usize>,
    pub channels: Vec<usize>,
    pub block_type: BlockType,
    pub tied: bool,
    pub biases: bool,
    pub rope_base: f32,
    pub rope_dim: usize,
    pub rope_scale: Option<f32>,
    pub rope_factors: bool,
    /// Whether weights are numbers of bfloat16, as those of most models are, in whatever type.
    pub from_bfloat16: bool,
    pub seed: u64,
}

impl Default for Shape {
    /// Two layers with grouped-query attention.
    fn default() -> Self {
        Self {
            vocabulary: 50,
            embedding: 64,
            head_dim: 16,
            heads: vec![4, 4],
            kv_heads: vec![2, 2],
            channels: vec![96, 96],
            block_type: BlockType::F32,
            tied: true,
            biases: false,
            rope_base: 10_000.0,
            rope_dim: 16,
            rope_scale: None,
            rope_factors: false,
            from_bfloat16: false,
            seed: 1,
        }
    }
}

/// A random model twice: as a GGUF file in a folder of its own, and as the reference's plain matrices, which hold what the
/// file's encoding left of the values.
pub struct Synthetic {
    pub shape: Shape,
    pub reference: ReferenceModel,
    pub path: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

impl Synthetic {
    pub fn new(shape: Shape) -> Self {
        let mut random = Random::new(shape.seed);
        let d = shape.embedding;
        let mut writer = Writer::new();
        write_metadata(&mut writer, &shape);

        let mut matrix = |writer: &mut Writer, name: &str, rows: usize, cols: usize| {
            let mut values = random.normals(rows * cols, 1.0 / (cols.max(1) as f64).sqrt());
            if shape.from_bfloat16 {
                for value in &mut values {
                    *value = half::bf16::from_f32(*value).to_f32();
                }
            }
            store(writer, name, &[rows, cols], shape.block_type, &values)
        };
        let embedding = matrix(&mut writer, "token_embd.weight", shape.vocabulary, d);
        let output =
            (!shape.tied).then(|| matrix(&mut writer, "output.weight", shape.vocabulary, d));

        let mut random = Random::new(shape.seed + 1000);
        let mut vector = |writer: &mut Writer, name: &str, n: usize, mean: f32| {
            let values: Vec<f32> = random.normals(n, 0.2).iter().map(|v| v + mean).collect();
            store(writer, name, &[n], BlockType::F32, &values)
        };
        let output_norm = vector(&mut writer, "output_norm.weight", d, 1.0);
        let factors = shape.rope_factors.then(|| {
            let values: Vec<f32> = (0..shape.rope_dim / 2)
                .map(|i| 1.0 + i as f32 * 0.5)
                .collect();
            store(
                &mut writer,
                "rope_freqs.weight",
                &[values.len()],
                BlockType::F32,
                &values,
            )
        });

        let mut layers = Vec::new();
        for l in 0..shape.heads.len() {
            let (q, kv, c) = (
                shape.heads[l] * shape.head_dim,
                shape.kv_heads[l] * shape.head_dim,
                shape.channels[l],
            );
            let mut linear = |name: &str, rows: usize, cols: usize| ReferenceLinear {
                rows,
                cols,
                weight: matrix(&mut writer, &format!("blk.{l}.{name}.weight"), rows, cols),
                bias: shape
                    .biases
                    .then(|| vector(&mut writer, &format!("blk.{l}.{name}.bias"), rows, 0.0)),
            };
            let [wq, wk, wv] =
                [("attn_q", q), ("attn_k", kv), ("attn_v", kv)].map(|(n, r)| linear(n, r, d));
            let wo = linear("attn_output", d, q);
            let [gate, up] = ["ffn_gate", "ffn_up"].map(|n| linear(n, c, d));
            let down = linear("ffn_down", d, c);
            layers.push(ReferenceLayer {
                attention_norm: vector(&mut writer, &format!("blk.{l}.attn_norm.weight"), d, 1.0),
                mlp_norm: vector(&mut writer, &format!("blk.{l}.ffn_norm.weight"), d, 1.0),
                heads: shape.heads[l],
                kv_heads: shape.kv_heads[l],
                q: wq,
                k: wk,
                v: wv,
                o: wo,
                gate,
                up,
                down,
            });
        }

        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("model.gguf");
        writer.save(&path).expect("the model is written");
        let reference = ReferenceModel {
            embedding_length: d,
            head_dim: shape.head_dim,
            rope_dim: shape.rope_dim,
            rope_base: f64::from(shape.rope_base),
            rope_scale: shape.rope_scale.map_or(1.0, f64::from),
            rope_factors: factors,
            epsilon: f64::from(1e-5f32),
            embedding,
            output,
            output_norm,
            layers,
        };
        Self {
            shape,
            reference,
            path,
            _folder: folder,
        }
    }

    pub fn load(&self) -> Model {
        let file = GgufFile::open(&self.path).expect("the file is well formed");
        Model::load(file).expect("the model is well formed")
    }

    /// As [`Synthetic::load`], with weights packed or as the file has them.
    pub fn load_packed_if(&self, packed: bool) -> Model {
        let mut model = self.load();
        if packed {
            model.pack(&runtime(2));
        }
        model
    }
}

fn write_metadata(writer: &mut Writer, shape: &Shape) {
    let number = |n: usize| Value::U32(n as u32);
    // One number where all layers agree, an array where they do not: both forms occur.
    let per_layer = |values: &[usize]| {
        if values.windows(2).all(|w| w[0] == w[1]) {
            number(values[0])
        } else {
            Value::Array(ValueType::U32, values.iter().map(|n| number(*n)).collect())
        }
    };
    writer
        .metadata("general.architecture", Value::String("llama".into()))
        .metadata("llama.block_count", number(shape.heads.len()))
        .metadata("llama.context_length", number(256))
        .metadata("llama.embedding_length", number(shape.embedding))
        .metadata("llama.feed_forward_length", per_layer(&shape.channels))
        .metadata("llama.attention.head_count", per_layer(&shape.heads))
        .metadata("llama.attention.head_count_kv", per_layer(&shape.kv_heads))
        .metadata("llama.attention.key_length", number(shape.head_dim))
        .metadata("llama.attention.value_length", number(shape.head_dim))
        .metadata("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .metadata("llama.rope.freq_base", Value::F32(shape.rope_base))
        .metadata("llama.rope.dimension_count", number(shape.rope_dim));
    if let Some(scale) = shape.rope_scale {
        writer
            .metadata("llama.rope.scaling.type", Value::String("linear".into()))
            .metadata("llama.rope.scaling.factor", Value::F32(scale));
    }
}

/// Encodes and adds a tensor; returns what decoding it gives.
fn store(
    writer: &mut Writer,
    name: &str,
    shape: &[usize],
    block_type: BlockType,
    values: &[f32],
) -> Vec<f64> {
    let cols = shape[shape.len() - 1];
    let row_bytes = block_type.row_bytes(cols);
    let mut bytes = vec![0u8; values.len().checked_div(cols).unwrap_or(0) * row_bytes];
    let mut decoded = vec![0.0f32; values.len()];
    if cols > 0 {
        for (r, row) in values.chunks_exact(cols).enumerate() {
            let stored = &mut bytes[r * row_bytes..][..row_bytes];
            encode_row(block_type, row, stored);
            decode_row(block_type, stored, &mut decoded[r * cols..][..cols]);
        }
    }
    writer.tensor(name, shape, block_type, bytes);
    decoded.into_iter().map(f64::from).collect()
}

/// The best kernels of this machine that keep single precision, and some threads: where it has tiles of bfloat16, those that
/// it would have without them.
pub fn runtime(threads: usize) -> Runtime {
    let best = Kernels::get().expect("an instruction set");
    let kernels = match rounds(best.isa()) {
        true => Isa::available()
            .filter(|isa| !rounds(*isa))
            .last()
            .and_then(Kernels::for_isa)
            .expect("plain C runs everywhere"),
        false => best,
    };
    runtime_of(kernels, threads)
}

/// Whether products of many tokens are in bfloat16: of half-precision weights, or of all.
fn rounds(isa: Isa) -> bool {
    matches!(isa, Isa::Avx512Bf16 | Isa::Amx)
}

fn runtime_of(kernels: Kernels, threads: usize) -> Runtime {
    Runtime {
        kernels,
        pool: Pool::new(threads).expect("threads"),
    }
}

/// Every instruction set of this machine, with the relative error that a forward pass may have where one in single precision
/// may have `exact`. Tiles of bfloat16 round off more.
pub fn each_runtime(threads: usize, exact: f64) -> Vec<(Runtime, f64)> {
    const TILES: f64 = 3e-2;
    let runtimes: Vec<_> = Isa::available()
        .map(|isa| {
            let kernels = Kernels::for_isa(isa).expect("it is available");
            let allowed = if rounds(isa) { TILES } else { exact };
            (runtime_of(kernels, threads), allowed)
        })
        .collect();
    assert!(runtimes.iter().any(|(_, allowed)| *allowed == exact));
    runtimes
}

/// The logits of every token, fed in batches of the given sizes: one token as a generated one, several as part of a prompt.
pub fn logits_in_batches(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    batches: &[usize],
) -> Vec<f32> {
    let phase = |size| match size {
        1 => Phase::Decode,
        _ => Phase::Prefill,
    };
    let pieces: Vec<_> = batches.iter().map(|size| (*size, phase(*size))).collect();
    logits_in_pieces(model, runtime, tokens, &pieces)
}

/// The logits of every token, fed in pieces of the given sizes and phases.
pub fn logits_in_pieces(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    pieces: &[(usize, Phase)],
) -> Vec<f32> {
    assert_eq!(pieces.iter().map(|p| p.0).sum::<usize>(), tokens.len());
    let mut cache = KvCache::new(model, tokens.len());
    let mut all = Vec::new();
    for &(size, phase) in pieces {
        let first = cache.len();
        let rows: Vec<Row> = (first..first + size)
            .map(|position| Row {
                token: tokens[position],
                sequence: 0,
                position,
                phase,
                wants_logits: true,
            })
            .collect();
        all.extend(logits_of_rows(
            model,
            runtime,
            &rows,
            &mut [&mut cache],
            phase,
        ));
    }
    all
}

/// The logits of those rows of a batch that want them, in their order.
pub fn logits_of_rows(
    model: &Model,
    runtime: &Runtime,
    rows: &[Row],
    sequences: &mut [&mut KvCache],
    phase: Phase,
) -> Vec<f32> {
    let (mut scratch, mut logits) = (Scratch::new(), Vec::new());
    let wanted = rows.iter().filter(|row| row.wants_logits).count();
    runtime.region(|team| {
        model
            .forward(team, rows, sequences, &mut scratch, &mut Unobserved)
            .expect("the batch fits");
        model.logits(team, phase, 0..wanted, &mut scratch, &mut logits);
    });
    logits
}

/// The logits of every token, fed all at once.
pub fn logits(model: &Model, runtime: &Runtime, tokens: &[u32]) -> Vec<f32> {
    logits_in_batches(model, runtime, tokens, &[tokens.len()])
}
