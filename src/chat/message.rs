//! Messages, in the form that OpenAI's API has them.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// A message of a conversation. It reads and writes OpenAI's JSON; keys that it has no field for are kept, in their order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or whatever else a template knows.
    pub role: String,
    #[serde(default)]
    pub content: Content,
    /// What the model thought before it answered; `None` if it is not known, or is still part of the content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The calls of tools that the model asks for.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "maybe_null"
    )]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a message of a tool answers; `None` for other messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The name of a tool, or of one of several users; mostly `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Null or absent, as in messages that only call tools.
    #[default]
    Nothing,
    Text(String),
    /// Parts with a `type` each, of which only those of the type `text` can be read.
    Parts(Vec<Map<String, Value>>),
}

/// A call of a tool that the model asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// What its answer refers to; `None` if the model gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    pub function: FunctionCall,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The name of a function and what it is called with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FunctionCall {
    pub name: String,
    /// An object, or, as OpenAI's API has it, a string that holds the object as JSON.
    #[serde(default)]
    pub arguments: Value,
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of text.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: Content::Text(text.into()),
            ..Self::default()
        }
    }

    pub fn system(text: impl Into<String>) -> Self {
        Self::new("system", text)
    }

    pub fn user(text: impl Into<String>) -> Self {
        Self::new("user", text)
    }

    pub fn assistant(text: impl Into<String>) -> Self {
        Self::new("assistant", text)
    }

    /// The text of the message, parts with newlines between them; empty if it has none.
    pub fn text(&self) -> String {
        self.content.text()
    }
}

impl Content {
    /// All text in one, parts with newlines between them.
    pub fn text(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => {
                let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
                texts.collect::<Vec<_>>().join("\n")
            }
        }
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl ToolCall {
    /// A call without an id.
    pub fn new(name: impl Into<String>, arguments: Value) -> Self {
        Self {
            id: None,
            kind: function(),
            function: FunctionCall {
                name: name.into(),
                arguments,
                extra: Map::new(),
            },
            extra: Map::new(),
        }
    }
}

impl FunctionCall {
    /// The arguments as a value: what a string holds, if it holds JSON, and else what there is.
    pub fn arguments(&self) -> Value {
        let held = self.arguments.as_str().map(serde_json::from_str);
        match held {
            Some(Ok(value @ Value::Object(_))) => value,
            _ => self.arguments.clone(),
        }
    }

    /// The arguments as text, as OpenAI's API has them.
    pub fn arguments_text(&self) -> String {
        match &self.arguments {
            Value::String(text) => text.clone(),
            Value::Null => "{}".to_owned(),
            value => value.to_string(),
        }
    }
}

fn function() -> String {
    "function".to_owned()
}

/// Null, which OpenAI's clients send for "none", as an empty list.
fn maybe_null<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// How messages are written for a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Fit {
    /// Arguments of tools as text, where templates mostly take objects.
    pub text_arguments: bool,
    /// An empty text where a message that calls tools has no content.
    pub empty_content: bool,
    /// Contents in parts as one text.
    pub join_parts: bool,
    /// Contents that are one text in a part.
    pub make_parts: bool,
}

impl Message {
    /// What a template gets to see. What is null is left out, as transformers does, but for the content of a message that calls
    /// tools, for which some templates look.
    pub(super) fn for_template(&self, fit: Fit) -> Value {
        let mut map = Map::new();
        map.insert("role".into(), self.role.clone().into());
        let text = |text: String| match fit.make_parts {
            true => serde_json::json!([{"type": "text", "text": text}]),
            false => Value::String(text),
        };
        let content = match &self.content {
            Content::Nothing if self.tool_calls.is_empty() => None,
            Content::Nothing if fit.empty_content => Some(text(String::new())),
            Content::Nothing => Some(Value::Null),
            Content::Text(content) => Some(text(content.clone())),
            Content::Parts(_) if fit.join_parts => Some(text(self.content.text())),
            Content::Parts(parts) => Some(parts.iter().cloned().map(Value::Object).collect()),
        };
        let strings = [
            ("reasoning_content", &self.reasoning_content),
            ("tool_call_id", &self.tool_call_id),
            ("name", &self.name),
        ];
        map.extend(content.map(|content| ("content".into(), content)));
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.iter().map(|call| call.for_template(fit));
            map.insert("tool_calls".into(), calls.collect());
        }
        for (key, value) in strings {
            map.extend(value.clone().map(|value| (key.into(), value.into())));
        }
        let extra = self.extra.iter().filter(|(_, value)| !value.is_null());
        map.extend(extra.map(|(key, value)| (key.clone(), value.clone())));
        Value::Object(map)
    }
}

impl ToolCall {
    fn for_template(&self, fit: Fit) -> Value {
        let mut map = Map::new();
        map.extend(self.id.clone().map(|id| ("id".into(), id.into())));
        map.insert("type".into(), self.kind.clone().into());
        let mut function = Map::new();
        function.insert("name".into(), self.function.name.clone().into());
        let arguments = match fit.text_arguments {
            true => self.function.arguments_text().into(),
            false => self.function.arguments(),
        };
        function.insert("arguments".into(), arguments);
        function.extend(self.function.extra.clone());
        map.insert("function".into(), Value::Object(function));
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}
