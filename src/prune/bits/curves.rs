//! What smaller types cost, as data.

use super::levels::Level;
use super::plan::TypePlan;
use crate::model::{MatrixId, Model, ModuleId};

/// What changes its type as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// All projections of a module.
    Module(ModuleId),
    /// A matrix of the vocabulary: the output head, or an embedding.
    Vocabulary(MatrixId),
}

impl Place {
    /// All places of a model: modules by their index, then the head, then the embedding if it is not the head.
    pub fn all(model: &Model) -> Vec<Self> {
        let modules = ModuleId::each(ModuleId::all(model.layers.len())).map(Self::Module);
        let head = model.head_id();
        let vocabulary = [head, MatrixId::Embedding];
        let many = 1 + usize::from(head != MatrixId::Embedding);
        let vocabulary = vocabulary.into_iter().take(many).map(Self::Vocabulary);
        modules.chain(vocabulary).collect()
    }

    /// Its matrices.
    pub fn matrices(self) -> Vec<MatrixId> {
        match self {
            Place::Vocabulary(id) => vec![id],
            Place::Module(module) => {
                let layer = module.layer();
                let projections = match module.index() % 2 {
                    0 => 0..4,
                    _ => 4..7,
                };
                projections
                    .map(|projection| MatrixId::Projection { layer, projection })
                    .collect()
            }
        }
    }

    /// Bytes that it has less at a level.
    pub(super) fn saved(self, model: &Model, level: Level) -> usize {
        let matrices = self.matrices().into_iter();
        matrices
            .map(|id| {
                let weight = model.matrix(id);
                let bytes = |t: crate::quant::BlockType| weight.rows * t.row_bytes(weight.cols);
                let new = level.type_for(weight.block_type, weight.cols);
                bytes(weight.block_type) - bytes(new)
            })
            .sum()
    }
}

/// A place at a level, and all others as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TypePoint {
    pub level: Level,
    /// Bytes that it saves.
    pub saved: usize,
    /// The mean divergence from the model's own predictions, in nats per token.
    pub loss: f64,
}

/// How much the inputs of a model's matrices matter: their mean squares.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Importance {
    /// Of each layer those of q, k and v; of o; of gate and up; of down.
    pub layers: Vec<[Vec<f32>; 4]>,
    /// Those of the output head.
    pub head: Vec<f32>,
}

/// What smaller types cost in each place of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct TypeCurves {
    pub places: Vec<Place>,
    /// Of each place the levels by rising savings.
    pub points: Vec<Vec<TypePoint>>,
    pub importance: Importance,
    /// Tokens that losses were measured on.
    pub tokens: usize,
}

/// A step of a place from one level to a smaller one, on the convex curve below its points.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// Loss per byte.
    price: f64,
    /// The point that it ends at.
    point: usize,
}

impl TypeCurves {
    /// The steps that cost at most `price`, in nats per byte, of every place whose steps are allowed.
    pub fn plan(&self, price: f64) -> TypePlan {
        let levels = self.points.iter().map(|points| {
            let steps = steps(points);
            let last = steps.iter().take_while(|step| step.price <= price).last();
            last.map(|step| points[step.point].level)
        });
        TypePlan::new(self.places.clone(), levels.collect())
    }

    /// A plan of the head alone: the smallest level that costs at most so many nats per token.
    pub fn head_within(&self, loss: f64) -> TypePlan {
        let head = self.places.len() - self.vocabulary();
        let levels = (0..self.places.len()).map(|i| {
            let within = self.points[i].iter().rev().find(|point| point.loss <= loss);
            within.filter(|_| i == head).map(|point| point.level)
        });
        TypePlan::new(self.places.clone(), levels.collect())
    }

    /// What a plan should cost, in nats per token, if losses add up.
    pub fn loss(&self, plan: &TypePlan) -> f64 {
        let points = self.points.iter().zip(plan.levels());
        points
            .filter_map(|(points, level)| {
                let level = (*level)?;
                points.iter().find(|point| point.level == level)
            })
            .map(|point| point.loss)
            .sum()
    }

