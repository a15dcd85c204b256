//! Folders in Hugging Face's form: they run, are pruned and written as the GGUF file with the same weights, and what is wrong with one is
//! named.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flapjack::checkpoint;
use flapjack::engine::{Engine, EngineError, GenerateOptions, OpenOptions, Pack, ignore};
use flapjack::generate::SamplerConfig;
use flapjack::gguf::{GgufFile, Value};
use flapjack::prune::calibrate;
use flapjack::quant::BlockType;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value as Json, json};

use crate::common::engine::{Workshop, flap};
use crate::families::{CHANNELS, D, Draft, FAMILIES, HEAD, VOCABULARY, our_perplexity};

/// A tensor of a file of weights.
type Tensor = (Vec<usize>, Vec<f32>);

/// A folder in the making.
pub struct Checkpoint {
    pub config: Json,
    tokenizer: Json,
    tensors: BTreeMap<String, Tensor>,
    dtype: Dtype,
}

fn is_gemma(architecture: &str) -> bool {
    architecture.starts_with("gemma")
}

/// The name that a tensor has in files of weights.
fn own_name(architecture: &str, name: &str) -> String {
    let post_norms = matches!(architecture, "gemma2" | "gemma3");
    let whole = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => "",
    };
    if !whole.is_empty() {
        return whole.to_owned();
    }
    let (layer, rest) = name.strip_prefix("blk.").unwrap().split_once('.').unwrap();
    let (part, end) = rest.split_once('.').unwrap();
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" if architecture == "phi3" => "mlp.gate_up_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_norm" if post_norms => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        other => panic!("{other}"),
    };
    format!("model.layers.{layer}.{part}.{end}")
}

/// Rows of heads whose values are turned in pairs, in the order in which they are turned in halves.
fn in_halves(values: &[f32], rows: usize) -> Vec<f32> {
    let cols = values.len() / rows;
    let mut out = vec![0.0; values.len()];
    for (i, row) in values.chunks(cols).enumerate() {
        let (head, r) = (i / HEAD, i % HEAD);
        let to = head * HEAD + r % 2 * (HEAD / 2) + r / 2;
        out[to * cols..][..cols].copy_from_slice(row);
    }
    out
}

impl Checkpoint {
    /// The same model as the draft's GGUF file.
    pub fn of(architecture: &'static str, dtype: Dtype) -> Self {
        let draft = Draft::of(architecture);
        let model_type = match architecture {
            "gemma3" => "gemma3_text",
            other => other,
        };
        let mut config = json!({
            "model_type": model_type,
            "hidden_size": D,
            "num_hidden_layers": draft.layers,
            "num_attention_heads": draft.heads,
            "num_key_value_heads": draft.kv_heads,
            "head_dim": HEAD,
            "intermediate_size": CHANNELS,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 20000.0,
            "tie_word_embeddings": is_gemma(architecture),
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": [2],
        });
        let more = match architecture {
            "gemma2" => json!({
                "sliding_window": 40, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
                "query_pre_attn_scalar": HEAD, "hidden_activation": "gelu_pytorch_tanh",
            }),
            "gemma3" => json!({
                "sliding_window": 40, "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0,
                "hidden_activation": "gelu_pytorch_tanh",
            }),
            "gemma" => json!({"hidden_act": "gelu_pytorch_tanh"}),
            // A window that is named, and not used.
            "qwen2" => {
                json!({"sliding_window": 8, "use_sliding_window": false, "max_window_layers": 2})
            }
            _ => json!({}),
        };
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        let pairs = matches!(architecture, "llama" | "smollm3");
        let tensors = draft
            .tensors()
            .into_iter()
            .map(|(name, shape, mut values)| {
                if pairs && (name.contains("attn_q.") || name.contains("attn_k.")) {
                    values = in_halves(&values, shape[0]);
                }
                if is_gemma(architecture) && name.ends_with("norm.weight") {
                    values.iter_mut().for_each(|v| *v -= 1.0);
                }
                (own_name(architecture, &name), (shape, values))
            });
        Self {
            config,
            tokenizer: tokenizer(),
            tensors: tensors.collect(),
            dtype,
        }
    }

