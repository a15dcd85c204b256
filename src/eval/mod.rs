//! Measuring models.

mod perplexity;

pub use perplexity::{Perplexity, PerplexityError, PerplexityOptions, perplexity};
