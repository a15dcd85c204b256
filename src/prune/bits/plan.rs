//! Which type every matrix takes, and giving it that.

use std::collections::BTreeMap;

use serde::Serialize;

use super::curves::{Importance, Place};
use super::levels::Level;
use crate::kernels::Runtime;
use crate::model::{MatrixId, Model, NewType};
use crate::progress::{self, Progress};
use crate::prune::choose::{LayerPlan, Plan};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::features::features;
use crate::quant::BlockType;

/// The level of every place; `None` where it keeps its types.
#[derive(Debug, Clone, PartialEq)]
pub struct TypePlan {
    places: Vec<Place>,
    levels: Vec<Option<Level>>,
}

/// What became of a model's types, for a report.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TypeChanges {
    /// The type of the head before and after; `None` where it kept its own.
    pub head: Option<(&'static str, &'static str)>,
    /// The same of an embedding that is not the head.
    pub embedding: Option<(&'static str, &'static str)>,
    /// How many projections went from one type to another.
    pub projections: Vec<(&'static str, &'static str, usize)>,
}

impl TypePlan {
    pub(super) fn new(places: Vec<Place>, levels: Vec<Option<Level>>) -> Self {
        Self { places, levels }
    }

    /// All keep their types.
    pub fn none(model: &Model) -> Self {
        let places = Place::all(model);
        let levels = vec![None; places.len()];
        Self { places, levels }
    }

    /// The head takes this level, and nothing else changes.
    pub fn of_head(model: &Model, level: Level) -> Self {
        let mut plan = Self::none(model);
        let head = Place::Vocabulary(model.head_id());
        let head = plan.places.iter().position(|place| *place == head);
        plan.levels[head.expect("a model has a head")] = Some(level);
        plan
    }

    /// The level of each place, in the order of [`Place::all`].
    pub fn levels(&self) -> &[Option<Level>] {
        &self.levels
    }

    /// The same but for one place, by its number.
    pub(super) fn with_level(&self, place: usize, level: Option<Level>) -> Self {
        let mut other = self.clone();
        other.levels[place] = level;
        other
    }

    /// Whether no place changes.
    pub fn is_empty(&self) -> bool {
        self.levels.iter().all(Option::is_none)
    }

    /// The other plan where it says something of a place, and this one elsewhere.
    pub fn over(&self, other: &Self) -> Self {
        let levels = self.levels.iter().zip(&other.levels);
        Self {
            places: self.places.clone(),
            levels: levels.map(|(a, b)| b.or(*a)).collect(),
        }
    }

    /// The type that a matrix takes which has a type and rows of so many columns by then.
    fn type_for(&self, id: MatrixId, own: BlockType, columns: usize) -> BlockType {
        let place = match id {
            MatrixId::Projection { layer, projection } => 2 * layer + usize::from(projection >= 4),
            vocabulary => {
                let place = Place::Vocabulary(vocabulary);
                let found = self.places.iter().position(|p| *p == place);
                found.expect("a place for every matrix")
            }
        };
        match self.levels[place] {
            Some(level) => level.type_for(own, columns),
            None => own,
        }
    }

    /// The type that a matrix of a model takes.
    ///
    /// # Panics
    /// If the plan was not made for this model.
    pub fn type_of(&self, model: &Model, id: MatrixId) -> BlockType {
        let weight = model.matrix(id);
        self.type_for(id, weight.block_type, weight.cols)
    }

    /// Bytes of all weights of a model once widths have gone by `plan`, and types after them by this.
    ///
    /// # Panics
    /// If one of them was not made for this model.
    pub fn bytes_after(&self, model: &Model, plan: &Plan) -> usize {
        let layers = plan.bytes_of(model, |layer, projection, own, rows, columns| {
            let id = MatrixId::Projection { layer, projection };
            rows * self.type_for(id, own, columns).row_bytes(columns)
        });
        layers + self.vocabulary_bytes(model)
    }

    /// Bytes of the embedding and the head.
    fn vocabulary_bytes(&self, model: &Model) -> usize {
        let matrices = self.places.iter().filter_map(|place| match place {
            Place::Vocabulary(id) => Some(*id),
            Place::Module(_) => None,
        });
        matrices
            .map(|id| {
                let weight = model.matrix(id);
                let new = self.type_for(id, weight.block_type, weight.cols);
                weight.rows * new.row_bytes(weight.cols)
            })
            .sum()
    }

