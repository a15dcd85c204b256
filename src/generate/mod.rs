//! From logits to text: the sampler chain, stop conditions, a session that owns a KV cache, and many texts at once.

mod many;
mod sampler;
mod session;
mod stop;

pub use many::Texts;
pub use sampler::{Sampler, SamplerConfig};
pub use session::{Finish, Outcome, Request, Session, Timings};
pub use stop::StopStrings;

use crate::model::ModelError;

/// Why generation ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the prompt has no tokens; give some text with -p, -f or on standard input")]
    EmptyPrompt,
    #[error(
        "the prompt has {prompt} tokens and the context holds {context}; shorten the prompt or raise --ctx"
    )]
    PromptTooLong { prompt: usize, context: usize },
    #[error(
        "the model's output at position {position} is not a number (NaN); its weights are damaged or not suited to this run"
    )]
    NotANumber { position: usize },
    #[error("writing the text failed: {0}")]
    Output(#[from] std::io::Error),
}
