//! Outcomes of pruning that are kept: the same model again, without calibrating, choosing and fitting.

use std::fs;

use crate::common::Random;
use crate::common::pruning::{assert_same, columns, outcome_key, profile_of, prune, recipe, text};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::model::Model;
use flapjack::progress::ignore;
use flapjack::prune::{
    Found, HeadUnit, Metric, Outcome, OutcomeError, OutcomeKey, PruneErrorKind, Recipe, Restore,
    Structure, Target,
};
use flapjack::quant::BlockType;

fn synthetic(block_type: BlockType, seed: u64) -> Synthetic {
    Synthetic::new(Shape {
        block_type,
        head_dim: 32,
        rope_dim: 32,
        heads: vec![6, 6],
        kv_heads: vec![3, 3],
        channels: vec![320, 256],
        biases: seed.is_multiple_of(2),
        seed,
        ..Shape::default()
    })
}

/// Prunes, and takes down what came of it.
fn outcome_of(model: &mut Model) -> Outcome {
    let tokens = Random::new(3).tokens(700, model.config.vocabulary);
    let profile = profile_of(model, text(&tokens));
    let recipe = recipe(Structure::AlAm, Restore::Lsq);
    let dense = columns(model);
    let plan = prune(model, &profile, text(&tokens), recipe, 0.35).unwrap();
    Outcome::of(
        model,
        &dense,
        plan,
        0.35,
        Some(Found::Bytes {
            before: 7,
            after: 5,
        }),
    )
}

#[test]
fn an_outcome_makes_of_a_model_what_pruning_made_of_it_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("an.outcome");
    for (block_type, seed) in [
        (BlockType::F32, 1),
        (BlockType::F16, 2),
        (BlockType::Q4_1, 3),
        (BlockType::Q8_0, 4),
    ] {
        let synthetic = synthetic(block_type, seed);
        for packed in [false, true] {
            let mut pruned = synthetic.load_packed_if(packed);
            let outcome = outcome_of(&mut pruned);
            outcome.save(&path, &outcome_key(), "a.gguf", None).unwrap();
            let again = Outcome::load(&path, &outcome_key()).unwrap();
            assert_eq!(again, outcome);
            // However the weights lay when the outcome was taken down.
            for pack_first in [packed, !packed] {
                let mut model = synthetic.load();
                if pack_first {
                    model.pack(&runtime(1));
                }
                again.apply(&mut model, &runtime(1), &mut ignore).unwrap();
                if pack_first != packed {
                    model.unpack(&runtime(1));
                    pruned.unpack(&runtime(1));
                }
                assert_same(&model, &pruned);
            }
        }
    }
}

#[test]
fn an_outcome_that_is_damaged_or_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("an.outcome");
    let outcome = outcome_of(&mut synthetic(BlockType::Q4_1, 3).load());
    outcome.save(&path, &outcome_key(), "a.gguf", None).unwrap();
    let bytes = fs::read(&path).unwrap();
    let refused = |bytes: &[u8], words: &str| {
        fs::write(&path, bytes).unwrap();
        let error = Outcome::load(&path, &outcome_key())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("an.outcome") && error.contains(words),
            "{error}"
        );
    };
    for place in (0..bytes.len()).step_by(997) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        refused(&damaged, "");
        refused(&bytes[..place], "");
    }
    let last = bytes.len() - 1;
    let mut damaged = bytes.clone();
    damaged[last] ^= 1;
    refused(&damaged, "checksum");
    let mut newer = bytes.clone();
    newer[8] = 99;
    refused(&newer, "version");

    fs::write(&path, &bytes).unwrap();
    let other = OutcomeKey {
        target: Target::Ratio(0.36),
        ..outcome_key()
    };
    assert!(matches!(
        Outcome::load(&path, &other),
        Err(OutcomeError::Unusable { problem, .. }) if problem.contains("something else")
    ));
    assert!(matches!(
        Outcome::load(&folder.path().join("none"), &outcome_key()),
        Err(OutcomeError::Io { .. })
    ));
}

