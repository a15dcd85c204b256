//! The keys and values of the positions that a model has seen, in blocks that sequences take from a pool and share.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use sha2::{Digest, Sha256};

use super::{Model, ModelError};
use crate::gguf::Map;
use crate::kernels::{KV_BLOCK, Kernels, KvBlocks, KvLayout};
use crate::memory::Memory;
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

/// Where the caches of a model's sequences take their blocks from. A block holds the keys and values of all layers for
/// [`KV_BLOCK`] positions; memory is taken as positions are filled, and what a sequence gives back the next one uses.
///
/// Copies are of the same pool. It is made for a model as it is; pruning changes the widths, so a pool made before cannot be
/// used after.
#[derive(Debug, Clone)]
pub struct KvPool {
    shape: Arc<Shape>,
    shared: Arc<Shared>,
}

/// How keys and values lie in a block.
#[derive(Debug)]
struct Shape {
    head_dim: usize,
    block_type: BlockType,
    /// Of every layer: its KV heads, and where its keys and values are.
    layers: Vec<(usize, KvLayout)>,
    /// Bytes of a block.
    bytes: usize,
    /// The longest context whose keys are turned as those of short ones; `None` where all are alike.
    longest_short: Option<usize>,
}

impl Shape {
    /// What distinguishes the keys of sequences with the same tokens in contexts of different lengths.
    fn kind(&self, context: usize) -> u8 {
        u8::from(self.longest_short.is_some_and(|longest| context > longest))
    }
}

/// What all copies of a pool share.
#[derive(Debug)]
struct Shared {
    /// Blocks that sequences hold, and how many these may be.
    used: AtomicUsize,
    limit: usize,
    /// Bytes that may be taken before the system is asked again how many there are.
    allowed: Mutex<u64>,
    /// Memory of blocks that were given back. It begins at pages: the keys of a head then lie in as few pages and cache lines as
    /// can be.
    free: Mutex<Vec<Map>>,
    /// Filled blocks by what they follow from.
    prefixes: Mutex<HashMap<PrefixKey, Weak<Block>>>,
    /// Blocks of prompts that stay when no sequence holds them any more, from the one that was used last longest ago to the one that
    /// was just used.
    kept: Mutex<VecDeque<(PrefixKey, Arc<Block>)>>,
    /// How many these may be.
    keep: AtomicUsize,
}

/// The SHA-256 of a block's tokens and of those before them in the sequence.
type PrefixKey = [u8; 32];

/// What blocks leave of the memory that is available, in bytes: a pass through the model needs some beside them.
const SPARED: u64 = 4 << 20;
/// The share of what is available, 1 / 8, that is taken before the system is asked again: it costs a fraction of a millisecond, and
/// others take memory too.
const BETWEEN: u64 = 8;

/// Buffers that stay with the pool for sequences to come; more go back to the system.
const MOST_FREE: usize = 16;

/// One block, which goes back to its pool when the last sequence lets go of it.
#[derive(Debug)]
struct Block {
    /// `None` only while it is dropped.
    buffer: Option<Map>,
    pool: Arc<Shared>,
}

impl Block {
    fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], Map::bytes)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().map_or(&mut [], Map::bytes_mut)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.used.fetch_sub(1, Ordering::Relaxed);
        let mut free = lock(&self.pool.free);
        if free.len() < MOST_FREE {
            free.extend(self.buffer.take());
        }
    }
}

