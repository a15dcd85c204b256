//! A folder that Python's own packages write of a real model's weights is that model: it runs, is pruned and converted as the GGUF file in
//! half precision.

use std::path::Path;

use flapjack::convert::{FileType, Mixture, Types};
use flapjack::engine::{
    ConvertOptions, Engine, GenerateOptions, OpenOptions, PruneOptions, Target, convert, ignore,
};
use flapjack::generate::SamplerConfig;
use flapjack::prune::Method;

use crate::common::default_model;
use crate::common::engine::{Workshop, by, tokens};
use crate::common::python::run;
use crate::families::{QWEN, real};

const PROMPT: &str = "The capital of France is";

fn go_on(engine: &Engine) -> String {
    let options = GenerateOptions {
        max_tokens: 16,
        ignore_end: true,
        sampler: SamplerConfig::greedy(),
        ..GenerateOptions::default()
    };
    let mut sequence = engine.sequence();
    let pieces = engine.generate(&mut sequence, PROMPT, &options).unwrap();
    pieces.collect::<Result<_, _>>().unwrap()
}

fn convert_to(source: &Path, target: &Path, types: Types) {
    let options = ConvertOptions {
        types,
        importance: None,
        open: OpenOptions::default(),
    };
    convert(source, &options, Some(target), &mut ignore).unwrap();
}

fn assert_python_writes_the_same(model: &Path) {
    let workshop = Workshop::new();
    let folder = workshop.path("folder");
    let paths = [model, &folder].map(|path| path.to_str().unwrap());
    if run("checkpoint.py", &paths).is_none() {
        return;
    }
    let half = workshop.path("half.gguf");
    let types = Mixture {
        requantize: true,
        ..Mixture::from(FileType::F16)
    };
    convert_to(model, &half, Types::Mixture(types));
    let text = go_on(&workshop.open_file(&half));
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(go_on(&workshop.open_file(&folder)), text);

    let converted = workshop.path("converted.gguf");
    convert_to(&folder, &converted, Types::Keep);
    assert_eq!(go_on(&workshop.open_file(&converted)), text);

    let options = PruneOptions {
        target: Target::Ratio(0.1),
        calibration: tokens(1024),
        ..by(Method::Flap)
    };
    let [ours, theirs] = [&half, &folder].map(|path| {
        let mut engine = workshop.open_file(path);
        engine.prune(&options, &mut ignore).unwrap();
        let layers = engine.model().layers.iter();
        layers
            .map(|l| (l.heads(), l.channels()))
            .collect::<Vec<_>>()
    });
    // Where heads are stored in another order, sums are rounded otherwise, and a channel or two at the threshold change places.
    for (l, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        let alike = ours.0 == theirs.0 && ours.1.abs_diff(theirs.1) <= 15;
        assert!(alike, "layer {l}: {ours:?}, {theirs:?}");
    }
}

#[test]
fn llama_with_heads_turned_in_pairs() {
    assert_python_writes_the_same(&default_model());
}

#[test]
fn qwen2_with_biases() {
    if let Some(model) = real(QWEN) {
        assert_python_writes_the_same(&model);
    }
}
