//! Removing single weights: which of them go, and what makes up for them. Wanda (Sun et al., ICLR 2024, arXiv 2306.11695), norms
//! alone, and SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).
//!
//! Beside the steps of structured pruning this is a way of its own: the shape of the model stays, and some of its weights become
//! exactly 0, or have no place any more. It can follow structured pruning.
//!
//! | file | what it does |
//! | --- | --- |
//! | `choice` | what can be asked for: a [`SparseMethod`], a [`Pattern`] of what stays, and both together, [`Sparsity`] |
//! | `projection` | the seven projections of a layer, and what each of them reads |
//! | `stream` | the text on its way through the layers: what a layer's projections see behind layers that are pruned already |
//! | `score` | masks by scores: those of Wanda, and norms |
//! | `surgeon` | SparseGPT: masks, and weights that make up for what goes |
//! | `allocate` | how much each module loses: the same everywhere, or by loss curves |
//! | `layers` | all of it layer by layer ([`sparsify`]) |
//! | `zeros` | takes the weights out: the sparse layout, or zeros |

pub mod allocate;
mod choice;
mod layers;
mod projection;
pub mod score;
mod stream;
pub mod surgeon;
mod zeros;

pub use choice::{Allocate, Pattern, SparseForm, SparseMethod, Sparsity};
pub use layers::{Removal, SparseLayer, TypeChange, bytes, sparsify, type_changes};
pub use projection::{LayerProjection, Projection};
pub use stream::{LayerInputs, Stream};
pub(in crate::prune) use zeros::Behind;
pub use zeros::{expected_bytes, has_zero, stays_dense, weight_bytes};
