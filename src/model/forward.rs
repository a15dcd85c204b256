//! The forward pass.
//!
//! A batch is rows of any sequences: prompts in pieces, and generated tokens one by one. What a row's numbers are depends on
//! its sequence and its phase alone, not on the other rows nor on how a prompt was cut: all arithmetic is row by row, but for
//! matrix products and attention, whose kernels sum a row's terms in an order that is fixed for a phase. Prompts and generated
//! tokens have different kernels for speed, so that the rows of each phase go through the layers together, one phase after the
//! other.
//!
//! Shapes in the comments: n rows, d the width of the residual stream, h heads, g KV heads, e values per head, c channels.

use std::ops::Range;

use super::loss::fast_exp;
use super::{KvCache, Layer, Linear, Model, ModelError, Module, ModuleId, Rope, Rotation};
use crate::kernels::{
    Activations, AttentionShape, Keep, Kernels, MatrixView, Phase, Precision, Product, Scores,
    Span, Team, Tokens, attention, matmul, matmul_add, matmul_gated, matmul_then,
};

/// A token of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub token: u32,
    /// Which of the batch's sequences it belongs to.
    pub sequence: usize,
    /// Its position there, which follows the sequence's last one.
    pub position: usize,
    pub phase: Phase,
    pub wants_logits: bool,
}

/// Rows of a batch in the making.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    rows: Vec<Row>,
}

impl Batch {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn clear(&mut self) {
        self.rows.clear();
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Adds tokens of a prompt, from a position of their sequence on; `wanted` are the places among them of those whose logits
    /// are wanted.
    pub fn add_prompt(
        &mut self,
        sequence: usize,
        first_position: usize,
        tokens: &[u32],
        wanted: Range<usize>,
    ) {
        self.rows
            .extend(tokens.iter().enumerate().map(|(i, &token)| Row {
                token,
                sequence,
                position: first_position + i,
                phase: Phase::Prefill,
                wants_logits: wanted.contains(&i),
            }));
    }

    /// Adds a generated token, whose logits are wanted.
    pub fn add_generated(&mut self, sequence: usize, position: usize, token: u32) {
        self.rows.push(Row {
            token,
            sequence,
            position,
            phase: Phase::Decode,
            wants_logits: true,
        });
    }
}

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
    /// The rows of it behind the last layer whose logits are wanted, `[wanted, d]`.
    wanted: Vec<f32>,
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
    /// What a module leaves, where a norm follows, `[n, d]`.
    output: Vec<f32>,
}

impl Scratch {
    pub fn new() -> Self {
        Self::default()
    }

    /// The residual stream, `[n, d]`.
    pub(crate) fn residual(&self) -> &[f32] {
        &self.x
    }

    /// Puts a residual stream `[n, d]` in its place.
    pub(crate) fn set_residual(&mut self, x: &[f32]) {
        self.x.clear();
        self.x.extend_from_slice(x);
    }

    /// Drops all rows of the residual stream but these.
    pub(crate) fn keep_rows(&mut self, rows: Range<usize>, width: usize) {
        self.x.truncate(rows.end * width);
        self.x.drain(..rows.start * width);
    }

    /// Asks for the logits of some rows of the residual stream, which is behind the last layer, and of no others.
    pub(crate) fn want(&mut self, rows: Range<usize>, width: usize) {
        self.wanted.clear();
        self.wanted
            .extend_from_slice(&self.x[rows.start * width..rows.end * width]);
    }
}

/// Neighbouring rows of one sequence at neighbouring positions.
#[derive(Debug, Clone)]
struct Stretch {
    sequence: usize,
    rows: Range<usize>,
    first_position: usize,
}

/// The rows of one phase on their way through the layers.
struct Pass<'a, 'c> {
    phase: Phase,
    /// All rows, in their order.
    stretches: Vec<Stretch>,
    sequences: &'a mut [&'c mut KvCache],
}

