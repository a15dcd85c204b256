//! The form of what has lost single weights: sparse, or dense with zeros where that is faster; and forms in another type than before
//! done again.

use std::fs;

use flapjack::engine::{
    EngineError, PruneOptions, SparseOptions, SyntheticType, TINY, Target, ignore, write_synthetic,
};
use flapjack::kernels::{Isa, Kernels, Reading, Runtime};
use flapjack::model::{self, Model};
use flapjack::progress;
use flapjack::prune::sparse::{
    self, LayerProjection, Pattern, Removal, SparseForm, SparseMethod, Sparsity, has_zero,
    stays_dense,
};
use flapjack::prune::{LayerPlan, Outcome, Plan, PruneErrorKind, SingleRecord};
use flapjack::quant::BlockType;

use crate::common::Random;
use crate::common::engine::{Workshop, flap, tokens};
use crate::common::program::{program, run_with_input, succeeded};
use crate::common::pruning::{assert_same, columns, outcome_key};
use crate::common::synthetic::{Shape, Synthetic, each_runtime, logits_in_batches, runtime};

/// The types that have a sparse form, and one that has none.
const TYPES: [BlockType; 8] = [
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q8_0,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::IQ4_NL,
    BlockType::Q4_K,
    BlockType::Q6_K,
];

fn wide(block_type: BlockType) -> Synthetic {
    Synthetic::new(Shape {
        embedding: 256,
        head_dim: 64,
        rope_dim: 16,
        channels: vec![256; 2],
        block_type,
        ..Shape::default()
    })
}

/// Half of all weights by norms, which are the same whatever the kernels.
fn halve(model: &mut Model, runtime: &Runtime, form: SparseForm) {
    let patterns = vec![Pattern::Share(0.5); 2 * model.layers.len()];
    let removal = Removal {
        method: SparseMethod::Magnitude,
        form,
        patterns: &patterns,
        text: None,
    };
    sparse::sparsify(model, runtime, removal, &mut progress::ignore).unwrap();
}

fn projections(model: &Model) -> impl Iterator<Item = LayerProjection> {
    (0..model.layers.len()).flat_map(LayerProjection::all)
}

/// By look-up, four bits take longer to spread than to read, and eight bits where dense weights come fast. Only types with a code for 0 can
/// have zeros.
#[test]
fn what_stays_dense_depends_on_the_instruction_set_and_on_how_fast_dense_weights_come() {
    for kernels in Isa::available().filter_map(Kernels::for_isa) {
        let looks_up = matches!(kernels.isa(), Isa::Avx2 | Isa::AvxVnni);
        // The way that a measurement found the fastest does not matter: what a file is made into must not depend on that.
        let usual = Reading::usual();
        let other = Reading {
            fetches: !usual.fetches,
            ..usual
        };
        for kernels in [kernels, kernels.reading(other)] {
            for block_type in TYPES {
                let slower = match block_type {
                    BlockType::Q4_0 => looks_up,
                    BlockType::Q8_0 => looks_up && !usual.fetches,
                    _ => false,
                };
                let name = format!("{} on {}", block_type.name(), kernels.isa().name());
                assert_eq!(
                    stays_dense(SparseForm::Auto, kernels, block_type),
                    slower,
                    "{name}"
                );
                assert!(!stays_dense(SparseForm::Sparse, kernels, block_type));
            }
        }
    }
}

