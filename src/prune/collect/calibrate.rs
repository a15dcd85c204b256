//! Running text through the dense model and watching the inputs of the projections that can lose columns.

use std::ops::Range;

use super::covariance::GramScratch;
use super::profile::{FeatureStats, LayerProfile, Profile};
use super::weighing::Weighing;
use crate::kernels::{Activations, Keep, Moments, Runtime, Team};
use crate::model::{KvCache, Model, Module, ModuleId, Observer, Scratch};
use crate::progress::{self, Progress};
use crate::prune::error::{PruneError, PruneErrorKind};

/// The built-in calibration text: varied prose, exposition, dialogue, lists, tables and code, written for this purpose.
pub const TEXT: &str = include_str!("calibration.txt");
/// Program sources in several languages, written for this purpose.
pub const CODE: &str = include_str!("code.txt");
/// A text of several kinds that no model is calibrated on, for telling what pruning has done to it.
pub const HELD_BACK: &str = include_str!("held_back.txt");

/// Tokens of one sequence; each starts afresh.
pub const SEQUENCE: usize = 512;

/// Fewer tokens than this say too little about any feature.
pub const LEAST_TOKENS: usize = 128;

/// A text and what is to be collected of it.
#[derive(Debug, Clone, Copy)]
pub struct Calibration<'a> {
    /// The text's tokens.
    pub tokens: &'a [u32],
    /// The token that is put in front of every sequence; `None` where the model wants none.
    pub bos: Option<u32>,
    /// Whether to collect covariances, which least squares need. A layer's take 4 bytes for every pair of channels and for
    /// every pair of attention features, and about as long as the layer itself.
    pub covariance: bool,
}

/// The profile of a text, without loss curves. The text runs in sequences of [`SEQUENCE`] tokens (or of the model's context, if
/// that is shorter).
///
/// `progress` counts tokens.
///
/// # Errors
/// If the text is too short, has tokens that the model does not know, or drives activations out of range, or `progress`
/// breaks.
pub fn calibrate(
    model: &Model,
    runtime: &Runtime,
    calibration: Calibration,
    progress: &mut Progress,
) -> Result<Profile, PruneError> {
    calibrate_onwards(model, runtime, calibration, None, &mut |_, _| {}, progress)
}

/// Gets what is done so far, and whether the work ends there because it is called off.
pub type SoFar<'a, T> = dyn FnMut(&T, bool) + 'a;

/// [`calibrate()`] from where an earlier run was: `begun` are the layers that `so_far` got there, of the same model and text. What comes out is the
/// same as in one run.
///
/// # Errors
/// Those of [`calibrate()`].
pub fn calibrate_onwards(
    model: &Model,
    runtime: &Runtime,
    calibration: Calibration,
    begun: Option<Vec<LayerProfile>>,
    so_far: &mut SoFar<[LayerProfile]>,
    progress: &mut Progress,
) -> Result<Profile, PruneError> {
    let layers = 0..model.layers.len();
    let begun = begun.unwrap_or_default();
    let layers = collect(model, runtime, calibration, layers, begun, so_far, progress)?;
    Ok(Profile {
        layers,
        curves: None,
    })
}

/// The statistics of some layers only. The text goes no further than to the last of them.
///
/// `progress` counts tokens.
///
/// # Errors
/// Those of [`calibrate()`].
///
/// # Panics
/// If there are no such layers.
pub fn calibrate_layers(
    model: &Model,
    runtime: &Runtime,
    calibration: Calibration,
    layers: Range<usize>,
    progress: &mut Progress,
) -> Result<Vec<LayerProfile>, PruneError> {
    let nothing = Vec::new();
    collect(
        model,
        runtime,
        calibration,
        layers,
        nothing,
        &mut |_, _| {},
        progress,
    )
}

