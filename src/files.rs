//! Putting files in place, whole or not at all, and naming them by their hashes.

use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Links that lead to links: more than this are a circle.
const MOST_LINKS: usize = 40;

/// Lets `write` fill a new file beside `path`, flushes it to disk and renames it into place; the folder is flushed too. At
/// every moment `path` is either the old file or the whole new one. A symbolic link stays one: what it leads to is replaced.
///
/// # Errors
/// Those of the system and of `write`; also when `path` is there and is no regular file. The old file is then untouched.
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
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // What a killed run leaves behind should be known for what it is.
    let prefix = format!(
        ".{}.",
        path.file_name().unwrap_or_default().to_string_lossy()
    );
    let mut beside = tempfile::Builder::new();
    beside.prefix(&prefix);
    // A temporary file is for its owner alone; this one becomes a file like any other.
    #[cfg(unix)]
    beside.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = beside.tempfile_in(folder)?;
    write(file.as_file_mut())?;
    // The data has to be on the disk before the name is: a crash must not leave the name with holes behind it.
    file.as_file().sync_all()?;
    file.persist(&path).map_err(|e| e.error)?;
    sync_folder(folder);
    Ok(())
}

/// Makes a rename in the folder last. The file itself is safe by then, so a file system that cannot do this is no error.
pub(crate) fn sync_folder(folder: &Path) {
    #[cfg(unix)]
    if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
        tracing::debug!("cannot sync {}: {error}", folder.display());
    }
    #[cfg(not(unix))]
    let _ = folder;
}

/// Where symbolic links lead in the end, whether or not anything is there.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => {
                let folder = path.parent().unwrap_or(Path::new(""));
                path = folder.join(target);
            }
            // Not a link, or nothing there.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links in a row"))
}

/// Two digits for each byte.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
