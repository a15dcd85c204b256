//! `--prune` and what belongs to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use flapjack::gguf::Residency;
use flapjack::kernels::Runtime;
use flapjack::model::Model;
use flapjack::prune::{
    self, Calibration, Covariance, CurveOptions, Effort, HeadUnit, Method, Metric, Plan, Profile,
    PruneError, Recipe, Restore, Structure, calibrate, curves,
};
use flapjack::tokenize::Tokenizer;

use super::memory;
use super::options::{Loaded, read_text};
use super::progress;

/// Tokens that are used of a file unless --calib-tokens says otherwise.
const DEFAULT_FILE_TOKENS: usize = 32_768;
/// Tokens that are used of any text at `--effort fast`.
const FAST_TOKENS: usize = 4096;

#[derive(Debug, Args)]
pub struct PruneOptions {
    /// Remove this share of the layers' weights before running (at least 0, below 0.9)
    #[arg(long, value_name = "RATIO", value_parser = parse_ratio, allow_negative_numbers = true)]
    pub prune: Option<f64>,
    /// Calibrate on this text file instead of the built-in text
    #[arg(long, value_name = "FILE", requires = "prune")]
    pub calib: Option<PathBuf>,
    /// Calibrate on the first N tokens only [default: all of the built-in text, 32768 of a file; 4096 at --effort fast]
    #[arg(long, value_name = "N", requires = "prune")]
    pub calib_tokens: Option<usize>,
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

/// A profile and what it took to get it.
pub struct Calibrated {
    pub profile: Profile,
    pub source: String,
    /// What the profile saw.
    pub tokens: Vec<u32>,
    pub bos: Option<u32>,
    pub time: Duration,
    /// What loss curves were measured on and took, if they were.
    pub curves: Option<(usize, Duration)>,
}

impl PruneOptions {
    /// The ratio, if there is anything to do.
    pub fn ratio(&self) -> Option<f64> {
        self.prune.filter(|r| *r > 0.0)
    }

    pub fn calibrate(&self, loaded: &Loaded) -> Result<Calibrated> {
        let (source, text) = match &self.calib {
            Some(path) => (path.display().to_string(), read_text(path)?),
            None => ("the built-in text".to_owned(), calibrate::TEXT.to_owned()),
        };
        let start = Instant::now();
        let limit = match (self.calib_tokens, self.method.effort, &self.calib) {
            (Some(limit), ..) => limit,
            (None, Effort::Fast, _) => FAST_TOKENS,
            (None, _, Some(_)) => DEFAULT_FILE_TOKENS,
            (None, _, None) => usize::MAX,
        };
        let tokens = first_tokens(&loaded.tokenizer, &text, limit)?;
        if self.calib_tokens.is_none() && self.calib.is_some() && tokens.len() == limit {
            tracing::info!(
                "calibrating on the first {limit} tokens of {source}; --calib-tokens takes more"
            );
        }
        let recipe = self.method.recipe();
        let bos = loaded
            .tokenizer
            .bos()
            .filter(|_| loaded.tokenizer.adds_bos());
        // Curves are measured on text that the statistics have not seen.
        let levels = self.method.effort.curve_levels();
        let held_back = match recipe.wants_curves() {
            true => held_back(tokens.len(), levels.tokens)
                .with_context(|| format!("measuring loss curves on {source}"))?,
            false => 0,
        };
        let (seen, held_back) = tokens.split_at(tokens.len() - held_back);
        let covariance = recipe.wants_covariance() && covariances_fit(&loaded.model, recipe)?;
        let text = |tokens| Calibration {
            tokens,
            bos,
            covariance,
        };
        let bar = progress::bar("calibrating", seen.len() as u64, "tokens");
        let mut profile = prune::calibrate(
            &loaded.model,
            &loaded.runtime,
            text(seen),
            &mut |done, _| bar.set_position(done as u64),
        )
        .with_context(|| format!("calibrating on {source}"))?;
        bar.finish_and_clear();
        let time = start.elapsed();

        let start = Instant::now();
        if recipe.wants_curves() {
            let options = CurveOptions {
                metric: recipe.metric,
                heads: recipe.heads,
                restore: recipe.restore,
                levels,
            };
            let modules = 2 * loaded.model.layers.len() as u64;
            let bar = progress::bar("measuring loss curves", modules, "modules");
            let curves = prune::curves::measure(
                &loaded.model,
                &loaded.runtime,
                &profile,
                text(held_back),
                options,
                &mut |done, _| bar.set_position(done as u64),
            )
            .with_context(|| format!("measuring loss curves on {source}"))?;
            bar.finish_and_clear();
            profile.curves = Some(curves);
        }
        Ok(Calibrated {
            curves: profile
                .curves
                .as_ref()
                .map(|curves| (curves.tokens, start.elapsed())),
            profile,
            source,
            tokens: seen.to_vec(),
            bos,
            time,
        })
    }
}

/// Whether there is memory for the covariances of all layers. Where the recipe can do without, it does, with a warning.
fn covariances_fit(model: &Model, recipe: Recipe) -> Result<bool> {
    let needed: usize = model
        .layers
        .iter()
        .map(|l| Covariance::bytes(l.o.weight.cols) + Covariance::bytes(l.channels()))
        .sum();
    let available = memory::available().map(|bytes| bytes / 2);
    tracing::debug!("covariances take {} MiB", needed >> 20);
    match available {
        Some(available) if available < needed as u64 => {
            let shortage = format!(
                "least squares need covariances of {} MiB, and {} MiB are half of the free memory",
                needed >> 20,
                available >> 20
            );
            if recipe.restore != Restore::Auto || recipe.metric.wants_covariance() {
                bail!("{shortage}; --restore bias does without");
            }
            tracing::warn!("{shortage}; restoring by biases");
            Ok(false)
        }
        _ => Ok(true),
    }
}

/// How many of a text's tokens are kept for loss curves: `wanted`, but no more than a quarter.
fn held_back(tokens: usize, wanted: usize) -> Result<usize, PruneError> {
    let least = calibrate::LEAST_TOKENS + curves::LEAST_TOKENS;
    if tokens < least {
        return Err(PruneError::TooShort { tokens, least });
    }
    Ok(wanted.min(tokens / 4).max(curves::LEAST_TOKENS))
}

/// The first `limit` tokens of a text, without tokenising all of a long one.
fn first_tokens(tokenizer: &Tokenizer, text: &str, limit: usize) -> Result<Vec<u32>> {
    // No token of a usual vocabulary is longer on average than this in running text.
    const BYTES_PER_TOKEN: usize = 16;
    let mut end = limit.saturating_mul(BYTES_PER_TOKEN).min(text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let mut tokens = tokenizer.encode(&text[..end])?;
    tokens.truncate(limit);
    Ok(tokens)
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
        tokens: &calibrated.tokens,
        bos: calibrated.bos,
        covariance: recipe.wants_covariance(),
    };
    let profile = &calibrated.profile;
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
