//! Making up for what goes. A new way is a variant of [`Restore`] and an arm of [`restore`].

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Solve;
use faer::{Accum, Mat, MatRef, Par, Side};

use super::names::named_choices;
use super::{Covariance, FeatureStats, LayerPlan, LayerProfile, PruneError};
use crate::model::{Model, Weight};

/// λ of the least squares, in shares of the mean variance of the inputs that stay.
pub const RIDGE: f64 = 1e-2;

/// Least squares want more tokens than inputs; with fewer the ridge would decide.
const TOKENS_PER_FEATURE: f64 = 1.0;

named_choices! {
    /// What is changed in a projection W `[out, in]` that keeps the inputs K and loses the inputs R.
    "restoration" Restore {
        /// Nothing.
        None = "none",
        /// The bias W_R μ_R: what the removed inputs contribute on average (FLAP, section 3.4).
        Bias = "bias",
        /// The removed inputs' best linear prediction from those that stay goes into the weights:
        /// B = (C_KK + λI)⁻¹ C_KR, W_K + W_R Bᵀ, bias W_R (μ_R − Bᵀ μ_K), with the covariance C and the mean μ of the inputs and
        /// λ = 10⁻² · mean diag(C_KK): ridge regression of the dense projection's output.
        Lsq = "lsq",
        /// `lsq` layer by layer, on the inputs that the already pruned layers produce and towards the dense model's residual
        /// stream ([`sequential`](super::sequential)). Needs the calibration text itself.
        Sequential = "sequential",
        /// `lsq` where the covariance is known from at least as many tokens as the projection has inputs, else `bias`.
        Auto = "auto",
    }
}

impl Restore {
    /// What loss curves restore a module by, with all before it dense: without drift a sequence is least squares.
    pub fn of_one_module(self) -> Self {
        match self {
            Restore::Sequential => Restore::Auto,
            other => other,
        }
    }

    /// Whether a profile should have covariances.
    pub fn wants_covariance(self) -> bool {
        matches!(self, Restore::Lsq | Restore::Sequential | Restore::Auto)
    }
}

/// What becomes of one projection.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Restoration {
    /// New weights of the columns that stay, `[out, kept]`; none where they stay as they are.
    pub weights: Option<Vec<f32>>,
    /// Added to the projection's bias, `[out]`; may be empty where nothing is.
    pub bias: Vec<f32>,
    /// Mean squares of the inputs that stay, `[kept]`, by which errors count where weights are encoded anew; where it is empty
    /// all count alike.
    pub importance: Vec<f32>,
}

/// What becomes of one layer's two projections that lose columns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerRestoration {
    pub attention: Restoration,
    pub mlp: Restoration,
}

/// Makes up for what `kept` removes from layer `l` of the model, which must be as it was when `stats` were taken. Of one
/// layer alone, `sequential` is the same as `lsq`.
///
/// # Errors
/// If `lsq` is asked for and the profile has no covariances.
///
/// # Panics
/// If plan and profile were not made for this model.
pub fn restore(
    model: &Model,
    stats: &LayerProfile,
    l: usize,
    kept: &LayerPlan,
    how: Restore,
) -> Result<LayerRestoration, PruneError> {
    let layer = &model.layers[l];
    let queries = features(&kept.heads, model.config.head_dim);
    let one = |weight, stats, kept| restore_projection(model, weight, stats, kept, how);
    Ok(LayerRestoration {
        attention: one(&layer.o.weight, &stats.attention, &queries)?,
        mlp: one(&layer.down.weight, &stats.mlp, &kept.channels)?,
    })
}

