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

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::format::{HASH, Hashing, Numbers, checked, hash_of, read_head, read_header};
use crate::files::{self, hexadecimal};
use crate::prune::collect::{
    Covariance, CurveOptions, Curves, FeatureStats, LayerProfile, Profile, have_covariances,
};

const MAGIC: &[u8; 8] = b"FLAPPROF";
/// Goes up whenever the format does, or what calibration computes: a profile of another version is not used.
pub const VERSION: u32 = 7;

/// What a profile was made from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The model's [fingerprint](crate::gguf::GgufFile::fingerprint).
    pub model: String,
    /// The name of the model's file, for messages.
    pub model_name: String,
    /// The SHA-256 of the tokens ([`hash_tokens`]), or of how a text is made that can be made again ([`hash_making`]).
    pub text: String,
    /// Where the text came from, for messages.
    pub source: String,
    /// Tokens of the text. Loss curves, if there are any, were measured on the last of them, and statistics on the others.
    pub tokens: usize,
    /// What was collected of the text.
    pub collected: Collected,
    /// The version of flapjack.
    pub flapjack: String,
}

/// What was collected of a text: everything that profiles of the same model and text differ by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Collected {
    pub covariances: Covariances,
    /// Tokens at the end of the text that were kept for judging.
    pub judge_tokens: usize,
    /// How loss curves were measured; `None` where they were not.
    pub curves: Option<CurveOptions>,
}

/// Whether covariances were collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Covariances {
    /// There are means and variances only.
    None,
    /// The profile has all of them.
    All,
    /// There were those of a group of layers at a time. The profile has none, but its curves were measured with them.
    InGroups,
}

impl Collected {
    /// The SHA-256 of all fields, in hexadecimal digits.
    pub fn hash(&self) -> String {
        hash_of(self)
    }
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
    #[error("{path} is not a profile")]
    NotAProfile { path: PathBuf },
    #[error("{path} is a profile of format {found}, and this version of flapjack reads {VERSION}")]
    Version { path: PathBuf, found: u32 },
    #[error("{path} is damaged ({problem})")]
    Damaged {
        path: PathBuf,
        problem: &'static str,
    },
    #[error(
        "{path} is a profile of {made_for} (fingerprint {theirs:.12}), and the model is {model} (fingerprint {ours:.12})"
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
    /// Features and tokens seen of every layer's attention and MLP.
    layers: Vec<[(usize, u64); 2]>,
    /// Whether there are covariances.
    covariances: bool,
    curves: Option<Curves>,
}

/// Bytes that the statistics of so many features take in a file; `None` if that is too many for a number.
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

/// What a file has.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    pub origin: &'a Origin,
    pub layers: &'a [LayerProfile],
    /// `None` where none were measured yet.
    pub curves: Option<&'a Curves>,
}

impl Content<'_> {
    /// Writes the bytes of the file and returns their SHA-256, which are the last of them.
    fn write(&self, out: impl Write) -> io::Result<[u8; HASH]> {
        let covariances = have_covariances(self.layers);
        let layers = self.layers.iter();
        let header = Header {
            origin: self.origin.clone(),
            layers: layers
                .map(|l| [&l.attention, &l.mlp].map(|s| (s.len(), s.count())))
                .collect(),
            covariances,
            curves: self.curves.cloned(),
        };
        let mut out = Hashing::begin(out, MAGIC, VERSION, &header)?;
        for layer in self.layers {
            for stats in [&layer.attention, &layer.mlp] {
                out.put_doubles((0..stats.len()).map(|j| stats.mean(j)))?;
                out.put_doubles((0..stats.len()).map(|j| stats.deviation(j)))?;
                let Some(covariance) = stats.covariance.as_ref().filter(|_| covariances) else {
                    continue;
                };
                let (shift, sums, rows) = covariance.parts();
                // Before the first token there is no shift.
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

    /// The bytes of the file, without its head.
    pub fn bytes(&self) -> u64 {
        let covariances = have_covariances(self.layers);
        let stats = self.layers.iter().flat_map(|l| [&l.attention, &l.mlp]);
        let bytes = stats.map(|stats| stored_bytes(stats.len(), covariances).unwrap_or(usize::MAX));
        bytes.fold(0, |sum, bytes| sum.saturating_add(bytes as u64))
    }

    /// Writes the file, whole or not at all, and returns its [hash](StoredProfile::hash).
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
}

impl StoredProfile {
    fn content(&self) -> Content<'_> {
        Content {
            origin: &self.origin,
            layers: &self.profile.layers,
            curves: self.profile.curves.as_ref(),
        }
    }

    /// The bytes of the file, without its head.
    pub fn bytes(&self) -> u64 {
        self.content().bytes()
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.content()
            .write(&mut bytes)
            .expect("a Vec takes all bytes");
        bytes
    }

    /// The SHA-256 by which a pruned file names its profile, in hexadecimal digits.
    pub fn hash(&self) -> String {
        let hash = self.content().write(io::sink());
        hexadecimal(&hash.expect("a sink takes all bytes"))
    }

    /// Writes the file, whole or not at all, and returns the [hash](StoredProfile::hash).
    ///
    /// # Errors
    /// [`ProfileError::Io`].
    pub fn save(&self, path: &Path) -> Result<String, ProfileError> {
        self.content().save(path)
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

    /// What the file of a profile says that it was made from, without reading the rest; `None` if there is no such file, or none
    /// of this format.
    pub fn stated_origin(path: &Path) -> Option<Origin> {
        let header: Header = read_head(path, MAGIC, VERSION)?;
        Some(header.origin)
    }

    /// Reads the file of a profile.
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

/// The SHA-256, in hexadecimal digits, of how a text is made that can be made again.
pub fn hash_making(how: &impl Serialize) -> String {
    hash_of(how)
}
