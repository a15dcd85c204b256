//! Removing single weights, by themselves or after structured pruning: what is refused beforehand, shares, and the work itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::Engine;
use super::error::{EngineError, Unsuited};
use super::events::{Events, Shared, Stage};
use super::memory;
use super::options::{PruneOptions, SparseOptions};
use super::report::{CurvesReport, Notice, SparseReport};
use crate::files::hexadecimal;
use crate::kernels::{Kernels, Runtime};
use crate::model::{Layer, Model, Module};
use crate::prune::sparse::{
    self, Allocate, Pattern, Removal, SparseForm, SparseLayer, Sparsity, TypeChange, allocate,
    type_changes,
};
use crate::prune::{
    Calibration, Curve, Effort, PruneError, PruneErrorKind, Single, SingleRecord, Target,
    calibrate, curves,
};
use crate::quant::BlockType;

/// Tokens that shares by curves are measured on.
pub(super) fn tokens_of_curves(effort: Effort) -> usize {
    match effort {
        Effort::Fast | Effort::Normal => 1024,
        Effort::Best => 4096,
    }
}

/// Refuses what cannot be asked for together, before anything takes long.
///
/// # Errors
/// If the pattern makes no sense, groups do not fill rows, shares by curves are asked for where groups
/// leave no choice, or there is a profile in the place of the text.
pub(super) fn check(
    model: &Model,
    sparse: SparseOptions,
    options: &PruneOptions,
) -> Result<(), EngineError> {
    let pattern = sparse.sparsity.pattern;
    let whole = options.target == Target::Ratio(0.0);
    if pattern.group() > 1 && sparse.allocate == Allocate::Curves {
        return Err(EngineError::CurvesOfGroups { pattern });
    }
    if !pattern.is_sound() {
        return Err(PruneError::from(PruneErrorKind::Pattern(pattern.to_string())).into());
    }
    pattern.check(model)?;
    let head_dim = model.config.head_dim;
    if !whole && !head_dim.is_multiple_of(pattern.group()) {
        // Any number of heads may be left.
        let kind = PruneErrorKind::Group {
            group: pattern.group(),
            which: "a head".to_owned(),
            columns: head_dim,
        };
        return Err(PruneError::from(kind).into());
    }
    if options.profile.is_some() && (reads_text(sparse) || whole) {
        return Err(Unsuited::SingleWeights.into());
    }
    Ok(())
}

/// Refuses a model of which single weights are gone already, as its file has it.
///
/// # Errors
/// [`PruneErrorKind::Sparse`].
pub(super) fn must_be_whole(model: &Model) -> Result<(), EngineError> {
    match model.sparse_weights().next() {
        Some(weight) => Err(PruneError::from(PruneErrorKind::Sparse(weight.name.clone())).into()),
        None => Ok(()),
    }
}

/// Whether text is needed.
pub(super) fn reads_text(sparse: SparseOptions) -> bool {
    sparse.sparsity.method.reads_text() || sparse.allocate == Allocate::Curves
}

/// A removal of single weights that can begin.
#[derive(Debug)]
pub(super) struct Removing {
    options: SparseOptions,
    kernels: Kernels,
    /// The text; empty where none is needed. What is held back for curves are the last of its tokens.
    tokens: Vec<u32>,
    held_back: usize,
    /// Stands in front of every sequence, where the model wants one.
    bos: Option<u32>,
}

impl Removing {
    /// Takes a text for it: all of it, or its beginning where the rest is `held_back` for curves.
    ///
    /// # Errors
    /// If it is too short, or there is too little memory.
    pub fn new(
        model: &Model,
        kernels: Kernels,
        options: SparseOptions,
        most_held_back: usize,
        tokens: &[u32],
        bos: Option<u32>,
    ) -> Result<Self, EngineError> {
        let mut removing = Self {
            options,
            kernels,
            tokens: Vec::new(),
            held_back: 0,
            bos,
        };
        if reads_text(options) {
            let (least_curves, most_curves) = match options.allocate {
                Allocate::Even => (0, 0),
                Allocate::Curves => (curves::LEAST_TOKENS, most_held_back),
            };
            let least = calibrate::LEAST_TOKENS + least_curves;
            if tokens.len() < least {
                let tokens = tokens.len();
                return Err(PruneError::from(PruneErrorKind::TooShort { tokens, least }).into());
            }
            removing.tokens = tokens.to_vec();
            removing.held_back = most_curves.min(tokens.len() / 4).max(least_curves);
        }
        let (method, form) = (options.sparsity.method, options.form);
        memory::must_hold_sparse(model, method, form, removing.tokens.len())?;
        Ok(removing)
    }

    /// Tokens that scores are taken from.
    pub fn scored(&self) -> usize {
        match self.options.sparsity.method.reads_text() {
            true => self.tokens.len() - self.held_back,
            false => 0,
        }
    }

