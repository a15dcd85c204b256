//! `--calib` and what belongs to it: where calibration text comes from, and profiles that are kept.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{ArgMatches, Args, Command};
use flapjack::generate::Texts;
use flapjack::gguf::GgufFile;
use flapjack::hub;
use flapjack::kernels::Runtime;
use flapjack::model::{Layer, Model};
use flapjack::progress::Progress;
use flapjack::prune::{
    self, Calibration, Collected, CurveOptions, Curves, Effort, Evidence, Groups, Origin, Outcome,
    OutcomeKey, Plan, Profile, ProfileError, PruneError, PruneErrorKind, Recipe, Restore,
    StoredProfile, calibrate, curves, groups, outcome, sequential, store,
};
use flapjack::tokenize::Tokenizer;

use super::memory;
use super::options::Loaded;
use super::progress;
use super::pruning::{MethodOptions, parse_size};
use super::report::{mebibytes, plural};

/// Tokens that are used of a text of the user's unless --calib-tokens says otherwise, and at `--effort best`. Least squares
/// gain by more text for long: with three times as much, 5 % of the perplexity (`docs/pruning.md`).
const DEFAULT_TEXT_TOKENS: usize = 32_768;
const BEST_TEXT_TOKENS: usize = 98_304;
/// Tokens that a model writes for its own calibration unless it is asked for another number.
const DEFAULT_OWN_TOKENS: usize = 8192;
/// Tokens that are used of any text at `--effort fast`.
const FAST_TOKENS: usize = 4096;
/// Profiles in the cache folder, most of which are some MiB, and how many of them may be larger than [`LARGE`].
const MOST_KEPT: usize = 64;
const MOST_LARGE: usize = 4;
/// Outcomes of pruning in the cache folder, and bytes that one of them may have; all together may have twice as many.
const MOST_OUTCOMES: usize = 16;
const MOST_OUTCOME_BYTES: u64 = 1 << 30;
/// Covariances make profiles larger than this many bytes.
const LARGE: u64 = 32 << 20;
/// Fewer tokens than this do not tell whether a model is still a good one.
const LEAST_JUDGE: usize = 256;
/// More than this takes days.
const MOST_OWN_TOKENS: usize = 1 << 24;
/// A change of how own text is made must change this.
const OWN_TEXT_VERSION: u32 = 1;
/// No token of a usual vocabulary is longer on average than this in running text.
const BYTES_PER_TOKEN: usize = 16;
/// Tokens of a text of the user's that the effect of pruning is measured on.
pub const EFFECT_TOKENS: usize = 1024;
/// The field of JSON lines that holds the text.
const DEFAULT_FIELD: &str = "text";

#[derive(Debug, Clone, Default, Args)]
#[group(skip)]
pub struct CalibrationOptions {
    /// Calibrate on another text than the built-in one: a text file, a folder of text files, a file of JSON lines (.jsonl),
    /// - for standard input, or self:N for N tokens that the model writes itself (self alone: 8192)
    #[arg(long, value_name = "SOURCE", value_parser = parse_source)]
    pub calib: Option<Source>,
    /// The field of JSON lines that holds the text [default: text]
    #[arg(long, value_name = "NAME", requires = "calib")]
    pub calib_field: Option<String>,
    /// Calibrate on the first N tokens only [default: all of the built-in text and of self, 32768 of another; 98304 at --effort
    /// best, 4096 at --effort fast]
    #[arg(long, value_name = "N")]
    pub calib_tokens: Option<usize>,
    /// Memory for the covariances of least squares, for example 2GB; where those of all layers take more, they are collected in
    /// groups of layers, in more passes over the text [default: half of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
}

/// [`CalibrationOptions`] where they make sense only with `--prune` or what stands in its place.
#[derive(Debug, Clone)]
pub struct WithPrune(pub CalibrationOptions);

