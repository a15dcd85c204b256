//! Smaller types: which matrices of a model can do with fewer bits, by what that does to its predictions, and encoding them so.
//!
//! A *place* is what changes its type as one: a module with all its projections, the output head, or an embedding that is not the
//! head. A *level* is a number of bits; each matrix takes the type of that level whose blocks fit its rows. [`measure`] encodes one
//! place at a time, by the importance of its inputs, and takes down the divergence from the model's own predictions on held-back text,
//! as loss curves do for widths. [`TypeCurves::plan`] takes, from all places, every step that costs less than a price per byte;
//! [`Joint`] finds the price at which types and widths together reach a size.

mod curves;
mod joint;
mod levels;
mod measure;
mod plan;

pub use curves::{Importance, Place, TypeCurves, TypePoint};
pub use joint::{Joint, JointPlan, Moves};
pub use levels::Level;
pub use measure::{importance, measure};
pub use plan::{KeptTypes, TypeChanges, TypePlan};
