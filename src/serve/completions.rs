//! `POST /v1/completions`: text as it stands, and what its tokens are worth. What `lm-eval` asks of it: prompts as token ids,
//! `echo` with `logprobs`, and the generated token among them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answers::{Answers, Said, finish_reason, timings, timings_so_far};
use super::body::Body;
use super::chat::{StreamOptions, events};
use super::error::ApiError;
use super::sampling::{self, MOST_ALTERNATIVES, SamplingFields};
use super::{App, Model, now, unique};
use crate::chat::Piece;
use crate::generate::{Request, TokenLogprob};
use crate::tokenize::{Decoder, Tokenizer};

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
    /// The tokens of each prompt. Text begins as the model's texts begin; with `parse_special`, control tokens that it spells are
    /// taken as such.
    ///
    /// # Errors
    /// If a text cannot be encoded, a token is not in the vocabulary, or a prompt is empty.
    pub async fn tokens(self, model: &Model, parse_special: bool) -> Result<Vec<Prompt>, ApiError> {
        let (texts, many) = match self {
            Prompts::Text(text) => (vec![text], Vec::new()),
            Prompts::Texts(texts) => (texts, Vec::new()),
            Prompts::Tokens(tokens) => (Vec::new(), vec![tokens]),
            Prompts::ManyTokens(many) => (Vec::new(), many),
        };
        let given = |tokens| Prompt { tokens, added: 0 };
        let mut all: Vec<Prompt> = many.into_iter().map(given).collect();
        let bos = model.tokenizer.bos().filter(|_| model.tokenizer.adds_bos());
        let bos = bos.and_then(|bos| model.tokenizer.token_text(bos));
        for text in texts {
            let own = bos.as_ref().is_none_or(|bos| text.starts_with(bos));
            all.push(Prompt {
                tokens: model.encode(text, true, parse_special).await?,
                added: usize::from(!own),
            });
        }
        if all.is_empty() {
            return Err(ApiError::field("prompt", "there is no prompt"));
        }
        for (i, Prompt { tokens, added }) in all.iter_mut().enumerate() {
            model.check_tokens(tokens)?;
            if tokens.is_empty() {
                let first = model.tokenizer.bos().or(model.tokenizer.eos());
                let first = first
                    .ok_or_else(|| ApiError::field("prompt", format!("prompt {i} is empty")))?;
                tokens.push(first);
                *added = 1;
            }
        }
        Ok(all)
    }
}

