//! Folders and files as GGUF files: what comes of them computes the same, here and in llama.cpp, and is written whole or not at all.

use std::path::Path;
use std::process::Stdio;

use flapjack::convert::{FileType, Mixture, Types};
use flapjack::engine::{
    ConvertOptions, ConvertReport, EngineError, Event, OpenOptions, Stage, convert, ignore,
};
use flapjack::gguf::{GgufFile, Value, Writer};
use flapjack::prune::calibrate;
use flapjack::quant::{BlockType, decode_row};
use safetensors::tensor::Dtype;

use crate::common::engine::{Workshop, break_at, flap};
use crate::common::program::{flapjack, program, stderr, succeeded};
use crate::common::{copy_of, peer};
use crate::families::{CHUNKS, CONTEXT, Draft, FAMILIES, our_perplexity, peer_perplexity};
use crate::safetensors::Checkpoint;
use crate::split::split;

pub fn options(types: Types) -> ConvertOptions {
    ConvertOptions {
        types,
        importance: None,
        open: OpenOptions::default(),
    }
}

/// Matrices in this type, whatever they were in.
fn floats(file_type: FileType) -> ConvertOptions {
    options(Types::Mixture(Mixture {
        requantize: true,
        ..file_type.into()
    }))
}

fn converted(source: &Path, target: &Path, options: &ConvertOptions) -> ConvertReport {
    convert(source, options, Some(target), &mut ignore)
        .unwrap_or_else(|error| panic!("{}: {error}", source.display()))
}

fn text() -> String {
    calibrate::TEXT.chars().take(1200).collect()
}

#[track_caller]
fn close(a: f64, b: f64, place: &str) {
    assert!((a / b - 1.0).abs() < 1e-3, "{place}: {a} {b}");
}

/// The values of a tensor.
pub fn values(file: &GgufFile, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).expect("it is there");
    let cols = *tensor.shape.last().unwrap();
    let mut values = vec![0.0; tensor.shape.iter().product()];
    let row_bytes = tensor.block_type.row_bytes(cols);
    for (row, out) in file
        .bytes(tensor)
        .chunks(row_bytes)
        .zip(values.chunks_mut(cols))
    {
        decode_row(tensor.block_type, row, out);
    }
    values
}

// ---- folders ----

#[test]
fn a_folder_of_every_family_becomes_the_file_that_it_would_be() {
    let workshop = Workshop::new();
    for architecture in FAMILIES {
        for (dtype, block_type) in [(Dtype::BF16, BlockType::BF16), (Dtype::F32, BlockType::F32)] {
            let path = workshop.path("family.gguf");
            let mut draft = Draft::of(architecture);
            draft.block_type = block_type;
            draft.write(&path);
            let folder = Checkpoint::of(architecture, dtype).write_shards(&workshop.path("folder"));
            let target = workshop.path("converted.gguf");
            let report = converted(&folder, &target, &options(Types::Keep));
            assert_eq!(report.bytes, std::fs::metadata(&target).unwrap().len());

            let (expected, file) = (
                GgufFile::open(&path).unwrap(),
                GgufFile::open(&target).unwrap(),
            );
            for tensor in expected.tensors() {
                let ours = file.tensor(&tensor.name).expect("it is there");
                assert_eq!(ours.shape, tensor.shape, "{architecture}: {}", tensor.name);
                assert_eq!(ours.block_type, tensor.block_type, "{}", tensor.name);
                // What was added to Gemma's norms is taken off again.
                if !tensor.name.contains("norm") {
                    assert!(
                        file.bytes(ours) == expected.bytes(tensor),
                        "{architecture}: {}",
                        tensor.name
                    );
                }
            }
            let id = if dtype == Dtype::BF16 { 32 } else { 0 };
            let key = |key: &str| file.metadata().get(key);
            assert_eq!(key("general.file_type"), Some(&Value::U32(id)));
            assert_eq!(key("general.quantization_version"), Some(&Value::U32(2)));
            assert_eq!(key("flapjack.rotation"), None);
        }
    }
}

#[test]
fn llama_cpp_runs_what_was_a_folder() {
    let Some(program) = peer("llama-perplexity") else {
        return;
    };
    let workshop = Workshop::new();
    let text_file = workshop.write("text.txt", text());
    for architecture in FAMILIES {
        // Not by the name of a family: by that llama.cpp looks for tokens which these have not.
        let folder = Checkpoint::of(architecture, Dtype::F16).write(&workshop.path("folder"));
        let target = workshop.path("converted.gguf");
        converted(&folder, &target, &options(Types::Keep));
        let theirs = peer_perplexity(&program, &target, &text_file);
        let theirs = theirs.unwrap_or_else(|said| panic!("{architecture}: {said}"));
        let ours =
            |path: &Path| our_perplexity(&workshop.open_file(path), &text(), CONTEXT, CHUNKS);
        println!(
            "{architecture}: ours {}, llama.cpp's {theirs}",
            ours(&target)
        );
        close(ours(&folder), ours(&target), architecture);
        assert!(
            (ours(&target) / theirs - 1.0).abs() < 0.01,
            "{architecture}: {theirs}"
        );
    }
}

