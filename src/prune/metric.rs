//! Metrics: how much every input feature of the projections that lose columns matters. A new metric is a variant of
//! [`Metric`] and an arm of `Metric::score`.
//!
//! Notation: W `[out, in]` is the projection, ‖W_:j‖² = Σ_i W_ij² the squared norm of its column j, and mean, variance (with
//! n − 1) and mean square of input feature j come from the profile.

use std::sync::Mutex;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::names::named_choices;
use super::{FeatureStats, Module, Profile, PruneError, surgeon};
use crate::kernels::Runtime;
use crate::model::{Model, Weight};

named_choices! {
    /// What makes a feature worth keeping.
    "metric" Metric {
        /// Weighted input feature variance, variance_j · ‖W_:j‖² (FLAP, section 3.2).
        Wifv = "wifv",
        /// Input feature variance, variance_j (FLAP, section 4.4).
        Ifv = "ifv",
        /// Weighted input feature norm, mean_i |W_ij| · √(mean square_j): Wanda's metric averaged over a column (Sun et al.,
        /// ICLR 2024, section 3; FLAP, section 4.4).
        Wifn = "wifn",
        /// The squared error that the feature's removal costs when those that stay take over, removed greedily with the
        /// cheapest first (Optimal Brain Surgeon for columns, [`surgeon`]). Needs covariances.
        Obs = "obs",
        /// The norm of the column, ‖W_:j‖; looks at no text.
        Magnitude = "magnitude",
        /// Uniform random numbers, the same on every run: the floor that other metrics must beat.
        Random = "random",
    }
}

/// Scores of the input features of one layer's two projections that lose columns; higher ones are worth more.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerScores {
    /// Of the attention output projection, `[heads · head_dim]`.
    pub attention: Vec<f64>,
    /// Of the MLP down projection, `[channels]`.
    pub mlp: Vec<f64>,
}

impl Metric {
    /// Whether a profile must have covariances.
    pub fn wants_covariance(self) -> bool {
        self == Metric::Obs
    }

    /// The score of every input feature of one projection.
    fn score(self, projection: &Projection) -> Result<Vec<f64>, PruneError> {
        let Projection { columns, stats, .. } = projection;
        let per_feature = |f: &dyn Fn(usize) -> f64| Ok((0..stats.len()).map(f).collect());
        match self {
            Metric::Wifv => per_feature(&|j| stats.variance(j) * columns.squares[j]),
            Metric::Ifv => per_feature(&|j| stats.variance(j)),
            Metric::Wifn => per_feature(&|j| columns.means[j] * stats.mean_square(j).sqrt()),
            Metric::Obs => {
                let covariance = stats.covariance.as_ref().ok_or(PruneError::NoCovariance)?;
                let weight = projection.weight;
                let values = weight.decode(&projection.model.map);
                let losses = surgeon::losses(&values, weight.rows, covariance, projection.unit);
                // Never seen; fluctuations do then.
                losses.map_or_else(|| Metric::Wifv.score(projection), Ok)
            }
            Metric::Magnitude => per_feature(&|j| columns.squares[j].sqrt()),
            Metric::Random => {
                let mut random = ChaCha8Rng::seed_from_u64(projection.number);
                Ok((0..stats.len()).map(|_| random.random::<f64>()).collect())
            }
        }
    }
}

/// What metrics can look at.
struct Projection<'a> {
    model: &'a Model,
    weight: &'a Weight,
    columns: ColumnNorms,
    stats: &'a FeatureStats,
    /// Adjacent features that go or stay together.
    unit: usize,
    /// Tells projections apart where chance decides.
    number: u64,
}

/// Scores every layer's features by `metric`.
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
    let slots: Vec<Mutex<Option<Result<LayerScores, PruneError>>>> =
        model.layers.iter().map(|_| Mutex::new(None)).collect();
    runtime.region(|team| {
        team.items(model.layers.len(), |_, l| {
            let (layer, stats) = (&model.layers[l], &profile.layers[l]);
            let features = |module, weight, stats, unit| {
                let columns = ColumnNorms::new(model, weight);
                if columns.squares.iter().any(|v| !v.is_finite()) {
                    return Err(PruneError::DamagedWeights { layer: l, module });
                }
                metric.score(&Projection {
                    model,
                    weight,
                    columns,
                    stats,
                    unit,
                    number: 2 * l as u64 + u64::from(module == Module::Mlp),
                })
            };
            let head_dim = model.config.head_dim;
            let attention = features(
                Module::Attention,
                &layer.o.weight,
                &stats.attention,
                head_dim,
            );
            let scores = attention.and_then(|attention| {
                let mlp = features(Module::Mlp, &layer.down.weight, &stats.mlp, 1)?;
                Ok(LayerScores { attention, mlp })
            });
            *slots[l].lock().expect("each layer has one user") = Some(scores);
        });
    });
    slots
        .into_iter()
        .map(|slot| {
            slot.into_inner()
                .ok()
                .flatten()
                .expect("every layer was scored")
        })
        .collect()
}

/// Of every column of a matrix.
struct ColumnNorms {
    /// Σ_i W_ij²
    squares: Vec<f64>,
    /// mean_i |W_ij|
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