impl Pass<'_, '_> {
    fn tokens(&self) -> Tokens {
        Tokens {
            count: self.stretches.last().map_or(0, |s| s.rows.end),
            phase: self.phase,
        }
    }

    /// Cosines and sines of the angles that each row's heads are turned by, `[n]`.
    fn angles<'r>(&self, rope: &'r Rope) -> Vec<(&'r [f32], &'r [f32])> {
        let each = |s: &Stretch| {
            let angles = rope.within(self.sequences[s.sequence].capacity());
            let positions = s.first_position..s.first_position + s.rows.len();
            positions.map(|position| angles.at(position))
        };
        self.stretches.iter().flat_map(each).collect()
    }
}

impl Model {
    /// Takes a batch through all layers. The rows' keys and values go into the caches of their sequences, and the residual
    /// streams of those whose logits are wanted stay in `scratch` for [`Model::logits`], in the batch's order.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, a row's position does not follow its sequence's last one (of each sequence the
    /// prefill rows come first), or a cache has no room or is of a model of other widths. The sequences are then as they were.
    ///
    /// # Panics
    /// If a row is of no sequence, or the caches are not all of one kind.
    pub fn forward(
        &self,
        team: &Team,
        rows: &[Row],
        sequences: &mut [&mut KvCache],
        scratch: &mut Scratch,
        observer: &mut impl Observer,
    ) -> Result<(), ModelError> {
        let (d, vocabulary) = (self.config.embedding_length, self.config.vocabulary);
        if let Some(place) = rows.iter().position(|r| r.token as usize >= vocabulary) {
            return Err(ModelError::Token {
                token: rows[place].token,
                place,
                vocabulary,
            });
        }
        let alike = |cache: &&mut KvCache| cache.is_like(sequences[0]);
        assert!(sequences.iter().all(alike), "caches of one kind");
        if sequences.first().is_some_and(|cache| !cache.is_of(self)) {
            return Err(ModelError::CacheShape);
        }
        let phases = [Phase::Prefill, Phase::Decode];
        let of_phase = |phase| rows.iter().filter(move |r: &&Row| r.phase == phase);
        let mut next: Vec<usize> = sequences.iter().map(|cache| cache.len()).collect();
        for row in phases.into_iter().flat_map(of_phase) {
            if row.position != next[row.sequence] {
                return Err(ModelError::Position {
                    sequence: row.sequence,
                    expected: next[row.sequence],
                    found: row.position,
                });
            }
            next[row.sequence] += 1;
        }
        for i in 0..sequences.len() {
            if let Err(error) = sequences[i].reserve(next[i] - sequences[i].len()) {
                for cache in sequences.iter_mut() {
                    cache.truncate(cache.len());
                }
                return Err(error);
            }
        }

        let places: Vec<usize> = (0..rows.len()).filter(|i| rows[*i].wants_logits).collect();
        scratch.wanted.resize(places.len() * d, 0.0);
        for phase in phases {
            let numbers: Vec<usize> = (0..rows.len())
                .filter(|i| rows[*i].phase == phase)
                .collect();
            if numbers.is_empty() {
                continue;
            }
            let token = |i: usize| rows[numbers[i]].token;
            self.embed_rows(team, numbers.len(), token, scratch);
            let pass = &mut Pass {
                phase,
                stretches: stretches(numbers.iter().map(|i| &rows[*i])),
                sequences,
            };
            let all = ModuleId::all(self.layers.len());
            self.pass_through(team, all, pass, scratch, observer);
            for (wanted, place) in scratch.wanted.chunks_exact_mut(d).zip(&places) {
                if let Ok(i) = numbers.binary_search(place) {
                    wanted.copy_from_slice(&scratch.x[i * d..(i + 1) * d]);
                }
            }
        }
        for (cache, next) in sequences.iter_mut().zip(next) {
            cache.advance(next - cache.len());
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
        let vocabulary = self.config.vocabulary;
        if let Some(place) = tokens.iter().position(|t| *t as usize >= vocabulary) {
            return Err(ModelError::Token {
                token: tokens[place],
                place,
                vocabulary,
            });
        }
        self.embed_rows(team, tokens.len(), |i| tokens[i], scratch);
        Ok(())
    }

    fn embed_rows(
        &self,
        team: &Team,
        rows: usize,
        token: impl Fn(usize) -> u32 + Sync,
        scratch: &mut Scratch,
    ) {
        let (d, scale) = (self.config.embedding_length, self.config.embedding_scale);
        scratch.x.resize(rows * d, 0.0);
        team.chunks_mut(&mut scratch.x, d, |i, row| {
            self.embedding.decode_row(&self.map, token(i) as usize, row);
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        });
    }

    /// Begins to take a prompt's tokens, which follow those in the cache, through the layers: [`Model::run_modules`] goes on with
    /// them, over all modules in order, and [`Model::end_prompt`] ends it.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the cache has no room or is of a model of other widths.
    pub(crate) fn begin_prompt(
        &self,
        team: &Team,
        tokens: &[u32],
        cache: &mut KvCache,
        scratch: &mut Scratch,
    ) -> Result<(), ModelError> {
        if !cache.is_of(self) {
            return Err(ModelError::CacheShape);
        }
        self.embed(team, tokens, scratch)?;
        cache.reserve(tokens.len())
    }

    /// Counts a prompt's tokens, which have gone through all modules, in their cache, and asks for the logits of the last `wanted`.
    pub(crate) fn end_prompt(
        &self,
        tokens: usize,
        wanted: usize,
        cache: &mut KvCache,
        scratch: &mut Scratch,
    ) {
        cache.advance(tokens);
        scratch.want(tokens - wanted..tokens, self.config.embedding_length);
    }

    /// Takes the residual stream in `scratch`, of a prompt's tokens that follow those in the cache, through some modules. The
    /// cache takes on their keys and values, but does not count them.
    ///
    /// # Errors
    /// If the cache has no room, or there is no memory for it.
    ///
    /// # Panics
    /// If the cache was made for a model of another shape.
    pub(crate) fn run_modules(
        &self,
        team: &Team,
        modules: Range<ModuleId>,
        cache: &mut KvCache,
        scratch: &mut Scratch,
        observer: &mut impl Observer,
    ) -> Result<(), ModelError> {
        let rows = scratch.x.len() / self.config.embedding_length;
        let first_position = cache.len();
        cache.reserve(rows)?;
        let pass = &mut Pass {
            phase: Phase::Prefill,
            stretches: vec![Stretch {
                sequence: 0,
                rows: 0..rows,
                first_position,
            }],
            sequences: &mut [cache],
        };
        self.pass_through(team, modules, pass, scratch, observer);
        Ok(())
    }

    /// Takes the residual stream of a pass through some modules.
    fn pass_through(
        &self,
        team: &Team,
        modules: Range<ModuleId>,
        pass: &mut Pass,
        scratch: &mut Scratch,
        observer: &mut impl Observer,
    ) {
        for module in ModuleId::each(modules) {
            let (l, layer) = (module.layer(), &self.layers[module.layer()]);
            match module.kind() {
                Module::Attention => {
                    // x += post_norm(o(attention(rope(head_norm(q)), rope(head_norm(k)), v))) of norm(x)
                    let (norm, readers) = (&layer.attention_norm, [&layer.q, &layer.k, &layer.v]);
                    // 8 bits harm queries and keys more than all else; see docs/speed.md.
                    self.norm(team, pass, norm, &readers, Precision::High, scratch);
                    self.project_qkv(team, pass, layer, scratch);
                    self.remember(team, pass, l, scratch);
                    self.attend(team, pass, l, observer.keeps(), scratch);
                    observer.attention_output(team, l, &scratch.input);
                    let Scratch {
                        input, output, x, ..
                    } = &mut *scratch;
                    let post_norm = layer.attention_post_norm.as_deref();
                    self.add_projected(team, &layer.o, post_norm, input, output, x);
                }
                Module::Mlp => {
                    // x += post_norm(down(activation(gate(y)) * up(y))) of y = norm(x)
                    let (norm, readers) = (&layer.mlp_norm, [&layer.gate, &layer.up]);
                    self.norm(team, pass, norm, &readers, Precision::Normal, scratch);
                    self.gate_and_up(team, layer, observer.keeps(), scratch);
                    observer.mlp_down(team, l, &scratch.hidden);
                    let Scratch {
                        hidden, output, x, ..
                    } = &mut *scratch;
                    let post_norm = layer.mlp_post_norm.as_deref();
                    self.add_projected(team, &layer.down, post_norm, hidden, output, x);
                }
            }
        }
    }

    /// The logits `[rows.len(), vocabulary]` of some of the rows of the last batch whose logits are wanted. In the phase of
    /// decoding, a row's are the same whatever the others; in that of prefill too, and for many rows faster.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn logits(
        &self,
        team: &Team,
        phase: Phase,
        rows: Range<usize>,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) {
        let d = self.config.embedding_length;
        let weights = self.head().view(&self.map);
        let Scratch { wanted, input, .. } = scratch;
        let x = &wanted[rows.start * d..rows.end * d];
        let tokens = Tokens {
            count: rows.len(),
            phase,
        };
        let (norm, precision) = (&self.output_norm, Precision::Normal);
        self.normalise(team, tokens, x, norm, &[weights], precision, input);
        out.resize(rows.len() * self.config.vocabulary, 0.0);
        let mut products = [Product { weights, out }];
        match self.config.logit_cap {
            None => matmul(team, input, &mut products),
            Some(cap) => matmul_then(team, input, &mut products, |_, _, _, logits| {
                logits.iter_mut().for_each(|l| *l = cap * tanh(*l / cap));
            }),
        }
    }

