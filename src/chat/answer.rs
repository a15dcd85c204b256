//! The answer of a model taken apart: what it thinks, what it says, and the tools that it calls.
//!
//! Templates teach models different ways to write these; [`AnswerStyle::of`] finds out which. An answer comes in pieces of any length,
//! so that [`AnswerParser`] holds back what may be the beginning of a tag.

use serde_json::{Map, Value};

use super::{ChatTemplate, ToolCall};
use crate::tokenize::Tokenizer;

/// The tags around reasoning that are known.
const REASONING: [(&str, &str); 3] = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
];

const PYTHON_TAG: &str = "<|python_tag|>";
const TOOL_CALLS: &str = "[TOOL_CALLS]";
const CALL_ID: &str = "[CALL_ID]";
const ARGS: &str = "[ARGS]";
const CALL: (&str, &str) = ("<tool_call>", "</tool_call>");

/// Has a tokenizer show the texts that tell the parts of an answer from each other, where they are control tokens.
pub(crate) fn show_markers(tokenizer: &mut Tokenizer) {
    let reasoning = REASONING.iter().flat_map(|(open, close)| [*open, *close]);
    for text in reasoning.chain([PYTHON_TAG, TOOL_CALLS, CALL_ID, ARGS, CALL.0, CALL.1]) {
        tokenizer.show(text);
    }
}

/// How a model writes what is not plain text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerStyle {
    /// What stands around its reasoning; `None` for models that do not reason, or not in tags.
    pub reasoning: Option<Tags>,
    /// How it calls tools; `None` for models that do not, or in ways that are not known.
    pub tools: Option<ToolStyle>,
}

/// The texts around something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tags {
    pub open: String,
    pub close: String,
}

/// How a model calls tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolStyle {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Qwen and Hermes do; Qwen3-Coder has `<function=…>` between.
    Hermes,
    /// `{"name": …, "parameters": {…}}` and nothing else, or behind `<|python_tag|>`, as Llama 3 does.
    Llama,
    /// `[TOOL_CALLS]` and a list of `{"name": …, "arguments": {…}}`, or a name, `[ARGS]` and an object, as Mistral does.
    Mistral,
}

impl AnswerStyle {
    /// The style that a template teaches.
    pub fn of(template: &ChatTemplate) -> Self {
        let has = |text: &str| template.sources().any(|source| source.contains(text));
        let reasoning = REASONING.iter().find(|(_, close)| has(close));
        let tools = if has(CALL.0) {
            Some(ToolStyle::Hermes)
        } else if has(TOOL_CALLS) {
            Some(ToolStyle::Mistral)
        } else if has(PYTHON_TAG) || (has("\"parameters\": ") && has("<|eot_id|>")) {
            Some(ToolStyle::Llama)
        } else {
            None
        };
        Self {
            reasoning: reasoning.map(|(open, close)| Tags {
                open: (*open).to_owned(),
                close: (*close).to_owned(),
            }),
            tools,
        }
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // pieces are a few, and do not stay
pub enum Piece {
    /// Some of what the model thinks.
    Reasoning(String),
    /// Some of what it says.
    Text(String),
    /// A call of a tool, as soon as it is complete.
    Call(ToolCall),
}

/// Takes an answer apart while it comes.
#[derive(Debug, Clone)]
pub struct AnswerParser {
    reasoning: Option<Tags>,
    tools: Option<ToolStyle>,
    state: State,
    /// Text that is not decided yet.
    held: String,
    /// Whether blanks are left out until there is something else.
    skip_blanks: bool,
    /// Whether anything of the answer itself, behind its reasoning, has come.
    begun: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but blanks has come.
    Start,
    Reasoning,
    Body,
    /// Inside of `<tool_call>`.
    Call,
    /// All the rest may be calls, which are read at the end.
    Calls,
}

impl AnswerParser {
    /// For an answer to `prompt`. Calls of tools are looked for if there were tools to call (`tools`); else they are text like any
    /// other.
    pub fn new(style: &AnswerStyle, prompt: &super::Rendered, tools: bool) -> Self {
        let opened = style
            .reasoning
            .as_ref()
            .is_some_and(|tags| prompt.ends_with(&tags.open));
        Self::with_reasoning(style, opened, tools)
    }

    /// For an answer whose reasoning has been begun by the prompt, or has not.
    pub fn with_reasoning(style: &AnswerStyle, opened: bool, tools: bool) -> Self {
        Self {
            reasoning: style.reasoning.clone(),
            tools: style.tools.filter(|_| tools),
            state: if opened {
                State::Reasoning
            } else {
                State::Start
            },
            held: String::new(),
            skip_blanks: opened,
            begun: false,
        }
    }

    /// Takes more of the answer, and gives what is decided with it.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces) {}
        pieces
    }

    /// The rest, when no more comes.
    pub fn finish(mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Reasoning => emit(&mut pieces, Piece::Reasoning, held.trim_end()),
            // Models often leave the last tag out.
            State::Call => match call_in_tags(&held) {
                Some(call) => pieces.push(Piece::Call(call)),
                None => emit(&mut pieces, Piece::Text, &format!("{}{held}", CALL.0)),
            },
            State::Calls => {
                let calls = match self.tools {
                    Some(ToolStyle::Mistral) => mistral_calls(&held),
                    _ => llama_calls(&held),
                };
                match calls {
                    Some(calls) => pieces.extend(calls.into_iter().map(Piece::Call)),
                    None => emit(&mut pieces, Piece::Text, &held),
                }
            }
            State::Start | State::Body => match self.skip_blanks {
                true => emit(&mut pieces, Piece::Text, held.trim_start()),
                false => emit(&mut pieces, Piece::Text, &held),
            },
        }
        pieces
    }

