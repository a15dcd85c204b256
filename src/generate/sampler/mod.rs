//! Choosing the next token from logits: a chain of steps over the tokens that are still in the choice.
//!
//! | file | what it does |
//! | --- | --- |
//! | `config` | what can be chosen, and in which order the steps come |
//! | `candidates` | the tokens that are still in the choice |
//! | `penalties` | repetition, frequency and presence penalties; n-grams that may not come twice |
//! | `dry` | a penalty for going on with a repetition |
//! | `cuts` | top-n-sigma, typical, min-p, and the exclusion of top choices |
//! | `temperature` | temperature, fixed or dynamic |
//! | `mirostat` | Mirostat 2.0 |
//!
//! Biases and bans come first. Then the steps follow in [`SamplerConfig::steps`]' order, by default llama.cpp's: penalties, DRY,
//! top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature. At temperature 0 nothing is cut: what is most likely after biases,
//! bans and penalties is taken. With Mirostat biases, bans, penalties and temperature come first too, and it takes the place of the
//! rest.

mod candidates;
mod config;
mod cuts;
mod dry;
mod mirostat;
mod penalties;
mod temperature;

pub use config::{SamplerConfig, SamplerOptions, SamplerStep, UnknownStep};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::model::fast_exp;
use crate::tokenize::Tokenizer;
use candidates::Candidates;
use dry::Breakers;
use mirostat::Mirostat;

