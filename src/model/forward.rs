//! The forward pass.
//!
//! Shapes in the comments: n tokens of the batch, d the width of the residual stream, h heads, g KV heads, e values per
//! head, c channels.

use std::ops::Range;

use super::{KvCache, Layer, Linear, Model, ModelError};
use crate::kernels::{
    Activations, AttentionShape, Keep, Kernels, MatrixView, Precision, Product, Team, attention,
    attention_for, matmul, matmul_add, matmul_silu, matmul_then,
};

/// Looks at the inputs of the two projections that lose columns when a model is pruned.
pub trait Observer {
    /// x `[n, h e]`: the input of a layer's attention output projection.
    fn attention_output(&mut self, team: &Team, layer: usize, x: &Activations);
    /// x `[n, c]`: the input of a layer's MLP down projection.
    fn mlp_down(&mut self, team: &Team, layer: usize, x: &Activations);
    /// What it looks at. Where that is moments, the inputs may bring plain values.
    fn keeps(&self) -> Keep {
        Keep::Values
    }
}

/// Looks at nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn attention_output(&mut self, _: &Team, _: usize, _: &Activations) {}
    fn mlp_down(&mut self, _: &Team, _: usize, _: &Activations) {}
    fn keeps(&self) -> Keep {
        Keep::Nothing
    }
}

/// The buffers of a forward pass; they grow to the largest batch they have seen and are used again.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The residual stream, `[n, d]`.
    x: Vec<f32>,
    /// The input of the matrices at hand.
    input: Activations,
    /// `[n, h e]`
    q: Vec<f32>,
    /// `[n, g e]`
    k: Vec<f32>,
    /// `[n, g e]`
    v: Vec<f32>,
    /// The input of MLP down, `[n, c]`.
    hidden: Activations,
}

impl Scratch {
    pub fn new() -> Self {
        Self::default()
    }

    /// The residual stream of the last batch, `[n, d]`.
    pub(crate) fn residual(&self) -> &[f32] {
        &self.x
    }

    /// Puts a residual stream `[n, d]` in its place.
    pub(crate) fn set_residual(&mut self, x: &[f32]) {
        self.x.clear();
        self.x.extend_from_slice(x);
    }
}

impl Model {
    /// Takes the next tokens through all layers: their keys and values go into the cache, and the residual stream of each
    /// token, `[n, d]`, stays in `scratch` for [`Model::logits`].
    ///
    /// # Errors
    /// If a token is not in the vocabulary or the cache is too small; nothing has then changed.
    ///
    /// # Panics
    /// If the cache was made for a model of another shape.
    pub fn forward(
        &self,
        team: &Team,
        tokens: &[u32],
        cache: &mut KvCache,
        scratch: &mut Scratch,
        observer: &mut impl Observer,
    ) -> Result<(), ModelError> {
        self.forward_texts(team, tokens, &mut [cache], scratch, observer)
    }

    /// As [`Model::forward`], for several texts at once, which read the weights once for all. Every text has its own cache,
    /// and equally many of the tokens, one text's behind the other's.
    ///
    /// # Errors
    /// As [`Model::forward`].
    ///
    /// # Panics
    /// As [`Model::forward`]; also if the tokens cannot be shared out evenly.
    pub fn forward_texts(
        &self,
        team: &Team,
        tokens: &[u32],
        caches: &mut [&mut KvCache],
        scratch: &mut Scratch,
        observer: &mut impl Observer,
    ) -> Result<(), ModelError> {
        assert!(tokens.len().is_multiple_of(caches.len()), "even shares");
        let each = tokens.len() / caches.len();
        for cache in caches.iter() {
            let needed = cache.len() + each;
            if needed > cache.capacity() {
                return Err(ModelError::CacheFull {
                    needed,
                    capacity: cache.capacity(),
                });
            }
        }
        self.embed(team, tokens, scratch)?;
        let all = 0..2 * self.layers.len();
        self.blocks(team, all, caches, scratch, observer);
        for cache in caches {
            cache.advance(each);
        }
        Ok(())
    }

    /// Begins a batch: the residual stream is the tokens' embeddings.
    ///
    /// # Errors
    /// If a token is not in the vocabulary.
    pub(crate) fn embed(
        &self,
        team: &Team,
        tokens: &[u32],
        scratch: &mut Scratch,
    ) -> Result<(), ModelError> {
        let (d, vocabulary) = (self.config.embedding_length, self.config.vocabulary);
        if let Some(place) = tokens.iter().position(|t| *t as usize >= vocabulary) {
            return Err(ModelError::Token {
                token: tokens[place],
                place,
                vocabulary,
            });
        }
        scratch.x.resize(tokens.len() * d, 0.0);
        team.chunks_mut(&mut scratch.x, d, |i, row| {
            self.embedding
                .decode_row(&self.map, tokens[i] as usize, row);
        });
        Ok(())
    }

