//! How much memory this process may still take: of what the machine has, its control groups allow and its resource limits leave.
//!
//! A container or a service often may take far less than the machine has, and a process that goes beyond that is killed
//! without a word. So what counts is the least of all limits. [`Memory::read`] takes the folder that `proc` and `sys` are in, so
//! that it can be asked about any machine:
//!
//! | file | what is taken from it |
//! | --- | --- |
//! | `proc/meminfo` | what the machine has, and what can be had of it without swapping |
//! | `proc/self/cgroup`, `proc/self/mountinfo` | which control groups the process is in, and where they are |
//! | `memory.max`, `memory.high`, `memory.current`, `memory.stat` | limit and use of a group of version 2 |
//! | `memory.limit_in_bytes`, `memory.usage_in_bytes`, `memory.stat` | the same of version 1 |
//! | `proc/self/limits`, `proc/self/status` | limits of the address space, and what is taken of them |
//!
//! Any of them may be missing or not be understood, and then sets no limit.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that a process may take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Physical memory that it may have at most: all that the machine has, or the least that a control group allows.
    pub total: u64,
    /// What of it can still be had, without swapping. Pages of files that are in memory do not count as taken: they are dropped
    /// when something else needs their place.
    pub available: u64,
    /// Addresses that are left under `RLIMIT_AS` and `RLIMIT_DATA`; `None` where there is no limit.
    pub addresses: Option<u64>,
}

impl Memory {
    /// What this process may take now; `None` where the system does not tell.
    pub fn now() -> Option<Self> {
        Self::read(Path::new("/"))
    }

    /// What the process that sees `root` as its root folder may take; `None` where nothing is told.
    pub fn read(root: &Path) -> Option<Self> {
        let machine = machine(root);
        let groups = group_folders(root).into_iter().filter_map(|folder| {
            let group = Group::read(&folder)?;
            // Version 1 says "no limit" by a number beyond any memory.
            let there = machine.is_none_or(|(total, _)| group.limit < total);
            there.then_some((group.limit, group.limit.saturating_sub(group.used)))
        });
        let (total, available) = groups
            .chain(machine)
            .reduce(|a, b| (a.0.min(b.0), a.1.min(b.1)))?;
        Some(Self {
            total,
            available,
            addresses: addresses(root),
        })
    }

    /// Bytes that new memory may take: what is available, as far as there are addresses for it.
    pub fn for_new(&self) -> u64 {
        self.available.min(self.addresses.unwrap_or(u64::MAX))
    }
}

/// Physical memory of this process in bytes; `None` where the system does not tell.
pub fn resident() -> Option<u64> {
    line_in_kib(Path::new("/proc/self/status"), "VmRSS:")
}

// ---- the machine ----

/// What the machine has, and what can be had of it.
fn machine(root: &Path) -> Option<(u64, u64)> {
    let file = root.join("proc/meminfo");
    let line = |name| line_in_kib(&file, name);
    let available = line("MemAvailable:").or_else(|| {
        // Before Linux 3.14.
        Some(line("MemFree:")? + line("Buffers:")? + line("Cached:")?)
    })?;
    Some((line("MemTotal:").unwrap_or(available), available))
}

