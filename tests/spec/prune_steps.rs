//! The steps of pruning, each against its definition: metrics, structures, restorations, loss curves, named methods.

use crate::common::pruning::{
    curve_options, curves_of, plan_by, profile_of, prune, recipe, restore_and_apply, text,
};
use crate::common::synthetic::{Shape, Synthetic, logits, runtime};
use crate::common::{Random, doubles, relative_error};
use crate::families::{Draft, VOCABULARY};
use flapjack::kernels::{Moments, Team};
use flapjack::model::{Batch, KvCache, Layer, Model, Observer, Scratch};
use flapjack::progress::ignore;
use flapjack::prune::{
    self, CurveLevels, CurveOptions, Effort, Evidence, FeatureStats, HeadUnit, LayerPlan, Method,
    Metric, Plan, Profile, PruneErrorKind, Recipe, Restore, Structure,
};

fn three_layers() -> Synthetic {
    Synthetic::new(Shape {
        heads: vec![6; 3],
        kv_heads: vec![2; 3],
        channels: vec![90, 50, 120],
        ..Shape::default()
    })
}

fn tokens(seed: u64, n: usize) -> Vec<u32> {
    Random::new(seed).tokens(n, Shape::default().vocabulary)
}

/// The inputs of the down projections, row by row.
struct Inputs(Vec<Vec<f32>>);

impl Observer for Inputs {
    fn attention_output(&mut self, _: &Team, _: usize, _: &flapjack::kernels::Activations) {}
    fn mlp_down(&mut self, _: &Team, layer: usize, x: &flapjack::kernels::Activations) {
        self.0[layer].extend_from_slice(x.values());
    }
}

fn down_inputs(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut inputs = Inputs(vec![Vec::new(); model.layers.len()]);
    let runtime = runtime(1);
    for piece in tokens.chunks(256) {
        let mut cache = KvCache::new(model, piece.len());
        let mut batch = Batch::new();
        batch.add_prompt(0, 0, piece, 0..0);
        runtime.region(|team| {
            model
                .forward(
                    team,
                    batch.rows(),
                    &mut [&mut cache],
                    &mut Scratch::new(),
                    &mut inputs,
                )
                .unwrap();
        });
    }
    inputs.0
}

// ---- statistics ----

#[test]
fn a_norm_behind_a_module_weighs_the_tokens_of_its_statistics() {
    for architecture in ["gemma", "gemma2", "gemma3"] {
        let model = Draft::of(architecture).load();
        let tokens = Random::new(5).tokens(250, VOCABULARY);
        let profile = profile_of(&model, text(&tokens));
        for (l, inputs) in down_inputs(&model, &tokens).iter().enumerate() {
            let down = &model.layers[l].down.weight;
            let (values, stats) = (down.decode(&model.map), &profile.layers[l].mlp);
            let mut squares = vec![0.0; down.cols];
            for x in inputs.chunks_exact(down.cols) {
                let output = values.chunks_exact(down.cols).map(|row| {
                    let products = row.iter().zip(x).map(|(w, x)| f64::from(w * x));
                    products.sum::<f64>()
                });
                let output = output.map(|y| y * y).sum::<f64>() / down.rows as f64;
                let weight = match model.layers[l].mlp_post_norm {
                    Some(_) => 1.0 / (output + f64::from(model.config.rms_epsilon)),
                    None => 1.0,
                };
                for (square, x) in squares.iter_mut().zip(x) {
                    *square += weight * f64::from(*x).powi(2) / tokens.len() as f64;
                }
            }
            let covariance = stats.covariance.as_ref().expect("it was collected");
            for (j, square) in squares.into_iter().enumerate() {
                let place = format!("{architecture}, layer {l}, {j}: {square}");
                let found = [stats.mean_square(j), covariance.second_moment(j, j)];
                let near = found.map(|found| (found - square).abs() < 0.02 * square);
                assert_eq!(near, [true; 2], "{place}, {found:?}");
            }
        }
    }
}

