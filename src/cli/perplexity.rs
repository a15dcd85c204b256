//! `flapjack perplexity`

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use flapjack::engine::EngineError;
use flapjack::eval::{PerplexityError, PerplexityOptions};
use serde::Serialize;

use super::arguments::{CacheArgs, ModelArgs, PruningArgs, parse_chunk, plain_text, whole};
use super::interrupt::{self, Watch};
use super::report::found_words;
use super::words::plural;
use super::{heading, progress, streams, words};

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to score
    #[arg(help_heading = heading::TEXT, short, long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a chunk (0: the model's context)
    ///
    /// At least 4. Each chunk is scored on its own.
    #[arg(help_heading = heading::TEXT, short, long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512, value_parser = parse_chunk)]
    ctx: usize,
    /// Score only the first N chunks
    #[arg(help_heading = heading::TEXT, long, value_name = "N", value_parser = whole::<u32>(1..=u32::MAX.into()))]
    chunks: Option<u32>,
    /// Score every position of a chunk but the first, not only the second half
    #[arg(help_heading = heading::TEXT, long)]
    all_positions: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    pruning: PruningArgs,
    /// Print one JSON object
    #[arg(help_heading = heading::OUTPUT, long)]
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
    /// The share of the weights left that was set to zero.
    sparse_ratio: f64,
    seconds: f64,
}

pub fn run(args: PerplexityArgs) -> Result<()> {
    let text = plain_text(&args.file)?;
    let mut engine = args.model.open()?;
    let context = match args.ctx {
        0 => engine.model().config.context_length,
        tokens => tokens,
    };
    let options = PerplexityOptions {
        context,
        chunks: args.chunks.map(|n| n as usize),
        all_positions: args.all_positions,
        cache_type: args.cache.cache_type(),
    };
    // Before pruning, so that a text that cannot be read is known early.
    let tokens = engine.read(&text, options.most_tokens())?;
    let (mut prune_ratio, mut sparse_ratio) = (0.0, 0.0);
    if let Some(options) = args.pruning.options_if_any(false)? {
        let prepared = engine.prepare(&options)?;
        words::log(prepared.notices());
        let pruned = engine.prune_prepared(prepared, &mut progress::bars())?;
        words::log(&pruned.notices);
        interrupt::check()?;
        prune_ratio = pruned.removed;
        sparse_ratio = pruned.sparse.as_ref().map_or(0.0, |sparse| sparse.removed);
        if let Some(search) = &pruned.search {
            words::say(&found_words(pruned.target, pruned.ratio, &search.found));
        }
    }

    let start = Instant::now();
    words::log(engine.beyond_training(context).as_slice());
    let watch = Watch::begin();
    let result = match engine.perplexity_of(&tokens, options, &mut progress::bars()) {
        Err(EngineError::Perplexity(PerplexityError::Stopped(so_far))) => {
            words::say("interrupted; this is what the chunks before came to");
            so_far
        }
        result => result?,
    };
    if let Some(asked) = options
        .chunks
        .filter(|n| *n > result.chunks && watch.flow().is_continue())
    {
        tracing::warn!(
            "the text has only {} of {}, not the {asked} of --chunks",
            plural(result.chunks, "chunk"),
            plural(context, "token"),
        );
    }
    let model = engine.report();
    let output = Output {
        model: model.path.display().to_string(),
        file: args.file.display().to_string(),
        perplexity: result.perplexity,
        stderr: result.stderr,
        tokens: result.tokens,
        chunks: result.chunks,
        context,
        all_positions: args.all_positions,
        isa: model.isa,
        prune_ratio,
        sparse_ratio,
        seconds: start.elapsed().as_secs_f64(),
    };
    streams::print(|out| match args.json {
        true => out.json(&output),
        false => writeln!(
            out,
            "perplexity {:.4} ± {:.4} ({} in {} of {})",
            output.perplexity,
            output.stderr,
            plural(output.tokens, "prediction"),
            plural(output.chunks, "chunk"),
            output.context
        ),
    })?;
    Ok(watch.end()?)
}
