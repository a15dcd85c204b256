//! What users of other programs type, and what any user mistypes: the command line takes it as meant, or says what to do.

use std::collections::BTreeSet;
use std::fs;
use std::process::Output;

use flapjack::engine::{SyntheticType, TINY, write_synthetic};
use flapjack::model::Shape;

use crate::common::engine::Workshop;
use crate::common::program::{fail, flapjack, flapjack_reading, stderr, stdout, succeed};

/// The headings of options, in their order.
const HEADINGS: [&str; 14] = [
    "Model",
    "Text",
    "Server",
    "Sampling",
    "Tests",
    "Types",
    "How much to prune",
    "How to prune",
    "Calibration",
    "Healing",
    "Machine",
    "What to remove",
    "Output",
    "General",
];

/// The error of wrong use.
fn misuse(arguments: &[&str]) -> String {
    let message = fail(arguments);
    let code = flapjack(arguments).status.code();
    assert_eq!(code, Some(2), "{arguments:?}: {message}");
    message
}

/// [`misuse`] of arguments with spaces between, and what its message must say.
fn misused(arguments: &str, words: &[&str]) {
    let message = misuse(&arguments.split(' ').collect::<Vec<_>>());
    for word in words {
        assert!(message.contains(word), "{arguments}: {word} in {message}");
    }
}

fn run_in(workshop: &Workshop, arguments: &[&str]) -> Output {
    workshop.flapjack(&[&["run", "-q", "--temp", "0"], arguments].concat())
}

// ---- values that begin with a dash ----

