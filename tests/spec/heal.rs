//! Training a pruned model towards the dense one: the derivatives, and training as a whole.

use std::ops::{ControlFlow, Range};
use std::time::Duration;

use crate::common::Random;
use crate::common::pruning::{profile_of, text_for_biases};
use crate::common::reference::ReferenceModel;
use crate::common::synthetic::{Shape, Synthetic, each_runtime, logits, runtime};
use flapjack::heal::{
    Budget, Gradients, Places, Step, Student, Trainer, Training, TrainingError, What,
};
use flapjack::kernels::Runtime;
use flapjack::model::{Model, ModuleId};
use flapjack::progress::ignore;
use flapjack::prune;
use flapjack::quant::BlockType;

/// Two layers of different widths, with biases everywhere, and heads of which a part is turned.
fn shape() -> Shape {
    Shape {
        vocabulary: 37,
        heads: vec![4, 3],
        kv_heads: vec![2, 1],
        channels: vec![70, 33],
        biases: true,
        rope_dim: 12,
        seed: 5,
        ..Shape::default()
    }
}

/// The parameter with a number, in the reference.
fn parameter<'r>(reference: &'r mut ReferenceModel, places: &Places, number: usize) -> &'r mut f64 {
    let of = |range: &Range<usize>| range.contains(&number).then(|| number - range.start);
    if let Some(i) = of(&places.output_norm) {
        return &mut reference.output_norm[i];
    }
    for (there, layer) in reference.layers.iter_mut().zip(&places.layers) {
        let linears = [
            &mut there.q,
            &mut there.k,
            &mut there.v,
            &mut there.o,
            &mut there.gate,
            &mut there.up,
            &mut there.down,
        ];
        for (which, linear) in linears.into_iter().enumerate() {
            if let Some(i) = of(&layer.weights[which]) {
                return &mut linear.weight[i];
            }
            if let Some(i) = layer.biases[which].as_ref().and_then(of) {
                return &mut linear.bias.as_mut().expect("a bias")[i];
            }
        }
        if let Some(i) = of(&layer.attention_norm) {
            return &mut there.attention_norm[i];
        }
        if let Some(i) = of(&layer.mlp_norm) {
            return &mut there.mlp_norm[i];
        }
    }
    panic!("there is no parameter {number}");
}

/// The mean of KL(teacher ‖ student) over all positions, by the definition.
fn loss(reference: &ReferenceModel, tokens: &[u32], length: usize, teacher: &[f32]) -> f64 {
    let student: Vec<f64> = tokens
        .chunks(length)
        .flat_map(|s| reference.forward(s).0)
        .collect();
    let vocabulary = student.len() / tokens.len();
    let log_softmax = |logits: &[f64]| -> Vec<f64> {
        let sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        logits.iter().map(|l| l - sum).collect()
    };
    let rows = teacher.chunks(vocabulary).zip(student.chunks(vocabulary));
    let sum: f64 = rows
        .map(|(t, s)| {
            let t: Vec<f64> = t.iter().map(|t| f64::from(*t)).collect();
            let pairs = log_softmax(&t).into_iter().zip(log_softmax(s));
            pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        })
        .sum();
    sum / tokens.len() as f64
}

/// All places of a kind of parameter, with what they are called.
fn tensors(places: &Places) -> Vec<(String, Range<usize>)> {
    let mut all = vec![("output norm".to_owned(), places.output_norm.clone())];
    for (l, layer) in places.layers.iter().enumerate() {
        for (which, range) in layer.weights.iter().enumerate() {
            all.push((format!("layer {l}, projection {which}"), range.clone()));
        }
        for (which, range) in layer.biases.iter().enumerate() {
            all.extend(
                range
                    .clone()
                    .map(|r| (format!("layer {l}, bias {which}"), r)),
            );
        }
        all.push((
            format!("layer {l}, attention norm"),
            layer.attention_norm.clone(),
        ));
        all.push((format!("layer {l}, MLP norm"), layer.mlp_norm.clone()));
    }
    all
}

