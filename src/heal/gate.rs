//! The gate of an MLP, h = silu(g) u with silu(g) = g σ(g), and its derivatives.

use crate::kernels::Team;
use crate::model::fast_exp;

/// Values that a thread takes at a time.
const PIECE: usize = 1 << 14;

fn sigmoid(g: f32) -> f32 {
    let e = fast_exp(-g.abs());
    let small = e / (1.0 + e);
    if g < 0.0 { small } else { 1.0 - small }
}

/// h = silu(g) u, all of one length.
pub fn forward(team: &Team, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let kernels = team.kernels();
    team.chunks_mut(out, PIECE, |i, out| {
        let range = i * PIECE..i * PIECE + out.len();
        out.copy_from_slice(&gate[range.clone()]);
        kernels.silu_mul(out, &up[range]);
    });
}

/// The derivatives by g and u, given dh, in whose place that by u comes.
pub fn backward(team: &Team, gate: &[f32], up: &[f32], dh: &mut [f32], dgate: &mut [f32]) {
    let pieces = dh.chunks_mut(PIECE).zip(dgate.chunks_mut(PIECE));
    let mut pieces: Vec<_> = pieces.collect();
    team.chunks_mut(&mut pieces, 1, |i, piece| {
        let (dh, dgate) = &mut piece[0];
        let inputs = gate[i * PIECE..].iter().zip(&up[i * PIECE..]);
        for ((dh, dg), (g, u)) in dh.iter_mut().zip(dgate.iter_mut()).zip(inputs) {
            let s = sigmoid(*g);
            *dg = *dh * u * s * (1.0 + g * (1.0 - s));
            *dh *= g * s;
        }
    });
}
