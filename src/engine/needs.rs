//! What a profile must hold for a recipe: loss curves, and as many covariances as there is memory for. How a text is shared out
//! among what is taken from it.

use std::ops::Range;

use super::error::EngineError;
use super::memory::Allotted;
use super::report::{Notice, Shortage};
use crate::model::Model;
use crate::prune::{
    self, Collected, CurveLevels, CurveOptions, PruneError, PruneErrorKind, Recipe, Restore,
    calibrate, curves, groups,
};

/// Tokens below which a text does not tell whether a model is still a good one.
const LEAST_JUDGE_TOKENS: usize = 256;

/// What a profile must hold, and how many tokens of the text are kept from it for judging.
#[derive(Debug)]
pub(super) struct Needs {
    pub covariances: Covariances,
    /// How loss curves are measured; `None` where the recipe does without.
    pub curves: Option<CurveOptions>,
    pub judge: usize,
}

/// How covariances are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Covariances {
    None,
    All,
    /// Those of some layers at a time.
    InGroups(Vec<Range<usize>>),
}

/// How many of a text's tokens statistics are taken from, and loss curves behind them; the rest is for judging.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shares {
    pub statistics: usize,
    pub curves: usize,
}

impl Needs {
    /// Loss curves, where the recipe wants them, are measured at these levels.
    pub fn new(
        recipe: Recipe,
        levels: CurveLevels,
        covariances: Covariances,
        judge: usize,
    ) -> Self {
        let curves = recipe.wants_curves().then(|| CurveOptions {
            metric: recipe.metric,
            heads: recipe.heads,
            restore: recipe.restore.of_one_module(),
            levels,
        });
        Self {
            covariances,
            curves,
            judge,
        }
    }

    /// Everything that profiles of the same model and text differ by.
    pub fn collected(&self) -> Collected {
        Collected {
            covariances: match self.covariances {
                Covariances::None => prune::Covariances::None,
                Covariances::All => prune::Covariances::All,
                // However large the groups are, curves and outcomes are the same.
                Covariances::InGroups(_) => prune::Covariances::InGroups,
            },
            judge_tokens: self.judge,
            curves: self.curves.clone(),
        }
    }

    /// How a text of so many tokens is shared out.
    ///
    /// # Errors
    /// If there are too few for what is to be taken from them.
    pub fn share_out(&self, tokens: usize) -> Result<Shares, PruneError> {
        let (least_curves, most_curves) = match &self.curves {
            Some(options) => (curves::LEAST_TOKENS, options.levels.tokens),
            None => (0, 0),
        };
        let least_judge = self.judge.min(LEAST_JUDGE_TOKENS);
        let least = calibrate::LEAST_TOKENS + least_curves + least_judge;
        if tokens < least {
            return Err(PruneErrorKind::TooShort { tokens, least }.into());
        }
        let curves = most_curves.min(tokens / 4).max(least_curves);
        let judge = self.judge.min(tokens / 4).max(least_judge);
        Ok(Shares {
            statistics: tokens - curves - judge,
            curves,
        })
    }
}

impl Covariances {
    /// As many as the recipe needs and as there is memory for. Where not even those of one layer fit and the recipe can do without, it does, and that is noticed.
    ///
    /// # Errors
    /// If what the recipe cannot do without does not fit.
    pub fn that_fit(
        model: &Model,
        recipe: Recipe,
        allotted: Allotted,
        notices: &mut Vec<Notice>,
    ) -> Result<Self, EngineError> {
        if !recipe.wants_covariance() {
            return Ok(Covariances::None);
        }
        let layers = model.layers.iter().map(groups::covariance_bytes);
        let (all, largest): (u64, u64) = (layers.clone().sum(), layers.max().unwrap_or(0));
        tracing::debug!("covariances take {} MiB", all >> 20);
        let Some(allowed) = allotted.covariances.filter(|allowed| *allowed < all) else {
            return Ok(Covariances::All);
        };
        let shortage = |needed| Shortage {
            needed,
            allowed,
            set: allotted.set,
        };
        if recipe.metric.wants_covariance() {
            return Err(EngineError::MetricMemory {
                metric: recipe.metric,
                shortage: shortage(all),
            });
        }
        if let Some(ranges) = groups::partition(model, allowed) {
            return Ok(Covariances::InGroups(ranges));
        }
        let shortage = shortage(largest);
        if recipe.restore != Restore::Auto {
            return Err(EngineError::LayerMemory { shortage });
        }
        notices.push(Notice::BiasesForMemory(shortage));
        Ok(Covariances::None)
    }
}
