//! One answer, piece by piece.

use std::time::Instant;

use super::answer::{Answer, Then};
use super::sequence::Buffers;
use super::{GenerateError, Generated, Request, Sequence, Timings};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::tokenize::Tokenizer;

/// The answer to a request in the making: an iterator over its text as it becomes complete (never half a character, never a
/// stop string or the beginning of one). The first piece comes when the prompt has gone through the model. Dropping it leaves
/// the sequence at the last token that the model has seen.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a Model,
    runtime: &'a Runtime,
    sequence: &'a mut Sequence,
    answer: Answer<'a>,
    buffers: Buffers,
    state: State,
    timings: Timings,
    generated: Option<Generated>,
}

#[derive(Debug)]
enum State {
    /// The prompt has to go through the model first.
    Prompt(Vec<u32>),
    /// The logits behind the last token are there.
    Ready,
    Ended,
}

impl<'a> Generation<'a> {
    /// Begins to answer a request behind what the sequence has.
    ///
    /// # Errors
    /// If there is nothing to go on from, or the prompt does not fit in what is left of the sequence's context.
    pub fn new(
        model: &'a Model,
        runtime: &'a Runtime,
        tokenizer: &'a Tokenizer,
        sequence: &'a mut Sequence,
        request: &Request,
    ) -> Result<Self, GenerateError> {
        let prompt = sequence.continued_by(&request.prompt);
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if prompt.len() > sequence.room() {
            return Err(GenerateError::PromptTooLong {
                prompt: prompt.len(),
                room: sequence.room(),
                context: sequence.capacity(),
            });
        }
        Ok(Self {
            model,
            runtime,
            sequence,
            answer: Answer::new(tokenizer, request),
            buffers: Buffers::default(),
            timings: Timings {
                prompt_tokens: prompt.len(),
                ..Timings::default()
            },
            state: State::Prompt(prompt),
            generated: None,
        })
    }

    /// What came out; `None` before the last piece was taken, and after an error.
    pub fn generated(&self) -> Option<&Generated> {
        self.generated.as_ref()
    }

    /// The next token's text, which may be empty; `None` at the end.
    fn step(&mut self) -> Result<Option<String>, GenerateError> {
        let Self {
            model,
            runtime,
            sequence,
            buffers,
            timings,
            ..
        } = self;
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Ended => return Ok(None),
            State::Prompt(prompt) => {
                let start = Instant::now();
                sequence.feed_prompt(model, runtime, &prompt, buffers)?;
                timings.prompt = start.elapsed();
            }
            State::Ready => {}
        }
        let start = Instant::now();
        let (position, room) = (sequence.len(), sequence.room());
        let next = self.answer.next(&mut buffers.logits, position, room)?;
        match next.then {
            Then::Token(token) => {
                sequence.feed_generated(model, runtime, token, buffers)?;
                timings.steps += 1;
                timings.generation += start.elapsed();
                self.state = State::Ready;
            }
            Then::End(finish) => {
                let tokens = self.answer.tokens().to_vec();
                // The last token was not fed, if one was generated at all.
                if let Some(last) = tokens.get(timings.steps) {
                    sequence.leave_unseen(*last);
                }
                self.generated = Some(Generated {
                    tokens,
                    finish,
                    timings: *timings,
                });
            }
        }
        Ok(Some(next.text))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<String, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.step() {
                Ok(Some(text)) if text.is_empty() => {}
                Ok(text) => return text.map(Ok),
                Err(error) => {
                    self.state = State::Ended;
                    return Some(Err(error));
                }
            }
        }
    }
}
