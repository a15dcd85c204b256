//! What is kept in files: profiles, outcomes of pruning, and the record of a pruned model's origin.

pub(crate) mod format;
pub mod outcome;
pub mod record;
mod rewritten;
mod single;
pub mod store;

pub use outcome::{HealEnd, HealRecord, Outcome, OutcomeError, OutcomeKey};
pub use record::{LayerRecord, Record};
pub use rewritten::Rewritten;
pub use single::{Single, SingleRecord};
pub use store::{Collected, Covariances, Origin, ProfileError, StoredProfile};
