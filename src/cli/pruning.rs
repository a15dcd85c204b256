//! `--prune` and what belongs to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use flapjack::eval::TokenTime;
use flapjack::gguf::Residency;
use flapjack::kernels::Runtime;
use flapjack::model::Model;
use flapjack::progress::ignore;
use flapjack::prune::{
    self, Effort, Found, HeadUnit, Method, Metric, Origin, Outcome, OutcomeKey, Plan, Planner,
    PruneErrorKind, Recipe, Restore, Structure, Target, search,
};
use flapjack::quant::BlockType;

use super::calibration::{self, Calibrated, Task, WithPrune};
use super::effect::{self, Effect, Probe};
use super::memory;
use super::options::{Loaded, ModelOptions};
use super::progress;
use super::report::{CalibrationNote, megabytes};

#[derive(Debug, Args)]
pub struct PruneOptions {
    #[command(flatten)]
    pub amount: Amount,
    #[command(flatten)]
    pub calibration: WithPrune,
    /// Use a profile that `flapjack calibrate` made, and do not calibrate
    #[arg(long, value_name = "FILE", requires = AMOUNT, conflicts_with_all = ["calib", "calib_field", "calib_tokens", "memory", "max_ppl"])]
    pub profile: Option<PathBuf>,
    /// Calibrate and prune anew even if the cache folder has the profile or the outcome, and keep neither there
    #[arg(long, requires = AMOUNT)]
    pub no_profile_cache: bool,
    #[command(flatten)]
    pub method: MethodOptions,
}

/// The name of the group of [`Amount`], one of which other options need.
pub const AMOUNT: &str = "amount";

/// How much to prune.
#[derive(Debug, Clone, Default, Args)]
#[group(id = "amount", multiple = false)]
pub struct Amount {
    /// Remove this share of the layers' weights before running (at least 0, below 0.9)
    #[arg(long, visible_alias = "ratio", value_name = "RATIO", value_parser = parse_ratio, allow_negative_numbers = true)]
    pub prune: Option<f64>,
    /// Remove as little as makes all weights fit in so many bytes, for example 80MB or 76MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub fit: Option<u64>,
    /// Remove as little as should make generation so many times as fast, for example 1.3x
    #[arg(long, value_name = "FACTOR", value_parser = parse_speedup)]
    pub speedup: Option<f64>,
    /// Remove as much as raises the perplexity on held-back calibration text by at most so much, for example +10%
    #[arg(long, value_name = "PERCENT", value_parser = parse_rise)]
    pub max_ppl: Option<f64>,
}

/// A target as it was typed.
pub fn typed(target: Target) -> String {
    match target {
        Target::Ratio(ratio) => format!("--prune {ratio}"),
        Target::Bytes(bytes) => {
            let whole = |unit: &&(&str, u64)| bytes.is_multiple_of(unit.1);
            let (name, unit) = UNITS.iter().find(whole).unwrap_or(&("B", 1));
            format!("--fit {}{name}", bytes / unit)
        }
        Target::Speedup(factor) => format!("--speedup {factor}x"),
        Target::PerplexityRise(rise) => format!("--max-ppl +{}%", percent(rise)),
    }
}

/// What was found, in words.
fn found_words(target: Target, ratio: f64, found: &Found) -> String {
    let asked = typed(target);
    match *found {
        Found::Bytes { before, after } => format!(
            "{asked}: ratio {ratio:.4} leaves {} of weights of {}",
            megabytes(after as usize),
            megabytes(before as usize)
        ),
        Found::Speed {
            bytes_before,
            bytes_after,
            before,
            predicted,
        } => format!(
            "{asked}: ratio {ratio:.4} reads {} a token in place of {}; predicted {predicted:.1} tokens/s in place of {before:.1}",
            megabytes(bytes_after as usize),
            megabytes(bytes_before as usize),
        ),
        Found::Perplexity {
            tokens,
            dense,
            rise,
            beyond,
        } => {
            let what = format!(
                "{asked}: ratio {ratio:.4} raises the perplexity on {tokens} held-back tokens of the calibration text from {dense:.2} by {:.1} %",
                rise * 100.0
            );
            match beyond {
                Some(beyond) => format!("{what}; {}", beyond_words(beyond)),
                None => what,
            }
        }
    }
}

