//! Measuring loss curves: what removing a share of one module, and nothing else, costs on a slice of text. They say where a
//! budget is spent best, which scores that look at one projection at a time cannot know.
//!
//! Loss means how far predictions move, KL(dense ‖ pruned). The rise of the text's own negative log-likelihood has the same
//! expectation where the dense model is right, but between two models it differs by chance from token to token, and takes
//! many times as many tokens to tell apart.
//!
//! This stands beside the steps and not in one of them: a curve is measured by choosing and restoring, and is what structures
//! choose by.

use super::choose::{Units, score};
use super::collect::{
    Calibration, Capture, Curve, CurveOptions, Curves, Evidence, LayerProfile, SoFar,
    embed_sequences,
};
use super::error::{PruneError, PruneErrorKind};
use super::features::{features, inputs_per_unit};
use super::recipe::Restore;
use super::restore::{Around, Difference, restore_projection};
use crate::kernels::{Activations, Phase, Runtime, Team};
use crate::model::{KvCache, Model, ModelError, ModuleId, Predictions, Scratch, Unobserved};
use crate::progress::{self, Progress};

/// Tokens of a sequence where there is no choice; each starts afresh.
pub const SEQUENCE: usize = 256;
/// Positions at the end of each sequence that count: those that have seen some context.
pub const COUNTED: usize = 64;

/// Rows of logits that are held at a time.
const LOGIT_ROWS: usize = 64;

/// Fewer tokens than this measure noise.
pub const LEAST_TOKENS: usize = 64;

/// The curves of all modules on a text, which should not be the one that the profile was taken from. A module's variants cost a
/// forward pass from that module on: about half of the model's layers on average. Where the options pass over layers, those of the
/// layers around them stand for theirs.
///
/// `progress` counts modules.
///
/// # Errors
/// If there are too few tokens or unknown ones, the profile does not fit the model or lacks covariances, or the loss is not
/// a number; if `progress` breaks, or that of a group of layers does. The model is only read.
pub fn measure(
    model: &Model,
    runtime: &Runtime,
    evidence: Evidence,
    text: Calibration,
    options: &CurveOptions,
    progress: &mut Progress,
) -> Result<Curves, PruneError> {
    let onwards = Onwards {
        begun: Vec::new(),
        so_far: &mut |_, _| {},
    };
    measure_onwards(model, runtime, evidence, text, options, onwards, progress)
}

/// What an earlier run has measured, and who gets what is measured so far.
pub struct Onwards<'a> {
    /// The curves of the first modules; empty for none.
    pub begun: Vec<Curve>,
    /// Gets the curves so far behind each module.
    pub so_far: &'a mut SoFar<'a, Curves>,
}

/// [`measure()`] from where an earlier run was, of the same model, profile, text and options. What comes out is the same as in one run.
///
/// # Errors
/// Those of [`measure()`].
pub fn measure_onwards(
    model: &Model,
    runtime: &Runtime,
    mut evidence: Evidence,
    text: Calibration,
    options: &CurveOptions,
    onwards: Onwards,
    progress: &mut Progress,
) -> Result<Curves, PruneError> {
    let scores = score(model, runtime, evidence.profile, options.metric)?;
    if text.tokens.len() < LEAST_TOKENS {
        return Err(PruneErrorKind::TooShort {
            tokens: text.tokens.len(),
            least: LEAST_TOKENS,
        }
        .into());
    }
    let units = Units::of_model(model, &scores, options.heads);
    let mut slice = Slice::new(model, runtime, text, options.levels.sequence)?;
    let Onwards { begun, so_far } = onwards;
    let mut curves = Curves {
        metric: options.metric,
        heads: options.heads,
        restore: options.restore,
        modules: begun,
        tokens: text.tokens.len(),
    };
    let begun = curves.modules.len();
    slice.predict()?;
    let between = Between::new(&units, options.levels.stride);
    let all = ModuleId::all(model.layers.len());
    for (module, module_units) in ModuleId::each(all).zip(&units) {
        if module.index() < begun {
            slice.enter(module)?;
            continue;
        }
        let levels = levels(module_units, options.levels.shares(module.kind()));
        if between.passes_over(module.layer()) {
            slice.enter(module)?;
            let points = levels.iter();
            let points = points.map(|gone| (module_units.freed(*gone), f64::NAN));
            curves.modules.push(Curve {
                points: points.collect(),
            });
            continue;
        }
        let stats = evidence.layer(model, runtime, module.layer())?;
        let kept: Vec<Vec<usize>> = levels.iter().map(|gone| module_units.kept(*gone)).collect();
        let variants = variants(model, runtime, module, stats, &kept, options.restore)?;
        slice.enter(module)?;
        let mut points = Vec::with_capacity(levels.len());
        for (gone, variant) in levels.into_iter().zip(&variants) {
            let loss = slice.loss(module.next(), variant)?;
            if !loss.is_finite() {
                return Err(PruneErrorKind::not_finite(module).into());
            }
            points.push((module_units.freed(gone), loss));
        }
        curves.modules.push(Curve { points });
        let broken = progress::report(progress, curves.modules.len(), units.len());
        so_far(&curves, broken.is_err());
        broken?;
    }
    between.fill_in(&mut curves.modules);
    Ok(curves)
}

