//! flapjack: a memory-mapped CPU runtime for LLaMA-family models that can shrink the model it has just mapped, before it
//! serves the first token.
//!
//! The way data takes, from left to right; a module may use those before it and [`kernels`], never one behind it:
//!
//! ```text
//! file on disk ─► gguf ──► model ──► prune ───► runtime ──► generate ──► the command line
//!                 map      typed     profile,   kernels,    sampling     eval
//!                 views    weights   plan,      threads,
//!                          on the    apply in   KV cache
//!                          map       place
//! ```
//!
//! - [`hub`]: where model files come from.
//! - [`gguf`]: reading and writing GGUF, and the map itself.
//! - [`quant`]: the block formats of weights.
//! - [`kernels`]: the C kernels of `vendor/flapkern` behind a safe face, and the threads.
//! - [`model`]: configuration, weights as views on the map, one readable forward pass ([`model::Model::forward`]).
//! - [`prune`]: FLAP and beyond, in steps from plain data to plain data.
//! - [`tokenize`]: tokenizers from GGUF metadata.
//! - [`generate`]: sampler chain, stop conditions, sessions.
//! - [`eval`] measures perplexity and speed.
//!
//! Words: a *channel* is one hidden unit of an MLP; a *KV group* is a KV head and the query heads that read it; the
//! *ratio* of pruning is the share of the layers' attention and MLP weights, in parameters, that is removed. Matrices are
//! row-major `[out_features, in_features]`.
//!
//! ```no_run
//! use flapjack::{
//!     generate::*, gguf::GgufFile, kernels::Runtime, model::Model, progress, prune, tokenize::Tokenizer,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = GgufFile::open("model.gguf")?;
//! let tokenizer = Tokenizer::from_gguf(&file)?;
//! let mut model = Model::load(file)?;
//! let runtime = Runtime::new(2)?;
//!
//! let text = tokenizer.encode(prune::calibrate::TEXT)?;
//! let calibration = prune::Calibration { tokens: &text, bos: None, covariance: false };
//! let profile = prune::calibrate(&model, &runtime, calibration, &mut progress::ignore)?;
//! prune::flap(&mut model, &runtime, &profile, 0.3, &mut progress::ignore)?;
//!
//! let request = Request {
//!     prompt: tokenizer.encode_prompt("Once upon a time")?,
//!     max_tokens: 64,
//!     sampler: SamplerConfig::default(),
//!     stop: Vec::new(),
//!     ignore_end: false,
//! };
//! Session::new(&model, &runtime, 128).generate(&request, &tokenizer, &mut |text| {
//!     print!("{text}");
//!     Ok(())
//! })?;
//! # Ok(())
//! # }
//! ```

pub mod eval;
mod files;
pub mod generate;
pub mod gguf;
pub mod hub;
pub mod kernels;
pub mod model;
pub mod progress;
pub mod prune;
pub mod quant;
pub mod tokenize;