    /// The outputs behind the last norm of the rows whose logits are wanted, `[embedding_length]` each.
    pub(crate) fn outputs<'a>(
        &'a self,
        scratch: &'a Scratch,
    ) -> impl Iterator<Item = Vec<f32>> + 'a {
        let (d, epsilon) = (self.config.embedding_length, self.config.rms_epsilon);
        scratch.wanted.chunks_exact(d).map(move |x| {
            let square: f32 = x.iter().map(|x| x * x).sum();
            let scale = 1.0 / (square / d as f32 + epsilon).sqrt();
            let weighted = x.iter().zip(&self.output_norm);
            weighted.map(|(x, weight)| x * scale * weight).collect()
        })
    }

    /// input = norm(x), for these projections
    fn norm(
        &self,
        team: &Team,
        pass: &Pass,
        weight: &[f32],
        readers: &[&Linear],
        precision: Precision,
        scratch: &mut Scratch,
    ) {
        let readers: Vec<MatrixView> = readers.iter().map(|l| l.weight.view(&self.map)).collect();
        let Scratch { x, input, .. } = scratch;
        self.normalise(team, pass.tokens(), x, weight, &readers, precision, input);
    }

    #[allow(clippy::too_many_arguments)] // an input, what is to come of it, and who computes
    fn normalise(
        &self,
        team: &Team,
        tokens: Tokens,
        x: &[f32],
        weight: &[f32],
        readers: &[MatrixView],
        precision: Precision,
        out: &mut Activations,
    ) {
        let (d, epsilon) = (self.config.embedding_length, self.config.rms_epsilon);
        let kernels = team.kernels();
        out.produce(team, tokens, d, readers, precision, |t, row| {
            kernels.rms_norm(&x[t * d..][..d], weight, epsilon, row);
        });
    }

    /// q, k, v = Wq input + bq, Wk input + bk, Wv input + bv, where every head of q and k is normalised and turned by the angles of
    /// its row's position, if the layer does that.
    fn project_qkv(&self, team: &Team, pass: &Pass, layer: &Layer, scratch: &mut Scratch) {
        let Scratch { input, q, k, v, .. } = scratch;
        let (kernels, head_dim, n) = (team.kernels(), self.config.head_dim, pass.tokens().count);
        let angles = layer.rope.as_ref().map(|rope| pass.angles(rope));
        let linears = [&layer.q, &layer.k, &layer.v];
        for (out, linear) in [&mut *q, &mut *k, &mut *v].into_iter().zip(linears) {
            out.resize(n * linear.weight.rows, 0.0);
        }
        let mut products =
            [(&layer.q, &mut *q), (&layer.k, &mut *k), (&layer.v, v)].map(|(linear, out)| {
                Product {
                    weights: linear.weight.view(&self.map),
                    out,
                }
            });
        // Neighbours are turned while they are in the cache; norms and halves take whole heads.
        let in_pairs = self.config.family().rotation == Rotation::Pairs && layer.q_norm.is_none();
        let then = |which: usize, t: usize, rows: Range<usize>, out: &mut [f32]| {
            if let Some(bias) = &linears[which].bias {
                kernels.add(out, &bias[rows.clone()]);
            }
            if let Some(angles) = angles.as_ref().filter(|_| which < 2 && in_pairs) {
                rotate(kernels, head_dim, angles[t], rows.start, out);
            }
        };
        matmul_then(team, input, &mut products, then);
        if in_pairs {
            return;
        }
        let mut rows: Vec<HeadsOfRow> = Vec::with_capacity(2 * n);
        for (values, norm) in [(q, &layer.q_norm), (k, &layer.k_norm)] {
            let width = (values.len() / n.max(1)).max(1);
            let each = values.chunks_exact_mut(width).enumerate();
            rows.extend(each.map(|(t, heads)| (t, norm.as_deref(), heads)));
        }
        let (rotation, epsilon) = (self.config.family().rotation, self.config.rms_epsilon);
        team.chunks_mut(&mut rows, 1, |_, row| {
            let (t, norm, heads) = &mut row[0];
            for head in heads.chunks_exact_mut(head_dim) {
                if let Some(norm) = norm {
                    kernels.rms_norm_in_place(head, norm, epsilon);
                }
                match (&angles, rotation) {
                    (Some(angles), Rotation::Pairs) => {
                        kernels.rope(head, angles[*t].0, angles[*t].1)
                    }
                    (Some(angles), Rotation::Halves) => {
                        kernels.rope_halves(head, angles[*t].0, angles[*t].1);
                    }
                    (None, _) => {}
                }
            }
        });
    }

    /// Puts k and v into the caches, behind what is there.
    fn remember(&self, team: &Team, pass: &mut Pass, l: usize, scratch: &Scratch) {
        let width = self.layers[l].kv_heads() * self.config.head_dim;
        let kernels = team.kernels();
        for stretch in &pass.stretches {
            let Stretch {
                sequence,
                rows,
                first_position,
            } = stretch.clone();
            let positions = first_position..first_position + rows.len();
            let mut blocks: Vec<_> = pass.sequences[sequence].writers(l, positions).collect();
            team.chunks_mut(&mut blocks, 1, |_, block| {
                let (positions, writer) = &mut block[0];
                let at = |position: usize| (rows.start + position - first_position) * width;
                let these = at(positions.start)..at(positions.end);
                writer.write(kernels, &scratch.k[these.clone()], &scratch.v[these]);
            });
        }
    }

    /// input = attention(q, caches)
    fn attend(&self, team: &Team, pass: &Pass, l: usize, keep: Keep, scratch: &mut Scratch) {
        let Scratch { input, q, .. } = scratch;
        let layer = &self.layers[l];
        let caches = pass.stretches.iter().map(|s| &*pass.sequences[s.sequence]);
        let blocks: Vec<_> = caches.map(KvCache::blocks).collect();
        let spans = pass.stretches.iter().zip(&blocks);
        let spans: Vec<Span> = spans
            .map(|(stretch, blocks)| Span {
                blocks,
                tokens: stretch.rows.clone(),
                first_position: stretch.first_position,
            })
            .collect();
        let shape = AttentionShape {
            head_dim: self.config.head_dim,
            group_sizes: &layer.group_sizes,
            layout: pass.sequences[0].layout(l),
            spans: &spans,
            phase: pass.phase,
            scores: Scores {
                scale: self.config.score_scale,
                cap: self.config.score_cap,
                window: layer.window,
            },
        };
        let readers = [layer.o.weight.view(&self.map)];
        attention(team, shape, q, input, &readers, keep);
    }

    /// hidden = activation(gate(input)) * up(input)
    fn gate_and_up(&self, team: &Team, layer: &Layer, keep: Keep, scratch: &mut Scratch) {
        let Scratch { input, hidden, .. } = scratch;
        let [gate, up] = [&layer.gate, &layer.up]
            .map(|linear| (linear.weight.view(&self.map), linear.bias.as_deref()));
        let readers = [layer.down.weight.view(&self.map)];
        let activation = self.config.family().gate;
        matmul_gated(team, input, activation, gate, up, hidden, &readers, keep);
    }

    /// x += post_norm(linear(input)); `output` is a buffer.
    fn add_projected(
        &self,
        team: &Team,
        linear: &Linear,
        post_norm: Option<&[f32]>,
        input: &mut Activations,
        output: &mut Vec<f32>,
        x: &mut [f32],
    ) {
        let (weights, bias) = (linear.weight.view(&self.map), linear.bias.as_deref());
        let Some(norm) = post_norm else {
            return matmul_add(team, input, weights, bias, x);
        };
        let kernels = team.kernels();
        output.resize(x.len(), 0.0);
        let mut products = [Product {
            weights,
            out: output,
        }];
        matmul_then(team, input, &mut products, |_, _, rows, out| {
            if let Some(bias) = bias {
                kernels.add(out, &bias[rows]);
            }
        });
        add_normalised(team, norm, self.config.rms_epsilon, output, x);
    }
}

