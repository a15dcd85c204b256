//! Types with blocks of 256 values: where widths in between are better, the tensor changes to a type with blocks of 32, and
//! everything that tells or uses its bytes agrees.

use crate::common::blocks::{LONG_BLOCKS, there_and_back};
use crate::common::pruning::{
    assert_computes_the_same, assert_same, columns, export, outcome_key, profile_of, prune, recipe,
    text,
};
use crate::common::synthetic::{Shape, Synthetic, logits, runtime};
use crate::common::{Random, doubles, relative_error};
use flapjack::gguf::GgufFile;
use flapjack::model::Model;
use flapjack::progress::ignore;
use flapjack::prune::substitute::{choices, substitutes};
use flapjack::prune::{Outcome, Plan, Planner, Profile, Recipe, Restore, Structure};
use flapjack::quant::BlockType;

/// MLPs of two and three blocks.
fn synthetic(block_type: BlockType) -> Synthetic {
    Synthetic::new(Shape {
        block_type,
        embedding: 256,
        head_dim: 32,
        rope_dim: 32,
        heads: vec![8, 8],
        kv_heads: vec![4, 4],
        channels: vec![512, 768],
        ..Shape::default()
    })
}

fn profile(model: &Model) -> Profile {
    let tokens = Random::new(3).tokens(700, model.config.vocabulary);
    profile_of(model, text(&tokens))
}

fn pruned(model: &mut Model, recipe: Recipe, ratio: f64) -> Plan {
    let profile = profile(model);
    prune(model, &profile, text(&[]), recipe, ratio).unwrap()
}

/// Relative squared error of a row of Gaussian values.
fn error(block_type: BlockType) -> f64 {
    let values = Random::new(7).normals(1 << 14, 1.0);
    let decoded = there_and_back(block_type, &values);
    relative_error(&decoded, &doubles(&values)).powi(2)
}

#[test]
fn every_type_of_long_blocks_has_a_substitute_of_short_ones_and_of_no_lower_quality() {
    for block_type in BlockType::ALL {
        let all = substitutes(block_type);
        assert_eq!(all.is_empty(), block_type.block_len() < 256);
        for substitute in all {
            assert_eq!(substitute.block_len(), 32);
            assert!(substitute.row_bytes(256) > block_type.row_bytes(256));
        }
        let best = all.iter().map(|t| error(*t)).fold(f64::INFINITY, f64::min);
        assert!(
            all.is_empty() || best <= error(block_type),
            "{block_type:?}"
        );
    }
}

#[test]
fn only_long_blocks_leave_a_choice() {
    for block_type in [BlockType::F16, BlockType::Q4_1, BlockType::Q4_K] {
        let model = synthetic(block_type).load();
        let choices = choices(&model, &runtime(2), &profile(&model)).unwrap();
        assert_eq!(choices.len(), 4);
        let any = block_type == BlockType::Q4_K;
        assert!(choices.iter().all(|c| c.is_some() == any), "{block_type:?}");
    }
}

#[test]
fn plan_and_model_agree_on_widths_types_and_bytes() {
    let mut changed = Vec::new();
    for block_type in LONG_BLOCKS {
        let synthetic = synthetic(block_type);
        let probe = Random::new(9).tokens(30, synthetic.shape.vocabulary);
        let (expected, _) = synthetic.reference.forward(&probe);
        for packed in [false, true] {
            let profile = profile(&synthetic.load_packed_if(packed));
            for (structure, ratio) in [
                (Structure::AlAm, 0.3),
                (Structure::AlAm, 0.6),
                (Structure::UlUm, 0.62),
                (Structure::UlUm, 0.1),
            ] {
                let mut model = synthetic.load_packed_if(packed);
                let dense = model.bytes();
                let recipe = recipe(structure, Restore::Bias);
                let planner = Planner::new(&model, &runtime(2), &profile, recipe).unwrap();
                let planned = planner.plan(ratio).unwrap();
                let bytes = planned.bytes_after(&model);
                let plan = prune(&mut model, &profile, text(&[]), recipe, ratio).unwrap();
                assert_eq!(plan, planned);
                assert_eq!(model.bytes(), bytes, "{block_type:?} {structure} {ratio}");
                assert!(bytes <= dense);
                for (layer, kept) in model.layers.iter().zip(&plan.layers) {
                    for (linear, new) in [&layer.o, &layer.down].into_iter().zip(kept.types) {
                        let weight = &linear.weight;
                        assert_eq!(weight.block_type, new.unwrap_or(block_type));
                        // Whole blocks stay what they are.
                        assert_eq!(new.is_none(), weight.cols.is_multiple_of(256));
                        assert!(new.is_none_or(|t| substitutes(block_type).contains(&t)));
                        changed.extend(new);
                    }
                }
                // What stays computes as before, but for what went.
                let error = relative_error(&logits(&model, &runtime(2), &probe), &expected);
                assert!(error < 1.5, "{block_type:?} {structure} {ratio}: {error}");
            }
        }
    }
    // Q4_1 errs as much as Q4_K, give or take, and may be no choice.
    for new in [BlockType::Q4_0, BlockType::Q5_0, BlockType::Q5_1] {
        assert!(changed.contains(&new), "{new:?} in {changed:?}");
    }
}

