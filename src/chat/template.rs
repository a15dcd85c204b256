//! Templates, and rendering them.

use std::fmt;

use jiff::civil::DateTime;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::marks::{self, ChatTokens, Marking};
use super::message::{Content, Fit};
use super::rendered::{self, Rendered};
use super::{ChatError, ChatOptions, Message, builtin, jinja, python};

/// The name that a model's only template has, or its usual one.
pub(super) const DEFAULT: &str = "default";
/// The name of the template for conversations with tools, where a model has one of its own for them.
const TOOL_USE: &str = "tool_use";
/// The name under which a compiled template is kept in its environment.
const NAME: &str = "chat";
/// How many control tokens in an assistant's texts are tried, one by one, for whether the template looks for them.
const MAX_TRIED: usize = 16;

/// The chat template of a model: one, or several by name.
pub struct ChatTemplate {
    variants: Vec<Variant>,
}

/// One template, compiled.
struct Variant {
    name: String,
    source: String,
    environment: Environment<'static>,
    /// Whether it reads content that is one text.
    texts: bool,
    /// Whether it reads content in parts.
    parts: bool,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.variants.iter().map(|variant| &variant.name);
        f.debug_list().entries(names).finish()
    }
}

impl ChatTemplate {
    /// From the source of a template in Jinja.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] if it cannot be understood.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        Self::named([(DEFAULT.to_owned(), source.to_owned())])
    }

    /// From several templates with their names.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] if one cannot be understood, [`ChatError::NoTemplate`] if there is none.
    pub fn named(templates: impl IntoIterator<Item = (String, String)>) -> Result<Self, ChatError> {
        let variants = templates.into_iter();
        let variants = variants.map(|(name, source)| Variant::compile(name, source));
        let variants: Vec<Variant> = variants.collect::<Result<_, _>>()?;
        if variants.is_empty() {
            return Err(ChatError::NoTemplate);
        }
        Ok(Self { variants })
    }

    /// One of our own templates; see [`builtin_names`](super::builtin_names).
    ///
    /// # Errors
    /// [`ChatError::NoSuchTemplate`] if there is none of this name.
    pub fn builtin(name: &str) -> Result<Self, ChatError> {
        Self::new(builtin::source(name).ok_or_else(|| ChatError::no_builtin(name))?)
    }

    /// The names of the templates, the usual one first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.variants.iter().map(|variant| variant.name.as_str())
    }

    /// The source of the template that conversations without tools are rendered with.
    pub fn source(&self) -> &str {
        // There is at least one, and none is asked for by name.
        self.variant(&ChatOptions::default())
            .map_or("", |variant| variant.source.as_str())
    }

    /// Whether the template tells the model of tools that there are.
    pub fn tells_of_tools(&self) -> bool {
        let tool = serde_json::json!({
            "type": "function",
            "function": {
                "name": "SOMETOOL",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        });
        let options = ChatOptions {
            tools: vec![tool],
            // It may ask for the time, which does not matter here.
            now: Some(DateTime::ZERO),
            ..ChatOptions::default()
        };
        let messages = [Message::user("SOMETEXT")];
        let rendered = self.render(&messages, &options, &rendered::no_tokens());
        rendered.is_ok_and(|rendered| rendered.text.contains("SOMETOOL"))
    }

    /// All sources, one behind the other: what the model's conversations may have in them.
    pub(super) fn sources(&self) -> impl Iterator<Item = &str> {
        self.variants.iter().map(|variant| variant.source.as_str())
    }

    /// What the template makes of a conversation.
    ///
    /// # Errors
    /// [`ChatError::Refused`] if the template refuses the messages, in its own words; others if it does not get on with them, calls
    /// what is not there or does not end, if a part of a message is no text, or if there is nothing to continue.
    pub fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
        tokens: &ChatTokens,
    ) -> Result<Rendered, ChatError> {
        check(messages, options)?;
        let variant = self.variant(options)?;
        let (conversation, text) = variant.fitted(messages, options, tokens)?;
        let tokens = tokens.for_template(&variant.source);
        let marked = variant.marked(&conversation, &text, options, &tokens)?;
        Ok(Rendered { text, marked })
    }

    /// What the template writes behind an answer; `None` if it does not write answers.
    pub(super) fn behind_answer(&self, tokens: &ChatTokens) -> Option<String> {
        let answer = "ANSWERANSWER";
        let messages = [Message::user("QUESTION"), Message::assistant(answer)];
        let options = ChatOptions {
            add_generation_prompt: false,
            ..ChatOptions::default()
        };
        let text = self.render(&messages, &options, tokens).ok()?.text;
        Some(text.rsplit_once(answer)?.1.to_owned())
    }

    fn variant(&self, options: &ChatOptions) -> Result<&Variant, ChatError> {
        let named = |name: &str| self.variants.iter().find(|variant| variant.name == name);
        if let Some(name) = &options.template {
            return named(name).ok_or_else(|| ChatError::NoSuchTemplate {
                name: name.clone(),
                known: self.names().map(str::to_owned).collect(),
            });
        }
        let for_tools = named(TOOL_USE).filter(|_| !options.tools.is_empty());
        let usual = for_tools
            .or_else(|| named(DEFAULT))
            .or(self.variants.first());
        usual.ok_or(ChatError::NoTemplate)
    }
}

