//! Ctrl-C and the signal to terminate: work ends in order, what there is of it is told, and the second one ends at once.
#![cfg(unix)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::engine::Workshop;
use tempfile::TempDir;

/// The program under way.
struct Running {
    child: Child,
    /// Lines of standard error, as they came.
    said: String,
    errors: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("flapjack starts");
        let errors = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            said: String::new(),
            errors,
        }
    }

    /// Waits for a line with these words on standard error.
    fn wait_for(&mut self, words: &str) {
        while !self.said.contains(words) {
            let n = self.errors.read_line(&mut self.said).unwrap();
            assert!(n > 0, "{words} was never said: {}", self.said);
        }
    }

    /// Waits for text on standard output.
    fn wait_for_text(&mut self, bytes: usize) -> Vec<u8> {
        let mut text = vec![0; bytes];
        self.child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut text)
            .unwrap();
        text
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) -> (ExitStatus, String, String) {
        let mut text = String::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        self.errors.read_to_string(&mut self.said).unwrap();
        (self.child.wait().unwrap(), text, self.said)
    }
}

fn flapjack(arguments: &[&str]) -> Command {
    crate::common::default_model();
    let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
    command.args(arguments);
    command
}

const ENDLESS: [&str; 10] = [
    "run",
    "--raw",
    "-p",
    "Once upon a time",
    "-n",
    "8000",
    "--ignore-eos",
    "-t",
    "1",
    "-v",
];

#[test]
fn what_was_generated_before_a_signal_is_counted_and_reported() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut running = Running::start(&mut flapjack(&ENDLESS));
        let begun = running.wait_for_text(20);
        running.signal(signal);
        let (status, text, said) = running.end();
        assert_eq!(status.code(), Some(code), "{said}");
        assert!(text.ends_with('\n') && begun.len() == 20, "{text}");
        assert!(said.contains("  end        interrupted"), "{said}");
        let count = said.split("generate   ").nth(1).expect(&said);
        let count: usize = count.split(' ').next().unwrap().parse().unwrap();
        assert!((3..8000).contains(&count), "{said}");
        assert!(said.contains("tokens/s"), "{said}");
    }
}

/// A prompt goes in by pieces, between which it can be stopped; and nothing is generated then.
#[test]
fn a_long_prompt_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("long.txt");
    fs::write(
        &file,
        "one two three four five six seven eight ".repeat(700),
    )
    .unwrap();
    let mut running = Running::start(&mut flapjack(&[
        "run",
        "--raw",
        "-f",
        file.to_str().unwrap(),
        "-n",
        "4",
        "-t",
        "1",
    ]));
    running.wait_for("reading the prompt: ");
    running.signal(Signal::INT);
    let (status, text, said) = running.end();
    assert_eq!((status.code(), text.as_str()), (Some(130), "\n"), "{said}");
    assert!(
        said.contains("generate   0 tokens") && said.contains("interrupted"),
        "{said}"
    );
}

fn calibrating(output: &Path, cache: &Path) -> Running {
    let output = output.to_str().unwrap();
    let arguments = ["prune", "--ratio", "0.3", "-t", "1", "-v", "-o", output];
    let mut running = Running::start(flapjack(&arguments).env("FLAPJACK_CACHE", cache));
    running.wait_for("calibrating: ");
    running
}

/// A cache folder that has the default model and nothing else.
fn cache_with_the_model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = crate::common::default_model();
    for name in [model.clone(), model.with_extension("gguf.verified")] {
        let link = folder.path().join(name.file_name().unwrap());
        std::os::unix::fs::symlink(name, link).unwrap();
    }
    folder
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn calibration_is_called_off_and_the_next_goes_on_from_there() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), cache_with_the_model());
    let running = calibrating(&folder.path().join("small.gguf"), cache.path());
    running.signal(Signal::INT);
    let (status, _, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(
        said.ends_with("interrupted\n") && !said.contains("error"),
        "{said}"
    );
    assert!(names(folder.path()).is_empty());
    // What the model had written by then need not be written again, nor need it be measured anew how weights are read.
    let kept = names(&cache.path().join("profiles"));
    let useful = |name: &String| {
        name.ends_with(".text") || name.ends_with(".partial") || name == "reading.json"
    };
    assert!(kept.iter().all(useful), "{kept:?}");
    assert_eq!(profiles(&kept), (0, 1), "it was a second or more: {kept:?}");
    let path = folder.path().join("small.gguf");
    let mut again = calibrating(&path, cache.path());
    again.wait_for("calibration goes on from where an earlier run was broken off");
    again.signal(Signal::INT);
    again.end();
}

