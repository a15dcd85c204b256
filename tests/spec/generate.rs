//! Sampling, stop conditions and single answers.

use crate::common::Random;
use crate::common::synthetic::runtime;
use flapjack::generate::{
    Finish, GenerateError, Generated, Generation, Request, Sampler, SamplerConfig, Sequence,
    StopStrings,
};
use flapjack::gguf::GgufFile;
use flapjack::model::{KvCache, Model};
use flapjack::tokenize::Tokenizer;

// ---- the sampler chain ----

/// Everything off but the temperature.
fn plain() -> SamplerConfig {
    SamplerConfig::plain(1)
}

/// How often each token is drawn in many tries.
fn shares(config: SamplerConfig, logits: &[f32], history: &[u32]) -> Vec<f64> {
    const TRIES: usize = 20_000;
    let mut sampler = Sampler::new(config);
    let mut counts = vec![0usize; logits.len()];
    for _ in 0..TRIES {
        let token = sampler.sample(logits, history).expect("a token");
        counts[token as usize] += 1;
    }
    counts.iter().map(|c| *c as f64 / TRIES as f64).collect()
}

fn assert_close(shares: &[f64], expected: &[f64]) {
    for (s, e) in shares.iter().zip(expected) {
        assert!((s - e).abs() < 0.015, "{shares:?} for {expected:?}");
    }
}

/// Logits of 1/2, 1/4, 1/8, 1/8.
fn halves() -> Vec<f32> {
    [0.5f32, 0.25, 0.125, 0.125]
        .iter()
        .map(|p| p.ln() + 3.0)
        .collect()
}

#[test]
fn without_filters_tokens_come_with_their_probabilities() {
    assert_close(&shares(plain(), &halves(), &[]), &[0.5, 0.25, 0.125, 0.125]);
}

#[test]
fn temperature_sharpens_and_flattens() {
    let config = SamplerConfig {
        temperature: 0.5,
        ..plain()
    };
    let total = 0.25 + 0.0625 + 2.0 * 0.015625;
    assert_close(
        &shares(config, &halves(), &[]),
        &[
            0.25 / total,
            0.0625 / total,
            0.015625 / total,
            0.015625 / total,
        ],
    );
    let config = SamplerConfig {
        temperature: 100.0,
        ..plain()
    };
    assert_close(&shares(config, &halves(), &[]), &[0.25; 4]);
}

#[test]
fn zero_temperature_takes_the_best_and_the_first_of_equals() {
    let mut sampler = Sampler::new(SamplerConfig::greedy());
    assert_eq!(sampler.sample(&[0.0, 2.0, 1.0, 2.0], &[]), Some(1));
}

#[test]
fn top_k_keeps_k_tokens() {
    let config = SamplerConfig {
        top_k: 2,
        ..plain()
    };
    assert_close(
        &shares(config, &halves(), &[]),
        &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
    );
}

#[test]
fn top_p_keeps_the_fewest_tokens_that_reach_p() {
    let config = SamplerConfig {
        top_p: 0.7,
        ..plain()
    };
    assert_close(
        &shares(config, &halves(), &[]),
        &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
    );
    let config = SamplerConfig {
        top_p: 0.0,
        ..plain()
    };
    assert_close(&shares(config, &halves(), &[]), &[1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn min_p_keeps_tokens_of_a_share_of_the_best() {
    let config = SamplerConfig {
        min_p: 0.3,
        ..plain()
    };
    assert_close(
        &shares(config, &halves(), &[]),
        &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
    );
}

#[test]
fn the_repetition_penalty_weakens_recent_tokens_only() {
    let config = SamplerConfig {
        repetition_penalty: 2.0,
        repetition_window: 2,
        temperature: 0.0,
        ..plain()
    };
    let mut sampler = Sampler::new(config);
    // 3 / 2 < 2; a negative logit is multiplied.
    assert_eq!(sampler.sample(&[3.0, 2.0, -1.0], &[0, 2]), Some(1));
    assert_eq!(sampler.sample(&[3.0, 2.0, -1.0], &[0, 2, 2]), Some(0));
    assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]), Some(1));
    // 3 / 2 > 1.4: once, however often it occurred.
    assert_eq!(sampler.sample(&[3.0, 1.4, -1.0], &[0, 0]), Some(0));
}

