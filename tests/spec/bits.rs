//! Smaller types: what the planner takes, what the model computes then, and what a second start finds again.

use crate::common::engine::{Workshop, by, tokens};
use crate::common::program::{stderr, stdout};
use flapjack::engine::{
    Engine, EngineError, Event, Found, HeadType, OpenOptions, OutOfReach, PruneOptions, Stage,
    SyntheticType, TINY, Target, ignore, write_synthetic,
};
use flapjack::model::{Layer, Model, Shape};
use flapjack::prune::Method;
use flapjack::prune::bits::Moves;

/// Bytes of the tiny model's weights, all of them in Q8_0, and of its head.
fn sizes(workshop: &Workshop) -> (usize, usize) {
    let model = Model::load(flapjack::gguf::GgufFile::open(&workshop.model).unwrap()).unwrap();
    (model.bytes(), model.head().bytes())
}

fn fit(bytes: usize, moves: Moves) -> PruneOptions {
    PruneOptions {
        target: Target::Bytes(bytes as u64),
        moves,
        ..by(Method::Best)
    }
}

fn decoded(model: &Model) -> Vec<Vec<f32>> {
    let layers = model.layers.iter().flat_map(Layer::linears);
    let weights = layers.map(|linear| &linear.weight);
    let all = weights.chain([&model.embedding]);
    all.map(|weight| weight.decode(&model.map)).collect()
}

#[test]
fn a_size_is_reached_by_smaller_types_with_all_heads_and_channels() {
    let workshop = Workshop::new();
    let (before, _) = sizes(&workshop);
    let bytes = before * 8 / 10;
    let mut engine = workshop.open();
    let report = engine.prune(&fit(bytes, Moves::Bits), &mut ignore).unwrap();
    assert_eq!((report.ratio, report.removed), (0.0, 0.0));
    let model = engine.model();
    assert!(model.bytes() <= bytes && model.bytes() > bytes * 95 / 100);
    let Some(Found::Bytes { after, .. }) = report.search.as_ref().map(|s| s.found) else {
        panic!("a size was looked for");
    };
    assert_eq!(after as usize, model.bytes());
    let types = report.types.expect("types have changed");
    let changed: usize = types.changes.projections.iter().map(|(.., n)| n).sum();
    assert!(changed + usize::from(types.changes.head.is_some()) > 0);
    assert!(types.predicted.unwrap() > 0.0);
}

#[test]
fn weights_in_smaller_types_are_near_what_they_were() {
    let workshop = Workshop::new();
    let (before, _) = sizes(&workshop);
    let dense = decoded(workshop.open().model());
    let mut engine = workshop.open();
    let options = fit(before * 7 / 10, Moves::Bits);
    engine.prune(&options, &mut ignore).unwrap();
    let (mut error, mut square) = (0.0, 0.0);
    for (old, new) in dense.iter().zip(decoded(engine.model())) {
        assert_eq!(old.len(), new.len());
        error += old
            .iter()
            .zip(&new)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>();
        square += old.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
    }
    // Five bits or so of a value that is drawn from a normal distribution.
    assert!(error > 0.0 && error < 0.01 * square, "{error} of {square}");
}

#[test]
fn types_and_widths_go_together_and_either_can_be_left_out() {
    let workshop = Workshop::new();
    let (before, _) = sizes(&workshop);
    // Nothing below 4.5 bits has blocks of 32, so that types alone do not come to less than 18 bytes for 34.
    let bytes = before * 45 / 100;
    let both = workshop.prune(&fit(bytes, Moves::Both));
    assert!(both.removed > 0.0 && !both.types.unwrap().changes.projections.is_empty());
    assert!(both.after.bytes <= bytes);
    let error = workshop.try_prune(&fit(bytes, Moves::Bits)).unwrap_err();
    let EngineError::OutOfReach(OutOfReach::Bytes { least, .. }) = error else {
        panic!("{error}");
    };
    assert!(
        least > bytes && least < before * 55 / 100,
        "{least} of {before}"
    );
    let widths = workshop.prune(&fit(before * 8 / 10, Moves::Widths));
    assert!(widths.removed > 0.0 && widths.types.is_none());
}

#[test]
fn a_ratio_leaves_types_alone_but_for_the_head_that_is_asked_for() {
    let workshop = Workshop::new();
    let (_, head) = sizes(&workshop);
    let ratio = |head| PruneOptions {
        target: Target::Ratio(0.3),
        head,
        ..by(Method::Flap)
    };
    assert!(workshop.prune(&ratio(HeadType::Keep)).types.is_none());
    let mut engine = workshop.open();
    let options = ratio("q4_1".parse().unwrap());
    let report = engine.prune(&options, &mut ignore).unwrap();
    assert_eq!(report.types.unwrap().changes.head, Some(("Q8_0", "Q4_1")));
    assert_eq!(engine.model().head().bytes(), head / 34 * 20);
    assert!(report.removed > 0.2);
    // A larger type than its own is none.
    let larger = workshop.prune(&ratio("q8_0".parse().unwrap()));
    assert_eq!(larger.types.unwrap().changes.head, None);
    let auto = workshop.prune(&ratio(HeadType::Auto)).types.unwrap();
    assert!(auto.predicted.unwrap() <= 0.02);
    assert!("f16".parse::<HeadType>().is_err() && "q9".parse::<HeadType>().is_err());
}

