//! `flapjack run`

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use flapjack::generate::{
    Finish, Generated, Generation, Request, SamplerConfig, Sequence, Timings,
};
use flapjack::model::KvCache;

use super::options::{CacheOptions, Loaded, ModelOptions, read_standard_input, read_text};
use super::pruning::PruneOptions;
use super::report;

/// The dense model's speed is measured over at most so many tokens.
const BASELINE_TOKENS: usize = 64;

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelOptions,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file (one newline at its end is dropped); without -p and -f it comes from standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Generate at most N tokens
    #[arg(short, long, value_name = "N", default_value_t = 128)]
    n: usize,
    /// Positions to make room for [default: as many as prompt and -n need, up to what the model was trained for]
    #[arg(short, long, value_name = "N")]
    ctx: Option<usize>,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Stop where this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on when the model ends its text
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    pruning: PruneOptions,
    /// Do not measure the dense model's speed before pruning
    #[arg(long)]
    no_baseline: bool,
    /// Print no report
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
struct SamplingOptions {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.5, value_parser = parse_at_least_0, allow_negative_numbers = true)]
    temp: f32,
    /// Choose among the K most likely tokens (0: all)
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Choose among the most likely tokens that together have this probability (1: all)
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = parse_share, allow_negative_numbers = true)]
    top_p: f32,
    /// Choose among tokens of at least this share of the best one's probability (0: all)
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = parse_share, allow_negative_numbers = true)]
    min_p: f32,
    /// Make tokens of the recent text less likely (1: not)
    #[arg(long, value_name = "R", default_value_t = 1.1, value_parser = parse_positive, allow_negative_numbers = true)]
    repeat_penalty: f32,
    /// How many recent tokens --repeat-penalty looks at
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_last_n: usize,
    /// The same seed gives the same text
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

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

impl SamplingOptions {
    fn config(&self) -> SamplerConfig {
        SamplerConfig {
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_last_n,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            temperature: self.temp,
            seed: self.seed,
        }
    }
}

pub fn run(args: RunArgs) -> Result<()> {
    let prompt = args.prompt_text()?;
    let mut loaded = args.model.load()?;
    let request = Request {
        prompt: args.prompt_tokens(&loaded, &prompt)?,
        max_tokens: args.n,
        sampler: args.sampling.config(),
        stop: args.stop.clone(),
        ignore_end: args.ignore_eos,
    };
    let context = args.context(&loaded, request.prompt.len());

    let mut report = report::Run::new(&loaded);
    if let Some(job) = args.pruning.prepare(&loaded)? {
        if !args.no_baseline {
            report.dense = Some(dense_baseline(
                &loaded,
                &request,
                args.cache(&loaded, context)?,
            )?);
        }
        let done = job.carry_out(&mut loaded, &args.model, !args.quiet && !args.no_baseline)?;
        report.pruned = Some(done.pruned);
        report.calibrated = Some(done.note);
    }

    let cache = args.cache(&loaded, context)?;
    let mut out = io::stdout().lock();
    let outcome = generate(&loaded, &request, cache, &mut |text| {
        out.write_all(text.as_bytes())?;
        out.flush()
    })?;
    writeln!(out)?;
    drop(out);

    if outcome.finish == Finish::ContextFull {
        tracing::warn!(
            "stopped because the context of {context} tokens is full; --ctx makes room for more"
        );
    }
    if !args.quiet {
        report.print(&outcome);
    }
    Ok(())
}

impl RunArgs {
    fn cache(&self, loaded: &Loaded, context: usize) -> Result<KvCache> {
        Ok(KvCache::with_type(
            &loaded.model,
            context,
            self.cache.cache_type(),
        )?)
    }

    fn prompt_text(&self) -> Result<String> {
        if let Some(prompt) = &self.prompt {
            return Ok(prompt.clone());
        }
        let mut text = match &self.file {
            Some(path) => read_text(path)?,
            None if self.pruning.calibration.0.reads_standard_input() => bail!(
                "standard input cannot be both the prompt and the calibration text; give the prompt with -p TEXT or -f FILE"
            ),
            None => read_standard_input()?,
        };
        if text.ends_with('\n') {
            text.pop();
            if text.ends_with('\r') {
                text.pop();
            }
        }
        Ok(text)
    }

    fn prompt_tokens(&self, loaded: &Loaded, prompt: &str) -> Result<Vec<u32>> {
        let tokens = loaded.tokenizer.encode_prompt(prompt)?;
        if !tokens.is_empty() {
            return Ok(tokens);
        }
        // From nothing a text begins with the token that begins texts.
        match loaded.tokenizer.bos().or(loaded.tokenizer.eos()) {
            Some(token) => Ok(vec![token]),
            None => bail!("the prompt is empty, and this model has no token to begin a text with"),
        }
    }

    fn context(&self, loaded: &Loaded, prompt: usize) -> usize {
        let trained = loaded.model.config.context_length;
        match self.ctx {
            Some(context) => {
                if context > trained {
                    tracing::warn!(
                        "the model was trained for {trained} positions; what comes after them may be nonsense"
                    );
                }
                context
            }
            None => prompt.saturating_add(self.n).min(trained.max(prompt)),
        }
    }
}

/// The speed of the model as it is, on the same prompt; the text is thrown away.
fn dense_baseline(loaded: &Loaded, request: &Request, cache: KvCache) -> Result<Timings> {
    let request = Request {
        max_tokens: request.max_tokens.min(BASELINE_TOKENS),
        stop: Vec::new(),
        ignore_end: true,
        ..request.clone()
    };
    Ok(generate(loaded, &request, cache, &mut |_| Ok(()))?.timings)
}

fn generate(
    loaded: &Loaded,
    request: &Request,
    cache: KvCache,
    on_text: &mut dyn FnMut(&str) -> io::Result<()>,
) -> Result<Generated> {
    let mut sequence = Sequence::new(cache);
    let Loaded {
        model,
        runtime,
        tokenizer,
        ..
    } = loaded;
    let mut generation = Generation::new(model, runtime, tokenizer, &mut sequence, request)?;
    for piece in &mut generation {
        on_text(&piece?)?;
    }
    Ok(generation.generated().expect("it has ended").clone())
}
