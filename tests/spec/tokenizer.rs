//! The tokenizer, read as a specification: first against the vocabularies and ids of llama.cpp's own tests, then on tiny
//! vocabularies made here, where every rule can be seen at work, then on the default model.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use flapjack::gguf::{GgufFile, MetadataWarning, Value, ValueType, Writer};
use flapjack::hub;
use flapjack::tokenize::{TokenizeError, Tokenizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Result<T = (), E = Box<dyn Error>> = std::result::Result<T, E>;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

const NO_IDS: [u32; 0] = [];

// ---------------------------------------------------------------------------------------------------------------------
// The vocabularies of LLaMA-2 and LLaMA-3
// ---------------------------------------------------------------------------------------------------------------------

/// `../shared/fixtures/vocab/<name>`; `None`, after noting a skip, where there are no such files.
fn fixture(name: &str) -> Option<PathBuf> {
    crate::common::shared(&format!("fixtures/vocab/{name}"))
}

fn open(path: &Path) -> Result<Tokenizer> {
    Ok(Tokenizer::from_gguf(&GgufFile::open(path)?)?)
}

/// The tokenizer of a fixture with its test texts and the ids that are expected of them.
struct Fixture {
    tokenizer: Tokenizer,
    cases: Vec<(String, Vec<u32>)>,
}

impl Fixture {
    fn load(name: &str) -> Result<Option<Self>> {
        let Some(path) = fixture(name) else {
            return Ok(None);
        };
        let beside =
            |extension: &str| std::fs::read_to_string(format!("{}.{extension}", path.display()));
        let texts = beside("inp")?;
        let texts = texts
            .strip_suffix("\n__ggml_vocab_test__\n")
            .ok_or("the texts do not end with a separator")?;
        let ids = beside("out")?;
        let ids: Vec<Vec<u32>> = ids
            .lines()
            .map(|line| line.split_whitespace().map(str::parse).collect())
            .collect::<Result<_, _>>()?;
        let texts: Vec<String> = texts
            .split("\n__ggml_vocab_test__\n")
            .map(str::to_owned)
            .collect();
        assert_eq!(texts.len(), ids.len(), "a line of ids for each text");
        assert!(
            texts.iter().any(String::is_empty),
            "the empty text is among them"
        );
        Ok(Some(Self {
            tokenizer: open(&path)?,
            cases: texts.into_iter().zip(ids).collect(),
        }))
    }
}

const FIXTURES: [&str; 2] = ["ggml-vocab-llama-bpe.gguf", "ggml-vocab-llama-spm.gguf"];

/// Texts that are hard on a tokenizer, whatever its vocabulary.
const TEXTS: &[&str] = &[
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t \t",
    " a",
    "a ",
    "Hello, world!",
    "\u{a0}\u{3000}no-break and wide spaces\u{2009}\u{85}",
    "é and e\u{301}, ß, Å, ŉ",
    "🦙 👍🏽 👩\u{200d}👩\u{200d}👧 🇨🇭",
    "日本語 中文 한국어 ไทย हिन्दी עברית العربية",
    "3.14159 1,000,000 007 ½ Ⅷ ٣٤",
    "fn main() {\n    println!(\"{}\", 1 << 3);\n}\n",
    "\u{0}\u{1}\u{7f}\u{feff}\u{fffd}\u{10ffff}",
    "it's I'M we'll THEY'VE ''s",
    "</s><s><unk><0x0A><|eot_id|><|begin_of_text|>",
];

#[test]
fn ids_are_those_that_llama_cpp_expects() -> Result {
    for name in FIXTURES {
        let Some(Fixture { tokenizer, cases }) = Fixture::load(name)? else {
            return Ok(());
        };
        for (text, ids) in cases {
            assert_eq!(tokenizer.encode(&text)?, ids, "{name}: {text:?}");
        }
    }
    Ok(())
}

#[test]
fn decoding_undoes_encoding() -> Result {
    for name in FIXTURES {
        let Some(Fixture { tokenizer, cases }) = Fixture::load(name)? else {
            return Ok(());
        };
        let texts = cases.iter().map(|(text, _)| text.as_str());
        for text in texts.chain(TEXTS.iter().copied()) {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text)?), text, "{name}");
            // BOS is not part of the text.
            assert_eq!(
                tokenizer.decode(&tokenizer.encode_prompt(text)?),
                text,
                "{name}"
            );
        }
    }
    Ok(())
}

#[test]
fn streaming_gives_the_same_text_in_whole_characters() -> Result {
    for name in FIXTURES {
        let Some(Fixture { tokenizer, cases }) = Fixture::load(name)? else {
            return Ok(());
        };
        for (text, ids) in cases {
            let mut stream = tokenizer.stream().at_text_start();
            let mut streamed = String::new();
            for id in ids {
                let piece = stream.push(id);
                assert!(
                    !piece.contains('\u{fffd}'),
                    "{name}: {text:?} is cut at {piece:?}"
                );
                streamed += &piece;
            }
            assert_eq!(stream.finish(), "", "{name}: {text:?}");
            assert_eq!(streamed, text, "{name}");
        }
    }
    Ok(())
}

#[test]
fn control_tokens_are_not_read_from_text() -> Result {
    for name in FIXTURES {
        let Some(Fixture { tokenizer, .. }) = Fixture::load(name)? else {
            return Ok(());
        };
        let text = "<s>a</s><unk><|begin_of_text|>b<|eot_id|><|end_of_text|>";
        for id in tokenizer.encode(text)? {
            assert_ne!(Some(id), tokenizer.bos(), "{name}");
            assert!(!tokenizer.is_end_of_generation(id), "{name}: {id}");
            assert_ne!(
                tokenizer.token_bytes(id),
                b"",
                "{name}: {id} is a control token"
            );
        }
    }
    Ok(())
}

