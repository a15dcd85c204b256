//! Profiles as files.
//!
//! A file is, all little-endian: the bytes `FLAPPROF`; the version (u32); the length of what follows (u32), a JSON object with
//! the [`Origin`], the widths of the layers and the loss curves, if there are any; then for every layer, first of its attention
//! and then of its MLP, the mean of every feature and the sum of squared deviations from it (f64) and, where the profile has
//! covariances, their shift (f32), their sums (f64) and the lower triangle of their products row by row (f32), as
//! [`Covariance`] has them; at the end the SHA-256 of all bytes before.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Covariance, Curve, Curves, FeatureStats, LayerProfile, Profile};
use crate::files::{self, hexadecimal};

const MAGIC: &[u8; 8] = b"FLAPPROF";
/// Goes up whenever the format does, or what calibration computes: a profile of another version is not used.
pub const VERSION: u32 = 2;
const HASH: usize = 32;

/// What a profile was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The model's [fingerprint](crate::gguf::GgufFile::fingerprint).
    pub model: String,
    /// The name of the model's file, for messages.
    pub model_name: String,
    /// The SHA-256 of the tokens, or of how a text was made that can be made again.
    pub text: String,
    /// Where the text came from, for messages.
    pub source: String,
    /// Tokens of the text. Loss curves, if there are any, were measured on the last of them, and statistics on the others.
    pub tokens: usize,
    /// What was collected, in words.
    pub collected: String,
    /// The version of flapjack.
    pub flapjack: String,
}

/// A profile and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredProfile {
    pub origin: Origin,
    pub profile: Profile,
}

/// Why a profile file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is not a profile; `flapjack calibrate -o FILE` makes one")]
    NotAProfile { path: PathBuf },
    #[error(
        "{path} is a profile of format {found}, and this flapjack reads {VERSION}; make it anew with `flapjack calibrate`"
    )]
    Version { path: PathBuf, found: u32 },
    #[error("{path} is damaged ({problem}); make it anew with `flapjack calibrate`")]
    Damaged {
        path: PathBuf,
        problem: &'static str,
    },
    #[error(
        "{path} is a profile of {made_for} (fingerprint {theirs:.12}), and the model is {model} (fingerprint {ours:.12}); make one for it with `flapjack calibrate`"
    )]
    OtherModel {
        path: PathBuf,
        made_for: String,
        theirs: String,
        model: String,
        ours: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Header {
    origin: Origin,
    /// Of every layer, attention and MLP: features, and tokens seen.
    layers: Vec<[(usize, u64); 2]>,
    covariances: bool,
    curves: Option<StoredCurves>,
}

/// [`Curves`], with choices by their names.
#[derive(Serialize, Deserialize)]
struct StoredCurves {
    metric: String,
    heads: String,
    restore: String,
    tokens: usize,
    /// The points of every module, with the bits of the loss, which its digits need not give back exactly.
    modules: Vec<Vec<(usize, u64)>>,
}

impl StoredCurves {
    fn new(curves: &Curves) -> Self {
        let points = |c: &Curve| -> Vec<(usize, u64)> {
            c.points
                .iter()
                .map(|(n, loss)| (*n, loss.to_bits()))
                .collect()
        };
        Self {
            metric: curves.metric.to_string(),
            heads: curves.heads.to_string(),
            restore: curves.restore.to_string(),
            tokens: curves.tokens,
            modules: curves.modules.iter().map(points).collect(),
        }
    }

    /// `None` if they have a choice that is not known.
    fn curves(self) -> Option<Curves> {
        let points = |points: Vec<(usize, u64)>| Curve {
            points: points
                .into_iter()
                .map(|(n, bits)| (n, f64::from_bits(bits)))
                .collect(),
        };
        Some(Curves {
            metric: self.metric.parse().ok()?,
            heads: self.heads.parse().ok()?,
            restore: self.restore.parse().ok()?,
            modules: self.modules.into_iter().map(points).collect(),
            tokens: self.tokens,
        })
    }
}

/// Hashes what it passes on.
pub(super) struct Hashing<W> {
    out: W,
    hasher: Sha256,
}

impl<W: Write> Hashing<W> {
    /// Begins a file with its magic bytes, its version, and the length and the bytes of its header.
    pub(super) fn begin(
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
    pub(super) fn finish(mut self) -> io::Result<[u8; HASH]> {
        let hash: [u8; HASH] = self.hasher.finalize().into();
        self.out.write_all(&hash)?;
        self.out.flush()?;
        Ok(hash)
    }

    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)
    }

    fn put_doubles(&mut self, values: impl Iterator<Item = f64>) -> io::Result<()> {
        let bytes: Vec<u8> = values.flat_map(f64::to_le_bytes).collect();
        self.put(&bytes)
    }

    pub(super) fn put_floats(&mut self, values: &[f32]) -> io::Result<()> {
        let mut bytes = vec![0; size_of_val(values)];
        for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *to = value.to_le_bytes();
        }
        self.put(&bytes)
    }
}

