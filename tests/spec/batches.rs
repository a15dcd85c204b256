//! Batches of many sequences: what comes out for a sequence does not depend on the others, and blocks of the KV cache are
//! shared.

use crate::common::Random;
use crate::common::synthetic::{
    Shape, Synthetic, each_runtime, logits_in_pieces, logits_of_rows, runtime,
};
use flapjack::kernels::{KV_BLOCK, Phase, Runtime};
use flapjack::model::{Batch, CacheType, KvCache, KvPool, Model, ModelError, Row};
use flapjack::model::{Scratch, Unobserved};
use flapjack::quant::BlockType;

/// Widths that fill groups, types of every kind, heads of whole tiles and others.
fn models() -> Vec<Model> {
    let shape = |block_type, head_dim| Shape {
        block_type,
        head_dim,
        rope_dim: head_dim,
        ..Shape::default()
    };
    [
        shape(BlockType::Q4_0, 32),
        shape(BlockType::F16, 32),
        shape(BlockType::F32, 16),
    ]
    .into_iter()
    .map(|shape| Synthetic::new(shape).load())
    .collect()
}

/// As they lie in the file, and packed.
fn layouts(model: &mut Model, runtime: &Runtime, mut check: impl FnMut(&Model)) {
    check(model);
    model.pack(runtime);
    check(model);
    model.unpack(runtime);
}