#[test]
fn llama_2_and_3_begin_and_end_as_their_metadata_says() -> Result {
    let Some(bpe) = Fixture::load(FIXTURES[0])? else {
        return Ok(());
    };
    let bpe = bpe.tokenizer;
    assert_eq!(bpe.vocab_size(), 128_256);
    assert_eq!((bpe.bos(), bpe.eos()), (Some(128_000), Some(128_001)));
    // The file has no key for it: it is llama-bpe's default.
    assert!(bpe.adds_bos());
    assert_eq!(bpe.encode_prompt("")?, [128_000]);
    let ends: Vec<u32> = (0..128_256)
        .filter(|id| bpe.is_end_of_generation(*id))
        .collect();
    // <|end_of_text|>, <|eom_id|> being a reserved token in this file, and <|eot_id|>.
    assert_eq!(ends, [128_001, 128_009]);

    let Some(spm) = Fixture::load(FIXTURES[1])? else {
        return Ok(());
    };
    let spm = spm.tokenizer;
    assert_eq!(spm.vocab_size(), 32_000);
    assert_eq!((spm.bos(), spm.eos()), (Some(1), Some(2)));
    assert!(spm.adds_bos());
    assert_eq!(spm.encode_prompt("Hello world")?, [1, 15043, 3186]);
    assert_eq!(
        (0..32_000)
            .filter(|id| spm.is_end_of_generation(*id))
            .collect::<Vec<_>>(),
        [2]
    );
    Ok(())
}

#[test]
fn token_bytes_are_the_exact_bytes() -> Result {
    let Some(Fixture { tokenizer: bpe, .. }) = Fixture::load(FIXTURES[0])? else {
        return Ok(());
    };
    assert_eq!(bpe.token_bytes(0), b"!");
    assert_eq!(bpe.token_bytes(128_000), b"", "a control token");
    assert_eq!(bpe.token_bytes(128_256), b"", "outside the vocabulary");
    assert_eq!(bpe.token_bytes(u32::MAX), b"", "outside the vocabulary");
    let emoji: Vec<u8> = bpe
        .encode("🦙")?
        .iter()
        .flat_map(|id| bpe.token_bytes(*id))
        .copied()
        .collect();
    assert_eq!(emoji, "🦙".as_bytes());

    let Some(Fixture { tokenizer: spm, .. }) = Fixture::load(FIXTURES[1])? else {
        return Ok(());
    };
    assert_eq!(spm.token_bytes(0), b"", "<unk>");
    assert_eq!(spm.token_bytes(1), b"", "<s>");
    assert_eq!(spm.token_bytes(3), [0], "<0x00>");
    assert_eq!(spm.token_bytes(258), [255], "<0xFF>");
    assert_eq!(spm.token_bytes(15043), b" Hello");
    Ok(())
}

/// SentencePiece's rule as it is stated: for as long as some two neighbours make a token, join those whose token has the
/// best score, the leftmost of equals. What is left and no token becomes bytes.
fn sentence_piece(text: &str, scores: &HashMap<String, (u32, f32)>) -> Vec<u32> {
    let text = format!(" {text}").replace(' ', "▁");
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let mut best: Option<(usize, f32)> = None;
        for at in 1..parts.len() {
            let joined = format!("{}{}", parts[at - 1], parts[at]);
            if let Some((_, score)) = scores.get(&joined)
                && best.is_none_or(|(_, b)| score.total_cmp(&b) == Ordering::Greater)
            {
                best = Some((at, *score));
            }
        }
        let Some((at, _)) = best else {
            break;
        };
        let right = parts.remove(at);
        parts[at - 1] += &right;
    }
    let mut ids = Vec::new();
    for part in parts {
        match scores.get(&part) {
            Some((id, _)) => ids.push(*id),
            None => ids.extend(part.bytes().map(|byte| u32::from(byte) + 3)),
        }
    }
    ids
}