/// A ratio that raises the perplexity too far.
fn beyond_words((ratio, rise): (f64, f64)) -> String {
    let rise = rise * 100.0;
    format!("ratio {ratio:.4} would raise it by {rise:.1} %")
}

/// Without the digits that come of dividing by 100.
fn percent(share: f64) -> f64 {
    (share * 1e8).round() / 1e6
}

impl Amount {
    /// What is asked for, be it nothing.
    pub fn target(&self) -> Option<Target> {
        let ratio = self.prune.map(Target::Ratio);
        ratio
            .or(self.fit.map(Target::Bytes))
            .or(self.speedup.map(Target::Speedup))
            .or(self.max_ppl.map(Target::PerplexityRise))
    }
}

/// Units of sizes, and their bytes, from the largest to the smallest.
const UNITS: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1000),
    ("B", 1),
];

pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || {
        let names = UNITS.map(|(name, _)| name).join(", ");
        format!("must be a number of bytes with a unit ({names}), for example 80MB")
    };
    let unit = UNITS.iter().find(|(name, _)| text.ends_with(name));
    let (name, bytes) = unit.ok_or_else(wrong)?;
    let number: f64 = text[..text.len() - name.len()]
        .trim_end()
        .parse()
        .map_err(|_| wrong())?;
    let size = number * *bytes as f64;
    if size.is_finite() && (1.0..1e18).contains(&size) {
        Ok(size as u64)
    } else {
        Err(wrong())
    }
}

fn parse_speedup(text: &str) -> Result<f64, String> {
    match text.strip_suffix('x').unwrap_or(text).parse::<f64>() {
        Ok(factor) if factor.is_finite() && factor > 1.0 => Ok(factor),
        _ => Err("must be a factor above 1, for example 1.3x".into()),
    }
}

fn parse_rise(text: &str) -> Result<f64, String> {
    let number = text
        .strip_suffix('%')
        .map(|t| t.strip_prefix('+').unwrap_or(t));
    match number.map(str::parse::<f64>) {
        Some(Ok(rise)) if rise.is_finite() && rise > 0.0 => Ok(rise / 100.0),
        _ => Err("must be a share above 0 in per cent, for example +10%".into()),
    }
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
        self.change(self.method.recipe(self.effort))
    }

    /// The recipe where a text of so many tokens can be read again.
    pub fn recipe_with_text(&self, model: &Model, tokens: usize) -> Recipe {
        let memory = memory::available().map_or(u64::MAX, |free| free / 2);
        let (method, effort) = (self.method, self.effort);
        self.change(method.recipe_with_text(effort, model, tokens, memory))
    }

    /// Puts the choices that were made in the place of the method's.
    fn change(&self, named: Recipe) -> Recipe {
        Recipe {
            metric: self.metric.unwrap_or(named.metric),
            structure: self.structure.unwrap_or(named.structure),
            heads: self.heads,
            restore: self.restore.unwrap_or(named.restore),
        }
    }

    /// The method and the recipe that it came to, in words.
    pub fn description(&self, recipe: Recipe) -> String {
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
    /// Types of the attention output and MLP down of each layer.
    pub types: Vec<[BlockType; 2]>,
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
            types: model
                .layers
                .iter()
                .map(|l| [&l.o, &l.down].map(|linear| linear.weight.block_type))
                .collect(),
        }
    }
}

/// What pruning did.
#[derive(Debug, Clone)]
pub struct Pruned {
    pub ratio: f64,
    pub recipe: Recipe,
    pub plan: Plan,
    pub before: Snapshot,
    pub after: Snapshot,
    pub time: Duration,
    /// It was done before, and the cache folder knew how.
    pub repeated: bool,
    /// What a ratio was looked for by, and what that found.
    pub found: Option<Search>,
    /// Perplexities before and after, where they were measured.
    pub effects: Vec<Effect>,
}

/// A ratio that was looked for.
#[derive(Debug, Clone)]
pub struct Search {
    /// In words.
    pub what: String,
    pub time: Duration,
    /// How many times as fast the model has become, where that was asked for.
    pub speedup: Option<f64>,
}

/// A model's pruning, and where its profile comes from.
pub struct Done {
    pub pruned: Pruned,
    pub note: CalibrationNote,
    pub origin: Origin,
    /// The profile's hash.
    pub profile: String,
}

