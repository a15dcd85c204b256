//! Long texts: made tokens of in pieces, with the tokens of the whole, in memory that does not grow with what is not used.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::Random;
use crate::common::engine::{Workshop, source};
use crate::common::program::{run_with_input, stderr, stdout, succeeded};
use crate::tokenizer::{Draft, floats, strings};
use flapjack::engine::{MethodOptions, TextSource, ignore};
use flapjack::eval::PerplexityOptions;
use flapjack::gguf::{GgufFile, Value};
use flapjack::model::CacheType;
use flapjack::prune::{Effort, Method};
use flapjack::tokenize::{PIECE, Tokenizer};

/// The ids of a text that comes in parts of some bytes, encoded in pieces of at least `size`.
fn in_pieces(tokenizer: &Tokenizer, text: &str, size: usize, random: &mut Random) -> Vec<u32> {
    let (mut pieces, mut ids, mut rest) = (tokenizer.in_pieces(size), Vec::new(), text);
    while !rest.is_empty() {
        let mut end = 1 + random.below(2 * size).min(rest.len() - 1);
        while !rest.is_char_boundary(end) {
            end += 1;
        }
        pieces.push(&rest[..end], &mut ids).unwrap();
        // Running text can be cut anywhere, near enough.
        assert!(
            size < 4096 || pieces.held() <= 4 * size,
            "{}",
            pieces.held()
        );
        rest = &rest[end..];
    }
    pieces.finish(&mut ids).unwrap();
    ids
}

/// Texts of the characters that rules of splitting treat in ways of their own.
fn hard_text(random: &mut Random) -> String {
    const PARTS: [&str; 24] = [
        " ", " ", " ", "  ", "\n", "\n", "\n\n", "\r\n", "\t", "a", "b", "ab", "B", ".", "/", "'s",
        "'", "5", "12345", "\u{a0}", "字", "。", "e\u{301}", "\u{2581}",
    ];
    let parts = 1 + random.below(120);
    (0..parts)
        .map(|_| PARTS[random.below(PARTS.len())])
        .collect()
}

fn assert_same_in_pieces(name: &str, tokenizer: &Tokenizer) {
    let mut random = Random::new(7);
    for _ in 0..400 {
        let text = hard_text(&mut random);
        let whole = tokenizer.encode(&text).unwrap();
        for size in [1, 7, 30] {
            let ids = in_pieces(tokenizer, &text, size, &mut random);
            assert_eq!(ids, whole, "{name}, pieces of {size}: {text:?}");
        }
    }
}

const NORMAL: i32 = 1;
const USER_DEFINED: i32 = 4;

/// Byte-level BPE in which any two characters of hard texts can be joined, so that words that end elsewhere have other tokens.
fn byte_level(pre: &str, literals: &[&str]) -> Tokenizer {
    let mut other = '\u{100}'..;
    let alphabet: Vec<String> = (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
            _ => other.next().unwrap().to_string(),
        })
        .collect();
    let joined = [
        "Ġ", "Ċ", "č", "ĉ", "a", "b", "B", ".", "/", "'", "s", "5", "1", "å", "Â", "ł",
    ];
    let pairs = joined
        .iter()
        .flat_map(|a| joined.iter().map(move |b| (a, b)));
    let (merges, tokens): (Vec<_>, Vec<_>) = pairs
        .map(|(a, b)| (format!("{a} {b}"), format!("{a}{b}")))
        .unzip();
    let tokens = alphabet.iter().chain(&tokens).map(|t| (t.as_str(), NORMAL));
    let tokens: Vec<_> = tokens
        .chain(literals.iter().map(|text| (*text, USER_DEFINED)))
        .collect();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    Draft::new("gpt2", &tokens)
        .with("merges", strings(&merges))
        .with("pre", Value::String(pre.into()))
        .with("add_bos_token", Value::Bool(false))
        .build()
        .unwrap()
}

#[test]
fn pieces_have_the_tokens_of_the_whole_by_every_rule_of_splitting() {
    for pre in [
        "default",
        "gpt-2",
        "smollm",
        "falcon",
        "llama-bpe",
        "dbrx",
        "qwen2",
        "tekken",
        "gpt-4o",
    ] {
        assert_same_in_pieces(pre, &byte_level(pre, &[]));
    }
}

