//! Causal attention with grouped KV heads, and its derivatives. Heads lie one after the other, `[sequences, heads, length, e]`, and
//! probabilities are computed a block of queries at a time, and again for the derivatives.

use std::ops::Range;

use crate::kernels::{Factor, Kernels, Store, Team};
use crate::model::{Rotation, fast_exp};

/// Queries whose probabilities are held together.
const BLOCK: usize = 64;
/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// The shape of the attention of a layer, for sequences of one length.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    pub length: usize,
    pub head_dim: usize,
    /// Query heads of each KV head.
    pub groups: &'a [usize],
}

/// Cosines and sines of the angles of positions, `[length, pairs]`.
#[derive(Debug)]
pub struct Angles {
    /// Which values of a head are turned together.
    pub rotation: Rotation,
    pub cosines: Vec<f32>,
    pub sines: Vec<f32>,
    /// For turning back.
    pub negative: Vec<f32>,
    pub pairs: usize,
}

impl Default for Angles {
    fn default() -> Self {
        Self {
            rotation: Rotation::Pairs,
            cosines: Vec::new(),
            sines: Vec::new(),
            negative: Vec::new(),
            pairs: 0,
        }
    }
}

impl Angles {
    fn turn(&self, kernels: Kernels, position: usize, back: bool, head: &mut [f32]) {
        let range = position * self.pairs..(position + 1) * self.pairs;
        let sines = if back { &self.negative } else { &self.sines };
        let (cosines, sines) = (&self.cosines[range.clone()], &sines[range]);
        match self.rotation {
            Rotation::Pairs => kernels.rope(head, cosines, sines),
            Rotation::Halves => kernels.rope_halves(head, cosines, sines),
        }
    }
}

