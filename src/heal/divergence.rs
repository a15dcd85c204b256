//! The loss: KL(p ‖ q) of the teacher's predictions p and the student's q, and its derivative by the student's logits, (q − p) / n.

use crate::kernels::Team;
use crate::model::{fast_exp, log_sum_exp};

/// Values that are summed side by side, so that the compiler takes vector instructions; sums of a piece go on in double precision.
const LANES: usize = 16;
const PIECE: usize = 64 * LANES;

/// KL(p ‖ q), in nats, of every position, given the logits `[positions, vocabulary]` of both; with `share`, the derivatives of `share`
/// times their sum take the place of the student's logits.
pub fn divergences(
    team: &Team,
    teacher: &[f32],
    student: &mut [f32],
    vocabulary: usize,
    share: Option<f32>,
) -> Vec<f64> {
    let mut sums = vec![0.0; student.len() / vocabulary];
    let rows = student.chunks_exact_mut(vocabulary).zip(&mut sums);
    let mut rows: Vec<_> = rows.collect();
    team.chunks_mut(&mut rows, 1, |i, row| {
        let (student, sum) = &mut row[0];
        **sum = divergence(&teacher[i * vocabulary..][..vocabulary], student, share);
    });
    sums
}

fn divergence(teacher: &[f32], student: &mut [f32], share: Option<f32>) -> f64 {
    let shift = |logits: &[f32]| {
        let (peak, sum) = log_sum_exp(logits);
        (f64::from(peak) + sum) as f32
    };
    let (t, s) = (shift(teacher), shift(student));
    let mut total = 0.0;
    for (teacher, student) in teacher.chunks(PIECE).zip(student.chunks_mut(PIECE)) {
        let mut lanes = [0.0f32; LANES];
        for (teacher, student) in teacher.chunks(LANES).zip(student.chunks_mut(LANES)) {
            for (lane, (l, m)) in lanes.iter_mut().zip(teacher.iter().zip(student)) {
                // Rounding may take them above 0 by a little.
                let (ln_p, ln_q) = ((l - t).min(0.0), (*m - s).min(0.0));
                let p = fast_exp(ln_p);
                *lane += p * (ln_p - ln_q);
                if let Some(share) = share {
                    *m = (fast_exp(ln_q) - p) * share;
                }
            }
        }
        total += f64::from(lanes.iter().sum::<f32>());
    }
    total
}
