//! `flapjack run`

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use flapjack::engine::{Engine, GenerateOptions, SequenceOptions};
use flapjack::generate::{Finish, Timings};

use super::arguments::{CacheArgs, ModelArgs, PruningArgs, read_text};
use super::sampling::SamplingArgs;
use super::{progress, report, words};

/// The dense model's speed is measured over at most so many tokens.
const BASELINE_TOKENS: usize = 64;

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
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
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Stop where this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on when the model ends its text
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    pruning: PruningArgs,
    /// Do not measure the dense model's speed before pruning
    #[arg(long)]
    no_baseline: bool,
    /// Print no report
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: RunArgs) -> Result<()> {
    let prompt = args.prompt_text()?;
    let mut engine = args.model.open()?;
    let prompt = engine.prompt(&prompt)?;
    let options = args.generate_options(&engine);
    let place = args.sequence_options(&engine, prompt.len());

    let mut report = report::Run::new(&engine);
    if let Some(pruning) = args
        .pruning
        .options_if_any(!args.quiet && !args.no_baseline)
    {
        let prepared = engine.prepare(&pruning)?;
        words::log(prepared.notices());
        if !args.no_baseline {
            report.dense = Some(dense_speed(&engine, &prompt, &options, place)?);
        }
        report.pruned = Some(engine.prune_prepared(prepared, &mut progress::bars())?);
    }

    let mut sequence = engine.sequence_with(place)?;
    let mut generation = engine.generate_behind(&mut sequence, prompt, &options)?;
    let mut out = io::stdout().lock();
    for piece in &mut generation {
        out.write_all(piece?.as_bytes())?;
        out.flush()?;
    }
    writeln!(out)?;
    drop(out);

    let generated = generation.generated().expect("there are no more pieces");
    if let (Finish::ContextFull, Some(context)) = (generated.finish, place.context) {
        tracing::warn!(
            "stopped because the context of {context} tokens is full; --ctx makes room for more"
        );
    }
    if !args.quiet {
        report.print(generated);
    }
    Ok(())
}

impl RunArgs {
    fn prompt_text(&self) -> Result<String> {
        if let Some(prompt) = &self.prompt {
            return Ok(prompt.clone());
        }
        let mut text = match &self.file {
            Some(path) => read_text(path)?,
            None if self.pruning.reads_standard_input() => bail!(
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

    fn generate_options(&self, engine: &Engine) -> GenerateOptions {
        GenerateOptions {
            max_tokens: self.n,
            sampler: self.sampling.config(engine),
            stop: self.stop.clone(),
            ignore_end: self.ignore_eos,
        }
    }

    fn sequence_options(&self, engine: &Engine, prompt: usize) -> SequenceOptions {
        let trained = engine.model().config.context_length;
        let needed = prompt.saturating_add(self.n).min(trained.max(prompt));
        if self.ctx.is_some_and(|context| context > trained) {
            tracing::warn!(
                "the model was trained for {trained} positions; what comes after them may be nonsense"
            );
        }
        SequenceOptions {
            context: Some(self.ctx.unwrap_or(needed)),
            cache_type: self.cache.cache_type(),
        }
    }
}

/// Reads standard input to its end, unless it is a terminal.
fn read_standard_input() -> Result<String> {
    let mut input = io::stdin();
    if input.is_terminal() {
        bail!("there is no prompt; give one with -p TEXT, -f FILE or on standard input");
    }
    let mut text = String::new();
    input
        .read_to_string(&mut text)
        .context("cannot read the prompt from standard input")?;
    Ok(text)
}

/// The speed of the model as it is, on the same prompt; the text is thrown away.
fn dense_speed(
    engine: &Engine,
    prompt: &[u32],
    options: &GenerateOptions,
    place: SequenceOptions,
) -> Result<Timings> {
    let options = GenerateOptions {
        max_tokens: options.max_tokens.min(BASELINE_TOKENS),
        stop: Vec::new(),
        ignore_end: true,
        ..options.clone()
    };
    let mut sequence = engine.sequence_with(place)?;
    let mut generation = engine.generate_behind(&mut sequence, prompt.to_vec(), &options)?;
    for piece in &mut generation {
        piece?;
    }
    let generated = generation.generated().expect("there are no more pieces");
    Ok(generated.timings)
}
