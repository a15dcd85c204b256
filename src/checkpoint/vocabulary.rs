//! The tokenizer's metadata, from `tokenizer.json` (the `tokenizers` library's form) and `tokenizer_config.json`. Encoding is the library's own by
//! that file; these metadata say what the tokens are, and go into a GGUF file that the model is written to. Where there is only a
//! `tokenizer.model`, texts are encoded by these metadata, as those of a GGUF file are.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::sentencepiece::SentencePiece;
use super::{Folder, SENTENCEPIECE, TOKENIZER};
use crate::gguf::{GgufError, Value, ValueType};
use crate::tokenize::PRE;

const SETTINGS: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const ADDED: &str = "added_tokens.json";

/// The numbers that GGUF has for types of tokens.
pub(super) const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The score of a token that is never made of others.
const WORST: f32 = -1e6;

/// More tokens than any vocabulary has.
const MOST_TOKENS: usize = 1 << 24;

/// What the file of a tokenizer says.
struct Vocabulary {
    /// Texts and types.
    tokens: Vec<(String, i32)>,
    /// How they are applied.
    entries: Entries,
    /// Tokens that the file itself gives a meaning, by GGUF's names for it.
    known: Vec<(&'static str, usize)>,
    /// The token of this text stands in front of texts; `None` where the token of the name `bos` does.
    first: Option<Option<String>>,
}

/// Reads the vocabulary of a folder, with as many tokens as the embedding has `rows`: some models have rows for tokens that are none,
/// others tokens, of what they do not run, without rows.
///
/// # Errors
/// If there is neither `tokenizer.json` nor `tokenizer.model`, or it is no byte-level or SentencePiece BPE.
pub(super) fn read(
    folder: &Folder,
    config: &Json,
    rows: Option<usize>,
) -> Result<Vec<(String, Value)>, GgufError> {
    let settings = folder.optional_json(SETTINGS)?.unwrap_or(Json::Null);
    let Vocabulary {
        mut tokens,
        mut entries,
        known,
        first,
    } = match (folder.has(TOKENIZER), folder.has(SENTENCEPIECE)) {
        (true, _) => of_json(folder)?,
        (false, true) => of_sentencepiece(folder, &settings)?,
        (false, false) => {
            return Err(folder.error(
                TOKENIZER,
                "is missing from the folder, and so is tokenizer.model; fetch one, or take the model as GGUF",
            ));
        }
    };
    if let Some(rows) = rows {
        tokens.resize(rows, (String::new(), UNUSED));
    }
    // Those that no token has.
    for (id, (text, _)) in tokens.iter_mut().enumerate() {
        if text.is_empty() {
            *text = format!("[PAD{id}]");
        }
    }
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, (text, _))| (text.as_str(), id))
        .collect();

    if let Some(scores) = entries.scores.take() {
        // Tokens without a score are never made of others.
        let scores = scores.into_iter().chain(std::iter::repeat(WORST));
        let scores = scores.take(tokens.len()).map(Value::F32).collect();
        entries.put("scores", Value::Array(ValueType::F32, scores));
    }
    let texts = tokens.iter().map(|(text, _)| text.clone()).collect();
    entries.put("tokens", Value::StringArray(texts));
    let types = tokens.iter().map(|(_, t)| Value::I32(*t)).collect();
    entries.put("token_type", Value::Array(ValueType::I32, types));

    // The token of a name: its text in one file, or its id in the other, which may be a list.
    let id = |name: &str| -> Option<usize> {
        let text = settings.get(format!("{name}_token")).and_then(text_of);
        let by_text = text.and_then(|text| ids.get(text)).copied();
        let number = config.get(format!("{name}_token_id"));
        let number = number.and_then(|n| n.as_u64().or_else(|| n.get(0)?.as_u64()));
        by_text.or(number.and_then(|n| usize::try_from(n).ok()))
    };
    let own = |name: &str| known.iter().find(|(n, _)| *n == name).map(|(_, id)| *id);
    let there = |id: &usize| *id < tokens.len();
    let bos = id("bos").or(own("bos")).filter(there);
    let eos = id("eos").or(own("eos")).filter(there);
    for (name, id) in [
        ("bos", bos),
        ("eos", eos),
        ("padding", id("pad").or(own("padding")).filter(there)),
        ("unknown", own("unknown").filter(there)),
    ] {
        if let Some(id) = id {
            entries.put(&format!("{name}_token_id"), Value::U32(id as u32));
        }
    }
    if let Some(list) = config.get("eos_token_id").and_then(Json::as_array) {
        let ends = list
            .iter()
            .filter_map(Json::as_u64)
            .filter_map(|id| u32::try_from(id).ok());
        let ends = ends.map(Value::U32).collect();
        entries.put("eos_token_ids", Value::Array(ValueType::U32, ends));
    }
    let bos_text = bos.map(|id| tokens[id].0.as_str());
    let adds = |key: &str| settings.get(key).and_then(Json::as_bool);
    let adds_bos = adds("add_bos_token").unwrap_or_else(|| match &first {
        Some(first) => first.as_deref() == bos_text,
        None => true,
    });
    entries.put("add_bos_token", Value::Bool(bos.is_some() && adds_bos));
    let adds_eos = adds("add_eos_token").unwrap_or(false);
    entries.put("add_eos_token", Value::Bool(eos.is_some() && adds_eos));

    let file = std::fs::read_to_string(folder.path.join(TEMPLATE)).ok();
    let template = file.or_else(|| Some(settings.get("chat_template")?.as_str()?.to_owned()));
    if let Some(template) = template {
        entries.all.push((
            "tokenizer.chat_template".to_owned(),
            Value::String(template),
        ));
    }
    Ok(entries.all)
}

