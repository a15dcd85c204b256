//! The forward pass, against an independent one in double precision.

use crate::common::blocks::LONG_BLOCKS;
use crate::common::synthetic::{
    Shape, Synthetic, each_runtime, logits, logits_in_batches, runtime,
};
use crate::common::{Random, doubles, relative_error};
use flapjack::gguf::{GgufFile, Value, ValueType, Writer};
use flapjack::model::{Batch, KvCache, Model, ModelError, Scratch, Unobserved};
use flapjack::quant::BlockType;

/// Half-precision keys and values and single-precision sums against double precision throughout.
const TOLERANCE: f64 = 2e-3;

fn assert_follows_the_reference(shape: Shape) {
    let synthetic = Synthetic::new(shape);
    let model = synthetic.load();
    let tokens = Random::new(7).tokens(37, synthetic.shape.vocabulary);
    let (expected, _) = synthetic.reference.forward(&tokens);
    for threads in [1, 3] {
        for (runtime, allowed) in each_runtime(threads, TOLERANCE) {
            let isa = runtime.kernels.isa();
            let at_once = logits(&model, &runtime, &tokens);
            let error = relative_error(&at_once, &expected);
            assert!(error < allowed, "{isa:?}, batch: relative error {error}");
            let one_by_one = logits_in_batches(&model, &runtime, &tokens, &[1; 37]);
            let error = relative_error(&one_by_one, &expected);
            assert!(error < TOLERANCE, "{isa:?}, steps: relative error {error}");
        }
    }
}

#[test]
fn multi_head_attention() {
    assert_follows_the_reference(Shape {
        kv_heads: vec![4, 4],
        ..Shape::default()
    });
}

#[test]
fn grouped_query_attention() {
    assert_follows_the_reference(Shape::default());
}

#[test]
fn multi_query_attention_with_an_untied_head() {
    assert_follows_the_reference(Shape {
        kv_heads: vec![1, 1],
        tied: false,
        ..Shape::default()
    });
}

#[test]
fn biases_on_every_projection() {
    assert_follows_the_reference(Shape {
        biases: true,
        ..Shape::default()
    });
}

#[test]
fn rope_with_another_base_linear_scaling_and_frequency_factors() {
    assert_follows_the_reference(Shape {
        rope_base: 500_000.0,
        rope_scale: Some(4.0),
        rope_factors: true,
        ..Shape::default()
    });
}

#[test]
fn rope_on_a_part_of_each_head() {
    assert_follows_the_reference(Shape {
        rope_dim: 8,
        ..Shape::default()
    });
}

#[test]
fn layers_of_different_widths() {
    assert_follows_the_reference(Shape {
        heads: vec![4, 2, 6, 3],
        kv_heads: vec![2, 1, 3, 3],
        channels: vec![96, 33, 7, 160],
        ..Shape::default()
    });
}

#[test]
fn odd_sizes_everywhere() {
    assert_follows_the_reference(Shape {
        vocabulary: 61,
        embedding: 45,
        head_dim: 10,
        rope_dim: 10,
        heads: vec![3, 3],
        kv_heads: vec![1, 3],
        channels: vec![53, 71],
        ..Shape::default()
    });
}

#[test]
fn half_precision_and_bfloat_weights() {
    for block_type in [BlockType::F16, BlockType::BF16] {
        assert_follows_the_reference(Shape {
            block_type,
            ..Shape::default()
        });
    }
}

/// Steps of one token use 8-bit activations, so the tolerance is that of 8 bits; batches do not.
#[test]
fn quantised_weights() {
    for block_type in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
        let synthetic = Synthetic::new(Shape {
            block_type,
            channels: vec![96, 160],
            head_dim: 32,
            rope_dim: 32,
            ..Shape::default()
        });
        let model = synthetic.load();
        let tokens = Random::new(8).tokens(24, synthetic.shape.vocabulary);
        let (expected, _) = synthetic.reference.forward(&tokens);
        for (runtime, allowed) in each_runtime(2, TOLERANCE) {
            let isa = runtime.kernels.isa();
            let error = relative_error(&logits(&model, &runtime, &tokens), &expected);
            assert!(error < allowed, "{block_type:?}, {isa:?}, batch: {error}");
            let steps = logits_in_batches(&model, &runtime, &tokens, &[1; 24]);
            let error = relative_error(&steps, &expected);
            assert!(error < 3e-2, "{block_type:?}, {isa:?}, steps: {error}");
        }
    }
}

