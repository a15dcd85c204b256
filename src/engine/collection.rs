//! A profile that is found in the cache folder, or else collected from a text that goes through the model now.

use std::time::{Duration, Instant};

use super::Engine;
use super::error::{Doing, EngineError};
use super::events::{Events, Shared, Stage};
use super::memory::Room;
use super::needs::{Covariances, Needs, Shares};
use super::options::{CalibrationOptions, MethodOptions};
use super::profile::Calibrated;
use super::report::{CalibrationReport, CurvesReport, Notice, ProfileFrom};
use super::text::TextSource;
use crate::count::count;
use crate::generate::Texts;
use crate::model::{Layer, Model};
use crate::prune::{
    self, Calibration, Effort, Evidence, Groups, Origin, Profile, Recipe, Restore, StoredProfile,
    calibrate, curves, groups, sequential, store,
};

/// Tokens that are used of a text that is not the built-in one, at normal effort and at best. Least squares gain by more text
/// for long: with three times as much, 5 % of the perplexity (`docs/pruning.md`).
const TEXT_TOKENS: usize = 32_768;
const BEST_TEXT_TOKENS: usize = 98_304;
/// Tokens that are used of any text at fast effort.
const FAST_TOKENS: usize = 4096;
/// Tokens behind the calibration text that the effect of pruning is measured on.
pub(super) const EFFECT_TOKENS: usize = 1024;
/// Goes up whenever the way changes in which models write text.
const OWN_TEXT_VERSION: u32 = 1;

/// A text, and what is to be collected from it, unless that was done before.
#[derive(Debug)]
pub(super) struct Collection {
    /// What the text is enough for.
    pub recipe: Recipe,
    pub notices: Vec<Notice>,
    /// Whether packed weights must make room.
    pub unpack: bool,
    origin: Origin,
    text: CalibrationText,
    needs: Needs,
    shares: Shares,
    /// Whether the cache folder is asked, and keeps what is collected.
    cached: bool,
    /// What it took so far.
    time: Duration,
}

/// A text of which no profile is collected.
#[derive(Debug)]
pub(super) struct TextAlone {
    pub text: CalibrationText,
    pub notices: Vec<Notice>,
    /// The fingerprint of the model's file.
    model: String,
    /// What it took so far.
    time: Duration,
}

/// A text for calibration.
#[derive(Debug)]
pub(super) struct CalibrationText {
    source: TextSource,
    /// Zeros where the model has not written them yet.
    tokens: Vec<u32>,
    /// Whether they are the text.
    is_there: bool,
    /// Tokens of the source that follow those: [`EFFECT_TOKENS`], or fewer at its end.
    beyond: Vec<u32>,
    bos: Option<u32>,
    /// The SHA-256 of the tokens, or of how the model writes them.
    hash: String,
}

/// A text that is shared out.
struct Parts<'a> {
    statistics: &'a [u32],
    curves: &'a [u32],
    judge: &'a [u32],
}

impl Collection {
    /// Reads the text and decides what is collected from it; everything up to where the work begins. `judge` tokens are kept
    /// for judging, if the text has four times as many. `room` is the memory that there is.
    pub fn prepare(
        engine: &Engine,
        method: &MethodOptions,
        options: &CalibrationOptions,
        judge: usize,
        cached: bool,
        room: Room,
    ) -> Result<Self, EngineError> {
        let start = Instant::now();
        let mut notices = Vec::new();
        let model = &engine.model;
        let text = CalibrationText::read(engine, options, method.effort, &mut notices)?;
        let recipe = method.recipe_with_text(model, text.tokens.len(), room.half());
        let allotted = room.allot(
            model,
            &engine.runtime,
            recipe,
            text.tokens.len(),
            options.memory,
        )?;
        notices.extend(allotted.unpack.map(Notice::UnpackedToPrune));
        if recipe.restore == Restore::Sequential {
            let bytes = sequential::bytes(model, text.tokens.len());
            notices.push(Notice::InSequence { bytes });
        }
        let covariances = Covariances::that_fit(model, recipe, allotted, &mut notices)?;
        let needs = Needs::new(recipe, method.effort, covariances, judge);
        let shares = needs
            .share_out(text.tokens.len())
            .map_err(EngineError::from)
            .map_err(EngineError::at(text.calibrating()))?;
        let (fingerprint, model_name) = engine.identity()?;
        let origin = Origin {
            model: fingerprint,
            model_name,
            text: text.hash.clone(),
            source: text.source.to_string(),
            tokens: text.tokens.len(),
            collected: needs.collected(),
            flapjack: env!("CARGO_PKG_VERSION").to_owned(),
        };
        Ok(Self {
            recipe,
            notices,
            unpack: allotted.unpack.is_some(),
            origin,
            text,
            needs,
            shares,
            cached,
            time: start.elapsed(),
        })
    }