/// The layers whose modules are not measured, as they lie between measured ones.
struct Between {
    stride: usize,
    /// For each layer, whether it is passed over.
    passed_over: Vec<bool>,
}

impl Between {
    /// Passes over all layers but every `stride`th, the last, and those that are not as wide as the measured one before them.
    fn new(units: &[Units], stride: usize) -> Self {
        let stride = stride.max(1);
        let layers: Vec<&[Units]> = units.chunks_exact(2).collect();
        let widths = |l: usize| [layers[l][0].len(), layers[l][1].len()];
        let passed_over = (0..layers.len()).map(|l| {
            let before = l - l % stride;
            l != before && l + 1 != layers.len() && widths(l) == widths(before)
        });
        Self {
            stride,
            passed_over: passed_over.collect(),
        }
    }

    fn passes_over(&self, layer: usize) -> bool {
        self.passed_over[layer]
    }

    /// Gives layers that were passed over losses between those of the layers before and behind them, in a straight line.
    fn fill_in(&self, modules: &mut [Curve]) {
        let last = self.passed_over.len() - 1;
        for layer in (0..=last).filter(|l| self.passed_over[*l]) {
            let before = layer - layer % self.stride;
            let behind = (before + self.stride).min(last);
            let share = (layer - before) as f64 / (behind - before) as f64;
            for kind in 0..2 {
                let losses = |l: usize| -> Vec<f64> {
                    let points = modules[2 * l + kind].points.iter();
                    points.map(|(_, loss)| *loss).collect()
                };
                let (low, mut high) = (losses(before), losses(behind));
                // The layer behind may have other widths.
                if high.len() != low.len() {
                    high.clone_from(&low);
                }
                let points = &mut modules[2 * layer + kind].points;
                for ((_, loss), (low, high)) in points.iter_mut().zip(low.iter().zip(high)) {
                    *loss = low + (high - low) * share;
                }
            }
        }
    }
}

/// How many units go at each share, without repetition.
fn levels(units: &Units, shares: &[f64]) -> Vec<usize> {
    let mut levels: Vec<usize> = shares
        .iter()
        .map(|share| {
            let gone = (share * units.len() as f64).round() as usize;
            gone.clamp(1.min(units.len()), units.len())
        })
        .filter(|gone| units.freed(*gone) > 0)
        .collect();
    levels.dedup_by_key(|gone| units.freed(*gone));
    levels
}

/// What a module's projection becomes where it keeps these heads or channels: one variant for each list of them, made by as
/// many threads as there are.
fn variants(
    model: &Model,
    runtime: &Runtime,
    module: ModuleId,
    stats: &LayerProfile,
    kept: &[Vec<usize>],
    restore: Restore,
) -> Result<Vec<Difference>, PruneError> {
    let stats = stats.of(module.kind());
    let width = inputs_per_unit(model, module.kind());
    let variants = runtime.region(|team| {
        team.map(kept.len(), |i| {
            let kept = features(&kept[i], width);
            let restored = restore_projection(model, module, stats, &kept, restore)?;
            Ok(Difference::new(model, module, &kept, &restored))
        })
    });
    variants.into_iter().collect()
}

