//! Pruning by FLAP, against the definitions.

use std::collections::BTreeSet;

use crate::common::pruning::{plan_by, profile_of, restore_and_apply, text, text_for_biases};
use crate::common::reference::{Inputs, ReferenceModel};
use crate::common::synthetic::{Shape, Synthetic, logits, runtime};
use crate::common::{Random, relative_error};
use flapjack::eval::{PerplexityOptions, perplexity};
use flapjack::gguf::GgufFile;
use flapjack::kernels::{Moments, Team};
use flapjack::model::{CacheType, Model};
use flapjack::progress::ignore;
use flapjack::prune::{
    self, FeatureStats, HeadUnit, LayerPlan, Module, Plan, Profile, PruneErrorKind, Restore,
    Structure, calibrate,
};
use flapjack::quant::BlockType;
use flapjack::tokenize::Tokenizer;

fn flap_plan(model: &Model, profile: &Profile, ratio: f64) -> Plan {
    plan_by(model, profile, Structure::AlAm, HeadUnit::Query, ratio)
}

fn calibration_tokens(vocabulary: usize) -> Vec<u32> {
    Random::new(99).tokens(700, vocabulary)
}

/// The profile of the calibration tokens.
fn random_profile(model: &Model) -> Profile {
    profile_of(model, text(&calibration_tokens(model.config.vocabulary)))
}

// ---- statistics ----

#[test]
fn statistics_do_not_depend_on_batches_and_survive_a_large_mean() {
    let mut random = Random::new(1);
    let runtime = runtime(1);
    let (rows, width) = (301, 70);
    let x: Vec<f32> = (0..rows * width)
        .map(|i| 1e6 + (i % width) as f32 + random.normal() as f32)
        .collect();
    for split in [
        vec![301],
        vec![1; 301],
        vec![100, 1, 200],
        vec![64, 64, 64, 64, 45],
    ] {
        let mut stats = FeatureStats::new(width);
        let mut at = 0;
        for rows in split {
            let batch = &x[at * width..(at + rows) * width];
            let moments = Moments::of(&Team::solo(runtime.kernels), batch, width);
            stats.add(&Team::solo(runtime.kernels), &moments);
            at += rows;
        }
        assert_eq!(stats.count(), rows as u64);
        for j in 0..width {
            let column: Vec<f64> = (0..rows).map(|r| f64::from(x[r * width + j])).collect();
            let mean = column.iter().sum::<f64>() / rows as f64;
            let variance =
                column.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (rows - 1) as f64;
            let square = column.iter().map(|v| v * v).sum::<f64>() / rows as f64;
            assert!((stats.mean(j) - mean).abs() < 1e-6);
            assert!((stats.variance(j) - variance).abs() < 1e-6 * variance);
            assert!((stats.mean_square(j) - square).abs() < 1e-9 * square);
        }
    }
}

#[test]
fn a_profile_is_what_the_output_projections_saw() {
    let synthetic = Synthetic::new(Shape {
        heads: vec![4, 6],
        kv_heads: vec![2, 2],
        channels: vec![50, 70],
        ..Shape::default()
    });
    let tokens = calibration_tokens(synthetic.shape.vocabulary);
    let profile = random_profile(&synthetic.load());
    // Sequences of the model's context, 256, each on its own.
    let inputs = reference_inputs(&synthetic.reference, &tokens, 256);
    for (stats, inputs) in profile.layers.iter().zip(&inputs) {
        for (stats, rows) in [
            (&stats.attention, &inputs.attention),
            (&stats.mlp, &inputs.mlp),
        ] {
            assert_eq!(stats.count(), tokens.len() as u64);
            let (means, variances) = moments(rows);
            for j in 0..stats.len() {
                let spread = variances[j].sqrt();
                assert!((stats.mean(j) - means[j]).abs() < 2e-3 * spread);
                assert!((stats.variance(j) - variances[j]).abs() < 5e-3 * variances[j]);
            }
        }
    }
}

fn reference_inputs(model: &ReferenceModel, tokens: &[u32], sequence: usize) -> Vec<Inputs> {
    let mut all = vec![Inputs::default(); model.layers.len()];
    for piece in tokens.chunks(sequence) {
        for (all, inputs) in all.iter_mut().zip(model.forward(piece).1) {
            all.attention.extend(inputs.attention);
            all.mlp.extend(inputs.mlp);
        }
    }
    all
}

