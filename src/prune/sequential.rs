//! Least squares in sequence: each projection is fitted on the inputs that the already pruned layers before it really produce,
//! towards the dense model's residual stream, so that it also makes up for what they did.
//!
//! With the residual streams r of the dense model and r̂ of the pruned one behind a block whose own projection still is whole,
//! e = r − r̂ is how far the pruned model has drifted. The ridge regression of [`Restore::Lsq`](super::Restore) then has the
//! target W_R x_R + e in place of W_R x_R: ΔWᵀ = (C_KK + λI)⁻¹ (C_KR W_Rᵀ + C_Ke) and bias W_R μ_R + μ_e − ΔW μ_K.

use super::apply::apply_layer;
use super::calibrate::{LEAST_TOKENS, SEQUENCE};
use super::covariance::GramScratch;
use super::curves::{Capture, Difference};
use super::restore::{features, least_squares, others};
use super::{
    Calibration, FeatureStats, LayerPlan, LayerRestoration, Module, Plan, PruneError, Restoration,
};
use crate::kernels::{Activations, Moments, Runtime};
use crate::model::{KvCache, Model, Scratch, Unobserved, Weight};

/// Tokens for each input of the widest projection from which on restoring in sequence is better than without: the drift is
/// harder to predict than removed inputs. `docs/pruning.md` has what this was taken from.
const TOKENS_PER_INPUT: usize = 20;

/// Whether a text of so many tokens is long enough to be better than [`Restore::Lsq`](super::Restore::Lsq).
pub fn pays_off(model: &Model, tokens: usize) -> bool {
    tokens >= TOKENS_PER_INPUT * widest(model)
}

/// Bytes that a text of so many tokens takes on its way.
pub fn bytes(model: &Model, tokens: usize) -> u64 {
    let per_token = 2 * model.config.embedding_length + widest(model);
    (tokens * per_token * size_of::<f32>()) as u64
}

fn widest(model: &Model) -> usize {
    let layers = model.layers.iter();
    let inputs = layers.map(|l| l.o.weight.cols.max(l.channels()));
    inputs.max().unwrap_or(0)
}

/// Restores by least squares and applies a plan, layer by layer. The text's residual streams and the inputs of one projection
/// are held for all of its tokens: 4 · (2 d + channels) bytes a token. Costs about three forward passes.
///
/// `progress` is called with the number of layers done and their total.
///
/// # Errors
/// If the text is too short or has unknown tokens; the model is then unchanged. If activations are not numbers or the system
/// does not take memory back; the layers so far are then pruned.
///
/// # Panics
/// If the plan was not made for this model.
pub fn carry_out(
    model: &mut Model,
    runtime: &Runtime,
    text: Calibration,
    plan: &Plan,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), PruneError> {
    assert_eq!(plan.layers.len(), model.layers.len(), "layers of the plan");
    if text.tokens.len() < LEAST_TOKENS {
        return Err(PruneError::TooShort {
            tokens: text.tokens.len(),
            least: LEAST_TOKENS,
        });
    }
    let mut streams = Streams::new(model, runtime, text)?;
    for (l, kept) in plan.layers.iter().enumerate() {
        let queries = features(&kept.heads, model.config.head_dim);
        let layer = &model.layers[l];
        let mut one = |module, weight, kept: &[usize]| {
            streams.restore(model, runtime, l, module, weight, kept)
        };
        let restored = LayerRestoration {
            attention: one(Module::Attention, &layer.o.weight, &queries)?,
            mlp: one(Module::Mlp, &layer.down.weight, &kept.channels)?,
        };
        let kept: &LayerPlan = kept;
        apply_layer(model, runtime, l, kept, &restored)?;
        progress(l + 1, plan.layers.len());
    }
    Ok(())
}

/// The text on its way through the dense and the pruned model.
struct Streams {
    sequences: Vec<Sequence>,
    cache: KvCache,
    scratch: Scratch,
    gram: GramScratch,
}

