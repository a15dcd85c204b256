//! Files in smaller types: which matrices take which type, as llama-quantize has it; what they predict; importance matrices; sizes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flapjack::convert::{FileType, ImportanceMatrix, Mixture, Types};
use flapjack::engine::{
    ConvertOptions, ConvertReport, EngineError, OpenOptions, OutOfReach, convert, ignore,
    read_importance,
};
use flapjack::gguf::{GgufFile, Value, Writer};
use flapjack::model::Model;
use flapjack::prune::{Effort, calibrate};
use flapjack::quant::{BlockType, encode_row};

use crate::common::engine::{Workshop, tokens};
use crate::common::program::{flapjack, stderr, succeeded};
use crate::common::synthetic::{logits, runtime};
use crate::common::{Random, doubles, peer, relative_error, skip};
use crate::families::{CHUNKS, CONTEXT, our_perplexity, peer_perplexity, put_vocabulary};

const VOCABULARY: usize = crate::families::VOCABULARY;

/// A random model whose rows have blocks of 256.
#[derive(Clone, Copy)]
struct Wide {
    architecture: &'static str,
    layers: usize,
    width: usize,
    channels: usize,
    heads: usize,
    kv_heads: usize,
    tied: bool,
}

const HEAD: usize = 64;

const LLAMA: Wide = Wide {
    architecture: "llama",
    layers: 4,
    width: 256,
    channels: 512,
    heads: 4,
    kv_heads: 1,
    tied: false,
};

impl Wide {
    fn tensors(self) -> Vec<(String, Vec<usize>)> {
        let Self {
            width: d, channels, ..
        } = self;
        let (q, kv) = (self.heads * HEAD, self.kv_heads * HEAD);
        let mut all = vec![
            ("token_embd.weight".to_owned(), vec![VOCABULARY, d]),
            ("output_norm.weight".to_owned(), vec![d]),
        ];
        if !self.tied {
            all.push(("output.weight".to_owned(), vec![VOCABULARY, d]));
        }
        for l in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                all.push((format!("blk.{l}.{name}"), shape.to_vec()));
            };
            add("attn_norm.weight", &[d]);
            add("ffn_norm.weight", &[d]);
            if self.architecture == "phi3" {
                add("attn_qkv.weight", &[q + 2 * kv, d]);
                add("ffn_up.weight", &[2 * channels, d]);
            } else {
                add("attn_q.weight", &[q, d]);
                add("attn_k.weight", &[kv, d]);
                add("attn_v.weight", &[kv, d]);
                add("ffn_gate.weight", &[channels, d]);
                add("ffn_up.weight", &[channels, d]);
            }
            add("attn_output.weight", &[d, q]);
            add("ffn_down.weight", &[d, channels]);
            match self.architecture {
                "qwen2" => {
                    add("attn_q.bias", &[q]);
                    add("attn_k.bias", &[kv]);
                    add("attn_v.bias", &[kv]);
                }
                "gemma3" => {
                    add("attn_q_norm.weight", &[HEAD]);
                    add("attn_k_norm.weight", &[HEAD]);
                    add("post_attention_norm.weight", &[d]);
                    add("post_ffw_norm.weight", &[d]);
                }
                _ => {}
            }
        }
        all
    }

    fn write(self, path: &Path, block_type: BlockType) {
        let mut writer = Writer::new();
        let own = |key: &str| format!("{}.{key}", self.architecture);
        writer.metadata(
            "general.architecture",
            Value::String(self.architecture.into()),
        );
        for (key, number) in [
            ("block_count", self.layers),
            ("context_length", 512),
            ("embedding_length", self.width),
            ("feed_forward_length", self.channels),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", HEAD),
            ("attention.value_length", HEAD),
            ("rope.dimension_count", HEAD),
        ] {
            writer.metadata(own(key), Value::U32(number as u32));
        }
        writer
            .metadata(own("attention.layer_norm_rms_epsilon"), Value::F32(1e-5))
            .metadata(own("rope.freq_base"), Value::F32(20_000.0));
        if self.architecture == "gemma3" {
            writer.metadata(own("attention.sliding_window"), Value::U32(40));
        }
        put_vocabulary(&mut writer);
        let mut random = Random::new(11);
        for (name, shape) in self.tensors() {
            let cols = *shape.last().unwrap();
            let is_vector = shape.len() == 1;
            let len = shape.iter().product();
            let mut values = random.normals(
                len,
                if is_vector {
                    0.1
                } else {
                    1.0 / (cols as f64).sqrt()
                },
            );
            if name.contains("norm") {
                values.iter_mut().for_each(|v| *v += 1.0);
            }
            let to = if is_vector {
                BlockType::F32
            } else {
                block_type
            };
            let mut bytes = vec![0; len / cols * to.row_bytes(cols)];
            for (row, out) in values
                .chunks(cols)
                .zip(bytes.chunks_mut(to.row_bytes(cols)))
            {
                encode_row(to, row, out);
            }
            writer.tensor(name, &shape, to, bytes);
        }
        writer.save(path).unwrap();
    }
}