impl clap::FromArgMatches for WithPrune {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        CalibrationOptions::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl Args for WithPrune {
    fn augment_args(command: Command) -> Command {
        let options = CalibrationOptions::augment_args(Command::new(""));
        let options = options.get_arguments();
        command.args(options.map(|option| option.clone().requires(super::pruning::AMOUNT)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Where calibration text comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    BuiltIn,
    StandardInput,
    /// So many tokens that the model writes itself.
    Own(usize),
    Path(PathBuf),
}

fn parse_source(text: &str) -> Result<Source, String> {
    if let Some(tokens) = text.strip_prefix("self:") {
        return match tokens.parse() {
            Ok(n) if n <= MOST_OWN_TOKENS => Ok(Source::Own(n)),
            _ => Err(format!(
                "self: takes a number of tokens up to {MOST_OWN_TOKENS} (a file of this name is ./{text})"
            )),
        };
    }
    Ok(match text {
        "" => return Err("must name a text; leave --calib out to use the built-in one".into()),
        "-" => Source::StandardInput,
        "self" => Source::Own(DEFAULT_OWN_TOKENS),
        path => Source::Path(path.into()),
    })
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::BuiltIn => f.write_str("the built-in text"),
            Source::StandardInput => f.write_str("standard input"),
            Source::Own(_) => f.write_str("the model's own text"),
            Source::Path(path) => path.display().fmt(f),
        }
    }
}

/// A profile and what it took to get it.
#[derive(Debug)]
pub struct Calibrated {
    pub stored: StoredProfile,
    /// The profile's hash, where it is known already.
    pub hash: Option<String>,
    /// What the statistics were taken from, where restoration reads it too; else empty.
    pub text: Vec<u32>,
    /// What neither statistics nor curves were taken from, for judging.
    pub judge: Vec<u32>,
    /// Some of a text of the user's that statistics were not taken from; empty where there is none.
    pub unseen: Vec<u32>,
    pub bos: Option<u32>,
    /// Where covariances come from that the profile has not, because they do not fit in memory all at once.
    pub groups: Option<Groups>,
    pub time: Duration,
    /// How long loss curves took, where they were measured now.
    pub curves_time: Option<Duration>,
    /// It was not calibrated now: the profile was there.
    pub kept: bool,
}

impl Calibrated {
    /// Prunes in place by what was calibrated.
    pub fn prune(
        &mut self,
        model: &mut Model,
        runtime: &Runtime,
        recipe: Recipe,
        ratio: f64,
        progress: &mut Progress,
    ) -> Result<Plan, PruneError> {
        let profile = &self.stored.profile;
        let mut passes = passes_bar();
        let evidence = match &mut self.groups {
            Some(groups) => Evidence::in_groups(profile, groups, &mut passes),
            None => {
                let text = Calibration {
                    tokens: &self.text,
                    bos: self.bos,
                    covariance: true,
                };
                Evidence::with_text(profile, text)
            }
        };
        prune::prune(model, runtime, evidence, recipe, ratio, progress)
    }
}

/// What a profile must have.
struct Wanted {
    covariances: Covariances,
    curves: Option<CurveOptions>,
    /// Tokens that are kept for judging what pruning has done.
    judge: usize,
}

impl Wanted {
    fn new(
        model: &Model,
        recipe: Recipe,
        effort: Effort,
        judge: usize,
        memory: Option<u64>,
    ) -> Result<Self> {
        Ok(Self {
            judge,
            covariances: match recipe.wants_covariance() {
                true => Covariances::that_fit(model, recipe, memory)?,
                false => Covariances::None,
            },
            curves: recipe.wants_curves().then(|| CurveOptions {
                metric: recipe.metric,
                heads: recipe.heads,
                restore: recipe.restore.of_one_module(),
                levels: effort.curve_levels(),
            }),
        })
    }

    /// Everything that profiles of the same model and text differ by.
    fn collected(&self) -> Collected {
        Collected {
            covariances: match self.covariances {
                Covariances::None => prune::Covariances::None,
                Covariances::All => prune::Covariances::All,
                // However large the groups are, curves and outcomes are the same.
                Covariances::InGroups(_) => prune::Covariances::InGroups,
            },
            judge_tokens: self.judge,
            curves: self.curves.clone(),
        }
    }

