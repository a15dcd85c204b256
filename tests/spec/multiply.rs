//! Products of floats for training, on every instruction set that this machine has, against naive code.

use crate::common::Random;
use flapjack::kernels::{Factor, Isa, Kernels, Pool, Store, Team, add_gram, multiply};
use half::bf16;

/// Rows of the product, places of the sum, columns.
const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (3, 5, 2),
    (16, 32, 16),
    (17, 33, 15),
    (31, 0, 7),
    (64, 64, 256),
    (97, 513, 33),
    (300, 70, 290),
    (33, 1100, 47),
    (515, 129, 261),
];

fn every_isa() -> impl Iterator<Item = Kernels> {
    Isa::available().filter_map(Kernels::for_isa)
}

/// A B in double precision, of factors that were rounded to bfloat16 or not; and the sums of the terms' sizes.
fn naive(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize), round: bool) -> Vec<(f64, f64)> {
    let of = |v: f32| match round {
        true => bf16::from_f32(v).to_f64(),
        false => f64::from(v),
    };
    (0..m * n)
        .map(|at| {
            let terms = (0..k).map(|s| of(a[at / n * k + s]) * of(b[s * n + at % n]));
            terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()))
        })
        .collect()
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| values[i % rows * cols + i / rows])
        .collect()
}

#[test]
fn products_are_those_of_the_definition_whichever_way_factors_lie() {
    let mut random = Random::new(3);
    for (m, k, n) in SHAPES {
        let (a, b) = (random.normals(m * k, 1.0), random.normals(k * n, 1.0));
        let there = random.normals(m * n, 1.0);
        let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
        let (exact, rounded) = (
            naive(&a, &b, (m, k, n), false),
            naive(&a, &b, (m, k, n), true),
        );
        for kernels in every_isa() {
            let pool = Pool::new(2).unwrap();
            let in_bf16 = ["avx512-bf16", "amx"].contains(&kernels.isa().name());
            let expected = if in_bf16 { &rounded } else { &exact };
            for which in 0..4 {
                let left = match which % 2 {
                    0 => Factor::new(&a, m, k),
                    _ => Factor::new(&at, k, m).t(),
                };
                let right = match which / 2 {
                    0 => Factor::new(&b, k, n),
                    _ => Factor::new(&bt, n, k).t(),
                };
                for into in [Store::Replace, Store::Add] {
                    let mut out = match into {
                        Store::Replace => vec![f32::NAN; m * n],
                        Store::Add => there.clone(),
                    };
                    let mut alone = out.clone();
                    pool.region(kernels, |team| multiply(team, left, right, into, &mut out));
                    multiply(&Team::solo(kernels), left, right, into, &mut alone);
                    assert_eq!(out, alone, "the same whoever computes it");
                    for (i, (found, (sum, size))) in out.iter().zip(expected).enumerate() {
                        let before = if into == Store::Add {
                            f64::from(there[i])
                        } else {
                            0.0
                        };
                        let error = (f64::from(*found) - before - sum).abs();
                        let allowed = 3e-6 * (size + before.abs()) + 1e-12;
                        assert!(
                            error <= allowed,
                            "{kernels:?} {m}x{k}x{n} way {which} {into:?}, {i}: {found}, {sum} + {before}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_gram_matrix_is_the_lower_triangle_of_the_product() {
    let mut random = Random::new(5);
    for (n, c) in [(1, 1), (5, 33), (70, 290), (129, 600)] {
        let x = random.normals(n * c, 1.0);
        let there = random.normals(c * c, 1.0);
        for kernels in every_isa() {
            let (mut whole, mut half) = (there.clone(), there.clone());
            let x = Factor::new(&x, n, c);
            multiply(&Team::solo(kernels), x.t(), x, Store::Add, &mut whole);
            let pool = Pool::new(2).unwrap();
            pool.region(kernels, |team| add_gram(team, x, &mut half));
            for row in 0..c {
                let lower = row * c..row * c + row + 1;
                assert_eq!(half[lower.clone()], whole[lower], "{kernels:?} {n}x{c}");
            }
            if c > 256 {
                let last = c - 1;
                assert_eq!(half[last], there[last], "{c}: what is far above");
            }
        }
    }
}

#[test]
fn parts_of_larger_matrices_are_multiplied_where_they_lie() {
    let mut random = Random::new(4);
    let (m, k, n) = (37, 24, 50);
    let (a_stride, b_stride, stride) = (60, 53, 70);
    let (a, b) = (
        random.normals(m * a_stride, 1.0),
        random.normals(k * b_stride, 1.0),
    );
    let part = |values: &[f32], rows: usize, cols: usize, stride: usize| -> Vec<f32> {
        let at = |i: usize| values[i / cols * stride + i % cols];
        (0..rows * cols).map(at).collect()
    };
    let (small_a, small_b) = (part(&a, m, k, a_stride), part(&b, k, n, b_stride));
    for kernels in every_isa() {
        let mut out = vec![7.0; m * stride];
        let (left, right) = (
            Factor::strided(&a, m, k, a_stride),
            Factor::strided(&b, k, n, b_stride),
        );
        kernels.multiply(left, right, Store::Replace, &mut out, stride);
        let mut expected = vec![0.0; m * n];
        let (left, right) = (Factor::new(&small_a, m, k), Factor::new(&small_b, k, n));
        multiply(
            &Team::solo(kernels),
            left,
            right,
            Store::Replace,
            &mut expected,
        );
        for (row, expected) in out.chunks_exact(stride).zip(expected.chunks_exact(n)) {
            assert_eq!(&row[..n], expected);
            assert!(
                row[n..].iter().all(|v| *v == 7.0),
                "nothing else is written"
            );
        }
    }
}
