//! Arguments as users of other programs type them. What means the same here is an alias of the option; the rest is refused with a
//! word on what to do instead. They are looked at before the parser is, which would take `-hf` for `-h`.

use std::ffi::OsString;
use std::path::Path;

use clap::error::ErrorKind;
use clap::{Arg, Command, Error};

// ---- what others have ----

/// Names, and what to do here.
type Words = (&'static [&'static str], &'static str);

/// Options of llama.cpp's programs and of Ollama. They are looked up where a command has no option of that name, and those of
/// one dash and several letters always.
const OPTIONS: &[Words] = &[
    // Where models come from.
    (
        &["-hff", "--hf-file"],
        "a file of the hub is named with its repository: '--hf ORG/REPO/FILE'",
    ),
    (
        &["-hft", "--hf-token"],
        "the token for the hub is taken from the environment (HF_TOKEN), or from where 'hf auth login' puts it",
    ),
    (
        &["--offline"],
        "HF_HUB_OFFLINE=1 in the environment keeps flapjack from asking the hub",
    ),
    (
        &["-mu", "--model-url", "-dr", "--docker-repo", "--insecure"],
        "a model is a file, named with '-m FILE', or one of the Hugging Face hub, named with '--hf ORG/REPO'",
    ),
    (
        &["-cl", "--cache-list"],
        "'flapjack models' shows which models are on this machine",
    ),
    (
        &[
            "--lora",
            "--lora-scaled",
            "--control-vector",
            "--control-vector-scaled",
            "--control-vector-layer-range",
        ],
        "adapters and control vectors are not supported: merge them into the model first",
    ),
    (
        &[
            "-mm",
            "--mmproj",
            "-mmu",
            "--mmproj-url",
            "--no-mmproj",
            "--image",
            "--audio",
            "--video",
        ],
        "flapjack runs models of text only",
    ),
    // Other processors.
    (
        &[
            "-ngl",
            "--gpu-layers",
            "--n-gpu-layers",
            "-dev",
            "--device",
            "--list-devices",
            "-sm",
            "--split-mode",
            "-ts",
            "--tensor-split",
            "-mg",
            "--main-gpu",
            "-ot",
            "--override-tensor",
            "-cmoe",
            "--cpu-moe",
            "-ncmoe",
            "--n-cpu-moe",
            "-kvo",
            "--kv-offload",
            "-nkvo",
            "--no-kv-offload",
            "--op-offload",
            "-nopo",
            "--no-op-offload",
            "--no-host",
            "-rpc",
            "--rpc",
        ],
        "flapjack computes on the CPU of this machine: leave it out",
    ),
    (
        &["-fit", "-fitt", "--fit-target", "-fitc", "--fit-ctx"],
        "flapjack has no device whose memory a model could be fitted to: leave it out ('--fit SIZE' prunes the weights to a size here)",
    ),
    // How it is computed.
    (
        &["-fa", "--flash-attn"],
        "attention is always computed in blocks, without a matrix of all scores: leave it out",
    ),
    (
        &["-b", "--batch-size", "-ub", "--ubatch-size"],
        "how many tokens of a prompt go through the model at once is not for choosing: leave it out",
    ),
    (
        &["-tb", "--threads-batch"],
        "'-t N' is the number of threads for prompts and for what is generated: leave it out",
    ),
    (
        &[
            "-C",
            "--cpu-mask",
            "-Cr",
            "--cpu-range",
            "--cpu-strict",
            "--prio",
            "--poll",
            "-Cb",
            "--cpu-mask-batch",
            "-Crb",
            "--cpu-range-batch",
            "--cpu-strict-batch",
            "--prio-batch",
            "--poll-batch",
            "--numa",
        ],
        "where and how threads run is left to the system: leave it out, or start flapjack by taskset, numactl or nice",
    ),
    (
        &["-ctk", "--cache-type-k", "-ctv", "--cache-type-v"],
        "keys and values are stored in the same type, '--kv f16' or '--kv q8_0'",
    ),
    (
        &[
            "--mmap",
            "--no-mmap",
            "--mlock",
            "-dio",
            "--direct-io",
            "-ndio",
            "--no-direct-io",
            "-lm",
            "--load-mode",
        ],
        "the file is always mapped: leave it out ('--no-pack' keeps the pages shared with the file)",
    ),
    (
        &["--repack", "-nr"],
        "weights are rearranged where that is faster; '--no-pack' leaves them as they lie",
    ),
    (
        &[
            "-md",
            "--model-draft",
            "--spec-draft-model",
            "-hfd",
            "--hf-repo-draft",
            "-td",
            "--threads-draft",
            "-ngld",
            "--n-gpu-layers-draft",
            "-ctkd",
            "-ctvd",
            "--draft",
            "--draft-n",
            "--draft-max",
            "--draft-min",
            "--draft-p-min",
            "--spec-type",
            "--spec-default",
        ],
        "there is no speculative decoding: leave it out",
    ),
    (
        &["-np", "-ns", "--sequences", "-cb", "--cont-batching"],
        "one text is generated at a time: leave it out",
    ),
    // The context.
    (
        &[
            "--keep",
            "--context-shift",
            "--no-context-shift",
            "--swa-full",
            "-dt",
            "--defrag-thold",
            "-gan",
            "--grp-attn-n",
            "-gaw",
            "--grp-attn-w",
        ],
        "generation ends where the context is full, and nothing is shifted out of it: leave it out, and make room with '-c N'",
    ),
    (
        &[
            "--rope-scaling",
            "--rope-scale",
            "--rope-freq-base",
            "--rope-freq-scale",
            "--yarn-orig-ctx",
            "--yarn-ext-factor",
            "--yarn-attn-factor",
            "--yarn-beta-slow",
            "--yarn-beta-fast",
        ],
        "positions are embedded as the model's file says: leave it out",
    ),
    (
        &["--prompt-cache", "--prompt-cache-all", "--prompt-cache-ro"],
        "prompts are not kept between runs: leave it out",
    ),
    // The prompt, and talking.
    (
        &["-no-cnv", "--no-conversation", "--no-jinja"],
        "'--raw' goes on with the prompt as it stands",
    ),
    (
        &["-sys", "--system-prompt", "-sysf", "--system-prompt-file"],
        "'--system TEXT' stands before the user's messages",
    ),
    (
        &["--chat-template-file"],
        "'--chat-template FILE' takes a file, or the name of a template",
    ),
    (
        &[
            "--reasoning-format",
            "--reasoning-budget",
            "--think",
            "--hidethinking",
            "-rea",
            "--reasoning",
        ],
        "'--no-thinking' leaves out what the model thinks before it answers",
    ),
    (
        &[
            "-cnv",
            "--conversation",
            "-i",
            "--interactive",
            "-if",
            "--interactive-first",
            "-st",
            "--single-turn",
            "-mli",
            "--multiline-input",
            "--jinja",
            "--in-prefix",
            "--in-suffix",
        ],
        "'flapjack run' is a chat where there is no prompt, and answers a prompt by the model's chat template: leave it out",
    ),
    (
        &["-r", "--reverse-prompt"],
        "'--stop TEXT' ends the answer where the text appears",
    ),
    (
        &["-e", "--escape", "--no-escape"],
        "a prompt is taken as it is typed: leave it out, and give line breaks with '-f FILE'",
    ),
    (
        &["-bf", "--binary-file"],
        "'-f FILE' reads the prompt from a file of UTF-8 text",
    ),
    // Sampling.
    (
        &[
            "--sampler-seq",
            "--sampling-seq",
            "--adaptive-target",
            "--adaptive-decay",
        ],
        "what is sampled from is set by '--temp', '--top-k', '--top-p', '--min-p' and '--repeat-penalty'",
    ),
    (
        &["-jf", "--format"],
        "answers cannot be held to a grammar yet",
    ),
    // What is printed.
    (
        &["-lv", "--verbosity", "--log-verbosity", "--log-verbose"],
        "'-v' says more, and '-vv' more still",
    ),
    (
        &[
            "--log-disable",
            "--log-file",
            "--log-colors",
            "--log-prefix",
            "--log-timestamps",
        ],
        "what is not asked for goes to standard error: redirect it, with 2>FILE or 2>/dev/null",
    ),
    (
        &[
            "-co",
            "--color",
            "--simple-io",
            "--display-prompt",
            "--no-display-prompt",
            "--verbose-prompt",
            "-sp",
            "--perf",
            "--no-perf",
            "--show-timings",
            "--no-show-timings",
            "-ptc",
            "--print-token-count",
            "--nowordwrap",
        ],
        "standard output has the generated text and nothing else, and the report is on standard error: leave it out",
    ),
    (
        &[
            "--warmup",
            "--no-warmup",
            "--progress",
            "--delay",
            "--keepalive",
        ],
        "there is nothing like that here: leave it out",
    ),
    (
        &["-pg"],
        "prompts and generating are timed apart, with '-p N' and '-n N'; '-d N' fills the cache before",
    ),
];