/// The merges that stand in for the scores must give what the scores mean, runs of equal characters included: LLaMA-2
/// gives all runs of spaces one and the same score.
#[test]
fn merges_from_scores_do_what_scores_say() -> Result {
    let Some(path) = fixture(FIXTURES[1]) else {
        return Ok(());
    };
    let file = GgufFile::open(&path)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let texts: &[String] = file.require("tokenizer.ggml.tokens")?;
    let scores: Vec<f32> = file.require("tokenizer.ggml.scores")?;
    let scores: HashMap<String, (u32, f32)> = (0u32..)
        .zip(texts)
        .zip(scores)
        .skip(259)
        .map(|((id, text), score)| (text.clone(), (id, score)))
        .collect();

    let pieces = [
        "the", "ing", " of", "er", "Straße", "==", "--", "é", "日本", "🦙", "return", "self.", "(",
        "\n", "'s", "0", "ab", " x",
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..300 {
        let mut text = String::new();
        for _ in 0..rng.random_range(1..6) {
            if rng.random_bool(0.5) {
                text += pieces[rng.random_range(0..pieces.len())];
            } else {
                let run =
                    ["-", "=", "*", ".", "a", "o", "0", "\\", " ", " "][rng.random_range(0..10)];
                text += &run.repeat(rng.random_range(1..40));
            }
        }
        assert_eq!(
            tokenizer.encode(&text)?,
            sentence_piece(&text, &scores),
            "{text:?}"
        );
    }
    Ok(())
}

/// A megabyte of any text takes about a second. Were some step quadratic, this test would not end.
#[test]
fn long_texts_take_time_in_proportion() -> Result {
    for name in FIXTURES {
        let Some(Fixture { tokenizer, .. }) = Fixture::load(name)? else {
            return Ok(());
        };
        for (unit, times) in [
            ("a", 500_000),
            ("=", 500_000),
            (" ", 200_000),
            ("日本", 50_000),
            (" \n", 50_000),
        ] {
            let text = unit.repeat(times) + "x";
            assert_eq!(
                tokenizer.decode(&tokenizer.encode(&text)?),
                text,
                "{name}: {unit:?}"
            );
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiny vocabularies
// ---------------------------------------------------------------------------------------------------------------------

/// Metadata under construction. Keys are given without `tokenizer.ggml.`.
#[derive(Clone)]
pub struct Draft {
    entries: Vec<(String, Value)>,
}

pub fn strings(texts: &[&str]) -> Value {
    Value::StringArray(texts.iter().map(|text| text.to_string()).collect())
}

fn integers(numbers: &[i32]) -> Value {
    Value::Array(
        ValueType::I32,
        numbers.iter().copied().map(Value::I32).collect(),
    )
}

pub fn floats(numbers: &[f32]) -> Value {
    Value::Array(
        ValueType::F32,
        numbers.iter().copied().map(Value::F32).collect(),
    )
}

impl Draft {
    /// A draft of model `model` with these texts and types.
    pub fn new(model: &str, tokens: &[(&str, i32)]) -> Self {
        let texts: Vec<&str> = tokens.iter().map(|(text, _)| *text).collect();
        let types: Vec<i32> = tokens.iter().map(|(_, token_type)| *token_type).collect();
        Self {
            entries: Vec::new(),
        }
        .with("model", Value::String(model.to_owned()))
        .with("tokens", strings(&texts))
        .with("token_type", integers(&types))
    }

    pub fn with(mut self, key: &str, value: Value) -> Self {
        self = self.without(key);
        self.entries.push((format!("tokenizer.ggml.{key}"), value));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.entries
            .retain(|(k, _)| *k != format!("tokenizer.ggml.{key}"));
        self
    }

    pub fn build(&self) -> Result<Tokenizer, TokenizeError> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("vocabulary.gguf");
        let mut writer = Writer::new();
        for (key, value) in &self.entries {
            writer.metadata(key.clone(), value.clone());
        }
        writer.save(&path).expect("a file in a temporary folder");
        Tokenizer::from_gguf(
            &GgufFile::open(&path).expect("the writer writes what the reader reads"),
        )
    }
}

/// Byte-level BPE. Ids: 0 to 6 as listed, then single characters.
///
/// The text `he` is 4, `llo` 6 by way of `ll` (5).
fn byte_level() -> Draft {
    let tokens = [
        ("<|im_start|>", CONTROL),
        ("<|im_end|>", CONTROL),
        ("<tool>", USER_DEFINED),
        ("<tool>s", USER_DEFINED),
        ("he", NORMAL),
        ("ll", NORMAL),
        ("llo", NORMAL),
        ("h", NORMAL),
        ("e", NORMAL),
        ("l", NORMAL),
        ("o", NORMAL),
        ("Ġ", NORMAL),
        ("Ċ", NORMAL),
        ("s", NORMAL),
        ("<", NORMAL),
        ("ð", NORMAL),
        ("Ł", NORMAL),
        ("¦", NORMAL),
        ("Ļ", NORMAL),
        ("", NORMAL),
    ];
    Draft::new("gpt2", &tokens)
        .with("merges", strings(&["h e", "l l", "ll o"]))
        .with("pre", Value::String("gpt-2".into()))
        .with("bos_token_id", Value::U32(0))
        .with("eos_token_id", Value::U32(1))
}

/// SentencePiece BPE with all bytes: `<0x00>` is 3, `▁` is 259, and the others follow as listed below.
fn sentence_piece_draft() -> Draft {
    let bytes: Vec<String> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens = vec![("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)];
    tokens.extend(bytes.iter().map(|text| (text.as_str(), BYTE)));
    tokens.extend(["▁", "a", "b", "ab", "▁a", "▁▁"].map(|text| (text, NORMAL)));
    tokens.push(("<tool>", USER_DEFINED));
    let mut scores = vec![0.0; 259];
    scores.extend([-100.0, -101.0, -102.0, -1.0, -2.0, -3.0, 0.0]);
    Draft::new("llama", &tokens).with("scores", floats(&scores))
}

#[test]
fn merges_apply_in_their_order() -> Result {
    let tokenizer = byte_level().build()?;
    assert_eq!(tokenizer.vocab_size(), 20);
    assert_eq!(tokenizer.encode("hello")?, [4, 6]);
    assert_eq!(tokenizer.encode("lllo hehe\n")?, [5, 9, 10, 11, 4, 4, 12]);
    assert_eq!(tokenizer.decode(&[4, 6, 11, 12]), "hello \n");
    Ok(())
}

#[test]
fn of_two_equal_merges_the_first_counts() -> Result {
    // With its second occurrence `l l` would come after `l o`, and "llo" would be l + lo.
    let tokens = [
        ("l", NORMAL),
        ("o", NORMAL),
        ("ll", NORMAL),
        ("lo", NORMAL),
        ("llo", NORMAL),
    ];
    let tokenizer = Draft::new("gpt2", &tokens)
        .with("merges", strings(&["l l", "l o", "l l"]))
        .build()?;
    assert_eq!(tokenizer.encode("llo")?, [2, 1]);
    Ok(())
}

#[test]
fn whole_words_skip_the_merges_where_the_model_was_trained_so() -> Result {
    // No merge leads to `oh`.
    let tokens = [("o", NORMAL), ("h", NORMAL), ("oh", NORMAL)];
    let draft = Draft::new("gpt2", &tokens).with("merges", strings(&[]));
    for (pre, ids) in [
        ("llama-bpe", &[2][..]),
        ("smaug-bpe", &[0, 1]),
        ("gpt-2", &[0, 1]),
    ] {
        let tokenizer = draft
            .clone()
            .with("pre", Value::String(pre.into()))
            .build()?;
        assert_eq!(tokenizer.encode("oh")?, ids, "{pre}");
    }
    Ok(())
}

#[test]
fn a_byte_without_a_token_is_lost_and_separates_its_neighbours() -> Result {
    let tokenizer = byte_level().build()?;
    assert_eq!(tokenizer.encode("h\u{7}e")?, [7, 8]);
    assert_eq!(tokenizer.encode("lxl")?, [9, 9]);
    assert_eq!(tokenizer.encode("xyz")?, NO_IDS);
    Ok(())
}

#[test]
fn user_defined_tokens_are_read_from_text_and_control_tokens_are_not() -> Result {
    let tokenizer = byte_level().build()?;
    assert_eq!(tokenizer.encode("<tool>he<tool>")?, [2, 4, 2]);
    // The longest wins.
    assert_eq!(tokenizer.encode("<tool>s")?, [3]);
    assert_eq!(tokenizer.decode(&[3, 2]), "<tool>s<tool>");
    // Of the text of a control token only `<` and `s` are in the vocabulary.
    assert_eq!(tokenizer.encode("<|im_start|>s")?, [14, 13, 13]);
    assert_eq!(tokenizer.decode(&[0, 4, 1]), "he");
    Ok(())
}

/// A control token must not come from a merge, or from a word that happens to be its text.
#[test]
fn no_merge_leads_to_a_control_token() -> Result {
    let tokens = [("o", NORMAL), ("h", NORMAL), ("oh", CONTROL)];
    for pre in ["gpt-2", "llama-bpe"] {
        let tokenizer = Draft::new("gpt2", &tokens)
            .with("merges", strings(&["o h"]))
            .with("pre", Value::String(pre.into()))
            .build()?;
        assert_eq!(tokenizer.encode("oh")?, [0, 1], "{pre}");
    }
    Ok(())
}

#[test]
fn sentence_piece_joins_by_score() -> Result {
    let tokenizer = sentence_piece_draft().build()?;
    let (space, a, b, ab, space_a, spaces) = (259, 260, 261, 262, 263, 264);
    // "▁ab": `ab` has a better score than `▁a`.
    assert_eq!(tokenizer.encode("ab")?, [space, ab]);
    assert_eq!(tokenizer.encode("ba a")?, [space, b, a, space_a]);
    // The prefix and the text's own space are one run.
    assert_eq!(tokenizer.encode(" b")?, [spaces, b]);
    assert_eq!(tokenizer.encode("")?, NO_IDS);
    Ok(())
}

#[test]
fn sentence_piece_falls_back_to_bytes() -> Result {
    let tokenizer = sentence_piece_draft().build()?;
    let byte = |byte: u8| u32::from(byte) + 3;
    assert_eq!(tokenizer.encode("\n")?, [259, byte(b'\n')]);
    assert_eq!(tokenizer.encode("é")?, [259, byte(0xc3), byte(0xa9)]);
    assert_eq!(tokenizer.decode(&[259, byte(0xc3), byte(0xa9)]), "é");
    // The name of a byte token is text like any other.
    assert_eq!(tokenizer.decode(&tokenizer.encode("<0x0A>")?), "<0x0A>");
    assert!(!tokenizer.encode("<0x0A>")?.contains(&byte(b'\n')));
    Ok(())
}

#[test]
fn without_byte_tokens_there_is_the_unknown_token_or_an_error() -> Result {
    let tokens = [("<unk>", UNKNOWN), ("▁", NORMAL), ("a", NORMAL)];
    let draft = Draft::new("llama", &tokens).with("scores", floats(&[0.0, -1.0, -2.0]));
    let tokenizer = draft.build()?;
    assert_eq!(
        tokenizer.encode("aéüa")?,
        [1, 2, 0, 2],
        "one for a run of unknown characters"
    );
    assert_eq!(tokenizer.decode(&[1, 2, 0, 2]), "aa");

    let tokenizer = draft
        .with("token_type", integers(&[CONTROL, NORMAL, NORMAL]))
        .build()?;
    assert_eq!(tokenizer.encode("aa")?, [1, 2, 2]);
    assert!(matches!(
        tokenizer.encode("aé"),
        Err(TokenizeError::NoToken)
    ));
    Ok(())
}

/// Words may be encoded one by one only where no token reaches from one into the next.
#[test]
fn a_token_may_reach_over_a_space() -> Result {
    let tokens = [
        ("<unk>", UNKNOWN),
        ("▁", NORMAL),
        ("a", NORMAL),
        ("b", NORMAL),
        ("a▁", NORMAL),
        ("a▁b", NORMAL),
    ];
    let tokenizer = Draft::new("llama", &tokens)
        .with("scores", floats(&[0.0, -9.0, -9.0, -9.0, -1.0, -2.0]))
        .build()?;
    assert_eq!(tokenizer.encode("a b a")?, [1, 5, 1, 2]);
    Ok(())
}

#[test]
fn the_space_in_front_of_a_text_is_added_and_taken_away() -> Result {
    let tokenizer = sentence_piece_draft().build()?;
    for text in ["", " ", "  ", "a", " a", "  ab", "\n", "a b  "] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text)?), text);
    }
    // Only one space, only at the front, and BOS does not count as text.
    assert_eq!(tokenizer.decode(&[1, 263, 263]), "a a");
    assert_eq!(tokenizer.decode(&[264, 260]), " a");
    assert_eq!(tokenizer.decode(&[260, 263]), "a a");

    let plain = sentence_piece_draft()
        .with("add_space_prefix", Value::Bool(false))
        .build()?;
    assert_eq!(plain.encode("ab")?, [262]);
    assert_eq!(plain.encode(" a")?, [263]);
    assert_eq!(plain.decode(&[263]), " a");
    Ok(())
}

/// With a prefix, each stretch of text between user-defined tokens gets one, as in llama.cpp.
#[test]
fn text_behind_a_user_defined_token_has_a_space_too() -> Result {
    let tokenizer = sentence_piece_draft().build()?;
    assert_eq!(tokenizer.encode("<tool>a")?, [265, 263]);
    assert_eq!(tokenizer.encode("a<tool>")?, [263, 265]);
    assert_eq!(tokenizer.decode(&[265, 263]), "<tool> a");
    Ok(())
}

#[test]
fn a_stream_keeps_the_space_of_a_continuation() -> Result {
    let tokenizer = sentence_piece_draft().build()?;
    let mut continuation = tokenizer.stream();
    assert_eq!(continuation.push(263), " a");
    assert_eq!(continuation.push(263), " a");

    let mut start = tokenizer.stream().at_text_start();
    assert_eq!(start.push(1), "", "BOS");
    assert_eq!(start.push(263), "a");
    assert_eq!(start.push(263), " a");

    // Models without a prefix have nothing to take away.
    let tokenizer = byte_level().build()?;
    assert_eq!(tokenizer.stream().at_text_start().push(11), " ");
    Ok(())
}

#[test]
fn a_stream_waits_for_the_last_byte_of_a_character() -> Result {
    // A token for each byte, in either family.
    for (draft, space) in [(byte_level(), false), (sentence_piece_draft(), true)] {
        let tokenizer = draft.build()?;
        let ids = tokenizer.encode("🦙s")?;
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
        assert_eq!(pieces[usize::from(space)..], ["", "", "", "🦙", "s"]);
        assert_eq!(stream.finish(), "");
    }
    Ok(())
}

#[test]
fn bytes_that_are_not_text_become_replacement_characters() -> Result {
    let tokenizer = sentence_piece_draft().build()?;
    let ids =
        |bytes: &[u8]| -> Vec<u32> { bytes.iter().map(|byte| u32::from(*byte) + 3).collect() };
    for bytes in [
        &b"ab\xffcd"[..],
        b"\xf0\x9f\xa6",
        b"\xf0\x9f\xa6a",
        b"\xf0\x9f\xf0\x9f\xa6\x99",
        b"\xc0\x80\xed\xa0\x80",
        b"\xe2\x82",
    ] {
        let expected = String::from_utf8_lossy(bytes);
        assert_eq!(tokenizer.decode(&ids(bytes)), expected, "{bytes:x?}");
        let mut stream = tokenizer.stream();
        let mut streamed: String = ids(bytes).iter().map(|id| stream.push(*id)).collect();
        streamed += &stream.finish();
        assert_eq!(streamed, expected, "{bytes:x?}");
    }
    // What is incomplete at the end only shows when the stream ends.
    let mut stream = tokenizer.stream();
    assert_eq!(
        ids(b"\xf0\x9f\xa6")
            .iter()
            .map(|id| stream.push(*id))
            .collect::<String>(),
        ""
    );
    assert_eq!(stream.finish(), "\u{fffd}");
    Ok(())
}

#[test]
fn ids_outside_the_vocabulary_decode_to_nothing() -> Result {
    let tokenizer = byte_level().build()?;
    assert_eq!(tokenizer.decode(&[4, 20, u32::MAX, 4]), "hehe");
    // Nor does the hole in the vocabulary.
    assert_eq!(tokenizer.decode(&[19]), "");
    Ok(())
}

#[test]
fn bos_and_eos_follow_the_metadata() -> Result {
    let pre = |name: &str| Value::String(name.into());
    // (the draft, BOS, EOS, the ids of the empty prompt)
    let cases = [
        (
            "gpt-2 adds none by default",
            byte_level(),
            Some(0),
            Some(1),
            &[][..],
        ),
        (
            "an absent pre is the default",
            byte_level().without("pre"),
            Some(0),
            Some(1),
            &[],
        ),
        (
            "llama-bpe adds BOS by default",
            byte_level().with("pre", pre("llama-bpe")),
            Some(0),
            Some(1),
            &[0],
        ),
        (
            "metadata over default",
            byte_level()
                .with("pre", pre("llama-bpe"))
                .with("add_bos_token", Value::Bool(false)),
            Some(0),
            Some(1),
            &[],
        ),
        (
            "both when asked for",
            byte_level()
                .with("add_bos_token", Value::Bool(true))
                .with("add_eos_token", Value::Bool(true)),
            Some(0),
            Some(1),
            &[0, 1],
        ),
        (
            "no BOS, nothing to add by default",
            byte_level()
                .with("pre", pre("llama-bpe"))
                .without("bos_token_id"),
            None,
            Some(1),
            &[],
        ),
        (
            "SentencePiece: 1 and 2, BOS added",
            sentence_piece_draft(),
            Some(1),
            Some(2),
            &[1],
        ),
        (
            "SentencePiece, told otherwise",
            sentence_piece_draft()
                .with("bos_token_id", Value::U32(2))
                .with("eos_token_id", Value::U32(1))
                .with("add_bos_token", Value::Bool(false))
                .with("add_eos_token", Value::Bool(true)),
            Some(2),
            Some(1),
            &[1],
        ),
    ];
    for (what, draft, bos, eos, prompt) in cases {
        let tokenizer = draft.build().map_err(|error| format!("{what}: {error}"))?;
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (bos, eos), "{what}");
        assert_eq!(tokenizer.encode_prompt("")?, prompt, "{what}");
        assert_eq!(tokenizer.encode("")?, NO_IDS, "{what}");
        assert_eq!(
            tokenizer.adds_bos(),
            prompt.first() == bos.as_ref() && bos.is_some(),
            "{what}"
        );
    }
    Ok(())
}

