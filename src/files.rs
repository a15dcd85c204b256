//! Writing files as a whole or not at all, without leaving anything behind; and writing hashes as text.
//!
//! What is being written is a [`Draft`]. Where the system can do it (Linux, on most file systems), a draft has no name until it is
//! whole, so that nothing is left of it however its process ends. Elsewhere it has a name that tells what it is, and is locked for as
//! long as its process lives: [`sweep`] removes those that nobody has locked.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::{self, File, TryLockError};
use std::io::{self, Seek};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// The longest chain of symbolic links that is followed; a longer one is taken for a circle.
const MOST_LINKS: usize = 40;
/// What the names of drafts have before their last random characters.
const MARK: &str = ".flapjack-";
/// How many those are.
const RANDOM: usize = 6;
/// Characters of a file's name that the name of its draft repeats: names may have 255 bytes.
const MOST_NAME: usize = 50;

/// Replaces the file at `path` by what `write` writes, or creates it.
///
/// The new file is written beside the old one, flushed to disk and renamed into place, and the folder is flushed as well: at
/// every moment `path` is either the old file or the whole new one. If `path` is a symbolic link, the link stays and the
/// file that it leads to is replaced.
///
/// # Errors
/// Errors of the operating system and of `write`; also if something other than a regular file is at `path`. The old file
/// is then unchanged.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let path = follow(path)?;
    match fs::metadata(&path) {
        Ok(there) if !there.is_file() => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "this is there already and is not a regular file; name another file to write to",
            ));
        }
        _ => {}
    }
    let mut draft = Draft::new(&path)?;
    write(draft.file())?;
    draft.finish().map(drop)
}

/// A file that is being written. If it is dropped, or its process ends, nothing is left of it.
#[derive(Debug)]
pub(crate) struct Draft {
    /// The path of the whole file.
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Nameless(File),
    Named(NamedTempFile),
}

impl Draft {
    /// An empty draft of the file at `path`, in the same folder. What ended processes have left there is removed first.
    pub fn new(path: &Path) -> io::Result<Self> {
        let folder = folder_of(path);
        sweep(folder);
        let content = match nameless(folder) {
            Some(file) => Content::Nameless(file),
            None => Content::Named(named(folder, path.file_name().unwrap_or_default())?),
        };
        Ok(Self {
            path: path.to_owned(),
            content,
        })
    }

    pub fn file(&mut self) -> &mut File {
        match &mut self.content {
            Content::Nameless(file) => file,
            Content::Named(file) => file.as_file_mut(),
        }
    }

    /// Flushes the file to disk and puts it in place of what is at its path.
    pub fn finish(self) -> io::Result<File> {
        let Self { path, content } = self;
        let folder = folder_of(&path);
        let file = match content {
            // The data must be on the disk before the rename: after a crash the name must not lead to a file with holes.
            Content::Nameless(file) => {
                file.sync_all()?;
                give_name(file, &path)?
            }
            Content::Named(file) => {
                file.as_file().sync_all()?;
                file
            }
        };
        let file = file.persist(&path).map_err(|error| error.error)?;
        sync_folder(folder);
        Ok(file)
    }
}

/// A file for other programs to read, in the system's folder for temporary files. It goes when it is dropped; if the process is
/// killed, when another one makes such a file.
#[derive(Debug)]
pub struct TemporaryFile(NamedTempFile);

impl TemporaryFile {
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let folder = std::env::temp_dir();
        sweep(&folder);
        named(&folder, OsStr::new(name)).map(Self)
    }

    pub(crate) fn file(&mut self) -> &mut File {
        self.0.as_file_mut()
    }
}

/// The path.
impl Deref for TemporaryFile {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.0.path()
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file in this folder that has no name; `None` where there are none, or they cannot be given one later.
#[cfg(target_os = "linux")]
fn nameless(folder: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        // An ordinary file gets ordinary permissions; the system applies the umask.
        .mode(0o666)
        .open(folder)
        .ok()?;
    number_of(&file).exists().then_some(file)
}

#[cfg(not(target_os = "linux"))]
fn nameless(_: &Path) -> Option<File> {
    None
}

/// Where the system shows an open file under its number.
#[cfg(target_os = "linux")]
fn number_of(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives a nameless file the name of a draft of `path`. Where that turns out to be impossible, the draft is a copy.
fn give_name(mut file: File, path: &Path) -> io::Result<NamedTempFile> {
    let (folder, name) = (folder_of(path), path.file_name().unwrap_or_default());
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, linkat};
        // Nobody may take it for one that is left over.
        let _ = file.try_lock();
        let from = number_of(&file);
        let link = |to: &Path| Ok(linkat(CWD, &from, CWD, to, AtFlags::SYMLINK_FOLLOW)?);
        match with_new_name(folder, name, link) {
            Ok(linked) => return Ok(NamedTempFile::from_parts(file, linked.into_temp_path())),
            Err(error) => tracing::debug!("a nameless file cannot be named: {error}"),
        }
    }
    let mut copy = named(folder, name)?;
    file.rewind()?;
    io::copy(&mut file, copy.as_file_mut())?;
    copy.as_file().sync_all()?;
    Ok(copy)
}

/// A draft with a name, which is locked.
fn named(folder: &Path, name: &OsStr) -> io::Result<NamedTempFile> {
    loop {
        let draft = with_new_name(folder, name, |path| {
            let mut options = File::options();
            options.read(true).write(true).create_new(true).open(path)
        })?;
        match draft.as_file().try_lock() {
            // Somebody has swept it away between the two steps.
            Ok(()) if !draft.path().exists() => {}
            Err(TryLockError::WouldBlock) => {}
            // Where there are no locks, nobody can sweep either.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(draft),
        }
    }
}

