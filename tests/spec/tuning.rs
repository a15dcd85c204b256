//! How this machine likes weights to be read is measured, and is a matter of speed alone.

use std::fs;
use std::path::Path;

use flapjack::engine::{Engine, OpenOptions, SyntheticType, TINY, Tune, write_synthetic};
use flapjack::eval::{fastest_reading, reading_type};
use flapjack::kernels::{Kernels, Reading};
use flapjack::model::{Model, Shape};
use flapjack::quant::BlockType;
use serde_json::Value;

use crate::common::synthetic::runtime;

const SMALL: Shape = Shape {
    name: "small",
    layers: 2,
    embedding_length: 256,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    channels: 512,
    vocabulary: 300,
    tied: true,
    context_length: 64,
};

#[test]
fn one_of_the_ways_is_found_for_the_type_of_most_bytes() {
    let runtime = runtime(2);
    for block_type in [BlockType::Q4_0, BlockType::Q8_0] {
        let mut model = Model::synthetic(SMALL, block_type, &runtime).unwrap();
        assert_eq!(reading_type(&model, 1), None, "nothing is packed yet");
        model.pack(&runtime);
        if !runtime.kernels.prefers_packed() {
            continue;
        }
        assert_eq!(reading_type(&model, 1), Some(block_type));
        let found = fastest_reading(&model, &runtime, 1).expect("a way");
        assert!((1..=6).contains(&found.streams));
        assert_eq!(
            fastest_reading(&model, &runtime, 1 << 30),
            None,
            "so few bytes lie in caches"
        );
    }
}

/// Opens a model with this folder as its cache; how its weights are read.
fn reads(model: &Path, cache: &Path, tune: Tune) -> Reading {
    let options = OpenOptions {
        cache: Some(cache.to_owned()),
        tune,
        threads: Some(2),
        ..OpenOptions::default()
    };
    let engine = Engine::open(model, options).unwrap();
    engine.runtime().kernels.reads()
}

#[test]
fn a_small_model_is_read_as_usual_and_nothing_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (model, cache) = (folder.path().join("tiny.gguf"), folder.path().join("cache"));
    write_synthetic(&model, TINY, SyntheticType::Q4_0).unwrap();
    assert_eq!(reads(&model, &cache, Tune::Auto), Reading::usual());
    assert!(!cache.join("reading.json").exists());
}

#[test]
fn what_was_found_is_kept_and_used_the_next_time() {
    if !Kernels::get().unwrap().prefers_packed() {
        println!("skipped: plain C reads weights as they lie");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, cache) = (
        folder.path().join("model.gguf"),
        folder.path().join("cache"),
    );
    let shape = Shape {
        layers: 6,
        embedding_length: 1024,
        heads: 16,
        channels: 4096,
        ..SMALL
    };
    write_synthetic(&model, shape, SyntheticType::Q4_0).unwrap();
    assert_eq!(reads(&model, &cache, Tune::Never), Reading::usual());
    let kept = cache.join("reading.json");
    assert!(!kept.exists(), "nothing was measured");
    for start in 1..=3 {
        reads(&model, &cache, Tune::Auto);
        let text = fs::read_to_string(&kept).unwrap();
        assert!(
            text.contains("Q4_0") && text.contains(&format!("\"tried\": {start}")),
            "{text}"
        );
    }
    let mut forged: Value = serde_json::from_str(&fs::read_to_string(&kept).unwrap()).unwrap();
    let readings = forged["readings"].as_object_mut().unwrap();
    assert_eq!(readings.len(), 1, "of one type and one number of threads");
    for way in readings.values_mut() {
        (way["streams"], way["agreed"]) = (5.into(), 3.into());
    }
    fs::write(&kept, forged.to_string()).unwrap();
    assert_eq!(reads(&model, &cache, Tune::Auto).streams, 5, "{forged}");
    assert_eq!(reads(&model, &cache, Tune::Never), Reading::usual());
}
