//! The text on its way through the layers.

use crate::kernels::{Activations, Keep, Moments, Runtime, Team};
use crate::model::{KvCache, Model, ModuleId, Observer, Scratch, Unobserved};
use crate::progress::Cancelled;
use crate::prune::collect::calibrate::{LEAST_TOKENS, SEQUENCE, record};
use crate::prune::collect::{Calibration, FeatureStats, GramScratch, embed_sequences};
use crate::prune::error::{PruneError, PruneErrorKind};

use super::projection::Projection;

/// What the projections of one layer see of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputs {
    /// The inputs of queries, keys and values, behind the norm.
    pub attention: FeatureStats,
    /// The inputs of the attention output.
    pub output: FeatureStats,
    /// The inputs of MLP gate and up, behind the norm.
    pub mlp: FeatureStats,
    /// The inputs of MLP down.
    pub down: FeatureStats,
}

impl LayerInputs {
    /// What one projection sees.
    pub fn of(&self, projection: Projection) -> &FeatureStats {
        match projection {
            Projection::Query | Projection::Key | Projection::Value => &self.attention,
            Projection::Output => &self.output,
            Projection::Gate | Projection::Up => &self.mlp,
            Projection::Down => &self.down,
        }
    }
}

/// The residual streams of a text where it has arrived, 4 d bytes a token.
pub struct Stream {
    /// `[tokens, d]` of each sequence.
    sequences: Vec<Vec<f32>>,
    covariance: bool,
    cache: KvCache,
    scratch: Scratch,
    gram: GramScratch,
    /// The inputs behind a norm, `[tokens, d]`.
    normed: Vec<f32>,
}

impl Stream {
    /// A text before the first layer, in sequences of [`SEQUENCE`] tokens (or of the model's context, if that is shorter).
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
        Ok(Self {
            sequences: embed_sequences(model, runtime, text.tokens, text.bos, length)?,
            covariance: text.covariance,
            cache: KvCache::new(model, length),
            scratch: Scratch::new(),
            gram: GramScratch::default(),
            normed: Vec::new(),
        })
    }

    /// What layer l, the next one, sees of the text as it is. The text stays before the layer, or goes `on` through it.
    ///
    /// `between` is called behind every sequence.
    ///
    /// # Errors
    /// If activations are not numbers, or `between` calls it off.
    pub fn observe(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
        on: bool,
        between: &mut dyn FnMut() -> Result<(), Cancelled>,
    ) -> Result<LayerInputs, PruneError> {
        let Self {
            sequences,
            covariance,
            cache,
            scratch,
            gram,
            normed,
        } = self;
        let layer = &model.layers[l];
        let d = model.config.embedding_length;
        let stats = match covariance {
            true => FeatureStats::with_covariance,
            false => FeatureStats::new,
        };
        let (mut attention, mut mlp) = (stats(d), stats(d));
        let mut outputs = Outputs {
            output: stats(layer.o.weight.cols),
            down: stats(layer.channels()),
            covariance: *covariance,
            gram,
        };
        let (first, second) = (ModuleId::attention(l), ModuleId::mlp(l));
        for sequence in sequences.iter_mut() {
            scratch.set_residual(sequence);
            exactly(runtime, |team| {
                for (module, stats, norm) in [
                    (first, &mut attention, &layer.attention_norm),
                    (second, &mut mlp, &layer.mlp_norm),
                ] {
                    normalise(team, model, scratch.residual(), norm, normed);
                    stats.add(team, &Moments::of(team, normed, d));
                    if let Some(covariance) = &mut stats.covariance {
                        covariance.add(team, normed, outputs.gram);
                    }
                    let modules = module..module.next();
                    model.run_modules(team, modules, cache, scratch, &mut outputs)?;
                }
                Ok::<(), PruneError>(())
            })?;
            if on {
                sequence.copy_from_slice(scratch.residual());
            }
            between()?;
        }
        let inputs = LayerInputs {
            attention,
            output: outputs.output,
            mlp,
            down: outputs.down,
        };
        for (module, stats) in [
            (first, [&inputs.attention, &inputs.output]),
            (second, [&inputs.mlp, &inputs.down]),
        ] {
            if !stats.iter().all(|stats| stats.is_finite()) {
                return Err(PruneErrorKind::not_finite(module).into());
            }
        }
        Ok(inputs)
    }

    /// Takes the text through layer l, the next one, as it is now.
    ///
    /// `between` is called behind every sequence.
    ///
    /// # Errors
    /// If `between` calls it off.
    pub fn pass(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
        between: &mut dyn FnMut() -> Result<(), Cancelled>,
    ) -> Result<(), PruneError> {
        let (cache, scratch) = (&mut self.cache, &mut self.scratch);
        for sequence in &mut self.sequences {
            scratch.set_residual(sequence);
            exactly(runtime, |team| {
                let modules = ModuleId::attention(l)..ModuleId::attention(l + 1);
                model.run_modules(team, modules, cache, scratch, &mut Unobserved)
            })?;
            sequence.copy_from_slice(scratch.residual());
            between()?;
        }
        Ok(())
    }

    /// What the output head sees of the text, which stands behind the last layer.
    pub fn outputs(&mut self, model: &Model, runtime: &Runtime) -> FeatureStats {
        let d = model.config.embedding_length;
        let mut stats = FeatureStats::new(d);
        let normed = &mut self.normed;
        for sequence in &self.sequences {
            exactly(runtime, |team| {
                normalise(team, model, sequence, &model.output_norm, normed);
                stats.add(team, &Moments::of(team, normed, d));
            });
        }
        stats
    }
}

/// Runs `lead` with kernels that do not round inputs to bfloat16. Layer follows layer here with what the ones before have lost, so that a
/// little in the inputs becomes much in the choice of weights: at 2:4 the default model's perplexity differs by 6 %.
fn exactly<R>(runtime: &Runtime, lead: impl FnOnce(&Team) -> R) -> R {
    runtime
        .pool
        .region(runtime.kernels.single_precision(), lead)
}

/// out = norm(x), x `[tokens, d]`.
fn normalise(team: &Team, model: &Model, x: &[f32], weight: &[f32], out: &mut Vec<f32>) {
    let (d, epsilon) = (model.config.embedding_length, model.config.rms_epsilon);
    let kernels = team.kernels();
    out.resize(x.len(), 0.0);
    team.chunks_mut(out, d, |t, row| {
        kernels.rms_norm(&x[t * d..][..d], weight, epsilon, row);
    });
}

/// Adds the inputs of the attention output and of MLP down to their statistics.
struct Outputs<'a> {
    output: FeatureStats,
    down: FeatureStats,
    covariance: bool,
    gram: &'a mut GramScratch,
}

impl Observer for Outputs<'_> {
    fn keeps(&self) -> Keep {
        match self.covariance {
            true => Keep::Values,
            false => Keep::Moments,
        }
    }

    fn attention_output(&mut self, team: &Team, _: usize, x: &Activations) {
        record(&mut self.output, team, x, self.gram);
    }

    fn mlp_down(&mut self, team: &Team, _: usize, x: &Activations) {
        record(&mut self.down, team, x, self.gram);
    }
}
