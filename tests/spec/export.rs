//! Pruned models as files: what they hold, that they compute the same, and that llama.cpp runs them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::Random;
use crate::common::pruning::{
    assert_computes_the_same, export, profile_of, restore_and_apply, text_for_biases,
};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::eval::{PerplexityOptions, perplexity};
use flapjack::gguf::{GgufFile, Value, ValueType, Writer};
use flapjack::kernels::{Isa, Kernels, Pool, Runtime};
use flapjack::model::{Architecture, CacheType, Export, Model};
use flapjack::progress::ignore;
use flapjack::prune::{
    self, LayerPlan, LayerRecord, LayerRestoration, Plan, Record, Restore, calibrate, record,
};
use flapjack::quant::{BlockType, decode_row, encode_row};
use flapjack::tokenize::Tokenizer;

/// Carries out a plan on a model, with FLAP's biases.
fn pruned(synthetic: &Synthetic, plan: &Plan) -> Model {
    let mut model = synthetic.load();
    let tokens = Random::new(99).tokens(700, synthetic.shape.vocabulary);
    let profile = profile_of(&model, text_for_biases(&tokens));
    restore_and_apply(&mut model, &profile, plan, Restore::Bias);
    model
}

fn plan(layers: &[(&[usize], usize)]) -> Plan {
    let layers = layers.iter().map(|(heads, channels)| LayerPlan {
        heads: heads.to_vec(),
        channels: (0..*channels).collect(),
        ..LayerPlan::default()
    });
    Plan {
        layers: layers.collect(),
        removed: 0,
        total: 1,
    }
}

/// Writes a model beside the file that it came from, and opens what was written.
fn written(synthetic: &Synthetic, model: &Model) -> GgufFile {
    let source = GgufFile::open(&synthetic.path).unwrap();
    let path = synthetic.path.with_file_name("pruned.gguf");
    export(model, &source, &path);
    GgufFile::open(path).unwrap()
}

/// Heads of whole blocks of 32, in KV groups of 3.
fn shape(block_type: BlockType) -> Shape {
    Shape {
        block_type,
        head_dim: 32,
        rope_dim: 32,
        heads: vec![9; 3],
        kv_heads: vec![3; 3],
        channels: vec![96; 3],
        biases: true,
        ..Shape::default()
    }
}

#[test]
fn a_pruned_model_comes_back_from_its_file_as_it_was() {
    // Even groups; uneven ones; one head; no heads; no channels; neither.
    let plans = [
        plan(&[
            (&[0, 1, 3, 4, 6, 7], 64),
            (&[0, 3], 96),
            (&[0, 1, 2, 3, 4, 5, 6, 7, 8], 32),
        ]),
        plan(&[(&[0, 1, 2, 3, 4, 6], 32), (&[0, 1, 2, 4], 96), (&[8], 64)]),
        plan(&[(&[], 64), (&[0, 1, 2, 3, 4, 8], 0), (&[5], 32)]),
        plan(&[(&[1, 2, 8], 64), (&[], 0), (&[], 32)]),
        plan(&[(&[], 0), (&[], 0), (&[], 0)]),
    ];
    for block_type in [
        BlockType::F32,
        BlockType::F16,
        BlockType::Q8_0,
        BlockType::Q4_1,
    ] {
        for plan in &plans {
            let synthetic = Synthetic::new(shape(block_type));
            let model = pruned(&synthetic, plan);
            let file = written(&synthetic, &model);
            let again = Model::load(file).unwrap();
            for layer in &again.layers {
                let sizes = &layer.group_sizes;
                assert!(sizes.windows(2).all(|w| w[0] == w[1]), "{sizes:?}");
                // llama.cpp drops the attention of layers without an MLP.
                assert!(layer.channels() > 0);
            }
            assert!(
                again.layers[0].heads() > 0,
                "llama.cpp asks the first layer"
            );
            assert_computes_the_same(&model, &again);
        }
    }
}