/// Refuses what no template can read.
fn check(messages: &[Message], options: &ChatOptions) -> Result<(), ChatError> {
    for message in messages {
        let Content::Parts(parts) = &message.content else {
            continue;
        };
        for part in parts {
            let kind = part.get("type").and_then(Json::as_str).unwrap_or("text");
            if kind != "text" || !part.get("text").is_some_and(Json::is_string) {
                return Err(ChatError::Part {
                    kind: kind.to_owned(),
                });
            }
        }
    }
    if options.continue_final_message && messages.last().is_none_or(|last| last.text().is_empty()) {
        return Err(ChatError::NothingToContinue);
    }
    Ok(())
}

/// A conversation as a template sees it.
struct Conversation {
    messages: Json,
    tools: Json,
    documents: Json,
    variables: Map<String, Json>,
    now: DateTime,
}

impl Conversation {
    fn new(messages: &[Message], options: &ChatOptions, fit: Fit) -> Self {
        let list = |items: &[Json]| match items {
            [] => Json::Null,
            items => Json::Array(items.to_vec()),
        };
        Self {
            messages: messages
                .iter()
                .map(|message| message.for_template(fit))
                .collect(),
            tools: list(&options.tools),
            documents: list(&options.documents),
            variables: options.variables.clone(),
            now: options
                .now
                .unwrap_or_else(|| jiff::ZonedDateTime::now().datetime()),
        }
    }

    /// All that somebody else than the template wrote: the messages, then the rest.
    fn values(&self) -> Vec<&Json> {
        let others = [&self.messages, &self.tools, &self.documents];
        others.into_iter().chain(self.variables.values()).collect()
    }

    /// The messages of the model itself.
    fn answers(&self) -> Vec<&Json> {
        let messages = self.messages.as_array().map_or(&[][..], Vec::as_slice);
        messages
            .iter()
            .filter(|message| is_answer(message))
            .collect()
    }

    /// The variables of the template, with texts marked where there is something to mark with.
    fn context(
        &self,
        options: &ChatOptions,
        tokens: &ChatTokens,
        marking: Option<Marking>,
    ) -> Value {
        let mark = |text: &str| match marking {
            Some(marking) => marking.apply(text),
            None => text.to_owned(),
        };
        // Only the model's own texts keep some control tokens whole.
        let strict = |text: &str| match marking {
            Some(marking) => Marking {
                spared: &[],
                ..marking
            }
            .apply(text),
            None => text.to_owned(),
        };
        let messages = self.messages.as_array().map_or(&[][..], Vec::as_slice);
        let messages = messages.iter().map(|message| match is_answer(message) {
            true => to_value(message, &mark),
            false => to_value(message, &strict),
        });
        let now = self.now;
        let clock = Value::from_function(move |format: String| {
            jiff::fmt::strtime::format(&format, now).map_err(|error| {
                Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: {error}"),
                )
            })
        });
        let ours = [
            ("messages", messages.collect::<Vec<Value>>().into()),
            ("tools", to_value(&self.tools, &strict)),
            ("documents", to_value(&self.documents, &strict)),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt && !options.continue_final_message),
            ),
            ("strftime_now", clock),
        ];
        let mut pairs: Vec<(String, Value)> = Vec::new();
        pairs.extend(ours.map(|(name, value)| (name.to_owned(), value)));
        let named = [("bos_token", &tokens.bos), ("eos_token", &tokens.eos)];
        pairs.extend(
            named
                .into_iter()
                .filter_map(|(name, text)| Some((name.to_owned(), Value::from(text.as_deref()?)))),
        );
        let variables = self.variables.iter();
        pairs.extend(variables.map(|(name, value)| (name.clone(), to_value(value, &strict))));
        pairs.extend(marking.map(|marking| {
            (
                python::MARK.to_owned(),
                Value::from(marking.mark.to_string()),
            )
        }));
        Value::from_pairs(pairs)
    }
}

