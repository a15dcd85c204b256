//! Metrics: how much every query head and MLP channel matters.

use std::sync::Mutex;

use super::{FeatureStats, Profile, PruneError};
use crate::kernels::Runtime;
use crate::model::{Model, Weight};

/// Scores of one layer's units, standardised within each module, so that they can be compared across layers and modules.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerScores {
    /// One per query head: the mean over the head's standardised features.
    pub heads: Vec<f64>,
    /// One per channel.
    pub channels: Vec<f64>,
}

/// WIFV, weighted input feature variance: v_j · Σ_i W_ij², with v_j the sample variance of feature j of the input of the
/// projection W (FLAP, section 3.2), standardised within each layer and module (section 3.3).
///
/// # Errors
/// If the profile has other widths than the model.
pub fn wifv_scores(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
) -> Result<Vec<LayerScores>, PruneError> {
    check_shape(model, profile)?;
    let scores: Vec<Mutex<Option<LayerScores>>> =
        model.layers.iter().map(|_| Mutex::new(None)).collect();
    runtime.pool.region(|team| {
        team.items(model.layers.len(), |_, l| {
            let (layer, stats) = (&model.layers[l], &profile.layers[l]);
            let attention = standardise(wifv(model, &layer.o.weight, &stats.attention));
            let heads = attention
                .chunks_exact(model.config.head_dim)
                .map(|head| head.iter().sum::<f64>() / head.len() as f64)
                .collect();
            let channels = standardise(wifv(model, &layer.down.weight, &stats.mlp));
            if let Ok(mut slot) = scores[l].lock() {
                *slot = Some(LayerScores { heads, channels });
            }
        });
    });
    Ok(scores
        .into_iter()
        .map(|slot| {
            slot.into_inner()
                .ok()
                .flatten()
                .expect("every layer was scored")
        })
        .collect())
}

fn check_shape(model: &Model, profile: &Profile) -> Result<(), PruneError> {
    if profile.layers.len() != model.layers.len() {
        return Err(PruneError::OtherShape(format!(
            "it has {} layers, the model {}",
            profile.layers.len(),
            model.layers.len()
        )));
    }
    for (l, (stats, layer)) in profile.layers.iter().zip(&model.layers).enumerate() {
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

fn wifv(model: &Model, weight: &Weight, stats: &FeatureStats) -> Vec<f64> {
    let mut scores = column_squares(model, weight);
    for (j, score) in scores.iter_mut().enumerate() {
        *score *= stats.variance(j);
    }
    scores
}

/// Σ_i W_ij² for every column j.
fn column_squares(model: &Model, weight: &Weight) -> Vec<f64> {
    let mut sums = vec![0.0f64; weight.cols];
    let mut row = vec![0.0f32; weight.cols];
    for i in 0..weight.rows {
        weight.decode_row(&model.map, i, &mut row);
        for (sum, w) in sums.iter_mut().zip(&row) {
            *sum += f64::from(*w) * f64::from(*w);
        }
    }
    sums
}

/// (x − mean) / std, with the sample standard deviation; all 0 where it is 0.
fn standardise(mut x: Vec<f64>) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    let std = variance.sqrt();
    for v in &mut x {
        *v = if std > 0.0 { (*v - mean) / std } else { 0.0 };
    }
    x
}