#[test]
fn types_stay_dense_with_zeros_where_the_sparse_form_is_slower() {
    let tokens = Random::new(4).tokens(5, Shape::default().vocabulary);
    for (runtime, _) in each_runtime(2, 1e-4) {
        let kernels = runtime.kernels;
        for block_type in TYPES {
            let name = format!("{} on {}", block_type.name(), kernels.isa().name());
            let synthetic = wide(block_type);
            let made = |form| {
                let mut model = synthetic.load_packed_if(true);
                halve(&mut model, &runtime, form);
                model
            };
            let [auto, sparse, zeros] =
                [SparseForm::Auto, SparseForm::Sparse, SparseForm::Zeros].map(made);
            let dense = stays_dense(SparseForm::Auto, kernels, block_type);
            let has_form = block_type.has_sparse();
            for which in projections(&auto) {
                let [a, s] = [&auto, &sparse].map(|model| which.weight(model));
                assert_eq!(a.is_sparse(), has_form && !dense, "{name}");
                assert_eq!(
                    s.is_sparse(),
                    has_form,
                    "what was asked for goes first: {name}"
                );
                assert_eq!(a.block_type, block_type, "{name}");
                assert!(
                    a.decode(&auto.map) == s.decode(&sparse.map),
                    "{name}: {which}"
                );
            }
            // What it takes is known beforehand.
            let expected = |form| {
                let pattern = Pattern::Share(0.5);
                let of = |bytes: usize| {
                    sparse::expected_bytes(form, kernels, pattern, (block_type, bytes, 256))
                };
                of(256)
            };
            let like = if dense {
                SparseForm::Zeros
            } else {
                SparseForm::Sparse
            };
            assert_eq!(expected(SparseForm::Auto), expected(like), "{name}");
            if dense {
                assert_same(&auto, &zeros);
                let all = |model| logits_in_batches(model, &runtime, &tokens, &[2, 1, 1, 1]);
                let (a, s) = (all(&auto), all(&sparse));
                let largest = s.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let far = a.iter().zip(&s).map(|(a, s)| (a - s).abs());
                assert!(far.fold(0.0, f32::max) <= 1e-3 * largest, "{name}");
            }
        }
    }
}

/// A type without a code for 0 and without a sparse form becomes Q8_0, sparse or with zeros, behind everything else in the map.
#[test]
fn projections_in_another_type_than_before_are_done_again_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("an.outcome");
    let runtime = &runtime(2);
    for block_type in [BlockType::Q5_1, BlockType::Q4_1, BlockType::Q8_0] {
        for (form, packed) in [
            (SparseForm::Sparse, false),
            (SparseForm::Sparse, true),
            (SparseForm::Zeros, false),
            (SparseForm::Zeros, true),
        ] {
            let name = format!("{} {form} {packed}", block_type.name());
            let synthetic = wide(block_type);
            let mut model = synthetic.load_packed_if(packed);
            let layers = model.layers.iter().map(|layer| LayerPlan {
                heads: (0..layer.heads()).collect(),
                channels: (0..layer.channels()).collect(),
                types: [None; 2],
            });
            let plan = Plan {
                layers: layers.collect(),
                removed: 0,
                total: model.layer_parameters(),
            };
            let outcome = Outcome::of(&model, &columns(&model), plan, 0.0, None);
            halve(&mut model, runtime, form);
            let changed = which_type(&model) != block_type;
            let sparse = form == SparseForm::Sparse && block_type.has_sparse();
            assert_eq!(changed, !has_zero(block_type) && !sparse, "{name}");
            let record = SingleRecord {
                tokens: 0,
                shares: vec![0.5; 4],
                removed: vec![7; 2],
                curves: None,
            };
            let key = outcome_key();
            outcome
                .save(&path, &key, "model", Some((&model, &record)))
                .unwrap();

            let single = Outcome::load(&path, &key).unwrap().single.unwrap();
            // Weights may be packed now that were not then, and the other way round.
            for packed_again in [packed, !packed] {
                let mut again = synthetic.load_packed_if(packed_again);
                single
                    .apply(&mut again, runtime, &mut progress::ignore)
                    .unwrap();
                for which in projections(&model) {
                    let (a, b) = (which.weight(&model), which.weight(&again));
                    assert_eq!(a.block_type, b.block_type, "{name}: {which}");
                    assert!(
                        a.decode(&model.map) == b.decode(&again.map),
                        "{name}: {which}"
                    );
                }
                if packed_again == packed && !changed {
                    assert_same(&model, &again);
                }
            }
            // A model of other widths is left as it is.
            let mut other = Synthetic::new(Shape {
                block_type,
                ..Shape::default()
            })
            .load();
            let before = other.map.bytes().to_vec();
            let error = single
                .apply(&mut other, runtime, &mut progress::ignore)
                .unwrap_err();
            assert!(
                matches!(error.kind, PruneErrorKind::OtherShape(_)),
                "{name}"
            );
            assert!(other.map.bytes() == before, "{name}");
        }
    }
}

fn which_type(model: &Model) -> BlockType {
    let first = projections(model).next().unwrap();
    first.weight(model).block_type
}

