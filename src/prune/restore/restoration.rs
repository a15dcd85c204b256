//! Making up for what goes, projection by projection. A new way is a variant of [`Restore`] and an arm of
//! [`restore_projection`].

use std::cmp::Ordering;

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Solve;
use faer::traits::RealField;
use faer::{Accum, Mat, MatRef, Par, Side};

use crate::model::{Model, ModuleId, Weight};
use crate::prune::choose::LayerPlan;
use crate::prune::collect::{Covariance, FeatureStats, LayerProfile, RIDGE};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::features::{features, inputs_per_unit, others, output_weight};
use crate::prune::recipe::Restore;

/// Least squares want more tokens than inputs; with fewer the ridge would decide.
const TOKENS_PER_FEATURE: f64 = 1.0;
/// λ where there were as many tokens as inputs; see [`ridge`].
const RIDGE_OF_INPUTS: f64 = 0.75;
/// From this λ on single precision is enough, which takes half the time: the largest eigenvalue is at most as many times the mean
/// variance as there are inputs, so that with thousands of these the condition is some ten thousand.
const SINGLE_RIDGE: f64 = 0.2;

/// What becomes of one projection.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Restoration {
    /// New weights of the columns that stay, `[out, kept]`; `None` where they stay as they are.
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

/// Makes up for what `kept` removes from layer `l` of the model, which must be as it was when `stats` were taken. For one
/// layer alone, `sequential` is the same as `lsq`.
///
/// # Errors
/// If `lsq` is asked for and the profile has no covariances, or if the weights that go are not all numbers. The model is only
/// read.
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
    Ok(LayerRestoration {
        attention: restore_module(model, stats, ModuleId::attention(l), &kept.heads, how)?,
        mlp: restore_module(model, stats, ModuleId::mlp(l), &kept.channels, how)?,
    })
}

/// The same for one module of the layer, of which the heads or channels `kept` stay.
///
/// # Errors
/// Those of [`restore()`].
pub fn restore_module(
    model: &Model,
    stats: &LayerProfile,
    module: ModuleId,
    kept: &[usize],
    how: Restore,
) -> Result<Restoration, PruneError> {
    let inputs = features(kept, inputs_per_unit(model, module.kind()));
    restore_projection(model, module, stats.of(module.kind()), &inputs, how)
}

/// Makes up for what goes of the projection of one module, of which the inputs `kept` stay.
///
/// # Errors
/// If covariances are needed and missing, or the weights that go are not all numbers.
pub fn restore_projection(
    model: &Model,
    module: ModuleId,
    stats: &FeatureStats,
    kept: &[usize],
    how: Restore,
) -> Result<Restoration, PruneError> {
    let weight = output_weight(model, module);
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
        let bias: Vec<f32> = bias.collect();
        if bias.iter().any(|v| !v.is_finite()) {
            return Err(PruneErrorKind::damaged_weights(module).into());
        }
        Ok(Restoration {
            weights: None,
            bias,
            importance: importance(),
        })
    };
    let nothing = || Restoration {
        importance: importance(),
        ..Restoration::default()
    };
    let normed = model.post_norm(module).is_some();
    let few = (stats.count() as f64) < TOKENS_PER_FEATURE * stats.len() as f64;
    match (how, &stats.covariance) {
        (Restore::None, _) => Ok(nothing()),
        (Restore::Auto, covariance) if normed && (few || covariance.is_none()) => Ok(nothing()),
        (Restore::Bias, _) | (Restore::Auto, None) => bias(),
        (Restore::Auto, _) if few => bias(),
        // Where nothing stays there is nothing to predict from.
        (Restore::Lsq | Restore::Sequential | Restore::Auto, _) if kept.is_empty() => bias(),
        (Restore::Lsq | Restore::Sequential, None) => Err(PruneErrorKind::NoCovariance.into()),
        (Restore::Lsq | Restore::Sequential | Restore::Auto, Some(covariance)) => {
            let inputs = Inputs {
                stats,
                covariance,
                kept,
                removed: &removed,
                through_origin: normed,
            };
            least_squares(model, weight, inputs, Drift::None).map_or_else(bias, Ok)
        }
    }
}

/// What least squares know of the inputs of a projection.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    pub stats: &'a FeatureStats,
    pub covariance: &'a Covariance,
    /// The inputs that stay and those that go, by ascending number.
    pub kept: &'a [usize],
    pub removed: &'a [usize],
    /// The regression has no constant. So it is where a norm follows the projection: to tokens that a module answers with little, which the
    /// norm makes as much of as of others, a constant would be all there is.
    pub through_origin: bool,
}

