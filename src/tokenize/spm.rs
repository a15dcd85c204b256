//! SentencePiece BPE (`tokenizer.ggml.model` = "llama"). Spaces become `▁`; then neighbours are joined as long as some pair of
//! them is a token, the pair with the best score first. Characters without a token become byte tokens.

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::vocab::{TOKENS, TokenBytes, TokenType, Vocabulary};
use super::{Family, Kind, TokenizeError};
use crate::gguf::MetadataWarning;

const SCORES: &str = "tokenizer.ggml.scores";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// The character that stands for a space in the vocabulary.
pub(super) const SPACE: char = '\u{2581}';
/// A pattern for a word with the spaces in front of it.
const WORD: &str = "\u{2581}+[^\u{2581}]*";

/// Builds the encoder and the table of bytes.
///
/// # Errors
/// [`TokenizeError`] if scores are missing or not numbers, or if only some of the byte tokens exist.
pub(super) fn build(
    vocabulary: &Vocabulary,
    warnings: &mut Vec<MetadataWarning>,
) -> Result<Family, TokenizeError> {
    let file = vocabulary.file;
    let space_prefix = file.optional(SPACE_PREFIX, warnings).unwrap_or(true);
    let scores: Vec<f32> = vocabulary.per_token(SCORES)?;
    if let Some(id) = scores.iter().position(|score| score.is_nan()) {
        let problem = format!("the score of token {id} is not a number");
        return Err(file.metadata_error(SCORES, problem).into());
    }
    let separate_words = words_are_separate(vocabulary);
    let bytes = TokenBytes::new(vocabulary, |text, _, out| {
        out.extend_from_slice(text.replace(SPACE, " ").as_bytes());
    });

    let mut vocab: Vocab = vocabulary
        .iter()
        .filter(|(_, text, token_type)| {
            let has_text = token_type.comes_from_text() && !text.is_empty();
            has_text || *token_type == TokenType::Byte
        })
        .map(|(id, text, _)| (text.to_owned(), id))
        .collect();
    let unknown = match unknown_id(vocabulary, warnings) {
        Some(id) => {
            vocab.insert(vocabulary.texts[id as usize].clone(), id);
            vocabulary.texts[id as usize].clone()
        }
        // The empty text, which never occurs as a piece of text, with an id for which `encode` returns an error.
        None => {
            vocab.insert(String::new(), vocabulary.len() as u32);
            String::new()
        }
    };
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges(vocabulary, &scores))
        .byte_fallback(has_byte_tokens(vocabulary)?)
        .unk_token(unknown)
        .fuse_unk(true)
        .build();
    let built = model.and_then(|model| {
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if space_prefix {
            steps.push(Prepend::new(SPACE.to_string()).into());
        }
        steps.push(Replace::new(" ", SPACE.to_string())?.into());
        let mut encoder = Tokenizer::new(model);
        encoder.with_normalizer(Some(Sequence::new(steps)));
        if separate_words {
            let pattern = SplitPattern::Regex(WORD.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            encoder.with_pre_tokenizer(Some(split));
        }
        Ok(encoder)
    });
    let encoder = built.map_err(|source| TokenizeError::Build {
        path: file.path().to_owned(),
        source,
    })?;

    let in_vocabulary = |id: u32| ((id as usize) < vocabulary.len()).then_some(id);
    Ok(Family {
        kind: Kind::SentencePiece { space_prefix },
        encoder,
        separate_words,
        bytes,
        adds_bos: true,
        default_bos: in_vocabulary(1),
        default_eos: in_vocabulary(2),
    })
}

/// The merges: every way in which a token can be joined from two other tokens, best first.
///
/// SentencePiece has scores, while `tokenizers` wants merges in order, so merges are sorted by score, the highest first. If
/// scores are equal, SentencePiece joins the leftmost pair. In trained vocabularies this happens for runs of one character
/// (in LLaMA 2 for all runs of spaces), which therefore grow from the left. The same result is reached by putting the longer
/// token before the shorter, and of the splits of one token the one with the longer left part first. (For arbitrary
/// vocabularies no order of merges can reproduce the rule.)
fn merges(vocabulary: &Vocabulary, scores: &[f32]) -> Merges {
    let is_part = |text: &str| {
        vocabulary
            .id(text)
            .is_some_and(|id| vocabulary.types[id as usize].comes_from_text())
    };
    let mut splits: Vec<(u32, &str, usize)> = Vec::new();
    for (id, text, token_type) in vocabulary.iter() {
        if !token_type.comes_from_text() {
            continue;
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if is_part(left) && is_part(right) {
                splits.push((id, text, at));
            }
        }
    }
    splits.sort_by(|(a, a_text, a_at), (b, b_text, b_at)| {
        scores[*b as usize]
            .total_cmp(&scores[*a as usize])
            .then(b_text.len().cmp(&a_text.len()))
            .then(a.cmp(b))
            .then(b_at.cmp(a_at))
    });
    splits
        .into_iter()
        .map(|(_, text, at)| (text[..at].to_owned(), text[at..].to_owned()))
        .collect()
}

/// Whether words can be encoded one by one, because no token contains the end of a word and the space behind it.
///
/// If there is no such token, no merge crosses the end of a word, and each word by itself gives the same tokens as in the whole
/// text. Encoding is then faster, because words that occur again are found in the encoder's cache. The space itself must also
/// be a token: a run of unknown characters becomes one unknown token, and such a run must not continue across a space.
fn words_are_separate(vocabulary: &Vocabulary) -> bool {
    let mut space_is_token = false;
    for (_, text, token_type) in vocabulary.iter() {
        if !token_type.comes_from_text() {
            continue;
        }
        if text.trim_start_matches(SPACE).contains(SPACE) {
            return false;
        }
        space_is_token |= text.chars().eq([SPACE]);
    }
    space_is_token
}

/// The id of the token for characters that have no other: the one that the metadata name, or else the first of type "unknown";
/// `None` if there is neither.
fn unknown_id(vocabulary: &Vocabulary, warnings: &mut Vec<MetadataWarning>) -> Option<u32> {
    let first = || {
        let mut ids = vocabulary.iter();
        ids.find(|(_, _, token_type)| *token_type == TokenType::Unknown)
            .map(|(id, _, _)| id)
    };
    vocabulary.special_id(UNKNOWN, warnings).or_else(first)
}

/// Whether the vocabulary has a token for each byte.
///
/// # Errors
/// If it has tokens for only some of the bytes, with which characters would be encoded in part.
fn has_byte_tokens(vocabulary: &Vocabulary) -> Result<bool, TokenizeError> {
    let count = (0..=255u8)
        .filter(|byte| vocabulary.id(&format!("<0x{byte:02X}>")).is_some())
        .count();
    if count == 0 || count == 256 {
        return Ok(count == 256);
    }
    let problem =
        format!("has {count} of the 256 byte tokens <0x00> to <0xFF>; it must have all or none");
    Err(vocabulary.file.metadata_error(TOKENS, problem).into())
}