/// What a file has before the hash at its end, if the hash is of that.
pub(super) fn checked(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let (body, hash) = bytes.split_last_chunk::<HASH>().ok_or("it is cut off")?;
    if Sha256::digest(body).as_slice() != hash {
        return Err("its checksum is wrong");
    }
    Ok(body)
}

/// The header whose length and bytes a checked file has after its first `start` bytes, and what follows it. It was written by
/// this very version, but reading must not depend on that.
pub(super) fn read_header<H: DeserializeOwned>(body: &[u8], start: usize) -> Option<(H, &[u8])> {
    let (len, rest) = body.get(start..)?.split_first_chunk()?;
    let (header, data) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    Some((serde_json::from_slice(header).ok()?, data))
}

/// Takes numbers from the front of bytes whose length was checked.
pub(super) struct Numbers<'a>(pub &'a [u8]);

impl Numbers<'_> {
    fn doubles(&mut self, count: usize) -> Vec<f64> {
        let (these, rest) = self.0.split_at(8 * count);
        self.0 = rest;
        let numbers = these.as_chunks().0.iter();
        numbers.map(|n| f64::from_le_bytes(*n)).collect()
    }

    pub(super) fn floats(&mut self, to: &mut [f32]) {
        let (these, rest) = self.0.split_at(size_of_val(to));
        self.0 = rest;
        for (to, n) in to.iter_mut().zip(these.as_chunks().0) {
            *to = f32::from_le_bytes(*n);
        }
    }
}

/// Bytes that the statistics of so many features take; `None` if there are not so many numbers.
fn stored_bytes(features: usize, covariances: bool) -> Option<usize> {
    let moments = features.checked_mul(16)?;
    if !covariances {
        return Some(moments);
    }
    let pairs = features.checked_mul(features.checked_add(1)?)? / 2;
    let products = pairs.checked_mul(4)?;
    moments
        .checked_add(features.checked_mul(12)?)?
        .checked_add(products)
}

impl StoredProfile {
    /// Writes the bytes of the file and returns their SHA-256, which are the last of them.
    fn write(&self, out: impl Write) -> io::Result<[u8; HASH]> {
        let covariances = self.profile.has_covariance();
        let layers = self.profile.layers.iter();
        let header = Header {
            origin: self.origin.clone(),
            layers: layers
                .map(|l| [&l.attention, &l.mlp].map(|s| (s.len(), s.count())))
                .collect(),
            covariances,
            curves: self.profile.curves.as_ref().map(StoredCurves::new),
        };
        let mut out = Hashing::begin(out, MAGIC, VERSION, &header)?;
        for layer in &self.profile.layers {
            for stats in [&layer.attention, &layer.mlp] {
                out.put_doubles((0..stats.len()).map(|j| stats.mean(j)))?;
                out.put_doubles((0..stats.len()).map(|j| stats.deviation(j)))?;
                let Some(covariance) = stats.covariance.as_ref().filter(|_| covariances) else {
                    continue;
                };
                let (shift, sums, rows) = covariance.parts();
                // There is none before the first token.
                let mut shift = shift.to_vec();
                shift.resize(stats.len(), 0.0);
                out.put_floats(&shift)?;
                out.put_doubles(sums.iter().copied())?;
                for row in rows {
                    out.put_floats(row)?;
                }
            }
        }
        out.finish()
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write(&mut bytes).expect("a Vec takes all bytes");
        bytes
    }

    /// The SHA-256 by which a pruned file names its profile, in hexadecimal digits.
    pub fn hash(&self) -> String {
        hexadecimal(&self.write(io::sink()).expect("a sink takes all bytes"))
    }

