//! Pruning, from what was asked to what was done. [`Engine::prune`] goes through it in order:
//!
//! 1. read the text (`text.rs`), and decide what the profile must hold (`needs.rs`); or read the profile, if one is named
//!    (`profile.rs`);
//! 2. look whether an earlier run has left the outcome (`cache.rs`); then only that is carried out;
//! 3. find the profile in the cache, or run the text through the model for it (`collection.rs`);
//! 4. find the ratio that reaches the target (`target.rs`);
//! 5. prune in place, and measure what that does to predictions (`effect.rs`);
//! 6. keep the outcome for the next run, and report (`report.rs`).

use std::path::Path;
use std::time::{Duration, Instant};

use super::Engine;
use super::collection::Collection;
use super::effect::Probe;
use super::error::EngineError;
use super::events::{Events, Shared, Stage};
use super::memory::{self, Room};
use super::options::{Cache, CalibrationOptions, MethodOptions, PruneOptions};
use super::profile::{self, Calibrated};
use super::report::{CalibrationReport, NoEffects, Notice, PruneReport, SearchReport, Snapshot};
use super::target;
use crate::eval::TokenTime;
use crate::model::Model;
use crate::prune::{
    Found, Method, Outcome, OutcomeKey, Plan, PruneError, PruneErrorKind, RATIOS, Recipe,
    StoredProfile, Target,
};

/// Tokens of the calibration text that a [`Target::PerplexityRise`] is judged on.
const JUDGE_TOKENS: usize = 2048;

/// A pruning that can begin: everything that can be refused has been looked at, and nothing that takes long is done yet.
#[derive(Debug)]
pub struct Prepared {
    target: Target,
    method: Method,
    recipe: Recipe,
    source: ProfileSource,
    /// Whether packed weights must make room.
    unpack: bool,
    cache: Cache,
    effects: bool,
}

/// Where the profile comes from.
#[derive(Debug)]
enum ProfileSource {
    File(Box<Calibrated>),
    Text(Box<Collection>),
}

impl Prepared {
    /// What whoever asked may want to know before it is done.
    pub fn notices(&self) -> &[Notice] {
        match &self.source {
            ProfileSource::File(calibrated) => &calibrated.report.notices,
            ProfileSource::Text(collection) => &collection.notices,
        }
    }

    /// Why there are no effects, if it is for this reason; `None` where none are expected.
    fn without_effects(&self, reason: NoEffects) -> Option<NoEffects> {
        let reason = match &self.source {
            ProfileSource::File(_) => NoEffects::ProfileOfFile,
            ProfileSource::Text(collection) if collection.is_built_in() => return None,
            ProfileSource::Text(_) => reason,
        };
        self.effects.then_some(reason)
    }
}

impl Engine {
    /// Prunes the model in place until it reaches the target.
    ///
    /// # Errors
    /// If the text or the profile is of no use, there is too little memory, the target is out of reach, or `events` cancels.
    /// The model is then as it was, unless a [`PruneError`] names layers that are pruned already. When all are, cancelling
    /// only leaves effects unmeasured.
    pub fn prune(
        &mut self,
        options: &PruneOptions,
        events: &mut Events,
    ) -> Result<PruneReport, EngineError> {
        let prepared = self.prepare(options)?;
        self.prune_prepared(prepared, events)
    }

    /// The first half of [`Engine::prune`]: reads the text or the profile, and refuses what cannot be done, before anything
    /// takes long.
    ///
    /// # Errors
    /// Those of [`Engine::prune`].
    pub fn prepare(&self, options: &PruneOptions) -> Result<Prepared, EngineError> {
        self.must_be_dense()?;
        if let Target::Ratio(ratio) = options.target
            && !RATIOS.contains(&ratio)
        {
            return Err(PruneError::from(PruneErrorKind::Ratio(ratio)).into());
        }
        let (recipe, source) = match &options.profile {
            Some(path) => self.profile_of_file(path, options)?,
            None => self.profile_of_text(options)?,
        };
        let unpack = match &source {
            ProfileSource::File(calibrated) => calibrated.unpack,
            ProfileSource::Text(collection) => collection.unpack,
        };
        Ok(Prepared {
            target: options.target,
            method: options.method.method,
            recipe,
            source,
            unpack,
            cache: self.usable_cache(options.cache),
            effects: options.effects,
        })
    }