#[test]
fn every_derivative_is_that_of_finite_differences() {
    let synthetic = Synthetic::new(shape());
    let model = synthetic.load();
    let mut random = Random::new(11);
    // Two blocks of queries, the second of them not whole.
    let (length, sequences) = (70, 2);
    let tokens: Vec<u32> = (0..length * sequences)
        .map(|_| random.below(37) as u32)
        .collect();
    let teacher = random.normals(tokens.len() * 37, 1.5);
    let found: Vec<(Runtime, f64, f64, Vec<f32>)> = each_runtime(2, 2e-3)
        .into_iter()
        .map(|(runtime, allowed)| {
            let student = Student::new(&model, &runtime, What::All);
            let mut gradients = vec![f32::NAN; student.trained().len()];
            let logits = |rows: Range<usize>, out: &mut Vec<f32>| {
                *out = teacher[rows.start * 37..rows.end * 37].to_vec();
            };
            let loss = runtime.region(|team| {
                Step::default().gradients(
                    team,
                    &student,
                    &tokens,
                    length,
                    logits,
                    Gradients::From(student.first, &mut gradients),
                )
            });
            (runtime, allowed, loss, gradients)
        })
        .collect();
    let places = Places::of(&model);
    let mut reference = synthetic.reference.clone();
    let exact = loss(&reference, &tokens, length, &teacher);
    for (runtime, allowed, loss, _) in &found {
        assert!(
            (loss - exact).abs() < allowed * exact,
            "{:?}: {loss}, {exact}",
            runtime.kernels
        );
    }
    for (name, range) in tensors(&places) {
        assert!(!range.is_empty());
        for _ in 0..4 {
            let number = range.start + random.below(range.len());
            let before = *parameter(&mut reference, &places, number);
            let mut at = |change: f64| {
                *parameter(&mut reference, &places, number) = before + change;
                loss(&reference, &tokens, length, &teacher)
            };
            let h = 1e-5;
            let expected = (at(h) - at(-h)) / (2.0 * h);
            *parameter(&mut reference, &places, number) = before;
            for (runtime, allowed, _, gradients) in &found {
                let largest = gradients[range.clone()]
                    .iter()
                    .fold(0.0f32, |m, g| m.max(g.abs()));
                let error = (f64::from(gradients[number]) - expected).abs();
                // The bias of keys moves all scores of a query alike, and so has no effect; other derivatives have.
                let scale = f64::from(largest).max(1e-5);
                assert!(
                    error < 2.0 * allowed * scale,
                    "{:?}, {name}, {number}: {}, {expected}",
                    runtime.kernels,
                    gradients[number]
                );
            }
        }
    }
}

/// A model that has lost heads and channels, unequally, and has got biases for it.
fn pruned(synthetic: &Synthetic) -> Model {
    let mut model = synthetic.load();
    let mut random = Random::new(2);
    let tokens: Vec<u32> = (0..600).map(|_| random.below(50) as u32).collect();
    let profile = profile_of(&model, text_for_biases(&tokens));
    prune::flap(&mut model, &runtime(2), &profile, 0.4, &mut ignore).expect("a pruned model");
    model
}

fn text(tokens: usize) -> Vec<u32> {
    let mut random = Random::new(9);
    let mut last = 0;
    (0..tokens)
        .map(|_| {
            // Something to learn: most tokens follow from the one before.
            last = match random.below(4) {
                0 => random.below(50) as u32,
                _ => (last * 7 + 3) % 50,
            };
            last
        })
        .collect()
}

#[test]
fn the_forward_pass_in_training_is_that_of_the_model() {
    for gone in [false, true] {
        let synthetic = Synthetic::new(Shape {
            heads: vec![4, 4, 4],
            kv_heads: vec![2, 2, 2],
            channels: vec![96; 3],
            ..Shape::default()
        });
        let mut model = pruned(&synthetic);
        if gone {
            // A layer without heads, and one without channels.
            let mut plan = prune_plan(&model);
            plan.layers[0].heads.clear();
            plan.layers[2].channels.clear();
            let mut random = Random::new(2);
            let tokens: Vec<u32> = (0..600).map(|_| random.below(50) as u32).collect();
            let profile = profile_of(&model, text_for_biases(&tokens));
            crate::common::pruning::restore_and_apply(
                &mut model,
                &profile,
                &plan,
                flapjack::prune::Restore::Bias,
            );
        }
        let tokens = text(100);
        for (runtime, allowed) in each_runtime(2, 1e-4) {
            let expected = logits(&model, &runtime, &tokens);
            let student = Student::new(&model, &runtime, What::All);
            let mut step = Step::default();
            let found = runtime.region(|team| step.logits(team, &student, &tokens, tokens.len()));
            let largest = expected.iter().fold(0.0f32, |m, l| m.max(l.abs()));
            for (found, expected) in found.iter().zip(&expected) {
                let error = f64::from((found - expected).abs() / largest);
                assert!(
                    error < allowed.max(1e-3),
                    "{:?}: {found}, {expected}",
                    runtime.kernels
                );
            }
        }
    }
}

