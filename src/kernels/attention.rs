//! Causal attention of a batch of tokens to a KV cache.

use std::ops::Range;

use half::f16;

use super::activations::Sink;
use super::team::SharedSlice;
use super::{
    ACTIVATION_BLOCK, Activations, Keep, Kernels, MatrixView, Precision, TILE_COLS, Team, call,
    sys, with_scratch,
};
use crate::quant::BlockType;

/// Positions that one thread attends to at a time when a single token looks back on many: the parts are joined afterwards.
/// The same for any number of threads, so that results do not depend on it.
const PART: usize = 512;

/// The keys or the values of a layer, `[kv_heads, capacity, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub enum CachePlane<'a> {
    Half(&'a [f16]),
    /// Rows of whole blocks.
    Q8_0(&'a [u8]),
}

impl CachePlane<'_> {
    fn block_type(&self) -> BlockType {
        match self {
            CachePlane::Half(_) => BlockType::F16,
            CachePlane::Q8_0(_) => BlockType::Q8_0,
        }
    }
}

impl<'a> CachePlane<'a> {
    fn as_bytes(&self) -> &'a [u8] {
        match self {
            CachePlane::Half(values) => bytemuck::cast_slice(values),
            CachePlane::Q8_0(bytes) => bytes,
        }
    }
}

/// What [`attention`] works on.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    pub head_dim: usize,
    /// Query heads of each KV head, in order; their sum is the number of query heads.
    pub group_sizes: &'a [usize],
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// The position of the first token of the batch.
    pub first_position: usize,
    pub tokens: usize,
}

/// softmax(q · Kᵀ / √head_dim) · V for every token and query head, each token seeing the positions up to its own.
///
/// q and out are `[tokens, heads, head_dim]`; keys and values are filled up to the last token and of one kind.
///
/// # Panics
/// If a shape does not fit.
#[allow(clippy::too_many_arguments)] // three inputs, an output, and who computes
pub fn attention(
    team: &Team,
    shape: AttentionShape,
    q: &[f32],
    keys: CachePlane,
    values: CachePlane,
    out: &mut [f32],
) {
    let kernels = team.kernels();
    assert_eq!(out.len(), q.len(), "queries");
    let job = Job::new(kernels, shape, q, keys, values);
    job.run(team, &Out::Values(SharedSlice::new(out)));
}

/// As [`attention`], with the result `[tokens, heads · head_dim]` in the forms that `readers` will ask for, and what `keep`
/// asks for; where that is moments, it may be plain values.
///
/// # Panics
/// If a shape does not fit.
#[allow(clippy::too_many_arguments)] // three inputs, an output, and who computes
pub fn attention_for(
    team: &Team,
    shape: AttentionShape,
    q: &[f32],
    keys: CachePlane,
    values: CachePlane,
    out: &mut Activations,
    readers: &[MatrixView],
    keep: Keep,
) {
    let kernels = team.kernels();
    let (tokens, width) = (shape.tokens, q.len() / shape.tokens.max(1));
    let job = Job::new(kernels, shape, q, keys, values);
    if shape.head_dim.is_multiple_of(TILE_COLS) {
        let sink = out.sink(kernels, tokens, width, readers, keep, Precision::Normal);
        job.run(team, &Out::Sink(&sink));
    } else {
        let out = SharedSlice::new(out.begin(tokens, width));
        job.run(team, &Out::Values(out));
    }
}

/// Where results go.
enum Out<'a> {
    /// `[tokens, heads · head_dim]`
    Values(SharedSlice<'a, f32>),
    Sink(&'a Sink<'a>),
}

struct Job<'a> {
    kernels: Kernels,
    shape: AttentionShape<'a>,
    /// The first query head of each KV head.
    first_heads: Vec<usize>,
    /// Values of a token's queries.
    width: usize,
    scale: f32,
    q: &'a [f32],
    keys: CachePlane<'a>,
    values: CachePlane<'a>,
}

