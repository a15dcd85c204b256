//! `flapjack prune`

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use flapjack::gguf::GgufFile;
use flapjack::model::{Export, LayerForm};
use flapjack::prune::{Record, record};

use super::options::{ModelOptions, check_target};
use super::pruning::{Done, PruneOptions};
use super::report::{self, mebibytes, plural};

#[derive(Debug, Args)]
pub struct PruneArgs {
    #[command(flatten)]
    model: ModelOptions,
    /// Write the pruned model to this file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    pruning: PruneOptions,
    /// Print no report
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: PruneArgs) -> Result<()> {
    let Some(target) = args.pruning.amount.target() else {
        bail!(
            "say how much to prune, for example with --ratio 0.3, --fit 80MB, --speedup 1.3x or --max-ppl +10%"
        );
    };
    check_target(&args.output)?;
    let mut loaded = args.model.load()?;
    let path = loaded.model.path().to_owned();
    let widths = loaded.model.layers.iter();
    let widths: Vec<_> = widths.map(|l| (l.heads(), l.channels())).collect();
    let parameters = loaded.model.layer_parameters();

    let job = args.pruning.job(&loaded, target)?;
    let Done {
        pruned,
        note,
        origin,
        profile,
    } = job.carry_out(&mut loaded, &args.model, !args.quiet)?;
    loaded.model.unpack(&loaded.runtime);

    // Another map of the same file: what was not pruned is taken from it as it is.
    let source = GgufFile::open(&path)?;
    if source.fingerprint() != origin.model {
        bail!(
            "{} has changed since pruning began; try again",
            path.display()
        );
    }
    let earlier = Record::from_gguf(&source)?;
    let export = Export::new(&loaded.model);
    let parameters = earlier.as_ref().map_or(parameters as u64, |r| r.parameters);
    let record = Record {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        method: args.pruning.method.description(pruned.recipe),
        asked: pruned.ratio,
        ratio: 1.0 - loaded.model.layer_parameters() as f64 / parameters.max(1) as f64,
        parameters,
        profile,
        calibration: format!("{} of {}", plural(origin.tokens, "token"), origin.source),
        model: origin.model.clone(),
        layers: Record::layers(&pruned.plan, &widths, export.layers(), earlier.as_ref()),
    };
    let writer = export.writer(&source, record::PREFIX, record.entries())?;
    writer
        .save(&args.output)
        .with_context(|| format!("writing {}", args.output.display()))?;

    if args.quiet {
        return Ok(());
    }
    let size = |path| std::fs::metadata(path).map_or(0, |m| m.len());
    eprintln!(
        "{}: {}, architecture {}; {} was {}",
        args.output.display(),
        mebibytes(size(&args.output)),
        export.architecture().name(),
        path.display(),
        mebibytes(size(&path)),
    );
    for line in note.lines() {
        eprintln!("{line}");
    }
    for line in report::pruned_lines(&pruned) {
        eprintln!("{line}");
    }
    for line in form_lines(&export) {
        eprintln!("{line}");
    }
    Ok(())
}

/// What the file has that the model has not, because a file cannot tell it otherwise.
fn form_lines(export: &Export) -> Vec<String> {
    let sum = |of: fn(&LayerForm) -> usize| -> usize { export.layers().iter().map(of).sum() };
    let (heads, kv_heads) = (sum(|f| f.added_heads()), sum(|f| f.repeated_kv_heads()));
    let mut lines = Vec::new();
    if heads + kv_heads > 0 {
        lines.push(format!(
            "  form       {} of zeros added and {} repeated (+{}), because in a file all KV heads of a layer have equally many query heads",
            plural(heads, "query head"),
            plural(kv_heads, "KV head"),
            mebibytes(export.added_bytes() as u64),
        ));
    }
    lines
}
