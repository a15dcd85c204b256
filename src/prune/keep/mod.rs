//! What is kept in files: profiles, outcomes of pruning, and the record of a pruned model's origin.

mod format;
pub mod outcome;
pub mod record;
mod single;
pub mod store;

pub use outcome::{Outcome, OutcomeError, OutcomeKey};
pub use record::{LayerRecord, Record};
pub use single::{Single, SingleRecord};
pub use store::{Collected, Covariances, Origin, ProfileError, StoredProfile};
