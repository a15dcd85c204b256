//! Searching whole plans: what comes of it, what bounds it, what is kept, what is refused.

use std::ops::ControlFlow;
use std::time::Duration;

use flapjack::engine::{
    Cache, Engine, EngineError, MethodOptions, NoSearch, OpenOptions, PruneOptions, Target, ignore,
};
use flapjack::heal::{Search, Searched};
use flapjack::model::{Linear, Model};
use flapjack::progress::Progress;
use flapjack::prune::{Curve, Curves, Effort, Method, Plan, Planner, Profile, Restore, Structure};

use crate::common::default_model;
use crate::common::engine::{Workshop, by};
use crate::common::program::{stderr, succeeded};
use crate::common::pruning::{profile_of, recipe, text_for_biases};
use crate::common::synthetic::runtime;

/// A profile of a model by whose loss curves the first layer's MLP, without which nothing works, is worth little, and all other modules
/// are worth the same.
fn misjudged(model: &Model, tokens: &[u32]) -> Profile {
    let mut profile = profile_of(model, text_for_biases(tokens));
    let parameters = model.layers.iter().flat_map(|layer| {
        let all = |weights: [&Linear; 4]| weights.iter().map(|l| l.weight.parameters()).sum();
        let attention: usize = all([&layer.q, &layer.k, &layer.v, &layer.o]);
        [attention, layer.parameters() - attention]
    });
    let curve = |(m, parameters): (usize, usize)| {
        let worth = if m == 1 { 0.1 } else { 1.0 };
        let share = parameters as f64 / 2.0 / 1e6;
        Curve {
            points: vec![(parameters / 2, worth * share * share)],
        }
    };
    let recipe = Method::Best.recipe(Effort::Normal);
    profile.curves = Some(Curves {
        metric: recipe.metric,
        heads: recipe.heads,
        restore: Restore::Bias,
        modules: parameters.enumerate().map(curve).collect(),
        tokens: 0,
    });
    profile
}

struct Case {
    engine: Engine,
    profile: Profile,
    held_back: Vec<u32>,
}

impl Case {
    /// The default model.
    fn new() -> Self {
        let engine = Engine::open(default_model(), OpenOptions::default()).unwrap();
        let text = include_str!("../../src/prune/collect/calibration.txt");
        let tokens = engine.tokenizer().unwrap().encode(&text[..12_000]).unwrap();
        let (held_back, statistics) = tokens.split_at(512);
        Self {
            profile: misjudged(engine.model(), statistics),
            held_back: held_back.to_vec(),
            engine,
        }
    }

    fn search(
        &self,
        plans: usize,
        budget: Option<Duration>,
        progress: &mut Progress,
    ) -> (Plan, Searched) {
        let (model, runtime) = (self.engine.model(), &runtime(2));
        let recipe = recipe(Structure::Curves, Restore::Bias);
        let planner = Planner::new(model, runtime, &self.profile, recipe).unwrap();
        let shares = planner.shares(0.3).unwrap();
        let first = shares.plan(model);
        let search = Search {
            model,
            runtime,
            profile: &self.profile,
            restore: Restore::Bias,
            shares,
            text: &self.held_back,
            bos: None,
            plans,
            budget,
        };
        (first, search.run(progress).unwrap())
    }
}

#[test]
fn a_search_finds_a_plan_nearer_to_the_dense_model() {
    let case = Case::new();
    let mut told = Vec::new();
    let (first, found) = case.search(2, None, &mut |done, all| {
        told.push((done, all));
        ControlFlow::Continue(())
    });
    assert_eq!((found.tried, told), (2, vec![(0, 2), (1, 2)]));
    assert!(found.better > 0 && found.after < found.before, "{found:?}");
    assert_ne!(found.plan, first);
    // As much goes as before, but for a part of a step.
    assert!((found.plan.ratio() - first.ratio()).abs() < 0.002);
}

#[test]
fn a_search_ends_at_its_limits_with_the_best_plan_so_far() {
    let case = Case::new();
    let go_on = &mut |_: usize, _: usize| ControlFlow::Continue(());
    let (first, none) = case.search(0, None, go_on);
    assert!(none.tried == 0 && none.before == none.after);
    assert_eq!(none.plan, first);
    let moment = Some(Duration::from_nanos(1));
    let (_, none) = case.search(usize::MAX, moment, go_on);
    assert_eq!((none.tried, none.plan), (0, first));
    let (_, one) = case.search(12, None, &mut |done, _| match done {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
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
    assert!(search.tokens >= 512, "{search:?}");
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
