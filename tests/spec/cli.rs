//! The command line, as a user meets it.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::program::{
    fail, flapjack, flapjack_reading, flapjack_with, stderr, stdout, succeed,
};
use crate::common::synthetic::{Shape, Synthetic};

const PARIS: [&str; 7] = [
    "run",
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
        "dense",
        "ratio",
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
        succeed(&[&seeded[..6], &["4", "--temp", "1"]].concat()),
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
        succeed(&[&["run", "-f", file.to_str().unwrap()], &tail[..]].concat()),
        expected
    );

    let arguments = [&["run"], &tail[..]].concat();
    let output = flapjack_reading(&arguments, b"The capital of France is\n");
    assert_eq!(stdout(&output), expected);
    assert_eq!(stderr(&output), "", "quiet");
}

#[test]
fn an_empty_prompt_begins_a_text() {
    assert!(!succeed(&["run", "-p", "", "-n", "4", "--ignore-eos", "-q"]).is_empty());
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
            vec!["run", "-p", "x", "--prune", "0.9"],
            vec!["0.9", "at least 0"],
        ),
        (vec!["run", "-p", "x", "--prune", "-0.1"], vec!["--prune"]),
        (vec!["run", "-p", "x", "--prune", "nan"], vec!["--prune"]),
        (vec!["run", "-p", "x", "--temp", "-1"], vec!["--temp"]),
        (vec!["run", "-p", "x", "--temp", "inf"], vec!["--temp"]),
        (vec!["run", "-p", "x", "--top-p", "1.5"], vec!["--top-p"]),
        (vec!["run", "-p", "x", "-t", "0"], vec!["--threads"]),
        (
            vec!["run", "-p", "x", "-f", "y"],
            vec!["cannot be used with"],
        ),
        (vec!["run", "-p", "x", "--calib", "y"], vec!["--prune"]),
        (
            vec!["run", "-f", "/nonexistent/prompt"],
            vec!["/nonexistent/prompt"],
        ),
        (
            vec!["run", "-p", "x", "-m", "/nonexistent.gguf"],
            vec!["/nonexistent.gguf"],
        ),
        (
            vec!["run", "-p", "x", "--ctx", "0"],
            vec!["context", "--ctx"],
        ),
        (
            vec![
                "run",
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
            vec!["run", "-p", "x", "--prune", "0.3", "--calib-tokens", "5"],
            vec!["5 tokens", "192"],
        ),
        (
            vec![
                "run",
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
fn files_that_are_no_models_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let run = |path: &str| fail(&["run", "-p", "x", "-m", path]);
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
    let message = fail(&["run", "-p", "x", "-m", synthetic.path.to_str().unwrap()]);
    assert!(message.contains("tokenizer.ggml.model"), "{message}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_flapjack"))
        .args(["run", "-p", "Once upon a time", "-n", "64", "-q"])
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