/// A lock whose contents are whole between any two statements, so that a panic elsewhere does not matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvPool {
    /// A pool without a limit.
    ///
    /// # Errors
    /// [`ModelError::CacheType`], if the model's heads are not whole blocks of this type.
    pub fn new(model: &Model, cache_type: CacheType) -> Result<Self, ModelError> {
        Self::with_limit(model, cache_type, usize::MAX)
    }

    /// A pool whose sequences together hold at most so many blocks.
    ///
    /// # Errors
    /// [`ModelError::CacheType`], if the model's heads are not whole blocks of this type.
    pub fn with_limit(
        model: &Model,
        cache_type: CacheType,
        limit: usize,
    ) -> Result<Self, ModelError> {
        let (head_dim, block_type) = (model.config.head_dim, cache_type.block_type());
        let block = block_type.block_len();
        if !head_dim.is_multiple_of(block) {
            return Err(ModelError::CacheType { head_dim, block });
        }
        let mut bytes = 0;
        let layers = model.layers.iter().map(|layer| {
            let heads = layer.kv_heads();
            let plane = heads * KV_BLOCK * block_type.row_bytes(head_dim);
            let keys = bytes;
            bytes += 2 * plane;
            let layout = KvLayout {
                block_type,
                keys,
                values: keys + plane,
            };
            (heads, layout)
        });
        let layers = layers.collect();
        Ok(Self {
            shape: Arc::new(Shape {
                head_dim,
                block_type,
                layers,
                bytes,
                longest_short: model
                    .layers
                    .iter()
                    .find_map(|layer| layer.rope.as_ref()?.longest_short()),
            }),
            shared: Arc::new(Shared {
                used: AtomicUsize::new(0),
                limit,
                allowed: Mutex::default(),
                free: Mutex::default(),
                prefixes: Mutex::default(),
                kept: Mutex::default(),
                keep: AtomicUsize::new(0),
            }),
        })
    }

    /// An empty cache for a sequence of at most `capacity` positions.
    pub fn cache(&self, capacity: usize) -> KvCache {
        KvCache {
            pool: self.clone(),
            blocks: Vec::new(),
            len: 0,
            capacity,
        }
    }

    /// A cache for a sequence that begins with these tokens, which holds what other sequences have of them already: whole blocks
    /// that were [shared](KvCache::share), and never the last token, whose output somebody wants.
    pub fn cache_for(&self, tokens: &[u32], capacity: usize) -> KvCache {
        let mut cache = self.cache(capacity);
        let prefixes = lock(&self.shared.prefixes);
        let mut kept = lock(&self.shared.kept);
        let whole = tokens.len().min(capacity).saturating_sub(1) / KV_BLOCK;
        for key in prefix_keys(self.shape.kind(capacity), tokens).take(whole) {
            let Some(block) = prefixes.get(&key).and_then(Weak::upgrade) else {
                break;
            };
            cache.blocks.push(block);
            cache.len += KV_BLOCK;
            if let Some(place) = kept.iter().position(|(other, _)| *other == key) {
                let used = kept.remove(place);
                kept.extend(used);
            }
        }
        cache
    }

    /// Has so many blocks of prompts stay when no sequence holds them any more, for sequences to come that begin with the same
    /// tokens. They give way where a sequence needs a block and the pool has no other. A pool keeps none at first, and whoever lets it
    /// keep some must let it keep none before it is dropped, since kept blocks keep their pool.
    pub fn keep(&self, blocks: usize) {
        self.shared.keep.store(blocks, Ordering::Relaxed);
        let mut kept = lock(&self.shared.kept);
        let more = kept.len().saturating_sub(blocks);
        kept.drain(..more);
    }

    /// Blocks that nobody holds and that are kept all the same.
    fn idle_blocks(&self) -> usize {
        let kept = lock(&self.shared.kept);
        kept.iter()
            .filter(|(_, block)| Arc::strong_count(block) == 1)
            .count()
    }

    /// Gives up the kept block that was not used for longest; whether there was one.
    fn give_up(&self) -> bool {
        let mut kept = lock(&self.shared.kept);
        let idle = kept
            .iter()
            .position(|(_, block)| Arc::strong_count(block) == 1);
        idle.and_then(|place| kept.remove(place)).is_some()
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.shape.bytes
    }

    /// Blocks that sequences hold; one that several share counts once.
    pub fn used_blocks(&self) -> usize {
        let used = self.shared.used.load(Ordering::Relaxed);
        used.saturating_sub(self.idle_blocks())
    }

    /// Blocks that can still be taken, as far as the pool's limit goes.
    pub fn blocks_left(&self) -> usize {
        self.shared.limit.saturating_sub(self.used_blocks())
    }

    /// As many of `wanted` blocks as can be taken now: neither the limit nor the memory stands against them.
    pub(crate) fn blocks_of(&self, wanted: usize) -> usize {
        let wanted = wanted.min(self.blocks_left());
        let kept = lock(&self.shared.free).len() + self.idle_blocks();
        let new = wanted.saturating_sub(kept);
        let room = self.shared.allow(new, self.shape.bytes, false);
        wanted.min(kept + room.unwrap_or_else(|left| left))
    }

    /// Why so many blocks cannot be taken.
    pub(crate) fn why_not(&self, wanted: usize) -> ModelError {
        match self.blocks_left() < wanted {
            true => ModelError::PoolFull {
                blocks: self.used_blocks(),
            },
            false => self.shortage(),
        }
    }

    fn shortage(&self) -> ModelError {
        ModelError::CacheMemory {
            positions: KV_BLOCK,
            needed: self.shape.bytes as u64,
            available: available(),
        }
    }

    /// Bytes that the caches of `sequences` sequences take when each has so many positions: a float, as it may be more than
    /// an integer holds.
    pub(crate) fn bytes_of(&self, positions: usize, sequences: usize) -> f64 {
        let blocks = positions.div_ceil(KV_BLOCK) as f64 * sequences as f64;
        blocks * self.shape.bytes as f64
    }

    /// A block to be filled, with arbitrary contents.
    fn take(&self) -> Result<Arc<Block>, ModelError> {
        let Shared { used, limit, .. } = &*self.shared;
        let more = |used: usize| (used < *limit).then_some(used + 1);
        while used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_err()
        {
            if !self.give_up() {
                return Err(ModelError::PoolFull { blocks: *limit });
            }
        }
        // From here on the block counts itself out when it is dropped.
        let mut block = Block {
            buffer: None,
            pool: self.shared.clone(),
        };
        let kept = lock(&self.shared.free).pop();
        block.buffer = Some(match kept {
            Some(buffer) => buffer,
            None => match self.new_buffer() {
                Ok(buffer) => buffer,
                Err(shortage) => {
                    let given_up = self.give_up().then(|| lock(&self.shared.free).pop());
                    given_up.flatten().ok_or(shortage)?
                }
            },
        });
        Ok(Arc::new(block))
    }

    /// Memory for a block, which the system hands out as it is first written to: so it is asked before whether it has any.
    fn new_buffer(&self) -> Result<Map, ModelError> {
        let bytes = self.shape.bytes;
        let allowed = self.shared.allow(1, bytes, true);
        allowed.map_err(|_| self.shortage())?;
        // A model whose layers have all lost their attention needs none, but a map is never empty.
        Map::anonymous(bytes.max(1)).map_err(|_| self.shortage())
    }
}

