//! The cache folder: profiles and outcomes of earlier runs are found there, kept there, and forgotten when they get too many.
//!
//! A folder that cannot be read or written is no error: what it would have spared is done again.

use std::fs;
use std::path::{Path, PathBuf};

use crate::hub;
use crate::prune::{Origin, Outcome, OutcomeKey, Profile, StoredProfile, outcome, store};

/// Profiles that are kept, most of which are some MiB, and how many of them may be larger than [`LARGE`].
const MOST_PROFILES: usize = 64;
const MOST_LARGE_PROFILES: usize = 4;
/// Bytes that only profiles with covariances exceed.
const LARGE: u64 = 32 << 20;
/// Outcomes that are kept, and bytes that one of them may have; all together may have twice as many.
const MOST_OUTCOMES: usize = 16;
const MOST_OUTCOME_BYTES: u64 = 1 << 30;

/// The folder; `None` where the user has none.
#[derive(Debug, Clone)]
pub(super) struct CacheFolder(Option<PathBuf>);

impl CacheFolder {
    /// The folder that was named, or the user's.
    pub fn new(named: Option<PathBuf>) -> Self {
        Self(named.or_else(|| hub::profiles_dir().ok()))
    }

    /// The profile of an earlier run, and its hash. One that cannot be used is as good as none.
    pub fn find_profile(&self, origin: &Origin) -> Option<(Profile, String)> {
        let path = self.profile_path(origin)?;
        if !path.exists() {
            return None;
        }
        let stored = StoredProfile::load(&path)
            .map_err(|error| tracing::warn!("{error}; calibrating again"))
            .ok()?;
        let same = is_same(&stored.origin, origin);
        same.then_some((stored.profile, StoredProfile::stated_hash(&path)?))
    }

    /// The hash of the profile of an earlier run, which is not read for it.
    pub fn profile_hash(&self, origin: &Origin) -> Option<String> {
        StoredProfile::stated_hash(&self.profile_path(origin)?)
    }

    /// Keeps a profile for the next run, and returns its hash; `None` if that is not possible.
    pub fn keep_profile(&self, stored: &StoredProfile) -> Option<String> {
        let folder = self.0.as_ref()?;
        let path = self.profile_path(&stored.origin)?;
        make(folder);
        match stored.save(&path) {
            Ok(hash) => {
                forget_profiles(folder);
                Some(hash)
            }
            Err(error) => {
                tracing::info!("the profile is not kept for the next run: {error}");
                None
            }
        }
    }

    /// The outcome of an earlier run. One that cannot be used is as good as none.
    pub fn find_outcome(&self, key: &OutcomeKey) -> Option<Outcome> {
        let path = self.outcome_path(key)?;
        if !path.exists() {
            return None;
        }
        Outcome::load(&path, key)
            .map_err(|error| tracing::warn!("{error}; pruning anew"))
            .ok()
    }

    /// Keeps an outcome for the next run, if that is possible.
    pub fn keep_outcome(&self, outcome: &Outcome, key: &OutcomeKey) {
        let (Some(folder), Some(path)) = (&self.0, self.outcome_path(key)) else {
            return;
        };
        if outcome.bytes() as u64 > MOST_OUTCOME_BYTES {
            tracing::debug!("the outcome is too large to be kept");
            return;
        }
        make(folder);
        match outcome.save(&path, key) {
            Ok(()) => forget_outcomes(folder),
            Err(error) => tracing::info!("the outcome is not kept for the next run: {error}"),
        }
    }

    fn profile_path(&self, origin: &Origin) -> Option<PathBuf> {
        let (model, text) = (origin.model.get(..32)?, origin.text.get(..32)?);
        let collected = origin.collected.hash();
        let (collected, version) = (collected.get(..16)?, store::VERSION);
        let name = format!("{model}-{text}-{collected}-v{version}.profile");
        Some(self.0.as_ref()?.join(name))
    }

    fn outcome_path(&self, key: &OutcomeKey) -> Option<PathBuf> {
        let (hash, version) = (key.hash(), outcome::VERSION);
        let name = format!("{}-v{version}.outcome", hash.get(..32)?);
        Some(self.0.as_ref()?.join(name))
    }
}

/// Whether two profiles are the same for all that a run can tell. Names are for messages alone.
fn is_same(a: &Origin, b: &Origin) -> bool {
    (&a.model, &a.text, &a.collected, &a.flapjack) == (&b.model, &b.text, &b.collected, &b.flapjack)
}

/// Makes the folder. Where that fails, saving tells.
fn make(folder: &Path) {
    if let Err(error) = fs::create_dir_all(folder) {
        tracing::debug!("cannot make the folder {}: {error}", folder.display());
    }
}

fn forget_profiles(folder: &Path) {
    let (mut count, mut large) = (0, 0);
    forget_oldest(folder, "profile", |bytes| {
        let is_large = bytes > LARGE;
        let stays = count < MOST_PROFILES && (large < MOST_LARGE_PROFILES || !is_large);
        count += usize::from(stays);
        large += usize::from(stays && is_large);
        stays
    });
}

fn forget_outcomes(folder: &Path) {
    let (mut count, mut all) = (0, 0);
    forget_oldest(folder, "outcome", |bytes| {
        count += 1;
        all += bytes;
        count <= MOST_OUTCOMES && all <= 2 * MOST_OUTCOME_BYTES
    });
}

/// Removes the files of a folder with this extension that `stays` does not let stay. It is asked with their sizes, from the
/// youngest to the oldest.
fn forget_oldest(folder: &Path, extension: &str, mut stays: impl FnMut(u64) -> bool) {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = files
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .filter_map(|path| {
            let metadata = fs::metadata(&path).ok()?;
            Some((metadata.modified().ok()?, path, metadata.len()))
        })
        .collect();
    files.sort();
    for (_, path, bytes) in files.iter().rev() {
        if stays(*bytes) {
            continue;
        }
        if let Err(error) = fs::remove_file(path) {
            tracing::debug!("cannot remove {}: {error}", path.display());
        }
    }
}
