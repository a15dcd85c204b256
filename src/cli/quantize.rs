//! `flapjack quantize`

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use clap::builder::{NonEmptyStringValueParser, ValueHint};
use flapjack::convert::{FileType, ImportanceMatrix, Mixture, TensorType, Types};
use flapjack::engine::{
    self, CalibrationOptions, ConvertOptions, ConvertReport, TextSource, read_importance,
};
use flapjack::prune::Effort;

use super::arguments::{ModelArgs, check_writable, parse_size, parse_source, whole};
use super::report::calibration_lines;
use super::words::{self, mebibytes, printable, seconds};
use super::{heading, interrupt, progress, streams};

#[derive(Debug, Args)]
pub struct QuantizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The type of the file, one of llama-quantize's, like q4_k_m
    ///
    /// f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0, iq4_nl, iq4_xs, q3_k_l, q3_k_m, q3_k_s, iq3_m, iq3_s,
    /// iq3_xs, iq3_xxs, q2_k, q2_k_s, iq2_m, iq2_s, iq2_xs, iq2_xxs, tq2_0, tq1_0, iq1_m or iq1_s. Which matrices take which block type is as there.
    #[arg(help_heading = heading::TYPES, long = "type", value_name = "TYPE", value_parser = FileType::from_str, required_unless_present = "fit")]
    file_type: Option<FileType>,
    /// Take the types that suit a file of so many bytes best, like 2GB
    ///
    /// What smaller types cost is measured on the calibration text, place by place. Units: B, kB, KiB, MB, MiB, GB, GiB.
    #[arg(help_heading = heading::TYPES, long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["file_type", "imatrix", "pure", "keep_output", "output_type", "embedding_type"])]
    fit: Option<u64>,
    /// Give all matrices the type itself, without rules for some
    #[arg(help_heading = heading::TYPES, long)]
    pure: bool,
    /// Leave the output head in its type
    #[arg(help_heading = heading::TYPES, long, visible_alias = "leave-output-tensor", conflicts_with = "output_type")]
    keep_output: bool,
    /// The block type of the output head, like q6_k
    #[arg(help_heading = heading::TYPES, long, visible_alias = "output-tensor-type", value_name = "TYPE", value_parser = TensorType::from_str)]
    output_type: Option<TensorType>,
    /// The block type of the embedding, like q4_k
    ///
    /// It is the output head too where there is no other.
    #[arg(help_heading = heading::TYPES, long, visible_alias = "token-embedding-type", value_name = "TYPE", value_parser = TensorType::from_str)]
    embedding_type: Option<TensorType>,
    /// Encode anew what is in a block type already
    ///
    /// That is worse than to encode the original once.
    #[arg(help_heading = heading::TYPES, long)]
    allow_requantize: bool,
    /// Weight errors by an importance matrix from this file
    ///
    /// `flapjack calibrate --imatrix` and llama-imatrix make one.
    #[arg(help_heading = heading::CALIBRATION, long, value_name = "FILE", conflicts_with = "calib", value_hint = ValueHint::FilePath)]
    imatrix: Option<PathBuf>,
    /// Weight errors by how much inputs matter on a text
    ///
    /// A text file, a folder of text files, a file of JSON lines (.jsonl), - for standard input, built-in for the built-in text, self:N for N tokens
    /// that the model writes itself, or mixture for what `flapjack calibrate` takes by default.
    #[arg(help_heading = heading::CALIBRATION, long, value_name = "SOURCE", value_parser = parse_text, value_hint = ValueHint::AnyPath)]
    calib: Option<TextSource>,
    /// The field of JSON lines that holds the text [default: text]
    #[arg(help_heading = heading::CALIBRATION, long, value_name = "NAME", requires = "calib", value_parser = NonEmptyStringValueParser::new())]
    calib_field: Option<String>,
    /// Calibrate on N tokens only [default: 24576 of the mixture, all of the built-in text and of self, 32768 of another]
    #[arg(help_heading = heading::CALIBRATION, long, value_name = "N", value_parser = whole::<usize>(1..=u64::MAX))]
    calib_tokens: Option<usize>,
    /// Write the model to this file
    #[arg(help_heading = heading::OUTPUT, short, long, value_name = "FILE", required_unless_present = "dry_run", value_hint = ValueHint::FilePath)]
    output: Option<PathBuf>,
    /// Print what would be written, tensor by tensor, and write nothing
    #[arg(help_heading = heading::OUTPUT, long)]
    dry_run: bool,
    /// Print no report
    #[arg(help_heading = heading::OUTPUT, short, long)]
    quiet: bool,
}

fn parse_text(text: &str) -> Result<TextSource, String> {
    match text {
        "mixture" => Ok(TextSource::Mixture),
        other => parse_source(other),
    }
}

