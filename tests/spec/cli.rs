//! The command line, as a user meets it.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::engine::Workshop;
use crate::common::program::{
    Bench, fail, flapjack, flapjack_reading, flapjack_with, stderr, stdout, succeed, succeeded,
};
use crate::common::synthetic::{Shape, Synthetic};

const PARIS: [&str; 8] = [
    "run",
    "--raw",
    "-p",
    "The capital of France is",
    "-n",
    "8",
    "--temp",
    "0",
];

#[test]
fn the_capital_of_france_is_paris() {
    let output = flapjack(&PARIS);
    assert!(stdout(&output).starts_with(" Paris"), "{}", stdout(&output));
    let report = stderr(&output);
    for word in ["map", "prompt", "generate", "8 tokens", "tokens/s"] {
        assert!(report.contains(word), "{word} in {report}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn text_comes_though_standard_error_cannot_be_written() {
    crate::common::default_model();
    // A warning, and the report.
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_flapjack"))
        .args(PARIS)
        .args(["-c", "100000"])
        .stdin(Stdio::null())
        .stderr(full)
        .output()
        .unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    assert!(stdout(&output).starts_with(" Paris"), "{}", stdout(&output));
}

#[test]
fn what_is_said_has_no_colours_where_there_is_no_terminal() {
    let output = flapjack(&[&PARIS[..], &["-c", "100000"]].concat());
    let said = stderr(&output);
    assert!(said.contains("WARN") && !said.contains('\u{1b}'), "{said}");
}

#[test]
fn pruning_reports_what_was_gained() {
    let output = flapjack(
        &[
            &PARIS[..],
            &[
                "--prune",
                "0.3",
                "--calib-tokens",
                "1024",
                "--effort",
                "fast",
            ],
        ]
        .concat(),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stdout(&output).trim().is_empty());
    let report = stderr(&output);
    for word in [
        "map",
        "calibrate",
        "1024 tokens",
        "prune",
        "removed 30.",
        "heads",
        "KV heads",
        "channels",
        "parameters",
        "weights",
        "prompt",
        "generate",
        "in turns",
        "dense",
        "times as fast",
    ] {
        assert!(report.contains(word), "{word} in {report}");
    }
    if cfg!(target_os = "linux") {
        assert!(
            report.contains("resident") && report.contains("private"),
            "{report}"
        );
    }
    let without = flapjack(
        &[
            &PARIS[..],
            &[
                "--prune",
                "0.3",
                "--calib-tokens",
                "256",
                "--no-baseline",
                "--method",
                "flap",
            ],
        ]
        .concat(),
    );
    assert!(!stderr(&without).contains("dense"), "{}", stderr(&without));
}

#[test]
fn pruning_by_nothing_changes_nothing() {
    let seeded = [
        "run",
        "--raw",
        "-p",
        "Once upon a time",
        "-n",
        "24",
        "--seed",
        "3",
        "--temp",
        "1",
    ];
    let plain = succeed(&seeded);
    assert_eq!(succeed(&[&seeded[..], &["--prune", "0"]].concat()), plain);
    assert_ne!(
        succeed(&[&seeded[..7], &["4", "--temp", "1"]].concat()),
        plain
    );
}

#[test]
fn every_instruction_set_says_paris() {
    let info = succeed(&["info"]);
    let sets: Vec<&str> = info
        .lines()
        .filter(|l| l.starts_with("instructions") && !l.contains("not found"))
        .filter_map(|l| l.split_whitespace().nth(1))
        .collect();
    assert!(sets.contains(&"generic"), "{info}");
    for isa in sets {
        let output = flapjack_with(&PARIS, &[("FLAPJACK_ISA", isa)]);
        assert!(
            stdout(&output).starts_with(" Paris"),
            "{isa}: {}",
            stdout(&output)
        );
        assert!(stderr(&output).contains(isa), "{}", stderr(&output));
    }
    let output = flapjack_with(&PARIS, &[("FLAPJACK_ISA", "mmx")]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("FLAPJACK_ISA=mmx") && stderr(&output).contains("generic"));
}

#[test]
fn the_prompt_comes_from_an_argument_a_file_or_standard_input() {
    let expected = succeed(&PARIS);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "The capital of France is\n").unwrap();
    let tail = ["-n", "8", "--temp", "0", "-q"];
    assert_eq!(
        succeed(&[&["run", "--raw", "-f", file.to_str().unwrap()], &tail[..]].concat()),
        expected
    );

    let arguments = [&["run", "--raw"], &tail[..]].concat();
    let output = flapjack_reading(&arguments, b"The capital of France is\n");
    assert_eq!(stdout(&output), expected);
    assert_eq!(stderr(&output), "", "quiet");
}

#[test]
fn an_empty_prompt_begins_a_text() {
    assert!(!succeed(&["run", "--raw", "-p", "", "-n", "4", "--ignore-eos", "-q"]).is_empty());
}

#[test]
fn a_stop_string_ends_the_output() {
    assert_eq!(
        succeed(&[&PARIS[..], &["--stop", "."]].concat()),
        " Paris\n"
    );
}

#[test]
fn perplexity_prints_a_line_or_one_json_object() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(
        &file,
        "It was the best of days. It was the worst of nights.\n".repeat(40),
    )
    .unwrap();
    let base = [
        "perplexity",
        "-f",
        file.to_str().unwrap(),
        "-c",
        "64",
        "--chunks",
        "2",
    ];
    let line = succeed(&base);
    assert!(
        line.starts_with("perplexity ") && line.lines().count() == 1,
        "{line}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&succeed(&[&base[..], &["--json"]].concat())).unwrap();
    assert_eq!(
        (json["chunks"].as_u64(), json["tokens"].as_u64()),
        (Some(2), Some(62))
    );
    let dense = json["perplexity"].as_f64().unwrap();
    assert!(dense > 1.0 && json["stderr"].as_f64().unwrap() > 0.0);

    let pruned = [
        &base[..],
        &[
            "--json",
            "--all-positions",
            "--prune",
            "0.2",
            "--calib-tokens",
            "256",
            "--effort",
            "fast",
        ],
    ]
    .concat();
    let json: serde_json::Value = serde_json::from_str(&succeed(&pruned)).unwrap();
    assert_eq!(json["tokens"].as_u64(), Some(126));
    assert!((json["prune_ratio"].as_f64().unwrap() - 0.2).abs() < 0.01);
}

#[test]
fn bad_arguments_say_what_is_wrong() {
    for (arguments, words) in [
        (
            vec!["run", "--raw", "-p", "x", "--prune", "0.9"],
            vec!["0.9", "at least 0"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "--prune", "-0.1"],
            vec!["--prune"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "--prune", "nan"],
            vec!["--prune"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "--temp", "-1"],
            vec!["--temp"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "--temp", "inf"],
            vec!["--temp"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "--top-p", "1.5"],
            vec!["--top-p"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "-t", "0"],
            vec!["--threads"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "-f", "y"],
            vec!["cannot be used with"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "--calib", "y"],
            vec!["--prune"],
        ),
        (
            vec!["run", "--raw", "-f", "/nonexistent/prompt"],
            vec!["/nonexistent/prompt"],
        ),
        (
            vec!["run", "--raw", "-p", "x", "-m", "/nonexistent.gguf"],
            vec!["/nonexistent.gguf"],
        ),
        (
            vec!["run", "--raw", "-p", "to be or not to be", "--ctx", "2"],
            vec!["context", "--ctx"],
        ),
        (
            vec![
                "run",
                "--raw",
                "-p",
                "x",
                "--prune",
                "0.3",
                "--calib",
                "/nonexistent.txt",
            ],
            vec!["/nonexistent.txt"],
        ),
        (
            vec![
                "run",
                "--raw",
                "-p",
                "x",
                "--prune",
                "0.3",
                "--calib-tokens",
                "5",
            ],
            vec!["5 tokens", "192"],
        ),
        (
            vec![
                "run",
                "--raw",
                "-p",
                "x",
                "--prune",
                "0.3",
                "--effort",
                "fast",
                "--calib-tokens",
                "5",
            ],
            vec!["5 tokens", "128"],
        ),
        (
            vec!["perplexity", "-f", "/nonexistent.txt"],
            vec!["/nonexistent.txt"],
        ),
        (
            vec!["perplexity", "-f", "Cargo.toml", "-c", "100000"],
            vec!["100000"],
        ),
    ] {
        let message = fail(&arguments);
        for word in words {
            assert!(message.contains(word), "{arguments:?}: {word} in {message}");
        }
    }
}

#[test]
fn one_way_of_asking_excludes_the_others() {
    for (arguments, words) in [
        (
            vec!["--fit", "80MB", "--prune", "0.3"],
            "cannot be used with",
        ),
        (
            vec!["--speedup", "1.2x", "--max-ppl", "+10%"],
            "cannot be used with",
        ),
        (vec!["--fit", "80"], "unit"),
        (vec!["--speedup", "0.9x"], "above 1"),
        (vec!["--max-ppl", "10"], "per cent"),
        (
            vec!["--max-ppl", "+5%", "--profile", "x"],
            "cannot be used with",
        ),
        (vec!["--profile", "x"], "--prune"),
        (vec!["--prune", "0.2", "--memory", "150"], "with a unit"),
        (
            vec!["--prune", "0.2", "--memory", "1GB", "--profile", "x"],
            "cannot be used with",
        ),
        (vec!["--prune", "0.2", "--calib", ""], "--calib"),
        (
            vec!["--prune", "0.2", "--calib", "self:many"],
            "./self:many",
        ),
    ] {
        let message = fail(&[&["run", "--raw", "-p", "x"], &arguments[..]].concat());
        assert!(message.contains(words), "{arguments:?}: {message}");
    }
    let message = fail(&["prune", "-o", "never.gguf"]);
    assert!(
        message.contains("--prune") && message.contains("--fit"),
        "{message}"
    );
}

/// What the library refuses in its own terms, the program tells with what to do next.
#[test]
fn what_cannot_be_done_is_told_with_what_to_do_instead() {
    let workshop = Workshop::new();
    let path = |name: &str| workshop.path(name).to_str().unwrap().to_owned();
    let profile = path("plain.profile");
    let lines = workshop.write("other.jsonl", "{\"body\": \"text\"}");
    let lines = lines.to_str().unwrap();
    let make = ["calibrate", "--method", "flap", "--calib-tokens", "256"];
    succeeded(&workshop.flapjack(&[&make[..], &["-o", &profile]].concat()));
    let nowhere = path("nowhere/out.profile");
    let by_file = format!("--prune 0.2 --profile {profile}");
    let flap = format!("{by_file} --method flap");
    let text = "--prune 0.2 --calib-tokens 512";
    let fast = format!("{text} --effort fast --restore lsq");
    for (arguments, words) in [
        (
            by_file,
            vec!["no loss curves", "calibrate --structure curves"],
        ),
        (
            format!("{flap} --restore lsq"),
            vec!["no covariances", "calibrate --restore lsq"],
        ),
        (
            format!("{flap} --metric obs"),
            vec!["no covariances", "calibrate --metric obs"],
        ),
        (
            format!("{flap} --restore sequential"),
            vec!["the calibration text itself", "--calib"],
        ),
        (
            format!("{text} --calib {lines}"),
            vec!["\"body\"", "--calib-field"],
        ),
        (
            "--prune 0.2 --calib-tokens 100".to_owned(),
            vec!["100 tokens", "192", "--calib"],
        ),
        (
            format!("{fast} --memory 1kB"),
            vec!["one layer", "--memory", "--restore bias"],
        ),
        (
            format!("{fast} --metric obs --memory 200kB"),
            vec!["all layers at once", "--metric", "--memory"],
        ),
        (
            "--fit 1kB --calib-tokens 512".to_owned(),
            vec!["out of reach", "the weights take", "ask for at least that"],
        ),
        (
            "--speedup 50x --calib-tokens 512".to_owned(),
            vec!["out of reach", "times as fast"],
        ),
    ] {
        let arguments = format!("run -p x --no-baseline {arguments}");
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = workshop.flapjack(&arguments);
        let message = stderr(&output);
        let failed = !output.status.success() && stdout(&output).is_empty();
        assert!(failed, "{arguments:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{arguments:?}: {word} in {message}");
        }
    }
    // Both cannot come from standard input, and a profile needs a place.
    for (arguments, words) in [
        (
            vec!["run", "--raw", "--prune", "0.2", "--calib", "-"],
            "both the prompt",
        ),
        (vec!["calibrate", "-o", &nowhere], "nowhere"),
    ] {
        let output = workshop.flapjack(&arguments);
        assert!(
            !output.status.success() && stderr(&output).contains(words),
            "{}",
            stderr(&output)
        );
    }
}

