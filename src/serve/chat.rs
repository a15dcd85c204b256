//! `POST /v1/chat/completions`

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::answers::{Answers, Said, finish_reason, timings, timings_so_far};
use super::body::Body;
use super::error::ApiError;
use super::sampling::{self, MOST_ALTERNATIVES, SamplingFields};
use super::{App, Model, now, unique};
use crate::chat::{AnswerParser, ChatOptions, Message, Piece, Rendered, ToolCall};
use crate::generate::{Grammar, Request, TokenLogprob};

/// What is asked in the form of a chat.
#[derive(Debug, Deserialize)]
pub(super) struct ChatFields {
    model: Option<String>,
    messages: Vec<Message>,
    #[serde(default)]
    tools: Vec<Value>,
    tool_choice: Option<Value>,
    response_format: Option<Value>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    /// As in llama.cpp: tell with each part of a stream how fast it comes.
    #[serde(default)]
    timings_per_token: bool,
    #[serde(default)]
    logprobs: bool,
    top_logprobs: Option<usize>,
    /// As in vLLM and llama.cpp: variables for the template, such as `enable_thinking`.
    #[serde(default)]
    chat_template_kwargs: Map<String, Value>,
    /// Whether the answer follows; in vLLM and transformers one may go on with the last message instead.
    add_generation_prompt: Option<bool>,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(flatten)]
    sampling: SamplingFields,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
pub(super) struct StreamOptions {
    #[serde(default)]
    pub include_usage: bool,
}

/// Which tools an answer may or must call.
#[derive(Debug, Clone, PartialEq)]
enum ToolChoice {
    None,
    Auto,
    /// One of all tools, or the one of this name.
    Required(Option<String>),
}

impl ChatFields {
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn tool_choice(&self) -> Result<ToolChoice, ApiError> {
        let wrong = || {
            ApiError::field(
                "tool_choice",
                "must be none, auto, required, or {\"type\": \"function\", \"function\": {\"name\"}}",
            )
        };
        let choice = match &self.tool_choice {
            None | Some(Value::Null) => ToolChoice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => ToolChoice::None,
                "auto" => ToolChoice::Auto,
                "required" => ToolChoice::Required(None),
                _ => return Err(wrong()),
            },
            Some(object) => {
                let name = object.pointer("/function/name").and_then(Value::as_str);
                let name = name.ok_or_else(wrong)?;
                let known = |tool: &Value| {
                    tool.pointer("/function/name").and_then(Value::as_str) == Some(name)
                };
                if !self.tools.iter().any(known) {
                    return Err(ApiError::field(
                        "tool_choice",
                        format!("no tool is called {name}"),
                    ));
                }
                ToolChoice::Required(Some(name.to_owned()))
            }
        };
        if self.tools.is_empty() && matches!(choice, ToolChoice::Required(_)) {
            return Err(ApiError::field(
                "tools",
                "a tool must be called, but there are none",
            ));
        }
        Ok(choice)
    }

    /// The chat as the model's template writes it.
    pub fn render(&self, model: &Model) -> Result<Rendered, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field("messages", "there are no messages"));
        }
        let tools = match self.tool_choice()? {
            ToolChoice::None => Vec::new(),
            _ => self.tools.clone(),
        };
        let options = ChatOptions {
            add_generation_prompt: self
                .add_generation_prompt
                .unwrap_or(!self.continue_final_message),
            continue_final_message: self.continue_final_message,
            tools,
            variables: self.chat_template_kwargs.clone(),
            ..ChatOptions::default()
        };
        model.render(&self.messages, &options)
    }

    /// What the answer must look like; `None` for any text.
    fn grammar(&self, model: &Model) -> Result<Option<Grammar>, ApiError> {
        if let ToolChoice::Required(name) = self.tool_choice()? {
            let chosen = |tool: &&Value| {
                let own = tool.pointer("/function/name").and_then(Value::as_str);
                name.is_none() || own == name.as_deref()
            };
            let tools: Vec<Value> = self.tools.iter().filter(chosen).cloned().collect();
            return model.tool_call(&tools).map(Some);
        }
        match sampling::schema(self.response_format.as_ref())? {
            Some(schema) => model.json_schema(&schema).map(Some),
            None => Ok(None),
        }
    }
}

/// A chat that is about to be answered.
struct Chat {
    requests: Vec<Request>,
    parser: AnswerParser,
    prompt_tokens: usize,
    logprobs: bool,
}