    /// What the outcome follows from, beside the model and how heads and channels went.
    pub fn key(&self) -> String {
        let SparseOptions {
            sparsity,
            allocate,
            form,
        } = self.options;
        let ids = self.tokens.iter().chain(&self.bos);
        let bytes: Vec<u8> = ids.flat_map(|id| id.to_le_bytes()).collect();
        let text = hexadecimal(&Sha256::digest(bytes));
        let (all, held_back) = (self.tokens.len(), self.held_back);
        // What becomes of projections depends on the kernels.
        let types = BlockType::ALL.into_iter();
        let dense: String = types
            .filter(|block_type| sparse::stays_dense(form, self.kernels, *block_type))
            .map(|block_type| format!(" {}", block_type.name()))
            .collect();
        format!("{sparsity} {allocate} {form}{dense} {all} {held_back} {text}")
    }

    /// How the weights were shared out, for doing the same again.
    pub fn record(&self, done: &SparseReport) -> SingleRecord {
        SingleRecord {
            tokens: done.tokens,
            shares: done.shares.clone(),
            removed: done.layers.iter().map(|layer| layer.removed).collect(),
            curves: done.curves.map(|curves| curves.tokens),
        }
    }

    /// Does again what was done before, to a model whose heads and channels went as they did then.
    ///
    /// # Errors
    /// Those of [`Single::apply`].
    pub fn again(
        &self,
        engine: &mut Engine,
        single: &Single,
        events: &mut Events,
    ) -> Result<(SparseReport, Vec<Notice>), EngineError> {
        let start = Instant::now();
        let bytes_before = engine.model.bytes();
        let of = |layer: &Layer| layer.linears().map(|linear| linear.weight.block_type);
        let types: Vec<[BlockType; 7]> = engine.model.layers.iter().map(of).collect();
        let progress = &mut Stage::Sparsifying.progress(events);
        let applied = single.apply(&mut engine.model, &engine.runtime, progress);
        engine.touch();
        applied?;
        let (model, record) = (&engine.model, &single.record);
        let layers = model.layers.iter().zip(&record.removed).zip(&types);
        let layers: Vec<SparseLayer> = layers
            .map(|((layer, removed), types)| SparseLayer {
                weights: layer.parameters(),
                removed: *removed,
                types: type_changes(types.iter().copied().zip(of(layer))),
            })
            .collect();
        let SparseOptions {
            sparsity,
            allocate,
            form,
        } = self.options;
        let report = SparseReport {
            sparsity,
            allocate,
            form,
            tokens: record.tokens,
            removed: share_removed(&layers),
            shares: record.shares.clone(),
            layers,
            curves: record.curves.map(|tokens| CurvesReport {
                tokens,
                time: Duration::ZERO,
            }),
            bytes_before,
            bytes_after: model.bytes(),
            time: start.elapsed(),
        };
        let notices = self.notices(model, &report);
        Ok((report, notices))
    }

    /// What may be worth knowing of what became of a model.
    fn notices(&self, model: &Model, report: &SparseReport) -> Vec<Notice> {
        let changes = changes(&report.layers);
        let mut notices = Vec::new();
        if !changes.is_empty() {
            notices.push(Notice::TypesForZeros { changes });
        }
        notices.extend(forms(model, report.form, self.kernels));
        notices
    }

    pub fn sparsity(&self) -> Sparsity {
        self.options.sparsity
    }

    /// About as many bytes as a projection of a type and of so many rows and columns takes then.
    pub fn bytes(&self, block_type: BlockType, rows: usize, cols: usize) -> usize {
        let SparseOptions { sparsity, form, .. } = self.options;
        sparse::expected_bytes(
            form,
            self.kernels,
            sparsity.pattern,
            (block_type, rows, cols),
        )
    }

    fn text(&self) -> (Calibration<'_>, Calibration<'_>) {
        let (statistics, held_back) = self.tokens.split_at(self.tokens.len() - self.held_back);
        let text = |tokens| Calibration {
            tokens,
            bos: self.bos,
            covariance: false,
        };
        (text(statistics), text(held_back))
    }

    /// Removes the weights. `structured` says whether heads and channels were removed before: then no layer is as it was.
    ///
    /// # Errors
    /// Those of [`sparse::sparsify`] and of [`allocate::measure`].
    pub fn carry_out(
        &self,
        engine: &mut Engine,
        structured: bool,
        events: &mut Events,
    ) -> Result<(SparseReport, Vec<Notice>), EngineError> {
        let layers = engine.model.layers.len();
        let result = self.remove(&mut engine.model, &engine.runtime, events);
        let report = result.map_err(|mut error| {
            if structured {
                error.touched = (0..layers).collect();
            }
            engine.touched |= !error.is_untouched();
            EngineError::from(error)
        })?;
        engine.touch();
        let notices = self.notices(&engine.model, &report);
        Ok((report, notices))
    }

