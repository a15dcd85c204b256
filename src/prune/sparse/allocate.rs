//! How much of each module goes: the same share everywhere, or by loss curves, where what removing single weights of one module alone
//! does to the predictions on held-back text says what the module is worth.

use super::choice::{Pattern, SparseMethod};
use super::layers::mask_of;
use super::projection::LayerProjection;
use super::stream::Stream;
use crate::kernels::Runtime;
use crate::model::{Model, ModuleId};
use crate::progress::{self, Progress};
use crate::prune::collect::{Calibration, Curve};
use crate::prune::curves::{LEAST_TOKENS, SEQUENCE, Slice};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::quant::{KeepMask, is_kept};

/// How far the share of a module by its curve may be from that of the whole.
const REACH: f64 = 0.2;
/// How much of the way from even shares to those by curves is gone. A curve is of one module that loses weights while all others are
/// whole, and where all lose some, modules differ less; `docs/pruning.md` has what this was taken from.
const WAY: f64 = 0.5;
/// No module loses more.
const MOST: f64 = 0.95;
/// How far below and above the share of the whole each curve has a point.
const POINTS: [f64; 2] = [-0.1, 0.1];
/// Tokens that scores of curves are taken from at most.
const SCORED: usize = 8192;

/// What removing a share of the weights of one module, and nothing else, costs: at the index of each module its curve, with points around
/// the share of the whole. Masks are Wanda's, or those of norms where the method looks at no text.
///
/// `progress` counts modules.
///
/// # Errors
/// If there are too few tokens or unknown ones, activations, weights or losses are not numbers, there is no memory, or `progress` breaks.
/// The model is only read.
pub fn measure(
    model: &Model,
    runtime: &Runtime,
    method: SparseMethod,
    statistics: Calibration,
    held_back: Calibration,
    share: f64,
    progress: &mut Progress,
) -> Result<Vec<Curve>, PruneError> {
    if held_back.tokens.len() < LEAST_TOKENS {
        return Err(PruneErrorKind::TooShort {
            tokens: held_back.tokens.len(),
            least: LEAST_TOKENS,
        }
        .into());
    }
    let modules = 2 * model.layers.len();
    let mut stream = match method.reads_text() {
        true => {
            let text = Calibration {
                tokens: &statistics.tokens[..statistics.tokens.len().min(SCORED)],
                covariance: false,
                ..statistics
            };
            Some(Stream::new(model, runtime, text)?)
        }
        false => None,
    };
    let mut slice = Slice::new(model, runtime, held_back, SEQUENCE)?;
    slice.predict()?;
    let mut curves: Vec<Curve> = Vec::with_capacity(modules);
    for l in 0..model.layers.len() {
        let done = curves.len();
        let between = &mut || progress::report(progress, done, modules);
        let inputs = stream
            .as_mut()
            .map(|s| s.observe(model, runtime, l, true, between))
            .transpose()?;
        for module in [ModuleId::attention(l), ModuleId::mlp(l)] {
            let projections: Vec<LayerProjection> = LayerProjection::all(l)
                .filter(|which| which.module() == module)
                .collect();
            let weights: usize = projections
                .iter()
                .map(|which| which.weight(model).parameters())
                .sum();
            let mut points = Vec::with_capacity(POINTS.len());
            for offset in POINTS.iter().filter(|_| weights > 0) {
                let pattern = Pattern::Share((share + offset).clamp(0.01, MOST));
                let mut masks: Vec<Option<KeepMask>> = vec![None; 7];
                for which in &projections {
                    let stats = inputs.as_ref().map(|inputs| inputs.of(which.projection));
                    let mask = mask_of(model, runtime, *which, stats, pattern);
                    let mask = mask.map_err(|_| PruneErrorKind::damaged_weights(module))?;
                    masks[which.projection.index()] = Some(mask);
                }
                let streams = pass(model, runtime, &mut slice, module, &masks)?;
                let loss = slice.loss_of(module.next(), &streams)?;
                if !loss.is_finite() {
                    return Err(PruneErrorKind::not_finite(module).into());
                }
                let removed: usize = masks.iter().flatten().map(KeepMask::removed).sum();
                points.push((removed, loss));
            }
            points.dedup_by_key(|point| point.0);
            points.retain(|point| point.0 > 0);
            curves.push(Curve { points });
            slice.enter(module)?;
            progress::report(progress, curves.len(), modules)?;
        }
    }
    Ok(curves)
}

