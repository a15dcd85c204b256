//! A short distillation behind pruning: the pruned model's weights are trained towards the dense model's predictions.
//!
//! The loss is KL(p ‖ q) of the dense model's predictions p and the pruned model's q, at every position (Hinton, Vinyals and Dean,
//! "Distilling the Knowledge in a Neural Network", arXiv 1503.02531), and the optimizer AdamW. The derivatives are written by hand: there
//! is one forward pass, and it does not change.
//!
//! | file | what it does |
//! | --- | --- |
//! | `trainer` | training from beginning to end: begin to read here |
//! | `search` | before pruning: a search over whole plans, which needs the same derivatives |
//! | `gradients` | the loss of a batch and its derivatives |
//! | `forward`, `backward` | the passes through the layers |
//! | `attention`, `gate`, `norm`, `divergence` | their parts, each with its derivatives |
//! | `student`, `layout` | the parameters that are trained, and where they lie |
//! | `low_rank` | changes of low rank, which may be trained in place of whole matrices |
//! | `teacher` | what models predict |
//! | `adamw`, `schedule`, `batches` | the optimizer, the rate, the order of the text |
//! | `checkpoint` | training in the middle, as a file |

mod adamw;
mod attention;
mod backward;
mod batches;
pub(crate) mod checkpoint;
mod divergence;
mod forward;
mod gate;
mod gradients;
mod layout;
mod low_rank;
mod norm;
mod options;
mod schedule;
mod search;
mod student;
mod teacher;
mod trainer;

pub use backward::Gradients;
pub use gradients::Step;
pub use layout::{LayerPlaces, Places};
pub use options::{Budget, Training, What};
pub use search::{Search, SearchError, Searched, search_bytes};
pub use student::{Student, can_train};
pub use trainer::{Healed, Trainer, TrainingError, bytes, trained};
