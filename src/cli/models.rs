//! `flapjack models`

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Error, Result};
use clap::{Args, Subcommand};
use flapjack::hub::{self, Environment, HubError, Store, StoreModels, StoredModel};
use serde::Serialize;

use super::words::{ago, megabytes, printable};
use super::{heading, streams};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ModelsArgs {
    #[command(subcommand)]
    action: Option<Action>,
    /// Print one JSON object
    #[arg(help_heading = heading::OUTPUT, long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Remove models from the cache folder; runs that use them are not disturbed
    #[command(visible_alias = "rm")]
    Remove(RemoveArgs),
    /// Print where a model on this machine is
    Path(PathArgs),
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// The models, by the names that `flapjack models` shows or their last parts
    #[arg(help_heading = heading::REMOVAL, value_name = "NAME", required = true)]
    names: Vec<String>,
}

#[derive(Debug, Args)]
struct PathArgs {
    /// The model, by the name that `flapjack models` shows or its last part
    #[arg(help_heading = heading::MODEL, value_name = "NAME")]
    name: String,
}

pub fn run(args: ModelsArgs) -> Result<()> {
    match args.action {
        Some(Action::Remove(args)) => remove(&args.names),
        Some(Action::Path(args)) => {
            let path = match hub::stored_model(&args.name) {
                Ok(model) => model.path,
                Err(error) => match elsewhere(&args.name) {
                    Some((_, model)) => model.path,
                    None => return Err(error.into()),
                },
            };
            Ok(streams::print(|out| writeln!(out, "{}", path.display()))?)
        }
        None => list(args.json),
    }
}

#[derive(Debug, Serialize)]
struct Output {
    /// The cache folder.
    folder: PathBuf,
    /// Bytes of all of them.
    bytes: u64,
    models: Vec<Model>,
    /// Models that other programs keep.
    stores: Vec<OtherStore>,
}

#[derive(Debug, Serialize)]
struct OtherStore {
    store: &'static str,
    folder: PathBuf,
    bytes: u64,
    models: Vec<Model>,
}

impl From<StoreModels> for OtherStore {
    fn from(store: StoreModels) -> Self {
        let models = store.models.into_iter();
        let models: Vec<Model> = models
            .map(|model| Model {
                default: false,
                ..Model::from(model)
            })
            .collect();
        Self {
            store: store_words(store.store),
            folder: store.folder,
            bytes: models.iter().map(|model| model.bytes).sum(),
            models,
        }
    }
}

fn store_words(store: Store) -> &'static str {
    match store {
        Store::HuggingFace => "Hugging Face",
        Store::Ollama => "Ollama",
        Store::LmStudio => "LM Studio",
    }
}

/// A model of another program's store, by the name that the list shows.
fn elsewhere(name: &str) -> Option<(Store, StoredModel)> {
    let stores = hub::stores(&Environment::of_process()).into_iter();
    let mut all = stores.flat_map(|store| {
        let models = store.models.into_iter();
        models.map(move |model| (store.store, model))
    });
    all.find(|(_, model)| model.name == name)
}

#[derive(Debug, Serialize)]
struct Model {
    name: String,
    path: PathBuf,
    bytes: u64,
    /// Seconds since the beginning of 1970.
    fetched: u64,
    last_used: u64,
    /// Whether it is the default model.
    default: bool,
}

impl From<StoredModel> for Model {
    fn from(model: StoredModel) -> Self {
        let seconds = |time: SystemTime| {
            let since = time.duration_since(UNIX_EPOCH);
            since.map_or(0, |time| time.as_secs())
        };
        Self {
            default: model.name == hub::DEFAULT_MODEL.file_name,
            name: model.name,
            path: model.path,
            bytes: model.bytes,
            fetched: seconds(model.fetched),
            last_used: seconds(model.last_used),
        }
    }
}

fn list(json: bool) -> Result<()> {
    let models: Vec<Model> = hub::stored_models()?.into_iter().map(Model::from).collect();
    let output = Output {
        folder: hub::cache_dir()?,
        bytes: models.iter().map(|model| model.bytes).sum(),
        models,
        stores: hub::stores(&Environment::of_process())
            .into_iter()
            .map(OtherStore::from)
            .collect(),
    };
    Ok(streams::print(|out| match json {
        true => out.json(&output),
        false => write_list(out, &output),
    })?)
}

fn write_list(out: &mut impl Write, output: &Output) -> io::Result<()> {
    writeln!(out, "models in {}", output.folder.display())?;
    write_models(out, &output.models, output.bytes)?;
    for store in &output.stores {
        writeln!(
            out,
            "models of {} in {}",
            store.store,
            store.folder.display()
        )?;
        write_models(out, &store.models, store.bytes)?;
    }
    Ok(())
}

fn write_models(out: &mut impl Write, models: &[Model], bytes: u64) -> io::Result<()> {
    for model in models {
        let default = if model.default {
            "  (the default model)"
        } else {
            ""
        };
        writeln!(
            out,
            "  {:>11}  used {:<15} fetched {:<15} {}{default}",
            megabytes(model.bytes as usize),
            ago(model.last_used),
            ago(model.fetched),
            printable(&model.name)
        )?;
    }
    writeln!(out, "  {:>11}  together", megabytes(bytes as usize))
}

/// A model of our own cache folder to remove; those of other programs are theirs.
fn to_remove(name: &str) -> Result<StoredModel> {
    match hub::stored_model(name) {
        Err(error @ HubError::NotStored { .. }) => match elsewhere(name) {
            Some((store, model)) => Err(not_ours(store, &model)),
            None => Err(error.into()),
        },
        found => Ok(found?),
    }
}

/// That a model belongs to another program, and how that removes it.
fn not_ours(store: Store, model: &StoredModel) -> Error {
    let name = &*model.name;
    let how = match store {
        Store::HuggingFace => {
            let repository = name.split(['@', ':']).next().unwrap_or_default();
            let parts: Vec<&str> = repository.splitn(3, '/').take(2).collect();
            format!(
                "`hf cache rm model/{}` removes its repository, and so does deleting the folder models--{} there",
                parts.join("/"),
                parts.join("--")
            )
        }
        Store::Ollama => {
            let name = name.trim_start_matches("ollama:");
            format!("`ollama rm {name}` removes it")
        }
        Store::LmStudio => format!("LM Studio removes it, or delete {}", model.path.display()),
    };
    let store = store_words(store);
    Error::msg(printable(&format!(
        "{name} is not in flapjack's cache folder, but in {store}'s, which other programs use: {how}"
    )))
}

fn remove(names: &[String]) -> Result<()> {
    // Nothing is removed where one of them is wrong.
    let models: Result<Vec<StoredModel>> = names.iter().map(|name| to_remove(name)).collect();
    let mut models = models?;
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models.dedup_by(|a, b| a.name == b.name);
    for model in &models {
        hub::remove_model(model)?;
        let (path, size) = (
            model.path.display().to_string(),
            megabytes(model.bytes as usize),
        );
        streams::print(|out| writeln!(out, "removed {}, {size}", printable(&path)))?;
    }
    Ok(())
}
