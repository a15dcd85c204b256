//! Causal attention of a batch of tokens to the KV caches of their sequences.

use std::marker::PhantomData;
use std::ops::Range;

use super::activations::Sink;
use super::team::SharedSlice;
use super::{
    ACTIVATION_BLOCK, Activations, Keep, Kernels, MatrixView, Phase, Precision, TILE_COLS, Team,
    Tokens, call, sys, with_scratch,
};
use crate::quant::BlockType;

/// Positions of a block of a KV cache.
pub const KV_BLOCK: usize = sys::FK_KV_BLOCK as usize;

/// Positions that one thread attends to at a time when a generated token looks back on many: the parts are joined afterwards.
/// The same for any number of threads and tokens, so that results do not depend on these.
const PART: usize = 8 * KV_BLOCK;

/// The blocks of one sequence's KV cache, in the order of its positions: block b holds positions b · [`KV_BLOCK`] and so on.
#[derive(Debug)]
pub struct KvBlocks<'a> {
    starts: Vec<*const u8>,
    /// Bytes of each block.
    bytes: usize,
    borrowed: PhantomData<&'a [u8]>,
}

// SAFETY: the pointers are to bytes that are borrowed for 'a and only read.
unsafe impl Send for KvBlocks<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for KvBlocks<'_> {}

impl<'a> KvBlocks<'a> {
    /// # Panics
    /// If the blocks are not all of one length.
    pub fn new(blocks: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut bytes = None;
        let starts = blocks
            .into_iter()
            .map(|block| {
                let all = *bytes.get_or_insert(block.len());
                assert_eq!(block.len(), all, "blocks of one length");
                block.as_ptr()
            })
            .collect();
        Self {
            starts,
            bytes: bytes.unwrap_or(0),
            borrowed: PhantomData,
        }
    }
}

/// Where the keys and the values of one layer lie in every block, `[kv_heads, KV_BLOCK, head_dim]` each.
#[derive(Debug, Clone, Copy)]
pub struct KvLayout {
    /// [`BlockType::F16`], or [`BlockType::Q8_0`] where heads are whole blocks of it.
    pub block_type: BlockType,
    /// Bytes of a block before the keys.
    pub keys: usize,
    /// Bytes of a block before the values.
    pub values: usize,
}

/// Tokens of one sequence that follow each other.
#[derive(Debug)]
pub struct Span<'a> {
    pub blocks: &'a KvBlocks<'a>,
    /// Which tokens of the batch.
    pub tokens: Range<usize>,
    /// The position of the first of them in the sequence.
    pub first_position: usize,
}

/// The heads of a layer, and the sequences that the tokens of a batch belong to.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    pub head_dim: usize,
    /// Query heads of each KV head, in order; their sum is the number of query heads.
    pub group_sizes: &'a [usize],
    pub layout: KvLayout,
    /// The tokens of the batch, in their order.
    pub spans: &'a [Span<'a>],
    pub phase: Phase,
    pub scores: Scores,
}

/// What becomes of products of queries and keys before softmax, and which there are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// They are multiplied by this,
    pub scale: f32,
    /// and become cap · tanh(score / cap); `None` where they stay.
    pub cap: Option<f32>,
    /// The last positions that a token sees, its own among them; `None` where it sees all.
    pub window: Option<usize>,
}

impl Scores {
    /// Divided by √head_dim, and of all positions.
    pub fn plain(head_dim: usize) -> Self {
        Self {
            scale: 1.0 / (head_dim as f32).sqrt(),
            cap: None,
            window: None,
        }
    }

