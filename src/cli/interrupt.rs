//! Ctrl-C, and the signal to terminate: what is watched for them ends in order, with what it has; everything else ends at once.
//!
//! Work that can stop holds a [`Watch`] and looks at it now and then. The first signal is then only noted, the second ends the
//! program. Where nothing is watched (a file is mapped, standard input is awaited), the first one does.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use flapjack::engine::Cancelled;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether the next signal ends the program: nothing is watched, or one has been noted already.
static AT_ONCE: AtomicBool = AtomicBool::new(true);
/// The number of the signal that was noted last; 0 for none.
static NOTED: AtomicUsize = AtomicUsize::new(0);
/// Watches that live.
static WATCHES: AtomicUsize = AtomicUsize::new(0);

/// What asks the program to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    Terminate,
}

impl Signal {
    const ALL: [Self; 2] = [Self::Interrupt, Self::Terminate];

    fn number(self) -> i32 {
        match self {
            Self::Interrupt => SIGINT,
            Self::Terminate => SIGTERM,
        }
    }

    /// 128 and the signal's number, as shells have it.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// Work was stopped by a signal, and what there was of it has been told.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted(pub Signal);

/// Takes the signals over, once, at the start of the program.
///
/// # Errors
/// Those of the operating system.
pub fn install() -> Result<()> {
    for signal in Signal::ALL {
        let number = signal.number();
        // In this order: the signal that is noted does not end the program itself.
        flag::register_conditional_shutdown(number, signal.exit_code().into(), &AT_ONCE)
            .and_then(|_| flag::register(number, &AT_ONCE))
            .and_then(|_| flag::register_usize(number, &NOTED, number as usize))
            .context("cannot listen for Ctrl-C")?;
    }
    Ok(())
}

/// The signal that was noted and that nobody has taken.
pub fn noted() -> Option<Signal> {
    let number = NOTED.load(Ordering::SeqCst);
    let mut signals = Signal::ALL.into_iter();
    signals.find(|signal| signal.number() as usize == number)
}

/// Ends what comes next if a signal was noted during what came before.
///
/// # Errors
/// [`Cancelled`], if it was.
pub fn check() -> Result<()> {
    match noted() {
        Some(_) => Err(Cancelled.into()),
        None => Ok(()),
    }
}

/// While it lives, the first signal is noted and the second ends the program.
#[derive(Debug)]
pub struct Watch(());

impl Watch {
    pub fn begin() -> Self {
        WATCHES.fetch_add(1, Ordering::SeqCst);
        AT_ONCE.store(noted().is_some(), Ordering::SeqCst);
        Self(())
    }

    /// Whether to go on.
    pub fn flow(&self) -> ControlFlow<()> {
        match noted() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    /// Ends the watch and takes the signal, so that the next one is a first one again.
    ///
    /// # Errors
    /// [`Interrupted`], if one was noted. Whoever passes this on ends the program with the signal's exit code; whoever does not
    /// goes on.
    pub fn end(self) -> Result<(), Interrupted> {
        let signal = noted();
        NOTED.store(0, Ordering::SeqCst);
        drop(self);
        signal.map_or(Ok(()), |signal| Err(Interrupted(signal)))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if WATCHES.fetch_sub(1, Ordering::SeqCst) == 1 {
            AT_ONCE.store(true, Ordering::SeqCst);
        }
    }
}