#[test]
fn text_is_taken_as_text_though_it_begins_with_a_dash() {
    let workshop = Workshop::new();
    let said = |arguments: &[&str]| {
        let output = run_in(&workshop, arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    for prompt in [
        "- first item",
        "-5 + 3 =",
        "--- title",
        "-x",
        "--no such",
        "-",
    ] {
        let file = workshop.write("prompt.txt", prompt);
        let file = file.to_str().unwrap();
        let expected = said(&["-n", "5", "-f", file]);
        assert_eq!(said(&["-n", "5", "-p", prompt]), expected, "{prompt}");
        let attached = format!("--prompt={prompt}");
        assert_eq!(said(&["-n", "5", &attached]), expected, "{prompt}");
    }
    // A text to stop at.
    said(&["-p", "x", "-n", "2", "--stop", "- "]);
    said(&["-p", "x", "-n", "2", "--stop", "-----"]);
}

#[test]
fn the_name_of_a_file_may_begin_with_a_dash() {
    for (arguments, name) in [
        (&["run", "-p", "x", "-m"][..], "-model.gguf"),
        (&["run", "-f"], "-prompt.txt"),
        (
            &["run", "-p", "x", "--prune", "0.2", "--calib"],
            "-calib.txt",
        ),
        (
            &["run", "-p", "x", "--prune", "0.2", "--profile"],
            "-1.profile",
        ),
        (&["perplexity", "-f"], "--text.txt"),
        (&["prune", "--ratio", "0.2", "-o"], "-nowhere/x.gguf"),
        (&["bench", "-p", "8", "-n", "0", "--vs"], "-llama-bench"),
    ] {
        let arguments = [arguments, &[name]].concat();
        let output = flapjack(&arguments);
        // Taken as a file's name, and there is no such file.
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let folder = name.split('/').next().unwrap();
        assert!(stderr(&output).contains(folder), "{}", stderr(&output));
    }
}

#[test]
fn an_option_in_the_place_of_a_value_is_not_taken_for_it() {
    for arguments in [
        "run -p -n 5",
        "run -p --prune 0.2",
        "run -p x --stop --temp 0",
        "run -p --temp=0",
        "run -m -p x",
        "run -p -ngl 99",
        "perplexity -f -c 64",
        "prune --ratio 0.2 -o -q",
        "run -n --temp 0",
    ] {
        misused(arguments, &["a value is required for '-", "option '-"]);
    }
    let message = misuse(&["run", "-p", "-n", "5"]);
    assert!(message.contains("--prompt=-n"), "{message}");
    misused("run -p", &["a value is required for '--prompt <TEXT>'"]);
}

#[test]
fn numbers_below_zero_name_the_option_and_its_range() {
    for (arguments, words) in [
        ("run -p x -n -3", ["'--n <N>'", "at least 0, or -1"]),
        ("run -p x -c -1", ["'--ctx <N>'", "at least 0"]),
        (
            "run -p x -t -2",
            ["'--threads <N>'", "from 1 to 1024, or -1"],
        ),
        ("run -p x --top-k -2", ["'--top-k <K>'", "0 or -1 for all"]),
        (
            "run -p x --repeat-last-n -2",
            ["'--repeat-last-n <N>'", "a number of tokens"],
        ),
        (
            "run -p x --seed -2",
            ["'--seed <N>'", "from 0 to 18446744073709551615"],
        ),
        ("run -p x --temp -1", ["'--temp <T>'", "at least 0"]),
        ("run -p x --top-p -0.5", ["'--top-p <P>'", "from 0 to 1"]),
        ("run -p x --min-p -1", ["'--min-p <P>'", "from 0 to 1"]),
        (
            "run -p x --repeat-penalty -1",
            ["'--repeat-penalty <R>'", "above 0"],
        ),
        ("run -p x --prune -0.1", ["'--prune <RATIO>'", "at least 0"]),
        ("run -p x --fit -80MB", ["'--fit <SIZE>'", "with a unit"]),
        (
            "run -p x --speedup -1.3x",
            ["'--speedup <FACTOR>'", "above 1"],
        ),
        (
            "run -p x --max-ppl -10%",
            ["'--max-ppl <PERCENT>'", "above 0"],
        ),
        (
            "run -p x --prune 0.2 --calib-tokens -1",
            ["'--calib-tokens <N>'", "at least 1"],
        ),
        (
            "run -p x --prune 0.2 --memory -1GB",
            ["'--memory <SIZE>'", "with a unit"],
        ),
        ("perplexity -f x -c -1", ["'--ctx <N>'", "at least 4"]),
        ("perplexity -f x -c 3", ["'--ctx <N>'", "at least 4"]),
        ("perplexity -f x --chunks -1", ["'--chunks <N>'", "from 1"]),
        ("bench -p -1", ["'--n-prompt <N>'", "at least 0"]),
        ("bench -n -1", ["'--n-gen <N>'", "at least 0"]),
        ("bench -d -1", ["'--n-depth <N>'", "at least 0"]),
        ("bench -r -1", ["'--repetitions <N>'", "from 1"]),
        (
            "bench --parallel -1",
            ["'--parallel <N>'", "from 1 to 1024"],
        ),
    ] {
        misused(arguments, &words);
    }
}

#[test]
fn numbers_below_zero_mean_what_llama_cpp_means_by_them() {
    let workshop = Workshop::new();
    let said = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = workshop.flapjack(&[&["run", "-p", "x"], &arguments[..]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        (stdout(&output), stderr(&output))
    };
    // To the end of the context, of which the prompt takes two positions; the last token that fits in is not fed to the model.
    for n in ["-1", "-2"] {
        let (_, report) = said(&format!("-n {n} -c 40 --ignore-eos"));
        assert!(
            report.contains("the context of 40 tokens is full"),
            "{report}"
        );
        assert!(report.contains("generate   39 tokens"), "{report}");
    }
    let own = "at the 512 tokens that the model was trained for";
    let (_, report) = said("-n -1 -c 0 --ignore-eos --temp 0");
    assert!(report.contains(own), "the model's own context: {report}");

    let drawn = "-n 12 --ignore-eos --temp 1 -q";
    let text = |more: &str| said(&format!("{drawn} {more}")).0;
    assert_eq!(text("--top-k -1"), text("--top-k 0"));
    let penalty = "--repeat-penalty 1.5 --repeat-last-n";
    assert_eq!(
        text(&format!("{penalty} -1")),
        text(&format!("{penalty} 4096"))
    );
    assert_ne!(
        text("--seed -1"),
        text("--seed -1"),
        "12 tokens of a random model"
    );
    // The seed that was drawn is told, and gives the text again.
    let (random, report) = said("-n 12 --ignore-eos --temp 1 --seed -1 -v");
    let seed = report
        .split("seed ")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .trim_end_matches(',');
    assert_eq!(text(&format!("--seed {seed}")), random);
    said("-n 1 -t -1");
}

// ---- the help ----

/// All commands that there are, as the help lists them, with those within them.
fn commands() -> Vec<Vec<String>> {
    fn within(path: &[String], all: &mut Vec<Vec<String>>) {
        let mut arguments: Vec<&str> = path.iter().map(String::as_str).collect();
        arguments.push("--help");
        let help = succeed(&arguments);
        let listed = help.split("\nCommands:\n").nth(1).unwrap_or_default();
        for line in listed.lines().take_while(|line| line.starts_with("  ")) {
            let name = line.split_whitespace().next().unwrap();
            // A line that goes on begins further in.
            if name != "help" && line.as_bytes()[2] != b' ' {
                let deeper = [path, &[name.to_owned()]].concat();
                all.push(deeper.clone());
                within(&deeper, all);
            }
        }
    }
    let mut all = Vec::new();
    within(&[], &mut all);
    assert!(all.len() >= 7, "{all:?}");
    all
}

fn help(command: &[String], how: &str) -> String {
    let mut arguments: Vec<&str> = command.iter().map(String::as_str).collect();
    arguments.push(how);
    succeed(&arguments)
}

/// The headings of a help, each with the lines of options under it: those that begin with a dash.
fn headings(help: &str) -> Vec<(&str, Vec<&str>)> {
    let mut headings: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in help.lines() {
        match line.strip_suffix(':') {
            Some(heading) if !line.starts_with(' ') => headings.push((heading, Vec::new())),
            _ if line.trim_start().starts_with('-') => {
                let (_, options) = headings.last_mut().expect("options are under a heading");
                options.push(line);
            }
            _ => {}
        }
    }
    headings
}

/// The names of options in a line of the help, or in another text: `--name`, and `-n` where short ones are asked for.
fn names(text: &str, short: bool) -> BTreeSet<String> {
    let parts = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
    let parts = parts.filter(|part| match part.strip_prefix("--") {
        Some(name) => name.starts_with(|c: char| c.is_ascii_alphabetic()),
        None => short && part.len() == 2 && part.starts_with('-'),
    });
    parts.map(str::to_owned).collect()
}

#[test]
fn every_option_is_under_a_heading_and_headings_are_in_the_same_order_everywhere() {
    let mut seen = BTreeSet::new();
    for command in commands() {
        for how in ["-h", "--help"] {
            let help = help(&command, how);
            let found = headings(&help);
            let mut places = Vec::new();
            for (heading, options) in &found {
                let place = HEADINGS.iter().position(|h| h == heading);
                let other = ["Examples", "Commands"].contains(heading) && place.is_none();
                assert!(place.is_some() || other, "{command:?} {how}: {heading}");
                assert!(!other || options.is_empty(), "{command:?} {how}: {heading}");
                places.extend(place);
                seen.insert(*HEADINGS.get(place.unwrap_or(HEADINGS.len() - 1)).unwrap());
            }
            assert!(places.is_sorted(), "{command:?} {how}: {help}");
            assert_eq!(
                places.last(),
                Some(&(HEADINGS.len() - 1)),
                "{command:?} {how}: {help}"
            );
        }
    }
    assert_eq!(seen.len(), HEADINGS.len(), "{seen:?}");
}

#[test]
fn the_help_begins_with_the_model_and_ends_with_examples() {
    let help = help(&["run".to_owned()], "--help");
    let order = |names: &[&str]| {
        let places: Vec<usize> = names
            .iter()
            .map(|name| {
                let found = help.find(&format!("--{name}"));
                found.unwrap_or_else(|| panic!("--{name}"))
            })
            .collect();
        assert!(places.is_sorted(), "{names:?} are at {places:?}");
    };
    order(&[
        "model", "prompt", "file", "ctx", "temp", "prune", "fit", "method", "effort",
    ]);
    order(&[
        "effort",
        "calib ",
        "calib-field",
        "calib-tokens",
        "memory",
        "profile",
    ]);
    order(&["profile", "threads", "no-pack", "quiet", "verbose"]);
    let under = |heading: &str| {
        let found = headings(&help).into_iter().find(|(h, _)| *h == heading);
        found.unwrap_or_else(|| panic!("{heading}")).1.concat()
    };
    for (heading, option) in [
        ("Model", "--model"),
        ("Text", "--prompt"),
        ("Text", "--stop"),
        ("Sampling", "--min-p"),
        ("How much to prune", "--fit"),
        ("How to prune", "--restore"),
        ("Calibration", "--memory"),
        ("Calibration", "--no-profile-cache"),
        ("Machine", "--threads"),
        ("Machine", "--kv"),
        ("Output", "--quiet"),
        ("General", "--verbose"),
    ] {
        let options = under(heading);
        assert!(options.contains(option), "{option} in {heading}: {options}");
    }
    for command in commands() {
        let name = command.join(" ");
        // Commands within a command may leave them to it.
        if command.len() == 1 {
            for how in ["-h", "--help"] {
                let help = self::help(&command, how);
                let examples = help.split("\nExamples:\n").nth(1).unwrap_or_default();
                let example = format!("flapjack {name}");
                assert!(examples.contains(&example), "{name} {how}: {help}");
                assert!(!examples.contains("\n\n"), "{name} {how}: at the end");
            }
        }
    }
}

#[test]
fn the_short_help_has_one_line_for_each_of_the_essential_options() {
    for command in commands() {
        let short = help(&command, "-h");
        let before_examples = short.split("\nExamples:\n").next().unwrap();
        for line in before_examples
            .lines()
            .filter(|line| line.starts_with("  "))
        {
            // `  -m, --model`, `      --stop`, or the name of a command.
            let depth = line.len() - line.trim_start().len();
            let is_option = line.trim_start().starts_with('-');
            // A command with commands of its own has two lines of usage.
            let is_usage = line.trim_start().starts_with("flapjack ");
            let begins = depth == 2 || depth == 6 && is_option || is_usage;
            assert!(begins, "{command:?}: {line:?} goes on from the one before");
        }
        let long = help(&command, "--help");
        assert!(short.lines().count() <= 50, "{command:?}: {short}");
        assert!(short.len() <= long.len(), "{command:?}");
    }
    let (short, long) = (
        help(&["run".to_owned()], "-h"),
        help(&["run".to_owned()], "--help"),
    );
    assert!(2 * short.lines().count() < long.lines().count(), "{short}");
    for hidden in ["--structure", "--calib-field", "--no-pack"] {
        assert!(!short.contains(hidden) && long.contains(hidden), "{hidden}");
    }
}

/// The guide names every option of every command, and none that there is not.
#[test]
fn the_guide_has_the_options_that_the_program_has() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let guide = fs::read_to_string(path).unwrap();
    // What is said there of the options of others is not about ours.
    let (ours, others) = guide.split_once("\n## Coming from llama.cpp\n").unwrap();
    let (_, rest) = others.split_once("\n## ").unwrap();
    let ours = format!("{ours}\n{rest}");
    let code = ours.split('`').skip(1).step_by(2);
    // Nor is what other programs are to be called with.
    let code: Vec<&str> = code.filter(|c| !c.starts_with("llama-")).collect();
    let code = code.join(" ");
    let told = names(&code, true);
    let mut options = names(&succeed(&["--help"]), true);
    for command in commands() {
        let help = help(&command, "--help");
        let mut of_command = BTreeSet::new();
        for (_, lines) in headings(&help) {
            for line in lines {
                of_command.extend(names(line.split('<').next().unwrap(), true));
            }
        }
        for alias in help.split("[alias").skip(1) {
            of_command.extend(names(alias.split(']').next().unwrap(), true));
        }
        for option in &of_command {
            assert!(
                told.contains(option),
                "{option} of {command:?} is not in the guide"
            );
        }
        options.extend(of_command);
    }
    for option in names(&code, false) {
        assert!(
            options.contains(&option),
            "{option} of the guide does not exist"
        );
    }
}

// ---- options of other programs ----

#[test]
fn options_of_other_programs_are_refused_with_a_word_on_what_to_do() {
    for (arguments, words) in [
        ("run -hff y.gguf -p x", &["--hf ORG/REPO/FILE"][..]),
        ("-hf org/repo", &["'--hf'", "flapjack run --hf"]),
        ("run --offline", &["HF_HUB_OFFLINE=1"]),
        ("run -hft hf_x", &["HF_TOKEN"]),
        ("run -mu http://x/y.gguf", &["-m FILE", "--hf ORG/REPO"]),
        ("run -ngl 99 -p x", &["CPU", "leave it out"]),
        ("run --n-gpu-layers=99 -p x", &["'--n-gpu-layers'", "CPU"]),
        ("bench -ngl 0", &["CPU"]),
        ("run -p x -fa on", &["leave it out"]),
        ("run --flash-attn", &["leave it out"]),
        ("run -p x -cnv", &["is a chat where there is no prompt"]),
        ("run -p x -no-cnv", &["--raw", "as it stands"]),
        ("run -sys y -p x", &["--system TEXT"]),
        ("run -p x -ctk q8_0 -ctv q8_0", &["--kv q8_0"]),
        ("run -p x --cache-type-k q8_0", &["--kv q8_0"]),
        ("run -p x -md draft.gguf", &["speculative"]),
        ("run -p x -dev none", &["CPU"]),
        ("run -p x -ts 1,1", &["CPU"]),
        ("run -p x -tb 4", &["'-t N'"]),
        ("run -p x -b 512", &["'-b'", "leave it out"]),
        ("run -p x -ub 512", &["leave it out"]),
        ("run -p x -sm none", &["CPU"]),
        ("run -p x -mg 0", &["CPU"]),
        ("run -p x -lv 1", &["'-v'"]),
        ("run -p x --mlock", &["mapped"]),
        ("run -p x --no-mmap", &["mapped"]),
        ("run -p x --color", &["leave it out"]),
        ("run -p x --simple-io", &["leave it out"]),
        ("run -p x --log-disable", &["2>/dev/null"]),
        ("run -p x -r User:", &["--stop TEXT"]),
        ("run -p x --no-display-prompt", &["leave it out"]),
        ("run -p x -fit off", &["--fit SIZE"]),
        ("run -p x --keepalive 5m", &["leave it out"]),
        ("run llama3.2", &["-m FILE", "-p TEXT"]),
        ("run model.gguf hello", &["-m model.gguf"]),
        ("perplexity model.gguf", &["-m model.gguf"]),
        ("model.gguf", &["flapjack run -m model.gguf"]),
        (
            "-m model.gguf -p x",
            &["behind a command", "flapjack run -m"],
        ),
        ("pull llama3.2", &["-m FILE"]),
        ("server", &["flapjack serve"]),
        ("show model.gguf", &["flapjack inspect"]),
    ] {
        misused(arguments, words);
    }
    let message = misuse(&["run", "Why is the sky blue?"]);
    assert!(message.contains("-p TEXT"), "{message}");
}

#[test]
fn options_that_do_not_exist_are_refused_with_the_nearest_that_does() {
    for (arguments, words) in [
        ("run --tempp 0", &["'--tempp'", "'--temp'"][..]),
        ("run --promt x", &["'--prompt'"]),
        ("run -temp 0", &["'-temp'", "'--temp'"]),
        ("run -prompt x", &["'--prompt'"]),
        ("run -hx", &["'-hx'"]),
        ("run -qhz", &["'-qhz'"]),
        ("run -z", &["'-z'"]),
        ("perplexty", &["'perplexity'"]),
    ] {
        misused(arguments, words);
    }
    // Letters of options may stand together, and a value behind its letter.
    assert!(succeed(&["run", "-qh"]).contains("Usage"));
    let workshop = Workshop::new();
    let output = workshop.flapjack(&["run", "-vqn2", "-pOnce"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn options_that_mean_the_same_go_by_both_names() {
    let workshop = Workshop::new();
    let said = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = run_in(&workshop, &arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let expected = said("-p x -n 7 -c 64 --no-pack");
    assert_eq!(
        said("-p x --n-predict 7 --ctx-size 64 --no-repack"),
        expected
    );
    assert_eq!(said("--prompt x --predict 7 --threads 1 -c 64"), expected);
    let warm = workshop.flapjack(&["run", "-q", "-p", "x", "-n", "7", "--temperature", "0"]);
    assert_eq!(stdout(&warm), expected);
}

#[test]
fn fit_on_says_what_fit_means_here() {
    for value in ["on", "off"] {
        misused(
            &format!("run -p x --fit {value}"),
            &[
                "'--fit <SIZE>'",
                "80MB",
                "pruned to",
                "no device",
                "leave it out",
            ],
        );
    }
}

// ---- exit codes ----

#[test]
fn wrong_use_ends_with_2_and_failure_with_1() {
    for (arguments, words) in [
        (
            "prune -o x.gguf",
            &["--prune", "--fit", "--speedup", "--max-ppl"][..],
        ),
        ("prune --ratio 0.2", &["--output"]),
        ("bench -p 0 -n 0", &["nothing to time"]),
        (
            "run -p x --prune 0.2 --profile x --restore sequential",
            &["--calib"],
        ),
        ("run -p x -f y", &["cannot be used with"]),
    ] {
        // The last options are looked at before any file is.
        if !arguments.contains("sequential") {
            misused(arguments, words);
        }
    }
    let both = ["run", "--prune", "0.2", "--calib", "-"];
    let output = flapjack_reading(&both, b"text");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("both the prompt"));

    let workshop = Workshop::new();
    let profile = workshop.path("a.profile");
    let profile = profile.to_str().unwrap();
    let made = workshop.flapjack(&[
        "calibrate",
        "--calib-tokens",
        "256",
        "--method",
        "flap",
        "-o",
        profile,
    ]);
    assert!(made.status.success(), "{}", stderr(&made));
    let options = [
        "--prune",
        "0.2",
        "--profile",
        profile,
        "--method",
        "flap",
        "--restore",
        "sequential",
    ];
    let output = workshop.flapjack(&[&["run", "-p", "x"], &options[..]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));

    for arguments in [
        "run -p x -m /nonexistent.gguf",
        "perplexity -f /nonexistent.txt",
        "inspect /nonexistent.gguf",
        "prune --ratio 0.2 -o /nonexistent/x.gguf",
        "calibrate -o /nonexistent/x.profile",
        "bench -p 8 -n 0 --vs /nonexistent/llama-bench",
    ] {
        let output = flapjack(&arguments.split(' ').collect::<Vec<_>>());
        assert_eq!(
            output.status.code(),
            Some(1),
            "{arguments}: {}",
            stderr(&output)
        );
    }
}

// ---- options that would do nothing ----

#[test]
fn an_option_that_would_do_nothing_is_refused() {
    for (arguments, words) in [
        ("run -p x --method flap", &["--prune"][..]),
        ("run -p x --effort fast", &["--prune"]),
        ("run -p x --heads group", &["--prune"]),
        ("run -p x --no-baseline", &["--prune"]),
        ("perplexity -f x --restore lsq", &["--prune"]),
        ("bench --method flap", &["--prune"]),
        ("bench --calib-tokens 512", &["--prune"]),
        ("bench --parallel 2 -n 0", &["--parallel"]),
        ("bench --json --output csv", &["--json", "--output"]),
        ("bench --vs x --kv q8_0", &["--vs", "--kv"]),
        (
            "run -p x --prune 0.2 --calib self:300 --calib-field y",
            &["--calib-field", "self"],
        ),
        ("run -p x --stop= -n 1", &["--stop"]),
    ] {
        misused(arguments, words);
    }
}

#[test]
fn bench_chooses_with_the_effort_it_is_asked_for() {
    let workshop = Workshop::new();
    let bench = |more: &[&str]| {
        let arguments = [
            "bench",
            "-r",
            "1",
            "-p",
            "8",
            "-n",
            "0",
            "--prune",
            "0.2",
            "--calib-tokens",
            "512",
        ];
        let output = workshop.flapjack(&[&arguments[..], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        workshop.cached("profile").len()
    };
    // Profiles with loss curves and without are not the same.
    assert_eq!(bench(&[]), 1);
    assert_eq!(bench(&["--effort", "fast"]), 1, "by default");
    assert_eq!(bench(&["--effort", "normal"]), 2);
}

#[test]
fn numbers_of_bench_may_have_commas_between_as_in_llama_bench() {
    let workshop = Workshop::new();
    let output = workshop.flapjack(&[
        "bench", "-r", "1", "-p", "4,8", "-n", "2,3", "-d", "0,16", "-o", "csv",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(
        stdout(&output).lines().count(),
        1 + 8,
        "{}",
        stdout(&output)
    );
}

#[test]
fn a_filter_of_logs_that_is_none_is_told() {
    let workshop = Workshop::new();
    let model = workshop.model.to_str().unwrap();
    let arguments = ["run", "-p", "x", "-n", "1", "-m", model];
    let output = crate::common::program::flapjack_with(&arguments, &[("FLAPJACK_LOG", "=x=")]);
    assert!(output.status.success());
    assert!(
        stderr(&output).contains("FLAPJACK_LOG==x="),
        "{}",
        stderr(&output)
    );
}

// ---- one is not many ----

#[test]
fn one_thing_is_told_in_the_singular() {
    let workshop = Workshop::new();
    let one = Shape { layers: 1, ..TINY };
    let path = workshop.path("one.gguf");
    write_synthetic(&path, one, SyntheticType::Q8_0).unwrap();
    let model = path.to_str().unwrap();
    let text = workshop.write("text.txt", "It was the best of days. ".repeat(40));
    let text = text.to_str().unwrap();
    let empty = workshop.write("empty.txt", "");
    let empty = empty.to_str().unwrap();
    let mut said = String::new();
    for arguments in [
        &["run", "-t", "1", "-m", model, "-p", "", "-n", "1"][..],
        &[
            "run",
            "-m",
            model,
            "-p",
            "",
            "-n",
            "-1",
            "-c",
            "1",
            "--ignore-eos",
        ],
        &[
            "perplexity",
            "-m",
            model,
            "-f",
            text,
            "-c",
            "4",
            "--chunks",
            "1",
        ],
        &["perplexity", "-m", model, "-f", empty, "-c", "4"],
        &[
            "run", "-m", model, "-p", "x", "-n", "1", "--prune", "0.2", "--calib", empty,
        ],
    ] {
        let output = flapjack(arguments);
        said += &(stdout(&output) + &stderr(&output));
    }
    let words: Vec<&str> = said.split_whitespace().collect();
    for pair in words.windows(2) {
        let noun = pair[1].trim_end_matches(|c: char| !c.is_alphabetic());
        let many = noun.ends_with('s') && noun.chars().all(char::is_alphabetic) && noun.len() > 2;
        assert!(
            !(pair[0].trim_start_matches('(') == "1" && many),
            "{pair:?} in {said}"
        );
    }
    for words in [
        "one.gguf: 1 layer, ",
        "with 1 thread\n",
        "prompt     1 token, ",
        "generate   1 token\n",
        "context of 1 token is full",
        "in 1 chunk of 4",
        "the text has 1 token, and one chunk takes 4",
    ] {
        assert!(said.contains(words), "{words} in {said}");
    }
}
