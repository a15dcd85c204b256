//! Options of sampling, for all that generates text.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::ValueHint;
use flapjack::engine::Engine;
use flapjack::generate::{Grammar, SamplerConfig, SamplerOptions, SamplerStep};

use super::arguments::read_text;

use super::heading;

/// What is taken where neither the user nor the model says anything: what suits small models, and else llama.cpp's defaults.
fn defaults() -> SamplerOptions {
    SamplerOptions {
        temperature: Some(0.5),
        repetition_penalty: Some(1.1),
        ..SamplerOptions::default()
    }
}

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = heading::SAMPLING)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token [default: the model's, or 0.5]
    #[arg(long, alias = "temperature", value_name = "T", value_parser = parse_at_least_0, allow_negative_numbers = true)]
    temp: Option<f32>,
    /// Choose among the K most likely tokens; 0 for all [default: the model's, or 40]
    ///
    /// -1 is for all as well.
    #[arg(long, value_name = "K", value_parser = parse_top_k, allow_negative_numbers = true)]
    top_k: Option<usize>,
    /// Choose among the most likely tokens that together have this probability; 1 for all [default: the model's, or 0.95]
    #[arg(long, value_name = "P", value_parser = parse_share, allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Choose among tokens of at least this share of the best one's probability; 0 for all [default: the model's, or 0.05]
    #[arg(long, value_name = "P", value_parser = parse_share, allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Make tokens of the recent text less likely; 1 for not [default: the model's, or 1.1; 1 at --temp 0]
    #[arg(long, value_name = "R", value_parser = parse_positive, allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,
    /// How many recent tokens penalties look at; -1 for all [default: the model's, or 64]
    #[arg(long, value_name = "N", value_parser = parse_window, allow_negative_numbers = true)]
    repeat_last_n: Option<usize>,
    /// Make a token less likely each time that it occurs in the recent text; 0 for not [default: 0]
    #[arg(long, value_name = "A", value_parser = parse_finite, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Make a token less likely if it occurs in the recent text; 0 for not [default: 0]
    #[arg(long, value_name = "A", value_parser = parse_finite, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Make tokens less likely that go on with a repetition (DRY); 0 for not [default: 0]
    #[arg(long, value_name = "A", value_parser = parse_at_least_0, allow_negative_numbers = true)]
    dry_multiplier: Option<f32>,
    /// By what the penalty of DRY grows with each token of the repetition [default: 1.75]
    #[arg(long, value_name = "B", value_parser = parse_at_least_1, allow_negative_numbers = true)]
    dry_base: Option<f32>,
    /// Tokens that DRY lets be repeated [default: 2]
    #[arg(long, value_name = "N")]
    dry_allowed_length: Option<usize>,
    /// How many recent tokens DRY looks at; -1 for all [default: 64]
    #[arg(long, value_name = "N", value_parser = parse_window, allow_negative_numbers = true)]
    dry_penalty_last_n: Option<usize>,
    /// A text over which DRY follows no repetition, or "none"; may be given several times [default: "\\n", ":", "\"" and "*"]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    dry_sequence_breaker: Vec<String>,
    /// Let no N tokens in a row come twice, prompt included; 0 for no limit [default: the model's, or 0]
    #[arg(long, value_name = "N")]
    no_repeat_ngram: Option<usize>,
    /// Add to the logit of a token, given by its id or its text, as in 15043+1, " Hello"-2.5 or 15043-inf; may be given several
    /// times
    #[arg(short, long, value_name = "TOKEN±BIAS", value_parser = parse_bias, allow_hyphen_values = true)]
    logit_bias: Vec<Bias>,
    /// Choose among tokens whose logits are within N standard deviations of the best one's; 0 or -1 for all [default: 0]
    #[arg(long, alias = "top-nsigma", value_name = "N", value_parser = parse_sigma, allow_negative_numbers = true)]
    top_n_sigma: Option<f32>,
    /// Choose among the tokens of usual surprise that together have this probability; 1 for all [default: the model's, or 1]
    #[arg(long, alias = "typical-p", value_name = "P", value_parser = parse_share, allow_negative_numbers = true)]
    typical: Option<f32>,
    /// How often to exclude top choices (XTC); 0 for never [default: the model's, or 0]
    #[arg(long, value_name = "P", value_parser = parse_share, allow_negative_numbers = true)]
    xtc_probability: Option<f32>,
    /// The probability that makes a token a top choice [default: the model's, or 0.1]
    #[arg(long, value_name = "P", value_parser = parse_share, allow_negative_numbers = true)]
    xtc_threshold: Option<f32>,
    /// Let the temperature vary by so much in both directions, lower where the model is sure; 0 for a fixed one [default: 0]
    #[arg(long, value_name = "R", value_parser = parse_at_least_0, allow_negative_numbers = true)]
    dynatemp_range: Option<f32>,
    /// To which power the entropy leads to the temperature [default: 1]
    #[arg(long, value_name = "E", value_parser = parse_at_least_0, allow_negative_numbers = true)]
    dynatemp_exp: Option<f32>,
    /// 2 for Mirostat 2.0 in the place of all that cuts tokens off; 0 for not [default: the model's, or 0]
    #[arg(long, value_name = "VERSION", value_parser = parse_mirostat, allow_negative_numbers = true)]
    mirostat: Option<bool>,
    /// How quickly Mirostat learns, its eta [default: the model's, or 0.1]
    #[arg(long, value_name = "R", value_parser = parse_at_least_0, allow_negative_numbers = true)]
    mirostat_lr: Option<f32>,
    /// The surprise that Mirostat aims at, in bits for each token, its tau [default: the model's, or 5]
    #[arg(long, value_name = "BITS", value_parser = parse_at_least_0, allow_negative_numbers = true)]
    mirostat_ent: Option<f32>,
    /// The steps of sampling in their order, with semicolons between [default: the model's, or
    /// penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature]
    #[arg(long, value_name = "STEPS", value_parser = parse_steps)]
    samplers: Option<Steps>,
    /// Answer with JSON of this schema: JSON, or the name of a file with it
    #[arg(
        short = 'j',
        long,
        value_name = "SCHEMA",
        value_hint = ValueHint::FilePath,
        alias = "json-schema-file",
        conflicts_with = "grammar"
    )]
    json_schema: Option<String>,
    /// Answer by this grammar, in Lark or GBNF: its text, or the name of a file with it
    #[arg(long, value_name = "GRAMMAR", alias = "grammar-file", value_hint = ValueHint::FilePath)]
    grammar: Option<String>,
    /// The same seed gives the same text; -1: another one each time [default: 0]
    #[arg(short, long, value_name = "N", value_parser = parse_seed, allow_negative_numbers = true)]
    seed: Option<u64>,
}

