//! Loss curves: what removing a share of one module, and nothing else, costs on a slice of text. They say where a budget is
//! spent best, which scores that look at one projection at a time cannot know.
//!
//! Loss means how far predictions move, KL(dense ‖ pruned). The rise of the text's own negative log-likelihood has the same
//! expectation where the dense model is right, but between two models it differs by chance from token to token, and takes
//! many times as many tokens to tell apart.

use std::sync::Mutex;

use super::groups::Source;
use super::plan::Units;
use super::restore::{features, restore_projection};
use super::{
    Calibration, CurveLevels, HeadUnit, LayerProfile, Metric, Module, Profile, PruneError,
    Restoration, Restore, score,
};
use crate::kernels::{Activations, MatrixView, Product, Runtime, Team, matmul};
use crate::model::{KvCache, Model, Observer, Predictions, Scratch, Unobserved, Weight};
use crate::quant::{BlockType, Layout};

/// Tokens of a sequence, each of which starts afresh, and how many at its end count: those that have seen some context.
pub const SEQUENCE: usize = 256;
const COUNTED: usize = 64;

/// Rows of logits that are held at a time.
const LOGIT_ROWS: usize = 64;

/// Fewer tokens than this measure noise.
pub const LEAST_TOKENS: usize = 64;

/// What is measured of every module.
#[derive(Debug, Clone, Copy)]
pub struct CurveOptions {
    /// What units are removed by, lowest first, and how that is made up for.
    pub metric: Metric,
    pub heads: HeadUnit,
    pub restore: Restore,
    pub levels: CurveLevels,
}

/// The loss curves of all modules; module 2 l is the attention and 2 l + 1 the MLP of layer l.
#[derive(Debug, Clone, PartialEq)]
pub struct Curves {
    pub metric: Metric,
    pub heads: HeadUnit,
    pub restore: Restore,
    pub modules: Vec<Curve>,
    /// Tokens of the slice.
    pub tokens: usize,
}

/// How the loss rises as one module shrinks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Curve {
    /// Parameters freed and the mean Kullback-Leibler divergence from the dense model's predictions, in nats per token, by
    /// rising number of parameters; (0, 0) is left out.
    pub points: Vec<(usize, f64)>,
}

/// Measures the curves on a text, which should not be among those that the profile was taken from. A module's variants
/// cost a forward pass from that module on: about half of the model's layers on average.
///
/// `progress` is called with the number of modules done and their total.
///
/// # Errors
/// If there are too few tokens or unknown ones, the profile does not fit the model or lacks covariances, or the loss is not
/// a number.
pub fn measure(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
    text: Calibration,
    options: CurveOptions,
    progress: &mut (dyn FnMut(usize, usize) + Send),
) -> Result<Curves, PruneError> {
    let all = &mut Source::All(profile);
    measure_with(model, runtime, profile, all, text, options, progress)
}

/// [`measure`], restoring by statistics from `source`; the profile need not have covariances.
pub(super) fn measure_with(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
    source: &mut Source,
    text: Calibration,
    options: CurveOptions,
    progress: &mut (dyn FnMut(usize, usize) + Send),
) -> Result<Curves, PruneError> {
    let Calibration { tokens, bos, .. } = text;
    let scores = score(model, runtime, profile, options.metric)?;
    if tokens.len() < LEAST_TOKENS {
        return Err(PruneError::TooShort {
            tokens: tokens.len(),
            least: LEAST_TOKENS,
        });
    }
    let units = Units::of_model(model, &scores, options.heads);
    let mut slice = Slice::new(model, runtime, tokens, bos)?;
    let mut modules = Vec::with_capacity(units.len());
    slice.predict();
    for (m, units) in units.iter().enumerate() {
        let shares = match m % 2 {
            0 => options.levels.attention_shares,
            _ => options.levels.mlp_shares,
        };
        let levels = levels(units, shares);
        let stats = source.layer(model, runtime, m / 2)?;
        let variants = variants(model, runtime, stats, m, units, &levels, options.restore)?;
        slice.enter(m);
        let mut points = Vec::with_capacity(levels.len());
        for (gone, variant) in levels.into_iter().zip(&variants) {
            let loss = slice.loss(m + 1, variant);
            if !loss.is_finite() {
                return Err(PruneError::NotFinite {
                    layer: m / 2,
                    module: Module::of(m),
                });
            }
            points.push((units.freed(gone), loss));
        }
        modules.push(Curve { points });
        progress(m + 1, 2 * model.layers.len());
    }
    Ok(Curves {
        metric: options.metric,
        heads: options.heads,
        restore: options.restore,
        modules,
        tokens: tokens.len(),
    })
}