#[test]
fn generation_ends_at_eos_eot_eom_and_well_known_texts() -> Result {
    let tokens = [
        ("a", NORMAL),
        ("b", CONTROL),
        ("c", CONTROL),
        ("d", CONTROL),
        ("<|im_end|>", CONTROL),
        ("<|endoftext|>", CONTROL),
        ("<|eot_id|>", CONTROL),
        ("<|end|>", CONTROL),
        ("</s>", CONTROL),
        ("<|end_of_text|>", CONTROL),
        ("<|im_start|>", CONTROL),
    ];
    let draft = Draft::new("gpt2", &tokens).with("merges", strings(&[]));
    let ends = |draft: &Draft| -> Result<Vec<u32>> {
        let tokenizer = draft.build()?;
        Ok((0..20)
            .filter(|id| tokenizer.is_end_of_generation(*id))
            .collect())
    };
    assert_eq!(ends(&draft)?, [4, 5, 6, 7, 8, 9]);
    let draft = draft
        .with("eos_token_id", Value::U32(1))
        .with("eot_token_id", Value::U32(2))
        .with("eom_token_id", Value::U32(3));
    assert_eq!(ends(&draft)?, [1, 2, 3, 4, 5, 6, 7, 8, 9]);

    // Also where a converter has forgotten that they are control tokens; and then they are still not read from text.
    let tokens = [("<|im_end|>", USER_DEFINED), ("<", NORMAL)];
    let tokenizer = Draft::new("gpt2", &tokens)
        .with("merges", strings(&[]))
        .build()?;
    assert!(tokenizer.is_end_of_generation(0));
    assert_eq!(tokenizer.encode("<|im_end|>")?, [1]);
    assert_eq!(tokenizer.decode(&[0]), "");
    Ok(())
}