/// A slice of text on its way through the dense model, module by module.
pub(super) struct Slice<'a> {
    model: &'a Model,
    runtime: &'a Runtime,
    sequences: Vec<Sequence>,
    /// Tokens of a sequence at the most.
    length: usize,
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
    /// The residual stream behind a changed projection, `[tokens, d]`.
    change: Vec<f32>,
    /// What the dense model predicts at the positions that count.
    predictions: Predictions,
}

struct Sequence {
    /// The residual stream where the slice has arrived, `[tokens, d]`.
    residual: Vec<f32>,
    /// That before the last module on the way there, where a norm follows its projection.
    before: Vec<f32>,
    /// The input of the last projection on the way there.
    input: Activations,
}

impl<'a> Slice<'a> {
    /// The slice before the first module, in sequences of so many tokens, `sequence`.
    ///
    /// # Errors
    /// If a token is not in the vocabulary.
    pub fn new(
        model: &'a Model,
        runtime: &'a Runtime,
        text: Calibration,
        sequence: usize,
    ) -> Result<Self, PruneError> {
        let length = sequence.min(model.config.context_length);
        let sequences = embed_sequences(model, runtime, text.tokens, text.bos, length)?;
        let sequences = sequences.into_iter().map(|residual| Sequence {
            residual,
            before: Vec::new(),
            input: Activations::default(),
        });
        Ok(Self {
            model,
            runtime,
            sequences: sequences.collect(),
            cache: KvCache::new(model, length),
            length,
            scratch: Scratch::new(),
            logits: Vec::new(),
            change: Vec::new(),
            predictions: Predictions::default(),
        })
    }

    /// The residual streams where the slice has arrived, `[tokens, d]` of each sequence.
    pub fn residuals(&self) -> impl Iterator<Item = &[f32]> {
        self.sequences.iter().map(|sequence| &sequence.residual[..])
    }

    /// Goes through the next module.
    pub fn enter(&mut self, module: ModuleId) -> Result<(), ModelError> {
        let Self {
            model,
            runtime,
            sequences,
            cache,
            scratch,
            ..
        } = self;
        for sequence in sequences {
            scratch.set_residual(&sequence.residual);
            runtime.region(|team| {
                let mut capture = Capture(&mut sequence.input);
                let modules = module..module.next();
                model.run_modules(team, modules, cache, scratch, &mut capture)
            })?;
            if model.post_norm(module).is_some() {
                sequence.before.clone_from(&sequence.residual);
            }
            sequence.residual.copy_from_slice(scratch.residual());
        }
        Ok(())
    }

