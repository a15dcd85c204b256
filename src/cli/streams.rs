//! The two streams. What was asked for goes to standard output and must arrive: where it cannot be written, that is an error, and
//! where its reader has gone away, the end. What is said about it goes to standard error and need not.

use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::progress;

// ---- standard output ----

/// Standard output could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
struct OutputError(io::Error);

/// Standard output, in blocks: what is written may arrive only when it is flushed.
pub struct Output(BufWriter<StdoutLock<'static>>);

impl Output {
    pub fn new() -> Self {
        Self(BufWriter::new(io::stdout().lock()))
    }

    /// Writes a value as JSON, on one line.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut *self, value)?;
        writeln!(self)
    }

    /// Writes a value as JSON, on many lines.
    pub fn pretty_json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *self, value)?;
        writeln!(self)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(of_output)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(of_output)
    }
}

/// The error as one of standard output, so that it can be told from those of other files.
fn of_output(error: io::Error) -> io::Error {
    match error.kind() {
        // Whoever writes tries again.
        io::ErrorKind::Interrupted => error,
        kind => io::Error::new(kind, OutputError(error)),
    }
}

/// Lets `write` write to standard output, and sees that it arrives.
///
/// # Errors
/// If it does not.
pub fn print(write: impl FnOnce(&mut Output) -> io::Result<()>) -> io::Result<()> {
    let mut out = Output::new();
    write(&mut out)?;
    out.flush()
}

/// Whether an error is that the reader of standard output has had enough.
pub fn reader_left(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let error = cause.downcast_ref::<io::Error>();
        error.is_some_and(|error| {
            error.kind() == io::ErrorKind::BrokenPipe
                && error.get_ref().is_some_and(|e| e.is::<OutputError>())
        })
    })
}

// ---- standard error ----

static QUIET: AtomicBool = AtomicBool::new(false);

/// Whether nothing is to be said about progress from now on.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether nothing is to be said about progress.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Writes a line, or several, to standard error. Where that cannot be written, nobody reads it, and it is let go: the work and the
/// text on standard output matter more.
pub fn say(text: &str) {
    let _ = writeln!(Log, "{text}");
}

/// Standard error for lines, which go above the bars that are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        match progress::above_bars(text.trim_end_matches('\n')) {
            true => Ok(bytes.len()),
            false => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }

    /// All at once, so that lines stay whole.
    fn write_fmt(&mut self, arguments: std::fmt::Arguments<'_>) -> io::Result<()> {
        self.write_all(arguments.to_string().as_bytes())
    }
}

/// Whether standard error is a terminal on which a line can be drawn anew.
pub fn is_drawn() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether what is said may have colours: on a terminal, unless NO_COLOR is set to something (no-color.org).
pub fn has_colours() -> bool {
    is_drawn() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Whether what is written to standard output may have colours.
pub fn output_has_colours() -> bool {
    io::stdout().is_terminal() && has_colours()
}
