//! What a template made of a conversation.

use super::marks::ChatTokens;
use crate::tokenize::{TokenizeError, Tokenizer};

/// What a template made of a conversation: a text, of which it is known what the template wrote and what somebody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub(super) text: String,
    /// The same text with marks in what is no control token, and the mark; `None` where there is nothing to mark.
    pub(super) marked: Option<(String, char)>,
}

impl Rendered {
    /// The text, as Jinja2 renders it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tokens for the model. Control tokens are those that the template wrote; texts of messages become none, whatever they
    /// spell. BOS stands in front if the tokenizer adds it or the template wrote it, and once if both do. EOS is not added.
    ///
    /// In the rare case that a template looks for the text of a control token in what the user wrote, it did not find it there, and the
    /// tokens are those of a text without that.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TokenizeError> {
        let (text, mark) = match &self.marked {
            Some((text, mark)) => (text, Some(*mark)),
            None => (&self.text, None),
        };
        let mut tokens = tokenizer.encode_special(text, mark)?;
        if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos())
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    /// Whether the text ends with this one, blanks aside: whether the prompt has begun the model's reasoning already.
    pub fn ends_with(&self, text: &str) -> bool {
        self.text.trim_end().ends_with(text)
    }
}

/// What a template that knows nothing of a model's tokens is rendered with, to see how it is made.
pub(super) fn no_tokens() -> ChatTokens {
    ChatTokens::new(Some(String::new()), Some(String::new()), [])
}
