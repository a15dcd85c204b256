//! AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, without decay, and with the gradient's norm
//! clipped.

use crate::kernels::Team;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.95;
const EPSILON: f32 = 1e-8;
/// The norm that a gradient has at the most.
const LARGEST_NORM: f64 = 1.0;
/// Values that a thread takes at a time.
const PIECE: usize = 1 << 14;

/// Running means of the gradient and of its squares, of all that is trained.
#[derive(Debug)]
pub struct AdamW {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl AdamW {
    pub fn new(parameters: usize) -> Self {
        Self {
            first: vec![0.0; parameters],
            second: vec![0.0; parameters],
        }
    }

    /// Takes the step with this number, counted from 0. Returns whether the gradient was made of numbers; else nothing is changed.
    pub fn step(
        &mut self,
        team: &Team,
        step: usize,
        rate: f32,
        gradients: &[f32],
        parameters: &mut [f32],
    ) -> bool {
        let norm = norm(team, gradients);
        if !norm.is_finite() {
            return false;
        }
        let clip = (LARGEST_NORM / norm.max(LARGEST_NORM)) as f32;
        let power = step.min(1 << 20) as i32 + 1;
        let unbias_1 = 1.0 / (1.0 - BETA_1.powi(power));
        let unbias_2 = 1.0 / (1.0 - BETA_2.powi(power));
        let pieces = parameters.chunks_mut(PIECE).zip(gradients.chunks(PIECE));
        let moments = self
            .first
            .chunks_mut(PIECE)
            .zip(self.second.chunks_mut(PIECE));
        let mut pieces: Vec<_> = pieces.zip(moments).collect();
        team.chunks_mut(&mut pieces, 1, |_, piece| {
            let ((parameters, gradients), (first, second)) = &mut piece[0];
            let moments = first.iter_mut().zip(second.iter_mut());
            for ((w, g), (m, v)) in parameters.iter_mut().zip(gradients.iter()).zip(moments) {
                let g = g * clip;
                *m = BETA_1 * *m + (1.0 - BETA_1) * g;
                *v = BETA_2 * *v + (1.0 - BETA_2) * g * g;
                *w -= rate * (*m * unbias_1) / ((*v * unbias_2).sqrt() + EPSILON);
            }
        });
        true
    }
}

fn norm(team: &Team, gradients: &[f32]) -> f64 {
    let pieces = team.map(gradients.len().div_ceil(PIECE), |i| {
        let piece = &gradients[i * PIECE..];
        let piece = &piece[..piece.len().min(PIECE)];
        let mut lanes = [0.0f32; 16];
        for chunk in piece.chunks(16) {
            for (lane, g) in lanes.iter_mut().zip(chunk) {
                *lane += g * g;
            }
        }
        lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>()
    });
    pieces.into_iter().sum::<f64>().sqrt()
}
