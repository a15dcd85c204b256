//! From logits to text: the sampler chain and stop conditions; one answer ([`Generation`]) or many side by side
//! ([`Scheduler`]); and texts of the model's own ([`Texts`]).
//! [`TokenLogprob`] tells how likely the model held a token, and a
//! [`Grammar`] which tokens an answer may have.

mod answer;
mod generation;
mod grammar;
mod logprobs;
mod piece;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod stop;
mod texts;

pub use generation::Generation;
pub use grammar::{Grammar, GrammarCompiler, GrammarError};
pub use logprobs::TokenLogprob;
pub use request::{Finish, Generated, Request, Timings};
pub use sampler::{Sampler, SamplerConfig, SamplerOptions, SamplerStep, UnknownStep};
pub use scheduler::{Loaded, RequestId, Scheduler, Update};
pub use sequence::Sequence;
pub use stop::StopStrings;
pub use texts::{Answers, Texts};

use crate::count::count;
use crate::model::ModelError;
use crate::progress::Cancelled;

/// Why generation ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    #[error(
        "the prompt has {}, and there is room for {room} in a context of {context}",
        count(prompt, "token")
    )]
    PromptTooLong {
        prompt: usize,
        room: usize,
        context: usize,
    },
    #[error(
        "the model's output at position {position} is not a number (NaN); its weights are damaged or not suited to this run"
    )]
    NotANumber { position: usize },
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}
