//! The ratio that reaches a target: a size, a speed, a perplexity.

use super::Engine;
use super::bits::Types;
use super::effect;
use super::error::{Doing, EngineError, OutOfReach};
use super::events::{Events, Shared, Stage};
use super::memory;
use super::profile::Calibrated;
use super::sparse::Removing;
use crate::eval::TokenTime;
use crate::model::Model;
use crate::prune::bits::{Joint, JointPlan, TypeCurves, TypePlan};
use crate::prune::{Found, Plan, Planner, PruneError, Recipe, Target, search};

/// How the model will be pruned by the ratio.
#[derive(Clone, Copy)]
pub(super) struct How<'a> {
    pub recipe: Recipe,
    /// What numbers of channels must be multiples of, beside what block formats need.
    pub step: usize,
    /// Single weights that go afterwards.
    pub removing: Option<&'a Removing>,
    /// Types that may change; `None` where none may.
    pub types: Option<&'a Types>,
}

/// What a target has come to.
#[derive(Debug)]
pub(super) struct Reached {
    pub ratio: f64,
    /// What it was chosen for; `None` where the target is a ratio itself.
    pub found: Option<Found>,
    pub types: TypePlan,
}

impl<'h> How<'h> {
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
            None => self.fixed(model).bytes_after(model, plan),
        }
    }

    /// The types that are given in any case.
    fn fixed(self, model: &Model) -> TypePlan {
        match self.types {
            Some(types) => types.fixed(model),
            None => TypePlan::none(model),
        }
    }

    /// What smaller types cost, where they are found together with widths.
    fn joint(self) -> Option<(&'h Types, &'h TypeCurves)> {
        self.types.and_then(|types| Some((types, types.joint()?)))
    }

    /// Finds widths and types together.
    fn with_joint<T>(
        self,
        engine: &Engine,
        calibrated: &Calibrated,
        (types, curves): (&Types, &TypeCurves),
        find: impl FnOnce(&Joint) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let model = &engine.model;
        let planner = match types.bits.keeps_widths() {
            true => None,
            false => Some(self.planner(engine, calibrated)?),
        };
        find(&Joint::new(
            model,
            planner.as_ref(),
            curves,
            types.fixed(model),
        ))
    }
}

/// The ratio and the types for a target.
pub(super) fn find(
    engine: &Engine,
    target: Target,
    how: How,
    calibrated: &mut Calibrated,
    events: &mut Events,
) -> Result<Reached, EngineError> {
    if let Some(joint) = how.joint() {
        return find_joint(engine, target, how, joint, calibrated, events);
    }
    let (ratio, found) = find_ratio(engine, target, how, calibrated, events)?;
    Ok(Reached {
        ratio,
        found,
        types: how.fixed(&engine.model),
    })
}

/// Widths and types for a target that is not a ratio.
fn find_joint(
    engine: &Engine,
    target: Target,
    how: How,
    joint: (&Types, &TypeCurves),
    calibrated: &mut Calibrated,
    events: &mut Events,
) -> Result<Reached, EngineError> {
    let model = &engine.model;
    let before = model.bytes() as u64;
    let reached = |plan: JointPlan, found| Reached {
        ratio: plan.ratio,
        found: Some(found),
        types: plan.types,
    };
    match target {
        Target::Ratio(_) => unreachable!("a ratio is of widths alone"),
        Target::Bytes(bytes) => how.with_joint(engine, calibrated, joint, |joint| {
            match joint.smallest(|plan| plan.bytes as u64 <= bytes)? {
                Some(plan) => {
                    let after = plan.bytes as u64;
                    Ok(reached(plan, Found::Bytes { before, after }))
                }
                None => {
                    let least = joint.least()?.bytes;
                    Err(OutOfReach::Bytes { bytes, least }.into())
                }
            }
        }),
        Target::Speedup(factor) => {
            let dense = TokenTime::measure(model, &engine.runtime)?;
            let read = |plan: &JointPlan| plan.bytes - plan.types.unread_bytes(model);
            let speed = |plan: &JointPlan| dense.speed_at(read(plan));
            how.with_joint(engine, calibrated, joint, |joint| {
                match joint.smallest(|plan| speed(plan) >= factor * dense.speed())? {
                    Some(plan) => {
                        let found = Found::Speed {
                            bytes_before: dense.bytes as u64,
                            bytes_after: read(&plan) as u64,
                            before: dense.speed(),
                            predicted: speed(&plan),
                        };
                        Ok(reached(plan, found))
                    }
                    None => Err(OutOfReach::Speed {
                        factor,
                        most: speed(&joint.least()?) / dense.speed(),
                        share: dense.per_byte * dense.bytes as f64 / dense.seconds,
                    }
                    .into()),
                }
            })
        }
        Target::PerplexityRise(limit) => {
            joint_for_perplexity(engine, limit, how, joint, calibrated, events)
                .map_err(EngineError::at(Doing::Searching))
        }
    }
}

