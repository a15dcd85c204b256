//! The rows of a tensor in another type or another order, some MiB at a time.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use super::ConvertError;
use crate::gguf::TensorInfo;
use crate::kernels::Runtime;
use crate::quant::{BlockType, decode_row, encode_row, encode_row_by_importance};

/// Bytes of rows that are encoded before they are written.
const SLAB: usize = 4 << 20;
/// Rows that a thread encodes at a time.
const ROWS: usize = 4;
/// The size of values counts in full where at least this share of a matrix's columns has most of its inputs: see [`power_of_size`].
const EVEN_SHARE: f64 = 0.25;
/// What half precision rounds to infinity, from here on.
const BEYOND_HALF: f32 = 65_520.0;

/// A tensor that is written in another type or order.
pub(super) struct Recoding<'a> {
    pub tensor: &'a TensorInfo,
    pub bytes: &'a [u8],
    pub to: BlockType,
    /// For each row of a head the number of the source's.
    pub order: Option<&'a [usize]>,
    /// How much each column matters; `None` where that is not known.
    pub importance: Option<&'a [f32]>,
}

impl Recoding<'_> {
    /// Writes all rows. The outer errors are those of `out`, the inner ones say what is wrong with the tensor.
    pub fn write(
        &self,
        runtime: &Runtime,
        out: &mut dyn Write,
    ) -> io::Result<Result<(), ConvertError>> {
        // Biases go with the rows of their matrices.
        let (rows, columns) = match (&self.tensor.shape[..], self.order) {
            ([len], Some(_)) => (*len, 1),
            (shape, _) => {
                let columns = shape[shape.len() - 1];
                (shape[..shape.len() - 1].iter().product(), columns)
            }
        };
        let from = self.tensor.block_type;
        let (old, new) = (from.row_bytes(columns), self.to.row_bytes(columns));
        if new == 0 {
            return Ok(Ok(()));
        }
        let (too_large, no_number) = (AtomicBool::new(false), AtomicBool::new(false));
        let most = (SLAB / new).next_multiple_of(ROWS);
        let mut slab = vec![0; most.min(rows) * new];
        let by_size = self.importance.map_or(0.0, power_of_size);
        let is_of_three_levels = matches!(self.to, BlockType::TQ1_0 | BlockType::TQ2_0);
        let mut first = 0;
        while first < rows {
            let here = most.min(rows - first);
            let slab = &mut slab[..here * new];
            runtime.region(|team| {
                team.chunks_mut(slab, ROWS * new, |chunk, encoded| {
                    let mut values = vec![0.0; columns];
                    for (i, row) in encoded.chunks_exact_mut(new).enumerate() {
                        let source = self.source_of(first + chunk * ROWS + i);
                        decode_row(from, &self.bytes[source * old..][..old], &mut values);
                        self.check(&values, &too_large, &no_number);
                        match self.importance {
                            _ if self.to.is_float() => encode_row(self.to, &values, row),
                            // Random models in the types of three levels predict worse where the size of values counts.
                            None if is_of_three_levels => encode_row(self.to, &values, row),
                            Some(inputs) if is_of_three_levels => {
                                encode_row_by_importance(self.to, &values, inputs, row);
                            }
                            Some(inputs) => {
                                let all = importance_by_inputs(&values, inputs, by_size);
                                encode_row_by_importance(self.to, &values, &all, row);
                            }
                            None => {
                                let all = importance_by_size(&values);
                                encode_row_by_importance(self.to, &values, &all, row);
                            }
                        }
                    }
                });
            });
            let tensor = || self.tensor.name.clone();
            if no_number.load(Ordering::Relaxed) {
                return Ok(Err(ConvertError::NotFinite { tensor: tensor() }));
            }
            if too_large.load(Ordering::Relaxed) {
                return Ok(Err(ConvertError::OutOfRange {
                    tensor: tensor(),
                    to: self.to.name(),
                }));
            }
            out.write_all(slab)?;
            first += here;
        }
        Ok(Ok(()))
    }

    /// The row of the source that becomes this one.
    fn source_of(&self, row: usize) -> usize {
        self.order.map_or(row, |order| {
            let head = row / order.len() * order.len();
            head + order[row % order.len()]
        })
    }

    fn check(&self, values: &[f32], too_large: &AtomicBool, no_number: &AtomicBool) {
        if !self.to.is_float() && !values.iter().all(|v| v.is_finite()) {
            no_number.store(true, Ordering::Relaxed);
        }
        let is_beyond = |v: &f32| v.is_finite() && v.abs() >= BEYOND_HALF;
        if self.to == BlockType::F16 && values.iter().any(is_beyond) {
            too_large.store(true, Ordering::Relaxed);
        }
    }
}

