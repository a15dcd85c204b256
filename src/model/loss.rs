//! How well logits predict tokens, and how far they are from those of another model.

use crate::kernels::Team;

/// The negative log-likelihood, in nats, of every target under its row of logits `[targets.len(), vocabulary]`.
pub fn negative_log_likelihoods(team: &Team, logits: &[f32], targets: &[u32]) -> Vec<f64> {
    let vocabulary = logits.len().checked_div(targets.len()).unwrap_or(0);
    team.map(targets.len(), |i| {
        negative_log_likelihood(&logits[i * vocabulary..][..vocabulary], targets[i])
    })
}

/// −log softmax(logits)\[target\]
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let peak = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let sum: f64 = logits.iter().map(|l| f64::from((l - peak).exp())).sum();
    sum.ln() - f64::from(logits[target as usize] - peak)
}

/// The predictions p of one model at some positions, to which others are compared by KL(p ‖ q) = Σ p (ln p − ln q).
///
/// Other than the likelihood of a text, the divergence has no part that both models share, so that a few hundred positions
/// tell small changes apart.
#[derive(Debug, Default)]
pub struct Predictions {
    vocabulary: usize,
    /// p, `[positions, vocabulary]`
    probabilities: Vec<f32>,
    /// Σ p ln p of every position.
    negative_entropies: Vec<f64>,
}

impl Predictions {
    /// Adds positions, given their logits `[n, vocabulary]`.
    pub fn add(&mut self, team: &Team, logits: &[f32], vocabulary: usize) {
        self.vocabulary = vocabulary;
        let start = self.probabilities.len();
        self.probabilities.extend_from_slice(logits);
        let new = &mut self.probabilities[start..];
        team.chunks_mut(new, vocabulary, |_, row| {
            let (peak, sum) = log_sum_exp(row);
            row.iter_mut()
                .for_each(|l| *l = ((*l - peak) - sum as f32).exp());
        });
        let new = &self.probabilities[start..];
        let entropies = team.map(new.len() / vocabulary, |i| {
            let p = &new[i * vocabulary..][..vocabulary];
            let l = &logits[i * vocabulary..][..vocabulary];
            let (peak, sum) = log_sum_exp(l);
            dot_shifted(p, l, peak) - sum
        });
        self.negative_entropies.extend(entropies);
    }

    /// KL(p ‖ q), in nats, of the positions from `first` on, given q's logits `[n, vocabulary]`.
    pub fn divergences(&self, team: &Team, first: usize, logits: &[f32]) -> Vec<f64> {
        let vocabulary = self.vocabulary;
        team.map(logits.len() / vocabulary, |i| {
            let p = &self.probabilities[(first + i) * vocabulary..][..vocabulary];
            let q = &logits[i * vocabulary..][..vocabulary];
            let (peak, sum) = log_sum_exp(q);
            self.negative_entropies[first + i] - (dot_shifted(p, q, peak) - sum)
        })
    }
}

/// Values that are summed side by side, so that the compiler takes vector instructions; the sums of a piece are added up in
/// double precision.
const LANES: usize = 16;
const PIECE: usize = 64 * LANES;

/// The largest logit, and ln Σ exp(logit − largest).
pub(crate) fn log_sum_exp(logits: &[f32]) -> (f32, f64) {
    let peak = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let mut total = 0.0;
    for piece in logits.chunks(PIECE) {
        let mut lanes = [0.0f32; LANES];
        let chunks = piece.chunks_exact(LANES);
        let rest: f32 = chunks.remainder().iter().map(|l| fast_exp(l - peak)).sum();
        for chunk in chunks {
            for (lane, l) in lanes.iter_mut().zip(chunk) {
                *lane += fast_exp(l - peak);
            }
        }
        total += f64::from(lanes.iter().sum::<f32>() + rest);
    }
    (peak, total.ln())
}

/// Σ p (l − peak)
fn dot_shifted(p: &[f32], l: &[f32], peak: f32) -> f64 {
    let pieces = p.chunks(PIECE).zip(l.chunks(PIECE));
    pieces
        .map(|(p, l)| {
            let mut lanes = [0.0f32; LANES];
            for (p, l) in p.chunks(LANES).zip(l.chunks(LANES)) {
                for (lane, (p, l)) in lanes.iter_mut().zip(p.iter().zip(l)) {
                    *lane += p * (l - peak);
                }
            }
            f64::from(lanes.iter().sum::<f32>())
        })
        .sum()
}

/// exp(x) for x ≤ 0, to about 2 · 10⁻⁷ of itself, without a branch or a call: 2ⁿ exp(r) with |r| ≤ ln 2 / 2 and Taylor's
/// polynomial of degree 6.
#[inline(always)]
pub(crate) fn fast_exp(x: f32) -> f32 {
    // Adding and subtracting this rounds to whole numbers.
    const ROUNDER: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.max(-87.0);
    let n = (x * std::f32::consts::LOG2_E + ROUNDER) - ROUNDER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    // n is whole and between −126 and 0, so this is 2ⁿ.
    let power = f32::from_bits(((n + ROUNDER).to_bits() << 23).wrapping_add(127 << 23));
    p * power
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    fn solo() -> Team {
        Team::solo(Kernels::get().expect("an instruction set"))
    }

    #[test]
    fn the_fast_exponential_is_as_exact_as_single_precision_allows() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(fast_exp(x)) - exact).abs() / exact;
            assert!(error < 4e-7, "exp({x}): off by {error}");
        }
        assert!(fast_exp(-1e9) < 1e-37);
    }

    #[test]
    fn divergences_are_those_of_the_definition() {
        let p = [0.5f64, 0.25, 0.125, 0.125];
        let q = [0.1f64, 0.2, 0.3, 0.4];
        let logits = |d: &[f64], shift: f64| -> Vec<f32> {
            d.iter().map(|v| (v.ln() + shift) as f32).collect()
        };
        let mut predictions = Predictions::default();
        predictions.add(&solo(), &logits(&p, 3.0), 4);
        predictions.add(&solo(), &logits(&q, -1.0), 4);
        let expected: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let found = predictions.divergences(&solo(), 0, &logits(&q, 7.0));
        assert!((found[0] - expected).abs() < 1e-6, "{found:?}, {expected}");
        let same = predictions.divergences(&solo(), 1, &logits(&q, 2.0));
        assert!(same[0].abs() < 1e-6, "{same:?}");
    }
}
