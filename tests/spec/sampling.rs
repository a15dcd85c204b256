//! How text is sampled where nobody says how: as the model's makers recommend, with the user's options above and the program's
//! defaults below.

use std::fs;

use flapjack::engine::{Engine, Notice};
use flapjack::generate::{SamplerOptions, SamplerStep};
use flapjack::gguf::{GgufFile, Value};

use crate::common::copy_of;
use crate::common::engine::Workshop;
use crate::common::program::{stderr, stdout, succeeded};

/// The model of the workshop with more metadata.
fn with_metadata(workshop: &Workshop, entries: &[(&str, Value)]) {
    let file = GgufFile::open(&workshop.model).unwrap();
    let mut writer = copy_of(&file);
    for (key, value) in entries {
        writer.metadata(*key, value.clone());
    }
    let path = workshop.path("more.gguf");
    writer.save(&path).unwrap();
    drop(file);
    fs::rename(path, &workshop.model).unwrap();
}

fn recommended(engine: &Engine) -> SamplerOptions {
    engine.sampling_defaults().options()
}

/// Keys and problems of recommendations that were passed over.
fn ignored(engine: &Engine) -> Vec<(Option<&str>, &str)> {
    let notices = engine.notices().iter();
    notices
        .filter_map(|notice| match notice {
            Notice::SamplingIgnored { key, problem, .. } => {
                Some((key.as_deref(), problem.as_str()))
            }
            _ => None,
        })
        .collect()
}

#[test]
fn the_metadata_of_a_file_recommend_how_to_sample() {
    let workshop = Workshop::new();
    assert_eq!(recommended(&workshop.open()), SamplerOptions::default());
    with_metadata(
        &workshop,
        &[
            ("general.sampling.temp", Value::F32(0.25)),
            ("general.sampling.top_k", Value::I32(20)),
            ("general.sampling.top_p", Value::F32(0.75)),
            ("general.sampling.min_p", Value::F64(0.0)),
            ("general.sampling.penalty_repeat", Value::F32(1.5)),
            ("general.sampling.penalty_last_n", Value::I32(-1)),
            ("general.sampling.xtc_probability", Value::F32(0.5)),
            ("general.sampling.xtc_threshold", Value::F32(0.25)),
            ("general.sampling.mirostat", Value::I32(2)),
            ("general.sampling.mirostat_tau", Value::F32(4.0)),
            ("general.sampling.mirostat_eta", Value::F32(0.5)),
            (
                "general.sampling.sequence",
                Value::String("top_k;min_p;temperature".into()),
            ),
        ],
    );
    let engine = workshop.open();
    let expected = SamplerOptions {
        temperature: Some(0.25),
        top_k: Some(20),
        top_p: Some(0.75),
        min_p: Some(0.0),
        repetition_penalty: Some(1.5),
        repetition_window: Some(usize::MAX),
        xtc_probability: Some(0.5),
        xtc_threshold: Some(0.25),
        mirostat: Some(true),
        mirostat_tau: Some(4.0),
        mirostat_eta: Some(0.5),
        steps: Some(vec![
            SamplerStep::TopK,
            SamplerStep::MinP,
            SamplerStep::Temperature,
        ]),
        ..SamplerOptions::default()
    };
    assert_eq!(recommended(&engine), expected);
    assert!(ignored(&engine).is_empty());
}

