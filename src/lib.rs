pub mod gguf;
pub mod hub;
pub mod quant;
pub mod tokenize;