#[test]
fn user_defined_tokens_are_never_cut() {
    let literals = ["a b", "  ", " a", "b ", "\na", "。 ", "a\nb\n", ". . ."];
    for pre in ["gpt-2", "llama-bpe"] {
        assert_same_in_pieces(pre, &byte_level(pre, &literals));
    }
}

/// SentencePiece BPE without bytes, so that what is unknown is joined to one token.
fn sentence_piece(tokens: &[&str], literals: &[&str], space_prefix: bool) -> Tokenizer {
    let mut all = vec![("<unk>", 2), ("<s>", 3), ("</s>", 3)];
    all.extend(tokens.iter().map(|text| (*text, NORMAL)));
    all.extend(literals.iter().map(|text| (*text, USER_DEFINED)));
    let scores: Vec<f32> = (0..all.len()).map(|i| -(i as f32)).collect();
    Draft::new("llama", &all)
        .with("scores", floats(&scores))
        .with("unknown_token_id", Value::U32(0))
        .with("add_space_prefix", Value::Bool(space_prefix))
        .build()
        .unwrap()
}

#[test]
fn pieces_have_the_tokens_of_the_whole_in_sentence_piece() {
    let words = [
        "▁", "a", "b", "ab", "▁a", "▁ab", "▁▁", ".", "\n", "'s", "'", "s", "5",
    ];
    // Tokens that begin in one word and end in the next: nothing can be cut.
    let across = ["▁", "a", "b", "a▁", "a▁b", "▁▁", "b▁", "b▁▁"];
    for space_prefix in [true, false] {
        for literals in [&[][..], &["<x>", "a b", " a", "b ", "  "]] {
            assert_same_in_pieces("words", &sentence_piece(&words, literals, space_prefix));
            assert_same_in_pieces("across", &sentence_piece(&across, literals, space_prefix));
        }
    }
}

#[test]
fn pieces_of_real_text_have_the_tokens_of_the_whole() {
    let mut models = vec![crate::common::default_model()];
    models.extend(["llama-bpe", "llama-spm"].into_iter().filter_map(|name| {
        crate::common::shared(&format!("fixtures/vocab/ggml-vocab-{name}.gguf"))
    }));
    let mut random = Random::new(1);
    for text in ["dev.raw", "calib.txt"] {
        let Some(path) = crate::common::shared(&format!("data/wikitext-2/{text}")) else {
            return;
        };
        let text = fs::read_to_string(path).unwrap();
        for model in &models {
            let tokenizer = Tokenizer::from_gguf(&GgufFile::open(model).unwrap()).unwrap();
            let whole = in_pieces(&tokenizer, &text, usize::MAX / 4, &mut random);
            for size in [100, 4096, PIECE] {
                let ids = in_pieces(&tokenizer, &text, size, &mut random);
                assert!(ids == whole, "{} in pieces of {size}", model.display());
            }
            // A text as a whole is encoded in pieces as well.
            assert!(
                tokenizer.encode(&text).unwrap() == whole,
                "{}",
                model.display()
            );
        }
    }
}

/// A text without an end, and how many bytes of it were read.
fn endless() -> (TextSource, Arc<AtomicUsize>) {
    struct Endless(Arc<AtomicUsize>);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let line = b"it goes on and on, ";
            for (to, from) in buffer.iter_mut().zip(line.iter().cycle()) {
                *to = *from;
            }
            let read = buffer.len() / line.len() * line.len();
            self.0.fetch_add(read, Ordering::Relaxed);
            Ok(read)
        }
    }
    let read = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&read);
    let source = TextSource::reader("an endless text", move || {
        let reader = Endless(Arc::clone(&counter));
        Ok(Box::new(BufReader::new(reader)) as Box<dyn BufRead>)
    });
    (source, read)
}