/// x += norm(output), both `[n, d]`; output is normalised in its place.
pub(crate) fn add_normalised(
    team: &Team,
    norm: &[f32],
    epsilon: f32,
    output: &mut [f32],
    x: &mut [f32],
) {
    let kernels = team.kernels();
    let rows = x.chunks_exact_mut(norm.len());
    let mut rows: Vec<_> = rows.zip(output.chunks_exact_mut(norm.len())).collect();
    team.chunks_mut(&mut rows, 1, |_, row| {
        let (x, output) = &mut row[0];
        kernels.rms_norm_in_place(output, norm, epsilon);
        kernels.add(x, output);
    });
}

/// The number of a row, the norm of its heads and their values.
type HeadsOfRow<'a> = (usize, Option<&'a [f32]>, &'a mut [f32]);

/// tanh x, to about 10⁻⁷, in a form that the compiler makes vectors of.
fn tanh(x: f32) -> f32 {
    let e = fast_exp(-2.0 * x.abs());
    let tanh = ((1.0 - e) / (1.0 + e)).copysign(x);
    if x.is_nan() { x } else { tanh }
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

/// Puts neighbouring rows of one sequence together.
fn stretches<'r>(rows: impl Iterator<Item = &'r Row>) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for (i, row) in rows.enumerate() {
        match stretches.last_mut() {
            // Positions follow each other in every sequence.
            Some(last) if last.sequence == row.sequence => last.rows.end = i + 1,
            _ => stretches.push(Stretch {
                sequence: row.sequence,
                rows: i..i + 1,
                first_position: row.position,
            }),
        }
    }
    stretches
}
