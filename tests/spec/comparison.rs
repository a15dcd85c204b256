//! What pruning gains in speed is measured in turns with the dense model.

use std::ops::ControlFlow;

use crate::common::engine::{Workshop, break_at, flap};
use flapjack::engine::{
    Engine, EngineError, Event, OpenOptions, Stage, SyntheticType, TINY, ignore,
};
use flapjack::generate::SamplerConfig;
use flapjack::model::CacheType;

const PROMPT: &[u32] = &[1, 2, 3, 4, 5];

#[test]
fn both_models_take_as_many_turns_with_the_same_prompt() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    engine.prune(&flap(), &mut ignore).unwrap();
    let bytes = engine.report().bytes;

    let mut told = Vec::new();
    let mut events = |event: Event| {
        told.push(event);
        ControlFlow::Continue(())
    };
    let sampler = SamplerConfig::greedy();
    let comparison = engine
        .compare_speeds(PROMPT, &sampler, CacheType::F16, &mut events)
        .unwrap();

    assert_eq!(comparison.prompt_tokens, PROMPT.len());
    assert_eq!(comparison.generated, 32);
    for turns in [&comparison.prompt, &comparison.generation] {
        assert!((3..=5).contains(&turns.dense.len()), "{turns:?}");
        assert_eq!(turns.dense.len(), turns.pruned.len());
        for spread in [turns.dense(), turns.pruned(), turns.ratio()] {
            assert!(0.0 < spread.least && spread.least <= spread.median);
            assert!(spread.median <= spread.most && spread.most.is_finite());
        }
    }
    assert!(told.iter().all(|event| event.stage == Stage::Comparing));
    assert_eq!(told.first().map(|event| event.done), Some(0));
    assert_eq!(
        told.last().map(|event| event.done),
        Some(comparison.prompt.dense.len() as u64)
    );
    // The model is as it was.
    assert_eq!(engine.report().bytes, bytes);
}

#[test]
fn a_long_prompt_is_cut_to_what_tells_enough() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let prompt = vec![1; 3000];
    let sampler = SamplerConfig::greedy();
    let comparison = engine
        .compare_speeds(&prompt, &sampler, CacheType::F16, &mut ignore)
        .unwrap();
    assert_eq!(comparison.prompt_tokens, 1024);
}

#[test]
fn it_can_be_called_off() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let sampler = SamplerConfig::greedy();
    for done in [0, 2] {
        let events = &mut break_at(Stage::Comparing, done);
        let error = engine.compare_speeds(PROMPT, &sampler, CacheType::F16, events);
        assert!(matches!(error, Err(EngineError::Cancelled(_))), "{error:?}");
    }
}

#[test]
fn what_has_no_file_has_nothing_to_be_compared_with() {
    let engine = Engine::synthetic(TINY, SyntheticType::Q8_0, OpenOptions::default()).unwrap();
    let sampler = SamplerConfig::greedy();
    let error = engine
        .compare_speeds(PROMPT, &sampler, CacheType::F16, &mut ignore)
        .unwrap_err();
    assert!(matches!(error, EngineError::NoFile), "{error}");

    let workshop = Workshop::new();
    let engine = workshop.open();
    std::fs::remove_file(&workshop.model).unwrap();
    let error = engine
        .compare_speeds(PROMPT, &sampler, CacheType::F16, &mut ignore)
        .unwrap_err();
    assert!(error.to_string().contains("tiny.gguf"), "{error}");
}