impl Inputs<'_> {
    /// The covariance of two inputs, or the mean of their product.
    fn moment(&self, i: usize, j: usize) -> f64 {
        match self.through_origin {
            true => self.covariance.second_moment(i, j),
            false => self.covariance.get(i, j),
        }
    }
}

/// Whether the regression also makes up for what the output lacks already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    None,
    /// Behind the inputs, statistics and covariance go on with a feature for every output: how far that is from the dense
    /// model's. See [`sequential`](super::sequential).
    BehindInputs,
}

/// λ of so many inputs and tokens, in shares of the mean variance. The fewer tokens there are for each input, the more of what they say is
/// chance, which another text does not share.
fn ridge(inputs: usize, tokens: u64) -> f64 {
    RIDGE.max(RIDGE_OF_INPUTS * inputs as f64 / tokens.max(1) as f64)
}

/// Ridge regression of the dense projection's output on the inputs that stay; `None` if the covariance is too far from positive
/// definite for the ridge. In place of B only what it does to the weights is computed, ΔWᵀ = (C_KK + λI)⁻¹ (C_KR W_Rᵀ): one
/// right-hand side for every output.
pub(super) fn least_squares(
    model: &Model,
    weight: &Weight,
    inputs: Inputs,
    drift: Drift,
) -> Option<Restoration> {
    match ridge(inputs.kept.len(), inputs.stats.count()) >= SINGLE_RIDGE {
        true => least_squares_in::<f32>(model, weight, inputs, drift),
        false => least_squares_in::<f64>(model, weight, inputs, drift),
    }
}

/// Numbers that least squares are solved in.
trait Real: RealField + Copy {
    fn of(value: f64) -> Self;
    fn to_f64(self) -> f64;
}

impl Real for f32 {
    fn of(value: f64) -> Self {
        value as f32
    }

    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn of(value: f64) -> Self {
        value
    }

    fn to_f64(self) -> f64 {
        self
    }
}

fn least_squares_in<R: Real>(
    model: &Model,
    weight: &Weight,
    inputs: Inputs,
    drift: Drift,
) -> Option<Restoration> {
    let Inputs {
        stats,
        kept,
        removed,
        through_origin,
        ..
    } = inputs;
    let drift = drift == Drift::BehindInputs;
    let (k, d) = (kept.len(), weight.rows);
    let mean_variance = kept.iter().map(|j| inputs.moment(*j, *j)).sum::<f64>() / k as f64;
    let ridge = ridge(k, stats.count()) * mean_variance;
    let c_kk = Mat::<R>::from_fn(k, k, |i, j| match i.cmp(&j) {
        Ordering::Less => R::of(0.0), // Only the lower triangle is read.
        Ordering::Equal => R::of(inputs.moment(kept[i], kept[i]) + ridge),
        Ordering::Greater => R::of(inputs.moment(kept[i], kept[j])),
    });
    let moment = |i: usize, j: usize| R::of(inputs.moment(i, j));
    let c_kr = Mat::<R>::from_fn(k, removed.len(), |i, j| moment(kept[i], removed[j]));

    let w = weight.decode(&model.map);
    let w = MatRef::from_row_major_slice(&w, d, weight.cols);
    let w_r = Mat::<R>::from_fn(removed.len(), d, |i, j| R::of(w[(j, removed[i])].into()));
    let mut delta = match drift {
        true => Mat::<R>::from_fn(k, d, |i, j| moment(kept[i], weight.cols + j)),
        false => Mat::<R>::zeros(k, d),
    };
    matmul(&mut delta, Accum::Add, &c_kr, &w_r, R::of(1.0), Par::Seq);
    c_kk.llt(Side::Lower).ok()?.solve_in_place(&mut delta);
    let delta = |n: usize, i: usize| delta[(n, i)].to_f64();

    let mut weights = Vec::with_capacity(d * k);
    let mut bias = Vec::with_capacity(d);
    for i in 0..d {
        let mut sum = if drift {
            stats.mean(weight.cols + i)
        } else {
            0.0
        };
        for (n, &j) in kept.iter().enumerate() {
            weights.push((f64::from(w[(i, j)]) + delta(n, i)) as f32);
            sum -= delta(n, i) * stats.mean(j);
        }
        for (n, &j) in removed.iter().enumerate() {
            sum += w_r[(n, i)].to_f64() * stats.mean(j);
        }
        bias.push(sum as f32);
    }
    if through_origin {
        bias.clear();
    }
    let finite = weights.iter().chain(&bias).all(|v| v.is_finite());
    finite.then_some(Restoration {
        weights: Some(weights),
        bias,
        importance: kept.iter().map(|j| stats.mean_square(*j) as f32).collect(),
    })
}
