//! MXFP4, TQ1_0, TQ2_0, Q8_1 and the types IQ1, IQ2 and IQ3: decoding is ggml's, encoding finds groups that are near, and models run
//! and are pruned in them.

use std::path::Path;
use std::process::{Command, Stdio};

use flapjack::engine::{Engine, SyntheticType, ignore, write_synthetic};
use flapjack::gguf::{GgufFile, Writer};
use flapjack::kernels::{Isa, Kernels};
use flapjack::model::Shape;
use flapjack::prune::calibrate;
use flapjack::quant::{BlockType, decode_row, encode_row, encode_row_by_importance};

use crate::common::blocks::{decode, encode, squared_error, there_and_back};
use crate::common::engine::{Workshop, flap};
use crate::common::{Random, peer, skip};
use crate::families::{CHUNKS, CONTEXT, VOCABULARY, our_perplexity, peer_perplexity};

/// The types that are read in native rows, and what is left of normal values by encoding them: the root of the squared error as a
/// share, at most.
const TYPES: [(BlockType, f64); 11] = [
    (BlockType::Q8_1, 0.01),
    (BlockType::MXFP4, 0.125),
    (BlockType::TQ1_0, 0.45),
    (BlockType::TQ2_0, 0.45),
    (BlockType::IQ1_S, 0.56),
    (BlockType::IQ1_M, 0.53),
    (BlockType::IQ2_XXS, 0.40),
    (BlockType::IQ2_XS, 0.34),
    (BlockType::IQ2_S, 0.30),
    (BlockType::IQ3_XXS, 0.21),
    (BlockType::IQ3_S, 0.17),
];

/// Blocks of random bytes, and the bits of what gguf-py, which belongs to llama.cpp, decodes them to.
const DECODED: &str = include_str!("../data/few_bits.json");

#[test]
fn blocks_decode_to_what_ggml_decodes_them_to() {
    let all: serde_json::Value = serde_json::from_str(DECODED).unwrap();
    let all = all.as_object().unwrap();
    assert_eq!(all.len(), TYPES.len() - 1);
    for (name, blocks) in all {
        let block_type = BlockType::ALL
            .into_iter()
            .find(|t| t.name() == name)
            .unwrap();
        for block in blocks.as_array().unwrap() {
            let text = block["bytes"].as_str().unwrap();
            let byte = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).unwrap();
            let bytes: Vec<u8> = (0..text.len()).step_by(2).map(byte).collect();
            let bits = block["bits"].as_str().unwrap().split(' ');
            let expected: Vec<f32> = bits
                .map(|bits| f32::from_bits(u32::from_str_radix(bits, 16).unwrap()))
                .collect();
            let close = |got: &[f32]| {
                assert_eq!(got.len(), expected.len());
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let apart = (got - expected).abs();
                    assert!(
                        apart <= 2e-7 * expected.abs(),
                        "{name} {i}: {got} {expected}"
                    );
                }
            };
            close(&decode(block_type, &bytes));
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; expected.len()];
                Kernels::for_isa(isa)
                    .unwrap()
                    .dequantize(block_type, &bytes, &mut out);
                close(&out);
            }
        }
    }
    // Its sum is not part of a weight.
    let mut block = vec![0; 36];
    block[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
    block[4..36]
        .iter_mut()
        .enumerate()
        .for_each(|(i, b)| *b = (i as u8).wrapping_sub(16));
    let expected: Vec<f32> = (-16..16).map(|q| 0.5 * q as f32).collect();
    assert_eq!(decode(BlockType::Q8_1, &block), expected);
}

#[test]
fn encoding_leaves_what_the_bits_can_hold() {
    for (block_type, most) in TYPES {
        let mut random = Random::new(11);
        for size in [1.0, 1e-3, 300.0] {
            let values: Vec<f32> = random.normals(4096, 1.0).iter().map(|v| v * size).collect();
            let back = there_and_back(block_type, &values);
            let share =
                (squared_error(&values, &back) / squared_error(&values, &[0.0; 4096])).sqrt();
            println!("{block_type:?} {size}: {share:.3}");
            assert!(share < most, "{block_type:?} {size}: {share}");
            // What was decoded is nearly what it is encoded to again.
            let again = there_and_back(block_type, &back);
            let lost = (squared_error(&back, &again) / squared_error(&back, &[0.0; 4096])).sqrt();
            assert!(
                lost < 0.5 * share,
                "{block_type:?} {size}: {lost} of {share}"
            );
        }
    }
}

#[test]
fn what_cannot_be_held_does_not_spoil_the_rest() {
    for (block_type, _) in TYPES {
        let mut values = Random::new(3).normals(512, 1.0);
        values[300] = f32::NAN;
        values[301] = 1e30;
        let back = there_and_back(block_type, &values);
        assert!(back.iter().all(|v| v.is_finite()), "{block_type:?}");
        assert_eq!(
            encode(block_type, &[0.0; 256]),
            encode(block_type, &[-0.0; 256])
        );
        let zeros = there_and_back(block_type, &[0.0; 256]);
        assert!(zeros.iter().all(|v| *v == 0.0), "{block_type:?}");
    }
}

#[test]
fn important_values_err_less() {
    for (block_type, _) in TYPES {
        if block_type == BlockType::Q8_1 {
            continue;
        }
        let mut random = Random::new(4);
        let values = random.normals(8192, 0.02);
        let importance: Vec<f32> = random.normals(8192, 1.5).iter().map(|v| v.exp()).collect();
        let weighted = |decoded: &[f32]| -> f64 {
            let errors = values.iter().zip(decoded).zip(&importance);
            errors
                .map(|((x, y), w)| f64::from(*w) * f64::from(x - y).powi(2))
                .sum()
        };
        let mut bytes = vec![0; block_type.row_bytes(8192)];
        encode_row_by_importance(block_type, &values, &importance, &mut bytes);
        let gain =
            weighted(&decode(block_type, &bytes)) / weighted(&there_and_back(block_type, &values));
        // Of powers of two there are few to choose from.
        let most = if block_type == BlockType::MXFP4 {
            1.0
        } else {
            0.98
        };
        assert!(gain < most, "{block_type:?}: {gain}");
    }
}