/// Pruning that is about to be.
pub struct Job {
    target: Target,
    recipe: Recipe,
    profile: Pending,
    /// Whether outcomes are taken from the cache folder and kept there.
    cached: bool,
}

enum Pending {
    Task(Box<Task>),
    Calibrated(Box<Calibrated>),
}

impl PruneOptions {
    /// Everything up to where the work begins; `None` if there is none.
    pub fn prepare(&self, loaded: &Loaded) -> Result<Option<Job>> {
        let target = self.amount.target().filter(|t| *t != Target::Ratio(0.0));
        target.map(|target| self.job(loaded, target)).transpose()
    }

    /// The same where there is something to do for a ratio of 0 too.
    pub fn job(&self, loaded: &Loaded, target: Target) -> Result<Job> {
        let cached = !self.no_profile_cache;
        let judge = match target {
            Target::PerplexityRise(_) => JUDGE_TOKENS,
            _ => 0,
        };
        let (recipe, profile) = match &self.profile {
            Some(path) => {
                let recipe = self.method.recipe();
                let calibrated = calibration::from_file(loaded, path, recipe)?;
                (recipe, Pending::Calibrated(Box::new(calibrated)))
            }
            None => {
                let options = &self.calibration.0;
                let task = options.prepare(loaded, &self.method, cached, judge)?;
                (task.recipe(), Pending::Task(Box::new(task)))
            }
        };
        Ok(Job {
            target,
            recipe,
            profile,
            cached,
        })
    }
}

