//! A stand-in for the sequences and the streaming of `generate`, until they are there.

use std::time::Instant;

use crate::generate::{Finish, GenerateError, Outcome, Request, Sampler, StopStrings, Timings};
use crate::kernels::Runtime;
use crate::model::{CacheType, KvCache, Model, ModelError, Scratch, Unobserved};
use crate::tokenize::{DecodeStream, Tokenizer};

const PROMPT_BATCH: usize = 512;

/// The positions that a model has seen of one text.
#[derive(Debug)]
pub struct Sequence {
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl Sequence {
    pub(super) fn new(
        model: &Model,
        context: usize,
        cache_type: CacheType,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            cache: KvCache::with_type(model, context, cache_type)?,
            scratch: Scratch::new(),
            logits: Vec::new(),
        })
    }

    /// Positions that are filled.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    fn feed(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        tokens: &[u32],
    ) -> Result<(), GenerateError> {
        runtime.region(|team| {
            let mut last = 0;
            for batch in tokens.chunks(PROMPT_BATCH) {
                let (cache, scratch) = (&mut self.cache, &mut self.scratch);
                model.forward(team, batch, cache, scratch, &mut Unobserved)?;
                last = batch.len();
            }
            model.logits(team, last - 1..last, &mut self.scratch, &mut self.logits);
            Ok(())
        })
    }
}

/// Text in the making: pieces of it, one after the other.
pub struct Generation<'a> {
    model: &'a Model,
    runtime: &'a Runtime,
    tokenizer: &'a Tokenizer,
    sequence: &'a mut Sequence,
    request: Request,
    sampler: Sampler,
    stops: Option<StopStrings>,
    decoder: Option<DecodeStream<'a>>,
    history: Vec<u32>,
    timings: Timings,
    finish: Option<Finish>,
    ended: bool,
}

impl<'a> Generation<'a> {
    pub fn new(
        model: &'a Model,
        runtime: &'a Runtime,
        tokenizer: &'a Tokenizer,
        sequence: &'a mut Sequence,
        request: Request,
    ) -> Result<Self, GenerateError> {
        let room = sequence.cache.capacity() - sequence.cache.len();
        if request.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if request.prompt.len() > room {
            return Err(GenerateError::PromptTooLong {
                prompt: request.prompt.len(),
                context: sequence.cache.capacity(),
            });
        }
        let start = Instant::now();
        sequence.feed(model, runtime, &request.prompt)?;
        Ok(Self {
            sampler: Sampler::new(request.sampler.clone()),
            stops: Some(StopStrings::new(request.stop.iter().cloned())),
            decoder: Some(tokenizer.stream()),
            history: request.prompt.clone(),
            timings: Timings {
                prompt_tokens: request.prompt.len(),
                prompt: start.elapsed(),
                ..Timings::default()
            },
            finish: None,
            ended: false,
            model,
            runtime,
            tokenizer,
            sequence,
            request,
        })
    }

    /// What came out, when it has ended.
    pub fn outcome(self) -> Option<Outcome> {
        let mut history = self.history;
        Some(Outcome {
            tokens: history.split_off(self.request.prompt.len()),
            finish: self.finish?,
            timings: self.timings,
        })
    }

    /// One token more; the text that is complete with it.
    fn step(&mut self) -> Result<String, GenerateError> {
        let generated = self.history.len() - self.request.prompt.len();
        if generated >= self.request.max_tokens {
            self.finish = Some(Finish::Length);
            return Ok(String::new());
        }
        let position = self.sequence.len();
        let start = Instant::now();
        let token = self
            .sampler
            .sample(&mut self.sequence.logits, &self.history)
            .ok_or(GenerateError::NotANumber { position })?;
        if self.tokenizer.is_end_of_generation(token) && !self.request.ignore_end {
            self.finish = Some(Finish::EndOfText);
            return Ok(String::new());
        }
        self.history.push(token);
        let piece = self.decoder.as_mut().map(|d| d.push(token));
        let piece = piece.unwrap_or_default();
        let (text, stop) = match &mut self.stops {
            Some(stops) => stops.push(&piece),
            None => (piece, false),
        };
        if stop {
            self.finish = Some(Finish::StopString);
            self.stops = None;
            return Ok(text);
        }
        if position == self.sequence.cache.capacity() {
            self.finish = Some(Finish::ContextFull);
            return Ok(text);
        }
        if generated + 1 < self.request.max_tokens {
            self.sequence.feed(self.model, self.runtime, &[token])?;
            self.timings.steps += 1;
            self.timings.generation += start.elapsed();
        }
        Ok(text)
    }

    fn rest(&mut self) -> String {
        let (Some(mut stops), Some(decoder)) = (self.stops.take(), self.decoder.take()) else {
            return String::new();
        };
        let (text, stop) = stops.push(&decoder.finish());
        text + &if stop { String::new() } else { stops.finish() }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<String, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let text = match self.finish {
                None => match self.step() {
                    Ok(text) => text,
                    Err(error) => {
                        self.ended = true;
                        return Some(Err(error));
                    }
                },
                Some(_) => {
                    self.ended = true;
                    self.rest()
                }
            };
            if !text.is_empty() {
                return Some(Ok(text));
            }
        }
        None
    }
}