impl Curves {
    /// Gives every unit as its score the steepness of its module's curve, per parameter, where the unit's turn comes. Taking
    /// the lowest of all then frees parameters at the least rise of the loss, if rises add up.
    pub(super) fn price(&self, modules: &mut [Units]) {
        for (units, curve) in modules.iter_mut().zip(&self.modules) {
            let steepness = curve.steepness();
            let mut before = 0;
            for place in 0..units.len() {
                let after = units.freed_exactly(place + 1);
                let unit = units.by_score[place];
                units.scores[unit] = steepness.at((before + after) as f64 / 2.0);
                before = after;
            }
            // No module is emptied while there is another way.
            if let Some(last) = units.by_score.last() {
                units.scores[*last] = f64::INFINITY;
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

/// A pruned and restored projection as its difference to the dense one.
pub(super) struct Difference {
    /// `[out, in]`
    weights: Vec<f32>,
    /// `[out]`
    bias: Vec<f32>,
}

impl Difference {
    pub fn new(model: &Model, weight: &Weight, kept: &[usize], restored: &Restoration) -> Self {
        let mut weights = weight.decode(&model.map);
        for (i, row) in weights.chunks_exact_mut(weight.cols).enumerate() {
            let mut next = 0;
            for (j, w) in row.iter_mut().enumerate() {
                let stays = kept.get(next) == Some(&j);
                *w = match &restored.weights {
                    _ if !stays => -*w,
                    Some(weights) => weights[i * kept.len() + next] - *w,
                    None => 0.0,
                };
                next += usize::from(stays);
            }
        }
        let mut bias = restored.bias.clone();
        bias.resize(weight.rows, 0.0);
        Self { weights, bias }
    }

    /// The residual stream `[n, out]` behind the pruned projection, given the one behind the dense projection of the same
    /// input `[n, in]`.
    pub fn apply(
        &self,
        team: &Team,
        input: &mut Activations,
        residual: &[f32],
        out: &mut Vec<f32>,
    ) {
        let kernels = team.kernels();
        let d = self.bias.len();
        out.resize(residual.len(), 0.0);
        let weights = MatrixView::new(
            BlockType::F32,
            Layout::Native,
            d,
            input.cols(),
            bytemuck::cast_slice(&self.weights),
        );
        let mut product = [Product {
            weights,
            out: &mut out[..],
        }];
        matmul(team, input, &mut product);
        team.chunks_mut(out, d, |i, row| {
            kernels.add(row, &self.bias);
            kernels.add(row, &residual[i * d..][..d]);
        });
    }
}

/// The variants of module m, made by as many threads as there are.
fn variants(
    model: &Model,
    runtime: &Runtime,
    stats: &LayerProfile,
    m: usize,
    units: &Units,
    levels: &[usize],
    restore: Restore,
) -> Result<Vec<Difference>, PruneError> {
    let layer = &model.layers[m / 2];
    let (weight, stats, width) = match m % 2 {
        0 => (&layer.o.weight, &stats.attention, model.config.head_dim),
        _ => (&layer.down.weight, &stats.mlp, 1),
    };
    let slots: Vec<Mutex<Option<Result<Difference, PruneError>>>> =
        levels.iter().map(|_| Mutex::new(None)).collect();
    runtime.region(|team| {
        team.items(levels.len(), |_, i| {
            let kept = features(&units.kept(levels[i]), width);
            let variant = restore_projection(model, weight, stats, &kept, restore)
                .map(|restored| Difference::new(model, weight, &kept, &restored));
            *slots[i].lock().expect("each level has one user") = Some(variant);
        });
    });
    slots
        .into_iter()
        .filter_map(|slot| slot.into_inner().ok().flatten())
        .collect()
}

/// A slice of text on its way through the dense model, block by block.
struct Slice<'a> {
    model: &'a Model,
    runtime: &'a Runtime,
    sequences: Vec<Sequence>,
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
    change: Vec<f32>,
    /// The dense model's, at the positions that count.
    predictions: Predictions,
}

struct Sequence {
    /// How many.
    tokens: usize,
    /// The residual stream where the slice has arrived, `[tokens, d]`.
    residual: Vec<f32>,
    /// The input of the last projection on the way there.
    input: Activations,
}

impl<'a> Slice<'a> {
    fn new(
        model: &'a Model,
        runtime: &'a Runtime,
        tokens: &[u32],
        bos: Option<u32>,
    ) -> Result<Self, PruneError> {
        let length = SEQUENCE.min(model.config.context_length);
        let mut slice = Self {
            model,
            runtime,
            sequences: Vec::new(),
            cache: KvCache::new(model, length),
            scratch: Scratch::new(),
            logits: Vec::new(),
            change: Vec::new(),
            predictions: Predictions::default(),
        };
        for piece in tokens.chunks(length - usize::from(bos.is_some())) {
            let tokens: Vec<u32> = bos.into_iter().chain(piece.iter().copied()).collect();
            runtime.region(|team| model.embed(team, &tokens, &mut slice.scratch))?;
            slice.sequences.push(Sequence {
                tokens: tokens.len(),
                residual: slice.scratch.residual().to_vec(),
                input: Activations::default(),
            });
        }
        Ok(slice)
    }

    /// Goes through block m, the next one.
    fn enter(&mut self, m: usize) {
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
                model.blocks(team, m..m + 1, &mut [&mut *cache], scratch, &mut capture);
            });
            sequence.residual.copy_from_slice(scratch.residual());
        }
    }