// ---- metrics ----

#[test]
fn metrics_are_their_formulas() {
    let synthetic = three_layers();
    let model = synthetic.load();
    let profile = profile_of(&model, text(&tokens(1, 700)));
    for (l, layer) in synthetic.reference.layers.iter().enumerate() {
        let stats = &profile.layers[l].mlp;
        let column = |j: usize| -> Vec<f64> {
            let at = |i: usize| layer.down.weight[i * layer.down.cols + j];
            (0..layer.down.rows).map(at).collect()
        };
        let square = |j: usize| column(j).iter().map(|w| w * w).sum::<f64>();
        let mean_size =
            |j: usize| column(j).iter().map(|w| w.abs()).sum::<f64>() / layer.down.rows as f64;
        let formulas: [(Metric, &dyn Fn(usize) -> f64); 4] = [
            (Metric::Wifv, &|j| stats.variance(j) * square(j)),
            (Metric::Ifv, &|j| stats.variance(j)),
            (Metric::Wifn, &|j| {
                mean_size(j) * stats.mean_square(j).sqrt()
            }),
            (Metric::Magnitude, &|j| square(j).sqrt()),
        ];
        for (metric, formula) in formulas {
            let scores = prune::score(&model, &runtime(2), &profile, metric).unwrap();
            for (j, score) in scores[l].mlp.iter().enumerate() {
                let expected = formula(j);
                assert!(
                    (score - expected).abs() < 1e-9 * expected,
                    "{metric}: layer {l}, channel {j}"
                );
            }
        }
    }
}

#[test]
fn random_scores_are_the_same_on_every_run_and_differ_between_layers() {
    let synthetic = three_layers();
    let model = synthetic.load();
    let profile = profile_of(&model, text(&tokens(1, 700)));
    let scores = || prune::score(&model, &runtime(2), &profile, Metric::Random).unwrap();
    assert_eq!(scores(), scores());
    assert_ne!(scores()[0].attention, scores()[1].attention);
}

// ---- structures ----

#[test]
fn every_structure_reaches_the_ratio_and_shares_it_out_as_it_says() {
    let model = three_layers().load();
    let profile = profile_of(&model, text(&tokens(1, 700)));
    let kept = |structure, ratio| {
        let plan = plan_by(&model, &profile, structure, HeadUnit::Query, ratio);
        assert!(
            structure == Structure::UlUm || (plan.ratio() - ratio).abs() < 0.03,
            "{structure}: {} for {ratio}",
            plan.ratio()
        );
        plan.layers
    };
    for ratio in [0.1, 0.25, 0.5] {
        for layer in kept(Structure::UlUm, ratio) {
            assert_eq!(layer.heads.len(), 6 - (6.0 * ratio) as usize, "ul-um");
            let channels = [90.0, 50.0, 120.0].map(|c| c as usize - (c * ratio) as usize);
            assert!(channels.contains(&layer.channels.len()), "ul-um");
        }
        for (layer, kept) in model.layers.iter().zip(kept(Structure::UlMm, ratio)) {
            let d = model.config.embedding_length;
            let groups = kept.heads.iter().map(|h| h / 3);
            let groups = groups.collect::<std::collections::BTreeSet<_>>().len();
            let left = (2 * kept.heads.len() + 2 * groups) * 16 * d + 3 * kept.channels.len() * d;
            let share = 1.0 - left as f64 / layer.parameters() as f64;
            assert!((share - ratio).abs() < 0.15, "ul-mm: {share} of a layer");
        }
        let by_kind = kept(Structure::AlMm, ratio);
        let heads: usize = by_kind.iter().map(|l| l.heads.len()).sum();
        assert!(heads < 18, "al-mm takes heads too: {heads}");
        kept(Structure::AlAm, ratio);
    }
}