#[test]
fn the_same_seed_gives_the_same_choices_and_another_one_others() {
    let mut random = Random::new(3);
    let rows: Vec<Vec<f32>> = (0..50).map(|_| random.normals(100, 1.0)).collect();
    let draw = |seed| {
        let mut sampler = Sampler::new(SamplerConfig { seed, ..plain() });
        rows.iter()
            .map(|r| sampler.sample(&r.clone(), &[]).unwrap())
            .collect::<Vec<u32>>()
    };
    assert_eq!(draw(5), draw(5));
    assert_ne!(draw(5), draw(6));
}

#[test]
fn logits_that_are_not_numbers_give_no_token_and_infinities_do() {
    let mut sampler = Sampler::new(plain());
    assert_eq!(sampler.sample(&[0.0, f32::NAN], &[]), None);
    assert_eq!(sampler.sample(&[], &[]), None);
    assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0], &[]), Some(1));
    assert_eq!(sampler.sample(&[f32::INFINITY, 0.0], &[]), Some(0));
    assert!(sampler.sample(&[f32::NEG_INFINITY; 2], &[]).is_some());
}

// ---- stop strings ----

fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
    let mut filter = StopStrings::new(stops.iter().map(|s| (*s).to_owned()));
    let mut shown = String::new();
    for piece in pieces {
        let (text, stop) = filter.push(piece);
        shown += &text;
        if stop {
            return (shown, true);
        }
    }
    (shown + &filter.finish(), false)
}

#[test]
fn text_up_to_a_stop_string_is_shown_however_it_is_cut() {
    let text = "one two END three";
    for at in 0..text.len() {
        for to in at..text.len() {
            let pieces = [&text[..at], &text[at..to], &text[to..]];
            assert_eq!(
                stream(&["END"], &pieces),
                ("one two ".into(), true),
                "{pieces:?}"
            );
        }
    }
}

#[test]
fn the_beginning_of_a_stop_string_is_held_back_and_then_shown() {
    let mut filter = StopStrings::new(["stop".to_owned()]);
    assert_eq!(filter.push("do not sto"), ("do not ".into(), false));
    assert_eq!(filter.push("ry"), ("story".into(), false));
    assert_eq!(
        stream(&["stop"], &["the end: st"]),
        ("the end: st".into(), false)
    );
}

#[test]
fn the_first_of_several_stop_strings_counts_and_empty_ones_do_not() {
    assert_eq!(stream(&["b", "", "ab"], &["xxab"]), ("xx".into(), true));
    assert_eq!(stream(&[""], &["abc"]), ("abc".into(), false));
    assert_eq!(stream(&["é!"], &["caf", "é", "!"]), ("caf".into(), true));
}

// ---- sessions, with the default model ----

struct Loaded {
    model: Model,
    tokenizer: Tokenizer,
}

fn load() -> Loaded {
    let file = GgufFile::open(crate::common::default_model()).unwrap();
    Loaded {
        tokenizer: Tokenizer::from_gguf(&file).unwrap(),
        model: Model::load(file).unwrap(),
    }
}

impl Loaded {
    fn request(&self, prompt: &str, max_tokens: usize, sampler: SamplerConfig) -> Request {
        Request {
            prompt: self.tokenizer.encode_prompt(prompt).unwrap(),
            max_tokens,
            sampler,
            ..Request::default()
        }
    }

    fn generate(
        &self,
        threads: usize,
        context: usize,
        request: &Request,
    ) -> Result<(String, Generated), GenerateError> {
        let runtime = runtime(threads);
        let mut text = String::new();
        let mut sequence = Sequence::new(KvCache::new(&self.model, context));
        let (model, tokenizer) = (&self.model, &self.tokenizer);
        let mut generation = Generation::new(model, &runtime, tokenizer, &mut sequence, request)?;
        for piece in &mut generation {
            text += &piece?;
        }
        let generated = generation.generated().expect("it has ended").clone();
        Ok((text, generated))
    }
}

