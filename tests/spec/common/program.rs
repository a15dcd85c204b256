//! The program, as a user starts it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The program, without the config file of whoever runs the tests, without a network, and without models of other programs.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
    command.env("FLAPJACK_CONFIG", "");
    command.env("HF_HUB_OFFLINE", "1");
    for variable in ["HF_HUB_CACHE", "OLLAMA_MODELS", "LMSTUDIO_MODELS"] {
        command.env(variable, "/nonexistent");
    }
    command
}

pub fn flapjack(arguments: &[&str]) -> Output {
    flapjack_with(arguments, &[])
}

/// As [`flapjack`], with changes to its environment.
pub fn flapjack_with(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    // Fetched here, so that a test's time and output are its own.
    super::default_model();
    program()
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("flapjack starts")
}

/// As [`flapjack`], with something on its standard input.
pub fn flapjack_reading(arguments: &[&str], input: &[u8]) -> Output {
    super::default_model();
    let mut command = program();
    command.args(arguments);
    run_with_input(command, input)
}

/// Runs a program to its end.
pub fn run_with_input(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut pipe = child.stdin.take().expect("it is piped");
    // One that fails early reads nothing.
    let _ = pipe.write_all(input);
    drop(pipe);
    child.wait_with_output().expect("the program ends")
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("standard output is UTF-8")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output of a run that must succeed.
pub fn succeed(arguments: &[&str]) -> String {
    let output = flapjack(arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        stderr(&output)
    );
    stdout(&output)
}

/// The error message of a run that must fail, with nothing on standard output.
pub fn fail(arguments: &[&str]) -> String {
    let output = flapjack(arguments);
    assert!(!output.status.success(), "{arguments:?} succeeded");
    assert_eq!(stdout(&output), "", "{arguments:?}");
    let message = stderr(&output);
    assert!(
        message.contains("error:") && !message.contains("panicked"),
        "{message}"
    );
    message
}

/// Standard output and error of a run that must have succeeded.
pub fn succeeded(output: &Output) -> (String, String) {
    assert!(output.status.success(), "{}", stderr(output));
    (stdout(output), stderr(output))
}

/// The default model, and a folder for the files of a test and for a cache of its own.
pub struct Bench {
    pub model: String,
    folder: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let model = super::default_model();
        Self {
            model: model.to_str().expect("UTF-8").to_owned(),
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// Where a file of the folder is.
    pub fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().expect("UTF-8").to_owned()
    }

    /// Writes a file of the folder and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        let folder = Path::new(&path).parent().expect("a folder");
        fs::create_dir_all(folder).expect("the folder is made");
        fs::write(&path, content).expect("the file is written");
        path
    }

    /// As [`flapjack`], with the cache of this folder, and with one thread: tests run side by side, so that more would
    /// make nothing faster. (Results are the same for any number, as other tests show.)
    pub fn flapjack(&self, arguments: &[&str]) -> Output {
        let (command, rest) = arguments.split_first().expect("a subcommand");
        let arguments = [&[*command, "-t", "1"], rest].concat();
        flapjack_with(&arguments, &[("FLAPJACK_CACHE", &self.path("cache"))])
    }

    /// The profiles or outcomes in the cache, by what their names end with.
    pub fn cached(&self, extension: &str) -> Vec<PathBuf> {
        let files = fs::read_dir(self.path("cache/profiles")).expect("a cache");
        let mut files: Vec<_> = files
            .map(|file| file.expect("a file").path())
            .filter(|path| path.extension().is_some_and(|e| e == extension))
            .collect();
        files.sort();
        files
    }
}