#[test]
fn whole_groups_go_together_where_that_is_asked_for() {
    let model = three_layers().load();
    let profile = profile_of(&model, text(&tokens(1, 700)));
    let plan = plan_by(&model, &profile, Structure::AlMm, HeadUnit::Group, 0.4);
    let mut fewer = 0;
    for layer in &plan.layers {
        for group in 0..2 {
            let left = layer.heads.iter().filter(|h| *h / 3 == group).count();
            assert!(left == 0 || left == 3, "{left} heads of a group of 3 stay");
            fewer += usize::from(left == 0);
        }
    }
    assert!(fewer > 0);
}

// ---- restoration ----

/// The columns of the down projection that least squares leave are those of ridge regression on the inputs themselves, solved
/// by gradient descent's fixed point: (C_KK + λI) ΔWᵀ = C_KR W_Rᵀ.
#[test]
fn least_squares_solve_their_normal_equations() {
    let synthetic = three_layers();
    let model = synthetic.load();
    let tokens = tokens(3, 700);
    let profile = profile_of(&model, text(&tokens));
    let inputs = down_inputs(&model, &tokens);
    let plan = plan_by(&model, &profile, Structure::UlUm, HeadUnit::Query, 0.5);
    for (l, layer) in synthetic.reference.layers.iter().enumerate() {
        let (c, kept) = (layer.down.cols, &plan.layers[l].channels);
        let rows: Vec<&[f32]> = inputs[l].chunks_exact(c).collect();
        let n = rows.len() as f64;
        let mean = |j: usize| rows.iter().map(|r| f64::from(r[j])).sum::<f64>() / n;
        let means: Vec<f64> = (0..c).map(mean).collect();
        let covariance = |i: usize, j: usize| {
            let products = rows
                .iter()
                .map(|r| (f64::from(r[i]) - means[i]) * (f64::from(r[j]) - means[j]));
            products.sum::<f64>() / (n - 1.0)
        };
        let removed: Vec<usize> = (0..c).filter(|j| !kept.contains(j)).collect();
        let share = f64::max(1e-2, 0.75 * kept.len() as f64 / n);
        let ridge =
            share * kept.iter().map(|j| covariance(*j, *j)).sum::<f64>() / kept.len() as f64;
        let restored =
            prune::restore(&model, &profile.layers[l], l, &plan.layers[l], Restore::Lsq).unwrap();
        let weights = restored.mlp.weights.expect("new weights");
        let w = |i: usize, j: usize| layer.down.weight[i * c + j];
        for output in [0, layer.down.rows - 1] {
            let delta: Vec<f64> = kept
                .iter()
                .enumerate()
                .map(|(place, j)| f64::from(weights[output * kept.len() + place]) - w(output, *j))
                .collect();
            for (place, i) in kept.iter().enumerate() {
                let left: f64 = kept
                    .iter()
                    .zip(&delta)
                    .map(|(j, d)| covariance(*i, *j) * d)
                    .sum::<f64>()
                    + ridge * delta[place];
                let right: f64 = removed
                    .iter()
                    .map(|j| covariance(*i, *j) * w(output, *j))
                    .sum();
                let scale = covariance(*i, *i).max(ridge);
                assert!(
                    (left - right).abs() < 0.02 * scale,
                    "layer {l}, output {output}, input {i}: {left} and {right}"
                );
            }
            // On average over the text the output is what it was.
            let bias: f64 = removed
                .iter()
                .map(|j| w(output, *j) * means[*j])
                .sum::<f64>()
                - kept
                    .iter()
                    .zip(&delta)
                    .map(|(j, d)| d * means[*j])
                    .sum::<f64>();
            assert!((f64::from(restored.mlp.bias[output]) - bias).abs() < 1e-3);
        }
    }
}

