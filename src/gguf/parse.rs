//! Parsing GGUF files. Every length is checked before it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{
    GgufError, GgufFile, Map, Shown, TensorInfo, UnsupportedTensor, Value, ValueType, foreign,
};
use crate::count::count as counted;
use crate::quant::{BlockType, Layout, SparseType, told_len};

/// The deepest nesting of arrays that is accepted. The specification sets no limit, and no known file nests arrays at all.
const MAX_DEPTH: usize = 4;
/// The largest number of dimensions of a tensor, which is ggml's limit.
const MAX_RANK: usize = 4;
/// The largest number of items in all metadata arrays together. A vocabulary has up to about a million items. Without a limit
/// a file full of one-byte items would take 32 times its size in memory.
const MAX_ITEMS: usize = 1 << 24;
/// The metadata key that gives the alignment of tensor data.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// The alignment of tensor data in bytes, if the file does not give it.
pub(super) const DEFAULT_ALIGNMENT: usize = 32;

/// The alignment in bytes that a value of [`ALIGNMENT_KEY`] gives; `None` if it is not a power of two up to 1 MiB.
pub(super) fn alignment_from(value: &Value) -> Option<usize> {
    value
        .as_i128()
        .and_then(|v| usize::try_from(v).ok())
        .filter(|v| v.is_power_of_two() && *v <= 1 << 20)
}

/// Parses a map of a GGUF file; `path` is the file's name in messages.
///
/// # Errors
/// [`GgufError`] for anything that is out of bounds, invalid, not supported, or given twice.
pub(super) fn parse(path: &Path, map: Map) -> Result<GgufFile, GgufError> {
    let table = Table::read(path, map.bytes())?;
    Ok(GgufFile::of(path, map, table))
}

/// What stands before the data of a file. Ranges of tensors are of the file's bytes.
pub(super) struct Table {
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    /// The metadata keys in the order in which the file has them.
    pub keys: Vec<String>,
    pub tensors: Vec<TensorInfo>,
    /// The index in `tensors` of each name.
    pub by_name: BTreeMap<String, usize>,
    pub unsupported: Vec<UnsupportedTensor>,
}

impl Table {
    /// Reads the table of a file of these bytes; `path` is its name in messages.
    pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Self, GgufError> {
        read_table(path, bytes)
    }
}

fn read_table(path: &Path, file: &[u8]) -> Result<Table, GgufError> {
    let mut reader = Reader {
        path,
        bytes: file,
        at: 0,
        items: 0,
    };

    if !file.starts_with(b"GGUF") {
        return Err(not_gguf(path, file));
    }
    reader.at = 4;
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version {
            path: path.to_owned(),
            version,
            big_endian: (2..=3).contains(&version.swap_bytes()),
        });
    }
    // A tensor entry takes at least 24 bytes, a metadata entry at least 13. Impossible counts are refused before anything
    // is allocated.
    let tensor_count = reader.count("the tensor count", 24)?;
    let metadata_count = reader.count("the metadata count", 13)?;

    let mut metadata = BTreeMap::new();
    let mut keys = Vec::new();
    for i in 0..metadata_count {
        let at = reader.at;
        let key = reader.string(&format!("the name of metadata entry {i}"))?;
        let what = format!("the value of metadata key {key:?}");
        let value_type = reader.value_type(&what)?;
        let value = reader.value(value_type, &what, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.malformed(at, "the metadata", format!("key {key:?} occurs twice")));
        }
        keys.push(key);
    }

    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(value) => alignment_from(value).ok_or_else(|| GgufError::Metadata {
            path: path.to_owned(),
            key: ALIGNMENT_KEY.into(),
            problem: format!("must be a power of two up to 1 MiB, found {value}"),
        })?,
    };

    let mut tensors = Vec::new();
    let mut unsupported = Vec::new();
    for i in 0..tensor_count {
        match reader.tensor_entry(i, alignment)? {
            Entry::Tensor(tensor) => tensors.push(tensor),
            Entry::Unsupported(tensor) => unsupported.push(tensor),
        }
    }

    let data_start = reader.at.next_multiple_of(alignment);
    let file_len = file.len();
    let mut by_name = BTreeMap::new();
    for (i, tensor) in tensors.iter_mut().enumerate() {
        let fail = |problem: String| GgufError::Tensor {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            problem,
        };
        if tensor.layout == Layout::Sparse {
            // Its own index says how long it is.
            let data = data_start.checked_add(tensor.range.start);
            let data = data.and_then(|start| file.get(start..));
            let len = data.and_then(|data| told_len(tensor.shape[0], data));
            let end = len.and_then(|len| tensor.range.start.checked_add(len));
            tensor.range.end = end.ok_or_else(|| {
                fail(format!(
                    "its index, at byte {} after the data's start at {data_start}, is damaged or reaches past the end of the file at byte {file_len}; the file is truncated or damaged, fetch it again",
                    tensor.range.start
                ))
            })?;
        }
        let range = data_start
            .checked_add(tensor.range.start)
            .zip(data_start.checked_add(tensor.range.end))
            .filter(|(_, end)| *end <= file_len);
        let Some((start, end)) = range else {
            return Err(fail(format!(
                "its data (bytes {} to {} after the data's start at {data_start}) reaches past the end of the file at byte {file_len}; the file is truncated or damaged, fetch it again",
                tensor.range.start, tensor.range.end
            )));
        };
        tensor.range = start..end;
        if by_name.insert(tensor.name.clone(), i).is_some() {
            return Err(fail("the name occurs twice in the tensor table".into()));
        }
    }

    let mut others = BTreeSet::new();
    for tensor in &unsupported {
        if by_name.contains_key(&tensor.name) || !others.insert(&tensor.name) {
            return Err(GgufError::Tensor {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                problem: "the name occurs twice in the tensor table".into(),
            });
        }
    }

    let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|t| !t.range.is_empty()).collect();
    by_offset.sort_by_key(|t| t.range.start);
    for pair in by_offset.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(GgufError::Tensor {
                path: path.to_owned(),
                tensor: pair[1].name.clone(),
                problem: format!(
                    "its data at byte {} overlaps tensor {} (bytes {} to {}); the file is damaged, fetch it again",
                    pair[1].range.start,
                    Shown(&pair[0].name),
                    pair[0].range.start,
                    pair[0].range.end
                ),
            });
        }
    }

    Ok(Table {
        version,
        metadata,
        keys,
        tensors,
        by_name,
        unsupported,
    })
}