    /// The report of a profile that is in the cache folder and need not be read; `None` if there is none.
    pub fn unread(&self, engine: &Engine) -> Option<CalibrationReport> {
        let hash = self
            .cached
            .then(|| engine.cache.profile_hash(&self.origin))??;
        Some(self.report(ProfileFrom::Unread, hash, self.time))
    }

    /// The profile, from the cache folder or collected now.
    pub fn carry_out(
        mut self,
        engine: &Engine,
        events: &mut Events,
    ) -> Result<Calibrated, EngineError> {
        let start = Instant::now();
        let kept = self.kept(engine);
        if self.reads_text(kept.is_some()) {
            self.text.write(engine, events)?;
        }
        let mut groups = self.groups(&engine.model, kept.is_none());
        let mut notices = Vec::new();
        let (stored, report) = match kept {
            Some((stored, hash)) => {
                let time = self.time + start.elapsed();
                (stored, self.report(ProfileFrom::File, hash, time))
            }
            None => self.collect(engine, groups.as_mut(), start, &mut notices, events)?,
        };
        Ok(Calibrated {
            stored,
            report: CalibrationReport {
                groups: groups.as_ref().map(|groups| groups.ranges().len()),
                ..report
            },
            notices,
            judge: self.parts().judge.to_vec(),
            unseen: self.unseen(),
            bos: self.text.bos,
            unpack: self.unpack,
            text: match self.recipe.restore {
                Restore::Sequential => self.parts().statistics.to_vec(),
                _ => Vec::new(),
            },
            groups,
        })
    }

    /// Whether the text is the built-in one.
    pub fn is_built_in(&self) -> bool {
        self.text.is_built_in()
    }

    pub fn text(&self) -> &CalibrationText {
        &self.text
    }

    /// What is said before it begins, to which more may be added.
    pub fn notices_mut(&mut self) -> &mut Vec<Notice> {
        &mut self.notices
    }

    /// The tokens that are there but for those that are kept for judging.
    pub fn unjudged(&self) -> &[u32] {
        let tokens = self.text.tokens();
        let judged = self.shares.statistics + self.shares.curves;
        &tokens[..judged.min(tokens.len())]
    }

    /// The text. One that the model writes itself is there only when it is [written](CalibrationText::write).
    pub fn text_mut(&mut self) -> &mut CalibrationText {
        &mut self.text
    }

    /// The profile of an earlier run, and its hash.
    fn kept(&self, engine: &Engine) -> Option<(StoredProfile, String)> {
        if !self.cached {
            return None;
        }
        let (profile, hash) = engine.cache.find_profile(&self.origin)?;
        let origin = self.origin.clone();
        Some((StoredProfile { origin, profile }, hash))
    }

    /// Whether anything reads the text itself.
    fn reads_text(&self, kept: bool) -> bool {
        !kept
            || self.recipe.restore == Restore::Sequential
            || self.needs.judge > 0
            || matches!(self.needs.covariances, Covariances::InGroups(_))
    }

    /// Collects the profile and keeps it for the next run. `start` is when that began.
    fn collect(
        &self,
        engine: &Engine,
        groups: Option<&mut Groups>,
        start: Instant,
        notices: &mut Vec<Notice>,
        events: &mut Events,
    ) -> Result<(StoredProfile, CalibrationReport), EngineError> {
        let mut profile = self.statistics(engine, events)?;
        let time = self.time + start.elapsed();
        let curves = self.curves(engine, &mut profile, groups, events)?;
        let stored = StoredProfile {
            origin: self.origin.clone(),
            profile,
        };
        let hash = match self.cached {
            true => engine.cache.keep_profile(&stored, notices),
            false => None,
        };
        let hash = hash.unwrap_or_else(|| stored.hash());
        let report = self.report(ProfileFrom::Now, hash, time);
        Ok((stored, CalibrationReport { curves, ..report }))
    }

    /// Means and variances of what the projections see of the text, and covariances where they are held all at once.
    fn statistics(&self, engine: &Engine, events: &mut Events) -> Result<Profile, EngineError> {
        let text = self.calibration(self.parts().statistics);
        let (model, runtime) = (&engine.model, &engine.runtime);
        Stage::Calibrating.begin(events, text.tokens.len())?;
        let progress = &mut Stage::Calibrating.progress(events);
        prune::calibrate(model, runtime, text, progress)
            .map_err(EngineError::from)
            .map_err(EngineError::at(self.text.calibrating()))
    }