#[test]
fn heads_that_are_not_whole_blocks_are_evened_by_repeating_kv_heads() {
    let synthetic = Synthetic::new(Shape {
        block_type: BlockType::Q8_0,
        head_dim: 16,
        heads: vec![8; 2],
        kv_heads: vec![2; 2],
        ..Shape::default()
    });
    let plan = plan(&[(&[0, 1, 2, 4], 96), (&[], 64)]);
    let model = pruned(&synthetic, &plan);
    let export = Export::new(&model);
    let form = &export.layers()[0];
    assert_eq!(form.heads, [0, 1, 2, 3].map(Some));
    assert_eq!(form.kv_heads, [0, 0, 0, 1].map(Some));
    assert_eq!((form.added_heads(), form.repeated_kv_heads()), (0, 2));
    let again = Model::load(written(&synthetic, &model)).unwrap();
    assert_computes_the_same(&model, &again);
}

#[test]
fn everything_else_passes_through_byte_for_byte_and_in_its_order() {
    let synthetic = Synthetic::new(Shape {
        tied: false,
        rope_factors: true,
        ..shape(BlockType::Q8_0)
    });
    let source = GgufFile::open(&synthetic.path).unwrap();
    let model = pruned(
        &synthetic,
        &plan(&[(&[0, 3, 6], 64), (&[1, 2, 4], 96), (&[], 32)]),
    );
    let file = written(&synthetic, &model);
    for name in [
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "rope_freqs.weight",
        "blk.0.attn_norm.weight",
        "blk.2.ffn_norm.weight",
        // What lost nothing.
        "blk.1.ffn_gate.weight",
        "blk.1.ffn_down.weight",
    ] {
        let (was, is) = (source.tensor(name).unwrap(), file.tensor(name).unwrap());
        assert_eq!((&was.shape, was.block_type), (&is.shape, is.block_type));
        assert_eq!(source.bytes(was), file.bytes(is), "{name}");
    }
    assert!(file.tensor("blk.2.attn_norm.weight").is_none());

    let renamed: Vec<String> = source
        .entries()
        .map(|(key, _)| match key.strip_prefix("llama.") {
            Some(rest) => format!("deci.{rest}"),
            None => key.to_owned(),
        })
        .collect();
    let keys: Vec<&str> = file.entries().map(|(key, _)| key).collect();
    assert_eq!(keys, renamed);
    let changed = [
        "general.architecture",
        "deci.attention.head_count",
        "deci.attention.head_count_kv",
        "deci.feed_forward_length",
    ];
    for ((key, is), (_, was)) in file.entries().zip(source.entries()) {
        assert_eq!(is == was, !changed.contains(&key), "{key}: {was} -> {is}");
    }
}

#[test]
fn a_model_whose_layers_are_alike_stays_a_llama_file() {
    let synthetic = Synthetic::new(shape(BlockType::Q4_0));
    let whole = synthetic.load();
    let file = written(&synthetic, &whole);
    let source = GgufFile::open(&synthetic.path).unwrap();
    assert!(source.entries().eq(file.entries()), "nothing was pruned");
    assert_eq!(source.tensors().len(), file.tensors().len());
    for tensor in source.tensors() {
        let is = file.tensor(&tensor.name).unwrap();
        assert_eq!(source.bytes(tensor), file.bytes(is), "{}", tensor.name);
    }

    let model = pruned(
        &synthetic,
        &plan(&[(&[0, 3, 6], 64), (&[1, 4, 8], 64), (&[2, 4, 7], 64)]),
    );
    assert_eq!(Export::new(&model).architecture(), Architecture::Llama);
    let again = Model::load(written(&synthetic, &model)).unwrap();
    assert_computes_the_same(&model, &again);
}

#[test]
fn packed_weights_are_unpacked_to_what_they_were() {
    for block_type in [BlockType::Q4_1, BlockType::Q8_0, BlockType::F16] {
        let synthetic = Synthetic::new(shape(block_type));
        let native = synthetic.load();
        let mut model = synthetic.load();
        assert!(model.pack(&runtime(2)) > 0);
        model.unpack(&runtime(2));
        assert_eq!(model.map.bytes(), native.map.bytes(), "{block_type:?}");
        for (a, b) in native.layers.iter().zip(&model.layers) {
            for (a, b) in a.linears().into_iter().zip(b.linears()) {
                assert_eq!(a.weight, b.weight);
            }
        }
    }
}