/// The statistics of some layers, of which `begun` has those of the first sequences; empty for none.
fn collect(
    model: &Model,
    runtime: &Runtime,
    calibration: Calibration,
    layers: Range<usize>,
    begun: Vec<LayerProfile>,
    so_far: &mut SoFar<[LayerProfile]>,
    progress: &mut Progress,
) -> Result<Vec<LayerProfile>, PruneError> {
    let Calibration {
        tokens,
        bos,
        covariance,
    } = calibration;
    if tokens.len() < LEAST_TOKENS {
        return Err(PruneErrorKind::TooShort {
            tokens: tokens.len(),
            least: LEAST_TOKENS,
        }
        .into());
    }
    let sequence = SEQUENCE.min(model.config.context_length);
    let mut recorder = Recorder::new(model, layers.clone(), covariance);
    let mut done = 0;
    if !begun.is_empty() {
        done = tokens_of(&begun, sequence, bos);
        recorder.layers = begun;
        progress::report(progress, done, tokens.len())?;
    }
    let mut cache = KvCache::new(model, sequence);
    let mut scratch = Scratch::new();
    let mut batch = Vec::with_capacity(sequence);
    while done < tokens.len() {
        batch.clear();
        batch.extend(bos);
        let take = (sequence - batch.len()).min(tokens.len() - done);
        batch.extend_from_slice(&tokens[done..done + take]);
        runtime.region(|team| {
            model.embed(team, &batch, &mut scratch)?;
            let modules = ModuleId::all(layers.end);
            model.run_modules(team, modules, &mut cache, &mut scratch, &mut recorder)?;
            Ok::<(), PruneError>(())
        })?;
        done += take;
        let broken = progress::report(progress, done, tokens.len());
        so_far(&recorder.layers, broken.is_err());
        broken?;
    }
    for (stats, layer) in recorder.layers.iter().zip(layers) {
        for (module, stats) in [
            (Module::Attention, &stats.attention),
            (Module::Mlp, &stats.mlp),
        ] {
            if !stats.is_finite() {
                return Err(PruneErrorKind::NotFinite { layer, module }.into());
            }
        }
    }
    Ok(recorder.layers)
}

impl Profile {
    /// Tokens of a text that the profile is of. `bos` begins each of its sequences, and is not of the text.
    pub fn tokens(&self, model: &Model, bos: Option<u32>) -> usize {
        tokens_of(&self.layers, SEQUENCE.min(model.config.context_length), bos)
    }
}

fn tokens_of(layers: &[LayerProfile], sequence: usize, bos: Option<u32>) -> usize {
    let seen = layers.first().map_or(0, |layer| layer.mlp.count()) as usize;
    seen - seen.div_ceil(sequence) * usize::from(bos.is_some())
}

/// Adds the inputs that it sees to the statistics of some layers.
struct Recorder<'m> {
    model: &'m Model,
    /// The number of the first of these layers.
    first: usize,
    layers: Vec<LayerProfile>,
    covariance: bool,
    scratch: GramScratch,
    weighing: Weighing,
}

impl<'m> Recorder<'m> {
    fn new(model: &'m Model, layers: Range<usize>, covariance: bool) -> Self {
        let stats = if covariance {
            FeatureStats::with_covariance
        } else {
            FeatureStats::new
        };
        Self {
            model,
            first: layers.start,
            layers: model.layers[layers]
                .iter()
                .map(|layer| LayerProfile {
                    attention: stats(layer.o.weight.cols),
                    mlp: stats(layer.channels()),
                })
                .collect(),
            covariance,
            scratch: GramScratch::default(),
            weighing: Weighing::default(),
        }
    }

    fn record(&mut self, team: &Team, module: ModuleId, x: &Activations) {
        let Some(place) = module.layer().checked_sub(self.first) else {
            return;
        };
        let layer = &mut self.layers[place];
        let stats = match module.kind() {
            Module::Attention => &mut layer.attention,
            Module::Mlp => &mut layer.mlp,
        };
        let x = self.weighing.weigh(team, self.model, module, x);
        record(stats, team, x, &mut self.scratch);
    }
}

impl Observer for Recorder<'_> {
    fn keeps(&self) -> Keep {
        // What a norm makes of the outputs follows from the values.
        match self.covariance || self.model.config.family().post_norms {
            true => Keep::Values,
            false => Keep::Moments,
        }
    }

    fn attention_output(&mut self, team: &Team, layer: usize, x: &Activations) {
        self.record(team, ModuleId::attention(layer), x);
    }

    fn mlp_down(&mut self, team: &Team, layer: usize, x: &Activations) {
        self.record(team, ModuleId::mlp(layer), x);
    }
}

/// Adds the inputs of a projection to its statistics.
pub(in crate::prune) fn record(
    stats: &mut FeatureStats,
    team: &Team,
    x: &Activations,
    scratch: &mut GramScratch,
) {
    match x.moments() {
        Some(moments) => stats.add(team, moments),
        None => stats.add(team, &Moments::of(team, x.values(), x.cols())),
    }
    if let Some(covariance) = &mut stats.covariance {
        covariance.add(team, x.values(), scratch);
    }
}