#[test]
fn unsupported_tokenizers_are_named() -> Result {
    let error = byte_level()
        .with("model", Value::String("bert".into()))
        .build()
        .unwrap_err();
    assert!(
        matches!(&error, TokenizeError::Model { model, .. } if model == "bert"),
        "{error}"
    );
    let message = error.to_string();
    assert!(
        message.contains("\"gpt2\"") && message.contains("\"llama\""),
        "{message}"
    );

    let error = byte_level()
        .with("pre", Value::String("klingon".into()))
        .build()
        .unwrap_err();
    assert!(
        matches!(&error, TokenizeError::PreTokenizer { name, .. } if name == "klingon"),
        "{error}"
    );
    let message = error.to_string();
    assert!(
        message.contains("llama-bpe") && message.contains("smollm"),
        "{message}"
    );
    Ok(())
}

#[test]
fn known_pre_tokenizers() -> Result {
    for pre in [
        "",
        "default",
        "gpt-2",
        "llama-bpe",
        "llama3",
        "llama-v3",
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "qwen2",
        "falcon",
        "tekken",
        "gpt-4o",
    ] {
        let tokenizer = byte_level()
            .with("pre", Value::String(pre.into()))
            .build()?;
        assert_eq!(
            tokenizer.decode(&tokenizer.encode("hello hello\n")?),
            "hello hello\n",
            "{pre}"
        );
    }
    Ok(())
}