impl Job {
    /// Does again what was done before, if the cache folder knows of it.
    fn repeat(&self, loaded: &mut Loaded) -> Result<Option<Done>> {
        let start = Instant::now();
        let (origin, profile) = match &self.profile {
            Pending::Task(task) => (task.origin(), task.hash()),
            Pending::Calibrated(calibrated) => (&calibrated.stored.origin, calibrated.hash.clone()),
        };
        let Some(profile) = profile else {
            return Ok(None);
        };
        let key = outcome_key(self.target, self.recipe, origin, &profile).filter(|_| self.cached);
        let Some(outcome) = key.and_then(|key| calibration::find_outcome(&key)) else {
            return Ok(None);
        };
        let before = Snapshot::take(&loaded.model);
        match outcome.apply(&mut loaded.model, &loaded.runtime, &mut ignore) {
            Ok(()) => {}
            Err(error) if matches!(error.kind, PruneErrorKind::OtherShape(_)) => {
                tracing::warn!("a kept outcome does not fit the model ({error}); pruning anew");
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        let time = start.elapsed();
        Ok(Some(Done {
            pruned: Pruned {
                ratio: outcome.ratio,
                recipe: self.recipe,
                after: Snapshot::take(&loaded.model),
                before,
                time,
                repeated: true,
                found: outcome.found.map(|found| Search {
                    what: found_words(self.target, outcome.ratio, &found),
                    time: Duration::ZERO,
                    speedup: None,
                }),
                effects: Vec::new(),
                plan: outcome.plan,
            },
            note: match &self.profile {
                Pending::Task(task) => CalibrationNote::unread(task),
                Pending::Calibrated(calibrated) => CalibrationNote::new(calibrated),
            },
            origin: origin.clone(),
            profile,
        }))
    }

    /// Prunes in place, and measures what that does to a text of the user's if `effects`.
    pub fn carry_out(
        self,
        loaded: &mut Loaded,
        options: &ModelOptions,
        effects: bool,
    ) -> Result<Done> {
        if let Some(done) = self.repeat(loaded)? {
            return Ok(done);
        }
        let Job {
            target,
            recipe,
            cached,
            profile,
        } = self;
        let mut calibrated = match profile {
            Pending::Task(task) => task.carry_out(loaded)?,
            Pending::Calibrated(calibrated) => *calibrated,
        };
        let (note, origin) = (
            CalibrationNote::new(&calibrated),
            calibrated.stored.origin.clone(),
        );
        let hash = calibrated.hash.clone();
        let hash = hash.unwrap_or_else(|| calibrated.stored.hash());

        let start = Instant::now();
        let goal = find(target, loaded, options, &mut calibrated, recipe)?;
        let search_time = start.elapsed();
        let probe = match effects {
            true => Probe::new(loaded, &calibrated)?,
            false => None,
        };
        let layers = loaded.model.layers.iter();
        let dense: Vec<_> = layers
            .map(|l| [l.o.weight.cols, l.down.weight.cols])
            .collect();
        let mut pruned = prune(
            &mut loaded.model,
            &loaded.runtime,
            calibrated,
            recipe,
            goal.ratio,
        )?;
        if let Some(probe) = probe {
            pruned.effects = probe.effects(&loaded.model, &loaded.runtime)?;
        }
        if let Some(found) = &goal.found {
            let speedup = match found {
                Found::Speed { before, .. } => {
                    let now = TokenTime::measure(&loaded.model, &loaded.runtime)?;
                    Some(now.speed() / before)
                }
                _ => None,
            };
            pruned.found = Some(Search {
                what: found_words(target, goal.ratio, found),
                time: search_time,
                speedup,
            });
        }
        if let Some(key) = outcome_key(target, recipe, &origin, &hash).filter(|_| cached) {
            let plan = pruned.plan.clone();
            let outcome = Outcome::of(&loaded.model, &dense, plan, goal.ratio, goal.found);
            calibration::keep_outcome(&outcome, &key);
        }
        Ok(Done {
            pruned,
            note,
            origin,
            profile: hash,
        })
    }
}

/// What an outcome is known by in the cache folder; `None` where it would not be the same the next time.
fn outcome_key(
    target: Target,
    recipe: Recipe,
    origin: &Origin,
    profile: &str,
) -> Option<OutcomeKey> {
    // What a speed asks for depends on the machine and the moment.
    if matches!(target, Target::Speedup(_)) {
        return None;
    }
    Some(OutcomeKey {
        model: origin.model.clone(),
        profile: profile.to_owned(),
        recipe,
        target,
        flapjack: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Tokens of the calibration text on which `--max-ppl` judges, and of a sequence of them.
const JUDGE_TOKENS: usize = 2048;

/// A ratio, and what it was found by where it was not asked for itself.
struct Goal {
    ratio: f64,
    found: Option<Found>,
}

/// The ratio for what is asked.
fn find(
    target: Target,
    loaded: &Loaded,
    options: &ModelOptions,
    calibrated: &mut Calibrated,
    recipe: Recipe,
) -> Result<Goal> {
    let Loaded { model, runtime, .. } = loaded;
    let profile = &calibrated.stored.profile;
    let asked = typed(target);
    let (ratio, found) = match target {
        Target::Ratio(ratio) => return Ok(Goal { ratio, found: None }),
        Target::Bytes(bytes) => {
            let planner = Planner::new(model, runtime, profile, recipe)?;
            let fits = |plan: &Plan| plan.bytes_after(model) as u64 <= bytes;
            let Some((ratio, plan)) = planner.smallest_ratio(fits)? else {
                bail!(
                    "{asked} is out of reach: at the highest ratio the weights take {}; ask for at least that, or take a smaller model or file type",
                    megabytes(planner.most()?.bytes_after(model))
                );
            };
            let found = Found::Bytes {
                before: model.bytes() as u64,
                after: plan.bytes_after(model) as u64,
            };
            (ratio, found)
        }
        Target::Speedup(factor) => {
            let planner = Planner::new(model, runtime, profile, recipe)?;
            let dense = TokenTime::measure(model, runtime)?;
            // Of the embedding a token reads one row, unless it is the output head too.
            let unread = model.bytes() - model.bytes_per_token();
            let speed = |plan: &Plan| dense.speed_at(plan.bytes_after(model) - unread);
            let fast_enough = |plan: &Plan| speed(plan) >= factor * dense.speed();
            let Some((ratio, plan)) = planner.smallest_ratio(fast_enough)? else {
                bail!(
                    "{asked} is out of reach: at the highest ratio generation should be {:.2} times as fast, for only so much of its time is the weights' ({:.0} %) and not all of them are pruned",
                    speed(&planner.most()?) / dense.speed(),
                    100.0 * dense.per_byte * dense.bytes as f64 / dense.seconds
                );
            };
            let found = Found::Speed {
                bytes_before: dense.bytes as u64,
                bytes_after: (plan.bytes_after(model) - unread) as u64,
                before: dense.speed(),
                predicted: speed(&plan),
            };
            (ratio, found)
        }
        Target::PerplexityRise(limit) => {
            find_by_perplexity(limit, loaded, options, calibrated, recipe)
                .with_context(|| format!("looking for the ratio of {asked}"))?
        }
    };
    let found = Some(found);
    Ok(Goal { ratio, found })
}

/// The ratio whose perplexity on the text kept for judging rises by at most `limit`.
fn find_by_perplexity(
    limit: f64,
    loaded: &Loaded,
    options: &ModelOptions,
    calibrated: &mut Calibrated,
    recipe: Recipe,
) -> Result<(f64, Found)> {
    let (tokens, bos) = (calibrated.judge.clone(), calibrated.bos);
    let judge = |model: &Model| effect::perplexity(model, &loaded.runtime, &tokens, bos);
    let dense = judge(&loaded.model)?;
    let bar = progress::bar("looking for the ratio", 0, "models");
    let found = search::largest_ratio(limit, |ratio| -> Result<f64> {
        // Pruning rewrites the map, and the dense model is needed again.
        let mut model = options.load_again(loaded)?;
        calibrated.prune(&mut model, &loaded.runtime, recipe, ratio, &mut ignore)?;
        let rise = judge(&model)? / dense - 1.0;
        tracing::info!("ratio {ratio:.4}: perplexity {:+.1} %", rise * 100.0);
        bar.inc(1);
        Ok(rise)
    })?;
    bar.finish_and_clear();
    let (ratio, rise) = found.within;
    if ratio == 0.0 {
        bail!(
            "it is out of reach: of the ratios tried the smallest is too large already ({}); allow more, or calibrate on more text",
            found.beyond.map(beyond_words).unwrap_or_default()
        );
    }
    let found = Found::Perplexity {
        tokens: tokens.len(),
        dense,
        rise,
        beyond: found.beyond,
    };
    Ok((ratio, found))
}

/// Prunes in place by a ratio. The profile is given back before memory is looked at.
pub fn prune(
    model: &mut Model,
    runtime: &Runtime,
    mut calibrated: Calibrated,
    recipe: Recipe,
    ratio: f64,
) -> Result<Pruned> {
    let before = Snapshot::take(model);
    let start = Instant::now();
    let bar = progress::bar("pruning", model.layers.len() as u64, "layers");
    let plan = calibrated.prune(model, runtime, recipe, ratio, &mut progress::of(&bar))?;
    bar.finish_and_clear();
    let time = start.elapsed();
    drop(calibrated);
    Ok(Pruned {
        ratio,
        recipe,
        plan,
        before,
        after: Snapshot::take(model),
        time,
        repeated: false,
        found: None,
        effects: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_number_and_a_unit() {
        for (text, bytes) in [
            ("80MB", 80_000_000),
            ("76.5 MiB", 80_216_064),
            ("1GiB", 1 << 30),
            ("2GB", 2_000_000_000),
            ("7kB", 7000),
            ("7KiB", 7168),
            ("123B", 123),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "80", "MB", "80 mb", "-1MB", "nanMB", "infB", "0B", "80TB5",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_speedup_is_above_1_and_a_rise_above_0_per_cent() {
        assert_eq!(parse_speedup("1.3x"), Ok(1.3));
        assert_eq!(parse_speedup("2"), Ok(2.0));
        assert!(
            ["1x", "0.5", "x", "nan", "inf", "-2x"]
                .iter()
                .all(|t| parse_speedup(t).is_err())
        );
        assert_eq!(parse_rise("+10%"), Ok(0.1));
        assert_eq!(parse_rise("2.5%"), Ok(0.025));
        assert!(
            ["10", "+0%", "-3%", "%", "+-3%", "nan%"]
                .iter()
                .all(|t| parse_rise(t).is_err())
        );
    }

    #[test]
    fn what_is_asked_reads_as_it_was_typed() {
        assert_eq!(
            typed(Target::PerplexityRise(parse_rise("+7%").unwrap())),
            "--max-ppl +7%"
        );
        assert_eq!(typed(Target::Speedup(1.3)), "--speedup 1.3x");
        for text in ["80MB", "76MiB", "1GiB", "1500B", "7kB"] {
            let target = Target::Bytes(parse_size(text).unwrap());
            assert_eq!(typed(target), format!("--fit {text}"));
        }
    }
}
