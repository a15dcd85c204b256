//! `flapjack info`

use std::io::{self, Write};

use anyhow::Result;
use clap::Args;
use flapjack::hub;
use flapjack::kernels::{ISA_VARIABLE, Isa, Kernels};

#[derive(Debug, Args)]
pub struct InfoArgs {}

pub fn run(_: InfoArgs) -> Result<()> {
    let used = Kernels::get()?.isa();
    let mut out = io::stdout().lock();
    writeln!(out, "flapjack {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(
        out,
        "processors        {}",
        std::thread::available_parallelism().map_or(1, usize::from)
    )?;
    for isa in Isa::ALL {
        let state = match (isa == used, Kernels::for_isa(isa).is_some()) {
            (true, _) => "used",
            (_, true) => "found",
            (_, false) => "not found",
        };
        writeln!(out, "instructions      {:<12} {state}", isa.name())?;
    }
    writeln!(out, "                  ({ISA_VARIABLE}=NAME forces one)")?;
    match hub::cache_dir() {
        Ok(folder) => writeln!(out, "cache folder      {}", folder.display())?,
        Err(error) => writeln!(out, "cache folder      none: {error}")?,
    }
    Ok(())
}
