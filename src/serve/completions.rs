//! `POST /v1/completions`: text as it stands, and what its tokens are worth. What `lm-eval` asks of it: prompts as token ids,
//! `echo` with `logprobs`, and the generated token among them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answers::{Answers, Said, finish_reason, timings};
use super::body::Body;
use super::chat::{StreamOptions, events};
use super::error::ApiError;
use super::sampling::{self, MOST_ALTERNATIVES, SamplingFields};
use super::{App, Model, now, unique};
use crate::chat::Piece;
use crate::generate::{Request, TokenLogprob};
use crate::tokenize::Tokenizer;

/// Answers that one request may ask for, over all its prompts.
const MOST_ANSWERS: usize = 1024;
/// Tokens of an answer where the request does not say, as with OpenAI.
const DEFAULT_TOKENS: i64 = 16;

/// Prompts, as text or as token ids.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Prompts {
    /// The tokens of each prompt. Text begins as the model's texts begin.
    ///
    /// # Errors
    /// If a text cannot be encoded, a token is not in the vocabulary, or a prompt is empty.
    pub async fn tokens(self, model: &Model) -> Result<Vec<Vec<u32>>, ApiError> {
        let (texts, many) = match self {
            Prompts::Text(text) => (vec![text], Vec::new()),
            Prompts::Texts(texts) => (texts, Vec::new()),
            Prompts::Tokens(tokens) => (Vec::new(), vec![tokens]),
            Prompts::ManyTokens(many) => (Vec::new(), many),
        };
        let mut all = many;
        for text in texts {
            all.push(model.encode(text, true, false).await?);
        }
        if all.is_empty() {
            return Err(ApiError::field("prompt", "there is no prompt"));
        }
        for (i, tokens) in all.iter_mut().enumerate() {
            model.check_tokens(tokens)?;
            if tokens.is_empty() {
                let first = model.tokenizer.bos().or(model.tokenizer.eos());
                let first = first
                    .ok_or_else(|| ApiError::field("prompt", format!("prompt {i} is empty")))?;
                tokens.push(first);
            }
        }
        Ok(all)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct CompletionFields {
    model: Option<String>,
    prompt: Prompts,
    #[serde(alias = "n_predict")]
    max_tokens: Option<i64>,
    #[serde(default)]
    echo: bool,
    logprobs: Option<Logprobs>,
    suffix: Option<String>,
    best_of: Option<usize>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    response_format: Option<Value>,
    /// As in llama.cpp: a grammar in GBNF.
    grammar: Option<String>,
    /// As in llama.cpp: a schema that the answer follows.
    json_schema: Option<Value>,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// How many alternatives are told of each token; some clients send a truth value.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Logprobs {
    Count(usize),
    Wanted(bool),
}

impl CompletionFields {
    /// `None` where nothing of the kind is asked for.
    fn alternatives(&self) -> Result<Option<usize>, ApiError> {
        match self.logprobs {
            None | Some(Logprobs::Wanted(false)) => Ok(None),
            Some(Logprobs::Wanted(true)) => Ok(Some(1)),
            Some(Logprobs::Count(n)) if n <= MOST_ALTERNATIVES => Ok(Some(n)),
            Some(Logprobs::Count(_)) => Err(ApiError::field(
                "logprobs",
                format!("at most {MOST_ALTERNATIVES} alternatives can be told"),
            )),
        }
    }
}

pub(super) async fn complete(
    State(app): State<Arc<App>>,
    Body(fields): Body<CompletionFields>,
) -> Result<Response, ApiError> {
    let (number, model) = app.model(fields.model.as_deref());
    if fields
        .suffix
        .as_ref()
        .is_some_and(|suffix| !suffix.is_empty())
    {
        return Err(ApiError::field(
            "suffix",
            "text is only completed at its end here",
        ));
    }
    let alternatives = fields.alternatives()?;
    let grammar = match (&fields.grammar, &fields.json_schema) {
        (Some(text), _) => Some(model.grammar(text)?),
        (None, Some(schema)) => Some(model.json_schema(schema)?),
        (None, None) => match sampling::schema(fields.response_format.as_ref())? {
            Some(schema) => Some(model.json_schema(&schema)?),
            None => None,
        },
    };
    let sampling = fields.sampling.read(model)?;
    if fields.best_of.is_some_and(|best| best != sampling.choices) {
        return Err(ApiError::field("best_of", "must be the same as n"));
    }
    let prompts = fields.prompt.tokens(model).await?;
    if prompts.len() * sampling.choices > MOST_ANSWERS {
        return Err(ApiError::field(
            "prompt",
            format!("at most {MOST_ANSWERS} answers can be asked for at once"),
        ));
    }
    let asked = fields.max_tokens.or(Some(DEFAULT_TOKENS));
    let mut requests = Vec::new();
    let mut made = Vec::new();
    for prompt in prompts {
        let max_tokens = sampling::answer_tokens(asked, prompt.len(), model.context)?;
        let request = Request {
            max_tokens,
            grammar: grammar.clone(),
            logprobs: alternatives,
            prompt_logprobs: alternatives.filter(|_| fields.echo),
            ..Request::new(prompt)
        };
        for request in sampling.requests(&request) {
            made.push(Made::of(&request, fields.echo, &model.tokenizer));
            requests.push(request);
        }
    }
    let answers = Answers::begin(&app, number, requests, None)?;
    let shape = Shape {
        id: unique("cmpl-"),
        created: now(),
        model: model.name.clone(),
        tokenizer: model.tokenizer.clone(),
        with_logprobs: alternatives.is_some(),
    };
    match fields.stream {
        true => {
            let usage = fields.stream_options.unwrap_or_default().include_usage;
            Ok(shape.stream(answers, made, usage).into_response())
        }
        false => Ok(shape.whole(answers, made).await?.into_response()),
    }
}

/// One answer, as far as it has come.
struct Made {
    /// The prompt, where it is told again.
    echo: Option<Vec<u32>>,
    prompt_tokens: usize,
    text: String,
    logprobs: LegacyLogprobs,
    end: Option<(&'static str, Value)>,
    tokens: usize,
}

impl Made {
    fn of(request: &Request, echo: bool, tokenizer: &Tokenizer) -> Self {
        Self {
            echo: echo.then(|| request.prompt.clone()),
            prompt_tokens: request.prompt.len(),
            text: match echo {
                true => tokenizer.decode(&request.prompt),
                false => String::new(),
            },
            logprobs: LegacyLogprobs::default(),
            end: None,
            tokens: 0,
        }
    }
}

/// What tokens are worth, in lists side by side.
#[derive(Default)]
struct LegacyLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
    /// Characters so far.
    length: usize,
}

impl LegacyLogprobs {
    fn push(&mut self, tokenizer: &Tokenizer, token: u32, scored: Option<&TokenLogprob>) {
        let text = |token: u32| String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned();
        let own = text(token);
        self.text_offset.push(self.length);
        self.length += own.chars().count();
        self.token_logprobs
            .push(scored.map(|scored| scored.logprob));
        let others = |scored: &TokenLogprob| {
            let mut top = Map::new();
            for (token, logprob) in &scored.top {
                // Tokens of half a character may look the same; the likeliest of them counts.
                top.entry(text(*token)).or_insert(json!(logprob));
            }
            top
        };
        self.top_logprobs.push(scored.map(others));
        self.tokens.push(own);
    }

    fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

struct Shape {
    id: String,
    created: u64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    with_logprobs: bool,
}

impl Shape {
    fn object(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    /// Notes what was said.
    fn note(&self, said: Said, made: &mut [Made]) {
        match said {
            Said::Prompt { choice, scored } => {
                let made = &mut made[choice];
                let prompt = made.echo.take().unwrap_or_default();
                // Nothing comes before the first token.
                let scored = std::iter::once(None).chain(scored.iter().map(Some));
                for (token, scored) in prompt.into_iter().zip(scored) {
                    made.logprobs.push(&self.tokenizer, token, scored);
                }
            }
            Said::Parts {
                choice,
                parts,
                scored,
            } => {
                let made = &mut made[choice];
                for part in parts {
                    if let Piece::Text(text) = part {
                        made.text += &text;
                    }
                }
                for scored in &scored {
                    made.logprobs
                        .push(&self.tokenizer, scored.token, Some(scored));
                }
            }
            Said::Ended { choice, generated } => {
                let made = &mut made[choice];
                made.end = Some((finish_reason(generated.finish, false), timings(&generated)));
                made.tokens = generated.tokens.len();
            }
        }
    }

    fn choice(&self, index: usize, made: &Made) -> Value {
        json!({
            "index": index,
            "text": made.text,
            "logprobs": self.with_logprobs.then(|| made.logprobs.json()),
            "finish_reason": made.end.as_ref().map(|(reason, _)| reason),
        })
    }

    fn usage(made: &[Made]) -> Value {
        let prompt: usize = made.iter().map(|made| made.prompt_tokens).sum();
        let tokens: usize = made.iter().map(|made| made.tokens).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
        })
    }

    async fn whole(
        &self,
        mut answers: Answers,
        mut made: Vec<Made>,
    ) -> Result<Json<Value>, ApiError> {
        while let Some(said) = answers.next().await? {
            self.note(said, &mut made);
        }
        let choices = made
            .iter()
            .enumerate()
            .map(|(i, made)| self.choice(i, made));
        let mut object = self.object(choices.collect());
        object["usage"] = Self::usage(&made);
        let first = made.first().and_then(|made| made.end.as_ref());
        object["timings"] = json!(first.map(|(_, timings)| timings));
        Ok(Json(object))
    }

    fn stream(self, mut answers: Answers, mut made: Vec<Made>, usage: bool) -> impl IntoResponse {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            let send = |value: Value| {
                let _ = sender.send(value.to_string());
            };
            let mut ended = 0;
            while ended < made.len() {
                let said = tokio::select! {
                    said = answers.next() => said,
                    () = sender.closed() => return,
                };
                let said = match said {
                    Ok(Some(said)) => said,
                    Ok(None) => break,
                    Err(error) => return send(error.json()),
                };
                let choice = said.choice();
                self.note(said, &mut made);
                let mut object = self.object(json!([self.choice(choice, &made[choice])]));
                // What was told is not told again.
                let told = &mut made[choice];
                told.text.clear();
                let length = told.logprobs.length;
                told.logprobs = LegacyLogprobs {
                    length,
                    ..LegacyLogprobs::default()
                };
                if let Some((_, timings)) = &told.end {
                    ended += 1;
                    object["timings"] = timings.clone();
                }
                send(object);
            }
            if usage {
                let mut object = self.object(json!([]));
                object["usage"] = Self::usage(&made);
                send(object);
            }
            let _ = sender.send("[DONE]".to_owned());
        });
        events(receiver)
    }
}