/// Steps in their order. (The parser would take a list for several values.)
#[derive(Debug, Clone)]
struct Steps(Vec<SamplerStep>);

/// What is added to the logit of a token, or of each token of a text.
#[derive(Debug, Clone, PartialEq)]
struct Bias {
    token: BiasOf,
    bias: f32,
}

#[derive(Debug, Clone, PartialEq)]
enum BiasOf {
    Id(u32),
    Text(String),
}

impl Bias {
    fn tokens(&self, engine: &Engine) -> Result<Vec<(u32, f32)>> {
        let vocabulary = engine.model().config.vocabulary;
        let tokens = match &self.token {
            BiasOf::Id(id) if *id as usize >= vocabulary => {
                bail!("--logit-bias: there is no token {id}; the vocabulary has {vocabulary}")
            }
            BiasOf::Id(id) => vec![*id],
            BiasOf::Text(text) => engine.tokenizer()?.encode(text)?,
        };
        Ok(tokens.into_iter().map(|id| (id, self.bias)).collect())
    }
}

impl SamplingArgs {
    /// What the user asks for.
    ///
    /// # Errors
    /// If a token of a bias is not in the vocabulary.
    pub fn asked(&self, engine: &Engine) -> Result<SamplerOptions> {
        let biases = self.logit_bias.iter().map(|bias| bias.tokens(engine));
        let biases: Vec<_> = biases.collect::<Result<_>>()?;
        let breakers = self.dry_sequence_breaker.iter();
        let breakers = breakers.filter(|text| *text != "none");
        Ok(SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_last_n,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_window: self.dry_penalty_last_n,
            dry_breakers: (!self.dry_sequence_breaker.is_empty())
                .then(|| breakers.map(|text| unescaped(text)).collect()),
            no_repeat_ngram: self.no_repeat_ngram,
            logit_bias: (!biases.is_empty()).then(|| biases.concat()),
            top_n_sigma: self.top_n_sigma,
            typical_p: self.typical,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            dynatemp_range: self.dynatemp_range,
            dynatemp_exponent: self.dynatemp_exp,
            mirostat: self.mirostat,
            mirostat_tau: self.mirostat_ent,
            mirostat_eta: self.mirostat_lr,
            steps: self.samplers.as_ref().map(|steps| steps.0.clone()),
            seed: self.seed,
        })
    }

    /// What the user asks for, what the model's makers recommend, and what is taken otherwise, in this order.
    ///
    /// # Errors
    /// Those of [`asked`](Self::asked).
    pub fn options(&self, engine: &Engine) -> Result<SamplerOptions> {
        let recommended = engine.sampling_defaults().options();
        Ok(self.asked(engine)?.or(&recommended).or(&defaults()))
    }

    /// What answers must be like; `None` where they may be anything.
    ///
    /// # Errors
    /// If a file cannot be read, or there is no such grammar.
    pub fn grammar(&self, engine: &Engine) -> Result<Option<Grammar>> {
        // What is a text cannot be the name of a file, or hardly.
        if let Some(schema) = &self.json_schema {
            let is_json = |text: &str| text.starts_with('{') || matches!(text, "true" | "false");
            let schema = text_or_file(schema, is_json).context("--json-schema")?;
            let grammar = engine.grammars()?.json_schema(&schema);
            return Ok(Some(grammar.context("--json-schema")?));
        }
        if let Some(grammar) = &self.grammar {
            let is_grammar = |text: &str| {
                let signs = ["::=", "start:", "start :", "\n"];
                signs.iter().any(|sign| text.contains(sign))
            };
            let grammar = text_or_file(grammar, is_grammar).context("--grammar")?;
            let grammar = engine.grammars()?.grammar(&grammar);
            return Ok(Some(grammar.context("--grammar")?));
        }
        Ok(None)
    }

    /// How to sample, which the log tells with where it comes from.
    ///
    /// # Errors
    /// Those of [`asked`](Self::asked).
    pub fn config(&self, engine: &Engine) -> Result<SamplerConfig> {
        let asked = self.asked(engine)?;
        let recommended = engine.sampling_defaults();
        let options = self.options(engine)?;
        let beside = recommended.config_path.iter();
        let mut from = vec![
            ("options".to_owned(), asked),
            (
                "the file's recommendation".to_owned(),
                recommended.metadata.clone(),
            ),
        ];
        from.extend(beside.map(|path| {
            let name = path.display().to_string();
            (name, recommended.config.clone())
        }));
        from.push(("defaults".to_owned(), options.clone()));
        // Each setting is told once, with the first that has it and whose value was taken.
        let mut told = Vec::new();
        for (source, settings) in from {
            let taken = settings.entries().into_iter().filter(|entry| {
                options.entries().contains(entry) && !told.iter().any(|(name, _)| *name == entry.0)
            });
            let taken: Vec<_> = taken.collect();
            if taken.is_empty() {
                continue;
            }
            let words: Vec<String> = taken.iter().map(|(n, v)| format!("{n} {v}")).collect();
            tracing::info!("sampling by {source}: {}", words.join(", "));
            told.extend(taken);
        }
        Ok(options.config())
    }
}