impl Heads<'_> {
    fn heads(&self) -> usize {
        self.groups.iter().sum()
    }

    /// Values of a head over a sequence.
    fn head_len(&self) -> usize {
        self.length * self.head_dim
    }

    /// From rows `[n, heads e]` to heads, turned by their positions' angles, if these are given.
    pub fn gather(
        &self,
        team: &Team,
        rows: &[f32],
        heads: usize,
        angles: Option<&Angles>,
        out: &mut [f32],
    ) {
        let (e, width, kernels) = (self.head_dim, heads * self.head_dim, team.kernels());
        if heads == 0 {
            return;
        }
        team.chunks_mut(out, self.head_len(), |i, out| {
            let (sequence, head) = (i / heads, i % heads);
            for (t, out) in out.chunks_exact_mut(e).enumerate() {
                let at = (sequence * self.length + t) * width + head * e;
                out.copy_from_slice(&rows[at..at + e]);
                if let Some(angles) = angles {
                    angles.turn(kernels, t, false, out);
                }
            }
        });
    }

    /// The other way round, turned back.
    pub fn scatter(
        &self,
        team: &Team,
        values: &[f32],
        heads: usize,
        angles: Option<&Angles>,
        rows: &mut [f32],
    ) {
        let (e, width, kernels) = (self.head_dim, heads * self.head_dim, team.kernels());
        if heads == 0 {
            return;
        }
        team.chunks_mut(rows, ROWS * width, |i, rows| {
            for (row, out) in (i * ROWS..).zip(rows.chunks_exact_mut(width)) {
                let (sequence, t) = (row / self.length, row % self.length);
                for (head, out) in out.chunks_exact_mut(e).enumerate() {
                    let at = ((sequence * heads + head) * self.length + t) * e;
                    out.copy_from_slice(&values[at..at + e]);
                    if let Some(angles) = angles {
                        angles.turn(kernels, t, true, out);
                    }
                }
            }
        });
    }

    /// Cuts values of all query heads into those of each sequence and KV head.
    fn by_group<'v>(&self, values: &'v mut [f32]) -> Vec<&'v mut [f32]> {
        let sequences = values.len() / (self.heads() * self.head_len()).max(1);
        let mut rest = values;
        let mut pieces = Vec::with_capacity(sequences * self.groups.len());
        for _ in 0..sequences {
            for group in self.groups {
                let (piece, behind) = rest.split_at_mut(group * self.head_len());
                pieces.push(piece);
                rest = behind;
            }
        }
        pieces
    }

    /// Where the query heads of a sequence and KV head begin.
    fn queries(&self, sequence: usize, group: usize) -> usize {
        let before: usize = self.groups[..group].iter().sum();
        (sequence * self.heads() + before) * self.head_len()
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let length = self.length;
        (0..length)
            .step_by(BLOCK)
            .map(move |first| first..(first + BLOCK).min(length))
    }

    /// p `[rows.len(), rows.end]` = softmax(q kᵀ / √e) of some queries of a head, which see their own position and those before.
    fn probabilities(
        &self,
        kernels: Kernels,
        rows: &Range<usize>,
        q: &[f32],
        k: &[f32],
        p: &mut [f32],
    ) {
        let (e, seen) = (self.head_dim, rows.end);
        let queries = Factor::new(&q[rows.start * e..rows.end * e], rows.len(), e);
        let keys = Factor::new(&k[..seen * e], seen, e);
        kernels.multiply(queries, keys.t(), Store::Replace, p, seen);
        let scale = 1.0 / (e as f32).sqrt();
        for (i, row) in rows.clone().zip(p.chunks_exact_mut(seen)) {
            let (row, beyond) = row.split_at_mut(i + 1);
            beyond.fill(0.0);
            let peak = row.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
            row.iter_mut()
                .for_each(|s| *s = fast_exp((*s - peak) * scale));
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|s| *s /= sum);
        }
    }

    /// out = attention(q, k, v), all by heads.
    pub fn forward(&self, team: &Team, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
        let (e, len, kernels) = (self.head_dim, self.head_len(), team.kernels());
        let groups = self.groups.len();
        let mut pieces = self.by_group(out);
        team.chunks_mut(&mut pieces, 1, |i, piece| {
            let q = &q[self.queries(i / groups, i % groups)..];
            let (k, v) = (&k[i * len..][..len], &v[i * len..][..len]);
            let mut p = vec![0.0; BLOCK * self.length];
            for (q, out) in q.chunks_exact(len).zip(piece[0].chunks_exact_mut(len)) {
                for rows in self.blocks() {
                    let p = &mut p[..rows.len() * rows.end];
                    self.probabilities(kernels, &rows, q, k, p);
                    let p = Factor::new(p, rows.len(), rows.end);
                    let v = Factor::new(&v[..rows.end * e], rows.end, e);
                    kernels.multiply(
                        p,
                        v,
                        Store::Replace,
                        &mut out[rows.start * e..rows.end * e],
                        e,
                    );
                }
            }
        });
    }

    /// The derivatives by q, k and v, given that by the output.
    #[allow(clippy::too_many_arguments)] // inputs, and what comes of each
    pub fn backward(
        &self,
        team: &Team,
        (q, k, v): (&[f32], &[f32], &[f32]),
        dout: &[f32],
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        let (e, len, kernels) = (self.head_dim, self.head_len(), team.kernels());
        let groups = self.groups.len();
        if groups == 0 {
            return;
        }
        let scale = 1.0 / (e as f32).sqrt();
        let pieces = self.by_group(dq).into_iter();
        let pieces = pieces
            .zip(dk.chunks_exact_mut(len))
            .zip(dv.chunks_exact_mut(len));
        let mut pieces: Vec<_> = pieces.collect();
        team.chunks_mut(&mut pieces, 1, |i, piece| {
            let ((dq, dk), dv) = &mut piece[0];
            let first = self.queries(i / groups, i % groups);
            let (q, dout) = (&q[first..], &dout[first..]);
            let (k, v) = (&k[i * len..][..len], &v[i * len..][..len]);
            dk.fill(0.0);
            dv.fill(0.0);
            let (mut p, mut dp) = (
                vec![0.0; BLOCK * self.length],
                vec![0.0; BLOCK * self.length],
            );
            let heads = q.chunks_exact(len).zip(dout.chunks_exact(len));
            for (dq, (q, dout)) in dq.chunks_exact_mut(len).zip(heads) {
                for rows in self.blocks() {
                    let (n, seen) = (rows.len(), rows.end);
                    let these = rows.start * e..rows.end * e;
                    let (p, dp) = (&mut p[..n * seen], &mut dp[..n * seen]);
                    self.probabilities(kernels, &rows, q, k, p);
                    let dout = Factor::new(&dout[these.clone()], n, e);
                    let keys = Factor::new(&k[..seen * e], seen, e);
                    let values = Factor::new(&v[..seen * e], seen, e);
                    // dv += pᵀ dout, dp = dout vᵀ, ds = p (dp − Σ p dp) / √e
                    kernels.multiply(Factor::new(p, n, seen).t(), dout, Store::Add, dv, e);
                    kernels.multiply(dout, values.t(), Store::Replace, dp, seen);
                    for (p, dp) in p.chunks_exact(seen).zip(dp.chunks_exact_mut(seen)) {
                        let mean: f32 = p.iter().zip(&*dp).map(|(p, dp)| p * dp).sum();
                        for (dp, p) in dp.iter_mut().zip(p) {
                            *dp = p * (*dp - mean) * scale;
                        }
                    }
                    // dq = ds k, dk += dsᵀ q
                    let ds = Factor::new(dp, n, seen);
                    kernels.multiply(ds, keys, Store::Replace, &mut dq[these.clone()], e);
                    kernels.multiply(ds.t(), Factor::new(&q[these], n, e), Store::Add, dk, e);
                }
            }
        });
    }
}
