//! Writing GGUF files. A file is written beside its target, flushed to disk, and put in place by renaming it.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::parse::{self, ALIGNMENT_KEY, DEFAULT_ALIGNMENT, alignment_from};
use super::{GgufError, GgufFile, Map, Shown, Value};
use crate::files;
use crate::progress::{self, Cancelled, Progress};
use crate::quant::{BlockType, Layout, SparseType};

/// Writes the data of a [reserved](Writer::reserve) tensor, known by its name.
pub type Fill<'f> = dyn FnMut(&str, &mut dyn Write) -> io::Result<()> + 'f;

/// The contents of a GGUF file that is to be written: metadata and tensors. The file has version 3.
#[derive(Debug, Default)]
pub struct Writer<'a> {
    metadata: Vec<(String, Cow<'a, Value>)>,
    tensors: Vec<TensorEntry<'a>>,
}

/// A tensor that is to be written.
#[derive(Debug)]
struct TensorEntry<'a> {
    name: String,
    shape: Vec<usize>,
    block_type: BlockType,
    layout: Layout,
    /// The size of the data in bytes.
    len: usize,
    /// The data; `None` if it is put into the image later.
    bytes: Option<Cow<'a, [u8]>>,
}

impl<'a> Writer<'a> {
    /// A writer with no metadata and no tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry. Entries are written in the order in which they are added.
    pub fn metadata(&mut self, key: impl Into<String>, value: Value) -> &mut Self {
        self.metadata.push((key.into(), Cow::Owned(value)));
        self
    }

    /// Adds a metadata entry whose value, which may be a vocabulary, is not copied.
    pub fn metadata_of(&mut self, key: impl Into<String>, value: &'a Value) -> &mut Self {
        self.metadata.push((key.into(), Cow::Borrowed(value)));
        self
    }

