//! Where a text begins on its way through a model, and what is kept of it on the way.

use crate::kernels::{Activations, Runtime, Team};
use crate::model::{Model, ModelError, Observer, Scratch};

/// The residual streams `[tokens, d]` with which the sequences of a text begin, each of at most `length` tokens, with `bos` in
/// front where there is one.
///
/// # Errors
/// If a token is not in the vocabulary.
pub fn embed_sequences(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    bos: Option<u32>,
    length: usize,
) -> Result<Vec<Vec<f32>>, ModelError> {
    let mut scratch = Scratch::new();
    let pieces = tokens.chunks(length - usize::from(bos.is_some()));
    pieces
        .map(|piece| {
            let tokens: Vec<u32> = bos.into_iter().chain(piece.iter().copied()).collect();
            runtime.region(|team| model.embed(team, &tokens, &mut scratch))?;
            Ok(scratch.residual().to_vec())
        })
        .collect()
}

/// Keeps the last input that it sees of a projection that loses columns.
pub struct Capture<'a>(pub &'a mut Activations);

impl Capture<'_> {
    fn keep(&mut self, x: &Activations) {
        self.0
            .begin(x.tokens(), x.cols())
            .copy_from_slice(x.values());
    }
}

impl Observer for Capture<'_> {
    fn attention_output(&mut self, _: &Team, _: usize, x: &Activations) {
        self.keep(x);
    }

    fn mlp_down(&mut self, _: &Team, _: usize, x: &Activations) {
        self.keep(x);
    }
}
