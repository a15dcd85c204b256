//! Text to token ids and back, as a GGUF file's `tokenizer.ggml.*` metadata asks for.
//!
//! [`Tokenizer::from_gguf`] turns the metadata into a [`tokenizers::Tokenizer`] for encoding, and into a table of the bytes
//! that each token stands for, which decoding reads. The ids are those of llama.cpp for the same file.
//!
//! | file | what it does |
//! | --- | --- |
//! | `vocab` | reads and checks the vocabulary; the table of bytes |
//! | `bpe` | byte-level BPE: alphabet, merges, words |
//! | `pretokenize` | what a word is, for each name of `tokenizer.ggml.pre` |
//! | `spm` | SentencePiece BPE: scores to merges, spaces, byte tokens |
//! | `literal` | user-defined tokens, which are found in the text as they are written |
//! | `stream` | decoding, a token at a time |
//!
//! Sources: the GGUF specification (`docs/gguf.md` in the ggml repository); Sennrich et al., "Neural Machine Translation of
//! Rare Words with Subword Units" (ACL 2016); Kudo and Richardson, "SentencePiece" (EMNLP 2018); for defaults of absent keys
//! and the meaning of pre-tokenizer names, llama.cpp (`llama-vocab.cpp`).

mod bpe;
mod error;
mod literal;
mod pretokenize;
mod spm;
mod stream;
mod vocab;

use std::collections::BTreeSet;
use std::fmt;

pub use error::TokenizeError;
pub use stream::DecodeStream;

use crate::gguf::GgufFile;
use literal::{Fragment, Literals};
use vocab::{END_TEXTS, TokenBytes, TokenType, Vocabulary};

const MODEL: &str = "tokenizer.ggml.model";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const EOT: &str = "tokenizer.ggml.eot_token_id";
const EOM: &str = "tokenizer.ggml.eom_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";

/// The engine behind the word patterns keeps a stack entry for each character of a run of whitespace, and past a million
/// it gives up without a word. Such a text is refused well before.
const MAX_BLANK_RUN: usize = 250_000;

/// What the two families of tokenizers build in their own ways.
struct Family {
    kind: Kind,
    encoder: tokenizers::Tokenizer,
    bytes: TokenBytes,
    /// Whether prompts begin with BOS when the metadata does not say.
    adds_bos: bool,
    default_bos: Option<u32>,
    default_eos: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ByteLevel,
    SentencePiece { space_prefix: bool },
}

/// The tokenizer of one model: text to ids, ids to text.
pub struct Tokenizer {
    kind: Kind,
    encoder: tokenizers::Tokenizer,
    bytes: TokenBytes,
    literals: Literals,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    adds_eos: bool,
    ends: BTreeSet<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata of `file` describes. Nothing of the file is kept.
    ///
    /// `tokenizer.ggml.model` may be "gpt2" (byte-level BPE, with one of the pre-tokenizers in `tokenizer.ggml.pre`) or
    /// "llama" (SentencePiece BPE). Keys that are absent have llama.cpp's defaults, except that byte-level BPE without
    /// `tokenizer.ggml.bos_token_id` has no BOS, and without `tokenizer.ggml.eos_token_id` no EOS.
    ///
    /// # Errors
    /// [`TokenizeError::Model`] and [`TokenizeError::PreTokenizer`] for what is not supported, and
    /// [`TokenizeError::Metadata`] for a key that is missing, of another type, of another length than the vocabulary,
    /// holds an id or merge outside the vocabulary, or asks for a BOS or EOS that there is none of.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, TokenizeError> {
        let build = match file.require(MODEL)? {
            "gpt2" => bpe::build,
            "llama" => spm::build,
            other => {
                return Err(TokenizeError::Model {
                    path: file.path().to_owned(),
                    model: other.to_owned(),
                });
            }
        };
        let vocabulary = Vocabulary::read(file)?;
        let family = build(&vocabulary)?;

        let bos = vocabulary.special_id(BOS)?.or(family.default_bos);
        let eos = vocabulary.special_id(EOS)?.or(family.default_eos);
        let mut ends: BTreeSet<u32> = END_TEXTS
            .iter()
            .filter_map(|text| vocabulary.id(text))
            .collect();
        ends.extend(eos);
        ends.extend(vocabulary.special_id(EOT)?);
        ends.extend(vocabulary.special_id(EOM)?);
        let literals = vocabulary
            .iter()
            .filter(|(_, _, token_type)| *token_type == TokenType::UserDefined)
            .map(|(id, text, _)| (text.to_owned(), id))
            .collect();

