//! The cache folder: profiles, outcomes and texts of earlier runs are found there, and kept there within a number of bytes. What was used
//! last longest ago goes first, and before all others what this version cannot read any more.
//!
//! | name | what it is |
//! | --- | --- |
//! | `MODEL-TEXT-COLLECTED-vN.profile` | a profile, under parts of the hashes that its [`Origin`] has |
//! | `MODEL-TEXT-COLLECTED-vN.hash` | the hash of a profile that was too large to stay: outcomes are found by it |
//! | `MODEL-TEXT-COLLECTED-vN.partial` | a profile whose calibration was broken off |
//! | `KEY-vN.training` | a healing that was broken off, under the same as its outcome |
//! | `KEY-vN.outcome` | an outcome, under a part of the hash of its [`OutcomeKey`] |
//! | `MODEL-KEY-vN.text` | a text that the model has written, under a part of the hash of how it is made |
//!
//! *N* is the version of the format. The time of a file's last change is that of its last use.
//!
//! A folder that cannot be read or written is no error: what it would have spared is done again.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::mixture::Mixed;
use super::report::{CacheKind, Notice};
use super::sizes::parse_size;
use crate::files;
use crate::heal::checkpoint;
use crate::hub;
use crate::model::Model;
use crate::prune::store::Content;
use crate::prune::{
    Effect, Origin, Outcome, OutcomeError, OutcomeKey, Profile, ProfileError, Recipe, SingleRecord,
    StoredProfile, Target, outcome, store,
};

/// The environment variable that limits the cache: a size such as `2GB`, or 0 to keep nothing.
pub const CACHE_SIZE_VARIABLE: &str = "FLAPJACK_CACHE_SIZE";
/// Bytes that profiles and outcomes may take together, unless another number is given.
pub const DEFAULT_CACHE_SIZE: u64 = 2_000_000_000;
/// What file systems give to files: a multiple of this.
const BLOCK: u64 = 4096;
/// How long what no process has locked may be the work of an earlier version, which did not lock.
const UNLOCKED: Duration = Duration::from_secs(24 * 60 * 60);

/// Why the cache cannot be used as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("{CACHE_SIZE_VARIABLE} is {text:?}, and must be a size such as 2GB or 500MiB, or 0")]
    Size { text: String },
    #[error("cannot read the cache folder {}", folder.display())]
    Read { folder: PathBuf, source: io::Error },
    #[error("cannot remove {}", path.display())]
    Remove { path: PathBuf, source: io::Error },
}

/// The folder for profiles and outcomes.
#[derive(Debug, Clone)]
pub struct CacheFolder {
    /// `None` where the user has none.
    folder: Option<PathBuf>,
    limit: u64,
}

/// A file of the cache.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheEntry {
    pub path: PathBuf,
    pub kind: CacheKind,
    pub bytes: u64,
    pub last_used: SystemTime,
    /// Whether an earlier version wrote it in a format that is not read any more.
    pub outdated: bool,
}

/// What a file of the cache holds.
#[derive(Debug, Clone, PartialEq)]
pub enum CacheContent {
    Profile(Origin),
    /// A text of so many tokens.
    Text {
        tokens: usize,
    },
    Outcome {
        /// The name of the model's file.
        model: String,
        target: Target,
        ratio: f64,
        recipe: Recipe,
    },
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cleared {
    pub files: usize,
    pub bytes: u64,
}

// ---- as a whole ----

impl CacheFolder {
    /// The folder that was named, or the user's ([`hub::profiles_dir`]), and the bytes that it may take: those that were given, or
    /// what [`CACHE_SIZE_VARIABLE`] says, or [`DEFAULT_CACHE_SIZE`]. What killed processes have left behind is removed.
    ///
    /// # Errors
    /// [`CacheError::Size`] if the variable has to be read and says nothing that makes sense.
    pub fn new(named: Option<PathBuf>, limit: Option<u64>) -> Result<Self, CacheError> {
        let limit = match limit {
            Some(limit) => limit,
            None => limit_of(env::var_os(CACHE_SIZE_VARIABLE).map(|t| t.to_string_lossy().into()))?,
        };
        // The user's folder is inside the one for models.
        if named.is_none() {
            hub::sweep();
        }
        let cache = Self {
            folder: named.or_else(|| hub::profiles_dir().ok()),
            limit,
        };
        cache.sweep();
        Ok(cache)
    }

