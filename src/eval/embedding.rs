//! What a text is about, as a vector.

use crate::kernels::Runtime;
use crate::model::{Batch, KvPool, Model, ModelError, Scratch, Unobserved};

/// Tokens that go through the model together.
const BATCH: usize = 512;

/// The mean over the tokens of the model's outputs behind the last norm, brought to length 1; `[embedding_length]`.
///
/// # Errors
/// Those of a forward pass. No tokens have no mean: that is zeros.
pub fn embedding(
    model: &Model,
    runtime: &Runtime,
    tokens: &[u32],
    pool: &KvPool,
) -> Result<Vec<f32>, ModelError> {
    let mut cache = pool.cache(tokens.len());
    let (mut batch, mut scratch) = (Batch::new(), Scratch::new());
    let mut sum = vec![0.0; model.config.embedding_length];
    for piece in tokens.chunks(BATCH) {
        batch.clear();
        batch.add_prompt(0, cache.len(), piece, 0..piece.len());
        runtime.region(|team| {
            let sequences = &mut [&mut cache];
            model.forward(team, batch.rows(), sequences, &mut scratch, &mut Unobserved)
        })?;
        for output in model.outputs(&scratch) {
            for (sum, x) in sum.iter_mut().zip(output) {
                *sum += f64::from(x);
            }
        }
    }
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    let unit = |x: &f64| if length > 0.0 { x / length } else { 0.0 };
    Ok(sum.iter().map(|x| unit(x) as f32).collect())
}
