//! The errors of tokenizers.

use std::path::PathBuf;

use super::pretokenize;
use crate::gguf::GgufError;

/// Why a tokenizer cannot be built, or why it cannot encode a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    /// A metadata key is missing or its value is unusable. The message names the file, the key and the problem.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// The value of `tokenizer.ggml.model` is not supported.
    #[error(
        "{path}: the tokenizer model {model:?} is not supported; supported are \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE)"
    )]
    Model { path: PathBuf, model: String },
    /// The value of `tokenizer.ggml.pre` is not supported.
    #[error(
        "{path}: the pre-tokenizer {name:?} (tokenizer.ggml.pre) is not supported; supported are {known}",
        known = pretokenize::known_names()
    )]
    PreTokenizer { path: PathBuf, name: String },
    /// The `tokenizers` library refused the vocabulary or the merges.
    #[error("{path}: the tokenizer cannot be built: {source}")]
    Build {
        path: PathBuf,
        source: tokenizers::Error,
    },
    /// The `tokenizers` library failed to encode a text.
    #[error("the text cannot be encoded: {0}")]
    Encode(tokenizers::Error),
    /// The text has too many whitespace characters in a row for the patterns that split it into words.
    #[error(
        "the text has {len} whitespace characters in a row; more than {limit} cannot be split into words, shorten the run",
        limit = super::MAX_BLANK_RUN
    )]
    BlankRun { len: usize },
    /// The text has a character that no token stands for.
    #[error(
        "the text has a character that the vocabulary cannot express: it has no token for it, no byte tokens and no unknown token"
    )]
    NoToken,
}