/// All that a model has.
fn prune_plan(model: &Model) -> prune::Plan {
    let layers = model.layers.iter().map(|layer| prune::LayerPlan {
        heads: (0..layer.heads()).collect(),
        channels: (0..layer.channels()).collect(),
        types: [None; 2],
    });
    prune::Plan {
        layers: layers.collect(),
        removed: 0,
        total: model.layer_parameters(),
    }
}

/// The product of two matrices, each transposed where that is said, `[rows, cols]` from a sum of `inner` terms.
fn product(
    (a, a_transposed): (&[f32], bool),
    (b, b_transposed): (&[f32], bool),
    (rows, inner, cols): (usize, usize, usize),
) -> Vec<f64> {
    let left = |r: usize, i: usize| {
        a[if a_transposed {
            i * rows + r
        } else {
            r * inner + i
        }]
    };
    let right = |i: usize, c: usize| {
        b[if b_transposed {
            c * inner + i
        } else {
            i * cols + c
        }]
    };
    let entry = |r, c| (0..inner).map(move |i| f64::from(left(r, i)) * f64::from(right(i, c)));
    (0..rows * cols)
        .map(|n| entry(n / cols, n % cols).sum())
        .collect()
}

#[test]
fn factors_change_matrices_by_their_product_and_their_derivatives_follow_from_those_by_the_matrix()
{
    let synthetic = Synthetic::new(shape());
    let model = synthetic.load();
    let mut random = Random::new(13);
    let length = 64;
    let tokens: Vec<u32> = (0..2 * length).map(|_| random.below(37) as u32).collect();
    let teacher = random.normals(tokens.len() * 37, 1.5);
    let drawn = random.normals(1 << 17, 0.05);
    for (runtime, allowed) in each_runtime(2, 1e-2) {
        let mut student = Student::new(&model, &runtime, What::LowRank);
        let places = student.places.clone();
        assert_eq!(places.vectors, Places::of(&model).vectors);
        let before = Student::new(&model, &runtime, What::All).parameters;
        let matrices = places.vectors.start;
        assert_eq!(student.parameters[..matrices], before[..matrices]);
        let factors: Vec<_> = (places.layers.iter().enumerate())
            .flat_map(|(l, layer)| (0..7).map(move |i| (l, i)).zip(&layer.factors))
            .map(|(at, factors)| (at, factors.clone().expect("every matrix has factors")))
            .collect();
        for (_, factors) in &factors {
            assert!(student.at(&factors.b).iter().all(|b| *b == 0.0));
            student.parameters[factors.b.clone()].copy_from_slice(&drawn[..factors.b.len()]);
        }
        runtime.region(|team| student.follow(team));
        let mut whole = Student::new(&model, &runtime, What::All);
        whole.parameters[..matrices].copy_from_slice(&student.parameters[..matrices]);
        let derivatives = |student: &Student| {
            let mut gradients = vec![f32::NAN; student.trained().len()];
            let logits = |rows: Range<usize>, out: &mut Vec<f32>| {
                *out = teacher[rows.start * 37..rows.end * 37].to_vec();
            };
            runtime.region(|team| {
                Step::default().gradients(
                    team,
                    student,
                    &tokens,
                    length,
                    logits,
                    Gradients::From(student.first, &mut gradients),
                )
            });
            gradients
        };
        let (by_factors, by_matrices) = (derivatives(&student), derivatives(&whole));
        let vectors = &by_factors[..places.vectors.len()];
        assert_eq!(vectors, &by_matrices[places.vectors.clone()]);
        let near = |found: &[f32], expected: Vec<f64>, what: &str| {
            let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for (found, expected) in found.iter().zip(&expected) {
                let error = (f64::from(*found) - expected).abs();
                let name = runtime.kernels;
                assert!(
                    error <= allowed * largest,
                    "{name:?}, {what}: {found}, {expected}"
                );
            }
        };
        for ((l, i), factors) in &factors {
            let at = &places.layers[*l].weights[*i];
            let linear = &model.layers[*l].linears()[*i].weight;
            let (rows, cols) = (linear.rows, linear.cols);
            let rank = factors.a.len() / cols;
            let (a, b) = (student.at(&factors.a), student.at(&factors.b));
            let change = product((b, false), (a, false), (rows, rank, cols));
            let changed = student.at(at).iter().zip(&before[at.clone()]);
            let changed: Vec<f32> = changed.map(|(now, before)| now - before).collect();
            near(&changed, change, "W + B A");
            let dw = &by_matrices[at.clone()];
            let of =
                |place: &Range<usize>| &by_factors[place.start - matrices..place.end - matrices];
            let da = product((b, true), (dw, false), (rank, rows, cols));
            near(of(&factors.a), da, "dA");
            let db = product((dw, false), (a, true), (rows, cols, rank));
            near(of(&factors.b), db, "dB");
        }
    }
}

