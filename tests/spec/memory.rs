//! Covariances in groups of layers: the same plan and the same weights as with all of them at once, in less memory.

use std::ops::ControlFlow;

use crate::common::Random;
use crate::common::pruning::{assert_same, curve_options, recipe};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::model::Model;
use flapjack::progress::ignore;
use flapjack::prune::{
    self, Calibration, Evidence, Groups, Metric, Plan, Profile, PruneError, PruneErrorKind, Recipe,
    Restore, Structure, groups,
};
use flapjack::quant::BlockType;

/// Four layers, of which the second has the largest covariances.
fn four_layers(block_type: BlockType) -> Synthetic {
    Synthetic::new(Shape {
        block_type,
        head_dim: 32,
        rope_dim: 32,
        heads: vec![4; 4],
        kv_heads: vec![2; 4],
        channels: vec![128, 192, 128, 128],
        ..Shape::default()
    })
}

fn text(tokens: &[u32], covariance: bool) -> Calibration<'_> {
    Calibration {
        tokens,
        bos: Some(1),
        covariance,
    }
}

/// Prunes with covariances in groups, or all at once. Also gives how many passes over the text the groups took.
fn pruned(
    model: &mut Model,
    recipe: Recipe,
    mut groups: Option<&mut Groups>,
) -> Result<(Profile, Plan, usize), PruneError> {
    let runtime = runtime(2);
    let mut random = Random::new(3);
    let [seen, held_back] = [700, 256].map(|n| random.tokens(n, Shape::default().vocabulary));
    let all = text(&seen, groups.is_none());
    let mut profile = prune::calibrate(model, &runtime, all, &mut ignore)?;
    let mut passes = 0;
    let mut count = |done, total| {
        assert!(done <= total);
        passes += usize::from(done == total);
        ControlFlow::Continue(())
    };
    if recipe.wants_curves() {
        let evidence = match &mut groups {
            None => Evidence::profile(&profile),
            Some(groups) => Evidence::in_groups(&profile, groups, &mut count),
        };
        let (held_back, options) = (text(&held_back, true), curve_options(recipe));
        let quiet = &mut ignore;
        let curves = prune::curves::measure(model, &runtime, evidence, held_back, &options, quiet)?;
        profile.curves = Some(curves);
    }
    let evidence = match groups {
        None => Evidence::with_text(&profile, all),
        Some(groups) => Evidence::in_groups(&profile, groups, &mut count),
    };
    let plan = prune::prune(model, &runtime, evidence, recipe, 0.4, &mut ignore)?;
    Ok((profile, plan, passes))
}

fn groups_of(model: &Model, bytes: u64) -> Groups {
    let seen = Random::new(3).tokens(700, Shape::default().vocabulary);
    let ranges = groups::partition(model, bytes).expect("a layer fits");
    Groups::new(ranges, text(&seen, false))
}

/// What the covariances of some layers take.
fn bytes(model: &Model, layers: std::ops::Range<usize>) -> u64 {
    model.layers[layers]
        .iter()
        .map(groups::covariance_bytes)
        .sum()
}

#[test]
fn groups_are_of_as_many_layers_as_fit() {
    let model = four_layers(BlockType::F32).load();
    assert_eq!(
        bytes(&model, 0..1),
        4 * (128 * 128 + 128 * 128),
        "4 bytes for every pair of inputs"
    );
    let all = bytes(&model, 0..4);
    let whole = groups::partition(&model, all).unwrap();
    assert!(whole.len() == 1 && whole[0] == (0..4), "{whole:?}");
    assert_eq!(groups::partition(&model, all - 1), Some(vec![0..3, 3..4]));
    let most = bytes(&model, 1..2);
    assert_eq!(
        groups::partition(&model, most),
        Some(vec![0..1, 1..2, 2..3, 3..4])
    );
    assert_eq!(groups::partition(&model, most - 1), None);
    let two = bytes(&model, 2..4);
    assert_eq!(groups::partition(&model, two), Some(vec![0..1, 1..2, 2..4]));
}

#[test]
fn in_groups_plan_and_weights_are_the_same_to_the_bit() {
    let recipes = [
        (Structure::Curves, Restore::Auto),
        (Structure::AlAm, Restore::Lsq),
        (Structure::Curves, Restore::Sequential),
    ];
    for (block_type, packed) in [(BlockType::F32, false), (BlockType::Q4_1, true)] {
        let synthetic = four_layers(block_type);
        let load = || synthetic.load_packed_if(packed);
        for (structure, restore) in recipes {
            let recipe = recipe(structure, restore);
            let mut at_once = load();
            let (whole, plan, _) = pruned(&mut at_once, recipe, None).unwrap();
            assert!(plan.layers.iter().any(|l| l.channels.len() < 128));
            for bytes in [bytes(&synthetic.load(), 1..2), 300_000] {
                let mut model = load();
                let mut groups = groups_of(&model, bytes);
                let (ranges, count) = (groups.ranges().to_vec(), groups.ranges().len());
                assert!(count > 1);
                let (profile, plan_2, passes) =
                    pruned(&mut model, recipe, Some(&mut groups)).unwrap();
                assert!(!profile.has_covariance());
                assert_eq!(profile.curves, whole.curves, "{recipe:?}");
                assert_eq!(plan_2, plan, "{recipe:?}");
                assert_same(&model, &at_once);
                // The last group of the curves is the first to be restored.
                let curves = structure == Structure::Curves;
                let expected = match (curves, restore) {
                    (true, Restore::Sequential) => count,
                    (true, _) => 2 * count - 1,
                    (false, _) => count,
                };
                assert_eq!(passes, expected, "{recipe:?}");
                let whole_passes = groups::passes(&ranges, curves);
                assert!(whole_passes < (2 * count) as f64 && whole_passes >= 1.0);
            }
        }
    }
}

#[test]
fn passes_are_counted_in_shares_of_the_layers() {
    assert_eq!(groups::passes(&[0..2, 2..4], false), 1.5);
    assert_eq!(groups::passes(&[0..2, 2..4], true), 2.0);
    assert_eq!(groups::passes(&[0..1, 1..2, 2..3, 3..4], false), 2.5);
}

#[test]
fn a_metric_that_needs_all_covariances_is_refused_and_the_model_stays() {
    let synthetic = four_layers(BlockType::F32);
    let mut model = synthetic.load();
    let recipe = Recipe {
        metric: Metric::Obs,
        ..recipe(Structure::AlAm, Restore::Lsq)
    };
    let mut groups = groups_of(&model, 300_000);
    let error = pruned(&mut model, recipe, Some(&mut groups)).unwrap_err();
    assert!(
        matches!(error.kind, PruneErrorKind::NoCovariance),
        "{error}"
    );
    assert!(error.is_untouched());
    assert_same(&model, &synthetic.load());
}
