//! Limits of memory: what this process may take, and what becomes of work that needs more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::engine::Workshop;
use crate::common::program::stderr;
use crate::common::skip;
use flapjack::engine::{
    EngineError, Notice, SequenceOptions, SyntheticType, TINY, write_synthetic,
};
use flapjack::eval::SpeedTest;
use flapjack::memory::Memory;
use flapjack::model::{CacheType, Shape};

/// A machine of so many files, each with its content, in a folder of its own.
fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder is made");
        fs::write(path, content).expect("the file is written");
    }
    root
}

fn read(files: &[(&str, &str)]) -> Option<Memory> {
    Memory::read(machine(files).path())
}

const MEMINFO: (&str, &str) = (
    "proc/meminfo",
    "MemTotal:        8000 kB\nMemFree:         1000 kB\nMemAvailable:    6000 kB\nCached:          3000 kB\n",
);
const KIB: u64 = 1024;

fn memory(total: u64, available: u64) -> Option<Memory> {
    Some(Memory {
        total,
        available,
        addresses: None,
    })
}

// ---- what there is ----

#[test]
fn without_limits_it_is_what_the_machine_has() {
    let whole = memory(8000 * KIB, 6000 * KIB);
    assert_eq!(read(&[MEMINFO]), whole);
    let unlimited_2 = [
        MEMINFO,
        ("proc/self/cgroup", "0::/user.slice\n"),
        ("sys/fs/cgroup/user.slice/memory.max", "max\n"),
        ("sys/fs/cgroup/user.slice/memory.high", "max\n"),
        ("sys/fs/cgroup/user.slice/memory.current", "1000\n"),
    ];
    assert_eq!(read(&unlimited_2), whole);
    let unlimited_1 = [
        MEMINFO,
        ("proc/self/cgroup", "4:memory:/\n0::/\n"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        ),
        (
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
            "9223372036854771000\n",
        ),
    ];
    assert_eq!(read(&unlimited_1), whole);
}

#[test]
fn a_limit_of_version_2_counts_less_what_is_used_but_not_pages_of_files() {
    let files = [
        MEMINFO,
        ("proc/self/cgroup", "0::/app\n"),
        (
            "proc/self/mountinfo",
            "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        ),
        ("sys/fs/cgroup/app/memory.max", "1000000\n"),
        ("sys/fs/cgroup/app/memory.high", "max\n"),
        ("sys/fs/cgroup/app/memory.current", "900000\n"),
        (
            "sys/fs/cgroup/app/memory.stat",
            "anon 200000\nfile 690000\nactive_file 400000\ninactive_file 290000\nslab_reclaimable 10000\n",
        ),
    ];
    assert_eq!(read(&files), memory(1_000_000, 800_000));
}

#[test]
fn a_limit_of_version_1_counts_in_the_same_way() {
    let files = [
        MEMINFO,
        (
            "proc/self/cgroup",
            "9:name=systemd:/app\n4:cpu,memory:/app\n0::/\n",
        ),
        (
            "proc/self/mountinfo",
            "31 24 0:27 / /sys/fs/cgroup/cpu,memory rw - cgroup cgroup rw,cpu,memory\n",
        ),
        (
            "sys/fs/cgroup/cpu,memory/app/memory.limit_in_bytes",
            "1000000\n",
        ),
        (
            "sys/fs/cgroup/cpu,memory/app/memory.usage_in_bytes",
            "900000\n",
        ),
        (
            "sys/fs/cgroup/cpu,memory/app/memory.stat",
            "cache 690000\nactive_file 1\ninactive_file 2\ntotal_active_file 400000\ntotal_inactive_file 290000\n",
        ),
    ];
    assert_eq!(read(&files), memory(1_000_000, 790_000));
    // Of groups above the one that a container sees, only the limit is told.
    let hidden = [
        MEMINFO,
        ("proc/self/cgroup", "4:memory:/docker/4711\n"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        ),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "300000\n"),
        (
            "sys/fs/cgroup/memory/memory.stat",
            "hierarchical_memory_limit 700000\n",
        ),
    ];
    assert_eq!(read(&hidden), memory(700_000, 400_000));
}

