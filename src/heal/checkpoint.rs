//! Training in the middle, as a file, from which it goes on to the bit.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::adamw::AdamW;
use crate::files;
use crate::prune::format::{HASH, Hashing, read_head};

const MAGIC: &[u8; 8] = b"FLAPHEAL";
/// Goes up whenever the format does, or what training computes.
pub const VERSION: u32 = 1;
/// Floats that are read at a time.
const PIECE: usize = 1 << 18;

/// Where training is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// What it follows from; another training has another.
    pub key: String,
    /// Steps that are done.
    pub done: usize,
    /// Steps in all; `None` while that is not known.
    pub steps: Option<usize>,
    /// Seconds that the steps took.
    pub seconds: f64,
    /// Values that are trained.
    pub trained: usize,
}

/// Bytes of a file.
pub fn bytes(trained: usize) -> u64 {
    3 * 4 * trained as u64 + 4096
}

/// Writes the file, whole or not at all.
///
/// # Errors
/// Those of the operating system.
pub fn save(path: &Path, state: &State, parameters: &[f32], adamw: &AdamW) -> io::Result<()> {
    files::replace(path, |file| {
        let out = BufWriter::with_capacity(1 << 20, file);
        let mut out = Hashing::begin(out, MAGIC, VERSION, state)?;
        for values in [parameters, &adamw.first, &adamw.second] {
            for piece in values.chunks(PIECE) {
                out.put_floats(piece)?;
            }
        }
        out.finish().map(drop)
    })
}

/// Reads the file of a training with this key, if it is there and whole. Where it is damaged, what was read of it is left in
/// `parameters` and `adamw`, and the answer is `Err`.
pub fn load(
    path: &Path,
    key: &str,
    parameters: &mut [f32],
    adamw: &mut AdamW,
) -> Result<Option<State>, ()> {
    let Some(state) = read_head::<State>(path, MAGIC, VERSION) else {
        return Ok(None);
    };
    if state.key != key || state.trained != parameters.len() {
        return Ok(None);
    }
    let read = || -> io::Result<bool> {
        let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
        let mut hasher = Sha256::new();
        let mut start = [0; 16];
        file.read_exact(&mut start)?;
        hasher.update(start);
        let len = u32::from_le_bytes(start[12..].try_into().expect("four bytes"));
        let mut header = vec![0; len as usize];
        file.read_exact(&mut header)?;
        hasher.update(&header);
        let mut bytes = vec![0; 4 * PIECE];
        for values in [parameters, &mut adamw.first, &mut adamw.second] {
            for piece in values.chunks_mut(PIECE) {
                let bytes = &mut bytes[..4 * piece.len()];
                file.read_exact(bytes)?;
                hasher.update(&*bytes);
                for (to, from) in piece.iter_mut().zip(bytes.as_chunks().0) {
                    *to = f32::from_le_bytes(*from);
                }
            }
        }
        let mut hash = [0; HASH];
        file.read_exact(&mut hash)?;
        Ok(hasher.finalize().as_slice() == hash)
    };
    match read() {
        Ok(true) => Ok(Some(state)),
        _ => Err(()),
    }
}