    /// Where it is; `None` where the user has no cache folder.
    pub fn path(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Bytes that all files may take together.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// All files, from the one that was used last to the one that goes first.
    ///
    /// # Errors
    /// [`CacheError::Read`], if the folder is there and cannot be read.
    pub fn entries(&self) -> Result<Vec<CacheEntry>, CacheError> {
        let Some(folder) = &self.folder else {
            return Ok(Vec::new());
        };
        let cannot = |source| CacheError::Read {
            folder: folder.clone(),
            source,
        };
        let files = match fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(cannot(error)),
        };
        let mut entries = Vec::new();
        for file in files {
            // One that another process has removed by now is none.
            entries.extend(CacheEntry::of(file.map_err(cannot)?.path()));
        }
        entries.sort_by(|a, b| {
            (a.outdated, b.last_used, &a.path).cmp(&(b.outdated, a.last_used, &b.path))
        });
        Ok(entries)
    }

    /// Removes all files, or those that were not used for so long. Processes that read one right now are not disturbed.
    ///
    /// # Errors
    /// [`CacheError`], after everything else is removed.
    pub fn clear(&self, unused_for: Option<Duration>) -> Result<Cleared, CacheError> {
        let now = SystemTime::now();
        let mut cleared = Cleared::default();
        let mut failed = None;
        for entry in self.entries()? {
            // One from the future was used just now.
            let age = now.duration_since(entry.last_used).unwrap_or_default();
            if unused_for.is_some_and(|least| age < least) {
                continue;
            }
            match remove(&entry.path) {
                Ok(()) => {
                    cleared.files += 1;
                    cleared.bytes += entry.bytes;
                }
                Err(source) => {
                    let path = entry.path;
                    failed = failed.or(Some(CacheError::Remove { path, source }));
                }
            }
        }
        failed.map_or(Ok(cleared), Err)
    }

    /// Removes what killed processes have left behind.
    fn sweep(&self) {
        let Some(folder) = &self.folder else { return };
        files::sweep(folder);
        // Earlier versions wrote `.NAME.XXXXXX` and locked nothing.
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = file.file_name();
            let name = name.to_string_lossy();
            let name = name.strip_prefix('.').and_then(|n| n.rsplit_once('.'));
            let is_old_draft = name.is_some_and(|(name, random)| {
                random.len() == 6 && kind_and_version(Path::new(name)).is_some()
            });
            let changed = file.metadata().and_then(|m| m.modified()).ok();
            let age = changed.and_then(|time| time.elapsed().ok());
            if is_old_draft && age.is_some_and(|age| age > UNLOCKED) {
                files::remove_unlocked(&file.path());
            }
        }
    }

    /// Removes files until there is room for so many bytes of one that takes the place of the one at `path`.
    fn make_room(&self, bytes: u64, path: &Path) {
        let Ok(mut entries) = self.entries() else {
            return;
        };
        entries.retain(|entry| entry.path != path);
        let mut all = on_disk(bytes) + entries.iter().map(|e| on_disk(e.bytes)).sum::<u64>();
        while all > self.limit
            && let Some(entry) = entries.pop()
        {
            let hash = match entry.kind {
                CacheKind::Profile => StoredProfile::stated_hash(&entry.path),
                _ => None,
            };
            match remove(&entry.path) {
                Ok(()) => all -= on_disk(entry.bytes),
                Err(error) => {
                    tracing::debug!("cannot remove {}: {error}", entry.path.display());
                    continue;
                }
            }
            // So that its outcomes can still be found.
            if let Some(hash) = hash {
                keep_hash(&entry.path, &hash, entry.last_used);
                all += BLOCK;
            }
        }
    }

    /// Whether a file of so many bytes may be kept; else why not, unless nothing is to be kept at all.
    fn may_keep(&self, kind: CacheKind, bytes: u64, notices: &mut Vec<Notice>) -> bool {
        let fits = on_disk(bytes) <= self.limit;
        if !fits && self.limit > 0 {
            notices.push(Notice::TooLargeToKeep {
                kind,
                bytes,
                limit: self.limit,
            });
        }
        fits
    }
}

