//! A projection that has lost columns, to be put in the place of the dense one.

use crate::quant::BlockType;

/// A projection `[rows, columns]` that has lost columns, encoded.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedProjection {
    pub block_type: BlockType,
    /// The rows in the native layout; empty where the projection has lost nothing and is as it was.
    pub bytes: Vec<u8>,
    /// The whole bias, `[rows]`; `None` where the projection has none.
    pub bias: Option<Vec<f32>>,
}
