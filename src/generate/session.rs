//! A model, its KV cache and the tokens so far.

use std::io;
use std::time::{Duration, Instant};

use super::{GenerateError, Sampler, SamplerConfig, StopStrings};
use crate::kernels::Runtime;
use crate::model::{KvCache, Model, Scratch, Unobserved};
use crate::tokenize::Tokenizer;

/// Tokens of a prompt that go through the model together: enough to use every decoded weight often, few enough that
/// their activations stay in the cache.
const PROMPT_BATCH: usize = 512;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampler: SamplerConfig,
    pub stop: Vec<String>,
    /// Go on after the model says that its text has ended.
    pub ignore_end: bool,
}

/// Why generation stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// As many tokens as were asked for.
    Length,
    /// The model ended its text.
    EndOfText,
    StopString,
    ContextFull,
}

/// How long things took. The first generated token comes out of the prompt's last position and counts to the prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
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

/// What came out.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub timings: Timings,
}

/// One text in the making.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    runtime: &'m Runtime,
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl<'m> Session<'m> {
    /// A session with room for `context` positions.
    pub fn new(model: &'m Model, runtime: &'m Runtime, context: usize) -> Self {
        Self::with_cache(model, runtime, KvCache::new(model, context))
    }

    /// A session on a cache of the model's, which may hold positions already.
    pub fn with_cache(model: &'m Model, runtime: &'m Runtime, cache: KvCache) -> Self {
        Self {
            model,
            runtime,
            cache,
            scratch: Scratch::new(),
            logits: Vec::new(),
        }
    }

    /// Tokens that the model has seen.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// Takes tokens in and returns the logits `[vocabulary]` behind the last of them.
    ///
    /// # Errors
    /// If there are none, or one is not in the vocabulary, or there is no room.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&mut [f32], GenerateError> {
        let Self {
            model,
            runtime,
            cache,
            scratch,
            logits,
        } = self;
        if tokens.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        runtime.region(|team| {
            let mut last = 0;
            for batch in tokens.chunks(PROMPT_BATCH) {
                model.forward(team, batch, cache, scratch, &mut Unobserved)?;
                last = batch.len();
            }
            model.logits(team, last - 1..last, scratch, logits);
            Ok::<_, GenerateError>(())
        })?;
        Ok(&mut self.logits)
    }

    /// Forgets everything, for another text.
    pub fn clear(&mut self) {
        self.cache.truncate(0);
    }

    /// Feeds the prompt and generates. `on_text` gets the text as it becomes complete (never half a character, never a
    /// stop string or the beginning of one).
    ///
    /// # Errors
    /// [`GenerateError`]; also when `on_text` fails.
    pub fn generate(
        &mut self,
        request: &Request,
        tokenizer: &Tokenizer,
        on_text: &mut dyn FnMut(&str) -> io::Result<()>,
    ) -> Result<Outcome, GenerateError> {
        let room = self.cache.capacity() - self.cache.len();
        if request.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if request.prompt.len() > room {
            return Err(GenerateError::PromptTooLong {
                prompt: request.prompt.len(),
                context: self.cache.capacity(),
            });
        }
        let mut sampler = Sampler::new(request.sampler.clone());
        let mut stops = StopStrings::new(request.stop.iter().cloned());
        let mut decoder = tokenizer.stream();
        let mut history = request.prompt.clone();
        let mut timings = Timings {
            prompt_tokens: request.prompt.len(),
            ..Timings::default()
        };

        let start = Instant::now();
        self.feed(&request.prompt)?;
        timings.prompt = start.elapsed();

        let mut stopped = false;
        let finish = loop {
            if history.len() - request.prompt.len() >= request.max_tokens {
                break Finish::Length;
            }
            let position = self.cache.len();
            let start = Instant::now();
            let token = sampler
                .sample(&mut self.logits, &history)
                .ok_or(GenerateError::NotANumber { position })?;
            if tokenizer.is_end_of_generation(token) && !request.ignore_end {
                break Finish::EndOfText;
            }
            history.push(token);
            let (text, stop) = stops.push(&decoder.push(token));
            if !text.is_empty() {
                on_text(&text)?;
            }
            if stop {
                stopped = true;
                break Finish::StopString;
            }
            if position == self.cache.capacity() {
                break Finish::ContextFull;
            }
            // The last token asked for needs no logits behind it.
            if history.len() - request.prompt.len() < request.max_tokens {
                self.feed(&[token])?;
                timings.steps += 1;
                timings.generation += start.elapsed();
            }
        };
        if !stopped {
            let (text, stop) = stops.push(&decoder.finish());
            let rest = if stop { String::new() } else { stops.finish() };
            let text = text + &rest;
            if !text.is_empty() {
                on_text(&text)?;
            }
        }
        Ok(Outcome {
            tokens: history.split_off(request.prompt.len()),
            finish,
            timings,
        })
    }
}