/// What a user may want to ask for differently is a warning or, with -v, told.
#[test]
fn what_was_done_without_is_no_secret() {
    let workshop = Workshop::new();
    let said = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        succeeded(&workshop.flapjack(&arguments)).1
    };
    let prune = "run -p x -n 1 --no-baseline --prune 0.2 --calib-tokens 512 --effort fast";
    let report = said(&format!("{prune} --memory 1kB"));
    assert!(report.contains("restoring by biases"), "{report}");
    let report = said(&format!("{prune} --restore lsq --memory 300kB -v"));
    assert!(report.contains("2 groups of layers"), "{report}");
    let path = workshop.path("a.profile");
    let path = path.to_str().unwrap();
    let calibrate = "calibrate --effort fast --restore lsq --calib-tokens 512 --memory 300kB -o";
    let report = said(&format!("{calibrate} {path}"));
    assert!(
        report.contains("the profile has no covariances"),
        "{report}"
    );
    let report = said(&format!(
        "run -p x -n 1 --no-baseline --prune 0.2 --effort fast --profile {path}"
    ));
    assert!(report.contains("biases have to make up"), "{report}");
    let report = said("run -p x -n 1 --no-baseline --prune 0.2 --effort fast --calib built-in -v");
    assert!(report.contains("--calib-tokens takes more"), "{report}");
}

