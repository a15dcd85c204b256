//! Searching whole plans: what comes of it, what bounds it, what is kept, what is refused.

use std::ops::ControlFlow;
use std::time::Duration;

use flapjack::engine::{
    Cache, Engine, EngineError, MethodOptions, NoSearch, OpenOptions, PruneOptions, Target, ignore,
};
use flapjack::heal::{Search, Searched};
use flapjack::model::Model;
use flapjack::progress::Progress;
use flapjack::prune::{CurveOptions, Effort, Method, Planner, Profile, Restore, Shares, Structure};

use crate::common::Random;
use crate::common::engine::{Workshop, by};
use crate::common::program::{stderr, succeeded};
use crate::common::pruning::{curve_options, curves_of, profile_of, recipe, text};
use crate::common::synthetic::{Shape, Synthetic, runtime};

fn three_layers() -> Synthetic {
    Synthetic::new(Shape {
        heads: vec![6; 3],
        kv_heads: vec![2; 3],
        channels: vec![90, 50, 120],
        ..Shape::default()
    })
}

fn words(seed: u64, n: usize) -> Vec<u32> {
    Random::new(seed).tokens(n, Shape::default().vocabulary)
}

/// A profile by whose curves the MLP that is worth most is worth next to nothing; and the number of its layer.
fn misjudged(model: &Model) -> (Profile, usize) {
    let mut profile = profile_of(model, text(&words(3, 700)));
    let options = CurveOptions {
        restore: Restore::Bias,
        ..curve_options(Method::Best.recipe(Effort::Best))
    };
    let mut curves = curves_of(model, &profile, text(&words(4, 256)), options);
    let worth = |m: &usize| {
        let (freed, loss) = *curves.modules[*m].points.last().unwrap();
        loss / freed as f64
    };
    let module = [1, 3, 5]
        .into_iter()
        .max_by(|a, b| worth(a).total_cmp(&worth(b)))
        .unwrap();
    for (_, loss) in &mut curves.modules[module].points {
        *loss *= 1e-3;
    }
    profile.curves = Some(curves);
    (profile, module / 2)
}

fn search(
    model: &Model,
    profile: &Profile,
    threads: usize,
    limit: (usize, Option<Duration>),
    progress: &mut Progress,
) -> (Shares, Searched) {
    let runtime = runtime(threads);
    let recipe = recipe(Structure::Curves, Restore::Bias);
    let planner = Planner::new(model, &runtime, profile, recipe).unwrap();
    let shares = planner.shares(0.4).unwrap();
    let search = Search {
        model,
        runtime: &runtime,
        profile,
        restore: Restore::Bias,
        shares: shares.clone(),
        text: &words(5, 1024),
        bos: None,
        plans: limit.0,
        budget: limit.1,
    };
    (shares, search.run(progress).unwrap())
}

#[test]
fn a_search_gives_back_what_curves_have_misjudged() {
    let model = three_layers().load();
    let (profile, layer) = misjudged(&model);
    let (shares, found) = search(&model, &profile, 1, (12, None), &mut |_, _| {
        ControlFlow::Continue(())
    });
    assert!(found.better > 0 && found.tried <= 12, "{found:?}");
    assert!(found.after < found.before, "{found:?}");
    let before = shares.plan(&model);
    let kept = |plan: &flapjack::prune::Plan| plan.layers[layer].channels.len();
    assert!(
        kept(&found.plan) > kept(&before),
        "{} of {}",
        kept(&found.plan),
        kept(&before)
    );
    // No more and no less goes, but for a unit.
    assert!((found.plan.ratio() - before.ratio()).abs() < 0.02);
    // What it was measured on is what the plan does.
    let (_, again) = search(&model, &profile, 2, (12, None), &mut |_, _| {
        ControlFlow::Continue(())
    });
    assert_eq!(again.plan, found.plan, "on another number of threads");
    assert_eq!(again.after.to_bits(), found.after.to_bits());
}

