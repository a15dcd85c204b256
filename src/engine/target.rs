//! The ratio that reaches a target: a size, a speed, a perplexity.

use super::Engine;
use super::effect;
use super::error::{Doing, EngineError, OutOfReach};
use super::events::{Events, Shared, Stage};
use super::memory;
use super::profile::Calibrated;
use super::sparse::Removing;
use crate::eval::TokenTime;
use crate::model::Model;
use crate::prune::{Found, Plan, Planner, PruneError, Recipe, Target, search};

/// How the model will be pruned by the ratio.
#[derive(Clone, Copy)]
pub(super) struct How<'a> {
    pub recipe: Recipe,
    /// What numbers of channels must be multiples of, beside what block formats need.
    pub step: usize,
    /// Single weights that go afterwards.
    pub removing: Option<&'a Removing>,
}

impl How<'_> {
    fn planner<'a>(
        self,
        engine: &'a Engine,
        calibrated: &'a Calibrated,
    ) -> Result<Planner<'a>, PruneError> {
        let Engine { model, runtime, .. } = engine;
        let planner = Planner::new(model, runtime, &calibrated.stored.profile, self.recipe)?;
        Ok(planner.in_steps(self.step))
    }

    /// Bytes of all weights in the end.
    fn bytes_after(self, plan: &Plan, model: &Model) -> usize {
        match self.removing {
            Some(removing) => plan.bytes_by(model, |block_type, rows, cols| {
                removing.bytes(block_type, rows, cols)
            }),
            None => plan.bytes_after(model),
        }
    }
}

/// The ratio for a target, and what it was chosen for, where the target is not a ratio itself.
pub(super) fn find_ratio(
    engine: &Engine,
    target: Target,
    how: How,
    calibrated: &mut Calibrated,
    events: &mut Events,
) -> Result<(f64, Option<Found>), EngineError> {
    let (ratio, found) = match target {
        Target::Ratio(ratio) => return Ok((ratio, None)),
        Target::Bytes(bytes) => for_size(engine, bytes, how, calibrated)?,
        Target::Speedup(factor) => for_speed(engine, factor, how, calibrated)?,
        Target::PerplexityRise(limit) => for_perplexity(engine, limit, how, calibrated, events)
            .map_err(EngineError::at(Doing::Searching))?,
    };
    Ok((ratio, Some(found)))
}

/// The smallest ratio at which all weights fit in so many bytes.
fn for_size(
    engine: &Engine,
    bytes: u64,
    how: How,
    calibrated: &Calibrated,
) -> Result<(f64, Found), EngineError> {
    let (model, planner) = (&engine.model, how.planner(engine, calibrated)?);
    let fits = |plan: &Plan| how.bytes_after(plan, model) as u64 <= bytes;
    let Some((ratio, plan)) = planner.smallest_ratio(fits)? else {
        let least = how.bytes_after(&planner.most()?, model);
        return Err(OutOfReach::Bytes { bytes, least }.into());
    };
    let found = Found::Bytes {
        before: model.bytes() as u64,
        after: how.bytes_after(&plan, model) as u64,
    };
    Ok((ratio, found))
}

/// The smallest ratio at which generation should be so many times as fast.
fn for_speed(
    engine: &Engine,
    factor: f64,
    how: How,
    calibrated: &Calibrated,
) -> Result<(f64, Found), EngineError> {
    let Engine { model, runtime, .. } = engine;
    let planner = how.planner(engine, calibrated)?;
    let dense = TokenTime::measure(model, runtime)?;
    // Of the embedding a token reads one row, unless it is the output head too.
    let unread = model.bytes() - model.bytes_per_token();
    let speed = |plan: &Plan| dense.speed_at(how.bytes_after(plan, model) - unread);
    let fast_enough = |plan: &Plan| speed(plan) >= factor * dense.speed();
    let Some((ratio, plan)) = planner.smallest_ratio(fast_enough)? else {
        return Err(OutOfReach::Speed {
            factor,
            most: speed(&planner.most()?) / dense.speed(),
            share: dense.per_byte * dense.bytes as f64 / dense.seconds,
        }
        .into());
    };
    let found = Found::Speed {
        bytes_before: dense.bytes as u64,
        bytes_after: (how.bytes_after(&plan, model) - unread) as u64,
        before: dense.speed(),
        predicted: speed(&plan),
    };
    Ok((ratio, found))
}

/// The largest ratio whose perplexity on the text kept for judging rises by at most `limit`. Models pruned by one ratio after
/// another are measured, each loaded anew: pruning rewrites the map, and the dense model is needed again.
fn for_perplexity(
    engine: &Engine,
    limit: f64,
    how: How,
    calibrated: &mut Calibrated,
    events: &mut Events,
) -> Result<(f64, Found), EngineError> {
    let runtime = &engine.runtime;
    let (tokens, bos) = (calibrated.judge.clone(), calibrated.bos);
    let events = Shared::new(events);
    let mut tried = 0;
    let judge = |model: &Model, tried| {
        let progress = &mut |_, _| events.tell(Stage::Searching, tried, 0);
        effect::perplexity(model, runtime, &tokens, bos, progress)
    };
    let dense = judge(&engine.model, tried)?;
    let mut rise_at = |ratio: f64| -> Result<f64, EngineError> {
        let mut model = engine.load_again()?;
        memory::must_hold_pruned(&model, ratio)?;
        if ratio > 0.0 {
            let layers = &mut |_, _| events.tell(Stage::Searching, tried, 0);
            let passes = &mut events.progress(Stage::Covariances);
            let How { recipe, step, .. } = how;
            calibrated.prune(&mut model, runtime, recipe, ratio, step, layers, passes)?;
        }
        if let Some(removing) = how.removing {
            removing.remove(&mut model, runtime, &mut |_| {
                events.tell(Stage::Searching, tried, 0)
            })?;
        }
        let rise = judge(&model, tried)? / dense - 1.0;
        tracing::info!("ratio {ratio:.4}: perplexity {:+.1} %", rise * 100.0);
        tried += 1;
        Ok(rise)
    };
    let alone = match how.removing {
        Some(removing) => {
            let (rise, sparsity) = (rise_at(0.0)?, removing.sparsity());
            if rise > limit {
                let far = OutOfReach::SparsePerplexity {
                    limit,
                    sparsity,
                    rise,
                };
                return Err(far.into());
            }
            Some(rise)
        }
        None => None,
    };
    let search = search::largest_ratio(limit, rise_at)?;
    match search.within {
        (0.0, _) if alone.is_none() => Err(OutOfReach::Perplexity {
            limit,
            smallest: search.beyond,
        }
        .into()),
        (ratio, rise) => {
            let rise = alone.filter(|_| ratio == 0.0).unwrap_or(rise);
            let found = Found::Perplexity {
                tokens: tokens.len(),
                dense,
                rise,
                beyond: search.beyond,
            };
            Ok((ratio, found))
        }
    }
}