/// A random model of llama.cpp's widths, whose projections are of this type; by itself, and as decoding it leaves it.
fn models(workshop: &Workshop, block_type: BlockType) -> [std::path::PathBuf; 2] {
    let source = workshop.path("source.gguf");
    let shape = Shape {
        name: "wide",
        layers: 2,
        embedding_length: 256,
        heads: 8,
        kv_heads: 4,
        head_dim: 32,
        channels: 512,
        vocabulary: VOCABULARY,
        tied: true,
        context_length: 512,
    };
    write_synthetic(&source, shape, SyntheticType::Q8_0).unwrap();
    let source = GgufFile::open(&source).unwrap();
    let write = |name: &str, decoded: bool| {
        let mut writer = Writer::new();
        for (key, value) in source.entries() {
            writer.metadata(key, value.clone());
        }
        for tensor in source.tensors() {
            let bytes = source.bytes(tensor);
            if tensor.shape.len() < 2 || tensor.name == "token_embd.weight" {
                writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
                continue;
            }
            let cols = tensor.shape[1];
            let (mut values, mut few, mut plain) = (vec![0.0; cols], Vec::new(), Vec::new());
            for row in bytes.chunks(tensor.block_type.row_bytes(cols)) {
                decode_row(tensor.block_type, row, &mut values);
                let mut out = vec![0; block_type.row_bytes(cols)];
                encode_row(block_type, &values, &mut out);
                decode_row(block_type, &out, &mut values);
                few.extend(out);
                plain.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            }
            match decoded {
                true => writer.tensor(&tensor.name, &tensor.shape, BlockType::F32, plain),
                false => writer.tensor(&tensor.name, &tensor.shape, block_type, few),
            };
        }
        let path = workshop.path(name);
        writer.save(&path).unwrap();
        path
    };
    [write("few.gguf", false), write("plain.gguf", true)]
}

fn a_text() -> String {
    calibrate::TEXT.chars().take(1200).collect()
}

#[test]
fn models_run_and_are_pruned_in_every_type() {
    let workshop = Workshop::new();
    let text = a_text();
    let ppl = |engine: &Engine| our_perplexity(engine, &text, CONTEXT, 1);
    for (block_type, _) in TYPES {
        let [few, plain] = models(&workshop, block_type).map(|path| workshop.open_file(&path));
        let (is, expected) = (ppl(&few), ppl(&plain));
        assert!(
            (is / expected - 1.0).abs() < 0.01,
            "{block_type:?}: {is} {expected}"
        );
        let mut few = few;
        let report = few.prune(&flap(), &mut ignore).unwrap();
        assert!(report.removed > 0.1, "{block_type:?}: {}", report.removed);
        let before = ppl(&few);
        let path = workshop.path("pruned.gguf");
        few.export(&path).unwrap();
        let after = ppl(&workshop.open_file(&path));
        // Packed weights in place of native ones change inputs of attention by less than a step of bfloat16, some of them to the next.
        assert!(
            (before / after - 1.0).abs() < 3e-3,
            "{block_type:?}: {before} {after}"
        );
    }
}

/// Files in types that we encode say in llama.cpp what they say here, and so do those that it writes.
#[test]
fn llama_cpp_says_the_same_of_every_type() {
    let (Some(program), Some(quantize)) = (peer("llama-perplexity"), peer("llama-quantize")) else {
        return;
    };
    let workshop = Workshop::new();
    let text = a_text();
    let text_file = workshop.write("text.txt", &text);
    let compare = |name: &str, path: &Path| {
        let theirs = peer_perplexity(&program, path, &text_file);
        let theirs = theirs.unwrap_or_else(|said| panic!("{name}: {said}"));
        let ours = our_perplexity(&workshop.open_file(path), &text, CONTEXT, CHUNKS);
        println!("{name}: ours {ours:.3}, llama.cpp's {theirs:.3}");
        assert!(
            (ours / theirs - 1.0).abs() < 0.01,
            "{name}: ours {ours}, llama.cpp's {theirs}"
        );
    };
    for (block_type, _) in TYPES {
        // llama.cpp multiplies no weights in Q8_1.
        if block_type != BlockType::Q8_1 {
            compare(block_type.name(), &models(&workshop, block_type)[0]);
        }
    }
    let [_, plain] = models(&workshop, BlockType::Q8_1);
    for name in ["TQ1_0", "TQ2_0", "IQ3_XXS", "IQ3_S"] {
        let path = workshop.path("theirs.gguf");
        let output = Command::new(&quantize)
            // The embedding is in Q8_0.
            .arg("--allow-requantize")
            .arg(&plain)
            .arg(&path)
            .arg(name)
            .stdin(Stdio::null())
            .output()
            .expect("the peer starts");
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() && said.contains("imatrix") {
            skip(&format!(
                "llama-quantize makes no {name} without an importance matrix"
            ));
            continue;
        }
        assert!(output.status.success(), "{name}: {said}");
        let file = GgufFile::open(&path).unwrap();
        let types = TYPES.map(|(block_type, _)| block_type);
        let any = file.tensors().iter().any(|t| types.contains(&t.block_type));
        assert!(any, "{name}");
        compare(&format!("llama-quantize's {name}"), &path);
    }
}
