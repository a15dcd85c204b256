//! What the files of profiles and of outcomes have in common: magic bytes, a version, a header as JSON with its length before it,
//! numbers in little-endian order, and the SHA-256 of all that at the end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::files::hexadecimal;

/// Bytes of the hash at the end.
pub const HASH: usize = 32;

/// A writer that hashes what it passes on.
pub struct Hashing<W> {
    out: W,
    hasher: Sha256,
}

impl<W: Write> Hashing<W> {
    /// Begins a file with its magic bytes, its version, and the length and the bytes of its header.
    pub fn begin(
        out: W,
        magic: &[u8; 8],
        version: u32,
        header: &impl Serialize,
    ) -> io::Result<Self> {
        let header = serde_json::to_vec(header).expect("strings and numbers");
        let mut file = Self {
            out,
            hasher: Sha256::new(),
        };
        file.put(magic)?;
        file.put(&version.to_le_bytes())?;
        file.put(&(header.len() as u32).to_le_bytes())?;
        file.put(&header)?;
        Ok(file)
    }

    /// Ends with the hash of everything before, and returns it.
    pub fn finish(mut self) -> io::Result<[u8; HASH]> {
        let hash: [u8; HASH] = self.hasher.finalize().into();
        self.out.write_all(&hash)?;
        self.out.flush()?;
        Ok(hash)
    }

    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)
    }

    pub fn put_doubles(&mut self, values: impl Iterator<Item = f64>) -> io::Result<()> {
        let bytes: Vec<u8> = values.flat_map(f64::to_le_bytes).collect();
        self.put(&bytes)
    }

    pub fn put_floats(&mut self, values: &[f32]) -> io::Result<()> {
        let mut bytes = vec![0; size_of_val(values)];
        for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *to = value.to_le_bytes();
        }
        self.put(&bytes)
    }
}

/// The bytes of a file before the hash at its end.
///
/// # Errors
/// What is wrong, in words, if the file is too short or the hash is not that of the bytes.
pub fn checked(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let (body, hash) = bytes.split_last_chunk::<HASH>().ok_or("it is cut off")?;
    if Sha256::digest(body).as_slice() != hash {
        return Err("its checksum is wrong");
    }
    Ok(body)
}

/// The header whose length and bytes a checked file has after its first `start` bytes, and what follows it; `None` if there is no
/// such header. Files that pass the check were written by this very version, but reading must not depend on that.
pub fn read_header<H: DeserializeOwned>(body: &[u8], start: usize) -> Option<(H, &[u8])> {
    let (len, rest) = body.get(start..)?.split_first_chunk()?;
    let (header, data) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    Some((serde_json::from_slice(header).ok()?, data))
}

/// The header of a file that is not read any further, and so not checked; `None` if it has none of this kind and version.
pub fn read_head<H: DeserializeOwned>(path: &Path, magic: &[u8; 8], version: u32) -> Option<H> {
    let mut file = File::open(path).ok()?;
    let mut start = [0; 16];
    file.read_exact(&mut start).ok()?;
    let (kind, len) = start.split_last_chunk()?;
    if kind != [&magic[..], &version.to_le_bytes()].concat() {
        return None;
    }
    let mut header = Vec::new();
    let len = u32::from_le_bytes(*len).into();
    file.take(len).read_to_end(&mut header).ok()?;
    serde_json::from_slice(&header).ok()
}

/// A reader that takes numbers from the front of bytes whose length was checked.
pub struct Numbers<'a>(pub &'a [u8]);

impl Numbers<'_> {
    pub fn doubles(&mut self, count: usize) -> Vec<f64> {
        let (these, rest) = self.0.split_at(8 * count);
        self.0 = rest;
        let numbers = these.as_chunks().0.iter();
        numbers.map(|n| f64::from_le_bytes(*n)).collect()
    }

    pub fn floats(&mut self, to: &mut [f32]) {
        let (these, rest) = self.0.split_at(size_of_val(to));
        self.0 = rest;
        for (to, n) in to.iter_mut().zip(these.as_chunks().0) {
            *to = f32::from_le_bytes(*n);
        }
    }
}

/// The SHA-256, in hexadecimal digits, of data as JSON. Data that differs in any field has another.
pub fn hash_of(data: &impl Serialize) -> String {
    let json = serde_json::to_vec(data).expect("plain data");
    hexadecimal(&Sha256::digest(json))
}
