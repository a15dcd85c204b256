//! Healing through the engine and the program: what comes of it, what is kept, what is refused.

use std::ops::ControlFlow;

use flapjack::engine::{
    Budget, CalibrationOptions, EffectText, Engine, EngineError, HealEnd, HealOptions,
    MethodOptions, Notice, PruneOptions, SparseOptions, Stage, Target, TextSource, Unsuited, What,
    ignore,
};
use flapjack::gguf::GgufFile;
use flapjack::prune::sparse::Sparsity;
use flapjack::prune::{Effort, Method, Record};

use crate::common::engine::{Workshop, break_at, by, flap, tokens};
use crate::common::program::{stderr, succeeded};
use crate::mixture;

/// Few tokens at a high rate, which is enough for a tiny model.
fn heal(tokens: usize) -> HealOptions {
    HealOptions {
        rate: Some(3e-3),
        ..Budget::Tokens(tokens).into()
    }
}

fn healing(tokens: usize) -> PruneOptions {
    PruneOptions {
        heal: Some(heal(tokens)),
        calibration: self::tokens(3000),
        ..flap()
    }
}

fn unhealed() -> PruneOptions {
    PruneOptions {
        heal: None,
        ..healing(0)
    }
}

/// All that training can change.
fn weights(engine: &Engine) -> Vec<f32> {
    let model = engine.model();
    let layers = model.layers.iter().flat_map(|layer| {
        let linears = layer.linears().into_iter().flat_map(|linear| {
            let bias = linear.bias.clone().unwrap_or_default();
            [linear.weight.decode(&model.map), bias].concat()
        });
        let norms = [&layer.attention_norm[..], &layer.mlp_norm].concat();
        linears.chain(norms).collect::<Vec<f32>>()
    });
    layers.chain(model.output_norm.iter().copied()).collect()
}

#[test]
fn a_healed_model_is_nearer_to_the_dense_one_and_its_file_is_an_ordinary_one() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let mut healed_tokens = Vec::new();
    let options = healing(20_000);
    let prepared = engine.prepare(&options).unwrap();
    let told = prepared
        .notices()
        .iter()
        .any(|n| matches!(n, Notice::HealMemory { bytes } if *bytes > 1 << 20));
    assert!(
        told,
        "what it takes is told before: {:?}",
        prepared.notices()
    );
    let report = engine.prune_prepared(prepared, &mut |event| {
        if event.stage == Stage::Healing {
            healed_tokens.push((event.done, event.total));
        }
        ControlFlow::Continue(())
    });
    let heal = report.unwrap().heal.expect("it was healed");
    assert_eq!(heal.end, HealEnd::Healed);
    assert!(
        heal.after < 0.9 * heal.before,
        "{} to {}",
        heal.before,
        heal.after
    );
    assert_eq!((heal.tokens, heal.steps, heal.held_back), (20_480, 20, 256));
    assert_eq!(healed_tokens.first(), Some(&(0, 20_480)));
    assert_eq!(healed_tokens.last(), Some(&(20_480, 20_480)));
    let path = workshop.path("healed.gguf");
    engine.export(&path).unwrap();
    let exported = workshop.open_file(&path);
    let mut options = unhealed();
    options.cache = flapjack::engine::Cache::Nothing;
    let mut pruned = workshop.open();
    pruned.prune(&options, &mut ignore).unwrap();
    let (healed, pruned) = (weights(&engine), weights(&pruned));
    assert_eq!(healed.len(), pruned.len(), "the same widths");
    assert_ne!(healed, pruned);
    // In a file heads may be added; the norms are there as they are.
    let norms = |engine: &Engine| engine.model().layers[0].mlp_norm.clone();
    assert_eq!(norms(&exported), norms(&engine));
    assert_eq!(exported.model().output_norm, engine.model().output_norm);
    let dense = workshop.open();
    assert_ne!(dense.model().output_norm, engine.model().output_norm);
    let record = Record::from_gguf(&GgufFile::open(&path).unwrap())
        .unwrap()
        .unwrap();
    assert!(
        record.method.contains("healed (all by 20480 tokens"),
        "{}",
        record.method
    );
}