    /// How a text is shared out.
    fn parts(&self, tokens: usize) -> Result<Parts, PruneError> {
        let (least, wanted) = match &self.curves {
            Some(options) => (curves::LEAST_TOKENS, options.levels.tokens),
            None => (0, 0),
        };
        let least_judge = self.judge.min(LEAST_JUDGE);
        let needed = calibrate::LEAST_TOKENS + least + least_judge;
        if tokens < needed {
            return Err(PruneErrorKind::TooShort {
                tokens,
                least: needed,
            }
            .into());
        }
        let curves = wanted.min(tokens / 4).max(least);
        let judge = self.judge.min(tokens / 4).max(least_judge);
        Ok(Parts {
            seen: tokens - curves - judge,
            curves,
        })
    }
}

/// Numbers of a text's tokens that statistics and then curves are taken from; those behind them are for judging.
#[derive(Debug, Clone, Copy)]
struct Parts {
    seen: usize,
    curves: usize,
}

/// How covariances are held.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Covariances {
    None,
    All,
    /// Of some layers at a time.
    InGroups(Vec<Range<usize>>),
}

impl Covariances {
    /// As many as there is memory for: `memory` bytes or half of what is free. Where not even those of one layer fit and the
    /// recipe can do without, it does, with a warning.
    fn that_fit(model: &Model, recipe: Recipe, memory: Option<u64>) -> Result<Self> {
        let layers = model.layers.iter().map(groups::covariance_bytes);
        let (needed, most): (u64, u64) = (layers.clone().sum(), layers.max().unwrap_or(0));
        let (available, which) = match memory {
            Some(bytes) => (Some(bytes), "--memory"),
            None => (
                memory::available().map(|free| free / 2),
                "half of the free memory",
            ),
        };
        tracing::debug!("covariances take {}", mebibytes(needed));
        let Some(available) = available.filter(|available| *available < needed) else {
            return Ok(Covariances::All);
        };
        let (needed, most) = (mebibytes(needed), mebibytes(most));
        let allowed = format!("{which} ({})", mebibytes(available));
        if recipe.metric.wants_covariance() {
            bail!(
                "the metric {} looks at the covariances of all layers at once, {needed}, and that is more than {allowed}; choose another --metric, or raise --memory",
                recipe.metric
            );
        }
        if let Some(ranges) = groups::partition(model, available) {
            return Ok(Covariances::InGroups(ranges));
        }
        let shortage = format!(
            "least squares need the covariances of one layer at least, {most}, and that is more than {allowed}"
        );
        if recipe.restore != Restore::Auto {
            bail!("{shortage}; --restore bias does without");
        }
        tracing::warn!("{shortage}; restoring by biases");
        Ok(Covariances::None)
    }
}

/// A profile from a file that the user names.
pub fn from_file(loaded: &Loaded, path: &Path, recipe: Recipe) -> Result<Calibrated> {
    let start = Instant::now();
    if recipe.restore == Restore::Sequential {
        bail!(
            "--restore sequential reads the calibration text itself, which no profile holds; name the text with --calib instead of --profile, or restore by lsq"
        );
    }
    let stored = StoredProfile::load(path).map_err(with_advice)?;
    let (fingerprint, name) = identity(loaded)?;
    stored
        .check_model(path, &fingerprint, &name)
        .map_err(with_advice)?;
    check_suits(path, &stored.profile, recipe)?;
    Ok(Calibrated {
        hash: StoredProfile::stated_hash(path),
        stored,
        text: Vec::new(),
        judge: Vec::new(),
        unseen: Vec::new(),
        bos: None,
        groups: None,
        time: start.elapsed(),
        curves_time: None,
        kept: true,
    })
}

/// What to do about a profile that cannot be used.
fn with_advice(error: ProfileError) -> anyhow::Error {
    match error {
        ProfileError::Io { .. } => error.into(),
        _ => anyhow!("{error}; `flapjack calibrate` makes one"),
    }
}

/// What to do about a text that is too short.
fn with_text_advice(error: PruneError) -> anyhow::Error {
    match error.kind {
        PruneErrorKind::TooShort { .. } => anyhow!(
            "{error}; name a longer text with --calib or leave it out to use the built-in one"
        ),
        _ => error.into(),
    }
}

/// Refuses a profile that lacks what the recipe needs.
fn check_suits(path: &Path, profile: &Profile, recipe: Recipe) -> Result<()> {
    let name = path.display();
    if recipe.wants_curves() {
        let Some(curves) = &profile.curves else {
            bail!(
                "{name} has no loss curves; make one that has with `flapjack calibrate --structure curves`, or prune with --effort fast or another --structure"
            );
        };
        let Curves {
            metric,
            heads,
            restore,
            ..
        } = curves;
        let theirs = (*metric, *heads, *restore);
        if theirs != (recipe.metric, recipe.heads, recipe.restore.of_one_module()) {
            bail!(
                "the loss curves of {name} were measured with --metric {metric} --heads {heads} --restore {restore}; prune with the same, or make another profile with `flapjack calibrate --structure curves --metric {} --heads {} --restore {}`",
                recipe.metric,
                recipe.heads,
                recipe.restore
            );
        }
    }
    if profile.has_covariance() || !recipe.wants_covariance() {
        return Ok(());
    }
    if recipe.metric.wants_covariance() {
        let metric = recipe.metric;
        bail!(
            "{name} has no covariances, which --metric {metric} needs; make one that has with `flapjack calibrate --metric {metric}`"
        );
    }
    if recipe.restore != Restore::Auto {
        let restore = recipe.restore;
        bail!(
            "{name} has no covariances, which --restore {restore} needs; make one that has with `flapjack calibrate --restore {restore}`, or prune with --restore bias"
        );
    }
    tracing::warn!(
        "{name} has no covariances, so that biases have to make up for what goes; `flapjack calibrate --restore lsq` makes one that has"
    );
    Ok(())
}

/// The fingerprint and the name of the model's file. It is mapped anew, because packing has rearranged the other map.
fn identity(loaded: &Loaded) -> Result<(String, String)> {
    let path = loaded.model.path();
    let name = path.file_name().unwrap_or(path.as_os_str());
    Ok((
        GgufFile::open(path)?.fingerprint(),
        name.to_string_lossy().into_owned(),
    ))
}

impl CalibrationOptions {
    pub fn reads_standard_input(&self) -> bool {
        self.calib == Some(Source::StandardInput)
    }

