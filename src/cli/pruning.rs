//! `--prune` and what belongs to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use flapjack::gguf::Residency;
use flapjack::kernels::Runtime;
use flapjack::model::Model;
use flapjack::prune::{self, Plan, Profile};

use super::calibration::{self, Calibrated, WithPrune};
use super::memory;
use super::options::Loaded;
use super::progress;

#[derive(Debug, Args)]
pub struct PruneOptions {
    /// Remove this share of the layers' weights before running (at least 0, below 0.9)
    #[arg(long, visible_alias = "ratio", value_name = "RATIO", value_parser = parse_ratio, allow_negative_numbers = true)]
    pub prune: Option<f64>,
    #[command(flatten)]
    pub calibration: WithPrune,
    /// Use a profile that `flapjack calibrate` made, and do not calibrate
    #[arg(long, value_name = "FILE", requires = "prune", conflicts_with_all = ["calib", "calib_field", "calib_tokens"])]
    pub profile: Option<PathBuf>,
    /// Calibrate anew even if the cache folder has the profile, and do not keep it there
    #[arg(long, requires = "prune")]
    pub no_profile_cache: bool,
}

pub fn parse_ratio(text: &str) -> Result<f64, String> {
    let ratio: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if prune::RATIOS.contains(&ratio) {
        Ok(ratio)
    } else {
        Err(format!(
            "must be at least {} and below {}",
            prune::RATIOS.start,
            prune::RATIOS.end
        ))
    }
}

/// Sizes of a model and memory of this process at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub parameters: usize,
    pub bytes: usize,
    pub map: Option<Residency>,
    pub process: Option<u64>,
    /// Heads, KV heads and channels of each layer.
    pub widths: Vec<[usize; 3]>,
}

impl Snapshot {
    fn take(model: &Model) -> Self {
        Self {
            parameters: model.parameters(),
            bytes: model.bytes(),
            map: model.map.residency(),
            process: memory::resident(),
            widths: model
                .layers
                .iter()
                .map(|l| [l.heads(), l.kv_heads(), l.channels()])
                .collect(),
        }
    }
}

/// What pruning did.
#[derive(Debug, Clone)]
pub struct Pruned {
    pub asked: f64,
    pub plan: Plan,
    pub before: Snapshot,
    pub after: Snapshot,
    pub time: Duration,
}

impl PruneOptions {
    /// The ratio, if there is anything to do.
    pub fn ratio(&self) -> Option<f64> {
        self.prune.filter(|r| *r > 0.0)
    }

    pub fn calibrate(&self, loaded: &Loaded) -> Result<Calibrated> {
        match &self.profile {
            Some(path) => calibration::from_file(loaded, path),
            None => self.calibration.0.calibrate(loaded, !self.no_profile_cache),
        }
    }
}

/// Prunes in place.
pub fn prune(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    ratio: f64,
) -> Result<Pruned> {
    let before = Snapshot::take(model);
    let start = Instant::now();
    let bar = progress::bar("pruning", model.layers.len() as u64, "layers");
    let plan = prune::flap(model, runtime, profile, ratio, &|done, _| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(Pruned {
        asked: ratio,
        plan,
        before,
        after: Snapshot::take(model),
        time: start.elapsed(),
    })
}
