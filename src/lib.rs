pub mod gguf;
pub mod hub;
pub mod kernels;
pub mod model;
pub mod quant;
pub mod tokenize;