fn options(mixture: Mixture) -> ConvertOptions {
    ConvertOptions {
        types: Types::Mixture(mixture),
        importance: None,
        open: OpenOptions {
            threads: Some(2),
            ..OpenOptions::default()
        },
    }
}

fn quantized(source: &Path, target: &Path, options: &ConvertOptions) -> ConvertReport {
    convert(source, options, Some(target), &mut ignore).unwrap_or_else(|error| {
        panic!(
            "{:?}: {error} {:?}",
            options.types,
            std::error::Error::source(&error)
        )
    })
}

fn types(path: &Path) -> BTreeMap<String, String> {
    let file = GgufFile::open(path).unwrap();
    let tensors = file.tensors().iter();
    tensors.map(|t| (t.name.clone(), t.type_name())).collect()
}

fn text() -> String {
    calibrate::TEXT.chars().take(1200).collect()
}

fn perplexity(workshop: &Workshop, path: &Path) -> f64 {
    our_perplexity(&workshop.open_file(path), &text(), CONTEXT, CHUNKS)
}

/// Those that need no importance matrix, with the relative error that weights may have in them.
const ALONE: [(FileType, f64); 23] = [
    (FileType::F32, 0.001),
    (FileType::F16, 0.001),
    (FileType::BF16, 0.005),
    (FileType::Q8_0, 0.01),
    (FileType::Q6_K, 0.03),
    (FileType::Q5_K_M, 0.06),
    (FileType::Q5_K_S, 0.06),
    (FileType::Q5_1, 0.06),
    (FileType::Q5_0, 0.06),
    (FileType::Q4_K_M, 0.1),
    (FileType::Q4_K_S, 0.1),
    (FileType::Q4_1, 0.1),
    (FileType::Q4_0, 0.1),
    (FileType::IQ4_NL, 0.1),
    (FileType::IQ4_XS, 0.1),
    (FileType::Q3_K_L, 0.2),
    (FileType::Q3_K_M, 0.2),
    (FileType::Q3_K_S, 0.22),
    (FileType::IQ3_M, 0.22),
    (FileType::IQ3_S, 0.22),
    (FileType::Q2_K, 0.35),
    (FileType::TQ2_0, 0.5),
    (FileType::TQ1_0, 0.5),
];

#[test]
fn every_type_is_written_and_predicts_about_the_same() {
    let workshop = Workshop::new();
    let source = workshop.path("f16.gguf");
    LLAMA.write(&source, BlockType::F16);
    let program = peer("llama-perplexity");
    let text_file = workshop.write("text.txt", text());
    let runtime = runtime(2);
    let seen = Random::new(2).tokens(48, VOCABULARY);
    let logits = |path: &Path| {
        let model = Model::load(GgufFile::open(path).unwrap()).unwrap();
        logits(&model, &runtime, &seen)
    };
    let dense = doubles(&logits(&source));
    let mut last = u64::MAX;
    for (file_type, allowed) in ALONE {
        let target = workshop.path("small.gguf");
        let report = quantized(&source, &target, &options(file_type.into()));
        assert_eq!(report.bytes, std::fs::metadata(&target).unwrap().len());
        assert_eq!(report.file_type, Some(file_type.name()));
        let file = GgufFile::open(&target).unwrap();
        let key = |key: &str| file.metadata().get(key).cloned();
        assert_eq!(key("general.file_type"), Some(Value::U32(file_type.id())));
        let (mut error, mut size) = (0.0, 0.0);
        for (name, shape) in LLAMA.tensors() {
            // The rules give the head and the embedding more.
            if shape.len() == 2 && name.starts_with("blk.") {
                for (a, b) in values(&source, &name).iter().zip(values(&target, &name)) {
                    error += f64::from(a - b).powi(2);
                    size += f64::from(*a).powi(2);
                }
            }
        }
        let error = (error / size).sqrt();
        let far = relative_error(&logits(&target), &dense);
        println!(
            "{file_type}: {error:.4}, logits {far:.4}, {} bytes",
            report.bytes
        );
        assert!(error < allowed, "{file_type}: {error}");
        // What has nothing to do with the model's would be at 1.4.
        assert!(
            far < if allowed <= 0.1 { 0.6 } else { 1.2 },
            "{file_type}: {far}"
        );
        // They are given from the largest to the smallest, as far as rules for some matrices leave it so.
        assert!(report.bytes as f64 <= last as f64 * 1.15, "{file_type}");
        last = report.bytes;
        if let Some(program) = &program {
            let ours = perplexity(&workshop, &target);
            let theirs = peer_perplexity(program, &target, &text_file)
                .unwrap_or_else(|said| panic!("{file_type}: {said}"));
            // Activations are rounded in other places.
            assert!(
                (ours / theirs - 1.0).abs() < 0.03,
                "{file_type}: ours {ours}, llama.cpp's {theirs}"
            );
        }
    }
}

