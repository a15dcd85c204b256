//! `flapjack inspect`, and `flapjack prune`, whose files it shows.

use std::path::Path;

use crate::common::program::{fail, flapjack, stderr, succeed};
use crate::common::synthetic::{Shape, Synthetic};
use flapjack::gguf::{GgufFile, Value, Writer};
use flapjack::prune::Record;
use flapjack::quant::BlockType;

#[test]
fn it_shows_metadata_and_tensors() {
    let synthetic = Synthetic::new(Shape {
        block_type: BlockType::Q8_0,
        heads: vec![4, 2],
        ..Shape::default()
    });
    let path = synthetic.path.to_str().unwrap();
    let shown = succeed(&["inspect", path]);
    for words in [
        vec!["GGUF version 3", "tensors"],
        vec!["general.architecture", "\"llama\""],
        vec!["llama.attention.head_count_kv", " 2"],
        vec!["llama.attention.head_count ", " 4 2"],
        vec!["blk.1.ffn_down.weight", "64 x 96", "Q8_0", "6528"],
        vec!["output_norm.weight", "64", "F32", "256"],
    ] {
        let line = shown.lines().find(|l| words.iter().all(|w| l.contains(w)));
        assert!(line.is_some(), "{words:?} in {shown}");
    }
    assert!(!shown.contains("pruned"), "{shown}");
}

#[test]
fn json_has_everything() {
    let synthetic = Synthetic::new(Shape {
        heads: vec![4, 2],
        ..Shape::default()
    });
    let json = succeed(&["inspect", "--json", synthetic.path.to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["version"], 3);
    assert_eq!(json["metadata"]["llama.block_count"], 2);
    assert_eq!(
        json["metadata"]["llama.attention.head_count"],
        serde_json::json!([4, 2])
    );
    let file = GgufFile::open(&synthetic.path).unwrap();
    let tensors = json["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), file.tensors().len());
    for (shown, tensor) in tensors.iter().zip(file.tensors()) {
        assert_eq!(shown["name"], tensor.name.as_str());
        assert_eq!(shown["shape"], serde_json::json!(tensor.shape));
        assert_eq!(shown["type"], "F32");
        assert_eq!(shown["bytes"], tensor.range.len());
    }
    assert!(json["pruned"].is_null());
}

#[test]
fn a_pruned_file_shows_which_heads_and_how_many_channels_stayed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    let path = path.to_str().unwrap();
    let output = flapjack(&[
        "prune",
        "-o",
        path,
        "--ratio",
        "0.3",
        "--calib-tokens",
        "256",
        "--method",
        "flap",
        "--restore",
        "none",
        "-t",
        "1",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout.is_empty());
    let report = stderr(&output);
    for words in ["small.gguf", "architecture deci", "removed 30.", "heads"] {
        assert!(report.contains(words), "{words} in {report}");
    }
    let size = std::fs::metadata(path).unwrap().len();
    assert!(
        size < std::fs::metadata(crate::common::default_model())
            .unwrap()
            .len()
            * 85
            / 100
    );

    let file = GgufFile::open(path).unwrap();
    let record = Record::from_gguf(&file).unwrap().expect("a record");
    assert_eq!(
        (record.method.as_str(), record.asked),
        ("flap (wifv, al-am, heads by query, restoration none)", 0.3)
    );
    assert!((record.ratio - 0.3).abs() < 0.005);
    assert_eq!(record.profile.len(), 64);
    let source = GgufFile::open(crate::common::default_model()).unwrap();
    assert_eq!(record.model, source.fingerprint());
    assert_eq!(record.layers.len(), 30);

    let shown = succeed(&["inspect", path]);
    assert!(shown.contains("pruned by flapjack") && shown.contains(", method flap (wifv, "));
    for (l, layer) in record.layers.iter().enumerate() {
        let heads: String = (0..9)
            .map(|h| match layer.kept_heads().contains(&h) {
                true => '●',
                false => '·',
            })
            .collect();
        let start = format!("  {l:>5}  {heads} ");
        let end = format!("{} of 1536", layer.channels);
        assert!(
            shown
                .lines()
                .any(|line| line.starts_with(&start) && line.ends_with(&end)),
            "{start:?} and {end:?} in {shown}"
        );
    }
    let json: serde_json::Value =
        serde_json::from_str(&succeed(&["inspect", "--json", path])).unwrap();
    assert_eq!(
        json["pruned"]["layers"][3]["heads"],
        serde_json::json!(record.layers[3].kept_heads())
    );

    // It runs, and can be pruned again, onto itself.
    let text = succeed(&[
        "run",
        "--raw",
        "-m",
        path,
        "-p",
        "Once",
        "-n",
        "4",
        "-q",
        "--ignore-eos",
    ]);
    assert!(!text.trim().is_empty());
    succeed(&[
        "prune",
        "-q",
        "-m",
        path,
        "-o",
        path,
        "--ratio",
        "0.1",
        "--calib-tokens",
        "256",
    ]);
    let file = GgufFile::open(path).unwrap();
    let again = Record::from_gguf(&file).unwrap().expect("a record");
    assert_eq!(again.layers[0].heads_before, 9);
    // Of the ones left; heads of zeros, which the file had been given, went first.
    assert!(again.ratio > 0.33 && again.ratio < 0.38, "{}", again.ratio);
}

#[test]
fn names_and_values_cannot_send_control_sequences_to_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("evil.gguf");
    let evil = "a\u{1b}[2Jb\r\u{202e}";
    Writer::new()
        .metadata(evil, Value::String(evil.into()))
        .tensor(evil, &[1], BlockType::F32, vec![0u8; 4])
        .save(&path)
        .unwrap();
    let shown = succeed(&["inspect", path.to_str().unwrap()]);
    let odd = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!shown.contains(odd), "{shown:?}");
    assert!(shown.contains("\\u{1b}[2J"), "{shown}");
}

#[test]
fn what_cannot_be_shown_or_pruned_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let inside = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = inside("text");
    std::fs::write(&text, "this is no model").unwrap();
    assert!(fail(&["inspect", &text]).contains("not a GGUF file"));
    assert!(fail(&["inspect", &inside("none")]).contains("none"));

    let out = inside("out.gguf");
    assert!(fail(&["prune", "-o", &out]).contains("--prune"));
    assert!(fail(&["prune", "-o", &out, "--ratio", "0.95"]).contains("0.9"));
    let nowhere = inside("nowhere/out.gguf");
    assert!(fail(&["prune", "-o", &nowhere, "--ratio", "0.1"]).contains("nowhere"));
    let here = folder.path().to_str().unwrap();
    assert!(fail(&["prune", "-o", here, "--ratio", "0.1"]).contains("folder"));
    let device = fail(&[
        "prune",
        "-o",
        "/dev/full",
        "--ratio",
        "0.1",
        "--effort",
        "fast",
        "--calib-tokens",
        "128",
    ]);
    assert!(device.contains("/dev/full"), "{device}");
    assert!(!Path::new(&out).exists());
}

/// A limit on the size of files stands for a full disk: writing stops in the middle.
#[cfg(target_os = "linux")]
#[test]
fn a_write_that_is_cut_off_leaves_the_old_file_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    std::fs::write(&path, "the old file").unwrap();
    let output = std::process::Command::new("sh")
        .args(["-c", "ulimit -f 2000; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_flapjack"))
        .args(["prune", "--ratio", "0.1", "--effort", "fast"])
        .args(["--calib-tokens", "128", "-m"])
        .arg(crate::common::default_model())
        .arg("-o")
        .arg(&path)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert_eq!(std::fs::read(&path).unwrap(), b"the old file");
}
