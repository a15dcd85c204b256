//! One file per subcommand, and what they share: `arguments` and the engine's options that they stand for, options of `sampling`,
//! `words`, `progress` bars, and the lines of a `report`.

mod arguments;
mod bench;
mod calibrate;
mod info;
mod inspect;
mod overrides;
mod perplexity;
mod progress;
mod prune;
mod report;
mod run;
mod sampling;
mod words;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs LLaMA-family models on the CPU, and prunes them at start-up.
#[derive(Debug, Parser)]
#[command(name = "flapjack", version, arg_required_else_help = true)]
struct Cli {
    /// Say more on standard error (twice: more still)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate text from a prompt
    Run(run::RunArgs),
    /// Prune a model and write it to a file that flapjack and llama.cpp run
    Prune(prune::PruneArgs),
    /// Run a calibration text through a model and write what it leaves behind, its profile, to a file
    Calibrate(calibrate::CalibrateArgs),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::PerplexityArgs),
    /// Measure the speed of models, dense and pruned, and of llama.cpp beside them
    Bench(bench::BenchArgs),
    /// Show what a GGUF file holds, and how it was pruned
    Inspect(inspect::InspectArgs),
    /// Show what this machine offers and what is used of it
    Info(info::InfoArgs),
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.verbose);
    let result = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Prune(args) => prune::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Info(args) => info::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has had enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            words::say(&format!("error: {}", words::describe(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Logs go to standard error. `FLAPJACK_LOG` takes a filter in the manner of `RUST_LOG`, for example `flapjack=debug`.
fn start_logging(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = std::env::var("FLAPJACK_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        // Where standard error cannot be written, neither can the news of it.
        .log_internal_errors(false)
        .with_target(false)
        .without_time()
        .init();
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}
