//! Removing single weights: which of them go, that they are zero then and the others as they were, and what is refused.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use flapjack::engine::{
    Cache, Engine, EngineError, Event, GenerateOptions, Notice, OpenOptions, OutOfReach,
    PruneOptions, PruneReport, SparseOptions, Stage, SyntheticType, TINY, Target, TextSource,
    Unsuited, ignore, write_synthetic,
};
use flapjack::gguf::GgufFile;
use flapjack::model::{Model, Weight};
use flapjack::progress;
use flapjack::prune::sparse::{
    self, Allocate, LayerProjection, Pattern, Projection, Removal, SparseForm, SparseLayer,
    SparseMethod, Stream, has_zero, surgeon,
};
use flapjack::prune::{
    self, Calibration, Effort, Evidence, Found, InverseFactor, Method, PruneError, PruneErrorKind,
    Record,
};
use flapjack::quant::{BlockType, Layout};

use crate::common::engine::{Workshop, break_at, tokens};
use crate::common::program::{flapjack, stderr, succeeded};
use crate::common::pruning::{assert_same, correlated, profile_of, text};
use crate::common::reference::{ReferenceLinear, ReferenceModel};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use crate::common::{Random, peer, shared};

// ---- a naive pruning to compare with ----

/// What a layer's projections see of some sequences, a row per token: behind the attention norm, the attention output's, behind the
/// MLP norm, MLP down's.
type Inputs = [Vec<Vec<f64>>; 4];

/// The same of each projection.
fn input_of(projection: Projection) -> usize {
    match projection {
        Projection::Query | Projection::Key | Projection::Value => 0,
        Projection::Output => 1,
        Projection::Gate | Projection::Up => 2,
        Projection::Down => 3,
    }
}

/// What layer l of the reference sees. What is behind a norm is got by a head that is the identity behind an output norm that is that
/// norm.
fn inputs(reference: &ReferenceModel, sequences: &[&[u32]], l: usize) -> Inputs {
    let d = reference.embedding_length;
    let identity = (0..d * d).map(|i| f64::from(u8::from(i / d == i % d)));
    let mut before = reference.clone();
    before.output = Some(identity.collect());
    before.output_norm = reference.layers[l].attention_norm.clone();
    before.layers.truncate(l);
    let mut between = before.clone();
    between.output_norm = reference.layers[l].mlp_norm.clone();
    let mut half = reference.layers[l].clone();
    half.down.weight.fill(0.0);
    between.layers.push(half);
    let mut all = Inputs::default();
    for tokens in sequences {
        let rows = |model: &ReferenceModel| -> Vec<Vec<f64>> {
            let logits = model.forward(tokens).0;
            logits.chunks_exact(d).map(<[f64]>::to_vec).collect()
        };
        let seen = &reference.forward(tokens).1[l];
        all[0].extend(rows(&before));
        all[1].extend(seen.attention.iter().cloned());
        all[2].extend(rows(&between));
        all[3].extend(seen.mlp.iter().cloned());
    }
    all
}

fn linears(reference: &mut ReferenceModel, l: usize) -> [&mut ReferenceLinear; 7] {
    let layer = &mut reference.layers[l];
    [
        &mut layer.q,
        &mut layer.k,
        &mut layer.v,
        &mut layer.o,
        &mut layer.gate,
        &mut layer.up,
        &mut layer.down,
    ]
}

/// Wanda's scores by their definition, |w| ‖x‖.
fn scores(linear: &ReferenceLinear, inputs: &[Vec<f64>]) -> Vec<f64> {
    let norms: Vec<f64> = (0..linear.cols)
        .map(|j| inputs.iter().map(|x| x[j] * x[j]).sum::<f64>().sqrt())
        .collect();
    let weights = linear.weight.iter().enumerate();
    weights
        .map(|(at, w)| w.abs() * norms[at % linear.cols])
        .collect()
}

/// What goes by these scores: row by row, or group by group, the lowest.
fn lowest(scores: &[f64], cols: usize, pattern: Pattern) -> Vec<bool> {
    let (length, gone) = lengths(cols, pattern);
    let mut goes = vec![false; scores.len()];
    for (scores, goes) in scores.chunks(length).zip(goes.chunks_mut(length)) {
        let mut order: Vec<usize> = (0..length).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        order[..gone].iter().for_each(|j| goes[*j] = true);
    }
    goes
}

/// How many neighbours are compared, and how many of them go.
fn lengths(cols: usize, pattern: Pattern) -> (usize, usize) {
    match pattern {
        Pattern::Share(share) => (cols, (share * cols as f64) as usize),
        Pattern::OfGroup { stay, group } => (group, group - stay),
    }
}

// ---- helpers ----

fn sparsify(
    model: &mut Model,
    method: SparseMethod,
    pattern: Pattern,
    text: Option<Calibration>,
) -> Result<Vec<SparseLayer>, PruneError> {
    sparsify_to(SparseForm::Zeros, model, method, pattern, text)
}

fn sparsify_to(
    form: SparseForm,
    model: &mut Model,
    method: SparseMethod,
    pattern: Pattern,
    text: Option<Calibration>,
) -> Result<Vec<SparseLayer>, PruneError> {
    let patterns = vec![pattern; 2 * model.layers.len()];
    let removal = Removal {
        method,
        form,
        patterns: &patterns,
        text,
    };
    sparse::sparsify(model, &runtime(2), removal, &mut progress::ignore)
}

fn weights(model: &Model) -> Vec<(LayerProjection, &Weight)> {
    let layers = 0..model.layers.len();
    let all = layers.flat_map(LayerProjection::all);
    all.map(|which| (which, which.weight(model))).collect()
}

/// Numbers of tokens of the vocabulary of a small model.
fn some_tokens(n: usize) -> Vec<u32> {
    Random::new(8).tokens(n, Shape::default().vocabulary)
}

const PATTERNS: [Pattern; 4] = [
    Pattern::Share(0.5),
    Pattern::Share(0.3),
    Pattern::OfGroup { stay: 2, group: 4 },
    Pattern::OfGroup { stay: 5, group: 8 },
];

/// Whether as many weights of every row, and of every group, are gone as the pattern says.
fn assert_pattern(values: &[f32], cols: usize, pattern: Pattern, name: &str) {
    let zeros = |values: &[f32]| values.iter().filter(|v| **v == 0.0).count();
    for row in values.chunks_exact(cols) {
        match pattern {
            Pattern::Share(share) => {
                assert_eq!(zeros(row), (share * cols as f64) as usize, "{name}");
            }
            Pattern::OfGroup { stay, group } => {
                for group_values in row.chunks_exact(group) {
                    assert_eq!(zeros(group_values), group - stay, "{name}");
                }
            }
        }
    }
}

// ---- Wanda and norms ----

#[test]
fn wanda_removes_the_lowest_products_of_weight_and_input_layer_by_layer() {
    for pattern in PATTERNS {
        let synthetic = Synthetic::new(Shape::default());
        let dense = synthetic.load();
        let mut model = synthetic.load();
        // A sequence of the model's whole context, and a short one.
        let tokens = some_tokens(300);
        let sequences = [&tokens[..256], &tokens[256..]];
        sparsify(
            &mut model,
            SparseMethod::Wanda,
            pattern,
            Some(text(&tokens)),
        )
        .unwrap();

        let mut reference = synthetic.reference.clone();
        let (mut wrong, mut wrong_by_dense) = (0, 0);
        for l in 0..2 {
            let seen = inputs(&reference, &sequences, l);
            // Scored by what the dense model shows, the second layer would lose other weights.
            let seen_dense = inputs(&synthetic.reference, &sequences, l);
            for projection in Projection::ALL {
                let which = LayerProjection {
                    layer: l,
                    projection,
                };
                let (i, input) = (projection.index(), input_of(projection));
                let weight = which.weight(&model);
                let (is, was) = (
                    weight.decode(&model.map),
                    which.weight(&dense).decode(&dense.map),
                );
                for (is, was) in is.iter().zip(&was) {
                    assert!(*is == 0.0 || is.to_bits() == was.to_bits(), "{which}");
                }
                let linear = &mut linears(&mut reference, l)[i];
                let scores = scores(linear, &seen[input]);
                // Keys and values are in half precision, so that scores that are nearly equal may be in another order.
                let (length, gone) = lengths(weight.cols, pattern);
                for (is, scores) in is.chunks(length).zip(scores.chunks(length)) {
                    let zero = |zero: bool| {
                        let these = is
                            .iter()
                            .zip(scores)
                            .filter(move |(w, _)| (**w == 0.0) == zero);
                        these.map(|(_, score)| *score)
                    };
                    assert_eq!(zero(true).count(), gone, "{which}, {pattern}");
                    let highest = zero(true).fold(0.0, f64::max);
                    let lowest = zero(false).fold(f64::INFINITY, f64::min);
                    assert!(highest < 1.005 * lowest, "{which}, {pattern}");
                }
                let expected = lowest(&scores, weight.cols, pattern);
                let of_dense = self::scores(
                    linears(&mut synthetic.reference.clone(), l)[i],
                    &seen_dense[input],
                );
                let of_dense = lowest(&of_dense, weight.cols, pattern);
                let differ = |goes: &[bool]| {
                    let pairs = is.iter().zip(goes);
                    pairs.filter(|(w, goes)| (**w == 0.0) != **goes).count()
                };
                wrong += differ(&expected);
                wrong_by_dense += differ(&of_dense);
                for (w, is) in linears(&mut reference, l)[i].weight.iter_mut().zip(&is) {
                    *w = f64::from(*is);
                }
            }
        }
        assert!(
            wrong < 20 && wrong_by_dense > 10 * wrong.max(20),
            "{wrong} {wrong_by_dense}, {pattern}"
        );
    }
}

