//! What flapjack must do, a module for each of its parts, in one program: each program more would link the library again, and
//! its tests would wait for those of the one before.

mod batches;
mod bench;
mod block_formats;
mod calibration;
mod cancel;
mod cli;
mod common;
mod ending;
mod engine;
mod export;
mod generate;
mod gguf;
mod habits;
mod hub;
mod inspect;
mod interrupt;
mod kernels;
mod memory;
mod model;
mod odd_files;
mod outcome;
mod overrides;
mod perplexity;
mod progress;
mod prune;
mod prune_steps;
mod quant;
mod sampling;
mod scheduler;
mod search;
mod stop;
mod streams;
mod substitute;
mod synthetic;
mod tokenizer;
