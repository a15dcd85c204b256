//! `flapjack models`

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::{Args, Subcommand};
use flapjack::hub::{self, StoredModel};
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
    /// Print where a model in the cache folder is
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
            let model = hub::stored_model(&args.name)?;
            Ok(streams::print(|out| {
                writeln!(out, "{}", model.path.display())
            })?)
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
    };
    Ok(streams::print(|out| match json {
        true => out.json(&output),
        false => write_list(out, &output),
    })?)
}

fn write_list(out: &mut impl Write, output: &Output) -> io::Result<()> {
    writeln!(out, "models in {}", output.folder.display())?;
    for model in &output.models {
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
    writeln!(out, "  {:>11}  together", megabytes(output.bytes as usize))
}

fn remove(names: &[String]) -> Result<()> {
    // Nothing is removed where one of them is wrong.
    let models: Result<Vec<StoredModel>, _> =
        names.iter().map(|name| hub::stored_model(name)).collect();
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
