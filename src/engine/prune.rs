//! Pruning, from what was asked to what was done. [`Engine::prune`] goes through it in order:
//!
//! 1. read the text (`text.rs`), and decide what the profile must hold (`needs.rs`); or read the profile, if one is named
//!    (`profile.rs`);
//! 2. look whether an earlier run has left the outcome (`cache.rs`); then only that is carried out;
//! 3. find the profile in the cache, or run the text through the model for it (`collection.rs`);
//! 4. find the ratio that reaches the target, together with smaller types where these may change (`target.rs`, `bits.rs`); and search for
//!    a better plan of that ratio, where there is time (`plans.rs`);
//! 5. prune in place, and give matrices their new types;
//! 6. remove single weights, if any are to go (`sparse.rs`);
//! 7. heal what is left, if that was asked for (`heal.rs`);
//! 8. measure what all this does to predictions (`effect.rs`), keep the outcome with it, and report (`report.rs`). What heads and channels
//!    have come to before 6 or 7 is kept by itself, too.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Engine;
use super::bits::{Bits, Types};
use super::collection::{Collection, TextAlone};
use super::effect::{self, Probe, Unseen};
use super::effort;
use super::error::EngineError;
use super::events::{Events, Shared, Stage};
use super::heal::{self, Healing};
use super::memory::{self, Room};
use super::options::{Cache, CalibrationOptions, MethodOptions, PruneOptions, SparseOptions};
use super::plans::Searching;
use super::profile::{self, Calibrated};
use super::report::{
    CalibrationReport, NoEffects, Notice, PruneReport, SearchReport, Snapshot, TypesReport,
};
use super::sparse::{self, Removing};
use super::target::{self, How};
use crate::eval::TokenTime;
use crate::hub;
use crate::model::Model;
use crate::prune::bits::{KeptTypes, TypePlan};
use crate::prune::sparse::Allocate;
use crate::prune::{
    Effort, Found, Method, Outcome, OutcomeKey, Plan, PruneError, PruneErrorKind, RATIOS, Recipe,
    SingleRecord, StoredProfile, Target,
};

/// Tokens of the calibration text that a [`Target::PerplexityRise`] is judged on.
const JUDGE_TOKENS: usize = 2048;

/// A pruning that can begin: everything that can be refused has been looked at, and nothing that takes long is done yet.
#[derive(Debug)]
pub struct Prepared {
    target: Target,
    method: Method,
    recipe: Recipe,
    effort: Effort,
    /// Single weights to remove; `None` for none.
    sparse: Option<SparseOptions>,
    /// Which types may change.
    bits: Bits,
    /// How whole plans are searched; `None` for not.
    searching: Option<Searching>,
    /// How the pruned model is healed; `None` for not.
    heal: Option<Healing>,
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
    /// No heads and channels go, and so there is none.
    NotNeeded(Box<TextAlone>),
}

/// What is kept for the next run once its effects are known.
struct Keep {
    outcome: Outcome,
    key: OutcomeKey,
    /// How single weights went, where that is part of it.
    single: Option<SingleRecord>,
}

/// What an earlier run did, done again.
struct Again {
    report: PruneReport,
    /// What measures its effects; `None` where they are known or not asked for.
    probe: Option<Probe>,
    /// What it is kept by, where its effects are only measured now.
    without_effects: Option<OutcomeKey>,
}

impl Prepared {
    /// What whoever asked may want to know before it is done.
    pub fn notices(&self) -> &[Notice] {
        match &self.source {
            ProfileSource::File(calibrated) => &calibrated.report.notices,
            ProfileSource::Text(collection) => &collection.notices,
            ProfileSource::NotNeeded(alone) => &alone.notices,
        }
    }

    /// What numbers of channels must be multiples of, beside what block formats need.
    fn step(&self) -> usize {
        self.sparse.map_or(1, |s| s.sparsity.pattern.group())
    }
}