#[test]
fn greedy_continuations_begin_as_those_of_llama_cpp() {
    let loaded = load();
    for (prompt, expected) in [
        (
            "The capital of France is",
            " Paris.\n\nThe United States has a population of approximately 3",
        ),
        (
            "def fibonacci(n):",
            "\n    if n == 0:\n        return 1\n    return",
        ),
    ] {
        let request = loaded.request(prompt, 16, SamplerConfig::greedy());
        let (text, outcome) = loaded.generate(2, 64, &request).unwrap();
        // 4-bit weights and 8-bit activations round differently from program to program; later words may differ.
        let common = text
            .bytes()
            .zip(expected.bytes())
            .take_while(|(a, b)| a == b)
            .count();
        assert!(common >= 7, "{text:?} for {expected:?}");
        assert_eq!(outcome.tokens.len(), 16);
        assert_eq!(outcome.finish, Finish::Length);
        assert_eq!(outcome.timings.steps, 15);
    }
}

#[test]
fn the_same_seed_gives_the_same_text_whatever_the_number_of_threads() {
    let loaded = load();
    let sampler = |seed| SamplerConfig {
        seed,
        temperature: 1.0,
        ..SamplerConfig::default()
    };
    let request = loaded.request("Once upon a time", 24, sampler(7));
    let (text, _) = loaded.generate(1, 64, &request).unwrap();
    for threads in [2, 3] {
        assert_eq!(loaded.generate(threads, 64, &request).unwrap().0, text);
    }
    let other = loaded.request("Once upon a time", 24, sampler(8));
    assert_ne!(loaded.generate(2, 64, &other).unwrap().0, text);
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_shown() {
    let loaded = load();
    let mut request = loaded.request("The capital of France is", 16, SamplerConfig::greedy());
    request.stop = vec![".\n".into()];
    let (text, outcome) = loaded.generate(2, 64, &request).unwrap();
    assert_eq!(
        (text.as_str(), outcome.finish),
        (" Paris", Finish::StopString)
    );
}

#[test]
fn the_end_of_text_token_ends_the_text_unless_told_otherwise() {
    let loaded = load();
    // The control tokens around a chat turn are not parsed from text, so they are put in by number.
    let eos = loaded.tokenizer.eos().unwrap();
    let mut request = loaded.request("user\nSay yes.", 40, SamplerConfig::greedy());
    request.prompt.insert(0, loaded.tokenizer.bos().unwrap());
    request.prompt.push(eos);
    request
        .prompt
        .extend(loaded.tokenizer.encode("\n").unwrap());
    request.prompt.push(loaded.tokenizer.bos().unwrap());
    request
        .prompt
        .extend(loaded.tokenizer.encode("assistant\n").unwrap());
    let (_, outcome) = loaded.generate(2, 128, &request).unwrap();
    assert_eq!(outcome.finish, Finish::EndOfText);
    assert!(!outcome.tokens.contains(&eos));
    request.ignore_end = true;
    let (_, outcome) = loaded.generate(2, 128, &request).unwrap();
    assert_eq!((outcome.finish, outcome.tokens.len()), (Finish::Length, 40));
}

#[test]
fn a_full_context_ends_the_text_and_a_longer_prompt_is_refused() {
    let loaded = load();
    let request = loaded.request("The capital of France is", 100, SamplerConfig::greedy());
    let n = request.prompt.len();
    let (_, outcome) = loaded.generate(2, n + 3, &request).unwrap();
    // The last token needs no position of its own.
    assert_eq!(
        (outcome.finish, outcome.tokens.len()),
        (Finish::ContextFull, 4)
    );
    let error = loaded.generate(2, n - 1, &request).unwrap_err();
    assert!(
        matches!(error, GenerateError::PromptTooLong { .. }),
        "{error}"
    );
    let empty = Request {
        prompt: Vec::new(),
        ..request
    };
    assert!(matches!(
        loaded.generate(2, 8, &empty),
        Err(GenerateError::EmptyPrompt)
    ));
}

#[test]
fn no_tokens_asked_for_none_given() {
    let loaded = load();
    let request = loaded.request("Hello", 0, SamplerConfig::greedy());
    let (text, outcome) = loaded.generate(2, 8, &request).unwrap();
    assert_eq!(
        (text.as_str(), outcome.tokens.len(), outcome.finish),
        ("", 0, Finish::Length)
    );
    assert_eq!(outcome.timings.generation_speed(), None);
}
