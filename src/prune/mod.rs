//! Structured pruning: FLAP (An et al., AAAI 2024, arXiv 2312.11983), the structured side of Wanda (Sun et al., ICLR 2024,
//! arXiv 2306.11695), and what goes beyond them.
//!
//! The steps go from plain data to plain data, so that a method is one choice per step, a [`Recipe`]. Each is a folder:
//!
//! | step | what it does |
//! | --- | --- |
//! | `collect` | [`calibrate()`] runs text and leaves a [`Profile`]; where the covariances of all layers do not fit in memory, [`groups`] takes them of a few layers at a time |
//! | `choose` | a [`Metric`] [`score`]s the inputs of the projections that lose columns; a [`Structure`] turns scores into a [`Plan`] within a budget ([`plan()`]), for which a [`Planner`] finds the ratio; types whose blocks are too long may change ([`substitute`]) |
//! | `restore` | [`restore()`] makes up for what goes, as [`Restore`] says, or [`sequential`] does |
//! | `apply` | [`apply()`] compacts the weights in place; [`restore_and_apply`] does both, layer by layer |
//! | `keep` | [`store`] keeps profiles as files, [`outcome`] what pruning made of a model; [`record`] is what a pruned file tells of its origin |
//!
//! [`sparse`] removes single weights, by themselves or after that; [`bits`] gives matrices smaller types.
//!
//! Beside the steps stand the choices by name ([`Recipe`], [`Method`]), [`rounding`], which encodes weights so that errors make up for each other,
//! and [`curves`], which measures by choosing and restoring what a
//! module is worth. [`prune`] follows a recipe from a profile to the pruned model. `docs/pruning.md` has the formulas and what
//! they measure.
//!
//! *Ratio* means the share of the decoder layers' attention and MLP weights, counted in parameters, that goes. Embeddings,
//! norms, biases and the output head stay out of the count.

mod apply;
pub mod bits;
mod choose;
mod collect;
pub mod curves;
mod effect;
mod error;
mod exact;
mod features;
mod inverse;
mod keep;
pub mod method;
mod names;
mod recipe;
mod restore;
pub mod rounding;
pub mod sparse;

pub use apply::{apply, apply_layer, restore_and_apply};
pub use choose::{
    Division, Found, LayerPlan, LayerScores, Plan, Planner, RATIOS, Shares, Target, plan, score,
    search, substitute, surgeon,
};
pub use collect::{
    Calibration, Covariance, Curve, CurveLevels, CurveOptions, Curves, Evidence, FeatureStats,
    GramScratch, Groups, LayerProfile, Profile, Reread, SoFar, calibrate, calibrate_onwards,
    groups,
};
pub use effect::{Effect, EffectText};
pub use error::{PruneError, PruneErrorKind};
pub(crate) use features::inputs_per_unit;
pub use inverse::InverseFactor;
pub(crate) use keep::format;
pub use keep::{
    Collected, Covariances, HealEnd, HealRecord, LayerRecord, Origin, Outcome, OutcomeError,
    OutcomeKey, ProfileError, Record, Rewritten, Single, SingleRecord, StoredProfile, outcome,
    record, store,
};
pub use method::{Effort, Method};
pub use recipe::{HeadUnit, Metric, Recipe, Restore, Structure};
pub use restore::{LayerRestoration, Restoration, restore, restore_module, sequential};

use crate::kernels::Runtime;
use crate::model::Model;
pub use crate::model::Module;
use crate::progress::Progress;

/// Prunes `model` in place by a recipe and returns the plan that was carried out.
///
/// `progress` counts layers. It is called before the first of them too, where a break leaves the model as it was.
///
/// # Errors
/// If the ratio is out of range, or the profile does not fit the model or lacks what the recipe needs, before anything has
/// changed; else those of [`restore_and_apply`]. The error says which layers are pruned by then.
pub fn prune(
    model: &mut Model,
    runtime: &Runtime,
    evidence: Evidence,
    recipe: Recipe,
    ratio: f64,
    progress: &mut Progress,
) -> Result<Plan, PruneError> {
    prune_in_steps(model, runtime, evidence, recipe, ratio, 1, progress)
}

/// [`prune`] to numbers of channels that are multiples of `step`, of which the numbers there are must be multiples too.
///
/// # Errors
/// Those of [`prune`].
pub fn prune_in_steps(
    model: &mut Model,
    runtime: &Runtime,
    evidence: Evidence,
    recipe: Recipe,
    ratio: f64,
    step: usize,
    progress: &mut Progress,
) -> Result<Plan, PruneError> {
    let planner = Planner::new(model, runtime, evidence.profile, recipe)?;
    let plan = planner.in_steps(step).plan(ratio)?;
    restore_and_apply(model, runtime, evidence, &plan, recipe.restore, progress)?;
    Ok(plan)
}

/// Prunes `model` in place by the method of FLAP's paper, [`Method::Flap`], and returns the plan that was carried out.
///
/// `progress` counts layers.
///
/// # Errors
/// Those of [`prune`].
pub fn flap(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    ratio: f64,
    progress: &mut Progress,
) -> Result<Plan, PruneError> {
    let recipe = Method::Flap.recipe(Effort::Fast);
    let evidence = Evidence::profile(profile);
    prune(model, runtime, evidence, recipe, ratio, progress)
}