#[test]
fn the_least_limit_of_all_groups_counts() {
    let nested = |own: &'static str, parent: &'static str, high: &'static str| {
        read(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", parent),
            ("sys/fs/cgroup/a/memory.current", "500000"),
            ("sys/fs/cgroup/a/memory.high", high),
            ("sys/fs/cgroup/a/b/memory.max", own),
            ("sys/fs/cgroup/a/b/memory.current", "100000"),
        ])
    };
    assert_eq!(
        nested("max", "2000000", "max"),
        memory(2_000_000, 1_500_000)
    );
    assert_eq!(nested("600000", "2000000", "max"), memory(600_000, 500_000));
    // Another process of the group above may have taken most of it.
    assert_eq!(nested("900000", "1000000", "max"), memory(900_000, 500_000));
    assert_eq!(
        nested("max", "2000000", "1000000"),
        memory(1_000_000, 500_000)
    );
    // More is used than is allowed, for a moment or because the limit was lowered.
    assert_eq!(nested("max", "400000", "max"), memory(400_000, 0));
}

#[test]
fn a_container_sees_its_group_at_the_mount_point() {
    let group = [
        ("sys/fs/cgroup/memory.max", "1000000"),
        ("sys/fs/cgroup/memory.current", "400000"),
    ];
    for (cgroup, mounted) in [
        ("0::/docker/4711", "/docker/4711"),
        ("0::/docker/4711/of/another/space", "/docker/4711"),
        ("0::/docker/47", "/docker/4711"),
        ("0::/../../init.scope", "/"),
        ("0::/", "/"),
    ] {
        let mount = format!("30 24 0:26 {mounted} /sys/fs/cgroup ro - cgroup2 cgroup rw");
        let cgroup = ("proc/self/cgroup", cgroup);
        let mount = ("proc/self/mountinfo", mount.as_str());
        let files = [MEMINFO, cgroup, mount, group[0], group[1]];
        assert_eq!(read(&files), memory(1_000_000, 600_000), "{files:?}");
    }
}

#[test]
fn what_is_missing_or_cannot_be_understood_sets_no_limit() {
    assert_eq!(read(&[]), None);
    assert_eq!(read(&[("proc/meminfo", "MemTotal: many kB\n")]), None);
    let whole = memory(8000 * KIB, 6000 * KIB);
    for garbage in [
        "",
        "\n",
        "-1",
        "0x10",
        "lots",
        "99999999999999999999999",
        "1 2",
    ] {
        let files = [
            MEMINFO,
            (
                "proc/self/cgroup",
                "0::/\n4:memory\nnonsense\n:::\n4:memory:/gone\n",
            ),
            (
                "proc/self/mountinfo",
                "30 24\n - cgroup2\n- -\n1 2 3 / /nowhere rw - cgroup2 x y\n",
            ),
            ("sys/fs/cgroup/memory.max", garbage),
            ("sys/fs/cgroup/memory.current", garbage),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", garbage),
            ("sys/fs/cgroup/memory/memory.stat", garbage),
        ];
        assert_eq!(read(&files), whole, "{garbage:?}");
    }
    // Without /proc/meminfo, as in some sandboxes, the group's limit still holds.
    let files = [
        ("proc/self/cgroup", "0::/\n"),
        ("sys/fs/cgroup/memory.max", "1000000"),
    ];
    assert_eq!(read(&files), memory(1_000_000, 1_000_000));
    // Kernels before 3.14.
    let old = (
        "proc/meminfo",
        "MemTotal: 9 kB\nMemFree: 2 kB\nBuffers: 1 kB\nCached: 3 kB\n",
    );
    assert_eq!(read(&[old]), memory(9 * KIB, 6 * KIB));
}

#[test]
fn limits_of_addresses_bound_new_memory() {
    let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                  Max data size             500000               unlimited            bytes\n\
                  Max address space         900000               unlimited            bytes\n";
    let status = (
        "proc/self/status",
        "VmSize:      300 kB\nVmData:      100 kB\n",
    );
    let limited = read(&[MEMINFO, ("proc/self/limits", limits), status]).unwrap();
    assert_eq!(limited.addresses, Some(500_000 - 100 * KIB));
    assert_eq!(limited.for_new(), 500_000 - 100 * KIB);
    assert_eq!(limited.available, 6000 * KIB);
    let unlimited = limits
        .replace("500000", "unlimited")
        .replace("900000", "unlimited");
    let unlimited = read(&[MEMINFO, ("proc/self/limits", &unlimited), status]).unwrap();
    assert_eq!(unlimited.addresses, None);
    assert_eq!(unlimited.for_new(), 6000 * KIB);
}

#[test]
fn this_machine_tells() {
    if !Path::new("/proc/meminfo").exists() {
        return skip("there is no /proc/meminfo");
    }
    let memory = Memory::now().expect("it is told");
    assert!(
        memory.available > 0 && memory.available <= memory.total,
        "{memory:?}"
    );
}