#[test]
fn of_the_mixture_more_is_written_where_training_would_see_it_too_often() {
    let workshop = Workshop::new();
    let healed = |workshop: &Workshop, budget: Budget| {
        let mut options = by(MethodOptions {
            effort: Effort::Fast,
            ..Method::Best.into()
        });
        options.calibration = CalibrationOptions::default();
        options.heal = Some(HealOptions {
            what: What::LowRank,
            ..budget.into()
        });
        let report = workshop.prune(&options);
        assert_eq!(report.calibration.all_tokens, 4096);
        report.heal.unwrap()
    };
    let few = healed(&workshop, Budget::Tokens(6000));
    assert_eq!((few.held_back, workshop.cached("text").len()), (2 * 256, 1));
    let more = healed(&workshop, Budget::Tokens(24_000));
    let texts = mixture::texts(&workshop);
    assert_eq!(texts.len(), 2);
    let further = texts.iter().find(|[text, _]| text.is_empty());
    let [_, further] = further.expect("what is written beyond the mixture");
    // Half of 24,000 tokens, in whole texts.
    let missing = 12_000 - 4096;
    assert!(
        (missing - 256..=missing).contains(&further.len()),
        "{}",
        further.len()
    );
    assert_eq!(more.held_back, (further.len() + 4096) / 256 / 8 * 256);
    // It is the same wherever it is written.
    let elsewhere = Workshop::new();
    let again = healed(&elsewhere, Budget::Tokens(24_000));
    assert_eq!(mixture::texts(&elsewhere), texts);
    assert_eq!(again.after.to_bits(), more.after.to_bits());
    let as_many = healed(&workshop, Budget::Tokens(24_001));
    assert_eq!(
        (as_many.steps, workshop.cached("text").len()),
        (more.steps, 2)
    );
}

#[test]
fn what_was_healed_is_kept_beside_what_was_only_pruned() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let report = engine.prune(&healing(9000), &mut ignore).unwrap();
    assert!(!report.repeated);
    assert_eq!(workshop.cached("outcome").len(), 2);
    let no_training = &mut break_at(Stage::Healing, 0);
    let mut again = workshop.open();
    let repeated = again.prune(&healing(9000), no_training).unwrap();
    assert!(repeated.repeated);
    assert!(weights(&again) == weights(&engine));
    let (first, second) = (report.heal.unwrap(), repeated.heal.unwrap());
    assert!(second.repeated && second.end == HealEnd::Healed);
    assert_eq!(
        (first.before, first.after, first.tokens),
        (second.before, second.after, second.tokens)
    );
    // Pruning alone is found, too, and is another model.
    let mut alone = workshop.open();
    assert!(alone.prune(&unhealed(), no_training).unwrap().repeated);
    assert!(weights(&alone) != weights(&engine));
    for other in [
        heal(9000 + 1024),
        HealOptions {
            seed: 1,
            ..heal(9000)
        },
        HealOptions {
            rate: None,
            ..heal(9000)
        },
        HealOptions {
            what: What::LowRank,
            ..heal(9000)
        },
        HealOptions {
            what: What::Norms,
            ..heal(9000)
        },
    ] {
        let options = PruneOptions {
            heal: Some(other),
            ..healing(0)
        };
        let report = workshop.prune(&options);
        assert!(
            !report.repeated && !report.heal.unwrap().repeated,
            "{other:?}"
        );
        let again = workshop.prune(&options);
        assert!(again.repeated, "{other:?}");
    }
}

#[test]
fn a_healing_that_is_broken_off_leaves_the_pruned_model_and_goes_on_the_next_time() {
    let workshop = Workshop::new();
    let mut whole = workshop.open();
    whole.prune(&healing(12_000), &mut ignore).unwrap();
    let mut alone = workshop.open();
    alone.prune(&unhealed(), &mut ignore).unwrap();

    let other = Workshop::new();
    let mut broken = other.open();
    let report = broken
        .prune(&healing(12_000), &mut break_at(Stage::Healing, 5000))
        .unwrap();
    assert_eq!(report.heal.unwrap().end, HealEnd::Cancelled);
    assert!(weights(&broken) == weights(&alone), "as pruning left it");
    assert_eq!(other.cached("training").len(), 1);
    let mut resumed = other.open();
    let report = resumed.prune(&healing(12_000), &mut ignore).unwrap();
    let heal = report.heal.unwrap();
    assert!(heal.resumed == 5 && heal.steps == 12, "{heal:?}");
    assert!(weights(&resumed) == weights(&whole), "to the bit");
    assert_eq!(
        other.cached("training").len(),
        0,
        "it is not needed any more"
    );
}