fn moments(rows: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let n = rows.len() as f64;
    (0..rows[0].len())
        .map(|j| {
            let mean = rows.iter().map(|r| r[j]).sum::<f64>() / n;
            let squares: f64 = rows.iter().map(|r| (r[j] - mean).powi(2)).sum();
            (mean, squares / (n - 1.0))
        })
        .unzip()
}

// ---- FLAP from its definitions, sharing nothing with the crate but the profile's numbers ----

struct Flap<'a> {
    model: &'a ReferenceModel,
    profile: &'a Profile,
}

impl Flap<'_> {
    /// WIFV of every input feature: variance times the squared column norm.
    fn wifv(
        &self,
        linear: &crate::common::reference::ReferenceLinear,
        stats: &FeatureStats,
    ) -> Vec<f64> {
        (0..linear.cols)
            .map(|j| {
                let norm: f64 = (0..linear.rows)
                    .map(|i| linear.weight[i * linear.cols + j].powi(2))
                    .sum();
                stats.variance(j) * norm
            })
            .collect()
    }

    /// All units as (score, layer, is a channel, number), lowest score first.
    fn units(&self) -> Vec<(f64, usize, bool, usize)> {
        let mut units = Vec::new();
        for (l, layer) in self.model.layers.iter().enumerate() {
            let standardise = |x: Vec<f64>| -> Vec<f64> {
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                let std = (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>()
                    / (x.len() - 1) as f64)
                    .sqrt();
                x.into_iter().map(|v| (v - mean) / std).collect()
            };
            let e = self.model.head_dim;
            let squares = self
                .wifv(&layer.o, &self.profile.layers[l].attention)
                .into_iter()
                .map(|v| v * v)
                .collect();
            let features = standardise(squares);
            for h in 0..layer.heads {
                let score = features[h * e..(h + 1) * e].iter().sum::<f64>() / e as f64;
                units.push((score, l, false, h));
            }
            let channels = standardise(self.wifv(&layer.down, &self.profile.layers[l].mlp));
            units.extend(
                channels
                    .into_iter()
                    .enumerate()
                    .map(|(c, score)| (score, l, true, c)),
            );
        }
        units.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap());
        units
    }

    /// Parameters of attention and MLP weights that are left without the given units.
    fn parameters_without(&self, gone: &BTreeSet<(usize, bool, usize)>) -> usize {
        let (d, e) = (self.model.embedding_length, self.model.head_dim);
        let mut left = 0;
        for (l, layer) in self.model.layers.iter().enumerate() {
            let heads: Vec<usize> = (0..layer.heads)
                .filter(|h| !gone.contains(&(l, false, *h)))
                .collect();
            let groups: BTreeSet<usize> = heads
                .iter()
                .map(|h| h * layer.kv_heads / layer.heads)
                .collect();
            let channels = (0..layer.gate.rows)
                .filter(|c| !gone.contains(&(l, true, *c)))
                .count();
            left += 2 * heads.len() * e * d + 2 * groups.len() * e * d + 3 * channels * d;
        }
        left
    }

    /// The threshold whose ratio comes closest, tried one by one.
    fn gone(&self, ratio: f64) -> BTreeSet<(usize, bool, usize)> {
        let total = self.parameters_without(&BTreeSet::new()) as f64;
        let mut gone = BTreeSet::new();
        let mut best = (ratio, gone.clone());
        for (_, l, channel, unit) in self.units() {
            gone.insert((l, channel, unit));
            let reached = 1.0 - self.parameters_without(&gone) as f64 / total;
            if (reached - ratio).abs() < best.0 {
                best = ((reached - ratio).abs(), gone.clone());
            }
        }
        best.1
    }
}

fn gone_of(plan: &Plan, model: &ReferenceModel) -> BTreeSet<(usize, bool, usize)> {
    let mut gone = BTreeSet::new();
    for (l, (kept, layer)) in plan.layers.iter().zip(&model.layers).enumerate() {
        gone.extend(
            (0..layer.heads)
                .filter(|h| !kept.heads.contains(h))
                .map(|h| (l, false, h)),
        );
        gone.extend(
            (0..layer.gate.rows)
                .filter(|c| !kept.channels.contains(c))
                .map(|c| (l, true, c)),
        );
    }
    gone
}

