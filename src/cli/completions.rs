//! `flapjack completions`

use std::io::Write;

use anyhow::Result;
use clap::{Args, Command};
use clap_complete::Shell;

use super::{heading, streams};

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(help_heading = heading::OUTPUT, value_name = "SHELL", value_enum)]
    shell: Shell,
}

pub fn run(args: &CompletionsArgs, mut command: Command) -> Result<()> {
    // Where a stream fails, the generator panics.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "flapjack", &mut script);
    Ok(streams::print(|out| out.write_all(&script))?)
}