struct Sequence {
    /// Residual streams, `[tokens, d]`.
    dense: Vec<f32>,
    pruned: Vec<f32>,
    /// The input of the pruned model's projection at hand, with all of its features, `[tokens, in]`.
    input: Activations,
}

impl Streams {
    fn new(model: &Model, runtime: &Runtime, text: Calibration) -> Result<Self, PruneError> {
        let length = SEQUENCE.min(model.config.context_length);
        let mut scratch = Scratch::new();
        let mut sequences = Vec::new();
        for piece in text.tokens.chunks(length - usize::from(text.bos.is_some())) {
            let tokens: Vec<u32> = text.bos.into_iter().chain(piece.iter().copied()).collect();
            runtime.region(|team| model.embed(team, &tokens, &mut scratch))?;
            sequences.push(Sequence {
                dense: scratch.residual().to_vec(),
                pruned: scratch.residual().to_vec(),
                input: Activations::default(),
            });
        }
        Ok(Self {
            sequences,
            cache: KvCache::new(model, length),
            scratch,
            gram: GramScratch::default(),
        })
    }

    /// Takes both streams through one module of layer l, which is still dense, and fits what stays of its projection.
    fn restore(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
        module: Module,
        weight: &Weight,
        kept: &[usize],
    ) -> Result<Restoration, PruneError> {
        let Self {
            sequences,
            cache,
            scratch,
            gram,
        } = self;
        let d = weight.rows;
        let m = 2 * l + usize::from(module == Module::Mlp);
        let whole = kept.len() == weight.cols;
        // Inputs and drift side by side, so that one covariance has all that the regression needs.
        let mut stats = FeatureStats::with_covariance(weight.cols + d);
        let mut joint = Vec::new();
        for sequence in sequences.iter_mut() {
            runtime.region(|team| {
                scratch.set_residual(&sequence.dense);
                let caches = &mut [&mut *cache];
                model.blocks(team, m..m + 1, caches, scratch, &mut Unobserved);
                sequence.dense.copy_from_slice(scratch.residual());
                scratch.set_residual(&sequence.pruned);
                let mut capture = Capture(&mut sequence.input);
                model.blocks(team, m..m + 1, caches, scratch, &mut capture);
                sequence.pruned.copy_from_slice(scratch.residual());
                if whole {
                    return;
                }
                let width = weight.cols + d;
                joint.resize(sequence.input.tokens() * width, 0.0);
                team.chunks_mut(&mut joint, width, |t, row| {
                    let (input, drift) = row.split_at_mut(weight.cols);
                    input.copy_from_slice(
                        &sequence.input.values()[t * weight.cols..][..weight.cols],
                    );
                    let streams = sequence.dense[t * d..]
                        .iter()
                        .zip(&sequence.pruned[t * d..]);
                    for (drift, (dense, pruned)) in drift.iter_mut().zip(streams) {
                        *drift = dense - pruned;
                    }
                });
                stats.add(team, &Moments::of(team, &joint, width));
                if let Some(covariance) = &mut stats.covariance {
                    covariance.add(team, &joint, gram);
                }
            });
        }
        if whole {
            return Ok(Restoration::default());
        }
        if !stats.is_finite() {
            return Err(PruneError::NotFinite { layer: l, module });
        }
        let removed = others(weight.cols, kept);
        let covariance = stats.covariance.as_ref().ok_or(PruneError::NoCovariance)?;
        let restored = least_squares(model, weight, &stats, covariance, kept, &removed, true)
            .ok_or(PruneError::NotFinite { layer: l, module })?;
        let difference = Difference::new(model, weight, kept, &restored);
        let mut change = Vec::new();
        for sequence in sequences {
            runtime.region(|team| {
                difference.apply(team, &mut sequence.input, &sequence.pruned, &mut change);
            });
            sequence.pruned.copy_from_slice(&change);
        }
        Ok(restored)
    }
}
