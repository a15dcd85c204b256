//! Decoding: bytes of tokens to text, at once or one token at a time.

use super::{Kind, Tokenizer};

/// Turns token ids into text as they come; see [`Tokenizer::stream`].
///
/// A character whose bytes are spread over several tokens is held back until the last of them is there, so that every
/// piece of text is whole. All pieces together are what [`Tokenizer::decode`] makes of the same ids (of a text's beginning,
/// if [`at_text_start`](Self::at_text_start) was asked for).
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not complete yet.
    pending: Vec<u8>,
    /// Whether the next token with text may begin with a space that is not part of the text.
    drop_space: bool,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            pending: Vec::new(),
            drop_space: false,
        }
    }

    /// Says that the ids are a text from its first token on, and not the continuation of a prompt: the space that
    /// [`Tokenizer::encode`] puts in front of a text, for models that want one, is then left out. It changes nothing for
    /// models without such a space.
    ///
    /// Source: SentencePiece's dummy prefix; `tokenizer.ggml.add_space_prefix`.
    #[must_use]
    pub fn at_text_start(mut self) -> Self {
        self.drop_space = self.tokenizer.kind == Kind::SentencePiece { space_prefix: true };
        self
    }

    /// Takes the next id and returns the text that became complete with it, which may be empty. Control tokens and ids
    /// outside the vocabulary add nothing; bytes that cannot be UTF-8 become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_to(id, &mut text);
        text
    }

    /// Ends the stream: what was held back of an incomplete character, as U+FFFD. Mostly it is empty.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    pub(super) fn push_to(&mut self, id: u32, text: &mut String) {
        let mut bytes = self.tokenizer.token_bytes(id);
        if bytes.is_empty() {
            return;
        }
        if std::mem::take(&mut self.drop_space) && !self.tokenizer.is_literal(id) {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);

        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        // Bytes that no further byte can complete.
                        Some(len) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[len..];
                        }
                        None => {
                            rest = after;
                            break;
                        }
                    }
                }
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
    }
}
