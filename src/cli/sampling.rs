//! Options of sampling, for all that generates text.

use std::hash::{BuildHasher, Hasher, RandomState};

use clap::Args;
use flapjack::engine::Engine;
use flapjack::generate::{SamplerConfig, SamplerOptions};

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
    /// The same seed gives the same text; -1: another one each time [default: 0]
    #[arg(short, long, value_name = "N", value_parser = parse_seed, allow_negative_numbers = true)]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// What the user asks for.
    pub fn asked(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_last_n,
            seed: self.seed,
        }
    }

    /// What the user asks for, what the model's makers recommend, and what is taken otherwise, in this order.
    pub fn options(&self, engine: &Engine) -> SamplerOptions {
        let recommended = engine.sampling_defaults().options();
        self.asked().or(&recommended).or(&defaults())
    }

    /// How to sample, which the log tells with where it comes from.
    pub fn config(&self, engine: &Engine) -> SamplerConfig {
        let asked = self.asked();
        let recommended = engine.sampling_defaults();
        let options = self.options(engine);
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
        options.config()
    }
}

// ---- values ----

fn parse_number(text: &str, fits: impl Fn(f32) -> bool, range: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && fits(value) => Ok(value),
        _ => Err(format!("must be a number {range}")),
    }
}

fn parse_at_least_0(text: &str) -> Result<f32, String> {
    parse_number(text, |v| v >= 0.0, "of at least 0")
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
