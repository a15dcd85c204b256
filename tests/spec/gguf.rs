//! GGUF files: what is read from files built byte by byte, what is written, what is refused and in which words, and the
//! private map.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flapjack::gguf::{GgufError, GgufFile, Map, TensorInfo, Value, ValueType, Writer};
use flapjack::quant::{BlockType, Layout};
use tempfile::TempDir;

// ---------------------------------------------------------------------------------------------------------------------
// Files by hand
// ---------------------------------------------------------------------------------------------------------------------

const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

fn text(text: &str) -> Vec<u8> {
    raw_text(text.as_bytes())
}

fn raw_text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn entry(key: &str, value_type: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), value_type.to_le_bytes().as_slice(), value].concat()
}

fn array(item_type: u32, items: &[&[u8]]) -> Vec<u8> {
    array_of_count(item_type, items.len() as u64, items)
}

fn array_of_count(item_type: u32, count: u64, items: &[&[u8]]) -> Vec<u8> {
    [
        item_type.to_le_bytes().as_slice(),
        &count.to_le_bytes(),
        &items.concat(),
    ]
    .concat()
}

/// A row of the tensor table. `ne` is in GGUF's order, fastest first.
fn row(name: &str, ne: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
    raw_row(name.as_bytes(), ne, type_id, offset)
}

fn raw_row(name: &[u8], ne: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
    let mut bytes = raw_text(name);
    bytes.extend((ne.len() as u32).to_le_bytes());
    for extent in ne {
        bytes.extend(extent.to_le_bytes());
    }
    bytes.extend(type_id.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// The parts of a file, to be spoilt one at a time.
#[derive(Clone)]
struct Parts {
    version: u32,
    metadata: Vec<Vec<u8>>,
    table: Vec<Vec<u8>>,
    /// Instead of the true counts of tensors and metadata entries.
    tensor_count: Option<u64>,
    metadata_count: Option<u64>,
    alignment: usize,
    data: Vec<u8>,
}

impl Default for Parts {
    fn default() -> Self {
        Self {
            version: 3,
            metadata: Vec::new(),
            table: Vec::new(),
            tensor_count: None,
            metadata_count: None,
            alignment: 32,
            data: Vec::new(),
        }
    }
}

impl Parts {
    fn metadata(metadata: impl IntoIterator<Item = Vec<u8>>) -> Self {
        Self {
            metadata: metadata.into_iter().collect(),
            ..Self::default()
        }
    }

    fn tensors(table: impl IntoIterator<Item = Vec<u8>>, data: usize) -> Self {
        Self {
            table: table.into_iter().collect(),
            data: counting(data),
            ..Self::default()
        }
    }

    /// Everything before the data, without padding.
    fn head(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        let tensors = self.tensor_count.unwrap_or(self.table.len() as u64);
        bytes.extend(tensors.to_le_bytes());
        let entries = self.metadata_count.unwrap_or(self.metadata.len() as u64);
        bytes.extend(entries.to_le_bytes());
        bytes.extend(self.metadata.concat());
        bytes.extend(self.table.concat());
        bytes
    }

    fn file(&self) -> Vec<u8> {
        let mut bytes = self.head();
        if !self.data.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(&self.data);
        }
        bytes
    }
}

/// Bytes that tell their place: 0, 1, 2 and so on, never all the same.
fn counting(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

/// One entry of every type, and arrays of every type of item.
fn all_types_of_metadata() -> (Vec<Vec<u8>>, Vec<(&'static str, Value)>) {
    let bytes = vec![
        entry("general.architecture", STRING, &text("llama")),
        entry("a.u8", U8, &[0xFE]),
        entry("a.i8", I8, &[0xFE]),
        entry("a.u16", U16, &[0x34, 0x12]),
        entry("a.i16", I16, &[0x00, 0x80]),
        entry("a.u32", U32, &[0x78, 0x56, 0x34, 0x12]),
        entry("a.i32", I32, &[0xFF, 0xFF, 0xFF, 0xFF]),
        entry("a.f32", F32, &[0x00, 0x00, 0xC0, 0x3F]),
        entry("a.no", BOOL, &[0]),
        entry("a.yes", BOOL, &[1]),
        entry(
            "a.u64",
            U64,
            &[0xEF, 0xCD, 0xAB, 0x89, 0x67, 0x45, 0x23, 0x01],
        ),
        entry("a.i64", I64, &[0, 0, 0, 0, 0, 0, 0, 0x80]),
        entry("a.f64", F64, &[0, 0, 0, 0, 0, 0, 0x04, 0xC0]),
        entry("empty text", STRING, &text("")),
        entry("grüße", STRING, &text("héllo\n\0wörld 🥞")),
        entry("l.u8", ARRAY, &array(U8, &[&[1], &[2], &[255]])),
        entry("l.i8", ARRAY, &array(I8, &[&[0x80], &[0x7F]])),
        entry("l.u16", ARRAY, &array(U16, &[&[0xFF, 0xFF]])),
        entry("l.i16", ARRAY, &array(I16, &[&[0xFF, 0xFF]])),
        entry("l.u32", ARRAY, &array(U32, &[&[1, 0, 0, 0], &[0, 1, 0, 0]])),
        entry("l.i32", ARRAY, &array(I32, &[&[0xFE, 0xFF, 0xFF, 0xFF]])),
        entry("l.f32", ARRAY, &array(F32, &[&[0, 0, 0x80, 0xBF]])),
        entry("l.bool", ARRAY, &array(BOOL, &[&[1], &[0], &[1]])),
        entry(
            "l.string",
            ARRAY,
            &array(STRING, &[&text("<s>"), &text(""), &text("▁the")]),
        ),
        entry("l.u64", ARRAY, &array(U64, &[&[0xFF; 8]])),
        entry("l.i64", ARRAY, &array(I64, &[&[0xFF; 8]])),
        entry(
            "l.f64",
            ARRAY,
            &array(F64, &[&[0, 0, 0, 0, 0, 0, 0xF0, 0x3F]]),
        ),
        entry("l.empty", ARRAY, &array(U32, &[])),
        entry("l.no strings", ARRAY, &array(STRING, &[])),
        entry(
            "l.nested",
            ARRAY,
            &array(
                ARRAY,
                &[
                    &array(U8, &[&[7], &[8]]),
                    &array(STRING, &[&text("deep")]),
                    &array(ARRAY, &[&array(BOOL, &[&[1]]), &array(I16, &[])]),
                ],
            ),
        ),
    ];
    let list = |item_type, items: &[Value]| Value::Array(item_type, items.to_vec());
    let values = vec![
        ("general.architecture", Value::String("llama".into())),
        ("a.u8", Value::U8(254)),
        ("a.i8", Value::I8(-2)),
        ("a.u16", Value::U16(0x1234)),
        ("a.i16", Value::I16(i16::MIN)),
        ("a.u32", Value::U32(0x1234_5678)),
        ("a.i32", Value::I32(-1)),
        ("a.f32", Value::F32(1.5)),
        ("a.no", Value::Bool(false)),
        ("a.yes", Value::Bool(true)),
        ("a.u64", Value::U64(0x0123_4567_89AB_CDEF)),
        ("a.i64", Value::I64(i64::MIN)),
        ("a.f64", Value::F64(-2.5)),
        ("empty text", Value::String(String::new())),
        ("grüße", Value::String("héllo\n\0wörld 🥞".into())),
        (
            "l.u8",
            list(ValueType::U8, &[Value::U8(1), Value::U8(2), Value::U8(255)]),
        ),
        (
            "l.i8",
            list(ValueType::I8, &[Value::I8(-128), Value::I8(127)]),
        ),
        ("l.u16", list(ValueType::U16, &[Value::U16(65535)])),
        ("l.i16", list(ValueType::I16, &[Value::I16(-1)])),
        (
            "l.u32",
            list(ValueType::U32, &[Value::U32(1), Value::U32(256)]),
        ),
        ("l.i32", list(ValueType::I32, &[Value::I32(-2)])),
        ("l.f32", list(ValueType::F32, &[Value::F32(-1.0)])),
        (
            "l.bool",
            list(
                ValueType::Bool,
                &[Value::Bool(true), Value::Bool(false), Value::Bool(true)],
            ),
        ),
        (
            "l.string",
            Value::StringArray(vec!["<s>".into(), String::new(), "▁the".into()]),
        ),
        ("l.u64", list(ValueType::U64, &[Value::U64(u64::MAX)])),
        ("l.i64", list(ValueType::I64, &[Value::I64(-1)])),
        ("l.f64", list(ValueType::F64, &[Value::F64(1.0)])),
        ("l.empty", list(ValueType::U32, &[])),
        ("l.no strings", Value::StringArray(vec![])),
        (
            "l.nested",
            list(
                ValueType::Array,
                &[
                    list(ValueType::U8, &[Value::U8(7), Value::U8(8)]),
                    Value::StringArray(vec!["deep".into()]),
                    list(
                        ValueType::Array,
                        &[
                            list(ValueType::Bool, &[Value::Bool(true)]),
                            list(ValueType::I16, &[]),
                        ],
                    ),
                ],
            ),
        ),
    ];
    (bytes, values)
}

/// A whole file with everything in it: metadata of all types, three tensors, and data that ends with the last of them.
fn whole() -> Parts {
    let mut parts = Parts::tensors(
        [
            row("token_embd.weight", &[32, 2], 8, 0), // Q8_0: 2 × 34 = 68 bytes
            row("blk.0.ffn_up.weight", &[64, 3, 1], 2, 96), // Q4_0: 3 × 2 × 18 = 108 bytes
            row("output_norm.weight", &[5], 0, 224),  // F32: 20 bytes
        ],
        244,
    );
    parts.metadata = all_types_of_metadata().0;
    parts
}

// ---------------------------------------------------------------------------------------------------------------------
// Opening them
// ---------------------------------------------------------------------------------------------------------------------

/// A folder with one file, `model.gguf`, that is replaced again and again.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: TempDir::new().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("model.gguf")
    }

    fn open(&self, bytes: &[u8]) -> Result<GgufFile, GgufError> {
        // A new file each time: some file systems flush a file that is cut to nothing and written again.
        let _ = fs::remove_file(self.path());
        fs::write(self.path(), bytes).unwrap();
        GgufFile::open(self.path())
    }
}

fn open(parts: &Parts) -> GgufFile {
    // An open map outlives its file's name.
    Bench::new().open(&parts.file()).unwrap()
}

/// The message with which a file of these bytes is refused; it names the file.
fn refusal(bytes: &[u8]) -> String {
    let bench = Bench::new();
    let message = match bench.open(bytes) {
        Ok(_) => panic!("the file should be refused"),
        Err(error) => error.to_string(),
    };
    let path = bench.path().display().to_string();
    assert!(message.contains(&path), "{message:?} does not name {path}");
    message
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(
            message.contains(part),
            "the message does not say {part:?}:\n{message}"
        );
    }
}