fn training(tokens: usize, what: What) -> Training {
    Training {
        budget: Budget::Tokens(tokens),
        rate: 3e-3,
        what,
        seed: 1,
    }
}

#[test]
fn training_brings_the_predictions_back_in_every_type() {
    for (block_type, what, wanted) in [
        (BlockType::F32, What::All, 0.7),
        (BlockType::F32, What::LowRank, 0.7),
        (BlockType::F32, What::Norms, 0.95),
        (BlockType::F16, What::All, 0.7),
        (BlockType::Q8_0, What::All, 0.7),
        (BlockType::Q4_0, What::LowRank, 0.85),
    ] {
        let synthetic = Synthetic::new(Shape {
            block_type,
            ..Shape::default()
        });
        let (dense, mut model) = (synthetic.load(), pruned(&synthetic));
        let (runtime, text) = (runtime(2), text(6000));
        let mut counted = 0;
        let (before, healed) = {
            let models = (&dense, &model);
            let mut trainer =
                Trainer::new(models, &runtime, training(40_000, what), &text, None).unwrap();
            let before = trainer.divergence(&model).unwrap();
            let healed = trainer.run(&mut |done, _| {
                counted = done;
                ControlFlow::Continue(())
            });
            (before, healed.unwrap())
        };
        assert_eq!((healed.tokens, healed.steps), (40_960, 40));
        assert_eq!(counted, 40_960);
        let matrices = model.layers[0].q.weight.decode(&model.map);
        healed.weights.apply(&mut model, &runtime).unwrap();
        let kept = matrices == model.layers[0].q.weight.decode(&model.map);
        assert_eq!(kept, what == What::Norms, "{what}");
        let models = (&dense, &model);
        let trainer = Trainer::new(models, &runtime, training(1, what), &text, None).unwrap();
        let after = trainer.divergence(&model).unwrap();
        assert!(
            after < wanted * before,
            "{block_type:?}, {what}: {before} to {after}"
        );
    }
}

#[test]
fn training_goes_on_to_the_bit_after_it_was_broken_off_and_is_the_same_for_any_number_of_threads() {
    for what in [What::All, What::LowRank] {
        goes_on_to_the_bit(what);
    }
}

