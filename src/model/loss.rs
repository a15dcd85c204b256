//! How well logits predict tokens.

use std::sync::Mutex;

use crate::kernels::Team;

/// The negative log-likelihood, in nats, of every target under its row of logits `[targets.len(), vocabulary]`.
pub fn negative_log_likelihoods(team: &Team, logits: &[f32], targets: &[u32]) -> Vec<f64> {
    let vocabulary = logits.len().checked_div(targets.len()).unwrap_or(0);
    let losses: Vec<Mutex<f64>> = targets.iter().map(|_| Mutex::new(f64::NAN)).collect();
    team.items(targets.len(), |_, i| {
        let loss = negative_log_likelihood(&logits[i * vocabulary..][..vocabulary], targets[i]);
        if let Ok(mut slot) = losses[i].lock() {
            *slot = loss;
        }
    });
    losses
        .into_iter()
        .map(|loss| loss.into_inner().unwrap_or(f64::NAN))
        .collect()
}

/// −log softmax(logits)\[target\]
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let peak = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let sum: f64 = logits.iter().map(|l| f64::from((l - peak).exp())).sum();
    sum.ln() - f64::from(logits[target as usize] - peak)
}
