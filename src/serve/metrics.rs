//! Counts and gauges for Prometheus.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::App;
use super::error::ApiError;

/// What is counted.
pub(super) struct Metrics {
    registry: Registry,
    pub requests: Family<RequestLabels, Counter>,
    pub prompt_tokens: Counter,
    pub generated_tokens: Counter,
    /// Answers under way.
    pub running: Gauge,
    /// Answers that wait for a place.
    pub waiting: Gauge,
    /// Blocks of the KV cache that are in use.
    pub cache_blocks: Gauge,
    /// Seconds of a step: one token for every answer under way, and a piece of a prompt.
    pub steps: Histogram,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct RequestLabels {
    /// The address as it is routed, so that there are few of them.
    pub path: String,
    pub status: u16,
}

impl Metrics {
    pub fn new() -> Self {
        let requests = Family::<RequestLabels, Counter>::default();
        let (prompt_tokens, generated_tokens) = (Counter::default(), Counter::default());
        let (running, waiting, cache_blocks) =
            (Gauge::default(), Gauge::default(), Gauge::default());
        let steps = Histogram::new(exponential_buckets(0.001, 2.0, 14));
        let mut registry = Registry::with_prefix("flapjack");
        registry.register("requests", "Requests that were answered", requests.clone());
        registry.register(
            "prompt_tokens",
            "Tokens of prompts that went through a model",
            prompt_tokens.clone(),
        );
        registry.register(
            "generated_tokens",
            "Tokens that were generated",
            generated_tokens.clone(),
        );
        registry.register("answers_running", "Answers under way", running.clone());
        registry.register(
            "answers_waiting",
            "Answers that wait for a place",
            waiting.clone(),
        );
        registry.register(
            "cache_blocks",
            "Blocks of the KV cache in use, of 64 positions each",
            cache_blocks.clone(),
        );
        registry.register_with_unit(
            "step",
            "Time of a step, in which each answer under way gets a token",
            Unit::Seconds,
            steps.clone(),
        );
        Self {
            registry,
            requests,
            prompt_tokens,
            generated_tokens,
            running,
            waiting,
            cache_blocks,
            steps,
        }
    }
}

/// `GET /metrics`
pub(super) async fn show(State(app): State<Arc<App>>) -> Result<impl IntoResponse, ApiError> {
    let mut text = String::new();
    encode(&mut text, &app.metrics.registry)
        .map_err(|error| ApiError::internal(error.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text))
}
