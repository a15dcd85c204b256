//! What the machine has to compute with. How much memory there is, [`memory`](crate::memory) tells.

use serde::Serialize;

use super::tuning::{Measured, MeasuredReading};
use crate::hub;
use crate::kernels::{ISA_VARIABLE, Isa, IsaError, Kernels, Reading};

/// What the machine offers to compute with.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Threads of this process that run at once.
    pub processors: usize,
    /// All instruction sets that there are kernels for, from the plainest to the most capable.
    pub instruction_sets: Vec<InstructionSet>,
    /// The environment variable that forces one of them.
    pub variable: &'static str,
    /// Groups of rows that a generated token's products read side by side.
    pub streams: u32,
    /// Whether weights are asked for ahead of their use.
    pub fetches: bool,
    /// How weights are read where measurements on this processor have settled it; empty where none have. From the user's cache folder.
    pub measured: Vec<MeasuredReading>,
}

/// An instruction set that there are kernels for.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct InstructionSet {
    pub name: &'static str,
    /// Whether this machine has it.
    pub found: bool,
    /// Whether it is the one that is used.
    pub used: bool,
}

/// Looks at the machine.
///
/// # Errors
/// If the environment forces an instruction set that the machine lacks.
pub fn machine() -> Result<Machine, IsaError> {
    let used = Kernels::get()?.isa();
    let reading = Reading::usual();
    let set = |isa: Isa| InstructionSet {
        name: isa.name(),
        found: Kernels::for_isa(isa).is_some(),
        used: isa == used,
    };
    Ok(Machine {
        processors: processors(),
        instruction_sets: Isa::ALL.into_iter().map(set).collect(),
        variable: ISA_VARIABLE,
        streams: reading.streams,
        fetches: reading.fetches,
        measured: hub::profiles_dir()
            .map_or_else(|_| Vec::new(), |folder| Measured::read(&folder).list()),
    })
}

/// Threads of this process that run at once: processors that it may run on, as the system and its control groups have it. 1
/// where the system does not say.
pub(super) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the processor calls itself; "unknown" where the system does not tell.
pub(super) fn processor_name() -> String {
    // On x86, and on ARM.
    const FIELDS: [&str; 3] = ["model name", "CPU implementer", "CPU part"];
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &&str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(key, _)| key.trim() == *name)?;
        Some(value.trim().to_owned())
    };
    let found: Vec<String> = FIELDS.iter().filter_map(field).collect();
    match found.is_empty() {
        true => "unknown".to_owned(),
        false => found.join(" "),
    }
}
