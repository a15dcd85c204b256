//! The vocabulary, read from the metadata and checked, and the bytes that each token stands for.

use std::collections::HashMap;

use super::TokenizeError;
use crate::count::count;
use crate::gguf::{FromValue, GgufFile, MetadataWarning};

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";

/// Texts of tokens that end a model's turn in any vocabulary. Tokens with these texts are treated as control tokens whatever
/// type the file gives them, because some converters give a wrong one and the model's turn would then never end.
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

/// More such texts, which stand for an end only where the token is a control token.
pub(super) const MORE_END_TEXTS: &[&str] = &[
    "<eos>",
    "<EOT>",
    "[EOS]",
    "[EOT]",
    "<turn|>",
    "<|eot|>",
    "<|return|>",
    "<|call|>",
    "<|endofturn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
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
    /// The type with this number; `None` if there is none.
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

    /// Whether text that is spelt like a token of this type becomes that token. Control and unknown tokens never come from text,
    /// and byte tokens stand for bytes and not for the text `<0x..>`.
    pub(super) fn comes_from_text(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined | Self::Unused)
    }
}

/// The vocabulary of a file, checked: the text and type of each token.
pub(super) struct Vocabulary<'a> {
    /// The file that the vocabulary was read from.
    pub(super) file: &'a GgufFile,
    pub(super) texts: &'a [String],
    pub(super) types: Vec<TokenType>,
    /// The id of each text that is not empty.
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the vocabulary from the metadata of a file. Types that are of no use become warnings.
    ///
    /// # Errors
    /// [`TokenizeError::Metadata`] if it is missing, empty or too large, or if texts occur twice.
    pub(super) fn read(
        file: &'a GgufFile,
        warnings: &mut Vec<MetadataWarning>,
    ) -> Result<Self, TokenizeError> {
        let texts: &[String] = file.require(TOKENS)?;
        if texts.is_empty() {
            return Err(file.metadata_error(TOKENS, "is empty").into());
        }
        // `bpe` needs up to 256 ids behind the last token.
        if texts.len() > (u32::MAX - 256) as usize {
            return Err(file
                .metadata_error(TOKENS, format!("{} tokens are too many", texts.len()))
                .into());
        }

        let mut types = types(file, texts, warnings);
        let mut ids = HashMap::with_capacity(texts.len());
        for (id, text) in (0u32..).zip(texts) {
            if END_TEXTS.contains(&text.as_str()) {
                types[id as usize] = TokenType::Control;
            }
            // A token with an empty text is an unused id: no text is encoded as it.
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

    /// The number of tokens.
    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    /// The id of the token with exactly this text, whatever its type; `None` if there is none.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Id, text and type of all tokens, in the order of their ids.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        (0u32..)
            .zip(self.texts)
            .zip(&self.types)
            .map(|((id, text), &token_type)| (id, text.as_str(), token_type))
    }

    /// The token id that a metadata key gives; `None` if the file does not have the key, or, with a warning, if its value is not the
    /// id of a token.
    pub(super) fn special_id(&self, key: &str, warnings: &mut Vec<MetadataWarning>) -> Option<u32> {
        let id: u32 = self.file.optional(key, warnings)?;
        if id as usize >= self.len() {
            let problem = format!("{id} is not the id of a token, there are {}", self.len());
            warnings.push(MetadataWarning::ignored(key, problem));
            return None;
        }
        Some(id)
    }

    /// The array of a metadata key that must have one item for each token.
    ///
    /// # Errors
    /// If the key is missing or the array has another length.
    pub(super) fn per_token<T>(&self, key: &str) -> Result<Vec<T>, TokenizeError>
    where
        Vec<T>: FromValue<'a>,
    {
        let items: Vec<T> = self.file.require(key)?;
        check_len(self.file, key, items.len(), self.len())?;
        Ok(items)
    }
}

/// The type of each token. Where the file gives none that are of use, all are normal tokens but those that are bytes by their names;
/// so is a token whose own type cannot be.
fn types(file: &GgufFile, texts: &[String], warnings: &mut Vec<MetadataWarning>) -> Vec<TokenType> {
    let mut ignored = |problem| warnings.push(MetadataWarning::ignored(TOKEN_TYPE, problem));
    let numbers = file.get::<Vec<usize>>(TOKEN_TYPE);
    let numbers = match numbers {
        Ok(Some(numbers)) if numbers.len() == texts.len() => numbers,
        other => {
            match (other, file.metadata().get(TOKEN_TYPE)) {
                (Ok(Some(numbers)), _) => ignored(wrong_len(numbers.len(), texts.len())),
                (_, Some(value)) => ignored(format!(
                    "expected {}, found {value}",
                    <Vec<usize> as FromValue>::EXPECTED
                )),
                (_, None) => {}
            }
            warnings.push(MetadataWarning::missing(TOKEN_TYPE, "normal"));
            return guessed_types(texts);
        }
    };
    let mut impossible: Option<(usize, String)> = None;
    let types = numbers.iter().zip(texts).enumerate();
    let types = types.map(|(id, (&number, text))| {
        let problem = match TokenType::from_number(number) {
            Some(TokenType::Byte) if named_byte(text).is_none() => {
                format!("token {id} is a byte token but its text is {text:?} (<0x00> to <0xFF>)")
            }
            Some(token_type) => return token_type,
            None => format!("token {id} has type {number} (0 to 6 are known)"),
        };
        impossible.get_or_insert((0, problem)).0 += 1;
        TokenType::Normal
    });
    let types = types.collect();
    match impossible {
        None => {}
        Some((1, problem)) => ignored(problem),
        Some((more, problem)) => ignored(format!("{problem}, and so on for {more} tokens")),
    }
    types
}

fn guessed_types(texts: &[String]) -> Vec<TokenType> {
    let names_byte = |text: &String| named_byte(text).is_some();
    let has_bytes = texts.iter().filter(|text| names_byte(text)).count() == 256;
    let types = texts
        .iter()
        .map(|text| match has_bytes && names_byte(text) {
            true => TokenType::Byte,
            false => TokenType::Normal,
        });
    types.collect()
}

/// Returns an error if the array of a key does not have one item for each of `tokens` tokens.
fn check_len(file: &GgufFile, key: &str, len: usize, tokens: usize) -> Result<(), TokenizeError> {
    if len == tokens {
        return Ok(());
    }
    Err(file.metadata_error(key, wrong_len(len, tokens)).into())
}

fn wrong_len(len: usize, tokens: usize) -> String {
    format!("has {} where {TOKENS} has {tokens}", count(len, "item"))
}

/// The byte that a text from `<0x00>` to `<0xFF>` stands for; `None` for any other text.
pub(super) fn named_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` alone would also take a sign.
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The bytes that each token stands for, in a single buffer.
pub(super) struct TokenBytes {
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// The end of each token's bytes in `bytes`.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// The table for a vocabulary. Control and unknown tokens have no bytes, byte tokens have the byte that they name; for all
    /// other tokens `write` appends the bytes.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        write: impl Fn(&str, TokenType, &mut Vec<u8>),
    ) -> Self {
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(vocabulary.len());
        for (_, text, token_type) in vocabulary.iter() {
            match token_type {
                TokenType::Control | TokenType::Unknown => {}
                TokenType::Byte => bytes.extend(named_byte(text)),
                _ => write(text, token_type, &mut bytes),
            }
            ends.push(bytes.len());
        }
        Self { bytes, ends }
    }

    /// The number of tokens.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; empty for an id that is not in the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}
