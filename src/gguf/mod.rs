//! GGUF files: mapping them into memory, and reading and writing header, metadata and tensor table.
//!
//! [`GgufFile::open`] maps a file privately (copy-on-write) and parses it. Every offset, count, length, alignment, shape and
//! type is checked against the file before it is used. This module does not know what a tensor is for.
//!
//! | file | what it does |
//! | --- | --- |
//! | `map` | the map of a file, and how much of it is in memory |
//! | `parse` | header, metadata and tensor table, with all checks |
//! | `parts` | a model that is split among several files, as one |
//! | `value` | the types and values of metadata |
//! | `warning` | what is passed over in metadata, or assumed, though a model can run |
//! | `foreign` | files that are not GGUF files, by how they begin |
//! | `write` | writing files |
//! | `fingerprint` | a hash by which a model file is recognised |
//! | `text` | names from files, made safe for a terminal |
//!
//! Source: the GGUF specification in the ggml repository (`docs/gguf.md`), versions 2 and 3, little-endian.

mod fingerprint;
mod foreign;
mod map;
mod parse;
mod parts;
mod text;
mod value;
mod warning;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use foreign::Foreign;
pub(crate) use map::own_pages;
pub use map::{Map, Residency, WithPlaces};
pub(crate) use parse::ALIGNMENT_KEY;
pub use parts::{OtherPart, Part};
pub use text::Shown;
pub use value::{Value, ValueType};
pub use warning::MetadataWarning;
pub use write::{Fill, Writer};

use crate::count::count;
use crate::quant::{BlockType, Layout, SPARSE_VERSION, SparseType};

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
    /// The file is of another format.
    #[error("{path} is not a GGUF file but {found}")]
    Foreign { path: PathBuf, found: Foreign },
    /// The file does not begin with `GGUF`, nor as anything else that is known.
    #[error(
        "{path} is not a GGUF file (it begins with {magic:02x?} and not with \"GGUF\"); name a .gguf model"
    )]
    NotGguf { path: PathBuf, magic: Vec<u8> },
    /// Writing was called off.
    #[error(transparent)]
    Cancelled(#[from] crate::progress::Cancelled),
    /// The file has another version than 2 or 3, or is big-endian.
    #[error("{path}: {}{hint}",
        match big_endian {
            true => format!("GGUF version {} in big-endian order is not supported", version.swap_bytes()),
            false => format!("GGUF version {version} is not supported (2 and 3 are)"),
        },
        hint = match (*big_endian, *version) {
            (true, _) => "; convert the file to little-endian first (gguf_convert_endian.py of llama.cpp)",
            (_, 1) => "; files of version 1 are of August 2023, and no recent program reads them: fetch a newer file of the model, or convert it anew",
            (_, 4..=99) => "; the file was written by a newer program",
            _ => "; the file is damaged, fetch it again",
        }
    )]
    Version {
        path: PathBuf,
        version: u32,
        big_endian: bool,
    },
    /// The file ends within something that its header announces.
    #[error(
        "{path}: the file ends at byte {len} but {what} at byte {offset} needs {}; it is truncated or damaged, fetch it again",
        count(need, "byte")
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
    /// A tensor is of a type that is not supported.
    #[error("{path}: tensor {}: {}", Shown(tensor), type_problem(*type_id, path))]
    TensorType {
        path: PathBuf,
        tensor: String,
        type_id: u32,
    },
    /// A file that by its name is a part of a model is not one of the same model.
    #[error("{path} is not {problem}")]
    ForeignPart {
        path: PathBuf,
        /// Which part it should be, of which model, and what it is.
        problem: String,
    },
    /// A folder in Hugging Face's form, or a file of it, is of no use.
    #[error("{path}: {problem}")]
    Checkpoint { path: PathBuf, problem: String },
    /// A metadata key is missing.
    #[error(
        "{path}: metadata key {}: is missing ({expected} is needed)",
        Shown(key)
    )]
    Missing {
        path: PathBuf,
        key: String,
        /// The kind of value that it should have, for example "a string".
        expected: &'static str,
    },
    /// The value of a metadata key is of the wrong type or unusable.
    #[error("{path}: metadata key {}: {problem}", Shown(key))]
    Metadata {
        path: PathBuf,
        key: String,
        problem: String,
    },
}