/// Every tensor lies in the file, apart from the others, and can be read.
fn assert_readable(file: &GgufFile) {
    let len = file.map().bytes().len();
    let mut ranges = Vec::new();
    for tensor in file.tensors() {
        assert!(tensor.range.start <= tensor.range.end && tensor.range.end <= len);
        let bytes = file.bytes(tensor);
        assert_eq!(bytes.len(), tensor.range.len());
        let sum: u64 = bytes.iter().map(|b| u64::from(*b)).sum();
        assert!(sum <= 255 * len as u64);
        let columns = *tensor.shape.last().expect("a shape");
        let rows: usize = tensor.shape[..tensor.shape.len() - 1].iter().product();
        assert_eq!(bytes.len(), rows * tensor.block_type.row_bytes(columns));
        assert_eq!(file.tensor(&tensor.name), Some(tensor));
        if !tensor.range.is_empty() {
            ranges.push(tensor.range.clone());
        }
    }
    ranges.sort_by_key(|r| r.start);
    assert!(ranges.windows(2).all(|r| r[0].end <= r[1].start));
}

fn tensor(
    name: &str,
    shape: &[usize],
    block_type: BlockType,
    start: usize,
    len: usize,
) -> TensorInfo {
    TensorInfo {
        name: name.into(),
        shape: shape.to_vec(),
        block_type,
        layout: Layout::Native,
        range: start..start + len,
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_file_made_by_hand_reads_back_exactly_in_versions_2_and_3() {
    for version in [2, 3] {
        let parts = Parts { version, ..whole() };
        let bytes = parts.file();
        let data = bytes.len() - 244;
        assert_eq!(data % 32, 0);

        let bench = Bench::new();
        let file = bench.open(&bytes).unwrap();
        assert_eq!(file.path(), bench.path());
        assert_eq!(file.version(), version);
        let (_, values) = all_types_of_metadata();
        assert_eq!(file.metadata().len(), values.len());
        for (key, value) in &values {
            assert_eq!(file.metadata().get(*key), Some(value), "{key}");
        }
        // Shapes are GGUF's extents reversed; tensors keep the order of the table.
        assert_eq!(
            file.tensors(),
            [
                tensor("token_embd.weight", &[2, 32], BlockType::Q8_0, data, 68),
                tensor(
                    "blk.0.ffn_up.weight",
                    &[1, 3, 64],
                    BlockType::Q4_0,
                    data + 96,
                    108
                ),
                tensor("output_norm.weight", &[5], BlockType::F32, data + 224, 20),
            ]
        );
        for (tensor, range) in file.tensors().iter().zip([0..68, 96..204, 224..244]) {
            assert_eq!(file.bytes(tensor), &parts.data[range]);
        }
        assert_eq!(file.tensor("no such tensor"), None);
        assert_readable(&file);
        assert_eq!(file.map().bytes(), bytes);
        assert_eq!(file.into_map().bytes(), bytes);
    }
}

#[test]
fn every_supported_type_is_read() {
    let types = [
        (BlockType::F32, 0, 128),
        (BlockType::F16, 1, 64),
        (BlockType::Q4_0, 2, 18),
        (BlockType::Q4_1, 3, 20),
        (BlockType::Q8_0, 8, 34),
        (BlockType::BF16, 30, 64),
    ];
    for (block_type, id, len) in types {
        let file = open(&Parts::tensors([row("t", &[32], id, 0)], len));
        assert_eq!(file.tensors()[0].block_type, block_type);
        assert_eq!(file.bytes(&file.tensors()[0]), counting(len));
    }
}

#[test]
fn the_least_file_has_neither_metadata_nor_tensors() {
    let file = open(&Parts::default());
    assert!(file.metadata().is_empty());
    assert!(file.tensors().is_empty());
}

#[test]
fn data_starts_at_the_alignment_that_the_metadata_asks_for() {
    for alignment in [8u32, 16, 64, 256, 4096] {
        let parts = Parts {
            metadata: vec![entry("general.alignment", U32, &alignment.to_le_bytes())],
            alignment: alignment as usize,
            ..Parts::tensors(
                [
                    row("a", &[1], 0, 0),
                    row("b", &[1], 0, u64::from(alignment)),
                ],
                alignment as usize + 4,
            )
        };
        let file = open(&parts);
        let start = parts.head().len().next_multiple_of(alignment as usize);
        assert_eq!(file.tensors()[0].range, start..start + 4);
        assert_eq!(file.bytes(&file.tensors()[0]), &parts.data[..4]);
        assert_eq!(
            file.bytes(&file.tensors()[1]),
            &parts.data[alignment as usize..]
        );
    }
}

#[test]
fn tensors_may_lie_in_any_order_and_with_gaps() {
    let parts = Parts::tensors(
        [
            row("last", &[8], 0, 128),
            row("first", &[8], 0, 0),
            row("middle", &[4], 0, 64),
        ],
        160,
    );
    let file = open(&parts);
    assert_eq!(
        file.bytes(file.tensor("last").unwrap()),
        &parts.data[128..160]
    );
    assert_eq!(file.bytes(file.tensor("first").unwrap()), &parts.data[..32]);
    assert_eq!(
        file.bytes(file.tensor("middle").unwrap()),
        &parts.data[64..80]
    );
    assert_readable(&file);
}

#[test]
fn bytes_after_the_last_tensor_are_no_concern() {
    let file = open(&Parts::tensors([row("t", &[4], 0, 0)], 500));
    assert_eq!(file.tensors()[0].range.len(), 16);
}

#[test]
fn a_tensor_with_an_extent_of_zero_is_empty() {
    for ne in [&[0u64][..], &[0, 7], &[32, 0], &[5, 0, 3, 2]] {
        let file = open(&Parts::tensors(
            [row("t", ne, 0, 0), row("u", &[4], 0, 0)],
            16,
        ));
        assert!(file.bytes(file.tensor("t").unwrap()).is_empty());
        assert_eq!(file.bytes(file.tensor("u").unwrap()), counting(16));
    }
}

#[test]
fn metadata_is_read_as_what_it_is_needed_as() {
    let file = open(&whole());
    assert_eq!(
        file.get::<&str>("general.architecture").unwrap(),
        Some("llama")
    );
    assert_eq!(file.get::<&str>("missing").unwrap(), None);
    assert_eq!(file.require::<usize>("a.u8").unwrap(), 254);
    assert_eq!(
        file.require::<usize>("a.u64").unwrap(),
        0x0123_4567_89AB_CDEF
    );
    assert_eq!(file.require::<u32>("a.u32").unwrap(), 0x1234_5678);
    assert!(file.require::<bool>("a.yes").unwrap());
    assert_eq!(file.require::<f32>("a.f32").unwrap(), 1.5);
    assert_eq!(file.require::<f32>("a.f64").unwrap(), -2.5);
    assert_eq!(file.require::<&[String]>("l.string").unwrap().len(), 3);
    assert_eq!(file.require::<Vec<f32>>("l.f32").unwrap(), [-1.0]);
    assert_eq!(file.require::<Vec<usize>>("l.u32").unwrap(), [1, 256]);
    assert!(file.require::<Vec<usize>>("l.empty").unwrap().is_empty());
}

#[test]
fn metadata_of_another_type_is_named_with_what_was_expected_and_found() {
    let bench = Bench::new();
    let file = bench.open(&whole().file()).unwrap();
    let path = bench.path().display().to_string();
    let says = |error: GgufError, parts: &[&str]| {
        assert_says(&error.to_string(), &[&path]);
        assert_says(&error.to_string(), parts);
    };
    let error = file.require::<usize>("missing").unwrap_err();
    says(error, &["missing", "is needed"]);
    let error = file.get::<usize>("general.architecture").unwrap_err();
    says(
        error,
        &["general.architecture", "non-negative integer", "\"llama\""],
    );
    let error = file.get::<usize>("a.i8").unwrap_err();
    says(error, &["a.i8", "-2"]);
    let error = file.get::<u32>("a.u64").unwrap_err();
    says(error, &["a.u64", "32-bit", "81985529216486895"]);
    let error = file.get::<&str>("a.u8").unwrap_err();
    says(error, &["a.u8", "a string", "254"]);
    let error = file.get::<bool>("a.u8").unwrap_err();
    says(error, &["a.u8", "a boolean"]);
    let error = file.get::<f32>("a.u8").unwrap_err();
    says(error, &["a.u8", "a number"]);
    let error = file.get::<&[String]>("l.u8").unwrap_err();
    says(error, &["l.u8", "array of strings", "an array of 3 U8"]);
    let error = file.get::<Vec<f32>>("l.string").unwrap_err();
    says(error, &["l.string", "floats", "an array of 3 strings"]);
    let error = file.get::<Vec<usize>>("l.i32").unwrap_err();
    says(error, &["l.i32", "non-negative integers"]);
}

#[test]
fn long_values_are_cut_in_messages() {
    let long = "é".repeat(10_000);
    let file = open(&Parts::metadata([entry("key", STRING, &text(&long))]));
    let message = file.get::<usize>("key").unwrap_err().to_string();
    assert!(message.chars().count() < 500, "{message}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing
// ---------------------------------------------------------------------------------------------------------------------

/// A writer with all types of metadata and of tensors, and what it holds.
fn full_writer() -> (Writer<'static>, Vec<(BlockType, Vec<u8>)>) {
    let mut writer = Writer::new();
    for (key, value) in all_types_of_metadata().1 {
        writer.metadata(key, value);
    }
    let mut tensors = Vec::new();
    for block_type in BlockType::ALL {
        let bytes = counting(3 * 2 * block_type.row_bytes(256));
        let name = format!("{}.weight", block_type.name());
        writer.tensor(name, &[3, 2, 256], block_type, bytes.clone());
        tensors.push((block_type, bytes));
    }
    (writer, tensors)
}

#[test]
fn what_is_written_reads_back_equal() {
    let (mut writer, tensors) = full_writer();
    writer.tensor("vector", &[7], BlockType::F32, counting(28));
    writer.tensor("four", &[2, 1, 3, 5], BlockType::F16, counting(60));
    let bench = Bench::new();
    writer.save(&bench.path()).unwrap();

    let file = GgufFile::open(bench.path()).unwrap();
    assert_eq!(file.version(), 3);
    let expected = all_types_of_metadata().1;
    assert_eq!(file.metadata().len(), expected.len());
    for (key, value) in &expected {
        assert_eq!(file.metadata().get(*key), Some(value), "{key}");
    }
    assert_eq!(file.tensors().len(), tensors.len() + 2);
    for ((block_type, bytes), tensor) in tensors.iter().zip(file.tensors()) {
        assert_eq!(tensor.name, format!("{}.weight", block_type.name()));
        assert_eq!(tensor.shape, [3, 2, 256]);
        assert_eq!(tensor.block_type, *block_type);
        assert_eq!(file.bytes(tensor), bytes);
        assert_eq!(tensor.range.start % 32, 0);
    }
    assert_eq!(file.tensor("vector").unwrap().shape, [7]);
    let four = file.tensor("four").unwrap();
    assert_eq!(four.shape, [2, 1, 3, 5]);
    assert_eq!(file.bytes(four), counting(60));
    assert_readable(&file);
}

#[test]
fn what_is_written_is_what_the_format_says_byte_by_byte() {
    let mut writer = Writer::new();
    writer.metadata("k", Value::U16(513));
    writer.metadata("s", Value::StringArray(vec!["x".into()]));
    writer.tensor("ab", &[2, 3], BlockType::F32, counting(24));
    writer.tensor("c", &[1], BlockType::F16, counting(2));
    let mut bytes = Vec::new();
    writer.write_to(&mut bytes).unwrap();

    let parts = Parts {
        metadata: vec![
            entry("k", U16, &[1, 2]),
            entry("s", ARRAY, &array(STRING, &[&text("x")])),
        ],
        table: vec![row("ab", &[3, 2], 0, 0), row("c", &[1], 1, 32)],
        data: [counting(24), vec![0; 8], counting(2), vec![0; 30]].concat(),
        ..Parts::default()
    };
    assert_eq!(bytes, parts.file());
}

#[test]
fn a_writer_without_anything_writes_the_least_file() {
    let bench = Bench::new();
    Writer::new().save(&bench.path()).unwrap();
    let file = GgufFile::open(bench.path()).unwrap();
    assert!(file.metadata().is_empty() && file.tensors().is_empty());
}

#[test]
fn the_writer_aligns_as_its_metadata_says() {
    for alignment in [1u32, 8, 32, 64, 4096] {
        let bench = Bench::new();
        let mut writer = Writer::new();
        writer.metadata("general.alignment", Value::U32(alignment));
        writer.tensor("a", &[3], BlockType::F32, counting(12));
        writer.tensor("b", &[5], BlockType::F32, counting(20));
        writer.save(&bench.path()).unwrap();
        let file = GgufFile::open(bench.path()).unwrap();
        for (tensor, len) in file.tensors().iter().zip([12, 20]) {
            assert_eq!(tensor.range.start % alignment as usize, 0);
            assert_eq!(file.bytes(tensor), counting(len), "alignment {alignment}");
        }
    }
}

#[test]
fn the_writer_refuses_an_alignment_that_it_could_not_read_back() {
    for alignment in [Value::U32(0), Value::U32(24), Value::String("32".into())] {
        let bench = Bench::new();
        let mut writer = Writer::new();
        writer.metadata("general.alignment", alignment);
        let error = writer.save(&bench.path()).unwrap_err();
        assert_says(
            &error.to_string(),
            &[
                &bench.path().display().to_string(),
                "general.alignment",
                "power of two",
            ],
        );
        assert!(!bench.path().exists());
    }
}

#[test]
#[should_panic(expected = "the data must fill the shape")]
fn a_tensor_with_too_little_data_is_a_mistake_of_the_caller() {
    Writer::new().tensor("t", &[2, 32], BlockType::Q8_0, vec![0; 34]);
}

#[test]
fn an_error_while_writing_is_handed_on() {
    /// Takes so many bytes and no more.
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "no room"));
            }
            Ok(taken)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (writer, _) = full_writer();
    let mut bytes = Vec::new();
    writer.write_to(&mut bytes).unwrap();
    for room in [0, 1, 100, bytes.len() - 1] {
        let error = writer.write_to(&mut Full(room)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
    writer.write_to(&mut Full(bytes.len())).unwrap();
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn saving_replaces_the_old_file_whole_and_leaves_nothing_else() {
    let bench = Bench::new();
    fs::write(bench.path(), vec![0xEE; 1 << 20]).unwrap();
    let (writer, _) = full_writer();
    for _ in 0..3 {
        writer.save(&bench.path()).unwrap();
        let mut expected = Vec::new();
        writer.write_to(&mut expected).unwrap();
        assert_eq!(fs::read(bench.path()).unwrap(), expected);
        assert_eq!(names_in(bench.folder.path()), ["model.gguf"]);
    }
}

#[test]
fn a_file_can_be_saved_over_itself_while_it_is_mapped() {
    let bench = Bench::new();
    let file = bench.open(&whole().file()).unwrap();
    let mut writer = Writer::new();
    let tensor = file.tensor("output_norm.weight").unwrap();
    let reversed: Vec<u8> = file.bytes(tensor).iter().rev().copied().collect();
    writer.tensor("output_norm.weight", &[5], BlockType::F32, reversed.clone());
    // Borrowed from the very map whose file is replaced.
    let other = file.tensor("token_embd.weight").unwrap();
    writer.tensor(
        "token_embd.weight",
        &[2, 32],
        BlockType::Q8_0,
        file.bytes(other),
    );
    writer.save(&bench.path()).unwrap();

    assert_eq!(
        file.map().bytes(),
        whole().file(),
        "the old map is what it was"
    );
    let new = GgufFile::open(bench.path()).unwrap();
    assert_eq!(
        new.bytes(new.tensor("output_norm.weight").unwrap()),
        reversed
    );
    assert_eq!(
        new.bytes(new.tensor("token_embd.weight").unwrap()),
        file.bytes(other)
    );
}

#[cfg(unix)]
#[test]
fn saving_to_a_link_replaces_what_it_leads_to_and_keeps_the_link() {
    let bench = Bench::new();
    let (writer, _) = full_writer();
    let mut expected = Vec::new();
    writer.write_to(&mut expected).unwrap();
    let folder = bench.folder.path();
    fs::create_dir(folder.join("shelf")).unwrap();
    fs::write(folder.join("shelf/real"), b"the old file").unwrap();
    // Relative, and by way of another link; then to a file that is not there yet.
    std::os::unix::fs::symlink("other", bench.path()).unwrap();
    std::os::unix::fs::symlink("shelf/real", folder.join("other")).unwrap();
    for _ in 0..2 {
        writer.save(&bench.path()).unwrap();
        assert_eq!(fs::read(folder.join("shelf/real")).unwrap(), expected);
        assert!(bench.path().is_symlink() && folder.join("other").is_symlink());
        fs::remove_file(folder.join("shelf/real")).unwrap();
    }
    // In a circle.
    fs::remove_file(folder.join("other")).unwrap();
    std::os::unix::fs::symlink("model.gguf", folder.join("other")).unwrap();
    let message = writer.save(&bench.path()).unwrap_err().to_string();
    assert_says(&message, &["links"]);
}

#[cfg(unix)]
#[test]
fn devices_and_pipes_are_not_replaced() {
    let (writer, _) = full_writer();
    let message = writer.save(Path::new("/dev/null")).unwrap_err().to_string();
    assert_says(&message, &["/dev/null", "regular file"]);
}

#[test]
fn the_writer_refuses_names_and_keys_that_occur_twice() {
    let zero = || vec![0u8; 4];
    let mut writer = Writer::new();
    writer.tensor("a\u{7}", &[1], BlockType::F32, zero());
    writer.tensor("a\u{7}", &[1], BlockType::F32, zero());
    let mut out = Vec::new();
    let message = writer.write_to(&mut out).unwrap_err().to_string();
    assert_says(&message, &["tensor", "a\\u{7}", "twice"]);
    let mut writer = Writer::new();
    writer
        .metadata("k", Value::U8(1))
        .metadata("k", Value::U8(1));
    let message = writer.write_to(&mut out).unwrap_err().to_string();
    assert_says(&message, &["key", "k", "twice"]);
    assert!(out.is_empty());
}

#[test]
fn names_cannot_send_control_sequences_to_a_terminal() {
    let bench = Bench::new();
    let evil = "blk\u{1b}[31m\u{202e}";
    let mut writer = Writer::new();
    writer.metadata(evil, Value::U8(1));
    writer.metadata("general.alignment\n", Value::U8(1));
    writer.tensor(evil, &[1], BlockType::F32, vec![0u8; 4]);
    let mut bytes = Vec::new();
    writer.write_to(&mut bytes).unwrap();
    let file = bench.open(&bytes).unwrap();
    let wrong_type = file.get::<&str>(evil).unwrap_err().to_string();
    let missing = file.require::<u32>("a\rb").unwrap_err().to_string();
    let cut = refusal(&bytes[..bytes.len() - 32]);
    for message in [wrong_type, missing, cut] {
        assert!(
            !message.contains(|c: char| c.is_control() || c == '\u{202e}'),
            "{message:?}"
        );
    }
}

#[test]
fn entries_come_in_the_order_of_the_file() {
    let bench = Bench::new();
    let mut writer = Writer::new();
    for key in ["z", "a", "m"] {
        writer.metadata(key, Value::U8(1));
    }
    let mut bytes = Vec::new();
    writer.write_to(&mut bytes).unwrap();
    let file = bench.open(&bytes).unwrap();
    let keys: Vec<&str> = file.entries().map(|(key, _)| key).collect();
    assert_eq!(keys, ["z", "a", "m"]);
}

#[test]
fn a_fingerprint_tells_files_apart_by_metadata_length_and_data_anywhere() {
    let bench = Bench::new();
    // Larger than what is hashed whole.
    let mut data = vec![7u8; 1 << 20];
    let print = |data: &[u8], alignment: u32| {
        let mut writer = Writer::new();
        writer.metadata("general.alignment", Value::U32(alignment));
        writer.tensor("a", &[data.len() / 4], BlockType::F32, data.to_vec());
        writer.save(&bench.path()).unwrap();
        GgufFile::open(bench.path()).unwrap().fingerprint()
    };
    let first = print(&data, 32);
    assert_eq!(first.len(), 64);
    assert_eq!(print(&data, 32), first);
    assert_ne!(print(&data, 64), first);
    assert_ne!(print(&data[4..], 32), first);
    for place in [0, (1 << 20) - 1] {
        data[place] = 8;
        assert_ne!(print(&data, 32), first, "byte {place}");
        data[place] = 7;
    }
    // A change as training makes it: everywhere.
    data.iter_mut()
        .skip(500_000)
        .take(200_000)
        .for_each(|b| *b = 9);
    assert_ne!(print(&data, 32), first);
}

#[test]
fn saving_to_where_a_folder_is_fails_and_leaves_nothing_behind() {
    let bench = Bench::new();
    fs::create_dir(bench.path()).unwrap();
    let (writer, _) = full_writer();
    let message = writer.save(&bench.path()).unwrap_err().to_string();
    assert_says(&message, &[&bench.path().display().to_string()]);
    assert_eq!(names_in(bench.folder.path()), ["model.gguf"]);
    assert!(bench.path().is_dir());
}

#[test]
fn saving_into_a_folder_that_is_not_there_fails_and_names_the_file() {
    let bench = Bench::new();
    let path = bench.folder.path().join("nowhere").join("model.gguf");
    let (writer, _) = full_writer();
    let message = writer.save(&path).unwrap_err().to_string();
    assert_says(&message, &[&path.display().to_string()]);
    assert!(names_in(bench.folder.path()).is_empty());
}

#[cfg(unix)]
#[test]
fn saving_into_a_folder_that_cannot_be_written_leaves_the_old_file() {
    use std::os::unix::fs::PermissionsExt;

    let bench = Bench::new();
    fs::write(bench.path(), b"the old file").unwrap();
    fs::set_permissions(bench.folder.path(), PermissionsExt::from_mode(0o555)).unwrap();
    if fs::write(bench.folder.path().join("probe"), b"").is_ok() {
        crate::common::skip("permissions do not hold this user (root?)");
        return;
    }
    let (writer, _) = full_writer();
    let message = writer.save(&bench.path()).unwrap_err().to_string();
    assert_says(&message, &[&bench.path().display().to_string()]);
    assert_eq!(fs::read(bench.path()).unwrap(), b"the old file");
    assert_eq!(names_in(bench.folder.path()), ["model.gguf"]);
    fs::set_permissions(bench.folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
}

#[cfg(unix)]
#[test]
fn a_saved_file_has_the_permissions_of_any_new_file() {
    use std::os::unix::fs::PermissionsExt;

    let bench = Bench::new();
    let (writer, _) = full_writer();
    writer.save(&bench.path()).unwrap();
    let usual = bench.folder.path().join("usual");
    fs::write(&usual, b"").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&bench.path()), mode(&usual));
}

// ---------------------------------------------------------------------------------------------------------------------
// Damage of every kind, in bulk
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bytes = whole().file();
    let bench = Bench::new();
    bench.open(&bytes).expect("whole, it is fine");
    for len in 0..bytes.len() {
        let error = bench.open(&bytes[..len]).expect_err("cut off");
        let message = error.to_string();
        assert_says(&message, &[&bench.path().display().to_string()]);
        if len >= 4 {
            assert_says(&message, &["fetch it again"]);
        }
    }
}

#[test]
fn any_byte_of_the_tables_overwritten_is_refused_or_read_within_bounds() {
    let parts = whole();
    let bytes = parts.file();
    let tables = parts.head().len();
    let bench = Bench::new();
    let (mut refused, mut read) = (0, 0);
    for at in 0..tables {
        let old = bytes[at];
        let flipped = (0..8).map(|bit| old ^ 1 << bit);
        for new in [0x00, 0xFF, 0x80].into_iter().chain(flipped) {
            if new == old {
                continue;
            }
            let mut damaged = bytes.clone();
            damaged[at] = new;
            match bench.open(&damaged) {
                Ok(file) => {
                    assert_readable(&file);
                    read += 1;
                }
                Err(error) => {
                    let path = bench.path().display().to_string();
                    assert_says(&error.to_string(), &[&path]);
                    refused += 1;
                }
            }
        }
    }
    // Most bytes are lengths, types and offsets that must be right; values and letters may be anything.
    assert!(
        refused > 2000 && read > 2000,
        "{refused} refused, {read} read"
    );
}

#[test]
fn pairs_of_damaged_bytes_are_refused_or_read_within_bounds() {
    let parts = whole();
    let bytes = parts.file();
    let tables = parts.head().len() as u64;
    let bench = Bench::new();
    let mut state = 1u64;
    let mut random = |n: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % n
    };
    for _ in 0..4000 {
        let mut damaged = bytes.clone();
        for _ in 0..2 {
            damaged[random(tables) as usize] = random(256) as u8;
        }
        if let Ok(file) = bench.open(&damaged) {
            assert_readable(&file);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Damage, kind by kind
// ---------------------------------------------------------------------------------------------------------------------

/// Counts that no file can keep.
fn wild_counts(len: usize) -> [u64; 6] {
    [
        u64::MAX,
        i64::MAX as u64,
        1 << 63,
        1 << 40,
        u64::from(u32::MAX),
        len as u64 + 1,
    ]
}

#[test]
fn wild_counts_are_refused_at_once() {
    let base = Parts {
        metadata: vec![entry("k", U8, &[1])],
        ..Parts::tensors([row("t", &[4], 0, 0)], 16)
    };
    let len = base.file().len();
    let start = Instant::now();
    for wild in wild_counts(len) {
        let number = wild.to_string();
        let parts = Parts {
            tensor_count: Some(wild),
            ..base.clone()
        };
        assert_says(
            &refusal(&parts.file()),
            &["the tensor count", "byte 8", &number, "fetch it again"],
        );
        let parts = Parts {
            metadata_count: Some(wild),
            ..base.clone()
        };
        assert_says(
            &refusal(&parts.file()),
            &["the metadata count", "byte 16", &number, "fetch it again"],
        );

        let mut key = base.clone();
        key.metadata[0][..8].copy_from_slice(&wild.to_le_bytes());
        assert_says(
            &refusal(&key.file()),
            &["the name of metadata entry 0", "byte 24", &number],
        );

        let mut value = base.clone();
        value.metadata[0] = entry("k", STRING, &[&wild.to_le_bytes()[..], b"abc"].concat());
        // 24 bytes of header, 9 of the key, 4 of the type.
        assert_says(&refusal(&value.file()), &["\"k\"", "byte 37", &number]);

        for item_type in 0..=12 {
            let mut items = base.clone();
            items.metadata[0] = entry("k", ARRAY, &array_of_count(item_type, wild, &[&[0; 8]]));
            // And 4 of the type of items.
            assert_says(&refusal(&items.file()), &["\"k\"", "byte 41", &number]);

            let mut inner = base.clone();
            let nested = array(ARRAY, &[&array_of_count(item_type, wild, &[&[0; 8]])]);
            inner.metadata[0] = entry("k", ARRAY, &nested);
            assert_says(&refusal(&inner.file()), &["\"k\"", "byte 53", &number]);
        }

        let mut string = base.clone();
        let items = array(STRING, &[&text("a"), &wild.to_le_bytes()]);
        string.metadata[0] = entry("k", ARRAY, &items);
        assert_says(&refusal(&string.file()), &["\"k\"", "byte 58", &number]);

        let mut name = base.clone();
        name.table[0][..8].copy_from_slice(&wild.to_le_bytes());
        assert_says(
            &refusal(&name.file()),
            &["the name of tensor 0", "byte 38", &number],
        );
    }
    assert!(start.elapsed() < Duration::from_secs(10));
}

/// How much address space this process has had at most, in bytes.
fn peak_of_address_space() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

/// Opens a file that begins with `head` and is otherwise a hole of zeros.
fn open_sparse(head: &[u8], len: u64) -> Result<GgufFile, GgufError> {
    let bench = Bench::new();
    let mut file = fs::File::create(bench.path()).unwrap();
    file.write_all(head).unwrap();
    file.set_len(len).unwrap();
    drop(file);
    GgufFile::open(bench.path())
}

#[test]
fn counts_that_only_just_fit_a_large_file_allocate_nothing_ahead() {
    const ALONE: &str = "FLAPJACK_TEST_ALONE";
    const GIB: u64 = 1 << 30;
    if std::env::var_os(ALONE).is_none() {
        // In a process of its own, where no other test takes memory.
        let name = "gguf::counts_that_only_just_fit_a_large_file_allocate_nothing_ahead";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        print!("{said}");
        assert!(output.status.success());
        assert!(said.contains("1 passed"), "the test has another name now");
        return;
    }
    let Some(before) = peak_of_address_space() else {
        crate::common::skip("no /proc/self/status");
        return;
    };
    let parts = Parts {
        tensor_count: Some((GIB - 24) / 32),
        ..Parts::default()
    };
    let error = open_sparse(&parts.head(), GIB).unwrap_err();
    assert_says(&error.to_string(), &["0 dimensions"]);
    // The map itself takes a GiB of addresses; a table of this count would take two more.
    let grown = peak_of_address_space().unwrap() - before;
    assert!(grown < GIB + GIB / 4, "{grown} bytes");
}

#[test]
fn arrays_that_would_swell_in_memory_are_refused() {
    // Each one-byte item would take many times its size.
    let len = 100 << 20;
    let items = array_of_count(U8, len - 200, &[]);
    let parts = Parts::metadata([entry("swollen", ARRAY, &items)]);
    let error = open_sparse(&parts.head(), len).unwrap_err();
    assert_says(&error.to_string(), &["\"swollen\"", "byte 47", "items"]);

    // Arrays in an array add up.
    let small = array_of_count(U8, 1 << 20, &[&vec![0; 1 << 20]]);
    let nested = array(ARRAY, &[&small, &array_of_count(U8, 16 << 20, &[])]);
    let parts = Parts::metadata([entry("many", ARRAY, &nested)]);
    let error = open_sparse(&parts.head(), len).unwrap_err();
    assert_says(&error.to_string(), &["\"many\"", "items"]);
}

#[test]
fn a_vocabulary_of_a_million_entries_is_read() {
    let count = 1_000_000u64;
    let scores = vec![0u8; 4_000_000];
    let tokens: Vec<u8> = (0..count).flat_map(|i| text(&format!("{i:x}"))).collect();
    let parts = Parts::metadata([
        entry("tokens", ARRAY, &array_of_count(STRING, count, &[&tokens])),
        entry("scores", ARRAY, &array_of_count(F32, count, &[&scores])),
        entry("types", ARRAY, &array_of_count(I32, count, &[&scores])),
    ]);
    let file = open(&parts);
    let tokens = file.require::<&[String]>("tokens").unwrap();
    assert_eq!(
        (tokens.len(), tokens[999_999].as_str()),
        (1_000_000, "f423f")
    );
    assert_eq!(file.require::<Vec<f32>>("scores").unwrap().len(), 1_000_000);
}

#[test]
fn arrays_of_arrays_are_read_to_a_depth_of_four_and_then_refused() {
    let nest = |depth: usize| {
        let around = array_of_count(ARRAY, 1, &[]).repeat(depth - 1);
        Parts::metadata([entry(
            "deep",
            ARRAY,
            &[around, array(U8, &[&[42]])].concat(),
        )])
    };
    for depth in 1..=4 {
        open(&nest(depth));
    }
    for depth in [5, 6, 100, 10_000, 100_000] {
        assert_says(
            &refusal(&nest(depth).file()),
            &["\"deep\"", "nested", "byte"],
        );
    }
}

#[test]
fn a_value_type_that_does_not_exist_is_named() {
    for id in [13u32, 14, 255, 256, u32::MAX] {
        let message = refusal(&Parts::metadata([entry("odd", id, &[0; 16])]).file());
        // 24 bytes of header, 11 of the key.
        assert_says(
            &message,
            &["\"odd\"", "byte 35", "unknown value type", &id.to_string()],
        );
        let items = array(id, &[&[0; 16]]);
        let message = refusal(&Parts::metadata([entry("odd", ARRAY, &items)]).file());
        assert_says(
            &message,
            &["\"odd\"", "byte 39", "unknown value type", &id.to_string()],
        );
    }
}

#[test]
fn a_boolean_is_zero_or_one() {
    for byte in [2u8, 3, 0x80, 0xFF] {
        let found = format!("found {byte}");
        let message = refusal(&Parts::metadata([entry("flag", BOOL, &[byte])]).file());
        assert_says(&message, &["\"flag\"", "byte 40", "boolean", &found]);
        let items = array(BOOL, &[&[1], &[0], &[byte]]);
        let message = refusal(&Parts::metadata([entry("flag", ARRAY, &items)]).file());
        assert_says(&message, &["\"flag\"", "byte 54", "boolean", &found]);
    }
}

#[test]
fn a_key_that_occurs_twice_is_refused() {
    let parts = Parts::metadata([
        entry("once", U8, &[1]),
        entry("twice", U8, &[1]),
        entry("twice", STRING, &text("other")),
    ]);
    let at = format!("byte {}", 24 + parts.metadata[..2].concat().len());
    assert_says(&refusal(&parts.file()), &["\"twice\"", "occurs twice", &at]);
}

#[test]
fn a_tensor_name_that_occurs_twice_is_refused() {
    let parts = Parts::tensors([row("same", &[4], 0, 0), row("same", &[4], 0, 32)], 48);
    assert_says(&refusal(&parts.file()), &["tensor same", "occurs twice"]);
}

#[test]
fn tensors_that_overlap_are_refused_and_both_named() {
    for (second, len) in [(0, 4), (32, 4), (64, 1), (0, 100)] {
        let parts = Parts::tensors(
            [row("under", &[20], 0, 0), row("over", &[len], 0, second)],
            400,
        );
        let message = refusal(&parts.file());
        assert_says(&message, &["under", "over", "overlaps", "byte"]);
    }
    // Neighbours that touch do not overlap.
    open(&Parts::tensors(
        [row("a", &[8], 0, 0), row("b", &[8], 0, 32)],
        64,
    ));
}

#[test]
fn overlaps_are_found_in_any_order_of_the_table() {
    let parts = Parts::tensors(
        [
            row("c", &[8], 0, 96),
            row("a", &[9], 0, 0),
            row("b", &[8], 0, 32),
        ],
        128,
    );
    assert_says(&refusal(&parts.file()), &["tensor b", "overlaps tensor a"]);
}

#[test]
fn an_offset_off_the_alignment_is_refused() {
    for offset in [1u64, 16, 31, 33, u64::MAX] {
        let message = refusal(&Parts::tensors([row("askew", &[4], 0, offset)], 64).file());
        let offset = offset.to_string();
        assert_says(
            &message,
            &["tensor askew", "offset", &offset, "alignment 32"],
        );
    }
    let parts = Parts {
        metadata: vec![entry("general.alignment", U32, &64u32.to_le_bytes())],
        alignment: 64,
        ..Parts::tensors([row("askew", &[4], 0, 32)], 64)
    };
    assert_says(
        &refusal(&parts.file()),
        &["tensor askew", "offset 32", "alignment 64"],
    );
}

#[test]
fn data_past_the_end_of_the_file_is_refused() {
    for (ne, offset) in [
        (4, 64),
        (4, 1 << 20),
        (4, 1 << 62),
        (4, u64::MAX - 31),
        (17, 0),
        (9, 32),
        (1 << 40, 0),
        (1 << 60, 0),
    ] {
        let message = refusal(&Parts::tensors([row("far", &[ne], 0, offset)], 64).file());
        assert_says(&message, &["tensor far"]);
        assert!(
            message.contains("past the end of the file") || message.contains("too large"),
            "{message}"
        );
    }
    let message = refusal(&Parts::tensors([row("far", &[4], 0, 64)], 64).file());
    assert_says(
        &message,
        &["past the end of the file", "truncated", "fetch it again"],
    );
}

#[test]
fn a_shape_whose_product_overflows_is_refused() {
    for ne in [
        &[u64::MAX][..],
        &[1 << 62],
        &[1 << 32, 1 << 32],
        &[1 << 16, 1 << 16, 1 << 16, 1 << 16],
        &[1, u64::MAX],
        &[1, u64::MAX, u64::MAX, u64::MAX],
        &[2, 1 << 63],
        // 2⁶⁴ + 4 bytes, which would be four if it wrapped.
        &[(1 << 62) + 1],
        &[0, u64::MAX, 2],
    ] {
        let message = refusal(&Parts::tensors([row("vast", ne, 0, 0)], 64).file());
        assert_says(&message, &["tensor vast"]);
    }
    let message = refusal(&Parts::tensors([row("vast", &[1 << 32, 1 << 32], 0, 0)], 64).file());
    assert_says(&message, &["too large"]);
}

#[test]
fn a_tensor_has_one_to_four_dimensions() {
    for rank in 1..=4 {
        open(&Parts::tensors([row("flat", &vec![1; rank], 0, 0)], 4));
    }
    for rank in [0, 5, 6, 100] {
        let message = refusal(&Parts::tensors([row("odd", &vec![1; rank], 0, 0)], 4).file());
        let said = format!("{rank} dimensions");
        assert_says(&message, &["tensor odd", &said, "1 to 4"]);
    }
    // A rank that the file could not even hold.
    let mut bytes = row("odd", &[1], 0, 0);
    bytes[11..15].copy_from_slice(&u32::MAX.to_le_bytes());
    let message = refusal(&Parts::tensors([bytes], 64).file());
    assert_says(&message, &["tensor odd", "4294967295 dimensions"]);
}

#[test]
fn a_row_must_be_a_whole_number_of_blocks() {
    for (id, name) in [(2, "Q4_0"), (3, "Q4_1"), (8, "Q8_0")] {
        for columns in [1u64, 16, 31, 33, 48] {
            // 32 rows, so that the whole is a multiple of 32 even where no row is.
            let parts = Parts::tensors([row("broken", &[columns, 32], id, 0)], 8192);
            let columns = columns.to_string();
            assert_says(
                &refusal(&parts.file()),
                &["tensor broken", name, &columns, "32"],
            );
        }
    }
}

/// What a tensor holds is not known without its type, but the rest of the file can be read.
#[test]
fn tensors_of_types_that_are_not_supported_are_set_apart() {
    let parts = Parts::tensors(
        [row("fancy", &[256, 2], 40, 0), row("plain", &[4], 0, 2048)],
        2064,
    );
    let file = open(&parts);
    let [fancy] = file.unsupported() else {
        panic!("{:?}", file.unsupported());
    };
    assert_eq!(
        (fancy.name.as_str(), fancy.type_name().as_str()),
        ("fancy", "NVFP4")
    );
    assert_eq!(fancy.shape, [2, 256]);
    assert!(file.tensor("fancy").is_none() && file.tensor("plain").is_some());

    for twin in [row("fancy", &[32], 40, 0), row("fancy", &[4], 0, 0)] {
        let parts = Parts::tensors([row("fancy", &[256], 40, 0), twin], 2048);
        assert_says(&refusal(&parts.file()), &["tensor fancy", "occurs twice"]);
    }
    let message = refusal(&Parts::tensors([row("fancy", &[256], 40, 16)], 2048).file());
    assert_says(&message, &["tensor fancy", "alignment 32"]);
}

#[test]
fn text_that_is_not_utf8_is_refused_with_the_byte_where_it_stops_being() {
    // 24 bytes of header and 8 of the length, then two good letters.
    let key = [&raw_text(b"ab\xFFcd")[..], &U8.to_le_bytes(), &[1]].concat();
    let message = refusal(&Parts::metadata([key]).file());
    assert_says(
        &message,
        &["the name of metadata entry 0", "byte 34", "UTF-8"],
    );

    // 24, then 9 of the key, 4 of the type, 8 of the length.
    let value = entry("k", STRING, &raw_text(b"good\xC3"));
    assert_says(
        &refusal(&Parts::metadata([value]).file()),
        &["\"k\"", "byte 49", "UTF-8"],
    );

    // 24, 9, 4, then 12 of the array, 10 of its first item, 8 of the length.
    let items = array(STRING, &[&text("ok"), &raw_text(b"\xED\xA0\x80")]);
    let value = entry("k", ARRAY, &items);
    assert_says(
        &refusal(&Parts::metadata([value]).file()),
        &["\"k\"", "byte 67", "UTF-8"],
    );

    let name = raw_row(b"blk\x80", &[4], 0, 0);
    let message = refusal(&Parts::tensors([name], 16).file());
    assert_says(&message, &["the name of tensor 0", "byte 35", "UTF-8"]);
}

#[test]
fn an_alignment_must_be_a_power_of_two() {
    for (value_type, value, found) in [
        (U32, &0u32.to_le_bytes()[..], "0"),
        (U32, &3u32.to_le_bytes(), "3"),
        (U32, &48u32.to_le_bytes(), "48"),
        (U32, &(1u32 << 31).to_le_bytes(), "2147483648"),
        (U64, &(1u64 << 63).to_le_bytes(), "9223372036854775808"),
        (I32, &(-32i32).to_le_bytes(), "-32"),
        (F32, &32f32.to_le_bytes(), "32"),
        (STRING, &text("32"), "\"32\""),
        (BOOL, &[1], "true"),
        (ARRAY, &array(U8, &[&[32]]), "an array of 1 U8"),
    ] {
        let parts = Parts {
            metadata: vec![entry("general.alignment", value_type, value)],
            ..Parts::tensors([row("t", &[4], 0, 0)], 16)
        };
        let found = format!("found {found}");
        assert_says(
            &refusal(&parts.file()),
            &["general.alignment", "power of two", &found],
        );
    }
}

#[test]
fn versions_other_than_2_and_3_are_refused() {
    for version in [0u32, 1, 4, 1000] {
        let message = refusal(&Parts { version, ..whole() }.file());
        let said = format!("version {version} ");
        assert_says(&message, &[&said, "2 and 3"]);
        assert!(!message.contains("big-endian"), "{message}");
    }
}

#[test]
fn a_big_endian_file_is_recognised() {
    for version in [2u32, 3] {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_be_bytes());
        bytes.extend(0u64.to_be_bytes());
        bytes.extend(0u64.to_be_bytes());
        assert_says(&refusal(&bytes), &["big-endian", "convert"]);
    }
}

#[test]
fn a_file_that_is_not_gguf_is_told_by_how_it_begins() {
    for bytes in [&b"GGU"[..], b"gguf\x03\0\0\0", b"G", b"\0", b"some text"] {
        assert_says(&refusal(bytes), &["not a GGUF file", "name a .gguf model"]);
    }
    assert_says(&refusal(b"PK\x05\x06"), &["50, 4b, 05, 06"]);
}

#[test]
fn an_empty_file_is_refused() {
    assert_says(&refusal(b""), &["empty", "name a .gguf model"]);
}

#[test]
fn a_folder_is_refused() {
    let folder = TempDir::new().unwrap();
    let message = GgufFile::open(folder.path()).unwrap_err().to_string();
    let path = folder.path().display().to_string();
    assert_says(
        &message,
        &[&path, "not a regular file", "name a .gguf model"],
    );
}

#[test]
fn a_missing_file_is_refused_by_name() {
    let path = Bench::new().path();
    let error = GgufFile::open(&path).unwrap_err();
    assert_says(&error.to_string(), &[&path.display().to_string()]);
    assert!(
        matches!(error, GgufError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// The private map
// ---------------------------------------------------------------------------------------------------------------------

/// No system has larger pages than this.
const PAGE: usize = 64 << 10;

/// A map of `pages` times [`PAGE`] and `rest` more bytes, and what its file holds.
fn mapped(bench: &Bench, pages: usize, rest: usize) -> (Map, Vec<u8>) {
    let bytes = counting(pages * PAGE + rest);
    fs::write(bench.path(), &bytes).unwrap();
    (Map::open(&bench.path()).unwrap(), bytes)
}

#[test]
fn writing_to_the_map_never_changes_the_file() {
    let bench = Bench::new();
    let (mut map, original) = mapped(&bench, 3, 100);
    for byte in map.bytes_mut() {
        *byte = !*byte;
    }
    let inverted: Vec<u8> = original.iter().map(|b| !b).collect();
    assert_eq!(map.bytes(), inverted);
    assert_eq!(fs::read(bench.path()).unwrap(), original);
    // A second map of the same file sees the file.
    assert_eq!(Map::open(&bench.path()).unwrap().bytes(), original);
    drop(map);
    assert_eq!(fs::read(bench.path()).unwrap(), original);
}

#[test]
fn a_file_that_may_only_be_read_can_be_mapped_and_written_in_memory() {
    let bench = Bench::new();
    fs::write(bench.path(), counting(1000)).unwrap();
    let mut permissions = fs::metadata(bench.path()).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(bench.path(), permissions).unwrap();
    let mut map = Map::open(&bench.path()).unwrap();
    map.bytes_mut()[7] = 99;
    assert_eq!(map.bytes()[7], 99);
    assert_eq!(fs::read(bench.path()).unwrap(), counting(1000));
}

#[cfg(target_os = "linux")]
#[test]
fn released_pages_read_as_the_file_again_and_are_no_longer_private() {
    let bench = Bench::new();
    let (mut map, original) = mapped(&bench, 16, 0);
    let private = |map: &Map| map.residency().expect("linux has smaps").private as usize;
    assert_eq!(private(&map), 0);

    map.bytes_mut().fill(0xAA);
    assert_eq!(private(&map), 16 * PAGE);

    map.release(4 * PAGE..12 * PAGE).unwrap();
    assert_eq!(private(&map), 8 * PAGE);
    let expected = |map: &Map| {
        for (range, kept) in [(0..4, true), (4..12, false), (12..16, true)] {
            let range = range.start * PAGE..range.end * PAGE;
            let bytes = &map.bytes()[range.clone()];
            if kept {
                assert!(bytes.iter().all(|b| *b == 0xAA));
            } else {
                assert_eq!(bytes, &original[range]);
            }
        }
    };
    expected(&map);
    assert_eq!(private(&map), 8 * PAGE, "reading makes nothing private");
    assert!(map.residency().unwrap().resident as usize >= 8 * PAGE);

    // Pages that were released can be written and released again.
    map.bytes_mut()[5 * PAGE] = 1;
    assert!(private(&map) > 8 * PAGE);
    map.release(4 * PAGE..12 * PAGE).unwrap();
    expected(&map);
    assert_eq!(private(&map), 8 * PAGE);
    assert_eq!(fs::read(bench.path()).unwrap(), original);
}

#[cfg(unix)]
#[test]
fn pages_that_are_released_in_part_are_kept() {
    let bench = Bench::new();
    let (mut map, original) = mapped(&bench, 6, 0);
    map.bytes_mut().fill(0xAA);
    // One byte into a page, and up to one byte before the end of another.
    map.release(PAGE + 1..5 * PAGE - 1).unwrap();
    for at in [
        0,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        5 * PAGE - 2,
        5 * PAGE - 1,
        5 * PAGE,
    ] {
        assert_eq!(map.bytes()[at], 0xAA, "byte {at}");
    }
    assert_eq!(
        map.bytes()[2 * PAGE..4 * PAGE],
        original[2 * PAGE..4 * PAGE]
    );
}

#[cfg(unix)]
#[test]
fn the_last_page_of_a_file_that_fills_it_in_part_is_kept() {
    let bench = Bench::new();
    let (mut map, original) = mapped(&bench, 2, 10);
    map.bytes_mut().fill(0xAA);
    map.release(0..usize::MAX).unwrap();
    assert_eq!(map.bytes()[..2 * PAGE], original[..2 * PAGE]);
    assert_eq!(map.bytes()[2 * PAGE..], [0xAA; 10]);
}

#[cfg(unix)]
#[test]
fn a_map_that_is_reset_is_the_file_again_to_the_last_byte() {
    let bench = Bench::new();
    let (mut map, original) = mapped(&bench, 2, 10);
    map.bytes_mut().fill(0xAA);
    map.reset().unwrap();
    assert_eq!(map.bytes(), original);
    if let Some(residency) = map.residency() {
        assert_eq!(residency.private, 0);
    }
}

#[test]
fn ranges_without_a_whole_page_release_nothing() {
    let bench = Bench::new();
    let (mut map, original) = mapped(&bench, 2, 0);
    map.bytes_mut().fill(0xAA);
    for (start, end) in [
        (0, 0),
        (100, 200),
        (PAGE, PAGE),
        (PAGE - 1, PAGE + 1),
        (PAGE, 1),
        (2 * PAGE, 4 * PAGE),
        (10 * PAGE, 20 * PAGE),
    ] {
        map.release(start..end).unwrap();
    }
    assert!(map.bytes().iter().all(|b| *b == 0xAA));
    assert_eq!(fs::read(bench.path()).unwrap(), original);
}

#[test]
fn disjoint_ranges_are_handed_out_in_the_order_asked_for() {
    let (mut map, original) = mapped(&Bench::new(), 1, 0);
    let ranges = [500..600, 0..100, 7..7, 100..101, 600..PAGE];
    let pieces = map.disjoint_mut(&ranges);
    assert_eq!(pieces.len(), ranges.len());
    for (piece, range) in pieces.into_iter().zip(&ranges) {
        assert_eq!(piece, &original[range.clone()]);
        piece.fill(0xAA);
    }
    assert_eq!(map.bytes()[101..500], original[101..500]);
    assert!(map.bytes()[500..].iter().all(|b| *b == 0xAA));
}

#[test]
#[should_panic]
fn ranges_that_overlap_are_not_handed_out() {
    mapped(&Bench::new(), 1, 0).0.disjoint_mut(&[50..60, 0..51]);
}

#[test]
#[should_panic]
fn ranges_past_the_end_are_not_handed_out() {
    mapped(&Bench::new(), 1, 0)
        .0
        .disjoint_mut(&[0..1, 5..PAGE + 1]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_larger_than_memory_can_be_mapped() {
    let memory = fs::read_to_string("/proc/meminfo").unwrap();
    let kib_of = |name: &str| {
        let line = memory.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    let len = 2 * 1024 * (kib_of("MemTotal:") + kib_of("SwapTotal:"));
    let bench = Bench::new();
    let file = fs::File::create(bench.path()).unwrap();
    if file.set_len(len).is_err() {
        crate::common::skip(&format!("the file system has no files of {len} bytes"));
        return;
    }
    if fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2") {
        crate::common::skip("this system promises no more memory than it has");
        return;
    }
    let mut map = Map::open(&bench.path()).unwrap();
    let last = map.bytes().len() - 1;
    map.bytes_mut()[last] = 1;
    assert_eq!(map.bytes()[last], 1);
}

#[test]
fn a_map_outlives_the_name_of_its_file() {
    let bench = Bench::new();
    let (map, original) = mapped(&bench, 1, 1);
    fs::remove_file(bench.path()).unwrap();
    assert_eq!(map.bytes(), original);
}
