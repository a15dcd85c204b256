//! Choosing what stays: scores of features, structures that share out a budget, and the search for a ratio.

mod metric;
mod plan;
pub mod search;
mod structure;
pub mod substitute;
pub mod surgeon;
mod units;

pub use metric::{LayerScores, score};
pub use plan::{LayerPlan, Plan, RATIOS};
pub use search::{Found, Planner, Target};
pub use structure::{Division, Shares, plan};

pub(super) use units::Units;
