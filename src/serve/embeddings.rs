//! `POST /v1/embeddings`: the mean of the model's outputs (behind the last norm) over the tokens of a text, of length 1. A
//! model that was not trained for it gives embeddings of moderate use.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::body::Body;
use super::completions::Prompts;
use super::error::ApiError;

#[derive(Debug, Deserialize)]
pub(super) struct EmbeddingFields {
    model: Option<String>,
    input: Prompts,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

pub(super) async fn embed(
    State(app): State<Arc<App>>,
    Body(fields): Body<EmbeddingFields>,
) -> Result<Json<Value>, ApiError> {
    let (number, model) = app.model(fields.model.as_deref());
    let base64 = match fields.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(ApiError::field(
                "encoding_format",
                "must be float or base64",
            ));
        }
    };
    let width = model.embedding_length;
    if fields.dimensions.is_some_and(|n| n != width) {
        return Err(ApiError::field(
            "dimensions",
            format!("embeddings of this model have {width} dimensions"),
        ));
    }
    let prompts = fields.input.tokens(model, false).await?;
    let prompts: Vec<Vec<u32>> = prompts.into_iter().map(|prompt| prompt.tokens).collect();
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let embeddings = all(&app, number, prompts).await?;
    let object = |(index, embedding): (usize, &Vec<f32>)| {
        let value = match base64 {
            true => json!(encode(embedding)),
            false => json!(embedding),
        };
        json!({ "object": "embedding", "index": index, "embedding": value })
    };
    let data: Vec<Value> = embeddings.iter().enumerate().map(object).collect();
    Ok(Json(json!({
        "object": "list",
        "model": model.name,
        "data": data,
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    })))
}

/// The embedding of each text.
///
/// # Errors
/// If one is empty or beyond the context, or too much is waiting already.
pub(super) async fn all(
    app: &App,
    number: usize,
    texts: Vec<Vec<u32>>,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let context = app.models[number].context;
    let mut embeddings = Vec::new();
    for text in texts {
        if text.is_empty() {
            return Err(ApiError::invalid("an empty text has no embedding"));
        }
        if text.len() > context {
            return Err(ApiError::too_long(text.len(), context));
        }
        embeddings.push(app.orders.embed(number, text).await?);
    }
    Ok(embeddings)
}

/// Little-endian floats in base64, which the `openai` package asks for by itself.
fn encode(embedding: &[f32]) -> String {
    use base64::Engine;
    let bytes: Vec<u8> = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
    base64::prelude::BASE64_STANDARD.encode(bytes)
}
