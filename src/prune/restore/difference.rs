//! A projection that was pruned and restored, beside the dense one, without changing the model.

use super::restoration::Restoration;
use crate::kernels::{Activations, MatrixView, Product, Team, matmul};
use crate::model::{Model, ModuleId, add_normalised};
use crate::prune::features::output_projection;
use crate::quant::{BlockType, Layout};

/// The projection of a module that loses columns, pruned and restored, as its difference to the dense one. Where a norm follows the
/// projection, as the whole: that norm is of the sum.
pub struct Difference {
    /// The weights of the pruned projection less those of the dense one, `[out, in]`.
    weights: Vec<f32>,
    /// What pruning adds to the bias, `[out]`.
    bias: Vec<f32>,
    /// The norm behind the projection, and its epsilon; weights and bias are then those of the pruned projection, and not a difference.
    post_norm: Option<(Vec<f32>, f32)>,
}

/// The residual stream `[n, d]` around a module.
#[derive(Debug, Clone, Copy)]
pub struct Around<'a> {
    /// Before it; of no use, and may be empty, where no norm follows the projection.
    pub before: &'a [f32],
    /// Behind it, as the dense projection leaves it.
    pub behind: &'a [f32],
}

impl Difference {
    /// The difference that restoration makes where the inputs `kept` stay, by ascending number.
    pub fn new(model: &Model, module: ModuleId, kept: &[usize], restored: &Restoration) -> Self {
        let projection = output_projection(model, module);
        let weight = &projection.weight;
        let post_norm = model.post_norm(module);
        let mut weights = weight.decode(&model.map);
        for (i, row) in weights.chunks_exact_mut(weight.cols).enumerate() {
            let mut next = 0;
            for (j, w) in row.iter_mut().enumerate() {
                let stays = kept.get(next) == Some(&j);
                *w = match &restored.weights {
                    _ if !stays => -*w,
                    Some(weights) => weights[i * kept.len() + next] - *w,
                    None => 0.0,
                } + post_norm.map_or(0.0, |_| *w);
                next += usize::from(stays);
            }
        }
        let mut bias = restored.bias.clone();
        bias.resize(weight.rows, 0.0);
        if let (Some(_), Some(dense)) = (post_norm, &projection.bias) {
            bias.iter_mut()
                .zip(dense)
                .for_each(|(b, dense)| *b += dense);
        }
        let epsilon = model.config.rms_epsilon;
        Self {
            weights,
            bias,
            post_norm: post_norm.map(|norm| (norm.to_vec(), epsilon)),
        }
    }

    /// Puts the residual stream `[n, d]` behind the pruned module into `out`, given the one around it and the projection's input
    /// `[n, in]`.
    pub fn apply(&self, team: &Team, input: &mut Activations, around: Around, out: &mut Vec<f32>) {
        let kernels = team.kernels();
        let d = self.bias.len();
        out.resize(around.behind.len(), 0.0);
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
        let Some((norm, epsilon)) = &self.post_norm else {
            team.chunks_mut(out, d, |i, row| {
                kernels.add(row, &self.bias);
                kernels.add(row, &around.behind[i * d..][..d]);
            });
            return;
        };
        team.chunks_mut(out, d, |_, row| kernels.add(row, &self.bias));
        let mut output = std::mem::replace(out, around.before.to_vec());
        add_normalised(team, norm, *epsilon, &mut output, out);
    }
}
