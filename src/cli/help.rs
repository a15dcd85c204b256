//! The help: its headings and their order, and what of it is short. Every option takes its heading from here, and the examples at
//! the end are here too.

use clap::Command;

/// The headings, under one of which every option is.
pub mod heading {
    pub const MODEL: &str = "Model";
    /// The prompt and what is generated behind it, or the text that is scored.
    pub const TEXT: &str = "Text";
    pub const SAMPLING: &str = "Sampling";
    pub const SERVER: &str = "Server";
    /// What `bench` times.
    pub const TESTS: &str = "Tests";
    /// What `convert` and `quantize` make of weights.
    pub const TYPES: &str = "Types";
    pub const AMOUNT: &str = "How much to prune";
    pub const METHOD: &str = "How to prune";
    pub const CALIBRATION: &str = "Calibration";
    pub const HEALING: &str = "Healing";
    pub const MACHINE: &str = "Machine";
    /// What `cache clear` and `models remove` take away.
    pub const REMOVAL: &str = "What to remove";
    pub const OUTPUT: &str = "Output";
    pub const GENERAL: &str = "General";

    /// In the order of the help.
    pub const ALL: [&str; 14] = [
        MODEL,
        TEXT,
        SERVER,
        SAMPLING,
        TESTS,
        TYPES,
        AMOUNT,
        METHOD,
        CALIBRATION,
        HEALING,
        MACHINE,
        REMOVAL,
        OUTPUT,
        GENERAL,
    ];
}

/// The options that `-h` shows, by their ids, where a command has more than [`FEW`]. `--help` shows all.
const ESSENTIAL: [&str; 38] = [
    "model",
    "synthetic",
    "prompt",
    "file",
    "raw",
    "host",
    "port",
    "api_key",
    "compare",
    "n",
    "ctx",
    "stop",
    "temp",
    "top_k",
    "seed",
    "chunks",
    "n_prompt",
    "n_gen",
    "n_depth",
    "parallel",
    "repetitions",
    "vs",
    "source",
    "file_type",
    "imatrix",
    "prune",
    "fit",
    "speedup",
    "max_ppl",
    "effort",
    "calib",
    "profile",
    "threads",
    "output",
    "json",
    "quiet",
    "verbose",
    "help",
];

/// What takes more than a line is for `--help`, however few options a command has.
const LONG: &str = "override_kv";

/// A command with at most so many options of its own shows them all in its short help.
const FEW: usize = 8;

/// Brings the options of a command and its subcommands into the order of the headings, and makes them alike in what they share:
/// the value of an option may begin with a dash.
///
/// Within a heading options are in the order of their declaration, whichever structures they come from.
pub fn arrange(command: Command) -> Command {
    let mut options: Vec<(usize, String)> = command
        .get_arguments()
        .map(|option| {
            let heading = option.get_help_heading().unwrap_or_default();
            let rank = heading::ALL.iter().position(|h| *h == heading);
            (rank.unwrap_or(usize::MAX), option.get_id().to_string())
        })
        .collect();
    options.sort_by_key(|(rank, _)| *rank);
    let many = options.len() > FEW;
    // The help shows headings as their first options come, and an option that is changed goes to the end.
    let command = (1..)
        .zip(options)
        .fold(command, |command, (place, (_, id))| {
            command.mut_arg(&id, |option| {
                let option = match id == LONG || many && !ESSENTIAL.contains(&id.as_str()) {
                    true => option.hide_short_help(true),
                    false => option,
                };
                if option.is_positional() {
                    return option;
                }
                let takes_value = option.get_action().takes_values();
                option.display_order(place).allow_hyphen_values(takes_value)
            })
        });
    command.mut_subcommands(arrange)
}

// ---- examples ----

pub const EXAMPLES: &str = "\
Examples:
  flapjack run -p \"Once upon a time\"                         the default model as it is
  flapjack run -m model.gguf --prune 0.3 -p \"Once upon a\"    pruned at start-up
  flapjack help run                                          all options of a command";

