//! The two projections of a layer that lose columns, MLP down and the attention output, and the numbers of their inputs.

use crate::model::{Linear, Model, Module, ModuleId, Weight};

/// The projection of a module that loses columns.
pub fn output_projection(model: &Model, module: ModuleId) -> &Linear {
    let layer = &model.layers[module.layer()];
    match module.kind() {
        Module::Attention => &layer.o,
        Module::Mlp => &layer.down,
    }
}

/// Its weight, `[out, in]`.
pub fn output_weight(model: &Model, module: ModuleId) -> &Weight {
    &output_projection(model, module).weight
}

/// How many inputs of that projection belong to each head or channel.
pub fn inputs_per_unit(model: &Model, kind: Module) -> usize {
    match kind {
        Module::Attention => model.config.head_dim,
        Module::Mlp => 1,
    }
}

/// The inputs of some units that have `width` inputs each.
pub fn features(units: &[usize], width: usize) -> Vec<usize> {
    units
        .iter()
        .flat_map(|unit| unit * width..(unit + 1) * width)
        .collect()
}

/// The numbers below `count` that are not in `kept`, which is sorted.
pub fn others(count: usize, kept: &[usize]) -> Vec<usize> {
    (0..count)
        .filter(|unit| kept.binary_search(unit).is_err())
        .collect()
}
