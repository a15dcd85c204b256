//! What can go wrong between a GGUF file and token ids.

use std::path::PathBuf;

use super::pretokenize;
use crate::gguf::GgufError;

/// Why a tokenizer cannot be built, or why it cannot encode a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    /// A metadata key is missing, or what it holds does not fit; the message names the file, the key and the problem.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    #[error(
        "{path}: the tokenizer model {model:?} is not supported; supported are \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE)"
    )]
    Model { path: PathBuf, model: String },
    #[error(
        "{path}: the pre-tokenizer {name:?} (tokenizer.ggml.pre) is not supported; supported are {known}",
        known = pretokenize::known_names()
    )]
    PreTokenizer { path: PathBuf, name: String },
    #[error("{path}: the tokenizer cannot be built: {source}")]
    Build {
        path: PathBuf,
        source: tokenizers::Error,
    },
    #[error("the text cannot be encoded: {0}")]
    Encode(tokenizers::Error),
    #[error(
        "the text has {len} whitespace characters in a row; more than {limit} cannot be split into words, shorten the run",
        limit = super::MAX_BLANK_RUN
    )]
    BlankRun { len: usize },
    #[error(
        "the text has a character that the vocabulary cannot express: it has no token for it, no byte tokens and no unknown token"
    )]
    NoToken,
}
