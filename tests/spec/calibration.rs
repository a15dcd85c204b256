//! Calibration: profiles as files, the texts it takes, and texts that a model writes itself.

use std::fs;
use std::path::Path;

use crate::common::Random;
use crate::common::program::{Bench, flapjack_reading, stderr, stdout, succeeded};
use crate::common::pruning::{curve_options, curves_of, profile_of, text};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::generate::{Sampler, SamplerConfig, Texts};
use flapjack::gguf::{GgufFile, Value};
use flapjack::prune::{
    Calibration, Collected, Covariances, CurveLevels, CurveOptions, Effort, HeadUnit, Method,
    Metric, Origin, ProfileError, Restore, StoredProfile, calibrate, store,
};

// ---- profiles as files ----

fn stored_profile() -> StoredProfile {
    let synthetic = Synthetic::new(Shape {
        heads: vec![4, 6],
        kv_heads: vec![2, 2],
        channels: vec![50, 70],
        ..Shape::default()
    });
    let tokens = Random::new(9).tokens(300, synthetic.shape.vocabulary);
    let calibration = Calibration {
        bos: Some(1),
        ..text(&tokens)
    };
    let model = synthetic.load();
    let mut profile = profile_of(&model, calibration);
    let options = curve_options(Method::Best.recipe(Effort::Best));
    let curves = curves_of(&model, &profile, calibration, options.clone());
    profile.curves = Some(curves);
    StoredProfile {
        origin: Origin {
            model: GgufFile::open(&synthetic.path).unwrap().fingerprint(),
            model_name: "model.gguf".into(),
            text: store::hash_tokens(&tokens, Some(1)),
            source: "a \"text\"".into(),
            tokens: 300,
            collected: Collected {
                covariances: Covariances::All,
                judge_tokens: 20,
                curves: Some(options),
            },
            flapjack: "0.1.0".into(),
        },
        profile,
    }
}

#[test]
fn a_profile_comes_back_from_its_file_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.profile");
    let profile = stored_profile();
    profile.save(&path).unwrap();
    let again = StoredProfile::load(&path).unwrap();
    assert_eq!(again, profile);
    assert_eq!(again.hash(), profile.hash());
    assert_eq!(fs::read(&path).unwrap(), profile.to_bytes());
}

#[test]
fn a_damaged_profile_is_refused_wherever_the_damage_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.profile");
    let bytes = stored_profile().to_bytes();
    let load = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        StoredProfile::load(&path)
    };
    for place in (0..bytes.len()).step_by(37) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        let message = load(&damaged).unwrap_err().to_string();
        assert!(message.contains("a.profile"), "byte {place}: {message}");
        assert!(load(&bytes[..place]).is_err(), "cut off at {place}");
    }
    assert!(matches!(
        load(b"something else entirely"),
        Err(ProfileError::NotAProfile { .. })
    ));
    let mut newer = bytes.clone();
    newer[8] = 99;
    let message = load(&newer).unwrap_err().to_string();
    assert!(
        message.contains("format 99") && !message.contains("--"),
        "{message}"
    );
}

#[test]
fn what_was_collected_comes_back_from_its_text_and_differs_where_any_field_does() {
    let options = curve_options(Method::Best.recipe(Effort::Best));
    let collected = Collected {
        covariances: Covariances::All,
        judge_tokens: 20,
        curves: Some(options.clone()),
    };
    let with = |options| Collected {
        curves: Some(options),
        ..collected.clone()
    };
    let with_levels = |levels| {
        with(CurveOptions {
            levels,
            ..options.clone()
        })
    };
    let levels = &options.levels;
    let all = [
        collected.clone(),
        Collected {
            covariances: Covariances::None,
            ..collected.clone()
        },
        Collected {
            covariances: Covariances::InGroups,
            ..collected.clone()
        },
        Collected {
            judge_tokens: 0,
            ..collected.clone()
        },
        Collected {
            curves: None,
            ..collected.clone()
        },
        with(CurveOptions {
            metric: Metric::Obs,
            ..options.clone()
        }),
        with(CurveOptions {
            heads: HeadUnit::Group,
            ..options.clone()
        }),
        with(CurveOptions {
            restore: Restore::Bias,
            ..options.clone()
        }),
        with_levels(CurveLevels {
            tokens: levels.tokens + 1,
            ..levels.clone()
        }),
        with_levels(CurveLevels {
            mlp_shares: vec![0.25, 0.5],
            ..levels.clone()
        }),
        with_levels(CurveLevels {
            attention_shares: vec![1.0 / 9.0, 0.33],
            ..levels.clone()
        }),
        // The same numbers, shared out otherwise.
        with_levels(CurveLevels {
            mlp_shares: levels.attention_shares.clone(),
            attention_shares: levels.mlp_shares.clone(),
            ..levels.clone()
        }),
    ];
    for (i, one) in all.iter().enumerate() {
        let text = serde_json::to_string(one).unwrap();
        assert_eq!(serde_json::from_str::<Collected>(&text).unwrap(), *one);
        for other in &all[i + 1..] {
            assert_ne!(one, other);
            assert_ne!(one.hash(), other.hash(), "{one:?} and {other:?}");
        }
    }
}