    /// Measures loss curves, where they are needed, on text that the statistics have not seen.
    fn curves(
        &self,
        engine: &Engine,
        profile: &mut Profile,
        groups: Option<&mut Groups>,
        events: &mut Events,
    ) -> Result<Option<CurvesReport>, EngineError> {
        let Some(options) = &self.needs.curves else {
            return Ok(None);
        };
        let start = Instant::now();
        let text = self.calibration(self.parts().curves);
        let (model, runtime) = (&engine.model, &engine.runtime);
        Stage::Curves.begin(events, 2 * model.layers.len())?;
        let events = Shared::new(events);
        let passes = &mut events.progress(Stage::Covariances);
        let evidence = match groups {
            Some(groups) => Evidence::in_groups(profile, groups, passes),
            None => Evidence::profile(profile),
        };
        let modules = &mut events.progress(Stage::Curves);
        let doing = Doing::Curves {
            text: self.text.source.to_string(),
        };
        let curves = curves::measure(model, runtime, evidence, text, options, modules)
            .map_err(EngineError::from)
            .map_err(EngineError::at(doing))?;
        let tokens = curves.tokens;
        profile.curves = Some(curves);
        Ok(Some(CurvesReport {
            tokens,
            time: start.elapsed(),
        }))
    }

    /// The groups of layers that covariances are collected in, where they do not fit all at once. What that costs is said
    /// before it is paid.
    fn groups(&self, model: &Model, collects: bool) -> Option<Groups> {
        let Covariances::InGroups(ranges) = &self.needs.covariances else {
            return None;
        };
        let bytes =
            |layers: &[Layer]| layers.iter().map(groups::covariance_bytes).sum::<u64>() >> 20;
        let largest = ranges.iter().map(|r| bytes(&model.layers[r.clone()])).max();
        let text = self.calibration(self.parts().statistics);
        tracing::info!(
            "covariances of {} MiB are collected in {} of layers, of at most {} MiB each, which takes {:.1} times the {} through the model",
            bytes(&model.layers),
            count(ranges.len(), "group"),
            largest.unwrap_or(0),
            groups::passes(ranges, collects && self.needs.curves.is_some()),
            count(text.tokens.len(), "token"),
        );
        Some(Groups::new(ranges.clone(), text))
    }

    fn calibration<'a>(&self, tokens: &'a [u32]) -> Calibration<'a> {
        Calibration {
            tokens,
            bos: self.text.bos,
            covariance: self.needs.covariances == Covariances::All,
        }
    }

    fn parts(&self) -> Parts<'_> {
        let (statistics, rest) = self.text.tokens.split_at(self.shares.statistics);
        let (curves, judge) = rest.split_at(self.shares.curves);
        Parts {
            statistics,
            curves,
            judge,
        }
    }

    /// See [`Calibrated::unseen`].
    fn unseen(&self) -> Vec<u32> {
        if self.is_built_in() || !self.text.is_there {
            return Vec::new();
        }
        let beyond = self.text.unseen();
        if !beyond.is_empty() {
            return beyond;
        }
        let curves = self.parts().curves;
        curves[..curves.len().min(EFFECT_TOKENS)].to_vec()
    }

    fn report(&self, profile: ProfileFrom, hash: String, time: Duration) -> CalibrationReport {
        CalibrationReport {
            source: self.origin.source.clone(),
            tokens: self.shares.statistics,
            all_tokens: self.origin.tokens,
            profile,
            hash,
            model: self.origin.model.clone(),
            time,
            curves: None,
            groups: None,
            notices: self.notices.clone(),
        }
    }
}

impl TextAlone {
    /// Reads a text.
    pub fn read(
        engine: &Engine,
        options: &CalibrationOptions,
        effort: Effort,
    ) -> Result<Self, EngineError> {
        let start = Instant::now();
        let mut notices = Vec::new();
        let text = CalibrationText::read(engine, options, effort, &mut notices)?;
        Ok(Self {
            text,
            notices,
            model: engine.identity()?.0,
            time: start.elapsed(),
        })
    }

    /// What it took, where so many of its tokens were used.
    pub fn report(&self, tokens: usize) -> CalibrationReport {
        CalibrationReport {
            source: self.text.name(),
            tokens,
            all_tokens: self.text.tokens().len(),
            profile: ProfileFrom::NotNeeded,
            hash: String::new(),
            model: self.model.clone(),
            time: self.time,
            curves: None,
            groups: None,
            notices: self.notices.clone(),
        }
    }
}