impl<'a> Job<'a> {
    fn new(
        kernels: Kernels,
        shape: AttentionShape<'a>,
        q: &'a [f32],
        keys: CachePlane<'a>,
        values: CachePlane<'a>,
    ) -> Self {
        let AttentionShape {
            head_dim,
            group_sizes,
            capacity,
            first_position,
            tokens,
        } = shape;
        let heads: usize = group_sizes.iter().sum();
        let block_type = keys.block_type();
        assert!(
            block_type == BlockType::F16 || head_dim.is_multiple_of(ACTIVATION_BLOCK),
            "a cache in blocks"
        );
        let row_bytes = block_type.row_bytes(head_dim);
        let plane = capacity * row_bytes;
        assert!(q.len() == tokens * heads * head_dim, "queries");
        assert!(
            keys.as_bytes().len() == group_sizes.len() * plane
                && values.as_bytes().len() == keys.as_bytes().len()
                && values.block_type() == block_type,
            "cache"
        );
        assert!(first_position + tokens <= capacity, "positions");
        let first_heads = group_sizes.iter().scan(0, |next, size| {
            let first = *next;
            *next += size;
            Some(first)
        });
        Self {
            kernels,
            shape,
            first_heads: first_heads.collect(),
            width: heads * head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            q,
            keys,
            values,
        }
    }

    /// The keys and values of a KV head from a position on.
    fn kv(&self, group: usize, position: usize) -> sys::fk_kv_head {
        let head_dim = self.shape.head_dim;
        let block_type = self.keys.block_type();
        let row_bytes = block_type.row_bytes(head_dim);
        let at = (group * self.shape.capacity + position) * row_bytes;
        sys::fk_kv_head {
            type_: super::type_of(block_type),
            keys: self.keys.as_bytes()[at..].as_ptr(),
            values: self.values.as_bytes()[at..].as_ptr(),
            row_bytes,
            head_dim,
        }
    }

    fn run(&self, team: &Team, out: &Out) {
        if self.shape.tokens == 1 && self.shape.first_position >= PART {
            self.one_token(team, out);
        } else {
            self.blocks(team, out);
        }
    }

    /// Blocks of tokens, each for itself.
    fn blocks(&self, team: &Team, out: &Out) {
        let AttentionShape {
            head_dim,
            group_sizes,
            first_position,
            tokens,
            ..
        } = self.shape;
        // The same for any number of threads, so that results do not depend on it.
        let tokens_per_block = self.kernels.table().attend_tokens;
        let blocks = tokens.div_ceil(tokens_per_block);
        team.items(blocks * group_sizes.len(), |_, item| {
            let (block, group) = (item / group_sizes.len(), item % group_sizes.len());
            let size = group_sizes[group];
            // Late blocks see the most positions: they go first, so that the short ones fill the gaps at the end.
            let first_token = (blocks - 1 - block) * tokens_per_block;
            let count = tokens_per_block.min(tokens - first_token);
            let queries = count * size;
            if queries == 0 {
                return;
            }
            let span = size * head_dim;
            let at = |token: usize| {
                (first_token + token) * self.width + self.first_heads[group] * head_dim
            };
            let visible: Vec<usize> = (0..queries)
                .map(|i| first_position + first_token + i / size + 1)
                .collect();
            let scratch_len = self.scratch_len(&visible);
            with_scratch(scratch_len + 2 * queries * head_dim, |scratch| {
                let (scratch, rest) = scratch.split_at_mut(scratch_len);
                let (gathered, result) = rest.split_at_mut(queries * head_dim);
                for token in 0..count {
                    gathered[token * span..][..span].copy_from_slice(&self.q[at(token)..][..span]);
                }
                self.attend(
                    gathered,
                    &visible,
                    &self.kv(group, 0),
                    result,
                    None,
                    scratch,
                );
                let first = self.first_heads[group] * head_dim;
                // SAFETY: every item is handed out once, and has its own tokens and heads; these begin at whole tiles, if it is a
                // sink, as `attention_for` has seen to for heads and blocks of tokens do.
                unsafe {
                    self.put(
                        out,
                        first_token..first_token + count,
                        first..first + span,
                        result,
                    )
                };
            });
        });
    }

