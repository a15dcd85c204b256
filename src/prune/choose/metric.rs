//! Metrics: how much every input feature of the projections that lose columns matters. A new metric is a variant of
//! [`Metric`] and an arm of `Scored::by`.
//!
//! Notation: W `[out, in]` is the projection, ‖W_:j‖² = Σ_i W_ij² the squared norm of its column j, and mean, variance (with
//! n − 1) and mean square of input feature j come from the profile.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::surgeon;
use crate::kernels::Runtime;
use crate::model::{Model, ModuleId, Weight};
use crate::prune::collect::{FeatureStats, Profile};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::features::{inputs_per_unit, output_weight};
use crate::prune::recipe::Metric;

/// Scores of the input features of one layer's two projections that lose columns; higher ones are worth more.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerScores {
    /// Scores for the attention output projection, `[heads · head_dim]`.
    pub attention: Vec<f64>,
    /// Scores for the MLP down projection, `[channels]`.
    pub mlp: Vec<f64>,
}

/// What metrics can look at of one projection that loses columns.
struct Scored<'a> {
    model: &'a Model,
    module: ModuleId,
    weight: &'a Weight,
    columns: ColumnNorms,
    stats: &'a FeatureStats,
}

impl Scored<'_> {
    /// The score of every input feature by `metric`.
    fn by(&self, metric: Metric) -> Result<Vec<f64>, PruneErrorKind> {
        let Self { columns, stats, .. } = self;
        let per_feature = |f: &dyn Fn(usize) -> f64| Ok((0..stats.len()).map(f).collect());
        match metric {
            Metric::Wifv => per_feature(&|j| stats.variance(j) * columns.squares[j]),
            Metric::Ifv => per_feature(&|j| stats.variance(j)),
            Metric::Wifn => per_feature(&|j| columns.means[j] * stats.mean_square(j).sqrt()),
            Metric::Obs => {
                let covariance = stats.covariance.as_ref();
                let covariance = covariance.ok_or(PruneErrorKind::NoCovariance)?;
                let values = self.weight.decode(&self.model.map);
                let unit = inputs_per_unit(self.model, self.module.kind());
                let losses = surgeon::losses(&values, self.weight.rows, covariance, unit);
                // This has never been seen to fail; where it does, fluctuations decide.
                losses.map_or_else(|| self.by(Metric::Wifv), Ok)
            }
            Metric::Magnitude => per_feature(&|j| columns.squares[j].sqrt()),
            Metric::Random => {
                // Projections must differ from each other, and be the same on every run.
                let mut random = ChaCha8Rng::seed_from_u64(self.module.index() as u64);
                Ok((0..stats.len()).map(|_| random.random::<f64>()).collect())
            }
        }
    }
}

/// The scores of every layer's features by `metric`.
///
/// # Errors
/// If the profile has other widths than the model or lacks covariances that the metric needs, or a weight is not a number.
pub fn score(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
    metric: Metric,
) -> Result<Vec<LayerScores>, PruneError> {
    profile.check_shape(model)?;
    let one = |module: ModuleId| -> Result<Vec<f64>, PruneErrorKind> {
        let weight = output_weight(model, module);
        let columns = ColumnNorms::new(model, weight);
        if columns.squares.iter().any(|v| !v.is_finite()) {
            return Err(PruneErrorKind::damaged_weights(module));
        }
        let projection = Scored {
            model,
            module,
            weight,
            columns,
            stats: profile.layers[module.layer()].of(module.kind()),
        };
        projection.by(metric)
    };
    let scores = runtime.region(|team| {
        team.map(model.layers.len(), |l| {
            Ok(LayerScores {
                attention: one(ModuleId::attention(l))?,
                mlp: one(ModuleId::mlp(l))?,
            })
        })
    });
    scores.into_iter().collect()
}

/// Norms of every column of a matrix.
struct ColumnNorms {
    /// The squared norm of each column j, Σ_i W_ij².
    squares: Vec<f64>,
    /// The mean size of each column's values, mean_i |W_ij|.
    means: Vec<f64>,
}

impl ColumnNorms {
    fn new(model: &Model, weight: &Weight) -> Self {
        let mut norms = Self {
            squares: vec![0.0; weight.cols],
            means: vec![0.0; weight.cols],
        };
        let mut row = vec![0.0f32; weight.cols];
        for i in 0..weight.rows {
            weight.decode_row(&model.map, i, &mut row);
            for ((square, mean), w) in norms.squares.iter_mut().zip(&mut norms.means).zip(&row) {
                let w = f64::from(*w);
                *square += w * w;
                *mean += w.abs();
            }
        }
        norms
            .means
            .iter_mut()
            .for_each(|m| *m /= weight.rows as f64);
        norms
    }
}