/// Commands of Ollama and of other programs.
const COMMANDS: &[Words] = &[
    (
        &["pull", "push", "create", "cp", "get", "download"],
        "'flapjack run --hf ORG/REPO' fetches a model of the hub once; other models are plain files, named with 'flapjack run -m FILE'",
    ),
    (
        &["list", "ls", "ps", "stop"],
        "none stays loaded; 'flapjack models' shows those that are on this machine",
    ),
    (
        &["rm", "delete"],
        "'flapjack models remove NAME' removes a model from the cache folder; others are plain files",
    ),
    (
        &["completion"],
        "'flapjack completions SHELL' prints a script for a shell, and 'flapjack run --raw' goes on with a text",
    ),
    (
        &["show"],
        "'flapjack inspect FILE' shows what is in a model",
    ),
    (&["server", "start"], "'flapjack serve' answers over HTTP"),
    (
        &["chat", "cli", "generate", "simple"],
        "'flapjack run' is a chat, and 'flapjack run -p TEXT' answers a text",
    ),
    (&["ppl"], "'flapjack perplexity -f FILE' scores a text"),
    (
        &["imatrix"],
        "'flapjack calibrate --imatrix FILE' writes an importance matrix, and 'flapjack quantize --imatrix FILE' reads it",
    ),
];

