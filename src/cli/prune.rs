//! `flapjack prune`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flapjack::engine::ExportReport;
use flapjack::prune::sparse::SparseForm;

use super::arguments::{AMOUNT, ModelArgs, PruningArgs, check_writable};
use super::report::{calibration_lines, pruned_lines};
use super::words::{self, mebibytes, plural};
use super::{heading, interrupt, progress};

#[derive(Debug, Args)]
#[command(mut_group(AMOUNT, |amount| amount.required(true)))]
pub struct PruneArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Write the pruned model to this file
    #[arg(help_heading = heading::OUTPUT, short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    pruning: PruningArgs,
    /// Write what --sparse leaves without the bytes of what is gone, in a form that only flapjack reads
    ///
    /// Without this the file has zeros in their place, takes as many bytes as before, and other programs read it too.
    #[arg(help_heading = heading::OUTPUT, long, requires = "sparse")]
    pack: bool,
    /// Print no report
    #[arg(help_heading = heading::OUTPUT, short, long)]
    quiet: bool,
}

pub fn run(args: PruneArgs) -> Result<()> {
    let options = args.pruning.options(true)?;
    let mut options = options.expect("the parser asks for an amount");
    if let Some(sparse) = &mut options.sparse {
        sparse.form = match args.pack {
            true => SparseForm::Sparse,
            false => SparseForm::Zeros,
        };
    }
    progress::set_quiet(args.quiet);
    check_writable(&args.output)?;
    let mut engine = args.model.open()?;
    let source = engine.report().path;
    let prepared = engine.prepare(&options)?;
    words::log(prepared.notices());
    let pruned = engine.prune_prepared(prepared, &mut progress::bars())?;
    words::log(&pruned.notices);
    interrupt::check()?;
    let export = engine.export_with(&args.output, &mut progress::bars())?;
    if args.quiet {
        return Ok(());
    }
    words::say(&format!(
        "{}: {}, architecture {}; {} was {}",
        args.output.display(),
        mebibytes(export.bytes),
        export.architecture,
        source.display(),
        mebibytes(export.source_bytes),
    ));
    let mut lines = calibration_lines(&pruned.calibration);
    lines.extend(pruned_lines(&pruned));
    lines.extend(form_line(&export));
    if export.own_form {
        let line =
            "  form       flapjack's own, since llama.cpp has none for this; see docs/format.md";
        lines.push(line.to_owned());
    }
    for line in lines {
        words::say(&line);
    }
    Ok(())
}

/// What the file has that the model has not, because a file cannot tell it otherwise.
fn form_line(export: &ExportReport) -> Option<String> {
    let (heads, kv_heads) = (export.added_heads, export.repeated_kv_heads);
    (heads + kv_heads > 0).then(|| {
        format!(
            "  form       {} of zeros added and {} repeated (+{}), because in a file all KV heads of a layer have equally many query heads",
            plural(heads, "query head"),
            plural(kv_heads, "KV head"),
            mebibytes(export.added_bytes as u64),
        )
    })
}
