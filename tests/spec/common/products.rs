//! Products of a matrix and tokens, computed by the kernels.

use flapjack::kernels::{Activations, MatrixView, Phase, Product, Team, Tokens, matmul};

/// W X, `[tokens, rows]`.
pub fn product(team: &Team, weights: MatrixView, x: &[f32], phase: Phase) -> Vec<f32> {
    let tokens = Tokens {
        count: x.len() / weights.cols(),
        phase,
    };
    let mut input = Activations::default();
    input.begin(tokens, weights.cols()).copy_from_slice(x);
    let mut out = vec![f32::NAN; tokens.count * weights.rows()];
    let product = Product {
        weights,
        out: &mut out,
    };
    matmul(team, &mut input, &mut [product]);
    out
}