fn is_answer(message: &Json) -> bool {
    message.get("role").and_then(Json::as_str) == Some("assistant")
}

/// A value for the template, its texts and keys as `text` gives them.
fn to_value(value: &Json, text: &impl Fn(&str) -> String) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Value::from(number),
            (_, Some(number), _) => Value::from(number),
            (_, _, number) => Value::from(number.unwrap_or(f64::NAN)),
        },
        Json::String(string) => Value::from(text(string)),
        Json::Array(items) => items.iter().map(|item| to_value(item, text)).collect(),
        Json::Object(map) => Value::from_pairs(
            map.iter()
                .map(|(key, value)| (text(key), to_value(value, text))),
        ),
    }
}

impl Variant {
    fn compile(name: String, source: String) -> Result<Self, ChatError> {
        let mut environment = jinja::environment();
        let mut variant = Self {
            texts: true,
            parts: false,
            name,
            source,
            environment: Environment::empty(),
        };
        let compiled = environment.add_template_owned(NAME, jinja::source(&variant.source));
        compiled.map_err(|error| ChatError::from_jinja(&variant.title(), &error))?;
        variant.environment = environment;
        variant.texts = variant.shows(&Content::from("SOMETEXT"));
        let part = serde_json::json!({"type": "text", "text": "SOMETEXT"});
        if let Json::Object(part) = part {
            variant.parts = variant.shows(&Content::Parts(vec![part]));
        }
        Ok(variant)
    }

    /// What errors call the template.
    fn title(&self) -> String {
        match self.name.as_str() {
            DEFAULT => "the chat template".to_owned(),
            name => format!("the chat template {name:?}"),
        }
    }

    /// Whether the text of a message with this content appears, and nothing of how it is stored.
    fn shows(&self, content: &Content) -> bool {
        let message = Message {
            content: content.clone(),
            ..Message::user("")
        };
        let options = ChatOptions {
            // It may ask for the time, which does not matter here.
            now: Some(DateTime::ZERO),
            ..ChatOptions::default()
        };
        let conversation = Conversation::new(&[message], &options, Fit::default());
        let text = self.run(&conversation, &options, &rendered::no_tokens(), None);
        text.is_ok_and(|text| {
            text.contains("SOMETEXT")
                && !text.contains("'SOMETEXT'")
                && !text.contains("\"SOMETEXT\"")
        })
    }

    /// The conversation in a form that the template can read, and what it makes of it.
    ///
    /// # Errors
    /// If it can read none; the error is that of the usual form.
    fn fitted(
        &self,
        messages: &[Message],
        options: &ChatOptions,
        tokens: &ChatTokens,
    ) -> Result<(Conversation, String), ChatError> {
        let usual = Fit {
            join_parts: !self.parts,
            make_parts: !self.texts && self.parts,
            ..Fit::default()
        };
        let mut first = None;
        let calls = messages
            .iter()
            .any(|message| !message.tool_calls.is_empty());
        for (text_arguments, empty_content) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let fit = Fit {
                text_arguments,
                empty_content,
                ..usual
            };
            let conversation = Conversation::new(messages, options, fit);
            match self.render(&conversation, options, tokens, None) {
                Ok(text) => return Ok((conversation, text)),
                Err(error) if !calls || matches!(error, ChatError::Endless { .. }) => {
                    return Err(error);
                }
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or(ChatError::NoTemplate))
    }