#[test]
fn a_covariance_is_that_of_the_inputs() {
    let mut random = Random::new(8);
    let (n, c) = (301, 300);
    let base = random.normals(n * 3, 1.0);
    // Three sources behind all features, and a mean a hundred times the spread.
    let x: Vec<f32> = (0..n * c)
        .map(|i| 100.0 + base[i / c * 3 + i % c % 3] + 0.3 * random.normal() as f32)
        .collect();
    let runtime = runtime(2);
    let mut covariance = prune::Covariance::new(c);
    let mut scratch = prune::GramScratch::default();
    for piece in [&x[..c * 100], &x[c * 100..c * 101], &x[c * 101..]] {
        runtime.region(|team| covariance.add(team, piece, &mut scratch));
    }
    let mut stats = FeatureStats::new(c);
    let team = Team::solo(runtime.kernels);
    stats.add(&team, &Moments::of(&team, &x, c));
    for (i, j) in [(0, 0), (0, 3), (0, 1), (299, 2), (17, 290), (256, 255)] {
        let expected = (0..n)
            .map(|r| {
                (f64::from(x[r * c + i]) - stats.mean(i))
                    * (f64::from(x[r * c + j]) - stats.mean(j))
            })
            .sum::<f64>()
            / (n - 1) as f64;
        let found = covariance.get(i, j);
        assert!(
            (found - expected).abs() < 4e-3,
            "({i}, {j}): {found}, {expected}"
        );
        assert_eq!(found, covariance.get(j, i));
    }
}

#[test]
fn auto_falls_back_to_biases_where_text_is_short_or_covariances_are_missing() {
    let model = three_layers().load();
    let long = profile_of(&model, text(&tokens(3, 700)));
    let mut without = long.clone();
    for layer in &mut without.layers {
        layer.attention.covariance = None;
        layer.mlp.covariance = None;
    }
    let plan = plan_by(&model, &long, Structure::UlUm, HeadUnit::Query, 0.5);
    let restored = |profile: &Profile, how| {
        prune::restore(&model, &profile.layers[2], 2, &plan.layers[2], how)
    };
    assert_eq!(
        restored(&long, Restore::Auto).unwrap(),
        restored(&long, Restore::Lsq).unwrap()
    );
    assert_eq!(
        restored(&without, Restore::Auto).unwrap(),
        restored(&without, Restore::Bias).unwrap()
    );
    let error = restored(&without, Restore::Lsq).unwrap_err();
    assert!(matches!(error.kind, PruneErrorKind::NoCovariance));
}

/// Carries out a plan by restoring in sequence.
fn in_sequence(model: &mut Model, profile: &Profile, tokens: &[u32], plan: &Plan) {
    let (runtime, how) = (runtime(2), Restore::Sequential);
    let evidence = Evidence::with_text(profile, text(tokens));
    prune::restore_and_apply(model, &runtime, evidence, plan, how, &mut ignore).unwrap();
}

#[test]
fn in_sequence_the_first_pruned_projection_is_fitted_as_alone() {
    let synthetic = three_layers();
    let text_tokens = tokens(3, 700);
    let dense = synthetic.load();
    let profile = profile_of(&dense, text(&text_tokens));
    let mut plan = plan_by(&dense, &profile, Structure::UlUm, HeadUnit::Query, 0.0);
    plan.layers[2].channels = (0..60).collect();
    let probe = tokens(9, 40);
    let pruned = |sequential: bool| {
        let mut model = synthetic.load();
        match sequential {
            true => in_sequence(&mut model, &profile, &text_tokens, &plan),
            false => restore_and_apply(&mut model, &profile, &plan, Restore::Lsq),
        }
        logits(&model, &runtime(2), &probe)
    };
    let error = relative_error(&pruned(true), &doubles(&pruned(false)));
    assert!(error < 1e-3, "{error}");
}