/// What was given, or what is in the file of that name.
fn text_or_file(given: &str, is_text: impl Fn(&str) -> bool) -> Result<String> {
    match is_text(given.trim()) {
        true => Ok(given.to_owned()),
        false => read_text(Path::new(given)),
    }
}

// ---- values ----

fn parse_number(text: &str, fits: impl Fn(f32) -> bool, range: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && fits(value) => Ok(value),
        _ => Err(format!("must be a number {range}").trim_end().to_owned()),
    }
}

fn parse_at_least_0(text: &str) -> Result<f32, String> {
    parse_number(text, |v| v >= 0.0, "of at least 0")
}

fn parse_at_least_1(text: &str) -> Result<f32, String> {
    parse_number(text, |v| v >= 1.0, "of at least 1")
}

fn parse_finite(text: &str) -> Result<f32, String> {
    parse_number(text, |_| true, "")
}

/// A number of standard deviations; -1 stands for 0.
fn parse_sigma(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(-1.0f32) => Ok(0.0),
        _ => parse_number(text, |v| v >= 0.0, "of at least 0, or -1 for all"),
    }
}

fn parse_mirostat(text: &str) -> Result<bool, String> {
    match text {
        "0" => Ok(false),
        "2" => Ok(true),
        _ => Err("must be 0 (off) or 2 (Mirostat 2.0)".to_owned()),
    }
}