    /// Calibrates as the method needs it, or takes the profile of an earlier run from the cache folder if `cached`.
    pub fn calibrate(
        &self,
        loaded: &Loaded,
        method: &MethodOptions,
        cached: bool,
    ) -> Result<Calibrated> {
        self.prepare(loaded, method, cached, 0)?.carry_out(loaded)
    }

    /// Everything up to where the work begins. `judge` tokens of the text are kept for judging, if it has as many times four.
    pub fn prepare(
        &self,
        loaded: &Loaded,
        method: &MethodOptions,
        cached: bool,
        judge: usize,
    ) -> Result<Task> {
        let source = self.calib.clone().unwrap_or(Source::BuiltIn);
        let start = Instant::now();
        let bos = loaded
            .tokenizer
            .bos()
            .filter(|_| loaded.tokenizer.adds_bos());
        // Own text is known by how it is made, so that it need not be made to find its profile.
        let (tokens, beyond, text) = match source {
            Source::Own(n) => {
                let n = self.calib_tokens.map_or(n, |limit| n.min(limit));
                let making = store::hash_making(&("own text", OWN_TEXT_VERSION, n));
                (vec![0; n], Vec::new(), making)
            }
            _ => {
                let (tokens, beyond) = self.tokens_of(&source, &loaded.tokenizer, method.effort)?;
                let hash = store::hash_tokens(&tokens, bos);
                (tokens, beyond, hash)
            }
        };
        let recipe = method.recipe_with_text(&loaded.model, tokens.len());
        if recipe.restore == Restore::Sequential {
            let streams = sequential::bytes(&loaded.model, tokens.len());
            tracing::info!(
                "restoring in sequence: about three more passes over the text, whose streams take {}",
                mebibytes(streams)
            );
        }
        let effort = method.effort;
        let wanted = Wanted::new(&loaded.model, recipe, effort, judge, self.memory)?;
        let parts = wanted
            .parts(tokens.len())
            .map_err(with_text_advice)
            .with_context(|| format!("calibrating on {source}"))?;
        let (model, model_name) = identity(loaded)?;
        Ok(Task {
            origin: Origin {
                model,
                model_name,
                text,
                source: source.to_string(),
                tokens: tokens.len(),
                collected: wanted.collected(),
                flapjack: env!("CARGO_PKG_VERSION").to_owned(),
            },
            source,
            tokens,
            beyond,
            bos,
            wanted,
            parts,
            recipe,
            cached,
            time: start.elapsed(),
        })
    }

