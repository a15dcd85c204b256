//! Turning text into token ids and back, as the `tokenizer.ggml.*` metadata of a GGUF file describe it.
//!
//! [`Tokenizer::from_gguf`] makes two things from the metadata: a [`tokenizers::Tokenizer`] for encoding, and a table of the
//! bytes that each token stands for, for decoding. The ids are the same as llama.cpp's for the same file.
//!
//! | file | what it does |
//! | --- | --- |
//! | `vocab` | the vocabulary, read and checked, and the table of each token's bytes |
//! | `bpe` | byte-level BPE: alphabet, merges, words |
//! | `pretokenize` | how text is split into words, for each name of `tokenizer.ggml.pre` |
//! | `spm` | SentencePiece BPE: merges from scores, spaces, byte tokens |
//! | `literal` | user-defined tokens, which are searched for in the text before it is split |
//! | `pieces` | encoding long texts, and texts that come in pieces |
//! | `stream` | decoding, one token at a time |
//! | `error` | the errors |
//!
//! Sources: the GGUF specification (`docs/gguf.md` in the ggml repository); Sennrich et al., "Neural Machine Translation of
//! Rare Words with Subword Units" (ACL 2016); Kudo and Richardson, "SentencePiece" (EMNLP 2018); for defaults of absent keys
//! and the meaning of pre-tokenizer names, llama.cpp (`llama-vocab.cpp`).

mod bpe;
mod error;
mod literal;
mod pieces;
mod pretokenize;
mod spm;
mod stream;
mod vocab;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

pub use error::TokenizeError;
pub use pieces::{PIECE, Pieces};
pub(crate) use pretokenize::{GPT2, pre_of};
pub use stream::DecodeStream;
pub(crate) use stream::Decoder;

use crate::gguf::{GgufFile, MetadataWarning};
use literal::{Fragment, Literals};
use vocab::{END_TEXTS, MORE_END_TEXTS, TokenBytes, TokenType, Vocabulary};

const MODEL: &str = "tokenizer.ggml.model";
/// The key of the name of the pre-tokenizer.
pub(crate) const PRE: &str = "tokenizer.ggml.pre";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const EOT: &str = "tokenizer.ggml.eot_token_id";
const EOM: &str = "tokenizer.ggml.eom_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
/// Lists of tokens that end a text, as some converters write them.
const END_LISTS: [&str; 3] = [
    "tokenizer.ggml.eos_token_ids",
    "tokenizer.ggml.eot_token_ids",
    "tokenizer.ggml.eog_token_ids",
];

/// The largest number of whitespace characters in a row that is accepted. The regular-expression engine that splits words
/// keeps a stack entry for each of them, and fails silently with more than about a million.
const MAX_BLANK_RUN: usize = 250_000;

/// The parts of a tokenizer that byte-level BPE and SentencePiece build in different ways.
struct Family {
    kind: Kind,
    encoder: tokenizers::Tokenizer,
    /// Whether each word is encoded by itself.
    separate_words: bool,
    bytes: TokenBytes,
    /// Whether prompts begin with BOS if the metadata do not say.
    adds_bos: bool,
    /// The BOS token if the metadata do not name one; `None` if there is then none.
    default_bos: Option<u32>,
    /// The EOS token if the metadata do not name one; `None` if there is then none.
    default_eos: Option<u32>,
}

/// The kind of a tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Byte-level BPE, as in GPT-2.
    ByteLevel,
    /// SentencePiece BPE, as in LLaMA; `space_prefix` if encoding puts a space in front of a text.
    SentencePiece { space_prefix: bool },
}

/// The tokenizer of one model: text to ids, ids to text.
pub struct Tokenizer {
    kind: Kind,
    encoder: tokenizers::Tokenizer,
    /// Whether each word is encoded by itself, so that texts can be cut between words.
    separate_words: bool,
    bytes: TokenBytes,
    literals: Literals,
    /// The control tokens and the user-defined ones.
    specials: Literals,
    /// Text and id of each control token.
    controls: BTreeMap<u32, String>,
    /// The control tokens that are decoded to their texts, and not to nothing.
    shown: BTreeSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    adds_eos: bool,
    /// The tokens at which generation stops.
    ends: BTreeSet<u32>,
    warnings: Vec<MetadataWarning>,
}

