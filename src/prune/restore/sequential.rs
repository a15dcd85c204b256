//! Least squares in sequence: each projection is fitted on the inputs that the already pruned layers before it really produce,
//! towards the dense model's residual stream, so that it also makes up for what they did.
//!
//! With the residual streams r of the dense model and r̂ of the pruned one behind a module whose own projection still is whole,
//! e = r − r̂ is how far the pruned model has drifted. The ridge regression of [`Restore::Lsq`] then has the
//! target W_R x_R + e in place of W_R x_R: ΔWᵀ = (C_KK + λI)⁻¹ (C_KR W_Rᵀ + C_Ke) and bias W_R μ_R + μ_e − ΔW μ_K.
//!
//! Where a norm follows the projection, what it leaves is not what is added to the stream. Its drift e is then how far its own output
//! has drifted, W (x − x̂) with x as the dense model and x̂ as the pruned one has it, and tokens are weighed as the norm weighs them in the
//! dense model.

use super::difference::{Around, Difference};
use super::restoration::{Drift, Inputs, LayerRestoration, Restoration, least_squares};
use crate::kernels::{Activations, Moments, Product, Runtime, matmul};
use crate::model::{KvCache, Model, ModuleId, Scratch, Unobserved};
use crate::prune::choose::LayerPlan;
use crate::prune::collect::calibrate::{LEAST_TOKENS, SEQUENCE};
use crate::prune::collect::{
    Calibration, Capture, FeatureStats, GramScratch, Weighing, embed_sequences,
};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::features::{features, others, output_weight};
#[cfg(doc)]
use crate::prune::recipe::Restore;

/// Tokens for each input of the widest projection from which on restoring in sequence is better than without: the drift is
/// harder to predict than removed inputs. `docs/pruning.md` has what this was taken from.
const TOKENS_PER_INPUT: usize = 20;

/// Whether a text of so many tokens is long enough for restoring in sequence to be better than [`Restore::Lsq`].
pub fn pays_off(model: &Model, tokens: usize) -> bool {
    tokens >= TOKENS_PER_INPUT * widest(model)
}

/// Bytes that a text of so many tokens takes while it goes through both models.
pub fn bytes(model: &Model, tokens: usize) -> u64 {
    let per_token = 2 * model.config.embedding_length + widest(model);
    (tokens * per_token * size_of::<f32>()) as u64
}

/// Inputs of the widest projection that loses columns.
fn widest(model: &Model) -> usize {
    let layers = model.layers.iter();
    let inputs = layers.map(|l| l.o.weight.cols.max(l.channels()));
    inputs.max().unwrap_or(0)
}

/// The text on its way through the dense and the pruned model. Held for all of its tokens are both residual streams and the
/// inputs of one projection: 4 · (2 d + channels) bytes a token. The whole way costs about three forward passes.
pub struct Streams {
    sequences: Vec<Sequence>,
    cache: KvCache,
    scratch: Scratch,
    gram: GramScratch,
}

struct Sequence {
    /// The residual stream of the dense model, `[tokens, d]`.
    dense: Vec<f32>,
    /// The residual stream of the pruned model, `[tokens, d]`.
    pruned: Vec<f32>,
    /// The residual stream of the pruned model before the module at hand, where a norm follows its projection, `[tokens, d]`.
    before: Vec<f32>,
    /// The input of the pruned model's projection at hand, with all of its features, `[tokens, in]`.
    input: Activations,
}

impl Streams {
    /// A text before the first layer.
    ///
    /// # Errors
    /// If the text is too short or has unknown tokens.
    pub fn new(model: &Model, runtime: &Runtime, text: Calibration) -> Result<Self, PruneError> {
        if text.tokens.len() < LEAST_TOKENS {
            return Err(PruneErrorKind::TooShort {
                tokens: text.tokens.len(),
                least: LEAST_TOKENS,
            }
            .into());
        }
        let length = SEQUENCE.min(model.config.context_length);
        let sequences = embed_sequences(model, runtime, text.tokens, text.bos, length)?;
        let sequences = sequences.into_iter().map(|stream| Sequence {
            dense: stream.clone(),
            pruned: stream,
            before: Vec::new(),
            input: Activations::default(),
        });
        Ok(Self {
            sequences: sequences.collect(),
            cache: KvCache::new(model, length),
            scratch: Scratch::new(),
            gram: GramScratch::default(),
        })
    }