#[test]
fn a_generation_config_beside_the_file_recommends_too_and_the_file_comes_first() {
    let workshop = Workshop::new();
    workshop.write(
        "generation_config.json",
        r#"{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": null, "repetition_penalty": 1.05,
            "typical_p": 0.9, "no_repeat_ngram_size": 3, "eos_token_id": [1, 2], "transformers_version": "4.51.0"}"#,
    );
    let options = recommended(&workshop.open());
    let expected = SamplerOptions {
        temperature: Some(0.7),
        top_k: Some(20),
        top_p: Some(0.8),
        repetition_penalty: Some(1.05),
        typical_p: Some(0.9),
        no_repeat_ngram: Some(3),
        ..SamplerOptions::default()
    };
    assert_eq!(options, expected);
    with_metadata(&workshop, &[("general.sampling.top_k", Value::I32(64))]);
    let options = recommended(&workshop.open());
    assert_eq!(options.top_k, Some(64));
    assert_eq!(options.top_p, Some(0.8));

    workshop.write(
        "generation_config.json",
        r#"{"do_sample": false, "temperature": 0.7}"#,
    );
    assert_eq!(recommended(&workshop.open()).temperature, Some(0.0));
}

#[test]
fn a_recommendation_that_makes_no_sense_is_passed_over_with_a_notice() {
    let workshop = Workshop::new();
    with_metadata(
        &workshop,
        &[
            ("general.sampling.temp", Value::F32(f32::NAN)),
            ("general.sampling.top_k", Value::String("many".into())),
            ("general.sampling.top_p", Value::F32(1.5)),
            ("general.sampling.min_p", Value::F32(0.25)),
            ("general.sampling.penalty_repeat", Value::F32(-1.0)),
            ("general.sampling.mirostat", Value::I32(1)),
            (
                "general.sampling.sequence",
                Value::String("infill;top_k".into()),
            ),
        ],
    );
    let engine = workshop.open();
    let expected = SamplerOptions {
        min_p: Some(0.25),
        // What is known of the steps is taken.
        steps: Some(vec![SamplerStep::TopK]),
        ..SamplerOptions::default()
    };
    assert_eq!(recommended(&engine), expected);
    let found = ignored(&engine);
    let keys: Vec<_> = found.iter().map(|(key, _)| key.unwrap()).collect();
    let expected = [
        "temp",
        "top_k",
        "top_p",
        "penalty_repeat",
        "mirostat",
        "sequence",
    ];
    assert_eq!(keys, expected.map(|key| format!("general.sampling.{key}")));
    assert_eq!(found[1].1, "expected a whole number, found \"many\"");
    assert_eq!(found[2].1, "expected a number from 0 to 1, found 1.5");
    let (_, log) = succeeded(&workshop.flapjack(&["run", "-p", "x", "-n", "1", "-q"]));
    assert!(log.contains("general.sampling.top_p"), "{log}");

    let workshop = Workshop::new();
    for (text, words) in [
        ("{", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        (
            r#"{"temperature": "hot"}"#,
            "expected a number of at least 0, found \"hot\"",
        ),
        (r#"{"top_k": 2.5}"#, "expected a whole number, found 2.5"),
        (
            r#"{"do_sample": "no"}"#,
            "expected true or false, found \"no\"",
        ),
    ] {
        workshop.write("generation_config.json", text);
        let engine = workshop.open();
        assert_eq!(recommended(&engine), SamplerOptions::default(), "{text}");
        let found = ignored(&engine);
        assert_eq!(found.len(), 1, "{text}");
        assert!(found[0].1.starts_with(words), "{found:?}");
    }
}

#[test]
fn an_option_wins_over_the_recommendation_and_that_over_the_default() {
    let workshop = Workshop::new();
    let sampling = |arguments: &[&str]| {
        let run = ["run", "-v", "-p", "abc", "-n", "2", "-q"];
        let (_, log) = succeeded(&workshop.flapjack(&[&run, arguments].concat()));
        let lines = log.lines().filter(|line| line.contains("sampling by"));
        lines
            .map(|line| line.trim().to_owned())
            .collect::<Vec<_>>()
            .join("\n")
    };
    let log = sampling(&[]);
    assert!(
        log.contains("by defaults: repetition_penalty 1.1, temperature 0.5"),
        "{log}"
    );
    with_metadata(
        &workshop,
        &[
            ("general.sampling.temp", Value::F32(0.75)),
            ("general.sampling.penalty_repeat", Value::F32(1.5)),
        ],
    );
    let log = sampling(&["--top-k", "-1"]);
    assert!(log.contains("by options: top_k 0"), "{log}");
    assert!(
        log.contains("by the file's recommendation: repetition_penalty 1.5, temperature 0.75"),
        "{log}"
    );
    assert!(!log.contains("defaults"), "{log}");
    let log = sampling(&["--temp", "1", "--seed", "-1"]);
    assert!(log.contains("temperature 1.0, seed "), "{log}");
    assert!(!log.contains("temperature 0.75"), "{log}");
}

#[test]
fn temperature_0_is_greedy_and_has_no_penalty_that_nobody_asked_for() {
    let options = |temperature, repetition_penalty| SamplerOptions {
        temperature,
        repetition_penalty,
        ..SamplerOptions::default()
    };
    let (model, program) = (options(Some(0.7), Some(1.5)), options(Some(0.5), Some(1.1)));
    let penalty = |asked: SamplerOptions| asked.or(&model).or(&program).config().repetition_penalty;
    assert_eq!(penalty(options(None, None)), 1.5);
    assert_eq!(penalty(options(Some(1.0), None)), 1.5);
    assert_eq!(penalty(options(Some(0.0), None)), 1.0);
    assert_eq!(penalty(options(Some(0.0), Some(1.2))), 1.2);
    // A model that is to be read greedily with a penalty is.
    let greedy = options(Some(0.0), Some(1.3));
    assert_eq!(greedy.or(&program).config().repetition_penalty, 1.3);

    // On the command line it is as the same without any penalty.
    let text = |arguments: &[&str]| {
        let prompt = "the the the the the the the the";
        let run = ["run", "-p", prompt, "-n", "24", "-q"];
        let workshop = Workshop::new();
        succeeded(&workshop.flapjack(&[&run, arguments].concat())).0
    };
    let greedy = text(&["--temp", "0"]);
    assert_eq!(greedy, text(&["--temp", "0", "--repeat-penalty", "1"]));
    assert_ne!(greedy, text(&["--temp", "0", "--repeat-penalty", "3"]));
}

#[test]
fn numbers_below_zero_mean_what_they_mean_elsewhere_or_are_refused_with_the_range() {
    let workshop = Workshop::new();
    let run = |arguments: &[&str]| {
        let run = ["run", "-p", "abc", "-n", "16", "-q"];
        workshop.flapjack(&[&run, arguments].concat())
    };
    let text = |arguments: &[&str]| succeeded(&run(&[&["--temp", "1"], arguments].concat())).0;
    assert_eq!(text(&["--top-k", "-1"]), text(&["--top-k", "0"]));
    assert_eq!(
        text(&["--repeat-last-n", "-1", "--repeat-penalty", "2"]),
        text(&["--repeat-last-n", "1000000", "--repeat-penalty", "2"])
    );
    // Of 16 bytes by a model that knows nothing, two are hardly ever the same.
    assert_ne!(text(&["--seed", "-1"]), text(&["--seed", "-1"]));
    for (option, value, range) in [
        ("--temp", "-1", "of at least 0"),
        ("--top-k", "-2", "0 or -1 for all"),
        ("--top-p", "-0.5", "from 0 to 1"),
        ("--min-p", "-0.5", "from 0 to 1"),
        ("--repeat-penalty", "-1", "above 0"),
        ("--repeat-last-n", "-2", "-1 for all"),
        ("--seed", "-2", "-1 for any"),
        ("--frequency-penalty", "inf", "must be a number"),
        ("--dry-base", "0.5", "of at least 1"),
        ("--dry-penalty-last-n", "-2", "-1 for all"),
        ("--typical", "2", "from 0 to 1"),
        ("--xtc-probability", "-1", "from 0 to 1"),
        ("--xtc-threshold", "7", "from 0 to 1"),
        ("--top-n-sigma", "-2", "-1 for all"),
        ("--mirostat", "1", "0 (off) or 2"),
        ("--samplers", "top_k;infill", "penalties;dry;top_n_sigma"),
        ("--logit-bias", "15", "15043+1"),
        ("--logit-bias", "x+nan", "15043+1"),
    ] {
        let output = run(&[option, value]);
        assert_eq!(output.status.code(), Some(2), "{option}");
        assert_eq!(stdout(&output), "");
        let message = stderr(&output);
        assert!(message.contains(option), "{message}");
        assert!(message.contains(range), "{message}");
    }
}

#[test]
fn a_bias_is_for_a_token_by_its_id_or_by_its_text() {
    let workshop = Workshop::new();
    let run = |bias: &str| {
        let options = ["--temp", "0", "--logit-bias", bias];
        let run = ["run", "-p", "abc", "-n", "6", "-q"];
        workshop.flapjack(&[&run[..], &options].concat())
    };
    let text = |bias: &str| succeeded(&run(bias)).0;
    let engine = workshop.open();
    let id = engine.tokenizer().unwrap().encode("x").unwrap()[0];
    assert_eq!(text(&format!("{id}+1000")), "xxxxxx\n");
    assert_eq!(text("x+1e3"), "xxxxxx\n");
    assert_eq!(text("-+1e3"), "------\n");
    // Each token of a text of several.
    let several = text("-y+1e3");
    assert!(
        several.trim().chars().all(|c| "-y".contains(c)),
        "{several}"
    );
    let plain = text("x+0");
    let first = plain.chars().next().unwrap();
    if first.is_ascii_alphanumeric() {
        let banned = text(&format!("{first}-inf"));
        assert!(!banned.contains(first), "{banned}");
    }
    let output = run("9999999+1");
    assert!(!output.status.success());
    let message = stderr(&output);
    assert!(message.contains("--logit-bias"), "{message}");
    assert!(message.contains("there is no token 9999999"), "{message}");
}

#[test]
fn every_option_of_sampling_is_taken() {
    let workshop = Workshop::new();
    let options = "--frequency-penalty 0.1 --presence-penalty 0.2 --dry-multiplier 0.3 --dry-base 1.5 \
        --dry-allowed-length 3 --dry-penalty-last-n -1 --dry-sequence-breaker none --dry-sequence-breaker \\n \
        --no-repeat-ngram 4 --top-n-sigma 2 --typical 0.9 --xtc-probability 0.4 --xtc-threshold 0.2 --dynatemp-range 0.1 \
        --dynatemp-exp 2 --mirostat 0 --mirostat-lr 0.2 --mirostat-ent 6 --samplers top_k;temp --seed 7";
    let options: Vec<&str> = options.split_whitespace().collect();
    let run = ["run", "-v", "-p", "abc", "-n", "2", "-q"];
    let (_, log) = succeeded(&workshop.flapjack(&[&run, &options[..]].concat()));
    let expected = [
        "frequency_penalty 0.1",
        "presence_penalty 0.2",
        "dry_multiplier 0.3",
        "dry_base 1.5",
        "dry_allowed_length 3",
        "dry_window 18446744073709551615",
        r#"dry_breakers ["\n"]"#,
        "no_repeat_ngram 4",
        "top_n_sigma 2.0",
        "typical_p 0.9",
        "xtc_probability 0.4",
        "xtc_threshold 0.2",
        "dynatemp_range 0.1",
        "dynatemp_exponent 2.0",
        "mirostat false",
        "mirostat_tau 6.0",
        "mirostat_eta 0.2",
        "steps [TopK, Temperature]",
        "seed 7",
    ];
    let line = log.lines().find(|line| line.contains("by options:"));
    assert!(
        line.is_some_and(|line| line.ends_with(&expected.join(", "))),
        "{log}"
    );
}
