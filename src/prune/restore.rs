//! Making up for what goes.

use std::sync::Mutex;

use super::{FeatureStats, Plan, Profile};
use crate::kernels::Runtime;
use crate::model::{Model, Weight};

/// What is added to the biases of one layer's two output projections, `[embedding_length]` each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerBiases {
    pub attention: Vec<f32>,
    pub mlp: Vec<f32>,
}

/// FLAP's bias compensation (section 3.4): what a removed feature contributes on average, Σ_{j removed} W_:j · mean_j, of
/// the model as it is before the plan is applied.
///
/// # Panics
/// If plan and profile were not made for this model.
pub fn biases(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
    plan: &Plan,
) -> Vec<LayerBiases> {
    let head_dim = model.config.head_dim;
    let slots: Vec<Mutex<LayerBiases>> = model.layers.iter().map(|_| Mutex::default()).collect();
    runtime.pool.region(|team| {
        team.items(model.layers.len(), |_, l| {
            let (layer, stats, kept) = (&model.layers[l], &profile.layers[l], &plan.layers[l]);
            let removed_heads = removed(layer.heads(), &kept.heads);
            let features: Vec<usize> = removed_heads
                .into_iter()
                .flat_map(|head| head * head_dim..(head + 1) * head_dim)
                .collect();
            let channels = removed(layer.channels(), &kept.channels);
            if let Ok(mut slot) = slots[l].lock() {
                slot.attention =
                    mean_contribution(model, &layer.o.weight, &stats.attention, &features);
                slot.mlp = mean_contribution(model, &layer.down.weight, &stats.mlp, &channels);
            }
        });
    });
    slots
        .into_iter()
        .map(|slot| slot.into_inner().unwrap_or_default())
        .collect()
}

/// The numbers below `count` that are not in `kept`, which is sorted.
fn removed(count: usize, kept: &[usize]) -> Vec<usize> {
    (0..count)
        .filter(|unit| kept.binary_search(unit).is_err())
        .collect()
}

/// Σ_j W_:j · mean_j over the given columns.
fn mean_contribution(
    model: &Model,
    weight: &Weight,
    stats: &FeatureStats,
    columns: &[usize],
) -> Vec<f32> {
    let mut row = vec![0.0f32; weight.cols];
    (0..weight.rows)
        .map(|i| {
            if columns.is_empty() {
                return 0.0;
            }
            weight.decode_row(&model.map, i, &mut row);
            let sum: f64 = columns
                .iter()
                .map(|&j| f64::from(row[j]) * stats.mean(j))
                .sum();
            sum as f32
        })
        .collect()
}
