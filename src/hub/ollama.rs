//! Ollama's store: `manifests/HOST/NAMESPACE/MODEL/TAG` names the content `blobs/sha256-…` that is a model. It is only read.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::StoredModel;
use super::environment::Environment;
use super::errors::{NameError, cannot};
use super::repository::FoundModel;
use super::stored::{entries, folders_there, stored};

/// The environment variable that names the folder of the store.
const VARIABLE: &str = "OLLAMA_MODELS";
const NAME: &str = "Ollama";
/// What is left out of names: where models come from unless something else is said.
const REGISTRY: &str = "registry.ollama.ai";
const LIBRARY: &str = "library";
const LATEST: &str = "latest";

/// The folder of contents, each of which has its hash for a name.
const BLOBS: &str = "blobs";

/// Kinds of layers.
const MODEL: &str = "application/vnd.ollama.image.model";
const ADAPTER: &str = "application/vnd.ollama.image.adapter";

/// Where the store may be: the folder that is named, or those of the user and of the service.
pub(super) fn folders(environment: &Environment) -> Vec<PathBuf> {
    if let Some(named) = environment.path(VARIABLE) {
        return vec![named];
    }
    let own = environment.home().map(|home| home.join(".ollama/models"));
    let service = ["/usr/share/ollama/.ollama/models", "/var/lib/ollama/models"];
    own.into_iter()
        .chain(service.iter().map(PathBuf::from))
        .collect()
}

/// A model by Ollama's name, such as `llama3.2:1b`; without a tag it is `latest`.
///
/// # Errors
/// If there is no store, or no such model in it, or it cannot be used.
pub(super) fn find(name: &str, environment: &Environment) -> Result<FoundModel, NameError> {
    let there = folders_there(NAME, folders(environment), VARIABLE)?;
    let last = name.rsplit('/').next().unwrap_or_default();
    let wanted = match last.contains(':') {
        true => name.to_owned(),
        false => format!("{name}:{LATEST}"),
    };
    let mut names = Vec::new();
    for folder in &there {
        for (found, manifest) in manifests(folder) {
            if found.eq_ignore_ascii_case(&wanted) {
                return model(folder, &found, &manifest).map(FoundModel::at);
            }
            names.push(found);
        }
    }
    Err(NameError::NotInStore {
        store: NAME,
        name: name.to_owned(),
        folder: there[0].clone(),
        there: names,
    })
}

/// All models of a store that can be used.
pub(super) fn all(folder: &Path) -> Vec<StoredModel> {
    let manifests = manifests(folder).into_iter();
    let models = manifests.filter_map(|(name, manifest)| {
        let path = model(folder, &name, &manifest).ok()?;
        stored(format!("ollama:{name}"), path, &[])
    });
    models.collect()
}

/// The name of the model that a file of a store is, such as `ollama:llama3.2:1b`; of several the first. `None` for any other file.
pub(super) fn name_of(file: &Path) -> Option<String> {
    let blobs = file.parent().filter(|folder| folder.ends_with(BLOBS))?;
    let folder = blobs.parent()?;
    let (name, _) = manifests(folder)
        .into_iter()
        .find(|(name, manifest)| model(folder, name, manifest).is_ok_and(|model| model == file))?;
    Some(format!("ollama:{name}"))
}

/// Names and manifests of a store, by name.
fn manifests(folder: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let root = folder.join("manifests");
    for host in entries(&root) {
        for space in entries(&root.join(&host)) {
            for model in entries(&root.join(&host).join(&space)) {
                let tags = root.join(&host).join(&space).join(&model);
                for tag in entries(&tags) {
                    let before = match (&*host, &*space) {
                        (REGISTRY, LIBRARY) => String::new(),
                        (REGISTRY, space) => format!("{space}/"),
                        (host, space) => format!("{host}/{space}/"),
                    };
                    found.push((format!("{before}{model}:{tag}"), tags.join(&tag)));
                }
            }
        }
    }
    found.sort();
    found
}

/// The model's file that a manifest names.
fn model(folder: &Path, name: &str, manifest: &Path) -> Result<PathBuf, NameError> {
    let text = fs::read(manifest).map_err(cannot("read", manifest))?;
    let unusable = |problem: String| NameError::Unusable {
        store: NAME,
        name: name.to_owned(),
        problem,
    };
    let json: Value = serde_json::from_slice(&text)
        .map_err(|_| unusable(format!("{} is no manifest", manifest.display())))?;
    let layers = json["layers"].as_array().map(Vec::as_slice);
    let layers = layers.unwrap_or_default();
    let of_kind = |kind: &str| -> Vec<&Value> {
        let layers = layers.iter();
        layers.filter(|layer| layer["mediaType"] == kind).collect()
    };
    if !of_kind(ADAPTER).is_empty() {
        return Err(unusable(
            "it is an adapter on another model; merge them first".to_owned(),
        ));
    }
    let layer = match of_kind(MODEL)[..] {
        [layer] => layer,
        [] => return Err(unusable("it has no model, only settings".to_owned())),
        _ => return Err(unusable("it is of several files".to_owned())),
    };
    let digest = layer["digest"].as_str().unwrap_or_default();
    let hash = digest.strip_prefix("sha256:").unwrap_or_default();
    if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(unusable(format!(
            "{} does not name its model by a SHA-256",
            manifest.display()
        )));
    }
    let path = folder.join(BLOBS).join(format!("sha256-{hash}"));
    let there = fs::metadata(&path).map_err(cannot("read", &path))?;
    match layer["size"].as_u64() {
        Some(size) if size != there.len() => Err(unusable(format!(
            "{} has {} bytes instead of {size}; pull it again",
            path.display(),
            there.len()
        ))),
        _ => Ok(path),
    }
}
