//! What takes tokens out of the choice.

use super::candidates::Candidates;

/// Keeps logits within n standard deviations of the best one. Infinities count for nothing in the deviation.
pub(super) fn top_n_sigma(candidates: &mut Candidates, n: f32) {
    let logits = candidates.items().iter().map(|item| f64::from(item.logit));
    let finite = logits.filter(|logit| logit.is_finite());
    let (mut count, mut sum, mut squares) = (0usize, 0.0, 0.0);
    let shift = f64::from(candidates.best().logit);
    if !shift.is_finite() {
        return;
    }
    for logit in finite {
        count += 1;
        sum += logit - shift;
        squares += (logit - shift) * (logit - shift);
    }
    let mean = sum / count as f64;
    let deviation = (squares / count as f64 - mean * mean).max(0.0).sqrt();
    let least = shift - f64::from(n) * deviation;
    candidates.retain(|item| f64::from(item.logit) >= least);
}

/// Keeps tokens whose surprise is nearest to the entropy, which is the surprise to be expected.
pub(super) fn typical(candidates: &mut Candidates, share: f32) {
    let entropy = entropy(candidates) as f32;
    candidates.keep_first(share, |item| (-item.p.ln() - entropy).abs());
}

/// Keeps tokens of at least this share of the best one's probability.
pub(super) fn min_p(candidates: &mut Candidates, share: f32) {
    let items = candidates.probable();
    let best = items.iter().map(|item| item.p).fold(0.0, f32::max);
    let least = best * share;
    candidates.retain(|item| item.p >= least);
}

/// Takes out all tokens that reach the threshold but the least likely of them.
pub(super) fn exclude_top_choices(candidates: &mut Candidates, threshold: f32) {
    let items = candidates.probable();
    let reaching = items.iter().filter(|item| item.p >= threshold);
    // Of equals the last in rank stays.
    let stays = reaching.min_by(|a, b| a.p.total_cmp(&b.p).then(b.token.cmp(&a.token)));
    if let Some(stays) = stays.copied() {
        candidates.retain(|item| item.p < threshold || item.token == stays.token);
    }
}

/// The entropy of what is in the choice, in nats.
pub(super) fn entropy(candidates: &mut Candidates) -> f64 {
    let items = candidates.probable().iter();
    let probabilities = items.map(|item| f64::from(item.p)).filter(|p| *p > 0.0);
    -probabilities.map(|p| p * p.ln()).sum::<f64>()
}
