//! Stop texts in text in which they really occur: what the default model writes, where they begin and end in the middle of tokens
//! and of characters of several bytes.

use std::collections::BTreeSet;

use crate::common::program::{flapjack, succeeded};
use crate::common::synthetic::runtime;
use flapjack::generate::{
    Finish, Generated, Generation, Loaded, Request, SamplerConfig, Scheduler, Sequence,
};
use flapjack::gguf::GgufFile;
use flapjack::model::{CacheType, KvCache, KvPool, Model};
use flapjack::tokenize::Tokenizer;

const TOKENS: usize = 16;
const CONTEXT: usize = 128;

/// Prompts behind which the model writes plain words, letters with accents, characters of one token for each byte, and emoji in
/// two tokens.
const PROMPTS: [&str; 4] = [
    "The capital of France is",
    "café, thé, crème brûlée, café, thé, crème brûlée, café, thé,",
    "日本語: 東京、大阪、京都、東京、大阪、京都、東京、大阪、",
    "😀 😃 😄 😁 😀 😃 😄 😁 😀 😃 😄 😁 😀 😃",
];

struct Subject {
    model: Model,
    tokenizer: Tokenizer,
}

impl Subject {
    fn new() -> Self {
        let file = GgufFile::open(crate::common::default_model()).unwrap();
        Self {
            tokenizer: Tokenizer::from_gguf(&file).unwrap(),
            model: Model::load(file).unwrap(),
        }
    }

    fn request(&self, prompt: &str, stop: &[&str]) -> Request {
        Request {
            prompt: self.tokenizer.encode_prompt(prompt).unwrap(),
            max_tokens: TOKENS,
            sampler: SamplerConfig::greedy(),
            stop: stop.iter().map(|&text| text.to_owned()).collect(),
            ignore_end: true,
            ..Request::default()
        }
    }

    /// The pieces as they come, and what came out.
    fn alone(&self, request: &Request) -> (Vec<String>, Generated) {
        let runtime = runtime(1);
        let mut sequence = Sequence::new(KvCache::new(&self.model, CONTEXT));
        let (model, tokenizer) = (&self.model, &self.tokenizer);
        let mut generation =
            Generation::new(model, &runtime, tokenizer, &mut sequence, request).unwrap();
        let pieces = generation.by_ref().map(|piece| piece.unwrap()).collect();
        let generated = generation.generated().expect("it has ended").clone();
        (pieces, generated)
    }

    /// The same for many requests side by side.
    fn together(&self, requests: &[Request]) -> Vec<(Vec<String>, Generated)> {
        let runtime = runtime(1);
        let pool = KvPool::new(&self.model, CacheType::F16).unwrap();
        let mut scheduler = Scheduler::new(pool);
        let with = Loaded {
            model: &self.model,
            runtime: &runtime,
            tokenizer: &self.tokenizer,
        };
        let ids: Vec<_> = requests
            .iter()
            .map(|request| scheduler.add(with, request.clone(), CONTEXT).unwrap())
            .collect();
        let mut answers: Vec<_> = ids.iter().map(|_| (Vec::new(), None)).collect();
        while !scheduler.is_empty() {
            for update in scheduler.step(with).unwrap() {
                let place = ids.iter().position(|id| *id == update.id).unwrap();
                answers[place].0.push(update.text);
                if let Some(ended) = update.ended {
                    answers[place].1 = Some(ended.unwrap());
                }
            }
        }
        let ended = answers.into_iter();
        ended
            .map(|(pieces, generated)| (pieces, generated.expect("it has ended")))
            .collect()
    }

    /// How many tokens it takes until the text has the stop text in it.
    fn tokens_until(&self, tokens: &[u32], stop: &str) -> usize {
        (1..=tokens.len())
            .find(|&n| self.tokenizer.decode(&tokens[..n]).contains(stop))
            .expect("it occurs")
    }

    /// Where in the text, in bytes, tokens end.
    fn borders(&self, tokens: &[u32]) -> BTreeSet<usize> {
        let mut at = 0;
        let ends = tokens.iter().map(|token| {
            at += self.tokenizer.token_bytes(*token).len();
            at
        });
        ends.collect()
    }
}

