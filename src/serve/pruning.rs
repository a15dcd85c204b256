//! `/prune`: what was pruned, and pruning the model that runs.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::body::Body;
use super::error::ApiError;
use super::worker::{Order, PruneOrder};
use super::{App, Model, ModelState};
use crate::engine::{Engine, Event, PruneOptions, SparseOptions, Target};
use crate::prune;
use crate::prune::sparse::{Allocate, Sparsity};

#[derive(Debug, Deserialize)]
pub(super) struct PruneFields {
    model: Option<String>,
    /// The share of the layers' weights that goes as heads and channels; 0 for the model as its file has it, unless `sparse` names what
    /// goes. It may be left out beside that.
    ratio: Option<f64>,
    /// Single weights that go, like "wanda:0.5"; null for none. Without the field they are what the server was started with.
    #[serde(default, deserialize_with = "there")]
    sparse: Option<Option<String>>,
    /// How these are shared out; without it evenly, or as the server was started.
    allocate: Option<String>,
}

/// A field that is there, be it null.
fn there<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

impl PruneFields {
    /// What to prune, where the server was started with `base`; `None` for the model as its file has it.
    ///
    /// # Errors
    /// If a field makes no sense, or not for this model.
    fn options(
        &self,
        base: &PruneOptions,
        model: &Model,
    ) -> Result<Option<PruneOptions>, ApiError> {
        let named: Option<Sparsity> = match &self.sparse {
            Some(Some(text)) => {
                let sparsity = text.parse();
                Some(sparsity.map_err(|words: String| ApiError::field("sparse", words))?)
            }
            _ => None,
        };
        let ratio = match (self.ratio, named) {
            (Some(ratio), _) => ratio,
            (None, Some(_)) => 0.0,
            (None, None) => {
                return Err(ApiError::field(
                    "ratio",
                    "there must be a ratio, or single weights by \"sparse\"",
                ));
            }
        };
        if !prune::RATIOS.contains(&ratio) {
            let (low, high) = (prune::RATIOS.start, prune::RATIOS.end);
            return Err(ApiError::field(
                "ratio",
                format!("ratio must be at least {low} and below {high}"),
            ));
        }
        let mut sparse = match (&self.sparse, named) {
            (_, Some(sparsity)) => Some(SparseOptions {
                form: base.sparse.map(|sparse| sparse.form).unwrap_or_default(),
                ..sparsity.into()
            }),
            (Some(_), None) => None,
            (None, None) => base.sparse.filter(|_| ratio > 0.0),
        };
        if let Some(name) = &self.allocate {
            let allocate: Result<Allocate, String> = name.parse();
            let allocate = allocate.map_err(|words| ApiError::field("allocate", words))?;
            let Some(sparse) = &mut sparse else {
                let words = "there are no single weights to share out; \"sparse\" says which go";
                return Err(ApiError::field("allocate", words));
            };
            sparse.allocate = allocate;
        }
        if let Some(sparse) = sparse {
            model.check_sparse(sparse, ratio)?;
        }
        let prunes = ratio > 0.0 || sparse.is_some();
        Ok(prunes.then(|| PruneOptions {
            target: Target::Ratio(ratio),
            sparse,
            ..base.clone()
        }))
    }
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
    let (number, model) = app.model(fields.model.as_deref());
    let options = fields.options(options, model)?;
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
    let report = pruned.map_err(|error| ApiError::of(&error))?;
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
