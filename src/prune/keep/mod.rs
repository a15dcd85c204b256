//! What is kept in files: profiles, outcomes of pruning, and the record of a pruned model's origin.

mod format;
pub mod outcome;
pub mod record;
pub mod store;

pub use outcome::{Outcome, OutcomeError, OutcomeKey};
pub use record::{LayerRecord, Record};
pub use store::{Collected, Covariances, Origin, ProfileError, StoredProfile};
