//! Profiles: the statistics that calibration leaves behind.

use super::covariance::Covariance;
use super::curve::Curves;
use crate::count::count;
use crate::kernels::{Moments, Team};
use crate::model::{Model, Module};
use crate::prune::error::{PruneError, PruneErrorKind};

/// Features per piece of work when statistics are split among threads.
const PIECE: usize = 64;

/// Running statistics of the features of a projection's input, one sample per token. Means and sums of squared
/// deviations are merged batch by batch (Chan, Golub and LeVeque 1979), so that a large mean does not swallow a small
/// variance.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureStats {
    /// Tokens seen.
    count: u64,
    features: Vec<Feature>,
    /// The covariance of the features; `None` where it was not collected.
    pub covariance: Option<Covariance>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Feature {
    mean: f64,
    /// The sum of squared deviations, Σ (x − mean)².
    deviation: f64,
}

impl FeatureStats {
    /// No tokens yet, and no covariance.
    pub fn new(features: usize) -> Self {
        Self {
            count: 0,
            features: vec![Feature::default(); features],
            covariance: None,
        }
    }

    /// No tokens yet, with a covariance to be collected.
    pub fn with_covariance(features: usize) -> Self {
        Self {
            covariance: Some(Covariance::new(features)),
            ..Self::new(features)
        }
    }

    /// Statistics that were taken before, without a covariance: the [mean](FeatureStats::mean) and the
    /// [deviation](FeatureStats::deviation) of every feature.
    ///
    /// # Panics
    /// If there are not as many means as deviations.
    pub(in crate::prune) fn from_parts(count: u64, means: &[f64], deviations: &[f64]) -> Self {
        assert_eq!(means.len(), deviations.len());
        let features = means.iter().zip(deviations);
        Self {
            count,
            covariance: None,
            features: features
                .map(|(&mean, &deviation)| Feature { mean, deviation })
                .collect(),
        }
    }

    /// Adds a batch of inputs.
    ///
    /// # Panics
    /// If they are of another width.
    pub fn add(&mut self, team: &Team, batch: &Moments) {
        assert_eq!(batch.cols(), self.features.len(), "features");
        if batch.tokens() == 0 {
            return;
        }
        let (before, tokens) = (self.count as f64, batch.tokens() as f64);
        let all = before + tokens;
        team.chunks_mut(&mut self.features, PIECE, |piece, moments| {
            let features = piece * PIECE..piece * PIECE + moments.len();
            // First the batch's mean, then the deviations from it.
            let mut means = [0.0f64; PIECE];
            for part in batch.parts() {
                for (mean, i) in means.iter_mut().zip(features.clone()) {
                    *mean += part.tokens as f64 * f64::from(part.near[i]) + f64::from(part.sums[i]);
                }
            }
            means.iter_mut().for_each(|mean| *mean /= tokens);
            let mut deviations = [0.0f64; PIECE];
            for part in batch.parts() {
                let n = part.tokens as f64;
                for ((deviation, mean), i) in deviations.iter_mut().zip(means).zip(features.clone())
                {
                    // Σ (x − mean)² = Σ (x − near)² + 2 off Σ (x − near) + n off², off = near − mean
                    let off = f64::from(part.near[i]) - mean;
                    *deviation += f64::from(part.squares[i])
                        + off * (2.0 * f64::from(part.sums[i]) + n * off);
                }
            }
            for ((old, mean), deviation) in moments.iter_mut().zip(means).zip(deviations) {
                let shift = mean - old.mean;
                old.mean += shift * tokens / all;
                old.deviation += deviation.max(0.0) + shift * shift * before * tokens / all;
            }
        });
        self.count += batch.tokens() as u64;
    }

    /// Tokens seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of features.
    pub fn len(&self) -> usize {
        self.features.len()
    }

    pub fn is_empty(&self) -> bool {
        self.features.is_empty()
    }

    /// The mean of a feature.
    pub fn mean(&self, feature: usize) -> f64 {
        self.features[feature].mean
    }

    /// The sum of squared deviations, Σ (x − mean)².
    pub(in crate::prune) fn deviation(&self, feature: usize) -> f64 {
        self.features[feature].deviation
    }

    /// The sample variance of a feature, with n − 1: FLAP's *fluctuation*. 0 for fewer than two tokens.
    pub fn variance(&self, feature: usize) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            n => self.features[feature].deviation / (n - 1) as f64,
        }
    }

    /// The mean of squares of a feature.
    pub fn mean_square(&self, feature: usize) -> f64 {
        let Feature { mean, deviation } = self.features[feature];
        deviation / self.count.max(1) as f64 + mean * mean
    }

    /// Whether every mean and variance is a finite number.
    pub fn is_finite(&self) -> bool {
        self.features
            .iter()
            .all(|m| m.mean.is_finite() && m.deviation.is_finite())
    }
}

/// Statistics of the inputs of the two projections of a layer that lose columns.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerProfile {
    /// The inputs of the attention output projection: `[heads · head_dim]` features.
    pub attention: FeatureStats,
    /// The inputs of the MLP down projection: `[channels]` features.
    pub mlp: FeatureStats,
}

impl LayerProfile {
    /// The statistics of one of the two modules.
    pub fn of(&self, module: Module) -> &FeatureStats {
        match module {
            Module::Attention => &self.attention,
            Module::Mlp => &self.mlp,
        }
    }
}

/// What calibration leaves behind.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// The statistics of every layer.
    pub layers: Vec<LayerProfile>,
    /// What removing a share of each module costs; `None` where that was not measured.
    pub curves: Option<Curves>,
}

impl Profile {
    /// Checks that the profile has the model's widths.
    ///
    /// # Errors
    /// [`PruneErrorKind::OtherShape`].
    pub fn check_shape(&self, model: &Model) -> Result<(), PruneError> {
        if self.layers.len() != model.layers.len() {
            return Err(PruneErrorKind::OtherShape(format!(
                "it has {}, the model {}",
                count(self.layers.len(), "layer"),
                model.layers.len()
            ))
            .into());
        }
        for (l, (stats, layer)) in self.layers.iter().zip(&model.layers).enumerate() {
            let theirs = (stats.attention.len(), stats.mlp.len());
            let ours = (layer.o.weight.cols, layer.channels());
            if theirs != ours {
                return Err(PruneErrorKind::OtherShape(format!(
                    "layer {l} has {} and {}, the model's {} and {}",
                    count(theirs.0, "attention feature"),
                    count(theirs.1, "channel"),
                    ours.0,
                    ours.1
                ))
                .into());
            }
        }
        Ok(())
    }

    /// Whether every layer's covariances are there.
    pub fn has_covariance(&self) -> bool {
        have_covariances(&self.layers)
    }
}

/// Whether the covariances of all these layers are there.
pub(in crate::prune) fn have_covariances(layers: &[LayerProfile]) -> bool {
    let mut layers = layers.iter();
    layers.all(|l| l.attention.covariance.is_some() && l.mlp.covariance.is_some())
}
