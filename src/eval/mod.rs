//! Measuring models: perplexity and speed.

mod perplexity;
mod prediction;
mod speed;

pub use perplexity::{Perplexity, PerplexityError, PerplexityOptions, perplexity};
pub use prediction::TokenTime;
pub use speed::{SpeedRun, SpeedTest, mean_and_deviation, median, read_bandwidth};
