//! `flapjack calibrate`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::arguments::{CalibrationArgs, MethodArgs, ModelArgs, check_writable};
use super::report::calibration_lines;
use super::words::{self, mebibytes};
use super::{heading, progress};

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Write the profile to this file
    #[arg(help_heading = heading::OUTPUT, short, long, value_name = "FILE")]
    output: PathBuf,
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
    check_writable(&args.output)?;
    let mut engine = args.model.open()?;
    let (method, calibration) = (args.method.options(), args.calibration.options()?);
    let (profile, report) = engine.calibrate(&method, &calibration, &mut progress::bars())?;
    words::log(&report.notices);
    profile.save(&args.output)?;
    if report.groups.is_some() {
        tracing::warn!(
            "the profile has no covariances, for they do not fit in memory all at once; pruning by it restores by biases. Without --profile, pruning collects them in groups of layers"
        );
    }
    if !args.quiet {
        let size = std::fs::metadata(&args.output).map_or(0, |m| m.len());
        words::say(&format!(
            "{}: {}, SHA-256 {}",
            args.output.display(),
            mebibytes(size),
            report.hash
        ));
        for line in calibration_lines(&report) {
            words::say(&line);
        }
    }
    Ok(())
}