#[test]
fn bad_metadata_is_an_error_that_names_the_key() {
    let bytes_but_one: Vec<String> = (1..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    let bytes_but_one: Vec<(&str, i32)> = bytes_but_one
        .iter()
        .map(|text| (text.as_str(), BYTE))
        .collect();
    let cases = [
        // What is not there
        (byte_level().without("model"), "model: is missing"),
        (byte_level().without("tokens"), "tokens: is missing"),
        (byte_level().without("merges"), "merges: is missing"),
        (
            sentence_piece_draft().without("scores"),
            "scores: is missing",
        ),
        // What is of another type
        (
            byte_level().with("model", Value::U32(1)),
            "model: expected a string",
        ),
        (
            byte_level().with("tokens", integers(&[1])),
            "tokens: expected an array of strings",
        ),
        (
            byte_level().with("merges", Value::U32(1)),
            "merges: expected an array of strings",
        ),
        (
            sentence_piece_draft().with("scores", integers(&[0])),
            "scores: expected an array of 32-bit floats",
        ),
        // Lengths
        (
            byte_level().with("tokens", strings(&[])),
            "tokens: is empty",
        ),
        (
            sentence_piece_draft().with("scores", floats(&[0.0])),
            "scores: has 1 item where tokenizer.ggml.tokens has 266",
        ),
        // Numbers
        (
            Draft::new("llama", &[("a", NORMAL)]).with("scores", floats(&[f32::NAN])),
            "scores: the score of token 0 is not a number",
        ),
        // Texts
        (
            Draft::new("gpt2", &[("a", NORMAL), ("a", NORMAL)]).with("merges", strings(&[])),
            "tokens: tokens 0 and 1 have the same text \"a\"",
        ),
        (
            Draft::new("llama", &bytes_but_one).with("scores", floats(&[0.0; 255])),
            "tokens: has 255 of the 256 byte tokens",
        ),
        // Merges
        (
            byte_level().with("merges", strings(&["he"])),
            "merges: merge 0 (\"he\") is not two tokens",
        ),
        (
            byte_level().with("merges", strings(&["h e", "h e l"])),
            "merges: merge 1 (\"h e l\") is not two tokens",
        ),
        (
            byte_level().with("merges", strings(&[" e"])),
            "merges: merge 0 (\" e\") is not two tokens",
        ),
        (
            byte_level().with("merges", strings(&["e "])),
            "merges: merge 0 (\"e \") is not two tokens",
        ),
        (
            byte_level().with("merges", strings(&[""])),
            "merges: merge 0 (\"\") is not two tokens",
        ),
        (
            byte_level().with("merges", strings(&["q e"])),
            "merges: merge 0 (\"q e\") needs \"q\"",
        ),
        (
            byte_level().with("merges", strings(&["e h"])),
            "merges: merge 0 (\"e h\") needs \"eh\"",
        ),
    ];
    for (draft, expected) in cases {
        match draft.build() {
            Ok(_) => panic!("no error where this was expected: {expected}"),
            Err(error) => {
                let message = error.to_string();
                assert!(
                    message.contains(&format!("tokenizer.ggml.{expected}")),
                    "{message}\ndoes not say: {expected}"
                );
            }
        }
    }
}

/// Text can be encoded without them, so that a value of no use must not keep the model from running.
#[test]
fn what_can_be_done_without_is_passed_over_with_a_warning() -> Result {
    let space = sentence_piece_draft();
    let cases = [
        // Ids that are none, and flags that are none; then what is done without them.
        (
            byte_level().with("bos_token_id", Value::U32(20)),
            "bos_token_id: 20 is not the id of a token",
        ),
        (
            byte_level().with("bos_token_id", Value::I32(-1)),
            "bos_token_id: expected",
        ),
        (
            byte_level().with("eos_token_id", Value::U32(u32::MAX)),
            "eos_token_id: 4294967295 is not",
        ),
        (
            byte_level().with("eot_token_id", Value::U32(99)),
            "eot_token_id: 99",
        ),
        (
            byte_level().with("eom_token_id", Value::String("x".into())),
            "eom_token_id: expected",
        ),
        (
            space.clone().with("unknown_token_id", Value::U32(999)),
            "unknown_token_id: 999",
        ),
        (
            byte_level().with("add_bos_token", Value::U32(1)),
            "add_bos_token: expected a boolean, found 1",
        ),
        (
            byte_level().with("add_eos_token", Value::U32(1)),
            "add_eos_token: expected a boolean, found 1",
        ),
        (
            space.with("add_space_prefix", Value::U8(1)),
            "add_space_prefix: expected a boolean",
        ),
        (
            byte_level()
                .without("bos_token_id")
                .with("add_bos_token", Value::Bool(true)),
            "add_bos_token: is true, but there is no such token",
        ),
        (
            byte_level()
                .with("eos_token_id", Value::U32(99))
                .with("add_eos_token", Value::Bool(true)),
            "add_eos_token: is true, but there is no such token",
        ),
        (
            byte_level().with("pre", Value::U32(1)),
            "pre: expected a string, found 1",
        ),
        // Types
        (
            byte_level().with("token_type", integers(&[1, 1])),
            "token_type: has 2 items where tokenizer.ggml.tokens has 20",
        ),
        (
            byte_level().with("token_type", Value::U32(1)),
            "token_type: expected an array",
        ),
        (
            Draft::new("gpt2", &[("a", 7), ("b", NORMAL), ("c", 9)]).with("merges", strings(&[])),
            "token_type: token 0 has type 7 (0 to 6 are known), and so on for 2 tokens",
        ),
        (
            Draft::new("llama", &[("<0x+1>", BYTE), ("a", NORMAL)])
                .with("scores", floats(&[0.0, 0.0]))
                .with("add_space_prefix", Value::Bool(false)),
            "token_type: token 0 is a byte token but its text is \"<0x+1>\"",
        ),
    ];
    for (draft, expected) in cases {
        let tokenizer = draft
            .build()
            .map_err(|error| format!("{expected}: {error}"))?;
        let told = tokenizer.warnings().iter().any(|warning| match warning {
            MetadataWarning::Ignored { key, problem } => {
                format!("{key}: {problem}").contains(&format!("tokenizer.ggml.{expected}"))
            }
            _ => false,
        });
        assert!(told, "{expected}: {:?}", tokenizer.warnings());
        assert!(tokenizer.encode_prompt("a").is_ok(), "{expected}");
    }
    Ok(())
}

#[test]
fn a_value_that_is_passed_over_is_as_good_as_absent() -> Result {
    // SentencePiece has defaults for BOS and EOS, byte-level BPE has none.
    let tokenizer = sentence_piece_draft()
        .with("bos_token_id", Value::U32(999))
        .with("eos_token_id", Value::U32(999))
        .build()?;
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    let tokenizer = byte_level().with("eos_token_id", Value::U32(20)).build()?;
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(0), None));
    assert!(
        tokenizer.is_end_of_generation(1),
        "<|im_end|> is known by its text"
    );
    Ok(())
}