/// What `tokenizer.json` says.
fn of_json(folder: &Folder) -> Result<Vocabulary, GgufError> {
    let error = |problem: &str| folder.error(TOKENIZER, problem);
    let json = folder.json(TOKENIZER)?;
    let model = json.get("model").ok_or_else(|| error("has no model"))?;
    match model.get("type").and_then(Json::as_str) {
        None | Some("BPE") => {}
        Some(other) => {
            return Err(error(&format!(
                "its model is {other}, which is not supported (BPE is)"
            )));
        }
    }
    let vocab = model.get("vocab").and_then(Json::as_object);
    let vocab = vocab.ok_or_else(|| error("its model has no vocab"))?;
    let added = json.get("added_tokens").and_then(Json::as_array);
    let added: Vec<&Json> = added.into_iter().flatten().collect();

    // Texts and types by their ids.
    let id_of = |id: &Json| {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
        id.filter(|id| *id < MOST_TOKENS)
            .ok_or_else(|| error("a token has no id"))
    };
    let mut tokens: Vec<(String, i32)> = Vec::new();
    let mut set = |id: usize, text: &str, token_type: i32| {
        if tokens.len() <= id {
            tokens.resize(id + 1, (String::new(), UNUSED));
        }
        tokens[id] = (text.to_owned(), token_type);
    };
    let fallback = model.get("byte_fallback").and_then(Json::as_bool) == Some(true);
    let unknown = model.get("unk_token").and_then(Json::as_str);
    for (text, id) in vocab {
        let is_byte = fallback && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let token_type = match (is_byte, Some(text.as_str()) == unknown) {
            (true, _) => BYTE,
            (_, true) => UNKNOWN,
            _ => NORMAL,
        };
        set(id_of(id)?, text, token_type);
    }
    for token in added {
        let text = token
            .get("content")
            .and_then(Json::as_str)
            .unwrap_or_default();
        let special = token.get("special").and_then(Json::as_bool) == Some(true);
        let token_type = match (special, Some(text) == unknown) {
            (_, true) => UNKNOWN,
            (true, _) => CONTROL,
            (false, _) => USER_DEFINED,
        };
        set(
            id_of(token.get("id").unwrap_or(&Json::Null))?,
            text,
            token_type,
        );
    }
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, (text, _))| (text.as_str(), id))
        .collect();
    let merges = merges(model).ok_or_else(|| error("its model has no merges"))?;
    let mut entries = Entries::default();
    let words = Words::of(&json);
    if words.byte_level {
        entries.put("model", Value::String("gpt2".into()));
        let whole = model.get("ignore_merges").and_then(Json::as_bool) == Some(true);
        if let Some(name) = crate::tokenize::pre_of(&words.patterns, whole) {
            entries
                .all
                .push((PRE.to_owned(), Value::String(name.to_owned())));
        }
        let lines = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        entries.put("merges", Value::StringArray(lines));
    } else if fallback || has_spaces(&json) {
        entries.put("model", Value::String("llama".into()));
        // The first merges come first.
        let mut scores = vec![WORST; tokens.len()];
        for (rank, (a, b)) in merges.iter().enumerate().rev() {
            if let Some(id) = ids.get(format!("{a}{b}").as_str()) {
                scores[*id] = -(rank as f32);
            }
        }
        entries.scores = Some(scores);
        entries.put("add_space_prefix", Value::Bool(has_prefix(&json)));
    } else {
        return Err(error(
            "is neither byte-level BPE nor SentencePiece's, which are the ones that are supported",
        ));
    }

    let unknown = unknown.and_then(|text| ids.get(text)).copied();
    let first = json.get("post_processor").and_then(first_token);
    Ok(Vocabulary {
        known: unknown.map(|id| ("unknown", id)).into_iter().collect(),
        first: Some(first.map(str::to_owned)),
        tokens,
        entries,
    })
}