fn words(table: &[Words], name: &str) -> Option<&'static str> {
    let known = table.iter().find(|(names, _)| names.contains(&name));
    known.map(|(_, words)| *words)
}

// ---- names of several letters that mean the same here ----

/// The arguments with llama.cpp's names for the hub, `-hf` and `-hfr`, as the option that they stand for.
pub fn translated(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let options = arguments
        .iter_mut()
        .take_while(|argument| *argument != "--");
    for argument in options {
        let Some(text) = argument.to_str() else {
            continue;
        };
        let head = head(text);
        if matches!(head, "-hf" | "-hfr") {
            *argument = format!("--hf{}", &text[head.len()..]).into();
        }
    }
    arguments
}

// ---- looking at arguments ----

/// Something that the parser would misunderstand, or refuse without a word on what to do.
struct Habit {
    kind: ErrorKind,
    /// The subcommand in which it is, if in any.
    command: Option<String>,
    message: String,
}

/// Refuses arguments that are other programs', and options in the place of values. What else is wrong is for the parser to find.
///
/// # Errors
/// In the form of the parser's own.
pub fn check(root: &mut Command, arguments: &[OsString]) -> Result<(), Error> {
    let Some(habit) = find(root, arguments) else {
        return Ok(());
    };
    let subcommand = habit
        .command
        .filter(|name| root.find_subcommand(name).is_some());
    let command = match subcommand {
        Some(name) => root.find_subcommand_mut(name).expect("it is there"),
        None => root,
    };
    Err(command.error(habit.kind, habit.message))
}

fn find(root: &Command, arguments: &[OsString]) -> Option<Habit> {
    let mut command = root;
    let mut path: Option<String> = None;
    let mut arguments = arguments.iter().skip(1).map(|a| a.to_string_lossy());
    while let Some(argument) = arguments.next() {
        let habit = |kind, message| {
            Some(Habit {
                kind,
                command: path.clone(),
                message,
            })
        };
        if argument == "--" {
            return None;
        }
        if !is_dashed(&argument) {
            if let Some(subcommand) = command.find_subcommand(&*argument) {
                if subcommand.get_name() == "help" {
                    return None;
                }
                command = subcommand;
                path.get_or_insert_with(|| subcommand.get_name().to_owned());
                continue;
            }
            let place = match command.has_subcommands() {
                true => in_place_of_a_command(&argument).map(|tip| {
                    let message = format!("unrecognized subcommand '{argument}'");
                    (ErrorKind::InvalidSubcommand, message, tip)
                }),
                false => out_of_place(command, &argument).map(|tip| {
                    let message = format!("unexpected argument '{argument}' found");
                    (ErrorKind::UnknownArgument, message, tip)
                }),
            };
            let (kind, message, tip) = place?;
            return habit(kind, with_tip(&message, &tip));
        }
        match meaning(command, &argument) {
            Meaning::Known => {}
            Meaning::TakesNext(option) => {
                let value = arguments.next()?;
                if is_option(command, &value) {
                    let long = option.get_long().unwrap_or_default();
                    let message = format!(
                        "a value is required for '{option}' but the option '{value}' follows"
                    );
                    let tip = format!("to give '{value}' as the value, use '--{long}={value}'");
                    return habit(ErrorKind::InvalidValue, with_tip(&message, &tip));
                }
            }
            Meaning::Unknown(tip) => {
                let tip = tip.or_else(|| before_its_command(command, &argument))?;
                let message = format!("unexpected argument '{}' found", head(&argument));
                return habit(ErrorKind::UnknownArgument, with_tip(&message, &tip));
            }
        }
    }
    None
}