// ---- in a control group ----

/// A control group that may take so many bytes; removed in the end.
struct Group {
    folder: PathBuf,
}

impl Group {
    /// `None`, after noting a skip, where this process cannot make one.
    fn new(bytes: u64) -> Option<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("flapjack-test-{}-{number}", std::process::id());
        for (top, limit, with_swap) in [
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.memsw.limit_in_bytes",
            ),
            ("/sys/fs/cgroup", "memory.max", "memory.swap.max"),
        ] {
            let folder = Path::new(top).join(&name);
            // The folder alone is no group where nothing is mounted.
            if !Path::new(top).join("cgroup.procs").exists() || fs::create_dir(&folder).is_err() {
                continue;
            }
            let group = Self { folder };
            if fs::write(group.folder.join(limit), bytes.to_string()).is_ok() {
                // Without swap, or where it is not counted, there is no such file.
                let swap = if limit == "memory.max" { 0 } else { bytes };
                let _ = fs::write(group.folder.join(with_swap), swap.to_string());
                return Some(group);
            }
        }
        skip("no control group with a limit of memory can be made here");
        None
    }

    /// Runs flapjack in it.
    fn flapjack(&self, arguments: &[&str]) -> Output {
        let procs = self.folder.join("cgroup.procs");
        shell("echo $$ > \"$0\" && exec \"$@\"", &procs, arguments)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The system may take a moment to see that its process has ended.
        for _ in 0..50 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// Runs a line of shell before flapjack. `$0` in it is `value`.
fn shell(line: &str, value: &Path, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Command::new("sh")
        .args(["-c", line])
        .arg(value)
        .arg(env!("CARGO_BIN_EXE_flapjack"))
        .args(arguments)
        .env("FLAPJACK_CACHE", folder.path())
        .stdin(Stdio::null())
        .output()
        .expect("sh starts")
}

/// A model of 16 layers and 45 MB, as a file.
fn large(workshop: &Workshop) -> String {
    let shape = Shape {
        layers: 16,
        embedding_length: 512,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        channels: 1024,
        ..TINY
    };
    let path = workshop.path("large.gguf");
    write_synthetic(&path, shape, SyntheticType::Q8_0).expect("the model is written");
    path.to_str().expect("UTF-8").to_owned()
}

const MB: u64 = 1_000_000;

#[test]
fn what_does_not_fit_packed_runs_unpacked_and_says_so() {
    let workshop = Workshop::new();
    let model = large(&workshop);
    let run = [
        "run", "--raw", "-m", &model, "-t", "1", "-p", "Hello", "-n", "4",
    ];
    let Some(group) = Group::new(40 * MB) else {
        return;
    };
    let output = group.flapjack(&run);
    let said = stderr(&output);
    assert!(output.status.success(), "{:?}: {said}", output.status);
    if flapjack::kernels::Kernels::get().unwrap().prefers_packed() {
        assert!(said.contains("stay as they lie in the file"), "{said}");
    }
    let Some(group) = Group::new(200 * MB) else {
        return;
    };
    let said = stderr(&group.flapjack(&run));
    assert!(!said.contains("WARN"), "{said}");
}

#[test]
fn pruning_fits_in_the_limit() {
    let workshop = Workshop::new();
    let model = large(&workshop);
    let prune = |ratio: &'static str| {
        [
            "run",
            "--raw",
            "-m",
            &model,
            "-t",
            "1",
            "-p",
            "Hello",
            "-n",
            "4",
            "--prune",
            ratio,
            "--effort",
            "fast",
            "--calib-tokens",
            "1200",
        ]
    };
    let Some(group) = Group::new(80 * MB) else {
        return;
    };
    let output = group.flapjack(&prune("0.3"));
    let said = stderr(&output);
    assert!(output.status.success(), "{:?}: {said}", output.status);
    assert!(said.contains("groups of layers"), "{said}");
    if flapjack::kernels::Kernels::get().unwrap().prefers_packed() {
        assert!(said.contains("go back to how they lie"), "{said}");
    }
    // Weights of 42 MB stay, which fit nowhere.
    let Some(group) = Group::new(40 * MB) else {
        return;
    };
    let output = group.flapjack(&prune("0.05"));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("pruning rewrites the weights that stay in memory") && said.contains("MiB"),
        "{said}"
    );
    assert!(!said.contains("calibrat"), "before the work: {said}");
}

