//! From a model's file or folder to a GGUF file in other types, tensor by tensor and row by row: what is held in memory is a few MiB of rows.
//!
//! [`Source`] is what is converted, as llama.cpp wants it in a file; [`Conversion`] decides the type of each tensor, and writes the file.
//!
//! | file | what it does |
//! | --- | --- |
//! | `file_type` | the types of files, by the names and numbers of llama.cpp |
//! | `rules` | which matrices of a file take which block type |
//! | `imatrix` | files that say how much the inputs of matrices matter |
//! | `source` | what is converted |
//! | `encode` | the rows of a tensor, in another type |
//!
//! Sources: llama.cpp's `src/llama-quant.cpp` for what types of files are, `tools/imatrix` for importance matrices.

mod encode;
mod file_type;
mod imatrix;
mod rules;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use file_type::FileType;
pub use imatrix::{ImportanceError, ImportanceMatrix};
pub use source::Source;

use crate::gguf::{GgufError, Shown, TensorInfo, Value, Writer};
use crate::kernels::Runtime;
use crate::model::{ModelError, ROTATION_KEY};
use crate::progress::Progress;
use crate::quant::{BlockType, Layout};
use encode::Recoding;
use rules::{Role, Rules};

const OUTPUT: &str = "output.weight";
const FILE_TYPE: &str = "general.file_type";
const VERSION: &str = "general.quantization_version";
/// The version of ggml's block formats.
const QUANTIZATION_VERSION: u32 = 2;
const BY_IMPORTANCE: &str = "quantize.imatrix.";

/// Why a model cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{} would take the place of what is converted; name another file to write to", path.display())]
    SameFile { path: PathBuf },
    /// Errors of two types add up.
    #[error(
        "tensor {}: is in {from} already, and what is encoded twice is worse than what is encoded once; take the model in F16, BF16 or F32",
        Shown(tensor)
    )]
    Requantized { tensor: String, from: &'static str },
    #[error(
        "tensor {}: single weights of it are gone, and other types have no place for that",
        Shown(tensor)
    )]
    Sparse { tensor: String },
    #[error(
        "tensor {}: in {to} the model would write nonsense unless it is known how much the inputs matter",
        Shown(tensor)
    )]
    NeedsImportance { tensor: String, to: &'static str },
    #[error(
        "the importance matrix has {found} inputs of tensor {}, which has {expected}; it is of another model",
        Shown(tensor)
    )]
    OtherImportance {
        tensor: String,
        found: usize,
        expected: usize,
    },
    #[error("the importance matrix has none of the model's matrices; it is of another model")]
    NoImportance,
    #[error("tensor {}: has values that {to} has no place for", Shown(tensor))]
    OutOfRange { tensor: String, to: &'static str },
    #[error(
        "tensor {}: has values that are not numbers, so that the model is damaged; fetch it again",
        Shown(tensor)
    )]
    NotFinite { tensor: String },
}

/// Which types tensors take.
#[derive(Debug, Clone, PartialEq)]
pub enum Types {
    /// Their own.
    Keep,
    Mixture(Mixture),
    /// These, by their names; those without one keep theirs.
    Each(BTreeMap<String, BlockType>),
}

/// The type of a matrix, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType(BlockType);

impl FromStr for TensorType {
    type Err = String;

    /// The name of any type for weights, like `q6_k`, in large or small letters.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = BlockType::ALL.into_iter();
        // Q8_1 is for activations; no program multiplies by it.
        let usable = |t: &BlockType| *t != BlockType::Q8_1;
        let named = |t: &BlockType| t.name().eq_ignore_ascii_case(text) && usable(t);
        all.find(named).map(Self).ok_or_else(|| {
            let all = BlockType::ALL.into_iter().filter(usable);
            let names: Vec<String> = all.map(|t| t.name().to_lowercase()).collect();
            format!("must be one of {}", names.join(", "))
        })
    }
}

/// A type of files, and what is to be otherwise in this one.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    pub file_type: FileType,
    /// All matrices take the same type.
    pub pure: bool,
    /// The output head keeps its type.
    pub keep_head: bool,
    /// The type of the output head.
    pub head: Option<TensorType>,
    /// The type of the embedding, also where it is the output head.
    pub embedding: Option<TensorType>,
    /// Matrices that are in block types already may take others.
    pub requantize: bool,
}

impl From<FileType> for Mixture {
    fn from(file_type: FileType) -> Self {
        Self {
            file_type,
            pure: false,
            keep_head: false,
            head: None,
            embedding: None,
            requantize: false,
        }
    }
}

/// A tensor, and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorChange<'a> {
    pub name: &'a str,
    /// Row-major.
    pub shape: &'a [usize],
    pub from: &'static str,
    pub to: &'static str,
    /// Bytes before and after.
    pub bytes: (usize, usize),
}

/// A source, and the type that each of its tensors takes.
#[derive(Debug)]
pub struct Conversion<'a> {
    source: &'a Source,
    /// In the order of the source's tensors.
    types: Vec<BlockType>,
    /// The type of the file; `None` where it says nothing, or what it said before.
    file_type: Option<FileType>,
    /// Everything is as the source's file has it.
    keeps: bool,
    importance: Option<&'a ImportanceMatrix>,
}

