//! Projections whose blocks have 256 values (K-quants, IQ1 to IQ3, IQ4_XS, TQ) and that lose columns: either as many columns stay as fill
//! whole blocks, or the tensor changes to a type with blocks of 32 values and of no lower quality, which takes more bytes a
//! value. Whichever errs less at equal bytes is taken, projection by projection.
//!
//! W `[out, in]` is the projection, v_j the variance and s_j the mean square of its input j. What keeping the inputs K in type
//! T errs, in the squared error of the projection's output, is
//!
//! E(K, T) = Σ_{j ∉ K} v_j ‖W_:j‖² + ε_T Σ_{j ∈ K} s_j ‖W_:j‖²,
//!
//! the first term being what the inputs that go fluctuated (their mean goes into the bias), the second what encoding anew
//! costs. ε_T is that error as a share, Σ s_j (W_ij − Ŵ_ij)² / Σ s_j W_ij², measured on some rows of the half of the columns
//! that matter most, put together as those that stay are and encoded by importance.
//!
//! A width in the substitute has bytes that no width in the source type has exactly: those of the module (gate, up and down, or
//! q and o) count. It is compared with the two multiples of 256 that have the next more and the next fewer bytes, interpolated.
//! What the module has as it is bounds both: since weights are compacted in place, a substitute must fit in the tensor's bytes.

use super::units::Units;
use crate::kernels::Runtime;
use crate::model::{Linear, Model, Module, ModuleId, Weight};
use crate::prune::collect::{FeatureStats, Profile};
use crate::prune::error::PruneError;
use crate::prune::features::output_weight;
use crate::quant::{BlockType, decode_row, encode_row_by_importance};

/// Rows of a projection that errors are measured on, or a few more.
const ROWS: usize = 64;

/// The types that a tensor may change to; empty for a type that it always keeps.
pub fn substitutes(source: BlockType) -> &'static [BlockType] {
    match source {
        BlockType::Q2_K
        | BlockType::Q3_K
        | BlockType::TQ1_0
        | BlockType::TQ2_0
        | BlockType::IQ1_S
        | BlockType::IQ1_M
        | BlockType::IQ2_XXS
        | BlockType::IQ2_XS
        | BlockType::IQ2_S
        | BlockType::IQ3_XXS
        | BlockType::IQ3_S => &[BlockType::Q4_0],
        BlockType::Q4_K | BlockType::IQ4_XS => &[BlockType::Q4_1, BlockType::Q5_0],
        BlockType::Q5_K => &[BlockType::Q5_1],
        BlockType::Q6_K => &[BlockType::Q8_0],
        _ => &[],
    }
}

/// What there is to choose from for one module's projection that loses columns.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The type that the projection has.
    source: BlockType,
    /// ε of the source type: the error of encoding anew, as a share.
    error: f64,
    /// Substitutes, each with its ε.
    substitutes: Vec<(BlockType, f64)>,
    /// What the removal of every input errs: v_j ‖W_:j‖².
    removed: Vec<f64>,
    /// What every input weighs where it is encoded anew: s_j ‖W_:j‖².
    kept: Vec<f64>,
    /// Inputs of the projection.
    columns: usize,
    /// Outputs of the projection.
    rows: usize,
    /// Bytes that an input takes in the rows of the module's other matrices.
    row_bytes: usize,
}

/// The choices of all modules, at the index of each; `None` for a module whose projection keeps its type.
///
/// # Errors
/// If the profile has other widths than the model.
pub fn choices(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
) -> Result<Vec<Option<Choice>>, PruneError> {
    profile.check_shape(model)?;
    let modules: Vec<ModuleId> = ModuleId::each(ModuleId::all(model.layers.len())).collect();
    let choice = |module: ModuleId| {
        let layer = &model.layers[module.layer()];
        let others: &[&Linear] = match module.kind() {
            Module::Attention => &[&layer.q],
            Module::Mlp => &[&layer.gate, &layer.up],
        };
        let row_bytes = others.iter().map(|linear| linear.weight.row_bytes()).sum();
        let stats = profile.layers[module.layer()].of(module.kind());
        Choice::new(model, output_weight(model, module), stats, row_bytes)
    };
    Ok(runtime.region(|team| team.map(modules.len(), |m| choice(modules[m]))))
}