#[test]
fn a_calibration_text_may_come_from_standard_input() {
    let workshop = Workshop::new();
    let text = "It was the best of days. It was the worst of nights.\n".repeat(20);
    let path = workshop.path("piped.profile");
    let path = path.to_str().unwrap();
    let arguments = ["calibrate", "--method", "flap", "--calib", "-", "-o", path];
    let output = workshop.flapjack_reading(&arguments, text.as_bytes());
    let (_, report) = succeeded(&output);
    let expected = format!("{} tokens of standard input", text.len());
    assert!(report.contains(&expected), "{report}");
    let output = workshop.flapjack_reading(&[&arguments[..], &["-q"]].concat(), text.as_bytes());
    assert_eq!(succeeded(&output).1, "", "quiet");
}

#[test]
fn a_perplexity_that_is_kept_to_is_told() {
    let workshop = Workshop::new();
    let text = workshop.write("text.txt", "The sun rises in the east. ".repeat(20));
    let arguments = format!(
        "perplexity -f {} -c 64 --chunks 1 --max-ppl +50% --calib-tokens 1024 --method flap",
        text.display()
    );
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let (line, said) = succeeded(&workshop.flapjack(&arguments));
    assert!(line.starts_with("perplexity "), "{line}");
    assert!(
        said.contains("--max-ppl +50%: ratio 0.") && said.contains("256 held-back tokens"),
        "{said}"
    );
}