impl<'a> Conversion<'a> {
    /// Decides what becomes of every tensor.
    ///
    /// # Errors
    /// If a matrix is in a block type already and may not take another, needs an importance matrix, or that is of another model.
    pub fn new(
        source: &'a Source,
        types: &Types,
        importance: Option<&'a ImportanceMatrix>,
    ) -> Result<Self, ConvertError> {
        let tensors = source.file().tensors();
        let mut chosen: Vec<BlockType> = tensors.iter().map(|t| source.own_type(t)).collect();
        match types {
            Types::Keep => {}
            Types::Each(named) => {
                for (tensor, chosen) in tensors.iter().zip(&mut chosen) {
                    *chosen = named.get(&tensor.name).copied().unwrap_or(*chosen);
                }
            }
            Types::Mixture(mixture) => {
                mixed(source, mixture, importance.is_some(), &mut chosen);
            }
        }
        let of_file = source.file().get::<usize>(FILE_TYPE).ok().flatten();
        let conversion = Self {
            file_type: match types {
                Types::Mixture(mixture) => Some(mixture.file_type),
                Types::Keep if of_file.is_some() => None,
                _ => mostly(tensors, &chosen),
            },
            keeps: *types == Types::Keep && source.file().is_gguf(),
            source,
            types: chosen,
            importance,
        };
        conversion.check(types)?;
        Ok(conversion)
    }

    fn check(&self, types: &Types) -> Result<(), ConvertError> {
        let tensors = self.source.file().tensors().iter().zip(&self.types);
        let (may_requantize, file_type) = match types {
            Types::Mixture(mixture) => (mixture.requantize, Some(mixture.file_type)),
            _ => (true, None),
        };
        let mut known = false;
        for (tensor, to) in tensors {
            if *to == tensor.block_type {
                continue;
            }
            let name = || tensor.name.clone();
            if tensor.layout == Layout::Sparse {
                return Err(ConvertError::Sparse { tensor: name() });
            }
            let from = tensor.block_type;
            if !from.is_float() && !may_requantize {
                return Err(ConvertError::Requantized {
                    tensor: name(),
                    from: from.name(),
                });
            }
            let squares = self.importance.and_then(|all| all.squares(&tensor.name));
            known |= squares.is_some();
            let role = Role::of(&tensor.name);
            if let Some(squares) = squares
                && squares.len() != columns(tensor)
                && role != Role::Embedding
            {
                return Err(ConvertError::OtherImportance {
                    tensor: name(),
                    found: squares.len(),
                    expected: columns(tensor),
                });
            }
            if squares.is_none() && rules::needs_importance(role, *to, file_type) {
                return Err(ConvertError::NeedsImportance {
                    tensor: name(),
                    to: to.name(),
                });
            }
        }
        match self.importance {
            Some(_) if !known && self.changes().any(|c| c.from != c.to) => {
                Err(ConvertError::NoImportance)
            }
            _ => Ok(()),
        }
    }