    /// The text with marks in what the template did not write, and the mark; `None` where there is nothing to mark.
    fn marked(
        &self,
        conversation: &Conversation,
        text: &str,
        options: &ChatOptions,
        tokens: &ChatTokens,
    ) -> Result<Option<(String, char)>, ChatError> {
        let keys = Json::Object(conversation.variables.clone());
        let mut values = conversation.values();
        values.push(&keys);
        if !marks::needed(tokens, &values) {
            return Ok(None);
        }
        let mark = marks::free(&values, &self.source).ok_or(ChatError::NoMark)?;
        let render = |spared: &[String]| {
            let marking = Marking {
                tokens,
                mark,
                spared,
            };
            self.render(conversation, options, tokens, Some(marking))
        };
        let same = |marked: &Result<String, ChatError>| {
            marked
                .as_ref()
                .is_ok_and(|marked| marked.replace(mark, "") == text)
        };
        let marked = render(&tokens.markers);
        if same(&marked) {
            return Ok(Some((marked?, mark)));
        }
        // The template looks for some of these tokens in the model's own messages, as for the end of its reasoning.
        let mut spelt = marks::spelt(tokens, &conversation.answers());
        spelt.retain(|text| !tokens.markers.contains(text));
        let mut spared = tokens.markers.clone();
        for one in spelt.iter().take(MAX_TRIED) {
            let others = spelt.iter().filter(|other| *other != one);
            let others: Vec<String> = others.chain(&tokens.markers).cloned().collect();
            if !same(&render(&others)) {
                spared.push(one.clone());
            }
        }
        Ok(Some((render(&spared)?, mark)))
    }

    /// What the template makes of a conversation, cut behind the last message if that is to be continued.
    fn render(
        &self,
        conversation: &Conversation,
        options: &ChatOptions,
        tokens: &ChatTokens,
        marking: Option<Marking>,
    ) -> Result<String, ChatError> {
        if !options.continue_final_message {
            return self.run(conversation, options, tokens, marking);
        }
        let keys = Json::Object(conversation.variables.clone());
        let mut values = conversation.values();
        values.push(&keys);
        let mark = marking.map(|marking| marking.mark.to_string());
        let taken = self.source.clone() + &mark.unwrap_or_default();
        let tag = marks::free(&values, &taken).ok_or(ChatError::NoMark)?;
        // The blank tells whether the template trims what it is given.
        let tagged = conversation.with_tag(&format!("{tag} "))?;
        let text = self.run(&tagged, options, tokens, marking)?;
        let (before, behind) = text.rsplit_once(tag).ok_or(ChatError::LostMessage)?;
        Ok(match behind.starts_with(' ') {
            true => before.to_owned(),
            false => before.trim_end_matches(python::is_space).to_owned(),
        })
    }

    fn run(
        &self,
        conversation: &Conversation,
        options: &ChatOptions,
        tokens: &ChatTokens,
        marking: Option<Marking>,
    ) -> Result<String, ChatError> {
        let context = conversation.context(options, tokens, marking);
        let template = self.environment.get_template(NAME);
        let text = template.and_then(|template| template.render(context));
        text.map_err(|error| ChatError::from_jinja(&self.title(), &error))
    }
}

impl Conversation {
    /// The same with a text behind the last message's own, or behind the last of its parts.
    fn with_tag(&self, tag: &str) -> Result<Self, ChatError> {
        let mut messages = self.messages.clone();
        let last = messages
            .as_array_mut()
            .and_then(|messages| messages.last_mut());
        let content = last.and_then(|message| message.get_mut("content"));
        let text = match content {
            Some(Json::Array(parts)) => parts.last_mut().and_then(|part| part.get_mut("text")),
            content => content,
        };
        match text {
            Some(Json::String(text)) => text.push_str(tag),
            _ => return Err(ChatError::NothingToContinue),
        }
        Ok(Self {
            messages,
            tools: self.tools.clone(),
            documents: self.documents.clone(),
            variables: self.variables.clone(),
            now: self.now,
        })
    }
}