#[test]
fn the_pattern_holds_in_every_row_of_every_type_and_codes_that_stay_are_the_same() {
    let types = BlockType::ALL.into_iter();
    for block_type in types.filter(|block_type| has_zero(*block_type)) {
        let wide = block_type.block_len() > 32;
        let synthetic = Synthetic::new(Shape {
            embedding: if wide { 256 } else { 64 },
            head_dim: if wide { 64 } else { 16 },
            channels: if wide { vec![256; 2] } else { vec![96; 2] },
            rope_dim: 16,
            block_type,
            ..Shape::default()
        });
        let dense = synthetic.load();
        let tokens = some_tokens(200);
        for (n, pattern) in PATTERNS.into_iter().enumerate() {
            // By a method, from weights as they lie in the file and from packed ones.
            let method = [SparseMethod::Wanda, SparseMethod::Magnitude][n % 2];
            for packed in [false, true] {
                let mut model = synthetic.load_packed_if(packed);
                let done = sparsify(&mut model, method, pattern, Some(text(&tokens))).unwrap();
                for ((which, weight), (_, before)) in
                    weights(&model).into_iter().zip(weights(&dense))
                {
                    assert_eq!(weight.block_type, block_type);
                    let (is, was) = (weight.decode(&model.map), before.decode(&dense.map));
                    let name = format!("{which} in {}", block_type.name());
                    // Coarse types have zeros of their own, so that there may be more.
                    if block_type.is_float() {
                        assert_pattern(&is, weight.cols, pattern, &name);
                    }
                    for (is, was) in is.iter().zip(&was) {
                        assert!(*is == 0.0 || is.to_bits() == was.to_bits(), "{name}");
                    }
                }
                let removed: usize = done.iter().map(|layer| layer.removed).sum();
                let all: usize = weights(&model)
                    .iter()
                    .map(|(_, weight)| {
                        let gone = match pattern {
                            Pattern::Share(share) => (share * weight.cols as f64) as usize,
                            _ => (weight.cols as f64 * pattern.share()) as usize,
                        };
                        weight.rows * gone
                    })
                    .sum();
                assert_eq!(removed, all);
                assert!(done.iter().all(|layer| layer.types.is_empty()));
                assert_eq!(model.bytes(), dense.bytes());
            }
        }
    }
}

#[test]
fn types_without_a_code_for_zero_become_q8_0() {
    let types = BlockType::ALL.into_iter();
    for block_type in types.filter(|block_type| !has_zero(*block_type)) {
        let wide = block_type.block_len() > 32;
        let synthetic = Synthetic::new(Shape {
            embedding: if wide { 256 } else { 64 },
            head_dim: if wide { 64 } else { 16 },
            channels: if wide { vec![256; 2] } else { vec![96; 2] },
            rope_dim: 16,
            block_type,
            ..Shape::default()
        });
        let dense = synthetic.load();
        for (packed, method) in [
            (false, SparseMethod::Wanda),
            (true, SparseMethod::Magnitude),
            (true, SparseMethod::SparseGpt),
        ] {
            let mut model = synthetic.load_packed_if(packed);
            let pattern = Pattern::OfGroup { stay: 2, group: 4 };
            let tokens = some_tokens(200);
            let done = sparsify(&mut model, method, pattern, Some(text(&tokens))).unwrap();
            for ((which, weight), (_, before)) in weights(&model).into_iter().zip(weights(&dense)) {
                assert_eq!(weight.block_type, BlockType::Q8_0, "{}", block_type.name());
                let (is, was) = (weight.decode(&model.map), before.decode(&dense.map));
                for group in is.chunks_exact(4) {
                    let zeros = group.iter().filter(|v| **v == 0.0).count();
                    assert!(zeros >= 2, "{which} in {}", block_type.name());
                }
                let largest = was.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (is, was) in is.iter().zip(&was) {
                    let near = (is - was).abs() <= largest / 127.0;
                    let free = method == SparseMethod::SparseGpt;
                    assert!(*is == 0.0 || near || free, "{which}: {is} was {was}");
                }
            }
            for layer in &done {
                let [change] = &layer.types[..] else {
                    panic!("{layer:?}")
                };
                let told = (change.from, change.to, change.projections);
                assert_eq!(told, (block_type.name(), "Q8_0", 7));
            }
            // The rest of the model came along.
            let row = |model: &Model| {
                let mut row = vec![0.0; model.config.embedding_length];
                model.embedding.decode_row(&model.map, 3, &mut row);
                row
            };
            assert_eq!(row(&model), row(&dense));
            // Only Q8_1 is larger, by a sum for each block.
            let grows = block_type != BlockType::Q8_1;
            assert_eq!(model.bytes() > dense.bytes(), grows);
            // What the engine counts with: the whole model moves, and needs room for what it becomes.
            let counted = sparse::weight_bytes(&dense, SparseForm::Zeros) as usize;
            let layers: usize = model.layers.iter().map(|layer| layer.bytes()).sum();
            assert!((dense.bytes() + layers..dense.bytes() + layers + 64 * 14).contains(&counted));
        }
    }
}

/// A model whose rows are long enough to gain by the sparse form.
fn wide(block_type: BlockType) -> Synthetic {
    Synthetic::new(Shape {
        embedding: 256,
        head_dim: 64,
        channels: vec![512; 2],
        rope_dim: 16,
        block_type,
        ..Shape::default()
    })
}

#[test]
fn the_sparse_form_has_the_same_weights_as_zeros_in_fewer_bytes() {
    for block_type in BlockType::ALL {
        let synthetic = wide(block_type);
        let dense = synthetic.load();
        let tokens = some_tokens(200);
        for (n, pattern) in [Pattern::Share(0.6), Pattern::OfGroup { stay: 1, group: 4 }]
            .into_iter()
            .enumerate()
        {
            let method = [SparseMethod::Wanda, SparseMethod::Magnitude][n % 2];
            let name = format!("{} {pattern}", block_type.name());
            for packed in [false, true] {
                let mut zeros = synthetic.load_packed_if(packed);
                let with_zeros =
                    sparsify(&mut zeros, method, pattern, Some(text(&tokens))).unwrap();
                let mut model = synthetic.load_packed_if(packed);
                let (form, text) = (SparseForm::Sparse, Some(text(&tokens)));
                let done = sparsify_to(form, &mut model, method, pattern, text).unwrap();
                let keeps = block_type.has_sparse() || has_zero(block_type);
                assert_eq!(done[0].removed, with_zeros[0].removed, "{name}");
                assert_eq!(done[0].types.is_empty(), keeps, "{name}");
                let all = weights(&model).into_iter().zip(weights(&zeros));
                for (((which, weight), (_, zero)), (_, before)) in all.zip(weights(&dense)) {
                    let name = format!("{name}: {which}");
                    let sparse = block_type.has_sparse() || !has_zero(block_type);
                    assert_eq!(weight.is_sparse(), sparse, "{name}");
                    let is = weight.decode(&model.map);
                    if has_zero(block_type) {
                        // Behind the first layer inputs may differ in their last bits, and so may what goes.
                        if which.layer == 0 {
                            assert!(is == zero.decode(&zeros.map), "{name}");
                        }
                        assert!(!sparse || weight.bytes() < zero.bytes(), "{name}");
                    }
                    if keeps {
                        for (is, was) in is.iter().zip(before.decode(&dense.map)) {
                            assert!(*is == 0.0 || is.to_bits() == was.to_bits(), "{name}");
                        }
                    }
                    let gone = is.iter().filter(|v| **v == 0.0).count();
                    assert!(gone as f64 >= 0.59 * is.len() as f64, "{name}");
                }
            }
        }
    }
}

