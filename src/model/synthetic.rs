//! Models of common shapes with random weights, to measure speed at sizes that nobody wants to download.

use std::path::Path;

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Model, ModelError};
use crate::gguf::{Value, Writer};
use crate::kernels::Runtime;
use crate::memory::Memory;
use crate::quant::{BlockType, decode_row};

/// Bytes that a thread fills at a time.
const PIECE: usize = 1 << 20;

/// The widths of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What it is called, for example `1b`.
    pub name: &'static str,
    pub layers: usize,
    pub embedding_length: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub channels: usize,
    pub vocabulary: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    pub context_length: usize,
}

impl Shape {
    /// Llama 3.2 1B: 1.24 · 10⁹ parameters, grouped-query attention, a large tied vocabulary.
    pub const LLAMA_1B: Shape = Shape {
        name: "1b",
        layers: 16,
        embedding_length: 2048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        channels: 8192,
        vocabulary: 128_256,
        tied: true,
        context_length: 131_072,
    };

    /// Llama 2 7B: 6.74 · 10⁹ parameters, every query head with a KV head of its own.
    pub const LLAMA_7B: Shape = Shape {
        name: "7b",
        layers: 32,
        embedding_length: 4096,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        channels: 11_008,
        vocabulary: 32_000,
        tied: false,
        context_length: 4096,
    };
}

impl Model {
    /// A model with random weights of variance 1 / columns, in memory of this process, with the bytes of a whole GGUF file (without a
    /// vocabulary) in its map.
    ///
    /// # Errors
    /// If the memory is not to be had.
    ///
    /// # Panics
    /// If `block_type` is not one whose blocks are a scale and integers, [`Q4_0`](BlockType::Q4_0) or
    /// [`Q8_0`](BlockType::Q8_0), or does not divide the widths.
    pub fn synthetic(
        shape: Shape,
        block_type: BlockType,
        runtime: &Runtime,
    ) -> Result<Self, ModelError> {
        let name = format!("{}-{}-synthetic", shape.name, block_type.name());
        let writer = writer(shape, block_type, &name);
        let needed = writer.data_bytes() as u64;
        let available = Memory::now().map_or(u64::MAX, |memory| memory.for_new());
        if available < needed {
            return Err(ModelError::Memory { needed, available });
        }
        let file = writer.image(Path::new(&name))?;
        let mut model = Self::load(file)?;
        model.fill(block_type, runtime);
        Ok(model)
    }

    /// Random bytes for all matrices, with scales that give the values their variance.
    fn fill(&mut self, block_type: BlockType, runtime: &Runtime) {
        let block = block_type.block_bytes();
        let deviation = code_deviation(block_type);
        let layers = self.layers.iter().flat_map(|l| l.linears());
        let weights = layers.map(|l| &l.weight).chain([&self.embedding]);
        let mut ranges = Vec::new();
        let mut scales = Vec::new();
        for weight in weights.chain(&self.output) {
            let scale = half::f16::from_f32(1.0 / (deviation * (weight.cols as f32).sqrt()));
            for start in weight.range.clone().step_by(PIECE / block * block) {
                ranges.push(start..(start + PIECE / block * block).min(weight.range.end));
                scales.push(scale.to_le_bytes());
            }
        }
        let mut pieces = self.map.disjoint_mut(&ranges);
        runtime.region(|team| {
            team.chunks_mut(&mut pieces, 1, |i, piece| {
                ChaCha8Rng::seed_from_u64(i as u64).fill_bytes(piece[0]);
                for block in piece[0].chunks_exact_mut(block) {
                    block[..2].copy_from_slice(&scales[i]);
                }
            });
        });
    }
}

/// The standard deviation of random codes under a scale of 1.
fn code_deviation(block_type: BlockType) -> f32 {
    assert!(
        matches!(block_type, BlockType::Q4_0 | BlockType::Q8_0),
        "{} has more than a scale in a block",
        block_type.name()
    );
    let mut values = [0.0f32; 32];
    let mut bytes = vec![0u8; block_type.block_bytes()];
    bytes[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
    let mut squares = 0.0;
    for code in 0..=u8::MAX {
        bytes[2..].fill(code);
        decode_row(block_type, &bytes, &mut values);
        squares += values.iter().map(|v| v * v).sum::<f32>();
    }
    (squares / (256.0 * 32.0)).sqrt()
}

fn writer(shape: Shape, block_type: BlockType, name: &str) -> Writer<'static> {
    let mut writer = Writer::new();
    writer.metadata("general.architecture", Value::String("llama".into()));
    writer.metadata("general.name", Value::String(name.into()));
    // By this llama.cpp knows that there is no vocabulary, only its size.
    writer.metadata("tokenizer.ggml.model", Value::String("no_vocab".into()));
    for (key, number) in [
        ("vocab_size", shape.vocabulary),
        ("block_count", shape.layers),
        ("context_length", shape.context_length),
        ("embedding_length", shape.embedding_length),
        ("feed_forward_length", shape.channels),
        ("attention.head_count", shape.heads),
        ("attention.head_count_kv", shape.kv_heads),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        ("rope.dimension_count", shape.head_dim),
    ] {
        writer.metadata(format!("llama.{key}"), Value::U32(number as u32));
    }
    writer.metadata("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    writer.metadata("llama.rope.freq_base", Value::F32(10_000.0));

    let d = shape.embedding_length;
    let [queries, keys] = [shape.heads, shape.kv_heads].map(|heads| heads * shape.head_dim);
    let ones: Vec<u8> = 1f32.to_le_bytes().repeat(d);
    let vector = |writer: &mut Writer<'static>, name: String| {
        writer.tensor(name, &[d], BlockType::F32, ones.clone());
    };
    writer.reserve("token_embd.weight", &[shape.vocabulary, d], block_type);
    if !shape.tied {
        writer.reserve("output.weight", &[shape.vocabulary, d], block_type);
    }
    vector(&mut writer, "output_norm.weight".into());
    for l in 0..shape.layers {
        for norm in ["attn_norm", "ffn_norm"] {
            vector(&mut writer, format!("blk.{l}.{norm}.weight"));
        }
        for (name, rows, cols) in [
            ("attn_q", queries, d),
            ("attn_k", keys, d),
            ("attn_v", keys, d),
            ("attn_output", d, queries),
            ("ffn_gate", shape.channels, d),
            ("ffn_up", shape.channels, d),
            ("ffn_down", d, shape.channels),
        ] {
            writer.reserve(format!("blk.{l}.{name}.weight"), &[rows, cols], block_type);
        }
    }
    writer
}
