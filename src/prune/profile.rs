//! What calibration leaves behind.

use super::{Covariance, Curves, PruneError};
use crate::kernels::Team;
use crate::model::Model;

/// Features per piece of work when statistics are split among threads.
const PIECE: usize = 64;
/// Tokens that are summed in single precision before the sum goes into one in double precision.
const SOME_ROWS: usize = 32;

/// Running statistics of the features of a projection's input, one sample per token. Means and sums of squared
/// deviations are merged batch by batch (Chan, Golub and LeVeque 1979), so that a large mean does not swallow a small
/// variance.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureStats {
    count: u64,
    features: Vec<Moments>,
    /// Where least squares need it.
    pub covariance: Option<Covariance>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Moments {
    mean: f64,
    /// Σ (x − mean)²
    deviation: f64,
}

impl FeatureStats {
    pub fn new(features: usize) -> Self {
        Self {
            count: 0,
            features: vec![Moments::default(); features],
            covariance: None,
        }
    }

    /// The same with an empty covariance.
    pub fn with_covariance(features: usize) -> Self {
        Self {
            covariance: Some(Covariance::new(features)),
            ..Self::new(features)
        }
    }

    /// Statistics that were taken before: see [`FeatureStats::mean`] and [`FeatureStats::deviation`].
    ///
    /// # Panics
    /// If there are not as many of one as of the other.
    pub(super) fn from_parts(count: u64, means: &[f64], deviations: &[f64]) -> Self {
        assert_eq!(means.len(), deviations.len());
        let features = means.iter().zip(deviations);
        Self {
            count,
            covariance: None,
            features: features
                .map(|(&mean, &deviation)| Moments { mean, deviation })
                .collect(),
        }
    }

    /// Adds a batch x `[n, features]`, row-major.
    ///
    /// # Panics
    /// If x is not a whole number of rows.
    pub fn add(&mut self, team: &Team, x: &[f32]) {
        let width = self.features.len();
        if width == 0 || x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(width), "whole rows");
        let rows = x.len() / width;
        let (before, batch) = (self.count as f64, rows as f64);
        let all = before + batch;
        // Near the mean, so that nothing cancels: what came before, or a token from the middle, since the first of a text often
        // lies far off.
        let near: Vec<f32> = match self.count {
            0 => x[rows / 2 * width..][..width].to_vec(),
            _ => self.features.iter().map(|f| f.mean as f32).collect(),
        };
        // Some tokens at a time, in single precision: Σ (x − near), and behind them Σ (x − near)².
        let mut partial = vec![0.0f32; rows.div_ceil(SOME_ROWS) * 2 * width];
        team.chunks_mut(&mut partial, 2 * width, |some, sums| {
            let (sums, squares) = sums.split_at_mut(width);
            let rows = &x[some * SOME_ROWS * width..rows.min((some + 1) * SOME_ROWS) * width];
            for row in rows.chunks_exact(width) {
                let sums = sums.iter_mut().zip(squares.iter_mut());
                for ((sum, square), (v, near)) in sums.zip(row.iter().zip(&near)) {
                    let difference = v - near;
                    *sum += difference;
                    *square += difference * difference;
                }
            }
        });
        team.chunks_mut(&mut self.features, PIECE, |piece, moments| {
            let first = piece * PIECE;
            let mut totals = [(0.0f64, 0.0f64); PIECE];
            for sums in partial.chunks_exact(2 * width) {
                for (i, total) in totals[..moments.len()].iter_mut().enumerate() {
                    total.0 += f64::from(sums[first + i]);
                    total.1 += f64::from(sums[width + first + i]);
                }
            }
            for (i, (old, (sum, squares))) in moments.iter_mut().zip(totals).enumerate() {
                let off = sum / batch;
                let deviation = (squares - sum * off).max(0.0);
                let shift = f64::from(near[first + i]) + off - old.mean;
                old.mean += shift * batch / all;
                old.deviation += deviation + shift * shift * before * batch / all;
            }
        });
        self.count += rows as u64;
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

    pub fn mean(&self, feature: usize) -> f64 {
        self.features[feature].mean
    }

    /// Σ (x − mean)²
    pub(super) fn deviation(&self, feature: usize) -> f64 {
        self.features[feature].deviation
    }

    /// Sample variance, with n − 1: FLAP's *fluctuation*. 0 for fewer than two tokens.
    pub fn variance(&self, feature: usize) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            n => self.features[feature].deviation / (n - 1) as f64,
        }
    }

    /// Mean of squares.
    pub fn mean_square(&self, feature: usize) -> f64 {
        let Moments { mean, deviation } = self.features[feature];
        deviation / self.count.max(1) as f64 + mean * mean
    }

    /// Whether every statistic is a finite number.
    pub fn is_finite(&self) -> bool {
        self.features
            .iter()
            .all(|m| m.mean.is_finite() && m.deviation.is_finite())
    }
}

/// The inputs of the two projections of a layer that lose columns.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerProfile {
    /// Of the attention output projection: `[heads · head_dim]` features.
    pub attention: FeatureStats,
    /// Of the MLP down projection: `[channels]` features.
    pub mlp: FeatureStats,
}

/// What calibration leaves behind: statistics for every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    pub layers: Vec<LayerProfile>,
    /// Where they were measured.
    pub curves: Option<Curves>,
}

impl Profile {
    /// Checks that the profile has the model's widths.
    ///
    /// # Errors
    /// [`PruneError::OtherShape`].
    pub fn check_shape(&self, model: &Model) -> Result<(), PruneError> {
        if self.layers.len() != model.layers.len() {
            return Err(PruneError::OtherShape(format!(
                "it has {} layers, the model {}",
                self.layers.len(),
                model.layers.len()
            )));
        }
        for (l, (stats, layer)) in self.layers.iter().zip(&model.layers).enumerate() {
            let theirs = (stats.attention.len(), stats.mlp.len());
            let ours = (layer.o.weight.cols, layer.channels());
            if theirs != ours {
                return Err(PruneError::OtherShape(format!(
                    "layer {l} has {} attention features and {} channels, the model's {} and {}",
                    theirs.0, theirs.1, ours.0, ours.1
                )));
            }
        }
        Ok(())
    }

    /// Whether every layer's covariances are there.
    pub fn has_covariance(&self) -> bool {
        self.layers
            .iter()
            .all(|l| l.attention.covariance.is_some() && l.mlp.covariance.is_some())
    }
}
