//! What is asked of a generation, and what comes of it.

use std::time::Duration;

use super::{Grammar, SamplerConfig, TokenLogprob};

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The tokens that come first, behind what the sequence has already.
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampler: SamplerConfig,
    /// Texts that end the answer, and are not part of it.
    pub stop: Vec<String>,
    /// Go on after the model says that its text has ended.
    pub ignore_end: bool,
    /// What the answer must be like; it ends where that is complete.
    pub grammar: Option<Grammar>,
    /// Tell how likely the model held each token that was generated, and so many that it held most likely; `None` for not.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt, except the first. The prompt is then computed anew, whatever others have of it.
    pub prompt_logprobs: Option<usize>,
}

impl Default for Request {
    /// An answer of 128 tokens to an empty prompt.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            max_tokens: 128,
            sampler: SamplerConfig::default(),
            stop: Vec::new(),
            ignore_end: false,
            grammar: None,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl Request {
    /// A request with this prompt, and defaults for the rest.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            ..Self::default()
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has as many tokens as were asked for.
    Length,
    /// The model ended its text, or the grammar of the answer is complete.
    EndOfText,
    StopString,
    ContextFull,
    /// Whoever asked has [stopped](super::Generation::stop) it.
    Stopped,
}

/// How long things took. The first generated token comes out of the prompt's last position and counts to the prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Tokens of the prompt that went through the model.
    pub prompt_tokens: usize,
    pub prompt: Duration,
    /// Forward passes of one token.
    pub steps: usize,
    pub generation: Duration,
}

impl Timings {
    /// Tokens per second of the prompt.
    pub fn prompt_speed(&self) -> f64 {
        per_second(self.prompt_tokens, self.prompt)
    }

    /// Tokens per second of generation; `None` if there was no step.
    pub fn generation_speed(&self) -> Option<f64> {
        (self.steps > 0).then(|| per_second(self.steps, self.generation))
    }
}

fn per_second(count: usize, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64().max(1e-9)
}

/// What came out of a request.
#[derive(Debug, Clone)]
pub struct Generated {
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub timings: Timings,
    /// Of each token, where they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Of the token with which the model ended its text, which is not among the tokens; `None` if it did not, or they were not
    /// asked for.
    pub end_logprob: Option<TokenLogprob>,
    /// Of the prompt's second token and of those behind it, where they were asked for.
    pub prompt_logprobs: Vec<TokenLogprob>,
}

/// Tokens at the end of an answer that are looked at for repetition, and the longest piece that counts as one. A list or a
/// table repeats its layout, but hardly 96 tokens of it exactly.
const REPEATED: usize = 96;
const LONGEST_PIECE: usize = 32;

impl Generated {
    /// The length in tokens of the piece that the end of the answer repeats again and again; `None` where it does not.
    pub fn repeats(&self) -> Option<usize> {
        let end = self.tokens.last_chunk::<REPEATED>()?;
        (1..=LONGEST_PIECE).find(|&piece| end[piece..] == end[..REPEATED - piece])
    }
}