#[test]
fn a_file_records_how_it_was_pruned_from_the_first_model_on() {
    let synthetic = Synthetic::new(shape(BlockType::F32));
    let source = GgufFile::open(&synthetic.path).unwrap();
    let first_plan = plan(&[(&[0, 1, 2, 3, 4, 6], 64), (&[2, 5, 8], 96), (&[], 32)]);
    let model = pruned(&synthetic, &first_plan);
    let export = Export::new(&model);
    let widths = [(9, 96); 3];
    let first = Record {
        version: "0.1.0".into(),
        method: "flap".into(),
        asked: 0.3,
        ratio: 0.29,
        parameters: 1000,
        profile: "aa".into(),
        calibration: "700 tokens of a text".into(),
        model: source.fingerprint(),
        sparse: Some("wanda:0.5".into()),
        layers: Record::layers(&first_plan, &widths, export.layers(), None),
    };
    assert_eq!(
        first.layers[0],
        LayerRecord {
            heads_before: 9,
            channels_before: 96,
            // Groups of 3, 2 and 1 are filled with zeros.
            heads: vec![
                Some(0),
                Some(1),
                Some(2),
                Some(3),
                Some(4),
                None,
                Some(6),
                None,
                None
            ],
            channels: 64,
        }
    );
    assert_eq!(first.layers[1].kept_heads(), [2, 5, 8]);
    assert!(first.layers[2].heads.is_empty());

    let path = synthetic.path.with_file_name("first.gguf");
    export
        .writer(&source, record::PREFIX, first.entries())
        .unwrap()
        .save(&path)
        .unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(Record::from_gguf(&file).unwrap().as_ref(), Some(&first));
    assert_eq!(Record::from_gguf(&source).unwrap(), None);

    // Pruned again, it still tells of the heads of the first model.
    let mut model = Model::load(GgufFile::open(&path).unwrap()).unwrap();
    let second_plan = plan(&[(&[1, 4, 5], 32), (&[0, 2], 96), (&[], 32)]);
    let none = vec![LayerRestoration::default(); 3];
    prune::apply(&mut model, &runtime(1), &second_plan, &none, &mut ignore).unwrap();
    let widths = [(9, 64), (3, 96), (0, 32)];
    let forms = Export::new(&model);
    let layers = Record::layers(&second_plan, &widths, forms.layers(), Some(&first));
    assert_eq!(layers[0].heads_before, 9);
    assert_eq!(layers[0].kept_heads(), [1, 4]);
    assert_eq!(layers[1].kept_heads(), [2, 8]);
    let second = Record { layers, ..first };
    let path = synthetic.path.with_file_name("second.gguf");
    forms
        .writer(&file, record::PREFIX, second.entries())
        .unwrap()
        .save(&path)
        .unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(Record::from_gguf(&file).unwrap(), Some(second));
}

// ---- reading `deci` files ----

/// A pruned file with some metadata replaced.
fn deci_with(key: &str, value: Value) -> String {
    let synthetic = Synthetic::new(shape(BlockType::F32));
    let model = pruned(
        &synthetic,
        &plan(&[(&[0, 3, 6], 64), (&[1], 96), (&[], 32)]),
    );
    let file = written(&synthetic, &model);
    let mut writer = Writer::new();
    for (k, v) in file.entries() {
        writer.metadata(k, if k == key { value.clone() } else { v.clone() });
    }
    for t in file.tensors() {
        writer.tensor(&t.name, &t.shape, t.block_type, file.bytes(t));
    }
    let path = synthetic.path.with_file_name("changed.gguf");
    writer.save(&path).unwrap();
    let error = Model::load(GgufFile::open(&path).unwrap()).expect_err("it was spoilt");
    error.to_string()
}

