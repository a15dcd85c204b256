//! Mirostat 2.0: the surprise of the text is kept near a target by letting it lead how surprising a token may be.

use super::SamplerConfig;
use super::candidates::{Candidate, Candidates};

/// How surprising a token may be now, in bits (μ of the paper).
#[derive(Debug, Clone, Copy)]
pub(super) struct Mirostat {
    most: f32,
}

impl Mirostat {
    pub fn new(config: &SamplerConfig) -> Self {
        Self {
            most: 2.0 * config.mirostat_tau,
        }
    }

    /// Draws a token that is not too surprising, and learns from how surprising it was.
    pub fn draw(
        &mut self,
        candidates: &mut Candidates,
        config: &SamplerConfig,
        uniform: f64,
    ) -> Candidate {
        candidates.probable();
        candidates.retain(|item| -item.p.log2() <= self.most);
        let drawn = candidates.draw(uniform);
        let error = -drawn.p.log2() - config.mirostat_tau;
        self.most -= config.mirostat_eta * error;
        drawn
    }
}