#[test]
fn what_a_ratio_was_found_by_is_kept_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("an.outcome");
    let mut outcome = outcome_of(&mut synthetic(BlockType::Q8_0, 4).load());
    let perplexity = |beyond| Found::Perplexity {
        tokens: 2048,
        dense: 21.0 / 7.1,
        rise: 0.1 + 0.2,
        beyond,
    };
    for found in [
        None,
        Some(Found::Bytes {
            before: 1 << 60,
            after: 3,
        }),
        Some(Found::Speed {
            bytes_before: 100,
            bytes_after: 50,
            before: 1.0 / 3.0,
            predicted: 2.0 / 3.0,
        }),
        Some(perplexity(None)),
        Some(perplexity(Some((0.3, f64::INFINITY)))),
    ] {
        outcome.found = found;
        outcome.save(&path, &outcome_key(), "a.gguf", None).unwrap();
        let again = Outcome::load(&path, &outcome_key()).unwrap();
        assert_eq!(again, outcome);
    }
}

#[test]
fn a_key_comes_back_from_its_text_and_differs_where_any_field_does() {
    let key = outcome_key();
    let recipe = key.recipe;
    let with_recipe = |recipe| OutcomeKey {
        recipe,
        ..key.clone()
    };
    let with_target = |target| OutcomeKey {
        target,
        ..key.clone()
    };
    let keys = [
        key.clone(),
        OutcomeKey {
            model: "another".into(),
            ..key.clone()
        },
        OutcomeKey {
            profile: "another".into(),
            ..key.clone()
        },
        OutcomeKey {
            flapjack: "1".into(),
            ..key.clone()
        },
        with_recipe(Recipe {
            metric: Metric::Ifv,
            ..recipe
        }),
        with_recipe(Recipe {
            structure: Structure::AlMm,
            ..recipe
        }),
        with_recipe(Recipe {
            heads: HeadUnit::Group,
            ..recipe
        }),
        with_recipe(Recipe {
            restore: Restore::Auto,
            ..recipe
        }),
        // The next number, and the same in other units.
        with_target(Target::Ratio(f64::from_bits(0.35f64.to_bits() + 1))),
        with_target(Target::Bytes(1)),
        with_target(Target::Bytes(2)),
        with_target(Target::Speedup(0.35)),
        with_target(Target::PerplexityRise(0.35)),
    ];
    for (i, key) in keys.iter().enumerate() {
        let text = serde_json::to_string(key).unwrap();
        assert_eq!(serde_json::from_str::<OutcomeKey>(&text).unwrap(), *key);
        for other in &keys[i + 1..] {
            assert_ne!(key, other);
            assert_ne!(key.hash(), other.hash(), "{key:?} and {other:?}");
        }
    }
    let text = serde_json::to_string(&key).unwrap();
    assert!(text.contains("\"al-am\""), "{text}");
    let unknown = text.replace("al-am", "al-an");
    assert!(serde_json::from_str::<OutcomeKey>(&unknown).is_err());
}

#[test]
fn an_outcome_of_a_model_of_another_shape_leaves_the_model_alone() {
    let outcome = outcome_of(&mut synthetic(BlockType::Q4_1, 3).load());
    for other in [
        Shape {
            channels: vec![256, 256],
            ..synthetic(BlockType::Q4_1, 3).shape
        },
        Shape {
            block_type: BlockType::Q8_0,
            ..synthetic(BlockType::Q4_1, 3).shape
        },
        Shape::default(),
    ] {
        let other = Synthetic::new(other);
        let mut model = other.load();
        let error = outcome
            .apply(&mut model, &runtime(1), &mut ignore)
            .unwrap_err();
        assert!(
            matches!(error.kind, PruneErrorKind::OtherShape(_)),
            "{error}"
        );
        assert!(error.is_untouched());
        assert_same(&model, &other.load());
    }
}