    /// The second half of [`Engine::prune`].
    ///
    /// # Errors
    /// Those of [`Engine::prune`].
    pub fn prune_prepared(
        &mut self,
        prepared: Prepared,
        events: &mut Events,
    ) -> Result<PruneReport, EngineError> {
        self.must_be_dense()?;
        let unpack = prepared.unpack;
        if unpack {
            self.unpack();
        }
        let report = match self.repeat(&prepared, events)? {
            Some(report) => report,
            None => self.prune_anew(prepared, events)?,
        };
        self.pruned = Some(Box::new(report.clone()));
        // Pruned weights may fit packed.
        if unpack {
            self.pack();
        }
        Ok(report)
    }

    /// Collects a profile, and nothing else.
    ///
    /// # Errors
    /// If the text is of no use, there is too little memory, or `events` cancels.
    pub fn calibrate(
        &mut self,
        method: &MethodOptions,
        calibration: &CalibrationOptions,
        events: &mut Events,
    ) -> Result<(StoredProfile, CalibrationReport), EngineError> {
        self.must_be_dense()?;
        let room = Room::now(&self.model, None, self.has_file);
        let collection = Collection::prepare(self, method, calibration, 0, false, room)?;
        let unpack = collection.unpack;
        if unpack {
            self.unpack();
        }
        let calibrated = collection.carry_out(self, events);
        if unpack {
            self.pack();
        }
        let Calibrated { stored, report, .. } = calibrated?;
        Ok((stored, report))
    }

    fn profile_of_file(
        &self,
        path: &Path,
        options: &PruneOptions,
    ) -> Result<(Recipe, ProfileSource), EngineError> {
        let recipe = options.method.recipe();
        let mut calibrated = profile::from_file(self, path, recipe)?;
        let room = Room::now(&self.model, Some(options.target), self.has_file);
        let allotted = room.allot(&self.model, &self.runtime, recipe, 0, None)?;
        calibrated.unpack = allotted.unpack.is_some();
        let notice = allotted.unpack.map(Notice::UnpackedToPrune);
        calibrated.report.notices.extend(notice);
        Ok((recipe, ProfileSource::File(Box::new(calibrated))))
    }

    fn profile_of_text(
        &self,
        options: &PruneOptions,
    ) -> Result<(Recipe, ProfileSource), EngineError> {
        let PruneOptions {
            method,
            calibration,
            ..
        } = options;
        let judge = match options.target {
            Target::PerplexityRise(_) => JUDGE_TOKENS,
            _ => 0,
        };
        let cached = self.usable_cache(options.cache).has_profiles();
        let room = Room::now(&self.model, Some(options.target), self.has_file);
        let collection = Collection::prepare(self, method, calibration, judge, cached, room)?;
        Ok((collection.recipe, ProfileSource::Text(Box::new(collection))))
    }

    /// Does again what an earlier run did, if the cache folder knows of it.
    fn repeat(
        &mut self,
        prepared: &Prepared,
        events: &mut Events,
    ) -> Result<Option<PruneReport>, EngineError> {
        let start = Instant::now();
        let calibration = match &prepared.source {
            ProfileSource::File(calibrated) => Some(calibrated.report.clone()),
            ProfileSource::Text(collection) => collection.unread(self),
        };
        let Some(calibration) = calibration else {
            return Ok(None);
        };
        let key = outcome_key(
            prepared.target,
            prepared.recipe,
            prepared.cache,
            &calibration,
        );
        let Some(outcome) = key.and_then(|key| self.cache.find_outcome(&key)) else {
            return Ok(None);
        };
        let before = Snapshot::take(&self.model);
        let progress = &mut Stage::Pruning.progress(events);
        match outcome.apply(&mut self.model, &self.runtime, progress) {
            Ok(()) => self.touch(),
            Err(error) if matches!(error.kind, PruneErrorKind::OtherShape(_)) => {
                tracing::warn!("a kept outcome does not fit the model ({error}); pruning anew");
                return Ok(None);
            }
            Err(error) => return Err(self.broken_off(error)),
        }
        let time = start.elapsed();
        let search = outcome.found.map(|found| SearchReport {
            found,
            time: Duration::ZERO,
            speedup: None,
        });
        Ok(Some(PruneReport {
            target: prepared.target,
            ratio: outcome.ratio,
            removed: outcome.plan.ratio(),
            method: prepared.method,
            recipe: prepared.recipe,
            plan: outcome.plan,
            calibration,
            search,
            effects: Vec::new(),
            no_effects: prepared.without_effects(NoEffects::Repeated),
            after: Snapshot::take(&self.model),
            before,
            time,
            repeated: true,
            notices: Vec::new(),
        }))
    }

