//! Streams that fail: standard output must arrive or be an error, standard error need not, and neither ever panics.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Output, Stdio};

use crate::common::engine::Workshop;
use crate::common::program::{stderr, succeeded};

/// A command line for each subcommand that prints results, on a small model that is named where FILE stands.
const PRINTING: [&str; 24] = [
    "run -p x -n 4 -m FILE",
    "run -p x -n 4 -q -m FILE",
    "perplexity -c 32 --chunks 1 -f TEXT -m FILE",
    "perplexity -c 32 --chunks 1 --json -f TEXT -m FILE",
    "bench -p 4 -n 0 -r 1 -m FILE",
    "bench -p 4 -n 0 -r 1 -o csv -m FILE",
    "bench -p 4 -n 0 -r 1 --json -m FILE",
    "inspect FILE",
    "inspect --json FILE",
    "info",
    "cache",
    "cache --json",
    "cache clear",
    "models",
    "models --json",
    "config",
    "config --path",
    "completions bash",
    "completions zsh",
    "man",
    "--help",
    "--version",
    "help run",
    "run --help",
];

/// Those that say something on standard error only, or both.
const SAYING: [&str; 5] = [
    "run -p x -n 4 --prune 0.2 --method flap --calib-tokens 256 -m FILE",
    "prune --ratio 0.2 --method flap --calib-tokens 256 -o OUT -m FILE",
    "calibrate --method flap --calib-tokens 256 -o OUT -m FILE",
    "man MANUAL",
    "run --wrong",
];

struct Place {
    workshop: Workshop,
}

impl Place {
    fn new() -> Self {
        let workshop = Workshop::new();
        workshop.write("text.txt", "The sun rises in the east. ".repeat(20));
        Self { workshop }
    }

    fn command(&self, line: &str) -> Command {
        let name = |name: &str| self.workshop.path(name).to_str().unwrap().to_owned();
        let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
        for word in line.split(' ') {
            command.arg(match word {
                "FILE" => self.workshop.model.to_str().unwrap().to_owned(),
                "TEXT" => name("text.txt"),
                "OUT" => name("out"),
                "MANUAL" => name("manual"),
                word => word.to_owned(),
            });
        }
        // Tests run side by side, where threads that wait for each other lose their time.
        if line.contains("-m FILE") {
            command.args(["-t", "1"]);
        }
        command.env("FLAPJACK_CACHE", name("cache"));
        command.stdin(Stdio::null());
        command
    }
}

fn assert_no_panic(line: &str, output: &Output) {
    let said = stderr(output);
    assert!(!said.contains("panicked"), "{line}: {said}");
    assert!(
        output.status.code().is_some_and(|code| code != 101),
        "{line}: {:?}",
        output.status
    );
}

#[test]
#[cfg(target_os = "linux")]
fn standard_output_that_is_full_is_an_error() {
    let place = Place::new();
    for line in PRINTING {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = place.command(line).stdout(full).output().unwrap();
        assert_no_panic(line, &output);
        assert_eq!(output.status.code(), Some(1), "{line}: {}", stderr(&output));
        assert!(
            stderr(&output).contains("error: cannot write to standard output: No space"),
            "{line}: {}",
            stderr(&output)
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn standard_error_that_is_full_is_let_go() {
    let place = Place::new();
    for line in PRINTING.iter().chain(&SAYING) {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = place.command(line).stderr(full).output().unwrap();
        let expected = if line.contains("--wrong") { 2 } else { 0 };
        assert_eq!(output.status.code(), Some(expected), "{line}");
    }
}

/// `flapjack … | head -c 1`, and the same with 2>&1.
#[test]
#[cfg(unix)]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    for line in PRINTING.iter().chain(&SAYING) {
        for both in [false, true] {
            let (mut reader, writer) = std::io::pipe().unwrap();
            let mut command = place.command(line);
            if both && line.contains("-m FILE") {
                // There is more to say than a line.
                command.args(["-v", "-v"]);
            }
            let mut child = match both {
                true => command.stderr(writer.try_clone().unwrap()).stdout(writer),
                false => command.stderr(Stdio::piped()).stdout(writer),
            }
            .spawn()
            .unwrap();
            // The command holds the pipe open as well.
            drop(command);
            let mut one = [0];
            let _ = reader.read(&mut one);
            drop(reader);
            let mut said = String::new();
            if let Some(mut pipe) = child.stderr.take() {
                pipe.read_to_string(&mut said).unwrap();
            }
            let status = child.wait().unwrap();
            let expected = if line.contains("--wrong") { 2 } else { 0 };
            assert_eq!(status.code(), Some(expected), "{line}, {both}: {said}");
            assert!(expected == 2 || !said.contains("error"), "{line}: {said}");
        }
    }
}

/// JSON of 100 kB and more does not fit into a pipe, so that its writer meets the end.
#[test]
#[cfg(unix)]
fn long_json_into_a_pipe_that_closes_is_no_error() {
    let model = crate::common::default_model();
    let mut child = Command::new(env!("CARGO_BIN_EXE_flapjack"))
        .args(["inspect", "--json"])
        .arg(model)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 10]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
}

#[test]
#[cfg(unix)]
fn closed_streams_do_no_harm() {
    let place = Place::new();
    for line in PRINTING.iter().chain(&SAYING) {
        for closed in [">&-", "2>&-", "<&-", "<&- >&- 2>&-"] {
            let inner = place.command(line);
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec \"$@\" {closed}"), "sh"]);
            shell.arg(inner.get_program()).args(inner.get_args());
            for (key, value) in inner.get_envs() {
                shell.env(key, value.unwrap());
            }
            let output = shell.output().unwrap();
            assert_no_panic(line, &output);
            let expected = if line.contains("--wrong") { 2 } else { 0 };
            assert_eq!(output.status.code(), Some(expected), "{line} {closed}");
        }
    }
}

#[test]
fn results_alone_are_on_standard_output() {
    let place = Place::new();
    for line in PRINTING.iter().filter(|line| line.contains("--json")) {
        let output = place.command(line).arg("-v").output().unwrap();
        let (text, _) = succeeded(&output);
        let _: serde_json::Value = serde_json::from_str(&text).expect(line);
    }
}

/// `print!` and its like panic where their stream fails.
#[test]
fn no_source_writes_to_a_stream_behind_the_streams_back() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
            for line in code {
                for forbidden in ["print!(", "println!(", "dbg!("] {
                    assert!(!line.contains(forbidden), "{}: {line}", path.display());
                }
                // `streams.rs` is where they are written.
                let is_home = path.ends_with("cli/streams.rs");
                for stream in ["io::stdout()", "io::stderr()"] {
                    assert!(
                        is_home || !line.contains(stream),
                        "{}: {line}",
                        path.display()
                    );
                }
            }
        }
    }
    assert!(files > 50);
}
