//! `flapjack convert`

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, builder::ValueHint};
use flapjack::convert::{FileType, Mixture, Types};
use flapjack::engine::{self, ConvertOptions, OpenOptions};

use super::arguments::{ThreadArgs, check_writable};
use super::overrides::OverrideArgs;
use super::quantize::{converted_lines, log_converted};
use super::{heading, progress, words};

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A folder with config.json and safetensors files, or a GGUF file
    ///
    /// Of a split file any part names the whole. A name as -m takes it is as good.
    #[arg(help_heading = heading::MODEL, value_name = "SOURCE", value_hint = ValueHint::AnyPath)]
    source: PathBuf,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// The type of matrices
    ///
    /// Vectors are in F32. What is in a block type is decoded, unless it keeps its type.
    #[arg(help_heading = heading::TYPES, long = "type", alias = "outtype", value_name = "TYPE", value_parser = float_types(), default_value = "keep")]
    file_type: Kept,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Write the model to this file
    #[arg(help_heading = heading::OUTPUT, short, long, visible_alias = "outfile", value_name = "FILE", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// Print no report
    #[arg(help_heading = heading::OUTPUT, short, long)]
    quiet: bool,
}

/// A type of files; `None` for the source's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept(Option<FileType>);

fn float_types() -> impl TypedValueParser<Value = Kept> {
    PossibleValuesParser::new(["keep", "f16", "bf16", "f32"])
        .map(|name| Kept(FileType::from_str(&name).ok()))
}

pub fn run(args: ConvertArgs) -> Result<()> {
    progress::set_quiet(args.quiet);
    check_writable(&args.output)?;
    let types = match args.file_type.0 {
        None => Types::Keep,
        Some(file_type) => Types::Mixture(Mixture {
            requantize: true,
            ..file_type.into()
        }),
    };
    let options = ConvertOptions {
        types,
        importance: None,
        open: OpenOptions {
            threads: args.threads.number(),
            overrides: args.overrides.overrides(),
            ..OpenOptions::default()
        },
    };
    let source = progress::model(Some(&args.source))?;
    let events = &mut progress::bars();
    let report = engine::convert(source, &options, Some(&args.output), events)?;
    log_converted(&report);
    if !args.quiet {
        for line in converted_lines(&report, &args.output) {
            words::say(&line);
        }
    }
    Ok(())
}