impl CacheEntry {
    /// `None` if this is no file of the cache, or there is none.
    fn of(path: PathBuf) -> Option<Self> {
        let (kind, version) = kind_and_version(&path)?;
        let metadata = fs::symlink_metadata(&path).ok()?;
        if !metadata.is_file() {
            return None;
        }
        Some(Self {
            kind,
            bytes: metadata.len(),
            last_used: metadata.modified().ok()?,
            outdated: version < version_of(kind),
            path,
        })
    }

    /// What the file says of itself; `None` if it is a hash alone, or of no use.
    pub fn content(&self) -> Option<CacheContent> {
        if self.outdated {
            return None;
        }
        match self.kind {
            CacheKind::Profile => {
                StoredProfile::stated_origin(&self.path).map(CacheContent::Profile)
            }
            CacheKind::Outcome => {
                let stated = outcome::stated(&self.path)?;
                Some(CacheContent::Outcome {
                    model: stated.model_name,
                    target: stated.target,
                    ratio: stated.ratio,
                    recipe: stated.recipe,
                })
            }
            CacheKind::Text => {
                let bytes = usize::try_from(self.bytes).ok()?;
                let tokens = bytes.checked_sub(TEXT_HEAD + TEXT_HASH)? / 4;
                Some(CacheContent::Text { tokens })
            }
            CacheKind::Hash | CacheKind::Training | CacheKind::Partial => None,
        }
    }
}

/// What the names of files end with.
fn extension(kind: CacheKind) -> &'static str {
    match kind {
        CacheKind::Profile => "profile",
        CacheKind::Outcome => "outcome",
        CacheKind::Hash => "hash",
        CacheKind::Text => "text",
        CacheKind::Training => "training",
        CacheKind::Partial => "partial",
    }
}

/// The version of the format that is read.
fn version_of(kind: CacheKind) -> u32 {
    match kind {
        CacheKind::Profile | CacheKind::Hash | CacheKind::Partial => store::VERSION,
        CacheKind::Outcome => outcome::VERSION,
        CacheKind::Text => TEXT_VERSION,
        CacheKind::Training => checkpoint::VERSION,
    }
}

/// The limit that the environment sets.
fn limit_of(text: Option<String>) -> Result<u64, CacheError> {
    match text.as_deref().map(str::trim) {
        None | Some("") => Ok(DEFAULT_CACHE_SIZE),
        Some("0") => Ok(0),
        Some(size) => parse_size(size).ok_or_else(|| CacheError::Size { text: size.into() }),
    }
}

/// What a file is by its name, and the version of its format; `None` if it is no file of the cache.
fn kind_and_version(path: &Path) -> Option<(CacheKind, u32)> {
    let kinds = [
        CacheKind::Profile,
        CacheKind::Outcome,
        CacheKind::Hash,
        CacheKind::Text,
        CacheKind::Training,
        CacheKind::Partial,
    ];
    let ending = path.extension()?.to_str()?;
    let kind = kinds.into_iter().find(|kind| extension(*kind) == ending)?;
    let name = path.file_stem()?.to_str()?;
    // The first versions had none in their names.
    let (name, version) = name.rsplit_once("-v").unwrap_or((name, "0"));
    let is_hash = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
    let ours = name.len() >= 32 && name.split('-').all(is_hash);
    ours.then_some((kind, version.parse().ok()?))
}

/// Bytes that a file of so many takes.
fn on_disk(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK)
}

/// Removes a file that another process may have removed already.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes down that a file was used now.
fn touch(path: &Path) {
    set_used(path, SystemTime::now());
}

fn set_used(path: &Path, time: SystemTime) {
    let file = File::options().write(true).open(path);
    if let Err(error) = file.and_then(|file| file.set_modified(time)) {
        tracing::debug!("cannot change the time of {}: {error}", path.display());
    }
}

/// Keeps the hash of the profile at `path`, which does not stay itself.
fn keep_hash(path: &Path, hash: &str, last_used: SystemTime) {
    let path = path.with_extension(extension(CacheKind::Hash));
    match files::replace(&path, |file| file.write_all(hash.as_bytes())) {
        Ok(()) => set_used(&path, last_used),
        Err(error) => tracing::debug!("cannot write {}: {error}", path.display()),
    }
}