#[test]
fn a_search_ends_at_its_limits_with_the_best_plan_so_far() {
    let model = three_layers().load();
    let (profile, _) = misjudged(&model);
    let go_on = &mut |_: usize, _: usize| ControlFlow::Continue(());
    let (shares, none) = search(&model, &profile, 1, (0, None), go_on);
    assert!(none.tried == 0 && none.before == none.after);
    assert_eq!(none.plan, shares.plan(&model));
    let moment = Some(Duration::from_nanos(1));
    let (_, none) = search(&model, &profile, 1, (usize::MAX, moment), go_on);
    assert_eq!(none.tried, 0);
    let (_, one) = search(&model, &profile, 1, (12, None), &mut |done, all| {
        assert_eq!(all, 12);
        match done {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    });
    assert_eq!(one.tried, 1);
    assert!(one.better == 0 || one.after < one.before);
}

fn best(effort: Effort) -> MethodOptions {
    MethodOptions {
        effort,
        ..Method::Best.into()
    }
}

fn searched() -> PruneOptions {
    PruneOptions {
        calibration: crate::common::engine::tokens(4096),
        ..by(best(Effort::Best))
    }
}

#[test]
fn best_effort_searches_and_its_outcome_is_kept() {
    let workshop = Workshop::new();
    let first = workshop.prune(&searched());
    let report = first.plan_search.expect("it is best effort");
    assert!(report.tokens > 512 && report.after <= report.before);
    let again = workshop.prune(&searched());
    assert!(again.repeated && again.plan_search.is_none());
    assert_eq!(first.plan, again.plan);
    // What is found in a time is another outcome, and so is what is found without.
    let timed = PruneOptions {
        budget: Some(Duration::from_nanos(1)),
        ..searched()
    };
    let report = workshop.prune(&timed);
    assert!(!report.repeated);
    assert_eq!(report.plan_search.expect("there was a budget").tried, 0);
    let normal = PruneOptions {
        method: best(Effort::Normal),
        ..searched()
    };
    let report = workshop.prune(&normal);
    assert!(!report.repeated && report.plan_search.is_none());
}

#[test]
fn the_profile_of_an_earlier_run_serves_a_search_too() {
    let workshop = Workshop::new();
    let normal = PruneOptions {
        method: best(Effort::Normal),
        ..searched()
    };
    workshop.prune(&normal);
    let budget = PruneOptions {
        budget: Some(Duration::from_secs(5)),
        cache: Cache::Profiles,
        ..normal
    };
    let report = workshop.prune(&budget);
    let search = report.plan_search.expect("there was a budget");
    assert!(search.tokens > 512, "{search:?}");
    let options = OpenOptions {
        threads: Some(2),
        cache: Some(workshop.path("profiles")),
        ..OpenOptions::default()
    };
    let mut engine = Engine::open(&workshop.model, options).unwrap();
    let two = engine.prune(&budget, &mut ignore).unwrap();
    assert_eq!(two.plan_search.unwrap().before, search.before);
}

#[test]
fn a_budget_that_cannot_be_spent_is_refused_before_anything_is_done() {
    let workshop = Workshop::new();
    let refused = |options: PruneOptions| {
        let options = PruneOptions {
            budget: Some(Duration::from_secs(1)),
            ..options
        };
        match workshop.open().prepare(&options) {
            Err(EngineError::NoSearch(reason)) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(by(Method::Flap)), NoSearch::Curves);
    let structure = Some(Structure::AlAm);
    let other = MethodOptions {
        structure,
        ..best(Effort::Best)
    };
    assert_eq!(refused(by(other)), NoSearch::Curves);
    let size = PruneOptions {
        target: Target::Bytes(1000),
        ..searched()
    };
    assert_eq!(refused(size), NoSearch::Target);
    let output = workshop.flapjack(&[
        "run", "-p", "x", "--raw", "-n", "1", "--method", "flap", "--prune", "0.2", "--budget",
        "5s",
    ]);
    let said = stderr(&output);
    assert!(!output.status.success());
    assert!(
        said.contains("loss curves") && said.contains("--budget"),
        "{said}"
    );
}

#[test]
fn the_program_takes_a_budget_at_any_effort_and_tells_what_came_of_it() {
    let workshop = Workshop::new();
    let run = [
        "run",
        "-p",
        "x",
        "--raw",
        "-n",
        "1",
        "--prune",
        "0.3",
        "--calib",
        "built-in",
        "--calib-tokens",
        "4096",
        "--budget",
        "3s",
    ];
    let said = succeeded(&workshop.flapjack(&run)).1;
    assert!(
        said.contains("  plans ") && said.contains("nats on"),
        "{said}"
    );
    let output = workshop.flapjack(&["run", "-p", "x", "--prune", "0.3", "--budget", "12"]);
    let said = stderr(&output);
    assert!(
        said.contains("must be a time") && !output.status.success(),
        "{said}"
    );
}
