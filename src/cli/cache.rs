//! `flapjack cache`

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;
use clap::{Args, Subcommand};
use flapjack::engine::{CACHE_SIZE_VARIABLE, CacheContent, CacheEntry, CacheFolder, CacheKind};
use flapjack::hub;
use flapjack::prune::Covariances;
use serde::Serialize;

use super::words::{ago, megabytes, plural, printable, target_words};
use super::{heading, streams};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct CacheFolderArgs {
    #[command(subcommand)]
    action: Option<Action>,
    /// Print one JSON object
    #[arg(help_heading = heading::OUTPUT, long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Remove profiles and outcomes of earlier runs; what a run needs of them is made again
    Clear(ClearArgs),
}

#[derive(Debug, Args)]
#[command(next_help_heading = heading::REMOVAL)]
struct ClearArgs {
    /// Only those that were not used for so long, for example 30d or 12h
    #[arg(long, value_name = "AGE", value_parser = parse_age)]
    older_than: Option<Duration>,
    /// Also the default model, which is fetched again when it is needed
    #[arg(long)]
    models: bool,
}

/// Units of ages, and their seconds.
const AGES: [(char, u64); 5] = [
    ('w', 7 * 24 * 60 * 60),
    ('d', 24 * 60 * 60),
    ('h', 60 * 60),
    ('m', 60),
    ('s', 1),
];

fn parse_age(text: &str) -> Result<Duration, String> {
    let unit = AGES.iter().find(|(name, _)| text.ends_with(*name));
    let seconds = unit.and_then(|(name, unit)| {
        let number: u64 = text.strip_suffix(*name)?.trim_end().parse().ok()?;
        number.checked_mul(*unit)
    });
    let seconds = seconds
        .ok_or("must be a whole number with a unit: s, m (minutes), h, d or w, for example 30d")?;
    Ok(Duration::from_secs(seconds))
}

pub fn run(args: CacheFolderArgs) -> Result<()> {
    let cache = CacheFolder::new(None, None)?;
    match args.action {
        Some(Action::Clear(args)) => clear(&cache, &args),
        None => list(&cache, args.json),
    }
}

// ---- showing ----

#[derive(Debug, Serialize)]
struct Output {
    /// The folder of profiles and outcomes.
    folder: Option<PathBuf>,
    /// Bytes of all entries, and those that they may have.
    bytes: u64,
    limit: u64,
    /// From the one that was used last to the one that goes first.
    entries: Vec<Entry>,
    models: Vec<Model>,
}

#[derive(Debug, Serialize)]
struct Entry {
    kind: CacheKind,
    path: PathBuf,
    bytes: u64,
    /// Seconds since the beginning of 1970.
    last_used: u64,
    /// Whether an earlier version wrote it in a format that is not read any more.
    outdated: bool,
    /// The name of the model's file, where it is known.
    model: Option<String>,
    /// What it holds, in words.
    content: String,
}

#[derive(Debug, Serialize)]
struct Model {
    path: PathBuf,
    bytes: u64,
}

fn list(cache: &CacheFolder, json: bool) -> Result<()> {
    let entries: Vec<Entry> = cache.entries()?.iter().map(entry).collect();
    let model = match cache.path() {
        Some(_) => hub::stored_default_model()?,
        None => None,
    };
    let output = Output {
        folder: cache.path().map(Path::to_owned),
        bytes: entries.iter().map(|entry| entry.bytes).sum(),
        limit: cache.limit(),
        entries,
        models: model
            .into_iter()
            .map(|model| Model {
                path: model.path,
                bytes: model.bytes,
            })
            .collect(),
    };
    Ok(streams::print(|out| match json {
        true => out.json(&output),
        false => write_list(out, &output),
    })?)
}

fn write_list(out: &mut impl Write, output: &Output) -> io::Result<()> {
    let Some(folder) = &output.folder else {
        let variable = hub::CACHE_VARIABLE;
        return writeln!(out, "this user has no cache folder; {variable} sets one");
    };
    writeln!(out, "profiles and outcomes in {}", folder.display())?;
    for entry in &output.entries {
        writeln!(
            out,
            "  {:<8} {:>11}  {:<15}  {}",
            kind_words(entry.kind),
            megabytes(entry.bytes as usize),
            ago(entry.last_used),
            printable(&entry.content)
        )?;
    }
    writeln!(
        out,
        "  {:<8} {:>11}  of at most {} ({CACHE_SIZE_VARIABLE} sets another limit)",
        "together",
        megabytes(output.bytes as usize),
        megabytes(output.limit as usize)
    )?;
    for model in &output.models {
        let folder = model.path.parent().unwrap_or(folder);
        let name = model.path.file_name().unwrap_or_default();
        writeln!(out, "models in {}", folder.display())?;
        writeln!(
            out,
            "  {:<8} {:>11}  {}",
            "model",
            megabytes(model.bytes as usize),
            name.display()
        )?;
    }
    Ok(())
}

