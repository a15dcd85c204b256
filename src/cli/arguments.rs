//! Arguments that several subcommands share, and the engine's options that they stand for.

use std::fs::File;
use std::io::{self, BufReader};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::builder::{NonEmptyStringValueParser, PossibleValuesParser, TypedValueParser, ValueHint};
use clap::parser::ValueSource;
use clap::{ArgGroup, ArgMatches, Args, Command, FromArgMatches, Id, ValueEnum};
use flapjack::engine::{
    Budget, Cache, CalibrationOptions, Engine, HeadType, HealOptions, MethodOptions, OpenOptions,
    Pack, PruneOptions, SparseOptions, Target, TextSource, Tune, What,
};
use flapjack::model::CacheType;
use flapjack::prune::bits::Moves;
use flapjack::prune::sparse::{Allocate, Sparsity};
use flapjack::prune::{self, Effort, HeadUnit, Method, Metric, Restore, Structure};
use flapjack::{engine, hub};

use super::overrides::OverrideArgs;
use super::words::UNITS;
use super::{heading, progress, words};

/// Options that can be refused only when they are looked at together. The program ends with 2, as where the parser refuses.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUse(pub String);

impl WrongUse {
    pub fn new(words: impl Into<String>) -> Self {
        Self(words.into())
    }
}

/// The options of a command that are typed, or in the environment, and so no defaults. It must be the first field of its structure, since
/// the parser hands values over in the order of the fields.
#[derive(Debug, Clone, Default)]
pub struct Given(Vec<Id>);