/// Whether this machine can be told to take AVX2.
fn has_avx2() -> bool {
    let has = Isa::available().any(|isa| isa == Isa::Avx2);
    if !has {
        eprintln!("skipped: there is no AVX2");
    }
    has
}

#[test]
fn the_program_says_what_is_kept_dense_and_packs_it_all_the_same() {
    if !has_avx2() {
        return;
    }
    let workshop = Workshop::new();
    let model = workshop.path("four.gguf");
    // Small matrices gain nothing by the sparse form.
    let shape = model::Shape {
        embedding_length: 256,
        channels: 512,
        ..TINY
    };
    write_synthetic(&model, shape, SyntheticType::Q4_0).unwrap();
    let run = |isa: &str, arguments: &[&str]| {
        let mut command = program();
        command
            .args(arguments)
            .arg("-m")
            .arg(&model)
            .env("FLAPJACK_CACHE", workshop.path(""))
            .env("FLAPJACK_ISA", isa);
        succeeded(&run_with_input(command, b""))
    };
    let sparse = ["--sparse", "magnitude:0.5"];
    let generate = [&["run", "--raw", "-p", "a", "-n", "2"][..], &sparse].concat();
    // Also the second time, when it comes out of the cache.
    for _ in 0..2 {
        let said = run("avx2", &generate).1;
        assert!(
            said.contains("21 projections in Q4_0 are kept dense") && said.contains("on avx2"),
            "{said}"
        );
        assert!(said.contains("of the layers' weights are zero"), "{said}");
    }
    // Another instruction set has an outcome of its own.
    let said = run("generic", &generate).1;
    assert!(
        said.contains("gone, one by one") && !said.contains("kept dense"),
        "{said}"
    );
    let packed = workshop.path("packed.gguf");
    let packed = packed.to_str().unwrap();
    let said = run(
        "avx2",
        &["prune", sparse[0], sparse[1], "--pack", "-o", packed],
    )
    .1;
    assert!(
        said.contains("gone, one by one") && !said.contains("kept dense"),
        "{said}"
    );
    assert!(fs::metadata(packed).unwrap().len() < fs::metadata(&model).unwrap().len());
}

#[test]
fn patterns_and_targets_that_are_no_numbers_are_refused_by_the_engine() {
    let workshop = Workshop::new();
    for target in [
        Target::Speedup(f64::NAN),
        Target::Speedup(f64::INFINITY),
        Target::Speedup(0.0),
        Target::PerplexityRise(f64::NAN),
        Target::PerplexityRise(f64::INFINITY),
        Target::PerplexityRise(-0.1),
    ] {
        let error = workshop
            .try_prune(&PruneOptions { target, ..flap() })
            .unwrap_err();
        assert!(
            matches!(error, EngineError::Amount(_)),
            "{target:?}: {error}"
        );
    }
    for ratio in [f64::NAN, f64::INFINITY] {
        let target = Target::Ratio(ratio);
        let error = workshop
            .try_prune(&PruneOptions { target, ..flap() })
            .unwrap_err();
        let is_ratio = |kind: &PruneErrorKind| matches!(kind, PruneErrorKind::Ratio(_));
        assert!(
            matches!(&error, EngineError::Prune(e) if is_ratio(&e.kind)),
            "{error}"
        );
    }
    for pattern in [
        Pattern::Share(f64::NAN),
        Pattern::Share(0.0),
        Pattern::Share(1.0),
        Pattern::OfGroup { stay: 4, group: 4 },
        Pattern::OfGroup { stay: 0, group: 4 },
        Pattern::OfGroup { stay: 0, group: 0 },
    ] {
        let sparsity = Sparsity {
            method: SparseMethod::Magnitude,
            pattern,
        };
        let options = PruneOptions {
            target: Target::Ratio(0.0),
            sparse: Some(SparseOptions::from(sparsity)),
            calibration: tokens(512),
            ..PruneOptions::default()
        };
        let error = workshop.open().prune(&options, &mut ignore).unwrap_err();
        let is_pattern = |kind: &PruneErrorKind| matches!(kind, PruneErrorKind::Pattern(_));
        assert!(
            matches!(&error, EngineError::Prune(e) if is_pattern(&e.kind)),
            "{pattern:?}: {error}"
        );
    }
}
