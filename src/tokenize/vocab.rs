//! The vocabulary as the metadata gives it, checked; and the bytes that each token stands for.

use std::collections::HashMap;

use super::TokenizeError;
use crate::gguf::{FromValue, GgufFile};

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";

/// Texts that end a model's turn wherever they occur in a vocabulary. Tokens with these texts count as control tokens,
/// whatever type the file gives them: some converters get it wrong, and a turn that never ends is the price.
pub(super) const END_TEXTS: &[&str] = &[
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
];

/// The types of tokens, as `tokenizer.ggml.token_type` numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    fn from_number(number: usize) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            // 0 is "undefined" in ggml.
            0 | 5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether text can become such a token by itself. Control and unknown tokens never come from text, and byte tokens
    /// stand for bytes, not for the text that names them.
    pub(super) fn comes_from_text(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined | Self::Unused)
    }
}

/// A vocabulary whose lengths, types and texts have been checked.
pub(super) struct Vocabulary<'a> {
    pub(super) file: &'a GgufFile,
    pub(super) texts: &'a [String],
    pub(super) types: Vec<TokenType>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(file: &'a GgufFile) -> Result<Self, TokenizeError> {
        let texts: &[String] = file.require(TOKENS)?;
        if texts.is_empty() {
            return Err(file.metadata_error(TOKENS, "is empty").into());
        }
        // Room for 256 ids behind the last one, see `bpe`.
        if texts.len() > (u32::MAX - 256) as usize {
            return Err(file
                .metadata_error(TOKENS, format!("{} tokens are too many", texts.len()))
                .into());
        }

        let mut types = match file.get::<Vec<usize>>(TOKEN_TYPE)? {
            None => vec![TokenType::Normal; texts.len()],
            Some(numbers) => {
                check_len(file, TOKEN_TYPE, numbers.len(), texts.len())?;
                numbers
                    .iter()
                    .enumerate()
                    .map(|(id, &number)| {
                        TokenType::from_number(number).ok_or_else(|| {
                            let problem =
                                format!("token {id} has type {number} (0 to 6 are known)");
                            file.metadata_error(TOKEN_TYPE, problem).into()
                        })
                    })
                    .collect::<Result<_, TokenizeError>>()?
            }
        };

        let mut ids = HashMap::with_capacity(texts.len());
        for (id, text) in (0u32..).zip(texts) {
            if END_TEXTS.contains(&text.as_str()) {
                types[id as usize] = TokenType::Control;
            }
            // An empty text is a hole in the vocabulary: an id that no text leads to.
            if text.is_empty() {
                continue;
            }
            if let Some(first) = ids.insert(text.as_str(), id) {
                let problem = format!("tokens {first} and {id} have the same text {text:?}");
                return Err(file.metadata_error(TOKENS, problem).into());
            }
        }
        Ok(Self {
            file,
            texts,
            types,
            ids,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    /// The id of the token with exactly this text, of any type.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// All tokens in the order of their ids.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        (0u32..)
            .zip(self.texts)
            .zip(&self.types)
            .map(|((id, text), &token_type)| (id, text.as_str(), token_type))
    }

    /// An optional token id, checked to be in the vocabulary.
    pub(super) fn special_id(&self, key: &str) -> Result<Option<u32>, TokenizeError> {
        let id: Option<u32> = self.file.get(key)?;
        match id {
            Some(id) if id as usize >= self.len() => {
                let problem = format!("{id} is not the id of a token, there are {}", self.len());
                Err(self.file.metadata_error(key, problem).into())
            }
            other => Ok(other),
        }
    }

    /// An array with one item for each token.
    pub(super) fn per_token<T>(&self, key: &str) -> Result<Vec<T>, TokenizeError>
    where
        Vec<T>: FromValue<'a>,
    {
        let items: Vec<T> = self.file.require(key)?;
        check_len(self.file, key, items.len(), self.len())?;
        Ok(items)
    }
}

fn check_len(file: &GgufFile, key: &str, len: usize, tokens: usize) -> Result<(), TokenizeError> {
    if len == tokens {
        return Ok(());
    }
    let problem = format!("has {len} items where {TOKENS} has {tokens}");
    Err(file.metadata_error(key, problem).into())
}

/// The byte that `<0x00>` to `<0xFF>` stands for.
pub(super) fn named_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` alone would also take a sign.
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The bytes of all tokens, one after the other in a single buffer.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where the bytes of each token end.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// Control and unknown tokens stand for nothing, byte tokens for the byte they name; `write` appends the bytes of all
    /// others.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        write: impl Fn(&str, TokenType, &mut Vec<u8>),
    ) -> Result<Self, TokenizeError> {
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(vocabulary.len());
        for (id, text, token_type) in vocabulary.iter() {
            match token_type {
                TokenType::Control | TokenType::Unknown => {}
                TokenType::Byte => bytes.push(named_byte(text).ok_or_else(|| {
                    let problem = format!(
                        "token {id} is a byte token but its text is {text:?} (<0x00> to <0xFF>)"
                    );
                    vocabulary.file.metadata_error(TOKENS, problem)
                })?),
                _ => write(text, token_type, &mut bytes),
            }
            ends.push(bytes.len());
        }
        Ok(Self { bytes, ends })
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of one token; none for an id that is not in the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}