impl Choice {
    fn new(model: &Model, weight: &Weight, stats: &FeatureStats, row_bytes: usize) -> Option<Self> {
        let substitutes = substitutes(weight.block_type);
        let (c, block) = (weight.cols, weight.block_type.block_len());
        if substitutes.is_empty() || c == 0 {
            return None;
        }
        let stride = (weight.rows / ROWS).max(1);
        let rows: Vec<Vec<f32>> = (0..weight.rows)
            .step_by(stride)
            .map(|i| {
                let mut row = vec![0.0; c];
                weight.decode_row(&model.map, i, &mut row);
                row
            })
            .collect();
        let mut squares = vec![0.0; c];
        for row in &rows {
            for (square, w) in squares.iter_mut().zip(row) {
                *square += f64::from(w * w);
            }
        }
        let times = |of: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..c).map(|j| of(j) * squares[j]).collect()
        };
        let removed = times(&|j| stats.variance(j));
        let kept = times(&|j| stats.mean_square(j));

        let mut sample: Vec<usize> = (0..c).collect();
        sample.sort_by(|a, b| removed[*b].total_cmp(&removed[*a]));
        sample.truncate((c / 2).next_multiple_of(block).min(c));
        sample.sort_unstable();
        let error_in = |block_type| encoding_error(block_type, &rows, &sample, stats);
        let error = error_in(weight.block_type);
        let substitutes = substitutes.iter().map(|t| (*t, error_in(*t)));
        Some(Self {
            source: weight.block_type,
            error,
            // Only those of no lower quality, here and not only in general.
            substitutes: substitutes.filter(|(_, e)| *e <= error).collect(),
            removed,
            kept,
            columns: c,
            rows: weight.rows,
            row_bytes,
        })
    }

    /// Whether so many columns can stay at all: in whole blocks of the source type, or in those of a substitute in its place.
    pub(super) fn can_keep(&self, columns: usize) -> bool {
        let (t, substitutes) = (self.source, &self.substitutes);
        t.checked_row_bytes(columns).is_some()
            || substitutes.iter().any(|(s, _)| self.fits(*s, columns))
    }

    /// Whether so many columns can stay in the blocks of a substitute, in the bytes that the tensor has.
    pub(super) fn fits(&self, substitute: BlockType, columns: usize) -> bool {
        let bytes = substitute.checked_row_bytes(columns);
        bytes.is_some_and(|bytes| bytes <= self.source.row_bytes(self.columns))
    }

    /// Whether so many columns fill whole blocks of the source type.
    pub(super) fn is_whole(&self, columns: usize) -> bool {
        columns.is_multiple_of(self.source.block_len())
    }

    /// The best type for what stays of the module when the lowest `gone` units go; `None` where the source type with a
    /// multiple of its blocks is better. `width` is the number of inputs that a head or channel has.
    pub(super) fn best(&self, units: &Units, gone: usize, width: usize) -> Option<BlockType> {
        let states = self.states(units, width);
        let whole: Vec<(f64, f64)> = states
            .iter()
            .filter(|s| self.is_whole(s.columns))
            .map(|s| {
                // Nothing is encoded anew where nothing goes.
                let encoding = if s.columns == self.columns {
                    0.0
                } else {
                    self.error
                };
                let bytes = self.bytes(self.source, s.columns);
                (bytes, s.removed + encoding * s.kept)
            })
            .collect();
        let at = &states[gone];
        self.substitutes
            .iter()
            .filter(|(t, _)| self.fits(*t, at.columns))
            .map(|(t, error)| {
                let same_type = interpolated(&whole, self.bytes(*t, at.columns));
                (*t, same_type - (at.removed + error * at.kept))
            })
            .filter(|(_, gain)| *gain > 0.0)
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(t, _)| t)
    }

    /// Bytes of the module when its projection keeps so many columns in a type.
    fn bytes(&self, block_type: BlockType, columns: usize) -> f64 {
        (self.rows * block_type.row_bytes(columns) + columns * self.row_bytes) as f64
    }

    /// At place n what is left when the lowest n units go.
    fn states(&self, units: &Units, width: usize) -> Vec<State> {
        let mut state = State {
            columns: self.columns,
            removed: 0.0,
            kept: self.kept.iter().sum(),
        };
        let mut states = vec![state];
        for unit in &units.by_score {
            for member in &units.members[*unit] {
                for j in member * width..(member + 1) * width {
                    state.columns -= 1;
                    state.removed += self.removed[j];
                    state.kept -= self.kept[j];
                }
            }
            states.push(state);
        }
        states
    }
}

/// A projection of which some units are gone.
#[derive(Debug, Clone, Copy)]
struct State {
    /// Inputs that stay.
    columns: usize,
    removed: f64,
    kept: f64,
}

/// The error at so many bytes, between points (bytes, error) by falling bytes; above the first point it is the first's.
fn interpolated(points: &[(f64, f64)], bytes: f64) -> f64 {
    let next = points.iter().position(|p| p.0 <= bytes);
    match next {
        Some(0) => points[0].1,
        Some(i) => {
            let ((b0, e0), (b1, e1)) = (points[i - 1], points[i]);
            e1 + (e0 - e1) * (bytes - b1) / (b0 - b1)
        }
        None => points.last().map_or(0.0, |p| p.1),
    }
}

/// What encoding in a type errs, as a share: Σ s_j (W_ij − Ŵ_ij)² / Σ s_j W_ij² of the columns `sample` of some rows.
fn encoding_error(
    block_type: BlockType,
    rows: &[Vec<f32>],
    sample: &[usize],
    stats: &FeatureStats,
) -> f64 {
    let importance: Vec<f32> = sample
        .iter()
        .map(|j| stats.mean_square(*j) as f32)
        .collect();
    let mut bytes = vec![0; block_type.row_bytes(sample.len())];
    let mut decoded = vec![0.0; sample.len()];
    let (mut error, mut all) = (0.0, 0.0);
    for row in rows {
        let values: Vec<f32> = sample.iter().map(|j| row[*j]).collect();
        encode_row_by_importance(block_type, &values, &importance, &mut bytes);
        decode_row(block_type, &bytes, &mut decoded);
        for ((w, is), s) in values.iter().zip(&decoded).zip(&importance) {
            let (w, s) = (f64::from(*w), f64::from(*s));
            error += s * (w - f64::from(*is)).powi(2);
            all += s * w * w;
        }
    }
    if all > 0.0 { error / all } else { 0.0 }
}