fn shapes() -> Vec<Shape> {
    let three = |heads: usize, kv: usize| Shape {
        heads: vec![heads; 3],
        kv_heads: vec![kv; 3],
        channels: vec![90, 50, 120],
        seed: (heads * 10 + kv) as u64,
        ..Shape::default()
    };
    vec![
        three(4, 4),
        three(4, 2),
        three(9, 3),
        Shape {
            biases: true,
            ..three(6, 2)
        },
        Shape {
            tied: false,
            ..three(5, 1)
        },
    ]
}

#[test]
fn masks_are_those_of_the_definition() {
    for shape in shapes() {
        let synthetic = Synthetic::new(shape);
        let model = synthetic.load();
        let profile = random_profile(&model);
        let reference = Flap {
            model: &synthetic.reference,
            profile: &profile,
        };
        for ratio in [0.05, 0.2, 0.3, 0.5, 0.7, 0.89] {
            let plan = flap_plan(&model, &profile, ratio);
            assert_eq!(
                gone_of(&plan, &synthetic.reference),
                reference.gone(ratio),
                "ratio {ratio}"
            );
        }
    }
}

/// The definition's masks and biases put into the dense reference.
fn masked(reference: &ReferenceModel, profile: &Profile, plan: &Plan) -> ReferenceModel {
    let mut masked = reference.clone();
    let e = reference.head_dim;
    for (l, layer) in masked.layers.iter_mut().enumerate() {
        let (kept, stats) = (&plan.layers[l], &profile.layers[l]);
        let features: Vec<usize> = (0..layer.heads * e)
            .filter(|j| !kept.heads.contains(&(j / e)))
            .collect();
        let channels: Vec<usize> = (0..layer.gate.rows)
            .filter(|c| !kept.channels.contains(c))
            .collect();
        for (linear, stats, gone) in [
            (&mut layer.o, &stats.attention, features),
            (&mut layer.down, &stats.mlp, channels),
        ] {
            let bias: Vec<f64> = (0..linear.rows)
                .map(|i| {
                    gone.iter()
                        .map(|&j| linear.weight[i * linear.cols + j] * stats.mean(j))
                        .sum()
                })
                .collect();
            linear.mask_columns(&gone);
            linear.add_bias(&bias);
        }
    }
    masked
}

/// How far a pruned model is from the dense reference with masks and biases.
fn error_beside_masked(
    model: &Model,
    reference: &ReferenceModel,
    profile: &Profile,
    plan: &Plan,
) -> f64 {
    let tokens = Random::new(5).tokens(30, model.config.vocabulary);
    let (expected, _) = masked(reference, profile, plan).forward(&tokens);
    relative_error(&logits(model, &runtime(2), &tokens), &expected)
}

#[test]
fn prune_then_run_equals_mask_and_add_bias_and_run_dense() {
    for shape in shapes() {
        let synthetic = Synthetic::new(shape);
        for ratio in [0.1, 0.3, 0.6, 0.85] {
            let mut model = synthetic.load();
            let profile = random_profile(&model);
            let plan = prune::flap(&mut model, &runtime(2), &profile, ratio, &mut ignore).unwrap();
            let error = error_beside_masked(&model, &synthetic.reference, &profile, &plan);
            assert!(error < 2e-3, "ratio {ratio}: relative error {error}");
        }
    }
}

#[test]
fn restoration_brings_the_output_closer_to_the_dense_one() {
    let synthetic = Synthetic::new(Shape::default());
    let tokens = calibration_tokens(synthetic.shape.vocabulary);
    let dense = synthetic.load();
    let profile = random_profile(&dense);
    let plan = flap_plan(&dense, &profile, 0.5);
    let (expected, _) = synthetic.reference.forward(&tokens[..100]);
    let error_with = |how| {
        let mut model = synthetic.load();
        restore_and_apply(&mut model, &profile, &plan, how);
        relative_error(&logits(&model, &runtime(1), &tokens[..100]), &expected)
    };
    let [none, bias, lsq] = [Restore::None, Restore::Bias, Restore::Lsq].map(error_with);
    assert!(
        lsq < bias && bias < none,
        "{lsq} with least squares, {bias} with biases, {none} without restoration"
    );
}

