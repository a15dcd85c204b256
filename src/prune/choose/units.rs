//! The heads or channels of a module as units that go or stay, in the order in which they go.

use super::metric::LayerScores;
use super::plan::{LayerPlan, Plan};
use crate::model::{Layer, Model, ModuleId, Weight};
use crate::prune::recipe::HeadUnit;
use crate::quant::BlockType;

/// The units of one module, and what their going frees.
#[derive(Debug, Clone)]
pub struct Units {
    /// The score of each unit; those with the lowest go first.
    pub scores: Vec<f64>,
    /// The heads or channels that each unit consists of.
    pub members: Vec<Vec<usize>>,
    /// The numbers of the units, by rising score.
    pub by_score: Vec<usize>,
    /// At place n the columns of the projection that stay when the lowest n units go.
    columns: Vec<usize>,
    /// At place n how many units go when n are asked for, so that what stays fills whole blocks.
    rounded: Vec<usize>,
    /// The projection's type.
    block_type: BlockType,
    /// The type that the projection changes to where what stays does not fill whole blocks of its own; `None` where it always
    /// does.
    substitute: Option<BlockType>,
    /// At place n the parameters that are freed when the lowest n units go.
    freed: Vec<usize>,
}

impl Units {
    /// The units of all modules, at the index of each module; a unit's score is the mean over its features of `scores`.
    pub fn of_model(model: &Model, scores: &[LayerScores], heads: HeadUnit) -> Vec<Units> {
        let head_dim = model.config.head_dim;
        model
            .layers
            .iter()
            .zip(scores)
            .flat_map(|(layer, scores)| {
                [
                    Units::heads(layer, head_dim, heads, &scores.attention),
                    Units::channels(layer, &scores.mlp),
                ]
            })
            .collect()
    }

    fn heads(layer: &Layer, head_dim: usize, unit: HeadUnit, features: &[f64]) -> Self {
        let d = layer.o.weight.rows;
        let groups: Vec<usize> = layer
            .group_sizes
            .iter()
            .enumerate()
            .flat_map(|(group, size)| std::iter::repeat_n(group, *size))
            .collect();
        let members: Vec<Vec<usize>> = match unit {
            HeadUnit::Query => (0..groups.len()).map(|head| vec![head]).collect(),
            HeadUnit::Group => (0..layer.kv_heads())
                .map(|g| (0..groups.len()).filter(|h| groups[*h] == g).collect())
                .collect(),
        };
        let scores = members
            .iter()
            .map(|heads| {
                let of_head = |h: &usize| &features[h * head_dim..(h + 1) * head_dim];
                let sum: f64 = heads.iter().flat_map(of_head).sum();
                sum / (heads.len() * head_dim).max(1) as f64
            })
            .collect();
        let mut left = layer.group_sizes.clone();
        Self::new(scores, members, head_dim, &layer.o.weight, |head| {
            let group = groups[head];
            left[group] -= 1;
            let matrices = if left[group] == 0 { 4 } else { 2 };
            matrices * head_dim * d
        })
    }

    fn channels(layer: &Layer, scores: &[f64]) -> Self {
        let d = layer.down.weight.rows;
        let members = (0..scores.len()).map(|c| vec![c]).collect();
        Self::new(scores.to_vec(), members, 1, &layer.down.weight, |_| 3 * d)
    }

    /// `cost` gives the parameters that a member frees, asked for in the order in which members go.
    fn new(
        scores: Vec<f64>,
        members: Vec<Vec<usize>>,
        features: usize,
        weight: &Weight,
        mut cost: impl FnMut(usize) -> usize,
    ) -> Self {
        let mut by_score: Vec<usize> = (0..scores.len()).collect();
        by_score.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let mut freed = vec![0];
        let mut columns = vec![weight.cols];
        for unit in &by_score {
            let freed_by_unit: usize = members[*unit].iter().map(|m| cost(*m)).sum();
            freed.push(freed[freed.len() - 1] + freed_by_unit);
            columns.push(columns[columns.len() - 1] - members[*unit].len() * features);
        }
        let block = weight.block_type.block_len();
        Self {
            rounded: nearest_whole(&columns, |n| n.is_multiple_of(block)),
            columns,
            block_type: weight.block_type,
            substitute: None,
            scores,
            members,
            by_score,
            freed,
        }
    }