#[test]
fn the_hash_of_a_text_depends_on_its_tokens_and_on_what_begins_sequences() {
    let hashes = [
        store::hash_tokens(&[1, 2], None),
        store::hash_tokens(&[2, 1], None),
        store::hash_tokens(&[1, 2], Some(0)),
        store::hash_tokens(&[1, 2], Some(1)),
        store::hash_tokens(&[1], Some(2)),
    ];
    for (i, a) in hashes.iter().enumerate() {
        assert!(hashes[i + 1..].iter().all(|b| a != b));
    }
}

// ---- on the command line ----

impl Bench {
    /// Standard error of a run, and whether it succeeded; standard output must be empty where it failed.
    fn run(&self, arguments: &[&str]) -> (bool, String) {
        let output = self.flapjack(arguments);
        let (ok, said) = (output.status.success(), stderr(&output));
        assert!(ok || stdout(&output).is_empty(), "{}", stdout(&output));
        assert!(!said.contains("panicked"), "{said}");
        (ok, said)
    }

    /// What a run says that is pruned by the published method, which needs neither covariances nor loss curves.
    fn prune(&self, more: &[&str]) -> (bool, String) {
        self.prune_by(&[&["--method", "flap"], more].concat())
    }

    fn prune_by(&self, more: &[&str]) -> (bool, String) {
        let base = ["run", "-m", &self.model, "-p", "x", "-n", "1"];
        let prune = ["--no-baseline", "--prune", "0.2"];
        self.run(&[&base[..], &prune, more].concat())
    }

    /// What a pruned run says that must succeed.
    fn report(&self, more: &[&str]) -> String {
        let (ok, said) = self.prune(more);
        assert!(ok, "{said}");
        said
    }

    /// The profile that `flapjack calibrate` makes of some source, without covariances and loss curves.
    fn calibrate(&self, more: &[&str]) -> StoredProfile {
        let path = self.path("out.profile");
        let base = [
            "calibrate",
            "--method",
            "flap",
            "-m",
            &self.model,
            "-o",
            &path,
        ];
        let (ok, said) = self.run(&[&base[..], more].concat());
        assert!(ok, "{said}");
        StoredProfile::load(Path::new(&path)).unwrap()
    }

    /// Why `flapjack calibrate` fails.
    fn refusal(&self, more: &[&str]) -> String {
        let path = self.path("never.profile");
        let base = ["calibrate", "-m", &self.model, "-o", &path];
        let (ok, said) = self.run(&[&base[..], more].concat());
        assert!(!ok && !Path::new(&path).exists(), "{said}");
        said
    }
}

/// Long enough a text.
fn prose(from: usize) -> String {
    calibrate::TEXT.chars().skip(from).take(1200).collect()
}

#[test]
fn the_second_start_takes_the_profile_of_the_first() {
    let bench = Bench::new();
    let few = ["--calib-tokens", "256"];
    let kept = |report: &str| report.contains("from a profile") || report.contains("not again");
    assert!(!kept(&bench.report(&few)));
    assert!(kept(&bench.report(&few)));
    // Another text, other tokens, or the wish to do without.
    let file = bench.write("text.txt", prose(3000));
    assert!(!kept(&bench.report(&["--calib-tokens", "255"])));
    assert!(!kept(&bench.report(&["--calib", &file])));
    assert!(kept(&bench.report(&["--calib", &file])));
    assert!(!kept(
        &bench.report(&[&few[..], &["--no-profile-cache"]].concat())
    ));

    // One that is damaged is made again.
    for entry in fs::read_dir(bench.path("cache/profiles")).unwrap() {
        fs::write(entry.unwrap().path(), b"FLAPPROF").unwrap();
    }
    let said = bench.report(&few);
    assert!(said.contains("damaged") && !kept(&said), "{said}");
    assert!(kept(&bench.report(&few)));
}