    /// Adds a tensor of row-major `shape` with the data `bytes`.
    ///
    /// # Panics
    /// If the number of bytes does not fit the shape and type.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        block_type: BlockType,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> &mut Self {
        let bytes = bytes.into();
        assert_eq!(
            bytes.len(),
            data_len(shape, block_type),
            "the data must fill the shape"
        );
        self.push(name.into(), shape, block_type, Some(bytes))
    }

    /// Adds a matrix `[rows, cols]` in flapjack's sparse form; its groups lie best where `general.alignment` is 64 or more.
    pub fn sparse(
        &mut self,
        name: impl Into<String>,
        shape: [usize; 2],
        block_type: BlockType,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> &mut Self {
        let bytes = bytes.into();
        self.tensors.push(TensorEntry {
            name: name.into(),
            shape: shape.to_vec(),
            block_type,
            layout: Layout::Sparse,
            len: bytes.len(),
            bytes: Some(bytes),
        });
        self
    }

    /// Adds a tensor of row-major `shape` without data, which is to be put into the [image](Self::image) later, or is written when its turn
    /// comes ([`save_filled`](Self::save_filled)).
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
        bytes: Option<Cow<'a, [u8]>>,
    ) -> &mut Self {
        self.tensors.push(TensorEntry {
            name,
            shape: shape.to_vec(),
            block_type,
            layout: Layout::Native,
            len: data_len(shape, block_type),
            bytes,
        });
        self
    }

    /// The file in memory, without writing it to a disk. The data of reserved tensors is zeros. `name` takes the place of the
    /// path in messages.
    ///
    /// # Errors
    /// [`GgufError`] if a name occurs twice, the alignment is invalid, or there is not enough memory.
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

    /// Writes the whole file to `out`. Tensors are aligned to the metadata's `general.alignment`, or to 32 bytes without it.
    ///
    /// # Errors
    /// Errors of `out`. Nothing is written if a key or the name of a tensor occurs twice, if `general.alignment` is not a
    /// power of two up to 1 MiB, or if a tensor has no data.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        if let Some(tensor) = self.tensors.iter().find(|t| t.bytes.is_none()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the tensor {} has no data", Shown(&tensor.name)),
            ));
        }
        self.write_filled(out, &mut |_, _| Ok(()))
    }

    /// Writes the whole file; `fill` writes the data of reserved tensors.
    fn write_filled(&self, out: &mut impl Write, fill: &mut Fill) -> io::Result<()> {
        let alignment = self.alignment()?;
        out.write_all(&self.head()?)?;
        for tensor in &self.tensors {
            match &tensor.bytes {
                Some(bytes) => out.write_all(bytes)?,
                None => {
                    let mut exact = Exact {
                        out,
                        left: tensor.len,
                    };
                    fill(&tensor.name, &mut exact)?;
                    let left = exact.left;
                    assert_eq!(left, 0, "{} is written to its end", tensor.name);
                }
            }
            let padding = tensor.len.next_multiple_of(alignment) - tensor.len;
            out.write_all(&vec![0u8; padding])?;
        }
        Ok(())
    }

    /// Everything before the data (header, metadata and tensor table), padded to the alignment.
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
            put_entry(&mut head, key, value);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            put_string(&mut head, &tensor.name);
            head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
            for extent in tensor.shape.iter().rev() {
                head.extend_from_slice(&(*extent as u64).to_le_bytes());
            }
            let type_id = match tensor.layout {
                Layout::Sparse => SparseType::id(tensor.block_type),
                _ => tensor.block_type.id(),
            };
            head.extend_from_slice(&type_id.to_le_bytes());
            head.extend_from_slice(&(offset as u64).to_le_bytes());
            offset = (offset + tensor.len).next_multiple_of(alignment);
        }
        head.resize(head.len().next_multiple_of(alignment), 0);
        Ok(head)
    }

    /// The alignment of tensor data in bytes.
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

    /// The size of the whole file in bytes.
    ///
    /// # Errors
    /// Those of writing it that do not come from the system.
    pub fn file_bytes(&self) -> io::Result<u64> {
        let alignment = self.alignment()?;
        let padded = self.tensors.iter();
        let padded = padded.map(|t| t.len.next_multiple_of(alignment) as u64);
        Ok(self.head()?.len() as u64 + padded.sum::<u64>())
    }

    /// The size of all tensors' data in bytes, without padding.
    pub fn data_bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.len).sum()
    }

    /// Writes the file to `path`: first beside it, then flushed to disk and renamed into place, so that `path` is at every
    /// moment either the old file or the whole new one. If `path` is a symbolic link, the file that it leads to is replaced.
    ///
    /// # Errors
    /// [`GgufError::Io`], also if something other than a regular file is at `path`. An old file is then unchanged.
    pub fn save(&self, path: &Path) -> Result<(), GgufError> {
        self.save_with(path, &mut progress::ignore)
    }

    /// [`Writer::save`]; `progress` is called with the bytes of tensors that are written and those of all.
    ///
    /// # Errors
    /// Those of [`Writer::save`]; [`GgufError::Cancelled`].
    pub fn save_with(&self, path: &Path, progress: &mut Progress) -> Result<(), GgufError> {
        self.save_by(path, progress, |out| self.write_to(out))
    }

    /// [`Writer::save_with`], where `fill` writes the data of reserved tensors, one after the other in their order.
    ///
    /// # Errors
    /// Those of [`Writer::save_with`], and of `fill` as [`GgufError::Io`].
    ///
    /// # Panics
    /// If `fill` writes more or less than the tensor has.
    pub fn save_filled(
        &self,
        path: &Path,
        progress: &mut Progress,
        fill: &mut Fill,
    ) -> Result<(), GgufError> {
        self.save_by(path, progress, |out| self.write_filled(out, fill))
    }

    fn save_by(
        &self,
        path: &Path,
        progress: &mut Progress,
        write: impl FnOnce(&mut BufWriter<Told>) -> io::Result<()>,
    ) -> Result<(), GgufError> {
        let total = self.data_bytes();
        files::replace(path, |file| {
            let mut out = BufWriter::new(Told {
                file,
                done: 0,
                total,
                progress,
            });
            write(&mut out)?;
            out.flush()
        })
        .map_err(
            |source| match source.get_ref().is_some_and(|e| e.is::<Cancelled>()) {
                true => Cancelled.into(),
                false => GgufError::Io {
                    path: path.to_owned(),
                    source,
                },
            },
        )
    }
}

/// The place of a tensor, which must be filled exactly.
struct Exact<'a, W> {
    out: &'a mut W,
    left: usize,
}

impl<W: Write> Write for Exact<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        assert!(bytes.len() <= self.left, "more than the tensor has");
        let written = self.out.write(bytes)?;
        self.left -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A file that tells how much was written to it. After a break, writing fails with [`Cancelled`].
struct Told<'a, 'p> {
    file: &'a mut File,
    done: usize,
    total: usize,
    progress: &'a mut Progress<'p>,
}

impl Write for Told<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        /// Bytes after which the progress is told again.
        const PIECE: usize = 1 << 20;
        let written = self.file.write(&bytes[..bytes.len().min(PIECE)])?;
        // The head and the padding are not in the total.
        self.done = (self.done + written).min(self.total);
        progress::report(self.progress, self.done, self.total).map_err(io::Error::other)?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The size in bytes of a tensor of row-major `shape`.
fn data_len(shape: &[usize], block_type: BlockType) -> usize {
    let columns = *shape.last().expect("a tensor has at least one dimension");
    let rows: usize = shape[..shape.len() - 1].iter().product();
    rows * block_type.row_bytes(columns)
}

/// Returns an error if one of the names occurs twice.
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

/// A metadata entry: its key, the type of its value, and the value.
pub(super) fn put_entry(out: &mut Vec<u8>, key: &str, value: &Value) {
    put_string(out, key);
    out.extend_from_slice(&(value.value_type() as u32).to_le_bytes());
    put_value(out, value);
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