/// How many files of profiles there are, and of those that are not whole.
fn profiles(names: &[String]) -> (usize, usize) {
    let number = |ending: &str| names.iter().filter(|name| name.ends_with(ending)).count();
    (number(".profile"), number(".partial"))
}

#[test]
fn the_second_signal_ends_at_once() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), cache_with_the_model());
    let running = calibrating(&folder.path().join("small.gguf"), cache.path());
    running.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(30));
    running.signal(Signal::INT);
    let (status, _, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(
        !said.contains("interrupted"),
        "it did not come to that: {said}"
    );
}

#[test]
fn a_perplexity_is_told_as_far_as_it_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    fs::write(
        &file,
        "The sun rises in the east, and sets in the west. ".repeat(2000),
    )
    .unwrap();
    let file = file.to_str().unwrap();
    for json in [false, true] {
        let mut arguments = vec!["perplexity", "-f", file, "-c", "64", "-t", "1", "-v"];
        arguments.extend(json.then_some("--json"));
        let mut running = Running::start(&mut flapjack(&arguments));
        running.wait_for("chunk 2: ");
        running.signal(Signal::TERM);
        let (status, text, said) = running.end();
        assert_eq!(status.code(), Some(143), "{said}");
        assert!(said.contains("interrupted"), "{said}");
        if json {
            let result: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(
                (2..300).contains(&result["chunks"].as_u64().unwrap()),
                "{text}"
            );
        } else {
            assert!(text.starts_with("perplexity "), "{text}");
        }
    }
}

#[test]
fn a_bench_tells_what_it_has_measured() {
    let workshop = Workshop::new();
    let model = workshop.model.to_str().unwrap();
    let mut running = Running::start(&mut flapjack(&[
        "bench", "-m", model, "-r", "1000000", "-p", "16", "-n", "0", "-t", "1", "--json",
    ]));
    running.wait_for("measuring: ");
    running.signal(Signal::INT);
    let (status, text, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(
        !rows[0]["samples_ts"].as_array().unwrap().is_empty(),
        "{text}"
    );
}

/// What waits for standard input or a file looks at no signal, and so ends by the first one.
#[test]
fn waiting_for_a_prompt_ends_at_once() {
    let mut command = flapjack(&["run", "--raw"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Long enough for it to have come so far.
    std::thread::sleep(Duration::from_millis(500));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

// ---- fetching the default model ----

/// A Python that downloads for ever; it leaves its process id in a file.
fn slow_python(folder: &Path) -> String {
    let path = folder.join("python");
    let script = "#!/bin/sh\necho $$ > \"$0.pid\"\nhead -c 20000000 /dev/zero > scratch/part\nexec sleep 60\n";
    // Written by another process: see `hub.rs`.
    let status = Command::new("sh")
        .args(["-c", "printf '%s' \"$1\" > \"$0\" && chmod 755 \"$0\""])
        .args([path.as_os_str(), script.as_ref()])
        .status()
        .unwrap();
    assert!(status.success());
    path.to_str().unwrap().to_owned()
}

fn fetching(folder: &Path, python: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
    command
        .arg("inspect")
        .env("FLAPJACK_CACHE", folder.join("cache"))
        .env("HF_HUB_OFFLINE", "1")
        .env("FLAPJACK_PYTHON", python);
    command
}

#[test]
fn a_download_is_called_off_with_its_process_and_files() {
    let folder = tempfile::tempdir().unwrap();
    let python = slow_python(folder.path());
    let mut running = Running::start(&mut fetching(folder.path(), &python));
    running.wait_for("20.00 MB of 92.87 MB");
    running.signal(Signal::INT);
    let begun = Instant::now();
    let (status, _, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(said.ends_with("interrupted\n"), "{said}");
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "it is not waited for"
    );
    let pid: i32 = fs::read_to_string(format!("{python}.pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let pip = Pid::from_raw(pid).unwrap();
    assert!(
        rustix::process::test_kill_process(pip).is_err(),
        "pip lives on"
    );
    let left = names(&folder.path().join("cache"));
    assert!(left.iter().all(|name| name.ends_with(".lock")), "{left:?}");
}

#[test]
fn waiting_for_another_process_that_fetches_is_called_off() {
    let folder = tempfile::tempdir().unwrap();
    let python = slow_python(folder.path());
    let mut first = Running::start(&mut fetching(folder.path(), &python));
    first.wait_for("downloading ");
    let mut second = Running::start(&mut fetching(folder.path(), &python));
    second.wait_for("waiting for another process");
    second.signal(Signal::INT);
    let (status, _, said) = second.end();
    assert_eq!(status.code(), Some(130), "{said}");
    first.signal(Signal::INT);
    assert_eq!(first.end().0.code(), Some(130));
}
