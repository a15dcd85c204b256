//! One answer, piece by piece.

use std::time::Instant;

use super::answer::{Answer, Then};
use super::logprobs::PromptScores;
use super::sequence::{Buffers, PROMPT_BATCH};
use super::{Finish, GenerateError, Generated, Request, Sequence, Timings, TokenLogprob};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::tokenize::Tokenizer;

/// The answer to a request in the making: an iterator over its text as it becomes complete (never half a character, never a
/// stop string or the beginning of one). The first piece comes when the prompt has gone through the model. Dropping it leaves
/// the sequence at the last token that the model has seen.
///
/// Whoever may want to stop it takes it [step by step](Generation::step): between two pieces of text there may be many steps.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a Model,
    runtime: &'a Runtime,
    sequence: &'a mut Sequence,
    tokenizer: &'a Tokenizer,
    answer: Answer,
    buffers: Buffers,
    state: State,
    timings: Timings,
    generated: Option<Generated>,
}

#[derive(Debug)]
enum State {
    /// The prompt has to go through the model first; so many of its tokens have.
    Prompt(Vec<u32>, usize),
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
        let history = [sequence.tokens(), &prompt].concat();
        let scores = request.prompt_logprobs;
        let scores = scores.map(|top| PromptScores::new(prompt.clone(), sequence.len(), top));
        Ok(Self {
            model,
            runtime,
            sequence,
            tokenizer,
            answer: Answer::new(tokenizer, request, history),
            buffers: Buffers::new(scores),
            timings: Timings::default(),
            state: State::Prompt(prompt, 0),
            generated: None,
        })
    }

    /// What came out; `None` before the last piece was taken, and after an error.
    pub fn generated(&self) -> Option<&Generated> {
        self.generated.as_ref()
    }

    /// The tokens generated so far.
    pub fn tokens(&self) -> &[u32] {
        self.answer.tokens()
    }

    /// How likely the model held each of them, where this was asked for.
    pub fn logprobs(&self) -> &[TokenLogprob] {
        self.answer.logprobs()
    }

    /// How likely the model held the prompt's second token and those behind it, where this was asked for and the prompt has gone
    /// through the model.
    pub fn prompt_logprobs(&self) -> &[TokenLogprob] {
        let scores = self.buffers.scores.as_ref();
        scores.map_or(&[], PromptScores::scores)
    }

    /// What took how long so far.
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// Ends the answer here and returns the text that was held back. What came out is then there. Does nothing where it has
    /// ended already.
    pub fn stop(&mut self) -> String {
        if matches!(self.state, State::Ended) {
            return String::new();
        }
        self.state = State::Ended;
        let next = self.answer.end(String::new(), Finish::Stopped);
        self.ended(Finish::Stopped);
        next.text
    }

    /// Takes down what came out.
    fn ended(&mut self, finish: Finish) {
        // The last token was not fed, if one was generated at all.
        if let Some(last) = self.answer.tokens().get(self.timings.steps) {
            self.sequence.leave_unseen(*last);
        }
        let scores = self.prompt_logprobs().to_vec();
        self.generated = Some(self.answer.generated(finish, self.timings, scores));
    }

    /// Takes the next piece of the prompt in, or generates the next token. The text that this makes complete, which may be
    /// empty; `None` at the end.
    ///
    /// # Errors
    /// Those of a forward pass; if the model's output is not a number. The answer has then ended.
    pub fn step(&mut self) -> Result<Option<String>, GenerateError> {
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
            State::Prompt(prompt, fed) => {
                let start = Instant::now();
                let end = prompt.len().min(fed + PROMPT_BATCH);
                let is_last = end == prompt.len();
                sequence.feed_prompt(model, runtime, &prompt[fed..end], is_last, buffers)?;
                timings.prompt += start.elapsed();
                timings.prompt_tokens = end;
                if !is_last {
                    self.state = State::Prompt(prompt, end);
                    return Ok(Some(String::new()));
                }
            }
            State::Ready => {}
        }
        let start = Instant::now();
        let (position, room) = (sequence.len(), sequence.room());
        let next = self
            .answer
            .next(self.tokenizer, &buffers.logits, position, room)?;
        match next.then {
            Then::Token(token) => {
                sequence.feed_generated(model, runtime, token, buffers)?;
                timings.steps += 1;
                timings.generation += start.elapsed();
                self.state = State::Ready;
            }
            Then::End(finish) => self.ended(finish),
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