/// In life: whoever shrinks the default model to a size, for text of their own, sees that it fits and what it does to such
/// text and to other text; and the second start says the same at once.
#[test]
fn the_default_model_fits_where_it_is_asked_to_and_starts_again_at_once() {
    let bench = Bench::new();
    let own = bench.write("own.txt", flapjack::prune::calibrate::TEXT.to_uppercase());
    let arguments = format!(
        "run -m {} -p The -n 8 --temp 0 --fit 80MB --only widths --calib {own} --calib-tokens 768",
        bench.model
    );
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let (text, report) = succeeded(&bench.flapjack(&arguments));
    assert!(report.contains("--fit 80MB: ratio 0."), "{report}");
    let numbers = |line: &str| -> Vec<f64> {
        let words = line.split_whitespace();
        words.filter_map(|word| word.parse().ok()).collect()
    };
    let lines = |name: &str| -> Vec<Vec<f64>> {
        let lines = report.lines().filter(|line| line.starts_with(name));
        lines.map(numbers).collect()
    };
    // Just below 80 MB, in the report's unit.
    let weights = &lines("  weights")[0];
    assert!((75.0..=76.3).contains(&weights[1]), "{report}");
    // Calibrated on capitals, the model loses less of them than of other text.
    let effects = lines("  perplexity");
    assert_eq!(effects.len(), 2, "{report}");
    let rise = |effect: &[f64]| effect[1] / effect[0];
    assert!(
        1.0 < rise(&effects[0]) && rise(&effects[0]) < rise(&effects[1]),
        "{report}"
    );
    assert!(report.contains("  curves "), "{report}");

    let (again, report) = succeeded(&bench.flapjack(&arguments));
    assert!(
        report.contains("from the cache") && !report.contains("  curves "),
        "{report}"
    );
    assert_eq!(again, text);
    assert_eq!(report.matches("by layer").count(), 3, "{report}");
}

#[test]
fn files_that_are_no_models_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let run = |path: &str| fail(&["run", "--raw", "-p", "x", "-m", path]);
    assert!(run(&write("text.gguf", b"this is not a model")).contains("not a GGUF file"));
    assert!(run(&write("empty.gguf", b"")).contains("empty"));
    let whole = std::fs::read(crate::common::default_model()).unwrap();
    let cut = write("cut.gguf", &whole[..whole.len() / 2]);
    assert!(run(&cut).contains("truncated"), "{}", run(&cut));
    let not_text = write("not-text", &[b'a', b'b', 0xff]);
    assert!(fail(&["perplexity", "-f", &not_text]).contains("offset 2"));
}

#[test]
fn a_model_without_a_tokenizer_says_so() {
    let synthetic = Synthetic::new(Shape::default());
    let message = fail(&[
        "run",
        "--raw",
        "-p",
        "x",
        "-m",
        synthetic.path.to_str().unwrap(),
    ]);
    assert!(message.contains("tokenizer.ggml.model"), "{message}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_flapjack"))
        .args(["run", "--raw", "-p", "Once upon a time", "-n", "64", "-q"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"));
}

#[test]
fn the_built_in_text_never_repeats_itself() {
    let text = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/prune/collect/calibration.txt"),
    )
    .unwrap();
    let mut lines: Vec<&str> = text.lines().filter(|l| l.len() > 40).collect();
    let all = lines.len();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), all, "no long line occurs twice");
}