/// A changed projection holds the columns that stay, as well as its new type can.
#[test]
fn a_changed_projection_holds_the_columns_that_stay() {
    let synthetic = synthetic(BlockType::Q2_K);
    for packed in [false, true] {
        let mut model = synthetic.load_packed_if(packed);
        let plan = pruned(&mut model, recipe(Structure::AlAm, Restore::None), 0.6);
        let mut changed = 0;
        for (l, kept) in plan.layers.iter().enumerate() {
            let Some(new) = kept.types[1] else { continue };
            let dense = &synthetic.reference.layers[l].down;
            let weight = &model.layers[l].down.weight;
            let expected: Vec<f64> = (0..weight.rows)
                .flat_map(|i| kept.channels.iter().map(move |j| (i, *j)))
                .map(|(i, j)| dense.weight[i * dense.cols + j])
                .collect();
            let error = relative_error(&weight.decode(&model.map), &expected);
            assert!(error < 0.1, "{new:?}: {error}");
            changed += 1;
        }
        assert!(changed > 0);
    }
}

#[test]
fn an_outcome_and_a_file_bring_changed_types_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("an.outcome");
    let key = outcome_key();
    for block_type in [BlockType::Q2_K, BlockType::Q4_K] {
        let synthetic = synthetic(block_type);
        let mut model = synthetic.load();
        let dense = columns(&model);
        let plan = pruned(&mut model, recipe(Structure::AlAm, Restore::Lsq), 0.6);
        assert!(
            plan.layers.iter().any(|l| l.types != [None, None]),
            "{block_type:?}"
        );
        let outcome = Outcome::of(&model, &dense, plan, 0.6, None);
        outcome.save(&path, &key, "a.gguf", None).unwrap();
        let outcome = Outcome::load(&path, &key).unwrap();
        let mut again = synthetic.load();
        again.pack(&runtime(2));
        outcome.apply(&mut again, &runtime(2), &mut ignore).unwrap();
        again.unpack(&runtime(2));
        assert_same(&model, &again);

        let source = GgufFile::open(&synthetic.path).unwrap();
        let file = folder.path().join("pruned.gguf");
        export(&model, &source, &file);
        let written = Model::load(GgufFile::open(&file).unwrap()).unwrap();
        for (a, b) in model.layers.iter().zip(&written.layers) {
            for (x, y) in [(&a.o, &b.o), (&a.down, &b.down)] {
                assert_eq!(x.weight.cols, y.weight.cols);
                // A module that lost everything has no tensor in the file, and so no type.
                if x.weight.cols > 0 {
                    assert_eq!(x.weight.block_type, y.weight.block_type);
                }
            }
        }
        assert_computes_the_same(&model, &written);
    }
}

#[test]
fn a_size_that_is_asked_for_is_kept_where_types_change() {
    for block_type in [BlockType::Q2_K, BlockType::Q6_K] {
        let model = synthetic(block_type).load();
        let profile = profile(&model);
        let recipe = recipe(Structure::AlAm, Restore::Bias);
        let planner = Planner::new(&model, &runtime(2), &profile, recipe).unwrap();
        let limit = model.bytes() * 7 / 10;
        let fits = |plan: &Plan| plan.bytes_after(&model) <= limit;
        let (ratio, plan) = planner.smallest_ratio(fits).unwrap().expect("a ratio");
        assert!(fits(&plan) && plan == planner.plan(ratio).unwrap());
    }
}