fn with_tip(message: &str, tip: &str) -> String {
    match tip {
        "" => message.to_owned(),
        tip => format!("{message}\n\n  tip: {tip}"),
    }
}

/// What stands before the value that is written in the same argument, if one is.
fn head(argument: &str) -> &str {
    argument.split('=').next().unwrap_or(argument)
}

/// `-` alone is a value.
fn is_dashed(argument: &str) -> bool {
    argument.starts_with('-') && argument.len() > 1
}

enum Meaning<'a> {
    /// Options that need nothing of the next argument.
    Known,
    /// The next argument is this option's value.
    TakesNext(&'a Arg),
    /// What to do instead, if there is something to say; empty to refuse it though the parser might not.
    Unknown(Option<String>),
}

fn meaning<'a>(command: &'a Command, argument: &str) -> Meaning<'a> {
    let head = head(argument);
    if let Some(name) = head.strip_prefix("--") {
        return match long(command, name) {
            Some(option) if takes_value(option) && head == argument => Meaning::TakesNext(option),
            Some(_) => Meaning::Known,
            // Other programs take one dash or two.
            None => {
                let words = words(OPTIONS, head).or_else(|| words(OPTIONS, &head[1..]));
                Meaning::Unknown(words.map(str::to_owned))
            }
        };
    }
    let mut letters = head[1..].chars();
    letters.next();
    let rest = letters.as_str();
    if !rest.is_empty() {
        // Names of several letters behind one dash.
        let doubled = format!("-{head}");
        if let Some(words) = words(OPTIONS, head).or_else(|| words(OPTIONS, &doubled)) {
            return Meaning::Unknown(Some(words.to_owned()));
        }
        if long(command, &doubled[2..]).is_some() {
            let tip = format!("a similar argument exists: '{doubled}'");
            return Meaning::Unknown(Some(tip));
        }
    }
    // Letters of options that are written together, the last of which may have its value behind it.
    let mut letters = argument[1..].chars();
    let mut help = false;
    while let Some(letter) = letters.next() {
        match short(command, letter) {
            Some(option) if takes_value(option) => {
                return match letters.as_str().is_empty() {
                    true => Meaning::TakesNext(option),
                    false => Meaning::Known,
                };
            }
            Some(option) => help |= option.get_id() == "help",
            None if rest.is_empty() => {
                return Meaning::Unknown(words(OPTIONS, head).map(str::to_owned));
            }
            // The parser would show the help before it came to this letter.
            None if help => return Meaning::Unknown(Some(String::new())),
            None => return Meaning::Unknown(None),
        }
    }
    Meaning::Known
}

fn takes_value(option: &Arg) -> bool {
    option.get_action().takes_values()
}

fn long<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|option| {
        let aliases = option.get_all_aliases().unwrap_or_default();
        option.get_long() == Some(name) || aliases.contains(&name)
    })
}

fn short(command: &Command, letter: char) -> Option<&Arg> {
    command.get_arguments().find(|option| {
        let aliases = option.get_all_short_aliases().unwrap_or_default();
        option.get_short() == Some(letter) || aliases.contains(&letter)
    })
}

