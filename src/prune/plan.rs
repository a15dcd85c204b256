//! What stays: FLAP's AL-AM structure, one threshold over all layers and modules.

use super::{LayerScores, PruneError, RATIOS};
use crate::model::{Layer, Model, Weight};

/// What stays of one layer, by ascending number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    pub heads: Vec<usize>,
    pub channels: Vec<usize>,
}

/// What stays of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub layers: Vec<LayerPlan>,
    /// Parameters of the layers' attention and MLP weights that go, and all of them.
    pub removed: usize,
    pub total: usize,
}

impl Plan {
    /// The ratio that the plan reaches.
    pub fn ratio(&self) -> f64 {
        self.removed as f64 / self.total.max(1) as f64
    }
}

/// Removes units in the order of their scores, lowest first, over all layers and modules together. Every unit weighs as
/// many parameters as it frees: a channel its row of gate and up and its column of down; a query head its rows of q and its
/// columns of o, and its KV head too if it was the last to read it. Widths are rounded to what the block formats need.
/// The threshold is the one whose plan, after rounding, comes closest to `ratio`.
///
/// # Errors
/// If the ratio is out of [`RATIOS`].
pub fn plan(model: &Model, scores: &[LayerScores], ratio: f64) -> Result<Plan, PruneError> {
    if !RATIOS.contains(&ratio) {
        return Err(PruneError::Ratio(ratio));
    }
    let mut modules = Vec::with_capacity(2 * scores.len());
    for (layer, scores) in model.layers.iter().zip(scores) {
        modules.push(Units::heads(layer, model.config.head_dim, &scores.heads));
        modules.push(Units::channels(layer, &scores.channels));
    }
    let mut order: Vec<(f64, usize)> = modules
        .iter()
        .enumerate()
        .flat_map(|(m, units)| units.scores.iter().map(move |score| (*score, m)))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));

    // Walks the threshold up unit by unit; one module changes at a time.
    let total = model.layer_parameters();
    let target = ratio * total as f64;
    let distance = |removed: usize| (removed as f64 - target).abs();
    let mut gone = vec![0usize; modules.len()];
    let mut removed = 0;
    let mut best = (distance(0), gone.clone());
    for (_, m) in order {
        removed -= modules[m].freed(gone[m]);
        gone[m] += 1;
        removed += modules[m].freed(gone[m]);
        if distance(removed) < best.0 {
            best = (distance(removed), gone.clone());
        }
    }

    let mut layers = Vec::with_capacity(scores.len());
    let mut removed = 0;
    for (pair, gone) in modules.chunks_exact(2).zip(best.1.chunks_exact(2)) {
        removed += pair[0].freed(gone[0]) + pair[1].freed(gone[1]);
        layers.push(LayerPlan {
            heads: pair[0].kept(gone[0]),
            channels: pair[1].kept(gone[1]),
        });
    }
    Ok(Plan {
        layers,
        removed,
        total,
    })
}

/// The units of one module.
struct Units {
    scores: Vec<f64>,
    /// Units by rising score.
    by_score: Vec<usize>,
    /// How many stay is a multiple of this.
    granule: usize,
    /// Parameters freed when the lowest n units go, for every n that leaves a multiple of the granule.
    freed: Vec<usize>,
}

impl Units {
    fn heads(layer: &Layer, head_dim: usize, scores: &[f64]) -> Self {
        let d = layer.o.weight.rows;
        let groups: Vec<usize> = layer
            .group_sizes
            .iter()
            .enumerate()
            .flat_map(|(group, size)| std::iter::repeat_n(group, *size))
            .collect();
        let mut left = layer.group_sizes.clone();
        Self::new(scores, granule(&layer.o.weight, head_dim), |head| {
            let group = groups[head];
            left[group] -= 1;
            let matrices = if left[group] == 0 { 4 } else { 2 };
            matrices * head_dim * d
        })
    }

    fn channels(layer: &Layer, scores: &[f64]) -> Self {
        let d = layer.down.weight.rows;
        Self::new(scores, granule(&layer.down.weight, 1), |_| 3 * d)
    }

    /// `cost` gives the parameters that a unit frees, asked for in the order in which units go.
    fn new(scores: &[f64], granule: usize, mut cost: impl FnMut(usize) -> usize) -> Self {
        let mut by_score: Vec<usize> = (0..scores.len()).collect();
        by_score.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let mut freed = vec![0];
        for unit in &by_score {
            freed.push(freed[freed.len() - 1] + cost(*unit));
        }
        Self {
            scores: scores.to_vec(),
            by_score,
            granule,
            freed,
        }
    }

    /// How many go if the threshold takes `gone`: rounded to the granule, to the nearest, ties to fewer.
    fn rounded(&self, gone: usize) -> usize {
        let units = self.by_score.len();
        let kept = units - gone;
        units - ((kept + self.granule / 2) / self.granule * self.granule).min(units)
    }

    fn freed(&self, gone: usize) -> usize {
        self.freed[self.rounded(gone)]
    }

    fn kept(&self, gone: usize) -> Vec<usize> {
        let mut kept = self.by_score[self.rounded(gone)..].to_vec();
        kept.sort_unstable();
        kept
    }
}

/// The least number of units of `features` columns each that fill whole blocks of `weight`.
fn granule(weight: &Weight, features: usize) -> usize {
    let block = weight.block_type.block_len();
    block / gcd(block, features)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
