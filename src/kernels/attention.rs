//! Causal attention of a batch of tokens to a KV cache.

use half::f16;

use super::team::SharedSlice;
use super::{Kernels, Team, call, sys, with_scratch};

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
/// q and out are `[tokens, heads, head_dim]`; keys and values `[kv_heads, capacity, head_dim]`, filled up to the last token.
///
/// # Panics
/// If a shape does not fit.
pub fn attention(
    kernels: Kernels,
    team: &Team,
    shape: AttentionShape,
    q: &[f32],
    keys: &[f16],
    values: &[f16],
    out: &mut [f32],
) {
    let AttentionShape {
        head_dim,
        group_sizes,
        capacity,
        first_position,
        tokens,
    } = shape;
    let heads: usize = group_sizes.iter().sum();
    let width = heads * head_dim;
    let plane = capacity * head_dim;
    assert!(q.len() == tokens * width && out.len() == q.len(), "queries");
    assert!(
        keys.len() == group_sizes.len() * plane && values.len() == keys.len(),
        "cache"
    );
    assert!(first_position + tokens <= capacity, "positions");

    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut first_heads = Vec::with_capacity(group_sizes.len());
    let mut next = 0;
    for size in group_sizes {
        first_heads.push(next);
        next += size;
    }
    let out = SharedSlice::new(out);
    // The same for any number of threads, so that results do not depend on it.
    let tokens_per_block = kernels.table().attend_tokens;
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
        let at = |token: usize| (first_token + token) * width + first_heads[group] * head_dim;
        let visible: Vec<usize> = (0..queries)
            .map(|i| first_position + first_token + i / size + 1)
            .collect();
        let kv = sys::fk_kv_head {
            keys: keys[group * plane..].as_ptr().cast(),
            values: values[group * plane..].as_ptr().cast(),
            head_dim,
        };
        // SAFETY: the function has no preconditions.
        let scratch_len = unsafe {
            call!(
                kernels,
                attend_scratch(queries, head_dim, visible[queries - 1])
            )
        };
        with_scratch(scratch_len + 2 * queries * head_dim, |scratch| {
            let (scratch, rest) = scratch.split_at_mut(scratch_len);
            let (gathered, result) = rest.split_at_mut(queries * head_dim);
            for token in 0..count {
                gathered[token * span..(token + 1) * span].copy_from_slice(&q[at(token)..][..span]);
            }
            // SAFETY: queries and result hold `queries` vectors; the head's keys and values hold `capacity` positions,
            // and no query sees more than that; the scratch is as long as asked for.
            unsafe {
                call!(
                    kernels,
                    attend(
                        gathered.as_ptr(),
                        queries,
                        visible.as_ptr(),
                        &kv,
                        scale,
                        result.as_mut_ptr(),
                        scratch.as_mut_ptr()
                    )
                );
            }
            for token in 0..count {
                // SAFETY: every item is handed out once, and has its own tokens and heads.
                let to = unsafe { out.range(at(token)..at(token) + span) };
                to.copy_from_slice(&result[token * span..(token + 1) * span]);
            }
        });
    });
}
