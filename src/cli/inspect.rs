//! `flapjack inspect`

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use flapjack::checkpoint;
use flapjack::gguf::{GgufFile, Shown, Value};
use flapjack::prune::Record;
use serde::Serialize;
use serde_json::json;

use super::arguments::of_hub;
use super::words::{mebibytes, plural};
use super::{heading, progress, streams};

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A model's file, folder or name [default: the default model]
    #[arg(help_heading = heading::MODEL, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A model of the hub: ORG/REPO, ORG/REPO:TYPE or ORG/REPO/FILE
    #[arg(help_heading = heading::MODEL, long, visible_alias = "hf-repo", value_name = "REPO", conflicts_with = "file", value_parser = NonEmptyStringValueParser::new())]
    hf: Option<String>,
    /// Print one JSON object, with all items of all arrays
    #[arg(help_heading = heading::OUTPUT, long)]
    json: bool,
}

pub fn run(args: InspectArgs) -> Result<()> {
    let named = args.hf.as_ref().map(|name| of_hub(name)).or(args.file);
    let path = progress::model(named.as_deref())?;
    let file = checkpoint::open(&path)?;
    let record = Record::from_gguf(&file)?;
    streams::print(|out| {
        if args.json {
            return out.json(&Output::new(&file, record.as_ref()));
        }
        write_head(out, &file)?;
        write_tensors(out, &file)?;
        match &record {
            Some(record) => write_picture(out, record),
            None => Ok(()),
        }
    })?;
    Ok(())
}

fn write_head(out: &mut impl Write, file: &GgufFile) -> io::Result<()> {
    writeln!(
        out,
        "{}: {}, {}, {}, {}",
        file.path().display(),
        match file.is_gguf() {
            true => format!("GGUF version {}", file.version()),
            false => "safetensors".to_owned(),
        },
        mebibytes(file.file_len() as u64),
        plural(file.metadata().len(), "metadata key"),
        plural(file.tensors().len() + file.unsupported().len(), "tensor")
    )?;
    let width = widest(file.entries().map(|(key, _)| key));
    writeln!(out, "\nmetadata")?;
    for (key, value) in file.entries() {
        writeln!(out, "  {:width$}  {}", Shown(key), shown(value))?;
    }
    Ok(())
}

/// Values of every layer are shown one by one, longer arrays by their length.
fn shown(value: &Value) -> String {
    const MOST_ITEMS: usize = 128;
    match value {
        Value::Array(_, items) if !items.is_empty() && items.len() <= MOST_ITEMS => {
            let items: Vec<String> = items.iter().map(Value::to_string).collect();
            items.join(" ")
        }
        other => other.to_string(),
    }
}

fn write_tensors(out: &mut impl Write, file: &GgufFile) -> io::Result<()> {
    let tensors = tensors(file);
    let shapes: Vec<String> = tensors
        .iter()
        .map(|t| {
            let extents: Vec<String> = t.shape.iter().map(usize::to_string).collect();
            extents.join(" x ")
        })
        .collect();
    let names = widest(tensors.iter().map(|t| t.name));
    let widths = widest(shapes.iter().map(String::as_str)).max("shape".len());
    let types = widest(tensors.iter().map(|t| t.block_type.as_str())).max(6);
    writeln!(
        out,
        "\n  {:names$}  {:>widths$}  {:types$}  {:>12}",
        "tensor", "shape", "type", "bytes"
    )?;
    for (tensor, shape) in tensors.iter().zip(shapes) {
        let bytes = tensor.bytes.map_or("unknown".to_owned(), |n| n.to_string());
        writeln!(
            out,
            "  {:names$}  {shape:>widths$}  {:types$}  {bytes:>12}",
            Shown(tensor.name),
            tensor.block_type,
        )?;
    }
    Ok(())
}

fn widest<'a>(texts: impl Iterator<Item = &'a str>) -> usize {
    texts
        .map(|text| Shown(text).to_string().chars().count())
        .max()
        .unwrap_or(0)
}

