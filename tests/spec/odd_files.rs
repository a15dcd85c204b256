//! Files that are given as models and are none, or not whole, or odd: what they are is found out first and told in words, and what
//! a model can run without does not keep it from running.

use std::path::{Path, PathBuf};

use flapjack::engine::{Engine, EngineError, MetadataWarning, Notice, OpenOptions};
use flapjack::gguf::{Foreign, GgufError, GgufFile, Value, ValueType, Writer};
use flapjack::model::{Kind, ModelError};
use flapjack::quant::BlockType;

use crate::common::engine::Workshop;

fn text(text: &str) -> Value {
    Value::String(text.into())
}

fn number(number: u32) -> Value {
    Value::U32(number)
}

/// The model of a workshop, to be written once more with changes.
struct Draft {
    source: GgufFile,
    entries: Vec<(String, Value)>,
    keeps: Keeps,
}

/// Whether a tensor stays, by its number and name.
type Keeps = Box<dyn Fn(usize, &str) -> bool>;

impl Draft {
    fn of(workshop: &Workshop) -> Self {
        let source = GgufFile::open(&workshop.model).unwrap();
        let entries = source.entries().map(|(k, v)| (k.to_owned(), v.clone()));
        Self {
            entries: entries.collect(),
            source,
            keeps: Box::new(|_, _| true),
        }
    }

    fn with(mut self, key: &str, value: Value) -> Self {
        match self.entries.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = value,
            None => self.entries.push((key.to_owned(), value)),
        }
        self
    }

    fn without(mut self, prefix: &str) -> Self {
        self.entries.retain(|(key, _)| !key.starts_with(prefix));
        self
    }

    /// Only these of the tensors, by their numbers and names.
    fn keeping(mut self, keeps: impl Fn(usize, &str) -> bool + 'static) -> Self {
        self.keeps = Box::new(keeps);
        self
    }

    fn save(&self, path: &Path) {
        let mut writer = Writer::new();
        for (key, value) in &self.entries {
            writer.metadata(key, value.clone());
        }
        for (i, tensor) in self.source.tensors().iter().enumerate() {
            if (self.keeps)(i, &tensor.name) {
                let bytes = self.source.bytes(tensor);
                writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
            }
        }
        writer.save(path).unwrap();
    }

    /// Opens the file as a model.
    fn open(&self, workshop: &Workshop) -> Result<Engine, EngineError> {
        let path = workshop.path("odd.gguf");
        self.save(&path);
        open(&path)
    }

    fn error(&self, workshop: &Workshop) -> EngineError {
        self.open(workshop).expect_err("it is no model")
    }
}

fn open(path: &Path) -> Result<Engine, EngineError> {
    let options = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    Engine::open(path, options)
}

fn message(path: &Path) -> String {
    open(path).expect_err("it is no model").to_string()
}

