//! The Hugging Face cache: what `huggingface_hub`, and flapjack as well, has fetched from the hub.
//!
//! ```text
//! models--org--repo/refs/main                        the commit of a branch or tag
//! models--org--repo/snapshots/COMMIT/file.gguf       a link to the file's content
//! models--org--repo/blobs/HASH                       contents, by the hub's ETag
//! models--org--repo/blobs/HASH.incomplete            what has arrived of one
//! .locks/models--org--repo/HASH.lock                 locked while a content is fetched
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::errors::{NameError, cannot};
use super::stored::{all_files, entries, of_names};
use super::{HubError, Step, Steps, StoredModel, tell};
use crate::files;

/// How often it is tried to get a lock.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// The folder of one repository in the cache.
#[derive(Debug, Clone)]
pub(super) struct Snapshots {
    cache: PathBuf,
    folder: PathBuf,
}

impl Snapshots {
    /// The folder of `org/repo`, which need not be there.
    pub fn new(cache: &Path, repository: &str) -> Self {
        let name = format!("models--{}", repository.replace('/', "--"));
        Self {
            cache: cache.to_owned(),
            folder: cache.join(name),
        }
    }

    /// All repositories in a cache, by name.
    pub fn all(cache: &Path) -> Vec<(String, Self)> {
        let mut found: Vec<(String, Self)> = entries(cache)
            .into_iter()
            .filter_map(|name| {
                let repository = name.strip_prefix("models--")?.replacen("--", "/", 1);
                let parts = repository.split('/');
                let is_named = repository.contains('/') && parts.clone().all(super::names::is_part);
                is_named.then(|| {
                    let snapshots = Self::new(cache, &repository);
                    (repository, snapshots)
                })
            })
            .collect();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// The commit that a branch, a tag or a commit stood for when it was fetched last; `None` if it never was.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let noted = fs::read_to_string(self.folder.join("refs").join(revision)).ok();
        let commit = noted.map_or_else(|| revision.to_owned(), |noted| noted.trim().to_owned());
        let is_there = super::names::is_part(&commit) && self.snapshot(&commit).is_dir();
        is_there.then_some(commit)
    }

    /// The commits that there are snapshots of, each with a branch or tag that stands for it.
    pub fn commits(&self) -> Vec<(String, Option<String>)> {
        let refs: Vec<(String, String)> = entries(&self.folder.join("refs"))
            .into_iter()
            .filter_map(|name| Some((self.commit(&name)?, name)))
            .collect();
        let mut commits: Vec<(String, Option<String>)> = entries(&self.folder.join("snapshots"))
            .into_iter()
            .map(|commit| {
                let mut names = refs.iter().filter(|(c, _)| *c == commit).map(|(_, n)| n);
                let main = names.clone().find(|name| *name == "main");
                let name = main.or_else(|| names.next()).cloned();
                (commit, name)
            })
            .collect();
        commits.sort();
        commits
    }

    /// The models of all commits that are there as a whole, by the names that lead to them.
    pub fn models(&self, repository: &str) -> Vec<StoredModel> {
        let of_commit = |(commit, name): (String, Option<String>)| {
            let id = match name.as_deref() {
                Some("main") => repository.to_owned(),
                Some(name) => format!("{repository}@{name}"),
                None => format!("{repository}@{commit}"),
            };
            let files = self.files(&commit);
            of_names(
                repository,
                &self.snapshot(&commit),
                &files,
                |file| match file {
                    Some(file) => format!("{id}/{file}"),
                    None => id.clone(),
                },
            )
        };
        self.commits().into_iter().flat_map(of_commit).collect()
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The names of the files of a snapshot whose contents are there.
    pub fn files(&self, commit: &str) -> Vec<String> {
        all_files(&self.snapshot(commit))
    }

    /// Whether a file of a snapshot is there.
    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).is_file()
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Bytes that have arrived of a content that is not whole.
    pub fn arrived(&self, etag: &str) -> u64 {
        fs::metadata(self.part(etag)).map_or(0, |part| part.len())
    }

    /// Where a content is until it is whole.
    pub fn part(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Makes the folder for contents.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn prepare(&self) -> Result<(), NameError> {
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(cannot("create", &blobs))
    }

    /// Locks a content, after waiting for other processes and threads that fetch it.
    ///
    /// # Errors
    /// Those of the operating system; [`HubError::Cancelled`].
    pub fn lock(&self, etag: &str, steps: &mut Steps) -> Result<File, HubError> {
        let name = self.folder.file_name().unwrap_or_default();
        let folder = self.cache.join(".locks").join(name);
        fs::create_dir_all(&folder).map_err(cannot("create", &folder))?;
        let path = folder.join(format!("{etag}.lock"));
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let lock = options.open(&path).map_err(cannot("open", &path))?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {
                    tell(steps, Step::Waiting)?;
                    thread::sleep(LOCK_POLL);
                }
                // Some network disks have no locks. What is put in place is whole nevertheless.
                Err(TryLockError::Error(error)) => {
                    tracing::debug!("{} cannot be locked: {error}", path.display());
                    return Ok(lock);
                }
            }
        }
    }

    /// Makes a content out of its whole part.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn keep(&self, etag: &str) -> Result<(), NameError> {
        let blob = self.blob(etag);
        fs::rename(self.part(etag), &blob).map_err(cannot("write", &blob))
    }

    /// Lets a file of a snapshot lead to its content.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), NameError> {
        let path = self.snapshot(commit).join(file);
        if path.is_file() {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(cannot("create", folder))?;
        // A link to what was removed.
        if path.symlink_metadata().is_ok() {
            fs::remove_file(&path).map_err(cannot("replace", &path))?;
        }
        let depth = 2 + file.matches('/').count();
        let target = format!("{}blobs/{etag}", "../".repeat(depth));
        match link(Path::new(&target), &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => {
                // Where there are no links, the file itself is there, as with huggingface_hub.
                tracing::debug!("{} cannot be a link: {error}", path.display());
                fs::rename(self.blob(etag), &path).map_err(cannot("write", &path))
            }
            Ok(()) => Ok(()),
        }
    }

    /// Notes for which commit a branch or tag stands.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn note(&self, revision: &str, commit: &str) -> Result<(), NameError> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(cannot("create", folder))?;
        files::replace(&path, |file| file.write_all(commit.as_bytes()))
            .map_err(cannot("write", &path))
    }
}

#[cfg(unix)]
fn link(to: &Path, from: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(to, from)
}

#[cfg(windows)]
fn link(to: &Path, from: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(to, from)
}
