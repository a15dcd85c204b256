//! What clients of Ollama need of its interface: chats and texts in lines of JSON, and what models there are.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::answers::{Answers, Said};
use super::body::{Body, OneOrMany};
use super::error::ApiError;
use super::sampling::{self, SamplingFields};
use super::{App, Model, embeddings, timestamp};
use crate::chat::{AnswerParser, ChatOptions, Message, Piece, ToolCall};
use crate::generate::{Finish, Generated, Grammar, Request};

/// What both ways to ask have in common.
#[derive(Debug, Default, Deserialize)]
struct Common {
    model: Option<String>,
    stream: Option<bool>,
    #[serde(default)]
    options: Map<String, Value>,
    /// `"json"`, or a schema.
    format: Option<Value>,
    think: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ChatFields {
    #[serde(default)]
    messages: Vec<Message>,
    #[serde(default)]
    tools: Vec<Value>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Debug, Deserialize)]
pub(super) struct GenerateFields {
    #[serde(default)]
    prompt: String,
    system: Option<String>,
    /// Text as it stands, without a template.
    #[serde(default)]
    raw: bool,
    suffix: Option<String>,
    #[serde(flatten)]
    common: Common,
}

/// A request that is ready to be answered.
struct Ready {
    request: Request,
    parser: Option<AnswerParser>,
}

/// In which form an answer is told.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Chat,
    Text,
}

/// `POST /api/chat`
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    body: Result<Body<ChatFields>, ApiError>,
) -> Response {
    let answer = async {
        let Body(fields) = body?;
        let (number, model) = app.model(fields.common.model.as_deref());
        if fields.messages.is_empty() {
            return Ok(loaded(model, Form::Chat));
        }
        let ready = of_messages(model, &fields.messages, fields.tools, &fields.common).await?;
        answer(&app, number, model, ready, &fields.common, Form::Chat).await
    };
    answer.await.unwrap_or_else(ApiError::for_ollama)
}

/// `POST /api/generate`
pub(super) async fn generate(
    State(app): State<Arc<App>>,
    body: Result<Body<GenerateFields>, ApiError>,
) -> Response {
    let answer = async {
        let Body(fields) = body?;
        let (number, model) = app.model(fields.common.model.as_deref());
        if fields.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::field(
                "suffix",
                "text is only completed at its end here",
            ));
        }
        if fields.prompt.is_empty() {
            return Ok(loaded(model, Form::Text));
        }
        let ready = match fields.raw || model.template.is_none() {
            true => Ready {
                // Whoever sends text as it stands has written it as the template would, control tokens and all.
                request: Request::new(model.encode(fields.prompt, true, true).await?),
                parser: None,
            },
            false => {
                let system = fields.system.map(|text| Message::new("system", text));
                let messages: Vec<Message> = system
                    .into_iter()
                    .chain([Message::new("user", fields.prompt)])
                    .collect();
                of_messages(model, &messages, Vec::new(), &fields.common).await?
            }
        };
        answer(&app, number, model, ready, &fields.common, Form::Text).await
    };
    answer.await.unwrap_or_else(ApiError::for_ollama)
}

async fn of_messages(
    model: &Model,
    messages: &[Message],
    tools: Vec<Value>,
    common: &Common,
) -> Result<Ready, ApiError> {
    let with_tools = !tools.is_empty();
    let mut options = ChatOptions {
        tools,
        ..ChatOptions::default()
    };
    if let Some(think) = &common.think {
        options
            .variables
            .insert("enable_thinking".to_owned(), think.clone());
    }
    let rendered = model.render(messages, &options)?;
    let parser = AnswerParser::new(&model.style, &rendered, with_tools);
    Ok(Ready {
        request: Request::new(model.tokens_of(rendered).await?),
        parser: Some(parser),
    })
}

/// What the answer must look like; `None` for any text.
fn grammar(model: &Model, format: Option<&Value>) -> Result<Option<Grammar>, ApiError> {
    match format {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(word)) if word.is_empty() => Ok(None),
        Some(Value::String(word)) if word == "json" => {
            model.json_schema(&json!({ "type": "object" })).map(Some)
        }
        Some(schema @ Value::Object(_)) => model.json_schema(schema).map(Some),
        Some(_) => Err(ApiError::field("format", "must be \"json\" or a schema")),
    }
}