impl Shared {
    /// Whether there is memory for so many blocks of so many bytes, and takes note of it if they are `taken`.
    ///
    /// # Errors
    /// If there is not; the number of those that there is memory for.
    fn allow(&self, blocks: usize, bytes: usize, taken: bool) -> Result<usize, usize> {
        let needed = (bytes as u64).saturating_mul(blocks as u64);
        let mut allowed = lock(&self.allowed);
        if *allowed < needed {
            let available = available();
            if available < needed {
                return Err(usize::try_from(available / bytes.max(1) as u64).unwrap_or(usize::MAX));
            }
            *allowed = needed.max(available / BETWEEN);
        }
        if taken {
            *allowed -= needed;
        }
        Ok(blocks)
    }
}

/// Bytes that there are for blocks; very many where the system does not tell.
fn available() -> u64 {
    Memory::now().map_or(u64::MAX, |memory| memory.for_new().saturating_sub(SPARED))
}

/// The keys of a text's whole blocks, in contexts of a [kind](Shape::kind).
fn prefix_keys(kind: u8, tokens: &[u32]) -> impl Iterator<Item = PrefixKey> {
    let blocks = tokens.chunks_exact(KV_BLOCK);
    blocks.scan([kind; 32], |key, tokens| {
        let mut hasher = Sha256::new_with_prefix(*key);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        *key = hasher.finalize().into();
        Some(*key)
    })
}

/// The KV cache of one sequence. A clone shares the blocks until one of the two writes to them.
#[derive(Debug, Clone)]
pub struct KvCache {
    pool: KvPool,
    /// As many as the positions fill, and for a moment those of a batch under way.
    blocks: Vec<Arc<Block>>,
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache in half precision, of a pool of its own.
    pub fn new(model: &Model, capacity: usize) -> Self {
        let pool = KvPool::new(model, CacheType::F16).expect("half precision suits all heads");
        pool.cache(capacity)
    }

    /// An empty cache in this type, of a pool of its own.
    ///
    /// # Errors
    /// [`ModelError::CacheType`], if the model's heads are not whole blocks of it.
    pub fn with_type(
        model: &Model,
        capacity: usize,
        cache_type: CacheType,
    ) -> Result<Self, ModelError> {
        Ok(KvPool::new(model, cache_type)?.cache(capacity))
    }