    fn prune_anew(
        &mut self,
        prepared: Prepared,
        events: &mut Events,
    ) -> Result<PruneReport, EngineError> {
        let unmeasured = prepared.without_effects(NoEffects::LittleText);
        let Prepared {
            target,
            method,
            recipe,
            source,
            unpack: _,
            cache,
            effects,
        } = prepared;
        let mut calibrated = match source {
            ProfileSource::File(calibrated) => *calibrated,
            ProfileSource::Text(collection) => collection.carry_out(self, events)?,
        };
        let calibration = calibrated.report.clone();
        let mut notices = std::mem::take(&mut calibrated.notices);
        let model_name = calibrated.stored.origin.model_name.clone();

        let start = Instant::now();
        let (ratio, found) = target::find_ratio(self, target, recipe, &mut calibrated, events)?;
        let search_time = start.elapsed();
        memory::must_hold_pruned(&self.model, ratio)?;

        let probe = match effects {
            true => Some(Probe::new(self, &calibrated, events)?),
            false => None,
        };
        let dense = columns(&self.model);
        let before = Snapshot::take(&self.model);
        let start = Instant::now();
        let plan = self.carry_out(calibrated, recipe, ratio, events)?;
        let time = start.elapsed();
        let after = Snapshot::take(&self.model);

        if let Some(key) = outcome_key(target, recipe, cache, &calibration) {
            let outcome = Outcome::of(&self.model, &dense, plan.clone(), ratio, found);
            self.cache
                .keep_outcome(&outcome, &key, &model_name, &mut notices);
        }
        let search = self.search_report(found, search_time)?;
        let (effects, no_effects) = match probe.map(|probe| probe.effects(self, events)) {
            Some(Ok(effects)) if effects.is_empty() => (effects, unmeasured),
            Some(Ok(effects)) => (effects, None),
            // It is too late to leave the model as it was.
            Some(Err(EngineError::Cancelled(_))) => (Vec::new(), Some(NoEffects::Cancelled)),
            Some(Err(error)) => return Err(error),
            None => (Vec::new(), None),
        };
        Ok(PruneReport {
            target,
            ratio,
            removed: plan.ratio(),
            method,
            recipe,
            plan,
            calibration,
            search,
            effects,
            no_effects,
            before,
            after,
            time,
            repeated: false,
            notices,
        })
    }

    /// Prunes in place. The profile is given back, so that memory can be looked at afterwards.
    fn carry_out(
        &mut self,
        mut calibrated: Calibrated,
        recipe: Recipe,
        ratio: f64,
        events: &mut Events,
    ) -> Result<Plan, EngineError> {
        let events = Shared::new(events);
        let layers = &mut events.progress(Stage::Pruning);
        let passes = &mut events.progress(Stage::Covariances);
        let Engine { model, runtime, .. } = self;
        match calibrated.prune(model, runtime, recipe, ratio, layers, passes) {
            Ok(plan) => {
                self.touch();
                Ok(plan)
            }
            Err(error) => Err(self.broken_off(error)),
        }
    }

    /// Takes down whether pruning has changed the model before it broke off.
    fn broken_off(&mut self, error: PruneError) -> EngineError {
        if !error.is_untouched() {
            self.touch();
        }
        error.into()
    }

    /// How the ratio was found, and whether the speed that was asked for is reached.
    fn search_report(
        &self,
        found: Option<Found>,
        time: Duration,
    ) -> Result<Option<SearchReport>, EngineError> {
        let Some(found) = found else {
            return Ok(None);
        };
        let speedup = match found {
            Found::Speed { before, .. } => {
                let now = TokenTime::measure(&self.model, &self.runtime)?;
                Some(now.speed() / before)
            }
            _ => None,
        };
        Ok(Some(SearchReport {
            found,
            time,
            speedup,
        }))
    }
}

/// The columns of the two projections of each layer that lose some.
fn columns(model: &Model) -> Vec<[usize; 2]> {
    let layers = model.layers.iter();
    layers
        .map(|layer| [layer.o.weight.cols, layer.down.weight.cols])
        .collect()
}

/// What an outcome is known by in the cache folder; `None` where it is not kept, or would not be the same the next time.
fn outcome_key(
    target: Target,
    recipe: Recipe,
    cache: Cache,
    calibration: &CalibrationReport,
) -> Option<OutcomeKey> {
    // What a speed asks for depends on the machine and the moment.
    if matches!(target, Target::Speedup(_)) || !cache.has_outcomes() {
        return None;
    }
    Some(OutcomeKey {
        model: calibration.model.clone(),
        profile: calibration.hash.clone(),
        recipe,
        target,
        flapjack: env!("CARGO_PKG_VERSION").to_owned(),
    })
}
