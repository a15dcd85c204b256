//! Tokens weighed as a norm weighs them.
//!
//! Where a norm follows the projection that loses columns, what reaches the residual stream of its output y is y / rms(y). The same
//! error then counts the more the smaller a token's output is, and it is the inputs times 1 / rms(y) whose moments say what removing
//! columns costs, and what makes up for it best. Gemma 3 answers the first token with a hundredth of what it answers others with.

use crate::kernels::{Activations, Product, Team, matmul};
use crate::model::{Model, ModuleId};
use crate::prune::features::output_projection;

/// Buffers for weighing the inputs of many projections.
#[derive(Debug, Default)]
pub struct Weighing {
    input: Activations,
    /// The projection's outputs, `[n, d]`.
    output: Vec<f32>,
}

impl Weighing {
    /// The inputs `[n, in]` of the projection of a module that loses columns, each token's times what the norm behind it multiplies its
    /// output by. Those inputs themselves where no norm follows.
    pub fn weigh<'a>(
        &'a mut self,
        team: &Team,
        model: &Model,
        module: ModuleId,
        x: &'a Activations,
    ) -> &'a Activations {
        let Some(scales) = self.scales(team, model, module, x) else {
            return x;
        };
        let cols = x.cols();
        let weighed = self.input.begin(x.tokens(), cols);
        team.chunks_mut(weighed, cols.max(1), |t, row| {
            for (to, from) in row.iter_mut().zip(&x.values()[t * cols..]) {
                *to = from * scales[t];
            }
        });
        &self.input
    }

    /// What the norm behind a module's projection multiplies the outputs to these inputs by, `[n]`; `None` where no norm follows.
    pub fn scales(
        &mut self,
        team: &Team,
        model: &Model,
        module: ModuleId,
        x: &Activations,
    ) -> Option<Vec<f32>> {
        model.post_norm(module)?;
        let projection = output_projection(model, module);
        let d = projection.weight.rows;
        self.input
            .begin(x.tokens(), x.cols())
            .copy_from_slice(x.values());
        self.output.resize(x.tokens().count * d, 0.0);
        let weights = projection.weight.view(&model.map);
        let out = &mut self.output[..];
        matmul(team, &mut self.input, &mut [Product { weights, out }]);
        let bias = projection.bias.as_deref();
        let scale = |output: &[f32]| {
            let value = |i: usize| output[i] + bias.map_or(0.0, |bias| bias[i]);
            let squares: f32 = (0..d).map(|i| value(i) * value(i)).sum();
            1.0 / (squares / d as f32 + model.config.rms_epsilon).sqrt()
        };
        Some(self.output.chunks_exact(d).map(scale).collect())
    }
}
