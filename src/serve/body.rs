//! Bodies of requests.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;

use super::App;
use super::error::ApiError;
use std::sync::Arc;

/// A body of JSON, whatever its content type says: many send none, or that of a form.
pub(super) struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, app).await;
        let bytes = bytes.map_err(|rejection: BytesRejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(app.options.body_bytes),
            _ => ApiError::invalid(format!("the body cannot be read: {rejection}")),
        })?;
        if bytes.is_empty() {
            return Err(ApiError::invalid("there is no body; send a JSON object"));
        }
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            ApiError::invalid(format!("the body is not what is expected here: {error}"))
        })
    }
}

/// A value alone, or a list of them.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMany::One(value) => vec![value],
            OneOrMany::Many(values) => values,
        }
    }
}
