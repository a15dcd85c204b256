//! Finding the ratio for what is wanted of the result: a size, a speed, a quality.

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use super::metric::{LayerScores, score};
use super::plan::{Plan, RATIOS};
use super::structure::{self, Division, Shares, plan};
use super::substitute::{self, Choice};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::prune::collect::Profile;
use crate::prune::error::PruneError;
use crate::prune::exact;
use crate::prune::recipe::Recipe;

/// What a model is pruned to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Target {
    /// This share of the layers' weights goes.
    Ratio(#[serde(with = "exact")] f64),
    /// As little goes as makes all weights fit in so many bytes.
    Bytes(u64),
    /// As little goes as should make generation so many times as fast.
    Speedup(#[serde(with = "exact")] f64),
    /// As much goes as raises the perplexity of held-back text by at most this share of it.
    PerplexityRise(#[serde(with = "exact")] f64),
}

/// No target is NaN: every target is equal to itself.
impl Eq for Target {}

impl Hash for Target {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::mem::discriminant(self).hash(state);
        match self {
            Target::Ratio(x) | Target::Speedup(x) | Target::PerplexityRise(x) => {
                // Both zeros are equal, and so are their hashes.
                (x + 0.0).to_bits().hash(state);
            }
            Target::Bytes(bytes) => bytes.hash(state),
        }
    }
}

/// What was found where a ratio was looked for, by what it was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Found {
    /// Bytes of all weights.
    Bytes { before: u64, after: u64 },
    /// What a token costs in generation.
    Speed {
        /// Bytes of weights that a token reads of the dense model.
        bytes_before: u64,
        /// Bytes of weights that a token reads of the pruned model.
        bytes_after: u64,
        /// Tokens per second of the dense model, as measured.
        #[serde(with = "exact")]
        before: f64,
        /// Tokens per second of the pruned model, as predicted.
        #[serde(with = "exact")]
        predicted: f64,
    },
    /// How well held-back text is predicted.
    Perplexity {
        /// Tokens of that text.
        tokens: usize,
        /// The perplexity of the dense model.
        #[serde(with = "exact")]
        dense: f64,
        /// By what share of it the ratio raises it.
        #[serde(with = "exact")]
        rise: f64,
        /// The smallest ratio tried that raises it too far, and by what share; `None` where none did.
        #[serde(with = "exact::optional_pair")]
        beyond: Option<(f64, f64)>,
    },
}

/// The step between the ratios that [`Planner`] looks for one among.
const STEP: f64 = 1e-4;

/// Measurements that [`largest_ratio`] makes at most.
const MEASUREMENTS: usize = 8;
/// The distance of two ratios that [`largest_ratio`] no longer tells apart.
const CLOSE: f64 = 0.01;
/// The ratio that [`largest_ratio`] tries first.
const FIRST: f64 = 0.25;
/// The share of the limit from which on [`largest_ratio`] takes a rise for good enough.
const CLOSE_SHARE: f64 = 0.9;

/// Makes plans of any ratio from one profile.
#[derive(Debug)]
pub struct Planner<'a> {
    model: &'a Model,
    profile: &'a Profile,
    recipe: Recipe,
    scores: Vec<LayerScores>,
    choices: Vec<Option<Choice>>,
    /// What numbers of channels are multiples of, beside what block formats need.
    step: usize,
}

impl<'a> Planner<'a> {
    /// Scores the model's features, and measures what types its projections may change to.
    ///
    /// # Errors
    /// Those of [`score`].
    pub fn new(
        model: &'a Model,
        runtime: &Runtime,
        profile: &'a Profile,
        recipe: Recipe,
    ) -> Result<Self, PruneError> {
        Ok(Self {
            scores: score(model, runtime, profile, recipe.metric)?,
            choices: substitute::choices(model, runtime, profile)?,
            model,
            profile,
            recipe,
            step: 1,
        })
    }

    /// Lets plans have numbers of channels that are multiples of `step`, of which the model's must be multiples too.
    pub fn in_steps(self, step: usize) -> Self {
        Self { step, ..self }
    }

    /// The plan of a ratio.
    ///
    /// # Errors
    /// Those of [`plan()`].
    pub fn plan(&self, ratio: f64) -> Result<Plan, PruneError> {
        let plan = plan(self.model, &self.scores, self.division(), ratio)?;
        Ok(plan.in_steps(self.model, &self.scores, self.step))
    }

