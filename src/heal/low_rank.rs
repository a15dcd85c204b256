//! Low-rank training: a matrix W `[rows, cols]` of the layers becomes W + B A, with A `[rank, cols]` and B `[rows, rank]`, and these are
//! trained in its place (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).
//!
//! Few values find less chance in a short text to follow than all weights do, and neither the derivatives by W nor moments of it are
//! needed. The passes run with the sum W + B A, made anew after every step, so that nothing else in them knows of factors.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::backward::Gradients;
use super::layout::{FactorPlaces, Places};
use super::student::Student;
use crate::kernels::{Factor, Store, Team, multiply};

/// The rank of a change.
pub const RANK: usize = 16;
/// The factors that training begins with follow from it.
const SEED: u64 = 0;

/// Makes factors what they are in the beginning: A evenly drawn, with rows of length 1 or so, and B 0, so that nothing is changed yet.
pub(super) fn begin(places: &Places, parameters: &mut [f32]) {
    let factors = places.layers.iter().flat_map(|layer| &layer.factors);
    for (i, FactorPlaces { a, b }) in factors.flatten().enumerate() {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        random.set_stream(i as u64);
        // Of values between -w and w the mean square is w² / 3.
        let cols = a.len() / RANK;
        let width = (3.0 / cols as f32).sqrt();
        for value in &mut parameters[a.clone()] {
            *value = random.random_range(-width..width);
        }
        parameters[b.clone()].fill(0.0);
    }
}

/// The derivatives by the factors of W in y = x Wᵀ: dB = dyᵀ (x Aᵀ) and dA = (dy B)ᵀ x. x is `[n, cols]`, dy `[n, rows]`.
pub(super) fn backward(
    team: &Team,
    student: &Student,
    places: &FactorPlaces,
    (x, dy): (&[f32], &[f32]),
    n: usize,
    gradients: &mut Gradients,
) {
    let FactorPlaces { a, b } = places;
    let (cols, rows) = (x.len() / n, dy.len() / n);
    let rank = a.len() / cols;
    let (x, dy) = (Factor::new(x, n, cols), Factor::new(dy, n, rows));
    let mut low = vec![0.0; n * rank];
    if let Some(db) = gradients.at(b) {
        let a = Factor::new(student.at(a), rank, cols);
        multiply(team, x, a.t(), Store::Replace, &mut low);
        let low = Factor::new(&low, n, rank);
        multiply(team, dy.t(), low, Store::Replace, db);
    }
    if let Some(da) = gradients.at(a) {
        let b = Factor::new(student.at(b), rows, rank);
        multiply(team, dy, b, Store::Replace, &mut low);
        let low = Factor::new(&low, n, rank);
        multiply(team, low.t(), x, Store::Replace, da);
    }
}

/// W += B A, with A `[rank, cols]`, B `[rows, rank]` and W `[rows, cols]`.
pub(super) fn add(team: &Team, a: &[f32], b: &[f32], rows: usize, cols: usize, w: &mut [f32]) {
    let rank = a.len() / cols;
    let (a, b) = (Factor::new(a, rank, cols), Factor::new(b, rows, rank));
    multiply(team, b, a, Store::Add, w);
}
