//! How an answer ends, and what is said about it where it is odd: nobody is left with an empty line.

use crate::common::engine::Workshop;
use crate::common::program::{flapjack, flapjack_reading, stderr, stdout, succeeded};
use flapjack::engine::{Engine, GenerateOptions, OpenOptions};
use flapjack::generate::{Finish, Generated, SamplerConfig, Timings};
use flapjack::gguf::{GgufFile, Value};
use tempfile::TempDir;

/// The default model with other metadata.
struct Changed {
    _folder: TempDir,
    path: String,
}

impl Changed {
    fn new(change: impl Fn(&str, &Value) -> Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changed.gguf");
        let file = GgufFile::open(crate::common::default_model()).unwrap();
        let mut writer = flapjack::gguf::Writer::new();
        for (key, value) in file.entries() {
            writer.metadata(key, change(key, value));
        }
        for tensor in file.tensors() {
            let bytes = file.bytes(tensor);
            writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
        }
        writer.save(&path).unwrap();
        Self {
            path: path.to_str().unwrap().to_owned(),
            _folder: folder,
        }
    }

    /// A model that ends its text with this token.
    fn ending_with(token: u32) -> Self {
        Self::new(|key, value| match key {
            "tokenizer.ggml.eos_token_id" => Value::U32(token),
            _ => value.clone(),
        })
    }

    /// A model that was trained for so many positions.
    fn trained_for(positions: u32) -> Self {
        Self::new(|key, value| match key {
            "llama.context_length" => Value::U32(positions),
            _ => value.clone(),
        })
    }

    fn run(&self, arguments: &[&str]) -> (String, String) {
        succeeded(&flapjack(
            &[&["run", "--raw", "-m", &self.path], arguments].concat(),
        ))
    }
}

const PARIS: [&str; 4] = ["-p", "The capital of France is", "--temp", "0"];

/// The first tokens that the default model writes behind a prompt.
fn greedy(prompt: &str, tokens: usize) -> Vec<u32> {
    let engine = Engine::open(crate::common::default_model(), OpenOptions::default()).unwrap();
    let options = GenerateOptions {
        max_tokens: tokens,
        sampler: SamplerConfig {
            repetition_penalty: 1.0,
            ..SamplerConfig::greedy()
        },
        ignore_end: true,
        ..GenerateOptions::default()
    };
    let mut sequence = engine.sequence();
    let mut generation = engine.generate(&mut sequence, prompt, &options).unwrap();
    while generation.step().unwrap().is_some() {}
    generation.generated().unwrap().tokens.clone()
}

#[test]
fn an_answer_that_ends_at_once_says_so_and_what_to_do() {
    let first = greedy(PARIS[1], 1)[0];
    let model = Changed::ending_with(first);
    let (text, said) = model.run(&[&PARIS[..], &["-n", "8"]].concat());
    assert_eq!(text, "\n");
    for words in [
        "ended its text at once",
        "--ignore-eos",
        "0 tokens",
        "end        the model ended its text",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    // Chance helps where there is some.
    let (_, said) = model.run(&["-p", PARIS[1], "--temp", "0.001", "--repeat-penalty", "1"]);
    assert!(said.contains("--seed"), "{said}");
    let (text, said) = model.run(&[&PARIS[..], &["-n", "8", "--ignore-eos"]].concat());
    assert!(text.trim().len() > 1, "{text}");
    assert!(
        !said.contains("WARN") && said.contains("-n 8 reached"),
        "{said}"
    );
}

#[test]
fn a_stop_text_that_comes_first_is_told() {
    let output = flapjack(
        &[
            &["run", "--raw"],
            &PARIS[..],
            &["-n", "8", "--stop", " Paris"],
        ]
        .concat(),
    );
    let (text, said) = succeeded(&output);
    assert_eq!(text, "\n");
    assert!(
        said.contains("--stop came before anything else") && said.contains("a stop text came"),
        "{said}"
    );
    let output = flapjack(&[&["run", "--raw"], &PARIS[..], &["--stop", ""]].concat());
    assert_eq!(
        output.status.code(),
        Some(2),
        "stops nothing: {}",
        stderr(&output)
    );
}

/// The tokens between the letters of a tiny model's text are all there is: no text, or white space.
#[test]
fn tokens_that_are_no_text_are_told() {
    // All of the model's favourite tokens end its text; with --ignore-eos they are passed over in silence otherwise.
    let first = greedy(PARIS[1], 1)[0];
    let model = Changed::new(|key, value| match (key, value) {
        // 3 is the type of control tokens, which stand for no text.
        ("tokenizer.ggml.token_type", Value::Array(kind, items)) => {
            let mut items = items.clone();
            items[first as usize] = Value::I32(3);
            Value::Array(*kind, items)
        }
        _ => value.clone(),
    });
    let (text, said) = model.run(&[&PARIS[..], &["-n", "1", "--ignore-eos"]].concat());
    assert_eq!(text.trim(), "");
    assert!(
        said.contains("nothing but white space or tokens that stand for no text"),
        "{said}"
    );
}

#[test]
fn the_report_says_why_an_answer_ended() {
    for (arguments, reason) in [
        (vec!["-n", "2"], "-n 2 reached"),
        (vec!["-n", "0"], "-n 0 reached"),
        (vec!["--stop", "."], "a stop text came"),
        (vec!["-c", "8", "-n", "20"], "all 8 positions are taken"),
    ] {
        let output = flapjack(&[&["run", "--raw"], &PARIS[..], &arguments].concat());
        let (_, said) = succeeded(&output);
        assert!(said.contains(&format!("  end        {reason}")), "{said}");
    }
}

#[test]
fn an_empty_prompt_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("empty.txt");
    std::fs::write(&file, "\n").unwrap();
    let tail = ["-n", "2", "--ignore-eos"];
    for output in [
        flapjack(&[&["run", "--raw", "-p", ""], &tail[..]].concat()),
        flapjack(&[&["run", "--raw", "-f", file.to_str().unwrap()], &tail[..]].concat()),
        flapjack_reading(&[&["run", "--raw"], &tail[..]].concat(), b""),
    ] {
        let (_, said) = succeeded(&output);
        assert!(said.contains("the prompt is empty"), "{said}");
    }
    let (_, said) = succeeded(&flapjack(
        &[&["run", "--raw", "-p", "x"], &tail[..]].concat(),
    ));
    assert!(!said.contains("the prompt is empty"), "{said}");
}