    /// The first position that a token at this one sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// out = softmax(scores(q · Kᵀ)) · V for every token and query head, each token seeing the positions of its sequence up to
/// its own, or the last of these. q is `[tokens, heads, head_dim]`, out `[tokens, heads · head_dim]`, in the forms that `readers` will ask for, and
/// what `keep` asks for; where that is moments, it may be plain values. Keys and values are there up to the last token's.
///
/// # Panics
/// If a shape does not fit.
pub fn attention(
    team: &Team,
    shape: AttentionShape,
    q: &[f32],
    out: &mut Activations,
    readers: &[MatrixView],
    keep: Keep,
) {
    let job = Job::new(team.kernels(), shape, q);
    let tokens = Tokens {
        count: shape.spans.last().map_or(0, |span| span.tokens.end),
        phase: shape.phase,
    };
    // A sink takes whole tiles of heads, in prefill whole tiles of tokens, which several sequences would share, and moments of
    // several tokens at a time, which those that are generated do not come in.
    let whole_tiles = shape.head_dim.is_multiple_of(TILE_COLS)
        && match shape.phase {
            Phase::Prefill => shape.spans.len() == 1,
            Phase::Decode => keep != Keep::Moments,
        };
    if whole_tiles {
        let sink = out.sink(
            job.kernels,
            tokens,
            job.width,
            readers,
            keep,
            Precision::Normal,
        );
        job.run(team, &Out::Sink(&sink));
    } else {
        let out = SharedSlice::new(out.begin(tokens, job.width));
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
    q: &'a [f32],
}

/// Some tokens of a span that are attended to together, and the positions that they see: from the block of the cache in which the first
/// one's begin.
struct Block {
    span: usize,
    tokens: Range<usize>,
    seen: Range<usize>,
}

/// Positions that one generated token attends to at a time.
struct Part {
    span: usize,
    token: usize,
    positions: Range<usize>,
    /// Positions at the beginning of these that it does not see.
    unseen: usize,
    /// The place of its results among those that are joined; `None` where the part is all that the token sees.
    place: Option<usize>,
}

impl<'a> Job<'a> {
    fn new(kernels: Kernels, shape: AttentionShape<'a>, q: &'a [f32]) -> Self {
        let AttentionShape {
            head_dim,
            group_sizes,
            layout,
            spans,
            ..
        } = shape;
        let KvLayout { block_type, .. } = layout;
        let heads: usize = group_sizes.iter().sum();
        assert!(
            block_type == BlockType::F16
                || (block_type == BlockType::Q8_0 && head_dim.is_multiple_of(ACTIVATION_BLOCK)),
            "a cache in half precision, or in whole blocks"
        );
        let plane = group_sizes.len() * KV_BLOCK * block_type.row_bytes(head_dim);
        let mut tokens = 0;
        for span in spans {
            assert_eq!(span.tokens.start, tokens, "tokens in order");
            tokens = span.tokens.end;
            assert!(
                span.first_position + span.tokens.len() <= span.blocks.starts.len() * KV_BLOCK,
                "positions"
            );
            assert!(
                layout.keys.max(layout.values) + plane <= span.blocks.bytes,
                "a layer's place in a block"
            );
        }
        assert_eq!(q.len(), tokens * heads * head_dim, "queries");
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
            q,
        }
    }

    /// The keys and values of a KV head of a sequence from a block on.
    fn kv(&self, span: &Span, group: usize, block: usize) -> sys::fk_kv_head {
        let AttentionShape {
            head_dim, layout, ..
        } = self.shape;
        let row_bytes = layout.block_type.row_bytes(head_dim);
        let head = group * KV_BLOCK * row_bytes;
        sys::fk_kv_head {
            type_: super::type_of(layout.block_type),
            blocks: span.blocks.starts[block..].as_ptr(),
            keys: layout.keys + head,
            values: layout.values + head,
            row_bytes,
            head_dim,
        }
    }

    fn run(&self, team: &Team, out: &Out) {
        match self.shape.phase {
            Phase::Prefill => self.prefill(team, out),
            Phase::Decode => self.decode(team, out),
        }
    }

    /// Blocks of tokens, each for itself.
    fn prefill(&self, team: &Team, out: &Out) {
        let AttentionShape {
            head_dim,
            group_sizes,
            spans,
            scores,
            ..
        } = self.shape;
        // The same for any number of threads, so that results do not depend on it.
        let most = self.kernels.table().attend_tokens;
        let mut blocks: Vec<Block> = Vec::new();
        for (s, span) in spans.iter().enumerate() {
            for first in span.tokens.clone().step_by(most) {
                let tokens = first..(first + most).min(span.tokens.end);
                let position = |token| span.first_position + token - span.tokens.start;
                let first = scores.first_seen(position(tokens.start)) / KV_BLOCK * KV_BLOCK;
                let seen = first..position(tokens.end);
                let span = s;
                blocks.push(Block { span, tokens, seen });
            }
        }
        // Those that see the most positions go first, so that the short ones fill the gaps at the end.
        blocks.sort_by_key(|block| std::cmp::Reverse(block.seen.len()));
        team.items(blocks.len() * group_sizes.len(), |item| {
            let (block, group) = (&blocks[item / group_sizes.len()], item % group_sizes.len());
            let (first_head, size) = (self.first_heads[group], group_sizes[group]);
            let count = block.tokens.len();
            let queries = count * size;
            if queries == 0 {
                return;
            }
            let cols = first_head * head_dim..(first_head + size) * head_dim;
            let sights: Vec<sys::fk_sight> = (0..queries)
                .map(|i| {
                    let position = block.seen.end - count + i / size;
                    sys::fk_sight {
                        begin: scores.first_seen(position) - block.seen.start,
                        end: position + 1 - block.seen.start,
                    }
                })
                .collect();
            let kv = self.kv(&spans[block.span], group, block.seen.start / KV_BLOCK);
            let scratch_len = self.scratch_len(&sights);
            with_scratch(scratch_len + 2 * queries * head_dim, |scratch| {
                let (scratch, rest) = scratch.split_at_mut(scratch_len);
                let (gathered, result) = rest.split_at_mut(queries * head_dim);
                for (gathered, t) in gathered
                    .chunks_exact_mut(cols.len())
                    .zip(block.tokens.clone())
                {
                    let q = &self.q[t * self.width..][..self.width];
                    gathered.copy_from_slice(&q[cols.clone()]);
                }
                self.attend(gathered, &sights, &kv, result, None, scratch);
                // SAFETY: every item is handed out once, and has its own tokens and heads; these begin at whole tiles, if it is a
                // sink, as `attention` has seen to for heads, and blocks of tokens of a single sequence do.
                unsafe { self.put(out, block.tokens.clone(), cols.clone(), result) };
            });
        });
    }

    /// Tokens one by one; the positions of one that looks back on many are shared out in parts.
    fn decode(&self, team: &Team, out: &Out) {
        let AttentionShape {
            head_dim,
            group_sizes,
            spans,
            scores,
            ..
        } = self.shape;
        let heads = self.width / head_dim;
        let mut parts: Vec<Part> = Vec::new();
        // Tokens whose parts are joined, and the places of these.
        let mut joined: Vec<(usize, Range<usize>)> = Vec::new();
        let mut places = 0;
        for (s, span) in spans.iter().enumerate() {
            for token in span.tokens.clone() {
                let seen = span.first_position + token - span.tokens.start + 1;
                let first_seen = scores.first_seen(seen - 1);
                let begin = first_seen / KV_BLOCK * KV_BLOCK;
                let several = seen - begin > PART;
                let first_place = places;
                for first in (begin..seen).step_by(PART) {
                    parts.push(Part {
                        span: s,
                        token,
                        positions: first..(first + PART).min(seen),
                        unseen: first_seen.saturating_sub(first),
                        place: several.then_some(places),
                    });
                    places += usize::from(several);
                }
                if several {
                    joined.push((token, first_place..places));
                }
            }
        }
        let (mut results, mut log_sums) =
            (vec![0.0; places * self.width], vec![0.0; places * heads]);
        let shared = SharedSlice::new(&mut results);
        let shared_sums = SharedSlice::new(&mut log_sums);
        team.items(parts.len() * group_sizes.len(), |item| {
            let (part, group) = (&parts[item / group_sizes.len()], item % group_sizes.len());
            let (first, size) = (self.first_heads[group], group_sizes[group]);
            if size == 0 {
                return;
            }
            let cols = first * head_dim..(first + size) * head_dim;
            let q = &self.q[part.token * self.width..][cols.clone()];
            let sight = sys::fk_sight {
                begin: part.unseen,
                end: part.positions.len(),
            };
            let sights = vec![sight; size];
            let kv = self.kv(&spans[part.span], group, part.positions.start / KV_BLOCK);
            let scratch_len = self.scratch_len(&sights);
            let Some(place) = part.place else {
                with_scratch(scratch_len + cols.len(), |scratch| {
                    let (scratch, result) = scratch.split_at_mut(scratch_len);
                    self.attend(q, &sights, &kv, result, None, scratch);
                    // SAFETY: every item is handed out once, and has its own token and heads.
                    unsafe { self.put(out, part.token..part.token + 1, cols.clone(), result) };
                });
                return;
            };
            let at = place * self.width;
            // SAFETY: every item is handed out once, and has its own place and heads.
            let (result, sums) = unsafe {
                (
                    shared.range(at + cols.start..at + cols.end),
                    shared_sums.range(place * heads + first..place * heads + first + size),
                )
            };
            with_scratch(scratch_len, |scratch| {
                self.attend(q, &sights, &kv, result, Some(sums), scratch);
            });
        });
        team.items(joined.len(), |i| {
            let (token, places) = &joined[i];
            let whole = self.join(
                &results[places.start * self.width..places.end * self.width],
                &log_sums[places.start * heads..places.end * heads],
            );
            // SAFETY: every item is handed out once, and has its own token.
            unsafe { self.put(out, *token..token + 1, 0..self.width, &whole) };
        });
    }

    /// What a token sees, `[heads, head_dim]`, of what it sees in parts `[parts, heads, head_dim]` and the logarithms of these'
    /// sums `[parts, heads]`.
    fn join(&self, results: &[f32], log_sums: &[f32]) -> Vec<f32> {
        let head_dim = self.shape.head_dim;
        let heads = self.width / head_dim;
        let mut joined = vec![0.0; self.width];
        for (head, joined) in joined.chunks_exact_mut(head_dim).enumerate() {
            let sums = || log_sums.iter().skip(head).step_by(heads);
            let peak = sums().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = sums().map(|sum| (sum - peak).exp()).sum();
            for (part, sum) in sums().enumerate() {
                let share = (sum - peak).exp() / total;
                let result = &results[part * self.width + head * head_dim..][..head_dim];
                for (j, r) in joined.iter_mut().zip(result) {
                    *j += share * r;
                }
            }
        }
        joined
    }

    /// Puts results `[tokens.len(), cols.len()]` in their place.
    ///
    /// # Safety
    /// The same as of [`SharedSlice::range`] or [`Sink::put`].
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

    /// Floats of scratch that [`Job::attend`] needs.
    fn scratch_len(&self, sights: &[sys::fk_sight]) -> usize {
        let most = sights.iter().map(|sight| sight.end).max().unwrap_or(0);
        let AttentionShape {
            phase, head_dim, ..
        } = self.shape;
        // SAFETY: the function has no preconditions.
        unsafe {
            call!(
                self.kernels,
                attend_scratch(phase.to_sys(), sights.len(), head_dim, most)
            )
        }
    }

    /// Queries `[sights.len(), head_dim]` of one KV head.
    fn attend(
        &self,
        q: &[f32],
        sights: &[sys::fk_sight],
        kv: &sys::fk_kv_head,
        out: &mut [f32],
        log_sums: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let (queries, head_dim) = (sights.len(), kv.head_dim);
        assert!(q.len() == queries * head_dim && out.len() == q.len());
        assert!(sights.iter().all(|sight| sight.begin < sight.end));
        assert!(scratch.len() >= self.scratch_len(sights));
        let Scores { scale, cap, .. } = self.shape.scores;
        let log_sums = log_sums.map_or(std::ptr::null_mut(), |sums| {
            assert_eq!(sums.len(), queries);
            sums.as_mut_ptr()
        });
        // SAFETY: q and out hold `queries` vectors, and log_sums as many numbers if it is not null; the blocks hold the
        // positions that any query sees, and this head's keys and values lie inside of each, as `Job::new` has checked; the
        // scratch is as long as asked for.
        unsafe {
            call!(
                self.kernels,
                attend(
                    self.shape.phase.to_sys(),
                    q.as_ptr(),
                    queries,
                    sights.as_ptr(),
                    kv,
                    scale,
                    cap.unwrap_or(0.0),
                    out.as_mut_ptr(),
                    log_sums,
                    scratch.as_mut_ptr()
                )
            );
        }
    }
}
