//! What several test files share: small random models and their pruning, an independent reference, the program, and the paths
//! of real data.
#![allow(dead_code)]

pub mod blocks;
pub mod browser;
pub mod engine;
pub mod products;
pub mod program;
pub mod pruning;
pub mod python;
pub mod reference;
pub mod synthetic;
#[cfg(unix)]
pub mod terminal;

use std::path::PathBuf;

use flapjack::gguf::{GgufFile, Writer};

/// A file of the folder beside the project that holds evaluation texts and fixtures; `None`, after noting a skip, where there
/// is no such folder.
///
/// # Panics
/// On a machine that checks commits, if the folder is there and the file is not: then nothing may be passed over in silence.
pub fn shared(file: &str) -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let path = folder.join(file);
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("CI").is_none() || !folder.exists(),
        "../shared is there, and {file} in it is not"
    );
    skip(&format!("../shared/{file} is not there"));
    None
}

/// A program of llama.cpp, from the folder that `FLAPJACK_PEER` names or from where the benchmarks put it; `None`, after
/// noting a skip, where there is none.
///
/// # Panics
/// If `FLAPJACK_PEER` names a folder without it.
pub fn peer(program: &str) -> Option<PathBuf> {
    let named = std::env::var_os("FLAPJACK_PEER").map(PathBuf::from);
    let folder = named.clone().unwrap_or_else(|| {
        let home = std::env::var_os("HOME").unwrap_or_default();
        PathBuf::from(home).join(".cache/peer-llama-cpp/build/bin")
    });
    let path = folder.join(program);
    if path.exists() {
        return Some(path);
    }
    assert!(
        named.is_none(),
        "FLAPJACK_PEER names {}, where there is no {program}",
        folder.display()
    );
    skip(&format!(
        "there is no {program}; FLAPJACK_PEER names the folder of llama.cpp's programs"
    ));
    None
}

/// Says that this test, or a part of it, is skipped, and why. `.ci/test` counts what is said here, and shows it at the end.
pub fn skip(why: &str) {
    use std::io::Write;
    let test = std::thread::current();
    let test = test.name().unwrap_or("a test");
    println!("skipped: {why}");
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("skipped");
    let file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path);
    // One line, written at once, since tests run side by side.
    file.and_then(|mut file| file.write_all(format!("{test}: {why}\n").as_bytes()))
        .expect("the list of skipped tests can be written");
}

/// The default model, fetched if need be.
pub fn default_model() -> PathBuf {
    flapjack::hub::default_model().expect("the default model can be had")
}

/// A file once more, to which something can be added.
pub fn copy_of(file: &GgufFile) -> Writer<'_> {
    let mut writer = Writer::new();
    for (key, value) in file.entries() {
        writer.metadata(key, value.clone());
    }
    for tensor in file.tensors() {
        let bytes = file.bytes(tensor);
        writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
    }
    writer
}

/// Small, fast, reproducible random numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub fn normals(&mut self, n: usize, scale: f64) -> Vec<f32> {
        (0..n).map(|_| (self.normal() * scale) as f32).collect()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn tokens(&mut self, n: usize, vocabulary: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocabulary) as u32).collect()
    }
}

/// In double precision.
pub fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// |a − b| / |b| of two vectors.
pub fn relative_error(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - b).powi(2))
        .sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    if size == 0.0 {
        difference.sqrt()
    } else {
        (difference / size).sqrt()
    }
}
