//! What can be chosen.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// As many batches as reach so many tokens.
    Tokens(usize),
    /// As many as should take so long, by what the first few take.
    Time(Duration),
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// All weights of the layers, and norms and biases.
    #[default]
    All,
    /// A change of low rank for each matrix of the layers, and norms and biases.
    LowRank,
    /// Norms and biases alone.
    Norms,
}

impl What {
    pub const ALL: &[Self] = &[Self::All, Self::LowRank, Self::Norms];

    pub const fn name(self) -> &'static str {
        match self {
            What::All => "all",
            What::LowRank => "low-rank",
            What::Norms => "norms",
        }
    }

    /// The learning rate unless another is asked for.
    pub const fn rate(self) -> f32 {
        match self {
            What::All => 2e-4,
            What::LowRank => 7e-4,
            What::Norms => 2e-3,
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Tokens(tokens) => write!(f, "{tokens} tokens"),
            Budget::Time(time) => write!(f, "{} s", time.as_secs_f64()),
        }
    }
}

/// How to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Training {
    pub budget: Budget,
    /// The highest learning rate.
    pub rate: f32,
    pub what: What,
    /// The order of the text follows from it.
    pub seed: u64,
}