#[test]
fn a_perplexity_is_kept_to_by_types_and_widths() {
    let workshop = Workshop::new();
    let options = PruneOptions {
        target: Target::PerplexityRise(0.02),
        calibration: tokens(8192),
        ..by(Method::Best)
    };
    let mut engine = workshop.open();
    let report = engine.prune(&options, &mut ignore).unwrap();
    let Some(Found::Perplexity { rise, .. }) = report.search.map(|s| s.found) else {
        panic!("a perplexity was looked for");
    };
    assert!(rise <= 0.02);
    assert!(report.after.bytes < report.before.bytes);
    assert!(report.types.is_some());
}

#[test]
fn a_head_of_its_own_and_the_embedding_change_each_by_itself() {
    let workshop = Workshop::new();
    let untied = Shape {
        tied: false,
        ..TINY
    };
    let path = workshop.path("untied.gguf");
    write_synthetic(&path, untied, SyntheticType::Q8_0).unwrap();
    let mut engine = workshop.open_file(&path);
    let before = engine.model().bytes();
    let options = fit(before * 56 / 100, Moves::Bits);
    let changes = engine
        .prune(&options, &mut ignore)
        .unwrap()
        .types
        .unwrap()
        .changes;
    assert!(
        changes.head.is_some() && changes.embedding.is_some(),
        "{changes:?}"
    );
    let mut engine = workshop.open_file(&path);
    let head = PruneOptions {
        target: Target::Ratio(0.0),
        head: "q5_0".parse().unwrap(),
        ..by(Method::Flap)
    };
    let changes = engine
        .prune(&head, &mut ignore)
        .unwrap()
        .types
        .unwrap()
        .changes;
    assert_eq!(
        (changes.head, changes.embedding),
        (Some(("Q8_0", "Q5_0")), None)
    );
}

#[test]
fn the_second_run_does_the_same_to_the_bit_without_measuring() {
    let workshop = Workshop::new();
    let (before, _) = sizes(&workshop);
    let options = PruneOptions {
        effects: true,
        ..fit(before * 45 / 100, Moves::Both)
    };
    let (mut first, mut second) = (workshop.open(), workshop.open());
    let done = first.prune(&options, &mut ignore).unwrap();
    let mut stages = Vec::new();
    let again = second.prune(&options, &mut |event: Event| {
        stages.push(event.stage);
        std::ops::ControlFlow::Continue(())
    });
    let again = again.unwrap();
    assert!(again.repeated && !done.repeated);
    assert!(!stages.contains(&Stage::Types), "{stages:?}");
    assert!(!done.effects.is_empty());
    assert_eq!(again.effects, done.effects);
    assert_eq!(again.types.unwrap().changes, done.types.unwrap().changes);
    assert_eq!(first.model().bytes(), second.model().bytes());
    assert_eq!(decoded(first.model()), decoded(second.model()));
    // By widths alone it is another outcome.
    let widths = workshop.prune(&fit(before * 45 / 100, Moves::Widths));
    assert!(!widths.repeated && widths.types.is_none());
}

#[test]
fn a_file_with_smaller_types_is_read_back_as_it_was() {
    let workshop = Workshop::new();
    let (before, _) = sizes(&workshop);
    let mut engine = workshop.open();
    let options = fit(before * 6 / 10, Moves::Both);
    engine.prune(&options, &mut ignore).unwrap();
    let path = workshop.path("smaller.gguf");
    engine.export(&path).unwrap();
    let open = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    let read = Engine::open(&path, open).unwrap();
    assert_eq!(read.model().bytes(), engine.model().bytes());
    assert_eq!(decoded(read.model()), decoded(engine.model()));
}

#[test]
fn the_program_says_which_types_have_changed() {
    let workshop = Workshop::new();
    let (before, _) = sizes(&workshop);
    let size = format!("{}B", before * 8 / 10);
    let out = workshop.path("out.gguf");
    let arguments = [
        "prune",
        "--fit",
        &size,
        "--only",
        "bits",
        "--calib-tokens",
        "2048",
        "-o",
    ];
    let done = workshop.flapjack(&[&arguments[..], &[out.to_str().unwrap()]].concat());
    assert!(done.status.success(), "{}", stderr(&done));
    let words = stderr(&done) + &stdout(&done);
    assert!(words.contains("from Q8_0 to"), "{words}");
    for wrong in ["f16", "many"] {
        let refused = workshop.flapjack(&["run", "-p", "a", "--prune", "0.1", "--head", wrong]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(stderr(&refused).contains("q5_0"), "{}", stderr(&refused));
    }
}
