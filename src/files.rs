//! Replacing a file as a whole or not at all, and writing hashes as text.

use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The longest chain of symbolic links that is followed; a longer one is taken for a circle.
const MOST_LINKS: usize = 40;

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
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // If this process is killed, the name of the file that it leaves behind shows what it was going to be.
    let prefix = format!(
        ".{}.",
        path.file_name().unwrap_or_default().to_string_lossy()
    );
    let mut beside = tempfile::Builder::new();
    beside.prefix(&prefix);
    // Temporary files can be read by their owner only; this one becomes an ordinary file and gets ordinary permissions.
    #[cfg(unix)]
    beside.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = beside.tempfile_in(folder)?;
    write(file.as_file_mut())?;
    // The data must be on the disk before the rename: after a crash the name must not lead to a file with holes.
    file.as_file().sync_all()?;
    file.persist(&path).map_err(|e| e.error)?;
    sync_folder(folder);
    Ok(())
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
