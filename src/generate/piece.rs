//! Prompts beside answers that are under way: pieces of them that go through the model a few modules at a time.

use std::time::{Duration, Instant};

use super::scheduler::RequestId;
use crate::kernels::Team;
use crate::model::{KvCache, Model, ModelError, ModuleId, Scratch, Unobserved};

/// How long the steps of answers under way may take for a prompt that is read beside them, and how large its pieces are for that.
/// What comes out does not depend on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Seconds of a step of answers alone; 0 where there was none.
    step: f64,
    /// Tokens of a piece.
    tokens: usize,
}

/// How many times as long a step may take for a prompt.
const STRETCH: f64 = 1.75;
/// Tokens of the first piece, and the fewest and the most of one: few are slow for each, many take long in a single module.
const FIRST: usize = 32;
const FEWEST: usize = 16;
const MOST: usize = 256;
/// How much a new measurement counts.
const NEW: f64 = 0.25;

impl Default for Pace {
    fn default() -> Self {
        Self {
            step: 0.0,
            tokens: FIRST,
        }
    }
}

impl Pace {
    /// Tokens of the next piece.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What there is for a prompt in the next step.
    pub fn time(&self) -> Duration {
        Duration::from_secs_f64((STRETCH - 1.0) * self.step)
    }

    /// Takes down what the answers of a step took.
    pub fn answers_took(&mut self, time: Duration) {
        let time = time.as_secs_f64();
        self.step = if self.step > 0.0 {
            self.step + NEW * (time - self.step)
        } else {
            time
        };
    }

    /// Takes down what the slowest module took with a piece, which is never cut.
    pub fn slowest_module_took(&mut self, time: Duration) {
        if time > self.time() {
            self.tokens = (self.tokens / 2).max(FEWEST);
        } else if 3 * time < self.time() {
            self.tokens = (self.tokens * 2).min(MOST);
        }
    }
}

/// Tokens of one prompt on their way through the layers.
#[derive(Debug)]
pub(super) struct Piece {
    pub id: RequestId,
    pub tokens: usize,
    /// Of how many of them logits are wanted, from the last one backwards.
    pub wanted: usize,
    /// The module that comes next.
    next: ModuleId,
    pub scratch: Scratch,
    /// What a module took at most, and what one of each kind took the last time.
    pub slowest: Duration,
    last: [Duration; 2],
}

impl Piece {
    /// Tokens that follow those in the cache, with blocks for them.
    ///
    /// # Errors
    /// If the cache is of another model, has no room, or a token is not in the vocabulary.
    pub fn begin(
        (id, tokens, wanted): (RequestId, &[u32], usize),
        (model, team): (&Model, &Team),
        cache: &mut KvCache,
        mut scratch: Scratch,
    ) -> Result<Self, ModelError> {
        model.begin_prompt(team, tokens, cache, &mut scratch)?;
        Ok(Self {
            id,
            tokens: tokens.len(),
            wanted,
            next: ModuleId::attention(0),
            scratch,
            slowest: Duration::ZERO,
            last: [Duration::ZERO; 2],
        })
    }

    /// Goes through at least one more module, and through those that are likely to end in this time; through all if it is `None`.
    /// Says whether all are behind it: then the cache has the tokens, and the scratch what the logits are made from.
    ///
    /// # Errors
    /// If there is no memory for the cache.
    pub fn go_on(
        &mut self,
        (model, team): (&Model, &Team),
        cache: &mut KvCache,
        time: Option<Duration>,
    ) -> Result<bool, ModelError> {
        let end = ModuleId::all(model.layers.len()).end;
        let begin = Instant::now();
        let mut before = begin;
        while self.next < end {
            let kind = self.next.index() % 2;
            let likely_end = before - begin + self.last[kind];
            if before > begin && time.is_some_and(|time| likely_end > time) {
                return Ok(false);
            }
            let module = self.next..self.next.next();
            model.run_modules(team, module, cache, &mut self.scratch, &mut Unobserved)?;
            let now = Instant::now();
            self.last[kind] = now - before;
            self.slowest = self.slowest.max(self.last[kind]);
            (self.next, before) = (self.next.next(), now);
        }
        model.end_prompt(self.tokens, self.wanted, cache, &mut self.scratch);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_become_as_large_as_answers_beside_them_can_bear() {
        let ms = |n: f64| Duration::from_secs_f64(n / 1e3);
        let mut pace = Pace::default();
        assert_eq!(pace.time(), Duration::ZERO, "nothing is known");
        pace.answers_took(ms(8.0));
        assert_eq!(pace.time(), ms(8.0 * (STRETCH - 1.0)));
        assert_eq!(pace.tokens(), FIRST);
        pace.slowest_module_took(ms(1.0));
        assert_eq!(pace.tokens(), 2 * FIRST);
        // In the middle they stay.
        pace.slowest_module_took(ms(5.0));
        assert_eq!(pace.tokens(), 2 * FIRST);
        for _ in 0..10 {
            pace.slowest_module_took(ms(9.0));
        }
        assert_eq!(pace.tokens(), FEWEST);
        for _ in 0..10 {
            pace.slowest_module_took(ms(0.1));
        }
        assert_eq!(pace.tokens(), MOST);
        for _ in 0..50 {
            pace.answers_took(ms(20.0));
        }
        assert!(pace.time() > ms(19.9 * (STRETCH - 1.0)));
    }
}
