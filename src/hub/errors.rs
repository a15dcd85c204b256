//! Why a model that was named cannot be provided.

use std::io;
use std::path::PathBuf;

use crate::count::count;

/// The environment variable with the token for the hub.
pub const TOKEN_VARIABLE: &str = "HF_TOKEN";
/// The environment variable that keeps flapjack, and other programs, from asking the hub.
pub const OFFLINE_VARIABLE: &str = "HF_HUB_OFFLINE";
/// The environment variable that names another hub.
pub const ENDPOINT_VARIABLE: &str = "HF_ENDPOINT";
/// The environment variable that names the folder of what was fetched from the hub.
pub const HUB_CACHE_VARIABLE: &str = "HF_HUB_CACHE";

/// Why a model that was named, and not given by a path, cannot be provided. Every message says what to do next, where something
/// can be done.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// It begins like the name of a repository, and is none.
    #[error(
        "{name:?} is no model of the hub: {problem}; models are named ORG/REPO, ORG/REPO:TYPE or ORG/REPO/FILE, with @REVISION behind REPO for another than the main branch"
    )]
    Malformed { name: String, problem: &'static str },

    /// It can be a path as well as a model of the hub, and is neither.
    #[error("{}: there is no such file or folder, and no such model of the hub was found: {cause}", path.display())]
    Neither {
        path: PathBuf,
        /// Why it is no model of the hub. It is part of the message and therefore not a `source`.
        cause: Box<NameError>,
    },

    /// The hub has no such repository, or does not tell.
    #[error(
        "{} has no repository {repository:?}{}",
        shown(endpoint),
        match with_token {
            true => ", or the token does not give access to it; look the name up there".to_owned(),
            false => format!("; if it is a private one, set {TOKEN_VARIABLE} to a token that may read it (or log in with `hf auth login`)"),
        }
    )]
    NoRepository {
        repository: String,
        endpoint: String,
        /// Whether it was asked with a token.
        with_token: bool,
    },

    /// Whoever wants its files has to ask for access first.
    #[error(
        "{repository:?} is given to those only who asked for access, on {}{}",
        shown(page),
        match with_token {
            true => ", and the token's owner does not have it yet".to_owned(),
            false => format!("; then set {TOKEN_VARIABLE} to a token (or log in with `hf auth login`)"),
        }
    )]
    Gated {
        repository: String,
        /// Where access is asked for.
        page: String,
        with_token: bool,
    },

    /// The token is not valid.
    #[error(
        "{} refuses the token of {origin}; make another one, or do without it",
        shown(endpoint)
    )]
    Token { endpoint: String, origin: String },

    /// The repository has no such branch, tag or commit.
    #[error("{repository:?} has no revision {revision:?}")]
    NoRevision {
        repository: String,
        revision: String,
    },

    /// The repository has no such file.
    #[error("{repository:?} has no file {file:?}; {}", have(there))]
    NoFile {
        repository: String,
        file: String,
        /// Files that it has and that could be meant.
        there: Vec<String>,
    },

    /// It has model files, but none of this type.
    #[error("{repository:?} has no file of type {wanted:?}; {}", have(there))]
    NoType {
        repository: String,
        wanted: String,
        there: Vec<String>,
    },

    /// It has nothing that could be run.
    #[error(
        "{repository:?} has neither a GGUF file nor config.json with safetensors files; {}",
        have(there)
    )]
    NothingUsable {
        repository: String,
        there: Vec<String>,
    },

    /// A file of several is not there.
    #[error("{repository:?} has {file:?}, but not {missing:?}, which belongs to it")]
    Incomplete {
        repository: String,
        file: String,
        missing: String,
    },

    /// The hub is not to be asked, or cannot be, and the model was not fetched before.
    #[error(
        "{repository:?} is not in {}, and {why}; {}",
        cache.display(),
        have(there)
    )]
    NotCached {
        repository: String,
        cache: PathBuf,
        why: String,
        /// What of the repository is there.
        there: Vec<String>,
    },

    /// The hub cannot be reached.
    #[error(
        "{} cannot be reached: {problem}; look at the network, and at {ENDPOINT_VARIABLE} and HTTPS_PROXY where they are set",
        shown(endpoint)
    )]
    Unreachable { endpoint: String, problem: String },

    /// The hub answers something else than what was asked for.
    #[error("{} answers {status}{}", shown(address), match words.is_empty() {
        true => String::new(),
        false => format!(": {}", shown(words)),
    })]
    Answer {
        address: String,
        status: u16,
        words: String,
    },

    /// What the hub answers cannot be understood.
    #[error("the answer of {} cannot be used: {problem}", shown(address))]
    Odd { address: String, problem: String },

    /// A download broke off again and again. What has arrived is kept.
    #[error(
        "the download of {file:?} broke off after {done} bytes{}: {problem}; it goes on from there the next time",
        match total {
            Some(total) => format!(" of {total}"),
            None => String::new(),
        }
    )]
    BrokenOff {
        file: String,
        done: u64,
        total: Option<u64>,
        problem: String,
    },

    /// A file has another length than the hub says.
    #[error("{file:?} has {} and should have {expected}; nothing is kept of it, try again later", count(*found, "byte"))]
    Length {
        file: String,
        expected: u64,
        found: u64,
    },

    /// A file has another content than the hub says.
    #[error(
        "the {kind} of {file:?} is {found} and should be {expected}; nothing is kept of it, try again later"
    )]
    Hash {
        file: String,
        kind: &'static str,
        expected: String,
        found: String,
    },

    /// There is not the room on the disk.
    #[error(
        "{} of room are needed in {} and {} are free; make room, or set {HUB_CACHE_VARIABLE} to another folder",
        gigabytes(*needed),
        folder.display(),
        gigabytes(*free)
    )]
    NoRoom {
        folder: PathBuf,
        needed: u64,
        free: u64,
    },

    /// A file or folder of a cache or a store cannot be used.
    #[error("cannot {action} {}: {source}{}", path.display(), match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!("; make room, or set {HUB_CACHE_VARIABLE} to another folder"),
        _ => String::new(),
    })]
    Files {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    /// There is no folder to keep what is fetched from the hub.
    #[error(
        "there is no folder for models of the hub: this user has no home folder; set {HUB_CACHE_VARIABLE} to a folder"
    )]
    NoFolder,

    /// A variable of the environment has a value that cannot be used.
    #[error("{variable}={value}: {problem}", value = shown(value))]
    Variable {
        variable: &'static str,
        value: String,
        problem: String,
    },

    /// The store of another program is not there.
    #[error("there is no model store of {store} in {}; {variable} names another folder", folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(" or "))]
    NoStore {
        store: &'static str,
        folders: Vec<PathBuf>,
        /// The variable that names its folder.
        variable: &'static str,
    },

    /// The store has no such model.
    #[error("{store} has no model {name:?} in {}; {}", folder.display(), have(there))]
    NotInStore {
        store: &'static str,
        name: String,
        folder: PathBuf,
        there: Vec<String>,
    },

    /// A model of a store cannot be used.
    #[error("{store}'s {name:?} cannot be used: {problem}")]
    Unusable {
        store: &'static str,
        name: String,
        problem: String,
    },
}

