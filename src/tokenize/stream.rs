//! Decoding: from the bytes of tokens to text, one token at a time.

use super::{Kind, Tokenizer};

/// A decoder that turns token ids into text one by one; see [`Tokenizer::stream`].
///
/// If the bytes of a character are spread over several tokens, the character is held back until the last of them has
/// arrived, so that every piece of text is valid. With [`at_text_start`](Self::at_text_start) all pieces together are what
/// [`Tokenizer::decode`] returns for the same ids.
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder,
}

/// How far a text is decoded. It is given the tokenizer with every id, and so can outlive a borrow of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Decoder {
    /// The bytes of a character that is not complete yet.
    pending: Vec<u8>,
    /// Whether a space at the beginning of the next token with text is to be left out.
    drop_space: bool,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            decoder: Decoder::default(),
        }
    }

    /// The same stream for ids that begin a text instead of continuing a prompt: it leaves out the space that
    /// [`Tokenizer::encode`] puts in front of a text for some models. For other models it changes nothing.
    ///
    /// Source: SentencePiece's dummy prefix; `tokenizer.ggml.add_space_prefix`.
    #[must_use]
    pub fn at_text_start(mut self) -> Self {
        self.decoder = Decoder::at_text_start(self.tokenizer);
        self
    }

    /// Decodes the next id and returns the text that is complete with it, which may be empty. Control tokens and ids outside
    /// the vocabulary add nothing; bytes that are not valid UTF-8 become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        self.decoder.push(self.tokenizer, id)
    }

    /// Ends the stream and returns U+FFFD for a character that is still incomplete; the text is empty if there is none.
    pub fn finish(self) -> String {
        self.decoder.finish()
    }

    /// Decodes the next id as [`push`](Self::push) does and appends the text to `text`.
    pub(super) fn push_to(&mut self, id: u32, text: &mut String) {
        self.decoder.push_to(self.tokenizer, id, text);
    }
}

impl Decoder {
    /// See [`DecodeStream::at_text_start`].
    pub fn at_text_start(tokenizer: &Tokenizer) -> Self {
        Self {
            pending: Vec::new(),
            drop_space: tokenizer.kind == Kind::SentencePiece { space_prefix: true },
        }
    }

    /// See [`DecodeStream::push`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let mut text = String::new();
        self.push_to(tokenizer, id, &mut text);
        text
    }

    /// The same, with the texts of control tokens in their places.
    pub fn push_shown(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        match tokenizer.controls.get(&id) {
            None => self.push(tokenizer, id),
            Some(text) => {
                // A character that was begun before it is not gone on with behind it, and a text begins anew.
                let before = std::mem::replace(self, Self::at_text_start(tokenizer));
                before.finish() + text
            }
        }
    }

    /// See [`DecodeStream::finish`].
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    fn push_to(&mut self, tokenizer: &Tokenizer, id: u32, text: &mut String) {
        let mut bytes = tokenizer.token_bytes(id);
        if bytes.is_empty() {
            bytes = tokenizer.shown_bytes(id);
        }
        if bytes.is_empty() {
            return;
        }
        if std::mem::take(&mut self.drop_space) && !tokenizer.is_literal(id) {
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
                        // These bytes are invalid, whatever follows them.
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