    /// Gives the tokenizer so many tokens, whatever the embedding has.
    pub fn resize_vocabulary(&mut self, tokens: usize) {
        let added = self.tokenizer["added_tokens"].as_array_mut().unwrap();
        added.retain(|token| token["id"].as_u64().unwrap() < tokens as u64);
        for id in VOCABULARY..tokens {
            let text = format!("<more {id}>");
            added.push(json!({"id": id, "content": text, "special": true}));
        }
        let vocab = self.tokenizer["model"]["vocab"].as_object_mut().unwrap();
        vocab.retain(|_, id| id.as_u64().unwrap() < tokens as u64);
    }

    /// Writes files of weights with these tensors.
    fn write_weights(&self, path: &Path, names: &[&String]) {
        let bytes: Vec<Vec<u8>> = names
            .iter()
            .map(|name| {
                let (shape, values) = &self.tensors[*name];
                let values = values.iter();
                match self.dtype_of(shape) {
                    Dtype::F16 => values
                        .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                        .collect(),
                    Dtype::BF16 => values
                        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                        .collect(),
                    _ => values.flat_map(|v| v.to_le_bytes()).collect(),
                }
            })
            .collect();
        let views = names.iter().zip(&bytes).map(|(name, bytes)| {
            let shape = self.tensors[*name].0.clone();
            let view = TensorView::new(self.dtype_of(&shape), shape, bytes).unwrap();
            (name.as_str(), view)
        });
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    /// Vectors are in single precision, as in the GGUF files that they are compared with.
    fn dtype_of(&self, shape: &[usize]) -> Dtype {
        match shape.len() {
            1 => Dtype::F32,
            _ => self.dtype,
        }
    }

    /// Writes the folder, its weights in one file.
    pub fn write(&self, folder: &Path) -> PathBuf {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(folder.join("tokenizer.json"), self.tokenizer.to_string()).unwrap();
        let names: Vec<&String> = self.tensors.keys().collect();
        self.write_weights(&folder.join("model.safetensors"), &names);
        folder.to_owned()
    }

    /// The same in three files with an index.
    pub fn write_shards(&self, folder: &Path) -> PathBuf {
        self.write(folder);
        std::fs::remove_file(folder.join("model.safetensors")).unwrap();
        let names: Vec<&String> = self.tensors.keys().collect();
        let mut map = serde_json::Map::new();
        for (i, names) in names.chunks(names.len().div_ceil(3)).enumerate() {
            let file = format!("model-{:05}-of-00003.safetensors", i + 1);
            self.write_weights(&folder.join(&file), names);
            for name in names {
                map.insert((*name).clone(), Json::String(file.clone()));
            }
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        let path = folder.join("model.safetensors.index.json");
        std::fs::write(path, index.to_string()).unwrap();
        folder.to_owned()
    }
}

/// The drafts' vocabulary, in which every byte is a token.
fn tokenizer() -> Json {
    let mut vocab = serde_json::Map::new();
    let first = ["<unk>", "<s>", "</s>", "\u{2581}"].map(str::to_owned);
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let rest = (260..VOCABULARY).map(|token| format!("<unused {token}>"));
    let mut added = Vec::new();
    for (id, text) in first.into_iter().chain(bytes).chain(rest).enumerate() {
        if !(3..260).contains(&id) {
            added.push(json!({"id": id, "content": text, "special": true}));
        }
        vocab.insert(text, json!(id));
    }
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

fn text() -> String {
    calibrate::TEXT.chars().take(600).collect()
}

fn go_on(engine: &Engine) -> String {
    let options = GenerateOptions {
        max_tokens: 24,
        ignore_end: true,
        sampler: SamplerConfig::greedy(),
        ..GenerateOptions::default()
    };
    let mut sequence = engine.sequence();
    let pieces = engine
        .generate(&mut sequence, "Once upon ", &options)
        .unwrap();
    pieces.collect::<Result<_, _>>().unwrap()
}

fn perplexity(engine: &Engine) -> f64 {
    our_perplexity(engine, &text(), 256, 1)
}

/// The GGUF file of the draft.
fn gguf(workshop: &Workshop, architecture: &'static str, block_type: BlockType) -> PathBuf {
    let path = workshop.path(&format!("{architecture}.gguf"));
    let mut draft = Draft::of(architecture);
    draft.block_type = block_type;
    draft.write(&path);
    path
}

/// To a thousandth: the values of a head are added in another order where rotation is stored otherwise, and sets that round inputs to
/// bfloat16 make more of that (5e-4 was seen, and 2e-6 elsewhere).
#[track_caller]
fn close(a: f64, b: f64, place: &str) {
    assert!((a / b - 1.0).abs() < 1e-3, "{place}: {a} {b}");
}

#[test]
fn every_family_runs_from_its_folder_as_from_gguf() {
    let workshop = Workshop::new();
    for architecture in FAMILIES {
        let path = gguf(&workshop, architecture, BlockType::F16);
        let folder = Checkpoint::of(architecture, Dtype::F16).write(&workshop.path(architecture));
        let [a, b] = [&path, &folder].map(|path| workshop.open_file(path));
        close(perplexity(&a), perplexity(&b), architecture);
        assert_eq!(go_on(&a), go_on(&b), "{architecture}");
        let texts = ["Hello  world ", "", " ünï 🙂\n<s>"];
        for text in texts {
            let ids = |engine: &Engine| engine.tokenizer().unwrap().encode_prompt(text).unwrap();
            assert_eq!(ids(&a), ids(&b), "{architecture}: {text:?}");
        }
    }
}

#[test]
fn every_type_and_any_number_of_files_run() {
    let workshop = Workshop::new();
    for (dtype, block_type) in [
        (Dtype::F32, BlockType::F32),
        (Dtype::BF16, BlockType::BF16),
        (Dtype::F16, BlockType::F16),
    ] {
        let whole = workshop.open_file(&gguf(&workshop, "llama", block_type));
        let checkpoint = Checkpoint::of("llama", dtype);
        let folder = checkpoint.write_shards(&workshop.path(&format!("{dtype:?}")));
        for path in [
            folder.clone(),
            folder.join("model.safetensors.index.json"),
            folder.join("model-00002-of-00003.safetensors"),
        ] {
            let engine = workshop.open_file(&path);
            assert_eq!(engine.model().layers[0].q.weight.block_type, block_type);
            close(
                perplexity(&engine),
                perplexity(&whole),
                &format!("{dtype:?}"),
            );
        }
    }
}

#[test]
fn weights_are_views_on_the_files() {
    let workshop = Workshop::new();
    let folder = Checkpoint::of("gemma", Dtype::F16).write(&workshop.path("folder"));
    let options = OpenOptions {
        threads: Some(1),
        pack: Pack::Never,
        ..OpenOptions::default()
    };
    let engine = Engine::open(&folder, options).unwrap();
    let file = std::fs::read(folder.join("model.safetensors")).unwrap();
    let model = engine.model();
    let range = model.layers[1].down.weight.range.clone();
    assert!(file[range.clone()] == model.map.bytes()[range]);
    // What is made, the norms of Gemma, takes a page or two.
    if let Some(residency) = model.map.residency() {
        assert!(residency.private <= 32 << 10, "{residency:?}");
    }
}

#[test]
fn folders_are_pruned_and_exported_as_gguf() {
    let workshop = Workshop::new();
    for architecture in ["llama", "qwen2", "gemma3", "phi3"] {
        let path = gguf(&workshop, architecture, BlockType::F16);
        let checkpoint = Checkpoint::of(architecture, Dtype::F16);
        let folder = checkpoint.write(&workshop.path(architecture));
        let before = std::fs::read(folder.join("model.safetensors")).unwrap();

        // As it is.
        let written = workshop.path("whole.gguf");
        workshop.open_file(&folder).export(&written).unwrap();
        let (source, file) = (
            GgufFile::open(&path).unwrap(),
            GgufFile::open(&written).unwrap(),
        );
        assert!(
            file.entries()
                .all(|(key, _)| !key.starts_with("flapjack.rotation"))
        );
        if architecture == "llama" {
            for tensor in source.tensors() {
                let ours = file.tensor(&tensor.name).expect("it is there");
                assert!(source.bytes(tensor) == file.bytes(ours), "{}", tensor.name);
            }
        }
        let (a, b) = (workshop.open_file(&path), workshop.open_file(&written));
        close(perplexity(&a), perplexity(&b), architecture);
        assert_eq!(go_on(&a), go_on(&b), "{architecture}");

        // Pruned.
        let pruned = [&path, &folder].map(|path| {
            let mut engine = workshop.open_file(path);
            engine.prune(&flap(), &mut ignore).unwrap();
            let written = workshop.path("pruned.gguf");
            engine.export(&written).unwrap();
            let again = workshop.open_file(&written);
            close(perplexity(&engine), perplexity(&again), architecture);
            (perplexity(&engine), go_on(&engine))
        });
        let difference = (pruned[0].0 / pruned[1].0 - 1.0).abs();
        assert!(difference < 0.02, "{architecture}: {pruned:?}");
        assert!(before == std::fs::read(folder.join("model.safetensors")).unwrap());
    }
}

#[test]
fn the_cache_knows_a_folder_again_and_its_settings() {
    let workshop = Workshop::new();
    let mut checkpoint = Checkpoint::of("llama", Dtype::F16);
    let folder = checkpoint.write(&workshop.path("folder"));
    let print = |path: &Path| checkpoint::open(path).unwrap().fingerprint();
    let first = print(&folder);
    assert_eq!(first, print(&folder.join("model.safetensors")));
    checkpoint.config["rope_theta"] = json!(30000.0);
    checkpoint.write(&folder);
    assert_ne!(first, print(&folder));
}

#[test]
fn factors_of_llama_3_are_computed() {
    let workshop = Workshop::new();
    let mut checkpoint = Checkpoint::of("llama", Dtype::F16);
    checkpoint.config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    });
    let file = checkpoint::open(checkpoint.write(&workshop.path("folder"))).unwrap();
    let tensor = file.tensor("rope_freqs.weight").expect("factors");
    assert_eq!(tensor.shape, [HEAD / 2]);
    let factors: Vec<f32> = file
        .bytes(tensor)
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    // Short waves stay, long ones are stretched by the factor.
    assert_eq!((factors[0], factors[HEAD / 2 - 1]), (1.0, 8.0));
    assert!(factors.windows(2).all(|pair| pair[0] <= pair[1]));
    let between = factors.iter().filter(|f| **f > 1.0 && **f < 8.0).count();
    assert!(between > 0);
}

#[test]
fn templates_come_from_the_folder() {
    let workshop = Workshop::new();
    let folder = Checkpoint::of("llama", Dtype::F16).write(&workshop.path("folder"));
    let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let settings = json!({"chat_template": template, "add_bos_token": false});
    std::fs::write(folder.join("tokenizer_config.json"), settings.to_string()).unwrap();
    let engine = workshop.open_file(&folder);
    assert!(engine.chat_template().is_ok());
    assert!(!engine.tokenizer().unwrap().adds_bos());
    std::fs::write(folder.join("chat_template.jinja"), "{{ other }}").unwrap();
    let file = checkpoint::open(&folder).unwrap();
    let found: Option<&str> = file.get("tokenizer.chat_template").unwrap();
    assert_eq!(found, Some("{{ other }}"));
}

/// The parts of SentencePiece's message that its programs write for a vocabulary of pairs.
#[derive(Clone, PartialEq, prost::Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerProto>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PieceProto {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, tag = "3")]
    kind: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TrainerProto {
    #[prost(int32, tag = "3")]
    model_type: i32,
    #[prost(int32, tag = "41")]
    bos: i32,
    #[prost(int32, tag = "42")]
    eos: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NormalizerProto {
    #[prost(bytes = "vec", tag = "2")]
    rules: Vec<u8>,
    #[prost(bool, optional, tag = "3")]
    prefix: Option<bool>,
}

#[test]
fn a_tokenizer_model_alone_is_as_good() {
    use prost::Message;
    let workshop = Workshop::new();
    let path = gguf(&workshop, "llama", BlockType::F16);
    let folder = Checkpoint::of("llama", Dtype::F16).write(&workshop.path("folder"));
    std::fs::remove_file(folder.join("tokenizer.json")).unwrap();
    says(
        &folder,
        &["tokenizer.json", "tokenizer.model", "is missing"],
    );

    let file = GgufFile::open(&path).unwrap();
    let texts: &[String] = file.require("tokenizer.ggml.tokens").unwrap();
    let list = |key: &str| match file.entries().find(|(name, _)| *name == key).unwrap().1 {
        Value::Array(_, values) => values.clone(),
        other => panic!("{other:?}"),
    };
    let (scores, types) = (
        list("tokenizer.ggml.scores"),
        list("tokenizer.ggml.token_type"),
    );
    let pieces = texts.iter().zip(scores.iter().zip(&types));
    let pieces = pieces.map(|(text, (score, kind))| match (score, kind) {
        (Value::F32(score), Value::I32(kind)) => PieceProto {
            text: text.clone(),
            score: *score,
            kind: *kind,
        },
        other => panic!("{other:?}"),
    });
    let mut model = ModelProto {
        pieces: pieces.collect(),
        trainer: Some(TrainerProto {
            model_type: 2,
            bos: 1,
            eos: 2,
        }),
        normalizer: Some(NormalizerProto {
            rules: vec![],
            // As the drafts' GGUF files say.
            prefix: Some(false),
        }),
    };
    let write = |model: &ModelProto| {
        std::fs::write(folder.join("tokenizer.model"), model.encode_to_vec()).unwrap();
    };
    write(&model);
    let [a, b] = [&path, &folder].map(|path| workshop.open_file(path));
    for text in ["Hello  world ", "", " ünï 🙂\n<s>"] {
        let ids = |engine: &Engine| engine.tokenizer().unwrap().encode_prompt(text).unwrap();
        assert_eq!(ids(&a), ids(&b), "{text:?}");
    }
    assert_eq!(go_on(&a), go_on(&b));

    // A token that another file adds.
    let last = texts.len() - 1;
    let added = json!({"added_tokens_decoder": {last.to_string(): {"content": "<|added|>", "special": true}}});
    std::fs::write(folder.join("tokenizer_config.json"), added.to_string()).unwrap();
    let file = checkpoint::open(&folder).unwrap();
    let texts: &[String] = file.require("tokenizer.ggml.tokens").unwrap();
    assert_eq!((texts.len(), texts[last].as_str()), (last + 1, "<|added|>"));

    model.normalizer.as_mut().unwrap().rules = vec![1, 2, 3];
    write(&model);
    says(&folder, &["tokenizer.model", "rules", "tokenizer.json"]);
    model.trainer.as_mut().unwrap().model_type = 1;
    write(&model);
    says(&folder, &["tokenizer.model", "BPE"]);
    std::fs::write(folder.join("tokenizer.model"), b"\xFFnothing").unwrap();
    says(&folder, &["tokenizer.model", "SentencePiece"]);
}

// ---- what is wrong ----

#[track_caller]
fn refused(workshop: &Workshop, change: impl Fn(&mut Checkpoint), parts: &[&str]) {
    let mut checkpoint = Checkpoint::of("llama", Dtype::F16);
    change(&mut checkpoint);
    let folder = checkpoint.write(&workshop.path("refused"));
    says(&folder, parts);
}

#[track_caller]
fn says(folder: &Path, parts: &[&str]) {
    let options = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    let error: EngineError = Engine::open(folder, options).expect_err("it is no model");
    let said = error.to_string();
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
}

#[test]
fn missing_extra_and_misshaped_tensors_are_named_as_the_files_name_them() {
    let workshop = Workshop::new();
    const DOWN: &str = "model.layers.2.mlp.down_proj.weight";
    refused(
        &workshop,
        |c| drop(c.tensors.remove(DOWN)),
        &[DOWN, "missing"],
    );
    refused(
        &workshop,
        |c| drop(c.tensors.remove("lm_head.weight")),
        &["lm_head.weight", "tie_word_embeddings"],
    );
    let extra = "model.layers.1.mlp.experts.0.weight";
    let add = |c: &mut Checkpoint| drop(c.tensors.insert(extra.into(), (vec![2], vec![0.0; 2])));
    refused(&workshop, add, &[extra, "not known"]);
    let misshape =
        |c: &mut Checkpoint| drop(c.tensors.insert(DOWN.into(), (vec![3, 2], vec![0.0; 6])));
    refused(&workshop, misshape, &[DOWN, "[3, 2]", "[64, 128]"]);
    refused(
        &workshop,
        |c| c.dtype = Dtype::I32,
        &["type I32 is not supported", "BF16"],
    );
}

#[test]
fn settings_that_do_not_run_are_named() {
    let workshop = Workshop::new();
    for (key, value, said) in [
        ("model_type", json!("mamba"), "mamba"),
        ("model_type", Json::Null, "model_type"),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "gptq",
        ),
        ("hidden_act", json!("relu"), "relu"),
        ("num_hidden_layers", json!("many"), "num_hidden_layers"),
        ("hidden_size", Json::Null, "hidden_size"),
        (
            "rope_scaling",
            json!({"rope_type": "dynamic", "factor": 2.0}),
            "dynamic",
        ),
        ("rope_scaling", json!({"type": "linear"}), "factor"),
    ] {
        refused(
            &workshop,
            |c| c.config[key] = value.clone(),
            &["config.json", said],
        );
    }
    refused(
        &workshop,
        |c| c.tokenizer["model"]["type"] = json!("Unigram"),
        &["tokenizer.json", "Unigram"],
    );
    refused(
        &workshop,
        |c| c.tokenizer["model"]["merges"] = Json::Null,
        &["tokenizer.json", "merges"],
    );
}

#[test]
fn files_that_are_missing_or_damaged_are_named() {
    let workshop = Workshop::new();
    let checkpoint = Checkpoint::of("llama", Dtype::F16);
    let folder = checkpoint.write_shards(&workshop.path("shards"));
    let second = folder.join("model-00002-of-00003.safetensors");
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() - 100]).unwrap();
    says(
        &folder,
        &["model-00002-of-00003.safetensors", "fetch it again"],
    );
    std::fs::remove_file(&second).unwrap();
    says(&folder, &["model-00002-of-00003.safetensors", "missing"]);
    std::fs::copy(folder.join("model-00001-of-00003.safetensors"), &second).unwrap();
    says(&folder, &["model-00002-of-00003.safetensors"]);

    let folder = checkpoint.write(&workshop.path("whole"));
    std::fs::write(folder.join("config.json"), "{").unwrap();
    says(&folder, &["config.json", "not JSON"]);
    let folder = checkpoint.write(&workshop.path("whole"));
    std::fs::remove_file(folder.join("tokenizer.json")).unwrap();
    says(&folder, &["tokenizer.json", "missing"]);
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    says(&folder, &["model.safetensors"]);
    // A file whose folder has nothing else.
    let folder = checkpoint.write(&workshop.path("alone"));
    std::fs::remove_file(folder.join("config.json")).unwrap();
    says(
        &folder.join("model.safetensors"),
        &["safetensors", "config.json"],
    );
}

#[test]
fn the_program_takes_a_folder() {
    let workshop = Workshop::new();
    let folder = Checkpoint::of("llama", Dtype::F16).write(&workshop.path("folder"));
    let folder = folder.to_str().unwrap();
    let shown = crate::common::program::succeed(&["inspect", folder]);
    for part in [
        "safetensors",
        "llama.block_count",
        "blk.3.ffn_down.weight",
        "F16",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let out = workshop.path("out.gguf");
    let cache = workshop.path("cache");
    let arguments = [
        "prune",
        "-m",
        folder,
        "--ratio",
        "0.2",
        "--method",
        "flap",
        "--calib-tokens",
        "512",
        "-o",
        out.to_str().unwrap(),
    ];
    let environment = [("FLAPJACK_CACHE", cache.to_str().unwrap())];
    let output = crate::common::program::flapjack_with(&arguments, &environment);
    assert!(
        output.status.success(),
        "{}",
        crate::common::program::stderr(&output)
    );
    assert!(GgufFile::open(&out).is_ok());
}
