//! Profiles as files.
//!
//! A file is, all little-endian: the bytes `FLAPPROF`; the version (u32); the length of what follows (u32), a JSON object with
//! the [`Origin`] and the widths of the layers; then for every layer, first of its attention and then of its MLP, the
//! mean of every feature and the sum of squared deviations from it (f64); at the end the SHA-256 of all bytes before.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FeatureStats, LayerProfile, Profile};
use crate::files::{self, hexadecimal};

const MAGIC: &[u8; 8] = b"FLAPPROF";
/// Goes up whenever the format does, or what calibration computes: a profile of another version is not used.
pub const VERSION: u32 = 1;
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
    pub tokens: usize,
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
}

impl StoredProfile {
    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let layers = self.profile.layers.iter();
        let header = Header {
            origin: self.origin.clone(),
            layers: layers
                .map(|l| [&l.attention, &l.mlp].map(|s| (s.len(), s.count())))
                .collect(),
        };
        let header = serde_json::to_vec(&header).expect("strings and numbers");
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&header);
        for layer in &self.profile.layers {
            for stats in [&layer.attention, &layer.mlp] {
                let means = (0..stats.len()).map(|j| stats.mean(j));
                let deviations = (0..stats.len()).map(|j| stats.deviation(j));
                for value in means.chain(deviations) {
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        let hash = Sha256::digest(&bytes);
        bytes.extend_from_slice(&hash);
        bytes
    }

    /// The SHA-256 by which a pruned file names its profile, in hexadecimal digits.
    pub fn hash(&self) -> String {
        let bytes = self.to_bytes();
        hexadecimal(&bytes[bytes.len() - HASH..])
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`ProfileError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), ProfileError> {
        files::replace(path, |file| file.write_all(&self.to_bytes())).map_err(|source| {
            ProfileError::Io {
                path: path.to_owned(),
                source,
            }
        })
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
        let (version, rest) = rest.split_first_chunk().ok_or(damaged("it is cut off"))?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(ProfileError::Version {
                path: path(),
                found: version,
            });
        }
        let (body, hash) = bytes
            .split_last_chunk::<HASH>()
            .ok_or(damaged("it is cut off"))?;
        if Sha256::digest(body).as_slice() != hash {
            return Err(damaged("its checksum is wrong"));
        }
        // What follows was written by this very version, but reading must not depend on that.
        let odd = || damaged("its parts do not fit each other");
        let rest = &rest[..rest.len() - HASH];
        let (len, rest) = rest.split_first_chunk().ok_or_else(odd)?;
        let (header, data) = rest
            .split_at_checked(u32::from_le_bytes(*len) as usize)
            .ok_or_else(odd)?;
        let header: Header = serde_json::from_slice(header).map_err(|_| odd())?;
        let mut numbers = data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|n| f64::from_le_bytes(*n));
        let wanted = header
            .layers
            .iter()
            .flatten()
            .try_fold(0usize, |sum, (n, _)| {
                n.checked_mul(16).and_then(|n| n.checked_add(sum))
            });
        if wanted != Some(data.len()) {
            return Err(odd());
        }
        let mut stats = |(features, count): (usize, u64)| {
            let means: Vec<f64> = numbers.by_ref().take(features).collect();
            let deviations: Vec<f64> = numbers.by_ref().take(features).collect();
            FeatureStats::from_parts(count, &means, &deviations)
        };
        let layers = header.layers.into_iter().map(|[attention, mlp]| {
            let (attention, mlp) = (stats(attention), stats(mlp));
            LayerProfile { attention, mlp }
        });
        Ok(Self {
            profile: Profile {
                layers: layers.collect(),
            },
            origin: header.origin,
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