/// Makes requests of the fields.
async fn prepare(fields: &ChatFields, model: &Model) -> Result<Chat, ApiError> {
    let rendered = fields.render(model)?;
    let parser = AnswerParser::new(&model.style, &rendered, !fields.tools.is_empty());
    let prompt = model.tokens_of(rendered).await?;
    let asked = fields.max_completion_tokens.or(fields.max_tokens);
    let max_tokens = sampling::answer_tokens(asked, prompt.len(), model.context)?;
    let alternatives = fields.top_logprobs.unwrap_or(0);
    if alternatives > MOST_ALTERNATIVES {
        return Err(ApiError::field(
            "top_logprobs",
            format!("at most {MOST_ALTERNATIVES} alternatives can be told"),
        ));
    }
    let request = Request {
        max_tokens,
        grammar: fields.grammar(model)?,
        logprobs: fields.logprobs.then_some(alternatives),
        ..Request::new(prompt)
    };
    let sampling = fields.sampling.clone().read(model)?;
    Ok(Chat {
        prompt_tokens: request.prompt.len(),
        requests: sampling.requests(&request),
        parser,
        logprobs: fields.logprobs,
    })
}

pub(super) async fn complete(
    State(app): State<Arc<App>>,
    Body(fields): Body<ChatFields>,
) -> Result<Response, ApiError> {
    let (number, model) = app.model(fields.model());
    let chat = prepare(&fields, model).await?;
    let choices = chat.requests.len();
    let answers = Answers::begin(&app, number, chat.requests, Some(&chat.parser))?;
    let shape = Shape {
        id: unique("chatcmpl-"),
        created: now(),
        model: model.name.clone(),
        prompt_tokens: chat.prompt_tokens,
        logprobs: chat.logprobs,
        timings: fields.timings_per_token,
        tokens: TokenTexts(model.tokenizer.clone()),
    };
    match fields.stream {
        true => {
            let usage = fields.stream_options.unwrap_or_default().include_usage;
            Ok(shape.stream(answers, choices, usage).into_response())
        }
        false => Ok(shape.whole(answers, choices).await?.into_response()),
    }
}

/// What all objects of one answer have in common.
struct Shape {
    id: String,
    created: u64,
    model: String,
    prompt_tokens: usize,
    logprobs: bool,
    /// Whether parts of a stream tell how fast they come.
    timings: bool,
    tokens: TokenTexts,
}

/// The texts of tokens, for those that are told one by one.
#[derive(Clone)]
pub(super) struct TokenTexts(pub Arc<crate::tokenize::Tokenizer>);

impl TokenTexts {
    /// A token with its log-probability, as chats tell it.
    fn scored(&self, scored: &TokenLogprob) -> Value {
        let one = |token: u32, logprob: f32| {
            let bytes = self.0.token_bytes(token);
            json!({
                "token": String::from_utf8_lossy(bytes),
                "logprob": logprob,
                "bytes": bytes,
            })
        };
        let mut value = one(scored.token, scored.logprob);
        let others = scored.top.iter().map(|(t, l)| one(*t, *l));
        value["top_logprobs"] = others.collect();
        value
    }
}

/// A call of a tool, as it is told.
fn tool_call(index: Option<usize>, call: &ToolCall) -> Value {
    let mut value = json!({
        "id": unique("call_"),
        "type": "function",
        "function": { "name": call.function.name, "arguments": call.function.arguments_text() },
    });
    if let Some(index) = index {
        value["index"] = json!(index);
    }
    value
}