fn goes_on_to_the_bit(what: What) {
    let synthetic = Synthetic::new(Shape::default());
    let (dense, model) = (synthetic.load(), pruned(&synthetic));
    let (text, folder) = (text(4000), tempfile::tempdir().unwrap());
    let path = folder.path().join("training");
    let run = |threads, key: Option<&str>, stop: Option<usize>| {
        let runtime = runtime(threads);
        let models = (&dense, &model);
        let mut trainer =
            Trainer::new(models, &runtime, training(12_000, what), &text, None).unwrap();
        trainer.checkpoints = key.map(|key| (path.clone(), key.to_owned()));
        trainer.between = Duration::ZERO;
        trainer.run(&mut |done, _| match stop.is_some_and(|stop| done >= stop) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    };
    let whole = run(2, None, None).unwrap();
    assert_eq!(whole.weights, run(1, None, None).unwrap().weights);
    let broken = run(2, Some("a"), Some(5000));
    assert!(
        matches!(broken, Err(TrainingError::Cancelled(_))),
        "{broken:?}"
    );
    assert!(path.exists());
    let resumed = run(2, Some("a"), None).unwrap();
    assert!(resumed.resumed >= 4 && resumed.steps == 12);
    assert_eq!(resumed.weights, whole.weights);
    // That of another training is not taken, nor a damaged one.
    let other = run(2, Some("b"), None).unwrap();
    assert_eq!((other.resumed, &other.weights), (0, &whole.weights));
    let _ = run(2, Some("c"), Some(5000));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = run(2, Some("c"), None).unwrap();
    assert_eq!((damaged.resumed, &damaged.weights), (0, &whole.weights));
}

#[test]
fn a_time_becomes_a_number_of_steps_once() {
    let synthetic = Synthetic::new(Shape::default());
    let (dense, model) = (synthetic.load(), pruned(&synthetic));
    let (runtime, text) = (runtime(2), text(4000));
    let by_time = Training {
        budget: Budget::Time(Duration::from_millis(300)),
        ..training(0, What::All)
    };
    let mut trainer = Trainer::new((&dense, &model), &runtime, by_time, &text, None).unwrap();
    let mut totals = Vec::new();
    let healed = trainer.run(&mut |_, total| {
        totals.push(total);
        ControlFlow::Continue(())
    });
    let healed = healed.unwrap();
    totals.dedup();
    assert_eq!(totals, [0, healed.tokens]);
    assert!(healed.steps >= 3);
    // As many tokens give the same weights.
    let by_tokens = training(healed.tokens, What::All);
    let mut again = Trainer::new((&dense, &model), &runtime, by_tokens, &text, None).unwrap();
    assert_eq!(again.run(&mut ignore).unwrap().weights, healed.weights);
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let synthetic = Synthetic::new(Shape::default());
    let (dense, model) = (synthetic.load(), pruned(&synthetic));
    let runtime = runtime(1);
    let short = Trainer::new(
        (&dense, &model),
        &runtime,
        training(1, What::All),
        &[1; 500],
        None,
    );
    let error = short.err().expect("two sequences are needed").to_string();
    assert!(
        error.contains("500 tokens") && error.contains("256"),
        "{error}"
    );
    let far = Training {
        rate: f32::MAX,
        ..training(20_000, What::All)
    };
    let text = text(4000);
    let mut trainer = Trainer::new((&dense, &model), &runtime, far, &text, None).unwrap();
    let error = trainer.run(&mut ignore).expect_err("nothing comes of it");
    assert!(matches!(error, TrainingError::NotNumbers { .. }), "{error}");
}

#[test]
fn the_curvature_foretells_what_a_small_change_does() {
    let synthetic = Synthetic::new(shape());
    let model = synthetic.load();
    let runtime = Runtime::new(1).unwrap();
    let mut random = Random::new(12);
    let length = 64;
    let tokens: Vec<u32> = (0..4 * length).map(|_| random.below(37) as u32).collect();
    let d = model.config.embedding_length;
    // Behind the last module a change at a position acts on no other one.
    let last = ModuleId::mlp(model.layers.len() - 1);
    let change = random.normals(d, 0.02);
    let mut student = Student::new(&model, &runtime, What::All);
    let mut step = Step::default();
    let (mut sum, draws) = (0.0, 100);
    let before = runtime.region(|team| {
        let before = step.logits(team, &student, &tokens, length);
        for _ in 0..draws {
            let chance: Vec<f32> = tokens.iter().map(|_| random.uniform() as f32).collect();
            step.curvatures(team, &student, &chance, &mut |_, module, _, dy| {
                for dy in dy.chunks_exact(d).filter(|_| module == last) {
                    let a: f32 = dy.iter().zip(&change).map(|(dy, c)| dy * c).sum();
                    sum += 0.5 * f64::from(a * a);
                }
            });
        }
        before
    });
    let foretold = sum / f64::from(draws) / tokens.len() as f64;
    let bias = student.places.layers[last.layer()].biases[6].clone();
    let bias = bias.expect("the model has biases");
    student.parameters[bias]
        .iter_mut()
        .zip(&change)
        .for_each(|(b, c)| *b += c);
    let after = runtime.region(|team| step.logits(team, &student, &tokens, length));
    let found = mean_divergence(&before, &after, 37);
    assert!(found > 1e-5, "{found}");
    let ratio = foretold / found;
    assert!((0.8..1.25).contains(&ratio), "{foretold}, {found}");
}

/// The mean of KL(p ‖ q) over rows of logits.
fn mean_divergence(p: &[f32], q: &[f32], vocabulary: usize) -> f64 {
    let logs = |row: &[f32]| -> Vec<f64> {
        let peak = row.iter().fold(f32::MIN, |m, x| m.max(*x));
        let sum: f64 = row.iter().map(|x| f64::from(x - peak).exp()).sum();
        row.iter().map(|x| f64::from(x - peak) - sum.ln()).collect()
    };
    let rows = p.chunks_exact(vocabulary).zip(q.chunks_exact(vocabulary));
    let each = rows.map(|(p, q)| {
        let pairs = logs(p).into_iter().zip(logs(q));
        pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    each.sum::<f64>() * vocabulary as f64 / p.len() as f64
}
