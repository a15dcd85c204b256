//! Root-mean-square normalisation y = x r · w with r = 1 / √(mean(x²) + ε), and its derivatives.

use crate::kernels::Team;

/// Rows that a thread takes at a time, and columns for sums over rows.
const ROWS: usize = 16;
const COLS: usize = 64;

/// y = norm(x), `[n, d]`.
pub fn forward(team: &Team, x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
    let (d, kernels) = (weight.len(), team.kernels());
    team.chunks_mut(y, ROWS * d, |i, rows| {
        let x = &x[i * ROWS * d..];
        for (y, x) in rows.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            kernels.rms_norm(x, weight, epsilon, y);
        }
    });
}

/// dx += the derivative by x, given dy `[n, d]`; and dw, the derivative by the weight, if that is wanted.
///
/// With x̂ = x r: dw = Σ dy x̂ over rows, and dx = r (dy w − x̂ mean(dy w x̂)).
pub fn backward(
    team: &Team,
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let d = weight.len();
    let inverses = team.map(x.len() / d, |i| {
        let square: f32 = sum(x[i * d..][..d].iter().map(|x| x * x));
        1.0 / (square / d as f32 + epsilon).sqrt()
    });
    team.chunks_mut(dx, ROWS * d, |i, rows| {
        for (row, dx) in (i * ROWS..).zip(rows.chunks_exact_mut(d)) {
            let (x, dy, r) = (&x[row * d..][..d], &dy[row * d..][..d], inverses[row]);
            let terms = dy.iter().zip(weight).zip(x);
            let mean = sum(terms.map(|((dy, w), x)| dy * w * x)) * r / d as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx += r * (dy * w - x * r * mean);
            }
        }
    });
    if let Some(dw) = dw {
        team.chunks_mut(dw, COLS, |i, dw| {
            dw.fill(0.0);
            let first = i * COLS;
            for (row, r) in inverses.iter().enumerate() {
                let at = row * d + first;
                let pairs = x[at..][..dw.len()].iter().zip(&dy[at..][..dw.len()]);
                for (dw, (x, dy)) in dw.iter_mut().zip(pairs) {
                    *dw += dy * x * r;
                }
            }
        });
    }
}

/// A sum in an order that the compiler may take vectors for.
fn sum(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (i, value) in values.enumerate() {
        lanes[i % 16] += value;
    }
    lanes.iter().sum()
}

/// out = Σ over the rows of dy `[n, out.len()]`: the derivative by a bias.
pub fn sum_rows(team: &Team, dy: &[f32], out: &mut [f32]) {
    let width = out.len();
    team.chunks_mut(out, COLS, |i, out| {
        out.fill(0.0);
        for row in dy.chunks_exact(width) {
            for (out, dy) in out.iter_mut().zip(&row[i * COLS..]) {
                *out += dy;
            }
        }
    });
}

/// Adds a bias to every row of x `[n, bias.len()]`.
pub fn add_bias(team: &Team, bias: &[f32], x: &mut [f32]) {
    let (width, kernels) = (bias.len(), team.kernels());
    team.chunks_mut(x, ROWS * width, |_, rows| {
        for row in rows.chunks_exact_mut(width) {
            kernels.add(row, bias);
        }
    });
}