#[test]
fn weights_that_are_no_better_are_not_kept() {
    let workshop = Workshop::new();
    let mut alone = workshop.open();
    alone.prune(&unhealed(), &mut ignore).unwrap();
    let options = PruneOptions {
        heal: Some(HealOptions {
            rate: Some(3.0),
            ..heal(12_000)
        }),
        ..healing(0)
    };
    for repeated in [false, true] {
        let mut engine = workshop.open();
        let report = engine.prune(&options, &mut ignore).unwrap();
        let heal = report.heal.unwrap();
        assert_eq!(heal.end, HealEnd::NotBetter);
        assert!(heal.after.is_nan() || heal.after >= heal.before);
        assert_eq!(heal.repeated, repeated);
        assert!(weights(&engine) == weights(&alone));
    }
}

#[test]
fn more_of_a_file_is_read_than_calibration_takes_but_not_what_effects_are_measured_on() {
    let workshop = Workshop::new();
    let line = "One line of many, with a number that differs: ";
    let text: String = (0..3000)
        .map(|i| format!("{line}{}\n", i * 7919 % 10_007))
        .collect();
    let path = workshop.write("text.txt", text);
    let options = PruneOptions {
        calibration: CalibrationOptions {
            source: TextSource::Path(path),
            ..CalibrationOptions::default()
        },
        method: flapjack::engine::MethodOptions {
            effort: flapjack::prune::Effort::Fast,
            ..flapjack::prune::Method::Flap.into()
        },
        ..healing(9000)
    };
    // Calibration takes 4096 tokens, 16 sequences; with what is read beside that there are 35, of which an eighth is held back.
    let report = workshop.prune(&options);
    let heal = report.heal.unwrap();
    assert_eq!(report.calibration.all_tokens, 4096);
    assert_eq!(heal.held_back, 4 * 256, "{heal:?}");
    let few = PruneOptions {
        heal: Some(self::heal(1000)),
        ..options
    };
    assert_eq!(workshop.prune(&few).heal.unwrap().held_back, 2 * 256);
}

#[test]
fn the_text_of_the_mixture_is_trained_on_and_nothing_of_what_is_held_back() {
    let of = |source| {
        let options = healing(9000);
        PruneOptions {
            calibration: CalibrationOptions {
                source,
                ..options.calibration
            },
            effects: true,
            ..options
        }
    };
    let workshop = Workshop::new();
    let mut mixed = workshop.open();
    let report = mixed.prune(&of(TextSource::Mixture), &mut ignore).unwrap();
    let trained = report.heal.unwrap();
    assert_eq!(report.effects[0].text, EffectText::Mixture);
    let texts = crate::mixture::texts(&workshop);
    let [[text, held_back]] = &texts[..] else {
        panic!("one text is kept, not {}", texts.len());
    };
    assert_eq!((text.len(), held_back.len()), (3000, 1024));
    // The same tokens, given by themselves, come to the same.
    let other = Workshop::new();
    let mut given = other.open();
    let same = of(TextSource::Tokens(text.clone().into()));
    let heal = given.prune(&same, &mut ignore).unwrap().heal.unwrap();
    // Measured with what was trained, be it kept or not.
    assert_eq!((heal.before, heal.after), (trained.before, trained.after));
    assert_ne!(heal.before, heal.after);
    assert!(weights(&given) == weights(&mixed));
}

