//! A model of the hub: which files it has, which of them are the model, and their way into the Hugging Face cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::choose::{Choice, INDEX, choose};
use super::client::{Access, Client, FileHead};
use super::environment::Environment;
use super::errors::{HUB_CACHE_VARIABLE, NameError, OFFLINE_VARIABLE};
use super::names::{Repository, Wanted};
use super::snapshots::Snapshots;
use super::stored::shards;
use super::transfer::{self, Progress};
use super::{HubError, Step, Steps, tell};

/// The branch that is meant where none is named.
const MAIN: &str = "main";
/// How long to wait for a connection where what is wanted is there already, or can be had elsewhere.
const SHORT: Duration = Duration::from_secs(3);

/// The hub and the folder for what is fetched from it.
#[derive(Debug, Clone)]
pub struct Hub {
    access: Access,
    cache: PathBuf,
    /// The variable that keeps us from asking; `None` if none does.
    offline: Option<&'static str>,
}

/// A model that was found by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundModel {
    /// The file, or the folder with safetensors.
    pub path: PathBuf,
    /// The file that was chosen where another one could have been meant: not of the usual type, or one of several.
    pub chosen: Option<String>,
    /// Why the hub did not say whether there is a newer one; `None` if it did, or is not asked.
    pub unasked: Option<String>,
}

impl FoundModel {
    pub(super) fn at(path: PathBuf) -> Self {
        Self {
            path,
            chosen: None,
            unasked: None,
        }
    }
}

impl Hub {
    /// The hub that the environment names, or huggingface.co: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`, `HF_HOME` and
    /// `HF_HUB_OFFLINE` mean what they mean for `huggingface_hub`.
    ///
    /// # Errors
    /// If there is no folder for what is fetched.
    pub fn new(environment: &Environment) -> Result<Self, NameError> {
        let home = hub_home(environment);
        Ok(Self {
            access: Access::new(environment, home.as_deref()),
            cache: cache(environment).ok_or(NameError::NoFolder)?,
            offline: [OFFLINE_VARIABLE, "TRANSFORMERS_OFFLINE"]
                .into_iter()
                .find(|variable| environment.is_on(variable)),
        })
    }

    /// The same with another pause before a request is made again, the first time. Later ones are longer.
    #[must_use]
    pub fn with_pause(mut self, pause: Duration) -> Self {
        self.access.pause = pause;
        self
    }

    /// The folder for what is fetched.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// A model of a repository. What of it is not in the cache is fetched.
    ///
    /// The hub is asked every time which files it has now, unless a commit is named. If it does not answer, what is in the cache
    /// is taken.
    ///
    /// # Errors
    /// [`HubError::Name`] if there is no such model, or it cannot be fetched; [`HubError::Cancelled`].
    pub fn find(&self, repository: &Repository, steps: &mut Steps) -> Result<FoundModel, HubError> {
        let store = Snapshots::new(&self.cache, &repository.id);
        let revision = repository.revision.as_deref().unwrap_or(MAIN);
        if let Some(variable) = self.offline {
            let why = format!("{variable} is set");
            return self.stored(&store, repository, why);
        }
        // What a commit has does not change.
        if is_commit(revision)
            && let Ok(found) = self.stored(&store, repository, String::new())
        {
            return Ok(found);
        }
        let mut access = self.access.clone();
        let there = self.stored(&store, repository, String::new()).ok();
        if there.is_some() {
            access.connect = access.connect.min(SHORT);
        }
        tell(steps, Step::Checking)?;
        let client = Client::new(access)?;
        let listed = client.list(&repository.id, revision, steps);
        let (commit, names) = match (listed, there) {
            (Ok(listed), _) => listed,
            (Err(HubError::Name(error)), Some(found)) if error.is_silence() => {
                let unasked = Some(error.to_string());
                return Ok(FoundModel { unasked, ..found });
            }
            (Err(error), _) => return Err(error),
        };
        let choice = choose(&repository.id, &names, &repository.wanted)?;
        let fetching = Fetching {
            client: &client,
            store: &store,
            repository: &repository.id,
            commit: &commit,
        };
        let found = match choice {
            Choice::Gguf {
                files,
                opened,
                is_notable,
            } => {
                fetching.all(&files, steps)?;
                FoundModel {
                    chosen: is_notable.then(|| opened.clone()),
                    ..FoundModel::at(store.snapshot(&commit).join(&opened))
                }
            }
            Choice::Safetensors { files, index } => {
                fetching.all(&files, steps)?;
                if index {
                    let shards = shards(&repository.id, &store.snapshot(&commit).join(INDEX))?;
                    if let Some(missing) = shards.iter().find(|shard| !names.contains(shard)) {
                        return Err(NameError::Incomplete {
                            repository: repository.id.clone(),
                            file: INDEX.to_owned(),
                            missing: missing.clone(),
                        }
                        .into());
                    }
                    fetching.all(&shards, steps)?;
                }
                FoundModel::at(store.snapshot(&commit))
            }
        };
        store.note(revision, &commit)?;
        tell(steps, Step::Ready)?;
        Ok(found)
    }