#[test]
fn what_would_not_be_smaller_has_zeros_instead() {
    for block_type in [BlockType::F16, BlockType::Q4_1, BlockType::Q4_0] {
        let synthetic = wide(block_type);
        let mut model = synthetic.load();
        // A bit for each weight is more than this saves.
        let pattern = Pattern::Share(0.03);
        let (form, text) = (SparseForm::Sparse, None);
        let done = sparsify_to(form, &mut model, SparseMethod::Magnitude, pattern, text).unwrap();
        assert!(
            weights(&model)
                .iter()
                .all(|(_, weight)| !weight.is_sparse())
        );
        let expected = if has_zero(block_type) {
            block_type
        } else {
            BlockType::Q8_0
        };
        for (which, weight) in weights(&model) {
            assert_eq!(weight.block_type, expected, "{which}");
            let zeros = weight
                .decode(&model.map)
                .iter()
                .filter(|v| **v == 0.0)
                .count();
            let gone = (pattern.share() * weight.cols as f64) as usize;
            assert!(zeros >= weight.rows * gone, "{which}");
        }
        assert!(done.iter().all(|layer| layer.removed > 0));
    }
}

#[test]
fn sparsegpt_encodes_what_stays_in_the_type_that_it_had() {
    for block_type in [
        BlockType::F16,
        BlockType::Q8_0,
        BlockType::Q4_0,
        BlockType::Q4_1,
    ] {
        let synthetic = wide(block_type);
        let dense = synthetic.load();
        let tokens = some_tokens(400);
        let mut model = synthetic.load();
        let (method, pattern) = (
            SparseMethod::SparseGpt,
            Pattern::OfGroup { stay: 2, group: 4 },
        );
        let (form, text) = (SparseForm::Sparse, Some(text(&tokens)));
        sparsify_to(form, &mut model, method, pattern, text).unwrap();
        for ((which, weight), (_, before)) in weights(&model).into_iter().zip(weights(&dense)) {
            assert!(
                weight.is_sparse() && weight.block_type == block_type,
                "{which}"
            );
            let (is, was) = (weight.decode(&model.map), before.decode(&dense.map));
            assert_pattern_at_least(&is, weight.cols, pattern);
            let changed = is
                .iter()
                .zip(&was)
                .filter(|(is, was)| **is != 0.0 && is != was);
            assert!(changed.count() > is.len() / 4, "{which}");
            // No value is out of all proportion.
            let most = was.iter().fold(0.0f32, |most, w| most.max(w.abs()));
            assert!(is.iter().all(|w| w.abs() <= 4.0 * most), "{which}");
        }
    }
}

// ---- SparseGPT ----

/// Algorithm 1 of the paper, with dense matrices and no blocks of rows: the mask and the weights.
fn sparsegpt(w: &[f32], cols: usize, h: &[f64], pattern: Pattern) -> Vec<f64> {
    let n = cols;
    let damp = 0.01 * (0..n).map(|j| h[j * n + j]).sum::<f64>() / n as f64;
    let mut h = h.to_vec();
    (0..n).for_each(|j| h[j * n + j] += damp);
    let upper = upper_cholesky(&inverse(&h, n), n);
    let mut w: Vec<f64> = w.iter().map(|w| f64::from(*w)).collect();
    let rows = w.len() / n;
    let mut gone = vec![false; w.len()];
    for begin in (0..n).step_by(128) {
        let end = (begin + 128).min(n);
        let cost = |w: &[f64], i: usize, j: usize| (w[i * n + j] / upper[j * n + j]).powi(2);
        if let Pattern::Share(share) = pattern {
            let mut order: Vec<usize> = (0..rows * (end - begin)).collect();
            let place = |at: usize| (at / (end - begin), begin + at % (end - begin));
            let cost = |at: usize| cost(&w, place(at).0, place(at).1);
            order.sort_by(|a, b| cost(*a).total_cmp(&cost(*b)));
            for at in &order[..(share * order.len() as f64) as usize] {
                let (i, j) = place(*at);
                gone[i * n + j] = true;
            }
        }
        for j in begin..end {
            for i in 0..rows {
                if let Pattern::OfGroup { stay, group } = pattern
                    && j % group == 0
                {
                    let mut order: Vec<usize> = (j..j + group).collect();
                    order.sort_by(|a, b| cost(&w, i, *a).total_cmp(&cost(&w, i, *b)));
                    for a in &order[..group - stay] {
                        gone[i * n + a] = true;
                    }
                }
                if gone[i * n + j] {
                    let error = w[i * n + j] / upper[j * n + j];
                    for k in j..n {
                        w[i * n + k] -= error * upper[j * n + k];
                    }
                    w[i * n + j] = 0.0;
                }
            }
        }
    }
    w
}

/// By Gauss and Jordan.
fn inverse(a: &[f64], n: usize) -> Vec<f64> {
    let mut a = a.to_vec();
    let mut b: Vec<f64> = (0..n * n)
        .map(|i| f64::from(u8::from(i / n == i % n)))
        .collect();
    for j in 0..n {
        let pivot = a[j * n + j];
        for k in 0..n {
            a[j * n + k] /= pivot;
            b[j * n + k] /= pivot;
        }
        for i in (0..n).filter(|i| *i != j) {
            let factor = a[i * n + j];
            for k in 0..n {
                a[i * n + k] -= factor * a[j * n + k];
                b[i * n + k] -= factor * b[j * n + k];
            }
        }
    }
    b
}

/// U of UᵀU = A.
fn upper_cholesky(a: &[f64], n: usize) -> Vec<f64> {
    let mut u = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            let sum: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
            let rest = a[i * n + j] - sum;
            u[i * n + j] = match i == j {
                true => rest.sqrt(),
                false => rest / u[i * n + i],
            };
        }
    }
    u
}

#[test]
fn sparsegpt_is_the_papers_algorithm() {
    // More columns than a block, and a last block that is not full.
    let (rows, cols) = (35, 200);
    let (_, moment) = correlated(600, cols);
    let weights = Random::new(9).normals(rows * cols, 1.0);
    for pattern in PATTERNS {
        let factor = InverseFactor::new(cols, |i, j| moment[i * cols + j]).expect("a factor");
        let surgery = surgeon::prune(&runtime(2), &factor, &weights, rows, pattern).unwrap();
        let expected = sparsegpt(&weights, cols, &moment, pattern);
        for (at, (is, expected)) in surgery.weights.iter().zip(&expected).enumerate() {
            let place = format!("{} {}, {pattern}", at / cols, at % cols);
            assert_eq!(
                surgery.mask.keep(at / cols, at % cols),
                *expected != 0.0,
                "{place}"
            );
            assert!(
                (f64::from(*is) - expected).abs() < 1e-4,
                "{place}: {is} {expected}"
            );
        }
    }
}

#[test]
fn sparsegpt_takes_inputs_that_are_always_zero() {
    let (rows, cols) = (5, 64);
    let (_, mut moment) = correlated(300, cols);
    for j in 0..cols {
        moment[7 * cols + j] = 0.0;
        moment[j * cols + 7] = 0.0;
    }
    let weights = Random::new(9).normals(rows * cols, 1.0);
    let factor = InverseFactor::new(cols, |i, j| moment[i * cols + j]).expect("a factor");
    let pattern = Pattern::Share(0.5);
    let surgery = surgeon::prune(&runtime(2), &factor, &weights, rows, pattern).unwrap();
    assert!((0..rows).all(|i| surgery.weights[i * cols + 7] == 0.0));
    assert_eq!(surgery.mask.removed(), rows * cols / 2);
}