fn text(seed: u64, n: usize) -> Vec<u32> {
    Random::new(seed).tokens(n, Shape::default().vocabulary)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn how_a_prompt_is_cut_changes_nothing() {
    let tokens = text(1, 150);
    for (runtime, _) in each_runtime(2, 0.0) {
        for mut model in models() {
            layouts(&mut model, &runtime, |model| {
                let cut = |sizes: &[usize]| {
                    let pieces: Vec<_> = sizes.iter().map(|n| (*n, Phase::Prefill)).collect();
                    bits(&logits_in_pieces(model, &runtime, &tokens, &pieces))
                };
                let whole = cut(&[150]);
                for sizes in [&[149, 1][..], &[1, 149], &[63, 1, 1, 85], &[17, 3, 64, 66]] {
                    assert!(
                        cut(sizes) == whole,
                        "{:?}, {sizes:?}",
                        runtime.kernels.isa()
                    );
                }
            });
        }
    }
}

#[test]
fn a_sequence_among_others_is_what_it_is_alone() {
    // Prompts of one to many blocks; some begin later, some end earlier.
    let prompts: Vec<Vec<u32>> = [3, 150, 64, 1, 65, 17].map(|n| text(n as u64, n)).into();
    let answers: Vec<Vec<u32>> = (0..6).map(|i| text(100 + i, 7 + i as usize)).collect();
    for (runtime, _) in each_runtime(2, 0.0) {
        for mut model in models() {
            layouts(&mut model, &runtime, |model| {
                let alone: Vec<Vec<u32>> = (0..6)
                    .map(|s| {
                        let all = [&prompts[s][..], &answers[s]].concat();
                        let mut pieces = vec![(prompts[s].len(), Phase::Prefill)];
                        pieces.extend(answers[s].iter().map(|_| (1, Phase::Decode)));
                        let logits = logits_in_pieces(model, &runtime, &all, &pieces);
                        // Those of generated tokens, which are computed in the decode phase here too.
                        bits(&logits[prompts[s].len() * model.config.vocabulary..])
                    })
                    .collect();
                let together = interleaved(model, &runtime, &prompts, &answers);
                for s in 0..6 {
                    assert!(
                        together[s] == alone[s],
                        "{:?}, sequence {s}",
                        runtime.kernels.isa()
                    );
                }
            });
        }
    }
}

/// The logits of all generated tokens of sequences that begin at different steps, whose prompts go in by pieces of 40 tokens
/// among the others' tokens.
fn interleaved(
    model: &Model,
    runtime: &Runtime,
    prompts: &[Vec<u32>],
    answers: &[Vec<u32>],
) -> Vec<Vec<u32>> {
    let pool = KvPool::new(model, CacheType::F16).unwrap();
    let mut caches: Vec<KvCache> = prompts.iter().map(|_| pool.cache(300)).collect();
    let mut got = vec![Vec::new(); prompts.len()];
    for step in 0.. {
        let mut batch = Batch::new();
        let mut generating = Vec::new();
        // The last first, so that sequences are not in the order of their numbers.
        for s in (0..prompts.len()).rev().filter(|s| step >= 2 * s) {
            let (len, prompt) = (caches[s].len(), &prompts[s]);
            if len < prompt.len() {
                let piece = &prompt[len..prompt.len().min(len + 40)];
                batch.add_prompt(s, len, piece, 0..0);
            } else if let Some(token) = answers[s].get(len - prompt.len()) {
                batch.add_generated(s, len, *token);
                generating.push(s);
            }
        }
        if batch.rows().is_empty() {
            return got;
        }
        let mut sequences: Vec<&mut KvCache> = caches.iter_mut().collect();
        let logits = logits_of_rows(model, runtime, batch.rows(), &mut sequences, Phase::Decode);
        for (s, logits) in generating
            .iter()
            .zip(logits.chunks_exact(model.config.vocabulary))
        {
            got[*s].extend(bits(logits));
        }
        // What has ended gives its blocks back while the others go on.
        for s in 0..prompts.len() {
            if caches[s].len() == prompts[s].len() + answers[s].len() {
                assert!(caches[s].bytes() > 0);
            }
        }
    }
    unreachable!("the steps do not end")
}

#[test]
fn a_batch_that_cannot_go_through_changes_nothing() {
    let model = Synthetic::new(Shape::default()).load();
    let runtime = runtime(1);
    let pool = KvPool::with_limit(&model, CacheType::F16, 2).unwrap();
    let (mut a, mut b) = (pool.cache(4), pool.cache(200));
    let forward = |rows: &[Row], a: &mut KvCache, b: &mut KvCache| {
        runtime.region(|team| {
            let sequences = &mut [a, b];
            model.forward(team, rows, sequences, &mut Scratch::new(), &mut Unobserved)
        })
    };
    let mut batch = Batch::new();
    batch.add_prompt(0, 0, &[1, 2], 0..0);
    batch.add_prompt(1, 0, &[1, 2, 3], 2..3);
    forward(batch.rows(), &mut a, &mut b).unwrap();
    assert_eq!((a.len(), b.len(), pool.used_blocks()), (2, 3, 2));

    // A position that does not follow.
    batch.clear();
    batch.add_generated(0, 2, 1);
    batch.add_generated(1, 4, 1);
    let error = forward(batch.rows(), &mut a, &mut b).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Position {
                sequence: 1,
                expected: 3,
                found: 4
            }
        ),
        "{error}"
    );
    // A sequence that may not grow.
    batch.clear();
    batch.add_prompt(1, 3, &[1; 20], 0..0);
    batch.add_prompt(0, 2, &[1; 3], 0..0);
    let error = forward(batch.rows(), &mut a, &mut b).unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::CacheFull {
                needed: 5,
                capacity: 4
            }
        ),
        "{error}"
    );
    // A pool that has no more.
    batch.clear();
    batch.add_generated(0, 2, 1);
    batch.add_prompt(1, 3, &[1; 100], 0..0);
    let error = forward(batch.rows(), &mut a, &mut b).unwrap_err();
    assert!(
        matches!(error, ModelError::PoolFull { blocks: 2 }),
        "{error}"
    );
    assert_eq!((a.len(), b.len(), pool.used_blocks()), (2, 3, 2));
    // What ends makes room at once.
    drop(b);
    assert_eq!(pool.used_blocks(), 1);
    let mut c = pool.cache(200);
    batch.clear();
    batch.add_generated(0, 2, 1);
    batch.add_prompt(1, 0, &[1; 64], 0..0);
    forward(batch.rows(), &mut a, &mut c).unwrap();
    assert_eq!((a.len(), c.len(), pool.blocks_left()), (3, 64, 0));
}

#[test]
fn a_cache_of_a_model_of_other_widths_is_refused() {
    let shape = |kv_heads| Shape {
        kv_heads,
        ..Shape::default()
    };
    let whole = Synthetic::new(shape(vec![2, 2])).load();
    let pruned = Synthetic::new(shape(vec![2, 1])).load();
    let runtime = runtime(1);
    let mut cache = KvCache::new(&whole, 10);
    let mut batch = Batch::new();
    batch.add_prompt(0, 0, &[1, 2], 0..0);
    let sequences = &mut [&mut cache];
    let error = runtime
        .region(|team| {
            let scratch = &mut Scratch::new();
            pruned.forward(team, batch.rows(), sequences, scratch, &mut Unobserved)
        })
        .unwrap_err();
    assert!(matches!(error, ModelError::CacheShape), "{error}");
    assert!(cache.is_empty());
}