impl Given {
    pub fn has(&self, id: &str) -> bool {
        self.0.iter().any(|given| given == id)
    }
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = matches.ids().filter(|id| {
            let source = matches.value_source(id.as_str());
            source.is_some_and(|source| source != ValueSource::DefaultValue)
        });
        Ok(Self(given.cloned().collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Given {
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

// ---- the model ----

#[derive(Debug, Args)]
#[command(next_help_heading = heading::MODEL)]
pub struct ModelArgs {
    /// A model's file or name [default: SmolLM2-135M-Instruct, fetched once]
    ///
    /// A GGUF file, or a folder with config.json and safetensors files. Or a model of the Hugging Face hub, like org/repo:Q4_K_M, of Ollama's,
    /// like ollama:llama3.2, or of LM Studio's, like lmstudio:publisher/repo. What is fetched from the hub is kept in the Hugging Face cache, the
    /// default model in flapjack's.
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// A model of the hub: ORG/REPO, ORG/REPO:TYPE or ORG/REPO/FILE
    ///
    /// Also -hf. No file here is meant, even if there is one of that name.
    #[arg(long, visible_alias = "hf-repo", value_name = "REPO", conflicts_with = "model", value_parser = NonEmptyStringValueParser::new())]
    pub hf: Option<String>,
    #[command(flatten)]
    pub overrides: OverrideArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
}

impl ModelArgs {
    /// The path of the model, which is fetched first if need be.
    pub fn path(&self) -> Result<PathBuf> {
        progress::model(self.name().as_deref())
    }

    pub fn open(&self) -> Result<Engine> {
        let engine = Engine::open(self.path()?, self.options())?;
        words::log(engine.notices());
        Ok(engine)
    }

    /// The model as it was named; `None` for the default model.
    pub fn name(&self) -> Option<PathBuf> {
        let hub = self.hf.as_ref().map(|name| of_hub(name));
        hub.or_else(|| self.model.clone())
    }

    /// What clients call the model unless they are told otherwise.
    pub fn title(&self, engine: &Engine) -> String {
        let name = self.name();
        let named = name.and_then(|name| hub::ModelName::read(&name).ok());
        let path = engine.model().path();
        match named {
            // The file is named by its hash.
            Some(hub::ModelName::Ollama(name)) => name,
            _ => hub::repository_of(path).unwrap_or_else(|| flapjack::checkpoint::name_of(path)),
        }
    }

    pub fn options(&self) -> OpenOptions {
        OpenOptions {
            overrides: self.overrides.overrides(),
            ..self.machine.options()
        }
    }
}

/// A repository's name as a model that can be nothing else.
pub fn of_hub(repository: &str) -> PathBuf {
    let bare = repository.strip_prefix("hf:").unwrap_or(repository);
    // Addresses say so themselves.
    match bare.contains("://") {
        true => bare.into(),
        false => format!("hf:{bare}").into(),
    }
}

/// How the machine is used.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = heading::MACHINE)]
pub struct MachineArgs {
    #[command(flatten)]
    threads: ThreadArgs,
    /// Leave the weights as they lie in the file [default: rearrange them in place if the memory suffices]
    ///
    /// Their pages stay shared with the file, and can be evicted: slower, for models near the size of the memory.
    #[arg(long, visible_alias = "no-repack")]
    pub no_pack: bool,
    /// Read weights as is usual for the processor's maker [default: as measurements found the fastest here]
    ///
    /// These take a tenth of a second at the first three starts with a type of weights, and are kept in the cache folder. Results do
    /// not depend on them.
    #[arg(long)]
    pub no_tune: bool,
}

#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = heading::MACHINE)]
pub struct ThreadArgs {
    /// Threads to compute with [default: one for each processor]
    ///
    /// From 1 to 1024; -1 stands for the default.
    #[arg(short, long, value_name = "N", value_parser = parse_threads)]
    threads: Option<Threads>,
}

impl ThreadArgs {
    pub fn number(self) -> Option<usize> {
        match self.threads {
            Some(Threads::Number(n)) => Some(n.into()),
            Some(Threads::OneEach) | None => None,
        }
    }
}

/// How many threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Threads {
    OneEach,
    Number(u16),
}

impl MachineArgs {
    pub fn options(&self) -> OpenOptions {
        OpenOptions {
            threads: self.threads.number(),
            pack: match self.no_pack {
                true => Pack::Never,
                false => Pack::Auto,
            },
            tune: match self.no_tune {
                true => Tune::Never,
                false => Tune::Auto,
            },
            ..OpenOptions::default()
        }
    }
}

#[derive(Debug, Clone, Copy, Default, Args)]
pub struct CacheArgs {
    /// Store the KV cache in this type; q8_0 takes about half the bytes
    #[arg(help_heading = heading::MACHINE, long = "kv", value_name = "TYPE", value_enum, default_value_t)]
    cache_type: CacheName,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum CacheName {
    #[default]
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl CacheArgs {
    pub fn cache_type(self) -> CacheType {
        match self.cache_type {
            CacheName::F16 => CacheType::F16,
            CacheName::Q8_0 => CacheType::Q8_0,
        }
    }
}

// ---- how much to prune, and how ----

#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new(AMOUNT).args(["prune", "fit", "speedup", "max_ppl", "sparse"]).multiple(true))]
pub struct PruningArgs {
    #[command(flatten)]
    amount: Amount,
    #[command(flatten)]
    sparse: SparseArgs,
    #[command(flatten)]
    bits: BitsArgs,
    #[command(flatten)]
    calibration: WithAmount<CalibrationArgs>,
    /// Use a profile that `flapjack calibrate` made, and do not calibrate
    #[arg(help_heading = heading::CALIBRATION, long, value_name = "FILE", requires = AMOUNT, conflicts_with_all = ["calib", "calib_field", "calib_mix", "calib_tokens", "memory", "max_ppl"])]
    profile: Option<PathBuf>,
    /// Calibrate and prune anew even if the cache folder has the profile or the outcome, and keep neither there
    #[arg(help_heading = heading::CALIBRATION, long, requires = AMOUNT)]
    no_profile_cache: bool,
    #[command(flatten)]
    method: WithAmount<MethodArgs>,
    #[command(flatten)]
    heal: WithAmount<HealArgs>,
}

impl PruningArgs {
    /// What to prune; `None` if no amount is given.
    pub fn options(&self, effects: bool) -> Result<Option<PruneOptions>> {
        let sparse = self.sparse.options();
        let target = match (self.amount.target(), sparse) {
            (None, None) => return Ok(None),
            (None, Some(_)) => Target::Ratio(0.0),
            (Some(target), _) => target,
        };
        Ok(Some(PruneOptions {
            target,
            method: self.method.0.options(),
            sparse,
            moves: self.bits.only.unwrap_or_default(),
            head: self.bits.head.unwrap_or_default(),
            heal: self.heal.0.options(),
            budget: self.method.0.budget,
            calibration: self.calibration.0.options()?,
            profile: self.profile.clone(),
            cache: match self.no_profile_cache {
                true => Cache::Nothing,
                false => Cache::All,
            },
            effects,
        }))
    }

    /// What to prune; `None` if that is nothing.
    pub fn options_if_any(&self, effects: bool) -> Result<Option<PruneOptions>> {
        let options = self.options(effects)?;
        let some = |options: &PruneOptions| {
            options.target != Target::Ratio(0.0)
                || options.sparse.is_some()
                || options.head != HeadType::Keep
        };
        Ok(options.filter(some))
    }

    pub fn reads_standard_input(&self) -> bool {
        matches!(self.calibration.0.calib, Some(TextSource::Reader(_)))
    }
}

/// The name of the group of [`Amount`] and `--sparse`, one of which other arguments need.
pub const AMOUNT: &str = "amount";

/// How much to prune.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = heading::AMOUNT)]
#[group(id = "target", multiple = false)]
struct Amount {
    /// Remove this share of the layers' weights, like 0.3
    ///
    /// At least 0 and below 0.9, counted in parameters of attention and MLPs over all layers.
    #[arg(long, visible_alias = "ratio", value_name = "RATIO", value_parser = parse_ratio)]
    prune: Option<f64>,
    /// Remove as little as makes the weights fit in so many bytes, like 80MB
    ///
    /// All weights of the model count. Units: B, kB, KiB, MB, MiB, GB, GiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_fit)]
    fit: Option<u64>,
    /// Remove as little as should make generation so much faster, like 1.3x
    #[arg(long, value_name = "FACTOR", value_parser = parse_speedup)]
    speedup: Option<f64>,
    /// Remove as much as raises the perplexity by at most so much, like +10%
    ///
    /// It is measured on held-back calibration text.
    #[arg(long, value_name = "PERCENT", value_parser = parse_rise)]
    max_ppl: Option<f64>,
}

/// Smaller types.
#[derive(Debug, Clone, Copy, Default, Args)]
#[group(skip)]
pub struct BitsArgs {
    /// How --fit, --speedup and --max-ppl make the model smaller: by smaller types and narrower modules, whichever costs less for a
    /// byte, or by one of them only
    #[arg(help_heading = heading::AMOUNT, long, value_name = "WAY", value_parser = one_of(&[Moves::Widths, Moves::Bits], Moves::name), requires = AMOUNT, conflicts_with = "sparse")]
    only: Option<Moves>,
    /// The type of the output head: keep, auto (the smallest that hardly changes predictions), or one like q5_0
    #[arg(help_heading = heading::AMOUNT, long, value_name = "TYPE", value_parser = HeadType::from_str, requires = AMOUNT, conflicts_with = "sparse")]
    head: Option<HeadType>,
}

impl Amount {
    fn target(&self) -> Option<Target> {
        let ratio = self.prune.map(Target::Ratio);
        ratio
            .or(self.fit.map(Target::Bytes))
            .or(self.speedup.map(Target::Speedup))
            .or(self.max_ppl.map(Target::PerplexityRise))
    }
}

/// Which single weights go.
#[derive(Debug, Clone, Copy, Default, Args)]
#[group(skip)]
pub struct SparseArgs {
    /// Remove single weights, like wanda:0.5 or wanda:2:4
    ///
    /// METHOD:SHARE removes this share of the weights, METHOD:N:M lets N of every M stay; the method is wanda, magnitude or sparsegpt.
    /// With --prune heads and channels go first.
    #[arg(help_heading = heading::AMOUNT, long, value_name = "METHOD:SHARE", value_parser = parse_sparsity)]
    sparse: Option<Sparsity>,
    /// How --sparse shares the budget out: the same share of every module, or by loss curves
    #[arg(help_heading = heading::METHOD, long, value_name = "HOW", value_parser = one_of(Allocate::ALL, Allocate::name), default_value_t = Allocate::default(), requires = "sparse")]
    allocate: Allocate,
}

impl SparseArgs {
    fn options(self) -> Option<SparseOptions> {
        self.sparse.map(|sparsity| SparseOptions {
            allocate: self.allocate,
            ..sparsity.into()
        })
    }
}

/// Training behind pruning.
#[derive(Debug, Clone, Copy, Default, Args)]
#[group(skip)]
#[command(next_help_heading = heading::HEALING)]
pub struct HealArgs {
    /// Train what is left, for so long or on so many tokens
    ///
    /// The pruned model is trained towards the dense one, for a time like 90s or 5m, or on so many tokens, like 200000 or 500k. It is trained on the calibration text; what it takes of memory is told before. With the same number of tokens the outcome is the
    /// same to the bit.
    #[arg(long, value_name = "TIME|TOKENS", value_parser = parse_budget)]
    heal: Option<Budget>,
    /// The highest learning rate of --heal [default: 2e-4, 7e-4 for low-rank, 2e-3 for norms]
    #[arg(long, value_name = "RATE", value_parser = parse_rate, requires = "heal")]
    heal_rate: Option<f32>,
    /// What --heal trains: all weights of the layers, a change of low rank for each matrix, or norms and biases alone
    ///
    /// A change of low rank takes less memory, and is better where the budget is short. Norms and biases take least, and do less.
    #[arg(long, value_name = "WHAT", value_parser = one_of(What::ALL, What::name), default_value_t = What::default(), requires = "heal")]
    heal_what: What,
}

impl HealArgs {
    fn options(self) -> Option<HealOptions> {
        self.heal.map(|budget| HealOptions {
            rate: self.heal_rate,
            what: self.heal_what,
            ..budget.into()
        })
    }
}

/// How to prune: a named method, and choices that differ from it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = heading::METHOD)]
pub struct MethodArgs {
    /// The method of pruning
    #[arg(long, value_parser = one_of(Method::ALL, Method::name), default_value_t = Method::default())]
    method: Method,
    /// What makes a head or channel worth keeping [default: the method's]
    #[arg(long, value_parser = one_of(Metric::ALL, Metric::name))]
    metric: Option<Metric>,
    /// Which units one threshold spans: all layers or each (al, ul), all modules, each kind, or the same ratio for both (am,
    /// mm, um) [default: the method's]
    #[arg(long, value_parser = one_of(Structure::ALL, Structure::name))]
    structure: Option<Structure>,
    /// Whether query heads go one by one or in whole KV groups
    #[arg(long, value_name = "UNIT", value_parser = one_of(HeadUnit::ALL, HeadUnit::name), default_value_t = HeadUnit::default())]
    heads: HeadUnit,
    /// How to make up for what goes [default: the method's]
    #[arg(long, value_parser = one_of(Restore::ALL, Restore::name))]
    restore: Option<Restore>,
    /// How long to choose
    ///
    /// Fast takes ten seconds, normal a minute, best ten minutes, on two cores with AVX-512, and longer on slower ones. The text, loss
    /// curves and least squares are chosen to fit into it: the larger the model is, the less of each. What is done is said before it
    /// begins.
    #[arg(long, value_parser = one_of(Effort::ALL, Effort::name), default_value_t = Effort::default())]
    effort: Effort,
    /// How long to search whole plans for a better one [default: six plans at --effort best, else none]
    ///
    /// A time like 90s or 10m. Where all modules are pruned at the same time, a head or a channel may be worth more or less than by itself: budget is moved between
    /// modules as long as that brings predictions closer to the dense model's on text that is held back. Ctrl-C ends the search, and the best plan so far is used.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    budget: Option<Duration>,
}

impl MethodArgs {
    pub fn options(&self) -> MethodOptions {
        MethodOptions {
            method: self.method,
            metric: self.metric,
            structure: self.structure,
            heads: self.heads,
            restore: self.restore,
            effort: self.effort,
        }
    }
}

// ---- calibration ----

#[derive(Debug, Clone, Default, Args)]
#[group(skip)]
#[command(next_help_heading = heading::CALIBRATION)]
pub struct CalibrationArgs {
    #[command(flatten)]
    given: Given,
    /// Calibrate on another text than the mixture
    ///
    /// A text file, a folder of text files, a file of JSON lines (.jsonl), - for standard input, built-in for the built-in text, or self:N
    /// for N tokens that the model writes itself (self alone: 8192). The mixture is of what the model writes itself, what it answers to
    /// prompts, and built-in texts.
    #[arg(long, value_name = "SOURCE", value_parser = parse_source, value_hint = ValueHint::AnyPath)]
    calib: Option<TextSource>,
    /// The field of JSON lines that holds the text [default: text]
    #[arg(long, value_name = "NAME", requires = "calib", value_parser = NonEmptyStringValueParser::new())]
    calib_field: Option<String>,
    /// Keep this share of the mixture beside the text of --calib, from 0 to 0.9 [default: 0.25 beside files by --method best, else 0]
    ///
    /// Without it, what the text has none of, for example code, may be lost.
    #[arg(long, value_name = "SHARE", value_parser = parse_mix, requires = "calib")]
    calib_mix: Option<f64>,
    /// Calibrate on N tokens, however long that takes [default: what the effort has time for, at most 24576 of the mixture, 32768 of
    /// another text, all of self; at --effort best 73728 and 98304 of these two, at --effort fast 4096]
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1..=u64::MAX))]
    calib_tokens: Option<usize>,
    /// Memory for the covariances of least squares, for example 2GB; where those of all layers take more, they are collected in
    /// groups of layers, in more passes over the text [default: half of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
}

impl CalibrationArgs {
    pub fn options(&self) -> Result<CalibrationOptions, WrongUse> {
        let own = matches!(self.calib, Some(TextSource::Own(_)));
        if own && self.given.has("calib_field") {
            return Err(WrongUse::new(
                "--calib-field is about JSON lines, and the model writes none for --calib self",
            ));
        }
        Ok(CalibrationOptions {
            source: self.calib.clone().unwrap_or_default(),
            field: self.calib_field.clone().filter(|_| self.field_counts()),
            tokens: self.calib_tokens,
            mix: self.calib_mix.filter(|_| self.mix_counts()),
            memory: self.memory,
        })
    }

    /// Whether the share of the mixture is meant for this text: a default of the user's is for files.
    fn mix_counts(&self) -> bool {
        let is_file = matches!(
            self.calib,
            Some(TextSource::Path(_) | TextSource::Reader(_))
        );
        self.given.has("calib_mix") || is_file
    }

    /// Whether the field of JSON lines is meant for this text: a default of the user's is not, where another text is named that is none.
    fn field_counts(&self) -> bool {
        let lines = match &self.calib {
            Some(TextSource::Path(path)) => path.extension().is_some_and(|e| {
                e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("ndjson")
            }),
            _ => false,
        };
        self.given.has("calib_field") || !self.given.has("calib") || lines
    }
}

/// Arguments where they make sense only with an [`AMOUNT`].
#[derive(Debug, Clone)]
pub struct WithAmount<T>(pub T);

impl<T: FromArgMatches> FromArgMatches for WithAmount<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        T::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl<T: Args> Args for WithAmount<T> {
    fn augment_args(command: Command) -> Command {
        let alone = T::augment_args(Command::new(""));
        let ids: Vec<Id> = alone.get_arguments().map(|a| a.get_id().clone()).collect();
        ids.iter().fold(T::augment_args(command), |command, id| {
            command.mut_arg(id, |argument| argument.requires(AMOUNT))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Tokens that a model writes for its own calibration unless it is asked for another number.
const OWN_TOKENS: usize = 8192;
/// Tokens that would take days to write.
const MOST_OWN_TOKENS: usize = 1 << 24;

pub fn parse_source(text: &str) -> Result<TextSource, String> {
    if let Some(tokens) = text.strip_prefix("self:") {
        return match tokens.parse() {
            Ok(n) if n <= MOST_OWN_TOKENS => Ok(TextSource::Own(n)),
            _ => Err(format!(
                "self: takes a number of tokens up to {MOST_OWN_TOKENS} (a file of this name is ./{text})"
            )),
        };
    }
    Ok(match text {
        "" => return Err("must name a text; leave --calib out to use the mixture".into()),
        "-" => TextSource::reader("standard input", || {
            Ok(Box::new(BufReader::new(io::stdin())))
        }),
        "self" => TextSource::Own(OWN_TOKENS),
        "built-in" => TextSource::BuiltIn,
        path => TextSource::Path(path.into()),
    })
}

// ---- values ----

/// A parser of whole numbers in a range, which its error tells.
pub fn whole<T: TryFrom<u64>>(
    range: RangeInclusive<u64>,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse::<u64>().ok().filter(|n| range.contains(n));
        number.and_then(|n| T::try_from(n).ok()).ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            match *most == u64::MAX {
                true => format!("must be a whole number of at least {least}"),
                false => format!("must be a whole number from {least} to {most}"),
            }
        })
    }
}

/// The same, where some other texts stand for numbers of their own; the error tells them with what they mean.
fn whole_or<T: TryFrom<u64> + Copy>(
    text: &str,
    range: RangeInclusive<u64>,
    others: &[(&str, T, &str)],
) -> Result<T, String> {
    if let Some((_, value, _)) = others.iter().find(|(other, ..)| *other == text) {
        return Ok(*value);
    }
    whole(range)(text).map_err(|words| {
        let others = others
            .iter()
            .map(|(other, _, meaning)| format!(", or {other} for {meaning}"));
        words + &others.collect::<String>()
    })
}

/// Tokens to generate at most. Nothing is shifted out of a context that is full, and so both numbers below zero that llama.cpp
/// knows mean the same.
pub fn parse_count(text: &str) -> Result<usize, String> {
    let others = [
        ("-1", usize::MAX, "no limit"),
        ("-2", usize::MAX, "as many as the context has room for"),
    ];
    whole_or(text, 0..=u64::MAX, &others)
}

/// Tokens of a chunk of perplexity; 0 for the model's own context.
pub fn parse_chunk(text: &str) -> Result<usize, String> {
    whole_or(text, 4..=u64::MAX, &[("0", 0, "the model's own context")])
}

fn parse_threads(text: &str) -> Result<Threads, String> {
    let each = [("-1", 0, "one for each processor")];
    Ok(match whole_or(text, 1..=1024, &each)? {
        0 => Threads::OneEach,
        n => Threads::Number(n),
    })
}

pub fn parse_ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if prune::RATIOS.contains(&ratio) => Ok(ratio),
        _ => Err(format!(
            "must be a number of at least {} and below {}, for example 0.3",
            prune::RATIOS.start,
            prune::RATIOS.end
        )),
    }
}

fn parse_mix(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=0.9).contains(&share) => Ok(share),
        _ => Err("must be a share from 0 to 0.9, for example 0.25".into()),
    }
}

