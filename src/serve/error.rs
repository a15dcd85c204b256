//! Errors as clients of OpenAI's interface expect them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::engine::EngineError;
use crate::generate::GenerateError;
use crate::prune::PruneErrorKind;

/// Why a request was refused or failed: a status, and a body `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub status: StatusCode,
    pub body: ErrorBody,
    /// Seconds after which trying again makes sense; `None` where it does not.
    retry_after: Option<u64>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ErrorBody {
    pub message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field of the request that is wrong; `None` where it is no single one.
    param: Option<&'static str>,
    /// A name of the error for programs; `None` where the type says all.
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            body: ErrorBody {
                message: message.into(),
                kind,
                param: None,
                code: None,
            },
            retry_after: None,
        }
    }

    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field of the request makes no sense.
    pub fn field(param: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(message);
        error.body.param = Some(param);
        error
    }

    /// Prompt and answer cannot be as long as that.
    pub fn too_long(prompt: usize, context: usize) -> Self {
        let mut error = Self::invalid(format!(
            "the prompt has {prompt} tokens, and prompt and answer together can have {context}"
        ));
        error.body.code = Some("context_length_exceeded");
        error
    }

    pub fn unauthorised() -> Self {
        let mut error = Self::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            "this server wants its API key, as \"Authorization: Bearer KEY\"",
        );
        error.body.code = Some("invalid_api_key");
        error
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    pub fn wrong_method() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            "this address does not take this method",
        )
    }

    pub fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the body has more than the {limit} bytes that this server takes"),
        )
    }

    /// So many requests are waiting already.
    pub fn busy(waiting: usize) -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            format!("{waiting} requests are under way or waiting already; try again later"),
        );
        error.retry_after = Some(1);
        error
    }

    pub fn too_slow() -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout_error",
            "the answer was not done within the time that a request may take",
        )
    }

    /// What the engine says.
    pub fn of(error: &EngineError) -> Self {
        match error {
            EngineError::Generate(GenerateError::PromptTooLong {
                prompt, context, ..
            }) => Self::too_long(*prompt, *context),
            EngineError::Generate(GenerateError::EmptyPrompt | GenerateError::Grammar(_))
            | EngineError::Tokenize(_)
            | EngineError::Chat(_) => Self::invalid(error.to_string()),
            EngineError::CurvesOfGroups { .. } => Self::field("allocate", error.to_string()),
            EngineError::Unsuited(_) => Self::invalid(error.to_string()),
            EngineError::Prune(prune) => match &prune.kind {
                PruneErrorKind::Group { .. } | PruneErrorKind::Pattern(_) => {
                    Self::field("sparse", error.to_string())
                }
                _ => Self::internal(error.to_string()),
            },
            error => Self::internal(error.to_string()),
        }
    }

    /// Something that is not the client's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub fn stopping() -> Self {
        let mut error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            "the server is stopping",
        );
        error.retry_after = Some(5);
        error
    }

    /// The body as JSON, for the end of a stream.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({ "error": self.body })
    }

    /// The same for clients of Ollama, whose errors are a sentence alone.
    pub fn for_ollama(self) -> Response {
        let body = Json(serde_json::json!({ "error": self.body.message }));
        self.respond(body)
    }

    /// The answer at an address: those of Ollama's interface have its form.
    pub fn at(self, path: &str) -> Response {
        match path.starts_with("/api/") {
            true => self.for_ollama(),
            false => self.into_response(),
        }
    }

    fn respond(self, body: impl IntoResponse) -> Response {
        let mut response = (self.status, body).into_response();
        if let Some(seconds) = self.retry_after {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = Json(self.json());
        self.respond(body)
    }
}