#[test]
fn the_default_method_starts_again_from_its_own_profile() {
    let bench = Bench::new();
    let kept = |report: &str| report.contains("from a profile") || report.contains("not again");
    let few = ["--calib-tokens", "256"];
    let prune_by = |more: &[&str]| {
        let (ok, said) = bench.prune_by(&[&few, more].concat());
        assert!(ok, "{said}");
        said
    };
    let first = prune_by(&[]);
    assert!(!kept(&first) && first.contains("  curves "), "{first}");
    assert!(first.contains("192 tokens of"), "{first}");
    let second = prune_by(&[]);
    assert!(kept(&second) && !second.contains("  curves "), "{second}");
    // The same is left of every layer.
    let widths = |report: &str| -> Vec<String> {
        let lines = report.lines().filter(|line| line.contains("by layer"));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(widths(&first).len(), 3, "{first}");
    assert_eq!(widths(&second), widths(&first));
    // What differs in what is collected, or in how curves are measured, is another profile.
    assert!(!kept(&prune_by(&["--method", "flap"])));
    assert!(!kept(&prune_by(&["--effort", "fast"])));
    assert!(!kept(&prune_by(&["--restore", "bias"])));
    // Where units are compared is not.
    assert!(kept(&prune_by(&[
        "--structure",
        "al-mm",
        "--restore",
        "bias"
    ])));
}

#[test]
fn a_profile_that_lacks_what_the_method_needs_is_refused_with_what_to_do() {
    let bench = Bench::new();
    let path = bench.path("out.profile");
    let few = ["--calib-tokens", "256"];
    bench.calibrate(&few);
    let refused = |more: &[&str]| {
        let (ok, said) = bench.prune_by(&[&["--profile", &path], more].concat());
        assert!(!ok, "{said}");
        said
    };
    for (arguments, words) in [
        (vec![], ["no loss curves", "calibrate --structure curves"]),
        (
            vec!["--method", "flap", "--restore", "lsq"],
            ["no covariances", "calibrate --restore lsq"],
        ),
        (
            vec!["--method", "flap", "--metric", "obs"],
            ["no covariances", "calibrate --metric obs"],
        ),
        (
            vec!["--method", "flap", "--restore", "sequential"],
            ["the calibration text itself", "--calib"],
        ),
    ] {
        let said = refused(&arguments);
        for word in words {
            assert!(said.contains(word), "{arguments:?}: {word} in {said}");
        }
    }
    // Restoration auto can do without covariances, and says so.
    let (ok, said) = bench.prune_by(&["--profile", &path, "--effort", "fast"]);
    assert!(ok && said.contains("has no covariances"), "{said}");

    let with_curves = ["--structure", "curves", "--restore", "bias"];
    let profile = bench.calibrate(&[&few[..], &with_curves].concat());
    assert!(profile.profile.curves.is_some() && !profile.profile.has_covariance());
    let said = refused(&[]);
    assert!(
        said.contains("--restore bias") && said.contains("--restore auto"),
        "{said}"
    );
    let (ok, said) = bench.prune_by(&["--profile", &path, "--restore", "bias"]);
    assert!(ok && said.contains("from a profile"), "{said}");
}

#[test]
fn the_cache_keeps_the_youngest_profiles() {
    let bench = Bench::new();
    let few = ["--calib-tokens", "256"];
    for i in 0..100 {
        bench.write(&format!("cache/profiles/{i:03}.profile"), "old");
    }
    for i in 0..6 {
        let path = bench.write(&format!("cache/profiles/large{i}.profile"), "old");
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_len(40 << 20).unwrap();
    }
    bench.report(&few);
    let files = bench.cached("profile");
    let sizes: Vec<u64> = files
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .collect();
    assert_eq!(sizes.len(), 64);
    assert_eq!(sizes.iter().filter(|size| **size == 40 << 20).count(), 4);
    assert!(bench.report(&few).contains("not again"));
}

#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    let bench = Bench::new();
    bench.write("cache", "a file where the folder should be");
    bench.report(&["--calib-tokens", "256"]);
}

#[test]
fn a_profile_made_by_calibrate_is_used_and_one_of_another_model_refused_by_name() {
    let bench = Bench::new();
    let path = bench.path("out.profile");
    let profile = bench.calibrate(&["--calib-tokens", "256"]);
    assert_eq!(profile.origin.tokens, 256);
    let said = bench.report(&["--profile", &path]);
    assert!(said.contains("from a profile"), "{said}");

    let source = GgufFile::open(&bench.model).unwrap();
    let mut writer = crate::common::copy_of(&source);
    writer.metadata("general.description", Value::String("another".into()));
    let other = bench.path("other.gguf");
    writer.save(Path::new(&other)).unwrap();
    let (ok, said) = bench.run(&[
        "run",
        "-m",
        &other,
        "-p",
        "x",
        "--prune",
        "0.2",
        "--profile",
        &path,
    ]);
    assert!(!ok);
    let name = Path::new(&bench.model).file_name().unwrap();
    for word in ["out.profile", name.to_str().unwrap(), "other.gguf"] {
        assert!(said.contains(word), "{word} in {said}");
    }
    let (ok, said) = bench.prune(&["--profile", &bench.path("none.profile")]);
    assert!(!ok && said.contains("none.profile"), "{said}");
    let (ok, said) = bench.prune(&["--profile", &path, "--calib", "self"]);
    assert!(!ok && said.contains("cannot be used with"), "{said}");
}