/// What is wrong with a type of this number, and what to do.
fn type_problem(type_id: u32, path: &Path) -> String {
    let supported = BlockType::supported_names();
    if let Some(SparseType::Unknown { version, values }) = SparseType::from_id(type_id) {
        return match version {
            SPARSE_VERSION => format!(
                "values of type {values} in flapjack's sparse form are not known; the file is damaged, fetch it again"
            ),
            _ => format!(
                "flapjack's sparse form of version {version} is not supported (version {SPARSE_VERSION} is); take the flapjack that wrote the file, or make it anew with `flapjack prune --sparse ... --pack`"
            ),
        };
    }
    let Some(known) = BlockType::unsupported(type_id) else {
        return format!(
            "unknown type {type_id}, of a newer llama.cpp or of a program that goes its own way; take the model in another type: supported are {supported}"
        );
    };
    let name = known.name;
    match known.instead {
        None => {
            format!(
                "type {name} is not supported, for it is not one of weights; supported are {supported}"
            )
        }
        Some(instead) if known.removed => format!(
            "type {name} is not supported, for it was removed from the format; take the {instead} file of the same model, or quantise the original anew to {instead} (supported are {supported})"
        ),
        Some(instead) => format!(
            "type {name} is not supported; take the model in another type such as {instead}, or make it with `llama-quantize --allow-requantize {} new.gguf {instead}` (supported are {supported})",
            path.display()
        ),
    }
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
    /// [`Layout::Native`], or [`Layout::Sparse`] for a matrix in flapjack's own form, of which nothing but its length is checked yet.
    pub layout: Layout,
    /// The data, as a range of bytes of the map.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// The name of the type, and whether it is sparse.
    pub fn type_name(&self) -> String {
        match self.layout {
            Layout::Sparse => format!("{} sparse", self.block_type.name()),
            Layout::Native | Layout::Packed | Layout::Narrow => self.block_type.name().to_owned(),
        }
    }
}

/// A tensor that cannot be read, because its type is not supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsupportedTensor {
    pub name: String,
    /// The extents, row-major.
    pub shape: Vec<usize>,
    /// The number of the type.
    pub type_id: u32,
}

impl UnsupportedTensor {
    /// The name of the type, or its number where it has none that we know.
    pub fn type_name(&self) -> String {
        if let Some(SparseType::Unknown { version, .. }) = SparseType::from_id(self.type_id) {
            return format!("sparse (version {version})");
        }
        match BlockType::unsupported(self.type_id) {
            Some(known) => known.name.to_owned(),
            None => format!("type {}", self.type_id),
        }
    }
}

/// A GGUF file that has been mapped and checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    version: u32,
    map: Map,
    metadata: BTreeMap<String, Value>,
    /// The metadata keys in the order in which the file has them, and behind them those that were added.
    keys: Vec<String>,
    /// The number of keys that the file itself has.
    own_keys: usize,
    /// The keys whose values are not the file's own.
    overridden: BTreeSet<String>,
    tensors: Vec<TensorInfo>,
    /// The index in `tensors` of each name.
    by_name: BTreeMap<String, usize>,
    unsupported: Vec<UnsupportedTensor>,
    /// Those of `tensors` that do not lie in the first of several files.
    later_parts: Range<usize>,
    /// The names of tensors in the files of another format that this was made of; empty for a GGUF file.
    own_names: BTreeMap<String, String>,
    /// The bytes of the file, or of all its parts.
    file_len: usize,
}