    /// The tokens of a text that is there to be read, and some of those behind them.
    fn tokens_of(
        &self,
        source: &Source,
        tokenizer: &Tokenizer,
        effort: Effort,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let limit = self.calib_tokens.unwrap_or(match (source, effort) {
            (_, Effort::Fast) => FAST_TOKENS,
            (Source::BuiltIn, _) => usize::MAX,
            (_, Effort::Best) => BEST_TEXT_TOKENS,
            _ => DEFAULT_TEXT_TOKENS,
        });
        let all = limit.saturating_add(EFFECT_TOKENS);
        let bytes = all.saturating_mul(BYTES_PER_TOKEN);
        let text = source.read(bytes, self.calib_field.as_deref())?;
        let mut tokens = first_tokens(tokenizer, &text, all)?;
        let beyond = tokens.split_off(limit.min(tokens.len()));
        if self.calib_tokens.is_none() && tokens.len() == limit {
            tracing::info!(
                "calibrating on the first {limit} tokens of {source}; --calib-tokens takes more"
            );
        }
        Ok((tokens, beyond))
    }
}

/// A calibration that is about to be.
pub struct Task {
    origin: Origin,
    source: Source,
    /// Zeros in the place of a text that the model has not written yet.
    tokens: Vec<u32>,
    /// Some that follow those.
    beyond: Vec<u32>,
    bos: Option<u32>,
    wanted: Wanted,
    parts: Parts,
    recipe: Recipe,
    cached: bool,
    /// What it took so far.
    time: Duration,
}

impl Task {
    /// What the text is enough for.
    pub fn recipe(&self) -> Recipe {
        self.recipe
    }

    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Tokens that statistics are taken from.
    pub fn seen(&self) -> usize {
        self.parts.seen
    }

    /// What it took so far.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// The hash of the profile in the cache folder, which is not read for it.
    pub fn hash(&self) -> Option<String> {
        let path = kept_path(&self.origin).filter(|_| self.cached)?;
        StoredProfile::stated_hash(&path)
    }

