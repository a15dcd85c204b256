//! Measuring what smaller types cost, place by place.

use super::curves::{Importance, Place, TypeCurves, TypePoint};
use super::levels::Level;
use crate::kernels::Runtime;
use crate::model::{MatrixId, Model, ModuleId, NewType};
use crate::progress::{self, Progress};
use crate::prune::collect::{Calibration, FeatureStats, embed_sequences};
use crate::prune::curves::{LEAST_TOKENS, SEQUENCE, Slice};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::sparse::Stream;

/// What smaller types cost in each place. The importance of inputs is taken from `statistics`; `held_back` is what divergences are
/// measured on.
///
/// `progress` counts places.
///
/// # Errors
/// If there are too few tokens or unknown ones, activations or losses are not numbers, there is no memory, or `progress` breaks. The
/// model is only read.
pub fn measure(
    model: &Model,
    runtime: &Runtime,
    statistics: Calibration,
    held_back: Calibration,
    levels: &[Level],
    progress: &mut Progress,
) -> Result<TypeCurves, PruneError> {
    let (tokens, least) = (held_back.tokens.len(), LEAST_TOKENS);
    if tokens < least {
        return Err(PruneErrorKind::TooShort { tokens, least }.into());
    }
    let places = Place::all(model);
    let total = places.len();
    let mut stream = Stream::new(model, runtime, statistics)?;
    let mut slice = Slice::new(model, runtime, held_back, SEQUENCE)?;
    slice.predict()?;
    let work = Work {
        model,
        runtime,
        levels,
    };
    let (mut points, mut inputs) = (Vec::with_capacity(total), Vec::new());
    for l in 0..model.layers.len() {
        let done = points.len();
        let seen = stream.observe(model, runtime, l, true, &mut || {
            progress::report(progress, done, total)
        })?;
        let squares = [&seen.attention, &seen.output, &seen.mlp, &seen.down].map(mean_squares);
        for module in [ModuleId::attention(l), ModuleId::mlp(l)] {
            points.push(work.module(&mut slice, module, &squares)?);
            slice.enter(module)?;
            progress::report(progress, points.len(), total)?;
        }
        inputs.push(squares);
    }
    let head = mean_squares(&stream.outputs(model, runtime));
    for place in &places[points.len()..] {
        let Place::Vocabulary(id) = *place else {
            unreachable!("modules come first");
        };
        points.push(work.vocabulary(&mut slice, held_back, id, &head)?);
        progress::report(progress, points.len(), total)?;
    }
    Ok(TypeCurves {
        places,
        points,
        importance: Importance {
            layers: inputs,
            head,
        },
        tokens,
    })
}

/// The importance of the inputs of all matrices on a text.
///
/// `progress` counts layers.
///
/// # Errors
/// If there are too few tokens or unknown ones, activations are not numbers, or `progress` breaks.
pub fn importance(
    model: &Model,
    runtime: &Runtime,
    text: Calibration,
    progress: &mut Progress,
) -> Result<Importance, PruneError> {
    let total = model.layers.len();
    let mut stream = Stream::new(model, runtime, text)?;
    let mut layers = Vec::with_capacity(total);
    for l in 0..total {
        let seen = stream.observe(model, runtime, l, true, &mut || {
            progress::report(progress, l, total)
        })?;
        layers.push([&seen.attention, &seen.output, &seen.mlp, &seen.down].map(mean_squares));
        progress::report(progress, l + 1, total)?;
    }
    let head = mean_squares(&stream.outputs(model, runtime));
    Ok(Importance { layers, head })
}

fn mean_squares(stats: &FeatureStats) -> Vec<f32> {
    (0..stats.len())
        .map(|j| stats.mean_square(j) as f32)
        .collect()
}

/// What is needed to try types out.
struct Work<'a> {
    model: &'a Model,
    runtime: &'a Runtime,
    levels: &'a [Level],
}

impl Work<'_> {
    /// The levels at which a place gets smaller, and by how much.
    fn levels(&self, place: Place) -> Vec<(Level, usize)> {
        let mut levels: Vec<(Level, usize)> = Vec::new();
        for level in self.levels {
            let saved = place.saved(self.model, *level);
            if saved > levels.last().map_or(0, |(_, saved)| *saved) {
                levels.push((*level, saved));
            }
        }
        levels
    }

    /// The points of a module, which the slice stands in front of.
    fn module(
        &self,
        slice: &mut Slice,
        module: ModuleId,
        squares: &[Vec<f32>; 4],
    ) -> Result<Vec<TypePoint>, PruneError> {
        let (model, runtime, l) = (self.model, self.runtime, module.layer());
        let place = Place::Module(module);
        let mut points = Vec::new();
        for (level, saved) in self.levels(place) {
            let mut new: [Option<NewType>; 7] = [None; 7];
            for id in place.matrices() {
                let MatrixId::Projection { projection, .. } = id else {
                    continue;
                };
                let weight = model.matrix(id);
                let block_type = level.type_for(weight.block_type, weight.cols);
                let importance = match projection {
                    0..3 => &squares[0],
                    3 => &squares[1],
                    4 | 5 => &squares[2],
                    _ => &squares[3],
                };
                new[projection] = (block_type != weight.block_type).then_some(NewType {
                    block_type,
                    importance,
                });
            }
            let alone = model.layer_in_types(runtime, l, new);
            let alone = alone.map_err(PruneErrorKind::Room)?;
            let streams = slice.through(&alone, module)?;
            let loss = slice.loss_of(module.next(), &streams)?;
            if !loss.is_finite() {
                return Err(PruneErrorKind::not_finite(module).into());
            }
            points.push(TypePoint { level, saved, loss });
        }
        Ok(points)
    }

    /// The points of a matrix of the vocabulary, which the slice stands behind all modules of.
    fn vocabulary(
        &self,
        slice: &mut Slice,
        text: Calibration,
        id: MatrixId,
        head: &[f32],
    ) -> Result<Vec<TypePoint>, PruneError> {
        let (model, runtime) = (self.model, self.runtime);
        let is_head = id == model.head_id();
        let mut points = Vec::new();
        for (level, saved) in self.levels(Place::Vocabulary(id)) {
            let weight = model.matrix(id);
            let new = NewType {
                block_type: level.type_for(weight.block_type, weight.cols),
                importance: if is_head { head } else { &[] },
            };
            let alone = model.vocabulary_in_type(runtime, id, new);
            let alone = alone.map_err(PruneErrorKind::Room)?;
            let last = ModuleId::all(model.layers.len()).end;
            let (from, streams) = match id {
                // It embeds the text, too.
                MatrixId::Embedding => {
                    let length = SEQUENCE.min(model.config.context_length);
                    let streams = embed_sequences(&alone, runtime, text.tokens, text.bos, length)?;
                    (ModuleId::attention(0), streams)
                }
                _ => (last, slice.residuals().map(<[f32]>::to_vec).collect()),
            };
            let made_by = if is_head { &alone } else { model };
            let loss = slice.loss_by(from, &streams, made_by)?;
            if !loss.is_finite() {
                let last = ModuleId::mlp(model.layers.len().saturating_sub(1));
                return Err(PruneErrorKind::not_finite(last).into());
            }
            points.push(TypePoint { level, saved, loss });
        }
        Ok(points)
    }
}