    /// Takes both streams through layer l, the next one, which is still dense, and fits what stays of its projections. The layer
    /// may then be pruned.
    ///
    /// # Errors
    /// If activations are not numbers.
    ///
    /// # Panics
    /// If the plan was not made for this model.
    pub fn restore_layer(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
        kept: &LayerPlan,
    ) -> Result<LayerRestoration, PruneError> {
        let queries = features(&kept.heads, model.config.head_dim);
        Ok(LayerRestoration {
            attention: self.restore_module(model, runtime, ModuleId::attention(l), &queries)?,
            mlp: self.restore_module(model, runtime, ModuleId::mlp(l), &kept.channels)?,
        })
    }

    /// Takes both streams through one module, and fits what stays of its projection: the inputs `kept`.
    fn restore_module(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        module: ModuleId,
        kept: &[usize],
    ) -> Result<Restoration, PruneError> {
        let Self {
            sequences,
            cache,
            scratch,
            gram,
        } = self;
        let weight = output_weight(model, module);
        let d = weight.rows;
        let modules = module..module.next();
        let whole = kept.len() == weight.cols;
        // Inputs and drift side by side, so that one covariance has all that the regression needs.
        let mut stats = FeatureStats::with_covariance(weight.cols + d);
        let mut joint = Vec::new();
        let normed = model.post_norm(module).is_some();
        let mut weighing = Weighing::default();
        // Of a norm's projection, the dense model's input and how far the projection's output has drifted.
        let (mut dense_input, mut drifts) = (Activations::default(), Vec::new());
        for sequence in sequences.iter_mut() {
            runtime.region(|team| {
                scratch.set_residual(&sequence.dense);
                match normed {
                    true => {
                        let mut capture = Capture(&mut dense_input);
                        model.run_modules(team, modules.clone(), cache, scratch, &mut capture)?;
                    }
                    false => {
                        let unobserved = &mut Unobserved;
                        model.run_modules(team, modules.clone(), cache, scratch, unobserved)?;
                    }
                }
                sequence.dense.copy_from_slice(scratch.residual());
                if normed {
                    sequence.before.clone_from(&sequence.pruned);
                }
                scratch.set_residual(&sequence.pruned);
                let mut capture = Capture(&mut sequence.input);
                model.run_modules(team, modules.clone(), cache, scratch, &mut capture)?;
                sequence.pruned.copy_from_slice(scratch.residual());
                if whole {
                    return Ok(());
                }
                let scales = weighing.scales(team, model, module, &dense_input);
                if normed {
                    let (tokens, cols) = (dense_input.tokens(), dense_input.cols());
                    let apart = dense_input.values().iter().zip(sequence.input.values());
                    let apart: Vec<f32> = apart.map(|(dense, pruned)| dense - pruned).collect();
                    dense_input.begin(tokens, cols).copy_from_slice(&apart);
                    drifts.resize(tokens.count * d, 0.0);
                    let weights = weight.view(&model.map);
                    let out = &mut drifts[..];
                    matmul(team, &mut dense_input, &mut [Product { weights, out }]);
                }
                let width = weight.cols + d;
                joint.resize(sequence.input.tokens().count * width, 0.0);
                team.chunks_mut(&mut joint, width, |t, row| {
                    let (input, drift) = row.split_at_mut(weight.cols);
                    input.copy_from_slice(
                        &sequence.input.values()[t * weight.cols..][..weight.cols],
                    );
                    if let Some(scales) = &scales {
                        drift.copy_from_slice(&drifts[t * d..][..d]);
                        row.iter_mut().for_each(|v| *v *= scales[t]);
                        return;
                    }
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
                Ok::<(), PruneError>(())
            })?;
        }
        if whole {
            return Ok(Restoration::default());
        }
        if !stats.is_finite() {
            return Err(PruneErrorKind::not_finite(module).into());
        }
        let removed = others(weight.cols, kept);
        let inputs = Inputs {
            stats: &stats,
            covariance: stats
                .covariance
                .as_ref()
                .ok_or(PruneErrorKind::NoCovariance)?,
            kept,
            removed: &removed,
            through_origin: normed,
        };
        let restored = least_squares(model, weight, inputs, Drift::BehindInputs)
            .ok_or(PruneErrorKind::not_finite(module))?;
        let difference = Difference::new(model, module, kept, &restored);
        let mut change = Vec::new();
        for sequence in sequences {
            runtime.region(|team| {
                let around = Around {
                    before: &sequence.before,
                    behind: &sequence.pruned,
                };
                difference.apply(team, &mut sequence.input, around, &mut change);
            });
            sequence.pruned.copy_from_slice(&change);
        }
        Ok(restored)
    }
}