    /// The steps that a plan takes, from the dearest on: each as the function that takes it back in a plan, if it is the last one of its
    /// place there.
    pub(super) fn steps_back(
        &self,
        plan: &TypePlan,
    ) -> Vec<impl Fn(&TypePlan) -> Option<TypePlan> + use<>> {
        let mut taken: Vec<(f64, usize, Level, Option<Level>)> = Vec::new();
        for (i, points) in self.points.iter().enumerate() {
            if plan.levels()[i].is_none() {
                continue;
            }
            let mut before = None;
            for step in steps(points) {
                let level = points[step.point].level;
                taken.push((step.price, i, level, before));
                if plan.levels()[i] == Some(level) {
                    break;
                }
                before = Some(level);
            }
        }
        taken.sort_by(|a, b| b.0.total_cmp(&a.0));
        taken
            .into_iter()
            .map(|(_, place, level, before)| {
                move |plan: &TypePlan| {
                    (plan.levels()[place] == Some(level)).then(|| plan.with_level(place, before))
                }
            })
            .collect()
    }

    /// The lowest and the highest price of a step; `None` where there are none.
    pub fn prices(&self) -> Option<(f64, f64)> {
        let all = self.points.iter().flat_map(|points| steps(points));
        all.map(|step| step.price).fold(None, |range, price| {
            let (low, high) = range.unwrap_or((price, price));
            Some((price.min(low), price.max(high)))
        })
    }

    fn vocabulary(&self) -> usize {
        let is_one = |place: &&Place| matches!(place, Place::Vocabulary(_));
        self.places.iter().filter(is_one).count()
    }
}

/// The convex curve below some points, from (0, 0) on, by rising price.
fn steps(points: &[TypePoint]) -> Vec<Step> {
    let mut hull: Vec<(f64, f64, usize)> = Vec::new();
    let slope = |a: (f64, f64), b: (f64, f64)| (b.1 - a.1) / (b.0 - a.0);
    for (i, point) in points.iter().enumerate() {
        let new = (point.saved as f64, point.loss.max(0.0));
        while let Some(&(saved, loss, _)) = hull.last() {
            let before = match hull.len() {
                1 => (0.0, 0.0),
                n => (hull[n - 2].0, hull[n - 2].1),
            };
            if slope(before, (saved, loss)) < slope(before, new) {
                break;
            }
            hull.pop();
        }
        hull.push((new.0, new.1, i));
    }
    let mut before = (0.0, 0.0);
    hull.iter()
        .map(|&(saved, loss, point)| {
            let price = slope(before, (saved, loss)).max(0.0);
            before = (saved, loss);
            Step { price, point }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(level: usize, saved: usize, loss: f64) -> TypePoint {
        TypePoint {
            level: Level::ALL[level],
            saved,
            loss,
        }
    }

    #[test]
    fn levels_above_the_convex_curve_are_passed_over() {
        let points = [
            point(0, 100, 0.01),
            point(1, 200, 0.5),
            point(2, 300, 0.21),
            point(3, 400, 1.0),
        ];
        let steps = steps(&points);
        let places: Vec<usize> = steps.iter().map(|step| step.point).collect();
        assert_eq!(places, [0, 2, 3]);
        assert!(steps.windows(2).all(|w| w[0].price < w[1].price));
    }

    #[test]
    fn a_plan_takes_the_steps_below_its_price() {
        let curves = TypeCurves {
            places: vec![
                Place::Module(ModuleId::attention(0)),
                Place::Vocabulary(MatrixId::Embedding),
            ],
            points: vec![
                vec![point(0, 100, 1.0), point(1, 200, 5.0)],
                vec![point(0, 1000, 1.0), point(1, 1500, 11.0)],
            ],
            importance: Importance::default(),
            tokens: 0,
        };
        let levels = |price: f64| curves.plan(price).levels().to_vec();
        assert_eq!(levels(0.0005), [None, None]);
        assert_eq!(levels(0.001), [None, Some(Level::ALL[0])]);
        assert_eq!(
            levels(0.02),
            [Some(Level::ALL[0]), Some(Level::ALL[1])],
            "the head goes on at 0.02"
        );
        let all = curves.plan(1.0);
        assert!((curves.loss(&all) - 16.0).abs() < 1e-9);
        assert_eq!(
            curves.head_within(2.0).levels(),
            [None, Some(Level::ALL[0])]
        );
    }
}