// ---- circles ----

fn generated(tokens: Vec<u32>) -> Generated {
    Generated {
        tokens,
        finish: Finish::Length,
        timings: Timings::default(),
        logprobs: Vec::new(),
        end_logprob: None,
        prompt_logprobs: Vec::new(),
    }
}

#[test]
fn an_answer_that_repeats_itself_is_found_by_its_end() {
    let mut tokens: Vec<u32> = (0..40).collect();
    tokens.extend([7, 8, 9].iter().cycle().take(96));
    assert_eq!(generated(tokens.clone()).repeats(), Some(3));
    tokens.push(1);
    assert_eq!(generated(tokens).repeats(), None, "it has come out of it");
    assert_eq!(generated(vec![5; 95]).repeats(), None, "too short to tell");
    assert_eq!(generated(vec![5; 96]).repeats(), Some(1));
    let counting = (0..96).flat_map(|i| [1, 2, 100 + i]).collect();
    assert_eq!(generated(counting).repeats(), None, "a list is no circle");
}

#[test]
fn going_round_in_a_circle_is_told() {
    let prompt = "😀 😃 😄 😁 😀 😃 😄 😁 😀 😃 😄 😁 😀 😃";
    let arguments = [
        "run",
        "--raw",
        "-p",
        prompt,
        "-n",
        "120",
        "--temp",
        "0",
        "--repeat-penalty",
        "1",
        "--ignore-eos",
    ];
    let (_, said) = succeeded(&flapjack(&arguments));
    assert!(
        said.contains("goes round in a circle") && said.contains("--repeat-penalty"),
        "{said}"
    );
}

// ---- beyond what the model was trained for ----

const LONG: &str = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen";

#[test]
fn a_prompt_beyond_what_the_model_was_trained_for_is_told_before_the_work_and_answered() {
    let model = Changed::trained_for(16);
    let (text, said) = model.run(&["-p", LONG, "-n", "6", "--ignore-eos", "--temp", "0"]);
    assert!(!text.trim().is_empty());
    let warning = said.find("trained for 16").expect(&said);
    assert!(warning < said.find("  map ").unwrap(), "{said}");
    assert!(
        said.contains("shorten the prompt") && !said.contains("--ctx"),
        "{said}"
    );
    assert!(said.contains("generate   6 tokens"), "{said}");
}

#[test]
fn an_answer_stops_where_the_models_training_did_and_the_advice_is_right() {
    let model = Changed::trained_for(16);
    let greedy = ["--ignore-eos", "--temp", "0"];
    let (_, said) = model.run(&[&PARIS[..2], &["-n", "100"], &greedy].concat());
    for words in [
        "16 tokens that the model was trained for",
        "a shorter prompt",
        "nonsense",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    // Five tokens of prompt, and the last one needs no position.
    assert!(said.contains("generate   12 tokens"), "{said}");
    // Whoever sets the context goes beyond, and is told before.
    let (_, said) = model.run(&[&PARIS[..2], &["-n", "20", "-c", "40"], &greedy].concat());
    assert!(
        said.contains("trained for 16 positions, and 40 are asked for"),
        "{said}"
    );
    assert!(said.contains("generate   20 tokens"), "{said}");
    // A smaller context than need be can be made larger.
    let (_, said) = model.run(&[&PARIS[..2], &["-n", "20", "-c", "8"], &greedy].concat());
    assert!(said.contains("a larger --ctx makes room"), "{said}");
}

#[test]
fn a_perplexity_beyond_what_the_model_was_trained_for_is_told() {
    let model = Changed::trained_for(16);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, LONG.repeat(4)).unwrap();
    let file = file.to_str().unwrap();
    let perplexity = |context| {
        let arguments = ["perplexity", "-m", &model.path, "-f", file, "-c", context];
        succeeded(&flapjack(&[&arguments[..], &["--chunks", "100"]].concat()))
    };
    let (line, said) = perplexity("32");
    assert!(line.starts_with("perplexity "), "{line}");
    assert!(
        said.contains("trained for 16 positions, and 32 are asked for"),
        "{said}"
    );
    assert!(said.contains("not the 100 of --chunks"), "{said}");
    assert!(!perplexity("16").1.contains("trained for"));
}