/// The error for a file that does not begin with the magic number.
fn not_gguf(path: &Path, bytes: &[u8]) -> GgufError {
    let path = path.to_owned();
    match foreign::recognise(bytes) {
        Some(found) => GgufError::Foreign { path, found },
        None => GgufError::NotGguf {
            path,
            magic: bytes[..bytes.len().min(4)].to_vec(),
        },
    }
}

/// An entry of the tensor table.
enum Entry {
    /// One of a supported type.
    Tensor(TensorInfo),
    Unsupported(UnsupportedTensor),
}

/// Reads values from the bytes of a file, one after the other.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    /// The offset of the next byte to read.
    at: usize,
    /// The number of items in all arrays read so far.
    items: usize,
}

impl<'a> Reader<'a> {
    /// An error about `what`, which is at `offset`.
    fn malformed(&self, offset: usize, what: &str, problem: String) -> GgufError {
        GgufError::Malformed {
            path: self.path.to_owned(),
            what: what.to_owned(),
            offset: offset as u64,
            problem,
        }
    }

    /// The next `len` bytes. `what` names them in the error that is returned if the file ends before.
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], GgufError> {
        let end = self
            .at
            .checked_add(len)
            .filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(GgufError::Truncated {
                path: self.path.to_owned(),
                what: what.to_owned(),
                offset: self.at as u64,
                need: len as u64,
                len: self.bytes.len() as u64,
            });
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// The next N bytes.
    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let taken = self.take(N, what)?;
        Ok(taken.try_into().expect("take returns what was asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of entries that take at least `min_size` bytes each, checked against the number of bytes that are left.
    fn count(&mut self, what: &str, min_size: usize) -> Result<usize, GgufError> {
        let at = self.at;
        let count = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / min_size;
        match usize::try_from(count) {
            Ok(n) if n <= room => Ok(n),
            _ => Err(self.malformed(
                at,
                what,
                format!(
                    "{count} times at least {} cannot fit in what is left, {}; the file is damaged, fetch it again",
                    counted(min_size, "byte"),
                    counted(self.bytes.len() - self.at, "byte")
                ),
            )),
        }
    }

    /// A string: its length in bytes and then UTF-8.
    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let len = self.count(what, 1)?;
        let at = self.at;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.malformed(
                at + error.valid_up_to(),
                what,
                "the string is not valid UTF-8".into(),
            )),
        }
    }

    fn value_type(&mut self, what: &str) -> Result<ValueType, GgufError> {
        let at = self.at;
        let id = self.u32(what)?;
        ValueType::from_id(id).ok_or_else(|| {
            self.malformed(
                at,
                what,
                format!("unknown value type {id} (0 to 12 are known)"),
            )
        })
    }

    /// A metadata value of the given type. `depth` is the number of arrays that it is nested in.
    fn value(
        &mut self,
        value_type: ValueType,
        what: &str,
        depth: usize,
    ) -> Result<Value, GgufError> {
        Ok(match value_type {
            ValueType::U8 => Value::U8(self.array::<1>(what)?[0]),
            ValueType::I8 => Value::I8(self.array::<1>(what)?[0] as i8),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            ValueType::U32 => Value::U32(self.u32(what)?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            ValueType::U64 => Value::U64(self.u64(what)?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            ValueType::Bool => match self.array::<1>(what)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => {
                    return Err(self.malformed(
                        self.at - 1,
                        what,
                        format!("a boolean must be 0 or 1, found {other}"),
                    ));
                }
            },
            ValueType::String => Value::String(self.string(what)?),
            ValueType::Array => {
                if depth == MAX_DEPTH {
                    return Err(self.malformed(
                        self.at,
                        what,
                        format!("arrays are nested more than {MAX_DEPTH} deep"),
                    ));
                }
                let item_type = self.value_type(what)?;
                let at = self.at;
                let count = self.count(what, item_type.min_size())?;
                self.items += count;
                if self.items > MAX_ITEMS {
                    return Err(self.malformed(
                        at,
                        what,
                        format!("with this array of {count}, the metadata's arrays hold more than {MAX_ITEMS} items"),
                    ));
                }
                if item_type == ValueType::String {
                    let items = (0..count)
                        .map(|_| self.string(what))
                        .collect::<Result<_, _>>()?;
                    Value::StringArray(items)
                } else {
                    let items = (0..count)
                        .map(|_| self.value(item_type, what, depth + 1))
                        .collect::<Result<_, _>>()?;
                    Value::Array(item_type, items)
                }
            }
        })
    }

    /// One entry of the tensor table. Its range is relative to the start of the data.
    fn tensor_entry(&mut self, index: usize, alignment: usize) -> Result<Entry, GgufError> {
        let path = self.path;
        let name = self.string(&format!("the name of tensor {index}"))?;
        let fail = |problem: String| GgufError::Tensor {
            path: path.to_owned(),
            tensor: name.clone(),
            problem,
        };
        let what = format!("the table entry of tensor {name:?}");
        let rank = self.u32(&what)? as usize;
        if rank == 0 || rank > MAX_RANK {
            return Err(fail(format!(
                "it has {rank} dimensions (1 to {MAX_RANK} are possible)"
            )));
        }
        let mut shape = Vec::with_capacity(rank);
        for _ in 0..rank {
            let extent = self.u64(&what)?;
            shape.push(
                usize::try_from(extent)
                    .map_err(|_| fail(format!("extent {extent} is too large")))?,
            );
        }
        // GGUF lists the extents in the reverse order, columns first.
        shape.reverse();
        let type_id = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let offset = usize::try_from(offset)
            .ok()
            .filter(|o| o.is_multiple_of(alignment))
            .ok_or_else(|| {
                fail(format!(
                    "its offset {offset} is not a multiple of the alignment {alignment}"
                ))
            })?;

        if let Some(SparseType::Of(block_type)) = SparseType::from_id(type_id) {
            if rank != 2 || block_type.checked_row_bytes(shape[1]).is_none() {
                return Err(fail(format!(
                    "shape {shape:?} is not that of a matrix of whole blocks of {}",
                    block_type.name()
                )));
            }
            return Ok(Entry::Tensor(TensorInfo {
                name,
                shape,
                block_type,
                layout: Layout::Sparse,
                range: offset..offset,
            }));
        }
        // How many bytes a block has is not known.
        let Some(block_type) = BlockType::from_id(type_id) else {
            return Ok(Entry::Unsupported(UnsupportedTensor {
                name,
                shape,
                type_id,
            }));
        };
        let columns = *shape.last().expect("rank is at least 1");
        let rows = shape[..rank - 1]
            .iter()
            .try_fold(1usize, |n, e| n.checked_mul(*e));
        let row_bytes = block_type.checked_row_bytes(columns).ok_or_else(|| {
            fail(format!(
                "a row of {columns} is not a whole number of {} blocks of {}",
                block_type.name(),
                block_type.block_len()
            ))
        })?;
        let end = rows
            .and_then(|rows| rows.checked_mul(row_bytes))
            .and_then(|size| size.checked_add(offset))
            .ok_or_else(|| fail(format!("shape {shape:?} is too large")))?;
        Ok(Entry::Tensor(TensorInfo {
            name,
            shape,
            block_type,
            layout: Layout::Native,
            range: offset..end,
        }))
    }
}