/// Rows of an embedding that no token has, and tokens without rows: a file has as many of the one as of the other.
#[test]
fn a_vocabulary_has_as_many_tokens_as_the_embedding_has_rows() {
    let workshop = Workshop::new();
    let rows = crate::families::VOCABULARY;
    for tokens in [rows - 20, rows + 1] {
        let mut checkpoint = Checkpoint::of("llama", Dtype::F16);
        checkpoint.resize_vocabulary(tokens);
        let folder = checkpoint.write(&workshop.path("folder"));
        let target = workshop.path("converted.gguf");
        converted(&folder, &target, &options(Types::Keep));
        let file = GgufFile::open(&target).unwrap();
        let Some(Value::StringArray(texts)) = file.metadata().get("tokenizer.ggml.tokens") else {
            panic!("there are tokens");
        };
        assert_eq!(texts.len(), rows, "{tokens}");
        for key in ["scores", "token_type"] {
            let Some(Value::Array(_, items)) =
                file.metadata().get(&format!("tokenizer.ggml.{key}"))
            else {
                panic!("there is {key}");
            };
            assert_eq!(items.len(), rows, "{tokens}");
        }
        workshop.open_file(&target);
    }
}

// ---- files ----

#[test]
fn parts_become_one_file_with_the_same_bytes() {
    let workshop = Workshop::new();
    let parts = split(&workshop, "model", 3, 4);
    let target = workshop.path("whole.gguf");
    let report = converted(&parts[1], &target, &options(Types::Keep));
    assert_eq!(report.file_type, Some("q8_0"));
    let (whole, file) = (
        GgufFile::open(&workshop.model).unwrap(),
        GgufFile::open(&target).unwrap(),
    );
    assert_eq!(whole.tensors().len(), file.tensors().len());
    for tensor in whole.tensors() {
        let ours = file.tensor(&tensor.name).unwrap();
        assert!(whole.bytes(tensor) == file.bytes(ours));
    }
    assert!(file.entries().all(|(key, _)| !key.starts_with("split.")));
}

#[test]
fn matrices_take_the_type_and_vectors_stay() {
    let workshop = Workshop::new();
    let source = GgufFile::open(&workshop.model).unwrap();
    for (file_type, block_type, id) in [
        (FileType::F32, BlockType::F32, 0),
        (FileType::F16, BlockType::F16, 1),
        (FileType::BF16, BlockType::BF16, 32),
    ] {
        let target = workshop.path("floats.gguf");
        converted(&workshop.model, &target, &floats(file_type));
        let file = GgufFile::open(&target).unwrap();
        for tensor in file.tensors() {
            let expected = match tensor.shape.len() {
                1 => BlockType::F32,
                _ => block_type,
            };
            assert_eq!(tensor.block_type, expected, "{}", tensor.name);
            let (old, new) = (values(&source, &tensor.name), values(&file, &tensor.name));
            let far = old
                .iter()
                .zip(&new)
                .any(|(a, b)| (a - b).abs() > 0.01 * a.abs() + 1e-6);
            assert!(!far, "{}", tensor.name);
        }
        assert_eq!(
            file.metadata().get("general.file_type"),
            Some(&Value::U32(id))
        );
    }
}

#[test]
fn a_pruned_model_keeps_its_record_and_its_widths() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    engine.prune(&flap(), &mut ignore).unwrap();
    let pruned = workshop.path("pruned.gguf");
    engine.export(&pruned).unwrap();
    let target = workshop.path("floats.gguf");
    converted(&pruned, &target, &floats(FileType::F32));
    let (before, after) = (workshop.open_file(&pruned), workshop.open_file(&target));
    let widths = |engine: &flapjack::engine::Engine| {
        let layers = engine.model().layers.iter();
        layers
            .map(|l| (l.heads(), l.channels()))
            .collect::<Vec<_>>()
    };
    assert_eq!(widths(&before), widths(&after));
    let file = GgufFile::open(&target).unwrap();
    assert!(file.entries().any(|(key, _)| key.starts_with("flapjack.")));
    let ppl = |engine| our_perplexity(engine, &text(), CONTEXT, 1);
    assert!((ppl(&before) / ppl(&after) - 1.0).abs() < 0.01);
}