/// A sampler chain with its random numbers.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: ChaCha8Rng,
    breakers: Breakers,
    mirostat: Mirostat,
    /// The logits that are added to single tokens, in the order of their numbers.
    bias: Vec<(u32, f32)>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler that knows no texts of tokens, and so none of DRY's breakers.
    pub fn new(config: SamplerConfig) -> Self {
        // Several for one token add up.
        let mut bias = config.logit_bias.clone();
        bias.retain(|(_, bias)| !bias.is_nan());
        bias.sort_by_key(|(token, _)| *token);
        bias.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 += next.1;
            }
            same
        });
        Self {
            random: ChaCha8Rng::seed_from_u64(config.seed),
            breakers: Breakers::default(),
            mirostat: Mirostat::new(&config),
            bias,
            config,
            candidates: Candidates::default(),
        }
    }

    pub fn with_tokenizer(config: SamplerConfig, tokenizer: &Tokenizer) -> Self {
        let breakers = match dry::is_on(&config) {
            true => Breakers::new(&config.dry_breakers, tokenizer),
            false => Breakers::default(),
        };
        Self {
            breakers,
            ..Self::new(config)
        }
    }

    /// The next token after `history`, which is prompt and answer; `None` if a logit is not a number.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Option<u32> {
        self.sample_among(logits, history, None)
    }

    /// The same among tokens that are allowed: some, in the order of their numbers, or all (`None`).
    ///
    /// # Panics
    /// If a token that is allowed has no logit.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        history: &[u32],
        allowed: Option<&[u32]>,
    ) -> Option<u32> {
        let is_nothing = logits.is_empty() || allowed.is_some_and(<[u32]>::is_empty);
        if is_nothing || logits.iter().any(|l| l.is_nan()) {
            return None;
        }
        let greedy = self.config.temperature <= 0.0;
        if allowed.is_none() && !self.changes_logits() {
            if greedy {
                return Some(most_likely(logits));
            }
            if self.only_temperature() {
                return Some(self.draw_from_all(logits));
            }
        }
        self.candidates.fill(logits, allowed);
        self.candidates.change(&self.bias, |logit, bias| {
            let sum = *logit + bias;
            // Infinity and its opposite: who sets a bias decides.
            *logit = if sum.is_nan() { *bias } else { sum };
        });
        penalties::ban_ngrams(&mut self.candidates, self.config.no_repeat_ngram, history);
        for i in 0..self.config.steps.len() {
            let step = self.config.steps[i];
            let cuts = !matches!(
                step,
                SamplerStep::Penalties | SamplerStep::Dry | SamplerStep::Temperature
            );
            let skipped = match step {
                SamplerStep::Temperature => greedy,
                _ => cuts && (greedy || self.config.mirostat),
            };
            if !skipped {
                self.apply(step, history);
            }
        }
        if greedy {
            return Some(self.candidates.best().token);
        }
        let uniform = uniform(&mut self.random);
        let drawn = match self.config.mirostat {
            true => self
                .mirostat
                .draw(&mut self.candidates, &self.config, uniform),
            false => self.candidates.draw(uniform),
        };
        Some(drawn.token)
    }

    fn has(&self, step: SamplerStep) -> bool {
        self.config.steps.contains(&step)
    }

    /// Whether logits are changed before anything is cut.
    fn changes_logits(&self) -> bool {
        !self.bias.is_empty()
            || self.config.no_repeat_ngram > 0
            || self.has(SamplerStep::Penalties) && penalties::is_on(&self.config)
            || self.has(SamplerStep::Dry) && dry::is_on(&self.config)
    }

    /// Whether nothing is cut.
    fn only_temperature(&self) -> bool {
        let SamplerConfig {
            mirostat,
            dynatemp_range,
            ..
        } = self.config;
        let mut steps = self.config.steps.iter();
        !mirostat && dynatemp_range <= 0.0 && !steps.any(|step| self.cuts(*step))
    }

    /// Whether a step takes tokens out of the choice.
    fn cuts(&self, step: SamplerStep) -> bool {
        let config = &self.config;
        match step {
            SamplerStep::TopNSigma => config.top_n_sigma > 0.0,
            SamplerStep::TopK => config.top_k > 0,
            SamplerStep::Typical => config.typical_p < 1.0,
            SamplerStep::TopP => config.top_p < 1.0,
            SamplerStep::MinP => config.min_p > 0.0,
            // Two tokens cannot both have more than half.
            SamplerStep::Xtc => config.xtc_probability > 0.0 && config.xtc_threshold <= 0.5,
            SamplerStep::Penalties | SamplerStep::Dry | SamplerStep::Temperature => false,
        }
    }

    fn apply(&mut self, step: SamplerStep, history: &[u32]) {
        let cuts = self.cuts(step);
        let Self {
            config, candidates, ..
        } = self;
        match step {
            SamplerStep::Penalties if penalties::is_on(config) => {
                penalties::penalise(candidates, config, history);
            }
            SamplerStep::Dry if dry::is_on(config) => {
                dry::penalise(candidates, config, &self.breakers, history);
            }
            SamplerStep::Temperature => temperature::apply(candidates, config),
            SamplerStep::TopNSigma if cuts => cuts::top_n_sigma(candidates, config.top_n_sigma),
            SamplerStep::TopK if cuts => candidates.keep_best(config.top_k),
            SamplerStep::Typical if cuts => cuts::typical(candidates, config.typical_p),
            SamplerStep::TopP if cuts => candidates.keep_probability(config.top_p),
            SamplerStep::MinP if cuts => cuts::min_p(candidates, config.min_p),
            SamplerStep::Xtc if cuts => {
                let happens = uniform(&mut self.random) < f64::from(config.xtc_probability);
                if happens {
                    cuts::exclude_top_choices(candidates, config.xtc_threshold);
                }
            }
            _ => {}
        }
    }

    /// Where nothing is cut off, nothing need be collected.
    fn draw_from_all(&mut self, logits: &[f32]) -> u32 {
        let temperature = match self.has(SamplerStep::Temperature) {
            true => self.config.temperature,
            false => 1.0,
        };
        let best = logits[most_likely(logits) as usize];
        let weight = |l: f32| {
            let x = (l - best) / temperature;
            match (l == best, x < LEAST_EXPONENT) {
                (true, _) => 1.0,
                (false, true) => 0.0,
                (false, false) => fast_exp(x),
            }
        };
        // What is not in a piece need not be looked at again.
        let sums: Vec<f64> = logits.chunks(PIECE).map(|l| sum(l, weight)).collect();
        let mut left = uniform(&mut self.random) * sums.iter().sum::<f64>();
        for (piece, (logits, sum)) in logits.chunks(PIECE).zip(&sums).enumerate() {
            if left >= *sum {
                left -= sum;
                continue;
            }
            // By rounding, the weights of a piece may come to less than their sum.
            let mut last = None;
            for (i, logit) in logits.iter().enumerate() {
                let weight = weight(*logit);
                left -= f64::from(weight);
                last = if weight > 0.0 { Some(i) } else { last };
                if left < 0.0 {
                    break;
                }
            }
            if let Some(i) = last {
                return (piece * PIECE + i) as u32;
            }
        }
        most_likely(logits)
    }
}

/// Logits whose weights are summed together.
const PIECE: usize = 1024;
/// Weights that are summed side by side, so that the compiler takes vector instructions.
const LANES: usize = 16;
/// Below this, e to it is no longer a normal number, and no token is drawn by it.
const LEAST_EXPONENT: f32 = -87.0;

/// The sum of the weights of some logits.
fn sum(logits: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|l| weight(*l)).sum();
    for chunk in chunks {
        for (lane, l) in lanes.iter_mut().zip(chunk) {
            *lane += weight(*l);
        }
    }
    f64::from(lanes.iter().sum::<f32>() + rest)
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