#[test]
fn what_is_assumed_in_the_place_of_what_is_missing_is_told() -> Result {
    let missing = |tokenizer: &Tokenizer| -> Vec<(String, String)> {
        let warnings = tokenizer.warnings().iter();
        let missing = warnings.filter_map(|warning| match warning {
            MetadataWarning::Missing { key, assumed } => {
                Some((key.replace("tokenizer.ggml.", ""), assumed.clone()))
            }
            _ => None,
        });
        missing.collect()
    };
    let pre = [("pre".to_owned(), "default".to_owned())];
    let named = |name: &str| byte_level().with("pre", Value::String(name.into()));
    assert_eq!(missing(&byte_level().without("pre").build()?), pre);
    assert_eq!(missing(&named("").build()?), pre);
    for whole in [named("default"), byte_level(), sentence_piece_draft()] {
        assert_eq!(whole.build()?.warnings(), []);
    }

    // Without types, bytes are known by their names, and nothing is a control token that is not known by its text.
    let tokenizer = sentence_piece_draft().without("token_type").build()?;
    assert_eq!(
        missing(&tokenizer),
        [("token_type".to_owned(), "normal".to_owned())]
    );
    let ids = tokenizer.encode("é")?;
    assert_eq!(ids, [259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids), "é");
    assert_eq!(tokenizer.decode(&[0, 260]), "<unk>a");
    Ok(())
}

/// The pattern engine would give up on it without an error, and the ids would be wrong.
#[test]
fn endless_whitespace_is_refused() -> Result {
    let tokenizer = byte_level().build()?;
    assert_eq!(tokenizer.encode(&" ".repeat(250_000))?.len(), 250_000);
    assert!(matches!(
        tokenizer.encode(&" ".repeat(250_001)),
        Err(TokenizeError::BlankRun { len: 250_001 })
    ));
    // SentencePiece has no patterns to give up.
    let tokenizer = sentence_piece_draft().build()?;
    assert_eq!(tokenizer.encode(&" ".repeat(400_001))?.len(), 200_001);
    Ok(())
}

#[test]
fn threads_can_share_a_tokenizer() -> Result {
    fn shareable<T: Send + Sync>() {}
    shareable::<Tokenizer>();

    let tokenizer = byte_level().build()?;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    assert_eq!(
                        tokenizer.encode("hello hello").ok(),
                        Some(vec![4, 6, 11, 4, 6])
                    );
                }
            });
        }
    });
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------------
// The default model
// ---------------------------------------------------------------------------------------------------------------------

fn default_model() -> PathBuf {
    hub::default_model().expect("the default model is in the cache or can be fetched")
}