#[test]
fn values_that_a_type_has_no_place_for_are_named() {
    let workshop = Workshop::new();
    let source = GgufFile::open(&workshop.model).unwrap();
    let large = workshop.path("large.gguf");
    let mut writer = Writer::new();
    for (key, value) in source.entries() {
        writer.metadata(key, value.clone());
    }
    for tensor in source.tensors() {
        let mut all = values(&source, &tensor.name);
        if tensor.name == "blk.1.ffn_up.weight" {
            all[300] = 1e5;
        }
        let bytes: Vec<u8> = all.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.tensor(&tensor.name, &tensor.shape, BlockType::F32, bytes);
    }
    writer.save(&large).unwrap();
    let target = workshop.path("target.gguf");
    let error = convert(&large, &floats(FileType::F16), Some(&target), &mut ignore).unwrap_err();
    let words = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(
        words.contains("blk.1.ffn_up.weight") && words.contains("F16"),
        "{words}"
    );
    assert!(!target.exists());
    converted(&large, &target, &floats(FileType::BF16));
}

// ---- whole or not at all ----

#[test]
fn the_source_is_never_written_over() {
    let workshop = Workshop::new();
    let parts = split(&workshop, "model", 2, 4);
    let folder = Checkpoint::of("qwen2", Dtype::F16).write(&workshop.path("folder"));
    let mut pairs = vec![
        (workshop.model.clone(), workshop.model.clone()),
        (parts[0].clone(), parts[1].clone()),
        (folder.clone(), folder.join("model.safetensors")),
    ];
    #[cfg(unix)]
    {
        let link = workshop.path("link.gguf");
        std::os::unix::fs::symlink(&workshop.model, &link).unwrap();
        pairs.push((workshop.model.clone(), link));
    }
    for (source, target) in pairs {
        let before = std::fs::read(&target).unwrap();
        let error = convert(&source, &options(Types::Keep), Some(&target), &mut ignore);
        let error = error.expect_err("it is the source");
        let words = std::error::Error::source(&error).map_or(error.to_string(), |e| e.to_string());
        assert!(words.contains("take the place"), "{words}");
        assert!(before == std::fs::read(&target).unwrap());
    }
}

#[test]
fn what_is_broken_off_leaves_what_was_there() {
    let workshop = Workshop::new();
    let target = workshop.write("target.gguf", "as it was");
    let mut events = break_at(Stage::Exporting, 1);
    let broken = convert(
        &workshop.model,
        &floats(FileType::F32),
        Some(&target),
        &mut events,
    );
    assert!(matches!(broken, Err(EngineError::Cancelled(_))));
    assert_eq!(std::fs::read(&target).unwrap(), b"as it was");
    let left = std::fs::read_dir(workshop.path("")).unwrap();
    let drafts = left.filter(|f| {
        f.as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .contains(".flapjack-")
    });
    assert_eq!(drafts.count(), 0);
    let mut last = 0;
    let mut events = |event: Event| {
        assert!(event.done >= last && event.done <= event.total);
        last = event.done;
        std::ops::ControlFlow::Continue(())
    };
    convert(
        &workshop.model,
        &floats(FileType::F32),
        Some(&target),
        &mut events,
    )
    .unwrap();
    assert!(last > 0);
}

#[test]
fn what_is_no_model_is_named() {
    let workshop = Workshop::new();
    let target = workshop.path("target.gguf");
    let model = GgufFile::open(&workshop.model).unwrap();
    let mut experts = copy_of(&model);
    let path = workshop.path("adapter.gguf");
    let mut writer = Writer::new();
    writer
        .metadata("general.type", Value::String("adapter".into()))
        .metadata("general.architecture", Value::String("llama".into()));
    writer.save(&path).unwrap();
    let error = convert(&path, &options(Types::Keep), Some(&target), &mut ignore).unwrap_err();
    assert!(error.to_string().contains("adapter"), "{error}");
    experts.metadata("llama.expert_count", Value::U32(4));
    experts.save(&path).unwrap();
    let error = convert(&path, &options(Types::Keep), Some(&target), &mut ignore).unwrap_err();
    assert!(error.to_string().contains("mixture-of-experts"), "{error}");
    assert!(!target.exists());
}

// ---- the command ----

#[test]
fn the_command_converts_and_reports() {
    let workshop = Workshop::new();
    let folder = Checkpoint::of("gemma3", Dtype::BF16).write(&workshop.path("folder"));
    let target = workshop.path("target.gguf");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (source, out) = (text(&folder), text(&target));
    let output = flapjack(&["convert", &source, "-o", &out, "--type", "f16"]);
    let (stdout, report) = succeeded(&output);
    assert_eq!(stdout, "");
    assert!(
        report.contains("f16") && report.contains("in F16"),
        "{report}"
    );
    let quiet = flapjack(&["convert", &source, "-o", &out, "-q"]);
    assert_eq!(succeeded(&quiet).1, "");
    for (arguments, words) in [
        (
            vec!["convert", &source, "-o", &out, "--type", "q4_0"],
            "keep",
        ),
        (vec!["convert", &source], "--output"),
        (vec!["convert", "nowhere", "-o", &out], "nowhere"),
        (vec!["convert", &out, "-o", &out], "another file"),
    ] {
        let output = flapjack(&arguments);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    // What other programs call a command.
    let output = program()
        .args(["imatrix"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(stderr(&output).contains("calibrate --imatrix"));
}