#[test]
fn packed_weights_give_what_native_ones_give() {
    for block_type in [
        BlockType::Q8_0,
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::IQ4_NL,
    ] {
        for (tied, vocabulary) in [(true, 50), (false, 64)] {
            let synthetic = Synthetic::new(Shape {
                block_type,
                vocabulary,
                tied,
                channels: vec![96, 160],
                head_dim: 32,
                rope_dim: 32,
                ..Shape::default()
            });
            let native = synthetic.load();
            let mut packed = synthetic.load();
            let runtime = runtime(2);
            assert!(packed.pack(&runtime) > 0);
            assert_eq!(packed.pack(&runtime), 0, "nothing is packed twice");
            let tokens = Random::new(8).tokens(24, vocabulary);
            // Native steps use 8-bit activations for some types, packed ones for all.
            let expected = logits_in_batches(&native, &runtime, &tokens, &[1; 24]);
            for split in [vec![1; 24], vec![24], vec![2, 3, 5, 7, 4, 3]] {
                let got = logits_in_batches(&packed, &runtime, &tokens, &split);
                let error = relative_error(&got, &doubles(&expected));
                assert!(error < 3e-2, "{block_type:?} {split:?}: {error}");
            }
            for l in 0..2 {
                let (was, is) = (&native.layers[l].up.weight, &packed.layers[l].up.weight);
                let (mut a, mut b) = (vec![0.0; was.cols], vec![1.0; was.cols]);
                for row in 0..was.rows {
                    was.decode_row(&native.map, row, &mut a);
                    is.decode_row(&packed.map, row, &mut b);
                    assert_eq!(a, b);
                }
            }
        }
    }
}

/// Formats with blocks of 256 want widths of 256.
#[test]
fn super_blocks_native_and_packed() {
    for block_type in LONG_BLOCKS {
        let synthetic = Synthetic::new(Shape {
            block_type,
            embedding: 256,
            head_dim: 64,
            rope_dim: 64,
            channels: vec![256, 512],
            ..Shape::default()
        });
        let tokens = Random::new(8).tokens(24, synthetic.shape.vocabulary);
        let (expected, _) = synthetic.reference.forward(&tokens);
        let runtime = runtime(2);
        for packed in [false, true] {
            let model = synthetic.load_packed_if(packed);
            for split in [vec![24], vec![1; 24], vec![5, 12, 7]] {
                let got = logits_in_batches(&model, &runtime, &tokens, &split);
                let error = relative_error(&got, &expected);
                // Packed weights meet 8-bit activations.
                let allowed = if packed { 3e-2 } else { TOLERANCE };
                assert!(
                    error < allowed,
                    "{block_type:?}, packed {packed}, {split:?}: {error}"
                );
            }
        }
    }
}

#[test]
fn a_prefill_of_n_equals_n_steps_of_one_and_any_other_split() {
    let synthetic = Synthetic::new(Shape {
        heads: vec![4, 8],
        kv_heads: vec![2, 4],
        ..Shape::default()
    });
    let model = synthetic.load();
    let runtime = runtime(2);
    let tokens = Random::new(9).tokens(100, synthetic.shape.vocabulary);
    let whole = doubles(&logits(&model, &runtime, &tokens));
    for split in [
        vec![1; 100],
        vec![50, 50],
        vec![7, 64, 1, 3, 25],
        vec![99, 1],
    ] {
        let parts = logits_in_batches(&model, &runtime, &tokens, &split);
        let error = relative_error(&parts, &whole);
        assert!(error < 1e-4, "{split:?}: relative error {error}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let synthetic = Synthetic::new(Shape {
        block_type: BlockType::Q4_0,
        head_dim: 32,
        rope_dim: 32,
        ..Shape::default()
    });
    let model = synthetic.load();
    let tokens = Random::new(10).tokens(40, synthetic.shape.vocabulary);
    for batches in [vec![40], vec![1; 40], vec![5; 8]] {
        let one = logits_in_batches(&model, &runtime(1), &tokens, &batches);
        for threads in [2, 3, 5] {
            let many = logits_in_batches(&model, &runtime(threads), &tokens, &batches);
            assert!(
                one.iter()
                    .zip(&many)
                    .all(|(a, b)| a.to_bits() == b.to_bits())
            );
        }
    }
}

#[test]
fn unknown_tokens_and_a_full_cache_are_errors_and_change_nothing() {
    let synthetic = Synthetic::new(Shape::default());
    let model = synthetic.load();
    let runtime = runtime(1);
    let mut cache = KvCache::new(&model, 4);
    let mut scratch = Scratch::new();
    let mut feed = |tokens: &[u32]| {
        let mut batch = Batch::new();
        batch.add_prompt(0, cache.len(), tokens, 0..0);
        let sequences = &mut [&mut cache];
        let result = runtime.region(|team| {
            model.forward(team, batch.rows(), sequences, &mut scratch, &mut Unobserved)
        });
        (result, cache.len())
    };
    assert!(matches!(
        feed(&[1, 50]),
        (
            Err(ModelError::Token {
                token: 50,
                place: 1,
                ..
            }),
            0
        )
    ));
    assert!(matches!(feed(&[1, 2, 3]), (Ok(()), 3)));
    assert!(matches!(
        feed(&[1, 2]),
        (
            Err(ModelError::CacheFull {
                needed: 5,
                capacity: 4
            }),
            3
        )
    ));
}