#[test]
fn a_layer_may_lose_all_its_heads_or_all_its_channels() {
    let synthetic = Synthetic::new(Shape::default());
    let mut model = synthetic.load();
    let profile = random_profile(&model);
    let plan = Plan {
        layers: vec![
            LayerPlan {
                heads: vec![],
                channels: (0..96).collect(),
                ..LayerPlan::default()
            },
            LayerPlan {
                heads: vec![1],
                channels: vec![],
                ..LayerPlan::default()
            },
        ],
        removed: 0,
        total: 1,
    };
    restore_and_apply(&mut model, &profile, &plan, Restore::Bias);
    assert_eq!(
        (
            model.layers[0].heads(),
            model.layers[0].kv_heads(),
            model.layers[1].channels()
        ),
        (0, 0, 0)
    );
    let error = error_beside_masked(&model, &synthetic.reference, &profile, &plan);
    assert!(error < 2e-3, "relative error {error}");
}

#[test]
fn a_pruned_model_can_be_pruned_again() {
    let synthetic = Synthetic::new(Shape {
        heads: vec![9, 9],
        kv_heads: vec![3, 3],
        ..Shape::default()
    });
    let tokens = calibration_tokens(synthetic.shape.vocabulary);
    let mut model = synthetic.load();
    let mut sizes = vec![model.layer_parameters()];
    for _ in 0..3 {
        let profile = random_profile(&model);
        let plan = prune::flap(&mut model, &runtime(2), &profile, 0.25, &mut ignore).unwrap();
        assert_eq!(plan.total, sizes[sizes.len() - 1]);
        assert_eq!(plan.total - plan.removed, model.layer_parameters());
        sizes.push(model.layer_parameters());
        assert!(
            logits(&model, &runtime(2), &tokens[..20])
                .iter()
                .all(|l| l.is_finite())
        );
    }
    assert!(sizes.windows(2).all(|w| w[1] < w[0]));
}

// ---- block formats ----

#[test]
fn every_weight_type_is_pruned_in_whole_blocks_and_keeps_its_type() {
    for (block_type, tolerance) in [
        (BlockType::F16, 3e-3),
        (BlockType::BF16, 3e-3),
        // Packed weights meet 8-bit activations in batches too.
        (BlockType::Q8_0, 4e-2),
        (BlockType::Q5_0, 0.12),
        (BlockType::Q5_1, 0.12),
        (BlockType::IQ4_NL, 0.2),
        (BlockType::Q4_1, 0.2),
        (BlockType::Q4_0, 0.2),
    ] {
        // Heads of 16 values: two fill a block, so heads must go in pairs where the type has blocks.
        for (head_dim, heads, kv) in [(32, 6, 2), (16, 8, 4)] {
            let synthetic = Synthetic::new(Shape {
                block_type,
                head_dim,
                rope_dim: head_dim,
                heads: vec![heads; 2],
                kv_heads: vec![kv; 2],
                channels: vec![320, 256],
                ..Shape::default()
            });
            for packed in [false, true] {
                let mut model = synthetic.load_packed_if(packed);
                let profile = random_profile(&model);
                let plan =
                    prune::flap(&mut model, &runtime(2), &profile, 0.4, &mut ignore).unwrap();
                for layer in &model.layers {
                    let block = block_type.block_len();
                    assert!(
                        layer.channels().is_multiple_of(block)
                            && layer.o.weight.cols.is_multiple_of(block)
                    );
                    assert!(
                        layer
                            .linears()
                            .iter()
                            .all(|l| l.weight.block_type == block_type)
                    );
                }
                assert!((plan.ratio() - 0.4).abs() < 0.05, "{}", plan.ratio());
                let error = error_beside_masked(&model, &synthetic.reference, &profile, &plan);
                assert!(
                    error < tolerance,
                    "{block_type:?}, heads of {head_dim}, packed {packed}: relative error {error}"
                );
            }
        }
    }
}

