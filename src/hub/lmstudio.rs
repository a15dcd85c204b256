//! LM Studio's folder of models: `PUBLISHER/REPO/FILE`. It is only read.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::StoredModel;
use super::choose::{Choice, choose, models};
use super::environment::Environment;
use super::errors::NameError;
use super::names::Wanted;
use super::repository::FoundModel;
use super::stored::{all_files, entries, folders_there, of_names};

/// The environment variable that names the folder, where it is another than LM Studio's usual ones.
const VARIABLE: &str = "LMSTUDIO_MODELS";
const NAME: &str = "LM Studio";

/// Where models may be: the folder that is named, what LM Studio's settings name, and its usual ones.
pub(super) fn folders(environment: &Environment) -> Vec<PathBuf> {
    if let Some(named) = environment.path(VARIABLE) {
        return vec![named];
    }
    let Some(home) = environment.home() else {
        return Vec::new();
    };
    let pointer = fs::read_to_string(home.join(".lmstudio-home-pointer")).ok();
    let named = pointer.map(|path| PathBuf::from(path.trim()));
    let mut folders = Vec::new();
    for studio in named.into_iter().chain([home.join(".lmstudio")]) {
        let settings = fs::read(studio.join("settings.json")).unwrap_or_default();
        let settings: Option<Value> = serde_json::from_slice(&settings).ok();
        let chosen = settings.and_then(|s| s["downloadsFolder"].as_str().map(PathBuf::from));
        folders.extend(chosen);
        folders.push(studio.join("models"));
    }
    folders.push(home.join(".cache/lm-studio/models"));
    folders.dedup();
    folders
}

/// A model by `PUBLISHER/REPO`, with `/FILE` or `:TYPE` behind it; the publisher may be left out where that is clear.
///
/// # Errors
/// If there is no such folder, or no such model in it.
pub(super) fn find(name: &str, environment: &Environment) -> Result<FoundModel, NameError> {
    let there = folders_there(NAME, folders(environment), VARIABLE)?;
    let (place, kind) = match name.rsplit_once(':') {
        Some((place, kind)) => (place, Some(kind)),
        None => (name, None),
    };
    let mut names = Vec::new();
    for folder in &there {
        let all = repositories(folder);
        let fits = |repository: &&String| {
            let short = repository.split('/').next_back().unwrap_or_default();
            let is_whole = starts(place, repository);
            is_whole || (!place.contains('/') && short.eq_ignore_ascii_case(place))
        };
        let matching: Vec<&String> = all.iter().filter(fits).collect();
        if let [repository] = matching[..] {
            let file = place.get(repository.len()..).unwrap_or_default();
            let file = file.trim_start_matches('/');
            let wanted = match (kind, file) {
                (Some(kind), _) => Wanted::Type(kind.to_owned()),
                (None, "") => Wanted::Usual,
                (None, file) => Wanted::File(file.to_owned()),
            };
            let root = folder.join(repository);
            let files = all_files(&root);
            return Ok(match choose(repository, &files, &wanted)? {
                Choice::Gguf {
                    opened, is_notable, ..
                } => FoundModel {
                    chosen: is_notable.then(|| opened.clone()),
                    ..FoundModel::at(root.join(opened))
                },
                Choice::Safetensors { .. } => FoundModel::at(root),
            });
        }
        for repository in all {
            let files = all_files(&folder.join(&repository));
            let all = models(&files).into_iter();
            names.extend(all.map(|file| format!("{repository}/{file}")));
        }
    }
    Err(NameError::NotInStore {
        store: NAME,
        name: name.to_owned(),
        folder: there[0].clone(),
        there: names,
    })
}

/// Whether a name is that of a repository, or of something in it.
fn starts(name: &str, repository: &str) -> bool {
    let begins = name
        .get(..repository.len())
        .is_some_and(|begin| begin.eq_ignore_ascii_case(repository));
    begins && matches!(name.as_bytes().get(repository.len()), None | Some(b'/'))
}

/// All models of the folder that can be used.
pub(super) fn all(folder: &Path) -> Vec<StoredModel> {
    let repositories = repositories(folder).into_iter();
    let models = repositories.flat_map(|repository| {
        let root = folder.join(&repository);
        let files = all_files(&root);
        of_names(&repository, &root, &files, |file| match file {
            Some(file) => format!("lmstudio:{repository}/{file}"),
            None => format!("lmstudio:{repository}"),
        })
    });
    models.collect()
}

/// `PUBLISHER/REPO` of all that there are, by name.
fn repositories(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for publisher in entries(folder) {
        for repository in entries(&folder.join(&publisher)) {
            if folder.join(&publisher).join(&repository).is_dir() {
                found.push(format!("{publisher}/{repository}"));
            }
        }
    }
    found.sort();
    found
}