pub(super) fn restore_projection(
    model: &Model,
    weight: &Weight,
    stats: &FeatureStats,
    kept: &[usize],
    how: Restore,
) -> Result<Restoration, PruneError> {
    if kept.len() == weight.cols {
        return Ok(Restoration::default());
    }
    let removed = others(weight.cols, kept);
    let importance = || -> Vec<f32> { kept.iter().map(|j| stats.mean_square(*j) as f32).collect() };
    let bias = || {
        let mut row = vec![0.0f32; weight.cols];
        let bias = (0..weight.rows).map(|i| {
            weight.decode_row(&model.map, i, &mut row);
            let sum: f64 = removed
                .iter()
                .map(|&j| f64::from(row[j]) * stats.mean(j))
                .sum();
            sum as f32
        });
        Restoration {
            weights: None,
            bias: bias.collect(),
            importance: importance(),
        }
    };
    match (how, &stats.covariance) {
        (Restore::None, _) => Ok(Restoration {
            importance: importance(),
            ..Restoration::default()
        }),
        (Restore::Bias, _) | (Restore::Auto, None) => Ok(bias()),
        (Restore::Auto, _) if (stats.count() as f64) < TOKENS_PER_FEATURE * stats.len() as f64 => {
            Ok(bias())
        }
        // Where nothing stays there is nothing to predict from.
        (Restore::Lsq | Restore::Sequential | Restore::Auto, _) if kept.is_empty() => Ok(bias()),
        (Restore::Lsq | Restore::Sequential, None) => Err(PruneError::NoCovariance),
        (Restore::Lsq | Restore::Sequential | Restore::Auto, Some(covariance)) => Ok(
            least_squares(model, weight, stats, covariance, kept, &removed, false)
                .unwrap_or_else(bias),
        ),
    }
}

/// Instead of B only what it does to the weights is computed, ΔWᵀ = (C_KK + λI)⁻¹ (C_KR W_Rᵀ): one right-hand side for every
/// output. `None` if the covariance is too far from positive definite for the ridge.
///
/// With `drift`, statistics go on behind the inputs with a feature for every output, which the regression makes up for too;
/// see [`sequential`](super::sequential).
pub(super) fn least_squares(
    model: &Model,
    weight: &Weight,
    stats: &FeatureStats,
    covariance: &Covariance,
    kept: &[usize],
    removed: &[usize],
    drift: bool,
) -> Option<Restoration> {
    let (k, d) = (kept.len(), weight.rows);
    let mean_variance = kept.iter().map(|j| covariance.get(*j, *j)).sum::<f64>() / k as f64;
    let mut c_kk = Mat::from_fn(k, k, |i, j| match i < j {
        true => 0.0, // Only the lower triangle is read.
        false => covariance.get(kept[i], kept[j]),
    });
    for i in 0..k {
        c_kk[(i, i)] += RIDGE * mean_variance;
    }
    let c_kr = Mat::from_fn(k, removed.len(), |i, j| covariance.get(kept[i], removed[j]));

    let w = weight.decode(&model.map);
    let w = MatRef::from_row_major_slice(&w, d, weight.cols);
    let w_r = Mat::from_fn(removed.len(), d, |i, j| f64::from(w[(j, removed[i])]));
    let mut delta = match drift {
        true => Mat::from_fn(k, d, |i, j| covariance.get(kept[i], weight.cols + j)),
        false => Mat::zeros(k, d),
    };
    matmul(&mut delta, Accum::Add, &c_kr, &w_r, 1.0, Par::Seq);
    c_kk.llt(Side::Lower).ok()?.solve_in_place(&mut delta);

    let mut weights = Vec::with_capacity(d * k);
    let mut bias = Vec::with_capacity(d);
    for i in 0..d {
        let mut sum = if drift {
            stats.mean(weight.cols + i)
        } else {
            0.0
        };
        for (n, &j) in kept.iter().enumerate() {
            weights.push((f64::from(w[(i, j)]) + delta[(n, i)]) as f32);
            sum -= delta[(n, i)] * stats.mean(j);
        }
        for (n, &j) in removed.iter().enumerate() {
            sum += w_r[(n, i)] * stats.mean(j);
        }
        bias.push(sum as f32);
    }
    bias.iter().all(|v| v.is_finite()).then_some(Restoration {
        weights: Some(weights),
        bias,
        importance: kept.iter().map(|j| stats.mean_square(*j) as f32).collect(),
    })
}

/// The features of some heads.
pub(super) fn features(heads: &[usize], head_dim: usize) -> Vec<usize> {
    heads
        .iter()
        .flat_map(|h| h * head_dim..(h + 1) * head_dim)
        .collect()
}

/// The numbers below `count` that are not in `kept`, which is sorted.
pub(super) fn others(count: usize, kept: &[usize]) -> Vec<usize> {
    (0..count)
        .filter(|unit| kept.binary_search(unit).is_err())
        .collect()
}
