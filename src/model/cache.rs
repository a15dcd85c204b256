//! The keys and values of the positions that a model has seen.

use half::f16;

use super::rope::Angles;
use super::{Model, ModelError};
use crate::kernels::{CachePlane, Team};
use crate::quant::{BlockType, encode_row};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheType {
    /// Half precision.
    #[default]
    F16,
    /// Blocks of 32 values in 8 bits with a common scale: 53 % of the bytes of half precision.
    Q8_0,
}

impl CacheType {
    fn block_type(self) -> BlockType {
        match self {
            CacheType::F16 => BlockType::F16,
            CacheType::Q8_0 => BlockType::Q8_0,
        }
    }
}

/// A KV cache. Layers differ in their number of KV heads.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// The rotation angles of every position that there is room for.
    angles: Angles,
    head_dim: usize,
    capacity: usize,
    len: usize,
}

#[derive(Debug)]
struct LayerCache {
    keys: Plane,
    values: Plane,
}

/// `[kv_heads, capacity, head_dim]`
#[derive(Debug)]
enum Plane {
    Half(Vec<f16>),
    Q8_0(Vec<u8>),
}

impl Plane {
    fn new(cache_type: CacheType, rows: usize, head_dim: usize) -> Self {
        match cache_type {
            CacheType::F16 => Plane::Half(vec![f16::ZERO; rows * head_dim]),
            CacheType::Q8_0 => Plane::Q8_0(vec![0; rows * BlockType::Q8_0.row_bytes(head_dim)]),
        }
    }

    fn view(&self) -> CachePlane<'_> {
        match self {
            Plane::Half(values) => CachePlane::Half(values),
            Plane::Q8_0(bytes) => CachePlane::Q8_0(bytes),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Plane::Half(values) => size_of_val(values.as_slice()),
            Plane::Q8_0(bytes) => bytes.len(),
        }
    }
}

impl KvCache {
    /// An empty cache in half precision with room for `capacity` positions of `model` as it is now; pruning changes the
    /// shape, so a cache made before cannot be used after. The system hands out the memory as it is first written to.
    pub fn new(model: &Model, capacity: usize) -> Self {
        Self::allocate(model, capacity, CacheType::F16)
    }

    /// As [`KvCache::new`], stored as `cache_type`.
    ///
    /// # Errors
    /// If the model's heads are not whole blocks of it.
    pub fn with_type(
        model: &Model,
        capacity: usize,
        cache_type: CacheType,
    ) -> Result<Self, ModelError> {
        let head_dim = model.config.head_dim;
        let block = cache_type.block_type().block_len();
        if !head_dim.is_multiple_of(block) {
            return Err(ModelError::CacheType { head_dim, block });
        }
        Ok(Self::allocate(model, capacity, cache_type))
    }

    fn allocate(model: &Model, capacity: usize, cache_type: CacheType) -> Self {
        let head_dim = model.config.head_dim;
        let layers = model
            .layers
            .iter()
            .map(|layer| {
                let rows = layer.group_sizes.len() * capacity;
                LayerCache {
                    keys: Plane::new(cache_type, rows, head_dim),
                    values: Plane::new(cache_type, rows, head_dim),
                }
            })
            .collect();
        Self {
            layers,
            angles: model.rope.angles(capacity),
            head_dim,
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
            .map(|l| l.keys.bytes() + l.values.bytes())
            .sum()
    }

    /// The keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> (CachePlane<'_>, CachePlane<'_>) {
        let LayerCache { keys, values } = &self.layers[layer];
        (keys.view(), values.view())
    }

    /// Puts k and v `[tokens, kv_heads, head_dim]` of a layer behind what is there.
    pub(super) fn remember(&mut self, team: &Team, layer: usize, k: &[f32], v: &[f32]) {
        let kernels = team.kernels();
        let (e, first, capacity) = (self.head_dim, self.len, self.capacity);
        let LayerCache { keys, values } = &mut self.layers[layer];
        match (keys, values) {
            (Plane::Half(keys), Plane::Half(values)) => {
                let shape = (e, e, first, capacity);
                store(team, [(k, keys), (v, values)], shape, |x, out| {
                    kernels.to_half(x, out);
                });
            }
            (Plane::Q8_0(keys), Plane::Q8_0(values)) => {
                let shape = (e, BlockType::Q8_0.row_bytes(e), first, capacity);
                store(team, [(k, keys), (v, values)], shape, |x, out| {
                    encode_row(BlockType::Q8_0, x, out);
                });
            }
            _ => unreachable!("keys and values are stored alike"),
        }
    }

    pub(super) fn angles(&self) -> &Angles {
        &self.angles
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// Writes every head's rows of k and of v `[tokens, kv_heads, head_dim]` to its plane; a row there has `width` elements.
fn store<T: Send>(
    team: &Team,
    from_to: [(&[f32], &mut Vec<T>); 2],
    (head_dim, width, first, capacity): (usize, usize, usize, usize),
    write: impl Fn(&[f32], &mut [T]) + Sync,
) {
    let size = width * capacity;
    if size == 0 {
        return;
    }
    let mut planes: Vec<(&[f32], usize, &mut [T])> = Vec::new();
    for (from, to) in from_to {
        let heads = to.chunks_exact_mut(size).enumerate();
        planes.extend(heads.map(|(head, plane)| (from, head, plane)));
    }
    let heads = planes.len() / 2;
    team.chunks_mut(&mut planes, 1, |_, plane| {
        let (from, head, plane) = &mut plane[0];
        for (i, row) in from.chunks_exact(heads * head_dim).enumerate() {
            let out = &mut plane[(first + i) * width..][..width];
            write(&row[*head * head_dim..][..head_dim], out);
        }
    });
}
