//! `flapjack config`

use std::env;
use std::io::{self, Write};

use anyhow::Result;
use clap::{Args, Command};
use flapjack::engine::CACHE_SIZE_VARIABLE;
use flapjack::hub;

use super::defaults::{self, Defaults, Setting};
use super::words::printable;
use super::{heading, streams};

#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Print where the config file is, or would be, and nothing else
    #[arg(help_heading = heading::OUTPUT, long)]
    path: bool,
}

/// Environment variables that change what flapjack does.
const VARIABLES: [&str; 14] = [
    defaults::VARIABLE,
    hub::CACHE_VARIABLE,
    CACHE_SIZE_VARIABLE,
    hub::PYTHON_VARIABLE,
    "FLAPJACK_API_KEY",
    "FLAPJACK_ISA",
    "FLAPJACK_LOG",
    hub::ENDPOINT_VARIABLE,
    "HF_HOME",
    hub::HUB_CACHE_VARIABLE,
    hub::OFFLINE_VARIABLE,
    hub::TOKEN_VARIABLE,
    "OLLAMA_MODELS",
    "LMSTUDIO_MODELS",
];

pub fn run(args: &ConfigArgs, mut command: Command) -> Result<()> {
    if args.path {
        return Ok(streams::print(|out| match defaults::path() {
            Some(path) => writeln!(out, "{}", path.display()),
            None => Ok(()),
        })?);
    }
    command.build();
    let defaults = Defaults::read(&command)?;
    Ok(streams::print(|out| write(out, defaults.as_ref()))?)
}

fn write(out: &mut impl Write, defaults: Option<&Defaults>) -> io::Result<()> {
    match (defaults, defaults::path()) {
        (Some(defaults), _) => {
            writeln!(out, "defaults of {}", defaults.path.display())?;
            write_settings(out, &defaults.settings)?;
        }
        (None, Some(path)) => {
            writeln!(
                out,
                "there is no config file; it would be {}",
                path.display()
            )?;
        }
        (None, None) => {
            let variable = defaults::VARIABLE;
            writeln!(out, "there is no config file; {variable} can name one")?;
        }
    }
    let set = VARIABLES
        .iter()
        .filter_map(|name| Some((*name, env::var_os(name)?)));
    for (place, (name, value)) in set.enumerate() {
        if place == 0 {
            writeln!(out, "environment, which comes before the file")?;
        }
        let value = match name {
            "FLAPJACK_API_KEY" | hub::TOKEN_VARIABLE => "…".to_owned(),
            _ => printable(&value.to_string_lossy()),
        };
        writeln!(out, "  {name}={value}")?;
    }
    Ok(())
}

fn write_settings(out: &mut impl Write, settings: &[Setting]) -> io::Result<()> {
    let mut section = None;
    for setting in settings {
        if setting.command != section {
            section.clone_from(&setting.command);
            if let Some(name) = &section {
                writeln!(out, "  [{name}]")?;
            }
        }
        let value = setting.values.join(", ");
        writeln!(
            out,
            "  {}",
            defaults::shown(&setting.key, &printable(&value))
        )?;
    }
    Ok(())
}
