//! Healing behind pruning: what is refused beforehand, the text, the training itself, and what is kept of it.

use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::collection::CalibrationText;
use super::error::{EngineError, Unsuited};
use super::events::{Events, Stage};
use super::options::{HealOptions, PruneOptions};
use super::report::{HealReport, Notice};
use super::text::TextSource;
use super::{Engine, memory};
use crate::files::hexadecimal;
use crate::heal::{self, Budget, Healed, Trainer, Training, TrainingError, What};
use crate::model::Model;
use crate::prune::{HealEnd, HealRecord, OutcomeKey, Rewritten, Target};

/// Tokens times the model's parameters that two cores with AVX-512 and bfloat16 train on in a second (`docs/pruning.md`). How much text a budget in
/// time is given follows from it: more than is needed on slower machines, and less on faster ones, where the text comes again.
const TRAINED_A_SECOND: f64 = 4e10;
/// Tokens that are read of a text, or written, at the most.
const MOST_TOKENS: usize = 1 << 19;
/// How often training may see a text that the model writes. Writing a token takes about a third of the time that training on it takes.
const TIMES: f64 = 2.0;
/// Fewer tokens than this are not worth writing.
const LEAST_WRITTEN: usize = 4096;

/// A healing that can begin.
#[derive(Debug, Clone)]
pub(super) struct Healing {
    training: Training,
    /// Tokens of the source behind those of calibration and those that effects are measured on; empty where there are none.
    beyond: Vec<u32>,
    /// How many tokens the model is to write beyond those of the mixture; 0 for none.
    further: usize,
    /// What these are known by in the cache folder; empty for none.
    further_key: String,
    /// The tokens that it has written beyond the mixture, and how long that took.
    written: (Vec<u32>, Duration),
    /// Bytes that it may take, if these were set.
    limit: Option<u64>,
}

impl Healing {
    /// Refuses what cannot be healed, before anything takes long; `None` where nothing is removed that it could make up for.
    ///
    /// # Errors
    /// If the model has no file or there is no text, single weights are to go, the rate is of no use, or there is too little memory.
    pub fn prepare(engine: &Engine, options: &PruneOptions) -> Result<Option<Self>, EngineError> {
        let Some(heal) = options.heal else {
            return Ok(None);
        };
        if options.sparse.is_some() {
            return Err(EngineError::HealSparse);
        }
        if !heal::can_train(&engine.model) {
            let architecture = engine.model.config.architecture.name();
            return Err(EngineError::HealFamily { architecture });
        }
        let rate = heal.rate.unwrap_or(heal.what.rate());
        if !(rate.is_finite() && rate > 0.0) {
            return Err(EngineError::HealRate { rate });
        }
        if options.profile.is_some() {
            return Err(Unsuited::Healing.into());
        }
        if options.target == Target::Ratio(0.0) {
            return Ok(None);
        }
        engine.must_have_file()?;
        let limit = options.calibration.memory;
        memory::must_hold_healing(needed(&engine.model, heal, options.target), limit)?;
        Ok(Some(Self {
            training: Training {
                budget: heal.budget,
                rate,
                what: heal.what,
                seed: heal.seed,
            },
            beyond: Vec::new(),
            further: 0,
            further_key: String::new(),
            written: (Vec::new(), Duration::ZERO),
            limit,
        }))
    }

    /// Reads on in the text, behind what effects are measured on, as far as the budget needs it, and decides how much the model is to write
    /// beyond the mixture. Where a number of tokens was asked for, that is all of the text, and so is what is built in.
    ///
    /// # Errors
    /// If the text is of no use.
    pub fn prepare_text(
        &mut self,
        engine: &Engine,
        options: &PruneOptions,
        text: &CalibrationText,
    ) -> Result<(), EngineError> {
        let calibration = &options.calibration;
        let source = &calibration.source;
        if calibration.tokens.is_some()
            || !matches!(source, TextSource::Path(_) | TextSource::Mixture)
        {
            return Ok(());
        }
        let wanted = match self.training.budget {
            Budget::Tokens(tokens) => tokens,
            Budget::Time(time) => {
                let parameters = engine.model.parameters() as f64;
                (time.as_secs_f64() * TRAINED_A_SECOND / parameters) as usize
            }
        };
        let (wanted, there) = (wanted.min(MOST_TOKENS) as f64, text.tokens().len() as f64);
        let (mix, given) = (text.mix(), 1.0 - text.mix());
        let missing = (mix * (wanted / TIMES - there)).max(0.0) as usize;
        if missing >= LEAST_WRITTEN {
            (self.further, self.further_key) = (missing, text.further_key(missing));
        }
        if let TextSource::Path(_) = source {
            let before = text.read_tokens();
            let missing = (given * (wanted - there)).max(0.0) as usize;
            let (tokenizer, field) = (engine.tokenizer.as_deref(), calibration.field.as_deref());
            let all = before.saturating_add(missing);
            let mut tokens = source.first_tokens(tokenizer, field, all)?;
            self.beyond = tokens.split_off(before.min(tokens.len()));
        }
        Ok(())
    }

    /// Lets the model, which is dense still, write what it is to write for training.
    ///
    /// # Errors
    /// If that cannot be written, or `events` cancel.
    pub fn write(
        &mut self,
        engine: &Engine,
        text: &CalibrationText,
        events: &mut Events,
    ) -> Result<(), EngineError> {
        let start = Instant::now();
        let tokens = text.further(engine, self.further, events)?;
        self.written = (tokens, start.elapsed());
        Ok(())
    }

