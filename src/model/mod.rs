//! LLaMA-family models: configuration, weights as typed views on the map, one readable forward pass, the KV cache.
//!
//! [`Model::load`] reads a [`GgufFile`](crate::gguf::GgufFile) of a family that [`Architecture`] names, each of which [`Family`]
//! describes; [`Export`] writes one. Every layer owns its widths: head
//! counts, the sizes of KV groups and the number of MLP channels may differ from layer to layer, as they do after pruning.
//! [`Model::forward`] takes a batch of tokens through all layers; [`Model::logits`] applies the output head to the rows
//! that are wanted.

mod cache;
mod config;
mod export;
mod family;
mod forward;
mod kind;
mod load;
mod loss;
mod module;
mod narrow;
mod pack;
mod retype;
mod rope;
mod single;
mod sparse;
mod synthetic;
mod weights;

pub use cache::{CacheType, KvCache, KvPool};
pub use config::Config;
pub(crate) use config::ROTATION_KEY;
pub use export::{Export, LayerForm};
pub use family::{Architecture, Family, Gate, Rotation, Windows};
pub(crate) use forward::add_normalised;
pub use forward::{Batch, Observer, Row, Scratch, Unobserved};
pub use kind::Kind;
pub(crate) use kind::architecture;
pub use loss::{Predictions, negative_log_likelihoods};
pub(crate) use loss::{fast_exp, log_sum_exp};
pub use module::{Module, ModuleId};
pub use retype::{MatrixId, NewType};
pub use rope::{Rope, Scaling, Yarn};
pub use sparse::SparseWeightError;
pub use synthetic::Shape;
pub use weights::{Layer, Linear, Model, Weight};

use crate::count::count;
use crate::gguf::{GgufError, Part};

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(
        "{path}: architecture {found:?} is not supported; flapjack runs {}",
        Architecture::names()
    )]
    Architecture {
        path: std::path::PathBuf,
        found: String,
    },
    /// The file is a part of a model that is split among several files, and others are missing.
    #[error(transparent)]
    Part(Box<Part>),
    /// The file belongs to a model, and is none itself.
    #[error("{path} is {kind}")]
    NotAModel {
        path: std::path::PathBuf,
        kind: Kind,
    },
    #[error("token {token} at place {place} is not in the vocabulary of {vocabulary}")]
    Token {
        token: u32,
        place: usize,
        vocabulary: usize,
    },
    #[error("{} do not fit in a KV cache of {capacity}", count(needed, "position"))]
    CacheFull { needed: usize, capacity: usize },
    #[error(
        "the KV cache was made for a model of other widths, as this one was before it was pruned; begin a new sequence"
    )]
    CacheShape,
    #[error("the KV cache has {}, and no other is free", count(blocks, "block"))]
    PoolFull { blocks: usize },
    /// The sequences are as they were.
    #[error(
        "the memory is used up: {positions} positions more in the KV cache take {}, and {} can be taken",
        mebibytes(*needed), mebibytes(*available)
    )]
    CacheMemory {
        positions: usize,
        needed: u64,
        available: u64,
    },
    /// The process may not take as much memory as the weights need.
    #[error(
        "the weights take {}, and {} of memory are available",
        mebibytes(*needed), mebibytes(*available)
    )]
    Memory { needed: u64, available: u64 },
    #[error(
        "the next position of sequence {sequence} in the batch is {expected}, and a row of it has {found}"
    )]
    Position {
        sequence: usize,
        expected: usize,
        found: usize,
    },
    #[error(
        "heads of {} do not fill blocks of {block}, so that the KV cache of this model must be in half precision",
        count(head_dim, "value")
    )]
    CacheType { head_dim: usize, block: usize },
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