impl Tokenizer {
    /// The tokenizer that the metadata of `file` describe. It keeps no reference to the file.
    ///
    /// `tokenizer.ggml.model` may be "gpt2" (byte-level BPE, with one of the pre-tokenizers in `tokenizer.ggml.pre`) or
    /// "llama" (SentencePiece BPE). Keys that are absent have llama.cpp's defaults, with one exception: byte-level BPE without
    /// `tokenizer.ggml.bos_token_id` has no BOS, and without `tokenizer.ggml.eos_token_id` no EOS. A value that is of no use is
    /// passed over as if it were absent, where text can be encoded without it: ids of special tokens, whether they are added, types
    /// of tokens. [`warnings`](Self::warnings) tells.
    ///
    /// # Errors
    /// [`TokenizeError::Model`] and [`TokenizeError::PreTokenizer`] if the file's tokenizer is not supported.
    /// [`TokenizeError::Metadata`] if tokens, merges or scores are missing, have a value of another type or an array of another length
    /// than the vocabulary, or contain a merge outside the vocabulary.
    /// [`TokenizeError::Build`] if the `tokenizers` library refuses the result.
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
        let mut warnings = Vec::new();
        let vocabulary = Vocabulary::read(file, &mut warnings)?;
        let family = build(&vocabulary, &mut warnings)?;

        let mut id = |key| vocabulary.special_id(key, &mut warnings);
        let bos = id(BOS).or(family.default_bos);
        let eos = id(EOS).or(family.default_eos);
        let mut ends: BTreeSet<u32> = END_TEXTS
            .iter()
            .filter_map(|text| vocabulary.id(text))
            .collect();
        ends.extend(eos);
        ends.extend(id(EOT));
        ends.extend(id(EOM));
        ends.extend(listed_ends(file, &vocabulary));
        let controls = controls(&vocabulary, bos.into_iter().chain(ends.iter().copied()));
        let more = controls
            .iter()
            .filter(|(_, text)| MORE_END_TEXTS.contains(&text.as_str()));
        ends.extend(more.map(|(id, _)| *id));
        let literals: Vec<(String, u32)> = vocabulary
            .iter()
            .filter(|(_, _, token_type)| *token_type == TokenType::UserDefined)
            .map(|(id, text, _)| (text.to_owned(), id))
            .collect();
        let special = controls.iter().map(|(id, text)| (text.clone(), *id));
        let specials = Literals::new(literals.iter().cloned().chain(special).collect());

