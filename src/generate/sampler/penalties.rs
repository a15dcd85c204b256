//! What makes tokens of the recent text less likely: repetition, frequency and presence penalties, and n-grams that may not come
//! twice.

use super::SamplerConfig;
use super::candidates::Candidates;

/// Tokens and how often they occur, in the order of their numbers.
fn counts(tokens: &[u32]) -> Vec<(u32, usize)> {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    let groups = sorted.chunk_by(|a, b| a == b);
    groups.map(|group| (group[0], group.len())).collect()
}

pub(super) fn is_on(config: &SamplerConfig) -> bool {
    let SamplerConfig {
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        ..
    } = config;
    *repetition_penalty != 1.0 || *frequency_penalty != 0.0 || *presence_penalty != 0.0
}

/// The three penalties on what occurs in the window.
pub(super) fn penalise(candidates: &mut Candidates, config: &SamplerConfig, history: &[u32]) {
    let window = history.len().min(config.repetition_window);
    let recent = counts(&history[history.len() - window..]);
    candidates.change(&recent, |logit, count| {
        *logit = match *logit > 0.0 {
            true => *logit / config.repetition_penalty,
            false => *logit * config.repetition_penalty,
        };
        *logit -= config.frequency_penalty * *count as f32 + config.presence_penalty;
    });
}

/// Bans the tokens with which an n-gram would come again.
pub(super) fn ban_ngrams(candidates: &mut Candidates, n: usize, history: &[u32]) {
    if n == 0 || history.len() + 1 < n {
        return;
    }
    let end = &history[history.len() + 1 - n..];
    let repeated = history.windows(n).filter(|gram| gram[..n - 1] == *end);
    let mut banned: Vec<(u32, ())> = repeated.map(|gram| (gram[n - 1], ())).collect();
    banned.sort_unstable();
    banned.dedup();
    candidates.change(&banned, |logit, ()| *logit = f32::NEG_INFINITY);
}