/// SmolLM2's ids as llama.cpp's `llama-tokenize --ids --no-bos --no-parse-special --no-escape` gives them.
const SMOLLM2: &[(&str, &[u32])] = &[
    (
        "In 1984, pi was 3.14159 and 1,000,000 lines long.",
        &[
            788, 216, 33, 41, 40, 36, 28, 16916, 436, 216, 35, 30, 33, 36, 33, 37, 41, 284, 216,
            33, 28, 32, 32, 32, 28, 32, 32, 32, 3204, 986, 30,
        ],
    ),
    (
        "I'm sure they'd say we've won; it's what y'all'll don't. I'M SURE IT'S",
        &[
            57, 5248, 2090, 502, 6737, 1643, 392, 3543, 3763, 43, 357, 506, 732, 329, 23, 449,
            3060, 1326, 982, 30, 339, 23, 61, 334, 15672, 9627, 23, 67,
        ],
    ),
    (
        "one\ntwo\n\nthree\n\n\n  four\n \n\tfive\r\nsix",
        &[
            537, 198, 11355, 198, 198, 16347, 1116, 3805, 1876, 198, 3717, 197, 14013, 201, 198,
            19619,
        ],
    ),
    (
        "\tif x:\n\t\treturn  y\n        pass   \n",
        &[
            197, 342, 1792, 42, 3354, 197, 5406, 216, 329, 448, 1301, 333, 198,
        ],
    ),
    (
        "Café naïve Ångström façade Žižek — “señor”…",
        &[
            51, 1939, 2756, 15486, 46494, 5549, 223, 863, 1321, 45682, 40852, 18811, 138, 89,
            43421, 1846, 1841, 619, 313, 10214, 270, 573, 2829,
        ],
    ),
    (
        "Thumbs 👍🏽, family 👩\u{200d}👩\u{200d}👧\u{200d}👦, flag 🇨🇭, llama 🦙!",
        &[
            1082, 26934, 15107, 235, 231, 10813, 233, 138, 28, 1564, 15107, 235, 119, 321, 231,
            10813, 235, 119, 321, 231, 10813, 235, 117, 321, 231, 10813, 235, 116, 28, 7048, 15107,
            225, 118, 10813, 225, 251, 28, 303, 4130, 81, 15107, 116, 243, 17,
        ],
    ),
    (
        "fn main() {\n    let v: Vec<u8> = (0..=255).map(|x| x as u8).collect();\n    println!(\"{:?}\", &v[1..]); // 100%\n}\n",
        &[
            7853, 1085, 1000, 1662, 472, 1303, 386, 42, 717, 1159, 44, 101, 40, 46, 446, 365, 32,
            950, 45, 34, 37, 37, 595, 5123, 24, 108, 104, 108, 1792, 347, 326, 40, 595, 19190,
            35040, 472, 1628, 34115, 17, 45257, 42, 47, 29394, 1456, 102, 75, 33, 950, 2255, 43,
            13241, 216, 33, 32, 32, 21, 198, 109, 198,
        ],
    ),
    (
        "日本語と中文와 한국어, ภาษาไทย हिन्दी עברית العربية",
        &[
            23274, 115, 40993, 179, 120, 248, 7365, 118, 28589, 29184, 183, 243, 218, 216, 33085,
            246, 181, 130, 251, 183, 240, 129, 28, 216, 10283, 250, 43662, 10283, 119, 43662,
            31933, 222, 10283, 241, 10283, 112, 12335, 134, 27011, 30658, 16525, 44757, 37189,
            12960, 112, 37657, 30825, 28532, 120, 27819, 34966, 20602, 31462, 23339, 43463,
        ],
    ),
    (
        "x=1;y==2&&z!=3 #tag @user $5.00 a_b-c/d\\e `f` ~g^h",
        &[
            104, 45, 33, 43, 105, 1189, 34, 22, 22, 106, 42732, 35, 907, 9204, 3394, 4093, 1885,
            37, 30, 32, 32, 253, 79, 82, 29, 83, 31, 84, 76, 85, 2179, 86, 80, 11417, 87, 78, 88,
        ],
    ),
    (
        "½ ² Ⅷ ٣٤ 1st 2nd 10% 007",
        &[
            16738, 216, 19133, 216, 173, 223, 117, 216, 164, 113, 164, 114, 216, 33, 302, 216, 34,
            268, 216, 33, 32, 21, 216, 32, 32, 39,
        ],
    ),
    (
        "<|im_start|>user\nHello<|im_end|>",
        &[
            44, 108, 306, 79, 3738, 108, 46, 4093, 198, 19556, 44, 108, 306, 79, 486, 108, 46,
        ],
    ),
    ("   leading and trailing   ", &[256, 2899, 284, 35079, 333]),
    ("\n", &[198]),
    (" ", &[216]),
    ("  ", &[256]),
    ("\t", &[197]),
    ("\u{a0}\u{3000}x", &[15442, 12109, 218, 104]),
];

#[test]
fn smollm2_has_the_ids_of_llama_cpp() -> Result {
    let tokenizer = open(&default_model())?;
    for (text, ids) in SMOLLM2 {
        assert_eq!(tokenizer.encode(text)?, *ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids), *text);
    }
    Ok(())
}

#[test]
fn smollm2_streams_emoji_whole() -> Result {
    let tokenizer = open(&default_model())?;
    let ids = tokenizer.encode("a🦙b👍🏽")?;
    assert!(ids.len() > 8, "each emoji is several tokens: {ids:?}");
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids
        .iter()
        .map(|id| stream.push(*id))
        .filter(|piece| !piece.is_empty())
        .collect();
    assert_eq!(pieces.concat(), "a🦙b👍🏽");
    assert_eq!(pieces, ["a", "🦙", "b", "👍", "🏽"]);
    Ok(())
}

#[test]
fn smollm2_begins_and_ends_as_its_metadata_says() -> Result {
    let tokenizer = open(&default_model())?;
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    assert!(!tokenizer.adds_bos());
    assert_eq!(
        tokenizer.encode_prompt("Hello")?,
        tokenizer.encode("Hello")?
    );
    let ends: Vec<u32> = (0..49_152)
        .filter(|id| tokenizer.is_end_of_generation(*id))
        .collect();
    assert_eq!(ends, [0, 2], "<|endoftext|> and <|im_end|>");
    Ok(())
}