    /// Notes what the dense model predicts.
    fn predict(&mut self) {
        let vocabulary = self.model.config.vocabulary;
        let mut predictions = std::mem::take(&mut self.predictions);
        for i in 0..self.sequences.len() {
            self.scratch.set_residual(&self.sequences[i].residual);
            self.finish(i, 0, &mut |team, _, logits| {
                predictions.add(team, logits, vocabulary);
            });
        }
        self.predictions = predictions;
    }

    /// The mean divergence when the blocks from `next` on follow, with the last block's projection changed.
    fn loss(&mut self, next: usize, variant: &Difference) -> f64 {
        let predictions = std::mem::take(&mut self.predictions);
        let (mut sum, mut counted) = (0.0, 0);
        for i in 0..self.sequences.len() {
            let Sequence {
                input, residual, ..
            } = &mut self.sequences[i];
            let change = &mut self.change;
            self.runtime.region(|team| {
                variant.apply(team, input, residual, change);
            });
            self.scratch.set_residual(change);
            self.finish(i, next, &mut |team, first, logits| {
                let losses = predictions.divergences(team, first, logits);
                sum += losses.iter().sum::<f64>();
                counted += losses.len();
            });
        }
        self.predictions = predictions;
        sum / counted.max(1) as f64
    }

    /// Takes the residual stream of sequence i, which lies in `scratch`, through the blocks from `next` on, and shows the
    /// logits of the positions that count, with the number of the first among those of all sequences.
    fn finish(
        &mut self,
        i: usize,
        next: usize,
        show: &mut (dyn FnMut(&Team, usize, &[f32]) + Send),
    ) {
        let Self {
            model,
            runtime,
            sequences,
            cache,
            scratch,
            logits,
            ..
        } = self;
        let counted = |s: &Sequence| s.tokens.min(COUNTED);
        let mut place: usize = sequences[..i].iter().map(counted).sum();
        let rows = sequences[i].tokens - counted(&sequences[i])..sequences[i].tokens;
        runtime.region(|team| {
            let blocks = next..2 * model.layers.len();
            model.blocks(team, blocks, &mut [cache], scratch, &mut Unobserved);
            for first in rows.clone().step_by(LOGIT_ROWS) {
                let end = (first + LOGIT_ROWS).min(rows.end);
                model.logits(team, first..end, scratch, logits);
                show(team, place, logits);
                place += end - first;
            }
        });
    }
}

/// Keeps the input that it sees.
pub(super) struct Capture<'a>(pub &'a mut Activations);

impl Capture<'_> {
    fn keep(&mut self, x: &Activations) {
        self.0
            .begin(x.tokens(), x.cols())
            .copy_from_slice(x.values());
    }
}

impl Observer for Capture<'_> {
    fn attention_output(&mut self, _: &Team, _: usize, x: &Activations) {
        self.keep(x);
    }

    fn mlp_down(&mut self, _: &Team, _: usize, x: &Activations) {
        self.keep(x);
    }
}

impl Curve {
    /// The steepness of the convex, rising curve nearest to the points: slopes between points, made monotone by pooling
    /// adjacent violators (weighted by their lengths), and between the middles of segments interpolated.
    fn steepness(&self) -> Steepness {
        let mut segments: Vec<Segment> = Vec::new();
        let mut last = (0.0, 0.0);
        for &(freed, rise) in &self.points {
            let point = (freed as f64, rise);
            let length = point.0 - last.0;
            let mut new = Segment {
                start: last.0,
                length,
                slope: ((point.1 - last.1) / length).max(0.0),
            };
            while let Some(before) = segments.pop_if(|s| s.slope >= new.slope) {
                let length = before.length + new.length;
                new.slope = (before.slope * before.length + new.slope * new.length) / length;
                new.start = before.start;
                new.length = length;
            }
            segments.push(new);
            last = point;
        }
        let mut knots: Vec<(f64, f64)> = segments
            .iter()
            .map(|s| (s.start + s.length / 2.0, s.slope))
            .collect();
        // With one segment only the curve is taken as quadratic, as rises of the loss mostly are.
        if knots.len() == 1 {
            knots.insert(0, (0.0, 0.0));
        }
        Steepness { knots }
    }
}

struct Segment {
    start: f64,
    length: f64,
    slope: f64,
}

/// A piecewise linear, rising function.
struct Steepness {
    knots: Vec<(f64, f64)>,
}

impl Steepness {
    fn at(&self, x: f64) -> f64 {
        let [.., _] = &self.knots[..] else {
            return f64::INFINITY; // Nothing was measured, so nothing is known to be harmless.
        };
        let i = self.knots[1..self.knots.len() - 1].partition_point(|k| k.0 <= x);
        let ((x0, y0), (x1, y1)) = (self.knots[i], self.knots[i + 1]);
        (y0 + (y1 - y0) * (x - x0) / (x1 - x0)).max(0.0)
    }
}
