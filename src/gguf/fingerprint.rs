//! A hash by which a model file is recognised.

use sha2::{Digest, Sha256};

use super::{GgufFile, write};
use crate::files::hexadecimal;

/// The most bytes of a tensor that are hashed. A larger tensor is sampled: pieces of [`PIECE`] bytes that add up to this size.
const SAMPLED: usize = 64 << 10;
/// The size in bytes of one sample.
const PIECE: usize = 4 << 10;

impl GgufFile {
    /// The fingerprint of the file: a SHA-256 in hexadecimal digits.
    ///
    /// It covers the length of the file, metadata and tensor table, and samples of every tensor's data, evenly spread from
    /// the first byte to the last; and metadata that take the place of the file's own
    /// ([`open_with`](Self::open_with)). Other training, another quantisation and larger damage change it; a few weights changed by
    /// hand may not. It takes milliseconds and reads a few MiB, however large the file is.
    ///
    /// It is computed from the map, so it must be taken before anything in the map is rearranged.
    pub fn fingerprint(&self) -> String {
        let bytes = self.map().bytes();
        let data = self.tensors().iter().filter(|t| !t.range.is_empty());
        let data_start = data.map(|t| t.range.start).min().unwrap_or(bytes.len());
        let mut hasher = Sha256::new();
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes[..data_start]);
        // The tables of later parts are not before the data.
        for tensor in &self.tensors()[self.later_parts.clone()] {
            hasher.update(format!(
                "{}\0{:?}\0{}\0",
                tensor.name,
                tensor.shape,
                tensor.type_name()
            ));
        }
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
        // Of a file that is put together no bytes are its metadata.
        let own = self.keys.iter().filter(|_| !self.is_gguf());
        for key in own.chain(&self.overridden) {
            let mut entry = Vec::new();
            write::put_entry(&mut entry, key, &self.metadata[key]);
            hasher.update((entry.len() as u64).to_le_bytes());
            hasher.update(&entry);
        }
        hexadecimal(&hasher.finalize())
    }
}
