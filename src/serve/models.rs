//! What is served, and whether all is well.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::error::ApiError;
use super::{App, Model};

/// `GET /health`
pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// `GET /v1/models`
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.models.iter().map(|m| m.json(app.created)).collect();
    Json(json!({ "object": "list", "data": models }))
}

/// `GET /v1/models/NAME`
pub(super) async fn show(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = app.models.iter().find(|model| model.name == name);
    let model =
        model.ok_or_else(|| ApiError::not_found(format!("no model here is called {name}")))?;
    Ok(Json(model.json(app.created)))
}

/// `GET /tokenizer_info`, which lm-eval reads.
pub(super) async fn tokenizer_info(State(app): State<Arc<App>>) -> Json<Value> {
    let (_, model) = app.model(None);
    let text = |id: Option<u32>| id.and_then(|id| model.tokenizer.token_text(id));
    Json(json!({
        "bos_token": text(model.tokenizer.bos()),
        "eos_token": text(model.tokenizer.eos()),
        "add_bos_token": model.tokenizer.adds_bos(),
        "vocab_size": model.vocabulary,
        "chat_template": model.template.as_ref().map(|template| template.source()),
    }))
}

impl Model {
    fn json(&self, created: u64) -> Value {
        let state = self.state();
        json!({
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "flapjack",
            "meta": {
                "vocabulary": self.vocabulary,
                "context": self.context,
                "trained_context": self.trained_context,
                "embedding_length": self.embedding_length,
                "layers": state.report.layers,
                "parameters": state.report.parameters,
                "bytes": state.report.bytes,
                "token_bytes": state.token_bytes,
                "threads": state.report.threads,
                "chat": self.template.is_some(),
                "pruned": state.pruned,
            },
        })
    }
}
