//! `flapjack perplexity`

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use flapjack::eval::{self, PerplexityOptions};
use serde::Serialize;

use super::options::{CacheOptions, ModelOptions, read_text};
use super::progress;
use super::pruning::PruneOptions;

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelOptions,
    /// The text to score
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a chunk; each is scored on its own
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// Score only the first N chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Score every position of a chunk but the first, not only the second half
    #[arg(long)]
    all_positions: bool,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    pruning: PruneOptions,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Output {
    model: String,
    file: String,
    perplexity: f64,
    stderr: f64,
    tokens: usize,
    chunks: usize,
    context: usize,
    all_positions: bool,
    isa: &'static str,
    /// The share of the layers' weights that was removed.
    prune_ratio: f64,
    seconds: f64,
}

pub fn run(args: PerplexityArgs) -> Result<()> {
    let text = read_text(&args.file)?;
    let mut loaded = args.model.load()?;
    let mut prune_ratio = 0.0;
    if let Some(job) = args.pruning.prepare(&loaded)? {
        let pruned = job.carry_out(&mut loaded, &args.model, false)?.pruned;
        prune_ratio = pruned.plan.ratio();
        if let Some(found) = pruned.found {
            eprintln!("{}", found.what);
        }
    }

    let tokens = loaded.tokenizer.encode_prompt(&text)?;
    let bos = loaded
        .tokenizer
        .bos()
        .filter(|_| loaded.tokenizer.adds_bos());
    let options = PerplexityOptions {
        context: args.ctx,
        chunks: args.chunks.map(|n| n as usize),
        all_positions: args.all_positions,
        cache_type: args.cache.cache_type(),
    };
    let start = Instant::now();
    let bar = progress::bar("scoring", 0, "chunks");
    let result = eval::perplexity(
        &loaded.model,
        &loaded.runtime,
        &tokens,
        bos,
        options,
        &mut |done, chunks| {
            bar.set_length(chunks as u64);
            bar.set_position(done as u64);
            std::ops::ControlFlow::Continue(())
        },
    )?;
    bar.finish_and_clear();

    let output = Output {
        model: loaded.model.path().display().to_string(),
        file: args.file.display().to_string(),
        perplexity: result.perplexity,
        stderr: result.stderr,
        tokens: result.tokens,
        chunks: result.chunks,
        context: args.ctx,
        all_positions: args.all_positions,
        isa: loaded.runtime.kernels.isa().name(),
        prune_ratio,
        seconds: start.elapsed().as_secs_f64(),
    };
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &output)?;
        writeln!(out)?;
    } else {
        writeln!(
            out,
            "perplexity {:.4} ± {:.4} ({} predictions in {} chunks of {})",
            output.perplexity, output.stderr, output.tokens, output.chunks, output.context
        )?;
    }
    Ok(())
}
