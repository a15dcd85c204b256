//! One file per subcommand, and what they share: `arguments` and the engine's options that they stand for, options of `sampling`,
//! the order of the `help`, `habits` of users of other programs, `defaults` of the user's own, `words`, `progress` bars, and the lines of
//! a `report`.

mod arguments;
mod bench;
mod cache;
mod calibrate;
mod chat;
mod completions;
mod config;
mod convert;
mod defaults;
mod ending;
mod habits;
mod help;
mod info;
mod inspect;
mod interrupt;
mod man;
mod models;
mod overrides;
mod perplexity;
mod progress;
mod prune;
mod quantize;
mod report;
mod run;
mod sampling;
mod serve;
mod streams;
mod words;

use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use flapjack::engine::{EngineError, Unsuited};

use arguments::WrongUse;
use help::heading;
use interrupt::Interrupted;

/// Runs LLaMA-family models on the CPU, and prunes them at start-up.
#[derive(Debug, Parser)]
#[command(name = "flapjack", version, arg_required_else_help = true, after_help = help::EXAMPLES)]
// The parser's own would stand apart from all other options.
#[command(disable_help_flag = true, disable_version_flag = true)]
struct Cli {
    /// Say more on standard error (twice: more still)
    #[arg(help_heading = heading::GENERAL, short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Show the essential options (-h) or all of them (--help)
    #[arg(help_heading = heading::GENERAL, short, long, global = true, action = ArgAction::Help)]
    help: Option<bool>,
    /// Show the version
    #[arg(help_heading = heading::GENERAL, short = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer a prompt, go on with a text, or chat
    #[command(after_help = help::RUN)]
    Run(run::RunArgs),
    /// Answer over HTTP: OpenAI's interface, Ollama's, and a page
    #[command(after_help = help::SERVE)]
    Serve(serve::ServeArgs),
    /// Prune a model and write it to a file that flapjack and llama.cpp run
    #[command(after_help = help::PRUNE)]
    Prune(prune::PruneArgs),
    /// Run calibration text through a model and write the profile to a file
    #[command(after_help = help::CALIBRATE)]
    Calibrate(calibrate::CalibrateArgs),
    /// Write a folder of safetensors files, or a GGUF file, as one GGUF file
    #[command(after_help = help::CONVERT)]
    Convert(convert::ConvertArgs),
    /// Write a model in smaller types, by llama.cpp's mixtures or to a size
    #[command(after_help = help::QUANTIZE)]
    Quantize(quantize::QuantizeArgs),
    /// Measure how well a model predicts a text
    #[command(after_help = help::PERPLEXITY)]
    Perplexity(perplexity::PerplexityArgs),
    /// Measure the speed of models, dense and pruned, and of llama.cpp beside them
    #[command(after_help = help::BENCH)]
    Bench(bench::BenchArgs),
    /// Show what a GGUF file holds, and how it was pruned
    #[command(after_help = help::INSPECT)]
    Inspect(inspect::InspectArgs),
    /// Show what this machine offers and what is used of it
    #[command(after_help = help::INFO)]
    Info(info::InfoArgs),
    /// Show what is kept from earlier runs, or remove it
    #[command(after_help = help::CACHE)]
    Cache(cache::CacheFolderArgs),
    /// Show which models are on this machine, or remove some
    #[command(after_help = help::MODELS)]
    Models(models::ModelsArgs),
    /// Show the config file and the defaults that it sets
    #[command(after_help = help::CONFIG)]
    Config(config::ConfigArgs),
    /// Print a script that completes the command line in a shell
    #[command(after_help = help::COMPLETIONS)]
    Completions(completions::CompletionsArgs),
    /// Write the help as manual pages
    #[command(after_help = help::MAN)]
    Man(man::ManArgs),
}

/// The command line as it is parsed, with its options in the order of the help.
fn command() -> clap::Command {
    help::arrange(Cli::command())
}

/// Parses the arguments, or says what is wrong with them; also the defaults that were taken from the config file, in words.
fn parse() -> anyhow::Result<(Cli, Option<String>)> {
    let arguments = habits::translated(std::env::args_os().collect());
    let mut command = command();
    command.build();
    habits::check(&mut command, &arguments)?;
    let parsed = defaults::parse(self::command, &arguments)?;
    Ok((Cli::from_arg_matches(&parsed.matches)?, parsed.taken))
}

pub fn main() -> ExitCode {
    let (cli, defaults) = match parse() {
        Ok(parsed) => parsed,
        Err(error) => {
            return match error.downcast_ref() {
                Some(message) => show(message),
                None => fail(&error),
            };
        }
    };
    start_logging(cli.verbose);
    if let Some(defaults) = defaults {
        tracing::info!("defaults of {defaults}");
    }
    survive_file_limits();
    let result = interrupt::install().and_then(|()| match cli.command {
        Command::Run(args) => run::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Prune(args) => prune::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Info(args) => info::run(args),
        Command::Cache(args) => cache::run(args),
        Command::Models(args) => models::run(args),
        Command::Config(args) => config::run(&args, command()),
        Command::Completions(args) => completions::run(&args, command()),
        Command::Man(args) => man::run(&args, command()),
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
    match signal {
        Some(signal) => signal.exit_code().into(),
        None if is_wrong_use(error) => ExitCode::from(2),
        None => ExitCode::FAILURE,
    }
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

/// Whether the command line alone tells that this cannot be.
fn is_wrong_use(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let engine = cause.downcast_ref::<EngineError>();
        cause.is::<WrongUse>()
            || matches!(engine, Some(EngineError::Unsuited(Unsuited::Sequential)))
    })
}

/// Lets a write beyond the largest size that files may have (`ulimit -f`) be an error of that write. By default the system ends the
/// process, with nothing said.
fn survive_file_limits() {
    #[cfg(unix)]
    {
        let noticed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        if let Err(error) = signal_hook::flag::register(libc::SIGXFSZ, noticed) {
            tracing::debug!("the limit of file sizes ends the process: {error}");
        }
    }
}