// ---- sizes that are asked for ----

#[test]
fn a_context_that_nobody_could_hold_is_refused_with_what_it_takes() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let options = |context, cache_type| SequenceOptions {
        context: Some(context),
        cache_type,
    };
    // Keys and values of 3 layers, each of 2 heads of 32 values.
    let f16 = 768.0;
    for context in [usize::MAX, 1 << 62, 1 << 40] {
        let error = engine
            .sequence_with(options(context, CacheType::F16))
            .unwrap_err();
        let EngineError::Context {
            positions, bytes, ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(positions, context);
        assert_eq!(bytes, context.div_ceil(64) as f64 * 64.0 * f16, "{context}");
        let checked = engine.check_sequence(options(context, CacheType::Q8_0));
        assert!(matches!(checked, Err(EngineError::Context { .. })));
    }
    for context in ["18446744073709551615", "1000000000000"] {
        let output = workshop.flapjack(&["run", "--raw", "-c", context, "-p", "Hi", "-n", "2"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains(context) && said.contains("TiB of KV cache") && said.contains("--ctx"),
            "{said}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_large_context_takes_memory_as_it_is_used_and_says_if_it_may_not_fit() {
    let Some(memory) = Memory::now() else {
        return skip("the system does not tell how much memory there is");
    };
    let workshop = Workshop::new();
    let engine = workshop.open();
    let context = |bytes: u64| SequenceOptions {
        context: Some((bytes / 768) as usize),
        cache_type: CacheType::F16,
    };
    assert_eq!(engine.check_sequence(context(1 << 20)).unwrap(), None);
    // What other programs have taken may be free later.
    let Some(Notice::ContextMemory { shortage, .. }) =
        engine.check_sequence(context(memory.total - MB)).unwrap()
    else {
        panic!("{memory:?}");
    };
    assert!(shortage.needed > shortage.allowed && shortage.allowed > 0);
}

/// A model whose KV cache takes 256 KiB for each position.
fn of_large_cache(workshop: &Workshop) -> String {
    let shape = Shape {
        layers: 8,
        heads: 64,
        kv_heads: 64,
        head_dim: 128,
        context_length: 8192,
        ..TINY
    };
    let path = workshop.path("cache.gguf");
    write_synthetic(&path, shape, SyntheticType::Q8_0).expect("the model is written");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
#[cfg(target_os = "linux")]
fn where_the_memory_is_used_up_generation_ends_with_an_error() {
    let workshop = Workshop::new();
    let model = of_large_cache(&workshop);
    let prompt = "abcdefg ".repeat(500);
    let limited = |arguments: &[&str]| {
        let kib = Path::new("700000");
        shell("ulimit -v \"$0\" && exec \"$@\"", kib, arguments)
    };
    for kv in ["f16", "q8_0"] {
        let output = limited(&[
            "run", "--raw", "-m", &model, "-t", "1", "-c", "30000", "-p", "Hello", "-n", "4",
            "--kv", kv,
        ]);
        let said = stderr(&output);
        assert!(
            output.status.success(),
            "30000 positions would take 7 GiB: {said}"
        );
        assert!(said.contains("a context of 30000 tokens takes"), "{said}");
    }
    let output = limited(&[
        "run",
        "--raw",
        "-m",
        &model,
        "-t",
        "1",
        "-p",
        &prompt,
        "-n",
        "4",
        "--no-pack",
    ]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{:?}: {said}", output.status);
    assert!(
        said.contains("the memory is used up") && said.contains("--kv q8_0"),
        "{said}"
    );
}

#[test]
fn measuring_what_cannot_be_held_is_refused_before_it_begins() {
    if Memory::now().is_none() {
        return skip("the system does not tell how much memory there is");
    }
    let workshop = Workshop::new();
    let engine = workshop.open();
    let test = |depth, prompt, generate, parallel| SpeedTest {
        prompt,
        generate,
        depth,
        parallel,
        cache_type: CacheType::F16,
    };
    for test in [
        test(usize::MAX, 1, 0, 1),
        test(0, usize::MAX, 1, 1),
        test(usize::MAX, usize::MAX, usize::MAX, usize::MAX),
        test(1 << 40, 0, 4, 1),
        test(1 << 34, 0, 4, 1024),
    ] {
        let error = engine.speed(test).unwrap_err();
        assert!(
            matches!(error, EngineError::ContextMemory { .. }),
            "{error}"
        );
    }
    assert!(engine.speed(test(4, 0, 4, 2)).unwrap() > 0.0);
}
