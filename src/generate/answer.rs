//! An answer in the making: from logits to tokens to text, up to where it ends.

use super::grammar::Constraint;
use super::logprobs::Distribution;
use super::{
    Finish, GenerateError, Generated, Request, Sampler, StopStrings, Timings, TokenLogprob,
};
use crate::tokenize::{Decoder, Tokenizer};

/// One answer to a request. It takes the logits behind the last token and says what comes next; running the model is its
/// owner's part.
#[derive(Debug)]
pub(super) struct Answer {
    sampler: Sampler,
    /// How far it has gone by its grammar; `None` where it may be anything.
    constraint: Option<Constraint>,
    stops: StopStrings,
    decoder: Decoder,
    /// What the model has seen and the prompt, and what was generated behind them.
    history: Vec<u32>,
    /// Tokens of it that come before the answer.
    before: usize,
    max_tokens: usize,
    ignore_end: bool,
    /// How many of the most likely tokens to tell for each one; `None` for not even its own logarithm.
    top: Option<usize>,
    logprobs: Vec<TokenLogprob>,
    end_logprob: Option<TokenLogprob>,
}

/// What the logits behind a token led to.
pub(super) struct Next {
    /// Text that has become complete: never half a character, a stop string or the beginning of one. May be empty.
    pub text: String,
    /// The token that was generated; `None` if the answer ended without one more.
    pub token: Option<u32>,
    /// How it goes on: with a token for the model, or not at all.
    pub then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Token(u32),
    End(Finish),
}

impl Answer {
    /// An answer to a request behind these tokens, the last of which are its prompt.
    pub fn new(tokenizer: &Tokenizer, request: &Request, history: Vec<u32>) -> Self {
        Self {
            sampler: Sampler::with_tokenizer(request.sampler.clone(), tokenizer),
            constraint: request.grammar.as_ref().map(Constraint::new),
            stops: StopStrings::new(request.stop.iter().cloned()),
            decoder: Decoder::default(),
            before: history.len(),
            history,
            max_tokens: request.max_tokens,
            ignore_end: request.ignore_end,
            top: request.logprobs,
            logprobs: Vec::new(),
            end_logprob: None,
        }
    }

    /// What the model has seen, or must see before it goes on: what came before the answer, and the answer so far.
    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// The tokens generated so far.
    pub fn tokens(&self) -> &[u32] {
        &self.history[self.before..]
    }

    /// How likely the model held each of them, where this was asked for.
    pub fn logprobs(&self) -> &[TokenLogprob] {
        &self.logprobs
    }

    /// What came out.
    pub fn generated(
        &self,
        finish: Finish,
        timings: Timings,
        prompt_logprobs: Vec<TokenLogprob>,
    ) -> Generated {
        Generated {
            tokens: self.tokens().to_vec(),
            finish,
            timings,
            logprobs: self.logprobs.clone(),
            end_logprob: self.end_logprob.clone(),
            prompt_logprobs,
        }
    }

    /// Chooses the next token by the logits behind the last one, which are those of `position`; `room` is the number of
    /// positions that are left behind it.
    ///
    /// # Errors
    /// If a logit is not a number, or the grammar breaks off.
    pub fn next(
        &mut self,
        tokenizer: &Tokenizer,
        logits: &[f32],
        position: usize,
        room: usize,
    ) -> Result<Next, GenerateError> {
        if self.tokens().len() >= self.max_tokens {
            return Ok(self.end(String::new(), Finish::Length));
        }
        if self.is_complete() {
            return Ok(self.end(String::new(), Finish::EndOfText));
        }
        let allowed = match &mut self.constraint {
            Some(constraint) => Some(constraint.allowed()?),
            None => None,
        };
        let not_a_number = || GenerateError::NotANumber { position };
        let token = self
            .sampler
            .sample_among(logits, &self.history, allowed)
            .ok_or_else(not_a_number)?;
        let logprob = match self.top {
            Some(top) => {
                let distribution = Distribution::new(logits, top).ok_or_else(not_a_number)?;
                Some(distribution.of(token, logits[token as usize]))
            }
            None => None,
        };
        // Where a grammar lets the text end, there is nothing to go on with.
        let may_end = !self.ignore_end || self.constraint.is_some();
        if tokenizer.is_end_of_generation(token) && may_end {
            self.end_logprob = logprob;
            return Ok(self.end(String::new(), Finish::EndOfText));
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token)?;
        }
        self.history.push(token);
        self.logprobs.extend(logprob);
        let (text, stopped) = self.stops.push(&self.decoder.push(tokenizer, token));
        let next = if stopped {
            let then = Then::End(Finish::StopString);
            Next {
                text,
                token: None,
                then,
            }
        } else if self.is_complete() {
            self.end(text, Finish::EndOfText)
        } else if room == 0 {
            self.end(text, Finish::ContextFull)
        } else if self.tokens().len() >= self.max_tokens {
            // The last token asked for needs no logits behind it.
            self.end(text, Finish::Length)
        } else {
            let then = Then::Token(token);
            Next {
                text,
                token: None,
                then,
            }
        };
        Ok(Next {
            token: Some(token),
            ..next
        })
    }

    /// Whether the grammar, if there is one, lets nothing more come.
    fn is_complete(&self) -> bool {
        self.constraint
            .as_ref()
            .is_some_and(Constraint::is_complete)
    }

    /// The end, with the text that was held back.
    pub fn end(&mut self, text: String, finish: Finish) -> Next {
        let (more, stopped) = self.stops.push(&std::mem::take(&mut self.decoder).finish());
        let rest = match stopped {
            true => String::new(),
            false => std::mem::take(&mut self.stops).finish(),
        };
        Next {
            text: text + &more + &rest,
            token: None,
            then: Then::End(finish),
        }
    }
}
