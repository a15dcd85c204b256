//! Answers as they come from the worker, in the parts that clients know: text, reasoning, calls of tools.

use std::collections::VecDeque;

use tokio::sync::mpsc::UnboundedReceiver;

use super::App;
use super::error::ApiError;
use super::worker::{Asked, Reply};
use crate::chat::{AnswerParser, Piece};
use crate::generate::{Finish, Generated, Request, Timings, TokenLogprob};

/// The answers to one prompt, side by side.
pub(super) struct Answers {
    replies: UnboundedReceiver<Reply>,
    /// Of each answer, what takes it apart; `None` for text that is passed on as it is.
    parsers: Vec<Option<AnswerParser>>,
    /// Answers that have not ended.
    left: usize,
    said: VecDeque<Said>,
}

/// What one of the answers brought.
#[derive(Debug)]
pub(super) enum Said {
    /// What the tokens of the prompt are worth, from the second on.
    Prompt {
        choice: usize,
        scored: Vec<TokenLogprob>,
    },
    Parts {
        choice: usize,
        parts: Vec<Piece>,
        scored: Vec<TokenLogprob>,
        /// How fast the answer has come so far; `None` for what is told at its end.
        timings: Option<Timings>,
    },
    Ended {
        choice: usize,
        generated: Generated,
    },
}

impl Said {
    /// Which of the answers it is about.
    pub fn choice(&self) -> usize {
        match self {
            Said::Prompt { choice, .. }
            | Said::Parts { choice, .. }
            | Said::Ended { choice, .. } => *choice,
        }
    }
}

impl Answers {
    /// Has the requests answered.
    ///
    /// # Errors
    /// If too many are waiting already, or the server is stopping.
    pub fn begin(
        app: &App,
        model: usize,
        requests: Vec<Request>,
        parser: Option<&AnswerParser>,
    ) -> Result<Self, ApiError> {
        let asked = Asked {
            model,
            context: app.models[model].context,
            deadline: app.deadline(),
        };
        let count = requests.len();
        Ok(Self {
            replies: app.orders.answer(&asked, requests)?,
            parsers: vec![parser.cloned(); count],
            left: count,
            said: VecDeque::new(),
        })
    }

    /// What comes next; `None` when all answers have ended.
    ///
    /// # Errors
    /// If one of them cannot be made; there is nothing to come then.
    pub async fn next(&mut self) -> Result<Option<Said>, ApiError> {
        loop {
            if let Some(said) = self.said.pop_front() {
                return Ok(Some(said));
            }
            if self.left == 0 {
                return Ok(None);
            }
            // The worker lets go of replies only where it ends.
            match self.replies.recv().await.ok_or_else(ApiError::stopping)? {
                Reply::Failed { error } => {
                    self.left = 0;
                    return Err(error);
                }
                Reply::Prompt { choice, scored } => {
                    self.said.push_back(Said::Prompt { choice, scored });
                }
                Reply::Piece {
                    choice,
                    text,
                    scored,
                    timings,
                } => {
                    let parts = match &mut self.parsers[choice] {
                        Some(parser) => parser.push(&text),
                        None if text.is_empty() => Vec::new(),
                        None => vec![Piece::Text(text)],
                    };
                    if !parts.is_empty() || !scored.is_empty() {
                        self.said.push_back(Said::Parts {
                            choice,
                            parts,
                            scored,
                            timings: Some(timings),
                        });
                    }
                }
                Reply::Ended { choice, generated } => {
                    self.left -= 1;
                    let parser = self.parsers[choice].take();
                    let parts = parser.map(AnswerParser::finish).unwrap_or_default();
                    if !parts.is_empty() {
                        self.said.push_back(Said::Parts {
                            choice,
                            parts,
                            scored: Vec::new(),
                            timings: None,
                        });
                    }
                    self.said.push_back(Said::Ended { choice, generated });
                }
            }
        }
    }
}

/// Why an answer ended, in OpenAI's words.
pub(super) fn finish_reason(finish: Finish, calls: bool) -> &'static str {
    match finish {
        Finish::Length | Finish::ContextFull => "length",
        _ if calls => "tool_calls",
        _ => "stop",
    }
}

/// How fast an answer has come so far, in the same form.
pub(super) fn timings_so_far(timings: &Timings) -> serde_json::Value {
    serde_json::json!({
        "predicted_n": timings.steps + 1,
        "predicted_ms": timings.generation.as_secs_f64() * 1e3,
        "predicted_per_second": timings.generation_speed(),
    })
}

/// Speeds, as llama.cpp's server tells them.
pub(super) fn timings(generated: &Generated) -> serde_json::Value {
    let timings = generated.timings;
    serde_json::json!({
        "prompt_n": timings.prompt_tokens,
        "prompt_ms": timings.prompt.as_secs_f64() * 1e3,
        "prompt_per_second": timings.prompt_speed(),
        "predicted_n": generated.tokens.len(),
        "predicted_ms": timings.generation.as_secs_f64() * 1e3,
        "predicted_per_second": timings.generation_speed(),
    })
}
