//! Arguments that several subcommands share, and the engine's options that they stand for.

use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgMatches, Args, Command, ValueEnum};
use flapjack::engine::{
    Cache, CalibrationOptions, Engine, MethodOptions, OpenOptions, Pack, PruneOptions, Target,
    TextSource,
};
use flapjack::hub;
use flapjack::model::CacheType;
use flapjack::prune::{self, Effort, HeadUnit, Method, Metric, Restore, Structure};

use super::overrides::OverrideArgs;
use super::words::UNITS;
use super::{progress, words};

// ---- the model ----

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A GGUF model [default: SmolLM2-135M-Instruct, fetched once and kept in the cache folder]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Threads to compute with [default: one for each processor]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Leave the weights as they lie in the file, so that their pages stay shared with it and can be evicted: slower, for
    /// models near the size of the memory [default: rearrange them in place if the memory suffices]
    #[arg(long)]
    pub no_pack: bool,
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

impl ModelArgs {
    pub fn open(&self) -> Result<Engine> {
        let path = match &self.model {
            Some(path) => hub::local(path)?,
            None => progress::default_model()?,
        };
        let engine = Engine::open(path, self.options())?;
        words::log(engine.notices());
        Ok(engine)
    }

    pub fn options(&self) -> OpenOptions {
        OpenOptions {
            threads: self.threads.map(usize::from),
            pack: match self.no_pack {
                true => Pack::Never,
                false => Pack::Auto,
            },
            overrides: self.overrides.overrides(),
            ..OpenOptions::default()
        }
    }
}

#[derive(Debug, Clone, Copy, Default, Args)]
pub struct CacheArgs {
    /// Store the KV cache in this type; q8_0 takes about half the bytes
    #[arg(long = "kv", value_name = "TYPE", value_enum, default_value_t)]
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
pub struct PruningArgs {
    #[command(flatten)]
    amount: Amount,
    #[command(flatten)]
    calibration: WithAmount,
    /// Use a profile that `flapjack calibrate` made, and do not calibrate
    #[arg(long, value_name = "FILE", requires = AMOUNT, conflicts_with_all = ["calib", "calib_field", "calib_tokens", "memory", "max_ppl"])]
    profile: Option<PathBuf>,
    /// Calibrate and prune anew even if the cache folder has the profile or the outcome, and keep neither there
    #[arg(long, requires = AMOUNT)]
    no_profile_cache: bool,
    #[command(flatten)]
    method: MethodArgs,
}

impl PruningArgs {
    /// What to prune; `None` if no amount is given.
    pub fn options(&self, effects: bool) -> Option<PruneOptions> {
        Some(PruneOptions {
            target: self.amount.target()?,
            method: self.method.options(),
            calibration: self.calibration.0.options(),
            profile: self.profile.clone(),
            cache: match self.no_profile_cache {
                true => Cache::Nothing,
                false => Cache::All,
            },
            effects,
        })
    }

    /// What to prune; `None` if that is nothing.
    pub fn options_if_any(&self, effects: bool) -> Option<PruneOptions> {
        let options = self.options(effects)?;
        (options.target != Target::Ratio(0.0)).then_some(options)
    }

    pub fn reads_standard_input(&self) -> bool {
        matches!(self.calibration.0.calib, Some(TextSource::Reader(_)))
    }
}

/// The name of the group of [`Amount`], one of which other arguments need.
const AMOUNT: &str = "amount";

/// How much to prune.
#[derive(Debug, Clone, Default, Args)]
#[group(id = "amount", multiple = false)]
struct Amount {
    /// Remove this share of the layers' weights before running (at least 0, below 0.9)
    #[arg(long, visible_alias = "ratio", value_name = "RATIO", value_parser = parse_ratio, allow_negative_numbers = true)]
    prune: Option<f64>,
    /// Remove as little as makes all weights fit in so many bytes, for example 80MB or 76MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    fit: Option<u64>,
    /// Remove as little as should make generation so many times as fast, for example 1.3x
    #[arg(long, value_name = "FACTOR", value_parser = parse_speedup)]
    speedup: Option<f64>,
    /// Remove as much as raises the perplexity on held-back calibration text by at most so much, for example +10%
    #[arg(long, value_name = "PERCENT", value_parser = parse_rise)]
    max_ppl: Option<f64>,
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

/// How to prune: a named method, and choices that differ from it.
#[derive(Debug, Clone, Default, Args)]
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
    /// How much time may be spent on choosing: fast measures no loss curves, best more of them than normal
    #[arg(long, value_parser = one_of(Effort::ALL, Effort::name), default_value_t = Effort::default())]
    effort: Effort,
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
pub struct CalibrationArgs {
    /// Calibrate on another text than the built-in one: a text file, a folder of text files, a file of JSON lines (.jsonl),
    /// - for standard input, or self:N for N tokens that the model writes itself (self alone: 8192)
    #[arg(long, value_name = "SOURCE", value_parser = parse_source)]
    calib: Option<TextSource>,
    /// The field of JSON lines that holds the text [default: text]
    #[arg(long, value_name = "NAME", requires = "calib")]
    calib_field: Option<String>,
    /// Calibrate on the first N tokens only [default: all of the built-in text and of self, 32768 of another; 98304 at --effort
    /// best, 4096 at --effort fast]
    #[arg(long, value_name = "N")]
    calib_tokens: Option<usize>,
    /// Memory for the covariances of least squares, for example 2GB; where those of all layers take more, they are collected in
    /// groups of layers, in more passes over the text [default: half of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
}

impl CalibrationArgs {
    pub fn options(&self) -> CalibrationOptions {
        CalibrationOptions {
            source: self.calib.clone().unwrap_or_default(),
            field: self.calib_field.clone(),
            tokens: self.calib_tokens,
            memory: self.memory,
        }
    }
}

/// [`CalibrationArgs`] where they make sense only with an [`Amount`].
#[derive(Debug, Clone)]
struct WithAmount(CalibrationArgs);

impl clap::FromArgMatches for WithAmount {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        CalibrationArgs::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl Args for WithAmount {
    fn augment_args(command: Command) -> Command {
        let calibration = CalibrationArgs::augment_args(Command::new(""));
        let arguments = calibration.get_arguments();
        command.args(arguments.map(|argument| argument.clone().requires(AMOUNT)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Tokens that a model writes for its own calibration unless it is asked for another number.
const OWN_TOKENS: usize = 8192;
/// Tokens that would take days to write.
const MOST_OWN_TOKENS: usize = 1 << 24;

fn parse_source(text: &str) -> Result<TextSource, String> {
    if let Some(tokens) = text.strip_prefix("self:") {
        return match tokens.parse() {
            Ok(n) if n <= MOST_OWN_TOKENS => Ok(TextSource::Own(n)),
            _ => Err(format!(
                "self: takes a number of tokens up to {MOST_OWN_TOKENS} (a file of this name is ./{text})"
            )),
        };
    }
    Ok(match text {
        "" => return Err("must name a text; leave --calib out to use the built-in one".into()),
        "-" => TextSource::reader("standard input", || {
            Ok(Box::new(BufReader::new(io::stdin())))
        }),
        "self" => TextSource::Own(OWN_TOKENS),
        path => TextSource::Path(path.into()),
    })
}

// ---- values ----

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

fn parse_size(text: &str) -> Result<u64, String> {
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