    /// Positions that are filled.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that the sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of the blocks that the sequence holds, alone or with others.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * self.pool.shape.bytes
    }

    /// Forgets all positions from `len` on, and gives back the blocks that then are empty.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.blocks.truncate(self.len.div_ceil(KV_BLOCK));
    }

    /// Offers the whole blocks of a prompt to sequences that begin with the same tokens. `tokens` are those of the positions from
    /// 0 on, and must all have been computed in prefill: what comes out of that depends on the tokens alone.
    pub fn share(&self, tokens: &[u32]) {
        let filled = tokens.len().min(self.len) / KV_BLOCK;
        let mut prefixes = lock(&self.pool.shared.prefixes);
        prefixes.retain(|_, block| block.strong_count() > 0);
        let keep = self.pool.shared.keep.load(Ordering::Relaxed);
        let mut kept = lock(&self.pool.shared.kept);
        let kind = self.pool.shape.kind(self.capacity);
        for (key, block) in prefix_keys(kind, tokens).zip(&self.blocks).take(filled) {
            let known = prefixes
                .get(&key)
                .is_some_and(|block| block.strong_count() > 0);
            if known || keep == 0 {
                prefixes.entry(key).or_insert_with(|| Arc::downgrade(block));
                continue;
            }
            prefixes.insert(key, Arc::downgrade(block));
            kept.push_back((key, Arc::clone(block)));
            if kept.len() > keep {
                kept.pop_front();
            }
        }
    }

    /// Makes room for the next `tokens` positions: their blocks are there and nobody else's.
    ///
    /// # Errors
    /// If the sequence may not have so many positions, or the pool has no more blocks. The cache is then as it was.
    pub(super) fn reserve(&mut self, tokens: usize) -> Result<(), ModelError> {
        let needed = self.len.saturating_add(tokens);
        if needed > self.capacity {
            return Err(ModelError::CacheFull {
                needed,
                capacity: self.capacity,
            });
        }
        let made = self.make_room(needed);
        if made.is_err() {
            self.truncate(self.len);
        }
        made
    }

    fn make_room(&mut self, needed: usize) -> Result<(), ModelError> {
        for block in &mut self.blocks[self.len / KV_BLOCK..] {
            if Arc::get_mut(block).is_none() {
                let mut copy = self.pool.take()?;
                let new = Arc::get_mut(&mut copy).expect("nobody else has it yet");
                new.bytes_mut().copy_from_slice(block.bytes());
                *block = copy;
            }
        }
        while self.blocks.len() * KV_BLOCK < needed {
            self.blocks.push(self.pool.take()?);
        }
        Ok(())
    }

    /// Counts positions that were written.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Whether it was made for a model of these widths.
    pub(super) fn is_of(&self, model: &Model) -> bool {
        let shape = &*self.pool.shape;
        let heads = shape.layers.iter().map(|(heads, _)| *heads);
        shape.head_dim == model.config.head_dim
            && heads.eq(model.layers.iter().map(|layer| layer.kv_heads()))
    }

    /// Whether keys and values lie in the blocks of the two in the same way.
    pub(super) fn is_like(&self, other: &KvCache) -> bool {
        let (ours, theirs) = (&self.pool.shape, &other.pool.shape);
        Arc::ptr_eq(ours, theirs)
            || (ours.block_type, ours.bytes) == (theirs.block_type, theirs.bytes)
    }

    /// Where a layer's keys and values are in each block.
    pub(super) fn layout(&self, layer: usize) -> KvLayout {
        self.pool.shape.layers[layer].1
    }

    /// All blocks, for reading.
    pub(super) fn blocks(&self) -> KvBlocks<'_> {
        KvBlocks::new(self.blocks.iter().map(|block| block.bytes()))
    }

    /// The blocks that hold some positions, which there must be room for, with the positions that each holds of them.
    pub(super) fn writers(
        &mut self,
        layer: usize,
        positions: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, BlockWriter<'_>)> {
        let shape = &*self.pool.shape;
        let (heads, layout) = shape.layers[layer];
        let first = positions.start / KV_BLOCK;
        let end = positions.end.div_ceil(KV_BLOCK);
        let blocks = self.blocks[first..end].iter_mut().enumerate();
        blocks.map(move |(i, block)| {
            let start = (first + i) * KV_BLOCK;
            let these = positions.start.max(start)..positions.end.min(start + KV_BLOCK);
            let block = Arc::get_mut(block).expect("a block that there is room in has one owner");
            let writer = BlockWriter {
                bytes: block.bytes_mut(),
                heads,
                head_dim: shape.head_dim,
                layout,
                first: these.start - start,
            };
            (these, writer)
        })
    }
}

/// Writes keys and values of a layer to a block.
pub(super) struct BlockWriter<'a> {
    bytes: &'a mut [u8],
    heads: usize,
    head_dim: usize,
    layout: KvLayout,
    /// The row of the block where it begins.
    first: usize,
}

impl BlockWriter<'_> {
    /// Puts k and v `[tokens, kv_heads, head_dim]` in the block.
    pub fn write(&mut self, kernels: Kernels, k: &[f32], v: &[f32]) {
        if self.heads == 0 {
            return;
        }
        let row_bytes = self.layout.block_type.row_bytes(self.head_dim);
        for (from, place) in [(k, self.layout.keys), (v, self.layout.values)] {
            for (t, token) in from.chunks_exact(self.heads * self.head_dim).enumerate() {
                for (head, values) in token.chunks_exact(self.head_dim).enumerate() {
                    let at = place + (head * KV_BLOCK + self.first + t) * row_bytes;
                    let to = &mut self.bytes[at..at + row_bytes];
                    match self.layout.block_type {
                        BlockType::F16 => {
                            kernels.to_half(values, bytemuck::cast_slice_mut(to));
                        }
                        block_type => encode_row(block_type, values, to),
                    }
                }
            }
        }
    }
}