#[test]
fn effects_are_those_of_the_healed_model_and_kept_with_it() {
    let workshop = Workshop::new();
    let measured = |options| PruneOptions {
        effects: true,
        ..options
    };
    let healed = workshop.prune(&measured(healing(20_000)));
    let again = workshop.prune(&measured(healing(20_000)));
    assert!(!healed.repeated && again.repeated);
    assert!(!healed.effects.is_empty());
    assert_eq!(healed.effects, again.effects);
    // What was kept before healing has effects of its own, as pruning anew has.
    let alone = workshop.prune(&measured(unhealed()));
    assert!(alone.repeated);
    assert_eq!(
        alone.effects,
        Workshop::new().prune(&measured(unhealed())).effects
    );
    assert_ne!(alone.effects, healed.effects);
    // Healing what was kept measures, too.
    let other = workshop.prune(&measured(healing(9000)));
    assert_eq!(other.effects.len(), healed.effects.len());
    assert_ne!(other.effects, alone.effects);
}

#[test]
fn what_cannot_be_healed_is_refused_before_anything_is_done() {
    let workshop = Workshop::new();
    let refused = |options: PruneOptions| {
        workshop
            .open()
            .prepare(&options)
            .expect_err("it is refused")
    };
    let sparse = SparseOptions::from("magnitude:0.5".parse::<Sparsity>().unwrap());
    let error = refused(PruneOptions {
        sparse: Some(sparse),
        ..healing(1000)
    });
    assert!(matches!(error, EngineError::HealSparse), "{error}");
    let profile = Some(workshop.path("any.profile"));
    let error = refused(PruneOptions {
        profile,
        ..healing(1000)
    });
    assert!(
        matches!(error, EngineError::Unsuited(Unsuited::Healing)),
        "{error}"
    );
    let mut little = healing(1000);
    little.calibration.memory = Some(1 << 20);
    let error = refused(little);
    let EngineError::HealMemory { shortage } = &error else {
        panic!("{error}");
    };
    assert!(shortage.set && shortage.allowed == 1 << 20 && shortage.needed > 1 << 20);
    for rate in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = refused(PruneOptions {
            heal: Some(HealOptions {
                rate: Some(rate),
                ..heal(1000)
            }),
            ..healing(0)
        });
        assert!(matches!(error, EngineError::HealRate { .. }), "{error}");
    }
    let nothing = PruneOptions {
        target: Target::Ratio(0.0),
        ..healing(1000)
    };
    assert!(
        workshop.prune(&nothing).heal.is_none(),
        "there is nothing to make up for"
    );
    let mut short = healing(1000);
    short.calibration = tokens(400);
    let error = workshop
        .try_prune(&short)
        .expect_err("two sequences are needed");
    assert!(error.to_string().contains("400 tokens"), "{error}");
}

#[test]
fn the_program_heals_and_says_so() {
    let workshop = Workshop::new();
    let file = workshop.path("healed.gguf");
    let file = file.to_str().unwrap();
    let arguments = [
        "prune",
        "--prune",
        "0.3",
        "--method",
        "flap",
        "--calib-tokens",
        "3000",
        "--heal",
        "9k",
        "--heal-rate",
        "3e-3",
        "-o",
        file,
    ];
    let output = workshop.flapjack(&arguments);
    succeeded(&output);
    let told = stderr(&output);
    assert!(
        told.contains("heal       ") && told.contains("9216 tokens in 9 steps"),
        "{told}"
    );
    assert!(
        told.contains("divergence ") && told.contains("256 held-back tokens"),
        "{told}"
    );
    let again = stderr(&workshop.flapjack(&arguments));
    assert!(
        again.contains("in an earlier run (from the cache)"),
        "{again}"
    );
    for (arguments, words) in [
        (&["run", "-p", "x", "--heal", "9k"][..], "--prune"),
        (
            &["run", "-p", "x", "--prune", "0.3", "--heal", "soon"],
            "a time (90s",
        ),
        (
            &["run", "-p", "x", "--prune", "0.3", "--heal-rate", "1e-4"],
            "--heal",
        ),
        (
            &[
                "run",
                "-p",
                "x",
                "--prune",
                "0.3",
                "--heal",
                "9k",
                "--sparse",
                "wanda:0.5",
            ],
            "leave out --sparse",
        ),
        (
            &[
                "run", "-p", "x", "--prune", "0.3", "--heal", "9k", "--memory", "1MB",
            ],
            "raise --memory",
        ),
    ] {
        let output = workshop.flapjack(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(
            stderr(&output).contains(words),
            "{arguments:?}: {}",
            stderr(&output)
        );
    }
}
