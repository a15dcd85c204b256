//! `flapjack info`

use std::io::{self, Write};

use anyhow::Result;
use clap::Args;
use flapjack::engine::{self, Machine};
use flapjack::hub;

use super::streams;

#[derive(Debug, Args)]
pub struct InfoArgs {}

pub fn run(_: InfoArgs) -> Result<()> {
    let machine = engine::machine()?;
    Ok(streams::print(|out| write_info(out, &machine))?)
}

fn write_info(out: &mut impl Write, machine: &Machine) -> io::Result<()> {
    writeln!(out, "flapjack {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "processors        {}", machine.processors)?;
    for set in &machine.instruction_sets {
        let state = match (set.used, set.found) {
            (true, _) => "used",
            (_, true) => "found",
            (_, false) => "not found",
        };
        writeln!(out, "instructions      {:<12} {state}", set.name)?;
    }
    writeln!(
        out,
        "                  ({}=NAME forces one)",
        machine.variable
    )?;
    writeln!(
        out,
        "weights are read  in {} streams, {}",
        machine.streams,
        if machine.fetches {
            "fetched ahead"
        } else {
            "not fetched ahead"
        }
    )?;
    for reading in &machine.measured {
        let ahead = if reading.fetches {
            "fetched"
        } else {
            "not fetched"
        };
        writeln!(
            out,
            "  measured        {}: {} streams, {ahead} ahead",
            reading.of, reading.streams
        )?;
    }
    match hub::cache_dir() {
        Ok(folder) => writeln!(out, "cache folder      {}", folder.display())?,
        Err(error) => writeln!(out, "cache folder      none: {error}")?,
    }
    Ok(())
}
