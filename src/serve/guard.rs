//! What stands before the handlers: the API key, and counts.

use std::any::Any;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::App;
use super::error::ApiError;
use super::metrics::RequestLabels;

/// Lets requests through that have the key, where one is wanted.
pub(super) async fn check_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if let Some(key) = &app.options.api_key {
        let header = request.headers().get(header::AUTHORIZATION);
        let given = header
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        // Digests take the same time to compare wherever they differ.
        let digest = |text: &str| Sha256::digest(text.trim().as_bytes());
        if given.map(digest) != Some(digest(key)) {
            return ApiError::unauthorised().at(request.uri().path());
        }
    }
    next.run(request).await
}

/// Refuses pages of other origins, unless they are let in: a page that somebody happens to read could else have a server on the
/// same machine work for it. Names that lead here from elsewhere are refused for the same reason.
pub(super) async fn check_origin(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if !app.options.cors {
        let text = |name| {
            let value = request.headers().get(name);
            value.and_then(|value| value.to_str().ok())
        };
        let host = text(header::HOST);
        if let (Some(origin), Some(host)) = (text(header::ORIGIN), host) {
            let own = origin
                .split_once("://")
                .is_some_and(|(_, authority)| authority == host);
            if !own {
                let words = "pages of other origins may not use this server; it can be started so that they may";
                return ApiError::forbidden(words).at(request.uri().path());
            }
        }
        if app.options.address.ip().is_loopback() && host.is_some_and(|host| !is_local(host)) {
            let words = "this server is asked by a name that is not of this machine";
            return ApiError::forbidden(words).at(request.uri().path());
        }
    }
    next.run(request).await
}

/// Whether a host, with or without a port, is this machine.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.to_ascii_lowercase().ends_with(".localhost")
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// Counts requests by address and status.
pub(super) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>();
    let path = matched.map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let labels = RequestLabels { path, status };
    app.metrics.requests.get_or_create(&labels).inc();
    response
}

/// The answer to a request whose handler panicked.
pub(super) fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    ApiError::internal("something went wrong in the server; its log has more").into_response()
}
