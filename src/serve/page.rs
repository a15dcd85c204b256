//! The page, which is part of the program: it works without a network.

use axum::extract::Path;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

/// `GET /`
pub(super) async fn index() -> Response {
    respond("text/html", include_str!("page/index.html"))
}

/// `GET /page/FILE`
pub(super) async fn file(Path(file): Path<String>) -> Response {
    match file.as_str() {
        "style.css" => respond("text/css", include_str!("page/style.css")),
        "markdown.js" => respond("text/javascript", include_str!("page/markdown.js")),
        "page.js" => respond("text/javascript", include_str!("page/page.js")),
        _ => ApiError::not_found("the page has no such file").into_response(),
    }
}

fn respond(kind: &str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, format!("{kind}; charset=utf-8")),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
        // What a model writes is shown on this page: nothing of it may run or be loaded from elsewhere.
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
             img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
                .to_owned(),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
    ];
    (headers, text).into_response()
}