/// A prompt as the model reads it.
pub(super) struct Prompt {
    pub tokens: Vec<u32>,
    /// Tokens in front that the client did not send: the one that begins texts, or none.
    added: usize,
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
    /// As in llama.cpp: tell with each part of a stream how fast it comes.
    #[serde(default)]
    timings_per_token: bool,
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
    // What a template has written comes as text too.
    let prompts = fields.prompt.tokens(model, true).await?;
    if prompts.len() * sampling.choices > MOST_ANSWERS {
        return Err(ApiError::field(
            "prompt",
            format!("at most {MOST_ANSWERS} answers can be asked for at once"),
        ));
    }
    let asked = fields.max_tokens.or(Some(DEFAULT_TOKENS));
    let mut requests = Vec::new();
    let mut made = Vec::new();
    for Prompt { tokens, added } in prompts {
        let max_tokens = sampling::answer_tokens(asked, tokens.len(), model.context)?;
        let request = Request {
            max_tokens,
            grammar: grammar.clone(),
            logprobs: alternatives,
            prompt_logprobs: alternatives.filter(|_| fields.echo),
            ..Request::new(tokens)
        };
        for request in sampling.requests(&request) {
            made.push(Made::of(
                &request,
                fields.echo.then_some(added),
                &model.tokenizer,
            ));
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
        timings: fields.timings_per_token,
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
    /// `echo` has the prompt told again, from behind so many tokens on.
    fn of(request: &Request, echo: Option<usize>, tokenizer: &Tokenizer) -> Self {
        let (text, logprobs) = match echo {
            Some(added) => (
                tokenizer.decode_special(&request.prompt[added..]),
                LegacyLogprobs::of_prompt(tokenizer, added),
            ),
            None => (String::new(), LegacyLogprobs::default()),
        };
        Self {
            echo: echo.map(|_| request.prompt.clone()),
            prompt_tokens: request.prompt.len(),
            text,
            logprobs,
            end: None,
            tokens: 0,
        }
    }

    /// Tells the tokens of the prompt, if that has not been done, with what those behind the first are worth. (Of a prompt of one
    /// token nothing is known.)
    fn score_prompt(&mut self, tokenizer: &Tokenizer, scored: &[TokenLogprob]) {
        let prompt = self.echo.take().unwrap_or_default();
        let scored = std::iter::once(None).chain(scored.iter().map(Some));
        for (token, scored) in prompt.into_iter().zip(scored) {
            self.logprobs.push(tokenizer, token, scored);
        }
    }
}

/// What tokens are worth, in lists side by side.
#[derive(Default)]
struct LegacyLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where the text of each token begins, in characters. For what is only a part of a character that is where the character
    /// begins, so that the offsets are those of the text as it is told.
    text_offset: Vec<usize>,
    /// The text so far.
    decoder: Decoder,
    /// Its characters.
    length: usize,
    /// Tokens to come that are no part of the text.
    hidden: usize,
}

impl LegacyLogprobs {
    /// For a text that begins with a prompt, of whose tokens so many in front are no part of it.
    fn of_prompt(tokenizer: &Tokenizer, hidden: usize) -> Self {
        Self {
            decoder: Decoder::at_text_start(tokenizer),
            hidden,
            ..Self::default()
        }
    }

    fn push(&mut self, tokenizer: &Tokenizer, token: u32, scored: Option<&TokenLogprob>) {
        let text = |token: u32| match tokenizer.token_text(token) {
            Some(text) => text,
            None => String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned(),
        };
        self.text_offset.push(self.length);
        match self.hidden {
            0 => self.length += self.decoder.push_shown(tokenizer, token).chars().count(),
            _ => self.hidden -= 1,
        }
        self.token_logprobs
            .push(scored.map(|scored| scored.logprob));
        let others = |scored: &TokenLogprob| {
            let mut top = Map::new();
            // Tokens of half a character may look the same; the likeliest of them counts. The token itself is always there, as
            // with OpenAI.
            let own = (scored.token, scored.logprob);
            for (token, logprob) in scored.top.iter().chain([&own]) {
                top.entry(text(*token)).or_insert(json!(logprob));
            }
            top
        };
        self.top_logprobs.push(scored.map(others));
        self.tokens.push(text(token));
    }

    /// Forgets what there is, and goes on behind it.
    fn go_on(&mut self) {
        let next = Self {
            decoder: self.decoder.clone(),
            length: self.length,
            hidden: self.hidden,
            ..Self::default()
        };
        *self = next;
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
    /// Whether parts of a stream tell how fast they come.
    timings: bool,
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
            Said::Prompt { choice, scored } => made[choice].score_prompt(&self.tokenizer, &scored),
            Said::Parts {
                choice,
                parts,
                scored,
                ..
            } => {
                let made = &mut made[choice];
                made.score_prompt(&self.tokenizer, &[]);
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
                made.score_prompt(&self.tokenizer, &[]);
                // The token that ends the text is no part of it, and yet was chosen: those who measure leave out what was
                // generated, and must find something to leave out.
                if let Some(scored) = &generated.end_logprob {
                    made.logprobs
                        .push(&self.tokenizer, scored.token, Some(scored));
                }
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
                let so_far = match &said {
                    Said::Parts { timings, .. } => timings.filter(|_| self.timings),
                    _ => None,
                };
                self.note(said, &mut made);
                let mut object = self.object(json!([self.choice(choice, &made[choice])]));
                if let Some(timings) = &so_far {
                    object["timings"] = timings_so_far(timings);
                }
                // What was told is not told again.
                let told = &mut made[choice];
                told.text.clear();
                told.logprobs.go_on();
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