    /// Decides about the beginning of what is held; whether there is more to decide.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> bool {
        if self.skip_blanks {
            let kept = self.held.trim_start().len();
            self.held.drain(..self.held.len() - kept);
            if kept == 0 {
                return false;
            }
        }
        match self.state {
            State::Start => self.start(),
            State::Reasoning => self.reason(pieces),
            State::Body => self.body(pieces),
            State::Call => self.call(pieces),
            State::Calls => false,
        }
    }

    fn start(&mut self) -> bool {
        let trimmed = self.held.trim_start();
        if let Some(tags) = &self.reasoning {
            if let Some(behind) = trimmed.strip_prefix(tags.open.as_str()) {
                self.held = behind.to_owned();
                self.state = State::Reasoning;
                self.skip_blanks = true;
                return true;
            }
            if tags.open.starts_with(trimmed) {
                return false;
            }
        }
        self.state = State::Body;
        true
    }

    fn reason(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let Some(tags) = &self.reasoning else {
            self.state = State::Body;
            return true;
        };
        if let Some((before, behind)) = self.held.split_once(tags.close.as_str()) {
            emit(pieces, Piece::Reasoning, before.trim_end());
            self.held = behind.to_owned();
            self.state = State::Body;
            self.skip_blanks = true;
            return true;
        }
        // Blanks in front of the last tag are no part of it.
        let sure = self.held.len() - possible_beginning(&self.held, &[&tags.close]);
        let sure = self.held[..sure].trim_end().len();
        self.pass_on(sure, pieces, Piece::Reasoning)
    }

    fn body(&mut self, pieces: &mut Vec<Piece>) -> bool {
        // Blanks in front of what may be a call are held until it is known to be none.
        let trimmed = self.held.trim_start();
        let markers: &[&str] = match self.tools {
            None => &[],
            Some(ToolStyle::Hermes) => &[CALL.0],
            Some(ToolStyle::Mistral) => &[TOOL_CALLS],
            Some(ToolStyle::Llama) => &[PYTHON_TAG],
        };
        if let Some((at, marker)) = first_of(&self.held, markers) {
            emit(pieces, Piece::Text, self.held[..at].trim_end());
            self.held.drain(..at + marker.len());
            self.begun = true;
            self.skip_blanks = false;
            self.state = match self.tools {
                Some(ToolStyle::Hermes) => State::Call,
                _ => State::Calls,
            };
            return true;
        }
        if !self.begun {
            let begins = |text: &str| trimmed.starts_with(text) || text.starts_with(trimmed);
            let whole = match self.tools {
                Some(ToolStyle::Llama) => begins("{"),
                Some(ToolStyle::Mistral) => begins("[{"),
                _ => false,
            };
            if whole {
                if trimmed.len() > 1 {
                    self.state = State::Calls;
                }
                return false;
            }
        }
        let mut sure = self.held.len() - possible_beginning(&self.held, markers);
        if !markers.is_empty() {
            sure = self.held[..sure].trim_end().len();
        }
        self.pass_on(sure, pieces, Piece::Text)
    }

    fn call(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let Some((inside, behind)) = self.held.split_once(CALL.1) else {
            return false;
        };
        match call_in_tags(inside) {
            Some(call) => pieces.push(Piece::Call(call)),
            None => emit(
                pieces,
                Piece::Text,
                &format!("{}{inside}{}", CALL.0, CALL.1),
            ),
        }
        self.held = behind.to_owned();
        self.state = State::Body;
        self.skip_blanks = true;
        true
    }

    /// Passes the first bytes of what is held on.
    fn pass_on(&mut self, len: usize, pieces: &mut Vec<Piece>, kind: fn(String) -> Piece) -> bool {
        if len > 0 {
            let rest = self.held.split_off(len);
            emit(pieces, kind, &std::mem::replace(&mut self.held, rest));
            self.skip_blanks = false;
            self.begun |= self.state == State::Body;
        }
        false
    }
}