#[test]
fn in_sequence_the_output_comes_closer_to_the_dense_one() {
    let synthetic = three_layers();
    let text_tokens = tokens(3, 2000);
    let dense = synthetic.load();
    let profile = profile_of(&dense, text(&text_tokens));
    let plan = plan_by(&dense, &profile, Structure::AlAm, HeadUnit::Query, 0.5);
    let (expected, _) = synthetic.reference.forward(&text_tokens[..200]);
    let runtime = runtime(2);
    let mut alone = synthetic.load();
    restore_and_apply(&mut alone, &profile, &plan, Restore::Lsq);
    let mut sequential = synthetic.load();
    in_sequence(&mut sequential, &profile, &text_tokens, &plan);
    let [alone, sequential] = [alone, sequential]
        .map(|model| relative_error(&logits(&model, &runtime, &text_tokens[..200]), &expected));
    assert!(
        sequential < alone,
        "{sequential} in sequence, {alone} alone"
    );
}

#[test]
fn the_best_effort_restores_in_sequence_where_text_and_memory_are_enough() {
    let synthetic = three_layers();
    let model = synthetic.load();
    let restore = |method: Method, effort, tokens, memory| {
        method
            .recipe_with_text(effort, &model, tokens, memory)
            .restore
    };
    // 120 channels are the widest input.
    let (enough, plenty) = (20 * 120, u64::MAX);
    let streams = prune::sequential::bytes(&model, enough);
    assert_eq!(
        streams,
        (enough * (2 * Shape::default().embedding + 120) * 4) as u64
    );
    let (best, in_sequence) = (Method::Best, Restore::Sequential);
    assert_eq!(restore(best, Effort::Best, enough, streams), in_sequence);
    assert_eq!(
        restore(best, Effort::Best, enough - 1, plenty),
        Restore::Auto
    );
    assert_eq!(
        restore(best, Effort::Best, enough, streams - 1),
        Restore::Auto
    );
    assert_eq!(restore(best, Effort::Normal, enough, plenty), Restore::Auto);
    assert_eq!(
        restore(Method::Flap, Effort::Best, enough, plenty),
        Restore::Bias
    );
}

// ---- loss curves ----

fn with_curves(model: &Model, seed: u64) -> Profile {
    let mut profile = profile_of(model, text(&tokens(seed, 700)));
    let options = CurveOptions {
        restore: Restore::Bias,
        ..curve_options(Method::Best.recipe(Effort::Best))
    };
    let held_back = tokens(seed + 1, 256);
    profile.curves = Some(curves_of(model, &profile, text(&held_back), options));
    profile
}

/// A curve's points are what pruning that module alone, for real, does to the predictions.
#[test]
fn curves_tell_what_pruning_one_module_does() {
    let synthetic = three_layers();
    let model = synthetic.load();
    let profile = with_curves(&model, 3);
    let curves = profile.curves.as_ref().unwrap();
    let held_back = tokens(4, 256);
    let dense = logits(&model, &runtime(2), &held_back);
    for (l, gone) in [(0, 0.5), (1, 0.5), (2, 0.5)] {
        let mut plan = plan_by(&model, &profile, Structure::UlUm, HeadUnit::Query, 0.0);
        let scores = prune::score(&model, &runtime(2), &profile, Metric::Wifv).unwrap();
        let mut order: Vec<usize> = (0..model.layers[l].channels()).collect();
        order.sort_by(|a, b| scores[l].mlp[*a].total_cmp(&scores[l].mlp[*b]));
        let mut kept = order[(gone * order.len() as f64).round() as usize..].to_vec();
        kept.sort_unstable();
        plan.layers[l].channels = kept;
        let mut pruned = synthetic.load();
        restore_and_apply(&mut pruned, &profile, &plan, Restore::Bias);
        let pruned = logits(&pruned, &runtime(2), &held_back);
        // The last 64 positions count.
        let vocabulary = synthetic.shape.vocabulary;
        let divergence = (192..256)
            .map(|t| {
                let row = t * vocabulary..(t + 1) * vocabulary;
                divergence(&dense[row.clone()], &pruned[row])
            })
            .sum::<f64>()
            / 64.0;
        let (_, measured) = curves.modules[2 * l + 1].points[1];
        assert!(
            (measured - divergence).abs() < 0.02 * divergence + 1e-6,
            "layer {l}: {measured}, pruned for real {divergence}"
        );
    }
}

fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |l: &[f32]| -> Vec<f64> {
        let sum: f64 = l.iter().map(|v| f64::from(*v).exp()).sum();
        l.iter().map(|v| f64::from(*v) - sum.ln()).collect()
    };
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Layers that are passed over are taken to lose what lies between those before and behind them.
#[test]
fn curves_of_layers_that_are_passed_over_lie_between_those_around_them() {
    let uneven = three_layers();
    let even = Synthetic::new(Shape {
        channels: vec![90; 3],
        ..uneven.shape.clone()
    });
    let held_back = tokens(4, 256);
    let curves = |model: &Model, stride| {
        let profile = profile_of(model, text(&tokens(3, 700)));
        let options = curve_options(Method::Best.recipe(Effort::Best));
        let options = CurveOptions {
            restore: Restore::Bias,
            levels: CurveLevels {
                stride,
                ..options.levels.clone()
            },
            ..options
        };
        curves_of(model, &profile, text(&held_back), options).modules
    };
    let model = even.load();
    let (all, some) = (curves(&model, 1), curves(&model, 2));
    for kind in 0..2 {
        let [first, middle, last] = [kind, 2 + kind, 4 + kind];
        assert_eq!(some[first], all[first]);
        assert_eq!(some[last], all[last]);
        assert_eq!(some[middle].points.len(), all[middle].points.len());
        for (i, (freed, loss)) in some[middle].points.iter().enumerate() {
            assert_eq!(*freed, all[middle].points[i].0);
            let mean = (all[first].points[i].1 + all[last].points[i].1) / 2.0;
            assert!((loss - mean).abs() < 1e-9 * mean, "{loss} {mean}");
        }
    }
    // A layer of other widths is like none, and is measured.
    let model = uneven.load();
    assert_eq!(curves(&model, 2), curves(&model, 1));
}

#[test]
fn curves_spare_the_modules_that_hurt_and_empty_none() {
    let model = three_layers().load();
    let mut profile = with_curves(&model, 3);
    let curves = profile.curves.as_mut().unwrap();
    for (m, curve) in curves.modules.iter_mut().enumerate() {
        for (freed, loss) in &mut curve.points {
            let total = *freed as f64 / 10_000.0;
            *loss = total * total * if m == 3 { 100.0 } else { 1.0 };
        }
    }
    let plan = plan_by(&model, &profile, Structure::Curves, HeadUnit::Query, 0.5);
    // Plans end within half a head, with the keys and values that go with it.
    assert!((plan.ratio() - 0.5).abs() < 0.012);
    assert!(plan.layers[1].channels.len() >= 48, "the dear one stays");
    let plan = plan_by(&model, &profile, Structure::Curves, HeadUnit::Query, 0.89);
    for layer in &plan.layers {
        assert!(!layer.heads.is_empty() && !layer.channels.is_empty());
    }
}