/// The streams of a slice behind one module that has lost weights, `[tokens, d]` of each sequence.
fn pass(
    model: &Model,
    runtime: &Runtime,
    slice: &mut Slice,
    module: ModuleId,
    masks: &[Option<KeepMask>],
) -> Result<Vec<Vec<f32>>, PruneError> {
    let alone = model.layer_alone(runtime, module.layer(), |i, row, values| {
        if let Some(mask) = &masks[i] {
            for (j, value) in values.iter_mut().enumerate() {
                if !is_kept(mask.row(row), j) {
                    *value = 0.0;
                }
            }
        }
    });
    let alone = alone.map_err(PruneErrorKind::Room)?;
    Ok(slice.through(&alone, module)?)
}

/// The share of each module, so that together they come to `share` of all weights: half of the way from there to where the curves are equally
/// steep, per weight, which is within 0.2 of it. `weights` are those of each module; one without a curve keeps `share`.
pub fn share_out(curves: &[Curve], weights: &[usize], share: f64) -> Vec<f64> {
    assert_eq!(curves.len(), weights.len(), "a curve for each module");
    let (least, most) = (
        (share - REACH).max(0.0),
        (share + REACH).min(MOST.max(share)),
    );
    let steepness: Vec<_> = curves.iter().map(Curve::steepness).collect();
    // The share at which a module's curve is as steep as this.
    let at = |m: usize, slope: f64| -> f64 {
        if curves[m].points.is_empty() {
            return share;
        }
        halve(least, most, |s| {
            steepness[m].at(s * weights[m] as f64) < slope
        })
    };
    let total = |slope: f64| -> f64 {
        let each = (0..weights.len()).map(|m| at(m, slope) * weights[m] as f64);
        each.sum()
    };
    let wanted = share * weights.iter().sum::<usize>() as f64;
    let ends = (0..weights.len()).map(|m| steepness[m].at(most * weights[m] as f64));
    let steepest = ends.filter(|s| s.is_finite()).fold(0.0, f64::max);
    let slope = halve(0.0, 2.0 * steepest, |slope| total(slope) < wanted);
    let mut shares: Vec<f64> = (0..weights.len()).map(|m| at(m, slope)).collect();
    // Curves without any slope leave something over, which all take equally.
    let reached: f64 = (0..weights.len())
        .map(|m| shares[m] * weights[m] as f64)
        .sum();
    let rest = (wanted - reached) / weights.iter().sum::<usize>().max(1) as f64;
    shares
        .iter_mut()
        .for_each(|s| *s = share + WAY * ((*s + rest).clamp(least.min(share), most) - share));
    shares
}

/// Where between two numbers something that holds at first ceases to hold.
fn halve(mut low: f64, mut high: f64, holds: impl Fn(f64) -> bool) -> f64 {
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match holds(middle) {
            true => low = middle,
            false => high = middle,
        }
    }
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(weights: usize, share: f64, cost: f64) -> Curve {
        let point = |s: f64| ((s * weights as f64) as usize, cost * s * s * weights as f64);
        Curve {
            points: vec![point(share - 0.1), point(share + 0.1)],
        }
    }

    #[test]
    fn modules_that_cost_more_lose_less_and_the_sum_is_kept() {
        let weights = [1000, 3000, 2000, 500];
        let costs = [1.0, 1.1, 0.9, 20.0];
        let curves: Vec<Curve> = weights
            .iter()
            .zip(costs)
            .map(|(w, cost)| curve(*w, 0.5, cost))
            .collect();
        let shares = share_out(&curves, &weights, 0.5);
        let sum: f64 = shares.iter().zip(weights).map(|(s, w)| s * w as f64).sum();
        assert!((sum / 6500.0 - 0.5).abs() < 1e-3, "{shares:?}");
        assert!(shares[3] < 0.401 && shares[3] > 0.399, "{shares:?}");
        assert!(shares[2] > shares[0] && shares[0] > shares[1], "{shares:?}");
        assert!(shares.iter().all(|s| (0.4..=0.6).contains(s)), "{shares:?}");
    }

    #[test]
    fn modules_that_are_alike_or_cost_nothing_lose_the_same() {
        let weights = [1000, 1000];
        for cost in [0.0, 1.0] {
            let curves = weights.map(|w| curve(w, 0.5, cost));
            for share in share_out(&curves, &weights, 0.5) {
                assert!((share - 0.5).abs() < 1e-6, "{share}");
            }
        }
        let empty = [Curve::default(), curve(1000, 0.5, 1.0)];
        let shares = share_out(&empty, &[0, 1000], 0.5);
        assert!((shares[1] - 0.5).abs() < 1e-3, "{shares:?}");
    }
}