    /// Calibrates, or takes the profile of an earlier run.
    pub fn carry_out(self, loaded: &Loaded) -> Result<Calibrated> {
        let Task {
            origin,
            source,
            mut tokens,
            beyond,
            bos,
            wanted,
            parts,
            recipe,
            cached,
            time: before,
        } = self;
        let start = Instant::now();
        let sequential = recipe.restore == Restore::Sequential;
        let found = if cached { find(&origin) } else { None };
        let ranges = match &wanted.covariances {
            Covariances::InGroups(ranges) => Some(ranges),
            _ => None,
        };
        let reads_text = found.is_none() || sequential || wanted.judge > 0 || ranges.is_some();
        if matches!(source, Source::Own(_)) && reads_text {
            tokens = own_text(loaded, tokens.len(), bos)?;
        }
        // Curves are measured on text that the statistics have not seen.
        let (seen, rest) = tokens.split_at(parts.seen);
        let (held_back, judge) = rest.split_at(parts.curves);
        let text = if sequential {
            seen.to_vec()
        } else {
            Vec::new()
        };
        let judge = judge.to_vec();
        let unseen = match source {
            Source::BuiltIn => Vec::new(),
            Source::Own(_) if !reads_text => Vec::new(),
            _ if beyond.len() == EFFECT_TOKENS => beyond,
            _ => held_back[..held_back.len().min(EFFECT_TOKENS)].to_vec(),
        };
        let calibration = |tokens| Calibration {
            tokens,
            bos,
            covariance: wanted.covariances == Covariances::All,
        };
        let mut groups = ranges.map(|ranges| {
            let curves = wanted.curves.is_some() && found.is_none();
            in_groups(&loaded.model, ranges, calibration(seen), curves)
        });
        if let Some((profile, hash)) = found {
            return Ok(Calibrated {
                stored: StoredProfile { origin, profile },
                hash: Some(hash),
                text,
                judge,
                unseen,
                bos,
                groups,
                time: before + start.elapsed(),
                curves_time: None,
                kept: true,
            });
        }
        let bar = progress::bar("calibrating", seen.len() as u64, "tokens");
        let mut profile = prune::calibrate(
            &loaded.model,
            &loaded.runtime,
            calibration(seen),
            &mut progress::of(&bar),
        )
        .map_err(with_text_advice)
        .with_context(|| format!("calibrating on {source}"))?;
        bar.finish_and_clear();
        let time = before + start.elapsed();

        let start = Instant::now();
        if let Some(options) = &wanted.curves {
            let modules = 2 * loaded.model.layers.len() as u64;
            let bar = progress::bar("measuring loss curves", modules, "modules");
            let (model, runtime) = (&loaded.model, &loaded.runtime);
            let text = calibration(held_back);
            let mut passes = passes_bar();
            let evidence = match &mut groups {
                Some(groups) => Evidence::in_groups(&profile, groups, &mut passes),
                None => Evidence::profile(&profile),
            };
            let progress = &mut progress::of(&bar);
            let curves = curves::measure(model, runtime, evidence, text, options, progress)
                .map_err(with_text_advice)
                .with_context(|| format!("measuring loss curves on {source}"))?;
            bar.finish_and_clear();
            profile.curves = Some(curves);
        }
        let mut calibrated = Calibrated {
            curves_time: wanted.curves.as_ref().map(|_| start.elapsed()),
            stored: StoredProfile { origin, profile },
            hash: None,
            text,
            judge,
            unseen,
            bos,
            groups,
            time,
            kept: false,
        };
        if cached {
            calibrated.hash = keep(&calibrated.stored);
        }
        Ok(calibrated)
    }
}

/// Groups of layers, and what they cost, said before it is paid.
fn in_groups(model: &Model, ranges: &[Range<usize>], text: Calibration, curves: bool) -> Groups {
    let bytes = |layers: &[Layer]| layers.iter().map(groups::covariance_bytes).sum();
    let most = ranges.iter().map(|r| bytes(&model.layers[r.clone()])).max();
    tracing::info!(
        "covariances of {} are collected in {} of at most {}, which takes {:.1} times the {} through the model",
        mebibytes(bytes(&model.layers)),
        plural(ranges.len(), "group"),
        mebibytes(most.unwrap_or(0)),
        groups::passes(ranges, curves),
        plural(text.tokens.len(), "token"),
    );
    Groups::new(ranges.to_vec(), text)
}

/// A bar for each pass over the text.
fn passes_bar() -> impl FnMut(usize, usize) -> ControlFlow<()> + Send {
    let mut bar = None;
    move |done, total| {
        let new = || progress::bar("covariances", total as u64, "tokens");
        bar.get_or_insert_with(new).set_position(done as u64);
        if done == total {
            bar = None;
        }
        ControlFlow::Continue(())
    }
}

/// So many tokens that the model writes, in texts that fill a sequence of calibration each.
fn own_text(loaded: &Loaded, tokens: usize, bos: Option<u32>) -> Result<Vec<u32>> {
    let tokenizer = &loaded.tokenizer;
    let sequence = calibrate::SEQUENCE.min(loaded.model.config.context_length);
    // Where calibration puts the token that begins texts in front, it is not part of the text.
    let skip = usize::from(bos.is_some());
    // A control token says nothing by itself.
    let starts: Vec<u32> = (0..tokenizer.vocab_size() as u32)
        .filter(|token| !tokenizer.token_bytes(*token).is_empty())
        .collect();
    let texts = Texts {
        count: tokens.div_ceil((sequence - skip).max(1)),
        tokens: sequence,
        bos,
        starts: &starts,
        vocabulary: tokenizer.vocab_size(),
        seed: 0,
    };
    let bar = progress::bar("writing", (texts.count * texts.tokens) as u64, "tokens");
    let written = texts
        .write(&loaded.model, &loaded.runtime, &mut |done, _| {
            bar.set_position(done as u64);
            std::ops::ControlFlow::Continue(())
        })
        .context("writing the calibration text")?;
    bar.finish_and_clear();
    let mut own: Vec<u32> = written.iter().flat_map(|t| &t[skip..]).copied().collect();
    own.truncate(tokens);
    tracing::debug!(
        "the model wrote: {:?}",
        tokenizer.decode(&own[..own.len().min(sequence)])
    );
    Ok(own)
}

/// Where a profile of this origin is kept.
fn kept_path(origin: &Origin) -> Option<PathBuf> {
    let folder = hub::profiles_dir().ok()?;
    let (model, text) = (origin.model.get(..32)?, origin.text.get(..32)?);
    let collected = origin.collected.hash();
    let collected = collected.get(..16)?;
    let version = store::VERSION;
    Some(folder.join(format!("{model}-{text}-{collected}-v{version}.profile")))
}

/// The profile of an earlier run. One that cannot be used is made anew.
fn find(origin: &Origin) -> Option<(Profile, String)> {
    let path = kept_path(origin)?;
    if !path.exists() {
        return None;
    }
    match StoredProfile::load(&path) {
        Ok(stored)
            if (&stored.origin.model, &stored.origin.text) == (&origin.model, &origin.text)
                && (&stored.origin.collected, &stored.origin.flapjack)
                    == (&origin.collected, &origin.flapjack) =>
        {
            Some((stored.profile, StoredProfile::stated_hash(&path)?))
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!("{error}; calibrating again");
            None
        }
    }
}

/// Keeps a profile for the next run and returns its hash. A cache folder that cannot be written is no error: the profile is in
/// hand.
fn keep(stored: &StoredProfile) -> Option<String> {
    let path = kept_path(&stored.origin)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let result = fs::create_dir_all(folder)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(stored.save(&path)?));
    match result {
        Ok(hash) => {
            let (mut count, mut large) = (0, 0);
            forget_oldest(folder, "profile", |bytes| {
                let is_large = bytes > LARGE;
                let stays = count < MOST_KEPT && (large < MOST_LARGE || !is_large);
                count += usize::from(stays);
                large += usize::from(stays && is_large);
                stays
            });
            Some(hash)
        }
        Err(error) => {
            tracing::info!("the profile is not kept for the next run: {error}");
            None
        }
    }
}