/// All loss curves are the same function of the share that goes. At a small ratio a smaller share of the heads goes than of the channels; at a
/// large one it is about the same share of both.
#[test]
fn heads_cost_more_than_their_curves_say() {
    let model = three_layers().load();
    let mut profile = with_curves(&model, 3);
    let curves = profile.curves.as_mut().unwrap();
    for (l, layer) in model.layers.iter().enumerate() {
        let projections = [&layer.q, &layer.k, &layer.v, &layer.o];
        let attention: usize = projections.iter().map(|p| p.weight.parameters()).sum();
        let mlp = layer.parameters() - attention;
        for (m, all) in [(2 * l, attention), (2 * l + 1, mlp)] {
            for (freed, loss) in &mut curves.modules[m].points {
                *loss = (*freed * *freed) as f64 / all as f64;
            }
        }
    }
    let gone = |ratio: f64| {
        let plan = plan_by(&model, &profile, Structure::Curves, HeadUnit::Query, ratio);
        let share = |all: fn(&Layer) -> usize, kept: fn(&LayerPlan) -> usize| {
            let all: usize = model.layers.iter().map(all).sum();
            let kept: usize = plan.layers.iter().map(kept).sum();
            (all - kept) as f64 / all as f64
        };
        let heads = share(Layer::heads, |layer| layer.heads.len());
        let channels = share(Layer::channels, |layer| layer.channels.len());
        (heads, channels)
    };
    let (heads, channels) = gone(0.2);
    assert!(heads < 0.7 * channels, "{heads:.3}, {channels:.3}");
    let (heads, channels) = gone(0.6);
    assert!((heads - channels).abs() < 0.15, "{heads:.3}, {channels:.3}");
}

// ---- methods ----

#[test]
fn every_combination_prunes_to_the_ratio_and_still_computes() {
    let synthetic = three_layers();
    let model = synthetic.load();
    let profile = with_curves(&model, 3);
    let all = tokens(3, 700);
    let probe = tokens(9, 40);
    let (dense, _) = synthetic.reference.forward(&probe);
    for &metric in Metric::ALL {
        for &structure in Structure::ALL {
            for &restore in Restore::ALL {
                let mut model = synthetic.load();
                let recipe = Recipe {
                    metric,
                    ..recipe(structure, restore)
                };
                let plan = prune(&mut model, &profile, text(&all), recipe, 0.2).unwrap();
                assert!((plan.ratio() - 0.2).abs() < 0.06, "{recipe:?}");
                let error = relative_error(&logits(&model, &runtime(2), &probe), &dense);
                assert!(error < 1.5, "{recipe:?}: relative error {error}");
            }
        }
    }
}

#[test]
fn what_a_recipe_needs_and_the_profile_lacks_is_named_and_the_model_stays() {
    let synthetic = three_layers();
    let mut model = synthetic.load();
    let all = tokens(1, 700);
    let mut profile = profile_of(&model, text(&all));
    let before = model.layer_parameters();
    let best = Method::Best.recipe(Effort::Normal);
    let error = prune(&mut model, &profile, text(&all), best, 0.2).unwrap_err();
    assert!(matches!(error.kind, PruneErrorKind::NoCurves), "{error}");
    profile.layers[0].mlp.covariance = None;
    let recipe = Recipe {
        restore: Restore::Lsq,
        ..Method::Flap.recipe(Effort::Fast)
    };
    let error = prune(&mut model, &profile, text(&all), recipe, 0.2).unwrap_err();
    assert!(
        matches!(error.kind, PruneErrorKind::NoCovariance),
        "{error}"
    );
    assert_eq!(model.layer_parameters(), before);
}

#[test]
fn weights_that_are_not_numbers_are_refused_with_their_layer() {
    let synthetic = three_layers();
    let mut model = synthetic.load();
    let profile = profile_of(&model, text(&tokens(1, 700)));
    let range = model.layers[2].down.weight.range.clone();
    model.map.bytes_mut()[range][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = prune::flap(&mut model, &runtime(2), &profile, 0.2, &mut ignore).unwrap_err();
    assert!(error.to_string().contains("layer 2"), "{error}");
}

#[test]
fn choices_are_known_by_name() {
    assert_eq!("al-am".parse(), Ok(Structure::AlAm));
    assert_eq!("wanda-sp".parse(), Ok(Method::WandaSp));
    let error = "best".parse::<Metric>().unwrap_err();
    assert!(
        error.contains("wifv") && error.contains("\"best\""),
        "{error}"
    );
}