pub fn run(args: QuantizeArgs) -> Result<()> {
    progress::set_quiet(args.quiet);
    let target = args.output.as_deref().filter(|_| !args.dry_run);
    if let Some(path) = target {
        check_writable(path)?;
    }
    let (types, importance) = match args.fit {
        Some(bytes) => args.fitting(bytes)?,
        None => args.mixed()?,
    };
    let options = ConvertOptions {
        types,
        importance,
        open: args.model.options(),
    };
    let events = &mut progress::bars();
    let report = engine::convert(args.model.path()?, &options, target, events)?;
    log_converted(&report);
    if args.dry_run {
        streams::print(|out| write_table(out, &report))?;
        return Ok(());
    }
    if let (Some(path), false) = (target, args.quiet) {
        for line in converted_lines(&report, path) {
            words::say(&line);
        }
    }
    Ok(())
}

impl QuantizeArgs {
    fn calibration(&self) -> CalibrationOptions {
        CalibrationOptions {
            source: self.calib.clone().unwrap_or_default(),
            field: self.calib_field.clone(),
            tokens: self.calib_tokens,
            // What is measured is of the text alone.
            mix: Some(0.0),
            memory: None,
        }
    }

    /// A type of files, and an importance matrix where one is asked for.
    fn mixed(&self) -> Result<(Types, Option<ImportanceMatrix>)> {
        let file_type = self.file_type.expect("the parser asks for a type");
        let types = Types::Mixture(Mixture {
            file_type,
            pure: self.pure,
            keep_head: self.keep_output,
            head: self.output_type,
            embedding: self.embedding_type,
            requantize: self.allow_requantize,
        });
        if let Some(path) = &self.imatrix {
            return Ok((types, Some(read_importance(path)?)));
        }
        if self.calib.is_none() {
            return Ok((types, None));
        }
        let engine = self.model.open()?;
        let calibration = self.calibration();
        let (matrix, report) =
            engine.importance_matrix(&calibration, Effort::Normal, &mut progress::bars())?;
        words::log(&report.notices);
        interrupt::check()?;
        if !self.quiet {
            for line in calibration_lines(&report) {
                words::say(&line);
            }
        }
        Ok((types, Some(matrix)))
    }

    /// The types that make a file of a size.
    fn fitting(&self, bytes: u64) -> Result<(Types, Option<ImportanceMatrix>)> {
        let engine = self.model.open()?;
        let found = engine.types_within(
            bytes,
            self.allow_requantize,
            &self.calibration(),
            Effort::Normal,
            &mut progress::bars(),
        )?;
        interrupt::check()?;
        if !self.quiet {
            words::say(&format!(
                "  types      found on the calibration text; they should cost {:.4} nats per token",
                found.predicted
            ));
        }
        Ok((found.types, Some(found.importance)))
    }
}

/// What is worth knowing of a file that was written.
pub fn log_converted(report: &ConvertReport) {
    if report.lacks_pre_tokenizer {
        tracing::warn!(
            "the way in which {} splits text into words has no name in GGUF files, so that llama.cpp will split it in its default way; --override-kv tokenizer.ggml.pre=str:NAME names another",
            report.source.display()
        );
    }
}

/// The report of a file that was written.
pub fn converted_lines(report: &ConvertReport, path: &Path) -> Vec<String> {
    let file_type = report.file_type.map(|name| format!(", {name}"));
    vec![
        format!(
            "{}: {}{}; {} was {}",
            path.display(),
            mebibytes(report.bytes),
            file_type.unwrap_or_default(),
            report.source.display(),
            mebibytes(report.source_bytes),
        ),
        format!("  tensors    {}", counts(report)),
        format!("  time       {}", seconds(report.time)),
    ]
}

/// How many tensors have which type, the most common first.
fn counts(report: &ConvertReport) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for tensor in &report.tensors {
        match counts.iter_mut().find(|(name, _)| *name == tensor.to) {
            Some((_, n)) => *n += 1,
            None => counts.push((tensor.to, 1)),
        }
    }
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let words = counts.iter().map(|(name, n)| format!("{n} in {name}"));
    words.collect::<Vec<_>>().join(", ")
}

fn write_table(out: &mut impl Write, report: &ConvertReport) -> io::Result<()> {
    let shape = |shape: &[usize]| {
        let extents: Vec<String> = shape.iter().map(usize::to_string).collect();
        extents.join(" x ")
    };
    let rows: Vec<[String; 5]> = report
        .tensors
        .iter()
        .map(|tensor| {
            [
                printable(&tensor.name),
                shape(&tensor.shape),
                tensor.from.to_owned(),
                tensor.to.to_owned(),
                tensor.bytes.to_string(),
            ]
        })
        .collect();
    let width = |i: usize, least: usize| {
        let widths = rows.iter().map(|row| row[i].chars().count());
        widths.max().unwrap_or(0).max(least)
    };
    let [name, shape, from, to, bytes] =
        [(0, 6), (1, 5), (2, 4), (3, 2), (4, 5)].map(|(i, least)| width(i, least));
    writeln!(
        out,
        "{:name$}  {:>shape$}  {:from$}  {:to$}  {:>bytes$}",
        "tensor", "shape", "from", "to", "bytes"
    )?;
    for [n, s, f, t, b] in &rows {
        writeln!(
            out,
            "{n:name$}  {s:>shape$}  {f:from$}  {t:to$}  {b:>bytes$}"
        )?;
    }
    writeln!(
        out,
        "\n{} ({}), from {}",
        mebibytes(report.bytes),
        counts(report),
        mebibytes(report.source_bytes)
    )
}