#[test]
fn sparsegpt_errs_less_than_wanda_on_what_the_layer_sees() {
    // Of more words than inputs, so that the inputs are no combinations of a few.
    let synthetic = Synthetic::new(Shape {
        vocabulary: 600,
        ..Shape::default()
    });
    let dense = synthetic.load();
    let tokens = Random::new(8).tokens(1500, 600);
    let sequences: Vec<&[u32]> = tokens.chunks(256).collect();
    let seen = inputs(&synthetic.reference, &sequences, 0);
    for pattern in PATTERNS {
        // The squared error of the outputs of each projection of the first layer, which sees the same by both methods.
        let errors = |method| -> Vec<f64> {
            let mut model = synthetic.load();
            sparsify(&mut model, method, pattern, Some(text(&tokens))).unwrap();
            let all = weights(&model).into_iter().zip(weights(&dense)).take(7);
            all.map(|((which, weight), (_, before))| {
                let (is, was) = (weight.decode(&model.map), before.decode(&dense.map));
                assert_pattern_at_least(&is, weight.cols, pattern);
                let rows = is
                    .chunks_exact(weight.cols)
                    .zip(was.chunks_exact(weight.cols));
                let rows: Vec<Vec<f64>> = rows
                    .map(|(is, was)| is.iter().zip(was).map(|(a, b)| f64::from(a - b)).collect())
                    .collect();
                let of = |x: &Vec<f64>| {
                    let of_row = |row: &Vec<f64>| {
                        let sum: f64 = row.iter().zip(x).map(|(w, x)| w * x).sum();
                        sum * sum
                    };
                    rows.iter().map(of_row).sum::<f64>()
                };
                seen[input_of(which.projection)].iter().map(of).sum()
            })
            .collect()
        };
        let (ours, wandas) = (errors(SparseMethod::SparseGpt), errors(SparseMethod::Wanda));
        for (ours, wandas) in ours.iter().zip(&wandas) {
            assert!(ours < wandas, "{ours} {wandas}, {pattern}");
        }
    }
}

/// Whether at least as many weights are gone as the pattern says, by blocks of rows and columns.
fn assert_pattern_at_least(values: &[f32], cols: usize, pattern: Pattern) {
    let zeros = |values: &[f32]| values.iter().filter(|v| **v == 0.0).count();
    match pattern {
        Pattern::Share(share) => {
            let gone = (share * values.len() as f64) as usize;
            assert!(zeros(values) + cols >= gone);
        }
        Pattern::OfGroup { stay, group } => {
            for values in values.chunks_exact(group) {
                assert!(zeros(values) >= group - stay);
            }
        }
    }
}

// ---- what a layer sees ----

#[test]
fn a_stream_shows_the_inputs_of_all_projections() {
    let synthetic = Synthetic::new(Shape::default());
    let model = synthetic.load();
    let tokens = some_tokens(300);
    let sequences = [&tokens[..256], &tokens[256..]];
    let runtime = runtime(2);
    let mut stream = Stream::new(&model, &runtime, text(&tokens)).unwrap();
    for l in 0..2 {
        let expected = inputs(&synthetic.reference, &sequences, l);
        let seen = stream
            .observe(&model, &runtime, l, false, &mut || Ok(()))
            .unwrap();
        stream.pass(&model, &runtime, l, &mut || Ok(())).unwrap();
        for projection in Projection::ALL {
            let (stats, rows) = (seen.of(projection), &expected[input_of(projection)]);
            assert_eq!((stats.count() as usize, stats.len()), (300, rows[0].len()));
            for i in 0..stats.len() {
                let mean = |of: &dyn Fn(&Vec<f64>) -> f64| {
                    rows.iter().map(of).sum::<f64>() / rows.len() as f64
                };
                let square = mean(&|x| x[i] * x[i]);
                assert!(
                    (stats.mean_square(i) - square).abs() < 1e-2 * square,
                    "{projection:?} {l} {i}: {} {square}",
                    stats.mean_square(i)
                );
                let covariance = stats.covariance.as_ref().expect("it was asked for");
                // Rounded to bfloat16, about their mean.
                let j = (i * 7) % stats.len();
                let product = mean(&|x| x[i] * x[j]);
                let size = (square * mean(&|x| x[j] * x[j])).sqrt();
                let error = (covariance.second_moment(i, j) - product).abs();
                assert!(error < 1e-2 * size, "{projection:?} {i} {j}: {error}");
            }
        }
    }
}

// ---- refusals and cancelling ----

#[test]
fn groups_that_do_not_fill_rows_are_refused_and_nothing_is_changed() {
    let synthetic = Synthetic::new(Shape::default());
    let mut model = synthetic.load();
    let pattern = Pattern::OfGroup { stay: 1, group: 3 };
    let tokens = some_tokens(200);
    let error = sparsify(
        &mut model,
        SparseMethod::Wanda,
        pattern,
        Some(text(&tokens)),
    )
    .unwrap_err();
    assert!(error.is_untouched());
    let words = error.to_string();
    assert!(
        words.contains("groups of 3")
            && words.contains("the query projection of layer 0")
            && words.contains("64"),
        "{words}"
    );
    for (text, words) in [
        (None, "reads the calibration text itself"),
        (Some(text(&tokens[..100])), "at least 128 are needed"),
    ] {
        let error = sparsify(&mut model, SparseMethod::Wanda, Pattern::Share(0.5), text);
        let error = error.unwrap_err();
        assert!(
            error.is_untouched() && error.to_string().contains(words),
            "{error}"
        );
    }
    assert_same(&model, &synthetic.load());
}