/// Makes the folder. Where that fails, saving tells.
fn make(folder: &Path) {
    if let Err(error) = fs::create_dir_all(folder) {
        tracing::debug!("cannot make the folder {}: {error}", folder.display());
    }
}

// ---- profiles ----

impl CacheFolder {
    /// The profile of an earlier run, and its hash. One that cannot be used is as good as none.
    pub(super) fn find_profile(&self, origin: &Origin) -> Option<(Profile, String)> {
        let path = self.profile_path(origin)?;
        let stored = match StoredProfile::load(&path) {
            Ok(stored) => stored,
            Err(ProfileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return None;
            }
            Err(error) => {
                tracing::warn!("{error}; calibrating again");
                return None;
            }
        };
        if !is_same(&stored.origin, origin) {
            return None;
        }
        touch(&path);
        Some((stored.profile, StoredProfile::stated_hash(&path)?))
    }

    /// The hash of the profile of an earlier run, which is not read for it, and may have been too large to stay.
    pub(super) fn profile_hash(&self, origin: &Origin) -> Option<String> {
        let path = self.profile_path(origin)?;
        if let Some(hash) = StoredProfile::stated_hash(&path) {
            touch(&path);
            return Some(hash);
        }
        let path = path.with_extension(extension(CacheKind::Hash));
        let hash = fs::read_to_string(&path).ok()?;
        let whole = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
        touch(&path);
        whole.then_some(hash)
    }

    /// Keeps a profile for the next run, or its hash alone where there is no room for it, and returns that hash; `None` if
    /// nothing is kept.
    pub(super) fn keep_profile(
        &self,
        stored: &StoredProfile,
        notices: &mut Vec<Notice>,
    ) -> Option<String> {
        let folder = self.folder.as_ref()?;
        let path = self.profile_path(&stored.origin)?;
        let kind = CacheKind::Profile;
        if !self.may_keep(kind, stored.bytes(), notices) {
            let hash = stored.hash();
            if self.limit >= BLOCK {
                make(folder);
                self.make_room(BLOCK, &path.with_extension(extension(CacheKind::Hash)));
                keep_hash(&path, &hash, SystemTime::now());
            }
            return Some(hash);
        }
        make(folder);
        self.make_room(stored.bytes(), &path);
        let saved = stored.save(&path);
        // By now another process may have kept something as well.
        self.make_room(stored.bytes(), &path);
        match saved {
            Ok(hash) => Some(hash),
            Err(error) => {
                notices.push(Notice::CannotKeep {
                    kind,
                    problem: error.to_string(),
                });
                // There may be room for that at least.
                let hash = stored.hash();
                keep_hash(&path, &hash, SystemTime::now());
                Some(hash)
            }
        }
    }

    /// What an earlier run has collected of a profile before it was broken off. One that cannot be used is as good as none.
    pub(super) fn find_partial(&self, origin: &Origin) -> Option<Profile> {
        let path = self.partial_path(origin)?;
        match StoredProfile::load(&path) {
            Ok(stored) => is_same(&stored.origin, origin).then_some(stored.profile),
            Err(ProfileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                None
            }
            Err(error) => {
                tracing::warn!("{error}; calibrating from the beginning");
                None
            }
        }
    }

    /// Keeps what is collected of a profile so far, if that is possible.
    pub(super) fn keep_partial(&self, content: Content) {
        let (Some(folder), Some(path)) = (&self.folder, self.partial_path(content.origin)) else {
            return;
        };
        if on_disk(content.bytes()) > self.limit {
            return;
        }
        make(folder);
        self.make_room(content.bytes(), &path);
        if let Err(error) = content.save(&path) {
            tracing::debug!("{error}");
        }
    }

    /// Removes that again, if it is there.
    pub(super) fn remove_partial(&self, origin: &Origin) {
        let path = self.partial_path(origin);
        if let Some(Err(error)) = path.as_deref().map(remove) {
            tracing::debug!("cannot remove what was collected so far: {error}");
        }
    }

    fn partial_path(&self, origin: &Origin) -> Option<PathBuf> {
        let path = self.profile_path(origin)?;
        Some(path.with_extension(extension(CacheKind::Partial)))
    }