    /// Puts results `[tokens.len(), cols.len()]` in their place.
    ///
    /// # Safety
    /// As for [`SharedSlice::range`] or [`Sink::put`].
    unsafe fn put(&self, out: &Out, tokens: Range<usize>, cols: Range<usize>, results: &[f32]) {
        match out {
            Out::Values(out) => {
                for (t, result) in tokens.zip(results.chunks_exact(cols.len().max(1))) {
                    let first = t * self.width;
                    // SAFETY: the caller vouches for it.
                    let to = unsafe { out.range(first + cols.start..first + cols.end) };
                    to.copy_from_slice(result);
                }
            }
            // SAFETY: the caller vouches for it.
            Out::Sink(sink) => unsafe { sink.put(tokens, cols, results) },
        }
    }

    /// One token that looks back on many positions, which are shared out in parts.
    fn one_token(&self, team: &Team, out: &Out) {
        let AttentionShape {
            head_dim,
            group_sizes,
            first_position,
            ..
        } = self.shape;
        let heads = self.width / head_dim;
        let positions = first_position + 1;
        let parts = positions.div_ceil(PART);
        let (mut results, mut log_sums) = (vec![0.0; parts * self.width], vec![0.0; parts * heads]);
        let shared = SharedSlice::new(&mut results);
        let shared_sums = SharedSlice::new(&mut log_sums);
        team.items(parts * group_sizes.len(), |_, item| {
            let (part, group) = (item / group_sizes.len(), item % group_sizes.len());
            let (first, size) = (self.first_heads[group], group_sizes[group]);
            if size == 0 {
                return;
            }
            let seen = PART.min(positions - part * PART);
            let queries = first * head_dim..(first + size) * head_dim;
            // SAFETY: every item is handed out once, and has its own part and heads.
            let (result, sums) = unsafe {
                (
                    shared
                        .range(part * self.width + queries.start..part * self.width + queries.end),
                    shared_sums.range(part * heads + first..part * heads + first + size),
                )
            };
            let kv = self.kv(group, part * PART);
            let visible = vec![seen; size];
            with_scratch(self.scratch_len(&visible), |scratch| {
                self.attend(&self.q[queries], &visible, &kv, result, Some(sums), scratch);
            });
        });
        let mut joined = vec![0.0; self.width];
        for (head, joined) in joined.chunks_exact_mut(head_dim).enumerate() {
            let sums = || (0..parts).map(|part| log_sums[part * heads + head]);
            let peak = sums().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = sums().map(|sum| (sum - peak).exp()).sum();
            for (part, sum) in sums().enumerate() {
                let share = (sum - peak).exp() / total;
                let result = &results[part * self.width + head * head_dim..][..head_dim];
                for (j, r) in joined.iter_mut().zip(result) {
                    *j += share * r;
                }
            }
        }
        // SAFETY: nobody else writes now.
        unsafe { self.put(out, 0..1, 0..self.width, &joined) };
    }

    /// Floats of scratch that [`Job::attend`] needs.
    fn scratch_len(&self, visible: &[usize]) -> usize {
        let most = visible.iter().copied().max().unwrap_or(0);
        // SAFETY: the function has no preconditions.
        unsafe {
            call!(
                self.kernels,
                attend_scratch(visible.len(), self.shape.head_dim, most)
            )
        }
    }

    /// Queries `[visible.len(), head_dim]` of one KV head.
    fn attend(
        &self,
        q: &[f32],
        visible: &[usize],
        kv: &sys::fk_kv_head,
        out: &mut [f32],
        log_sums: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let (queries, head_dim) = (visible.len(), kv.head_dim);
        assert!(q.len() == queries * head_dim && out.len() == q.len());
        assert!(scratch.len() >= self.scratch_len(visible));
        let log_sums = log_sums.map_or(std::ptr::null_mut(), |sums| {
            assert_eq!(sums.len(), queries);
            sums.as_mut_ptr()
        });
        // SAFETY: q and out hold `queries` vectors, and log_sums as many numbers if it is not null; the head's keys and
        // values hold the positions that any query sees, as the callers took them from a cache whose size `attention`
        // checked; the scratch is as long as asked for.
        unsafe {
            call!(
                self.kernels,
                attend(
                    q.as_ptr(),
                    queries,
                    visible.as_ptr(),
                    kv,
                    self.scale,
                    out.as_mut_ptr(),
                    log_sums,
                    scratch.as_mut_ptr()
                )
            );
        }
    }
}
