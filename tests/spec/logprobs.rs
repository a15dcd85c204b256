//! How likely the model holds tokens: of answers and of prompts, alone and among others.

use std::collections::BTreeMap;

use flapjack::engine::Engine;
use flapjack::generate::{
    Finish, Generated, Generation, Request, RequestId, SamplerConfig, Sequence, TokenLogprob,
};
use flapjack::kernels::Phase;
use flapjack::model::CacheType;

use crate::common::Random;
use crate::common::engine::Workshop;
use crate::common::synthetic::logits_in_pieces;

fn generate(engine: &Engine, request: &Request) -> Generated {
    let mut sequence: Sequence = engine.sequence();
    let (model, runtime) = (engine.model(), engine.runtime());
    let tokenizer = engine.tokenizer().unwrap();
    let mut generation =
        Generation::new(model, runtime, tokenizer, &mut sequence, request).unwrap();
    (&mut generation).for_each(|piece| drop(piece.unwrap()));
    generation.generated().unwrap().clone()
}

/// By definition.
fn logprob(logits: &[f32], token: u32) -> f64 {
    let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    f64::from(logits[token as usize]) - sum.ln()
}

fn assert_logprob(found: &TokenLogprob, logits: &[f32], token: u32, top: usize) {
    assert_eq!(found.token, token);
    let near = |found: f32, token| (f64::from(found) - logprob(logits, token)).abs() < 1e-4;
    assert!(near(found.logprob, token), "{found:?}");
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let tops: Vec<u32> = found.top.iter().map(|(token, _)| *token).collect();
    assert_eq!(tops, order[..top]);
    assert!(found.top.iter().all(|(token, found)| near(*found, *token)));
}

fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    Random::new(seed).tokens(tokens, 256)
}

#[test]
fn logprobs_are_those_of_the_model_whatever_is_done_to_sample() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let request = Request {
        prompt: prompt(1, 70),
        max_tokens: 10,
        sampler: SamplerConfig {
            repetition_penalty: 1.5,
            logit_bias: vec![(7, f32::NEG_INFINITY)],
            temperature: 2.0,
            top_k: 3,
            ..SamplerConfig::default()
        },
        ignore_end: true,
        logprobs: Some(3),
        prompt_logprobs: Some(2),
        ..Request::default()
    };
    let generated = generate(&engine, &request);
    assert_eq!(generated.tokens.len(), 10);
    assert_eq!(generated.logprobs.len(), 10);
    assert_eq!(generated.prompt_logprobs.len(), 69);
    assert_eq!(generated.end_logprob, None);

    let text = [&request.prompt[..], &generated.tokens].concat();
    let pieces: Vec<_> = std::iter::once((70, Phase::Prefill))
        .chain((0..10).map(|_| (1, Phase::Decode)))
        .collect();
    let logits = logits_in_pieces(engine.model(), engine.runtime(), &text, &pieces);
    let rows: Vec<&[f32]> = logits
        .chunks_exact(engine.model().config.vocabulary)
        .collect();
    for (i, found) in generated.prompt_logprobs.iter().enumerate() {
        assert_logprob(found, rows[i], text[i + 1], 2);
    }
    for (i, found) in generated.logprobs.iter().enumerate() {
        assert_logprob(found, rows[69 + i], text[70 + i], 3);
    }

    // Nothing is told that was not asked for, and nothing else changes.
    let silent = Request {
        logprobs: None,
        prompt_logprobs: None,
        ..request.clone()
    };
    let without = generate(&engine, &silent);
    assert_eq!(without.tokens, generated.tokens);
    assert!(without.logprobs.is_empty() && without.prompt_logprobs.is_empty());
    let bare = Request {
        logprobs: Some(0),
        ..silent
    };
    let bare = generate(&engine, &bare);
    let both = bare.logprobs.iter().zip(&generated.logprobs);
    both.for_each(|(a, b)| {
        assert_eq!((a.token, a.logprob, a.top.len()), (b.token, b.logprob, 0));
    });
}

#[test]
fn among_others_they_are_what_they_are_alone_and_come_as_the_answer_does() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let common = prompt(2, 64);
    let requests: Vec<Request> = (0..5)
        .map(|i| Request {
            // The same beginning, of which the others may share what is computed.
            prompt: [&common[..], &prompt(10 + i, 5 + 7 * i as usize)].concat(),
            // As measuring programs ask: one token or none, and the prompt's own logarithms.
            max_tokens: [6, 0, 1, 4, 3][i as usize],
            sampler: SamplerConfig::greedy(),
            ignore_end: true,
            logprobs: (i != 3).then_some(2),
            prompt_logprobs: (i != 0).then_some(1),
            ..Request::default()
        })
        .collect();
    let mut scheduler = engine.scheduler(CacheType::F16, None).unwrap();
    let ids: Vec<RequestId> = requests
        .iter()
        .map(|request| {
            scheduler
                .add(engine.loaded().unwrap(), request.clone(), 200)
                .unwrap()
        })
        .collect();
    /// Tokens, and how likely they and those of the prompt are.
    type Told = (Vec<u32>, Vec<TokenLogprob>, Vec<TokenLogprob>);
    let mut told: BTreeMap<RequestId, Told> = BTreeMap::new();
    let mut ended = BTreeMap::new();
    while !scheduler.is_empty() {
        for update in scheduler.step(engine.loaded().unwrap()).unwrap() {
            let told = told.entry(update.id).or_default();
            told.0.extend(update.token);
            told.1.extend(update.logprob);
            told.2.extend(update.prompt_logprobs);
            if let Some(end) = update.ended {
                ended.insert(update.id, end.unwrap());
            }
        }
    }
    for (id, request) in ids.iter().zip(&requests) {
        let alone = generate(&engine, request);
        let among = &ended[id];
        assert_eq!(among.tokens, alone.tokens);
        assert_eq!(among.tokens.len(), request.max_tokens);
        assert_eq!(among.finish, Finish::Length);
        assert_eq!(among.logprobs, alone.logprobs);
        assert_eq!(among.prompt_logprobs, alone.prompt_logprobs);
        let (tokens, logprobs, prompt_logprobs) = &told[id];
        assert_eq!(tokens, &alone.tokens);
        assert_eq!(logprobs, &alone.logprobs);
        assert_eq!(prompt_logprobs, &alone.prompt_logprobs);
        let asked = request
            .prompt_logprobs
            .map_or(0, |_| request.prompt.len() - 1);
        assert_eq!(prompt_logprobs.len(), asked);
        let asked = request.logprobs.map_or(0, |_| request.max_tokens);
        assert_eq!(logprobs.len(), asked);
    }
}

#[test]
fn the_token_that_ends_a_text_is_told_beside_it() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let eos = engine.tokenizer().unwrap().eos().expect("there is one");
    let request = Request {
        prompt: prompt(3, 9),
        sampler: SamplerConfig {
            logit_bias: vec![(eos, 1000.0)],
            ..SamplerConfig::greedy()
        },
        logprobs: Some(1),
        ..Request::default()
    };
    let generated = generate(&engine, &request);
    assert_eq!(generated.finish, Finish::EndOfText);
    assert!(generated.tokens.is_empty() && generated.logprobs.is_empty());
    let end = generated.end_logprob.expect("it was asked for");
    assert_eq!(end.token, eos);
    assert!(end.logprob < -0.01, "not by the bias: {end:?}");
}
