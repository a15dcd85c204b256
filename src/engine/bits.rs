//! Smaller types, together with widths or by themselves: on what text they are measured, and giving the model them.

use std::time::{Duration, Instant};

use super::Engine;
use super::error::{Doing, EngineError};
use super::events::{Events, Stage};
use super::options::{HeadType, PruneOptions};
use super::report::TypesReport;
use crate::kernels::Runtime;
use crate::model::Model;
use crate::prune::bits::{self, Importance, Level, Moves, TypeChanges, TypeCurves, TypePlan};
use crate::prune::{Calibration, LayerPlan, PruneError, PruneErrorKind, Target, calibrate, curves};

/// Tokens that the importance of inputs is taken from at most.
const STATISTICS: usize = 8192;
/// Tokens that divergences are measured on at most.
const HELD_BACK: usize = 512;
/// What a head that is to be as small as it can be may cost, in nats per token.
const HEAD_LOSS: f64 = 0.02;

/// Whether types may change, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits {
    pub moves: Moves,
    pub head: HeadType,
}

impl Bits {
    /// What of it makes sense for these options: a ratio is of widths alone, and where single weights go, types stay.
    pub fn of(options: &PruneOptions) -> Self {
        let is_ratio = matches!(options.target, Target::Ratio(_));
        let stays = is_ratio || options.sparse.is_some() || options.profile.is_some();
        Self {
            moves: match stays {
                true => Moves::Widths,
                false => options.moves,
            },
            head: match options.sparse {
                Some(_) => HeadType::Keep,
                None => options.head,
            },
        }
    }

    /// What an outcome follows from beside the rest; `None` where no type may change.
    pub fn key(self) -> Option<String> {
        self.changes()
            .then(|| format!("{} {:?}", self.moves, self.head))
    }

    /// Whether all heads and channels stay.
    pub fn keeps_widths(self) -> bool {
        self.moves == Moves::Bits
    }

    /// Whether any type may change.
    pub fn changes(self) -> bool {
        self.moves != Moves::Widths || self.head != HeadType::Keep
    }

    /// Whether it has to be known what smaller types cost.
    pub fn measures(self) -> bool {
        self.moves != Moves::Widths || self.head == HeadType::Auto
    }
}

/// What smaller types cost, where that was measured.
#[derive(Debug)]
pub(super) struct Types {
    pub bits: Bits,
    /// `None` where nothing had to be measured.
    pub curves: Option<TypeCurves>,
    time: Duration,
}

impl Types {
    /// Measures what smaller types cost, if that has to be known, on the end of some tokens.
    pub fn measure(
        engine: &Engine,
        bits: Bits,
        tokens: &[u32],
        bos: Option<u32>,
        text: &str,
        events: &mut Events,
    ) -> Result<Self, EngineError> {
        let start = Instant::now();
        let curves = match bits.measures() {
            true => {
                let least = calibrate::LEAST_TOKENS + curves::LEAST_TOKENS;
                if tokens.len() < least {
                    let tokens = tokens.len();
                    return Err(PruneError::from(PruneErrorKind::TooShort { tokens, least }).into());
                }
                let held_back = (tokens.len() / 4).clamp(curves::LEAST_TOKENS, HELD_BACK);
                let rest = tokens.len().saturating_sub(held_back);
                let (statistics, held_back) = tokens.split_at(rest);
                let statistics = &statistics[..rest.min(STATISTICS)];
                let of = |tokens| Calibration {
                    tokens,
                    bos,
                    covariance: false,
                };
                let progress = &mut Stage::Types.progress(events);
                let (model, runtime) = (&engine.model, &engine.runtime);
                let measured = bits::measure(
                    model,
                    runtime,
                    of(statistics),
                    of(held_back),
                    &Level::ALL,
                    progress,
                );
                let doing = Doing::Curves {
                    text: text.to_owned(),
                };
                let measured = measured.map_err(EngineError::from);
                Some(measured.map_err(EngineError::at(doing))?)
            }
            false => None,
        };
        Ok(Self {
            bits,
            curves,
            time: start.elapsed(),
        })
    }

    /// What becomes of the head in any case.
    pub fn fixed(&self, model: &Model) -> TypePlan {
        match (self.bits.head, &self.curves) {
            (HeadType::Keep, _) | (HeadType::Auto, None) => TypePlan::none(model),
            (HeadType::Auto, Some(curves)) => curves.head_within(HEAD_LOSS),
            (HeadType::Type(block_type), _) => TypePlan::of_head(model, Level::of(block_type)),
        }
    }

    /// What types cost, where they and widths are found together.
    pub fn joint(&self) -> Option<&TypeCurves> {
        let curves = self.curves.as_ref();
        curves.filter(|_| self.bits.moves != Moves::Widths)
    }

    /// Gives a model the types of a plan.
    pub fn apply(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        plan: &TypePlan,
        kept: &[LayerPlan],
        events: &mut Events,
    ) -> Result<TypeChanges, PruneError> {
        let progress = &mut Stage::Retyping.progress(events);
        plan.apply(model, runtime, self.importance(), kept, progress)
    }

    /// How much the inputs of matrices matter; `None` where that was not measured.
    pub fn importance(&self) -> Option<&Importance> {
        self.curves.as_ref().map(|curves| &curves.importance)
    }

    /// The report of types that were given as in an earlier run.
    pub fn repeated(changes: TypeChanges, time: Duration) -> TypesReport {
        TypesReport {
            changes,
            predicted: None,
            measured_on: 0,
            measuring: Duration::ZERO,
            time,
        }
    }

    /// What was done, for the report.
    pub fn report(&self, plan: &TypePlan, changes: TypeChanges, time: Duration) -> TypesReport {
        TypesReport {
            changes,
            predicted: self.curves.as_ref().map(|curves| curves.loss(plan)),
            measured_on: self.curves.as_ref().map_or(0, |curves| curves.tokens),
            measuring: self.time,
            time,
        }
    }
}