/// The number of a line "name   number kB" of a file, in bytes.
fn line_in_kib(file: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    let kib: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

// ---- control groups ----

/// Limit and use of a control group, in bytes.
struct Group {
    limit: u64,
    used: u64,
}

impl Group {
    /// Reads the files of a group's folder; `None` where it sets no limit.
    fn read(folder: &Path) -> Option<Self> {
        let number = |name| number_in(&folder.join(name));
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let stat = |name: &str| named_number(&stat, name);
        let sum = |names: [&str; 2]| names.into_iter().filter_map(stat).sum::<u64>();
        // Beyond `high` a process is not killed, but hardly gets on.
        let limit_2 = [number("memory.max"), number("memory.high")];
        let (limit, used, droppable) = match limit_2.into_iter().flatten().min() {
            Some(limit) => {
                let slabs = stat("slab_reclaimable").unwrap_or(0);
                let droppable = slabs + sum(["inactive_file", "active_file"]);
                (limit, number("memory.current"), droppable)
            }
            None => {
                // Groups above this one may set the limit without being seen from here.
                let limits = [
                    number("memory.limit_in_bytes"),
                    stat("hierarchical_memory_limit"),
                ];
                let droppable = match stat("total_inactive_file") {
                    Some(_) => sum(["total_inactive_file", "total_active_file"]),
                    None => sum(["inactive_file", "active_file"]),
                };
                let limit = limits.into_iter().flatten().min()?;
                (limit, number("memory.usage_in_bytes"), droppable)
            }
        };
        Some(Self {
            limit,
            used: used.unwrap_or(0).saturating_sub(droppable),
        })
    }
}

/// The number that a file consists of; `None` for "max", too.
fn number_in(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The number of a line "name number".
fn named_number(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let (_, number) = lines.find(|(key, _)| *key == name)?;
    number.trim().parse().ok()
}

/// The folders of the process's control groups that may limit memory, with all that are above them.
fn group_folders(root: &Path) -> Vec<PathBuf> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut folders = Vec::new();
    // "number:controllers:path"; version 2 has no controllers.
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        if !controllers.is_empty() && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let Some(mount) = mounts
            .lines()
            .find_map(|line| Mount::of_groups(line, !controllers.is_empty()))
            .or_else(|| Mount::usual(root, !controllers.is_empty()))
        else {
            continue;
        };
        let top = root.join(mount.point.trim_start_matches('/'));
        let mut folder = top.join(mount.below(path));
        if !folder.is_dir() {
            folder.clone_from(&top);
        }
        while folder.starts_with(&top) {
            folders.push(folder.clone());
            if !folder.pop() {
                break;
            }
        }
    }
    folders
}

/// Where a hierarchy of control groups is.
struct Mount {
    /// The group that is at the mount point, `/` for the topmost.
    group: String,
    point: String,
}

impl Mount {
    /// The mount of a line of `mountinfo`, where it is one of control groups for memory of version 1, or of version 2:
    /// "number parent device group point options … - type source options".
    fn of_groups(line: &str, version_1: bool) -> Option<Self> {
        let (before, behind) = line.split_once(" - ")?;
        let mut behind = behind.split(' ');
        let (kind, options) = (behind.next()?, behind.nth(1).unwrap_or_default());
        let fits = match version_1 {
            true => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
            false => kind == "cgroup2",
        };
        let mut before = before.split(' ').skip(3);
        let (group, point) = (before.next()?, before.next()?);
        fits.then(|| Self {
            group: group.to_owned(),
            // Spaces are written in octal.
            point: point.replace("\\040", " "),
        })
    }

    /// Where it usually is.
    fn usual(root: &Path, version_1: bool) -> Option<Self> {
        let points: &[&str] = match version_1 {
            true => &["/sys/fs/cgroup/memory"],
            false => &["/sys/fs/cgroup/unified", "/sys/fs/cgroup"],
        };
        let there = |point: &&&str| root.join(point.trim_start_matches('/')).is_dir();
        points.iter().find(there).map(|point| Self {
            group: "/".to_owned(),
            point: (*point).to_owned(),
        })
    }

    /// The way from the mount point to a group. Where it leads out of what is mounted, as it may in a container, the mount point
    /// is the group as far as one can see.
    fn below<'p>(&self, group: &'p str) -> &'p str {
        let path = match self.group.as_str() {
            "/" => Some(group),
            top => group
                .strip_prefix(top)
                .filter(|rest| rest.is_empty() || rest.starts_with('/')),
        };
        let path = path.unwrap_or_default().trim_start_matches('/');
        match path.split('/').any(|part| part == "..") {
            true => "",
            false => path,
        }
    }
}

// ---- resource limits ----

/// Addresses that are left to the process; `None` where there is no limit.
fn addresses(root: &Path) -> Option<u64> {
    let limits = fs::read_to_string(root.join("proc/self/limits")).ok()?;
    let status = root.join("proc/self/status");
    let left = |limit: &str, taken: &str| -> Option<u64> {
        let line = limits.lines().find_map(|line| line.strip_prefix(limit))?;
        let limit: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        Some(limit.saturating_sub(line_in_kib(&status, taken)?))
    };
    let space = left("Max address space", "VmSize:");
    let data = left("Max data size", "VmData:");
    space.into_iter().chain(data).min()
}