    fn profile_path(&self, origin: &Origin) -> Option<PathBuf> {
        let (model, text) = (origin.model.get(..32)?, origin.text.get(..32)?);
        let collected = origin.collected.hash();
        let (collected, version) = (collected.get(..16)?, store::VERSION);
        let name = format!("{model}-{text}-{collected}-v{version}.profile");
        Some(self.folder.as_ref()?.join(name))
    }
}

/// Whether two profiles are the same for all that a run can tell. Names are for messages alone.
fn is_same(a: &Origin, b: &Origin) -> bool {
    (&a.model, &a.text, &a.collected, &a.flapjack) == (&b.model, &b.text, &b.collected, &b.flapjack)
}

// ---- outcomes ----

impl CacheFolder {
    /// The outcome of an earlier run. One that cannot be used is as good as none.
    pub(super) fn find_outcome(&self, key: &OutcomeKey) -> Option<Outcome> {
        let path = self.outcome_path(key)?;
        match Outcome::load(&path, key) {
            Ok(outcome) => {
                touch(&path);
                Some(outcome)
            }
            Err(OutcomeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                None
            }
            Err(error) => {
                tracing::warn!("{error}; pruning anew");
                None
            }
        }
    }

    /// Keeps an outcome for the next run, if that is possible. `model_name` is for those who look through the folder, and `single` as for
    /// [`Outcome::save`].
    pub(super) fn keep_outcome(
        &self,
        outcome: &Outcome,
        key: &OutcomeKey,
        model_name: &str,
        single: Option<(&Model, &SingleRecord)>,
        notices: &mut Vec<Notice>,
    ) {
        let (Some(folder), Some(path)) = (&self.folder, self.outcome_path(key)) else {
            return;
        };
        let (kind, bytes) = (CacheKind::Outcome, outcome.bytes(single) as u64);
        if !self.may_keep(kind, bytes, notices) {
            return;
        }
        make(folder);
        self.make_room(bytes, &path);
        let saved = outcome.save(&path, key, model_name, single);
        self.make_room(bytes, &path);
        if let Err(error) = saved {
            notices.push(Notice::CannotKeep {
                kind,
                problem: error.to_string(),
            });
        }
    }

    /// Keeps with an outcome what was only measured now. One with single weights stays as it is.
    pub(super) fn add_effects(
        &self,
        effects: &[Effect],
        key: &OutcomeKey,
        model_name: &str,
        notices: &mut Vec<Notice>,
    ) {
        if let Some(mut outcome) = self.find_outcome(key).filter(|o| o.single.is_none()) {
            outcome.effects = effects.to_vec();
            self.keep_outcome(&outcome, key, model_name, None, notices);
        }
    }

    /// Where a healing of so many trained values keeps what it has done, and what that is known by; `None` where there is no room for it.
    pub(super) fn checkpoint(
        &self,
        key: &OutcomeKey,
        trained: usize,
        notices: &mut Vec<Notice>,
    ) -> Option<(PathBuf, String)> {
        let (folder, hash) = (self.folder.as_ref()?, key.hash());
        let name = format!("{}-v{}.training", hash.get(..32)?, checkpoint::VERSION);
        let (path, bytes) = (folder.join(name), checkpoint::bytes(trained));
        if !self.may_keep(CacheKind::Training, bytes, notices) {
            return None;
        }
        make(folder);
        self.make_room(bytes, &path);
        Some((path, hash))
    }

    fn outcome_path(&self, key: &OutcomeKey) -> Option<PathBuf> {
        let (hash, version) = (key.hash(), outcome::VERSION);
        let name = format!("{}-v{version}.outcome", hash.get(..32)?);
        Some(self.folder.as_ref()?.join(name))
    }
}

// ---- texts ----

/// What a file of a text begins with; then come the numbers of tokens of the text and of what is held back, these tokens (all u32,
/// little-endian), and the SHA-256 of all that.
const TEXT_MAGIC: &[u8; 8] = b"FLAPTEXT";
/// Goes up whenever the format does.
const TEXT_VERSION: u32 = 1;
const TEXT_HEAD: usize = 8 + 2 * 4;
const TEXT_HASH: usize = 32;

