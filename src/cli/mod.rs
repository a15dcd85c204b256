//! One file per subcommand, and what they share: `arguments` and the engine's options that they stand for, options of `sampling`,
//! `words`, `progress` bars, and the lines of a `report`.

mod arguments;
mod bench;
mod calibrate;
mod ending;
mod info;
mod inspect;
mod interrupt;
mod overrides;
mod perplexity;
mod progress;
mod prune;
mod report;
mod run;
mod sampling;
mod streams;
mod words;

use std::process::ExitCode;

use interrupt::Interrupted;

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
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => return show(&message),
    };
    start_logging(cli.verbose);
    let result = interrupt::install().and_then(|()| match cli.command {
        Command::Run(args) => run::run(args),
        Command::Prune(args) => prune::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Info(args) => info::run(args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// The exit code for an error, which is told unless there is nothing to tell.
fn fail(error: &anyhow::Error) -> ExitCode {
    if streams::reader_left(error) {
        return ExitCode::SUCCESS;
    }
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        return ExitCode::from(signal.exit_code());
    }
    let signal = interrupt::noted();
    match signal.is_some() && words::is_cancelled(error) {
        true => words::say("interrupted"),
        false => words::say(&format!("error: {}", words::describe(error))),
    }
    signal.map_or(ExitCode::FAILURE, |signal| signal.exit_code().into())
}

/// Shows help, the version, or what is wrong with the arguments.
fn show(message: &clap::Error) -> ExitCode {
    let shown = message.print();
    match (message.use_stderr(), shown) {
        (true, _) => ExitCode::from(2),
        (false, Err(error)) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            words::say(&format!("error: cannot write to standard output: {error}"));
            ExitCode::FAILURE
        }
        (false, _) => ExitCode::SUCCESS,
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
    let wanted = std::env::var("FLAPJACK_LOG").ok();
    let filter = wanted.as_deref().map(EnvFilter::try_new);
    let wrong = matches!(filter, Some(Err(_)));
    let filter = filter.and_then(Result::ok);
    let filter = filter.unwrap_or_else(|| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| streams::Log)
        .with_ansi(streams::has_colours())
        // Where standard error cannot be written, neither can the news of it.
        .log_internal_errors(false)
        .with_target(false)
        .without_time()
        .init();
    if wrong {
        tracing::warn!(
            "FLAPJACK_LOG={} is no log filter, such as flapjack=debug, and is passed over",
            wanted.unwrap_or_default()
        );
    }
}