    /// Lets the widths stay that `may_stay` accepts, in place of those of whole blocks; the others among them are encoded in
    /// `substitute`.
    pub fn allow(&mut self, may_stay: impl Fn(usize) -> bool, substitute: Option<BlockType>) {
        self.rounded = nearest_whole(&self.columns, may_stay);
        self.substitute = substitute;
    }

    /// How many units go if a threshold takes the lowest `gone`.
    pub fn rounded(&self, gone: usize) -> usize {
        self.rounded[gone]
    }

    /// The type that the projection changes to if a threshold takes the lowest `gone` units; `None` where it keeps its own.
    fn new_type(&self, gone: usize) -> Option<BlockType> {
        let columns = self.columns[self.rounded[gone]];
        let whole = columns.is_multiple_of(self.block_type.block_len());
        self.substitute.filter(|_| !whole)
    }

    /// How many units there are.
    pub fn len(&self) -> usize {
        self.by_score.len()
    }

    /// Parameters of the whole module.
    pub fn parameters(&self) -> usize {
        self.freed[self.len()]
    }

    /// Parameters freed when the lowest `gone` units go, whatever block formats need.
    pub fn freed_exactly(&self, gone: usize) -> usize {
        self.freed[gone]
    }

    /// Parameters freed if a threshold takes the lowest `gone` units, after rounding.
    pub fn freed(&self, gone: usize) -> usize {
        self.freed[self.rounded[gone]]
    }

    /// The heads or channels that stay if a threshold takes the lowest `gone` units, by ascending number.
    pub fn kept(&self, gone: usize) -> Vec<usize> {
        let mut kept: Vec<usize> = self.by_score[self.rounded[gone]..]
            .iter()
            .flat_map(|unit| self.members[*unit].iter().copied())
            .collect();
        kept.sort_unstable();
        kept
    }
}

/// Collects what the modules of a model keep when of each module, at its index, the lowest `gone` units go.
///
/// # Panics
/// If there are not two modules for every layer, with a number each.
pub fn plan_of(model: &Model, modules: &[Units], gone: &[usize]) -> Plan {
    assert!(modules.len() == 2 * model.layers.len() && gone.len() == modules.len());
    let mut removed = 0;
    let layers = (0..model.layers.len())
        .map(|l| {
            let [attention, mlp] = [ModuleId::attention(l), ModuleId::mlp(l)].map(|m| m.index());
            let (heads, channels) = (&modules[attention], &modules[mlp]);
            let (heads_gone, channels_gone) = (gone[attention], gone[mlp]);
            removed += heads.freed(heads_gone) + channels.freed(channels_gone);
            LayerPlan {
                heads: heads.kept(heads_gone),
                channels: channels.kept(channels_gone),
                types: [heads.new_type(heads_gone), channels.new_type(channels_gone)],
            }
        })
        .collect();
    Plan {
        layers,
        removed,
        total: model.layer_parameters(),
    }
}

/// For every number n of units, the number nearest to it whose removal leaves a width that may stay; of two equally near ones the
/// smaller. `columns[n]` is the width that the removal of n units leaves.
fn nearest_whole(columns: &[usize], may_stay: impl Fn(usize) -> bool) -> Vec<usize> {
    let whole: Vec<usize> = (0..columns.len())
        .filter(|n| may_stay(columns[*n]))
        .collect();
    (0..columns.len())
        .map(|n| {
            let nearest = whole.iter().min_by_key(|w| w.abs_diff(n));
            // Where nothing goes, blocks are always whole.
            nearest.copied().unwrap_or(0)
        })
        .collect()
}
