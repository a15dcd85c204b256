//! Choosing the next token from logits.

mod config;

pub use config::{SamplerConfig, SamplerOptions};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A sampler chain with its random numbers.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: ChaCha8Rng,
    /// Token and logit, and then probability, of what is still in the choice.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    pub fn new(config: SamplerConfig) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(config.seed),
            config,
            candidates: Vec::new(),
        }
    }

    /// The next token after `history`; `None` if a logit is not a number. `logits` are changed by the penalty.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Option<u32> {
        if logits.is_empty() || logits.iter().any(|l| l.is_nan()) {
            return None;
        }
        self.penalise(logits, history);
        if self.config.temperature <= 0.0 {
            return Some(most_likely(logits));
        }
        if self.keeps_all() {
            return Some(self.draw_from_all(logits));
        }
        self.candidates.clear();
        self.candidates
            .extend(logits.iter().enumerate().map(|(i, l)| (i as u32, *l)));
        self.keep_top_k();
        softmax(&mut self.candidates);
        self.keep_top_p();
        self.keep_min_p();
        self.draw()
    }

    fn keeps_all(&self) -> bool {
        self.config.top_k == 0 && self.config.top_p >= 1.0 && self.config.min_p <= 0.0
    }

    /// Where nothing is cut off, nothing need be sorted.
    fn draw_from_all(&mut self, logits: &[f32]) -> u32 {
        let best = logits[most_likely(logits) as usize];
        let weight = |l: f32| match l == best {
            // As in `softmax`: of equal infinities the difference is not a number.
            true => 1.0,
            false => ((l - best) / self.config.temperature).exp(),
        };
        let total: f64 = logits.iter().map(|l| f64::from(weight(*l))).sum();
        let mut left = uniform(&mut self.random) * total;
        for (token, logit) in logits.iter().enumerate() {
            left -= f64::from(weight(*logit));
            if left < 0.0 {
                return token as u32;
            }
        }
        most_likely(logits)
    }

    fn penalise(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.config.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let window = history.len().min(self.config.repetition_window);
        let mut recent = history[history.len() - window..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        for token in recent {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
    }

    /// Sorts by falling logit (by token where equal, so that the order is fixed) and cuts.
    fn keep_top_k(&mut self) {
        let by_rank = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = self.config.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_rank);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(by_rank);
    }

    fn keep_top_p(&mut self) {
        if self.config.top_p >= 1.0 {
            return;
        }
        let mut sum = 0.0;
        let enough = self.candidates.iter().position(|(_, p)| {
            sum += p;
            sum >= self.config.top_p
        });
        if let Some(last) = enough {
            self.candidates.truncate(last + 1);
        }
    }

    fn keep_min_p(&mut self) {
        let least = self.candidates[0].1 * self.config.min_p;
        self.candidates.retain(|(_, p)| *p >= least);
    }

    /// Draws with probabilities p^(1 / temperature), which is what dividing the logits amounts to.
    fn draw(&mut self) -> Option<u32> {
        let best = self.candidates[0].1;
        let exponent = 1.0 / self.config.temperature;
        for (_, p) in &mut self.candidates {
            *p = (*p / best).powf(exponent);
        }
        let total: f32 = self.candidates.iter().map(|(_, p)| p).sum();
        let mut left = uniform(&mut self.random) as f32 * total;
        for (token, p) in &self.candidates {
            left -= p;
            if left < 0.0 {
                return Some(*token);
            }
        }
        self.candidates.last().map(|(token, _)| *token)
    }
}

/// 53 random bits: uniform in [0, 1).
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The token with the greatest logit; the first of equals.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Logits, sorted by fall, to probabilities.
fn softmax(candidates: &mut [(u32, f32)]) {
    let best = candidates[0].1;
    for (_, l) in candidates.iter_mut() {
        // Where everything is −∞ but the best, or all are equal infinities, the difference must not be NaN.
        *l = if *l == best { 1.0 } else { (*l - best).exp() };
    }
    let total: f32 = candidates.iter().map(|(_, p)| p).sum();
    candidates.iter_mut().for_each(|(_, p)| *p /= total);
}