    /// Takes the residual stream in `scratch` through some blocks: block 2 l is the attention and 2 l + 1 the MLP of layer l.
    /// Its tokens are shared out evenly among the caches, one text's behind the other's, and follow those in each, which takes
    /// on their keys and values but does not yet count them.
    ///
    /// # Panics
    /// If a cache was made for a model of another shape or has no room.
    pub(crate) fn blocks(
        &self,
        team: &Team,
        blocks: Range<usize>,
        caches: &mut [&mut KvCache],
        scratch: &mut Scratch,
        observer: &mut impl Observer,
    ) {
        let each = scratch.x.len() / self.config.embedding_length / caches.len();
        for block in blocks {
            let (l, layer) = (block / 2, &self.layers[block / 2]);
            if block.is_multiple_of(2) {
                // x += o(attention(rope(q), rope(k), v)) of norm(x)
                let (norm, readers) = (&layer.attention_norm, [&layer.q, &layer.k, &layer.v]);
                // 8 bits harm queries and keys more than all else; see docs/speed.md.
                self.norm(team, norm, &readers, Precision::High, scratch);
                self.project_qkv(team, layer, each, caches, scratch);
                self.remember(team, layer, l, caches, scratch);
                self.attend(team, layer, l, caches, observer.keeps(), scratch);
                observer.attention_output(team, l, &scratch.input);
                self.add_projected(team, &layer.o, &mut scratch.input, &mut scratch.x);
            } else {
                // x += down(silu(gate(y)) * up(y)) of y = norm(x)
                let (norm, readers) = (&layer.mlp_norm, [&layer.gate, &layer.up]);
                self.norm(team, norm, &readers, Precision::Normal, scratch);
                self.gate_and_up(team, layer, observer.keeps(), scratch);
                observer.mlp_down(team, l, &scratch.hidden);
                self.add_projected(team, &layer.down, &mut scratch.hidden, &mut scratch.x);
            }
        }
    }

    /// The logits `[rows.len(), vocabulary]` of some of the last batch's tokens.
    ///
    /// # Panics
    /// If the last batch had no such rows.
    pub fn logits(
        &self,
        team: &Team,
        rows: Range<usize>,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) {
        let d = self.config.embedding_length;
        let weights = self.head().view(&self.map);
        let Scratch { x, input, .. } = scratch;
        let x = &x[rows.start * d..rows.end * d];
        let (norm, precision) = (&self.output_norm, Precision::Normal);
        self.normalise(team, x, norm, &[weights], precision, input);
        out.resize(rows.len() * self.config.vocabulary, 0.0);
        matmul(team, input, &mut [Product { weights, out }]);
    }

    /// input = norm(x), for these projections
    fn norm(
        &self,
        team: &Team,
        weight: &[f32],
        readers: &[&Linear],
        precision: Precision,
        scratch: &mut Scratch,
    ) {
        let readers: Vec<MatrixView> = readers.iter().map(|l| l.weight.view(&self.map)).collect();
        let Scratch { x, input, .. } = scratch;
        self.normalise(team, x, weight, &readers, precision, input);
    }

    #[allow(clippy::too_many_arguments)] // an input, what is to come of it, and who computes
    fn normalise(
        &self,
        team: &Team,
        x: &[f32],
        weight: &[f32],
        readers: &[MatrixView],
        precision: Precision,
        out: &mut Activations,
    ) {
        let kernels = team.kernels();
        let (d, epsilon) = (self.config.embedding_length, self.config.rms_epsilon);
        let tokens = x.len() / d;
        out.produce(team, tokens, d, readers, precision, |t, row| {
            kernels.rms_norm(&x[t * d..][..d], weight, epsilon, row);
        });
    }

