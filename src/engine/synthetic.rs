//! Small random models as files, for examples and tests: they run and can be pruned like any other, and write nonsense.

use std::path::Path;

use super::error::EngineError;
use crate::gguf::{GgufFile, Value, ValueType, Writer};
use crate::kernels::Runtime;
use crate::model::{Model, Shape};
use crate::quant::BlockType;

/// The type of random weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // as the types are called
pub enum SyntheticType {
    Q4_0,
    Q8_0,
}

impl SyntheticType {
    pub(super) fn block_type(self) -> BlockType {
        match self {
            SyntheticType::Q4_0 => BlockType::Q4_0,
            SyntheticType::Q8_0 => BlockType::Q8_0,
        }
    }
}

/// A model that is written, calibrated and pruned in no time.
pub const TINY: Shape = Shape {
    name: "tiny",
    layers: 3,
    embedding_length: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 32,
    channels: 128,
    vocabulary: 320,
    tied: true,
    context_length: 512,
};

/// Tokens of the vocabulary before those of bytes: unknown, the beginning and the end of a text, and a space.
const FIRST: [&str; 4] = ["<unk>", "<s>", "</s>", "\u{2581}"];
/// The numbers that GGUF has for normal, unknown, control and byte tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// Writes a model of this shape with random weights, and with a vocabulary in which every byte is a token, and
/// the space another one. The same shape and
/// type give the same file.
///
/// # Errors
/// If the file cannot be written.
///
/// # Panics
/// If the shape has fewer than 260 tokens, or its widths are not whole blocks of the type.
pub fn write_synthetic(
    path: impl AsRef<Path>,
    shape: Shape,
    synthetic_type: SyntheticType,
) -> Result<(), EngineError> {
    let runtime = Runtime::new(1)?;
    let model = Model::synthetic(shape, synthetic_type.block_type(), &runtime)?;
    let bare = GgufFile::from_map(path.as_ref(), model.map)?;
    let mut writer = Writer::new();
    let entries = bare.entries();
    for (key, value) in entries.filter(|(key, _)| !key.starts_with("tokenizer.")) {
        writer.metadata(key, value.clone());
    }
    put_vocabulary(&mut writer, shape.vocabulary);
    for tensor in bare.tensors() {
        let bytes = bare.bytes(tensor);
        writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
    }
    Ok(writer.save(path.as_ref())?)
}

/// The first tokens, a token for every byte, and names without a meaning for the rest.
fn put_vocabulary(writer: &mut Writer, tokens: usize) {
    let bytes_from = FIRST.len();
    let bytes_to = bytes_from + 256;
    assert!(tokens >= bytes_to, "there is no token for every byte");
    let first = FIRST.map(str::to_owned).into_iter();
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let rest = (bytes_to..tokens).map(|token| format!("<unused {token}>"));
    let texts: Vec<String> = first.chain(bytes).chain(rest).collect();
    let kinds = (0..tokens).map(|token| match token {
        0 => UNKNOWN,
        3 => NORMAL,
        _ if (bytes_from..bytes_to).contains(&token) => BYTE,
        _ => CONTROL,
    });
    let kinds = kinds.map(Value::I32).collect();
    let scores = vec![Value::F32(0.0); tokens];
    for (key, value) in [
        ("model", Value::String("llama".into())),
        ("tokens", Value::StringArray(texts)),
        ("token_type", Value::Array(ValueType::I32, kinds)),
        ("scores", Value::Array(ValueType::F32, scores)),
        ("unknown_token_id", Value::U32(0)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
        ("add_space_prefix", Value::Bool(false)),
    ] {
        writer.metadata(format!("tokenizer.ggml.{key}"), value);
    }
}