    /// All tensors, in the order of the source.
    pub fn changes(&self) -> impl Iterator<Item = TensorChange<'_>> {
        let tensors = self.source.file().tensors().iter().zip(&self.types);
        tensors.map(|(tensor, to)| TensorChange {
            name: &tensor.name,
            shape: &tensor.shape,
            from: tensor.block_type.name(),
            to: to.name(),
            bytes: (tensor.range.len(), self.bytes_of(tensor, *to)),
        })
    }

    fn bytes_of(&self, tensor: &TensorInfo, to: BlockType) -> usize {
        match tensor.layout {
            Layout::Native => {
                let rows: usize = tensor.shape[..tensor.shape.len() - 1].iter().product();
                rows * to.row_bytes(columns(tensor))
            }
            _ => tensor.range.len(),
        }
    }

    /// The type of the file, in the names of llama.cpp; `None` if there is none for it.
    pub fn file_type(&self) -> Option<FileType> {
        self.file_type
    }

    /// The size of the file in bytes.
    ///
    /// # Errors
    /// If the source has a name or a key twice, or an alignment that cannot be.
    pub fn bytes(&self) -> Result<u64, ConvertError> {
        let writer = self.writer();
        let bytes = writer.file_bytes().map_err(|source| GgufError::Io {
            path: self.source.file().path().to_owned(),
            source,
        });
        Ok(bytes?)
    }

    /// Writes the file. `progress` counts bytes.
    ///
    /// # Errors
    /// If `path` is the source, a tensor has values that its type has no place for, the system cannot write, or `progress` breaks. What
    /// was at `path` before is then still there.
    pub fn write(
        &self,
        runtime: &Runtime,
        path: &Path,
        progress: &mut Progress,
    ) -> Result<(), ConvertError> {
        if self.source.is_at(path) {
            return Err(ConvertError::SameFile {
                path: path.to_owned(),
            });
        }
        let file = self.source.file();
        let types: BTreeMap<&str, BlockType> = file
            .tensors()
            .iter()
            .zip(&self.types)
            .map(|(tensor, to)| (&tensor.name[..], *to))
            .collect();
        let mut problem = None;
        let written = self.writer().save_filled(path, progress, &mut |name, out| {
            let tensor = file.tensor(name).expect("it is the source's");
            let importance = self.importance.and_then(|all| all.squares(name));
            let recoding = Recoding {
                tensor,
                bytes: file.bytes(tensor),
                to: types[name],
                order: self.source.order_of(name),
                importance: importance.filter(|squares| squares.len() == columns(tensor)),
            };
            let done = recoding.write(runtime, out)?;
            done.map_err(|error| {
                let words = error.to_string();
                problem = Some(error);
                std::io::Error::other(words)
            })
        });
        match problem {
            Some(problem) => Err(problem),
            None => Ok(written?),
        }
    }

    /// The file, but for the data of tensors that change.
    fn writer(&self) -> Writer<'_> {
        let mut writer = Writer::new();
        let file = self.source.file();
        let version = Value::U32(QUANTIZATION_VERSION);
        let file_type = self.file_type.map(|file_type| Value::U32(file_type.id()));
        let mut own = vec![(FILE_TYPE, file_type), (VERSION, Some(version))];
        if self.keeps {
            own.clear();
        }
        for (key, value) in file.entries() {
            if key == ROTATION_KEY || (key.starts_with(BY_IMPORTANCE) && !self.keeps) {
                continue;
            }
            let place = own.iter().position(|(ours, _)| *ours == key);
            match place.and_then(|i| own.remove(i).1) {
                Some(value) => writer.metadata(key, value),
                None => writer.metadata_of(key, value),
            };
        }
        for (key, value) in own {
            if let Some(value) = value {
                writer.metadata(key, value);
            }
        }
        let by_importance = self.importance.map(ImportanceMatrix::metadata);
        for (key, value) in by_importance.into_iter().flatten() {
            writer.metadata(key, value);
        }
        for (tensor, to) in file.tensors().iter().zip(&self.types) {
            let (name, bytes) = (&tensor.name[..], file.bytes(tensor));
            let same = *to == tensor.block_type && self.source.order_of(name).is_none();
            match (tensor.layout, same) {
                (Layout::Native, true) => writer.tensor(name, &tensor.shape, *to, bytes),
                (Layout::Native, false) => writer.reserve(name, &tensor.shape, *to),
                _ => {
                    let shape = [tensor.shape[0], columns(tensor)];
                    writer.sparse(name, shape, *to, bytes)
                }
            };
        }
        writer
    }
}

/// Gives all matrices the types of a mixture.
fn mixed(source: &Source, mixture: &Mixture, by_importance: bool, types: &mut [BlockType]) {
    let tensors = source.file().tensors();
    let mut rules = Rules::new(mixture.file_type, source.traits(by_importance));
    // Rules go by the numbers of layers.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|i| (layer_of(&tensors[*i].name), &tensors[*i].name));
    let own = mixture.file_type.block_type();
    let tied = source.is_tied();
    for i in order {
        let tensor = &tensors[i];
        let role = Role::of(&tensor.name);
        let is_head = role == Role::Head || (role == Role::Embedding && tied);
        if !rules::may_change(&tensor.name, &tensor.shape) || (is_head && mixture.keep_head) {
            continue;
        }
        let asked = match role {
            Role::Embedding => mixture.embedding.or(mixture.head.filter(|_| tied)),
            Role::Head => mixture.head,
            _ => None,
        };
        let columns = columns(tensor);
        let chosen = match asked {
            Some(TensorType(asked)) => asked,
            None if own.is_float() || mixture.pure => own,
            None => rules.next(role, columns),
        };
        types[i] = rules::fitting(chosen, columns);
    }
}

/// The type of a file whose matrices have these types, if most of its bytes are in one.
fn mostly(tensors: &[TensorInfo], types: &[BlockType]) -> Option<FileType> {
    let mut bytes: Vec<(BlockType, usize)> = Vec::new();
    for (tensor, to) in tensors.iter().zip(types) {
        if rules::may_change(&tensor.name, &tensor.shape) {
            let rows: usize = tensor.shape[..tensor.shape.len() - 1].iter().product();
            let len = rows * to.row_bytes(columns(tensor));
            match bytes.iter_mut().find(|(t, _)| t == to) {
                Some((_, sum)) => *sum += len,
                None => bytes.push((*to, len)),
            }
        }
    }
    let (most, _) = bytes.into_iter().max_by_key(|(_, sum)| *sum)?;
    FileType::mostly(most)
}

fn columns(tensor: &TensorInfo) -> usize {
    *tensor.shape.last().expect("a tensor has a dimension")
}

/// The layer that a tensor belongs to, by its name; -1 of one that belongs to none.
fn layer_of(name: &str) -> i64 {
    let number = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    number
        .and_then(|(number, _)| number.parse().ok())
        .unwrap_or(-1)
}
