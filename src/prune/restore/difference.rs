//! A projection that was pruned and restored, beside the dense one, without changing the model.

use super::restoration::Restoration;
use crate::kernels::{Activations, MatrixView, Product, Team, matmul};
use crate::model::{Model, Weight};
use crate::quant::{BlockType, Layout};

/// A pruned and restored projection as its difference to the dense one.
pub struct Difference {
    /// The weights of the pruned projection less those of the dense one, `[out, in]`.
    weights: Vec<f32>,
    /// What pruning adds to the bias, `[out]`.
    bias: Vec<f32>,
}

impl Difference {
    /// The difference that restoration makes where the inputs `kept` stay, by ascending number.
    pub fn new(model: &Model, weight: &Weight, kept: &[usize], restored: &Restoration) -> Self {
        let mut weights = weight.decode(&model.map);
        for (i, row) in weights.chunks_exact_mut(weight.cols).enumerate() {
            let mut next = 0;
            for (j, w) in row.iter_mut().enumerate() {
                let stays = kept.get(next) == Some(&j);
                *w = match &restored.weights {
                    _ if !stays => -*w,
                    Some(weights) => weights[i * kept.len() + next] - *w,
                    None => 0.0,
                };
                next += usize::from(stays);
            }
        }
        let mut bias = restored.bias.clone();
        bias.resize(weight.rows, 0.0);
        Self { weights, bias }
    }

    /// Puts the residual stream `[n, out]` behind the pruned projection into `out`, given the one behind the dense projection of the
    /// same input `[n, in]`.
    pub fn apply(
        &self,
        team: &Team,
        input: &mut Activations,
        residual: &[f32],
        out: &mut Vec<f32>,
    ) {
        let kernels = team.kernels();
        let d = self.bias.len();
        out.resize(residual.len(), 0.0);
        let weights = MatrixView::new(
            BlockType::F32,
            Layout::Native,
            d,
            input.cols(),
            bytemuck::cast_slice(&self.weights),
        );
        let mut product = [Product {
            weights,
            out: &mut out[..],
        }];
        matmul(team, input, &mut product);
        team.chunks_mut(out, d, |i, row| {
            kernels.add(row, &self.bias);
            kernels.add(row, &residual[i * d..][..d]);
        });
    }
}
