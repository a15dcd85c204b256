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
    let (mut data, mut tokens) = (Vec::new(), 0);
    for (index, prompt) in fields.input.tokens(model).await?.into_iter().enumerate() {
        if prompt.len() > model.context {
            return Err(ApiError::too_long(prompt.len(), model.context));
        }
        tokens += prompt.len();
        let embedding = app.orders.embed(number, prompt).await?;
        let value = match base64 {
            true => json!(encode(&embedding)),
            false => json!(embedding),
        };
        data.push(json!({ "object": "embedding", "index": index, "embedding": value }));
    }
    Ok(Json(json!({
        "object": "list",
        "model": model.name,
        "data": data,
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    })))
}

/// Little-endian floats in base64, which the `openai` package asks for by itself.
fn encode(embedding: &[f32]) -> String {
    use base64::Engine;
    let bytes: Vec<u8> = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
    base64::prelude::BASE64_STANDARD.encode(bytes)
}