        Ok(Self {
            kind: family.kind,
            encoder: family.encoder,
            separate_words: family.separate_words,
            bytes: family.bytes,
            literals: Literals::new(literals),
            specials,
            controls,
            shown: BTreeSet::new(),
            adds_bos: adds(file, ADD_BOS, family.adds_bos, bos, &mut warnings),
            adds_eos: adds(file, ADD_EOS, false, eos, &mut warnings),
            bos,
            eos,
            ends,
            warnings,
        })
    }

    /// The tokenizer with the encoder of the `tokenizers` library's own file, a `tokenizer.json` of the same vocabulary, whose path is for
    /// messages. What this file does about special tokens stays out: texts never become control tokens, and what stands in front of
    /// prompts is said by the metadata.
    ///
    /// # Errors
    /// [`TokenizeError::Build`] if the library refuses the file.
    pub fn with_encoder(
        mut self,
        path: &Path,
        mut json: serde_json::Value,
    ) -> Result<Self, TokenizeError> {
        if let Some(object) = json.as_object_mut() {
            for key in ["post_processor", "truncation", "padding", "decoder"] {
                object.insert(key.to_owned(), serde_json::Value::Null);
            }
            object.insert(
                "added_tokens".to_owned(),
                serde_json::Value::Array(Vec::new()),
            );
        }
        let bytes = json.to_string();
        self.encoder =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|source| TokenizeError::Build {
                path: path.to_owned(),
                source,
            })?;
        // Where texts may be cut is known of rules that have a name.
        let named = |w: &MetadataWarning| w.key() != PRE;
        self.separate_words &= self.kind != Kind::ByteLevel || self.warnings.iter().all(named);
        self.warnings.retain(named);
        Ok(self)
    }

    /// What of the metadata was passed over, or assumed.
    pub fn warnings(&self) -> &[MetadataWarning] {
        &self.warnings
    }

    /// The ids of plain text. BOS and EOS are not added, and no text becomes a control token, even if it is spelt like one.
    /// User-defined tokens are recognised.
    ///
    /// If a byte-level vocabulary has no token for some byte (SmolLM2 has none for a few control characters), that byte is
    /// lost.
    ///
    /// # Errors
    /// [`TokenizeError::BlankRun`] if the text has more than 250,000 whitespace characters in a row (byte-level BPE only),
    /// [`TokenizeError::NoToken`] if a SentencePiece vocabulary has no token for a character, and
    /// [`TokenizeError::Encode`] if the `tokenizers` library fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        self.encode_to(text, &mut ids)?;
        Ok(ids)
    }

    /// The ids of a prompt: those of [`encode`](Self::encode), with BOS in front and EOS behind if the metadata ask for them.
    ///
    /// # Errors
    /// The errors of [`encode`](Self::encode).
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        ids.extend(self.bos.filter(|_| self.adds_bos));
        self.encode_to(text, &mut ids)?;
        ids.extend(self.eos.filter(|_| self.adds_eos));
        Ok(ids)
    }

    /// The ids of a text in which control tokens are written out, as a chat template writes it: their texts become the tokens. BOS and
    /// EOS are not added.
    ///
    /// Where there is a `mark`, that character is no part of the text: it is taken out after control and user-defined tokens have been
    /// found, so that a text with a mark in it becomes none. What else lies between two control tokens has the ids that
    /// [`encode`](Self::encode) gives it.
    ///
    /// # Errors
    /// The errors of [`encode`](Self::encode).
    pub fn encode_special(
        &self,
        text: &str,
        mark: Option<char>,
    ) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        for fragment in self.specials.cut(text) {
            match (fragment, mark) {
                (Fragment::Token(id), _) => ids.push(id),
                (Fragment::Text(stretch), Some(mark)) if stretch.contains(mark) => {
                    // Those without a mark have been cut out.
                    let (text, literals) = (stretch.replace(mark, ""), &Literals::NONE);
                    let rest = self.encode_front(&text, PIECE, literals, &mut ids)?;
                    self.encode_piece(rest, literals, &mut ids)?;
                }
                (Fragment::Text(stretch), _) => self.encode_to(stretch, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// The control tokens with their texts, which [`encode_special`](Self::encode_special) finds.
    pub fn controls(&self) -> impl Iterator<Item = (&str, u32)> {
        self.controls.iter().map(|(id, text)| (text.as_str(), *id))
    }

    /// The texts of user-defined tokens, which are found in any text.
    pub fn user_defined(&self) -> impl Iterator<Item = &str> {
        self.literals.texts()
    }

    /// What a token is written as: the text of a control token, and for others their bytes; `None` if these are not characters, and for
    /// ids outside the vocabulary.
    pub fn token_text(&self, id: u32) -> Option<String> {
        let text = self.controls.get(&id).cloned();
        let bytes = || {
            std::str::from_utf8(self.token_bytes(id))
                .ok()
                .map(str::to_owned)
        };
        text.or_else(bytes).filter(|text| !text.is_empty())
    }

    /// Lets generation stop at a token too. One that is no control token is left alone: text may have it.
    pub fn add_end(&mut self, id: u32) {
        if self.controls.contains_key(&id) {
            self.ends.insert(id);
        }
    }

    /// Has a control token decoded to its text from now on, where it is in the vocabulary: it says something to whoever reads the
    /// answer, as the marker of a tool call does.
    pub fn show(&mut self, text: &str) {
        let found = self.controls.iter().find(|(_, known)| *known == text);
        self.shown.extend(found.map(|(id, _)| *id));
    }

    /// The text of ids that are a whole text. Control tokens are skipped, invalid UTF-8 becomes U+FFFD, and the space that
    /// `encode` puts in front for some models is dropped. For ids that continue a text, use [`stream`](Self::stream).
    ///
    /// The result is the text that was encoded, except for what encoding loses: in a SentencePiece vocabulary `▁` and a space
    /// are the same, and with a space prefix, text behind a user-defined token gets that space in front.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream().at_text_start();
        let mut text = String::new();
        for &id in ids {
            stream.push_to(id, &mut text);
        }
        text.push_str(&stream.finish());
        text
    }

    /// The text of ids with control tokens written out, as [`encode_special`](Self::encode_special) takes it.
    pub fn decode_special(&self, ids: &[u32]) -> String {
        let mut decoder = Decoder::at_text_start(self);
        let mut text: String = ids.iter().map(|id| decoder.push_shown(self, *id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// The bytes that a token stands for, which may be parts of characters. The slice is empty for control and unknown tokens
    /// and for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// A stream that decodes one id at a time. It keeps a leading space, which is right for ids that continue a prompt; for ids
    /// that begin a text, use [`DecodeStream::at_text_start`].
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// The number of tokens; all ids are smaller. A model's output may be wider, padded with rows that belong to no token.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The id of the token that begins a sequence (BOS); `None` if the model has none.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id of the token that ends a sequence (EOS); `None` if the model has none.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether prompts begin with BOS; false if the model has none.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether EOS stands behind prompts; false if the model has none.
    pub fn adds_eos(&self) -> bool {
        self.adds_eos
    }

    /// Whether generation stops at this token. It does at EOS, at the end of a turn or of a message
    /// (`tokenizer.ggml.eot_token_id`, `tokenizer.ggml.eom_token_id`, and lists such as `tokenizer.ggml.eos_token_ids`), at tokens
    /// whose text is a well-known end marker such as `<|im_end|>` or `</s>`, and at those of [`add_end`](Self::add_end).
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// The bytes of the text that a control token is decoded to; empty for those that are decoded to nothing.
    fn shown_bytes(&self, id: u32) -> &[u8] {
        let text = self.controls.get(&id).filter(|_| self.shown.contains(&id));
        text.map_or(&[], |text| text.as_bytes())
    }

    /// Whether this token is user-defined.
    fn is_literal(&self, id: u32) -> bool {
        self.literals.contains(id)
    }

    /// Appends the ids of plain text to `ids`, encoded in pieces if it is long.
    fn encode_to(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
        let rest = self.encode_front(text, PIECE, &self.literals, ids)?;
        self.encode_piece(rest, &self.literals, ids)
    }

    /// Appends the ids of plain text to `ids`, encoded at once. Of user-defined tokens it finds these.
    fn encode_piece(
        &self,
        text: &str,
        literals: &Literals,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizeError> {
        if self.kind == Kind::ByteLevel {
            check_blank_runs(text)?;
        }
        for fragment in literals.cut(text) {
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
                // An id behind the last token marks text that the vocabulary has no token for.
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

/// Whether the token `id` is added to prompts: the value of `key`, or `default` without it; false if `id` is `None`, with a warning if
/// the value is true.
fn adds(
    file: &GgufFile,
    key: &str,
    default: bool,
    id: Option<u32>,
    warnings: &mut Vec<MetadataWarning>,
) -> bool {
    let said = file.optional(key, warnings);
    if said == Some(true) && id.is_none() {
        warnings.push(MetadataWarning::ignored(
            key,
            "is true, but there is no such token",
        ));
    }
    said.unwrap_or(default) && id.is_some()
}

/// The ids in the lists of tokens that end a text. What is no list of ids, or no id, is passed over.
fn listed_ends(file: &GgufFile, vocabulary: &Vocabulary) -> Vec<u32> {
    let lists = END_LISTS
        .iter()
        .filter_map(|key| file.get::<Vec<usize>>(key).ok().flatten());
    let ids = lists.flatten().filter(|id| *id < vocabulary.len());
    ids.filter_map(|id| u32::try_from(id).ok()).collect()
}

/// Id and text of the control tokens: those of this type, and those that the metadata name.
fn controls(vocabulary: &Vocabulary, named: impl Iterator<Item = u32>) -> BTreeMap<u32, String> {
    let named: BTreeSet<u32> = named.collect();
    let tokens = vocabulary.iter().filter(|(id, text, token_type)| {
        !text.is_empty() && (*token_type == TokenType::Control || named.contains(id))
    });
    tokens.map(|(id, text, _)| (id, text.to_owned())).collect()
}

/// Returns an error if a text has more than [`MAX_BLANK_RUN`] whitespace characters in a row.
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