fn entry(entry: &CacheEntry) -> Entry {
    let content = entry.content();
    let model = match &content {
        Some(CacheContent::Profile(origin)) => Some(origin.model_name.clone()),
        Some(CacheContent::Outcome { model, .. }) => Some(model.clone()),
        Some(CacheContent::Text { .. }) | None => None,
    };
    let model = model.filter(|name| !name.is_empty());
    let last_used = entry.last_used.duration_since(UNIX_EPOCH);
    Entry {
        kind: entry.kind,
        path: entry.path.clone(),
        bytes: entry.bytes,
        last_used: last_used.map_or(0, |time| time.as_secs()),
        outdated: entry.outdated,
        content: content_words(entry, content.as_ref(), model.as_deref()),
        model,
    }
}

fn kind_words(kind: CacheKind) -> &'static str {
    match kind {
        CacheKind::Profile => "profile",
        CacheKind::Outcome => "outcome",
        CacheKind::Hash => "hash",
        CacheKind::Text => "text",
        CacheKind::Training => "training",
        CacheKind::Partial => "partial",
    }
}

fn content_words(
    entry: &CacheEntry,
    content: Option<&CacheContent>,
    model: Option<&str>,
) -> String {
    let model = model.unwrap_or("a model");
    match content {
        Some(CacheContent::Profile(origin)) => {
            let tokens = plural(origin.tokens, "token");
            let mut words = format!("{model} on {tokens} of {}", origin.source);
            if origin.collected.covariances == Covariances::All {
                words += ", with covariances";
            }
            if origin.collected.curves.is_some() {
                words += ", with loss curves";
            }
            words
        }
        Some(CacheContent::Text { tokens }) => {
            format!(
                "{} that {model} has written to be calibrated on",
                plural(*tokens, "token")
            )
        }
        Some(CacheContent::Outcome {
            target,
            ratio,
            recipe,
            ..
        }) => {
            let target = target_words(*target);
            let (metric, structure) = (recipe.metric, recipe.structure);
            let restore = recipe.restore;
            format!("{model} with {target} (ratio {ratio:.4}, {metric}, {structure}, {restore})")
        }
        None if entry.outdated => "of an earlier version, not used any more".to_owned(),
        None if entry.kind == CacheKind::Hash => {
            "of a profile that was too large to stay".to_owned()
        }
        None if entry.kind == CacheKind::Training => "of a healing that was broken off".to_owned(),
        None if entry.kind == CacheKind::Partial => {
            "of a calibration that was broken off".to_owned()
        }
        None => "cannot be read".to_owned(),
    }
}

// ---- removing ----

fn clear(cache: &CacheFolder, args: &ClearArgs) -> Result<()> {
    let cleared = cache.clear(args.older_than)?;
    let model = hub::stored_default_model().ok().flatten();
    let removed = args.models && model.is_some() && hub::remove_default_model()?;
    Ok(streams::print(|out| {
        let (files, size) = (plural(cleared.files, "file"), cleared.bytes as usize);
        writeln!(out, "removed {files} of earlier runs, {}", megabytes(size))?;
        let Some(model) = &model else { return Ok(()) };
        let (name, size) = (model.path.display(), megabytes(model.bytes as usize));
        match removed {
            true => writeln!(out, "removed the default model {name}, {size}"),
            false => writeln!(
                out,
                "kept the default model {name}, {size}; --models removes it as well"
            ),
        }
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_a_number_and_a_unit() {
        for (text, seconds) in [
            ("30d", 2_592_000),
            ("12 h", 43_200),
            ("2w", 1_209_600),
            ("0s", 0),
            ("5m", 300),
        ] {
            assert_eq!(parse_age(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in [
            "",
            "d",
            "30",
            "-1d",
            "1.5h",
            "1y",
            "99999999999999999999w",
            "9999999999999999999w",
        ] {
            assert!(parse_age(text).is_err(), "{text}");
        }
    }
}
