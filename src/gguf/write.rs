//! Writing GGUF files: beside the target, flushed to disk, put in place by rename.

use std::collections::BTreeSet;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::parse::{self, ALIGNMENT_KEY, DEFAULT_ALIGNMENT, alignment_from};
use super::{GgufError, GgufFile, Map, Shown, Value};
use crate::files;
use crate::quant::BlockType;

/// Collects metadata and tensors and writes them as a GGUF version 3 file.
#[derive(Debug, Default)]
pub struct Writer<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<TensorEntry<'a>>,
}

#[derive(Debug)]
struct TensorEntry<'a> {
    name: String,
    shape: Vec<usize>,
    block_type: BlockType,
    /// Bytes of the data.
    len: usize,
    /// `None` if the data comes later, into an image.
    bytes: Option<std::borrow::Cow<'a, [u8]>>,
}

impl<'a> Writer<'a> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry; entries are written in the order in which they were added.
    pub fn metadata(&mut self, key: impl Into<String>, value: Value) -> &mut Self {
        self.metadata.push((key.into(), value));
        self
    }

    /// Adds a tensor of row-major `shape` whose data is `bytes`.
    ///
    /// # Panics
    /// If the number of bytes is not what shape and type ask for.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        block_type: BlockType,
        bytes: impl Into<std::borrow::Cow<'a, [u8]>>,
    ) -> &mut Self {
        let bytes = bytes.into();
        assert_eq!(
            bytes.len(),
            data_len(shape, block_type),
            "the data must fill the shape"
        );
        self.push(name.into(), shape, block_type, Some(bytes))
    }

    /// Adds a tensor of row-major `shape` whose data will be put into the [image](Self::image).
    pub fn reserve(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        block_type: BlockType,
    ) -> &mut Self {
        self.push(name.into(), shape, block_type, None)
    }

    fn push(
        &mut self,
        name: String,
        shape: &[usize],
        block_type: BlockType,
        bytes: Option<std::borrow::Cow<'a, [u8]>>,
    ) -> &mut Self {
        self.tensors.push(TensorEntry {
            name,
            shape: shape.to_vec(),
            block_type,
            len: data_len(shape, block_type),
            bytes,
        });
        self
    }

    /// The file in memory of this process, on no disk. The data of reserved tensors is zeros. `name` stands for its path in
    /// messages.
    ///
    /// # Errors
    /// Those of [`write_to`](Self::write_to), and if the memory is not to be had.
    pub fn image(&self, name: &Path) -> Result<GgufFile, GgufError> {
        let io = |source| GgufError::Io {
            path: name.to_owned(),
            source,
        };
        let head = self.head().map_err(io)?;
        let alignment = self.alignment().map_err(io)?;
        let data = self
            .tensors
            .iter()
            .map(|t| t.len.next_multiple_of(alignment));
        let mut map = Map::anonymous(head.len() + data.sum::<usize>()).map_err(io)?;
        let (start, mut rest) = map.bytes_mut().split_at_mut(head.len());
        start.copy_from_slice(&head);
        for tensor in &self.tensors {
            if let Some(bytes) = &tensor.bytes {
                rest[..tensor.len].copy_from_slice(bytes);
            }
            rest = &mut rest[tensor.len.next_multiple_of(alignment)..];
        }
        parse::parse(name, map)
    }

    /// Writes the whole file to `out`. Tensors are aligned as the metadata's `general.alignment` says, or to 32 bytes.
    ///
    /// # Errors
    /// Those of `out`; also when a key or the name of a tensor occurs twice, or when `general.alignment` is not a power of
    /// two up to 1 MiB. Then nothing is written.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let alignment = self.alignment()?;
        let head = self.head()?;
        if let Some(tensor) = self.tensors.iter().find(|t| t.bytes.is_none()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the tensor {} has no data", Shown(&tensor.name)),
            ));
        }
        out.write_all(&head)?;
        for tensor in &self.tensors {
            out.write_all(tensor.bytes.as_deref().unwrap_or_default())?;
            let padding = tensor.len.next_multiple_of(alignment) - tensor.len;
            out.write_all(&vec![0u8; padding])?;
        }
        Ok(())
    }

    /// All that comes before the data, padded to the alignment.
    fn head(&self) -> io::Result<Vec<u8>> {
        let alignment = self.alignment()?;
        refuse_twins(
            "metadata key",
            self.metadata.iter().map(|(key, _)| key.as_str()),
        )?;
        refuse_twins("tensor", self.tensors.iter().map(|t| t.name.as_str()))?;
        let mut head = Vec::new();
        head.extend_from_slice(b"GGUF");
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut head, key);
            head.extend_from_slice(&(value.value_type() as u32).to_le_bytes());
            put_value(&mut head, value);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            put_string(&mut head, &tensor.name);
            head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
            for extent in tensor.shape.iter().rev() {
                head.extend_from_slice(&(*extent as u64).to_le_bytes());
            }
            head.extend_from_slice(&tensor.block_type.id().to_le_bytes());
            head.extend_from_slice(&(offset as u64).to_le_bytes());
            offset = (offset + tensor.len).next_multiple_of(alignment);
        }
        head.resize(head.len().next_multiple_of(alignment), 0);
        Ok(head)
    }

    fn alignment(&self) -> io::Result<usize> {
        match self.metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
            None => Ok(DEFAULT_ALIGNMENT),
            Some((_, value)) => alignment_from(value).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{ALIGNMENT_KEY} must be a power of two up to 1 MiB, not {value}"),
                )
            }),
        }
    }

    /// Bytes of the tensors' data.
    pub fn data_bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.len).sum()
    }

    /// Writes the file beside `path`, flushes it to disk and renames it into place, so that `path` is either the old
    /// file or the whole new one. Where `path` is a symbolic link, the file that it leads to is replaced.
    ///
    /// # Errors
    /// [`GgufError::Io`]; the old file, if there was one, is then untouched. Also when `path` is there and is no regular
    /// file.
    pub fn save(&self, path: &Path) -> Result<(), GgufError> {
        files::replace(path, |file| {
            let mut out = BufWriter::new(file);
            self.write_to(&mut out)?;
            out.flush()
        })
        .map_err(|source| GgufError::Io {
            path: path.to_owned(),
            source,
        })
    }
}

/// Bytes that a tensor of row-major `shape` takes.
fn data_len(shape: &[usize], block_type: BlockType) -> usize {
    let columns = *shape.last().expect("a tensor has at least one dimension");
    let rows: usize = shape[..shape.len() - 1].iter().product();
    rows * block_type.row_bytes(columns)
}

fn refuse_twins<'n>(what: &str, names: impl Iterator<Item = &'n str>) -> io::Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the {what} {} is given twice", Shown(name)),
            ));
        }
    }
    Ok(())
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.push(*v as u8),
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(s) => put_string(out, s),
        Value::Array(item_type, items) => {
            out.extend_from_slice(&(*item_type as u32).to_le_bytes());
            out.extend_from_slice(&(items.len() as u64).to_le_bytes());
            for item in items {
                put_value(out, item);
            }
        }
        Value::StringArray(items) => {
            out.extend_from_slice(&(super::ValueType::String as u32).to_le_bytes());
            out.extend_from_slice(&(items.len() as u64).to_le_bytes());
            for item in items {
                put_string(out, item);
            }
        }
    }
}
