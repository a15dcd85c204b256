//! GGUF files: mapping them into memory, and reading and writing header, metadata and tensor table.
//!
//! [`GgufFile::open`] maps a file privately (copy-on-write) and parses it. Every offset, count, length, alignment, shape and
//! type is checked against the file before it is used. This module does not know what a tensor is for.
//!
//! | file | what it does |
//! | --- | --- |
//! | `map` | the map of a file, and how much of it is in memory |
//! | `parse` | header, metadata and tensor table, with all checks |
//! | `value` | the types and values of metadata |
//! | `write` | writing files |
//! | `fingerprint` | a hash by which a model file is recognised |
//! | `text` | names from files, made safe for a terminal |
//!
//! Source: the GGUF specification in the ggml repository (`docs/gguf.md`), versions 2 and 3, little-endian.

mod fingerprint;
mod map;
mod parse;
mod text;
mod value;
mod write;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use map::{Map, Residency};
pub use text::Shown;
pub use value::{Value, ValueType};
pub use write::Writer;

use crate::quant::BlockType;

/// Why a GGUF file cannot be read or written. The messages say what is wrong and where (the byte, key or tensor), and what to
/// do if anything can be done.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused to open, map or write the file.
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The file does not begin with `GGUF`.
    #[error(
        "{path} is not a GGUF file (it begins with {magic:02x?} and not with \"GGUF\"); name a .gguf model"
    )]
    NotGguf { path: PathBuf, magic: Vec<u8> },
    /// The file has another version than 2 or 3, or is big-endian.
    #[error(
        "{path}: GGUF version {version} is not supported (2 and 3 are){hint}",
        hint = if *big_endian { "; the file is big-endian, convert it to little-endian first" } else { "" }
    )]
    Version {
        path: PathBuf,
        version: u32,
        big_endian: bool,
    },
    /// The file ends within something that its header announces.
    #[error(
        "{path}: the file ends at byte {len} but {what} at byte {offset} needs {need} bytes; it is truncated or damaged, fetch it again"
    )]
    Truncated {
        path: PathBuf,
        what: String,
        offset: u64,
        need: u64,
        len: u64,
    },
    /// Something in the header or the metadata is invalid.
    #[error("{path}: {what} at byte {offset}: {problem}")]
    Malformed {
        path: PathBuf,
        what: String,
        offset: u64,
        problem: String,
    },
    /// A tensor is missing, or its shape, type or place in the file is invalid.
    #[error("{path}: tensor {}: {problem}", Shown(tensor))]
    Tensor {
        path: PathBuf,
        tensor: String,
        problem: String,
    },
    /// A metadata key is missing, or its value is of the wrong type or unusable.
    #[error("{path}: metadata key {}: {problem}", Shown(key))]
    Metadata {
        path: PathBuf,
        key: String,
        problem: String,
    },
}

/// An entry of the tensor table: the name, shape, type and place of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The tensor's name, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// The extents, row-major (GGUF's `ne` reversed): `[out_features, in_features]` for a matrix.
    pub shape: Vec<usize>,
    /// The type of the stored values.
    pub block_type: BlockType,
    /// The data, as a range of bytes of the map.
    pub range: Range<usize>,
}

/// A GGUF file that has been mapped and checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    version: u32,
    map: Map,
    metadata: BTreeMap<String, Value>,
    /// The metadata keys in the order in which the file has them.
    keys: Vec<String>,
    tensors: Vec<TensorInfo>,
    /// The index in `tensors` of each name.
    by_name: BTreeMap<String, usize>,
}

impl GgufFile {
    /// Maps and parses the file at `path`.
    ///
    /// # Errors
    /// [`GgufError`] if the file cannot be mapped, or if anything in it is out of bounds, of the wrong type, or overlaps.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let map = Map::open(path).map_err(|source| GgufError::Io {
            path: path.to_owned(),
            source,
        })?;
        parse::parse(path, map)
    }

    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The metadata, sorted by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The metadata in the order in which the file has them.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.keys
            .iter()
            .map(|key| (key.as_str(), &self.metadata[key]))
    }

    /// All tensors in the order of the file's tensor table.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name; `None` if the file has none.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The data of a tensor of this file, as stored.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.map.bytes()[tensor.range.clone()]
    }

    /// The map alone, without metadata and tensor table, for a model whose weights are views on it.
    pub fn into_map(self) -> Map {
        self.map
    }

    /// The map of the whole file.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The value of a metadata key; `None` if the file does not have the key.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if the value cannot be read as a `T`.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => T::from_value(value).map(Some).ok_or_else(|| {
                self.metadata_error(key, format!("expected {}, found {value}", T::EXPECTED))
            }),
        }
    }

    /// The value of a metadata key that the file must have.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if the key is missing or its value cannot be read as a `T`.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| {
            self.metadata_error(key, format!("is missing ({} is needed)", T::EXPECTED))
        })
    }

    /// An error about a metadata key of this file.
    pub(crate) fn metadata_error(&self, key: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Metadata {
            path: self.path.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    /// An error about a tensor of this file.
    pub(crate) fn tensor_error(&self, tensor: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Tensor {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
            problem: problem.into(),
        }
    }
}

/// Rust types that a metadata value can be read as. Integers of any width convert if the value fits.
pub trait FromValue<'a>: Sized {
    /// The kind of value that is expected, for error messages; for example "a string".
    const EXPECTED: &'static str;
    /// The value as this type; `None` if it is of another type or does not fit.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::String(s) => Some(s),
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a boolean";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }
}

impl FromValue<'_> for usize {
    const EXPECTED: &'static str = "a non-negative integer";
    fn from_value(value: &Value) -> Option<Self> {
        value.as_i128().and_then(|v| usize::try_from(v).ok())
    }
}

impl FromValue<'_> for u32 {
    const EXPECTED: &'static str = "a 32-bit non-negative integer";
    fn from_value(value: &Value) -> Option<Self> {
        value.as_i128().and_then(|v| u32::try_from(v).ok())
    }
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "a number";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::F32(v) => Some(*v),
            Value::F64(v) => Some(*v as f32),
            _ => None,
        }
    }
}

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a number";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::F32(v) => Some(f64::from(*v)),
            Value::F64(v) => Some(*v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a [String] {
    const EXPECTED: &'static str = "an array of strings";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::StringArray(a) => Some(a),
            _ => None,
        }
    }
}

impl FromValue<'_> for Vec<f32> {
    const EXPECTED: &'static str = "an array of 32-bit floats";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Array(ValueType::F32, items) => {
                items.iter().map(<f32 as FromValue>::from_value).collect()
            }
            _ => None,
        }
    }
}

impl FromValue<'_> for Vec<usize> {
    const EXPECTED: &'static str = "an array of non-negative integers";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Array(_, items) => items.iter().map(<usize as FromValue>::from_value).collect(),
            _ => None,
        }
    }
}
