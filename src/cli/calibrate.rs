//! `flapjack calibrate`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::calibration::CalibrationOptions;
use super::options::{ModelOptions, check_target};
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
    /// Print no report
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: CalibrateArgs) -> Result<()> {
    check_target(&args.output)?;
    let loaded = args.model.load()?;
    let calibrated = args.calibration.calibrate(&loaded, false)?;
    let profile = calibrated.stored();
    profile.save(&args.output)?;
    if !args.quiet {
        eprintln!(
            "{}: {}, SHA-256 {}",
            args.output.display(),
            mebibytes(profile.to_bytes().len() as u64),
            profile.hash()
        );
        eprintln!("{}", CalibrationNote::from(calibrated).line());
    }
    Ok(())
}