    /// A model that is in the cache.
    fn stored(
        &self,
        store: &Snapshots,
        repository: &Repository,
        why: String,
    ) -> Result<FoundModel, HubError> {
        let revision = repository.revision.as_deref().unwrap_or(MAIN);
        let not_there = |there| {
            Err(NameError::NotCached {
                repository: repository.to_string(),
                cache: self.cache.clone(),
                why: why.clone(),
                there,
            }
            .into())
        };
        let Some(commit) = store.commit(revision) else {
            return not_there(Vec::new());
        };
        let names = store.files(&commit);
        match stored_choice(&repository.id, store, &commit, &names, &repository.wanted) {
            Ok((path, chosen)) => Ok(FoundModel {
                chosen,
                ..FoundModel::at(path)
            }),
            Err(_) => not_there(names),
        }
    }

    /// Fetches one file of a repository to `path`, if the hub says that its SHA-256 is this; `false` if it is another. It is asked
    /// once, and not waited for long.
    ///
    /// # Errors
    /// If the hub does not answer, or the file cannot be fetched; [`HubError::Cancelled`].
    pub(super) fn fetch_exactly(
        &self,
        repository: &str,
        revision: &str,
        file: &str,
        sha256: &str,
        path: &Path,
        steps: &mut Steps,
    ) -> Result<bool, HubError> {
        if self.offline.is_some() {
            return Ok(false);
        }
        let mut access = self.access.clone();
        access.connect = access.connect.min(SHORT);
        access.answer = access.answer.min(2 * SHORT);
        access.pause = Duration::ZERO;
        let client = Client::new(access)?;
        let head = client.look(repository, revision, file, steps)?;
        if !head.etag.eq_ignore_ascii_case(sha256) {
            return Ok(false);
        }
        let client = Client::new(self.access.clone())?;
        let wanted = transfer::Wanted {
            repository,
            revision,
            file,
            head: &head,
        };
        let progress = Progress {
            before: 0,
            total: head.size.unwrap_or_default(),
        };
        transfer::fetch(&client, &wanted, path, &progress, steps).map(|()| true)
    }
}

/// Hugging Face's folder in the user's home: `HF_HOME`, or `huggingface` in the cache folder. `None` if there is no home.
fn hub_home(environment: &Environment) -> Option<PathBuf> {
    environment.path("HF_HOME").or_else(|| {
        let caches = environment.path("XDG_CACHE_HOME");
        let caches = caches.or_else(|| Some(environment.home()?.join(".cache")))?;
        Some(caches.join("huggingface"))
    })
}