    /// Removes them from a model.
    ///
    /// # Errors
    /// Those of [`sparse::sparsify`] and of [`allocate::measure`].
    pub fn remove(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        events: &mut Events,
    ) -> Result<SparseReport, PruneError> {
        let start = Instant::now();
        let bytes_before = model.bytes();
        let SparseOptions {
            sparsity,
            allocate,
            form,
        } = self.options;
        let (statistics, held_back) = self.text();
        let modules = 2 * model.layers.len();
        let events = Shared::new(events);
        let (patterns, curves) = match allocate {
            Allocate::Even => (vec![sparsity.pattern; modules], None),
            Allocate::Curves => {
                let share = sparsity.pattern.share();
                let progress = &mut events.progress(Stage::Curves);
                let curves = allocate::measure(
                    model,
                    runtime,
                    sparsity.method,
                    statistics,
                    held_back,
                    share,
                    progress,
                )?;
                let report = CurvesReport {
                    tokens: self.held_back,
                    time: start.elapsed(),
                };
                (patterns(model, &curves, share), Some(report))
            }
        };
        let removal = Removal {
            method: sparsity.method,
            form,
            patterns: &patterns,
            text: Some(statistics).filter(|text| !text.tokens.is_empty()),
        };
        let progress = &mut events.progress(Stage::Sparsifying);
        let layers = sparse::sparsify(model, runtime, removal, progress)?;
        Ok(SparseReport {
            sparsity,
            allocate,
            form,
            tokens: self.scored(),
            removed: share_removed(&layers),
            shares: patterns.iter().map(|pattern| pattern.share()).collect(),
            layers,
            curves,
            bytes_before,
            bytes_after: model.bytes(),
            time: start.elapsed(),
        })
    }
}

/// The share of the weights of all layers that was removed.
fn share_removed(layers: &[SparseLayer]) -> f64 {
    let sum = |of: fn(&SparseLayer) -> usize| layers.iter().map(of).sum::<usize>();
    sum(|layer| layer.removed) as f64 / sum(|layer| layer.weights).max(1) as f64
}

/// Shares of all modules by their curves.
fn patterns(model: &Model, curves: &[Curve], share: f64) -> Vec<Pattern> {
    let weights: Vec<usize> = model
        .layers
        .iter()
        .flat_map(|layer| {
            [Module::Attention, Module::Mlp].map(|module| {
                let all = sparse::Projection::ALL.into_iter().zip(layer.linears());
                let these = all.filter(|(projection, _)| projection.module() == module);
                these
                    .map(|(_, linear)| linear.weight.parameters())
                    .sum::<usize>()
            })
        })
        .collect();
    let shares = allocate::share_out(curves, &weights, share);
    shares.into_iter().map(Pattern::Share).collect()
}

/// What is not sparse though it was asked for, and what is slower for it, by type.
fn forms(model: &Model, form: SparseForm, kernels: Kernels) -> Vec<Notice> {
    if form == SparseForm::Zeros {
        return Vec::new();
    }
    let mut types: BTreeMap<(&str, bool), (BlockType, usize)> = BTreeMap::new();
    let weights = model.layers.iter().flat_map(Layer::linears);
    let weights = weights.map(|linear| &linear.weight);
    for weight in weights.filter(|weight| weight.parameters() > 0) {
        let block_type = weight.block_type;
        let key = (block_type.name(), weight.is_sparse());
        types.entry(key).or_insert((block_type, 0)).1 += 1;
    }
    let isa = kernels.isa().name();
    let notice = |((name, is_sparse), (of_type, projections))| {
        let dense = sparse::stays_dense(form, kernels, of_type);
        let slower = form == SparseForm::Auto && kernels.prefers_dense(of_type);
        match is_sparse {
            true => slower.then_some(Notice::SlowerSparse {
                block_type: name,
                projections,
                isa,
            }),
            false if dense => Some(Notice::KeptDense {
                block_type: name,
                projections,
                isa,
            }),
            false => Some(Notice::StayAsLarge {
                block_type: name,
                projections,
            }),
        }
    };
    types.into_iter().filter_map(notice).collect()
}

/// The changes of type of all layers together.
fn changes(layers: &[SparseLayer]) -> Vec<TypeChange> {
    let mut all: Vec<TypeChange> = Vec::new();
    for change in layers.iter().flat_map(|layer| &layer.types) {
        match all
            .iter_mut()
            .find(|other| (other.from, other.to) == (change.from, change.to))
        {
            Some(other) => other.projections += change.projections,
            None => all.push(change.clone()),
        }
    }
    all
}