async fn answer(
    app: &App,
    number: usize,
    model: &Model,
    ready: Ready,
    common: &Common,
    form: Form,
) -> Result<Response, ApiError> {
    let begin = Instant::now();
    let Ready {
        mut request,
        parser,
    } = ready;
    let asked = common.options.get("num_predict").and_then(Value::as_i64);
    // −1 and −2 are Ollama's ways to say that there is no limit.
    let asked = asked.filter(|n| *n >= 0);
    request.max_tokens = sampling::answer_tokens(asked, request.prompt.len(), model.context)?;
    request.grammar = grammar(model, common.format.as_ref())?;
    let fields: SamplingFields = serde_json::from_value(Value::Object(common.options.clone()))
        .map_err(|error| ApiError::field("options", format!("options: {error}")))?;
    let sampling = fields.read(model)?;
    let requests = sampling.requests(&request);
    let mut answers = Answers::begin(app, number, requests, parser.as_ref())?;
    let shape = Shape {
        model: model.name.clone(),
        form,
        begin,
    };
    if common.stream == Some(false) {
        let mut whole = Whole::default();
        let mut end = None;
        while let Some(said) = answers.next().await? {
            match said {
                Said::Parts { parts, .. } => parts.into_iter().for_each(|part| whole.take(part)),
                Said::Ended { generated, .. } => end = Some(generated),
                Said::Prompt { .. } => {}
            }
        }
        let end = end.ok_or_else(ApiError::stopping)?;
        return Ok(Json(shape.ended(&whole, &end)).into_response());
    }
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel::<String>();
    tokio::spawn(async move {
        let send = |value: Value| {
            let _ = sender.send(format!("{value}\n"));
        };
        loop {
            let said = tokio::select! {
                said = answers.next() => said,
                () = sender.closed() => return,
            };
            match said {
                Ok(None) => return,
                Ok(Some(Said::Parts { parts, .. })) => {
                    let mut whole = Whole::default();
                    parts.into_iter().for_each(|part| whole.take(part));
                    send(shape.piece(&whole));
                }
                Ok(Some(Said::Ended { generated, .. })) => {
                    send(shape.ended(&Whole::default(), &generated));
                }
                Ok(Some(Said::Prompt { .. })) => {}
                Err(error) => return send(json!({ "error": error.body.message })),
            }
        }
    });
    let lines = UnboundedReceiverStream::new(receiver).map(Ok::<_, std::convert::Infallible>);
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, HttpBody::from_stream(lines)).into_response())
}

/// The answer to nothing, by which clients have a model loaded.
fn loaded(model: &Model, form: Form) -> Response {
    let shape = Shape {
        model: model.name.clone(),
        form,
        begin: Instant::now(),
    };
    let mut object = shape.piece(&Whole::default());
    object["done"] = json!(true);
    object["done_reason"] = json!("load");
    Json(object).into_response()
}

/// What was said, as far as it goes into one object.
#[derive(Default)]
struct Whole {
    text: String,
    reasoning: String,
    calls: Vec<Value>,
}

impl Whole {
    fn take(&mut self, part: Piece) {
        match part {
            Piece::Text(text) => self.text += &text,
            Piece::Reasoning(text) => self.reasoning += &text,
            Piece::Call(call) => self.calls.push(tool_call(&call)),
        }
    }
}

/// A call of a tool, whose arguments are an object here.
fn tool_call(call: &ToolCall) -> Value {
    json!({ "function": { "name": call.function.name, "arguments": call.function.arguments() } })
}

struct Shape {
    model: String,
    form: Form,
    begin: Instant,
}

impl Shape {
    fn piece(&self, whole: &Whole) -> Value {
        let mut object = json!({
            "model": self.model,
            "created_at": timestamp(),
            "done": false,
        });
        match self.form {
            Form::Text => {
                object["response"] = json!(whole.text);
                if !whole.reasoning.is_empty() {
                    object["thinking"] = json!(whole.reasoning);
                }
            }
            Form::Chat => {
                let mut message = json!({ "role": "assistant", "content": whole.text });
                if !whole.reasoning.is_empty() {
                    message["thinking"] = json!(whole.reasoning);
                }
                if !whole.calls.is_empty() {
                    message["tool_calls"] = json!(whole.calls);
                }
                object["message"] = message;
            }
        }
        object
    }

    fn ended(&self, whole: &Whole, generated: &Generated) -> Value {
        let nanoseconds = |time: Duration| time.as_nanos() as u64;
        let timings = generated.timings;
        let reason = match generated.finish {
            Finish::Length | Finish::ContextFull => "length",
            _ => "stop",
        };
        let mut object = self.piece(whole);
        let end = json!({
            "done": true,
            "done_reason": reason,
            "total_duration": nanoseconds(self.begin.elapsed()),
            "load_duration": 0,
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": nanoseconds(timings.prompt),
            "eval_count": generated.tokens.len(),
            "eval_duration": nanoseconds(timings.generation),
        });
        if let (Value::Object(object), Value::Object(end)) = (&mut object, end) {
            object.extend(end);
        }
        object
    }
}

