//! Work that is called off or fails on the way: what is left of a model is either as it was, or the error says which layers are
//! pruned.

use std::ops::ControlFlow;

use crate::common::Random;
use crate::common::pruning::{
    assert_same, assert_same_layer, columns, curve_options, plan_by, profile_of, recipe, text,
};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::model::Model;
use flapjack::progress::{Progress, ignore};
use flapjack::prune::curves::Onwards;
use flapjack::prune::{
    self, Calibration, Curves, Effort, Evidence, Groups, HeadUnit, LayerProfile, LayerRestoration,
    Method, Module, Outcome, Plan, Profile, PruneError, PruneErrorKind, Restore, SoFar, Structure,
    curves,
};

/// A model of four layers.
fn four_layers() -> Synthetic {
    Synthetic::new(Shape {
        heads: vec![4; 4],
        kv_heads: vec![2; 4],
        channels: vec![96, 128, 96, 96],
        ..Shape::default()
    })
}

fn tokens(n: usize) -> Vec<u32> {
    Random::new(3).tokens(n, Shape::default().vocabulary)
}

/// Calls work off at one call of its progress, the first being number 0, and counts the calls.
struct Breaker {
    at: usize,
    calls: usize,
}

impl Breaker {
    fn new(at: usize) -> Self {
        Self { at, calls: 0 }
    }