    /// Bytes of the weights that a token does not read once types have changed: those of an embedding that is not the head.
    pub fn unread_bytes(&self, model: &Model) -> usize {
        match model.head_id() {
            MatrixId::Output => {
                let weight = &model.embedding;
                let new = self.type_for(MatrixId::Embedding, weight.block_type, weight.cols);
                weight.rows * new.row_bytes(weight.cols)
            }
            _ => 0,
        }
    }

    /// Encodes every matrix that takes another type, by the importance of its inputs. `kept` is what stays of each layer by now, of
    /// the widths that `importance` was measured at.
    ///
    /// `progress` counts places.
    ///
    /// # Errors
    /// If the system does not take memory back, or `progress` breaks; the error says which layers have changed.
    pub fn apply(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        importance: Option<&Importance>,
        kept: &[LayerPlan],
        progress: &mut Progress,
    ) -> Result<TypeChanges, PruneError> {
        let mut touched = Vec::new();
        let mut changes = TypeChanges::default();
        let mut projections: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let head = model.head_id();
        let head_dim = model.config.head_dim;
        for (i, place) in self.places.iter().enumerate() {
            let report = progress::report(progress, i, self.places.len());
            report.map_err(|cancelled| PruneError {
                touched: touched.clone(),
                kind: cancelled.into(),
            })?;
            for id in place.matrices() {
                let weight = model.matrix(id);
                let (own, columns) = (weight.block_type, weight.cols);
                let new = self.type_for(id, own, columns);
                if new == own || weight.parameters() == 0 {
                    continue;
                }
                let importance = match (importance, id) {
                    (Some(all), MatrixId::Projection { layer, projection }) => {
                        let kept = &kept[layer];
                        let of = |inputs: &[f32], kept: &[usize]| -> Vec<f32> {
                            kept.iter().map(|j| inputs[*j]).collect()
                        };
                        let inputs = &all.layers[layer];
                        match projection {
                            0..3 => inputs[0].clone(),
                            3 => of(&inputs[1], &features(&kept.heads, head_dim)),
                            4 | 5 => inputs[2].clone(),
                            _ => of(&inputs[3], &kept.channels),
                        }
                    }
                    (Some(all), id) if id == head => all.head.clone(),
                    _ => Vec::new(),
                };
                match id {
                    MatrixId::Projection { layer, .. } => {
                        if touched.last() != Some(&layer) {
                            touched.push(layer);
                        }
                        *projections.entry((own.name(), new.name())).or_default() += 1;
                    }
                    id if id == head => changes.head = Some((own.name(), new.name())),
                    _ => changes.embedding = Some((own.name(), new.name())),
                }
                let new = NewType {
                    block_type: new,
                    importance: &importance,
                };
                model.retype(runtime, id, new).map_err(|error| PruneError {
                    touched: touched.clone(),
                    kind: PruneErrorKind::Release(error),
                })?;
            }
        }
        let projections = projections.into_iter();
        changes.projections = projections.map(|((a, b), n)| (a, b, n)).collect();
        Ok(changes)
    }
}

/// Types that a model was given, and by what they were encoded: enough to do the same again.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptTypes {
    /// The types of the level of each place; empty where it keeps its own.
    pub levels: Vec<Vec<BlockType>>,
    /// `None` where all columns were taken to matter alike.
    pub importance: Option<Importance>,
}

impl KeptTypes {
    pub fn new(plan: &TypePlan, importance: Option<&Importance>) -> Self {
        let levels = plan.levels.iter();
        Self {
            levels: levels
                .map(|level| level.map_or(Vec::new(), |level| level.types().to_vec()))
                .collect(),
            importance: importance.cloned(),
        }
    }

    /// The plan; `None` if it cannot be this model's.
    pub fn plan(&self, model: &Model) -> Option<TypePlan> {
        let places = Place::all(model);
        let levels = self.levels.iter().map(|types| match &types[..] {
            [] => Some(None),
            types => Level::of_types(types).map(Some),
        });
        let levels: Vec<Option<Level>> = levels.collect::<Option<_>>()?;
        let fits = |all: &Importance| {
            let layers = all.layers.iter().zip(&model.layers);
            let d = model.config.embedding_length;
            all.layers.len() == model.layers.len()
                && all.head.len() == d
                && layers.into_iter().all(|(inputs, layer)| {
                    let lens = [d, layer.o.weight.cols, d, layer.channels()];
                    inputs.iter().map(Vec::len).eq(lens)
                })
        };
        (levels.len() == places.len() && self.importance.as_ref().is_none_or(fits))
            .then_some(TypePlan { places, levels })
    }
}