    /// The streams behind `module`, the next one, as another model has it: one of this layer alone. `[tokens, d]` of each sequence.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn through(
        &mut self,
        alone: &Model,
        module: ModuleId,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut cache = KvCache::new(alone, self.length);
        let first = ModuleId::from_index(module.index() % 2);
        let Self {
            runtime,
            sequences,
            scratch,
            ..
        } = self;
        let streams = sequences.iter().map(|sequence| {
            scratch.set_residual(&sequence.residual);
            runtime.region(|team| {
                let modules = first..first.next();
                alone.run_modules(team, modules, &mut cache, scratch, &mut Unobserved)
            })?;
            Ok(scratch.residual().to_vec())
        });
        streams.collect()
    }

    /// Notes what the dense model predicts.
    pub fn predict(&mut self) -> Result<(), ModelError> {
        let vocabulary = self.model.config.vocabulary;
        let mut predictions = std::mem::take(&mut self.predictions);
        for i in 0..self.sequences.len() {
            self.scratch.set_residual(&self.sequences[i].residual);
            self.finish(
                self.model,
                i,
                ModuleId::attention(0),
                &mut |team, _, logits| {
                    predictions.add(team, logits, vocabulary);
                },
            )?;
        }
        self.predictions = predictions;
        Ok(())
    }

    /// The mean divergence, in nats, when the modules from `next` on follow, with the last module's projection changed.
    fn loss(&mut self, next: ModuleId, variant: &Difference) -> Result<f64, ModelError> {
        self.mean_divergence(next, |slice, i| {
            let Sequence {
                input,
                residual,
                before,
            } = &mut slice.sequences[i];
            let change = &mut slice.change;
            let around = Around {
                before,
                behind: residual,
            };
            slice.runtime.region(|team| {
                variant.apply(team, input, around, change);
            });
            slice.scratch.set_residual(change);
        })
    }

    /// The mean divergence, in nats, when the modules from `next` on follow these streams, `[tokens, d]` of each sequence.
    pub fn loss_of(&mut self, next: ModuleId, streams: &[Vec<f32>]) -> Result<f64, ModelError> {
        self.mean_divergence(next, |slice, i| slice.scratch.set_residual(&streams[i]))
    }

    /// The same, with logits that another model's head makes.
    pub fn loss_by(
        &mut self,
        next: ModuleId,
        streams: &[Vec<f32>],
        head: &Model,
    ) -> Result<f64, ModelError> {
        self.mean_divergence_by(head, next, |slice, i| {
            slice.scratch.set_residual(&streams[i])
        })
    }

    /// The mean divergence, in nats, when the modules from `next` on follow the residual streams that `put` puts into `scratch`
    /// for each sequence.
    fn mean_divergence(
        &mut self,
        next: ModuleId,
        put: impl FnMut(&mut Self, usize),
    ) -> Result<f64, ModelError> {
        self.mean_divergence_by(self.model, next, put)
    }

    fn mean_divergence_by(
        &mut self,
        head: &Model,
        next: ModuleId,
        mut put: impl FnMut(&mut Self, usize),
    ) -> Result<f64, ModelError> {
        let predictions = std::mem::take(&mut self.predictions);
        let (mut sum, mut counted) = (0.0, 0);
        for i in 0..self.sequences.len() {
            put(self, i);
            self.finish(head, i, next, &mut |team, first, logits| {
                let losses = predictions.divergences(team, first, logits);
                sum += losses.iter().sum::<f64>();
                counted += losses.len();
            })?;
        }
        self.predictions = predictions;
        Ok(sum / counted.max(1) as f64)
    }

    /// Takes the residual stream of sequence i, which lies in `scratch`, through the modules from `next` on, and shows the
    /// logits of the positions that count, by the head of a model, with the number of the first among those of all sequences.
    fn finish(
        &mut self,
        head: &Model,
        i: usize,
        next: ModuleId,
        show: &mut (dyn FnMut(&Team, usize, &[f32]) + Send),
    ) -> Result<(), ModelError> {
        let Self {
            model,
            runtime,
            sequences,
            cache,
            scratch,
            logits,
            ..
        } = self;
        let tokens = |s: &Sequence| s.residual.len() / model.config.embedding_length;
        let counted = |s: &Sequence| tokens(s).min(COUNTED);
        let mut place: usize = sequences[..i].iter().map(counted).sum();
        let end = tokens(&sequences[i]);
        let rows = end - counted(&sequences[i])..end;
        runtime.region(|team| {
            let width = model.config.embedding_length;
            let end = ModuleId::all(model.layers.len()).end;
            // The last MLP looks at no other row, and is asked for those that count alone.
            let last = ModuleId::mlp(model.layers.len() - 1).max(next);
            model.run_modules(team, next..last, cache, scratch, &mut Unobserved)?;
            scratch.keep_rows(rows.clone(), width);
            model.run_modules(team, last..end, cache, scratch, &mut Unobserved)?;
            scratch.want(0..rows.len(), width);
            for first in (0..rows.len()).step_by(LOGIT_ROWS) {
                let end = (first + LOGIT_ROWS).min(rows.len());
                head.logits(team, Phase::Prefill, first..end, scratch, logits);
                show(team, place, logits);
                place += end - first;
            }
            Ok(())
        })
    }
}
