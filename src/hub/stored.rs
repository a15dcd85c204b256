//! What lies in folders of models: files, their sizes and times.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::Value;

use super::StoredModel;
use super::choose::{Choice, INDEX, choose, models};
use super::errors::{NameError, cannot};
use super::names::{Wanted, is_within};

/// Folders within folders in which files are looked for.
const DEEPEST: usize = 4;

/// Those of a store's possible folders that exist; never empty. `store` is its name and `variable` the environment variable that sets its folder, both for
/// the error.
///
/// # Errors
/// If none exists.
pub(super) fn folders_there(
    store: &'static str,
    folders: Vec<PathBuf>,
    variable: &'static str,
) -> Result<Vec<PathBuf>, NameError> {
    let there: Vec<PathBuf> = folders.iter().filter(|f| f.is_dir()).cloned().collect();
    if there.is_empty() {
        return Err(NameError::NoStore {
            store,
            folders,
            variable,
        });
    }
    Ok(there)
}

/// The names in a folder that are UTF-8 and not hidden, in order; none if it cannot be read.
pub(super) fn entries(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

/// The names of all files in a folder and in folders within it, with slashes, that are there: links that lead nowhere are not.
pub(super) fn all_files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), String::new(), DEEPEST)];
    while let Some((folder, before, deeper)) = folders.pop() {
        for name in entries(&folder) {
            let path = folder.join(&name);
            let within = format!("{before}{name}");
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => found.push(within),
                Ok(metadata) if metadata.is_dir() && deeper > 0 => {
                    folders.push((path, format!("{within}/"), deeper - 1));
                }
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// The models among the files of a repository in a folder: GGUF files with all their parts, or else a folder with safetensors (`None` as
/// the file of the name).
pub(super) fn of_names(
    repository: &str,
    folder: &Path,
    files: &[String],
    name: impl Fn(Option<&str>) -> String,
) -> Vec<StoredModel> {
    let all = models(files);
    let paths =
        |files: &[String]| -> Vec<PathBuf> { files.iter().map(|file| folder.join(file)).collect() };
    if all.is_empty() {
        let Ok(Choice::Safetensors { index, .. }) = choose(repository, files, &Wanted::Usual)
        else {
            return Vec::new();
        };
        let shards = match index {
            true => shards(repository, &folder.join(INDEX)),
            false => Ok(Vec::new()),
        };
        if !shards.is_ok_and(|shards| shards.iter().all(|shard| files.contains(shard))) {
            return Vec::new();
        }
        let model = stored(name(None), folder.to_owned(), &paths(files));
        return model.into_iter().collect();
    }
    let models = all.into_iter().filter_map(|file| {
        let wanted = Wanted::File(file.to_owned());
        match choose(repository, files, &wanted).ok()? {
            Choice::Gguf { files, .. } => {
                stored(name(Some(file)), folder.join(file), &paths(&files))
            }
            Choice::Safetensors { .. } => None,
        }
    });
    let mut models: Vec<StoredModel> = models.collect();
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models
}

/// The files that an index of safetensors names, each once.
///
/// # Errors
/// If it cannot be read, or names none.
pub(super) fn shards(repository: &str, index: &Path) -> Result<Vec<String>, NameError> {
    let text = fs::read(index).map_err(cannot("read", index))?;
    let json: Option<Value> = serde_json::from_slice(&text).ok();
    let map = json
        .as_ref()
        .and_then(|json| json["weight_map"].as_object());
    let files = map.map(|map| {
        let files = map.values().filter_map(Value::as_str).map(str::to_owned);
        files.collect::<BTreeSet<String>>()
    });
    match files {
        Some(files) if !files.is_empty() && files.iter().all(|file| is_within(file)) => {
            Ok(files.into_iter().collect())
        }
        _ => Err(NameError::Odd {
            address: format!("{repository}/{INDEX}"),
            problem: "it does not say which files have the weights (\"weight_map\")".to_owned(),
        }),
    }
}

/// What there is to know about a model of one file, or of several; `None` if it is not there.
pub(super) fn stored(name: String, path: PathBuf, files: &[PathBuf]) -> Option<StoredModel> {
    let alone = [path.clone()];
    let files = match files.is_empty() {
        true => &alone,
        false => files,
    };
    let mut model = StoredModel {
        name,
        path,
        bytes: 0,
        fetched: UNIX_EPOCH,
        last_used: UNIX_EPOCH,
    };
    for file in files {
        let metadata = fs::metadata(file).ok()?;
        let fetched = metadata.modified().unwrap_or(UNIX_EPOCH);
        model.bytes += metadata.len();
        model.fetched = model.fetched.max(fetched);
        model.last_used = model
            .last_used
            .max(metadata.accessed().unwrap_or(fetched))
            .max(fetched);
    }
    Some(model)
}