// ---- mixtures ----

/// Runs llama-quantize; what it says where it fails.
fn peer_quantize(
    program: &Path,
    source: &Path,
    target: &Path,
    file_type: &str,
    more: &[&str],
) -> Result<(), String> {
    let output = Command::new(program)
        .args(more)
        .arg(source)
        .arg(target)
        .arg(file_type)
        .stdin(Stdio::null())
        .output()
        .expect("the peer starts");
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Shapes that the rules tell apart: heads that share and that do not, heads of their own and tied ones, rows that are no whole blocks,
/// few layers and many.
const SHAPES: [Wide; 5] = [
    Wide {
        layers: 16,
        ..LLAMA
    },
    Wide {
        layers: 17,
        kv_heads: 2,
        tied: true,
        ..LLAMA
    },
    Wide {
        architecture: "qwen2",
        layers: 80,
        tied: false,
        ..LLAMA
    },
    Wide {
        architecture: "gemma3",
        layers: 18,
        width: 320,
        heads: 5,
        kv_heads: 1,
        channels: 768,
        tied: true,
    },
    Wide {
        architecture: "phi3",
        layers: 9,
        ..LLAMA
    },
];

/// The type that llama-quantize would give each tensor, and whether it would ask for an importance matrix.
fn planned(
    program: &Path,
    source: &Path,
    file_type: &str,
    more: &[&str],
) -> (BTreeMap<String, String>, bool) {
    let output = Command::new(program)
        .arg("--dry-run")
        .args(more)
        .arg(source)
        .arg(file_type)
        .stdin(Stdio::null())
        .output()
        .expect("the peer starts");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{file_type} {more:?}: {said}");
    // "[   2/ 272] token_embd.weight - [...], type = f16, size = 54.00 MiB -> 28.69 MiB (q8_0)", or without the arrow.
    let tensors = said.lines().filter_map(|line| {
        let (name, rest) = line
            .strip_prefix('[')?
            .split_once("] ")?
            .1
            .split_once(" - [")?;
        let own = rest.split_once("type = ")?.1.split_once(',')?.0;
        let new = rest
            .rsplit_once('(')
            .map(|(_, new)| new.trim_end_matches(')'));
        let block_type = new.unwrap_or(own).trim().to_uppercase();
        Some((name.trim().to_owned(), block_type))
    });
    (tensors.collect(), said.contains("will require an imatrix"))
}

/// The types that we would give them.
fn ours(report: &ConvertReport) -> BTreeMap<String, String> {
    let tensors = report.tensors.iter();
    tensors
        .map(|tensor| (tensor.name.clone(), tensor.to.to_uppercase()))
        .collect()
}

#[test]
fn tensors_have_the_types_that_llama_quantize_gives_them() {
    let Some(program) = peer("llama-quantize") else {
        return;
    };
    let workshop = Workshop::new();
    let (source, matrix) = (workshop.path("f16.gguf"), workshop.path("imatrix.gguf"));
    for shape in SHAPES {
        shape.write(&source, BlockType::F16);
        flat_importance(shape).save(&matrix).unwrap();
        let importance = read_importance(&matrix).unwrap();
        let by_matrix = ["--imatrix", matrix.to_str().unwrap()];
        let all = FileType::ALL.iter();
        for (file_type, by_importance) in all.flat_map(|t| [(*t, false), (*t, true)]) {
            let options = ConvertOptions {
                importance: by_importance.then(|| importance.clone()),
                ..options(file_type.into())
            };
            let more: &[&str] = if by_importance { &by_matrix } else { &[] };
            let (expected, asks) = planned(&program, &source, file_type.name(), more);
            let report = convert(&source, &options, None, &mut ignore);
            let name = format!("{} {file_type} {by_importance}", shape.architecture);
            match report {
                Ok(report) => {
                    assert!(!asks || by_importance, "{name}");
                    assert_eq!(ours(&report), expected, "{name}");
                }
                Err(error) => assert!(asks && !by_importance, "{name}: {error}"),
            }
        }
        let with = |change: Mixture, file_type: &str, more: &[&str]| {
            let (expected, _) = planned(&program, &source, file_type, more);
            let report = convert(&source, &options(change), None, &mut ignore).unwrap();
            assert_eq!(ours(&report), expected, "{} {more:?}", shape.architecture);
        };
        let pure = Mixture {
            pure: true,
            ..FileType::Q4_K_M.into()
        };
        with(pure, "q4_k_m", &["--pure"]);
        let head = Mixture {
            head: Some("Q8_0".parse().unwrap()),
            ..FileType::Q5_K_S.into()
        };
        with(head, "q5_k_s", &["--output-tensor-type", "q8_0"]);
        // llama-quantize does not look for another type where this one does not fit.
        if shape.width.is_multiple_of(256) {
            let both = Mixture {
                head: Some("q5_k".parse().unwrap()),
                embedding: Some("q3_k".parse().unwrap()),
                ..FileType::Q4_K_M.into()
            };
            let more = [
                "--output-tensor-type",
                "q5_k",
                "--token-embedding-type",
                "q3_k",
            ];
            with(both, "q4_k_m", &more);
        }
        if !shape.tied {
            let kept = Mixture {
                keep_head: true,
                ..FileType::Q4_0.into()
            };
            with(kept, "q4_0", &["--leave-output-tensor"]);
        }
    }
}

/// All inputs of all matrices matter alike.
fn flat_importance(shape: Wide) -> ImportanceMatrix {
    let mut matrix = ImportanceMatrix::new("nothing", 4, 512);
    for (name, shape) in shape.tensors() {
        if let [_, cols] = shape[..] {
            matrix.insert(name, &vec![1.0; cols], 2048);
        }
    }
    matrix
}

#[test]
fn a_tied_head_keeps_its_type_where_it_is_asked_to() {
    let workshop = Workshop::new();
    let (source, target) = (workshop.path("f16.gguf"), workshop.path("small.gguf"));
    Wide {
        tied: true,
        ..LLAMA
    }
    .write(&source, BlockType::F16);
    let mixture = Mixture {
        keep_head: true,
        ..FileType::Q4_0.into()
    };
    quantized(&source, &target, &options(mixture));
    let types = types(&target);
    assert_eq!(types["token_embd.weight"], "F16");
    assert_eq!(types["blk.0.attn_q.weight"], "Q4_0");
}

#[test]
fn what_is_quantised_is_encoded_anew_only_if_that_is_asked_for() {
    let workshop = Workshop::new();
    let target = workshop.path("small.gguf");
    let refused = convert(
        &workshop.model,
        &options(FileType::Q4_0.into()),
        Some(&target),
        &mut ignore,
    );
    let words = refused.unwrap_err().to_string();
    assert!(words.contains("Q8_0") && !target.exists(), "{words}");
    // The same type is no new encoding.
    quantized(&workshop.model, &target, &options(FileType::Q8_0.into()));
    let mixture = Mixture {
        requantize: true,
        ..FileType::Q4_0.into()
    };
    quantized(&workshop.model, &target, &options(mixture));
    assert_eq!(types(&target)["blk.0.attn_q.weight"], "Q4_0");
}

// ---- importance matrices ----

#[test]
fn an_importance_matrix_is_what_llama_imatrix_finds() {
    let workshop = Workshop::new();
    let source = workshop.path("f32.gguf");
    LLAMA.write(&source, BlockType::F32);
    let engine = workshop.open_file(&source);
    let (matrix, report) = engine
        .importance_matrix(&tokens(1024), Effort::Normal, &mut ignore)
        .unwrap();
    assert_eq!(report.tokens, 1024);
    // Seven matrices in each layer, and the head.
    assert_eq!(matrix.len(), 7 * LLAMA.layers + 1);
    for (name, shape) in LLAMA.tensors() {
        if shape.len() == 2 && name != "token_embd.weight" {
            assert_eq!(
                matrix.squares(&name).map(<[f32]>::len),
                Some(shape[1]),
                "{name}"
            );
        }
    }
    // Behind a norm with weights of about 1, mean squares are about 1.
    let squares = matrix.squares("blk.1.attn_q.weight").unwrap();
    let mean = squares.iter().sum::<f32>() / squares.len() as f32;
    assert!((mean - 1.0).abs() < 0.2, "{mean}");
    assert_eq!(squares, matrix.squares("blk.1.attn_v.weight").unwrap());

    let file = workshop.path("ours.gguf");
    matrix.save(&file).unwrap();
    let again = read_importance(&file).unwrap();
    for name in matrix.names() {
        let (a, b) = (matrix.squares(name).unwrap(), again.squares(name).unwrap());
        let far = a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-5 * a.abs());
        assert!(!far, "{name}");
    }

    let Some(program) = peer("llama-imatrix") else {
        return;
    };
    // The same 1024 tokens: the model's are bytes, and a chunk begins with the beginning of a text.
    let sequence = 512;
    let tokenizer = engine.tokenizer().unwrap();
    let tokens = tokenizer.encode_prompt(calibrate::TEXT).unwrap();
    println!("{:?}", &tokens[..8]);
    let text: String = calibrate::TEXT.chars().take(4096).collect();
    let text = workshop.write("text.txt", text);
    for (ending, format) in [("gguf", "gguf"), ("dat", "dat")] {
        let theirs = workshop.path(&format!("theirs.{ending}"));
        let output = Command::new(&program)
            .arg("-m")
            .arg(&source)
            .arg("-f")
            .arg(&text)
            .arg("-o")
            .arg(&theirs)
            .args(["-c", &sequence.to_string(), "--chunks", "2", "-t", "1"])
            .args(["--process-output", "--output-format", format])
            .stdin(Stdio::null())
            .output()
            .expect("the peer starts");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let theirs = read_importance(&theirs).unwrap();
        for name in theirs.names() {
            let (a, b) = (
                matrix.squares(name).expect(name),
                theirs.squares(name).unwrap(),
            );
            // The same text, cut into chunks at other places.
            let [ours, theirs] = [a, b].map(|s| s.iter().sum::<f32>());
            assert!(
                (ours / theirs - 1.0).abs() < 0.1,
                "{ending} {name}: {ours} {theirs}"
            );
            let likeness = cosine(a, b);
            assert!(likeness > 0.99, "{ending} {name}: {likeness}");
        }
        assert_eq!(theirs.len(), matrix.len());
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn llama_quantize_reads_our_importance_matrix() {
    let Some(program) = peer("llama-quantize") else {
        return;
    };
    let workshop = Workshop::new();
    let (source, matrix) = (workshop.path("f16.gguf"), workshop.path("imatrix.gguf"));
    LLAMA.write(&source, BlockType::F16);
    let engine = workshop.open_file(&source);
    let (found, _) = engine
        .importance_matrix(&tokens(512), Effort::Normal, &mut ignore)
        .unwrap();
    found.save(&matrix).unwrap();
    let (ours, theirs) = (workshop.path("ours.gguf"), workshop.path("theirs.gguf"));
    let by = ["--imatrix", matrix.to_str().unwrap()];
    peer_quantize(&program, &source, &theirs, "iq2_xs", &by).unwrap();
    let options = ConvertOptions {
        importance: Some(read_importance(&matrix).unwrap()),
        ..options(FileType::IQ2_XS.into())
    };
    quantized(&source, &ours, &options);
    assert_eq!(types(&ours), types(&theirs));
    let entries = |path: &Path| -> BTreeMap<String, Value> {
        let file = GgufFile::open(path).unwrap();
        let own = file
            .entries()
            .filter(|(key, _)| key.starts_with("quantize."));
        own.map(|(key, value)| (key.to_owned(), value.clone()))
            .collect()
    };
    let (mut ours, mut theirs) = (entries(&ours), entries(&theirs));
    // llama-quantize cuts it off.
    let file = "quantize.imatrix.file";
    assert!(ours.remove(file).is_some() && theirs.remove(file).is_some());
    assert_eq!(ours, theirs);
    assert!(ours.contains_key("quantize.imatrix.chunks_count"));
}

/// Where errors in some inputs cost most, they are smallest there.
#[test]
fn importance_moves_errors_to_where_they_cost_little() {
    let workshop = Workshop::new();
    let source = workshop.path("f32.gguf");
    LLAMA.write(&source, BlockType::F32);
    let mut matrix = ImportanceMatrix::new("nothing", 1, 512);
    for (name, shape) in LLAMA.tensors() {
        if let [_, cols] = shape[..] {
            let squares: Vec<f32> = (0..cols)
                .map(|j| if j % 8 == 0 { 100.0 } else { 0.1 })
                .collect();
            matrix.insert(name, &squares, 512);
        }
    }
    let name = "blk.2.ffn_down.weight";
    let errors = |importance: Option<ImportanceMatrix>| {
        let target = workshop.path("small.gguf");
        quantized(
            &source,
            &target,
            &ConvertOptions {
                importance,
                ..options(FileType::Q4_K_S.into())
            },
        );
        let (old, new) = (values(&source, name), values(&target, name));
        let mut sums = [0.0; 2];
        for (j, (a, b)) in old.iter().zip(&new).enumerate() {
            sums[usize::from(j % 8 == 0)] += f64::from(a - b).powi(2);
        }
        sums
    };
    let (alike, weighted) = (errors(None), errors(Some(matrix)));
    assert!(weighted[1] < 0.5 * alike[1], "{alike:?} {weighted:?}");
}

fn values(path: &Path, name: &str) -> Vec<f32> {
    crate::convert::values(&GgufFile::open(path).unwrap(), name)
}

#[test]
fn importance_matrices_that_are_none_are_named() {
    let workshop = Workshop::new();
    let source = workshop.path("f16.gguf");
    LLAMA.write(&source, BlockType::F16);
    for (name, content, words) in [
        ("empty.dat", vec![], "no importance matrix"),
        ("short.dat", vec![5, 0, 0, 0, 3, 0], "no importance matrix"),
        (
            "long.dat",
            [1u32, u32::MAX - 1, 7].map(u32::to_le_bytes).concat(),
            "no importance matrix",
        ),
        ("other.gguf", b"GGUFGGUF".to_vec(), "other.gguf"),
    ] {
        let path = workshop.write(name, content);
        let error = read_importance(&path).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains(name),
            "{name}: {error}"
        );
    }
    // A model is none, and a matrix of numbers that cannot be is none.
    let error = read_importance(&source).unwrap_err().to_string();
    assert!(error.contains("no sums of squares"), "{error}");
    let mut odd = ImportanceMatrix::new("nothing", 1, 512);
    odd.insert("blk.0.attn_q.weight", &[1.0, f32::NAN], 2);
    let path = workshop.path("odd.gguf");
    odd.save(&path).unwrap();
    assert!(
        read_importance(&path)
            .unwrap_err()
            .to_string()
            .contains("blk.0.attn_q")
    );
    // Of another model.
    let other = |name: &str, inputs: usize| {
        let mut matrix = ImportanceMatrix::new("nothing", 1, 512);
        matrix.insert(name, &vec![1.0; inputs], 2);
        let options = ConvertOptions {
            importance: Some(matrix),
            ..options(FileType::Q4_0.into())
        };
        convert(&source, &options, None, &mut ignore)
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    assert!(other("blk.0.attn_q.weight", 3).contains("another model"));
    assert!(other("blk.77.attn_q.weight", 256).contains("another model"));
    // Without one some types are nonsense.
    let error = convert(
        &source,
        &options(FileType::IQ2_XXS.into()),
        None,
        &mut ignore,
    );
    let error = error.map(drop).unwrap_err().to_string();
    assert!(error.contains("how much the inputs matter"), "{error}");
}

// ---- a size ----

#[test]
fn a_file_is_of_the_size_that_is_asked_for() {
    let workshop = Workshop::new();
    let (source, target) = (workshop.path("f16.gguf"), workshop.path("small.gguf"));
    LLAMA.write(&source, BlockType::F16);
    let engine = workshop.open_file(&source);
    let whole = std::fs::metadata(&source).unwrap().len();
    let fit = |bytes| engine.types_within(bytes, false, &tokens(512), Effort::Normal, &mut ignore);
    let mut last = 0.0;
    for share in [60, 35, 25] {
        let bytes = whole * share / 100;
        let found = fit(bytes).unwrap();
        let options = ConvertOptions {
            types: found.types,
            importance: Some(found.importance),
            open: OpenOptions::default(),
        };
        let report = quantized(&source, &target, &options);
        println!(
            "{share} %: {} of {bytes}, {:.4} nats",
            report.bytes, found.predicted
        );
        assert!(
            report.bytes <= bytes && report.bytes > bytes * 85 / 100,
            "{share}"
        );
        assert!(found.predicted > last);
        last = found.predicted;
        let (a, b) = (
            perplexity(&workshop, &source),
            perplexity(&workshop, &target),
        );
        assert!((b / a).ln().abs() < 0.4, "{share} %: {a} {b}");
    }
    let error = fit(whole / 20).unwrap_err();
    assert!(
        matches!(error, EngineError::OutOfReach(OutOfReach::Bytes { .. })),
        "{error}"
    );
    // What is quantised already is not encoded anew unasked.
    let engine = workshop.open();
    let found = engine.types_within(1 << 20, false, &tokens(512), Effort::Normal, &mut ignore);
    assert!(matches!(found, Err(EngineError::Convert(_))));
}

// ---- the command ----

#[test]
fn the_command_quantises_and_reports() {
    let workshop = Workshop::new();
    let (source, target) = (workshop.path("f16.gguf"), workshop.path("small.gguf"));
    LLAMA.write(&source, BlockType::F16);
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let (model, out, matrix) = (text(&source), text(&target), text(&workshop.path("m.gguf")));
    let run = |arguments: &str| {
        let arguments: Vec<String> = arguments
            .split(' ')
            .map(|a| {
                a.replace("MODEL", &model)
                    .replace("OUT", &out)
                    .replace("MATRIX", &matrix)
            })
            .collect();
        flapjack(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (stdout, report) = succeeded(&run("quantize -m MODEL -o OUT --type Q4_K_M"));
    assert_eq!(stdout, "");
    assert!(
        report.contains("q4_k_m") && report.contains("in Q4_K"),
        "{report}"
    );
    std::fs::remove_file(&target).unwrap();
    let (table, report) = succeeded(&run("quantize -m MODEL --type q5_0 --dry-run"));
    assert!(
        table.contains("blk.3.ffn_down.weight") && table.contains("MiB"),
        "{table}"
    );
    assert_eq!(report, "");
    assert!(!target.exists());
    let (_, report) = succeeded(&run(
        "calibrate -m MODEL --imatrix MATRIX --calib built-in --calib-tokens 512",
    ));
    assert!(
        report.contains("matrices") && report.contains("512 tokens"),
        "{report}"
    );
    let (_, report) = succeeded(&run(
        "quantize -m MODEL -o OUT --type iq2_m --imatrix MATRIX",
    ));
    assert!(report.contains("iq2_m"), "{report}");
    let by_text = "quantize -m MODEL -o OUT --type iq2_m --calib built-in --calib-tokens 512 -q";
    assert_eq!(succeeded(&run(by_text)), (String::new(), String::new()));
    let fit = "quantize -m MODEL -o OUT --fit 1.5MB --calib built-in --calib-tokens 512";
    let (_, report) = succeeded(&run(fit));
    assert!(
        report.contains("nats") && report.contains("small.gguf"),
        "{report}"
    );
    assert!(std::fs::metadata(&target).unwrap().len() <= 1_500_000);
    let again = std::fs::read(&target).unwrap();
    for (arguments, words) in [
        ("quantize -m MODEL -o OUT", "--type"),
        ("quantize -m MODEL --type q4_0", "--output"),
        ("quantize -m MODEL -o OUT --type q4_7", "q4_k_m"),
        ("quantize -m MODEL -o MODEL --type q4_0", "another file"),
        (
            "quantize -m OUT -o MATRIX --type q4_0",
            "--allow-requantize",
        ),
        ("quantize -m OUT -o MATRIX --fit 1MB", "--allow-requantize"),
        ("quantize -m MODEL -o OUT --type iq2_xs", "--imatrix"),
        (
            "quantize -m MODEL -o OUT --type q4_0 --imatrix MODEL",
            "calibrate --imatrix",
        ),
        (
            "quantize -m MODEL -o OUT --type q4_0 --fit 1MB",
            "cannot be used with",
        ),
        ("calibrate -m MODEL", "--output"),
    ] {
        let output = run(arguments);
        assert!(!output.status.success(), "{arguments}");
        assert!(
            stderr(&output).contains(words),
            "{arguments}: {}",
            stderr(&output)
        );
    }
    assert!(again == std::fs::read(&target).unwrap());
}

/// What is held in memory is a few MiB of rows, whatever the model and its tensors have.
#[test]
#[cfg(target_os = "linux")]
fn weights_stream_through_memory() {
    let workshop = Workshop::new();
    let (source, target) = (workshop.path("f16.gguf"), workshop.path("small.gguf"));
    // An embedding of tens of MiB beside layers of as many, 100 MiB in all.
    let shape = flapjack::model::Shape {
        name: "large",
        layers: 6,
        embedding_length: 512,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        channels: 4096,
        vocabulary: 60_000,
        tied: true,
        context_length: 512,
    };
    flapjack::engine::write_synthetic(&source, shape, flapjack::engine::SyntheticType::Q8_0)
        .unwrap();
    let whole = std::fs::metadata(&source).unwrap().len();
    assert!(whole > 70 << 20, "{whole}");
    for arguments in [
        &[
            "quantize",
            "--type",
            "q4_0",
            "--allow-requantize",
            "-t",
            "2",
            "-q",
            "-m",
        ][..],
        &["convert", "--type", "f32", "-t", "2", "-q"],
    ] {
        let mut child = crate::common::program::program()
            .args(arguments)
            .arg(&source)
            .arg("-o")
            .arg(&target)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let status = format!("/proc/{}/status", child.id());
        let mut peak = 0;
        while child.try_wait().unwrap().is_none() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
            let number = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
            peak = peak.max(number.unwrap_or(0));
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert!(child.wait().unwrap().success());
        println!("{arguments:?}: {} MiB of the process's own", peak >> 10);
        assert!(peak > 0 && peak >> 10 < 64, "{arguments:?}: {peak} KiB");
    }
}

// ---- real models ----

/// Perplexities of both programs' files in twelve types, with and without an importance matrix. Run it by name:
/// `cargo test --test spec -- --ignored quantize_table --nocapture`; `FLAPJACK_TABLE=model.gguf` names a model in F16.
#[test]
#[ignore = "it takes some minutes, and a model in F16"]
fn quantize_table() {
    let Some(program) = peer("llama-quantize") else {
        return;
    };
    let Some(source) = std::env::var_os("FLAPJACK_TABLE").map(PathBuf::from) else {
        return skip("FLAPJACK_TABLE names no model in F16");
    };
    let Some(data) = crate::common::shared("data/wikitext-2") else {
        return;
    };
    let chunks = std::env::var("FLAPJACK_TABLE_CHUNKS").ok();
    let chunks: usize = chunks.map_or(8, |n| n.parse().expect("a number of chunks"));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let measure = |model: &Path| -> f64 {
        let output = flapjack(&[
            "perplexity",
            "-m",
            model.to_str().unwrap(),
            "-f",
            data.join("dev.raw").to_str().unwrap(),
            "-c",
            "512",
            "--chunks",
            &chunks.to_string(),
            "--all-positions",
            "--json",
        ]);
        let (found, _) = succeeded(&output);
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        found["perplexity"].as_f64().unwrap()
    };
    let matrix = path("imatrix.gguf");
    let made = flapjack(&[
        "calibrate",
        "-m",
        source.to_str().unwrap(),
        "--imatrix",
        matrix.to_str().unwrap(),
        "--calib",
        data.join("calib.txt").to_str().unwrap(),
        "--calib-mix",
        "0",
        "--calib-tokens",
        "16384",
    ]);
    succeeded(&made);
    println!("{}: F16 {:.4}", source.display(), measure(&source));
    println!(
        "| type | llama-quantize | flapjack | by importance: llama-quantize | flapjack | MiB |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    let only = std::env::var("FLAPJACK_TABLE_TYPES").ok();
    let types = only.unwrap_or("q2_k q3_k_s q3_k_m q3_k_l q4_0 q4_1 q4_k_s q4_k_m q5_0 q5_1 q5_k_s q5_k_m q6_k q8_0 iq4_nl iq4_xs".into());
    for name in types.split(' ') {
        let mut cells = Vec::new();
        let mut bytes = 0;
        for by in [None, Some(&matrix)] {
            let (ours, theirs) = (path("ours.gguf"), path("theirs.gguf"));
            let more: Vec<&str> = by.map_or(Vec::new(), |m| vec!["--imatrix", m.to_str().unwrap()]);
            peer_quantize(&program, &source, &theirs, name, &more).unwrap();
            let options = ConvertOptions {
                importance: by.map(|m| read_importance(m).unwrap()),
                ..options(name.parse::<FileType>().unwrap().into())
            };
            bytes = quantized(&source, &ours, &options).bytes;
            assert_eq!(self::types(&ours), self::types(&theirs));
            cells.extend([measure(&theirs), measure(&ours)]);
        }
        println!(
            "| {name} | {:.4} | {:.4} | {:.4} | {:.4} | {:.1} |",
            cells[0],
            cells[1],
            cells[2],
            cells[3],
            bytes as f64 / f64::from(1 << 20)
        );
    }
}
