//! Rows of values to block formats and back.

use flapjack::quant::{BlockType, decode_row, encode_row};

/// The types whose blocks have 256 values.
pub const LONG_BLOCKS: [BlockType; 6] = [
    BlockType::Q2_K,
    BlockType::Q3_K,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
    BlockType::IQ4_XS,
];

/// What a row of whole blocks stands for.
pub fn decode(block_type: BlockType, bytes: &[u8]) -> Vec<f32> {
    let columns = bytes.len() / block_type.block_bytes() * block_type.block_len();
    let mut out = vec![f32::NAN; columns];
    decode_row(block_type, bytes, &mut out);
    out
}

/// A row in a block format.
pub fn encode(block_type: BlockType, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0xAA; block_type.row_bytes(values.len())];
    encode_row(block_type, values, &mut out);
    out
}

/// What encoding leaves of some values.
pub fn there_and_back(block_type: BlockType, values: &[f32]) -> Vec<f32> {
    decode(block_type, &encode(block_type, values))
}

/// Σ (a − b)²
pub fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum()
}
