//! A profile and what comes with it: pruning by it, and profiles from files that were named. `collection.rs` has those that are
//! in the cache folder or collected now.

use std::path::Path;
use std::time::Instant;

use super::Engine;
use super::error::{CurvesBy, EngineError, Unsuited};
use super::memory;
use super::report::{CalibrationReport, Notice, ProfileFrom};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::progress::Progress;
use crate::prune::{
    self, Calibration, Evidence, Groups, Plan, Profile, PruneError, Recipe, Restore, StoredProfile,
};

/// A profile, what it took to get it, and what else pruning reads.
#[derive(Debug)]
pub(super) struct Calibrated {
    pub stored: StoredProfile,
    pub report: CalibrationReport,
    /// What came up on the way, beside the notices of the report.
    pub notices: Vec<Notice>,
    /// Tokens that neither statistics nor curves were taken from, for judging.
    pub judge: Vec<u32>,
    /// Tokens that nothing but loss curves was taken from, where more is to be measured on them; else they may be missing.
    pub curves: Vec<u32>,
    /// Tokens of the source that nothing was taken from, for measuring the effect of pruning, and the same of the mixture.
    pub unseen: Vec<u32>,
    pub held_back: Vec<u32>,
    /// Stands in front of every sequence, where the model wants one.
    pub bos: Option<u32>,
    /// The tokens that statistics were taken from, where restoration reads them too; else empty.
    pub text: Vec<u32>,
    /// Where covariances come from that do not fit in memory all at once.
    pub groups: Option<Groups>,
    /// Whether packed weights must make room.
    pub unpack: bool,
}

impl Calibrated {
    /// Prunes a model in place by a recipe to a ratio, with widths that are multiples of a step, or by a plan of these. `layers` counts those that are pruned, `passes` the tokens of each pass over the text for
    /// covariances.
    pub fn prune<'a>(
        &'a mut self,
        model: &mut Model,
        runtime: &Runtime,
        to: (Recipe, f64, usize),
        plan: Option<Plan>,
        layers: &mut Progress,
        passes: &'a mut Progress<'a>,
    ) -> Result<Plan, PruneError> {
        let (recipe, ratio, step) = to;
        let profile = &self.stored.profile;
        let evidence = match &mut self.groups {
            Some(groups) => Evidence::in_groups(profile, groups, passes),
            None => {
                let text = Calibration {
                    tokens: &self.text,
                    bos: self.bos,
                    covariance: true,
                };
                Evidence::with_text(profile, text)
            }
        };
        match plan {
            Some(plan) => {
                let how = recipe.restore;
                prune::restore_and_apply(model, runtime, evidence, &plan, how, layers)?;
                Ok(plan)
            }
            None => prune::prune_in_steps(model, runtime, evidence, recipe, ratio, step, layers),
        }
    }
}

/// The profile of a file, which must be of this model and have what the recipe needs.
pub(super) fn from_file(
    engine: &Engine,
    path: &Path,
    recipe: Recipe,
) -> Result<Calibrated, EngineError> {
    let start = Instant::now();
    if recipe.restore == Restore::Sequential {
        return Err(Unsuited::Sequential.into());
    }
    memory::must_hold_profile(path)?;
    let stored = StoredProfile::load(path)?;
    let (fingerprint, name) = engine.identity()?;
    stored.check_model(path, &fingerprint, &name)?;
    let notices = check_suits(path, &stored.profile, recipe)?;
    let held_back = stored.profile.curves.as_ref().map_or(0, |c| c.tokens);
    let origin = &stored.origin;
    let report = CalibrationReport {
        source: origin.source.clone(),
        tokens: origin.tokens.saturating_sub(held_back),
        resumed: 0,
        all_tokens: origin.tokens,
        profile: ProfileFrom::File,
        hash: StoredProfile::stated_hash(path).unwrap_or_else(|| stored.hash()),
        model: origin.model.clone(),
        time: start.elapsed(),
        curves: None,
        groups: None,
        notices: notices.into_iter().collect(),
    };
    Ok(Calibrated {
        stored,
        report,
        notices: Vec::new(),
        judge: Vec::new(),
        curves: Vec::new(),
        unseen: Vec::new(),
        held_back: Vec::new(),
        bos: engine.bos(),
        text: Vec::new(),
        groups: None,
        unpack: false,
    })
}

/// Refuses a profile that lacks what the recipe needs, and tells what it lacks that the recipe can do without.
fn check_suits(path: &Path, profile: &Profile, recipe: Recipe) -> Result<Option<Notice>, Unsuited> {
    let path = || path.to_owned();
    if recipe.wants_curves() {
        let curves = profile.curves.as_ref();
        let curves = curves.ok_or_else(|| Unsuited::NoCurves { profile: path() })?;
        let theirs = CurvesBy {
            metric: curves.metric,
            heads: curves.heads,
            restore: curves.restore,
        };
        let ours = CurvesBy {
            metric: recipe.metric,
            heads: recipe.heads,
            restore: recipe.restore.of_one_module(),
        };
        if theirs != ours {
            return Err(Unsuited::OtherCurves {
                profile: path(),
                theirs,
                ours,
            });
        }
    }
    if profile.has_covariance() || !recipe.wants_covariance() {
        return Ok(None);
    }
    if recipe.metric.wants_covariance() {
        return Err(Unsuited::MetricNeedsCovariances {
            profile: path(),
            metric: recipe.metric,
        });
    }
    if recipe.restore != Restore::Auto {
        return Err(Unsuited::RestoreNeedsCovariances {
            profile: path(),
            restore: recipe.restore,
        });
    }
    Ok(Some(Notice::BiasesForProfile { profile: path() }))
}
