//! `flapjack man`: the help as manual pages, one for each command.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::StyledStr;
use clap::builder::ValueHint;
use clap::{Arg, Args, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::words::{plural, say};
use super::{heading, streams};

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write a page for each command to this folder [default: the main page to standard output]
    #[arg(help_heading = heading::OUTPUT, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    folder: Option<PathBuf>,
}

pub fn run(args: &ManArgs, command: Command) -> Result<()> {
    let mut root = command;
    root.build();
    let Some(folder) = &args.folder else {
        let text = page(&root, &root)?;
        return Ok(streams::print(|out| out.write_all(text.as_bytes()))?);
    };
    let cannot = |path: &Path| format!("cannot write {}", path.display());
    fs::create_dir_all(folder).with_context(|| cannot(folder))?;
    let pages = pages(&root);
    for command in &pages {
        let path = folder.join(format!("{}.1", name(command)));
        fs::write(&path, page(command, &root)?).with_context(|| cannot(&path))?;
    }
    let count = plural(pages.len(), "page");
    say(&format!("{count} written to {}", folder.display()));
    Ok(())
}

/// A command, and all within it that have pages.
fn pages(command: &Command) -> Vec<&Command> {
    let within = command.get_subcommands().filter(|c| c.get_name() != "help");
    let within = within.flat_map(pages);
    std::iter::once(command).chain(within).collect()
}

/// What the page of a command is called.
fn name(command: &Command) -> &str {
    let name = command.get_display_name();
    name.unwrap_or_else(|| command.get_name())
}

/// The page of a command.
fn page(command: &Command, root: &Command) -> Result<String> {
    let mut text = Vec::new();
    write_page(&mut text, command, root)?;
    // Each section begins with the same definitions, of which one is enough.
    let definitions = Roff::new().render();
    let text = String::from_utf8(text)?.replace(&definitions, "");
    // An empty line, of which there is one where texts have paragraphs and before choices, is an accident to typesetters.
    let text = text.replace("\n.br\n\n.br\n", "\n\n");
    Ok(definitions + &text.replace("\n\n", "\n.sp\n"))
}

fn write_page(out: &mut dyn Write, command: &Command, root: &Command) -> io::Result<()> {
    let version = root.get_version().unwrap_or_default();
    let title = name(command).to_uppercase();
    // Of what has no date the generator leaves it out, and what follows would be taken for it.
    writeln!(
        out,
        ".TH \"{title}\" \"1\" \"\" \"flapjack {version}\" \"flapjack\""
    )?;
    let man = Man::new(for_page(command));
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    let mut rest = Roff::new();
    list(&mut rest, "COMMANDS", &commands(command));
    if let Some(examples) = command.get_after_help() {
        let examples = examples.to_string();
        rest.control("SH", ["EXAMPLES"]).control("nf", []);
        for line in examples.lines().skip(1) {
            rest.text([roman(line.trim_start())]);
        }
        rest.control("fi", []);
    }
    if command.get_name() == root.get_name() {
        list(&mut rest, "ENVIRONMENT", &words(&ENVIRONMENT));
        list(&mut rest, "FILES", &words(&FILES));
        list(&mut rest, "EXIT STATUS", &words(&STATUS));
    } else {
        rest.control("SH", ["SEE ALSO"])
            .text([bold("flapjack"), roman("(1)")]);
    }
    rest.to_writer(out)
}

/// The command as a page shows it: with every option's text, other names, and choices.
fn for_page(command: &Command) -> Command {
    command.clone().mut_args(|option| {
        let option = option.hide_short_help(false);
        let Some(more) = other_names(&option) else {
            return option;
        };
        let text = option.get_long_help().or_else(|| option.get_help());
        let text = format!(
            "{} [aliases: {more}]",
            text.map_or_else(String::new, StyledStr::to_string)
        );
        option.long_help(text)
    })
}

fn other_names(option: &Arg) -> Option<String> {
    let names = option.get_visible_aliases().unwrap_or_default();
    let names: Vec<String> = names.iter().map(|name| format!("--{name}")).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The pages of the commands within one, and what they are about.
fn commands(command: &Command) -> Vec<(String, String)> {
    let within = command.get_subcommands().filter(|c| c.get_name() != "help");
    let about = |c: &Command| c.get_about().map_or_else(String::new, StyledStr::to_string);
    within
        .map(|c| (format!("{}(1)", name(c)), about(c)))
        .collect()
}

fn words(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = pairs.iter();
    pairs
        .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
        .collect()
}

/// A section of names with what they mean, if there are any.
fn list(page: &mut Roff, heading: &str, entries: &[(String, String)]) {
    if entries.is_empty() {
        return;
    }
    page.control("SH", [heading]);
    for (name, meaning) in entries {
        page.control("TP", []);
        page.text([bold(name.as_str())])
            .text([roman(meaning.as_str())]);
    }
}

const ENVIRONMENT: [(&str, &str); 7] = [
    ("FLAPJACK_CONFIG", "the config file; empty for none"),
    (
        "FLAPJACK_CACHE",
        "the folder for models, profiles and outcomes",
    ),
    (
        "FLAPJACK_CACHE_SIZE",
        "how much profiles and outcomes may take together, for example 500MB; 0 keeps none",
    ),
    (
        "FLAPJACK_PYTHON",
        "the Python interpreter whose pip fetches the default model",
    ),
    ("FLAPJACK_API_KEY", "the key that flapjack serve wants"),
    (
        "FLAPJACK_ISA",
        "forces an instruction set; flapjack info lists them",
    ),
    (
        "FLAPJACK_LOG",
        "a log filter such as flapjack=debug, in the place of -v",
    ),
];

const FILES: [(&str, &str); 2] = [
    (
        "~/.config/flapjack/config.toml",
        "defaults of options; flapjack config shows what is in force",
    ),
    (
        "~/.cache/flapjack/models",
        "the default model, and in profiles what is kept of earlier runs; flapjack models and flapjack cache list them",
    ),
];

const STATUS: [(&str, &str); 4] = [
    ("0", "success"),
    ("1", "failure while working"),
    ("2", "wrong use, or a config file that is wrong"),
    ("130, 143", "interrupted by Ctrl-C, or ended by SIGTERM"),
];
