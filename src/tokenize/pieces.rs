//! Encoding a text in pieces, with the tokens of the whole, so that the memory that it takes does not grow with the text.
//!
//! The `tokenizers` library holds more than a hundred bytes for each token of what it encodes at a time. So texts are cut where it
//! can be shown that the two parts by themselves have the tokens of the whole:
//!
//! - *In front of a space that stands behind something other than white space.* No pattern of `pretokenize` has a match in which a
//!   space follows something else than white space, so that a word ends there. What comes before it is split without looking
//!   further: runs end at a space as they end at the end of a text, and the one look ahead, `\s+(?!\S)`, is past by then. What comes
//!   behind it is split without looking back. In SentencePiece's vocabularies a word begins there too, where words are encoded one
//!   by one (see `spm`). Where encoding puts a space in front of every text, the space at the cut is left to it.
//! - *Behind a single line feed between two characters that are not white space*, in byte-level BPE, unless a `/` follows, which one
//!   pattern takes into the same word. The line feed is a word, or ends one; and `\s+(?!\S)` finds only one character to take.
//!
//! User-defined tokens are searched for before all this, and a cut must keep clear of any. Where there is no such place, the piece
//! grows until there is one.

use super::{Kind, Literals, TokenizeError, Tokenizer};

/// Bytes that are encoded at a time, unless another number is asked for. More is not faster, and every thread that encodes keeps the
/// memory of the most that it took.
pub const PIECE: usize = 1 << 14;

/// A place to cut a text at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Where the first part ends.
    end: usize,
    /// Where the second part begins.
    next: usize,
}

/// A text that comes in pieces, and is encoded in pieces. See [`Tokenizer::in_pieces`].
#[derive(Debug)]
pub struct Pieces<'t> {
    tokenizer: &'t Tokenizer,
    size: usize,
    /// Text that is not encoded yet.
    pending: String,
    /// The length of that at which it is worth while to look for a cut.
    wanted: usize,
}

impl<'t> Pieces<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, size: usize) -> Self {
        Self {
            tokenizer,
            size,
            pending: String::new(),
            wanted: size,
        }
    }

    /// Goes on with the text, and appends the ids of what can be encoded by now to `ids`.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn push(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
        self.pending.push_str(text);
        if self.pending.len() <= self.wanted {
            return Ok(());
        }
        let rest = self
            .tokenizer
            .encode_front(&self.pending, self.size, &self.tokenizer.literals, ids)?
            .len();
        let done = self.pending.len() - rest;
        self.pending.drain(..done);
        // Looking through a long piece again for every little that comes would take time with the square of its length.
        self.wanted = self.size.max(rest.saturating_mul(2));
        Ok(())
    }

    /// Bytes of the text that are not encoded yet.
    pub fn held(&self) -> usize {
        self.pending.len()
    }

    /// Appends the ids of the rest of the text.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn finish(self, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
        self.tokenizer
            .encode_piece(&self.pending, &self.tokenizer.literals, ids)
    }
}

impl Tokenizer {
    /// Encodes text that comes in pieces, of which about `bytes` (see [`PIECE`]) are held at a time. The ids are those of
    /// [`encode`](Self::encode) for the whole text.
    pub fn in_pieces(&self, bytes: usize) -> Pieces<'_> {
        Pieces::new(self, bytes)
    }

    /// Appends the ids of the beginning of a text, and returns the rest, which has at most `size` bytes unless it cannot be cut.
    pub(super) fn encode_front<'a>(
        &self,
        mut text: &'a str,
        size: usize,
        literals: &Literals,
        ids: &mut Vec<u32>,
    ) -> Result<&'a str, TokenizeError> {
        let mut window = size.max(1);
        while text.len() > size {
            match self.last_cut(text, window) {
                Some(cut) => {
                    self.encode_piece(&text[..cut.end], literals, ids)?;
                    text = &text[cut.next..];
                    window = size.max(1);
                }
                None if window >= text.len() => break,
                None => window = window.saturating_mul(2),
            }
        }
        Ok(text)
    }

    /// The last place among the first `window` bytes of a text at which it can be cut; `None` if there is none, or what follows
    /// has to be known first.
    fn last_cut(&self, text: &str, window: usize) -> Option<Cut> {
        // Nothing can be cut in the middle of words that belong together.
        if !self.separate_words {
            return None;
        }
        // A cut is known by the characters around it, and by the user-defined tokens that might begin there.
        let ahead = self.literals.longest().max(4) + 1;
        let last = window.min(text.len().saturating_sub(ahead));
        let bytes = text.as_bytes();
        (1..=last).rev().find_map(|at| {
            let cut = match (bytes[at - 1], bytes[at]) {
                (_, b' ') => self.in_front_of_space(text, at),
                (b'\n', _) => self.behind_line_feed(text, at),
                _ => None,
            }?;
            (!self.literals.touch(bytes, at)).then_some(cut)
        })
    }

    fn in_front_of_space(&self, text: &str, at: usize) -> Option<Cut> {
        let before = text[..at].chars().next_back()?;
        if before.is_whitespace() || before == super::spm::SPACE {
            return None;
        }
        let adds_space = self.kind == Kind::SentencePiece { space_prefix: true };
        Some(Cut {
            end: at,
            next: at + usize::from(adds_space),
        })
    }

    fn behind_line_feed(&self, text: &str, at: usize) -> Option<Cut> {
        let before = text[..at - 1].chars().next_back()?;
        let after = text[at..].chars().next()?;
        let lone = !before.is_whitespace() && !after.is_whitespace() && after != '/';
        (lone && self.kind == Kind::ByteLevel).then_some(Cut { end: at, next: at })
    }
}