/// Whoever shrinks a model for text of their own sees what that does to such text, and to other text.
#[test]
fn the_report_shows_the_effect_on_the_own_text_and_on_the_built_in_one() {
    let bench = Bench::new();
    let file = bench.write("own.txt", calibrate::TEXT.to_uppercase());
    let effects = |more: &[&str]| -> Vec<(String, [f64; 2])> {
        let base = [
            "run",
            "-m",
            &bench.model,
            "-p",
            "x",
            "-n",
            "1",
            "--prune",
            "0.2",
        ];
        let (ok, said) = bench.run(&[&base[..], &["--method", "flap"], more].concat());
        assert!(ok, "{said}");
        let lines = said.lines().filter_map(|l| l.strip_prefix("  perplexity "));
        lines
            .map(|line| {
                let (numbers, text) = line.split_once(" on ").unwrap();
                let numbers = numbers.split("  (").next().unwrap().split(" -> ");
                let numbers: Vec<f64> = numbers.map(|n| n.trim().parse().unwrap()).collect();
                (text.to_owned(), [numbers[0], numbers[1]])
            })
            .collect()
    };
    let few = ["--calib", &file, "--calib-tokens", "512"];
    let found = effects(&few);
    let [(own, own_change), (built_in, built_in_change)] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!(
        *own,
        format!("1024 tokens of {file}, not seen by statistics")
    );
    assert_eq!(built_in, "1024 tokens of the built-in text");
    for [before, after] in [own_change, built_in_change] {
        assert!(*before > 1.0 && after > before, "{found:?}");
    }
    // Calibrated on capitals, the model loses less of them than of other text.
    let rise = |[before, after]: &[f64; 2]| after / before;
    assert!(rise(own_change) < rise(built_in_change), "{found:?}");

    assert_eq!(effects(&few), [], "a second start measures nothing");
    let quick = [&few[..], &["--no-profile-cache", "--no-baseline"]].concat();
    assert_eq!(effects(&quick), []);
    assert_eq!(effects(&["--calib-tokens", "512"]), []);
}

#[test]
fn a_text_is_the_same_from_a_file_a_folder_json_lines_or_standard_input() {
    let bench = Bench::new();
    let (one, two) = (prose(0), prose(5000));
    let file = bench.write("whole.txt", format!("{one}\n\n{two}"));
    let expected = bench.calibrate(&["--calib", &file]);

    bench.write("folder/b/two.md", &two);
    bench.write("folder/a.txt", &one);
    bench.write("folder/.hidden", "this is passed over");
    bench.write("folder/picture.png", [0x89, b'P', 0, 0, 0xff]);
    let lines = [&one, &two].map(|t| serde_json::json!({ "title": "x", "body": t }).to_string());
    let json = bench.write("texts.jsonl", lines.join("\n") + "\n\n");
    for arguments in [
        vec!["--calib", &bench.path("folder")],
        vec!["--calib", &json, "--calib-field", "body"],
    ] {
        let profile = bench.calibrate(&arguments);
        assert_eq!(profile.origin.text, expected.origin.text, "{arguments:?}");
        assert_eq!(profile.profile, expected.profile);
    }

    let path = bench.path("piped.profile");
    let arguments = ["calibrate", "-q", "-m", &bench.model, "-o", &path];
    let arguments = [&arguments[..], &["--method", "flap", "--calib", "-"]].concat();
    succeeded(&flapjack_reading(&arguments, &fs::read(&file).unwrap()));
    let piped = StoredProfile::load(Path::new(&path)).unwrap();
    assert_eq!(piped.origin.text, expected.origin.text);
    assert_eq!(piped.profile, expected.profile);
}

