//! The program on a terminal: one that nobody looks at, whose output is kept.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// Runs a program with its standard error on a terminal. Returns all that it writes there, with everything that moves the cursor.
pub fn on_terminal(mut command: Command) -> (ExitStatus, String) {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&terminal).expect("a terminal");
    unlockpt(&terminal).expect("a terminal");
    let name = ptsname(&terminal, Vec::new()).expect("a terminal");
    let path = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
    let mut options = OpenOptions::new();
    let other_end = options
        .read(true)
        .write(true)
        .open(path)
        .expect("a terminal");
    let mut child = command
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(other_end)
        .spawn()
        .expect("the program starts");
    // The command holds the other end open as well.
    drop(command);
    let mut written = Vec::new();
    let mut terminal = File::from(terminal);
    let mut buffer = [0; 4096];
    // On Linux the end is an error (EIO).
    while let Ok(n @ 1..) = terminal.read(&mut buffer) {
        written.extend_from_slice(&buffer[..n]);
    }
    let status = child.wait().expect("the program ends");
    (status, String::from_utf8_lossy(&written).into_owned())
}
