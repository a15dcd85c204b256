//! Plans: which heads and channels of a model stay.

use std::ops::Range;

use super::metric::LayerScores;
use crate::model::{Layer, Linear, Model};
use crate::quant::BlockType;

/// The ratios that can be asked for: shares of the layers' weights, counted in parameters.
pub const RATIOS: Range<f64> = 0.0..0.9;

/// Which query heads and which channels of one layer stay, by ascending number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerPlan {
    pub heads: Vec<usize>,
    pub channels: Vec<usize>,
    /// The types that the attention output and MLP down change to; `None` where they keep theirs. A new type must not take
    /// more bytes than the tensor had.
    pub types: [Option<BlockType>; 2],
}

impl LayerPlan {
    /// How many query heads stay in each KV group.
    pub(in crate::prune) fn group_sizes(&self, layer: &Layer) -> Vec<usize> {
        let mut first = 0;
        layer
            .group_sizes
            .iter()
            .map(|size| {
                let group = first..first + size;
                first += size;
                self.heads.iter().filter(|h| group.contains(h)).count()
            })
            .collect()
    }

    /// Bytes of the layer's weights once the plan is carried out, by those of a projection (its place in [`Layer::linears`]) of a type
    /// and of so many rows and columns.
    fn bytes(
        &self,
        layer: &Layer,
        head_dim: usize,
        bytes: impl Fn(usize, BlockType, usize, usize) -> usize,
    ) -> usize {
        let groups = self.group_sizes(layer);
        let kv_heads = groups.iter().filter(|size| **size > 0).count();
        let (queries, keys) = (self.heads.len() * head_dim, kv_heads * head_dim);
        let rows = |place, linear: &Linear, rows: usize| {
            bytes(place, linear.weight.block_type, rows, linear.weight.cols)
        };
        let columns = |place, linear: &Linear, columns: usize, new: Option<BlockType>| {
            let block_type = new.unwrap_or(linear.weight.block_type);
            bytes(place, block_type, linear.weight.rows, columns)
        };
        let [o, down] = self.types;
        rows(0, &layer.q, queries)
            + rows(1, &layer.k, keys)
            + rows(2, &layer.v, keys)
            + columns(3, &layer.o, queries, o)
            + rows(4, &layer.gate, self.channels.len())
            + rows(5, &layer.up, self.channels.len())
            + columns(6, &layer.down, self.channels.len(), down)
    }
}

/// Which query heads and which channels of a model stay.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub layers: Vec<LayerPlan>,
    /// Parameters of the layers' attention and MLP weights that go.
    pub removed: usize,
    /// Parameters of the layers' attention and MLP weights before.
    pub total: usize,
}

impl Plan {
    /// The plan by which all heads and channels stay.
    pub fn whole(model: &Model) -> Self {
        let layers = model.layers.iter().map(|layer| LayerPlan {
            heads: (0..layer.heads()).collect(),
            channels: (0..layer.channels()).collect(),
            types: [None; 2],
        });
        Self {
            layers: layers.collect(),
            removed: 0,
            total: model.layer_parameters(),
        }
    }

    /// The ratio that the plan reaches, which need not be quite the one that was asked for.
    pub fn ratio(&self) -> f64 {
        self.removed as f64 / self.total.max(1) as f64
    }

    /// The plan with numbers of channels that are multiples of `step` and of whole blocks, the nearest to those that it has: channels
    /// of the highest scores come back, or those of the lowest go too.
    pub(super) fn in_steps(mut self, model: &Model, scores: &[LayerScores], step: usize) -> Self {
        if step == 1 {
            return self;
        }
        let layers = model.layers.iter().zip(&mut self.layers).zip(scores);
        for ((layer, kept), scores) in layers {
            let down = &layer.down.weight;
            let block = kept.types[1].unwrap_or(down.block_type).block_len();
            let step = step / greatest_divisor(step, block) * block;
            let have = kept.channels.len();
            if have.is_multiple_of(step) || !down.cols.is_multiple_of(step) {
                continue;
            }
            let want = (have + step / 2) / step * step;
            let mut order: Vec<usize> = (0..down.cols).collect();
            // Those that stay first, each lot by falling score.
            order.sort_by(|a, b| {
                let stays = |c: &usize| kept.channels.binary_search(c).is_ok();
                let by_score = scores.mlp[*b].total_cmp(&scores.mlp[*a]);
                stays(b).cmp(&stays(a)).then(by_score)
            });
            kept.channels = order[..want].to_vec();
            kept.channels.sort_unstable();
            self.removed = self.removed + 3 * down.rows * have - 3 * down.rows * want;
        }
        self
    }

    /// Bytes of all weight matrices once the plan is carried out, as [`Model::bytes`] will tell them.
    ///
    /// # Panics
    /// If the plan was not made for this model.
    pub fn bytes_after(&self, model: &Model) -> usize {
        self.bytes_by(model, |block_type, rows, cols| {
            rows * block_type.row_bytes(cols)
        })
    }

    /// The same, where a projection of a type and of so many rows and columns will take as many bytes as `bytes` says.
    ///
    /// # Panics
    /// If the plan was not made for this model.
    pub fn bytes_by(
        &self,
        model: &Model,
        bytes: impl Fn(BlockType, usize, usize) -> usize,
    ) -> usize {
        let before: usize = model.layers.iter().map(Layer::bytes).sum();
        let after = self.bytes_of(model, |_, _, block_type, rows, cols| {
            bytes(block_type, rows, cols)
        });
        model.bytes() - before + after
    }

    /// Bytes of the layers' weights, where a projection (by its layer, and its place in it) of a type and of so many rows and columns
    /// will take as many bytes as `bytes` says.
    ///
    /// # Panics
    /// If the plan was not made for this model.
    pub fn bytes_of(
        &self,
        model: &Model,
        bytes: impl Fn(usize, usize, BlockType, usize, usize) -> usize,
    ) -> usize {
        assert_eq!(self.layers.len(), model.layers.len(), "layers of the plan");
        let layers = model.layers.iter().zip(&self.layers).enumerate();
        layers
            .map(|(l, (layer, kept))| {
                let bytes = |place, block_type, rows, cols| bytes(l, place, block_type, rows, cols);
                kept.bytes(layer, model.config.head_dim, bytes)
            })
            .sum()
    }
}

fn greatest_divisor(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => greatest_divisor(b, a % b),
    }
}
