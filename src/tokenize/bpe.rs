//! Byte-level BPE (`tokenizer.ggml.model` = "gpt2"). Text is split into words, each byte of a word becomes a character of the
//! GPT-2 alphabet, and the merges of the file join characters to tokens.

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::vocab::{TokenBytes, TokenType, Vocabulary};
use super::{Family, Kind, PRE, TokenizeError, pretokenize};
use crate::gguf::MetadataWarning;

const MERGES: &str = "tokenizer.ggml.merges";
/// The pre-tokenizer of files that name none.
const DEFAULT_PRE: &str = "default";

/// Builds the encoder and the table of bytes.
///
/// # Errors
/// [`TokenizeError`] if the pre-tokenizer is not supported, or a merge is not two tokens of the vocabulary.
pub(super) fn build(
    vocabulary: &Vocabulary,
    warnings: &mut Vec<MetadataWarning>,
) -> Result<Family, TokenizeError> {
    let file = vocabulary.file;
    let name = file
        .optional(PRE, warnings)
        .filter(|name: &&str| !name.is_empty());
    let name = name.unwrap_or_else(|| {
        warnings.push(MetadataWarning::missing(PRE, DEFAULT_PRE));
        DEFAULT_PRE
    });
    let rule = pretokenize::rule(name).ok_or_else(|| TokenizeError::PreTokenizer {
        path: file.path().to_owned(),
        name: name.to_owned(),
    })?;

    let alphabet = Alphabet::new();
    let model = BPE::builder()
        .vocab_and_merges(model_vocab(vocabulary, &alphabet), merges(vocabulary)?)
        .ignore_merges(rule.whole_words)
        .build();
    let built = model.and_then(|model| {
        let mut steps = splits(rule)?;
        steps.push(ByteLevel::new(false, false, false).into());
        let mut encoder = Tokenizer::new(model);
        encoder.with_pre_tokenizer(Some(Sequence::new(steps)));
        Ok(encoder)
    });
    let encoder = built.map_err(|source| TokenizeError::Build {
        path: file.path().to_owned(),
        source,
    })?;

    Ok(Family {
        kind: Kind::ByteLevel,
        encoder,
        separate_words: true,
        bytes: TokenBytes::new(vocabulary, |text, token_type, out| {
            match alphabet.bytes(text) {
                // User-defined tokens are plain text and not written in the alphabet.
                Some(bytes) if token_type != TokenType::UserDefined => out.extend(bytes),
                _ => out.extend_from_slice(text.as_bytes()),
            }
        }),
        adds_bos: rule.adds_bos,
        default_bos: None,
        default_eos: None,
    })
}

/// The steps that split text into words, one for each pattern of a rule.
fn splits(rule: &pretokenize::Rule) -> tokenizers::Result<Vec<PreTokenizerWrapper>> {
    rule.patterns
        .iter()
        .map(|pattern| {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(Into::into)
        })
        .collect()
}

/// The tokens that words can be made of, and their ids.
///
/// A vocabulary may lack some of the 256 bytes. A byte without a token gets an id behind the last token, which `encode` leaves
/// out of its result. So the byte is lost, as in llama.cpp, but its neighbours are not merged across the gap.
fn model_vocab(vocabulary: &Vocabulary, alphabet: &Alphabet) -> Vocab {
    let mut vocab: Vocab = vocabulary
        .iter()
        .filter(|(_, text, token_type)| token_type.comes_from_text() && !text.is_empty())
        .map(|(id, text, _)| (text.to_owned(), id))
        .collect();
    let mut spare = vocabulary.len() as u32;
    for character in alphabet.characters {
        vocab.entry(character.to_string()).or_insert_with(|| {
            spare += 1;
            spare - 1
        });
    }
    vocab
}

