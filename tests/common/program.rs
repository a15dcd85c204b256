//! The program, as a user starts it.

use std::process::{Command, Output, Stdio};

pub fn flapjack(arguments: &[&str]) -> Output {
    flapjack_with(arguments, &[])
}

/// As [`flapjack`], with changes to its environment.
pub fn flapjack_with(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    // Fetched here, so that a test's time and output are its own.
    super::default_model();
    Command::new(env!("CARGO_BIN_EXE_flapjack"))
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("flapjack starts")
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