/// Leaves those files of a cache folder with this extension that `stays` lets stay, asked with their sizes from the youngest to
/// the oldest.
fn forget_oldest(folder: &Path, extension: &str, mut stays: impl FnMut(u64) -> bool) {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = files
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .filter_map(|path| {
            let metadata = fs::metadata(&path).ok()?;
            Some((metadata.modified().ok()?, path, metadata.len()))
        })
        .collect();
    files.sort();
    for (_, path, bytes) in files.iter().rev() {
        if stays(*bytes) {
            continue;
        }
        if let Err(error) = fs::remove_file(path) {
            tracing::debug!("cannot remove {}: {error}", path.display());
        }
    }
}

/// Where an outcome with this key is kept.
fn outcome_path(key: &OutcomeKey) -> Option<PathBuf> {
    let folder = hub::profiles_dir().ok()?;
    let hash = key.hash();
    Some(folder.join(format!("{}-v{}.outcome", hash.get(..32)?, outcome::VERSION)))
}

/// The outcome of an earlier run. One that cannot be used is made anew.
pub fn find_outcome(key: &OutcomeKey) -> Option<Outcome> {
    let path = outcome_path(key)?;
    if !path.exists() {
        return None;
    }
    Outcome::load(&path, key)
        .map_err(|error| tracing::warn!("{error}; pruning anew"))
        .ok()
}

/// Keeps an outcome for the next run, if that is possible.
pub fn keep_outcome(outcome: &Outcome, key: &OutcomeKey) {
    let Some(path) = outcome_path(key) else {
        return;
    };
    if outcome.bytes() as u64 > MOST_OUTCOME_BYTES {
        tracing::debug!("the outcome is too large to be kept");
        return;
    }
    // The folder is there, for the profile is in it.
    match outcome.save(&path, key) {
        Ok(()) => {
            let folder = path.parent().unwrap_or(Path::new("."));
            let (mut count, mut all) = (0, 0);
            forget_oldest(folder, "outcome", |bytes| {
                count += 1;
                all += bytes;
                count <= MOST_OUTCOMES && all <= 2 * MOST_OUTCOME_BYTES
            });
        }
        Err(error) => tracing::info!("the outcome is not kept for the next run: {error}"),
    }
}

/// The first `limit` tokens of a text, without tokenising all of a long one.
pub fn first_tokens(tokenizer: &Tokenizer, text: &str, limit: usize) -> Result<Vec<u32>> {
    let mut end = limit.saturating_mul(BYTES_PER_TOKEN).min(text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let mut tokens = tokenizer.encode(&text[..end])?;
    tokens.truncate(limit);
    Ok(tokens)
}

impl Source {
    /// The text, or at least its first `limit` bytes.
    fn read(&self, limit: usize, field: Option<&str>) -> Result<String> {
        let mut text = Text {
            text: String::new(),
            limit,
            field,
        };
        match self {
            Source::BuiltIn => text.append(calibrate::TEXT),
            // There is none before the model has written it.
            Source::Own(_) => {}
            Source::StandardInput => text.add("standard input", io::stdin().lock(), false)?,
            Source::Path(path) if path.is_dir() => text.add_folder(path)?,
            Source::Path(path) => text.add_file(path)?,
        }
        Ok(text.text)
    }
}

/// Text in the making; it stops growing at its limit.
struct Text<'a> {
    text: String,
    limit: usize,
    field: Option<&'a str>,
}