/// One answer, as far as it has come.
#[derive(Default)]
struct Whole {
    text: String,
    reasoning: String,
    calls: Vec<Value>,
    scored: Vec<Value>,
    end: Option<(&'static str, Value)>,
    tokens: usize,
}

impl Shape {
    fn usage(&self, tokens: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        })
    }

    /// The whole answer at once.
    async fn whole(&self, mut answers: Answers, choices: usize) -> Result<Json<Value>, ApiError> {
        let mut made: Vec<Whole> = (0..choices).map(|_| Whole::default()).collect();
        while let Some(said) = answers.next().await? {
            match said {
                // Chats do not tell what their prompt is worth.
                Said::Prompt { .. } => {}
                Said::Parts {
                    choice,
                    parts,
                    scored,
                    ..
                } => {
                    let whole = &mut made[choice];
                    for part in parts {
                        match part {
                            Piece::Text(text) => whole.text += &text,
                            Piece::Reasoning(text) => whole.reasoning += &text,
                            Piece::Call(call) => whole.calls.push(tool_call(None, &call)),
                        }
                    }
                    whole
                        .scored
                        .extend(scored.iter().map(|s| self.tokens.scored(s)));
                }
                Said::Ended { choice, generated } => {
                    let whole = &mut made[choice];
                    let reason = finish_reason(generated.finish, !whole.calls.is_empty());
                    whole.end = Some((reason, timings(&generated)));
                    whole.tokens = generated.tokens.len();
                }
            }
        }
        let tokens = made.iter().map(|whole| whole.tokens).sum();
        let speeds = made.first().and_then(|whole| whole.end.clone());
        let choice = |(index, whole): (usize, Whole)| {
            let mut message = json!({ "role": "assistant", "content": whole.text });
            if !whole.reasoning.is_empty() {
                message["reasoning_content"] = json!(whole.reasoning);
            }
            if !whole.calls.is_empty() {
                if whole.text.is_empty() {
                    message["content"] = Value::Null;
                }
                message["tool_calls"] = json!(whole.calls);
            }
            let logprobs = self.logprobs.then(|| json!({ "content": whole.scored }));
            json!({
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": whole.end.map(|(reason, _)| reason),
            })
        };
        Ok(Json(json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": made.into_iter().enumerate().map(choice).collect::<Vec<_>>(),
            "usage": self.usage(tokens),
            "timings": speeds.map(|(_, timings)| timings),
        })))
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    /// A chunk for one of the answers.
    fn delta(&self, index: usize, delta: Value, reason: Option<&str>) -> Value {
        self.chunk(json!([{
            "index": index,
            "delta": delta,
            "logprobs": null,
            "finish_reason": reason,
        }]))
    }

    /// The answer in chunks, as they become known.
    fn stream(self, mut answers: Answers, choices: usize, usage: bool) -> impl IntoResponse {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            let send = |value: Value| sender.send(value.to_string()).is_ok();
            for index in 0..choices {
                send(self.delta(index, json!({ "role": "assistant", "content": "" }), None));
            }
            let (mut tokens, mut calls) = (0, vec![0; choices]);
            loop {
                // A client that left is noticed at once, and takes its answers with it.
                let said = tokio::select! {
                    said = answers.next() => said,
                    () = sender.closed() => return,
                };
                match said {
                    Ok(None) => break,
                    Ok(Some(said)) => self.tell(said, &mut calls, &mut tokens, &send),
                    Err(error) => {
                        send(error.json());
                        return;
                    }
                }
            }
            if usage {
                let mut chunk = self.chunk(json!([]));
                chunk["usage"] = self.usage(tokens);
                send(chunk);
            }
            let _ = sender.send("[DONE]".to_owned());
        });
        events(receiver)
    }

    fn tell(
        &self,
        said: Said,
        calls: &mut [usize],
        tokens: &mut usize,
        send: &impl Fn(Value) -> bool,
    ) {
        match said {
            Said::Prompt { .. } => {}
            Said::Parts {
                choice,
                parts,
                scored,
                timings,
            } => {
                let timings = timings.filter(|_| self.timings);
                let mut deltas: Vec<Value> = parts
                    .into_iter()
                    .map(|part| match part {
                        Piece::Text(text) => json!({ "content": text }),
                        Piece::Reasoning(text) => json!({ "reasoning_content": text }),
                        Piece::Call(call) => {
                            calls[choice] += 1;
                            json!({ "tool_calls": [tool_call(Some(calls[choice] - 1), &call)] })
                        }
                    })
                    .collect();
                if deltas.is_empty() {
                    deltas.push(json!({}));
                }
                let mut scored = Some(scored).filter(|scored| !scored.is_empty());
                for delta in deltas {
                    let mut chunk = self.delta(choice, delta, None);
                    if let Some(scored) = scored.take() {
                        let told: Vec<Value> =
                            scored.iter().map(|s| self.tokens.scored(s)).collect();
                        chunk["choices"][0]["logprobs"] = json!({ "content": told });
                    }
                    if let Some(timings) = &timings {
                        chunk["timings"] = timings_so_far(timings);
                    }
                    send(chunk);
                }
            }
            Said::Ended { choice, generated } => {
                *tokens += generated.tokens.len();
                let reason = finish_reason(generated.finish, calls[choice] > 0);
                let mut chunk = self.delta(choice, json!({}), Some(reason));
                chunk["timings"] = timings(&generated);
                send(chunk);
            }
        }
    }
}

/// Server-sent events of texts.
pub(super) fn events(receiver: tokio::sync::mpsc::UnboundedReceiver<String>) -> impl IntoResponse {
    let stream = UnboundedReceiverStream::new(receiver);
    let stream = stream.map(|text| Ok::<_, Infallible>(Event::default().data(text)));
    Sse::new(stream).keep_alive(KeepAlive::default())
}