#[test]
fn memory_is_taken_as_positions_are_filled() {
    let model = Synthetic::new(Shape::default()).load();
    let runtime = runtime(1);
    let mut cache = KvCache::new(&model, usize::MAX);
    assert_eq!(cache.bytes(), 0);
    let tokens = text(2, 130);
    let mut batch = Batch::new();
    batch.add_prompt(0, 0, &tokens, 0..0);
    logits_of_rows(
        &model,
        &runtime,
        batch.rows(),
        &mut [&mut cache],
        Phase::Prefill,
    );
    let pool = KvPool::new(&model, CacheType::F16).unwrap();
    assert_eq!(cache.bytes(), 3 * pool.block_bytes());
    cache.truncate(64);
    assert_eq!(cache.bytes(), pool.block_bytes());
    cache.truncate(0);
    assert_eq!((cache.len(), cache.bytes()), (0, 0));
}

#[test]
fn a_copy_shares_its_blocks_until_it_writes() {
    let model = Synthetic::new(Shape::default()).load();
    let runtime = runtime(1);
    let pool = KvPool::new(&model, CacheType::F16).unwrap();
    let (tokens, ends) = (text(3, 100), [text(4, 30), text(5, 30)]);
    let feed = |cache: &mut KvCache, tokens: &[u32]| {
        let mut batch = Batch::new();
        batch.add_prompt(0, cache.len(), tokens, tokens.len() - 1..tokens.len());
        bits(&logits_of_rows(
            &model,
            &runtime,
            batch.rows(),
            &mut [cache],
            Phase::Decode,
        ))
    };
    let mut original = pool.cache(200);
    feed(&mut original, &tokens);
    assert_eq!(pool.used_blocks(), 2);
    let mut copy = original.clone();
    assert_eq!(pool.used_blocks(), 2);
    // The half-filled block is copied, the full one is not.
    let of_copy = feed(&mut copy, &ends[1]);
    assert_eq!(pool.used_blocks(), 4);
    let of_original = feed(&mut original, &ends[0]);
    for (end, got) in ends.iter().zip([of_original, of_copy]) {
        let mut whole = pool.cache(200);
        assert_eq!(feed(&mut whole, &[&tokens[..], end].concat()), got);
    }
}

#[test]
fn a_common_beginning_is_computed_and_kept_once() {
    let model = Synthetic::new(Shape::default()).load();
    let runtime = runtime(1);
    let pool = KvPool::new(&model, CacheType::F16).unwrap();
    let tokens = text(6, 200);
    let feed = |cache: &mut KvCache, tokens: &[u32]| {
        let mut batch = Batch::new();
        let first = cache.len();
        let rest = &tokens[first..];
        batch.add_prompt(0, first, rest, rest.len() - 1..rest.len());
        let logits = logits_of_rows(
            &model,
            &runtime,
            batch.rows(),
            &mut [&mut *cache],
            Phase::Decode,
        );
        cache.share(tokens);
        bits(&logits)
    };
    let mut first = pool.cache_for(&tokens, 300);
    assert_eq!(first.len(), 0);
    let expected = feed(&mut first, &tokens);

    let mut second = pool.cache_for(&tokens, 300);
    assert_eq!(second.len(), 3 * KV_BLOCK);
    assert_eq!(pool.used_blocks(), 4);
    assert_eq!(feed(&mut second, &tokens), expected);
    assert_eq!(pool.used_blocks(), 5);

    // Another text has what is the same at its beginning, in whole blocks.
    let mut other = tokens.clone();
    other[130] ^= 1;
    assert_eq!(pool.cache_for(&other, 300).len(), 2 * KV_BLOCK);
    other[0] ^= 1;
    assert_eq!(pool.cache_for(&other, 300).len(), 0);
    // The last token is always left to be computed.
    assert_eq!(pool.cache_for(&tokens[..128], 300).len(), KV_BLOCK);
    // What nobody holds any more is gone.
    drop((first, second));
    assert_eq!(pool.used_blocks(), 0);
    assert_eq!(pool.cache_for(&tokens, 300).len(), 0);
}
