//! `flapjack calibrate`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::calibration::CalibrationOptions;
use super::options::{ModelOptions, check_target};
use super::pruning::MethodOptions;
use super::report::{CalibrationNote, mebibytes};

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: ModelOptions,
    /// Write the profile to this file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    calibration: CalibrationOptions,
    #[command(flatten)]
    method: MethodOptions,
    /// Print no report
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: CalibrateArgs) -> Result<()> {
    check_target(&args.output)?;
    let loaded = args.model.load()?;
    let calibrated = args.calibration.calibrate(&loaded, &args.method, false)?;
    calibrated.stored.save(&args.output)?;
    if calibrated.groups.is_some() {
        tracing::warn!(
            "the profile has no covariances, for they do not fit in memory all at once; pruning by it restores by biases. Without --profile, pruning collects them in groups of layers"
        );
    }
    if !args.quiet {
        let size = std::fs::metadata(&args.output).map_or(0, |m| m.len());
        eprintln!(
            "{}: {}, SHA-256 {}",
            args.output.display(),
            mebibytes(size),
            calibrated.stored.hash()
        );
        for line in CalibrationNote::new(&calibrated).lines() {
            eprintln!("{line}");
        }
    }
    Ok(())
}