#[test]
fn damaged_weights_are_named() {
    let synthetic = Synthetic::new(Shape::default());
    let mut model = synthetic.load();
    let range = model.layers[1].k.weight.range.clone();
    model.map.bytes_mut()[range][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let (method, pattern) = (SparseMethod::Magnitude, Pattern::Share(0.5));
    let error = sparsify(&mut model, method, pattern, None).unwrap_err();
    assert!(
        matches!(error.kind, PruneErrorKind::DamagedWeights { layer: 1, .. }),
        "{error}"
    );
    assert_eq!(
        error.touched,
        [0, 1],
        "the queries of layer 1 are sparse already"
    );
}

#[test]
fn a_break_tells_which_layers_are_sparse() {
    let synthetic = Synthetic::new(Shape {
        heads: vec![4; 3],
        kv_heads: vec![2; 3],
        channels: vec![96; 3],
        ..Shape::default()
    });
    let (tokens, pattern) = (some_tokens(600), Pattern::Share(0.5));
    let mut whole = synthetic.load();
    sparsify(
        &mut whole,
        SparseMethod::Wanda,
        pattern,
        Some(text(&tokens)),
    )
    .unwrap();
    let mut seen = Vec::new();
    for at in 0.. {
        let mut model = synthetic.load();
        let mut calls = 0;
        let patterns = [pattern; 6];
        let removal = Removal {
            method: SparseMethod::Wanda,
            form: SparseForm::Zeros,
            patterns: &patterns,
            text: Some(text(&tokens)),
        };
        let mut progress = |_, total| {
            assert_eq!(total, 3);
            calls += 1;
            match calls > at {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let Err(error) = sparse::sparsify(&mut model, &runtime(2), removal, &mut progress) else {
            break;
        };
        assert!(error.is_cancelled(), "{error}");
        for l in 0..3 {
            let like = match error.touched.contains(&l) {
                true => &whole,
                false => &synthetic.load(),
            };
            crate::common::pruning::assert_same_layer(&model, like, l);
        }
        seen.push(error.touched);
    }
    // Three sequences go through each layer twice, but through the last one once.
    assert_eq!(seen[0], [0; 0]);
    assert_eq!(seen.last(), Some(&vec![0, 1, 2]));
    assert!(
        seen.len() > 15,
        "it can be called off behind every sequence: {}",
        seen.len()
    );
}

// ---- with the engine ----

fn sparse_only(spec: &str) -> PruneOptions {
    let sparsity: sparse::Sparsity = spec.parse().unwrap();
    PruneOptions {
        target: Target::Ratio(0.0),
        sparse: Some(SparseOptions {
            form: SparseForm::Zeros,
            ..sparsity.into()
        }),
        calibration: tokens(512),
        ..PruneOptions::default()
    }
}

#[test]
fn the_engine_removes_single_weights_and_reports() {
    let workshop = Workshop::new();
    for (spec, read) in [
        ("wanda:0.5", 512),
        ("magnitude:2:4", 0),
        ("sparsegpt:4:8", 512),
    ] {
        let mut engine = workshop.open();
        let mut stages = Vec::new();
        let mut events = |event: Event| {
            stages.push(event.stage);
            ControlFlow::Continue(())
        };
        let report = engine.prune(&sparse_only(spec), &mut events).unwrap();
        stages.dedup();
        assert_eq!(stages, [Stage::Sparsifying], "no profile is collected");
        let sparse = report.sparse.as_ref().unwrap();
        assert_eq!(sparse.sparsity.to_string(), spec);
        assert_eq!((sparse.tokens, report.calibration.tokens), (read, read));
        assert!((sparse.removed - 0.5).abs() < 1e-9, "{}", sparse.removed);
        assert_eq!(sparse.bytes_before, sparse.bytes_after);
        assert_eq!((report.removed, report.ratio), (0.0, 0.0));
        assert_eq!(report.before.layers, report.after.layers);
        for (_, weight) in weights(engine.model()) {
            let values = weight.decode(&engine.model().map);
            let zeros = values.iter().filter(|v| **v == 0.0).count();
            assert!(zeros >= values.len() / 2);
        }
        let again = engine.prune(&sparse_only(spec), &mut ignore);
        assert!(matches!(again, Err(EngineError::AlreadyPruned)));
    }
    assert!(workshop.cached("profile").is_empty());
}

#[test]
fn by_default_what_goes_takes_no_bytes_and_the_model_writes_what_it_writes_with_zeros() {
    let workshop = Workshop::new();
    let mut texts = Vec::new();
    for form in [SparseForm::Zeros, SparseForm::Sparse] {
        let mut engine = workshop.open();
        let mut options = sparse_only("magnitude:0.5");
        options.sparse.as_mut().unwrap().form = form;
        let report = engine.prune(&options, &mut ignore).unwrap();
        let sparse = report.sparse.unwrap();
        assert_eq!(sparse.form, form);
        if form == SparseForm::Sparse {
            assert!(sparse.bytes_after < sparse.bytes_before);
            let gone = report.before.parameters - report.after.parameters;
            let layers = report.before.layer_parameters;
            assert_eq!(gone, layers / 2);
            // It cannot be pruned any further, nor is it looked at as a dense model.
            assert!(matches!(
                engine.prune(&PruneOptions::default(), &mut ignore),
                Err(EngineError::AlreadyPruned)
            ));
        }
        texts.push(written(&engine));
    }
    assert!(!texts[0].is_empty());
    assert_eq!(texts[0], texts[1]);
    assert_eq!(SparseForm::default(), SparseForm::Auto);
}

#[test]
fn single_weights_go_after_heads_and_channels_and_the_outcome_of_these_is_kept() {
    let workshop = Workshop::new();
    let options = PruneOptions {
        target: Target::Ratio(0.3),
        method: Method::Flap.into(),
        ..sparse_only("wanda:2:4")
    };
    let structured = PruneOptions {
        sparse: None,
        ..options.clone()
    };
    let alone = workshop.prune(&structured);
    let mut engine = workshop.open();
    let mut stages = Vec::new();
    let mut events = |event: Event| {
        stages.push(event.stage);
        ControlFlow::Continue(())
    };
    let report = engine.prune(&options, &mut events).unwrap();
    assert!(report.plan == alone.plan && !stages.contains(&Stage::Calibrating));
    assert_eq!(report.after.bytes, alone.after.bytes);
    let sparse = report.sparse.unwrap();
    assert_eq!(sparse.removed, 0.5);
    for (_, weight) in weights(engine.model()) {
        for group in weight.decode(&engine.model().map).chunks_exact(4) {
            assert!(group.iter().filter(|v| **v == 0.0).count() >= 2);
        }
    }
}

#[test]
fn channels_that_stay_fill_groups() {
    let synthetic = Synthetic::new(Shape::default());
    let tokens = some_tokens(700);
    let recipe = Method::Flap.recipe(Effort::Fast);
    for step in [1, 4, 16] {
        let mut model = synthetic.load();
        let profile = profile_of(&model, text(&tokens));
        let evidence = Evidence::profile(&profile);
        let plan = prune::prune_in_steps(
            &mut model,
            &runtime(2),
            evidence,
            recipe,
            0.3,
            step,
            &mut progress::ignore,
        )
        .unwrap();
        let channels: Vec<usize> = model.layers.iter().map(|layer| layer.channels()).collect();
        let whole = channels
            .iter()
            .all(|channels| channels.is_multiple_of(step));
        assert!(whole, "{channels:?} in steps of {step}");
        let left: usize = model.layer_parameters();
        assert_eq!(plan.removed, plan.total - left);
        if step == 4 {
            sparsify(
                &mut model,
                SparseMethod::Wanda,
                PATTERNS[2],
                Some(text(&tokens)),
            )
            .unwrap();
        }
    }
}

#[test]
fn a_break_after_heads_and_channels_leaves_no_layer_untouched() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let error = engine
        .prune(
            &sparse_only("wanda:0.5"),
            &mut break_at(Stage::Sparsifying, 0),
        )
        .unwrap_err();
    assert!(
        matches!(error, EngineError::Cancelled(_)) && !engine.is_touched(),
        "{error}"
    );
    let error = engine
        .prune(
            &sparse_only("wanda:0.5"),
            &mut break_at(Stage::Sparsifying, 1),
        )
        .unwrap_err();
    let EngineError::Prune(cause) = &error else {
        panic!("{error}")
    };
    assert!(cause.is_cancelled() && cause.touched == [0], "{error}");
    assert!(engine.is_touched());
    let broken = engine.export(workshop.path("half.gguf"));
    assert!(matches!(broken, Err(EngineError::BrokenOff)));

    let mut engine = workshop.open();
    let both = PruneOptions {
        target: Target::Ratio(0.3),
        method: Method::Flap.into(),
        ..sparse_only("wanda:0.5")
    };
    let error = engine
        .prune(&both, &mut break_at(Stage::Sparsifying, 0))
        .unwrap_err();
    let EngineError::Prune(cause) = &error else {
        panic!("{error}")
    };
    assert_eq!(cause.touched, [0, 1, 2], "heads and channels are gone");
    assert!(engine.is_touched() && engine.pruned().is_none());
}

#[test]
fn what_does_not_go_together_is_refused_before_anything_is_read() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let mut refused = |options: PruneOptions| engine.prune(&options, &mut ignore).unwrap_err();
    let mut curves = sparse_only("wanda:2:4");
    curves.sparse.as_mut().unwrap().allocate = Allocate::Curves;
    let error = refused(curves);
    assert!(
        matches!(error, EngineError::CurvesOfGroups { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("2:4"), "{error}");
    let error = refused(PruneOptions {
        profile: Some("none.profile".into()),
        ..sparse_only("wanda:0.5")
    });
    assert!(
        matches!(error, EngineError::Unsuited(Unsuited::SingleWeights)),
        "{error}"
    );
    let error = refused(sparse_only("wanda:2:7"));
    assert!(error.to_string().contains("groups of 7"), "{error}");
    let mut short = sparse_only("wanda:0.5");
    short.calibration.source = TextSource::Tokens(vec![5; 100].into());
    let error = refused(short);
    assert!(error.to_string().contains("at least 128"), "{error}");
    assert!(!engine.is_touched());
}

#[test]
fn loss_curves_move_the_budget_and_keep_its_sum() {
    let workshop = Workshop::new();
    let mut options = sparse_only("wanda:0.5");
    options.calibration = tokens(2048);
    options.sparse.as_mut().unwrap().allocate = Allocate::Curves;
    let mut engine = workshop.open();
    let report = engine.prune(&options, &mut ignore).unwrap();
    let sparse = report.sparse.unwrap();
    assert!(sparse.curves.is_some() && sparse.tokens < 2048);
    assert_eq!(sparse.shares.len(), 6);
    assert!(
        sparse
            .shares
            .iter()
            .all(|share| (0.399..=0.601).contains(share)),
        "{:?}",
        sparse.shares
    );
    let spread = sparse
        .shares
        .iter()
        .fold(0.0f64, |m, share| m.max((share - 0.5).abs()));
    assert!(spread > 0.01, "{:?}", sparse.shares);
    // Rows lose whole weights.
    assert!((sparse.removed - 0.5).abs() < 0.02, "{}", sparse.removed);
    for (module, share) in sparse.shares.iter().enumerate() {
        let layer = &engine.model().layers[module / 2];
        let weight = if module % 2 == 0 {
            &layer.q.weight
        } else {
            &layer.up.weight
        };
        let values = weight.decode(&engine.model().map);
        let zeros = values.iter().filter(|v| **v == 0.0).count();
        let gone = weight.rows * (share * weight.cols as f64) as usize;
        assert!(zeros >= gone, "{module}: {zeros} {gone}");
    }
}

#[test]
fn a_size_a_speed_or_a_perplexity_is_reached_together_with_single_weights() {
    let workshop = Workshop::new();
    let with = |target, spec: &str| {
        let mut options = PruneOptions {
            target,
            method: Method::Flap.into(),
            ..sparse_only(spec)
        };
        options.sparse.as_mut().unwrap().form = SparseForm::Sparse;
        workshop.try_prune(&options)
    };
    let alone = with(Target::Ratio(0.0), "wanda:0.5").unwrap().after.bytes as u64;

    // Where single weights are enough, nothing else goes. (Sizes are estimated, and small matrices are mostly beginnings and ends.)
    let report = with(Target::Bytes(alone + alone / 10), "wanda:0.5").unwrap();
    assert_eq!((report.ratio, report.removed), (0.0, 0.0));
    assert_eq!(report.after.bytes as u64, alone);
    // Otherwise heads and channels go as well, as few as may be.
    let bytes = alone - alone / 10;
    let report = with(Target::Bytes(bytes), "wanda:0.5").unwrap();
    assert!(report.ratio > 0.0 && report.removed > 0.0);
    let after = report.after.bytes as u64;
    assert!(
        after <= bytes && after >= bytes - bytes / 4,
        "{after} {bytes}"
    );
    let error = with(Target::Bytes(1000), "wanda:0.5").unwrap_err();
    assert!(
        matches!(error, EngineError::OutOfReach(OutOfReach::Bytes { .. })),
        "{error}"
    );

    let report = with(Target::Speedup(1.01), "wanda:0.5").unwrap();
    let Found::Speed {
        bytes_before,
        bytes_after,
        ..
    } = report.search.unwrap().found
    else {
        panic!("a speed was looked for");
    };
    assert!(bytes_after < bytes_before);

    // The model is not trained, so that anything may go.
    let report = with(Target::PerplexityRise(9.0), "wanda:2:4").unwrap();
    let Found::Perplexity { rise, .. } = report.search.as_ref().unwrap().found else {
        panic!("a perplexity was looked for");
    };
    assert!(rise <= 9.0);
    assert_eq!(report.sparse.unwrap().removed, 0.5);
}

#[test]
fn a_perplexity_that_single_weights_alone_exceed_is_refused() {
    let model = crate::common::default_model();
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        threads: Some(2),
        cache: Some(folder.path().to_owned()),
        ..OpenOptions::default()
    };
    let mut engine = Engine::open(model, options).unwrap();
    let options = PruneOptions {
        target: Target::PerplexityRise(0.05),
        method: Method::Flap.into(),
        calibration: tokens(4096),
        ..sparse_only("magnitude:0.6")
    };
    let error = engine.prune(&options, &mut ignore).unwrap_err();
    let words = error.to_string();
    let mut source: &dyn std::error::Error = &error;
    while let Some(next) = source.source() {
        source = next;
    }
    let words = format!("{words}: {source}");
    assert!(
        words.contains("magnitude:0.6 raises the perplexity by"),
        "{words}"
    );
    // The model is as it was.
    engine
        .prune(&sparse_only("magnitude:0.1"), &mut ignore)
        .unwrap();
}

#[test]
fn text_that_the_model_writes_itself_is_written_first() {
    let workshop = Workshop::new();
    let mut options = sparse_only("wanda:0.5");
    options.calibration.source = TextSource::Own(256);
    options.calibration.tokens = None;
    let report = workshop.prune(&options);
    assert_eq!(report.sparse.unwrap().tokens, 256);
    let with_heads = PruneOptions {
        target: Target::Ratio(0.3),
        method: Method::Flap.into(),
        ..options
    };
    let report = workshop.prune(&with_heads);
    assert_eq!(report.sparse.unwrap().tokens, 256);
}

#[test]
fn effects_are_those_of_everything_that_went() {
    let workshop = Workshop::new();
    let text = workshop.write(
        "text.txt",
        "Some words that come again and again. ".repeat(90),
    );
    let mut options = sparse_only("magnitude:0.9");
    options.calibration.source = TextSource::Path(text);
    options.effects = true;
    let report = workshop.prune(&options);
    let [unseen, _] = &report.effects[..] else {
        panic!("{:?}", report.effects)
    };
    assert!(
        (unseen.after / unseen.before - 1.0).abs() > 1e-3,
        "{unseen:?}"
    );
}

#[test]
fn the_file_has_zeros_in_the_type_that_it_had_and_says_so() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    engine
        .prune(&sparse_only("wanda:2:4"), &mut ignore)
        .unwrap();
    let path = workshop.path("sparse.gguf");
    let export = engine.export(&path).unwrap();
    assert_eq!(export.architecture, "llama");
    let again = workshop.open_file(&path);
    for ((which, a), (_, b)) in weights(engine.model())
        .into_iter()
        .zip(weights(again.model()))
    {
        assert_eq!(a.block_type, b.block_type);
        assert!(
            a.decode(&engine.model().map) == b.decode(&again.model().map),
            "{which}"
        );
    }
    let file = GgufFile::open(&path).unwrap();
    let record = Record::from_gguf(&file).unwrap().unwrap();
    let words = record.sparse.clone().unwrap();
    assert!(
        words.contains("wanda:2:4 (50.0 %") && words.contains("512 tokens"),
        "{words}"
    );
    assert_eq!((record.method.as_str(), record.ratio), ("none", 0.0));

    // Once more, by heads and channels: it is known what was done before.
    let mut engine = again;
    let options = PruneOptions {
        method: Method::Flap.into(),
        calibration: tokens(512),
        ..PruneOptions::default()
    };
    engine.prune(&options, &mut ignore).unwrap();
    let path = workshop.path("smaller.gguf");
    engine.export(&path).unwrap();
    let record = Record::from_gguf(&GgufFile::open(&path).unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(record.sparse.as_deref(), Some(&words[..]));
    assert!(record.method.starts_with("flap"), "{}", record.method);
}

// ---- the second start ----

#[test]
fn what_came_of_single_weights_is_kept_and_done_again() {
    let workshop = Workshop::new();
    for (form, spec, allocate, ratio) in [
        (SparseForm::Sparse, "wanda:0.5", Allocate::Even, 0.0),
        (SparseForm::Zeros, "wanda:2:4", Allocate::Even, 0.0),
        (SparseForm::Sparse, "sparsegpt:0.5", Allocate::Even, 0.0),
        (SparseForm::Sparse, "wanda:0.4", Allocate::Curves, 0.0),
        (SparseForm::Sparse, "magnitude:2:4", Allocate::Even, 0.3),
        (SparseForm::Sparse, "wanda:0.5", Allocate::Even, 0.3),
    ] {
        let name = format!("{spec} {form} {allocate} {ratio}");
        let mut options = PruneOptions {
            target: Target::Ratio(ratio),
            method: Method::Flap.into(),
            calibration: tokens(2048),
            ..sparse_only(spec)
        };
        options.sparse = Some(SparseOptions {
            form,
            allocate,
            ..options.sparse.unwrap()
        });
        let mut first = workshop.open();
        let report = first.prune(&options, &mut ignore).unwrap();
        assert!(!report.repeated, "{name}");
        let mut again = workshop.open();
        let mut stages = Vec::new();
        let mut events = |event: Event| {
            stages.push(event.stage);
            ControlFlow::Continue(())
        };
        let repeated = again.prune(&options, &mut events).unwrap();
        assert!(repeated.repeated, "{name}");
        assert!(
            !stages.contains(&Stage::Calibrating) && !stages.contains(&Stage::Curves),
            "{name}"
        );
        assert_same(first.model(), again.model());
        let told = |report: &PruneReport| {
            let sparse = report.sparse.as_ref().unwrap();
            let removed: Vec<usize> = sparse.layers.iter().map(|layer| layer.removed).collect();
            (
                report.plan.clone(),
                sparse.removed,
                sparse.tokens,
                sparse.shares.clone(),
                removed,
                sparse.bytes_after,
                sparse.curves.map(|c| c.tokens),
            )
        };
        assert_eq!(told(&repeated), told(&report), "{name}");
        assert_eq!(written(&again), written(&first), "{name}");

        // Other single weights, or another text, are another matter.
        let mut other = options.clone();
        other.sparse.as_mut().unwrap().sparsity = "wanda:0.3".parse().unwrap();
        assert!(!workshop.prune(&other).sparse.unwrap().layers.is_empty());
        let mut anew = options.clone();
        anew.cache = Cache::Nothing;
        assert!(!workshop.prune(&anew).repeated, "{name}");
        if spec.starts_with("wanda") {
            let fewer = PruneOptions {
                calibration: tokens(1500),
                ..options.clone()
            };
            assert!(!workshop.prune(&fewer).repeated, "{name}");
        }
    }
    // What is damaged is as good as none.
    let options = sparse_only("wanda:0.5");
    let report = workshop.prune(&options);
    for path in workshop.cached("outcome") {
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let anew = workshop.prune(&options);
    assert!(!anew.repeated);
    assert_eq!(
        anew.sparse.unwrap().bytes_after,
        report.sparse.unwrap().bytes_after
    );
    // A file that is written after a second start has the same weights too.
    let mut engine = workshop.open();
    assert!(engine.prune(&options, &mut ignore).unwrap().repeated);
    let path = workshop.path("again.gguf");
    engine.export(&path).unwrap();
    assert_eq!(written(&workshop.open_file(&path)), written(&engine));
}

#[test]
fn what_changed_its_type_is_kept_too() {
    let folder = tempfile::tempdir().unwrap();
    // Q4_1 has no zero, and becomes Q8_0.
    let path = crate::common::default_model();
    let options = OpenOptions {
        threads: Some(2),
        cache: Some(folder.path().join("cache")),
        ..OpenOptions::default()
    };
    let pruned = || {
        let mut engine = Engine::open(&path, options.clone()).unwrap();
        let report = engine
            .prune(&sparse_only("magnitude:0.5"), &mut ignore)
            .unwrap();
        (engine, report)
    };
    let ((first, report), (again, repeated)) = (pruned(), pruned());
    assert!(!report.repeated && repeated.repeated);
    let told = |report: &PruneReport| {
        let sparse = report.sparse.as_ref().unwrap();
        assert!(!sparse.changes_no_types());
        let types: Vec<_> = sparse.layers.iter().map(|l| l.types.clone()).collect();
        (types, sparse.bytes_after, format!("{:?}", report.notices))
    };
    assert_eq!(told(&repeated), told(&report));
    let changed = |notice: &Notice| matches!(notice, Notice::TypesForZeros { .. });
    assert!(repeated.notices.iter().any(changed));
    assert_same(first.model(), again.model());
    assert_eq!(written(&again), written(&first));
}

// ---- packed files ----

/// A workshop's model without half of its single weights, in a packed file.
fn packed_file(workshop: &Workshop, ratio: f64) -> (Engine, PathBuf) {
    let mut engine = workshop.open();
    let mut options = sparse_only("wanda:0.5");
    options.target = Target::Ratio(ratio);
    options.method = Method::Flap.into();
    options.sparse.as_mut().unwrap().form = SparseForm::Sparse;
    engine.prune(&options, &mut ignore).unwrap();
    let path = workshop.path("packed.gguf");
    engine.export(&path).unwrap();
    (engine, path)
}

fn written(engine: &Engine) -> String {
    let mut sequence = engine.sequence();
    let options = GenerateOptions {
        max_tokens: 24,
        ignore_end: true,
        ..GenerateOptions::default()
    };
    let pieces = engine.generate(&mut sequence, "One", &options).unwrap();
    pieces.map(Result::unwrap).collect()
}

#[test]
fn a_packed_file_has_the_same_weights_writes_the_same_text_and_cannot_be_pruned() {
    let workshop = Workshop::new();
    let dense = fs::metadata(&workshop.model).unwrap().len();
    for ratio in [0.0, 0.2] {
        let (engine, path) = packed_file(&workshop, ratio);
        assert!(fs::metadata(&path).unwrap().len() < dense);
        let mut again = workshop.open_file(&path);
        let sparse = |engine: &Engine| engine.model().sparse_weights().count();
        assert!(sparse(&engine) > 0 && sparse(&engine) == sparse(&again));
        if ratio == 0.0 {
            for ((which, a), (_, b)) in weights(engine.model())
                .into_iter()
                .zip(weights(again.model()))
            {
                assert_eq!(
                    (a.block_type, a.layout),
                    (b.block_type, b.layout),
                    "{which}"
                );
                assert!(
                    a.decode(&engine.model().map) == b.decode(&again.model().map),
                    "{which}"
                );
            }
        }
        assert_eq!(written(&again), written(&engine));
        let file = GgufFile::open(&path).unwrap();
        assert_eq!(file.get::<u32>("general.alignment").unwrap(), Some(64));
        let record = Record::from_gguf(&file).unwrap().unwrap();
        assert!(record.sparse.unwrap().contains("wanda:0.5"));
        for options in [PruneOptions::default(), sparse_only("magnitude:0.5")] {
            let error = again.prune(&options, &mut ignore).unwrap_err();
            assert!(
                matches!(&error, EngineError::Prune(error) if matches!(error.kind, PruneErrorKind::Sparse(_))),
                "{error}"
            );
        }
        // Written once more, it is the same.
        let copy = workshop.path("copy.gguf");
        again.export(&copy).unwrap();
        assert_eq!(written(&workshop.open_file(&copy)), written(&engine));
    }
}

#[test]
fn a_packed_file_that_is_damaged_or_of_another_version_is_refused_by_tensor_and_byte() {
    let workshop = Workshop::new();
    let (_, path) = packed_file(&workshop, 0.0);
    let whole = fs::read(&path).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let sparse: Vec<_> = file
        .tensors()
        .iter()
        .filter(|t| t.layout == Layout::Sparse)
        .collect();
    let tensor = sparse[0];
    let (start, groups) = (tensor.range.start, tensor.shape[0].div_ceil(16));
    let first = u64::from_le_bytes(whole[start..start + 8].try_into().unwrap()) as usize;
    let id = 0x464a_0100u32 | tensor.block_type.id();
    let table = whole
        .windows(4)
        .position(|w| w == id.to_le_bytes())
        .unwrap();
    let name = &tensor.name[..];
    let changed = |at: usize, bytes: &[u8]| {
        let mut damaged = whole.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        damaged
    };
    let masks = start + first + 16 * (tensor.block_type.block_bytes() - 32);
    let cases = [
        (
            "another version",
            changed(table + 1, &[2]),
            "sparse form of version 2 is not supported (version 1 is)",
        ),
        ("another type", changed(table, &[3]), ""),
        (
            "no such type",
            changed(table, &[6]),
            "values of type 6 in flapjack's sparse form are not known",
        ),
        (
            "an index beyond the file",
            changed(start + 8 * groups, &[255; 8]),
            "its index, at byte",
        ),
        (
            "an index that begins elsewhere",
            changed(start, &[1]),
            "entry 0 of the index is",
        ),
        ("more values than there are", changed(masks, &[255; 64]), ""),
        ("none", changed(masks, &[0; 64]), ""),
        (
            "cut off",
            whole[..whole.len() - 2000].to_vec(),
            "reaches past the end of the file",
        ),
        ("cut off in the index", whole[..start + 4].to_vec(), ""),
    ];
    for (what, bytes, words) in cases {
        let damaged = workshop.write("damaged.gguf", bytes);
        let options = OpenOptions {
            threads: Some(1),
            ..OpenOptions::default()
        };
        let error = Engine::open(&damaged, options).unwrap_err().to_string();
        assert!(error.contains(words), "{what}: {error}");
        assert!(
            error.contains("damaged.gguf") && (error.contains(name) || what.starts_with("cut")),
            "{what}: {error}"
        );
    }
}

#[test]
fn the_program_writes_and_reads_packed_files() {
    let workshop = Workshop::new();
    let path = workshop.path("packed.gguf");
    let out = path.to_str().unwrap();
    let pack = [
        "prune",
        "--sparse",
        "wanda:2:4",
        "--calib-tokens",
        "512",
        "--pack",
        "-o",
        out,
    ];
    let report = succeeded(&workshop.flapjack(&pack)).1;
    assert!(
        report.contains("50.0 % of the layers' weights are gone, one by one"),
        "{report}"
    );
    let shown = succeeded(&flapjack(&["inspect", out])).0;
    assert!(
        shown.contains("Q8_0 sparse") && shown.contains("wanda:2:4"),
        "{shown}"
    );
    let run = ["run", "-m", out, "--raw", "-p", "One", "-n", "8"];
    assert!(!succeeded(&flapjack(&run)).0.is_empty());
    let again = flapjack(&["prune", "-m", out, "--prune", "0.2", "-o", out]);
    assert!(
        stderr(&again)
            .contains("cannot be pruned any further; prune the file that this one was made from"),
        "{}",
        stderr(&again)
    );
    assert!(!again.status.success());
    let alone = workshop.flapjack(&["prune", "--prune", "0.2", "--pack", "-o", out]);
    assert!(stderr(&alone).contains("--sparse"), "{}", stderr(&alone));
}

// ---- at the command line ----

#[test]
fn the_program_takes_single_weights_by_themselves_and_after_others() {
    let workshop = Workshop::new();
    let run = |arguments: &[&str]| {
        let arguments = [
            &[
                "run",
                "--raw",
                "-p",
                "a",
                "-n",
                "2",
                "--calib-tokens",
                "256",
            ],
            arguments,
        ];
        succeeded(&workshop.flapjack(&arguments.concat())).1
    };
    let report = run(&["--sparse", "wanda:0.5"]);
    let line = "wanda:0.5, the same share of every module: 50.0 % of the layers' weights are gone, one by one";
    assert!(report.contains(line), "{report}");
    assert!(
        report.contains("256 tokens of") && !report.contains("heads by"),
        "{report}"
    );
    let report = run(&["--sparse", "magnitude:2:4"]);
    assert!(
        !report.contains("  calibrate ") && report.contains("magnitude:2:4"),
        "{report}"
    );
    let report = run(&[
        "--prune",
        "0.3",
        "--method",
        "flap",
        "--sparse",
        "sparsegpt:2:4",
    ]);
    assert!(
        report.contains("heads by query") && report.contains("sparsegpt:2:4"),
        "{report}"
    );

    let path = workshop.path("sparse.gguf");
    let path = path.to_str().unwrap();
    let made = workshop.flapjack(&["prune", "--sparse", "wanda:2:4", "-o", path]);
    assert!(succeeded(&made).1.contains("wanda:2:4"));
    let text = workshop.write("text.txt", "the quick brown fox ".repeat(30));
    let scored = workshop.flapjack(&[
        "perplexity",
        "-f",
        text.to_str().unwrap(),
        "-c",
        "128",
        "--json",
        "--sparse",
        "wanda:0.5",
    ]);
    let (out, _) = succeeded(&scored);
    assert!(out.contains("\"sparse_ratio\":0.5"), "{out}");
    let bench = workshop.flapjack(&[
        "bench",
        "-p",
        "0",
        "-n",
        "1",
        "-r",
        "1",
        "--prune",
        "0.3",
        "--sparse",
        "wanda:2:4",
        "--calib-tokens",
        "256",
        "--json",
    ]);
    let (out, _) = succeeded(&bench);
    let rows: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
    let points: Vec<(bool, bool)> = rows
        .iter()
        .map(|row| {
            (
                row["prune_ratio"].as_f64() > Some(0.0),
                row["sparse"].is_string(),
            )
        })
        .collect();
    assert_eq!(
        points,
        [(false, false), (true, false), (false, true), (true, true)]
    );
}

#[test]
fn the_program_says_what_is_wrong_and_what_to_do() {
    let workshop = Workshop::new();
    for (arguments, words) in [
        (
            &["--sparse", "wanda"][..],
            "wanda needs a share or N:M behind it",
        ),
        (
            &["--sparse", "prune:0.5"],
            "there are wanda, magnitude, sparsegpt",
        ),
        (&["--sparse", "wanda:1.5"], "above 0 and below 1"),
        (&["--allocate", "curves"], "--sparse"),
        (&["--sparse", "wanda:0.5", "--fit", "1kB"], "out of reach"),
        (
            &["--sparse", "wanda:2:4", "--allocate", "curves"],
            "--allocate even",
        ),
        (&["--sparse", "wanda:2:7"], "groups of 7 columns"),
        (
            &["--sparse", "wanda:0.5", "--profile", "x"],
            "name the text with --calib",
        ),
    ] {
        let arguments = [&["run", "-p", "a", "-n", "1"], arguments].concat();
        let output = workshop.flapjack(&arguments);
        let message = stderr(&output);
        assert!(
            !output.status.success() && message.contains(words),
            "{arguments:?}: {message}"
        );
    }
}

// ---- with llama.cpp ----

/// The perplexity that a program tells last.
fn told(text: &str, before: &str) -> f64 {
    let rest = text.rsplit_once(before).expect("a perplexity").1;
    let number: String = rest
        .trim_start()
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    number.parse().expect("a number")
}

#[test]
fn llama_cpp_finds_the_same_perplexity() {
    let (Some(text), Some(program)) = (shared("data/wikitext-2/dev.raw"), peer("llama-perplexity"))
    else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        cache: Some(folder.path().join("cache")),
        ..OpenOptions::default()
    };
    let mut engine = Engine::open(crate::common::default_model(), options.clone()).unwrap();
    let report = engine
        .prune(&sparse_only("magnitude:0.3"), &mut ignore)
        .unwrap();
    let changed = |notice: &Notice| matches!(notice, Notice::TypesForZeros { changes } if changes[0].to == "Q8_0");
    assert!(report.notices.iter().any(changed), "{:?}", report.notices);
    let path = folder.path().join("sparse.gguf");
    engine.export(&path).unwrap();
    drop(engine);

    let ours = perplexity(&path, &options, &text);
    let output = Command::new(program)
        .args(["-c", "512", "--chunks", "2", "-t", "2", "-m"])
        .arg(&path)
        .arg("-f")
        .arg(&text)
        .output()
        .expect("llama-perplexity starts");
    let all = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{all}");
    let theirs = told(&all, "PPL =");
    assert!((ours / theirs - 1.0).abs() < 0.01, "{ours} and {theirs}");
}

fn perplexity(path: &Path, options: &OpenOptions, text: &Path) -> f64 {
    let engine = Engine::open(path, options.clone()).unwrap();
    let scored = flapjack::eval::PerplexityOptions {
        context: 512,
        chunks: Some(2),
        all_positions: false,
        cache_type: flapjack::model::CacheType::F16,
    };
    let text = fs::read_to_string(text).unwrap();
    let text: String = text.chars().take(20_000).collect();
    engine
        .perplexity(&text, scored, &mut ignore)
        .unwrap()
        .perplexity
}

/// What a synthetic model in another type looks like to the engine: it is written in Q4_0, which has a code for 0.
#[test]
fn four_bits_with_a_code_for_zero_keep_their_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write_synthetic(&path, TINY, SyntheticType::Q4_0).unwrap();
    let options = OpenOptions {
        cache: Some(folder.path().join("cache")),
        threads: Some(1),
        ..OpenOptions::default()
    };
    let mut engine = Engine::open(&path, options).unwrap();
    let report = engine
        .prune(&sparse_only("wanda:0.5"), &mut ignore)
        .unwrap();
    assert!(report.notices.is_empty(), "{:?}", report.notices);
    assert_eq!(report.before.bytes, report.after.bytes);
}
