//! A conversation with a model, turn by turn, whose keys and values stay from one turn to the next.

use std::ops::ControlFlow;

use super::{Engine, EngineError, GenerateOptions, SequenceOptions};
use crate::chat::{AnswerParser, ChatOptions, Message, Piece};
use crate::generate::{Finish, GenerateError, Sequence, Timings};

/// A conversation with a model. Where the model has been pruned since the last turn, or is another one, what was said is read again.
///
/// Where the context is full, the oldest turns are left out of what the model reads; the system message stays.
#[derive(Debug)]
pub struct Conversation {
    /// What stands before all turns; `None` for what the template puts there itself.
    system: Option<String>,
    /// Messages of user and assistant by turns.
    messages: Vec<Message>,
    /// How many of the oldest messages the model does not read any more.
    left_out: usize,
    options: SequenceOptions,
    chat: ChatOptions,
    /// What the model has read; `None` before the first turn.
    sequence: Option<Sequence>,
    /// The number of the weights that have read it.
    weights: u64,
}

/// What came of a turn.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// The answer, without what the model thought before it.
    pub text: String,
    pub reasoning: String,
    /// Why it ended.
    pub finish: Option<Finish>,
    /// Tokens that were generated.
    pub tokens: usize,
    pub timings: Timings,
    /// How many of the oldest messages were left out for it, beyond those that were before.
    pub newly_left_out: usize,
}

/// Called behind every step, with the parts of the answer that it made complete; there may be none. A break ends the answer,
/// which stays as far as it went.
pub type OnStep<'a> = dyn FnMut(&[Piece]) -> ControlFlow<()> + 'a;

impl Reply {
    fn take(&mut self, parts: &[Piece]) {
        for part in parts {
            match part {
                Piece::Text(text) => self.text += text,
                Piece::Reasoning(text) => self.reasoning += text,
                Piece::Call(_) => {}
            }
        }
    }
}

impl Conversation {
    /// A conversation in which nothing was said.
    pub fn new(options: SequenceOptions, chat: ChatOptions) -> Self {
        Self {
            system: None,
            messages: Vec::new(),
            left_out: 0,
            options,
            chat,
            sequence: None,
            weights: 0,
        }
    }

    /// What stands before all turns.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Sets what stands before all turns, from the next one on.
    pub fn set_system(&mut self, system: Option<String>) {
        self.system = system;
    }

    /// What was said, without the system message.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Puts other messages in the place of what was said. A system message at their beginning becomes the conversation's.
    pub fn set_messages(&mut self, mut messages: Vec<Message>) {
        self.system = None;
        if messages.first().is_some_and(|first| first.role == "system") {
            self.system = Some(messages.remove(0).text());
        }
        self.messages = messages;
        self.left_out = 0;
    }

    /// Forgets what was said; the system message stays.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.left_out = 0;
        self.sequence = None;
    }

    /// Forgets what the model has read, which is no longer of use when the model has changed; what was said stays.
    pub fn forget_cache(&mut self) {
        self.sequence = None;
    }

    /// Positions that are filled, and that there can be.
    pub fn fill(&self, engine: &Engine) -> (usize, usize) {
        (
            self.sequence.as_ref().map_or(0, Sequence::len),
            self.context(engine),
        )
    }

    fn context(&self, engine: &Engine) -> usize {
        self.options
            .context
            .unwrap_or(engine.model().config.context_length)
    }

    /// Answers a message of the user.
    ///
    /// # Errors
    /// If the template refuses the conversation, or the message alone is longer than the context. The conversation is then as it
    /// was.
    pub fn ask(
        &mut self,
        engine: &Engine,
        message: impl Into<String>,
        options: &GenerateOptions,
        on_step: &mut OnStep,
    ) -> Result<Reply, EngineError> {
        self.messages.push(Message::new("user", message));
        let reply = self.answer(engine, options, on_step);
        if reply.is_err() {
            self.messages.pop();
        }
        reply
    }

    /// Answers the last message of the user anew; `None` where there is none.
    ///
    /// # Errors
    /// As [`Conversation::ask`].
    pub fn ask_again(
        &mut self,
        engine: &Engine,
        options: &GenerateOptions,
        on_step: &mut OnStep,
    ) -> Result<Option<Reply>, EngineError> {
        let is_answer = |message: &Message| message.role == "assistant";
        let answer = match self.messages.last() {
            None => return Ok(None),
            Some(last) if is_answer(last) => self.messages.pop(),
            Some(_) => None,
        };
        let reply = self.answer(engine, options, on_step);
        if reply.is_err() {
            self.messages.extend(answer);
        }
        reply.map(Some)
    }

    fn answer(
        &mut self,
        engine: &Engine,
        options: &GenerateOptions,
        on_step: &mut OnStep,
    ) -> Result<Reply, EngineError> {
        let context = self.context(engine);
        // An answer of some length must have room, or every turn would end in the middle of a sentence.
        let room = options.max_tokens.min(context / 4).max(1);
        let mut left_out = self.left_out;
        let (rendered, tokens) = loop {
            let messages: Vec<Message> = self
                .system
                .iter()
                .map(|system| Message::new("system", system))
                .chain(self.messages[left_out..].iter().cloned())
                .collect();
            let rendered = engine.chat_text(&messages, &self.chat)?;
            let tokens = rendered.encode(engine.tokenizer()?)?;
            if tokens.len() + room <= context || left_out + 2 >= self.messages.len() {
                break (rendered, tokens);
            }
            left_out += 2;
        };
        if tokens.len() > context {
            return Err(GenerateError::PromptTooLong {
                prompt: tokens.len(),
                room: context,
                context,
            }
            .into());
        }
        let newly_left_out = left_out - self.left_out;
        self.left_out = left_out;

        // Keys and values are of no use to other weights than those that they were computed by.
        let kept = self.sequence.take();
        let mut sequence = match kept.filter(|_| self.weights == engine.weights) {
            Some(sequence) => sequence,
            None => engine.sequence_with(self.options)?,
        };
        self.weights = engine.weights;
        // What the model has read of this already; the last token must be read again, since what comes behind it is wanted.
        let common = sequence
            .tokens()
            .iter()
            .zip(&tokens)
            .take_while(|(a, b)| a == b);
        let common = common.count().min(tokens.len() - 1);
        sequence.truncate(common);
        let mut parser = AnswerParser::new(&engine.answer_style()?, &rendered, false);
        let mut generation =
            engine.generate_behind(&mut sequence, tokens[common..].to_vec(), options)?;
        let mut reply = Reply {
            newly_left_out,
            ..Reply::default()
        };
        while let Some(text) = generation.step()? {
            let parts = parser.push(&text);
            reply.take(&parts);
            if on_step(&parts).is_break() {
                break;
            }
        }
        let mut parts = parser.push(&generation.stop());
        parts.extend(parser.finish());
        reply.take(&parts);
        let _ = on_step(&parts);
        if let Some(generated) = generation.generated() {
            reply.finish = Some(generated.finish);
            reply.tokens = generated.tokens.len();
            reply.timings = generated.timings;
        }
        drop(generation);
        self.sequence = Some(sequence);
        self.messages.push(Message::new("assistant", &reply.text));
        Ok(reply)
    }
}
