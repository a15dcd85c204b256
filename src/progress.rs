//! How long work tells how far it is, and how it is called off.

use std::ops::ControlFlow;

/// Called now and then with how much is done and how much there is in all, in a unit that the function that takes it names.
/// The answer says whether to go on; after a break the function ends with its error for [`Cancelled`].
pub type Progress<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + Send + 'a;

/// Work was called off by the answer of its [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

/// Tells `progress`, and turns a break into an error.
///
/// # Errors
/// [`Cancelled`], if the answer is a break.
pub fn report(progress: &mut Progress, done: usize, total: usize) -> Result<(), Cancelled> {
    match progress(done, total) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Cancelled),
    }
}

/// A [`Progress`] that nobody looks at and that never calls anything off.
pub fn ignore(_done: usize, _total: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