/// A piece, if it is not empty.
fn emit(pieces: &mut Vec<Piece>, kind: fn(String) -> Piece, text: &str) {
    if !text.is_empty() {
        pieces.push(kind(text.to_owned()));
    }
}

/// The first of these texts in `text`, and where it is.
fn first_of<'m>(text: &str, markers: &[&'m str]) -> Option<(usize, &'m str)> {
    let found = markers
        .iter()
        .filter_map(|marker| Some((text.find(marker)?, *marker)));
    found.min_by_key(|(at, _)| *at)
}

/// The length of the longest end of `text` that one of the markers begins with.
fn possible_beginning(text: &str, markers: &[&str]) -> usize {
    let ends = text.char_indices().map(|(at, _)| &text[at..]);
    let mut open = ends.filter(|end| markers.iter().any(|marker| marker.starts_with(end)));
    open.next().map_or(0, str::len)
}

/// What stands between `<tool_call>` and `</tool_call>`; `None` if it is no call.
fn call_in_tags(text: &str) -> Option<ToolCall> {
    let text = text.trim();
    match serde_json::from_str(text) {
        Ok(value) => call_of(&value),
        Err(_) => call_in_xml(text),
    }
}

/// `<function=NAME>` and, for each argument, `<parameter=NAME>` with its value between newlines, as Qwen3-Coder writes.
fn call_in_xml(text: &str) -> Option<ToolCall> {
    let (name, mut rest) = text.strip_prefix("<function=")?.split_once('>')?;
    let mut arguments = Map::new();
    while let Some((_, parameter)) = rest.split_once("<parameter=") {
        let (key, behind) = parameter.split_once('>')?;
        let (value, behind) = behind.split_once("</parameter>")?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        // Whether a value is a string is said nowhere but in the tool's schema.
        let value = match serde_json::from_str(value) {
            Ok(
                value @ (Value::Object(_) | Value::Array(_) | Value::Bool(_) | Value::Number(_)),
            ) => value,
            _ => Value::String(value.to_owned()),
        };
        arguments.insert(key.to_owned(), value);
        rest = behind;
    }
    Some(ToolCall::new(name.trim(), Value::Object(arguments)))
}

