//! What a projection that loses columns has become.

use crate::quant::BlockType;

/// A projection `[rows, columns]` that has lost columns, encoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    pub block_type: BlockType,
    /// The rows in the native layout; empty where nothing was taken and nothing changed.
    pub bytes: Vec<u8>,
    /// The whole bias, `[rows]`; `None` where the projection has none.
    pub bias: Option<Vec<f32>>,
}
