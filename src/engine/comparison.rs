//! How much faster pruning has made the model, measured in turns with the dense one.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Engine, EngineError, Events, Stage, memory};
use crate::eval::median;
use crate::generate::{Generation, Request, SamplerConfig, Sequence, Timings};
use crate::model::{CacheType, KvPool, Model};
use crate::progress;

/// Turns of each model, unless they take too long.
const TURNS: usize = 5;
/// Fewer turns say nothing about how far they spread.
const FEWEST_TURNS: usize = 3;
/// No turn begins behind so much time, once there are enough.
const LONGEST: Duration = Duration::from_secs(8);
/// Tokens of the prompt that are read in a turn, and that are generated behind them, at the most.
const PROMPT: usize = 1024;
const GENERATED: usize = 32;

/// The speeds of a pruned model and of the dense one with the same prompt, in turns: what else the machine does meets both.
#[derive(Debug, Clone, Serialize)]
pub struct SpeedComparison {
    /// Tokens of the prompt that were read in each turn.
    pub prompt_tokens: usize,
    /// Tokens that were generated in each turn, one step for each.
    pub generated: usize,
    pub prompt: Turns,
    pub generation: Turns,
}

/// Tokens per second, turn by turn.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Turns {
    pub dense: Vec<f64>,
    /// As many, each measured right behind the one of the dense model.
    pub pruned: Vec<f64>,
}

/// What several turns came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of values, of which there is at least one.
    pub fn of(values: &[f64]) -> Self {
        Self {
            median: median(values),
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// Whether the values lie so far apart that something else must have kept the machine busy: by more than a quarter.
    pub fn is_wide(&self) -> bool {
        self.most - self.least > self.median / 4.0
    }
}

impl Turns {
    pub fn dense(&self) -> Spread {
        Spread::of(&self.dense)
    }

    pub fn pruned(&self) -> Spread {
        Spread::of(&self.pruned)
    }

    /// How many times as fast the pruned model is, by turns.
    pub fn ratio(&self) -> Spread {
        let pairs = self.pruned.iter().zip(&self.dense);
        let ratios: Vec<f64> = pairs.map(|(pruned, dense)| pruned / dense).collect();
        Spread::of(&ratios)
    }
}

impl Engine {
    /// Measures the pruned model and the dense one in turns, with the beginning of a prompt and some tokens behind it. The dense
    /// model is mapped again from its file, and packed if the pruned one is.
    ///
    /// # Errors
    /// If the file cannot be opened any more, or there is no memory for the dense model's packed weights; those of an answer; if
    /// `events` cancels.
    pub fn compare_speeds(
        &self,
        prompt: &[u32],
        sampler: &SamplerConfig,
        cache_type: CacheType,
        events: &mut Events,
    ) -> Result<SpeedComparison, EngineError> {
        Stage::Comparing.begin(events, TURNS)?;
        let dense = self.dense_beside()?;
        let request = Request {
            prompt: prompt[..prompt.len().min(PROMPT)].to_vec(),
            // The first one comes out of the prompt.
            max_tokens: GENERATED + 1,
            sampler: sampler.clone(),
            ignore_end: true,
            ..Request::default()
        };
        let time = |model: &Model, request: &Request| self.time(model, request, cache_type);
        // What is mapped anew has to be read once before its speed says anything.
        let once = Request {
            max_tokens: 2,
            ..request.clone()
        };
        time(&dense, &once)?;
        time(&self.model, &once)?;
        let begin = Instant::now();
        let mut generated = 0;
        let (mut prompts, mut generations) = (Turns::default(), Turns::default());
        for turn in 0..TURNS {
            if turn >= FEWEST_TURNS && begin.elapsed() > LONGEST {
                break;
            }
            for (model, prompts, generations) in [
                (&dense, &mut prompts.dense, &mut generations.dense),
                (&self.model, &mut prompts.pruned, &mut generations.pruned),
            ] {
                let timings = time(model, &request)?;
                generated = timings.steps;
                prompts.push(timings.prompt_speed());
                generations.extend(timings.generation_speed());
            }
            progress::report(&mut Stage::Comparing.progress(events), turn + 1, TURNS)?;
        }
        Ok(SpeedComparison {
            prompt_tokens: request.prompt.len(),
            generated,
            prompt: prompts,
            generation: generations,
        })
    }

    /// The dense model from a map of its own, beside the pruned one.
    pub(super) fn dense_beside(&self) -> Result<Model, EngineError> {
        self.must_have_file()?;
        let mut model = Model::load(self.file()?)?;
        if self.pack_time.is_some() {
            if let Some(shortage) = memory::packing_shortage(&model) {
                return Err(EngineError::DenseMemory { shortage });
            }
            model.pack(&self.runtime);
            model.narrow(&self.runtime);
        }
        Ok(model)
    }

    /// What a model takes for a request, in a sequence of its own.
    fn time(
        &self,
        model: &Model,
        request: &Request,
        cache_type: CacheType,
    ) -> Result<Timings, EngineError> {
        let pool = KvPool::new(model, cache_type)?;
        let positions = request.prompt.len() + request.max_tokens;
        let mut sequence = Sequence::new(pool.cache(positions));
        let tokenizer = self.tokenizer()?;
        let (runtime, sequence) = (&self.runtime, &mut sequence);
        let mut generation = Generation::new(model, runtime, tokenizer, sequence, request)?;
        while generation.step()?.is_some() {}
        Ok(*generation.timings())
    }
}