    /// q, k, v = rope(Wq input + bq), rope(Wk input + bk), Wv input + bv: every head of q and k is turned by the angles of its
    /// token's position.
    #[allow(clippy::too_many_arguments)] // a layer and its cache, what is to come of it, and who computes
    fn project_qkv(
        &self,
        team: &Team,
        layer: &Layer,
        each: usize,
        caches: &[&mut KvCache],
        scratch: &mut Scratch,
    ) {
        let kernels = team.kernels();
        let Scratch { input, q, k, v, .. } = scratch;
        let (tokens, head_dim) = (input.tokens(), self.config.head_dim);
        let linears = [&layer.q, &layer.k, &layer.v];
        let mut products = [q, k, v].into_iter().zip(linears).map(|(out, linear)| {
            out.resize(tokens * linear.weight.rows, 0.0);
            let weights = linear.weight.view(&self.map);
            Product { weights, out }
        });
        let mut products: [Product; 3] = std::array::from_fn(|_| products.next().expect("three"));
        let then = |which: usize, t: usize, rows: Range<usize>, out: &mut [f32]| {
            if let Some(bias) = &linears[which].bias {
                kernels.add(out, &bias[rows.clone()]);
            }
            if which < 2 {
                let cache = &caches[t / each];
                let angles = cache.angles().at(cache.len() + t % each);
                rotate(kernels, head_dim, angles, rows.start, out);
            }
        };
        matmul_then(team, input, &mut products, then);
    }

    /// Puts k and v into the caches, behind what is there.
    fn remember(
        &self,
        team: &Team,
        layer: &Layer,
        l: usize,
        caches: &mut [&mut KvCache],
        scratch: &Scratch,
    ) {
        let kernels = team.kernels();
        let width = layer.kv_heads() * self.config.head_dim;
        let share = scratch.k.len() / caches.len();
        let text = |i: usize| i * share..(i + 1) * share;
        // For one token waking the others would take longer than the work.
        let alone = Team::solo(team.kernels());
        match caches {
            [cache] => {
                let team = if share > width { team } else { &alone };
                cache.remember(team, l, &scratch.k, &scratch.v);
            }
            _ => team.chunks_mut(caches, 1, |i, cache| {
                let (k, v) = (&scratch.k[text(i)], &scratch.v[text(i)]);
                cache[0].remember(&Team::solo(kernels), l, k, v);
            }),
        }
    }

    /// input = attention(q, cache), each text with its own cache
    #[allow(clippy::too_many_arguments)] // a layer and its cache, what is to come of it, and who computes
    fn attend(
        &self,
        team: &Team,
        layer: &Layer,
        l: usize,
        caches: &[&mut KvCache],
        keep: Keep,
        scratch: &mut Scratch,
    ) {
        let kernels = team.kernels();
        let tokens = scratch.x.len() / self.config.embedding_length;
        let each = tokens / caches.len();
        let width = layer.heads() * self.config.head_dim;
        let Scratch { input, q, .. } = scratch;
        let shape = |cache: &KvCache| AttentionShape {
            head_dim: self.config.head_dim,
            group_sizes: &layer.group_sizes,
            capacity: cache.capacity(),
            first_position: cache.len(),
            tokens: each,
        };
        if let [cache] = caches {
            let (keys, values) = cache.layer(l);
            let readers = [layer.o.weight.view(&self.map)];
            let shape = shape(cache);
            attention_for(team, shape, q, keys, values, input, &readers, keep);
            return;
        }
        let out = input.begin(tokens, width);
        team.chunks_mut(out, each * width, |i, out| {
            let q = &q[i * each * width..][..each * width];
            let (keys, values) = caches[i].layer(l);
            let shape = shape(caches[i]);
            attention(&Team::solo(kernels), shape, q, keys, values, out);
        });
    }

    /// hidden = silu(gate(input)) * up(input)
    fn gate_and_up(&self, team: &Team, layer: &Layer, keep: Keep, scratch: &mut Scratch) {
        let Scratch { input, hidden, .. } = scratch;
        let [gate, up] = [&layer.gate, &layer.up]
            .map(|linear| (linear.weight.view(&self.map), linear.bias.as_deref()));
        let readers = [layer.down.weight.view(&self.map)];
        matmul_silu(team, input, gate, up, hidden, &readers, keep);
    }

    /// x += linear(input)
    fn add_projected(&self, team: &Team, linear: &Linear, input: &mut Activations, x: &mut [f32]) {
        let (weights, bias) = (linear.weight.view(&self.map), linear.bias.as_deref());
        matmul_add(team, input, weights, bias, x);
    }
}

/// Turns values of one token, the first of which is number `first` of all its heads', by the angles of its position. They begin
/// and end at pairs.
fn rotate(
    kernels: Kernels,
    head_dim: usize,
    (cosines, sines): (&[f32], &[f32]),
    first: usize,
    mut values: &mut [f32],
) {
    let mut place = first % head_dim;
    while !values.is_empty() {
        let count = values.len().min(head_dim - place);
        let (head, rest) = values.split_at_mut(count);
        let begin = (place / 2).min(cosines.len());
        let end = (begin + count / 2).min(cosines.len());
        kernels.rope(head, &cosines[begin..end], &sines[begin..end]);
        (values, place) = (rest, 0);
    }
}