    /// What the outcome follows from, beside the model and how it was pruned.
    pub fn key(&self) -> String {
        let Training {
            budget,
            rate,
            what,
            seed,
        } = self.training;
        let bytes: Vec<u8> = self.beyond.iter().flat_map(|id| id.to_le_bytes()).collect();
        let text = hexadecimal(&Sha256::digest(bytes));
        let (beyond, bits) = (self.beyond.len(), rate.to_bits());
        let further = &self.further_key;
        format!("{budget} {bits:08x} {what} {seed} {beyond} {text} {further}")
    }

    /// Puts the weights that were trained before in their place.
    ///
    /// # Errors
    /// If they are not this model's.
    pub fn again(
        &self,
        engine: &mut Engine,
        (record, weights): &(HealRecord, Rewritten),
    ) -> Result<HealReport, EngineError> {
        if record.end == HealEnd::Healed {
            let applied = weights.apply(&mut engine.model, &engine.runtime);
            engine.touch();
            applied.map_err(crate::prune::PruneError::from)?;
        }
        Ok(self.report(record, 0, true))
    }

    fn report(&self, record: &HealRecord, resumed: usize, repeated: bool) -> HealReport {
        HealReport {
            tokens: record.tokens,
            steps: record.steps,
            resumed,
            what: self.training.what,
            rate: self.training.rate,
            held_back: record.held_back,
            before: record.before,
            after: record.after,
            end: record.end,
            time: Duration::from_secs_f64(record.seconds),
            repeated,
        }
    }

    /// Trains the pruned model. `key` is what the outcome is known by, if it is kept. Returns what to keep, too; `None` if it was
    /// broken off.
    ///
    /// # Errors
    /// If the text is too short, or there is too little memory; the model is as pruning left it then.
    pub fn carry_out(
        &self,
        engine: &mut Engine,
        (tokens, bos): (&[u32], Option<u32>),
        key: Option<&OutcomeKey>,
        notices: &mut Vec<Notice>,
        events: &mut Events,
    ) -> Result<(HealReport, Option<(HealRecord, Rewritten)>), EngineError> {
        let start = Instant::now();
        let what = self.training.what;
        memory::must_hold_healing(heal::bytes(&engine.model, what, 1.0), self.limit)?;
        let teacher = engine.dense_beside()?;
        let (written, writing) = &self.written;
        // The trainer holds back the last sequences, and these are to be of the calibration text.
        let text = [written, tokens, &self.beyond].concat();
        let mut training = self.training;
        if let Budget::Time(time) = &mut training.budget {
            *time = time.saturating_sub(*writing);
        }
        let trained = heal::trained(&engine.model, what);
        let checkpoint = key.and_then(|key| engine.cache.checkpoint(key, trained, notices));
        let mut record = HealRecord {
            tokens: 0,
            steps: 0,
            seconds: 0.0,
            held_back: 0,
            before: f64::NAN,
            after: f64::NAN,
            end: HealEnd::Cancelled,
        };
        let result = {
            let mut trainer = trainer(engine, &teacher, training, &text, bos)?;
            trainer.checkpoints.clone_from(&checkpoint);
            record.held_back = trainer.held_back();
            record.before = trainer.divergence(&engine.model)?;
            record.after = record.before;
            trainer.run(&mut Stage::Healing.progress(events))
        };
        let Healed {
            weights,
            tokens,
            steps,
            time,
            resumed,
        } = match result {
            Ok(healed) => healed,
            Err(TrainingError::Cancelled(_)) => {
                record.seconds = start.elapsed().as_secs_f64();
                return Ok((self.report(&record, 0, false), None));
            }
            Err(TrainingError::NotNumbers { step }) => {
                record.end = HealEnd::Diverged;
                record.steps = step;
                record.seconds = start.elapsed().as_secs_f64();
                return Ok((self.report(&record, 0, false), None));
            }
            Err(error) => return Err(error.into()),
        };
        (record.tokens, record.steps) = (tokens, steps);
        record.seconds = time.as_secs_f64();
        let before = match what {
            What::All | What::LowRank => Rewritten::of(&engine.model),
            What::Norms => Rewritten::vectors_of(&engine.model),
        };
        let put = |engine: &mut Engine, weights: &Rewritten| {
            let applied = weights.apply(&mut engine.model, &engine.runtime);
            applied.expect("they were made for this model");
            engine.touch();
        };
        put(engine, &weights);
        let trainer = trainer(engine, &teacher, training, &text, bos)?;
        record.after = trainer.divergence(&engine.model)?;
        let kept = match record.after < record.before {
            true => {
                record.end = HealEnd::Healed;
                weights
            }
            false => {
                put(engine, &before);
                record.end = HealEnd::NotBetter;
                Rewritten::vectors_of(&engine.model)
            }
        };
        if let Some((path, _)) = checkpoint {
            // It may never have been written.
            let _ = std::fs::remove_file(path);
        }
        Ok((self.report(&record, resumed, false), Some((record, kept))))
    }
}

fn trainer<'m>(
    engine: &'m Engine,
    teacher: &'m Model,
    training: Training,
    tokens: &[u32],
    bos: Option<u32>,
) -> Result<Trainer<'m>, TrainingError> {
    Trainer::new(
        (teacher, &engine.model),
        &engine.runtime,
        training,
        tokens,
        bos,
    )
}

/// About as many bytes as healing will take behind pruning to a target.
pub(super) fn needed(model: &Model, options: HealOptions, target: Target) -> u64 {
    let share = match target {
        Target::Ratio(ratio) => 1.0 - ratio,
        // Only pruning tells.
        _ => 0.1,
    };
    heal::bytes(model, options.what, share)
}