#[test]
fn deci_files_that_flapjack_does_not_know_are_refused_with_the_reason() {
    let counts = |counts: [u32; 3]| {
        Value::Array(ValueType::U32, counts.into_iter().map(Value::U32).collect())
    };
    // A linear map in the place of attention.
    let message = deci_with("deci.attention.head_count_kv", counts([3, 0, 0]));
    assert!(
        message.contains("head_count_kv") && message.contains("layer 1"),
        "{message}"
    );
    // Tensors that the widths leave no use for.
    let message = deci_with("deci.feed_forward_length", counts([64, 0, 32]));
    assert!(message.contains("blk.1.ffn_"), "{message}");
    let message = deci_with("deci.attention.head_count", counts([3, 1, 1]));
    assert!(message.contains("head_count_kv"), "{message}");
}

// ---- the real model, and the peer ----

/// Prunes the default model by 0.3, writes it, and returns the file and the model as it is in memory.
fn default_model_pruned(folder: &Path) -> (std::path::PathBuf, Model, Tokenizer) {
    let source = GgufFile::open(crate::common::default_model()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&source).unwrap();
    let tokens = tokenizer.encode(calibrate::TEXT).unwrap();
    let mut model = Model::load(GgufFile::open(source.path()).unwrap()).unwrap();
    let profile = profile_of(&model, text_for_biases(&tokens[..2048]));
    prune::flap(&mut model, &runtime(2), &profile, 0.3, &mut ignore).unwrap();
    let path = folder.join("pruned.gguf");
    export(&model, &source, &path);
    (path, model, tokenizer)
}

const CONTEXT: usize = 256;
const CHUNKS: usize = 4;

fn our_perplexity(model: &Model, runtime: &Runtime, tokenizer: &Tokenizer, text: &str) -> f64 {
    let options = PerplexityOptions {
        context: CONTEXT,
        chunks: Some(CHUNKS),
        all_positions: false,
        cache_type: CacheType::F16,
    };
    let tokens = tokenizer.encode_prompt(text).unwrap();
    perplexity(model, runtime, &tokens, None, options, &mut ignore)
        .unwrap()
        .perplexity
}

/// Kernels that keep F16 weights and single-precision activations as they are, without tiles of bfloat16.
fn exact_runtime() -> Runtime {
    let kernels = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Generic]
        .into_iter()
        .find_map(Kernels::for_isa)
        .expect("plain C runs everywhere");
    Runtime {
        kernels,
        pool: Pool::new(2).unwrap(),
    }
}

/// What llama-perplexity says of a file.
fn peer_perplexity(program: &Path, model: &Path, text: &Path) -> f64 {
    let output = Command::new(program)
        .args([
            "-m".as_ref(),
            model.as_os_str(),
            "-f".as_ref(),
            text.as_os_str(),
        ])
        .args(["-c", &CONTEXT.to_string(), "--chunks", &CHUNKS.to_string()])
        .args(["-b", &CONTEXT.to_string(), "-t", "2"])
        .stdin(Stdio::null())
        .output()
        .expect("the peer starts");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    said.lines()
        .find_map(|l| l.split("Final estimate: PPL = ").nth(1))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no perplexity in {said}"))
}