/// The folder for what is fetched from the hub: `HF_HUB_CACHE`, or `hub` in Hugging Face's folder. `None` if there is no home.
pub(super) fn cache(environment: &Environment) -> Option<PathBuf> {
    environment
        .path(HUB_CACHE_VARIABLE)
        .or_else(|| environment.path("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(hub_home(environment)?.join("hub")))
}

/// The repository whose snapshot a folder of the Hugging Face cache is; `None` if it is another folder, or a file.
pub fn repository_of(folder: &Path) -> Option<String> {
    let mut above = folder.ancestors().skip(1).map(|above| above.file_name());
    let (Some(Some(snapshots)), Some(Some(repository))) = (above.next(), above.next()) else {
        return None;
    };
    let name = repository.to_str()?.strip_prefix("models--")?;
    let is_snapshot = snapshots == "snapshots" && folder.is_dir();
    is_snapshot.then(|| name.replacen("--", "/", 1))
}

/// Whether a revision is the whole hash of a commit.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The path of a model in a snapshot, and the name of the file if it had to be chosen.
///
/// # Errors
/// If it is not there as a whole.
pub(super) fn stored_choice(
    repository: &str,
    store: &Snapshots,
    commit: &str,
    names: &[String],
    wanted: &Wanted,
) -> Result<(PathBuf, Option<String>), NameError> {
    let folder = store.snapshot(commit);
    match choose(repository, names, wanted)? {
        Choice::Gguf {
            opened, is_notable, ..
        } => Ok((folder.join(&opened), is_notable.then_some(opened))),
        Choice::Safetensors { index, .. } => {
            if index {
                let shards = shards(repository, &folder.join(INDEX))?;
                if let Some(missing) = shards.into_iter().find(|shard| !names.contains(shard)) {
                    return Err(NameError::Incomplete {
                        repository: repository.to_owned(),
                        file: INDEX.to_owned(),
                        missing,
                    });
                }
            }
            Ok((folder, None))
        }
    }
}

/// The way of files into the cache.
struct Fetching<'a> {
    client: &'a Client,
    store: &'a Snapshots,
    repository: &'a str,
    commit: &'a str,
}

impl Fetching<'_> {
    /// Fetches those files that are not there, one after the other.
    fn all(&self, files: &[String], steps: &mut Steps) -> Result<(), HubError> {
        let mut missing: Vec<(&String, FileHead)> = Vec::new();
        for file in files {
            if !self.store.has(self.commit, file) {
                let head = self
                    .client
                    .look(self.repository, self.commit, file, steps)?;
                missing.push((file, head));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.store.prepare()?;
        self.check_room(&missing)?;
        let sizes = missing.iter().map(|(_, head)| head.size);
        let total = sizes.sum::<Option<u64>>().unwrap_or_default();
        let mut before = 0;
        for (file, head) in &missing {
            self.one(file, head, &Progress { before, total }, steps)?;
            before += head.size.unwrap_or_default();
        }
        Ok(())
    }

    fn one(
        &self,
        file: &str,
        head: &FileHead,
        progress: &Progress,
        steps: &mut Steps,
    ) -> Result<(), HubError> {
        let (store, etag) = (self.store, &*head.etag);
        let _lock = store.lock(etag, steps)?;
        let blob = store.blob(etag);
        let there = fs::metadata(&blob).ok().filter(|blob| blob.is_file());
        let is_whole = there.is_some_and(|blob| head.size.is_none_or(|size| size == blob.len()));
        if !is_whole {
            let wanted = transfer::Wanted {
                repository: self.repository,
                revision: self.commit,
                file,
                head,
            };
            transfer::fetch(self.client, &wanted, &store.part(etag), progress, steps)?;
            store.keep(etag)?;
        }
        Ok(store.link(self.commit, file, etag)?)
    }

    /// Whether there is the room for what is missing, as far as that can be told.
    fn check_room(&self, missing: &[(&String, FileHead)]) -> Result<(), NameError> {
        let needed = missing.iter().map(|(_, head)| {
            let size = head.size.unwrap_or_default();
            match self.store.blob(&head.etag).is_file() {
                true => 0,
                false => size.saturating_sub(self.store.arrived(&head.etag)),
            }
        });
        let needed = needed.fold(0_u64, u64::saturating_add);
        let folder = self.store.blob("");
        match free(&folder) {
            Some(free) if free < needed => Err(NameError::NoRoom {
                folder,
                needed,
                free,
            }),
            _ => Ok(()),
        }
    }
}

/// Free bytes on the disk of a folder; `None` where the system does not tell.
#[cfg(target_os = "linux")]
fn free(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(not(target_os = "linux"))]
fn free(_: &Path) -> Option<u64> {
    None
}