#[test]
fn a_text_is_read_as_far_as_it_is_needed() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let options = PerplexityOptions {
        context: 64,
        chunks: Some(3),
        all_positions: false,
        cache_type: CacheType::F16,
    };
    let (text, read) = endless();
    let tokens = engine.read(&text, options.most_tokens()).unwrap();
    assert_eq!(tokens.len(), 3 * 64);
    assert!(read.load(Ordering::Relaxed) <= 3 * PIECE);
    let result = engine.perplexity_of(&tokens, options, &mut ignore).unwrap();
    assert_eq!(result.chunks, 3);
    // The same as that of a text that ends there.
    let whole = "it goes on and on, ".repeat(100);
    assert_eq!(
        engine.perplexity(&whole, options, &mut ignore).unwrap(),
        result
    );

    // Calibration reads no further either.
    let (text, read) = endless();
    let method = MethodOptions {
        effort: Effort::Fast,
        ..Method::Flap.into()
    };
    let (_, report) = engine
        .calibrate(&method, &source(text), &mut ignore)
        .unwrap();
    assert_eq!(report.all_tokens, 4096);
    assert!(read.load(Ordering::Relaxed) <= 3 * PIECE);
}

#[test]
fn a_character_that_falls_between_two_reads_is_read_and_a_wrong_byte_is_named_wherever_it_is() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let text = format!("x{}", "äöü€🦙 ".repeat(PIECE / 6));
    let path = workshop.write("long.txt", &text);
    let read = |path| engine.read(&TextSource::Path(path), usize::MAX);
    let whole = engine.tokenizer().unwrap().encode_prompt(&text).unwrap();
    assert!(read(path).unwrap() == whole);
    for offset in [0, 10, PIECE - 1, PIECE, 2 * PIECE + 5] {
        let mut bytes = vec![b'a'; 3 * PIECE];
        bytes[offset] = 0xff;
        let error = read(workshop.write("wrong.txt", bytes))
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("offset {offset} ")), "{error}");
    }
    // Cut off in the middle of a character.
    let mut bytes = vec![b'a'; PIECE];
    bytes.extend([0xe2, 0x82]);
    let error = read(workshop.write("cut.txt", bytes))
        .unwrap_err()
        .to_string();
    assert!(error.contains(&format!("offset {PIECE} ")), "{error}");
}

/// Runs the program on the small model with so much memory for addresses (in KiB) and no more.
#[cfg(target_os = "linux")]
fn flapjack_within(workshop: &Workshop, kib: usize, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -v {kib} && exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_flapjack"))
        .args(arguments)
        .arg("-m")
        .arg(&workshop.model)
        .args(["-t", "1"])
        .env("FLAPJACK_CACHE", workshop.path("cache"));
    run_with_input(command, b"")
}

#[cfg(target_os = "linux")]
#[test]
fn a_text_of_20_mb_takes_little_memory_whether_some_of_it_is_used_or_all() {
    let workshop = Workshop::new();
    let line = "The quick brown fox jumps over the lazy dog. ";
    let text = line.repeat(20_000_000 / line.len());
    let path = workshop.write("long.txt", &text);
    let path = path.to_str().unwrap();
    let limit = 400_000;

    let few = ["perplexity", "-f", path, "-c", "64", "--chunks", "1"];
    let (line, _) = succeeded(&flapjack_within(&workshop, limit, &few));
    assert!(line.contains("in 1 chunk"), "{line}");

    // All of it is made tokens of: 4 bytes for each.
    let all = ["perplexity", "-f", path, "-c", "100000000"];
    let output = flapjack_within(&workshop, limit, &all);
    let message = stderr(&output);
    // Every byte is a token, with one in front that begins the text.
    let tokens = format!("{} tokens", text.len() + 1);
    assert!(message.contains(&tokens), "{message}");
    assert_eq!(
        (output.status.code(), stdout(&output).as_str()),
        (Some(1), "")
    );

    let calibrate = "run --prune 0.3 --method flap --effort fast -n 1 -p a --calib";
    let calibrate: Vec<&str> = calibrate.split(' ').chain([path]).collect();
    succeeded(&flapjack_within(&workshop, limit, &calibrate));

    // A prompt is needed as a whole, which takes 4 bytes for each token beside its text.
    let prompt = ["run", "-f", path, "-c", "128"];
    let message = stderr(&flapjack_within(&workshop, limit, &prompt));
    assert!(message.contains("--ctx"), "{message}");
}