// ---- other things that were done otherwise than asked ----

#[test]
fn a_calibration_text_that_is_shorter_than_asked_for_is_told() {
    let workshop = Workshop::new();
    let text = workshop.write("short.txt", "It was the best of days. ".repeat(20));
    let text = text.to_str().unwrap();
    let run = |arguments: &str| {
        let arguments = arguments.replace("TEXT", text);
        let arguments: Vec<&str> = arguments.split(' ').collect();
        succeeded(&workshop.flapjack(&arguments)).1
    };
    let prune = "run -p x -n 1 --prune 0.2 --method flap --calib";
    let said = run(&format!("{prune} TEXT --calib-tokens 5000"));
    assert!(
        said.contains("500 tokens in all, fewer than the 5000"),
        "{said}"
    );
    let said = run(&format!("{prune} self:300 --calib-tokens 5000"));
    assert!(
        said.contains("300 tokens in all, fewer than the 5000"),
        "{said}"
    );
    let said = run(&format!("{prune} TEXT --calib-tokens 400"));
    assert!(!said.contains("in all, fewer"), "{said}");
}

#[test]
fn effects_are_told_wherever_the_profile_comes_from() {
    let workshop = Workshop::new();
    let long = workshop.write("long.txt", "It was the best of days. ".repeat(200));
    let short = workshop.write("short.txt", "It was the best of days. ".repeat(20));
    let run = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        succeeded(&workshop.flapjack(&arguments)).1
    };
    let perplexities = |said: &str| -> Vec<String> {
        let lines = said.lines().filter(|line| line.contains("  perplexity "));
        lines.map(str::to_owned).collect()
    };
    let (long, short) = (long.display(), short.display());
    let prune = "run -p x -n 1 --prune 0.2 --method flap";
    let from_text = format!("{prune} --calib {long} --calib-tokens 1024");
    let said = run(&from_text);
    let first = perplexities(&said);
    assert!(first.len() == 2 && first[0].contains("long.txt"), "{said}");
    let said = run(&from_text);
    assert!(said.contains("from the cache"), "{said}");
    assert_eq!(perplexities(&said), first);
    let profile = workshop.path("a.profile");
    let profile = profile.display();
    run(&format!(
        "calibrate --method flap --calib-tokens 512 -o {profile}"
    ));
    // Where there is no more of the text, or none at all, there still is the one that nothing is calibrated on.
    for rest in [
        format!("--calib {short}"),
        format!("--profile {profile} --no-profile-cache"),
    ] {
        let said = run(&format!("{prune} {rest}"));
        let told = perplexities(&said);
        assert!(
            told.len() == 1 && told[0].contains("never calibrated on"),
            "{said}"
        );
    }
    let said = run(&format!("{from_text} --no-baseline"));
    assert!(
        perplexities(&said).is_empty() && !said.contains("not measured"),
        "{said}"
    );
}

#[test]
fn a_log_filter_that_is_none_is_told() {
    let output =
        crate::common::program::flapjack_with(&["info"], &[("FLAPJACK_LOG", "flapjack=very=loud")]);
    assert!(stdout(&output).contains("processors"));
    assert!(
        stderr(&output).contains("FLAPJACK_LOG=flapjack=very=loud"),
        "{}",
        stderr(&output)
    );
}

/// A model whose weights are damaged says so, and what it wrote before stands on a line of its own.
#[test]
fn output_that_is_not_a_number_is_an_error() {
    let workshop = Workshop::new();
    let path = workshop.path("damaged.gguf");
    let file = GgufFile::open(&workshop.model).unwrap();
    let mut writer = flapjack::gguf::Writer::new();
    for (key, value) in file.entries() {
        writer.metadata(key, value.clone());
    }
    for tensor in file.tensors() {
        let mut bytes = file.bytes(tensor).to_vec();
        if tensor.name == "output_norm.weight" {
            bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
    }
    writer.save(&path).unwrap();
    let output = flapjack(&[
        "run",
        "--raw",
        "-p",
        "x",
        "-n",
        "4",
        "-m",
        path.to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("not a number"),
        "{}",
        stderr(&output)
    );
    assert_eq!(stdout(&output), "");
}
