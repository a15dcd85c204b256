//! What comes of a call, and the border that no panic crosses.

use std::any::Any;
use std::cell::RefCell;
use std::error::Error;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::engine::EngineError;
use crate::generate::GenerateError;
use crate::heal::TrainingError;
use crate::model::ModelError;
use crate::prune::PruneErrorKind;

/// What came of a call. Where it is not FLAPJACK_STATUS_OK, flapjack_last_error() says why, in words.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlapjackStatus {
    /// It was done.
    Ok = 0,
    /// A callback, or flapjack_cancel(), has called it off; the model is as it was.
    Cancelled = 1,
    /// An argument is NULL, no UTF-8, or out of its range.
    Argument = 2,
    /// The model or the conversation is in use: by a call on another thread, or by the one whose callback this is.
    Busy = 3,
    /// The model is not in a state for it: it has been pruned already, say, or has no chat template.
    State = 4,
    /// A file cannot be read or written, or is not what it should be.
    File = 5,
    /// There is not the memory for it.
    Memory = 6,
    /// The prompt does not fit in the context.
    TooLong = 7,
    /// No ratio reaches the target of pruning.
    OutOfReach = 8,
    /// It failed in another way.
    Failed = 9,
    /// There is a mistake in flapjack. The handles of this call can only be freed.
    Internal = 10,
}

/// Why a call was not done.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: FlapjackStatus,
    pub words: String,
}

impl Failure {
    pub fn new(status: FlapjackStatus, words: impl Into<String>) -> Self {
        Self {
            status,
            words: words.into(),
        }
    }

    pub fn argument(words: impl Into<String>) -> Self {
        Self::new(FlapjackStatus::Argument, words)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let status = status_of(&error);
        let words = match &error {
            // Whoever prunes here has the model opened again.
            EngineError::Prune(error) => in_words(&error.kind),
            error => in_words(error),
        };
        Self { status, words }
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        EngineError::from(error).into()
    }
}

/// The error and its causes on one line. A cause that a message already tells is not told again.
fn in_words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        next = cause.source();
    }
    words
}

fn status_of(error: &EngineError) -> FlapjackStatus {
    match error {
        EngineError::While { source, .. } => status_of(source),
        EngineError::Cancelled(_) => FlapjackStatus::Cancelled,
        EngineError::Prune(error) => match &error.kind {
            PruneErrorKind::Cancelled(_) => FlapjackStatus::Cancelled,
            PruneErrorKind::Ratio(_)
            | PruneErrorKind::Group { .. }
            | PruneErrorKind::Pattern(_) => FlapjackStatus::Argument,
            PruneErrorKind::Model(error) => of_model(error),
            PruneErrorKind::DamagedWeights { .. } => FlapjackStatus::File,
            _ => FlapjackStatus::Failed,
        },
        EngineError::Model(error) => of_model(error),
        EngineError::Generate(error) => match error {
            GenerateError::Model(error) => of_model(error),
            GenerateError::PromptTooLong { .. } => FlapjackStatus::TooLong,
            GenerateError::Grammar(_) | GenerateError::EmptyPrompt => FlapjackStatus::Argument,
            _ => FlapjackStatus::Failed,
        },
        EngineError::Hub(_)
        | EngineError::Gguf(_)
        | EngineError::Tokenize(_)
        | EngineError::Vocabulary { .. }
        | EngineError::Text(_)
        | EngineError::Profile(_)
        | EngineError::Cache(_)
        | EngineError::Importance(_)
        | EngineError::FileChanged { .. } => FlapjackStatus::File,
        EngineError::AlreadyPruned
        | EngineError::BrokenOff
        | EngineError::NoFile
        | EngineError::NoTokenizer
        | EngineError::Chat(_) => FlapjackStatus::State,
        EngineError::Training(TrainingError::Cancelled(_)) => FlapjackStatus::Cancelled,
        EngineError::Training(TrainingError::Model(error)) => of_model(error),
        EngineError::NothingToBegin
        | EngineError::CurvesOfGroups { .. }
        | EngineError::Amount(_)
        | EngineError::NoSearch(_)
        | EngineError::HealSparse
        | EngineError::HealFamily { .. }
        | EngineError::HealRate { .. }
        | EngineError::Training(_)
        | EngineError::Convert(_) => FlapjackStatus::Argument,
        EngineError::OutOfReach(_) => FlapjackStatus::OutOfReach,
        EngineError::MetricMemory { .. }
        | EngineError::LayerMemory { .. }
        | EngineError::PruningMemory { .. }
        | EngineError::ProfileMemory { .. }
        | EngineError::DenseMemory { .. }
        | EngineError::SequentialMemory { .. }
        | EngineError::SparseMemory { .. }
        | EngineError::HealMemory { .. }
        | EngineError::Context { .. }
        | EngineError::ContextMemory { .. } => FlapjackStatus::Memory,
        EngineError::Runtime(_) | EngineError::Perplexity(_) | EngineError::Unsuited(_) => {
            FlapjackStatus::Failed
        }
    }
}

fn of_model(error: &ModelError) -> FlapjackStatus {
    match error {
        ModelError::CacheMemory { .. } | ModelError::Memory { .. } => FlapjackStatus::Memory,
        ModelError::Gguf(_)
        | ModelError::Architecture { .. }
        | ModelError::Part(_)
        | ModelError::NotAModel { .. } => FlapjackStatus::File,
        ModelError::CacheFull { .. } => FlapjackStatus::TooLong,
        _ => FlapjackStatus::Failed,
    }
}

// ---- the border ----

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn set_last_error(words: &str) {
    // A zero byte would end the text too early.
    let words = CString::new(words.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending has no last error any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(words));
}

/// Does the work of a call, and takes down why it was not done. Panics end here: C could not go on behind one.
pub(super) fn call(work: impl FnOnce() -> Result<(), Failure>) -> FlapjackStatus {
    let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic)));
    match done {
        Ok(()) => FlapjackStatus::Ok,
        Err(Failure { status, words }) => {
            set_last_error(&words);
            status
        }
    }
}

fn panicked(panic: Box<dyn Any + Send>) -> Failure {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied());
    let words = format!(
        "there is a mistake in flapjack: {}",
        text.unwrap_or("a panic")
    );
    // What a panic carries may panic itself when it is dropped.
    std::mem::forget(panic);
    Failure::new(FlapjackStatus::Internal, words)
}

/// Why the last call on this thread that was not done was not. Never NULL, and empty if all were done; valid until the next call
/// on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn flapjack_last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// The version of the library, such as "0.1.0". It is not to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn flapjack_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last_error() -> String {
        // SAFETY: it is a text, and no other call has come between.
        let words = unsafe { CStr::from_ptr(flapjack_last_error()) };
        words.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_ends_at_the_border_and_is_told() {
        assert_eq!(last_error(), "");
        let status = call(|| panic!("the answer is {}", 42));
        assert_eq!(status, FlapjackStatus::Internal);
        assert_eq!(
            last_error(),
            "there is a mistake in flapjack: the answer is 42"
        );
        assert_eq!(call(|| Ok(())), FlapjackStatus::Ok);
        assert!(last_error().ends_with("42"), "it stays, as errno does");
        let status = call(|| Err(Failure::argument("a\0b")));
        assert_eq!(
            (status, last_error().as_str()),
            (FlapjackStatus::Argument, "a b")
        );
    }
}
