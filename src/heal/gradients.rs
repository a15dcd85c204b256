//! One step's work: the loss of a batch and its derivatives.

use std::ops::Range;

use super::backward::{Gradients, Watch, Work};
use super::divergence::divergences;
use super::forward::{InputMoments, Tape, fit};
use super::norm;
use super::student::Student;
use super::teacher::LOGIT_ROWS;
use crate::kernels::{Activations, Factor, Product, Store, Team, Tokens, matmul, multiply};
use crate::model::{Model, fast_exp, log_sum_exp};

/// The memory of a step.
#[derive(Debug, Default)]
pub struct Step {
    tape: Tape,
    work: Work,
    input: Activations,
    /// `[LOGIT_ROWS, vocabulary]`, of the student and of the teacher.
    logits: Vec<f32>,
    targets: Vec<f32>,
}

impl Step {
    /// Bytes that it takes for so many rows.
    pub fn bytes(model: &Model, rows: usize) -> u64 {
        let logits = 2 * 4 * LOGIT_ROWS.min(rows) * model.config.vocabulary;
        Tape::bytes(model, rows) + Work::bytes(model, rows) + logits as u64
    }

    /// The mean of KL(teacher ‖ student) over all positions of sequences of `length` tokens, and its derivatives.
    /// `teacher(rows, out)` tells the teacher's logits of some rows.
    pub fn gradients(
        &mut self,
        team: &Team,
        student: &Student,
        tokens: &[u32],
        length: usize,
        mut teacher: impl FnMut(Range<usize>, &mut Vec<f32>),
        mut gradients: Gradients,
    ) -> f64 {
        let (n, vocabulary) = (tokens.len(), student.model.config.vocabulary);
        student.forward(team, tokens, length, &mut self.tape, None);
        let mut targets = std::mem::take(&mut self.targets);
        let mut loss = 0.0;
        let by_logits = |rows: Range<usize>, logits: &mut [f32]| {
            teacher(rows, &mut targets);
            let sums = divergences(team, &targets, logits, vocabulary, Some(1.0 / n as f32));
            loss += sums.iter().sum::<f64>();
        };
        let nothing = &mut |_: &Team, _, _: &[f32], _: &[f32]| {};
        self.back(team, student, n, by_logits, &mut gradients, nothing);
        self.targets = targets;
        loss / n as f64
    }

    /// Behind [`Step::gradients`], of the same tokens: shows `watch` the derivatives of Σ ln q(y) over the positions, with y drawn at each of
    /// them from the student's own predictions q, by `chance`, numbers from 0 to 1. The mean of their outer products is the curvature of the divergence from
    /// q (the Fisher matrix).
    pub fn curvatures(
        &mut self,
        team: &Team,
        student: &Student,
        chance: &[f32],
        watch: &mut Watch,
    ) {
        let vocabulary = student.model.config.vocabulary;
        let by_logits = |rows: Range<usize>, logits: &mut [f32]| {
            team.chunks_mut(logits, vocabulary, |i, logits| {
                against_drawn(logits, chance[rows.start + i]);
            });
        };
        let nothing = &mut Gradients::Of(&[], &mut []);
        self.back(team, student, chance.len(), by_logits, nothing, watch);
    }

    /// The way back from the head, behind a forward pass over n rows. `by_logits(rows, logits)` puts the derivatives by some rows' logits in their
    /// place.
    fn back(
        &mut self,
        team: &Team,
        student: &Student,
        n: usize,
        mut by_logits: impl FnMut(Range<usize>, &mut [f32]),
        gradients: &mut Gradients,
        watch: &mut Watch,
    ) {
        let Self {
            tape,
            work,
            input,
            logits,
            ..
        } = self;
        let model = student.model;
        let (d, epsilon, vocabulary) = (
            model.config.embedding_length,
            model.config.rms_epsilon,
            model.config.vocabulary,
        );
        let weight = student.at(&student.places.output_norm);
        let y = fit(&mut work.y, n * d);
        norm::forward(team, &tape.last, weight, epsilon, y);
        let dy = fit(&mut work.dy, n * d);
        let head = model.head().view(&model.map);
        for first in (0..n).step_by(LOGIT_ROWS) {
            let rows = first..(first + LOGIT_ROWS).min(n);
            let values = input.begin(Tokens::prefill(rows.len()), d);
            values.copy_from_slice(&y[rows.start * d..rows.end * d]);
            let out = fit(logits, rows.len() * vocabulary);
            matmul(team, input, &mut [Product { weights: head, out }]);
            by_logits(rows.clone(), logits);
            let dlogits = Factor::new(logits, rows.len(), vocabulary);
            let head = Factor::new(&student.head, vocabulary, d);
            let dy = &mut dy[rows.start * d..rows.end * d];
            multiply(team, dlogits, head, Store::Replace, dy);
        }
        let dx = fit(&mut work.dx, n * d);
        dx.fill(0.0);
        let dw = gradients.at(&student.places.output_norm);
        norm::backward(team, &tape.last, weight, epsilon, dy, dx, dw);
        student.backward(team, tape, work, gradients, watch);
    }

    /// The student's logits `[tokens, vocabulary]`.
    pub fn logits(
        &mut self,
        team: &Team,
        student: &Student,
        tokens: &[u32],
        length: usize,
    ) -> Vec<f32> {
        let model = student.model;
        let d = model.config.embedding_length;
        student.forward(team, tokens, length, &mut self.tape, None);
        let weight = student.at(&student.places.output_norm);
        let values = self.input.begin(Tokens::prefill(tokens.len()), d);
        norm::forward(
            team,
            &self.tape.last,
            weight,
            model.config.rms_epsilon,
            values,
        );
        let mut out = vec![0.0; tokens.len() * model.config.vocabulary];
        let weights = model.head().view(&model.map);
        matmul(
            team,
            &mut self.input,
            &mut [Product {
                weights,
                out: &mut out,
            }],
        );
        out
    }

    /// The forward pass alone, for what projections read.
    pub(super) fn observe(
        &mut self,
        team: &Team,
        student: &Student,
        tokens: &[u32],
        length: usize,
        moments: &mut InputMoments,
    ) {
        student.forward(team, tokens, length, &mut self.tape, Some(moments));
    }
}

/// Makes of logits the derivative of −ln q(y) by them, q less 1 at y, with y drawn from the predictions q.
fn against_drawn(logits: &mut [f32], chance: f32) {
    let (peak, sum) = log_sum_exp(logits);
    let shift = (f64::from(peak) + sum) as f32;
    let mut drawn = logits.len() - 1;
    let mut rest = chance;
    for (j, l) in logits.iter_mut().enumerate() {
        *l = fast_exp((*l - shift).min(0.0));
        if rest >= 0.0 {
            rest -= *l;
            if rest < 0.0 {
                drawn = j;
            }
        }
    }
    logits[drawn] -= 1.0;
}
