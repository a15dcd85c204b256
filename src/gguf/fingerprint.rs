//! Knowing a model file again.

use sha2::{Digest, Sha256};

use super::GgufFile;
use crate::files::hexadecimal;

/// A tensor is hashed whole up to this size, and beyond it in pieces of [`PIECE`] bytes that make up this size.
const SAMPLED: usize = 64 << 10;
const PIECE: usize = 4 << 10;

impl GgufFile {
    /// A SHA-256, in hexadecimal digits, of everything but the tensors' data (metadata, tensor table, length of the file) and
    /// of samples of every tensor's data, evenly spread from its first byte to its last. Training, quantising and damage
    /// of whole pages show in it; a few weights changed by hand may not. It costs milliseconds and touches some MiB,
    /// however large the file is. The map must be as the file is: ask before anything is rearranged in it.
    pub fn fingerprint(&self) -> String {
        let bytes = self.map().bytes();
        let data = self.tensors().iter().filter(|t| !t.range.is_empty());
        let data_start = data.map(|t| t.range.start).min().unwrap_or(bytes.len());
        let mut hasher = Sha256::new();
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes[..data_start]);
        for tensor in self.tensors() {
            let data = self.bytes(tensor);
            if data.len() <= SAMPLED {
                hasher.update(data);
                continue;
            }
            let pieces = SAMPLED / PIECE;
            for i in 0..pieces {
                let start = (data.len() - PIECE) / (pieces - 1) * i;
                let start = if i + 1 == pieces {
                    data.len() - PIECE
                } else {
                    start
                };
                hasher.update(&data[start..start + PIECE]);
            }
        }
        hexadecimal(&hasher.finalize())
    }
}
