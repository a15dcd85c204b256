//! An answer in the making: from logits to tokens to text, up to where it ends.

use super::{Finish, GenerateError, Request, Sampler, StopStrings};
use crate::tokenize::{DecodeStream, Tokenizer};

/// One answer to a request. It takes the logits behind the last token and says what comes next; running the model is its
/// owner's part.
#[derive(Debug)]
pub(super) struct Answer<'t> {
    tokenizer: &'t Tokenizer,
    sampler: Sampler,
    stops: StopStrings,
    stream: DecodeStream<'t>,
    /// The prompt and what was generated behind it.
    history: Vec<u32>,
    prompt_tokens: usize,
    max_tokens: usize,
    ignore_end: bool,
}

/// What the logits behind a token led to.
pub(super) struct Next {
    /// Text that has become complete: never half a character, a stop string or the beginning of one. May be empty.
    pub text: String,
    /// How it goes on: with a token for the model, or not at all.
    pub then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Token(u32),
    End(Finish),
}

impl<'t> Answer<'t> {
    pub fn new(tokenizer: &'t Tokenizer, request: &Request) -> Self {
        Self {
            tokenizer,
            sampler: Sampler::new(request.sampler.clone()),
            stops: StopStrings::new(request.stop.iter().cloned()),
            stream: tokenizer.stream(),
            history: request.prompt.clone(),
            prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            ignore_end: request.ignore_end,
        }
    }

    /// The tokens generated so far.
    pub fn tokens(&self) -> &[u32] {
        &self.history[self.prompt_tokens..]
    }

    /// Chooses the next token by the logits behind the last one, which are those of `position`; `room` is the number of
    /// positions that are left behind it.
    ///
    /// # Errors
    /// If a logit is not a number.
    pub fn next(
        &mut self,
        logits: &mut [f32],
        position: usize,
        room: usize,
    ) -> Result<Next, GenerateError> {
        if self.tokens().len() >= self.max_tokens {
            return Ok(self.end(String::new(), Finish::Length));
        }
        let token = self
            .sampler
            .sample(logits, &self.history)
            .ok_or(GenerateError::NotANumber { position })?;
        if self.tokenizer.is_end_of_generation(token) && !self.ignore_end {
            return Ok(self.end(String::new(), Finish::EndOfText));
        }
        self.history.push(token);
        let (text, stopped) = self.stops.push(&self.stream.push(token));
        if stopped {
            let then = Then::End(Finish::StopString);
            return Ok(Next { text, then });
        }
        if room == 0 {
            return Ok(self.end(text, Finish::ContextFull));
        }
        // The last token asked for needs no logits behind it.
        if self.tokens().len() >= self.max_tokens {
            return Ok(self.end(text, Finish::Length));
        }
        let then = Then::Token(token);
        Ok(Next { text, then })
    }

    /// The end, with the text that was held back.
    pub fn end(&mut self, text: String, finish: Finish) -> Next {
        let stream = std::mem::replace(&mut self.stream, self.tokenizer.stream());
        let (more, stopped) = self.stops.push(&stream.finish());
        let rest = match stopped {
            true => String::new(),
            false => std::mem::take(&mut self.stops).finish(),
        };
        Next {
            text: text + &more + &rest,
            then: Then::End(finish),
        }
    }
}