    /// Writes the file, whole or not at all, and returns the [hash](StoredProfile::hash).
    ///
    /// # Errors
    /// [`ProfileError::Io`].
    pub fn save(&self, path: &Path) -> Result<String, ProfileError> {
        let mut hash = [0; HASH];
        files::replace(path, |file| {
            hash = self.write(BufWriter::with_capacity(1 << 20, file))?;
            Ok(())
        })
        .map_err(|source| ProfileError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(hexadecimal(&hash))
    }

    /// The [hash](StoredProfile::hash) that the file of a profile states, without reading what it is the hash of; `None` if
    /// there is no such file, or none of this format.
    pub fn stated_hash(path: &Path) -> Option<String> {
        let mut file = File::open(path).ok()?;
        let mut start = [0; 12];
        file.read_exact(&mut start).ok()?;
        if start != *[&MAGIC[..], &VERSION.to_le_bytes()].concat() {
            return None;
        }
        let mut hash = [0; HASH];
        file.seek(io::SeekFrom::End(-(HASH as i64))).ok()?;
        file.read_exact(&mut hash).ok()?;
        Some(hexadecimal(&hash))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`ProfileError`], if it cannot be read, is no profile, one of another version, or damaged.
    pub fn load(path: &Path) -> Result<Self, ProfileError> {
        let bytes = std::fs::read(path).map_err(|source| ProfileError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::from_bytes(path, &bytes)
    }

    fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, ProfileError> {
        let path = || path.to_owned();
        let damaged = |problem| ProfileError::Damaged {
            path: path(),
            problem,
        };
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            return Err(ProfileError::NotAProfile { path: path() });
        };
        let (version, _) = rest.split_first_chunk().ok_or(damaged("it is cut off"))?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(ProfileError::Version {
                path: path(),
                found: version,
            });
        }
        let body = checked(bytes).map_err(damaged)?;
        let odd = || damaged("its parts do not fit each other");
        let start = MAGIC.len() + size_of_val(&VERSION);
        let (header, data) = read_header(body, start).ok_or_else(odd)?;
        let Header {
            origin,
            layers,
            covariances,
            curves,
        } = header;
        let wanted = layers.iter().flatten().try_fold(0usize, |sum, (n, _)| {
            sum.checked_add(stored_bytes(*n, covariances)?)
        });
        if wanted != Some(data.len()) {
            return Err(odd());
        }
        let mut numbers = Numbers(data);
        let mut stats = |(features, count): (usize, u64)| {
            let means = numbers.doubles(features);
            let deviations = numbers.doubles(features);
            let mut stats = FeatureStats::from_parts(count, &means, &deviations);
            if covariances {
                let mut shift = vec![0.0; features];
                numbers.floats(&mut shift);
                let sums = numbers.doubles(features);
                if count == 0 {
                    shift.clear();
                }
                let row = |row: &mut [f32]| numbers.floats(row);
                stats.covariance = Some(Covariance::from_parts(count, shift, sums, row));
            }
            stats
        };
        let layers = layers.into_iter().map(|[attention, mlp]| {
            let (attention, mlp) = (stats(attention), stats(mlp));
            LayerProfile { attention, mlp }
        });
        let layers = layers.collect();
        let curves = curves.map(|c| c.curves().ok_or_else(odd)).transpose()?;
        Ok(Self {
            profile: Profile { layers, curves },
            origin,
        })
    }

    /// Refuses a profile that was made for another model than the one with this fingerprint.
    ///
    /// # Errors
    /// [`ProfileError::OtherModel`], which names both.
    pub fn check_model(
        &self,
        path: &Path,
        fingerprint: &str,
        name: &str,
    ) -> Result<(), ProfileError> {
        if self.origin.model == fingerprint {
            return Ok(());
        }
        Err(ProfileError::OtherModel {
            path: path.to_owned(),
            made_for: self.origin.model_name.clone(),
            theirs: self.origin.model.clone(),
            model: name.to_owned(),
            ours: fingerprint.to_owned(),
        })
    }
}

/// The SHA-256 of a text's tokens, in hexadecimal digits, with the token that begins each of its sequences.
pub fn hash_tokens(tokens: &[u32], bos: Option<u32>) -> String {
    let mut hasher = Sha256::new();
    hasher.update(bos.map_or([0xff; 8], |t| u64::from(t).to_le_bytes()));
    for token in tokens {
        hasher.update(token.to_le_bytes());
    }
    hexadecimal(&hasher.finalize())
}

/// The SHA-256 of a recipe for a text, in hexadecimal digits.
pub fn hash_recipe(recipe: &str) -> String {
    hexadecimal(&Sha256::digest(recipe.as_bytes()))
}