    fn answer(&mut self) -> ControlFlow<()> {
        self.calls += 1;
        match self.calls > self.at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Prunes with a progress that breaks at every call in turn, and holds what is left against the dense and the pruned model.
/// `order` is that in which layers are pruned.
fn check_breaks(
    order: [usize; 4],
    prune: impl Fn(&mut Model, &mut Progress) -> Result<(), PruneError>,
) {
    let synthetic = four_layers();
    let (dense, mut whole) = (synthetic.load(), synthetic.load());
    prune(&mut whole, &mut ignore).unwrap();
    for l in 0..4 {
        assert_ne!(
            whole.layers[l].channels(),
            dense.layers[l].channels(),
            "layer {l}"
        );
    }
    // Before the first layer, and after each.
    for done in 0..=4 {
        let mut model = synthetic.load();
        let mut breaker = Breaker::new(done);
        let mut told = Vec::new();
        let mut progress = |done, total| {
            told.push((done, total));
            breaker.answer()
        };
        let error = prune(&mut model, &mut progress).unwrap_err();
        assert!(error.is_cancelled(), "{error}");
        assert_eq!(told, (0..=done).map(|d| (d, 4)).collect::<Vec<_>>());
        check_touched(&error, &order[..done], &model, &whole, &dense);
    }
}

/// The layers that the error names are those of the pruned model, and the others are dense.
fn check_touched(
    error: &PruneError,
    expected: &[usize],
    model: &Model,
    whole: &Model,
    dense: &Model,
) {
    assert_eq!(error.touched, expected, "{error}");
    assert_eq!(error.is_untouched(), expected.is_empty());
    assert_eq!(
        error.to_string().contains("loaded anew"),
        !expected.is_empty()
    );
    for l in 0..model.layers.len() {
        let like = match expected.contains(&l) {
            true => whole,
            false => dense,
        };
        assert_same_layer(model, like, l);
    }
}

/// A profile with covariances, and a plan by which every layer loses something.
fn profile_and_plan(tokens: &[u32]) -> (Profile, Plan) {
    let dense = four_layers().load();
    let profile = profile_of(&dense, text(tokens));
    let plan = plan_by(&dense, &profile, Structure::UlUm, HeadUnit::Query, 0.5);
    (profile, plan)
}

#[test]
fn a_break_of_side_by_side_restoration_tells_the_first_layers() {
    let tokens = tokens(700);
    let (profile, plan) = profile_and_plan(&tokens);
    for (threads, how) in [(1, Restore::Bias), (2, Restore::Lsq), (3, Restore::Auto)] {
        check_breaks([0, 1, 2, 3], |model, progress| {
            let evidence = Evidence::profile(&profile);
            prune::restore_and_apply(model, &runtime(threads), evidence, &plan, how, progress)
        });
    }
}

#[test]
fn a_break_of_a_whole_recipe_tells_the_first_layers() {
    let tokens = tokens(700);
    let (profile, _) = profile_and_plan(&tokens);
    for restore in [Restore::Lsq, Restore::Sequential] {
        check_breaks([0, 1, 2, 3], |model, progress| {
            let evidence = Evidence::with_text(&profile, text(&tokens));
            let recipe = recipe(Structure::UlUm, restore);
            prune::prune(model, &runtime(2), evidence, recipe, 0.5, progress).map(drop)
        });
    }
}

fn groups(tokens: &[u32]) -> Groups {
    Groups::new(vec![0..1, 1..2, 2..4], text(tokens))
}

#[test]
fn a_break_in_groups_tells_the_layers_of_the_last_groups() {
    let tokens = tokens(700);
    let (profile, plan) = profile_and_plan(&tokens);
    check_breaks([2, 3, 1, 0], |model, progress| {
        let (mut groups, mut quiet) = (groups(&tokens), ignore);
        let evidence = Evidence::in_groups(&profile, &mut groups, &mut quiet);
        let how = Restore::Lsq;
        prune::restore_and_apply(model, &runtime(2), evidence, &plan, how, progress)
    });
}

#[test]
fn a_break_of_a_pass_tells_what_was_pruned_before_it() {
    let tokens = tokens(700);
    let (profile, plan) = profile_and_plan(&tokens);
    let synthetic = four_layers();
    let prune_in_groups = |model: &mut Model, passes: &mut Progress| {
        let mut groups = groups(&tokens);
        let mut passes = |done, total| passes(done, total);
        let evidence = Evidence::in_groups(&profile, &mut groups, &mut passes);
        let (runtime, how) = (runtime(2), Restore::Lsq);
        prune::restore_and_apply(model, &runtime, evidence, &plan, how, &mut ignore)
    };
    let (dense, mut whole) = (synthetic.load(), synthetic.load());
    let mut counter = Breaker::new(usize::MAX);
    prune_in_groups(&mut whole, &mut |_, _| counter.answer()).unwrap();
    // The text has three sequences of the model's context, and there are three passes.
    assert_eq!(counter.calls, 9);
    for at in 0..9 {
        let mut model = synthetic.load();
        let mut breaker = Breaker::new(at);
        let error = prune_in_groups(&mut model, &mut |_, _| breaker.answer()).unwrap_err();
        assert!(error.is_cancelled(), "{error}");
        let expected = [&[][..], &[2, 3], &[2, 3, 1]][at / 3];
        check_touched(&error, expected, &model, &whole, &dense);
    }
}

#[test]
fn a_break_of_applying_tells_the_first_layers() {
    let tokens = tokens(700);
    let (profile, plan) = profile_and_plan(&tokens);
    let dense = four_layers().load();
    let restored: Vec<LayerRestoration> = (0..4)
        .map(|l| {
            let (stats, kept) = (&profile.layers[l], &plan.layers[l]);
            prune::restore(&dense, stats, l, kept, Restore::Bias).unwrap()
        })
        .collect();
    check_breaks([0, 1, 2, 3], |model, progress| {
        prune::apply(model, &runtime(2), &plan, &restored, progress)
    });

    let mut pruned = four_layers().load();
    prune::apply(&mut pruned, &runtime(2), &plan, &restored, &mut ignore).unwrap();
    let outcome = Outcome::of(&pruned, &columns(&dense), plan, 0.5, None);
    check_breaks([0, 1, 2, 3], |model, progress| {
        outcome.apply(model, &runtime(2), progress)
    });
}

#[test]
fn a_break_of_what_only_reads_leaves_the_model_alone() {
    let synthetic = four_layers();
    let (model, tokens) = (synthetic.load(), tokens(700));
    for at in 0..3 {
        let mut breaker = Breaker::new(at);
        let progress = &mut |_, _| breaker.answer();
        let error = prune::calibrate(&model, &runtime(2), text(&tokens), progress).unwrap_err();
        assert!(error.is_cancelled() && error.is_untouched(), "{error}");
        assert_eq!(error.to_string(), "cancelled");
        assert_eq!(breaker.calls, at + 1);
    }
    let profile = profile_of(&model, text(&tokens));
    let options = curve_options(Method::Best.recipe(Effort::Best));
    for at in 0..8 {
        let mut breaker = Breaker::new(at);
        let progress = &mut |_, _| breaker.answer();
        let (evidence, held_back) = (Evidence::profile(&profile), text(&tokens[..256]));
        let error = curves::measure(&model, &runtime(2), evidence, held_back, &options, progress)
            .unwrap_err();
        assert!(error.is_cancelled() && error.is_untouched(), "{error}");
        assert_eq!(breaker.calls, at + 1, "once for each module");
    }
    assert_same(&model, &synthetic.load());
}

#[test]
fn what_was_collected_before_a_break_is_gone_on_from_to_the_same_profile() {
    let synthetic = four_layers();
    for bos in [None, Some(1)] {
        let (model, tokens) = (synthetic.load(), tokens(1700));
        let text = Calibration {
            bos,
            ..text(&tokens)
        };
        let whole = profile_of(&model, text);
        for at in 0..4 {
            let mut breaker = Breaker::new(at);
            let mut kept = None;
            let so_far = &mut |layers: &[LayerProfile], ends: bool| {
                if ends {
                    kept = Some(layers.to_vec());
                }
            };
            let progress = &mut |_, _| breaker.answer();
            prune::calibrate_onwards(&model, &runtime(2), text, None, so_far, progress)
                .unwrap_err();
            assert!(kept.is_some(), "it ends with what there is");
            let mut told = Vec::new();
            let progress = &mut |done, _| {
                told.push(done);
                ControlFlow::Continue(())
            };
            let profile =
                prune::calibrate_onwards(&model, &runtime(1), text, kept, &mut |_, _| {}, progress);
            assert_eq!(profile.unwrap(), whole, "broken off at {at}");
            assert_eq!(
                told.len(),
                7 - at,
                "{told:?}: only what was missing is read"
            );
        }
        let options = curve_options(Method::Best.recipe(Effort::Best));
        let held_back = Calibration {
            tokens: &tokens[..256],
            ..text
        };
        let curves = |begun, so_far: &mut SoFar<Curves>, progress: &mut Progress| {
            let onwards = Onwards {
                begun,
                so_far: &mut |curves: &Curves, ends| so_far(curves, ends),
            };
            let evidence = Evidence::profile(&whole);
            curves::measure_onwards(
                &model,
                &runtime(2),
                evidence,
                held_back,
                &options,
                onwards,
                progress,
            )
        };
        let all = curves(Vec::new(), &mut |_, _| {}, &mut ignore).unwrap();
        for at in 0..8 {
            let mut breaker = Breaker::new(at);
            let mut kept = Vec::new();
            let so_far = &mut |curves: &Curves, ends: bool| {
                if ends {
                    kept.clone_from(&curves.modules);
                }
            };
            curves(Vec::new(), so_far, &mut |_, _| breaker.answer()).unwrap_err();
            assert_eq!(kept.len(), at + 1);
            let mut calls = 0;
            let rest = curves(kept, &mut |_, _| {}, &mut |_, _| {
                calls += 1;
                ControlFlow::Continue(())
            });
            assert_eq!(rest.unwrap(), all, "broken off at {at}");
            assert_eq!(calls, 7 - at, "only what was missing is measured");
        }
    }
}

// ---- what goes wrong in one layer ----

#[test]
fn what_goes_wrong_in_a_layer_is_told_and_so_are_the_layers_before_it() {
    let tokens = tokens(700);
    let (profile, mut plan) = profile_and_plan(&tokens);
    plan.layers[2].channels.retain(|channel| *channel > 0);
    let synthetic = four_layers();
    for (threads, expected) in [(1, &[0, 1][..]), (2, &[0, 1]), (3, &[])] {
        for how in [Restore::Bias, Restore::Lsq, Restore::Auto] {
            let mut model = synthetic.load();
            let range = model.layers[2].down.weight.range.clone();
            model.map.bytes_mut()[range][..4].copy_from_slice(&f32::NAN.to_le_bytes());
            let evidence = Evidence::profile(&profile);
            let runtime = runtime(threads);
            let error =
                prune::restore_and_apply(&mut model, &runtime, evidence, &plan, how, &mut ignore)
                    .unwrap_err();
            assert!(
                matches!(
                    error.kind,
                    PruneErrorKind::DamagedWeights {
                        layer: 2,
                        module: Module::Mlp
                    }
                ),
                "{error}"
            );
            assert_eq!(error.touched, expected, "{error}");
        }
    }
}

#[test]
fn restoring_in_sequence_without_the_text_leaves_the_model_alone() {
    let tokens = tokens(700);
    let (profile, plan) = profile_and_plan(&tokens);
    let synthetic = four_layers();
    let mut model = synthetic.load();
    let mut sequential = |evidence| {
        let (runtime, how) = (runtime(2), Restore::Sequential);
        prune::restore_and_apply(&mut model, &runtime, evidence, &plan, how, &mut ignore)
            .unwrap_err()
    };
    let none = sequential(Evidence::profile(&profile));
    assert!(matches!(none.kind, PruneErrorKind::NoText), "{none}");
    let short = sequential(Evidence::with_text(&profile, text(&tokens[..5])));
    assert!(
        matches!(short.kind, PruneErrorKind::TooShort { tokens: 5, .. }),
        "{short}"
    );
    assert!(none.is_untouched() && short.is_untouched());
    assert_same(&model, &synthetic.load());
}
