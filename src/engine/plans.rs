//! Search over whole plans, between choosing a plan and carrying it out, where there is time for it.

use std::time::{Duration, Instant};

use super::error::{EngineError, NoSearch};
use super::events::{Events, Stage};
use super::options::PruneOptions;
use super::profile::Calibrated;
use super::report::{Notice, PlanSearchReport};
use super::{Engine, memory};
use crate::heal::{Search, can_train, search_bytes};
use crate::model::Model;
use crate::prune::{Plan, Planner, Recipe, Target};

/// A search that is to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Searching {
    /// How long it may take; `None` for `plans` plans.
    budget: Option<Duration>,
    /// As many for any machine, so that the same comes out.
    plans: usize,
}

impl Searching {
    /// `None` where there is none: without a budget where the effort has no time for `plans`, and where nothing is to be searched.
    ///
    /// # Errors
    /// If there is a budget, and nothing to spend it on.
    pub fn new(
        model: &Model,
        options: &PruneOptions,
        recipe: Recipe,
        plans: usize,
    ) -> Result<Option<Self>, EngineError> {
        let reason = match options.target {
            _ if options.profile.is_some() => Some(NoSearch::ProfileFile),
            Target::Ratio(ratio) if ratio > 0.0 => None,
            _ => Some(NoSearch::Target),
        };
        let reason = reason.or((!recipe.wants_curves()).then_some(NoSearch::Curves));
        let reason = reason.or(options.sparse.is_some().then_some(NoSearch::Sparse));
        let reason = reason.or((!can_train(model)).then_some(NoSearch::Family));
        match (options.budget, reason) {
            (Some(_), Some(reason)) => Err(EngineError::NoSearch(reason)),
            (None, Some(_)) => Ok(None),
            (None, None) if plans == 0 => Ok(None),
            (budget, None) => Ok(Some(Self { budget, plans })),
        }
    }

    /// What an outcome is known by.
    pub fn key(self) -> String {
        match self.budget {
            Some(budget) => format!("{} s", budget.as_secs_f64()),
            None => format!("{} plans", self.plans),
        }
    }

    /// The best plan of a ratio that is found; `None` where the search could not be made.
    ///
    /// # Errors
    /// If weights are not numbers, or the model cannot be run.
    pub fn carry_out(
        self,
        engine: &Engine,
        calibrated: &Calibrated,
        recipe: Recipe,
        ratio: f64,
        notices: &mut Vec<Notice>,
        events: &mut Events,
    ) -> Result<Option<(Plan, PlanSearchReport)>, EngineError> {
        let start = Instant::now();
        let (model, profile) = (&engine.model, &calibrated.stored.profile);
        let bytes = search_bytes(model);
        let in_groups = calibrated.groups.is_some();
        if in_groups || memory::must_hold_healing(bytes, None).is_err() {
            notices.push(Notice::NoPlanSearch { bytes, in_groups });
            return Ok(None);
        }
        let planner = Planner::new(model, &engine.runtime, profile, recipe)?;
        let search = Search {
            model,
            runtime: &engine.runtime,
            profile,
            restore: recipe.restore.of_one_module(),
            shares: planner.shares(ratio)?,
            text: &calibrated.curves,
            bos: calibrated.bos,
            plans: self.budget.map_or(self.plans, |_| usize::MAX),
            budget: self.budget,
        };
        let found = search.run(&mut Stage::Plans.progress(events))?;
        let report = PlanSearchReport {
            tried: found.tried,
            better: found.better,
            before: found.before,
            after: found.after,
            tokens: found.tokens,
            time: start.elapsed(),
        };
        Ok(Some((found.plan, report)))
    }
}
