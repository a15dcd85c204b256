//! Files that are written when the process is killed or the disk is full: whole or not there, and nothing beside them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use crate::common::engine::{CACHE, Workshop, flap};
use crate::common::program::{run_with_input, stderr, succeeded};
use flapjack::gguf::Writer;
use flapjack::quant::BlockType;

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<_> = names
        .map(|name| name.into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

fn hidden(folder: &Path) -> Vec<String> {
    let mut names = names(folder);
    names.retain(|name| name.starts_with('.'));
    names
}

/// Runs a program that may write files of so many blocks of 512 bytes and no more: as if the disk were full then.
#[cfg(unix)]
fn with_little_room(blocks: usize, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -f {blocks} && exec \"$@\""), "sh"])
        .arg(program)
        .args(arguments);
    command
}

#[cfg(unix)]
fn flapjack_with_little_room(workshop: &Workshop, blocks: usize, arguments: &[&str]) -> Output {
    let program = Path::new(env!("CARGO_BIN_EXE_flapjack"));
    let mut command = with_little_room(blocks, program, arguments);
    command.arg("-m").arg(&workshop.model);
    command.env("FLAPJACK_CACHE", workshop.path(""));
    run_with_input(command, b"")
}

// ---- killed ----

const CHILD: &str = "FLAPJACK_LEFTOVERS_TEST_FILE";

fn large_file() -> Writer<'static> {
    let mut writer = Writer::new();
    writer.tensor("a", &[1 << 20], BlockType::F32, vec![1; 4 << 20]);
    writer
}

/// No test of its own: the process of the test below, which the system ends while it writes.
#[test]
fn as_a_child_process() {
    if let Some(path) = std::env::var_os(CHILD) {
        large_file()
            .save(Path::new(&path))
            .expect("it does not get so far");
    }
}

#[cfg(unix)]
#[test]
fn a_file_whose_writer_was_killed_leaves_nothing_beside_the_next_one() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", "leftovers::as_a_child_process"];
    let mut child = with_little_room(100, &program, &arguments);
    let output = child.env(CHILD, &path).output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGXFSZ), "{output:?}");
    // Where the system has files without names, nothing is left at all.
    if cfg!(target_os = "linux") {
        assert_eq!(names(folder.path()), [""; 0]);
    }
    large_file().save(&path).unwrap();
    assert_eq!(names(folder.path()), ["a.gguf"]);
}

#[test]
fn leftovers_in_the_cache_folder_are_swept_at_the_next_start() {
    let workshop = Workshop::new();
    let hash = "0123456789abcdef0123456789abcdef";
    let killed = format!("{CACHE}/.{hash}-v3.outcome.flapjack-Ab12Cd");
    let killed = workshop.write(&killed, vec![0; 1000]);
    // Earlier versions gave their files other names, and locked nothing: one that was written to of late may be in work.
    let old = workshop.write(&format!("{CACHE}/.{hash}-v3.profile.Ab12Cd"), "old");
    let long_ago = SystemTime::now() - Duration::from_secs(3 * 24 * 60 * 60);
    let file = fs::File::options().write(true).open(&old).unwrap();
    file.set_modified(long_ago).unwrap();
    let young = workshop.write(&format!("{CACHE}/.{hash}-v3.profile.Ef34Gh"), "young");
    // A living process has locked its own.
    let living = workshop.write(&format!("{CACHE}/.{hash}-v3.profile.flapjack-Ij56Kl"), "");
    let lock = fs::File::options().write(true).open(&living).unwrap();
    lock.lock().unwrap();
    let other = workshop.write(&format!("{CACHE}/.mine.Ab12Cd"), "");

    workshop.open();
    let there = [&killed, &old, &young, &living, &other].map(|path| path.exists());
    assert_eq!(there, [false, false, true, true, true]);
    drop(lock);
    workshop.open();
    assert!(!living.exists());
}

#[test]
fn a_download_that_was_killed_is_swept_by_a_run_that_needs_no_download() {
    let workshop = Workshop::new();
    let name = flapjack::hub::DEFAULT_MODEL.file_name;
    let half = workshop.write(&format!(".{name}.tmp-Ab12Cd/half.whl"), "PK");
    let lock = workshop.write(&format!(".{name}.lock"), "");
    let lock = fs::File::options().write(true).open(lock).unwrap();
    lock.lock().unwrap();
    let run = ["run", "--raw", "-p", "a", "-n", "1"];
    succeeded(&workshop.flapjack(&run));
    assert!(half.exists(), "another process is at it");
    drop(lock);
    succeeded(&workshop.flapjack(&run));
    assert!(!half.exists() && !half.parent().unwrap().exists());
}

#[test]
fn an_export_sweeps_its_folder_of_exports_that_were_killed() {
    let workshop = Workshop::new();
    let killed = workshop.write("out/.small.gguf.flapjack-Ab12Cd", "half");
    workshop.write("out/.small.gguf.part", "of another program");
    let mut engine = workshop.open();
    engine
        .prune(&flap(), &mut flapjack::engine::ignore)
        .unwrap();
    engine.export(workshop.path("out/small.gguf")).unwrap();
    assert!(!killed.exists());
    assert_eq!(
        names(&workshop.path("out")),
        [".small.gguf.part", "small.gguf"]
    );
}

// ---- no room ----

#[cfg(unix)]
#[test]
fn a_profile_or_a_model_that_does_not_fit_on_the_disk_is_an_error_and_leaves_nothing() {
    let workshop = Workshop::new();
    workshop.write("out/old.profile", "what was there before");
    let folder = workshop.path("out");
    for command in [
        "calibrate --method flap --calib-tokens 512 -o OUT/new.profile",
        "calibrate --method flap --calib-tokens 512 -o OUT/old.profile",
        "prune --method flap --calib-tokens 512 --ratio 0.3 -o OUT/new.gguf",
    ] {
        let command = command.replace("OUT", folder.to_str().unwrap());
        let arguments: Vec<&str> = command.split(' ').collect();
        let output = flapjack_with_little_room(&workshop, 4, &arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{command}: {message}");
        let file = arguments.last().unwrap();
        let last = message.lines().last().unwrap();
        assert!(
            last.starts_with("error: ") && last.contains(file),
            "{message}"
        );
        assert_eq!(names(&folder), ["old.profile"]);
        let old = fs::read_to_string(workshop.path("out/old.profile")).unwrap();
        assert_eq!(old, "what was there before");
    }
}

#[cfg(unix)]
#[test]
fn a_run_whose_profile_does_not_fit_on_the_disk_says_so_and_goes_on() {
    let workshop = Workshop::new();
    let arguments = "run --method flap --calib-tokens 512 --prune 0.3 --temp 0 -n 4 -p a";
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let output = flapjack_with_little_room(&workshop, 4, &arguments);
    let (text, log) = succeeded(&output);
    assert!(
        log.contains("the profile is not kept for the next run"),
        "{log}"
    );
    // There is room for the profile's hash, by which the outcome would be found.
    let left = names(&workshop.path(CACHE));
    assert!(left.len() == 1 && left[0].ends_with(".hash"), "{left:?}");
    assert_eq!(hidden(&workshop.path("")), [""; 0]);
    // With room for it there is nothing to say, and the text is the same.
    let (again, log) = succeeded(&workshop.flapjack(&arguments));
    assert_eq!(again, text);
    assert!(!log.contains("not kept"), "{log}");
    assert_eq!(workshop.cached("profile").len(), 1);
}