impl Engine {
    /// Prunes the model in place until it reaches the target.
    ///
    /// # Errors
    /// If the text or the profile is of no use, there is too little memory, the target is out of reach, or `events` cancels.
    /// The model is then as it was, unless a [`PruneError`] names layers that are pruned already. When all is done, cancelling
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
        if let Target::Speedup(amount) | Target::PerplexityRise(amount) = options.target
            && !(amount.is_finite() && amount > 0.0)
        {
            return Err(EngineError::Amount(amount));
        }
        sparse::must_be_whole(&self.model)?;
        if let Some(sparse) = options.sparse {
            sparse::check(&self.model, sparse, options)?;
        }
        let mut heal = Healing::prepare(self, options)?;
        let (recipe, mut source) = match &options.profile {
            _ if options.sparse.is_some() && options.target == Target::Ratio(0.0) => {
                let (calibration, effort) = (&options.calibration, options.method.effort);
                let cached = self.usable_cache(options.cache).has_profiles();
                let alone = TextAlone::read(self, calibration, effort, cached)?;
                let recipe = options.method.recipe();
                (recipe, ProfileSource::NotNeeded(Box::new(alone)))
            }
            Some(path) => self.profile_of_file(path, options)?,
            None => self.profile_of_text(options)?,
        };
        let plans = match &source {
            ProfileSource::Text(collection) => collection.plans,
            ProfileSource::File(_) | ProfileSource::NotNeeded(_) => 0,
        };
        let searching = Searching::new(&self.model, options, recipe, plans)?;
        if let (Some(_), ProfileSource::Text(collection)) = (searching, &mut source) {
            collection.keep_text();
        }
        let unpack = match &source {
            ProfileSource::File(calibrated) => calibrated.unpack,
            ProfileSource::Text(collection) => collection.unpack,
            ProfileSource::NotNeeded(_) => false,
        };
        if let (Some(healing), ProfileSource::Text(collection)) = (&mut heal, &mut source) {
            healing.prepare_text(self, options, collection.text())?;
            let how = options.heal.expect("it is healed");
            let bytes = heal::needed(&self.model, how, options.target);
            collection.notices_mut().push(Notice::HealMemory { bytes });
        }
        let prepared = Prepared {
            target: options.target,
            method: options.method.method,
            recipe,
            effort: options.method.effort,
            sparse: options.sparse,
            bits: Bits::of(options),
            searching,
            heal,
            source,
            unpack,
            cache: self.usable_cache(options.cache),
            effects: options.effects,
        };
        // What is too short for single weights, or too much for the memory, is known before anything takes long.
        self.removing(&prepared)?;
        Ok(prepared)
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
        match unpack {
            true => self.unpack(),
            false => self.model.widen(&self.runtime),
        }
        let report = self.prune_wide(prepared, events);
        match unpack && report.is_ok() {
            // Pruned weights may fit packed.
            true => self.pack(),
            false => self.settle(),
        }
        report
    }

    /// [`Engine::prune_prepared`] of a model none of whose weights are narrow.
    fn prune_wide(
        &mut self,
        mut prepared: Prepared,
        events: &mut Events,
    ) -> Result<PruneReport, EngineError> {
        let removing = match prepared.sparse {
            // The dense model writes the text, where it is its own.
            Some(sparse) if sparse::reads_text(sparse) => {
                match &mut prepared.source {
                    ProfileSource::Text(collection) => collection.write(self, events)?,
                    ProfileSource::NotNeeded(alone) => {
                        let curves = match sparse.allocate {
                            Allocate::Even => 0,
                            Allocate::Curves => sparse::tokens_of_curves(prepared.effort),
                        };
                        alone.write(self, curves, events)?;
                    }
                    ProfileSource::File(_) => {}
                }
                self.removing(&prepared)?
            }
            _ => self.removing(&prepared)?,
        };
        let structured = !matches!(prepared.source, ProfileSource::NotNeeded(_));
        let (dense, cache, effects) = (columns(&self.model), prepared.cache, prepared.effects);
        let (mut healing, searching) = (prepared.heal.clone(), prepared.searching);
        let mut all_again = match (&removing, &healing) {
            (None, None) => None,
            (None, Some(_)) if prepared.bits.changes() => None,
            _ => self.repeat(&mut prepared, removing.as_ref(), healing.as_ref(), events)?,
        };
        let text = match &mut prepared.source {
            ProfileSource::Text(collection) if all_again.is_none() => match &mut healing {
                Some(healing) => {
                    // The dense model writes the text, where it is its own.
                    collection.write(self, events)?;
                    let text = collection.text();
                    healing.write(self, text, events)?;
                    (text.tokens().to_vec(), text.bos())
                }
                None => (Vec::new(), None),
            },
            _ => (Vec::new(), None),
        };
        // What is healed is not kept where types have changed before: an outcome has widths, then types.
        let (bits, outcomes) = match prepared.bits.changes() {
            true => (prepared.bits, Cache::Profiles),
            false => (prepared.bits, self.outcome_cache(&prepared)),
        };
        let mut without_effects = None;
        let (mut report, probe, mut keep) = match structured {
            _ if all_again.is_some() => {
                let Again { report, probe, .. } = all_again.take().expect("it is there");
                (report, probe, None)
            }
            false => {
                let (report, probe) = self.prune_nothing(&prepared, removing.as_ref(), events)?;
                (report, probe, None)
            }
            true => match self.repeat(&mut prepared, None, None, events)? {
                Some(again) => {
                    without_effects = again.without_effects;
                    (again.report, again.probe, None)
                }
                None => self.prune_anew(prepared, removing.as_ref(), events)?,
            },
        };
        if let Some(removing) = removing.filter(|_| report.sparse.is_none()) {
            // What heads and channels have come to can be taken again by itself.
            if let Some(keep) = keep.take() {
                self.keep(keep, &mut report);
            }
            let key = outcome_key(
                report.target,
                report.recipe,
                (bits, searching),
                cache,
                &report.calibration,
            );
            let structure = key.map(|key| {
                let found = report.search.as_ref().map(|search| search.found);
                let plan = report.plan.clone();
                let outcome = Outcome::of(&self.model, &dense, plan, report.ratio, found);
                let single = Some(removing.key());
                (outcome, OutcomeKey { single, ..key })
            });
            let (done, notices) = removing.carry_out(self, structured, events)?;
            keep = structure.map(|(outcome, key)| Keep {
                outcome,
                key,
                single: Some(removing.record(&done)),
            });
            report.after = Snapshot::take(&self.model);
            report.sparse = Some(done);
            // These are not of single weights.
            report.effects = Vec::new();
            report.notices.extend(notices);
            report.repeated = false;
        }
        if let Some(healing) = healing.filter(|_| report.heal.is_none()) {
            // As above.
            if let Some(keep) = keep.take() {
                self.keep(keep, &mut report);
            }
            let key = outcome_key(
                report.target,
                report.recipe,
                (bits, searching),
                outcomes,
                &report.calibration,
            );
            let key = key.map(|key| OutcomeKey {
                healed: Some(healing.key()),
                ..key
            });
            let found = report.search.as_ref().map(|search| search.found);
            let plan = report.plan.clone();
            let mut outcome = Outcome::of(&self.model, &dense, plan, report.ratio, found);
            let (text, notices) = ((&text.0[..], text.1), &mut report.notices);
            let (done, kept) = healing.carry_out(self, text, key.as_ref(), notices, events)?;
            if let (Some(key), Some(kept)) = (key, kept) {
                outcome.healed = Some(kept);
                keep = Some(Keep {
                    outcome,
                    key,
                    single: None,
                });
            }
            report.after = Snapshot::take(&self.model);
            report.heal = Some(done);
            // These are not of what was healed.
            report.effects = Vec::new();
            report.repeated = false;
        }
        if effects {
            self.measure(probe, &mut report, events)?;
        }
        if let Some(keep) = keep {
            self.keep(keep, &mut report);
        }
        if let Some(key) = without_effects.filter(|_| report.repeated && !report.effects.is_empty())
        {
            let (effects, notices) = (&report.effects, &mut report.notices);
            self.cache
                .add_effects(effects, &key, &self.file_name(), notices);
        }
        report.notices.extend(effect::notice(&report));
        self.pruned = Some(Box::new(report.clone()));
        Ok(report)
    }

    /// Keeps an outcome and what it does to predictions for the next run.
    fn keep(&self, keep: Keep, report: &mut PruneReport) {
        let Keep {
            mut outcome,
            key,
            single,
        } = keep;
        outcome.effects = report.effects.clone();
        let single = single.as_ref().map(|record| (&self.model, record));
        let name = self.file_name();
        let notices = &mut report.notices;
        self.cache
            .keep_outcome(&outcome, &key, &name, single, notices);
    }

    /// The name of the model's file.
    fn file_name(&self) -> String {
        hub::name_of_file(self.model.path())
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
        let mut method = *method;
        if options.budget.is_some() {
            // Plans that are searched begin with loss curves, whatever these cost.
            method.structure.get_or_insert(method.recipe().structure);
        }
        let judge = match options.target {
            Target::PerplexityRise(_) => JUDGE_TOKENS,
            _ => 0,
        };
        let cached = self.usable_cache(options.cache).has_profiles();
        let room = Room::now(&self.model, Some(options.target), self.has_file);
        let collection = Collection::prepare(self, &method, calibration, judge, cached, room)?;
        Ok((collection.recipe, ProfileSource::Text(Box::new(collection))))
    }

    /// Does again what an earlier run did, if the cache folder knows of it: all of it, where `removing` is what single weights are to go and `healing` how it is healed,
    /// or what was done before these.
    fn repeat(
        &mut self,
        prepared: &mut Prepared,
        removing: Option<&Removing>,
        healing: Option<&Healing>,
        events: &mut Events,
    ) -> Result<Option<Again>, EngineError> {
        let start = Instant::now();
        let calibration = match &prepared.source {
            ProfileSource::File(calibrated) => Some(calibrated.report.clone()),
            ProfileSource::Text(collection) => collection.unread(self),
            ProfileSource::NotNeeded(alone) => removing.map(|r| alone.report(r.scored())),
        };
        let Some(calibration) = calibration else {
            return Ok(None);
        };
        let cache = match removing {
            Some(_) => prepared.cache,
            None => self.outcome_cache(prepared),
        };
        let key = outcome_key(
            prepared.target,
            prepared.recipe,
            (prepared.bits, prepared.searching),
            cache,
            &calibration,
        );
        let key = key.map(|key| OutcomeKey {
            single: removing.map(Removing::key),
            healed: healing.map(Healing::key),
            ..key
        });
        let Some(mut outcome) = key.as_ref().and_then(|key| self.cache.find_outcome(key)) else {
            return Ok(None);
        };
        // What fits the dense model.
        let dense_plan = outcome.types.as_ref().map(|kept| kept.plan(&self.model));
        if dense_plan == Some(None) {
            tracing::warn!("a kept outcome does not fit the model; pruning anew");
            return Ok(None);
        }
        let dense_plan = dense_plan.flatten();
        // What was not measured then is measured now, and so is what single weights and healing add.
        let more = prepared.sparse.is_some() && removing.is_none()
            || prepared.heal.is_some() && healing.is_none();
        let probe = match prepared.effects && (outcome.effects.is_empty() || more) {
            true => self.probe_of(&mut prepared.source, prepared.effort, events)?,
            false => None,
        };
        let before = Snapshot::take(&self.model);
        let applied = {
            let progress = &mut Stage::Pruning.progress(events);
            outcome.apply(&mut self.model, &self.runtime, progress)
        };
        match applied {
            Ok(()) => self.touch(),
            Err(error) if matches!(error.kind, PruneErrorKind::OtherShape(_)) => {
                tracing::warn!("a kept outcome does not fit the model ({error}); pruning anew");
                return Ok(None);
            }
            Err(error) => return Err(self.broken_off(error)),
        }
        let types = match outcome.types.take() {
            Some(kept) => Some(self.retype_again(&kept, dense_plan, &outcome.plan, events)?),
            None => None,
        };
        let (mut sparse, mut notices) = (None, Vec::new());
        if let Some((removing, single)) = removing.zip(outcome.single.take()) {
            let (report, more) = removing.again(self, &single, events)?;
            (sparse, notices) = (Some(report), more);
        }
        let mut heal = None;
        if let Some((healing, healed)) = healing.zip(outcome.healed.take()) {
            heal = Some(healing.again(self, &healed)?);
        }
        let time = start.elapsed();
        let search = outcome.found.map(|found| SearchReport {
            found,
            time: Duration::ZERO,
            speedup: None,
        });
        let report = PruneReport {
            target: prepared.target,
            ratio: outcome.ratio,
            removed: outcome.plan.ratio(),
            method: prepared.method,
            recipe: prepared.recipe,
            plan: outcome.plan,
            calibration,
            search,
            plan_search: None,
            types,
            sparse,
            heal,
            effects: match prepared.effects {
                true => outcome.effects,
                false => Vec::new(),
            },
            no_effects: None,
            after: Snapshot::take(&self.model),
            before,
            time,
            repeated: true,
            notices,
        };
        Ok(Some(Again {
            report,
            without_effects: key.filter(|_| probe.is_some()),
            probe,
        }))
    }

    /// Measures the dense model on what can be had without much work: the mixture only if it need not be written for it.
    fn probe_of(
        &self,
        source: &mut ProfileSource,
        effort: Effort,
        events: &mut Events,
    ) -> Result<Option<Probe>, EngineError> {
        let nothing = ("", &[][..], &[][..], self.bos());
        let (source, tokens, mixture, bos) = match source {
            ProfileSource::File(_) => nothing,
            ProfileSource::Text(collection) => {
                collection.find_text(self);
                let text = collection.text();
                (text.name(), text.unseen(), text.held_back(), text.bos())
            }
            ProfileSource::NotNeeded(alone) => {
                let text = &alone.text;
                (text.name(), text.unseen(), text.held_back(), text.bos())
            }
        };
        let unseen = Unseen {
            source,
            tokens,
            mixture,
            stand_in: effort::tokens_of_effect(&self.model, effort),
        };
        Probe::new(self, unseen, bos, events).map(Some)
    }

    fn prune_anew(
        &mut self,
        mut prepared: Prepared,
        removing: Option<&Removing>,
        events: &mut Events,
    ) -> Result<(PruneReport, Option<Probe>, Option<Keep>), EngineError> {
        let cache = self.outcome_cache(&prepared);
        let (step, bits) = (prepared.step(), prepared.bits);
        let types = self.types(&mut prepared, events)?;
        let types = types.as_ref();
        let Prepared {
            target,
            method,
            recipe,
            source,
            effects,
            effort,
            searching,
            ..
        } = prepared;
        let mut calibrated = match source {
            ProfileSource::File(calibrated) => *calibrated,
            ProfileSource::Text(collection) => collection.carry_out(self, events)?,
            ProfileSource::NotNeeded(_) => unreachable!("there are heads and channels to remove"),
        };
        let calibration = calibrated.report.clone();
        let mut notices = std::mem::take(&mut calibrated.notices);

        let start = Instant::now();
        let how = How {
            recipe,
            step,
            removing,
            types,
        };
        let reached = target::find(self, target, how, &mut calibrated, events)?;
        let (ratio, found) = (reached.ratio, reached.found);
        let search_time = start.elapsed();
        memory::must_hold_pruned(&self.model, ratio)?;

        let probe = match effects {
            true => {
                let unseen = Unseen {
                    source: &calibration.source,
                    tokens: &calibrated.unseen,
                    mixture: &calibrated.held_back,
                    stand_in: effort::tokens_of_effect(&self.model, effort),
                };
                Some(Probe::new(self, unseen, calibrated.bos, events)?)
            }
            false => None,
        };
        let searched = match searching {
            Some(searching) => {
                let notices = &mut notices;
                searching.carry_out(self, &calibrated, recipe, ratio, notices, events)?
            }
            None => None,
        };
        let (better, plan_search) = searched.unzip();
        let dense = columns(&self.model);
        let before = Snapshot::take(&self.model);
        let start = Instant::now();
        let plan = self.carry_out(calibrated, (recipe, ratio, step), better, events)?;
        let time = start.elapsed();
        let key = outcome_key(target, recipe, (bits, searching), cache, &calibration);
        // An outcome has widths in the types before.
        let keep = key.map(|key| {
            let mut outcome = Outcome::of(&self.model, &dense, plan.clone(), ratio, found);
            outcome.types = types.map(|types| KeptTypes::new(&reached.types, types.importance()));
            Keep {
                outcome,
                key,
                single: None,
            }
        });
        let types = match types {
            Some(types) => Some(self.retype(types, &reached.types, &plan, events)?),
            None => None,
        };
        let after = Snapshot::take(&self.model);

        let search = self.search_report(found, search_time)?;
        let report = PruneReport {
            target,
            ratio,
            removed: plan.ratio(),
            method,
            recipe,
            plan,
            calibration,
            search,
            plan_search,
            types,
            sparse: None,
            heal: None,
            effects: Vec::new(),
            no_effects: None,
            before,
            after,
            time,
            repeated: false,
            notices,
        };
        Ok((report, probe, keep))
    }

    /// The report of pruning by which all heads and channels stay, as single weights are to go.
    fn prune_nothing(
        &self,
        prepared: &Prepared,
        removing: Option<&Removing>,
        events: &mut Events,
    ) -> Result<(PruneReport, Option<Probe>), EngineError> {
        let ProfileSource::NotNeeded(alone) = &prepared.source else {
            unreachable!("heads and channels go by a profile");
        };
        let calibration = alone.report(removing.map_or(0, Removing::scored));
        let probe = match prepared.effects {
            true => {
                let unseen = Unseen {
                    source: alone.text.name(),
                    tokens: alone.text.unseen(),
                    mixture: alone.text.held_back(),
                    stand_in: effort::tokens_of_effect(&self.model, prepared.effort),
                };
                Some(Probe::new(self, unseen, alone.text.bos(), events)?)
            }
            false => None,
        };
        let before = Snapshot::take(&self.model);
        let report = PruneReport {
            target: prepared.target,
            ratio: 0.0,
            removed: 0.0,
            method: prepared.method,
            recipe: prepared.recipe,
            plan: Plan::whole(&self.model),
            calibration,
            search: None,
            plan_search: None,
            types: None,
            sparse: None,
            heal: None,
            effects: Vec::new(),
            no_effects: None,
            after: before.clone(),
            before,
            time: Duration::ZERO,
            repeated: false,
            notices: Vec::new(),
        };
        Ok((report, probe))
    }

    /// What smaller types cost, where any may be given.
    fn types(
        &self,
        prepared: &mut Prepared,
        events: &mut Events,
    ) -> Result<Option<Types>, EngineError> {
        let bits = prepared.bits;
        if !bits.changes() {
            return Ok(None);
        }
        let (tokens, bos, name) = match &mut prepared.source {
            ProfileSource::Text(collection) if bits.measures() => {
                // The dense model writes the text, where it is its own.
                collection.write(self, events)?;
                let text = collection.text();
                (collection.unjudged(), text.bos(), text.name())
            }
            _ => (&[][..], None, ""),
        };
        Types::measure(self, bits, tokens, bos, name, events).map(Some)
    }

    /// Gives matrices their new types, in a model whose widths went by `plan`.
    fn retype(
        &mut self,
        types: &Types,
        new: &TypePlan,
        plan: &Plan,
        events: &mut Events,
    ) -> Result<TypesReport, EngineError> {
        let start = Instant::now();
        let Engine { model, runtime, .. } = self;
        let changes = types.apply(model, runtime, new, &plan.layers, events);
        self.touch();
        let changes = changes.map_err(|error| self.broken_off(error))?;
        Ok(types.report(new, changes, start.elapsed()))
    }

    /// Gives matrices the types that they were given in an earlier run.
    fn retype_again(
        &mut self,
        kept: &KeptTypes,
        new: Option<TypePlan>,
        plan: &Plan,
        events: &mut Events,
    ) -> Result<TypesReport, EngineError> {
        let start = Instant::now();
        let Engine { model, runtime, .. } = self;
        let new = new.unwrap_or_else(|| TypePlan::none(model));
        let progress = &mut Stage::Retyping.progress(events);
        let importance = kept.importance.as_ref();
        let changes = new.apply(model, runtime, importance, &plan.layers, progress);
        self.touch();
        let changes = changes.map_err(|error| self.broken_off(error))?;
        Ok(Types::repeated(changes, start.elapsed()))
    }

    /// The removal of single weights, if any are to go; a text that the model writes itself need not be there yet.
    fn removing(&self, prepared: &Prepared) -> Result<Option<Removing>, EngineError> {
        let Some(sparse) = prepared.sparse else {
            return Ok(None);
        };
        let (tokens, bos) = match &prepared.source {
            ProfileSource::File(_) => (&[][..], None),
            ProfileSource::Text(collection) => (collection.unjudged(), collection.text().bos()),
            ProfileSource::NotNeeded(alone) => (alone.text.tokens(), alone.text.bos()),
        };
        let held_back = sparse::tokens_of_curves(prepared.effort);
        let kernels = self.runtime.kernels;
        Removing::new(&self.model, kernels, sparse, held_back, tokens, bos).map(Some)
    }

    /// Measures the pruned model.
    fn measure(
        &self,
        probe: Option<Probe>,
        report: &mut PruneReport,
        events: &mut Events,
    ) -> Result<(), EngineError> {
        let Some(probe) = probe else {
            return Ok(());
        };
        match probe.effects(self, events) {
            Ok(measured) if measured.is_empty() => report.no_effects = Some(NoEffects::NoText),
            Ok(measured) => report.effects = measured,
            // It is too late to leave the model as it was.
            Err(EngineError::Cancelled(_)) => report.no_effects = Some(NoEffects::Cancelled),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// What is taken from the cache folder and kept there: no outcomes where groups of single weights ask for widths that are not those
    /// of the key, or a ratio was looked for together with them.
    fn outcome_cache(&self, prepared: &Prepared) -> Cache {
        let step = prepared.step();
        let whole = |len: usize| len.is_multiple_of(step);
        let blocks = self.model.layers.iter();
        let mut blocks = blocks.map(|layer| layer.down.weight.block_type.block_len());
        // Long blocks may change to those of 32.
        // What is found for single weights is not what is found without.
        let found_alone = prepared.sparse.is_none() || matches!(prepared.target, Target::Ratio(_));
        match (
            found_alone && whole(32) && blocks.all(whole),
            prepared.cache,
        ) {
            (false, Cache::All) => Cache::Profiles,
            (_, cache) => cache,
        }
    }

    /// Prunes in place, by a plan if there is one already. The profile is given back, so that memory can be looked at afterwards.
    fn carry_out(
        &mut self,
        mut calibrated: Calibrated,
        (recipe, ratio, step): (Recipe, f64, usize),
        plan: Option<Plan>,
        events: &mut Events,
    ) -> Result<Plan, EngineError> {
        let events = Shared::new(events);
        let layers = &mut events.progress(Stage::Pruning);
        let passes = &mut events.progress(Stage::Covariances);
        let Engine { model, runtime, .. } = self;
        match calibrated.prune(model, runtime, (recipe, ratio, step), plan, layers, passes) {
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
    (bits, searching): (Bits, Option<Searching>),
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
        single: None,
        plans: searching.map(Searching::key),
        types: bits.key(),
        healed: None,
        flapjack: env!("CARGO_PKG_VERSION").to_owned(),
    })
}
