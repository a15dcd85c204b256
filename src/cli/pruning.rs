//! `--prune` and what belongs to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use flapjack::gguf::Residency;
use flapjack::kernels::Runtime;
use flapjack::model::Model;
use flapjack::prune::{
    self, Calibration, Effort, HeadUnit, Method, Metric, Plan, Recipe, Restore, Structure,
};

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
    #[command(flatten)]
    pub method: MethodOptions,
}

/// How to prune: a named method, and choices that differ from it.
#[derive(Debug, Clone, Default, Args)]
pub struct MethodOptions {
    /// The method of pruning
    #[arg(long, value_parser = one_of(Method::ALL, Method::name), default_value_t = Method::default())]
    pub method: Method,
    /// What makes a head or channel worth keeping [default: the method's]
    #[arg(long, value_parser = one_of(Metric::ALL, Metric::name))]
    pub metric: Option<Metric>,
    /// Which units one threshold spans: all layers or each (al, ul), all modules, each kind, or the same ratio for both (am,
    /// mm, um) [default: the method's]
    #[arg(long, value_parser = one_of(Structure::ALL, Structure::name))]
    pub structure: Option<Structure>,
    /// Whether query heads go one by one or in whole KV groups
    #[arg(long, value_name = "UNIT", value_parser = one_of(HeadUnit::ALL, HeadUnit::name), default_value_t = HeadUnit::default())]
    pub heads: HeadUnit,
    /// How to make up for what goes [default: the method's]
    #[arg(long, value_parser = one_of(Restore::ALL, Restore::name))]
    pub restore: Option<Restore>,
    /// How much time may be spent on choosing: fast measures no loss curves, best more of them than normal
    #[arg(long, value_parser = one_of(Effort::ALL, Effort::name), default_value_t = Effort::default())]
    pub effort: Effort,
}

impl MethodOptions {
    pub fn recipe(&self) -> Recipe {
        let named = self.method.recipe(self.effort);
        Recipe {
            metric: self.metric.unwrap_or(named.metric),
            structure: self.structure.unwrap_or(named.structure),
            heads: self.heads,
            restore: self.restore.unwrap_or(named.restore),
        }
    }

    /// The method and its recipe, in words.
    pub fn description(&self) -> String {
        let recipe = self.recipe();
        format!(
            "{} ({}, {}, heads by {}, restoration {})",
            self.method, recipe.metric, recipe.structure, recipe.heads, recipe.restore
        )
    }
}

/// One of some named choices, which the help lists.
fn one_of<T>(all: &'static [T], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    PossibleValuesParser::new(all.iter().map(|choice| name(*choice))).map(move |text| {
        let chosen = all.iter().copied().find(|choice| name(*choice) == text);
        chosen.expect("the parser lets no other name through")
    })
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
    pub recipe: Recipe,
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
            Some(path) => calibration::from_file(loaded, path, self.method.recipe()),
            None => {
                let cached = !self.no_profile_cache;
                self.calibration.0.calibrate(loaded, &self.method, cached)
            }
        }
    }
}

/// Prunes in place.
pub fn prune(
    model: &mut Model,
    runtime: &Runtime,
    calibrated: &Calibrated,
    recipe: Recipe,
    ratio: f64,
) -> Result<Pruned> {
    let before = Snapshot::take(model);
    let start = Instant::now();
    let bar = progress::bar("pruning", model.layers.len() as u64, "layers");
    let text = Calibration {
        tokens: &calibrated.text,
        bos: calibrated.bos,
        covariance: recipe.wants_covariance(),
    };
    let profile = &calibrated.stored.profile;
    let plan = prune::prune(model, runtime, profile, text, recipe, ratio, &|done, _| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(Pruned {
        asked: ratio,
        recipe,
        plan,
        before,
        after: Snapshot::take(model),
        time: start.elapsed(),
    })
}