        Ok(Self {
            kind: family.kind,
            encoder: family.encoder,
            bytes: family.bytes,
            literals: Literals::new(literals),
            adds_bos: adds(file, ADD_BOS, family.adds_bos, BOS, bos)?,
            adds_eos: adds(file, ADD_EOS, false, EOS, eos)?,
            bos,
            eos,
            ends,
        })
    }

    /// The ids of plain text: no BOS or EOS is added, and no text becomes a control token, whatever it looks like.
    /// User-defined tokens are recognised.
    ///
    /// Byte-level vocabularies without a token for some byte (SmolLM2 has none for a few control characters) lose it.
    ///
    /// # Errors
    /// [`TokenizeError::BlankRun`] for a quarter of a million whitespace characters in a row (byte-level BPE only), and
    /// [`TokenizeError::NoToken`] for a character that a SentencePiece vocabulary has nothing for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        self.encode_to(text, &mut ids)?;
        Ok(ids)
    }

    /// The ids of a prompt: as [`encode`](Self::encode), with BOS in front and EOS behind if the metadata asks for them.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        ids.extend(self.bos.filter(|_| self.adds_bos));
        self.encode_to(text, &mut ids)?;
        ids.extend(self.eos.filter(|_| self.adds_eos));
        Ok(ids)
    }

    /// The text of ids that are a whole text: control tokens are skipped, invalid UTF-8 becomes U+FFFD, and the space that
    /// `encode` puts in front for some models is dropped. For ids that continue a text, see [`stream`](Self::stream).
    ///
    /// It undoes `encode`, but for what encoding loses: `▁` and space are the same in a SentencePiece vocabulary, and with
    /// a space prefix text after a user-defined token comes back with that space in front.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream().at_text_start();
        let mut text = String::new();
        for &id in ids {
            stream.push_to(id, &mut text);
        }
        text.push_str(&stream.finish());
        text
    }

    /// The exact bytes that a token stands for, which need not be whole characters. None for control and unknown tokens
    /// and for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// A stream that decodes one id at a time. It keeps a leading space, as it must when the ids continue a prompt; for
    /// ids that begin a text, ask for [`DecodeStream::at_text_start`].
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// The number of tokens: ids are below it. A model's output can be wider, padded with rows that mean nothing.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The token that begins a sequence, if there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a sequence, if there is one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a prompt begins with BOS. It is never true without a BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether generation stops at this token: EOS, the end of a turn or of a message
    /// (`tokenizer.ggml.eot_token_id`, `tokenizer.ggml.eom_token_id`), and tokens whose text is a well-known end marker
    /// such as `<|im_end|>` or `</s>`.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    fn is_literal(&self, id: u32) -> bool {
        self.literals.contains(id)
    }

    fn encode_to(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
        if self.kind == Kind::ByteLevel {
            check_blank_runs(text)?;
        }
        for fragment in self.literals.cut(text) {
            let stretch = match fragment {
                Fragment::Text(stretch) => stretch,
                Fragment::Token(id) => {
                    ids.push(id);
                    continue;
                }
            };
            let encoding = self
                .encoder
                .encode_fast(stretch, false)
                .map_err(TokenizeError::Encode)?;
            for &id in encoding.get_ids() {
                // Ids behind the last token mark what the vocabulary has nothing for.
                if (id as usize) < self.vocab_size() {
                    ids.push(id);
                } else if self.kind != Kind::ByteLevel {
                    return Err(TokenizeError::NoToken);
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("kind", &self.kind)
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

/// Whether a prompt gets the token `id`: what `key` says, or else `default` if there is such a token.
fn adds(
    file: &GgufFile,
    key: &str,
    default: bool,
    id_key: &str,
    id: Option<u32>,
) -> Result<bool, TokenizeError> {
    match (file.get::<bool>(key)?, id) {
        (Some(true), None) => Err(file
            .metadata_error(key, format!("is true, but {id_key} is missing"))
            .into()),
        (said, id) => Ok(said.unwrap_or(default) && id.is_some()),
    }
}

fn check_blank_runs(text: &str) -> Result<(), TokenizeError> {
    let mut len = 0;
    let mut longest = 0;
    for character in text.chars() {
        len = if character.is_whitespace() {
            len + 1
        } else {
            0
        };
        longest = longest.max(len);
    }
    if longest > MAX_BLANK_RUN {
        return Err(TokenizeError::BlankRun { len: longest });
    }
    Ok(())
}