fn warnings(engine: &Engine) -> Vec<&MetadataWarning> {
    let notices = engine.notices().iter();
    let warnings = notices.filter_map(|notice| match notice {
        Notice::Metadata(warning) => Some(warning),
        _ => None,
    });
    warnings.collect()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

// ---- split models ----

/// Writes a model in parts as `llama-gguf-split` does: all metadata are in the first, which has the first `head` tensors; each other
/// part has only the `split.` keys. They are named `NAME-00001-of-0000N.gguf` and so on.
fn split(workshop: &Workshop, name: &str, count: usize, head: usize) -> Vec<PathBuf> {
    let total = GgufFile::open(&workshop.model).unwrap().tensors().len();
    let of_part = move |i: usize| match i < head {
        true => 0,
        false => 1 + (i - head) * (count - 1) / (total - head),
    };
    let parts = (0..count).map(|part| {
        let draft = Draft::of(workshop);
        let draft = if part == 0 { draft } else { draft.without("") };
        let draft = draft
            .with("split.no", Value::U16(part as u16))
            .with("split.count", Value::U16(count as u16))
            .with("split.tensors.count", Value::I32(total as i32))
            .keeping(move |i, _| of_part(i) == part);
        let path = workshop.path(&format!("{name}-{:05}-of-{count:05}.gguf", part + 1));
        draft.save(&path);
        path
    });
    parts.collect()
}

#[test]
fn a_part_without_the_others_names_those_that_are_missing() {
    let workshop = Workshop::new();
    let parts = split(&workshop, "model", 4, 3);
    std::fs::remove_file(&parts[0]).unwrap();
    let said = message(&parts[1]);
    assert_says(
        &said,
        &[
            "part 2 of 4",
            "; model-00003-of-00004.gguf and model-00004-of-00004.gguf are beside it",
            "but model-00001-of-00004.gguf is missing",
            "Fetch",
        ],
    );
    assert!(!said.contains("tokenizer"), "{said}");
    for part in &parts[2..] {
        std::fs::remove_file(part).unwrap();
    }
    assert_says(
        &message(&parts[1]),
        &["part 2 of 4", "it is alone", "Fetch"],
    );

    // Whoever gave it another name is told what can be told.
    let renamed = workshop.path("renamed.gguf");
    std::fs::rename(&parts[1], &renamed).unwrap();
    let error = open(&renamed).expect_err("a part");
    assert_says(&error.to_string(), &["part 2 of 4", "names do not follow"]);
    let EngineError::Model(ModelError::Part(part)) = error else {
        panic!("{error:?}");
    };
    assert_eq!(
        (part.number, part.count, part.others.len()),
        (Some(2), 4, 0)
    );
}

#[test]
fn of_many_parts_only_some_are_named() {
    let workshop = Workshop::new();
    let path = workshop.path("big-00001-of-00030.gguf");
    Draft::of(&workshop)
        .with("split.count", number(30))
        .save(&path);
    let said = message(&path);
    assert_says(
        &said,
        &[
            "part 1 of 30",
            "big-00005-of-00030.gguf and 25 more are missing",
        ],
    );
    assert!(!said.contains("big-00006"), "{said}");
}

#[test]
fn a_model_that_was_merged_again_runs() {
    let workshop = Workshop::new();
    for count in [0, 1] {
        let draft = Draft::of(&workshop).with("split.count", Value::U16(count));
        draft.open(&workshop).expect("it is whole");
    }
}

#[test]
fn parts_can_be_inspected() {
    let workshop = Workshop::new();
    let parts = split(&workshop, "split", 2, 5);
    let shown = crate::common::program::succeed(&["inspect", parts[1].to_str().unwrap()]);
    assert_says(&shown, &["token_embd.weight", "blk.2.ffn_down.weight"]);
    std::fs::remove_file(&parts[0]).unwrap();
    let shown = crate::common::program::succeed(&["inspect", parts[1].to_str().unwrap()]);
    assert_says(&shown, &["split.count", "blk.2.ffn_down.weight"]);
}

// ---- what belongs to a model and is none ----

#[test]
fn what_belongs_to_a_model_is_named_as_what_it_is() {
    let workshop = Workshop::new();
    let draft = || Draft::of(&workshop);
    let kind = |draft: Draft| match draft.error(&workshop) {
        EngineError::Model(ModelError::NotAModel { kind, .. }) => kind,
        error => panic!("{error:?}"),
    };
    let bare = || draft().without("tokenizer.");
    for (draft, expected) in [
        (bare().with("general.type", text("adapter")), Kind::Adapter),
        (bare().with("adapter.type", text("lora")), Kind::Adapter),
        (bare().with("general.type", text("mmproj")), Kind::Projector),
        (
            bare().with("general.architecture", text("clip")),
            Kind::Projector,
        ),
        (
            bare().without("").with("general.type", text("imatrix")),
            Kind::ImportanceMatrix,
        ),
        (
            bare().without("").with("imatrix.chunk_count", number(1)),
            Kind::ImportanceMatrix,
        ),
        (
            bare().with("general.architecture", text("controlvector")),
            Kind::ControlVector,
        ),
        (
            draft().with("general.type", text("poem")),
            Kind::Other("poem".into()),
        ),
        (draft().keeping(|_, _| false), Kind::Vocabulary),
        (bare().keeping(|_, _| false), Kind::Empty),
    ] {
        assert_eq!(kind(draft), expected);
    }
    let said = draft()
        .with("general.type", text("adapter"))
        .error(&workshop);
    assert_says(&said.to_string(), &["odd.gguf is an adapter", "base model"]);
    draft()
        .with("general.type", text("model"))
        .open(&workshop)
        .expect("a model");
}

#[test]
fn an_architecture_is_asked_for_before_a_tokenizer_and_types_of_tensors() {
    let workshop = Workshop::new();
    let path = workshop.path("odd.gguf");
    let strange = |architecture: &str| {
        let draft = Draft::of(&workshop).without("tokenizer.");
        draft
            .with("general.architecture", text(architecture))
            .save(&path);
        retype(&path, "blk.0.ffn_down.weight", 40);
        message(&path)
    };
    assert_says(
        &strange("gpt-oss"),
        &["architecture \"gpt-oss\" is not supported"],
    );
    assert_says(&strange("llama"), &["blk.0.ffn_down.weight", "NVFP4"]);
    let said = Draft::of(&workshop)
        .without("general.architecture")
        .error(&workshop);
    assert_says(&said.to_string(), &["general.architecture: is missing"]);
    assert_eq!(said.wanted_key(), Some("general.architecture"));
}

#[test]
fn mixtures_of_experts_are_known_by_their_tensors_too() {
    let workshop = Workshop::new();
    let draft = || Draft::of(&workshop).without("tokenizer.");
    let said = draft()
        .with("llama.expert_count", number(8))
        .error(&workshop)
        .to_string();
    assert_says(&said, &["llama.expert_count", "mixture-of-experts"]);

    let path = workshop.path("experts.gguf");
    let source = GgufFile::open(&workshop.model).unwrap();
    let mut writer = crate::common::copy_of(&source);
    writer.tensor(
        "blk.0.ffn_gate_exps.weight",
        &[2, 2, 4],
        BlockType::F32,
        vec![0; 64],
    );
    writer.save(&path).unwrap();
    assert_says(
        &message(&path),
        &["blk.0.ffn_gate_exps.weight", "mixture of experts"],
    );
}

// ---- types of tensors ----

/// Puts another number of a type into the entry of a tensor of rank 2.
fn retype(path: &Path, tensor: &str, type_id: u32) {
    let mut bytes = std::fs::read(path).unwrap();
    let name = [&(tensor.len() as u64).to_le_bytes(), tensor.as_bytes()].concat();
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    let type_at = at + 4 + 2 * 8;
    bytes[type_at..type_at + 4].copy_from_slice(&type_id.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn types_that_are_not_supported_are_named_with_what_to_take_instead() {
    let workshop = Workshop::new();
    let path = workshop.path("odd.gguf");
    let said = |type_id| {
        Draft::of(&workshop).save(&path);
        retype(&path, "blk.1.ffn_up.weight", type_id);
        message(&path)
    };
    for (type_id, name, instead) in [
        (4, "Q4_2", "Q4_0"),
        (5, "Q4_3", "Q4_1"),
        (31, "Q4_0_4_4", "Q4_0"),
        (32, "Q4_0_4_8", "Q4_0"),
        (33, "Q4_0_8_8", "Q4_0"),
        (36, "IQ4_NL_4_4", "IQ4_NL"),
        (37, "IQ4_NL_4_8", "IQ4_NL"),
        (38, "IQ4_NL_8_8", "IQ4_NL"),
    ] {
        assert_says(
            &said(type_id),
            &[
                &format!("blk.1.ffn_up.weight: type {name} is not supported, for it was removed"),
                &format!("take the {instead} file"),
            ],
        );
    }
    for (type_id, name, instead) in [
        (40, "NVFP4", "Q4_0"),
        (41, "Q1_0", "Q2_K"),
        (42, "Q2_0", "Q2_K"),
    ] {
        assert_says(
            &said(type_id),
            &[
                &format!("type {name} is not supported"),
                &format!("--allow-requantize {} new.gguf {instead}", path.display()),
            ],
        );
    }
    assert_says(
        &said(26),
        &["type I32 is not supported", "not one of weights"],
    );
    for type_id in [43, 1000, u32::MAX] {
        let unknown = format!("unknown type {type_id}");
        assert_says(&said(type_id), &[&unknown, "supported are", "Q4_0"]);
    }
    for block_type in BlockType::ALL {
        assert_says(&said(40), &[block_type.name()]);
    }
}

/// Every number up to the newest is either read or named.
#[test]
fn no_type_of_ggml_is_unknown() {
    for id in 0..=42 {
        let supported = BlockType::from_id(id).is_some();
        assert_ne!(supported, BlockType::unsupported(id).is_some(), "{id}");
    }
}

#[test]
fn what_is_not_supported_can_be_inspected() {
    let workshop = Workshop::new();
    let path = workshop.path("odd.gguf");
    Draft::of(&workshop).save(&path);
    retype(&path, "blk.1.ffn_up.weight", 40);
    let path = path.to_str().unwrap();
    let shown = crate::common::program::succeed(&["inspect", path]);
    let line = shown
        .lines()
        .find(|line| line.contains("blk.1.ffn_up"))
        .unwrap();
    assert_says(line, &["128 x 64", "NVFP4", "unknown"]);
    let json = crate::common::program::succeed(&["inspect", "--json", path]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let tensors = json["tensors"].as_array().unwrap();
    let tensor = tensors
        .iter()
        .find(|t| t["name"] == "blk.1.ffn_up.weight")
        .unwrap();
    assert_eq!(tensor["type"], "NVFP4");
    assert!(tensor["bytes"].is_null());
}

// ---- files of other formats ----

#[test]
fn files_of_other_formats_are_recognised() {
    let workshop = Workshop::new();
    let safetensors = [&12u64.to_le_bytes()[..], b"{\"a\":{}}    ", &[0; 64]].concat();
    let tar = [&b"model.gguf"[..], &[0; 247], b"ustar\0", &[0; 64]].concat();
    for (bytes, expected) in [
        (&b"lmgg\x00\x00\x00\x00"[..], Foreign::OldGgml),
        (b"fmgg\x01\x00\x00\x00", Foreign::OldGgml),
        (b"tjgg\x03\x00\x00\x00", Foreign::OldGgml),
        (b"algg\x01\x00\x00\x00", Foreign::OldLora),
        (b"FUGG\x00\x00\x00\x03", Foreign::ReverseGguf),
        (&safetensors, Foreign::Safetensors),
        (b"PK\x03\x04\x00\x00archive/data.pkl", Foreign::Zip),
        (b"\x80\x02\x8a\x0al\xfc\x9cF", Foreign::Pickle),
        (b"MZqFpD='\n", Foreign::Llamafile),
        (b"\x1f\x8b\x08\x00", Foreign::Compressed("gzip")),
        (b"\x28\xb5\x2f\xfd\x04", Foreign::Compressed("zstd")),
        (&tar, Foreign::Compressed("tar")),
        (b"<!DOCTYPE html>\n<html class=\"\">", Foreign::Web),
        (b"\n  <HTML><head>", Foreign::Web),
        (b"<?xml version=\"1.0\"?><Error>", Foreign::Web),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a",
            Foreign::LfsPointer,
        ),
        (
            b"{\n  \"architectures\": [\"LlamaForCausalLM\"]",
            Foreign::Json,
        ),
        (&[0; 4096], Foreign::Zeros),
    ] {
        let path = workshop.write("model.gguf", bytes);
        let error = GgufFile::open(&path).expect_err("no GGUF file");
        assert_says(&error.to_string(), &["model.gguf is not a GGUF file but "]);
        let GgufError::Foreign { found, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(found, expected);
    }
    // What only looks a little like one is not taken for it.
    for bytes in [
        &b"{ not json"[..],
        b"\x80 text",
        &[0; 100],
        &[9, 0, 0, 0, 0, 0, 0, 0, b'{'],
    ] {
        let path = workshop.write("model.gguf", bytes);
        let error = GgufFile::open(&path).expect_err("no GGUF file");
        assert!(matches!(error, GgufError::NotGguf { .. }), "{error}");
    }
}

#[test]
fn pieces_of_a_file_that_was_cut_up_are_known_by_their_names() {
    let workshop = Workshop::new();
    let whole = std::fs::read(&workshop.model).unwrap();
    let (head, tail) = whole.split_at(whole.len() / 2);
    for (name, bytes) in [
        ("tiny.gguf.part1of2", head),
        ("tiny.gguf.part2of2", tail),
        ("tiny.gguf-split-a", head),
        ("tiny.gguf-split-b", tail),
    ] {
        let path = workshop.write(name, bytes);
        assert_says(&message(&path), &[name, "a piece of a file", "join"]);
    }
    // By its name alone no file is a piece.
    let path = workshop.write("tiny.gguf.part1of1", &whole);
    open(&path).expect("it is whole");
}

#[test]
fn old_new_and_reversed_versions_say_what_to_do() {
    let workshop = Workshop::new();
    for (version, said) in [
        (1u32, "convert it anew"),
        (4, "newer program"),
        (u32::MAX, "damaged"),
        (3u32.swap_bytes(), "gguf_convert_endian.py"),
    ] {
        let bytes = [&b"GGUF"[..], &version.to_le_bytes(), &[0; 16]].concat();
        assert_says(
            &message(&workshop.write("v.gguf", bytes)),
            &["version", said],
        );
    }
}

#[test]
fn a_folder_in_the_place_of_a_model_says_what_is_in_it() {
    let workshop = Workshop::new();
    let folder = |name: &str| workshop.path(name).to_str().unwrap().to_owned();
    workshop.write("models/b.gguf", "");
    workshop.write("models/a.gguf", "");
    workshop.write("checkpoint/model-00001-of-00002.safetensors", "");
    workshop.write("checkpoint/config.json", "");
    workshop.write("notes/notes.txt", "");
    let said = |name: &str| crate::common::program::fail(&["run", "-p", "x", "-m", &folder(name)]);
    assert_says(
        &said("models"),
        &["folder, with a.gguf, b.gguf in it", "-m"],
    );
    assert_says(
        &said("checkpoint"),
        &[
            "model-00001-of-00002.safetensors",
            "converted",
            "convert_hf_to_gguf.py",
        ],
    );
    assert_says(&said("notes"), &["this is a folder;"]);
}

// ---- metadata that a model can run without, or cannot ----

#[test]
fn an_id_beyond_the_vocabulary_does_not_keep_a_model_from_running() {
    let workshop = Workshop::new();
    let eos = "tokenizer.ggml.eos_token_id";
    let engine = Draft::of(&workshop)
        .with(eos, number(5000))
        .open(&workshop)
        .expect("it runs");
    let expected = MetadataWarning::Ignored {
        key: eos.into(),
        problem: "5000 is not the id of a token, there are 320".into(),
    };
    assert!(
        warnings(&engine).contains(&&expected),
        "{:?}",
        engine.notices()
    );
    assert_eq!(engine.tokenizer().unwrap().eos(), Some(2));
    let path = workshop.path("odd.gguf");
    let output = workshop_run(&path, &["-n", "2"]);
    assert_says(&output, &["WARN", eos, "5000", "--override-kv"]);
}

/// Standard error of a run that must succeed.
fn workshop_run(path: &Path, more: &[&str]) -> String {
    let arguments = [
        &["run", "-p", "x", "-t", "1", "-m", path.to_str().unwrap()],
        more,
    ]
    .concat();
    let output = crate::common::program::flapjack(&arguments);
    crate::common::program::succeeded(&output).1
}

#[test]
fn a_context_that_is_not_told_is_assumed() {
    let workshop = Workshop::new();
    let key = "llama.context_length";
    let missing = MetadataWarning::Missing {
        key: key.into(),
        assumed: "2048".into(),
    };
    for (draft, problem) in [
        (Draft::of(&workshop).without(key), None),
        (
            Draft::of(&workshop).with(key, number(0)),
            Some("must not be 0"),
        ),
        (
            Draft::of(&workshop).with(key, text("long")),
            Some("expected a non-negative integer, found \"long\""),
        ),
    ] {
        let engine = draft.open(&workshop).expect("it runs");
        assert_eq!(engine.model().config.context_length, 2048);
        let warnings = warnings(&engine);
        assert!(warnings.contains(&&missing), "{warnings:?}");
        let ignored = problem.map(|problem| MetadataWarning::Ignored {
            key: key.into(),
            problem: problem.into(),
        });
        assert!(
            ignored.iter().all(|w| warnings.contains(&w)),
            "{warnings:?}"
        );
    }
}

#[test]
fn a_base_of_rotation_that_is_not_told_is_assumed_and_noticed() {
    let workshop = Workshop::new();
    let key = "llama.rope.freq_base";
    let engine = Draft::of(&workshop)
        .without(key)
        .open(&workshop)
        .expect("it runs");
    assert_eq!(engine.model().config.rope_base, 10_000.0);
    let missing = MetadataWarning::Missing {
        key: key.into(),
        assumed: "10000".into(),
    };
    assert!(
        warnings(&engine).contains(&&missing),
        "{:?}",
        engine.notices()
    );
}

#[test]
fn a_window_layout_or_quantisation_of_no_use_or_another_kind_is_noticed() {
    let workshop = Workshop::new();
    let noticed = |key: &str, value: Value| {
        let draft = Draft::of(&workshop).with("llama.context_length", number(512));
        let engine = draft.with(key, value).open(&workshop).expect("it runs");
        let of_key = |warning: &&MetadataWarning| match warning {
            MetadataWarning::Ignored { key: k, .. } | MetadataWarning::Missing { key: k, .. } => {
                k == key
            }
        };
        warnings(&engine).into_iter().find(of_key).cloned()
    };
    let window = "llama.attention.sliding_window";
    assert_eq!(noticed(window, number(128)), None, "it is kept to");
    let said = format!("{:?}", noticed(window, text("wide")));
    assert_says(&said, &["wide", "expected"]);

    let layout = "llama.tensor_data_layout";
    assert_eq!(noticed(layout, text("Meta AI original pth")), None);
    let said = format!("{:?}", noticed(layout, text("jploski")));
    assert_says(&said, &["jploski", "not known"]);

    let version = "general.quantization_version";
    assert_eq!(noticed(version, number(2)), None);
    assert_says(
        &format!("{:?}", noticed(version, number(1))),
        &["version 1", "version 2"],
    );
}

/// What changes the arithmetic is not passed over: the results would be wrong.
#[test]
fn metadata_that_would_change_the_arithmetic_are_refused_by_name() {
    let workshop = Workshop::new();
    for (key, value, neutral) in [
        ("attention.causal", Value::Bool(false), Value::Bool(true)),
        ("attention.clamp_kqv", Value::F32(8.0), Value::F32(0.0)),
        ("attention.max_alibi_bias", Value::F32(8.0), Value::F32(0.0)),
        (
            "attention.scale",
            Value::F32(0.5),
            Value::F32(1.0 / 32f32.sqrt()),
        ),
        ("attn_logit_softcapping", Value::F32(50.0), Value::F32(0.0)),
        ("final_logit_softcapping", Value::F32(30.0), Value::F32(0.0)),
        ("embedding_scale", Value::F32(12.0), Value::F32(1.0)),
        ("logit_scale", Value::F32(0.25), Value::F32(1.0)),
        ("residual_scale", Value::F32(0.22), Value::F32(1.0)),
        (
            "rope.scaling.yarn_log_multiplier",
            Value::F32(0.1),
            Value::F32(0.0),
        ),
        (
            "use_parallel_residual",
            Value::Bool(true),
            Value::Bool(false),
        ),
        ("logit_scale", text("x"), number(0)),
        ("rope.scaling.type", text("ntk"), text("none")),
    ] {
        let key = format!("llama.{key}");
        let error = Draft::of(&workshop).with(&key, value).error(&workshop);
        assert_says(&error.to_string(), &[&key, "not supported"]);
        Draft::of(&workshop)
            .with(&key, neutral)
            .open(&workshop)
            .unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn what_a_model_cannot_run_without_is_named_with_what_gives_it() {
    let workshop = Workshop::new();
    for key in [
        "llama.attention.layer_norm_rms_epsilon",
        "llama.attention.head_count",
        "llama.feed_forward_length",
        "llama.embedding_length",
        "llama.block_count",
    ] {
        let error = Draft::of(&workshop).without(key).error(&workshop);
        assert_says(&error.to_string(), &[key, "is missing"]);
        assert_eq!(error.wanted_key(), Some(key), "{error}");
    }
    // A tokenizer is more than can be given by hand.
    for key in [
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
    ] {
        let error = Draft::of(&workshop).without(key).error(&workshop);
        assert_says(&error.to_string(), &[key, "is missing"]);
        assert_eq!(error.wanted_key(), None, "{error}");
    }
    let error = Draft::of(&workshop)
        .with("llama.embedding_length", text("64"))
        .error(&workshop);
    assert_says(
        &error.to_string(),
        &["llama.embedding_length", "expected", "\"64\""],
    );

    let path = workshop.path("odd.gguf");
    Draft::of(&workshop)
        .without("llama.attention.layer_norm")
        .save(&path);
    let said = crate::common::program::fail(&["run", "-p", "x", "-m", path.to_str().unwrap()]);
    assert_says(
        &said,
        &["--override-kv llama.attention.layer_norm_rms_epsilon=TYPE:VALUE"],
    );
}

/// The model with byte-level BPE in the place of its vocabulary: a token for each byte, and a few for nothing.
fn byte_level(workshop: &Workshop, pre: Option<&str>) -> Draft {
    let mut spare = 0x100..;
    let mut texts: Vec<String> = (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
            _ => char::from_u32(spare.next().unwrap()).unwrap().to_string(),
        })
        .collect();
    texts.push("<|endoftext|>".into());
    let types = (0..texts.len()).map(|id| Value::I32(if id < 256 { 1 } else { 3 }));
    let draft = Draft::of(workshop)
        .without("tokenizer.")
        .with("tokenizer.ggml.model", text("gpt2"))
        .with(
            "tokenizer.ggml.token_type",
            Value::Array(ValueType::I32, types.collect()),
        )
        .with("tokenizer.ggml.tokens", Value::StringArray(texts))
        .with("tokenizer.ggml.merges", Value::StringArray(Vec::new()))
        .with("tokenizer.ggml.eos_token_id", number(256));
    match pre {
        Some(pre) => draft.with("tokenizer.ggml.pre", text(pre)),
        None => draft,
    }
}

#[test]
fn byte_level_bpe_without_a_pre_tokenizer_is_noticed() {
    let workshop = Workshop::new();
    let engine = byte_level(&workshop, None)
        .open(&workshop)
        .expect("it runs");
    let missing = MetadataWarning::Missing {
        key: "tokenizer.ggml.pre".into(),
        assumed: "default".into(),
    };
    assert_eq!(warnings(&engine), [&missing]);
    let said = workshop_run(&workshop.path("odd.gguf"), &["-n", "1"]);
    assert_says(
        &said,
        &["WARN", "tokenizer.ggml.pre", "otherwise than in training"],
    );

    let engine = byte_level(&workshop, Some("gpt-2"))
        .open(&workshop)
        .expect("it runs");
    assert_eq!(warnings(&engine), Vec::<&MetadataWarning>::new());
    let error = byte_level(&workshop, Some("klingon")).error(&workshop);
    assert_eq!(error.wanted_key(), Some("tokenizer.ggml.pre"), "{error}");
}
