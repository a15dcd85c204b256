//! `/prune`: what was pruned, and pruning the model that runs.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::body::Body;
use super::error::ApiError;
use super::worker::{Order, PruneOrder};
use super::{App, ModelState};
use crate::engine::{Engine, Event, Target};
use crate::prune;

#[derive(Debug, Deserialize)]
pub(super) struct PruneFields {
    model: Option<String>,
    /// The share of the layers' weights that goes; 0 for the model as its file has it.
    ratio: f64,
}

/// `GET /prune`: of every model what was pruned and how far pruning is that is under way.
pub(super) async fn show(State(app): State<Arc<App>>) -> Json<Value> {
    let model = |model: &super::Model| {
        let state = model.state();
        json!({
            "id": model.name,
            "allowed": app.options.pruning.is_some(),
            "bytes": state.report.bytes,
            "token_bytes": state.token_bytes,
            "under_way": state.under_way,
            "pruned": state.pruned,
        })
    };
    let models: Vec<Value> = app.models.iter().map(model).collect();
    Json(json!({ "models": models }))
}

/// `POST /prune`: prunes a model between two steps; answers under way go on with what it is then.
pub(super) async fn prune(
    State(app): State<Arc<App>>,
    Body(fields): Body<PruneFields>,
) -> Result<Json<Value>, ApiError> {
    let Some(options) = &app.options.pruning else {
        return Err(ApiError::forbidden("this server does not prune on request"));
    };
    if !prune::RATIOS.contains(&fields.ratio) {
        let (low, high) = (prune::RATIOS.start, prune::RATIOS.end);
        return Err(ApiError::field(
            "ratio",
            format!("ratio must be at least {low} and below {high}"),
        ));
    }
    let (number, model) = app.model(fields.model.as_deref());
    let options = (fields.ratio > 0.0).then(|| {
        let mut options = options.clone();
        options.target = Target::Ratio(fields.ratio);
        options
    });
    let (reply, answer) = oneshot::channel();
    // A client that leaves while its order waits or is carried out takes it back.
    let left = Arc::new(AtomicBool::new(false));
    let _leaves = Leaves(left.clone());
    let shared = app.clone();
    let events = move |event: Event| {
        shared.models[number].set_state(|state| state.under_way = Some(event));
        match left.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let shared = app.clone();
    let done = move |engine: &Engine| {
        shared.models[number].set_state(|state| *state = ModelState::of(engine));
    };
    app.orders.send(Order::Prune(Box::new(PruneOrder {
        model: number,
        options,
        events: Box::new(events),
        done: Box::new(done),
        reply,
    })))?;
    let pruned = answer.await.map_err(|_| ApiError::stopping())?;
    let report = pruned.map_err(|error| ApiError::internal(error.to_string()))?;
    let state = model.state();
    Ok(Json(json!({
        "id": model.name,
        "bytes": state.report.bytes,
        "token_bytes": state.token_bytes,
        "pruned": report,
    })))
}

/// Says so when it is dropped.
struct Leaves(Arc<AtomicBool>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