/// As many bytes less as raise the perplexity on the text kept for judging by at most `limit`.
fn joint_for_perplexity(
    engine: &Engine,
    limit: f64,
    how: How,
    joint: (&Types, &TypeCurves),
    calibrated: &mut Calibrated,
    events: &mut Events,
) -> Result<Reached, EngineError> {
    let mut trials = Trials::new(engine, how, calibrated, events)?;
    let before = engine.model.bytes();
    let at = |share: f64, calibrated: &Calibrated| {
        let bytes = before as f64 * (1.0 - share);
        how.with_joint(engine, calibrated, joint, |joint| {
            Ok(joint.smallest(|plan| plan.bytes as f64 <= bytes)?)
        })
    };
    let search = search::largest_ratio(limit, |share| -> Result<f64, EngineError> {
        let Some(plan) = at(share, trials.calibrated)? else {
            return Ok(f64::INFINITY);
        };
        let rise = trials.rise(plan.ratio, |model, pruned, events| {
            let kept = pruned.map_or(plan.widths.layers, |done| done.layers);
            let types = joint.0;
            types.apply(model, &engine.runtime, &plan.types, &kept, events)?;
            Ok(())
        })?;
        let (less, rise_percent) = (share * 100.0, rise * 100.0);
        tracing::info!("{less:.1} % of the bytes less: perplexity {rise_percent:+.1} %");
        Ok(rise)
    })?;
    let (share, rise) = search.within;
    let plan = match share > 0.0 {
        true => at(share, trials.calibrated)?,
        false => None,
    };
    let Some(plan) = plan else {
        let smallest = search.beyond;
        return Err(OutOfReach::Perplexity { limit, smallest }.into());
    };
    Ok(Reached {
        ratio: plan.ratio,
        found: Some(trials.found(rise, None)),
        types: plan.types,
    })
}

/// The ratio for a target, and what it was chosen for, where the target is not a ratio itself.
fn find_ratio(
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

/// The largest ratio whose perplexity on the text kept for judging rises by at most `limit`.
fn for_perplexity(
    engine: &Engine,
    limit: f64,
    how: How,
    calibrated: &mut Calibrated,
    events: &mut Events,
) -> Result<(f64, Found), EngineError> {
    let mut trials = Trials::new(engine, how, calibrated, events)?;
    let mut rise_at = |ratio: f64| -> Result<f64, EngineError> {
        let rise = trials.rise(ratio, |model, _, events| {
            if let Some(removing) = how.removing {
                removing.remove(model, &engine.runtime, events)?;
            }
            Ok(())
        })?;
        tracing::info!("ratio {ratio:.4}: perplexity {:+.1} %", rise * 100.0);
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
            Ok((ratio, trials.found(rise, search.beyond)))
        }
    }
}

/// Models pruned on trial, one after another, and judged on the text kept for it. Each is loaded anew: pruning rewrites the map, and
/// the dense model is needed again.
struct Trials<'a, 'e> {
    engine: &'a Engine,
    how: How<'a>,
    calibrated: &'a mut Calibrated,
    events: Shared<'a, 'e>,
    /// Models judged so far, besides the dense one.
    tried: usize,
    /// The perplexity of the dense model on that text.
    dense: f64,
}

impl<'a, 'e> Trials<'a, 'e> {
    fn new(
        engine: &'a Engine,
        how: How<'a>,
        calibrated: &'a mut Calibrated,
        events: &'a mut Events<'e>,
    ) -> Result<Self, EngineError> {
        let mut trials = Self {
            engine,
            how,
            calibrated,
            events: Shared::new(events),
            tried: 0,
            dense: f64::NAN,
        };
        trials.dense = trials.perplexity(&engine.model)?;
        Ok(trials)
    }

    /// How much the perplexity of a model rises, as a share of the dense model's, if it is pruned by `ratio` and then changed by `change`. `change` is given
    /// the plan that was carried out, or `None` if the ratio is 0.
    fn rise(
        &mut self,
        ratio: f64,
        change: impl FnOnce(&mut Model, Option<Plan>, &mut Events) -> Result<(), EngineError>,
    ) -> Result<f64, EngineError> {
        let mut model = self.engine.load_again()?;
        memory::must_hold_pruned(&model, ratio)?;
        let mut pruned = None;
        if ratio > 0.0 {
            let layers = &mut |_, _| self.events.tell(Stage::Searching, self.tried, 0);
            let passes = &mut self.events.progress(Stage::Covariances);
            let (runtime, how) = (&self.engine.runtime, self.how);
            let to = (how.recipe, ratio, how.step);
            let plan = self
                .calibrated
                .prune(&mut model, runtime, to, None, layers, passes)?;
            pruned = Some(plan);
        }
        change(&mut model, pruned, &mut |_| {
            self.events.tell(Stage::Searching, self.tried, 0)
        })?;
        let rise = self.perplexity(&model)? / self.dense - 1.0;
        self.tried += 1;
        Ok(rise)
    }

    fn perplexity(&self, model: &Model) -> Result<f64, EngineError> {
        let progress = &mut |_, _| self.events.tell(Stage::Searching, self.tried, 0);
        let Calibrated { judge, bos, .. } = &*self.calibrated;
        effect::perplexity(model, &self.engine.runtime, judge, *bos, progress)
    }

    /// The report of a search that ended with this rise. `beyond` is the smallest ratio tried that was too much, and its rise; `None` if there is none.
    fn found(&self, rise: f64, beyond: Option<(f64, f64)>) -> Found {
        Found::Perplexity {
            tokens: self.calibrated.judge.len(),
            dense: self.dense,
            rise,
            beyond,
        }
    }
}
