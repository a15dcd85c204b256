//! Asking for a result in place of a ratio: a size, a speed, a perplexity.

use crate::common::Random;
use crate::common::pruning::{profile_of, prune, recipe, text};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::eval::TokenTime;
use flapjack::model::Model;
use flapjack::prune::search::{Largest, largest_ratio};
use flapjack::prune::{Plan, Planner, Profile, Restore, Structure};
use flapjack::quant::BlockType;

fn synthetic(block_type: BlockType) -> Synthetic {
    Synthetic::new(Shape {
        block_type,
        embedding: 256,
        head_dim: 32,
        rope_dim: 32,
        heads: vec![16, 8],
        kv_heads: vec![4, 8],
        channels: vec![768, 512],
        ..Shape::default()
    })
}

fn profile(model: &Model) -> Profile {
    let tokens = Random::new(3).tokens(128, model.config.vocabulary);
    profile_of(model, text(&tokens))
}

// ---- sizes ----

#[test]
fn a_plan_knows_the_bytes_that_carrying_it_out_leaves() {
    for block_type in BlockType::ALL {
        let synthetic = synthetic(block_type);
        let profile = profile(&synthetic.load());
        for (structure, restore, ratio) in [
            (Structure::UlUm, Restore::None, 0.0),
            (Structure::UlUm, Restore::Bias, 0.3),
            (Structure::AlAm, Restore::Bias, 0.5),
            (Structure::AlMm, Restore::None, 0.85),
        ] {
            let recipe = recipe(structure, restore);
            let mut model = synthetic.load();
            let plan = Planner::new(&model, &runtime(2), &profile, recipe).unwrap();
            let plan = plan.plan(ratio).unwrap();
            let expected = plan.bytes_after(&model);
            let done = prune(&mut model, &profile, text(&[]), recipe, ratio);
            assert_eq!(done.unwrap(), plan);
            assert_eq!(
                model.bytes(),
                expected,
                "{block_type:?} {structure} {ratio}"
            );
        }
    }
}

#[test]
fn the_smallest_ratio_that_fits_is_found_and_one_step_less_does_not_fit() {
    let model = synthetic(BlockType::Q4_1).load();
    let profile = profile(&model);
    let recipe = recipe(Structure::AlAm, Restore::Lsq);
    let planner = Planner::new(&model, &runtime(2), &profile, recipe).unwrap();
    for share in [0.95, 0.7, 0.4] {
        let limit = (model.bytes() as f64 * share) as usize;
        let fits = |plan: &Plan| plan.bytes_after(&model) <= limit;
        let (ratio, plan) = planner.smallest_ratio(fits).unwrap().unwrap();
        assert!(fits(&plan) && plan == planner.plan(ratio).unwrap());
        assert!(!fits(&planner.plan(ratio - 1e-4).unwrap()), "{ratio}");
    }
    let (ratio, plan) = planner.smallest_ratio(|_| true).unwrap().unwrap();
    assert_eq!((ratio, plan.removed), (0.0, 0));
    assert_eq!(planner.smallest_ratio(|_| false).unwrap(), None);
    assert!((planner.most().unwrap().ratio() - 0.9).abs() < 0.05);
}

// ---- perplexity ----

/// Searches where the rise is known, and counts how often it is asked for.
fn search(limit: f64, rise: impl Fn(f64) -> f64) -> (Largest, usize) {
    let mut asked = 0;
    let found = largest_ratio(limit, |ratio| {
        asked += 1;
        Ok::<_, ()>(rise(ratio))
    });
    (found.unwrap(), asked)
}

#[test]
fn the_largest_ratio_within_a_limit_is_found_by_few_measurements() {
    // Rises of several shapes, and where each reaches the limit.
    for (rise, limit, end) in [
        ((|r| 4.0 * r * r) as fn(f64) -> f64, 0.1, 0.158),
        (|r| (6.0 * r).exp() - 1.0, 0.1, 0.0159),
        (|r| (6.0 * r).exp() - 1.0, 2.0, 0.183),
        (|r| if r < 0.42 { 0.0 } else { f64::INFINITY }, 0.1, 0.42),
        (|r| r - 0.02, 0.3, 0.32),
    ] {
        let (found, asked) = search(limit, rise);
        let (ratio, risen) = found.within;
        assert!(
            asked <= 8 && risen <= limit && risen == if ratio > 0.0 { rise(ratio) } else { 0.0 }
        );
        assert!(
            ratio <= end + 1e-3 && ratio > end - 0.03,
            "{ratio} for {end}"
        );
        assert!(
            found
                .beyond
                .is_none_or(|(r, rise)| r > ratio && rise > limit)
        );
    }
}

#[test]
fn where_nothing_or_everything_is_within_the_limit_the_search_says_so() {
    let (nothing, _) = search(0.1, |_| 5.0);
    assert_eq!(nothing.within, (0.0, 0.0));
    assert!(
        nothing
            .beyond
            .is_some_and(|(ratio, rise)| ratio < 0.05 && rise == 5.0)
    );
    let (everything, asked) = search(0.1, |_| 0.0);
    assert!(everything.within.0 > 0.85 && everything.beyond.is_none() && asked <= 8);
    assert_eq!(largest_ratio(0.1, |_| Err("broken")), Err("broken"));
}

// ---- speed ----

#[test]
fn speed_follows_from_the_bytes_that_are_left_and_the_time_that_is_not_theirs() {
    let time = TokenTime {
        seconds: 0.010,
        per_byte: 0.008 / 1e6,
        bytes: 1_000_000,
    };
    assert_eq!(time.speed(), 100.0);
    assert!((time.speed_at(1_000_000) - 100.0).abs() < 1e-9);
    assert!((time.speed_at(500_000) - 1.0 / 0.006).abs() < 1e-6);
    assert!(
        (time.speed_at(0) - 500.0).abs() < 1e-6,
        "what is not the weights' stays"
    );
    // Measured, the weights take some of the time, and not more than all of it.
    let model = synthetic(BlockType::Q4_1).load();
    let time = TokenTime::measure(&model, &runtime(2)).unwrap();
    assert_eq!(time.bytes, model.bytes_per_token());
    let share = time.per_byte * time.bytes as f64 / time.seconds;
    assert!(share > 0.0 && share <= 1.0, "{time:?}");
}