#[test]
fn heads_of_whole_blocks_move_without_being_encoded_anew() {
    let synthetic = Synthetic::new(Shape {
        block_type: BlockType::Q4_0,
        head_dim: 32,
        rope_dim: 32,
        ..Shape::default()
    });
    let dense = synthetic.load();
    let mut model = synthetic.load();
    let all = |n| (0..n).collect::<Vec<usize>>();
    let plan = Plan {
        layers: vec![
            LayerPlan {
                heads: vec![0, 3],
                channels: all(96),
                ..LayerPlan::default()
            },
            LayerPlan {
                heads: vec![2],
                channels: all(96),
                ..LayerPlan::default()
            },
        ],
        removed: 0,
        total: 1,
    };
    let none = vec![prune::LayerRestoration::default(); 2];
    prune::apply(&mut model, &runtime(1), &plan, &none, &mut ignore).unwrap();
    for (l, kept) in plan.layers.iter().enumerate() {
        let (was, is) = (&dense.layers[l].o.weight, &model.layers[l].o.weight);
        for row in 0..was.rows {
            let blocks: Vec<u8> = kept
                .heads
                .iter()
                .flat_map(|h| {
                    dense.map.bytes()[was.range.clone()][row * was.row_bytes() + h * 18..][..18]
                        .to_vec()
                })
                .collect();
            assert_eq!(
                model.map.bytes()[is.range.clone()][row * is.row_bytes()..][..is.row_bytes()],
                blocks
            );
        }
        // What is not pruned is untouched, and shares its pages with the file.
        let (was, is) = (&dense.layers[l].down.weight, &model.layers[l].down.weight);
        assert_eq!(was, is);
        assert_eq!(
            dense.map.bytes()[was.range.clone()],
            model.map.bytes()[is.range.clone()]
        );
    }
    assert_eq!(model.layers[0].group_sizes, [1, 1]);
    assert_eq!(model.layers[1].group_sizes, [1]);
}

// ---- in place ----

#[test]
fn pruning_gives_memory_back_and_never_touches_the_file() {
    let synthetic = Synthetic::new(Shape {
        block_type: BlockType::Q8_0,
        embedding: 256,
        head_dim: 64,
        rope_dim: 64,
        heads: vec![8; 3],
        kv_heads: vec![4; 3],
        channels: vec![2048; 3],
        ..Shape::default()
    });
    let before = std::fs::read(&synthetic.path).unwrap();
    let mut model = synthetic.load();
    let profile = random_profile(&model);
    let dense = (model.bytes(), model.map.residency());
    prune::flap(&mut model, &runtime(2), &profile, 0.5, &mut ignore).unwrap();
    assert_eq!(
        std::fs::read(&synthetic.path).unwrap(),
        before,
        "the file is as it was"
    );
    let Some(now) = model.map.residency() else {
        crate::common::skip("this system does not tell how much of a map is resident");
        return;
    };
    let freed = (dense.0 - model.bytes()) as u64;
    let was = dense.1.expect("told before").resident;
    // All but the odd page at either end of each of 21 tensors.
    let slack = 21 * 2 * 4096;
    assert!(
        now.resident <= was - freed + slack,
        "{} of {was} resident, {freed} freed",
        now.resident
    );
    assert!(
        now.private <= model.bytes() as u64 + slack,
        "{} private",
        now.private
    );
}

// ---- what can go wrong ----

#[test]
fn ratios_out_of_range_are_refused_and_zero_removes_nothing() {
    let synthetic = Synthetic::new(Shape::default());
    let mut model = synthetic.load();
    let profile = random_profile(&model);
    for ratio in [-0.1, 0.9, 1.0, f64::NAN, f64::INFINITY] {
        let result = prune::flap(&mut model, &runtime(1), &profile, ratio, &mut ignore);
        let kind = result.map_err(|error| error.kind);
        assert!(matches!(kind, Err(PruneErrorKind::Ratio(_))), "{ratio}");
    }
    let tokens = Random::new(5).tokens(30, synthetic.shape.vocabulary);
    let before = logits(&model, &runtime(1), &tokens);
    let plan = prune::flap(&mut model, &runtime(1), &profile, 0.0, &mut ignore).unwrap();
    assert_eq!(plan.removed, 0);
    assert_eq!(logits(&model, &runtime(1), &tokens), before);
}

#[test]
fn too_little_text_is_refused() {
    let model = Synthetic::new(Shape::default()).load();
    for n in [0, 1, calibrate::LEAST_TOKENS - 1] {
        let tokens = vec![1; n];
        let text = text_for_biases(&tokens);
        let error = prune::calibrate(&model, &runtime(1), text, &mut ignore).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("at least 128") && !message.contains("--"),
            "{message}"
        );
        assert!(matches!(error.kind, PruneErrorKind::TooShort { tokens, .. } if tokens == n));
    }
}

