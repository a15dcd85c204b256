//! Importance matrices: how much the inputs of each matrix of a model matter, as llama.cpp's programs write and read them.
//!
//! In the form of a GGUF file a matrix has two tensors, the sums of the squares of its inputs and how many inputs these were; in the older
//! form (`.dat`) it has mean squares, times a number of chunks. Both are read, and the first is written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::gguf::{GgufError, GgufFile, Shown, TensorInfo, Value, Writer};
use crate::quant::{BlockType, decode_row};

const DATASETS: &str = "imatrix.datasets";
const CHUNKS: &str = "imatrix.chunk_count";
const CHUNK: &str = "imatrix.chunk_size";
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// Longer names than any tensor has.
const MOST_NAME: usize = 4096;

/// How much the inputs of a model's matrices matter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ImportanceMatrix {
    /// By the names of the matrices.
    entries: BTreeMap<String, Entry>,
    /// The file that it was read from; `None` if it was collected now.
    path: Option<PathBuf>,
    /// What texts it was collected on.
    datasets: Vec<String>,
    /// How many chunks of so many tokens these had.
    chunks: u32,
    chunk: u32,
}

/// The inputs of one matrix.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    /// The mean square of each.
    squares: Vec<f32>,
    /// How many tokens they were taken from.
    tokens: f32,
}

/// Why a file is no importance matrix.
#[derive(Debug, thiserror::Error)]
pub enum ImportanceError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
}

impl ImportanceMatrix {
    /// One that was collected on `dataset`, in chunks of so many tokens.
    pub fn new(dataset: impl Into<String>, chunks: usize, chunk: usize) -> Self {
        Self {
            datasets: vec![dataset.into()],
            chunks: chunks as u32,
            chunk: chunk as u32,
            ..Self::default()
        }
    }

    /// Adds a matrix, by the mean squares of its inputs of so many tokens.
    pub fn insert(&mut self, name: impl Into<String>, squares: &[f32], tokens: u64) {
        let entry = Entry {
            squares: squares.to_vec(),
            tokens: tokens as f32,
        };
        self.entries.insert(name.into(), entry);
    }

    /// The mean squares of a matrix's inputs; `None` if it has none of this matrix.
    pub fn squares(&self, name: &str) -> Option<&[f32]> {
        self.entries.get(name).map(|entry| &entry.squares[..])
    }

    /// The names of the matrices.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The file that it was read from; `None` if it was collected now.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How many matrices it knows.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What a file that was quantised by it says of it.
    pub(super) fn metadata(&self) -> Vec<(String, Value)> {
        let key = |name: &str| format!("quantize.imatrix.{name}");
        let mut entries = Vec::new();
        if let Some(path) = &self.path {
            let path = path.display().to_string();
            entries.push((key("file"), Value::String(path)));
        }
        if let Some(dataset) = self.datasets.first() {
            entries.push((key("dataset"), Value::String(dataset.clone())));
        }
        entries.push((key("entries_count"), Value::U32(self.len() as u32)));
        if self.chunks > 0 {
            entries.push((key("chunks_count"), Value::U32(self.chunks)));
        }
        entries
    }