/// How much each value x of a row matters if its input has the mean square s: s · (rms² + x²)^p, with rms that of the row and p of
/// [`power_of_size`]. llama-quantize has ½ for p always.
fn importance_by_inputs(values: &[f32], inputs: &[f32], power: f32) -> Vec<f32> {
    let square = mean_square(values);
    let each = values.iter().zip(inputs);
    each.map(|(v, input)| input * (square + v * v).powf(power))
        .collect()
}

/// The power, 0 to ½, of the size of values in [`importance_by_inputs`], for inputs of a matrix with these mean squares. It is ½ where they are
/// alike, and smaller the fewer columns have most of their sum. In Gemma 3 270M and SmolLM2 these are 1 to 10 % of the columns, and weights by
/// inputs alone predict best; in Qwen2.5 they are 10 to 70 %, and such weights clip large values too much, as [`importance_by_size`] says.
fn power_of_size(inputs: &[f32]) -> f32 {
    let sum: f64 = inputs.iter().map(|s| f64::from(*s)).sum();
    let squares: f64 = inputs.iter().map(|s| f64::from(*s).powi(2)).sum();
    // The number of equal columns that would have this sum and this sum of squares.
    let columns = if squares > 0.0 {
        sum * sum / squares
    } else {
        0.0
    };
    let share = columns / inputs.len().max(1) as f64;
    0.5 * (share / EVEN_SHARE).min(1.0) as f32
}

fn mean_square(values: &[f32]) -> f32 {
    values.iter().map(|v| v * v).sum::<f32>() / values.len().max(1) as f32
}

/// How much the values of a row matter where nothing is known of their inputs: rms + |x|. With squared errors that all count alike, large
/// values are clipped to make many small ones better, and those do harm: Qwen2.5-Coder-0.5B in Q4_0 has a perplexity of 55.8 then, and
/// 50.3 with these.
fn importance_by_size(values: &[f32]) -> Vec<f32> {
    let rms = mean_square(values).sqrt();
    values.iter().map(|v| rms + v.abs()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row whose last value is ten times the others.
    fn row() -> Vec<f32> {
        let mut values = vec![0.1; 32];
        values[31] = 1.0;
        values
    }

    #[test]
    fn values_count_by_their_size_where_inputs_are_alike() {
        let inputs = vec![2.0; 32];
        let power = power_of_size(&inputs);
        assert_eq!(power, 0.5);
        let all = importance_by_inputs(&row(), &inputs, power);
        assert!(all[31] > 4.0 * all[0], "{all:?}");
    }

    #[test]
    fn inputs_alone_count_where_few_columns_have_them() {
        let mut inputs = vec![0.001; 32];
        inputs[0] = 100.0;
        // 1 of 32 columns: an eighth of the quarter from which size counts in full.
        let power = power_of_size(&inputs);
        assert!((power - 0.0625).abs() < 1e-3, "{power}");
        let all = importance_by_inputs(&row(), &inputs, power);
        assert!(all[31] < 1.4 * all[1], "{all:?}");
    }

    #[test]
    fn inputs_of_zero_and_no_inputs_have_a_power() {
        assert_eq!(power_of_size(&[0.0; 32]), 0.0);
        assert_eq!(power_of_size(&[]), 0.0);
    }
}