impl CalibrationText {
    fn read(
        engine: &Engine,
        options: &CalibrationOptions,
        effort: Effort,
        notices: &mut Vec<Notice>,
    ) -> Result<Self, EngineError> {
        let source = options.source.clone();
        let bos = engine.bos();
        // Own text is known by how it is made, so that it need not be made to find its profile.
        if let TextSource::Own(written) = source {
            let tokens = options.tokens.map_or(written, |limit| written.min(limit));
            notices.extend(fewer_tokens(&source, tokens, options.tokens));
            let making = ("own text", OWN_TEXT_VERSION, tokens);
            return Ok(Self {
                source,
                tokens: vec![0; tokens],
                is_there: false,
                beyond: Vec::new(),
                bos,
                hash: store::hash_making(&making),
            });
        }
        let limit = options.tokens.unwrap_or(most_tokens(&source, effort));
        let all = limit.saturating_add(EFFECT_TOKENS);
        let tokenizer = engine.tokenizer.as_deref();
        let mut tokens = source.first_tokens(tokenizer, options.field.as_deref(), all)?;
        let beyond = tokens.split_off(limit.min(tokens.len()));
        notices.extend(fewer_tokens(&source, tokens.len(), options.tokens));
        if options.tokens.is_none() && tokens.len() == limit {
            notices.push(Notice::FirstTokens {
                source: source.to_string(),
                tokens: limit,
            });
        }
        Ok(Self {
            hash: store::hash_tokens(&tokens, bos),
            source,
            tokens,
            is_there: true,
            beyond,
            bos,
        })
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// What messages call it.
    pub fn name(&self) -> String {
        self.source.to_string()
    }

    pub fn is_built_in(&self) -> bool {
        matches!(self.source, TextSource::BuiltIn)
    }

    /// Tokens of the source behind the text, for measuring the effect of pruning; empty where there are too few, or the source is the
    /// built-in text.
    pub fn unseen(&self) -> Vec<u32> {
        match self.is_there && !self.is_built_in() && self.beyond.len() == EFFECT_TOKENS {
            true => self.beyond.clone(),
            false => Vec::new(),
        }
    }

    /// Lets the model write the tokens, in texts that fill a sequence of calibration each, unless they are there.
    pub fn write(&mut self, engine: &Engine, events: &mut Events) -> Result<(), EngineError> {
        if self.is_there {
            return Ok(());
        }
        let tokenizer = engine.tokenizer()?;
        let sequence = calibrate::SEQUENCE.min(engine.model.config.context_length);
        // Where calibration puts the token that begins texts in front, it is not part of the text.
        let skip = usize::from(self.bos.is_some());
        // A control token says nothing by itself.
        let starts: Vec<u32> = (0..tokenizer.vocab_size() as u32)
            .filter(|token| !tokenizer.token_bytes(*token).is_empty())
            .collect();
        let texts = Texts {
            count: self.tokens.len().div_ceil((sequence - skip).max(1)),
            tokens: sequence,
            bos: self.bos,
            starts: &starts,
            vocabulary: tokenizer.vocab_size(),
            seed: 0,
        };
        let progress = &mut Stage::Writing.progress(events);
        let written = texts
            .write(&engine.model, &engine.runtime, progress)
            .map_err(EngineError::from)
            .map_err(EngineError::at(Doing::OwnText))?;
        let tokens = written.iter().flat_map(|text| &text[skip..]).copied();
        self.tokens = tokens.take(self.tokens.len()).collect();
        self.is_there = true;
        let beginning = &self.tokens[..self.tokens.len().min(sequence)];
        tracing::debug!("the model wrote: {:?}", tokenizer.decode(beginning));
        Ok(())
    }

    fn calibrating(&self) -> Doing {
        let text = self.source.to_string();
        Doing::Calibrating { text }
    }
}

/// Whether a text is shorter than was asked for.
fn fewer_tokens(source: &TextSource, tokens: usize, asked: Option<usize>) -> Option<Notice> {
    let asked = asked.filter(|asked| *asked > tokens)?;
    Some(Notice::FewerTokens {
        source: source.to_string(),
        tokens,
        asked,
    })
}

/// Tokens that are used of a text unless another number is asked for.
fn most_tokens(source: &TextSource, effort: Effort) -> usize {
    match (source, effort) {
        (_, Effort::Fast) => FAST_TOKENS,
        (TextSource::BuiltIn, _) => usize::MAX,
        (_, Effort::Best) => BEST_TEXT_TOKENS,
        _ => TEXT_TOKENS,
    }
}
