//! Temperature, fixed or by how sure the model is.

use super::SamplerConfig;
use super::candidates::Candidates;
use super::cuts::entropy;

pub(super) fn apply(candidates: &mut Candidates, config: &SamplerConfig) {
    let temperature = match config.dynatemp_range > 0.0 {
        true => dynamic(candidates, config),
        false => config.temperature,
    };
    if temperature != 1.0 {
        // So low that all but the best vanish, where it comes to nothing.
        let temperature = temperature.max(1e-6);
        candidates.scale(|logit| logit / temperature);
    }
}

/// The temperature for the entropy of what is in the choice.
fn dynamic(candidates: &mut Candidates, config: &SamplerConfig) -> f32 {
    let least = (config.temperature - config.dynatemp_range).max(0.0);
    let most = config.temperature + config.dynatemp_range;
    let greatest = (candidates.len() as f64).ln();
    let share = match greatest > 0.0 {
        true => (entropy(candidates) / greatest) as f32,
        false => 0.0,
    };
    least + (most - least) * share.powf(config.dynatemp_exponent)
}