/// Makes something under a name that a draft of `name` can have, `.NAME.flapjack-XXXXXX`, and that nothing else has.
fn with_new_name<T>(
    folder: &Path,
    name: &OsStr,
    make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<NamedTempFile<T>> {
    let name: String = name.to_string_lossy().chars().take(MOST_NAME).collect();
    let prefix = format!(".{name}{MARK}");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).rand_bytes(RANDOM);
    builder.make_in(folder, make)
}

/// Whether this is the name of a draft.
fn is_draft(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    let Some((start, random)) = name.split_last_chunk::<RANDOM>() else {
        return false;
    };
    name.starts_with(b".")
        && start.ends_with(MARK.as_bytes())
        && random.iter().all(u8::is_ascii_alphanumeric)
}

/// Removes the drafts in a folder whose processes have ended.
pub(crate) fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_draft(&entry.file_name()) {
            remove_unlocked(&entry.path());
        }
    }
}

/// Removes a file, unless somebody has locked it.
pub(crate) fn remove_unlocked(path: &Path) {
    let mut options = File::options();
    options.write(true);
    // By now it may be something else.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        libc::O_NOFOLLOW | libc::O_NONBLOCK,
    );
    let Ok(file) = options.open(path) else {
        return;
    };
    if file.try_lock().is_err() {
        return;
    }
    // The lock is held until it is gone. A draft that was put in place meanwhile is not there under this name any more.
    match fs::remove_file(path) {
        Ok(()) => tracing::debug!("removed {}, left by a killed run", path.display()),
        Err(error) => tracing::debug!("cannot remove {}: {error}", path.display()),
    }
}

/// Flushes a folder to disk, so that a rename in it survives a crash. A failure is only logged, because some file systems
/// cannot do this and the data of the renamed file has been flushed already.
pub(crate) fn sync_folder(folder: &Path) {
    #[cfg(unix)]
    if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
        tracing::debug!("cannot sync {}: {error}", folder.display());
    }
    #[cfg(not(unix))]
    let _ = folder;
}

/// The path at the end of a chain of symbolic links, whether or not a file exists there; `path` itself if it is no link.
///
/// # Errors
/// If the chain is longer than [`MOST_LINKS`].
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => {
                let folder = path.parent().unwrap_or(Path::new(""));
                path = folder.join(target);
            }
            // It is not a link, or it does not exist.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links in a row"))
}

/// The bytes in lower-case hexadecimal, two digits for each.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a folder");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_draft_with_a_name_stays_while_it_is_written_and_is_swept_when_nobody_writes_it() {
        let folder = tempfile::tempdir().unwrap();
        let draft = named(folder.path(), OsStr::new("a.gguf")).unwrap();
        let name = draft.path().file_name().unwrap().to_owned();
        assert!(is_draft(&name), "{name:?}");
        sweep(folder.path());
        assert!(draft.path().exists());
        // As if the process had been killed: the lock is gone and the file is not.
        let (file, path) = draft.keep().unwrap();
        drop(file);
        assert!(path.exists());
        sweep(folder.path());
        assert!(!path.exists());
    }

    #[test]
    fn other_files_are_never_swept() {
        let folder = tempfile::tempdir().unwrap();
        let others = [
            ".a.gguf.flapjack-Ab12C",
            ".a.gguf.flapjack-Ab_2Cd",
            ".a.gguf.tmp-Ab12Cd",
            ".flapjackAb12Cd",
            "a.gguf.flapjack-Ab12Cd",
        ];
        for other in others {
            fs::write(folder.path().join(other), "").unwrap();
        }
        // A folder, and what a link leads to, are no drafts either.
        fs::create_dir(folder.path().join(".b.flapjack-Ab12Cd")).unwrap();
        let mut left = others.map(str::to_owned).to_vec();
        left.push(".b.flapjack-Ab12Cd".to_owned());
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(others[0], folder.path().join(".c.flapjack-Ab12Cd"))
                .unwrap();
            left.push(".c.flapjack-Ab12Cd".to_owned());
        }
        left.sort();
        sweep(folder.path());
        assert_eq!(names(folder.path()), left);
    }

    #[test]
    fn a_file_that_got_no_name_until_it_was_whole_is_like_one_that_had_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for first in [true, false] {
            let Some(mut file) = nameless(folder.path()) else {
                return;
            };
            file.write_all(b"whole").unwrap();
            assert_eq!(
                names(folder.path()).len(),
                usize::from(!first),
                "nothing is to be seen"
            );
            let draft = give_name(file, &path).unwrap();
            assert!(is_draft(draft.path().file_name().unwrap()));
            sweep(folder.path());
            draft.persist(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"whole");
            assert_eq!(names(folder.path()), ["a"]);
        }
    }

    #[test]
    fn what_cannot_be_named_is_copied() {
        let folder = tempfile::tempdir().unwrap();
        // It has a name already and lies in no folder of files: linking it elsewhere fails.
        let mut file = File::options().read(true).open("/proc/self/status");
        let Ok(file) = &mut file else { return };
        let mut expected = String::new();
        file.read_to_string(&mut expected).unwrap();
        let file = file.try_clone().unwrap();
        let draft = give_name(file, &folder.path().join("a")).unwrap();
        let copy = fs::read_to_string(draft.path()).unwrap();
        assert_eq!(copy.lines().next(), expected.lines().next());
    }

    #[test]
    fn long_names_have_drafts_too() {
        let folder = tempfile::tempdir().unwrap();
        let name = "ä".repeat(120);
        let draft = named(folder.path(), OsStr::new(&name)).unwrap();
        assert!(is_draft(draft.path().file_name().unwrap()));
        replace(&folder.path().join(&name), |file| file.write_all(b"x")).unwrap();
        drop(draft);
        assert_eq!(names(folder.path()), [name]);
    }
}
