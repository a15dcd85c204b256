//! Making a model sparse layer by layer: each layer is scored by what it sees behind the layers that are sparse already, as the authors'
//! programs do it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::choice::{Pattern, SparseForm, SparseMethod};
use super::projection::{LayerProjection, Projection};
use super::score::{self, NotANumber, Rows};
use super::stream::{LayerInputs, Stream};
use super::surgeon::{self, Surgery};
use super::zeros::Zeros;
use crate::kernels::Runtime;
use crate::model::{Model, Weight};
use crate::progress::Progress;
use crate::prune::apply::{Tally, tallied};
use crate::prune::collect::{Calibration, Covariance, FeatureStats};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::inverse::InverseFactor;
use crate::quant::{BlockType, KeepMask};

/// What is to be removed, and by what.
#[derive(Debug, Clone, Copy)]
pub struct Removal<'a> {
    pub method: SparseMethod,
    pub form: SparseForm,
    /// At the index of each module what of its weights stays.
    pub patterns: &'a [Pattern],
    /// The text, which [`SparseMethod::Magnitude`] does without.
    pub text: Option<Calibration<'a>>,
}

/// What became of a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SparseLayer {
    /// Weights of its seven projections, and how many of them are 0 now because they were removed.
    pub weights: usize,
    pub removed: usize,
    /// Projections that have changed their type, because theirs has no place for what is removed.
    pub types: Vec<TypeChange>,
}

/// So many projections have changed from one type to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TypeChange {
    pub from: &'static str,
    pub to: &'static str,
    pub projections: usize,
}

/// About as many bytes as this takes beside the weights: the streams of the text and what a layer is worked on with.
pub fn bytes(model: &Model, method: SparseMethod, tokens: usize) -> u64 {
    let d = model.config.embedding_length as u64;
    let layers = model.layers.iter();
    let c = layers
        .map(|layer| layer.o.weight.cols.max(layer.channels()) as u64)
        .max()
        .unwrap_or(0)
        .max(d);
    match method {
        SparseMethod::Magnitude => 8 * c * d,
        SparseMethod::Wanda => tokens as u64 * 4 * d,
        // The second moments of a layer, what they are factored in, and a matrix twice.
        SparseMethod::SparseGpt => {
            tokens as u64 * 4 * d + 4 * (c * c + 3 * d * d) + 24 * c * c + 12 * c * d
        }
    }
}

/// Removes single weights of all projections of all layers, in place; weights that go become exactly 0. Those that stay keep
/// their codes to the bit, except by [`SparseMethod::SparseGpt`], and where a projection is not made sparse and its type has no code
/// for 0: it becomes Q8_0.
///
/// `progress` counts layers. It is called before the first of them too, where a break leaves the model as it was, and also in between,
/// with the same numbers.
///
/// # Errors
/// If the text is missing, too short, or drives activations out of range; if groups do not fill rows, weights are not numbers, there is
/// no memory, or `progress` breaks. The error says which layers are pruned by then.
///
/// # Panics
/// If there is not a pattern for every module.
pub fn sparsify(
    model: &mut Model,
    runtime: &Runtime,
    removal: Removal,
    progress: &mut Progress,
) -> Result<Vec<SparseLayer>, PruneError> {
    let layers = model.layers.len();
    assert_eq!(
        removal.patterns.len(),
        2 * layers,
        "a pattern for each module"
    );
    for pattern in removal.patterns {
        pattern.check(model)?;
    }
    let mut done = Vec::with_capacity(layers);
    tallied(layers, progress, |tally| {
        let mut stream = match removal.method.reads_text() {
            true => {
                let text = removal.text.ok_or(PruneErrorKind::NoText)?;
                let covariance = removal.method == SparseMethod::SparseGpt;
                let text = Calibration { covariance, ..text };
                Some(Stream::new(model, runtime, text)?)
            }
            false => None,
        };
        let mut zeros = Zeros::new(model, removal.form)?;
        for l in 0..layers {
            let inputs = stream
                .as_mut()
                .map(|s| s.observe(model, runtime, l, false, &mut || tally.report()))
                .transpose()?;
            let work = Work {
                removal: &removal,
                zeros: &mut zeros,
                tally: &mut *tally,
            };
            done.push(work.layer(model, runtime, l, inputs)?);
            if let Some(stream) = stream.as_mut().filter(|_| l + 1 < layers) {
                stream.pass(model, runtime, l, &mut || tally.report())?;
            }
            tally.report()?;
        }
        Ok(())
    })?;
    Ok(done)
}

/// A removal that is being carried out.
struct Work<'a, 'p> {
    removal: &'a Removal<'a>,
    zeros: &'a mut Zeros,
    tally: &'a mut Tally<'p>,
}