pub fn parse_sparsity(text: &str) -> Result<Sparsity, String> {
    text.parse()
}

/// A size; what `--fit` of llama.cpp takes is told from it.
fn parse_fit(text: &str) -> Result<u64, String> {
    match text {
        "on" | "off" | "auto" => Err(
            "here it takes the size that the weights are to be pruned to, for example 80MB; flapjack has no device whose memory a model could be fitted to, so leave it out to run the model as it is".into(),
        ),
        _ => parse_size(text),
    }
}

pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || {
        let names = UNITS.map(|(name, _)| name).join(", ");
        format!("must be a number of bytes with a unit ({names}), for example 80MB")
    };
    engine::parse_size(text).ok_or_else(wrong)
}

/// A time, or a number of tokens.
/// A time like `90s` or `5m`.
fn parse_time(text: &str) -> Result<Duration, String> {
    match parse_budget(text) {
        Ok(Budget::Time(time)) => Ok(time),
        _ => Err("must be a time, for example 90s or 5m".to_owned()),
    }
}

fn parse_budget(text: &str) -> Result<Budget, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let number = digits
        .parse::<f64>()
        .ok()
        .filter(|n| n.is_finite() && *n > 0.0);
    let time = |seconds: f64| {
        let time = Duration::try_from_secs_f64(seconds).ok();
        time.filter(|time| !time.is_zero()).map(Budget::Time)
    };
    let tokens = |n: f64| {
        (1.0..MOST_HEAL_TOKENS)
            .contains(&n)
            .then_some(Budget::Tokens(n as usize))
    };
    let budget = number.and_then(|n| match unit {
        "s" => time(n),
        "m" | "min" => time(60.0 * n),
        "h" => time(3600.0 * n),
        "" if n.fract() == 0.0 => tokens(n),
        "k" => tokens(1e3 * n),
        "M" => tokens(1e6 * n),
        _ => None,
    });
    budget.ok_or_else(|| {
        "must be a time (90s, 5m, 1h) or a number of tokens (200000, 500k, 1M)".into()
    })
}

