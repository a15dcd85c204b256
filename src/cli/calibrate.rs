//! `flapjack calibrate`

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use flapjack::engine::Engine;

use super::arguments::{CalibrationArgs, MethodArgs, ModelArgs, check_writable};
use super::report::calibration_lines;
use super::words::{self, mebibytes};
use super::{heading, interrupt, progress};

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Write the profile to this file
    #[arg(help_heading = heading::OUTPUT, short, long, value_name = "FILE", required_unless_present = "imatrix")]
    output: Option<PathBuf>,
    /// Write an importance matrix to this file
    ///
    /// It is in llama.cpp's form, and what `flapjack quantize` and llama-quantize weight errors by.
    #[arg(help_heading = heading::OUTPUT, long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    #[command(flatten)]
    method: MethodArgs,
    /// Print no report
    #[arg(help_heading = heading::OUTPUT, short, long)]
    quiet: bool,
}

pub fn run(args: CalibrateArgs) -> Result<()> {
    progress::set_quiet(args.quiet);
    for path in args.output.iter().chain(&args.imatrix) {
        check_writable(path)?;
    }
    let mut engine = args.model.open()?;
    if let Some(path) = &args.output {
        write_profile(&args, &mut engine, path)?;
    }
    if let Some(path) = &args.imatrix {
        interrupt::check()?;
        write_importance(&args, &engine, path)?;
    }
    Ok(())
}

fn write_importance(args: &CalibrateArgs, engine: &Engine, path: &Path) -> Result<()> {
    let effort = args.method.options().effort;
    let calibration = args.calibration.options()?;
    let (matrix, report) = engine.importance_matrix(&calibration, effort, &mut progress::bars())?;
    words::log(&report.notices);
    matrix.save(path)?;
    if !args.quiet {
        words::say(&format!(
            "{}: {}, importance of the inputs of {} matrices",
            path.display(),
            mebibytes(size_of(path)),
            matrix.len(),
        ));
        for line in calibration_lines(&report) {
            words::say(&line);
        }
    }
    Ok(())
}

fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

fn write_profile(args: &CalibrateArgs, engine: &mut Engine, path: &Path) -> Result<()> {
    let (method, calibration) = (args.method.options(), args.calibration.options()?);
    let (profile, report) = engine.calibrate(&method, &calibration, &mut progress::bars())?;
    words::log(&report.notices);
    profile.save(path)?;
    if report.groups.is_some() {
        tracing::warn!(
            "the profile has no covariances, for they do not fit in memory all at once; pruning by it restores by biases. Without --profile, pruning collects them in groups of layers"
        );
    }
    if !args.quiet {
        words::say(&format!(
            "{}: {}, SHA-256 {}",
            path.display(),
            mebibytes(size_of(path)),
            report.hash
        ));
        for line in calibration_lines(&report) {
            words::say(&line);
        }
    }
    Ok(())
}
