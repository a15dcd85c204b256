//! Making up for what goes: a bias, or least squares, of each projection by itself or in sequence.

mod difference;
mod restoration;
pub mod sequential;

pub use restoration::{LayerRestoration, Restoration, restore, restore_module};

pub(super) use difference::{Around, Difference};
pub(super) use restoration::restore_projection;