/// Layer by layer, which heads and how many channels stayed.
fn write_picture(out: &mut impl Write, record: &Record) -> io::Result<()> {
    writeln!(
        out,
        "\npruned by flapjack {}, method {}: {:.1} % of the layers' weights removed, calibrated on {}\n",
        Shown(&record.version),
        Shown(&record.method),
        record.ratio * 100.0,
        Shown(&record.calibration),
    )?;
    if let Some(sparse) = &record.sparse {
        writeln!(out, "single weights set to zero: {}\n", Shown(sparse))?;
    }
    let heads: Vec<String> = record
        .layers
        .iter()
        .map(|l| heads_picture(l.heads_before, &l.kept_heads()))
        .collect();
    let width = heads.iter().map(|h| h.chars().count()).max().unwrap_or(0);
    writeln!(out, "  layer  {:width$}              channels", "heads")?;
    for (l, (layer, heads)) in record.layers.iter().zip(heads).enumerate() {
        writeln!(
            out,
            "  {l:>5}  {heads:width$}  {:>3} of {:<3}  {}  {} of {}",
            layer.kept_heads().len(),
            layer.heads_before,
            bar(layer.channels, layer.channels_before),
            layer.channels,
            layer.channels_before,
        )?;
    }
    Ok(())
}

/// More heads than any model has are not drawn one by one.
const MOST_HEADS: usize = 256;
/// Characters of a bar.
const BAR: usize = 32;

fn heads_picture(before: usize, kept: &[usize]) -> String {
    if before > MOST_HEADS {
        return bar(kept.len(), before);
    }
    (0..before)
        .map(|h| if kept.contains(&h) { '●' } else { '·' })
        .collect()
}

fn bar(part: usize, whole: usize) -> String {
    // Something is never drawn as nothing, nor all but something as all.
    let full = match (part * BAR + whole / 2).checked_div(whole).unwrap_or(0) {
        0 if part > 0 => 1,
        BAR if part < whole => BAR - 1,
        n => n.min(BAR),
    };
    "█".repeat(full) + &"░".repeat(BAR - full)
}

#[derive(Serialize)]
struct Output<'a> {
    file: String,
    version: u32,
    bytes: usize,
    metadata: serde_json::Map<String, serde_json::Value>,
    tensors: Vec<Tensor<'a>>,
    pruned: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct Tensor<'a> {
    name: &'a str,
    shape: &'a [usize],
    #[serde(rename = "type")]
    block_type: String,
    /// Where the data begins, in bytes, and how many these are; `None` for a type that is not supported.
    offset: Option<usize>,
    bytes: Option<usize>,
}

/// All tensors: those that can be read, and then those of types that are not supported.
fn tensors(file: &GgufFile) -> Vec<Tensor<'_>> {
    let tensors = file.tensors().iter().map(|t| Tensor {
        name: &t.name,
        shape: &t.shape,
        block_type: t.type_name(),
        offset: Some(t.range.start),
        bytes: Some(t.range.len()),
    });
    let unsupported = file.unsupported().iter().map(|t| Tensor {
        name: &t.name,
        shape: &t.shape,
        block_type: t.type_name(),
        offset: None,
        bytes: None,
    });
    tensors.chain(unsupported).collect()
}

impl<'a> Output<'a> {
    fn new(file: &'a GgufFile, record: Option<&Record>) -> Self {
        let entries = file.entries();
        Self {
            file: file.path().display().to_string(),
            version: file.version(),
            bytes: file.map().bytes().len(),
            metadata: entries.map(|(k, v)| (k.to_owned(), to_json(v))).collect(),
            tensors: tensors(file),
            pruned: record.map(record_to_json),
        }
    }
}

fn record_to_json(record: &Record) -> serde_json::Value {
    let layers: Vec<_> = record
        .layers
        .iter()
        .map(|l| {
            json!({
                "heads_before": l.heads_before,
                "heads": l.kept_heads(),
                "channels_before": l.channels_before,
                "channels": l.channels,
            })
        })
        .collect();
    json!({
        "version": record.version,
        "method": record.method,
        "ratio_asked": record.asked,
        "ratio": record.ratio,
        "profile": record.profile,
        "calibration": record.calibration,
        "model": record.model,
        "sparse": record.sparse,
        "layers": layers,
    })
}

/// Numbers that JSON has no way to write become null.
fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::Array(_, items) => items.iter().map(to_json).collect(),
        Value::StringArray(items) => json!(items),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_full_or_empty_only_where_all_or_nothing_is_left() {
        let full = |part, whole| bar(part, whole).chars().filter(|c| *c == '█').count();
        assert_eq!(full(0, 1000), 0);
        assert_eq!(full(1, 1000), 1);
        assert_eq!(full(500, 1000), BAR / 2);
        assert_eq!(full(999, 1000), BAR - 1);
        assert_eq!(full(1000, 1000), BAR);
        assert_eq!(full(0, 0), 0);
    }

    #[test]
    fn heads_that_stayed_are_told_from_those_that_went() {
        assert_eq!(heads_picture(5, &[0, 3, 4]), "●··●●");
    }
}