/// Whether an argument is an option's name and nothing else, so that it is hardly meant as a value.
fn is_option(command: &Command, argument: &str) -> bool {
    if let Some(name) = argument.strip_prefix("--") {
        return long(command, head(name)).is_some() || words(OPTIONS, argument).is_some();
    }
    let mut letters = argument.strip_prefix('-').unwrap_or_default().chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) if short(command, letter).is_some() => true,
        _ => is_dashed(argument) && words(OPTIONS, argument).is_some(),
    }
}

/// Where an option of a command stands before it, or without one.
fn before_its_command(command: &Command, argument: &str) -> Option<String> {
    let known = |command: &Command| !matches!(meaning(command, argument), Meaning::Unknown(_));
    let commands = command.get_subcommands();
    let mut named = commands.filter(|c| c.get_name() != "help" && known(c));
    let name = named.next()?.get_name();
    Some(format!(
        "options come behind a command, for example 'flapjack {name} {argument} …'"
    ))
}

fn in_place_of_a_command(argument: &str) -> Option<String> {
    if is_model(argument) {
        return Some(format!(
            "to generate text, use 'flapjack run -m {argument}'"
        ));
    }
    words(COMMANDS, argument).map(str::to_owned)
}

/// What a word may have been meant as in a command that takes none.
fn out_of_place(command: &Command, argument: &str) -> Option<String> {
    if command.get_positionals().next().is_some() {
        return None;
    }
    long(command, "model")?;
    let prompt = long(command, "prompt").is_some();
    Some(if is_model(argument) {
        format!("a model is named with '-m', as in '-m {argument}'")
    } else if prompt && argument.contains(char::is_whitespace) {
        "a prompt is given with '-p TEXT'".to_owned()
    } else if prompt {
        "a model is a .gguf file, named with '-m FILE', and a prompt is given with '-p TEXT'"
            .to_owned()
    } else {
        "a model is a .gguf file, named with '-m FILE'".to_owned()
    })
}

fn is_model(argument: &str) -> bool {
    let extension = Path::new(argument).extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

#[cfg(test)]
mod tests {
    use super::super::command;
    use super::*;

    fn refused(arguments: &str) -> Option<String> {
        let mut root = command();
        root.build();
        let arguments: Vec<OsString> = arguments.split(' ').map(OsString::from).collect();
        check(&mut root, &arguments).err().map(|e| e.to_string())
    }

    #[test]
    fn no_name_is_in_the_tables_twice_and_none_is_an_option_of_every_command() {
        let mut names: Vec<&str> = OPTIONS
            .iter()
            .flat_map(|(names, _)| *names)
            .copied()
            .collect();
        names.extend(COMMANDS.iter().flat_map(|(names, _)| *names));
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        let mut root = command();
        root.build();
        for name in names {
            assert!(root.find_subcommand(name).is_none(), "{name} is a command");
            if let Some(name) = name.strip_prefix("--") {
                let run = root.find_subcommand("run").unwrap();
                assert!(long(run, name).is_none(), "--{name} is an option of run");
            }
        }
    }

    #[test]
    fn what_the_tables_advise_can_be_typed() {
        let mut root = command();
        root.build();
        let run = root.find_subcommand("run").unwrap();
        let bench = root.find_subcommand("bench").unwrap();
        for (_, words) in OPTIONS.iter().chain(COMMANDS) {
            for quoted in words.split('\'').skip(1).step_by(2) {
                let typed: Vec<&str> = quoted.split(' ').collect();
                if let ["flapjack", name, ..] = typed[..] {
                    assert!(root.find_subcommand(name).is_some(), "{quoted}");
                } else {
                    let there =
                        |c| matches!(meaning(c, typed[0]), Meaning::Known | Meaning::TakesNext(_));
                    assert!(there(run) || there(bench), "{quoted}");
                }
            }
        }
    }

    #[test]
    fn what_flapjack_knows_passes() {
        for arguments in [
            "flapjack run -p - -n -1 --stop -x --seed=-1 -vq",
            "flapjack -v run -mfile -n5 -t4 --temp=0 -p=-n",
            "flapjack bench -r 3 -p 1,2 -o csv --parallel 2",
            "flapjack inspect file.gguf",
            "flapjack help run",
            "flapjack run -hv",
            "flapjack run -- -hf",
            // For the parser to refuse.
            "flapjack run --tempp 1",
            "flapjack rnu",
            "flapjack run -p",
            "flapjack run -qx",
        ] {
            assert_eq!(refused(arguments), None, "{arguments}");
        }
    }
}
