//! What the process takes and the machine has.

/// Resident memory of this process in bytes, from `/proc/self/status`; `None` where there is no such file.
pub fn resident() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

/// Memory that can be had without swapping, in bytes, from `/proc/meminfo`; `None` where there is no such file.
pub fn available() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// A line "name   number kB".
fn field(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(name))?;
    let kib: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
