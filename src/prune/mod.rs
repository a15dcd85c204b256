//! FLAP: fluctuation-based adaptive structured pruning (An et al., AAAI 2024, arXiv 2312.11983).
//!
//! Five steps, each from plain data to plain data, so that a method is one choice per step:
//! [`calibrate()`] runs text and leaves a [`Profile`]; [`score`] gives every query head and MLP channel a number; [`plan()`]
//! decides within a budget what stays; [`restore`] makes up for what goes; [`apply()`] compacts the weights in place.
//! [`store`] keeps profiles as files, [`record`] is what a pruned file tells of its origin.
//!
//! *Ratio* means the share of the decoder layers' attention and MLP weights, counted in parameters, that goes. Embeddings,
//! norms, biases and the output head stay out of the count.

pub mod apply;
pub mod calibrate;
pub mod plan;
pub mod profile;
pub mod record;
pub mod restore;
pub mod score;
pub mod store;

use std::ops::Range;

pub use apply::apply;
pub use calibrate::{Calibration, calibrate};
pub use plan::{LayerPlan, Plan, plan};
pub use profile::{FeatureStats, LayerProfile, Profile};
pub use record::{LayerRecord, Record};
pub use score::{LayerScores, wifv_scores};
pub use store::{Origin, ProfileError, StoredProfile};

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
    #[error("the profile was made for a model of another shape: {0}")]
    OtherShape(String),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("giving memory back to the system failed: {0}")]
    Release(std::io::Error),
}

/// The method of FLAP's paper: WIFV scores, one threshold over everything (AL-AM), bias compensation. Prunes `model` in
/// place and returns the plan that was carried out.
///
/// `progress` is called with the number of layers done and their total.
///
/// # Errors
/// If the ratio is out of range or the profile does not fit the model; the model is then unchanged.
pub fn flap(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    ratio: f64,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Plan, PruneError> {
    let scores = wifv_scores(model, runtime, profile)?;
    let plan = plan(model, &scores, ratio)?;
    let biases = restore::biases(model, runtime, profile, &plan);
    apply(model, runtime, &plan, biases, progress)?;
    Ok(plan)
}