impl Text<'_> {
    fn is_full(&self) -> bool {
        self.text.len() >= self.limit
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let lines = matches!(extension, "jsonl" | "ndjson");
        self.add(
            &path.display().to_string(),
            BufReader::with_capacity(1 << 20, file),
            lines,
        )
    }

    /// All text files of a folder and of the folders in it, in the order of their paths. Hidden ones, and those that are
    /// not text, are passed over.
    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        let mut files = Vec::new();
        list_files(folder, &mut files)?;
        files.sort();
        let mut texts = 0;
        for file in files {
            if self.is_full() {
                break;
            }
            if !looks_like_text(&file)? {
                tracing::warn!("{} is passed over: it is not text", file.display());
                continue;
            }
            self.add_file(&file)?;
            texts += 1;
        }
        if texts == 0 {
            bail!("{} has no text files in it", folder.display());
        }
        Ok(())
    }

    fn add(&mut self, name: &str, mut reader: impl BufRead, json_lines: bool) -> Result<()> {
        if json_lines || self.field.is_some() {
            return self.add_json_lines(name, reader);
        }
        let room = self.limit.saturating_sub(self.text.len());
        let mut bytes = Vec::new();
        reader
            .by_ref()
            .take(room as u64)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {name}"))?;
        let text = match str::from_utf8(&bytes) {
            Ok(text) => text,
            // The limit may have cut a character in two.
            Err(error) if error.error_len().is_none() && bytes.len() == room => {
                str::from_utf8(&bytes[..error.valid_up_to()])?
            }
            Err(error) => bail!(
                "{name} is not UTF-8 text: the byte at offset {} is out of place",
                error.valid_up_to()
            ),
        };
        self.append(text);
        Ok(())
    }

    fn add_json_lines(&mut self, name: &str, reader: impl BufRead) -> Result<()> {
        let field = self.field.unwrap_or(DEFAULT_FIELD);
        for (i, line) in reader.lines().enumerate() {
            if self.is_full() {
                break;
            }
            let at = || format!("{name}, line {}", i + 1);
            let line = line.with_context(|| format!("cannot read {}", at()))?;
            if line.trim().is_empty() {
                continue;
            }
            let value: serde_json::Value =
                serde_json::from_str(&line).with_context(|| format!("{} is not JSON", at()))?;
            let text = value.get(field).and_then(|v| v.as_str()).ok_or_else(|| {
                let fields: Vec<&str> = value
                    .as_object()
                    .into_iter()
                    .flat_map(|o| o.iter())
                    .filter(|(_, v)| v.is_string())
                    .map(|(key, _)| key.as_str())
                    .collect();
                match fields[..] {
                    [] => anyhow!("{} has no field of text {field:?}, nor any other", at()),
                    _ => anyhow!(
                        "{} has no field of text {field:?}; it has {fields:?}, choose one with --calib-field",
                        at()
                    ),
                }
            })?;
            self.append(text);
        }
        Ok(())
    }

    /// Texts are apart by an empty line.
    fn append(&mut self, text: &str) {
        if !self.text.is_empty() && !text.is_empty() {
            self.text.push_str("\n\n");
        }
        self.text.push_str(text);
    }
}

fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let cannot = || format!("cannot read the folder {}", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A link to a folder is not followed: it may lead back.
        let kind = entry.file_type().with_context(cannot)?;
        if kind.is_dir() {
            list_files(&entry.path(), files)?;
        } else if entry.path().is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Whether the beginning of a file is UTF-8 without zero bytes.
fn looks_like_text(path: &Path) -> Result<bool> {
    const BEGINNING: u64 = 8192;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(BEGINNING).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(!bytes.contains(&0)
        && match str::from_utf8(&bytes) {
            Ok(_) => true,
            Err(error) => error.error_len().is_none() && bytes.len() as u64 == BEGINNING,
        })
}