/// A copy of a well-formed model's file with a change to its metadata and tensors.
fn changed(
    metadata: impl Fn(&str, &Value) -> Value,
    tensor: impl Fn(&str) -> Option<String>,
    extra: Option<(&str, Value)>,
) -> Result<Model, ModelError> {
    let synthetic = Synthetic::new(Shape::default());
    let file = GgufFile::open(&synthetic.path).unwrap();
    let mut writer = Writer::new();
    for (key, value) in file.metadata() {
        writer.metadata(key, metadata(key, value));
    }
    if let Some((key, value)) = extra {
        writer.metadata(key, value);
    }
    for info in file.tensors() {
        if let Some(name) = tensor(&info.name) {
            writer.tensor(name, &info.shape, info.block_type, file.bytes(info));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    writer.save(&path).unwrap();
    Model::load(GgufFile::open(&path).unwrap())
}

fn with_metadata(key: &'static str, value: Value) -> String {
    let result = changed(
        |k, v| if k == key { value.clone() } else { v.clone() },
        |name| Some(name.to_owned()),
        None,
    );
    result.expect_err(key).to_string()
}

#[test]
fn another_architecture_is_refused_by_name() {
    let message = with_metadata("general.architecture", Value::String("gpt2".into()));
    assert!(
        message.contains("\"gpt2\"") && message.contains("llama"),
        "{message}"
    );
}

#[test]
fn impossible_metadata_is_refused_with_its_key() {
    for (key, value) in [
        ("llama.block_count", Value::U32(0)),
        ("llama.block_count", Value::U32(3)),
        ("llama.block_count", Value::U32(1)),
        ("llama.block_count", Value::U64(u64::MAX)),
        ("llama.block_count", Value::String("2".into())),
        ("llama.embedding_length", Value::U32(0)),
        ("llama.attention.head_count_kv", Value::U32(3)),
        ("llama.attention.head_count_kv", Value::U32(0)),
        (
            "llama.attention.head_count_kv",
            Value::Array(ValueType::U32, vec![Value::U32(2)]),
        ),
        ("llama.attention.key_length", Value::U32(0)),
        ("llama.attention.value_length", Value::U32(8)),
        ("llama.rope.dimension_count", Value::U32(17)),
        ("llama.rope.freq_base", Value::F32(f32::NAN)),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Value::F32(f32::INFINITY),
        ),
    ] {
        let message = with_metadata(key, value.clone());
        assert!(
            message.contains(key) || message.contains("blk."),
            "{key} = {value}: {message}"
        );
    }
}

#[test]
fn wrong_shapes_are_refused_with_the_tensor() {
    for (key, tensor) in [
        ("llama.feed_forward_length", "ffn_"),
        ("llama.embedding_length", "token_embd.weight"),
        ("llama.attention.head_count", "attn_q"),
    ] {
        let message = with_metadata(key, Value::U32(32));
        assert!(
            message.contains(tensor) && message.contains("shape"),
            "{message}"
        );
    }
}

#[test]
fn missing_and_unknown_tensors_are_refused_by_name() {
    let lost = "blk.1.ffn_up.weight";
    let message = changed(
        |_, v| v.clone(),
        |name| (name != lost).then(|| name.to_owned()),
        None,
    )
    .expect_err("a missing tensor")
    .to_string();
    assert!(
        message.contains(lost) && message.contains("missing"),
        "{message}"
    );

    let synthetic = Synthetic::new(Shape::default());
    let file = GgufFile::open(&synthetic.path).unwrap();
    let mut writer = crate::common::copy_of(&file);
    writer.tensor("blk.1.attn_q_norm.weight", &[1], BlockType::F32, vec![0; 4]);
    let path = synthetic.path.with_file_name("stranger.gguf");
    writer.save(&path).unwrap();
    let error =
        Model::load(GgufFile::open(&path).unwrap()).expect_err("a tensor that is not LLaMA's");
    assert!(
        error.to_string().contains("blk.1.attn_q_norm.weight"),
        "{error}"
    );
}

#[test]
fn mixtures_of_experts_and_unknown_rope_scaling_are_refused() {
    for (key, value) in [
        ("llama.expert_count", Value::U32(8)),
        ("llama.rope.scaling.type", Value::String("ntk".into())),
    ] {
        let result = changed(
            |_, v| v.clone(),
            |name| Some(name.to_owned()),
            Some((key, value)),
        );
        let message = result.expect_err(key).to_string();
        assert!(message.contains(key), "{message}");
    }
}