/// The merges of the file, best first. Each is checked to join two tokens of the vocabulary to a third.
fn merges(vocabulary: &Vocabulary) -> Result<Merges, TokenizeError> {
    let file = vocabulary.file;
    let lines: &[String] = file.require(MERGES)?;
    let mut seen = HashSet::with_capacity(lines.len());
    let mut merges = Merges::with_capacity(lines.len());
    for (rank, line) in lines.iter().enumerate() {
        let fail = |problem: String| -> TokenizeError {
            let problem = format!("merge {rank} ({line:?}) {problem}");
            file.metadata_error(MERGES, problem).into()
        };
        let parts = line
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '));
        let Some((left, right)) = parts else {
            return Err(fail("is not two tokens with one space between them".into()));
        };
        let joined = format!("{left}{right}");
        let mut from_text = true;
        for text in [left, right, &joined] {
            let Some(id) = vocabulary.id(text) else {
                return Err(fail(format!(
                    "needs {text:?}, which is not in the vocabulary"
                )));
            };
            from_text &= vocabulary.types[id as usize].comes_from_text();
        }
        // Of two equal merges the first counts. A merge that would make a control token out of text is left out.
        if from_text && seen.insert((left, right)) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}

/// The GPT-2 alphabet: a printable character for every byte.
///
/// A byte that is printable in Latin-1 is the same character; the other bytes are U+0100, U+0101 and so on in their order.
/// Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), the encoder of the released code.
struct Alphabet {
    characters: [char; 256],
}

impl Alphabet {
    fn new() -> Self {
        let mut spare = '\u{100}'..;
        let characters = std::array::from_fn(|byte| match byte as u8 {
            byte @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(byte),
            // The range has more than a million characters.
            _ => spare.next().unwrap_or(char::REPLACEMENT_CHARACTER),
        });
        Self { characters }
    }

    /// The bytes that `text` stands for; `None` if it has a character that is not in the alphabet.
    fn bytes(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|character| self.byte(character)).collect()
    }

    /// The byte that a character stands for; `None` if it is not in the alphabet.
    fn byte(&self, character: char) -> Option<u8> {
        if let Ok(byte) = u8::try_from(character)
            && self.characters[usize::from(byte)] == character
        {
            return Some(byte);
        }
        let at = self.characters.iter().position(|c| *c == character)?;
        u8::try_from(at).ok()
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    fn words(name: &str, text: &str) -> Vec<String> {
        let rule = pretokenize::rule(name).expect("a known name");
        let mut pieces = PreTokenizedString::from(text);
        Sequence::new(splits(rule).expect("valid patterns"))
            .pre_tokenize(&mut pieces)
            .expect("patterns that match");
        pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(word, _, _)| word.to_owned())
            .collect()
    }

    #[test]
    fn names_split_words_in_their_own_ways() {
        let text = "It's 12345  IT'S,\n\n x";
        for (name, expected) in [
            ("gpt-2", "It|'s| 12345| | IT|'|S|,|\n\n| x"),
            ("smollm", "It|'s| |1|2|3|4|5| | IT|'|S|,|\n\n| x"),
            ("default", "It|'|s| |123|45| | IT|'|S|,|\n\n| x"),
            ("falcon", "It|'|s| |123|45| | IT|'|S|,|\n\n| x"),
            ("llama-bpe", "It|'s| |123|45| | IT|'S|,\n\n| x"),
            ("qwen2", "It|'s| |1|2|3|4|5| | IT|'S|,\n\n| x"),
            ("tekken", "It|'s| |1|2|3|4|5| | IT|'S|,\n\n| x"),
            ("gpt-4o", "It's| |123|45| | IT'S|,\n\n| x"),
        ] {
            assert_eq!(words(name, text).join("|"), expected, "{name}");
        }
        assert_eq!(words("falcon", " `a`").join("|"), " |`|a|`");
        assert_eq!(words("default", " `a`").join("|"), " `|a|`");
        assert_eq!(
            words("tekken", "camelCaseHTTPServer").join("|"),
            "camel|Case|HTTPServer"
        );
        assert_eq!(
            words("gpt-4o", "camelCase don't, O'Neill'll 12345 ///\n x").join("|"),
            "camel|Case| don't|,| O|'Neill'll| |123|45| ///\n| x"
        );
        // The last space of a run belongs to the word behind it. At the end of the text it stays in the run.
        assert_eq!(words("gpt-2", "a   b   "), ["a", "  ", " b", "   "]);
    }

    #[test]
    fn the_alphabet_has_a_character_of_its_own_for_each_byte() {
        let alphabet = Alphabet::new();
        let distinct: HashSet<char> = alphabet.characters.into_iter().collect();
        assert_eq!(distinct.len(), 256);
        for byte in 0..=255u8 {
            assert_eq!(
                alphabet.byte(alphabet.characters[usize::from(byte)]),
                Some(byte)
            );
        }
        assert_eq!(alphabet.bytes("Ġthe"), Some(b" the".to_vec()));
        assert_eq!(alphabet.bytes("ĊĊ"), Some(b"\n\n".to_vec()));
        assert_eq!(alphabet.bytes("Ã©"), Some("é".as_bytes().to_vec()));
        assert_eq!(alphabet.bytes("a b"), None);
    }
}
