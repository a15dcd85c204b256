//! Carrying out a plan on the model in place.

mod compact;
mod layers;
mod projection;
mod tally;

pub use compact::apply_layer;
pub use layers::{apply, restore_and_apply};

pub(super) use compact::Columns;
pub(super) use projection::EncodedProjection;
pub(super) use tally::{Tally, tallied};