/// Tokens that would take years.
const MOST_HEAL_TOKENS: f64 = 1e12;

fn parse_rate(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("must be a number above 0, for example 3e-4".into()),
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

// ---- files ----

/// Refuses a file that could not be written later, before the work is done.
pub fn check_writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        bail!("{} is a folder; name a file to write to", path.display());
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // A link leads elsewhere; writing will tell.
    if !path.is_symlink() {
        tempfile::tempfile_in(folder)
            .with_context(|| format!("cannot write to the folder {}", folder.display()))?;
    }
    Ok(())
}

/// The text of a file, whatever its name; it is read later.
pub fn plain_text(path: &Path) -> Result<TextSource> {
    let cannot = || format!("cannot read {}", path.display());
    // Opening tells more than looking, but a pipe can be opened only once.
    let there = path.metadata().with_context(cannot)?;
    if there.is_file() {
        File::open(path).with_context(cannot)?;
    }
    let file = path.to_owned();
    Ok(TextSource::reader(path.display().to_string(), move || {
        Ok(Box::new(BufReader::new(File::open(&file)?)))
    }))
}

/// Reads a text file.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        anyhow::anyhow!(
            "{} is not UTF-8 text: the byte at offset {} is out of place",
            path.display(),
            error.utf8_error().valid_up_to()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::words::target_words;
    use super::*;

    #[test]
    fn numbers_below_zero_mean_what_they_mean_to_llama_cpp_or_name_the_range() {
        assert_eq!(parse_count("-1"), Ok(usize::MAX));
        assert_eq!(parse_count("-2"), Ok(usize::MAX));
        assert_eq!(parse_count("0"), Ok(0));
        assert_eq!(parse_threads("-1"), Ok(Threads::OneEach));
        assert_eq!(parse_threads("3"), Ok(Threads::Number(3)));
        for (words, range) in [
            (parse_count("-3").unwrap_err(), "at least 0, or -1"),
            (parse_threads("0").unwrap_err(), "from 1 to 1024, or -1"),
            (whole::<u32>(1..=9)("-1").unwrap_err(), "from 1 to 9"),
        ] {
            assert!(words.contains(range), "{words}");
        }
    }

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
    fn healing_takes_a_time_or_a_number_of_tokens() {
        let time = |seconds| Ok(Budget::Time(Duration::from_secs(seconds)));
        assert_eq!(parse_budget("90s"), time(90));
        assert_eq!(parse_budget("1.5m"), time(90));
        assert_eq!(parse_budget("2h"), time(7200));
        assert_eq!(parse_budget("200000"), Ok(Budget::Tokens(200_000)));
        assert_eq!(parse_budget("500k"), Ok(Budget::Tokens(500_000)));
        assert_eq!(parse_budget("1.5M"), Ok(Budget::Tokens(1_500_000)));
        for text in [
            "", "m", "-1m", "0s", "0", "1.5", "10d", "1e99k", "nan", "inf", "5 m", "1e300h",
        ] {
            assert!(parse_budget(text).is_err(), "{text}");
        }
        assert_eq!(parse_rate("3e-4"), Ok(3e-4));
        assert!(
            ["0", "-1", "nan", "inf", "x"]
                .iter()
                .all(|t| parse_rate(t).is_err())
        );
    }

    #[test]
    fn a_target_reads_as_it_was_typed() {
        let rise = parse_rise("+7%").unwrap();
        assert_eq!(target_words(Target::PerplexityRise(rise)), "--max-ppl +7%");
        assert_eq!(target_words(Target::Speedup(1.3)), "--speedup 1.3x");
        for text in ["80MB", "76MiB", "1GiB", "1500B", "7kB"] {
            let target = Target::Bytes(parse_size(text).unwrap());
            assert_eq!(target_words(target), format!("--fit {text}"));
        }
    }
}