fn parse_steps(text: &str) -> Result<Steps, String> {
    let names = || SamplerStep::DEFAULT.map(SamplerStep::name).join(";");
    let steps = SamplerStep::list(text).map_err(|e| format!("{e}; there are {}", names()))?;
    Ok(Steps(steps))
}

/// A token and its bias. The bias begins at the first sign from which on all is a number.
fn parse_bias(text: &str) -> Result<Bias, String> {
    let signs = text.match_indices(['+', '-']).filter(|(at, _)| *at > 0);
    let split = signs.into_iter().find_map(|(at, _)| {
        let (token, bias) = text.split_at(at);
        let bias: f32 = bias.parse().ok().filter(|bias: &f32| !bias.is_nan())?;
        Some((token, bias))
    });
    let (token, bias) = split.ok_or_else(|| {
        "must be a token's id or text, and behind it a number with its sign, as 15043+1".to_owned()
    })?;
    let token = match token.parse() {
        Ok(id) => BiasOf::Id(id),
        Err(_) => BiasOf::Text(token.to_owned()),
    };
    Ok(Bias { token, bias })
}

/// Text as shells cannot easily give it: \\n, \\t and \\\\ stand for a line end, a tab and a backslash.
fn unescaped(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (character, characters.clone().next()) {
            ('\\', Some(next @ ('n' | 't' | '\\'))) => {
                characters.next();
                plain.push(match next {
                    'n' => '\n',
                    't' => '\t',
                    other => other,
                });
            }
            _ => plain.push(character),
        }
    }
    plain
}

fn parse_share(text: &str) -> Result<f32, String> {
    parse_number(text, |v| (0.0..=1.0).contains(&v), "from 0 to 1")
}

fn parse_positive(text: &str) -> Result<f32, String> {
    parse_number(text, |v| v > 0.0, "above 0")
}

/// A whole number, or -1, which stands for something else.
fn parse_count(text: &str, minus_1: usize, range: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(minus_1),
        _ => text.parse().map_err(|_| format!("must be {range}")),
    }
}

fn parse_top_k(text: &str) -> Result<usize, String> {
    parse_count(text, 0, "a number of tokens, or 0 or -1 for all")
}

fn parse_window(text: &str) -> Result<usize, String> {
    parse_count(text, usize::MAX, "a number of tokens, or -1 for all")
}

fn parse_seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        // The standard library seeds its hash tables from the system's random numbers.
        return Ok(RandomState::new().build_hasher().finish());
    }
    let range = || format!("must be a number from 0 to {}, or -1 for any", u64::MAX);
    text.parse().map_err(|_| range())
}