#[test]
fn texts_that_are_of_no_use_are_refused_with_the_reason() {
    let bench = Bench::new();
    let long = prose(0);
    let line = |field: &str| serde_json::json!({ field: &long }).to_string();
    let odd = format!("{}\n{{\"text\": 5}}\n", line("text"));
    fs::create_dir(bench.path("empty")).unwrap();
    for (source, words) in [
        (bench.write("empty.txt", ""), vec!["0 tokens", "192"]),
        (
            bench.write("short.txt", "Too short."),
            vec!["tokens", "192"],
        ),
        (bench.write("latin.txt", b"caf\xe9"), vec!["offset 3"]),
        (bench.path("empty"), vec!["no text files"]),
        (bench.path("nothing.txt"), vec!["nothing.txt"]),
        (
            bench.write("not.jsonl", "not json"),
            vec!["line 1", "not JSON"],
        ),
        (bench.write("odd.jsonl", odd), vec!["line 2", "\"text\""]),
        (
            bench.write("other.jsonl", line("body")),
            vec!["\"body\"", "--calib-field"],
        ),
        ("self:100".to_owned(), vec!["100 tokens", "192"]),
        ("self:many".to_owned(), vec!["self:", "./self:many"]),
        (String::new(), vec!["--calib"]),
    ] {
        let message = bench.refusal(&["--calib", &source]);
        for word in words {
            assert!(message.contains(word), "{source}: {word} in {message}");
        }
    }
    // Both cannot come from standard input.
    let (ok, said) = bench.run(&["run", "-m", &bench.model, "--prune", "0.2", "--calib", "-"]);
    assert!(!ok && said.contains("both the prompt"), "{said}");
    // And a profile needs a place.
    let nowhere = bench.path("nowhere/out.profile");
    let (ok, said) = bench.run(&["calibrate", "-m", &bench.model, "-o", &nowhere]);
    assert!(!ok && said.contains("nowhere"), "{said}");
}

// ---- own text ----

#[test]
fn own_texts_are_the_same_for_any_number_of_threads_and_differ_from_each_other() {
    let synthetic = Synthetic::new(Shape::default());
    let model = synthetic.load();
    let texts = Texts {
        count: 70,
        tokens: 20,
        bos: Some(3),
        starts: &[5, 7],
        vocabulary: 40,
        seed: 1,
    };
    let write = |texts: &Texts, threads| {
        let mut told = 0;
        let written = texts
            .write(&model, &runtime(threads), &mut |done, total| {
                assert!(done > told && done <= total);
                told = done;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(told, 70 * 20);
        written
    };
    let written = write(&texts, 1);
    assert_eq!(write(&texts, 3), written);
    assert_eq!(written.len(), 70);
    for (i, text) in written.iter().enumerate() {
        assert!(text.len() == 20 && text[0] == 3 && [5, 7].contains(&text[1]));
        assert!(
            text.iter().all(|t| *t < 40),
            "what means nothing is never chosen"
        );
        assert!(written[i + 1..].iter().all(|other| other != text));
    }
    let starts: Vec<u32> = (0..40).collect();
    let any = Texts {
        bos: None,
        starts: &starts,
        ..texts
    };
    let starts: std::collections::BTreeSet<u32> = write(&any, 2).iter().map(|t| t[0]).collect();
    assert!(starts.len() > 10);
}

#[test]
fn at_temperature_1_with_nothing_cut_off_tokens_come_as_often_as_their_probability() {
    let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY, -1.0];
    let config = SamplerConfig {
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        temperature: 1.0,
        seed: 5,
        ..SamplerConfig::default()
    };
    let mut sampler = Sampler::new(config);
    let draws = 20_000;
    let mut counts = [0usize; 5];
    for _ in 0..draws {
        counts[sampler.sample(&mut logits.clone(), &[]).unwrap() as usize] += 1;
    }
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    for (count, logit) in counts.iter().zip(logits) {
        let expected = f64::from(logit).exp() / total;
        let spread = (expected * (1.0 - expected) / draws as f64).sqrt();
        let share = *count as f64 / draws as f64;
        assert!(
            (share - expected).abs() <= 4.0 * spread,
            "{share} of {expected}"
        );
    }
}

#[test]
fn the_model_writes_its_own_calibration_text() {
    let bench = Bench::new();
    let own = ["--calib", "self:256"];
    let said = bench.report(&own);
    assert!(
        said.contains("256 tokens of the model's own text"),
        "{said}"
    );
    // It is not even written again.
    let said = bench.report(&own);
    assert!(said.contains("not again"), "{said}");
    // If it were, it would be the same.
    let [kept] = &bench.cached("profile")[..] else {
        panic!("one profile, and not {:?}", bench.cached("profile"));
    };
    let (one, two) = (StoredProfile::load(kept).unwrap(), bench.calibrate(&own));
    assert_eq!(one.profile, two.profile);
}