/// Pieces of 1 to 5 characters, each where it first occurs, some of which cross the border of a token.
fn stops_in(text: &str) -> Vec<&str> {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let mut stops = Vec::new();
    for (i, &start) in starts.iter().enumerate() {
        let length = 1 + i % 5;
        let Some(&end) = starts.get(i + length) else {
            continue;
        };
        let stop = &text[start..end];
        if text.find(stop) == Some(start) {
            stops.push(stop);
        }
    }
    stops
}

fn check(
    loaded: &Subject,
    whole: &(String, Generated),
    stop: &str,
    answer: (Vec<String>, Generated),
) {
    let (text, generated) = whole;
    let (pieces, stopped) = answer;
    let expected = &text[..text.find(stop).unwrap()];
    // Nothing is ever shown that is taken back.
    let mut shown = String::new();
    for piece in &pieces {
        shown += piece;
        assert!(
            expected.starts_with(&shown),
            "{stop:?} in {text:?}: {pieces:?}"
        );
    }
    assert_eq!(shown, expected, "{stop:?} in {text:?}");
    assert_eq!(stopped.finish, Finish::StopString, "{stop:?} in {text:?}");
    let tokens = loaded.tokens_until(&generated.tokens, stop);
    assert_eq!(
        stopped.tokens,
        generated.tokens[..tokens],
        "{stop:?} in {text:?}"
    );
}

#[test]
fn text_is_cut_exactly_where_a_stop_text_begins_alone_and_side_by_side() {
    let loaded = Subject::new();
    let (mut requests, mut expected) = (Vec::new(), Vec::new());
    let (mut crossing, mut within) = (0, 0);
    for prompt in PROMPTS {
        let (pieces, generated) = loaded.alone(&loaded.request(prompt, &[]));
        let text = pieces.concat();
        let borders = loaded.borders(&generated.tokens);
        for stop in stops_in(&text) {
            let start = text.find(stop).unwrap();
            let inside = borders.range(start + 1..start + stop.len());
            match inside.count() {
                0 => within += 1,
                _ => crossing += 1,
            }
            requests.push(loaded.request(prompt, &[stop]));
            expected.push((stop.to_owned(), (text.clone(), generated.clone())));
        }
    }
    assert!(
        crossing > 20 && within > 3,
        "{crossing} cross borders, {within} do not"
    );
    for (answer, (stop, whole)) in loaded.together(&requests).into_iter().zip(&expected) {
        check(&loaded, whole, stop, answer);
    }
    // Some of them alone, which takes longer.
    for (request, (stop, whole)) in requests.iter().zip(&expected).step_by(7) {
        check(&loaded, whole, stop, loaded.alone(request));
    }
}

#[test]
fn what_looks_like_a_stop_text_and_is_none_is_shown_to_the_end() {
    let loaded = Subject::new();
    for prompt in PROMPTS {
        let (pieces, generated) = loaded.alone(&loaded.request(prompt, &[]));
        let text = pieces.concat();
        // The text's own end, and more.
        let last = text.chars().rev().take(3).collect::<Vec<_>>();
        let stop: String = last.iter().rev().chain(&['~', '~']).collect();
        for (pieces, stopped) in [
            loaded.alone(&loaded.request(prompt, &[&stop])),
            loaded
                .together(&[loaded.request(prompt, &[&stop])])
                .remove(0),
        ] {
            assert_eq!(pieces.concat(), text, "{stop:?}");
            assert_eq!(stopped.finish, Finish::Length);
            assert_eq!(stopped.tokens, generated.tokens);
        }
    }
}

#[test]
fn the_program_cuts_there_too_and_counts_the_tokens_that_were_generated() {
    let loaded = Subject::new();
    let prompt = PROMPTS[1];
    let (pieces, generated) = loaded.alone(&loaded.request(prompt, &[]));
    let text = pieces.concat();
    let stop: String = text.chars().skip(2).take(3).collect();
    let tokens = loaded.tokens_until(&generated.tokens, &stop);
    let output = flapjack(&[
        "run",
        "--raw",
        "-p",
        prompt,
        "-n",
        "16",
        "--no-pack",
        "--temp",
        "0",
        "--repeat-penalty",
        "1",
        "--ignore-eos",
        "--stop",
        &stop,
    ]);
    let (shown, report) = succeeded(&output);
    assert_eq!(shown, format!("{}\n", &text[..text.find(&stop).unwrap()]));
    assert!(
        report.contains(&format!("generate   {tokens} tokens")),
        "{report}"
    );
    assert!(report.contains("a stop text came"), "{report}");
}
