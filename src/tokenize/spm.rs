//! SentencePiece BPE (`tokenizer.ggml.model` = "llama"): spaces become `▁`, and neighbours are joined for as long as some
//! pair of them makes a token, the pair with the best score first. Characters without a token become their bytes.

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::vocab::{TOKENS, TokenBytes, TokenType, Vocabulary};
use super::{Family, Kind, TokenizeError};

const SCORES: &str = "tokenizer.ggml.scores";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// What stands for a space in the vocabulary.
const SPACE: &str = "\u{2581}";
/// A word with the spaces in front of it.
const WORD: &str = "\u{2581}+[^\u{2581}]*";

pub(super) fn build(vocabulary: &Vocabulary) -> Result<Family, TokenizeError> {
    let file = vocabulary.file;
    let space_prefix = file.get::<bool>(SPACE_PREFIX)?.unwrap_or(true);
    let scores: Vec<f32> = vocabulary.per_token(SCORES)?;
    if let Some(id) = scores.iter().position(|score| score.is_nan()) {
        let problem = format!("the score of token {id} is not a number");
        return Err(file.metadata_error(SCORES, problem).into());
    }
    let bytes = TokenBytes::new(vocabulary, |text, _, out| {
        out.extend_from_slice(text.replace(SPACE, " ").as_bytes());
    })?;

    let mut vocab: Vocab = vocabulary
        .iter()
        .filter(|(_, text, token_type)| {
            let has_text = token_type.comes_from_text() && !text.is_empty();
            has_text || *token_type == TokenType::Byte
        })
        .map(|(id, text, _)| (text.to_owned(), id))
        .collect();
    let unknown = match unknown_id(vocabulary)? {
        Some(id) => {
            vocab.insert(vocabulary.texts[id as usize].clone(), id);
            vocabulary.texts[id as usize].clone()
        }
        // A name that no text can spell, with an id that `encode` takes for a failure.
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
            steps.push(Prepend::new(SPACE.to_owned()).into());
        }
        steps.push(Replace::new(" ", SPACE)?.into());
        let mut encoder = Tokenizer::new(model);
        encoder.with_normalizer(Some(Sequence::new(steps)));
        if words_are_separate(vocabulary) {
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
        bytes,
        adds_bos: true,
        default_bos: in_vocabulary(1),
        default_eos: in_vocabulary(2),
    })
}

/// Every way in which a token is two other tokens, best first.
///
/// SentencePiece knows scores, `tokenizers` knows merges in an order, so the higher score goes first. Where scores are equal
/// SentencePiece takes the leftmost pair. Trained vocabularies have equal scores for runs of one character (LLaMA-2 for all
/// its runs of spaces), which so grow from their left end; the longer token before the shorter, and of one token's splits
/// the one with the longer left part, do the same. No order of merges does it for any vocabulary one could think of.
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

/// Whether no token reaches over the end of a word into the space behind it.
///
/// Then no merge does so either, and what is merged in one word has no bearing on any other: each word by itself gives the
/// same tokens as the whole text at once, and words that come again are found in the model's cache. (The space itself must
/// be a token: a run of unknown characters becomes one unknown token, and no such run may go on over a word's end.)
fn words_are_separate(vocabulary: &Vocabulary) -> bool {
    let mut space_is_token = false;
    for (_, text, token_type) in vocabulary.iter() {
        if !token_type.comes_from_text() {
            continue;
        }
        if text.trim_start_matches(SPACE).contains(SPACE) {
            return false;
        }
        space_is_token |= text == SPACE;
    }
    space_is_token
}

/// The token for characters without any other: the one that the metadata names, else the first of type "unknown".
fn unknown_id(vocabulary: &Vocabulary) -> Result<Option<u32>, TokenizeError> {
    let first = || {
        let mut ids = vocabulary.iter();
        ids.find(|(_, _, token_type)| *token_type == TokenType::Unknown)
            .map(|(id, _, _)| id)
    };
    Ok(vocabulary.special_id(UNKNOWN)?.or_else(first))
}

/// Whether the vocabulary has a token for each byte. It must have all or none: with a part of them a text would come out in
/// pieces.
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