/// What `tokenizer.model` says, with the tokens that other files add.
fn of_sentencepiece(folder: &Folder, settings: &Json) -> Result<Vocabulary, GgufError> {
    let model = SentencePiece::read(folder)?;
    let pieces = model.pieces.iter();
    let mut tokens: Vec<(String, i32)> = pieces.map(|p| (p.text.clone(), p.token_type())).collect();
    // By text in one file, by id in the other.
    let more = folder.optional_json(ADDED)?.unwrap_or(Json::Null);
    let more = more.as_object().into_iter().flatten();
    let more = more.map(|(text, id)| (text.as_str(), id.as_u64(), false));
    let listed = settings
        .get("added_tokens_decoder")
        .and_then(Json::as_object);
    let listed = listed.into_iter().flatten().map(|(id, token)| {
        let special = token.get("special").and_then(Json::as_bool) == Some(true);
        (text_of(token).unwrap_or_default(), id.parse().ok(), special)
    });
    for (text, id, special) in more.chain(listed) {
        let id = id.and_then(|id: u64| usize::try_from(id).ok());
        let id = id.filter(|id| *id < MOST_TOKENS && !text.is_empty());
        let id = id.ok_or_else(|| folder.error(SETTINGS, "a token that is added has no id"))?;
        if id >= tokens.len() {
            tokens.resize(id + 1, (String::new(), UNUSED));
        }
        // What the file itself says of a token's type is as good.
        if tokens[id].0 != text {
            let token_type = if special { CONTROL } else { USER_DEFINED };
            tokens[id] = (text.to_owned(), token_type);
        }
    }
    let mut entries = Entries::default();
    entries.put("model", Value::String("llama".into()));
    entries.scores = Some(model.pieces.iter().map(|piece| piece.score).collect());
    entries.put("add_space_prefix", Value::Bool(model.has_prefix()));
    let names = ["bos", "eos", "padding", "unknown"].into_iter();
    Ok(Vocabulary {
        tokens,
        entries,
        known: names
            .filter_map(|name| Some((name, model.id(name)?)))
            .collect(),
        first: None,
    })
}

