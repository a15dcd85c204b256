//! Measuring models, and texts with them: perplexity, likeness, speed, embeddings.

mod embedding;
mod likeness;
mod perplexity;
mod prediction;
mod speed;

pub use embedding::embedding;
pub use likeness::{Likeness, Predicted};
pub use perplexity::{Perplexity, PerplexityError, PerplexityOptions, perplexity};
pub use prediction::TokenTime;
pub use speed::{SpeedRun, SpeedTest, mean_and_deviation, median, read_bandwidth};
