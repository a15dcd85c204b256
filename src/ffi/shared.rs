//! What handles share: a model that one call at a time uses.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

use super::status::{Failure, FlapjackStatus};
use crate::engine::{Engine, SequenceOptions};
use crate::generate::SamplerConfig;

/// A model, and what is known of it without taking it into use.
pub(super) struct Shared {
    engine: Mutex<Engine>,
    /// Whether the call under way is to end.
    cancelled: AtomicBool,
    pub sampler: SamplerConfig,
    pub sequence: SequenceOptions,
    /// The system message of conversations that name none; `None` to leave it to the template.
    pub system: Option<&'static str>,
}

// Handles may be used on any thread.
const _: fn() = || {
    fn any_thread<T: Send + Sync>() {}
    any_thread::<Shared>();
};

impl Shared {
    pub fn new(engine: Engine, sequence: SequenceOptions, system: Option<&'static str>) -> Self {
        Self {
            sampler: engine.sampling_defaults().options().config(),
            engine: Mutex::new(engine),
            cancelled: AtomicBool::new(false),
            sequence,
            system,
        }
    }

    /// Takes the model into use. It is not waited for: a callback that asks for its own call's model would wait forever.
    pub fn take(&self) -> Result<MutexGuard<'_, Engine>, Failure> {
        let engine = lock(&self.engine, "the model")?;
        if engine.is_touched() && engine.pruned().is_none() {
            return Err(Failure::new(
                FlapjackStatus::State,
                "pruning the model was broken off, and its file could not be opened again",
            ));
        }
        self.cancelled.store(false, Ordering::Relaxed);
        Ok(engine)
    }

    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// A break if the call under way is to end.
    pub fn go_on(&self) -> ControlFlow<()> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Takes what one call at a time uses.
pub(super) fn lock<'a, T>(mutex: &'a Mutex<T>, what: &str) -> Result<MutexGuard<'a, T>, Failure> {
    mutex.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Failure::new(
            FlapjackStatus::Busy,
            format!("{what} is in use by another call"),
        ),
        TryLockError::Poisoned(_) => Failure::new(
            FlapjackStatus::Internal,
            format!("a mistake in flapjack came up while {what} was in use; it can only be freed"),
        ),
    })
}