#[derive(Default)]
struct Entries {
    all: Vec<(String, Value)>,
    /// Of SentencePiece's tokens, the best first; `None` where there are merges.
    scores: Option<Vec<f32>>,
}

impl Entries {
    fn put(&mut self, name: &str, value: Value) {
        self.all.push((format!("tokenizer.ggml.{name}"), value));
    }
}

/// A token as a text, or as an object with one.
fn text_of(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// The merges, best first: pairs, or texts with a space between.
fn merges(model: &Json) -> Option<Vec<(&str, &str)>> {
    fn pair(item: &Json) -> Option<(&str, &str)> {
        match item {
            Json::String(text) => text.split_once(' '),
            item => Some((item.get(0)?.as_str()?, item.get(1)?.as_str()?)),
        }
    }
    model.get("merges")?.as_array()?.iter().map(pair).collect()
}

/// How text is split into words.
#[derive(Default)]
struct Words {
    /// Each byte of a word becomes a character.
    byte_level: bool,
    patterns: Vec<String>,
}

impl Words {
    fn of(json: &Json) -> Self {
        let mut words = Self::default();
        if let Some(step) = json.get("pre_tokenizer") {
            words.add(step);
        }
        words
    }

    fn add(&mut self, step: &Json) {
        let flag = |key: &str| step.get(key).and_then(Json::as_bool);
        match step.get("type").and_then(Json::as_str) {
            Some("Sequence") => {
                let steps = step.get("pretokenizers").and_then(Json::as_array);
                steps.into_iter().flatten().for_each(|step| self.add(step));
            }
            Some("Split") => {
                let pattern = step.get("pattern").and_then(|p| p.get("Regex"));
                self.patterns
                    .extend(pattern.and_then(Json::as_str).map(str::to_owned));
            }
            Some("Digits") if flag("individual_digits") == Some(true) => {
                self.patterns.push(r"\p{N}".to_owned());
            }
            Some("ByteLevel") => {
                self.byte_level = true;
                if flag("use_regex") != Some(false) {
                    self.patterns.push(crate::tokenize::GPT2.to_owned());
                }
            }
            // What is not known has no name, and so has the whole.
            Some(other) => self.patterns.push(other.to_owned()),
            None => {}
        }
    }
}

/// Whether something somewhere in a part of the file is of this type.
fn has_type(json: Option<&Json>, wanted: &str) -> bool {
    match json {
        Some(Json::Object(object)) => {
            object.get("type").and_then(Json::as_str) == Some(wanted)
                || object.values().any(|value| has_type(Some(value), wanted))
        }
        Some(Json::Array(items)) => items.iter().any(|item| has_type(Some(item), wanted)),
        _ => false,
    }
}

/// Whether spaces become the character that stands for them in SentencePiece.
fn has_spaces(json: &Json) -> bool {
    let normalizer = json
        .get("normalizer")
        .map(Json::to_string)
        .unwrap_or_default();
    has_type(json.get("pre_tokenizer"), "Metaspace") || normalizer.contains('\u{2581}')
}

/// Whether a space is put in front of texts.
fn has_prefix(json: &Json) -> bool {
    let scheme = json
        .get("pre_tokenizer")
        .and_then(|step| step.get("prepend_scheme"));
    let prepends = scheme
        .and_then(Json::as_str)
        .is_some_and(|scheme| scheme != "never");
    has_type(json.get("normalizer"), "Prepend") || prepends
}

/// The token that stands in front of texts by the template of a step behind encoding.
fn first_token(step: &Json) -> Option<&str> {
    if step.get("type")?.as_str()? == "Sequence" {
        let steps = step.get("processors")?.as_array()?;
        return steps.iter().find_map(first_token);
    }
    step.get("single")?
        .get(0)?
        .get("SpecialToken")?
        .get("id")?
        .as_str()
}
