//! `flapjack bench`, for what it prints; how fast anything is, is no matter for tests.

use std::process::Output;

use crate::common::engine::Workshop;
use crate::common::program::{stderr, succeeded};
use serde_json::Value;

/// Two repetitions with two threads on a small random model.
fn bench(arguments: &[&str]) -> Output {
    let workshop = Workshop::new();
    workshop.flapjack(&[&["bench", "-r", "2", "-t", "2"], arguments].concat())
}

fn printed(arguments: &[&str]) -> String {
    succeeded(&bench(arguments)).0
}

#[test]
fn json_is_an_array_with_an_object_for_each_test_dense_first() {
    let text = printed(&[
        "-p",
        "16",
        "-n",
        "3",
        "-d",
        "0",
        "-d",
        "8",
        "--prune",
        "0.3",
        "--calib-tokens",
        "256",
        "--json",
    ]);
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let tests: Vec<[u64; 3]> = rows
        .iter()
        .map(|row| ["n_prompt", "n_gen", "n_depth"].map(|key| row[key].as_u64().unwrap()))
        .collect();
    let each = [[16, 0, 0], [0, 3, 0], [16, 0, 8], [0, 3, 8]];
    assert_eq!(tests, [each, each].concat());
    for (i, row) in rows.iter().enumerate() {
        assert!(row["model_filename"].as_str().unwrap().ends_with(".gguf"));
        assert_eq!(row["n_threads"], 2);
        let samples: Vec<f64> = row["samples_ts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect();
        assert_eq!(samples.len(), 2);
        let mean = (samples[0] + samples[1]) / 2.0;
        assert!((row["avg_ts"].as_f64().unwrap() / mean - 1.0).abs() < 1e-9);
        assert!(row["stddev_ts"].as_f64().unwrap() >= 0.0 && row["isa"].is_string());
        let ratio = row["prune_ratio"].as_f64().unwrap();
        assert!(
            if i < 4 {
                ratio == 0.0
            } else {
                (ratio - 0.3).abs() < 0.1
            },
            "{ratio}"
        );
        assert_eq!(
            row["bandwidth_share"].is_number(),
            row["n_gen"] == 3,
            "of generation only"
        );
    }
    assert!(rows[4]["bytes_per_token"].as_u64() < rows[0]["bytes_per_token"].as_u64());
}

#[test]
fn tables_in_markdown_and_csv_have_a_line_for_each_test() {
    let markdown = printed(&["-p", "8", "-n", "2"]);
    let lines: Vec<&str> = markdown.lines().collect();
    assert_eq!(lines.len(), 4, "{markdown}");
    let columns = |line: &str| line.matches('|').count();
    assert!(
        lines.iter().all(|l| columns(l) == columns(lines[0])),
        "{markdown}"
    );
    assert!(
        lines[2].contains("pp8") && lines[3].contains("tg2"),
        "{markdown}"
    );

    let csv = printed(&["-p", "8", "-n", "0", "-o", "csv", "--no-pack"]);
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 2, "{csv}");
    assert_eq!(
        lines[0].split(',').count(),
        lines[1].split(',').count(),
        "{csv}"
    );
}

/// A stand-in for llama-bench that answers what that program answers.
#[cfg(unix)]
#[test]
fn the_peer_runs_on_the_same_file_and_its_ratio_is_told() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let peer = folder.path().join("llama-bench");
    let asked = folder.path().join("asked");
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> '{}'\necho '[{{\"avg_ts\": 4.0}}]'\n",
        asked.display()
    );
    std::fs::write(&peer, script).unwrap();
    std::fs::set_permissions(&peer, PermissionsExt::from_mode(0o755)).unwrap();
    let text = printed(&[
        "-p",
        "8",
        "-n",
        "0",
        "--json",
        "--vs",
        peer.to_str().unwrap(),
    ]);
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(rows[0]["peer_ts"], 4.0);
    let ratio = rows[0]["median_ts"].as_f64().unwrap() / 4.0;
    assert!((rows[0]["ratio_to_peer"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9);
    let asked = std::fs::read_to_string(asked).unwrap();
    assert_eq!(asked.lines().count(), 2, "once in each repetition: {asked}");
    assert!(
        asked.contains("-t 2") && asked.contains("-p 8") && asked.contains(".gguf"),
        "{asked}"
    );
}

#[test]
fn a_peer_that_is_not_there_and_nothing_to_time_are_errors() {
    for (arguments, word) in [
        (
            ["--vs", "/nonexistent/llama-bench", "-p", "8"],
            "/nonexistent/llama-bench",
        ),
        (["-p", "0", "-n", "0"], "nothing to time"),
    ] {
        let output = bench(&arguments);
        let message = stderr(&output);
        assert!(
            !output.status.success() && message.contains(word),
            "{message}"
        );
        assert!(output.stdout.is_empty());
    }
}