/// A call from `{"name": …}` with `arguments` or `parameters`, which may be text; `None` if it is none.
fn call_of(value: &Value) -> Option<ToolCall> {
    // OpenAI's own form has name and arguments one level deeper.
    let function = value
        .get("function")
        .filter(|function| function.is_object())
        .unwrap_or(value);
    let name = function.get("name")?.as_str()?;
    let arguments = function
        .get("arguments")
        .or_else(|| function.get("parameters"));
    let arguments = match arguments {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(Value::Object(map)) => Value::Object(map.clone()),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(map @ Value::Object(_)) => map,
            _ => return None,
        },
        Some(_) => return None,
    };
    let mut call = ToolCall::new(name, arguments);
    call.id = value.get("id").and_then(Value::as_str).map(str::to_owned);
    Some(call)
}

/// Calls one behind the other, with semicolons, commas or blanks between, or in a list; `None` if anything else is there.
fn llama_calls(text: &str) -> Option<Vec<ToolCall>> {
    let mut rest = text.trim();
    if !rest.starts_with(['{', '[']) {
        return python_call(rest).map(|call| vec![call]);
    }
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let (value, behind) = json_in_front(rest)?;
        match value {
            Value::Array(items) => {
                let found: Option<Vec<_>> = items.iter().map(call_of).collect();
                calls.extend(found?);
            }
            value => calls.push(call_of(&value)?),
        }
        let behind = behind.trim_start();
        let behind = behind.strip_prefix(PYTHON_TAG).unwrap_or(behind);
        rest = behind.trim_start_matches([';', ',']).trim_start();
    }
    Some(calls).filter(|calls| !calls.is_empty())
}

/// `brave_search.call(query="…")`, as Llama 3 calls the tools that it was trained with.
fn python_call(text: &str) -> Option<ToolCall> {
    let (name, arguments) = text.split_once(".call(")?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(is_name) {
        return None;
    }
    let mut rest = arguments.trim().strip_suffix(')')?.trim();
    let mut map = Map::new();
    while !rest.is_empty() {
        let (key, behind) = rest.split_once('=')?;
        let (value, behind) = json_in_front(behind.trim_start())?;
        map.insert(key.trim().to_owned(), value);
        let behind = behind.trim_start();
        rest = behind.strip_prefix(',').unwrap_or(behind).trim_start();
        if rest == behind && !rest.is_empty() {
            return None;
        }
    }
    Some(ToolCall::new(name, Value::Object(map)))
}

/// What stands behind `[TOOL_CALLS]`; `None` if it is no calls.
fn mistral_calls(text: &str) -> Option<Vec<ToolCall>> {
    let text = text.trim();
    if text.starts_with('[') && !text.starts_with(TOOL_CALLS) {
        let (value, rest) = json_in_front(text)?;
        let items = value.as_array().filter(|_| rest.trim().is_empty())?;
        let calls: Option<Vec<_>> = items.iter().map(call_of).collect();
        return calls.filter(|calls| !calls.is_empty());
    }
    let mut calls = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        rest = rest.strip_prefix(TOOL_CALLS).unwrap_or(rest).trim_start();
        let end = rest.find('{')?;
        let head = rest[..end].trim();
        let head = head.strip_suffix(ARGS).unwrap_or(head);
        let (name, id) = match head.split_once(CALL_ID) {
            Some((name, id)) => (name, Some(id.trim().to_owned())),
            None => (head, None),
        };
        let name = name.trim();
        if name.is_empty() || name.contains(char::is_whitespace) {
            return None;
        }
        let (arguments, behind) = json_in_front(&rest[end..])?;
        let mut call = ToolCall::new(name, arguments);
        call.id = id;
        calls.push(call);
        rest = behind.trim_start();
    }
    Some(calls).filter(|calls| !calls.is_empty())
}

/// The JSON that a text begins with, and what is behind it.
fn json_in_front(text: &str) -> Option<(Value, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let value = values.next()?.ok()?;
    let rest = &text[values.byte_offset()..];
    Some((value, rest))
}
