//! `tokenizer.model`, the file of SentencePiece: a message of protocol buffers (`sentencepiece_model.proto`).

use prost::Message;

use super::{Folder, SENTENCEPIECE};
use crate::gguf::GgufError;

/// Byte-pair encoding, among the kinds of vocabularies.
const BPE: i32 = 2;

/// The parts of the message that matter here.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SentencePiece {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

/// A token.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Piece {
    #[prost(string, tag = "1")]
    pub text: String,
    #[prost(float, tag = "2")]
    pub score: f32,
    /// The same numbers as in GGUF files.
    #[prost(int32, tag = "3", optional)]
    kind: Option<i32>,
}

/// How the vocabulary was made, and which tokens have a meaning; -1 is none.
#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(int32, optional, tag = "40")]
    unknown: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    padding: Option<i32>,
}

/// What is done to a text first.
#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(bytes = "vec", tag = "2")]
    rules: Vec<u8>,
    #[prost(bool, optional, tag = "3")]
    prefix: Option<bool>,
}

impl Piece {
    pub fn token_type(&self) -> i32 {
        self.kind.unwrap_or(super::vocabulary::NORMAL)
    }
}

impl SentencePiece {
    /// Reads the file of a folder.
    ///
    /// # Errors
    /// If it is no such message, or its text is not encoded by pairs or changed by rules first.
    pub fn read(folder: &Folder) -> Result<Self, GgufError> {
        let error = |problem: String| folder.error(SENTENCEPIECE, problem);
        let bytes = folder.bytes(SENTENCEPIECE)?;
        let model = Self::decode(&bytes[..]).map_err(|cause| {
            error(format!(
                "is no model of SentencePiece: {cause}; fetch it again"
            ))
        })?;
        if model.pieces.is_empty() {
            return Err(error("has no tokens; fetch it again".to_owned()));
        }
        let kind = model.trainer.as_ref().and_then(|t| t.model_type);
        if kind != Some(BPE) {
            return Err(error(
                "is not encoded by pairs (BPE), which is what is supported; take the model's tokenizer.json".to_owned(),
            ));
        }
        if model
            .normalizer
            .as_ref()
            .is_some_and(|n| !n.rules.is_empty())
        {
            return Err(error(
                "changes texts by rules of its own, which is not supported; take the model's tokenizer.json".to_owned(),
            ));
        }
        Ok(model)
    }

    /// Whether a space is put in front of texts.
    pub fn has_prefix(&self) -> bool {
        let prefix = self.normalizer.as_ref().and_then(|n| n.prefix);
        prefix.unwrap_or(true)
    }

    /// The token of a name; `None` where there is none.
    pub fn id(&self, name: &str) -> Option<usize> {
        let trainer = self.trainer.clone().unwrap_or_default();
        let id = match name {
            "unknown" => trainer.unknown.unwrap_or(0),
            "bos" => trainer.bos.unwrap_or(1),
            "eos" => trainer.eos.unwrap_or(2),
            _ => trainer.padding.unwrap_or(-1),
        };
        usize::try_from(id)
            .ok()
            .filter(|id| *id < self.pieces.len())
    }
}