impl CacheFolder {
    /// A text of so many tokens that the model has written in an earlier run. One that cannot be used is as good as none.
    pub(super) fn find_text(&self, model: &str, key: &str, tokens: usize) -> Option<Mixed> {
        let path = self.text_path(model, key)?;
        let bytes = fs::read(&path).ok()?;
        let found = text_of(&bytes).filter(|text| text.tokens.len() == tokens);
        match found {
            Some(_) => touch(&path),
            None => tracing::warn!("{} is of no use; writing the text again", path.display()),
        }
        found
    }

    /// Keeps a text that the model has written, if that is possible: without it the next run writes it again.
    pub(super) fn keep_text(&self, model: &str, key: &str, text: &Mixed) {
        let (Some(folder), Some(path)) = (&self.folder, self.text_path(model, key)) else {
            return;
        };
        let mut bytes = TEXT_MAGIC.to_vec();
        let counts = [text.tokens.len() as u32, text.held_back.len() as u32];
        let numbers = counts.iter().chain(&text.tokens).chain(&text.held_back);
        bytes.extend(numbers.flat_map(|n| n.to_le_bytes()));
        bytes.extend_from_slice(&Sha256::digest(&bytes));
        let all = bytes.len() as u64;
        if on_disk(all) > self.limit {
            return;
        }
        make(folder);
        self.make_room(all, &path);
        if let Err(error) = files::replace(&path, |file| file.write_all(&bytes)) {
            tracing::debug!("cannot write {}: {error}", path.display());
        }
    }

    fn text_path(&self, model: &str, key: &str) -> Option<PathBuf> {
        let (model, key) = (model.get(..32)?, key.get(..32)?);
        let name = format!("{model}-{key}-v{TEXT_VERSION}.text");
        Some(self.folder.as_ref()?.join(name))
    }
}

/// The text of a file; `None` if it is damaged.
fn text_of(bytes: &[u8]) -> Option<Mixed> {
    let (content, hash) = bytes.split_at_checked(bytes.len().checked_sub(TEXT_HASH)?)?;
    let numbers = content.strip_prefix(TEXT_MAGIC)?;
    if Sha256::digest(content).as_slice() != hash {
        return None;
    }
    let numbers = numbers.chunks_exact(4);
    let mut numbers = numbers.map(|n| u32::from_le_bytes(n.try_into().expect("four bytes")));
    let (tokens, held_back) = (numbers.next()? as usize, numbers.next()? as usize);
    let mut rest: Vec<u32> = numbers.collect();
    if rest.len() != tokens + held_back {
        return None;
    }
    let held_back = rest.split_off(tokens);
    Some(Mixed {
        tokens: rest,
        held_back,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_sets_a_size_or_nothing() {
        let limit = |text: &str| limit_of(Some(text.to_owned())).ok();
        assert_eq!(limit_of(None).ok(), Some(DEFAULT_CACHE_SIZE));
        assert_eq!(limit(""), Some(DEFAULT_CACHE_SIZE));
        assert_eq!(limit("0"), Some(0));
        assert_eq!(limit(" 500MiB "), Some(500 << 20));
        for text in ["2", "GB", "-1GB", "all"] {
            let error = limit_of(Some(text.to_owned())).expect_err(text).to_string();
            assert!(
                error.contains(CACHE_SIZE_VARIABLE) && error.contains(text),
                "{error}"
            );
        }
    }

    #[test]
    fn only_files_that_the_cache_names_are_of_the_cache() {
        let hash = "0123456789abcdef0123456789abcdef";
        let of = |name: &str| kind_and_version(Path::new(name));
        assert_eq!(
            of(&format!("{hash}-{hash}-0123456789abcdef-v3.profile")),
            Some((CacheKind::Profile, 3))
        );
        assert_eq!(
            of(&format!("{hash}-v12.outcome")),
            Some((CacheKind::Outcome, 12))
        );
        assert_eq!(
            of(&format!("{hash}-{hash}-v3.hash")),
            Some((CacheKind::Hash, 3))
        );
        assert_eq!(
            of(&format!("{hash}.profile")),
            Some((CacheKind::Profile, 0))
        );
        for name in [
            "mine.profile",
            "0123.profile",
            "my-own-model-of-many-words-and-long-v3.profile",
            &format!("{hash}-v3.gguf"),
            &format!("{hash}-vx.profile"),
            hash,
        ] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
