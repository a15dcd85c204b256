//! Metadata of one's own in the place of the file's, from the engine's options and from `--override-kv`.

use flapjack::engine::{
    Engine, EngineError, MetadataValue, Notice, OpenOptions, PruneOptions, Target, ignore,
};
use flapjack::gguf::{GgufFile, Value, Writer};

use crate::common::engine::{CACHE, Workshop, flap};
use crate::common::program::{stderr, succeeded};

fn open(workshop: &Workshop, overrides: &[(&str, MetadataValue)]) -> Result<Engine, EngineError> {
    let overrides = overrides.iter().map(|(k, v)| ((*k).to_owned(), v.clone()));
    let options = OpenOptions {
        threads: Some(1),
        cache: Some(workshop.path(CACHE)),
        overrides: overrides.collect(),
        ..OpenOptions::default()
    };
    Engine::open(&workshop.model, options)
}

const CONTEXT: &str = "llama.context_length";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const EPSILON: &str = "llama.attention.layer_norm_rms_epsilon";

#[test]
fn values_take_the_place_of_the_files_own_or_are_added() {
    let workshop = Workshop::new();
    let engine = open(
        &workshop,
        &[
            (CONTEXT, MetadataValue::I64(64)),
            (EPSILON, MetadataValue::F64(0.5)),
            (ADD_EOS, MetadataValue::Bool(true)),
            (CONTEXT, MetadataValue::I64(128)),
        ],
    )
    .expect("it runs");
    let config = &engine.model().config;
    assert_eq!((config.context_length, config.rms_epsilon), (128, 0.5));
    let tokenizer = engine.tokenizer().unwrap();
    assert_eq!(tokenizer.encode_prompt("").unwrap(), [1, 2]);
    // A key that the file does not have may be one that was misspelt.
    let added: Vec<&str> = engine
        .notices()
        .iter()
        .filter_map(|notice| match notice {
            Notice::KeyAdded { key } => Some(key.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(added, [ADD_EOS]);
}

#[test]
fn a_value_of_the_wrong_type_is_as_in_a_file() {
    let workshop = Workshop::new();
    let error = open(&workshop, &[("llama.block_count", MetadataValue::F64(3.0))]);
    let said = error.expect_err("it cannot run").to_string();
    assert!(
        said.contains("llama.block_count: expected a non-negative integer"),
        "{said}"
    );
    // What can be done without is passed over.
    let engine = open(&workshop, &[(ADD_EOS, MetadataValue::I64(1))]).expect("it runs");
    let notices = engine.notices();
    assert!(
        notices.iter().any(|n| matches!(n, Notice::Metadata(_))),
        "{notices:?}"
    );
}

#[test]
fn numbers_are_stored_as_wide_as_those_that_they_replace() {
    let workshop = Workshop::new();
    let overrides = [
        (CONTEXT, Value::I64(77)),
        (EPSILON, Value::F64(0.25)),
        ("llama.block_count", Value::I64(-1)),
        ("tokenizer.ggml.padding_token_id", Value::I64(3)),
        ("llama.rope.freq_base", Value::F64(1e6)),
        ("general.negative", Value::I64(-3)),
        ("general.large", Value::I64(1 << 40)),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let file = GgufFile::open_with(&workshop.model, &overrides).unwrap();
    for (key, value) in [
        (CONTEXT, Value::U32(77)),
        (EPSILON, Value::F32(0.25)),
        // One that does not fit stays as it is.
        ("llama.block_count", Value::I64(-1)),
        // Without anything to replace they are 32 bits wide, as in most files.
        ("tokenizer.ggml.padding_token_id", Value::U32(3)),
        ("llama.rope.freq_base", Value::F32(1e6)),
        ("general.negative", Value::I32(-3)),
        ("general.large", Value::I64(1 << 40)),
    ] {
        assert_eq!(file.metadata()[key], value, "{key}");
    }
    // Also as the file is listed.
    let last = file.entries().last().unwrap();
    assert_eq!(last, ("general.large", &Value::I64(1 << 40)));
}

#[test]
fn a_model_with_other_metadata_has_another_fingerprint() {
    let workshop = Workshop::new();
    let fingerprint = |overrides: &[(&str, Value)]| {
        let overrides = overrides.iter().map(|(k, v)| ((*k).to_owned(), v.clone()));
        let overrides: Vec<_> = overrides.collect();
        GgufFile::open_with(&workshop.model, &overrides)
            .unwrap()
            .fingerprint()
    };
    let own = GgufFile::open(&workshop.model).unwrap().fingerprint();
    let base = |base| ("llama.rope.freq_base", Value::F64(base));
    let (a, b) = (fingerprint(&[base(1e6)]), fingerprint(&[base(2e6)]));
    assert!(a != own && b != own && a != b);
    assert_eq!(fingerprint(&[base(2e6), base(1e6)]), a, "the last counts");
    // In any order.
    let epsilon = (EPSILON, Value::F64(0.5));
    assert_eq!(
        fingerprint(&[base(1e6), epsilon.clone()]),
        fingerprint(&[epsilon, base(1e6)])
    );
    // What the file says itself changes nothing.
    let own_context = GgufFile::open(&workshop.model).unwrap().metadata()[CONTEXT].clone();
    assert_eq!(fingerprint(&[(CONTEXT, own_context)]), own);
}

/// A profile or an outcome of the one must not be taken for the other.
#[test]
fn the_cache_keeps_models_apart_that_differ_in_their_metadata() {
    let workshop = Workshop::new();
    let overrides = [(EPSILON, MetadataValue::F64(0.5))];
    let prune = |overrides: &[(&str, MetadataValue)]| {
        let mut engine = open(&workshop, overrides).unwrap();
        engine.prune(&flap(), &mut ignore).unwrap()
    };
    let own = prune(&[]);
    let other = prune(&overrides);
    assert_ne!(own.calibration.model, other.calibration.model);
    assert!(!other.repeated);
    assert_eq!(workshop.cached("profile").len(), 2);
    assert_eq!(workshop.cached("outcome").len(), 2);
    assert!(prune(&[]).repeated && prune(&overrides).repeated);
}

/// A search loads the model again and again, and writing maps its file once more.
#[test]
fn whatever_opens_the_file_again_has_the_overrides() {
    let mut workshop = Workshop::new();
    let source = GgufFile::open(&workshop.model).unwrap();
    let mut writer = Writer::new();
    for (key, value) in source.entries().filter(|(key, _)| *key != EPSILON) {
        writer.metadata(key, value.clone());
    }
    for tensor in source.tensors() {
        let bytes = source.bytes(tensor);
        writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
    }
    let incomplete = workshop.path("incomplete.gguf");
    writer.save(&incomplete).unwrap();
    workshop.model = incomplete;
    assert!(open(&workshop, &[]).is_err());

    let mut engine = open(&workshop, &[(EPSILON, MetadataValue::F64(1e-5))]).expect("it runs");
    let options = PruneOptions {
        target: Target::PerplexityRise(0.5),
        calibration: crate::common::engine::tokens(4096),
        ..flap()
    };
    engine.prune(&options, &mut ignore).expect("it is pruned");
    let path = workshop.path("out.gguf");
    engine.export(&path).expect("it is written");
    workshop.open_file(&path);
}

#[test]
fn a_file_that_is_written_has_the_other_metadata() {
    let workshop = Workshop::new();
    let mut engine = open(
        &workshop,
        &[
            (CONTEXT, MetadataValue::I64(99)),
            (ADD_EOS, MetadataValue::Bool(false)),
        ],
    )
    .unwrap();
    let path = workshop.path("out.gguf");
    engine.export(&path).expect("it is written");
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.metadata()[CONTEXT], Value::U32(99));
    assert_eq!(file.metadata()[ADD_EOS], Value::Bool(false));
    // And one that was pruned.
    let mut engine = open(&workshop, &[(CONTEXT, MetadataValue::I64(99))]).unwrap();
    engine.prune(&flap(), &mut ignore).unwrap();
    engine.export(&path).expect("it is written");
    let written = workshop.open_file(&path);
    assert_eq!(written.model().config.context_length, 99);
}

// ---- the command line ----

#[test]
fn every_command_that_opens_a_model_takes_overrides() {
    let workshop = Workshop::new();
    let text = workshop.write("text", "Once upon a time. ".repeat(20));
    let (text, out) = (text.to_str().unwrap(), workshop.path("out"));
    let out = out.to_str().unwrap();
    let wrong = ["--override-kv", "llama.block_count=int:2"];
    let right = [
        "--override-kv",
        "llama.context_length=int:64,tokenizer.ggml.add_eos_token=bool:false",
    ];
    let fast = [
        "--effort",
        "fast",
        "--calib-tokens",
        "256",
        "--method",
        "flap",
    ];
    for command in [
        vec!["run", "-p", "x", "-n", "1"],
        vec!["perplexity", "-f", text, "-c", "32"],
        [&["prune", "-o", out, "--ratio", "0.1"], &fast[..]].concat(),
        [&["calibrate", "-o", out], &fast[..]].concat(),
        vec!["bench", "-r", "1", "-p", "8", "-n", "1"],
    ] {
        succeeded(&workshop.flapjack(&[&command[..], &right].concat()));
        let output = workshop.flapjack(&[&command[..], &wrong].concat());
        assert!(!output.status.success(), "{command:?}");
        let said = stderr(&output);
        assert!(
            said.contains("blk.2.") && said.contains("number of layers"),
            "{said}"
        );
    }
}

#[test]
fn overrides_may_be_repeated_and_say_what_is_wrong_with_them() {
    let workshop = Workshop::new();
    let run = |arguments: &[&str]| {
        workshop.flapjack(&[&["run", "-v", "-p", "x", "-n", "1"], arguments].concat())
    };
    let output = run(&[
        "--override-kv",
        "llama.context_length=int:64",
        "--override-kv",
        "tokenizer.ggml.add_eos_token=bool:true",
    ]);
    let (_, said) = succeeded(&output);
    assert!(said.contains("tokenizer.ggml.add_eos_token"), "{said}");
    for wrong in [
        "llama.context_length=64",
        "llama.context_length=int:many",
        "x=u8:1",
    ] {
        let output = run(&["--override-kv", wrong]);
        assert_eq!(output.status.code(), Some(2));
        let said = stderr(&output);
        assert!(
            said.contains("--override-kv") && said.contains(wrong),
            "{said}"
        );
    }
}
