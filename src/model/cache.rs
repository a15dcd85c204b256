//! The keys and values of the positions that a model has seen.

use half::f16;

use super::Model;
use super::rope::Angles;

/// A KV cache in half precision. Layers differ in their number of KV heads.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// The rotation angles of every position that there is room for.
    angles: Angles,
    capacity: usize,
    len: usize,
}

#[derive(Debug)]
pub(super) struct LayerCache {
    /// `[kv_heads, capacity, head_dim]`
    pub keys: Vec<f16>,
    /// `[kv_heads, capacity, head_dim]`
    pub values: Vec<f16>,
}

impl KvCache {
    /// An empty cache with room for `capacity` positions of `model` as it is now; pruning changes the shape, so a cache
    /// made before cannot be used after. The system hands out the memory as it is first written to.
    pub fn new(model: &Model, capacity: usize) -> Self {
        let layers = model
            .layers
            .iter()
            .map(|layer| {
                let len = layer.group_sizes.len() * capacity * model.config.head_dim;
                LayerCache {
                    keys: vec![f16::ZERO; len],
                    values: vec![f16::ZERO; len],
                }
            })
            .collect();
        Self {
            layers,
            angles: model.rope.angles(capacity),
            capacity,
            len: 0,
        }
    }

    /// Positions that are filled.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes for all positions.
    pub fn bytes(&self) -> usize {
        self.layers
            .iter()
            .map(|l| (l.keys.len() + l.values.len()) * size_of::<f16>())
            .sum()
    }

    pub(super) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    pub(super) fn angles(&self) -> &Angles {
        &self.angles
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