#[test]
fn a_profile_of_another_shape_is_refused() {
    let synthetic = Synthetic::new(Shape::default());
    let other = Synthetic::new(Shape {
        channels: vec![96, 64],
        ..Shape::default()
    })
    .load();
    let profile = random_profile(&other);
    let mut model = synthetic.load();
    let error = prune::flap(&mut model, &runtime(1), &profile, 0.3, &mut ignore).unwrap_err();
    assert!(error.to_string().contains("layer 1"), "{error}");
}

#[test]
fn activations_that_are_not_numbers_are_refused_with_their_layer() {
    let synthetic = Synthetic::new(Shape::default());
    let mut model = synthetic.load();
    let range = model.layers[1].gate.weight.range.clone();
    model.map.bytes_mut()[range][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let tokens = calibration_tokens(50);
    let text = text_for_biases(&tokens);
    let error = prune::calibrate(&model, &runtime(1), text, &mut ignore).unwrap_err();
    assert!(
        matches!(
            error.kind,
            PruneErrorKind::NotFinite {
                layer: 1,
                module: Module::Mlp
            }
        ),
        "{error}"
    );
}

// ---- the real model ----

#[test]
fn the_default_model_reaches_the_ratio_and_stays_a_language_model() {
    let Some(text) = crate::common::shared("data/wikitext-2/dev.raw") else {
        return;
    };
    let file = GgufFile::open(crate::common::default_model()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let mut model = Model::load(file).unwrap();
    let runtime = runtime(2);
    model.pack(&runtime);
    let text: String = std::fs::read_to_string(text)
        .unwrap()
        .chars()
        .take(12_000)
        .collect();
    let text = tokenizer.encode(&text).unwrap();
    let options = PerplexityOptions {
        context: 512,
        chunks: Some(4),
        all_positions: true,
        cache_type: CacheType::F16,
    };
    let measure = |model: &Model| {
        perplexity(model, &runtime, &text, None, options, &mut ignore)
            .unwrap()
            .perplexity
    };

    let dense = measure(&model);
    let tokens = tokenizer.encode(calibrate::TEXT).unwrap();
    assert!(
        tokens.len() >= 8000,
        "the built-in text has {} tokens",
        tokens.len()
    );
    let profile = profile_of(&model, text_for_biases(&tokens[..4096]));
    let plan = prune::flap(&mut model, &runtime, &profile, 0.2, &mut ignore).unwrap();
    assert!((plan.ratio() - 0.2).abs() < 0.002, "{}", plan.ratio());
    let pruned = measure(&model);
    // An untrained model would be at the size of the vocabulary, 49152.
    assert!(
        pruned > dense && pruned < 3.5 * dense,
        "dense {dense}, pruned {pruned}"
    );
}

#[test]
#[ignore = "a measurement that takes minutes; FLAPJACK_F16 names the default model in half precision"]
fn four_bits_cost_little_beside_the_same_pruning_in_half_precision() {
    let text = crate::common::shared("data/wikitext-2/dev.raw").expect("the text");
    let text: String = std::fs::read_to_string(text)
        .unwrap()
        .chars()
        .take(60_000)
        .collect();
    let half = std::env::var_os("FLAPJACK_F16").expect("the model in half precision");
    let runtime = runtime(2);
    let mut plan = None;
    let mut figures = Vec::new();
    // The plan is made for whole blocks of four bits.
    for path in [crate::common::default_model(), half.into()] {
        let file = GgufFile::open(&path).unwrap();
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        let mut model = Model::load(file).unwrap();
        model.pack(&runtime);
        let options = PerplexityOptions {
            context: 512,
            chunks: Some(16),
            all_positions: false,
            cache_type: CacheType::F16,
        };
        let tokens = tokenizer.encode(&text).unwrap();
        let measure = |model: &Model| {
            let result = perplexity(model, &runtime, &tokens, None, options, &mut ignore);
            result.unwrap().perplexity
        };
        let dense = measure(&model);
        let calibration = tokenizer.encode(calibrate::TEXT).unwrap();
        let profile = profile_of(&model, crate::common::pruning::text(&calibration));
        let plan = plan.get_or_insert_with(|| flap_plan(&model, &profile, 0.3));
        restore_and_apply(&mut model, &profile, plan, Restore::Lsq);
        figures.push((dense, measure(&model)));
    }
    println!("dense and pruned, four bits and half precision: {figures:?}");
    let cost = figures[0].1 / figures[1].1;
    assert!(cost < 1.03, "{cost}");
}
