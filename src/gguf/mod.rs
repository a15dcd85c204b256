//! GGUF files: the map itself, the header, the metadata and the tensor table.
//!
//! [`GgufFile::open`] maps a file privately (copy-on-write) and parses it; every offset, count, length, alignment, shape
//! and type is checked against the file before anything is read through it. What a tensor is *for* is not known here.
//!
//! Format: the GGUF specification in the ggml repository (`docs/gguf.md`), versions 2 and 3, little-endian.

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

/// What can be wrong with a GGUF file. Every message says what, where (byte or tensor) and, where there is one, what to do.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path} is not a GGUF file (it begins with {magic:02x?} and not with \"GGUF\"); name a .gguf model"
    )]
    NotGguf { path: PathBuf, magic: Vec<u8> },
    #[error(
        "{path}: GGUF version {version} is not supported (2 and 3 are){hint}",
        hint = if *big_endian { "; the file is big-endian, convert it to little-endian first" } else { "" }
    )]
    Version {
        path: PathBuf,
        version: u32,
        big_endian: bool,
    },
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
    #[error("{path}: {what} at byte {offset}: {problem}")]
    Malformed {
        path: PathBuf,
        what: String,
        offset: u64,
        problem: String,
    },
    #[error("{path}: tensor {}: {problem}", Shown(tensor))]
    Tensor {
        path: PathBuf,
        tensor: String,
        problem: String,
    },
    #[error("{path}: metadata key {}: {problem}", Shown(key))]
    Metadata {
        path: PathBuf,
        key: String,
        problem: String,
    },
}

/// One row of the tensor table. `shape` is row-major (GGUF's `ne` reversed): `[out_features, in_features]` for a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub shape: Vec<usize>,
    /// The element type as GGUF numbers it.
    pub block_type: BlockType,
    /// The bytes of the map that hold the data.
    pub range: Range<usize>,
}

/// A mapped and checked GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    version: u32,
    map: Map,
    metadata: BTreeMap<String, Value>,
    /// The keys in the order of the file.
    keys: Vec<String>,
    tensors: Vec<TensorInfo>,
    by_name: BTreeMap<String, usize>,
}

impl GgufFile {
    /// Maps and parses `path`.
    ///
    /// # Errors
    /// [`GgufError`], if the file cannot be mapped or anything in it is out of bounds, of the wrong type, or overlaps.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let map = Map::open(path).map_err(|source| GgufError::Io {
            path: path.to_owned(),
            source,
        })?;
        parse::parse(path, map)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The metadata in the order of the file.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.keys
            .iter()
            .map(|key| (key.as_str(), &self.metadata[key]))
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The bytes of a tensor of this file.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.map.bytes()[tensor.range.clone()]
    }

    /// Gives up the tables and keeps the map, for a model that has taken views on it.
    pub fn into_map(self) -> Map {
        self.map
    }

    pub fn map(&self) -> &Map {
        &self.map
    }

    /// An optional metadata value; `None` when the key is absent.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] when the key is there with another type or an unfit value.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => T::from_value(value).map(Some).ok_or_else(|| {
                self.metadata_error(key, format!("expected {}, found {value}", T::EXPECTED))
            }),
        }
    }

    /// A metadata value that must be there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] when it is absent or unfit.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| {
            self.metadata_error(key, format!("is missing ({} is needed)", T::EXPECTED))
        })
    }

    pub(crate) fn metadata_error(&self, key: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Metadata {
            path: self.path.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn tensor_error(&self, tensor: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Tensor {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
            problem: problem.into(),
        }
    }
}

/// Rust types that a metadata value can be read as; integers of any width convert when they fit.
pub trait FromValue<'a>: Sized {
    /// For error messages, for example "a string".
    const EXPECTED: &'static str;
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