#[test]
fn a_pruned_default_model_runs_from_its_file_and_in_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let (path, model, tokenizer) = default_model_pruned(folder.path());
    let text: String = calibrate::TEXT.chars().skip(20_000).take(8_000).collect();
    let in_memory = our_perplexity(&model, &runtime(2), &tokenizer, &text);
    let again = Model::load(GgufFile::open(&path).unwrap()).unwrap();
    let from_file = our_perplexity(&again, &runtime(2), &tokenizer, &text);
    assert!(
        (from_file / in_memory - 1.0).abs() < 1e-3,
        "{in_memory} in memory, {from_file} from the file"
    );

    if let Some(program) = crate::common::peer("llama-perplexity") {
        let text_file = folder.path().join("text.txt");
        std::fs::write(&text_file, &text).unwrap();
        let peer = peer_perplexity(&program, &path, &text_file);
        println!("perplexity: ours {from_file:.4}, llama.cpp's {peer:.4}");
        assert!(
            (peer / from_file - 1.0).abs() < 0.01,
            "ours {from_file}, llama.cpp's {peer}"
        );
    }
    if let Some(program) = crate::common::peer("llama-completion") {
        let output = Command::new(program)
            .args(["-m".as_ref(), path.as_os_str()])
            .args(["-p", "The capital of France is", "-n", "8", "--temp", "0"])
            .args(["-t", "2", "-no-cnv", "--no-display-prompt"])
            .stdin(Stdio::null())
            .output()
            .expect("the peer starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && !text.trim().is_empty(),
            "{text} {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// The default model with its matrices in F16, so that they differ by the rounding of activations
/// only.
fn in_half_precision(folder: &Path) -> std::path::PathBuf {
    let source = GgufFile::open(crate::common::default_model()).unwrap();
    let mut writer = Writer::new();
    for (key, value) in source.entries() {
        writer.metadata(key, value.clone());
    }
    for tensor in source.tensors() {
        let bytes = source.bytes(tensor);
        if tensor.block_type.is_float() {
            writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
            continue;
        }
        let cols = tensor.shape[1];
        let mut values = vec![0.0; cols];
        let mut halves = vec![0; tensor.shape[0] * 2 * cols];
        let rows = bytes.chunks_exact(tensor.block_type.row_bytes(cols));
        for (row, half) in rows.zip(halves.chunks_exact_mut(2 * cols)) {
            decode_row(tensor.block_type, row, &mut values);
            encode_row(BlockType::F16, &values, half);
        }
        writer.tensor(&tensor.name, &tensor.shape, BlockType::F16, halves);
    }
    let path = folder.join("half.gguf");
    writer.save(&path).unwrap();
    path
}

/// The default model with layers that lost all heads, all channels, or both, among them the first and the last.
#[test]
fn llama_cpp_runs_layers_that_lost_everything() {
    let Some(program) = crate::common::peer("llama-perplexity") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let source = GgufFile::open(in_half_precision(folder.path())).unwrap();
    let tokenizer = Tokenizer::from_gguf(&source).unwrap();
    let tokens = tokenizer.encode(calibrate::TEXT).unwrap();
    let dense = Model::load(GgufFile::open(source.path()).unwrap()).unwrap();
    let profile = profile_of(&dense, text_for_biases(&tokens[..1024]));
    let text: String = calibrate::TEXT.chars().skip(20_000).take(8_000).collect();
    let text_file = folder.path().join("text.txt");
    std::fs::write(&text_file, &text).unwrap();
    let last = dense.layers.len() - 1;
    let cases: [&[(usize, bool, bool)]; 3] = [
        &[(20, true, false), (22, false, true), (24, true, true)],
        &[(0, true, false), (last, true, true)],
        &[(0, true, true), (last, false, true), (10, true, false)],
    ];
    for lost in cases {
        let lost: BTreeMap<usize, (bool, bool)> =
            lost.iter().map(|(l, a, m)| (*l, (*a, *m))).collect();
        let layers = (0..=last).map(|l| {
            let (no_heads, no_channels) = lost.get(&l).copied().unwrap_or_default();
            LayerPlan {
                // KV groups of 3, 3 and 2 in every fourth layer.
                heads: match l % 4 {
                    _ if no_heads => Vec::new(),
                    3 => (0..8).collect(),
                    _ => (0..9).collect(),
                },
                channels: (0..if no_channels { 0 } else { 1536 }).collect(),
                ..LayerPlan::default()
            }
        });
        let plan = Plan {
            layers: layers.collect(),
            removed: 0,
            total: 1,
        };
        let mut model = Model::load(GgufFile::open(source.path()).unwrap()).unwrap();
        restore_and_apply(&mut model, &profile, &plan, Restore::Bias);
        let path = folder.path().join("pruned.gguf");
        export(&model, &source, &path);
        let ours = our_perplexity(&model, &exact_runtime(), &tokenizer, &text);
        let peer = peer_perplexity(&program, &path, &text_file);
        println!("perplexity: ours {ours:.4}, llama.cpp's {peer:.4}");
        // In nats a token, and as a share of these: without its first layer a model talks nonsense of 16 nats, and what the two
        // programs round differently grows with it.
        assert!(
            (peer.ln() - ours.ln()).abs() < 6e-4 * peer.ln(),
            "{lost:?}: ours {ours}, llama.cpp's {peer}"
        );
    }
}
