//! flapjack: a memory-mapped CPU runtime for LLaMA-family models that can shrink the model it has just mapped, before it
//! serves the first token.
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use flapjack::engine::{Engine, GenerateOptions, OpenOptions, PruneOptions, Target};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # // A tiny random model stands in for a real one.
//! # let folder = tempfile::tempdir()?;
//! # std::env::set_current_dir(&folder)?;
//! # flapjack::engine::write_synthetic("model.gguf", flapjack::engine::TINY, flapjack::engine::SyntheticType::Q8_0)?;
//! // Profiles and outcomes are kept in this folder; by default it is the user's cache folder.
//! let options = OpenOptions { cache: Some("cache".into()), ..OpenOptions::default() };
//! let mut engine = Engine::open("model.gguf", options)?;
//! let options = PruneOptions { target: Target::Ratio(0.3), ..PruneOptions::default() };
//! let report = engine.prune(&options, &mut |event| {
//!     eprintln!("{:?}: {} of {}", event.stage, event.done, event.total);
//!     ControlFlow::Continue(()) // or Break, to cancel
//! })?;
//! println!("{:.1} % of the layers' weights are gone", report.removed * 100.0);
//!
//! let mut sequence = engine.sequence();
//! for piece in engine.generate(&mut sequence, "Once upon a time", &GenerateOptions::default())? {
//!     print!("{}", piece?);
//! }
//! engine.export("small.gguf")?;
//! # assert!((report.removed - 0.3).abs() < 0.1 && !sequence.is_empty());
//! # Ok(())
//! # }
//! ```
//!
//! [`Target::Bytes`](engine::Target::Bytes) in place of a ratio prunes until all weights fit in so many bytes. The second run
//! finds in the cache folder what the first has left there, and takes no time.
//!
//! # The house
//!
//! The way data takes, from left to right. A room may use those to its left and [`kernels`], never one to its right:
//!
//! ```text
//!  file on disk ─► gguf ─► model ──► prune, heal ► generate · eval ─► engine ─────► the command line
//!                  maps    typed     collect →    sampling,          the whole     arguments,
//!                  views   weights   choose →     sequences,         pipeline      words, bars
//!                          on the    restore →    perplexity,        behind one
//!                          map       apply        speed              face
//!                             ▲         ▲              ▲
//!                             └─────────┴── kernels ───┘
//! ```
//!
//! | room | what lives in it |
//! | --- | --- |
//! | [`engine`] | open, prune to a target, sequences, export: the pipeline, its cache, its events, its report as data |
//! | [`serve`] | an HTTP server over the engine, and its page |
//! | [`ffi`] | the interface for C, over the engine |
//! | [`generate`] | sampling, grammars, stop conditions; one answer, or many side by side |
//! | [`eval`] | perplexity, speed, embeddings |
//! | [`prune`] | FLAP and beyond, in steps from plain data to plain data |
//! | [`heal`] | a short distillation behind pruning: forward and backward pass, optimizer |
//! | [`tokenize`] | tokenizers from GGUF metadata |
//! | [`chat`] | chat templates: from messages to text and tokens, and answers taken apart |
//! | [`model`] | weights as views on the map, the KV cache, one readable forward pass ([`model::Model::forward`]) |
//! | [`checkpoint`] | folders with `config.json` and safetensors files, as what a GGUF file is |
//! | [`convert`] | a model's file or folder as a GGUF file in other types |
//! | [`gguf`] | reading and writing GGUF, and the map itself |
//! | [`quant`] | the block formats of weights |
//! | [`kernels`] | the C kernels of `vendor/flapkern` behind a safe face, and the threads |
//! | [`hub`] | where model files come from |
//! | [`memory`] | how much memory this process may take |
//! | [`progress`] | how long work below the engine tells how far it is |
//!
//! # Words
//!
//! A *channel* is one hidden unit of an MLP; a *KV group* is a KV head and the query heads that read it; the
//! *ratio* of pruning is the share of the layers' attention and MLP weights, in parameters, that is removed. Matrices are
//! row-major `[out_features, in_features]`.

pub mod chat;
pub mod checkpoint;
pub mod convert;
mod count;
pub mod engine;
pub mod eval;
pub mod ffi;
mod files;
pub mod generate;
pub mod gguf;
pub mod heal;
pub mod hub;
pub mod kernels;
pub mod memory;
pub mod model;
pub mod progress;
pub mod prune;
pub mod quant;
pub mod serve;
pub mod tokenize;

/// The examples of the guide to the library, which must compile.
#[cfg(doctest)]
#[doc = include_str!("../docs/library.md")]
struct Guide;
