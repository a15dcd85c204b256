//! Structured pruning: FLAP (An et al., AAAI 2024, arXiv 2312.11983), the structured side of Wanda (Sun et al., ICLR 2024,
//! arXiv 2306.11695), and what goes beyond them.
//!
//! Steps from plain data to plain data, so that a method is one choice per step:
//! [`calibrate()`] runs text and leaves a [`Profile`]; a [`Metric`] [`score`]s the inputs of the projections that lose columns;
//! a [`Structure`] turns scores into a [`Plan`] within a budget, which [`search`] can find; [`restore()`] makes up for what goes, as [`Restore`] says;
//! [`apply()`] compacts the weights in place. A [`Method`] names a [`Recipe`], a choice for every step, and [`prune`] follows
//! one. `docs/pruning.md` has the formulas and what they measure.
//!
//! Types whose blocks are too long for that may change ([`substitute`]).
//! Where the covariances of all layers do not fit in memory, [`groups`] takes them of a few layers at a time.
//!
//! [`store`] keeps profiles as files, [`outcome`] what pruning made of a model, [`record`] is what a pruned file tells of its origin.
//!
//! *Ratio* means the share of the decoder layers' attention and MLP weights, counted in parameters, that goes. Embeddings,
//! norms, biases and the output head stay out of the count.

pub mod apply;
pub mod calibrate;
mod covariance;
pub mod curves;
pub mod groups;
pub mod method;
pub mod metric;
mod names;
pub mod outcome;
pub mod plan;
pub mod profile;
pub mod record;
pub mod restore;
pub mod search;
pub mod sequential;
pub mod store;
pub mod structure;
pub mod substitute;
pub mod surgeon;

use std::ops::Range;
use std::sync::Mutex;

pub use apply::apply;
pub use calibrate::{Calibration, calibrate};
pub use covariance::{Covariance, GramScratch};
pub use curves::{Curve, CurveOptions, Curves};
pub use groups::Groups;
pub use method::{CurveLevels, Effort, Method, Recipe};
pub use metric::{LayerScores, Metric, score};
pub use outcome::{Outcome, OutcomeError, OutcomeKey};
pub use plan::{HeadUnit, LayerPlan, Plan};
pub use profile::{FeatureStats, LayerProfile, Profile};
pub use record::{LayerRecord, Record};
pub use restore::{LayerRestoration, Restoration, Restore, restore};
pub use search::Planner;
pub use store::{Origin, ProfileError, StoredProfile};
pub use structure::{Structure, plan};

use crate::kernels::Runtime;
use crate::model::{Model, ModelError};

/// The ratios that can be asked for.
pub const RATIOS: Range<f64> = 0.0..0.9;

/// The two modules of a layer that lose units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    Attention,
    Mlp,
}

impl Module {
    /// Of module number m: 2 l is the attention and 2 l + 1 the MLP of layer l.
    fn of(m: usize) -> Self {
        match m % 2 {
            0 => Module::Attention,
            _ => Module::Mlp,
        }
    }
}

impl std::fmt::Display for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Module::Attention => "attention",
            Module::Mlp => "MLP",
        })
    }
}

/// Why a model was not pruned. It is then as it was.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    #[error("the pruning ratio {0} is out of range; it must be at least 0 and below 0.9")]
    Ratio(f64),
    #[error(
        "the calibration text has {tokens} tokens, and at least {least} are needed; name a longer text with --calib or leave it out to use the built-in one"
    )]
    TooShort { tokens: usize, least: usize },
    #[error(
        "the inputs of the {module} output in layer {layer} are not all finite numbers; the model's weights are damaged or its activations overflow"
    )]
    NotFinite { layer: usize, module: Module },
    #[error(
        "the weights of the {module} output in layer {layer} are not all finite numbers; the model file is damaged"
    )]
    DamagedWeights { layer: usize, module: Module },
    #[error("least squares need a profile with covariances, and this one has none")]
    NoCovariance,
    #[error(
        "this way of sharing out the budget needs a profile with loss curves, and this one has none"
    )]
    NoCurves,
    #[error("the profile was made for a model of another shape: {0}")]
    OtherShape(String),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("giving memory back to the system failed: {0}")]
    Release(std::io::Error),
}

/// Prunes `model` in place by a recipe and returns the plan that was carried out. `text` is what the profile was taken from;
/// only [`Restore::Sequential`] reads it.
///
/// `progress` is called with the number of layers done and their total.
///
/// # Errors
/// If the ratio is out of range, the profile does not fit the model or lacks what the recipe needs, or a weight is not a
/// number; the model is then unchanged.
pub fn prune(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    text: Calibration,
    recipe: Recipe,
    ratio: f64,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Plan, PruneError> {
    let plan = Planner::new(model, runtime, profile, recipe)?.plan(ratio)?;
    match recipe.restore {
        Restore::Sequential => sequential::carry_out(model, runtime, text, &plan, progress)?,
        how => carry_out(model, runtime, profile, &plan, how, progress)?,
    }
    Ok(plan)
}

/// The method of FLAP's paper; see [`prune`] and [`Method::Flap`].
///
/// # Errors
/// Those of [`prune`].
pub fn flap(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    ratio: f64,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Plan, PruneError> {
    let recipe = Method::Flap.recipe(Effort::Fast);
    let no_text = Calibration {
        tokens: &[],
        bos: None,
        covariance: false,
    };
    prune(model, runtime, profile, no_text, recipe, ratio, progress)
}

/// Restores and applies as many layers at a time as there are threads, so that restored weights are never all held at once.
///
/// # Errors
/// If the profile does not fit the model or lacks covariances; the model is then unchanged. If the system does not take
/// memory back.
pub fn carry_out(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    plan: &Plan,
    how: Restore,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), PruneError> {
    profile.check_shape(model)?;
    if how == Restore::Lsq && !profile.has_covariance() {
        return Err(PruneError::NoCovariance);
    }
    carry_out_layers(model, runtime, &profile.layers, 0, plan, how, progress)
}

/// [`carry_out`] for the layers from `first` on that there are `stats` of; `progress` is called with how many of them are done
/// and their total.
fn carry_out_layers(
    model: &mut Model,
    runtime: &Runtime,
    stats: &[LayerProfile],
    first: usize,
    plan: &Plan,
    how: Restore,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), PruneError> {
    for begin in (0..stats.len()).step_by(runtime.pool.threads()) {
        let slots: Vec<Mutex<Option<LayerRestoration>>> = (begin
            ..stats.len().min(begin + runtime.pool.threads()))
            .map(|_| Mutex::new(None))
            .collect();
        let dense = &*model;
        runtime.region(|team| {
            team.items(slots.len(), |_, i| {
                let (stats, l) = (&stats[begin + i], first + begin + i);
                let restored = restore(dense, stats, l, &plan.layers[l], how);
                *slots[i].lock().expect("each layer has one user") = restored.ok();
            });
        });
        for (i, slot) in slots.into_iter().enumerate() {
            let restored = slot.into_inner().ok().flatten();
            let restored = restored.ok_or(PruneError::NoCovariance)?;
            let l = first + begin + i;
            apply::apply_layer(model, runtime, l, &plan.layers[l], &restored)?;
            progress(begin + i + 1, stats.len());
        }
    }
    Ok(())
}