    /// Reads a file of either form.
    ///
    /// # Errors
    /// If it cannot be read, or is none.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ImportanceError> {
        let path = path.as_ref();
        let io = |source| GgufError::Io {
            path: path.to_owned(),
            source,
        };
        let mut begin = [0; 4];
        let mut file = std::fs::File::open(path).map_err(io)?;
        let is_gguf = std::io::Read::read_exact(&mut file, &mut begin).is_ok() && begin == *b"GGUF";
        let mut read = match is_gguf {
            true => Self::from_gguf(&GgufFile::open(path)?)?,
            false => {
                let bytes = std::fs::read(path).map_err(io)?;
                Self::from_dat(&bytes).map_err(|problem| file_error(path, problem))?
            }
        };
        read.path = Some(path.to_owned());
        let usable = |entry: &Entry| entry.squares.iter().all(|v| v.is_finite() && *v >= 0.0);
        match read.entries.iter().find(|(_, entry)| !usable(entry)) {
            Some((name, _)) => {
                let problem = format!(
                    "tensor {}: has squares that are no numbers of at least 0",
                    Shown(name)
                );
                Err(file_error(path, problem))
            }
            None => Ok(read),
        }
    }

    fn from_gguf(file: &GgufFile) -> Result<Self, ImportanceError> {
        let path = file.path();
        let numbers = |tensor: &TensorInfo| -> Result<Vec<f32>, ImportanceError> {
            if tensor.block_type != BlockType::F32 {
                let problem = format!("tensor {}: is not F32", Shown(&tensor.name));
                return Err(file_error(path, problem));
            }
            let mut values = vec![0.0; tensor.shape.iter().product()];
            decode_row(BlockType::F32, file.bytes(tensor), &mut values);
            Ok(values)
        };
        let mut entries = BTreeMap::new();
        for tensor in file.tensors() {
            let Some(name) = tensor.name.strip_suffix(SUMS) else {
                continue;
            };
            let counts = file.tensor(&format!("{name}{COUNTS}")).ok_or_else(|| {
                let problem = format!("tensor {}: has sums and no counts", Shown(name));
                file_error(path, problem)
            })?;
            let (mut squares, counts) = (numbers(tensor)?, numbers(counts)?);
            // One for each expert, of which none runs here.
            let [tokens] = counts[..] else {
                let problem = format!(
                    "tensor {}: has counts of {} experts, and mixtures of experts are not supported",
                    Shown(name),
                    counts.len()
                );
                return Err(file_error(path, problem));
            };
            for value in &mut squares {
                *value = if tokens > 0.0 { *value / tokens } else { 1.0 };
            }
            entries.insert(name.to_owned(), Entry { squares, tokens });
        }
        if entries.is_empty() {
            let problem = "has no sums of squares, and so is no importance matrix";
            return Err(file_error(path, problem));
        }
        let number = |key| file.get::<usize>(key).map(|n| n.unwrap_or(0) as u32);
        let datasets = match file.metadata().get(DATASETS) {
            Some(Value::StringArray(names)) => names.clone(),
            _ => Vec::new(),
        };
        Ok(Self {
            entries,
            path: None,
            datasets,
            chunks: number(CHUNKS)?,
            chunk: number(CHUNK)?,
        })
    }

    /// Of the older form: the number of matrices; of each its name, a number of calls, and mean squares times that number; the number of
    /// chunks, and the name of the text.
    fn from_dat(bytes: &[u8]) -> Result<Self, String> {
        let mut rest = Rest(bytes);
        let cut = || "is no importance matrix, or it is truncated".to_owned();
        let many = rest.number().filter(|n| *n > 0).ok_or_else(cut)?;
        let mut read = Self::default();
        for _ in 0..many {
            let len = rest.number().filter(|n| *n <= MOST_NAME).ok_or_else(cut)?;
            let name = rest.take(len).ok_or_else(cut)?;
            let name = String::from_utf8(name.to_vec()).map_err(|_| cut())?;
            let calls = rest.number().ok_or_else(cut)?;
            let len = rest.number().filter(|n| *n > 0).ok_or_else(cut)?;
            let values = len.checked_mul(4).and_then(|len| rest.take(len));
            let values = values.ok_or_else(cut)?.as_chunks::<4>().0;
            let by = calls.max(1) as f32;
            let squares = values.iter().map(|v| f32::from_le_bytes(*v) / by).collect();
            let tokens = calls as f32;
            read.entries.insert(name, Entry { squares, tokens });
        }
        // What follows is not in the oldest files.
        read.chunks = rest.number().unwrap_or(0) as u32;
        let name = rest.number().and_then(|len| rest.take(len));
        let name = name.map(|name| String::from_utf8_lossy(name).into_owned());
        read.datasets.extend(name.filter(|name| !name.is_empty()));
        Ok(read)
    }

    /// Writes it as a GGUF file.
    ///
    /// # Errors
    /// If the system cannot write. What was at `path` before is then still there.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), GgufError> {
        let mut writer = Writer::new();
        writer
            .metadata("general.type", Value::String("imatrix".into()))
            .metadata(DATASETS, Value::StringArray(self.datasets.clone()))
            .metadata(CHUNKS, Value::U32(self.chunks))
            .metadata(CHUNK, Value::U32(self.chunk));
        for (name, entry) in &self.entries {
            let tokens = entry.tokens.max(1.0);
            let sums = entry.squares.iter().map(|v| v * tokens);
            let sums: Vec<u8> = sums.flat_map(f32::to_le_bytes).collect();
            let shape = [1, entry.squares.len()];
            writer.tensor(format!("{name}{SUMS}"), &shape, BlockType::F32, sums);
            let tokens = tokens.to_le_bytes().to_vec();
            writer.tensor(format!("{name}{COUNTS}"), &[1, 1], BlockType::F32, tokens);
        }
        writer.save(path.as_ref())
    }
}

fn file_error(path: &Path, problem: impl Into<String>) -> ImportanceError {
    ImportanceError::File {
        path: path.to_owned(),
        problem: problem.into(),
    }
}

/// What is left of some bytes.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of 32 bits that is not negative.
    fn number(&mut self) -> Option<usize> {
        let bytes = self.take(4)?.as_chunks::<4>().0.first()?;
        usize::try_from(i32::from_le_bytes(*bytes)).ok()
    }
}