/// `GET /api/tags`
pub(super) async fn tags(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.models.iter().map(Model::tag).collect();
    Json(json!({ "models": models }))
}

/// `GET /api/ps`: what is in memory, which is all.
pub(super) async fn running(State(app): State<Arc<App>>) -> Json<Value> {
    let running = |model: &Model| {
        let mut object = model.tag();
        object["size_vram"] = json!(0);
        object["context_length"] = json!(model.context);
        // Nothing is ever taken out of memory.
        object["expires_at"] = json!("9999-12-31T23:59:59Z");
        object
    };
    let models: Vec<Value> = app.models.iter().map(running).collect();
    Json(json!({ "models": models }))
}

#[derive(Debug, Deserialize)]
pub(super) struct EmbedFields {
    model: Option<String>,
    input: OneOrMany<String>,
    /// Whether texts beyond the context are cut; they are refused otherwise.
    truncate: Option<bool>,
}

/// `POST /api/embed`
pub(super) async fn embed(
    State(app): State<Arc<App>>,
    body: Result<Body<EmbedFields>, ApiError>,
) -> Response {
    let answer = async {
        let begin = Instant::now();
        let Body(fields) = body?;
        let (number, model) = app.model(fields.model.as_deref());
        let mut prompts = Vec::new();
        for text in fields.input.into_vec() {
            let mut tokens = model.encode(text, true, false).await?;
            if fields.truncate != Some(false) {
                tokens.truncate(model.context);
            }
            prompts.push(tokens);
        }
        let count: usize = prompts.iter().map(Vec::len).sum();
        let embeddings = embeddings::all(&app, number, prompts).await?;
        Ok(Json(json!({
            "model": model.name,
            "embeddings": embeddings,
            "total_duration": begin.elapsed().as_nanos() as u64,
            "load_duration": 0,
            "prompt_eval_count": count,
        }))
        .into_response())
    };
    answer.await.unwrap_or_else(ApiError::for_ollama)
}

#[derive(Debug, Deserialize)]
pub(super) struct EmbedOneFields {
    model: Option<String>,
    prompt: String,
}

/// `POST /api/embeddings`, which older clients use.
pub(super) async fn embed_one(
    State(app): State<Arc<App>>,
    body: Result<Body<EmbedOneFields>, ApiError>,
) -> Response {
    let answer = async {
        let Body(fields) = body?;
        let (number, model) = app.model(fields.model.as_deref());
        let mut tokens = model.encode(fields.prompt, true, false).await?;
        tokens.truncate(model.context);
        let embeddings = embeddings::all(&app, number, vec![tokens]).await?;
        Ok(Json(json!({ "embedding": embeddings.into_iter().next() })).into_response())
    };
    answer.await.unwrap_or_else(ApiError::for_ollama)
}

#[derive(Debug, Deserialize)]
pub(super) struct ShowFields {
    #[serde(alias = "name")]
    model: Option<String>,
}

/// `POST /api/show`
pub(super) async fn show(
    State(app): State<Arc<App>>,
    body: Result<Body<ShowFields>, ApiError>,
) -> Response {
    let Body(fields) = match body {
        Ok(fields) => fields,
        Err(error) => return error.for_ollama(),
    };
    let (_, model) = app.model(fields.model.as_deref());
    let mut object = model.tag();
    object["template"] = json!(model.template.as_ref().map(|template| template.source()));
    object["capabilities"] = json!(model.capabilities());
    let own = |key: &str| format!("{}.{key}", model.architecture);
    object["model_info"] = json!({
        "general.architecture": model.architecture,
        "general.parameter_count": model.state().report.parameters,
        own("context_length"): model.trained_context,
        own("embedding_length"): model.embedding_length,
    });
    Json(object).into_response()
}

/// `GET /api/version`
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

impl Model {
    /// What clients can ask for. Tools are none where the template does not tell the model of them, or where it is not known how it
    /// calls them.
    fn capabilities(&self) -> Vec<&'static str> {
        let template = self.template.as_deref();
        let tools = self.style.tools.is_some() && template.is_some_and(|t| t.tells_of_tools());
        let tools = tools.then_some("tools");
        ["completion"].into_iter().chain(tools).collect()
    }

    fn tag(&self) -> Value {
        let state = self.state();
        json!({
            "name": self.name,
            "model": self.name,
            "modified_at": timestamp(),
            "size": state.report.bytes,
            "digest": "",
            "details": {
                "format": "gguf",
                "family": self.architecture,
                "families": [self.architecture],
                "parameter_size": format!("{:.1}M", state.report.parameters as f64 / 1e6),
                "quantization_level": "",
            },
        })
    }
}