impl Work<'_, '_> {
    /// Prunes one layer by what it sees.
    fn layer(
        self,
        model: &mut Model,
        runtime: &Runtime,
        l: usize,
        inputs: Option<LayerInputs>,
    ) -> Result<SparseLayer, PruneError> {
        let mut removed = 0;
        let mut types = Vec::with_capacity(Projection::ALL.len());
        // Projections that read the same have the same factor.
        let mut factor: Option<(Projection, InverseFactor)> = None;
        for which in LayerProjection::all(l) {
            let weight = which.weight(model);
            let (was, rows, cols) = (weight.block_type, weight.rows, weight.cols);
            if rows * cols == 0 {
                continue;
            }
            let pattern = self.removal.patterns[which.module().index()];
            let damaged = || PruneError::from(PruneErrorKind::damaged_weights(which.module()));
            let stats = inputs.as_ref().map(|inputs| inputs.of(which.projection));
            let mask = match (self.removal.method, stats) {
                (SparseMethod::SparseGpt, Some(stats)) => {
                    let same = factor.take().filter(|(first, _)| {
                        let of = |inputs: &LayerInputs| std::ptr::eq(inputs.of(*first), stats);
                        inputs.as_ref().is_some_and(of)
                    });
                    let (_, factor) = factor.insert(match same {
                        Some(same) => same,
                        None => (which.projection, factor_of(stats, which)?),
                    });
                    let values = weight.decode(&model.map);
                    let surgery = surgeon::prune(runtime, factor, &values, rows, pattern);
                    let Surgery { mask, weights } = surgery.ok_or_else(damaged)?;
                    let importance: Vec<f32> =
                        (0..cols).map(|j| stats.mean_square(j) as f32).collect();
                    self.tally.touch(l);
                    self.zeros
                        .put(model, runtime, which, &mask, &weights, &importance)?;
                    mask
                }
                (SparseMethod::Wanda | SparseMethod::Magnitude, stats) => {
                    let mask = mask_of(model, runtime, which, stats, pattern);
                    let mask = mask.map_err(|_| damaged())?;
                    self.tally.touch(l);
                    self.zeros.take_out(model, runtime, which, &mask)?;
                    mask
                }
                (SparseMethod::SparseGpt, None) => return Err(PruneErrorKind::NoText.into()),
            };
            removed += mask.removed();
            types.push((was, which.weight(model).block_type));
        }
        Ok(SparseLayer {
            weights: model.layers[l].parameters(),
            removed,
            types: type_changes(types),
        })
    }
}

/// The changes among the types that projections had and have.
pub fn type_changes(types: impl IntoIterator<Item = (BlockType, BlockType)>) -> Vec<TypeChange> {
    let mut changes: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for (was, is) in types.into_iter().filter(|(was, is)| was != is) {
        *changes.entry((was.name(), is.name())).or_default() += 1;
    }
    let changes = changes.into_iter();
    changes
        .map(|((from, to), projections)| TypeChange {
            from,
            to,
            projections,
        })
        .collect()
}

/// The mask of a projection by Wanda, or by norms where there are no statistics.
///
/// # Errors
/// If a weight is not a number.
pub(super) fn mask_of(
    model: &Model,
    runtime: &Runtime,
    which: LayerProjection,
    stats: Option<&FeatureStats>,
    pattern: Pattern,
) -> Result<KeepMask, NotANumber> {
    let weights = &Stored {
        model,
        weight: which.weight(model),
    };
    let norms: Vec<f64> = match stats {
        Some(stats) => (0..stats.len())
            .map(|j| stats.mean_square(j).sqrt())
            .collect(),
        None => vec![1.0; weights.cols()],
    };
    score::by_row(runtime, weights, &norms, pattern)
}

/// The factor of the second moments that a projection sees.
fn factor_of(stats: &FeatureStats, which: LayerProjection) -> Result<InverseFactor, PruneError> {
    let covariance: &Covariance = stats
        .covariance
        .as_ref()
        .ok_or(PruneErrorKind::NoCovariance)?;
    let factor = InverseFactor::new(stats.len(), |i, j| covariance.second_moment(i, j));
    factor.ok_or_else(|| PruneErrorKind::not_finite(which.module()).into())
}

/// The rows of a weight as it is stored.
struct Stored<'a> {
    model: &'a Model,
    weight: &'a Weight,
}

impl Rows for Stored<'_> {
    fn rows(&self) -> usize {
        self.weight.rows
    }

    fn cols(&self) -> usize {
        self.weight.cols
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        self.weight.decode_row(&self.model.map, row, out);
    }
}
