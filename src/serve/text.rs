//! Text to tokens and back, and chats as their template writes them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::body::Body;
use super::chat::ChatFields;
use super::error::ApiError;

#[derive(Debug, Deserialize)]
pub(super) struct TokenizeFields {
    model: Option<String>,
    /// The text, as llama.cpp calls it.
    content: Option<String>,
    /// The text, as vLLM and lm-eval call it.
    prompt: Option<String>,
    /// Whether the token that begins texts comes first, where the model wants one.
    #[serde(alias = "add_special_tokens")]
    add_special: Option<bool>,
    /// Whether control tokens that the text spells are taken as such; by default they are, as in llama.cpp and vLLM. lm-eval finds
    /// the token that ends texts by it.
    parse_special: Option<bool>,
    /// Tell the text of each token, too.
    #[serde(default)]
    with_pieces: bool,
}

/// `POST /tokenize`
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    Body(fields): Body<TokenizeFields>,
) -> Result<Json<Value>, ApiError> {
    let (_, model) = app.model(fields.model.as_deref());
    // lm-eval's way to ask means the model's own way to begin texts; llama.cpp's means none.
    let add_special = fields.add_special.unwrap_or(fields.prompt.is_some());
    let Some(text) = fields.prompt.or(fields.content) else {
        return Err(ApiError::field(
            "content",
            "there is no text, in content or prompt",
        ));
    };
    let tokens = model
        .encode(text, add_special, fields.parse_special.unwrap_or(true))
        .await?;
    let count = tokens.len();
    let shown: Vec<Value> = match fields.with_pieces {
        true => tokens
            .iter()
            .map(|id| json!({ "id": id, "piece": model.tokenizer.token_text(*id) }))
            .collect(),
        false => tokens.into_iter().map(Value::from).collect(),
    };
    Ok(Json(
        json!({ "tokens": shown, "count": count, "max_model_len": model.context }),
    ))
}

#[derive(Debug, Deserialize)]
pub(super) struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    Body(fields): Body<DetokenizeFields>,
) -> Result<Json<Value>, ApiError> {
    let (_, model) = app.model(fields.model.as_deref());
    model.check_tokens(&fields.tokens)?;
    let text = model.tokenizer.decode_special(&fields.tokens);
    // Both names are in use.
    Ok(Json(json!({ "content": text, "prompt": text })))
}

/// `POST /apply-template`
pub(super) async fn apply_template(
    State(app): State<Arc<App>>,
    Body(fields): Body<ChatFields>,
) -> Result<Json<Value>, ApiError> {
    let (_, model) = app.model(fields.model());
    let rendered = fields.render(model)?;
    Ok(Json(json!({ "prompt": rendered.text() })))
}
