//! What the machine has, and what this process takes of it.

use serde::Serialize;

use crate::kernels::{ISA_VARIABLE, Isa, IsaError, Kernels};

/// What the machine offers to compute with.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Threads that run at once.
    pub processors: usize,
    /// All instruction sets that there are kernels for, from the plainest to the most capable.
    pub instruction_sets: Vec<InstructionSet>,
    /// The environment variable that forces one of them.
    pub variable: &'static str,
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
    let set = |isa: Isa| InstructionSet {
        name: isa.name(),
        found: Kernels::for_isa(isa).is_some(),
        used: isa == used,
    };
    Ok(Machine {
        processors: processors(),
        instruction_sets: Isa::ALL.into_iter().map(set).collect(),
        variable: ISA_VARIABLE,
    })
}

/// Threads that run at once; 1 where the system does not say.
pub(super) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Resident memory of this process in bytes, from `/proc/self/status`; `None` where there is no such file.
pub(super) fn resident() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

/// Memory that can be had without swapping, in bytes, from `/proc/meminfo`; `None` where there is no such file.
pub(super) fn available() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// The number in a line "name   number kB" of a file, in bytes.
fn field(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(name))?;
    let kib: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