impl GgufFile {
    /// Maps and parses the file at `path`. If it is a part of a model that is split among several files, and the others lie beside it
    /// under the names that follow from its own, all of them are mapped, and are one file here: that of the first part's path, with
    /// its metadata, and without those that tell about parts. A part without all others is a file by itself ([`Part::of`]).
    ///
    /// # Errors
    /// [`GgufError`] if the file cannot be mapped, or if anything in it is out of bounds, of the wrong type, or overlaps; if another
    /// part is not of the same model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let map = Map::open(path).map_err(|source| GgufError::Io {
            path: path.to_owned(),
            source,
        })?;
        let file = parse::parse(path, map).map_err(|error| match foreign::is_piece(path) {
            // The first piece begins as a GGUF file does, and ends too early.
            true => GgufError::Foreign {
                path: path.to_owned(),
                found: Foreign::Piece,
            },
            false => error,
        })?;
        match Part::of(&file).and_then(|part| part.all()) {
            Some(paths) => parts::open(&paths),
            None => Ok(file),
        }
    }

    /// A file of this map and table, of which the map holds the data.
    fn of(path: &Path, map: Map, table: parse::Table) -> Self {
        let parse::Table {
            version,
            metadata,
            keys,
            tensors,
            by_name,
            unsupported,
        } = table;
        Self {
            path: path.to_owned(),
            version,
            file_len: map.bytes().len(),
            map,
            metadata,
            own_keys: keys.len(),
            keys,
            overridden: BTreeSet::new(),
            tensors,
            by_name,
            unsupported,
            later_parts: 0..0,
            own_names: BTreeMap::new(),
        }
    }

    /// As [`open`](Self::open), with other metadata than the file's own: these values take the place of those that the file has,
    /// or are added. Of two for the same key the last counts. An integer or float is stored in the type of the value that it
    /// replaces, where it fits that.
    ///
    /// Tensors are found where the file itself says that they are, whatever becomes of `general.alignment`.
    ///
    /// # Errors
    /// The errors of [`open`](Self::open).
    pub fn open_with(
        path: impl AsRef<Path>,
        overrides: &[(String, Value)],
    ) -> Result<Self, GgufError> {
        Ok(Self::open(path)?.overridden_by(overrides))
    }

    /// The file with other metadata, as [`open_with`](Self::open_with) has it.
    pub(crate) fn overridden_by(mut self, overrides: &[(String, Value)]) -> Self {
        for (key, value) in overrides {
            let own = self.metadata.get(key);
            let value = value.clone().in_place_of(own);
            if own == Some(&value) {
                continue;
            }
            if self.metadata.insert(key.clone(), value).is_none() {
                self.keys.push(key.clone());
            }
            self.overridden.insert(key.clone());
        }
        self
    }

    /// What a GGUF file would be, of metadata and tensors that come from files of another format, which are mapped one behind the other.
    /// `own_names` has the names of tensors there, by their names here, also of those that are missing.
    pub(crate) fn assembled(
        path: &Path,
        map: Map,
        metadata: Vec<(String, Value)>,
        tensors: Vec<TensorInfo>,
        own_names: BTreeMap<String, String>,
        file_len: usize,
    ) -> Self {
        let keys = metadata.iter().map(|(key, _)| key.clone()).collect();
        let by_name = tensors.iter().enumerate();
        let by_name = by_name
            .map(|(i, tensor)| (tensor.name.clone(), i))
            .collect();
        let table = parse::Table {
            version: 3,
            metadata: metadata.into_iter().collect(),
            keys,
            tensors,
            by_name,
            unsupported: Vec::new(),
        };
        let mut file = Self::of(path, map, table);
        file.later_parts = 0..file.tensors.len();
        file.own_names = own_names;
        file.file_len = file_len;
        file
    }

    /// Whether it is a GGUF file, and not made of files of another format.
    pub fn is_gguf(&self) -> bool {
        self.own_names.is_empty()
    }

    /// The keys that the file itself does not have.
    pub fn added(&self) -> impl Iterator<Item = &str> {
        self.keys[self.own_keys..].iter().map(String::as_str)
    }

    /// Parses a file that is in memory; `path` is the name that errors give it.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn from_map(path: &Path, map: Map) -> Result<Self, GgufError> {
        parse::parse(path, map)
    }

    /// The path that the file was opened by; of a split model, that of its first part.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of the file; of a split model, those of all parts.
    pub fn file_len(&self) -> usize {
        self.file_len
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

    /// All tensors of supported types, in the order of the file's tensor table.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensors of other types, in the order of the file's tensor table.
    pub fn unsupported(&self) -> &[UnsupportedTensor] {
        &self.unsupported
    }

    /// The tensor of this name; `None` if the file has none of a supported type.
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
            Some(value) => T::from_value(value)
                .map(Some)
                .ok_or_else(|| self.metadata_error(key, unexpected::<T>(value))),
        }
    }

    /// The value of a metadata key that the file must have.
    ///
    /// # Errors
    /// [`GgufError::Missing`] if the key is missing, [`GgufError::Metadata`] if its value cannot be read as a `T`.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| GgufError::Missing {
            path: self.path.clone(),
            key: key.to_owned(),
            expected: T::EXPECTED,
        })
    }

    /// The value of a metadata key that can be done without: one that cannot be read as a `T` is passed over, with a warning.
    pub(crate) fn optional<'a, T: FromValue<'a>>(
        &'a self,
        key: &str,
        warnings: &mut Vec<MetadataWarning>,
    ) -> Option<T> {
        let value = self.metadata.get(key)?;
        let read = T::from_value(value);
        if read.is_none() {
            warnings.push(MetadataWarning::ignored(key, unexpected::<T>(value)));
        }
        read
    }

    /// Returns an error if a tensor is of a type that is not supported.
    pub(crate) fn refuse_unsupported(&self) -> Result<(), GgufError> {
        match self.unsupported.first() {
            None => Ok(()),
            Some(tensor) => Err(GgufError::TensorType {
                path: self.path.clone(),
                tensor: tensor.name.clone(),
                type_id: tensor.type_id,
            }),
        }
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
        let own = self.own_names.get(tensor).map_or(tensor, String::as_str);
        GgufError::Tensor {
            path: self.path.clone(),
            tensor: own.to_owned(),
            problem: problem.into(),
        }
    }
}

/// What is wrong with a value that cannot be read as a `T`.
fn unexpected<'a, T: FromValue<'a>>(value: &Value) -> String {
    format!("expected {}, found {value}", T::EXPECTED)
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
