//! Pruning of small random models.

use std::path::Path;

use flapjack::gguf::GgufFile;
use flapjack::model::{Export, Model};
use flapjack::progress::ignore;
use flapjack::prune::{
    self, Calibration, CurveOptions, Curves, Division, Effort, Evidence, HeadUnit, Metric,
    OutcomeKey, Plan, Profile, PruneError, Recipe, Restore, Structure, Target, record,
};

use super::synthetic::{logits, runtime};
use super::{Random, doubles, relative_error};

/// A text of which covariances are taken too.
pub fn text(tokens: &[u32]) -> Calibration<'_> {
    Calibration {
        tokens,
        bos: None,
        covariance: true,
    }
}

/// A text of which means and variances are taken alone, which is enough for biases.
pub fn text_for_biases(tokens: &[u32]) -> Calibration<'_> {
    Calibration {
        covariance: false,
        ..text(tokens)
    }
}

/// What a model's projections see of a text.
pub fn profile_of(model: &Model, text: Calibration) -> Profile {
    prune::calibrate(model, &runtime(2), text, &mut ignore).expect("a profile")
}

/// How `--effort best` measures a recipe's loss curves.
pub fn curve_options(recipe: Recipe) -> CurveOptions {
    CurveOptions {
        metric: recipe.metric,
        heads: recipe.heads,
        restore: recipe.restore,
        levels: Effort::Best.curve_levels(),
    }
}

/// Loss curves on a text that was held back.
pub fn curves_of(
    model: &Model,
    profile: &Profile,
    held_back: Calibration,
    options: CurveOptions,
) -> Curves {
    let (runtime, evidence) = (runtime(2), Evidence::profile(profile));
    prune::curves::measure(model, &runtime, evidence, held_back, &options, &mut ignore)
        .expect("curves")
}

/// A recipe with FLAP's metric, heads going one by one.
pub fn recipe(structure: Structure, restore: Restore) -> Recipe {
    Recipe {
        metric: Metric::Wifv,
        structure,
        heads: HeadUnit::Query,
        restore,
    }
}

/// A plan by FLAP's metric.
pub fn plan_by(
    model: &Model,
    profile: &Profile,
    structure: Structure,
    heads: HeadUnit,
    ratio: f64,
) -> Plan {
    let scores = prune::score(model, &runtime(2), profile, Metric::Wifv).expect("scores");
    let by = Division {
        structure,
        heads,
        curves: profile.curves.as_ref(),
        choices: &[],
    };
    prune::plan(model, &scores, by, ratio).expect("a plan")
}

/// Prunes a model as a recipe says.
pub fn prune(
    model: &mut Model,
    profile: &Profile,
    text: Calibration,
    recipe: Recipe,
    ratio: f64,
) -> Result<Plan, PruneError> {
    let evidence = Evidence::with_text(profile, text);
    prune::prune(model, &runtime(2), evidence, recipe, ratio, &mut ignore)
}

/// Restores and applies a plan, which must be possible by a profile alone.
pub fn restore_and_apply(model: &mut Model, profile: &Profile, plan: &Plan, how: Restore) {
    let evidence = Evidence::profile(profile);
    prune::restore_and_apply(model, &runtime(2), evidence, plan, how, &mut ignore)
        .expect("a pruned model");
}

/// The columns of the two projections of each layer that lose some.
pub fn columns(model: &Model) -> Vec<[usize; 2]> {
    let layers = model.layers.iter();
    layers
        .map(|l| [l.o.weight.cols, l.down.weight.cols])
        .collect()
}

/// What some outcome follows from.
pub fn outcome_key() -> OutcomeKey {
    OutcomeKey {
        model: "model".into(),
        profile: "profile".into(),
        recipe: recipe(Structure::AlAm, Restore::Lsq),
        target: Target::Ratio(0.35),
        single: None,
        plans: None,
        types: None,
        healed: None,
        flapjack: "0".into(),
    }
}

/// Writes a pruned model as a file, with what else is in the file that it came from.
pub fn export(model: &Model, source: &GgufFile, path: &Path) {
    let export = Export::new(model);
    let writer = export.writer(source, record::PREFIX, []).expect("a writer");
    writer.save(path).expect("the model is written");
}

/// Every weight, every bias and every width, to the bit.
pub fn assert_same(a: &Model, b: &Model) {
    assert_eq!(a.layers.len(), b.layers.len());
    (0..a.layers.len()).for_each(|l| assert_same_layer(a, b, l));
}

/// The same of one layer.
pub fn assert_same_layer(a: &Model, b: &Model, l: usize) {
    let (a_layer, b_layer) = (&a.layers[l], &b.layers[l]);
    assert_eq!(a_layer.group_sizes, b_layer.group_sizes);
    for (x, y) in a_layer.linears().into_iter().zip(b_layer.linears()) {
        assert_eq!(x.weight, y.weight);
        assert_eq!(x.bias, y.bias, "{}", x.weight.name);
        let bytes = |model: &Model| model.map.bytes()[x.weight.range.clone()].to_vec();
        assert!(bytes(a) == bytes(b), "{}", x.weight.name);
    }
}

/// The same logits, but for the order of sums.
pub fn assert_computes_the_same(a: &Model, b: &Model) {
    let tokens = Random::new(5).tokens(40, a.config.vocabulary);
    let expected = doubles(&logits(a, &runtime(2), &tokens));
    let error = relative_error(&logits(b, &runtime(2), &tokens), &expected);
    assert!(error < 1e-4, "relative error {error}");
}

/// Correlated inputs `[n, cols]` and their second moments `[cols, cols]`.
pub fn correlated(n: usize, cols: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
    let mut random = Random::new(4);
    let mix: Vec<f64> = (0..cols * cols)
        .map(|_| random.normal() / (cols as f64).sqrt())
        .collect();
    let inputs: Vec<Vec<f64>> = (0..n)
        .map(|_| {
            let z: Vec<f64> = (0..cols).map(|_| random.normal()).collect();
            let mixed = |j: usize| (0..cols).map(|k| mix[j * cols + k] * z[k]).sum::<f64>();
            (0..cols).map(|j| mixed(j) + 0.3 * z[j] + 0.2).collect()
        })
        .collect();
    let mut moment = vec![0.0; cols * cols];
    for x in &inputs {
        for i in 0..cols {
            for j in 0..cols {
                moment[i * cols + j] += x[i] * x[j] / n as f64;
            }
        }
    }
    (inputs, moment)
}
