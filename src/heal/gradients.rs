//! One step's work: the loss of a batch and its derivatives.

use super::backward::{Gradients, Work};
use super::divergence::divergences;
use super::forward::{Tape, fit};
use super::norm;
use super::student::Student;
use super::teacher::LOGIT_ROWS;
use crate::kernels::{Activations, Factor, Product, Store, Team, Tokens, matmul, multiply};
use crate::model::Model;

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

    /// The mean of KL(teacher ‖ student) over all positions of sequences of `length` tokens, and its derivatives by all that is trained,
    /// `[trained]`. `teacher(rows, out)` tells the teacher's logits of some rows.
    pub fn gradients(
        &mut self,
        team: &Team,
        student: &Student,
        tokens: &[u32],
        length: usize,
        mut teacher: impl FnMut(std::ops::Range<usize>, &mut Vec<f32>),
        gradients: &mut [f32],
    ) -> f64 {
        let Self {
            tape,
            work,
            input,
            logits,
            targets,
        } = self;
        let (model, n) = (student.model, tokens.len());
        let (d, epsilon, vocabulary) = (
            model.config.embedding_length,
            model.config.rms_epsilon,
            model.config.vocabulary,
        );
        student.forward(team, tokens, length, tape, None);
        let weight = student.at(&student.places.output_norm);
        let y = fit(&mut work.y, n * d);
        norm::forward(team, &tape.last, weight, epsilon, y);
        let dy = fit(&mut work.dy, n * d);
        let head = model.head().view(&model.map);
        let mut loss = 0.0;
        for first in (0..n).step_by(LOGIT_ROWS) {
            let rows = first..(first + LOGIT_ROWS).min(n);
            let values = input.begin(Tokens::prefill(rows.len()), d);
            values.copy_from_slice(&y[rows.start * d..rows.end * d]);
            let out = fit(logits, rows.len() * vocabulary);
            matmul(team, input, &mut [Product { weights: head, out }]);
            teacher(rows.clone(), targets);
            let sums = divergences(team, targets, logits, vocabulary, Some(1.0 / n as f32));
            loss += sums.iter().sum::<f64>();
            let dlogits = Factor::new(logits, rows.len(), vocabulary);
            let head = Factor::new(&student.head, vocabulary, d);
            multiply(
                team,
                dlogits,
                head,
                Store::Replace,
                &mut dy[rows.start * d..rows.end * d],
            );
        }
        let mut gradients = Gradients {
            first: student.first,
            values: gradients,
        };
        let dx = fit(&mut work.dx, n * d);
        dx.fill(0.0);
        let dw = gradients.at(&student.places.output_norm);
        norm::backward(team, &tape.last, weight, epsilon, dy, dx, dw);
        student.backward(team, tape, work, &mut gradients);
        loss / n as f64
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

    /// The forward pass alone, for what each projection sees.
    pub(super) fn observe(
        &mut self,
        team: &Team,
        student: &Student,
        tokens: &[u32],
        length: usize,
        squares: &mut super::forward::InputSquares,
    ) {
        student.forward(team, tokens, length, &mut self.tape, Some(squares));
    }
}