    /// The same before it is a plan, and not in steps.
    ///
    /// # Errors
    /// Those of [`plan()`].
    pub fn shares(&self, ratio: f64) -> Result<Shares, PruneError> {
        structure::shares(self.model, &self.scores, self.division(), ratio)
    }

    fn division(&self) -> Division<'_> {
        Division {
            structure: self.recipe.structure,
            heads: self.recipe.heads,
            curves: self.profile.curves.as_ref(),
            choices: &self.choices,
        }
    }

    /// The ratio at which everything goes that costs at most `price`, in nats per parameter, by the loss curves; 0 where the recipe goes
    /// by none.
    ///
    /// # Errors
    /// If the profile has no curves.
    pub fn ratio_at(&self, price: f64) -> Result<f64, PruneError> {
        if !self.recipe.wants_curves() {
            return Ok(0.0);
        }
        let ratio = structure::ratio_at(self.model, &self.scores, self.division(), price)?;
        Ok(ratio.min(RATIOS.end - STEP))
    }

    /// The plan of the largest ratio, below the end of [`RATIOS`].
    ///
    /// # Errors
    /// Those of [`plan()`].
    pub fn most(&self) -> Result<Plan, PruneError> {
        self.plan(RATIOS.end - STEP)
    }

    /// The smallest ratio, to four digits, whose plan is small enough, and the plan; `None` if there is none. Plans must get
    /// smaller with the ratio, which they do but for rounding.
    ///
    /// # Errors
    /// Those of [`plan()`].
    pub fn smallest_ratio(
        &self,
        small_enough: impl Fn(&Plan) -> bool,
    ) -> Result<Option<(f64, Plan)>, PruneError> {
        let ratio = |step: usize| step as f64 * STEP;
        let none = self.plan(0.0)?;
        if small_enough(&none) {
            return Ok(Some((0.0, none)));
        }
        // The steps of a ratio whose plan is too large, and of one whose plan is small enough.
        let (mut above, mut below) = (0, ((RATIOS.end - STEP) / STEP).round() as usize);
        let mut found = self.plan(ratio(below))?;
        if !small_enough(&found) {
            return Ok(None);
        }
        while below - above > 1 {
            let middle = (above + below) / 2;
            let plan = self.plan(ratio(middle))?;
            match small_enough(&plan) {
                true => (below, found) = (middle, plan),
                false => above = middle,
            }
        }
        Ok(Some((ratio(below), found)))
    }
}

/// What [`largest_ratio`] has found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Largest {
    /// The largest ratio measured whose rise is within the limit, and its rise; (0, 0) if there was none.
    pub within: (f64, f64),
    /// The smallest ratio measured whose rise is beyond the limit, and its rise; `None` if there was none.
    pub beyond: Option<(f64, f64)>,
}

/// Searches the largest ratio by which something rises by at most `limit`, which must be above 0. `measure` tells how far it
/// rises at a ratio, and is asked at most eight times.
///
/// The rise is taken as roughly quadratic: the ratios tried are those where its root would reach the limit's, between the
/// ratios that bound it so far.
///
/// # Errors
/// Those of `measure`.
pub fn largest_ratio<E>(
    limit: f64,
    mut measure: impl FnMut(f64) -> Result<f64, E>,
) -> Result<Largest, E> {
    let most = RATIOS.end - STEP;
    let mut within = (0.0f64, 0.0f64);
    let mut beyond: Option<(f64, f64)> = None;
    let root = |rise: f64| rise.max(0.0).sqrt();
    for _ in 0..MEASUREMENTS {
        let end = beyond.map_or(most, |(ratio, _)| ratio);
        let gap = end - within.0;
        if gap <= CLOSE || within.1 >= CLOSE_SHARE * limit {
            break;
        }
        let guess = match beyond {
            Some((ratio, rise)) if rise.is_finite() => {
                let slope = (root(rise) - root(within.1)) / (ratio - within.0);
                within.0 + (root(limit) - root(within.1)) / slope
            }
            None if within.0 == 0.0 => FIRST,
            None => within.0 * root(limit) / root(within.1).max(1e-9),
            Some(_) => within.0 + gap / 2.0,
        };
        let guess = guess.clamp(within.0 + 0.1 * gap, end - 0.1 * gap);
        let ratio = (guess / STEP).round() * STEP;
        let rise = measure(ratio)?;
        match rise <= limit {
            true => within = (ratio, rise),
            false => beyond = Some((ratio, rise)),
        }
    }
    Ok(Largest { within, beyond })
}
