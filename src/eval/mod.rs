//! Measuring models, and texts with them: perplexity, likeness, speed, embeddings.

mod embedding;
mod likeness;
mod perplexity;
mod prediction;
mod reading;
mod speed;

pub use embedding::embedding;
pub use likeness::{Likeness, Predicted};
pub use perplexity::{Perplexity, PerplexityError, PerplexityOptions, perplexity};
pub use prediction::TokenTime;
pub use reading::{LEAST as READING_LEAST, fastest_reading, reading_type};
pub use speed::{SpeedRun, SpeedTest, mean_and_deviation, median, read_bandwidth};