impl NameError {
    /// Whether what was named is not there, or was not found out about, so that something else may have been meant.
    pub(super) fn is_nothing(&self) -> bool {
        matches!(
            self,
            Self::NoRepository { .. } | Self::NotCached { .. } | Self::Unreachable { .. }
        )
    }

    /// Whether the hub did not answer, so that what is in the cache is all there is to be had now.
    pub(super) fn is_silence(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Answer { status, .. } => is_passing(*status),
            _ => false,
        }
    }
}

/// Whether a status says that asking again later may help.
pub(super) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502..=504)
}

/// A function that turns an I/O error into a [`NameError::Files`] about `path`.
pub(super) fn cannot(
    action: &'static str,
    path: &std::path::Path,
) -> impl FnOnce(io::Error) -> NameError {
    let path = path.to_owned();
    move |source| NameError::Files {
        action,
        path,
        source,
    }
}

/// A text from elsewhere, without what would control a terminal.
fn shown(text: &str) -> String {
    text.escape_debug().to_string().replace("\\'", "'")
}

/// What there is in the place of what was asked for.
fn have(there: &[String]) -> String {
    const MOST: usize = 24;
    let names: Vec<String> = there.iter().take(MOST).map(|name| shown(name)).collect();
    let more = match there.len().saturating_sub(MOST) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    match names.is_empty() {
        true => "there is nothing that could be meant".to_owned(),
        false => format!("there is: {}{more}", names.join(", ")),
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}