pub const RUN: &str = "\
Examples:
  flapjack run                                               a chat with the default model
  flapjack run -p \"What is the capital of France?\"           an answer
  flapjack run --raw -p \"Once upon a time\" -n 64             a text that goes on, 64 tokens at most
  flapjack run -m model.gguf -f prompt.txt -n -1 --temp 0    to the end of the text, no chance
  flapjack run -m model.gguf --prune 0.3 -p \"Once upon a\"    without 30 % of the layers' weights
  flapjack run --fit 80MB --calib notes.txt -f prompt.txt    to a size, for text of your kind";

pub const SERVE: &str = "\
Examples:
  flapjack serve                                             the default model, at port 8080
  flapjack serve -m model.gguf --prune 0.2 --parallel 8      pruned, for many at once
  flapjack serve -m model.gguf --prune 0.3 --compare         with the dense model beside it";

pub const PRUNE: &str = "\
Examples:
  flapjack prune -m model.gguf -o small.gguf --ratio 0.3
  flapjack prune -m model.gguf -o small.gguf --fit 80MB --calib notes.txt";

pub const CALIBRATE: &str = "\
Examples:
  flapjack calibrate -m model.gguf --calib notes.txt -o model.profile
  flapjack calibrate -m model.gguf --imatrix imatrix.gguf    for quantize, and for llama-quantize
  flapjack run -m model.gguf --prune 0.3 --profile model.profile -p \"Once upon a time\"";

pub const CONVERT: &str = "\
Examples:
  flapjack convert path/to/folder -o model.gguf                the weights in their own types
  flapjack convert path/to/folder -o model.gguf --type f16
  flapjack convert model-00001-of-00003.gguf -o model.gguf     one file in the place of three";

pub const QUANTIZE: &str = "\
Examples:
  flapjack quantize -m model-f16.gguf -o model.gguf --type q4_k_m
  flapjack quantize -m model-f16.gguf -o model.gguf --type q4_k_m --calib notes.txt
  flapjack quantize -m model-f16.gguf -o model.gguf --fit 2GB
  flapjack quantize -m model-f16.gguf --type q4_k_m --dry-run";

pub const PERPLEXITY: &str = "\
Examples:
  flapjack perplexity -m model.gguf -f text.txt                the model as it is
  flapjack perplexity -m model.gguf -f text.txt --prune 0.3    what pruning costs";

pub const BENCH: &str = "\
Examples:
  flapjack bench -m model.gguf -p 512 -n 128 --prune 0.3       dense and pruned
  flapjack bench -m model.gguf --vs path/to/llama-bench        beside llama.cpp
  flapjack bench --synthetic 7b -d 0,4096                      without a file; short and long";

pub const INFO: &str = "\
Examples:
  flapjack info
  FLAPJACK_ISA=avx2 flapjack info    with an instruction set of your choice";

pub const CACHE: &str = "\
Examples:
  flapjack cache
  flapjack cache clear --older-than 30d";

pub const MODELS: &str = "\
Examples:
  flapjack models
  flapjack models remove SmolLM2-135M-Instruct.Q4_1
  llama-cli -m \"$(flapjack models path SmolLM2-135M-Instruct.Q4_1)\"";

pub const CONFIG: &str = "\
Examples:
  flapjack config
  \"$EDITOR\" \"$(flapjack config --path)\"
  FLAPJACK_CONFIG= flapjack run      without the file";

pub const COMPLETIONS: &str = "\
Examples:
  flapjack completions bash > ~/.local/share/bash-completion/completions/flapjack
  flapjack completions zsh > ~/.zfunc/_flapjack
  flapjack completions fish > ~/.config/fish/completions/flapjack.fish";

pub const MAN: &str = "\
Examples:
  flapjack man | man -l -
  flapjack man ~/.local/share/man/man1";

pub const INSPECT: &str = "\
Examples:
  flapjack inspect small.gguf
  flapjack inspect small.gguf --json | jq .pruned";
