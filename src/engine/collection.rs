//! A profile that is found in the cache folder, or else collected from a text that goes through the model now.

use std::time::{Duration, Instant};

use super::Engine;
use super::effort::{self, Amounts, Asked};
use super::error::{Doing, EngineError};
use super::events::{Events, Shared, Stage};
use super::memory::Room;
use super::mixture::{self, Mixed, Mixture, Wanted};
use super::needs::{Covariances, Needs, Shares};
use super::options::{CalibrationOptions, MethodOptions};
use super::partial::Partial;
use super::profile::Calibrated;
use super::report::{CalibrationReport, CurvesReport, Notice, ProfileFrom};
use super::text::TextSource;
use crate::count::count;
use crate::model::{Layer, Model};
use crate::prune::curves::Onwards;
use crate::prune::{
    self, Calibration, Effort, Evidence, Groups, LayerProfile, Method, Origin, Profile, Recipe,
    Restore, StoredProfile, curves, groups, sequential, store,
};

/// More of what can be made without end would take days.
const MOST_MADE: usize = 1 << 24;
/// The share of the mixture that the default method keeps beside a text that was named.
const MIX: f64 = 0.25;
/// A text, and what is to be collected from it, unless that was done before.
#[derive(Debug)]
pub(super) struct Collection {
    /// What the text is enough for.
    pub recipe: Recipe,
    /// Plans that a search tries without a budget; 0 for no search.
    pub plans: usize,
    pub notices: Vec<Notice>,
    /// Whether packed weights must make room.
    pub unpack: bool,
    origin: Origin,
    text: CalibrationText,
    needs: Needs,
    shares: Shares,
    /// Whether the cache folder is asked, and keeps what is collected.
    cached: bool,
    /// Whether the text is wanted even where the profile is in the cache folder.
    keeps_text: bool,
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
    /// What messages call it.
    name: String,
    /// How it is made; `None` for what only has to be read.
    mixture: Option<Mixture>,
    /// The share of the mixture in it.
    mix: f64,
    /// Zeros where the text is not made yet.
    tokens: Vec<u32>,
    /// Whether they are the text.
    is_there: bool,
    /// Tokens of the source that are not in the text: as many as effects are measured on, or fewer where the source ends.
    beyond: Vec<u32>,
    /// Tokens that were read of the source, those behind the text included; none where it is not read.
    read: usize,
    /// Tokens that effects are measured on, at the most.
    effect: usize,
    /// Tokens of the mixture that are not in the text; none where it is not made, or has no mixture in it.
    held_back: Vec<u32>,
    bos: Option<u32>,
    /// The SHA-256 of the tokens, or of how they are made.
    hash: String,
    /// Whether the cache folder is asked, and keeps what the model writes.
    cached: bool,
}

/// How many tokens are read.
#[derive(Debug, Clone, Copy)]
struct Most {
    /// Those of the text, unless the options have another number.
    tokens: usize,
    /// Those behind it that effects are measured on.
    effect: usize,
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
        let mix = match method.method {
            Method::Best => MIX,
            _ => 0.0,
        };
        let mix = mix_of(options, mix);
        let amounts = Amounts::that_fit(model, asked(method, options, mix));
        let most = Most {
            tokens: amounts.tokens,
            effect: amounts.effect,
        };
        let text = CalibrationText::read(engine, options, mix, most, cached, &mut notices)?;
        let recipe = method.recipe_with_text(model, text.tokens.len(), room.half());
        let recipe = amounts.change(recipe, method);
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
        let levels = amounts.curves.clone();
        let levels = levels.unwrap_or_else(|| method.effort.curve_levels());
        let needs = Needs::new(recipe, levels, covariances, judge);
        let shares = needs
            .share_out(text.tokens.len())
            .map_err(EngineError::from)
            .map_err(EngineError::at(text.calibrating()))?;
        let (fingerprint, model_name) = engine.identity()?;
        let origin = Origin {
            model: fingerprint,
            model_name,
            text: text.hash.clone(),
            source: text.name.clone(),
            tokens: text.tokens.len(),
            collected: needs.collected(),
            flapjack: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if !cached || engine.cache.profile_hash(&origin).is_none() {
            notices.extend(amounts.notice(method.effort, recipe, &origin));
        }
        Ok(Self {
            recipe,
            notices,
            unpack: allotted.unpack.is_some(),
            plans: amounts.plans,
            origin,
            text,
            needs,
            shares,
            cached,
            keeps_text: false,
            time: start.elapsed(),
        })
    }

    /// Makes the text where it is not there, also if the profile need not be collected.
    pub fn keep_text(&mut self) {
        self.keeps_text = true;
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
        match self.reads_text(kept.is_some()) {
            true => self.write(engine, events)?,
            false => self.find_text(engine),
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
            curves: self.parts().curves.to_vec(),
            unseen: self.text.beyond.clone(),
            held_back: self.text.held_back.clone(),
            bos: self.text.bos,
            unpack: self.unpack,
            text: match self.recipe.restore {
                Restore::Sequential => self.parts().statistics.to_vec(),
                _ => Vec::new(),
            },
            groups,
        })
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

    /// Makes the text, unless it is there.
    pub fn write(&mut self, engine: &Engine, events: &mut Events) -> Result<(), EngineError> {
        let wanted = self.wanted();
        self.text.write(engine, wanted, events)
    }

    /// Takes the text from the cache folder, if it has to be made and is there.
    pub fn find_text(&mut self, engine: &Engine) {
        let wanted = self.wanted();
        self.text.find(engine, wanted);
    }

    /// How much is to be made of the text.
    fn wanted(&self) -> Wanted {
        let levels = self.needs.curves.as_ref().map(|options| &options.levels);
        let sequence = levels.map_or(curves::SEQUENCE, |levels| levels.sequence);
        self.text.wanted(self.shares, sequence)
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
            || self.keeps_text
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
        let (mut partial, begun) = Partial::begin(engine, &self.origin, self.cached);
        let resumed = begun
            .as_ref()
            .map_or(0, |begun| begun.tokens(&engine.model, self.text.bos));
        let mut profile = self.statistics(engine, begun, &mut partial, events)?;
        let time = self.time + start.elapsed();
        let curves = self.curves(engine, &mut profile, groups, &mut partial, events)?;
        let stored = StoredProfile {
            origin: self.origin.clone(),
            profile,
        };
        let hash = match self.cached {
            true => engine.cache.keep_profile(&stored, notices),
            false => None,
        };
        partial.remove();
        let hash = hash.unwrap_or_else(|| stored.hash());
        let report = self.report(ProfileFrom::Now, hash, time);
        let report = CalibrationReport {
            resumed,
            curves,
            ..report
        };
        Ok((stored, report))
    }

    /// Means and variances of what the projections see of the text, and covariances where they are held all at once. `begun` is what an
    /// earlier run has collected.
    fn statistics(
        &self,
        engine: &Engine,
        begun: Option<Profile>,
        partial: &mut Partial,
        events: &mut Events,
    ) -> Result<Profile, EngineError> {
        let text = self.calibration(self.parts().statistics);
        let (model, runtime) = (&engine.model, &engine.runtime);
        if begun.is_some() {
            tracing::info!("calibration goes on from where an earlier run was broken off");
        }
        let (begun, curves) = begun.map_or((None, None), |b| (Some(b.layers), b.curves));
        Stage::Calibrating.begin(events, text.tokens.len())?;
        let progress = &mut Stage::Calibrating.progress(events);
        let so_far = &mut |layers: &[LayerProfile], ends| partial.keep(layers, None, ends);
        let mut profile = prune::calibrate_onwards(model, runtime, text, begun, so_far, progress)
            .map_err(EngineError::from)
            .map_err(EngineError::at(self.text.calibrating()))?;
        profile.curves = curves;
        Ok(profile)
    }

    /// Measures loss curves, where they are needed, on text that the statistics have not seen. Those that the profile has are not
    /// measured again.
    fn curves(
        &self,
        engine: &Engine,
        profile: &mut Profile,
        groups: Option<&mut Groups>,
        partial: &mut Partial,
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
        let begun = profile.curves.take().map_or(Vec::new(), |c| c.modules);
        let layers = &profile.layers;
        let onwards = Onwards {
            begun,
            so_far: &mut |curves, ends| partial.keep(layers, Some(curves), ends),
        };
        let evidence = match groups {
            Some(groups) => Evidence::in_groups(profile, groups, passes),
            None => Evidence::profile(profile),
        };
        let modules = &mut events.progress(Stage::Curves);
        let doing = Doing::Curves {
            text: self.text.name.clone(),
        };
        let curves =
            curves::measure_onwards(model, runtime, evidence, text, options, onwards, modules)
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

    fn report(&self, profile: ProfileFrom, hash: String, time: Duration) -> CalibrationReport {
        CalibrationReport {
            source: self.origin.source.clone(),
            tokens: self.shares.statistics,
            resumed: 0,
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
        cached: bool,
    ) -> Result<Self, EngineError> {
        let start = Instant::now();
        let mut notices = Vec::new();
        let mix = mix_of(options, 0.0);
        let most = Most {
            tokens: effort::most_tokens(&options.source, effort),
            effect: effort::tokens_of_effect(&engine.model, effort),
        };
        let text = CalibrationText::read(engine, options, mix, most, cached, &mut notices)?;
        Ok(Self {
            text,
            notices,
            model: engine.identity()?.0,
            time: start.elapsed(),
        })
    }

    /// Makes the text, unless it is there. Loss curves, if any are measured, are measured on the last `curves` of its tokens, or a quarter
    /// of it.
    pub fn write(
        &mut self,
        engine: &Engine,
        curves: usize,
        events: &mut Events,
    ) -> Result<(), EngineError> {
        let tokens = self.text.tokens.len();
        let curves = curves.min(tokens / 4);
        let shares = Shares {
            statistics: tokens - curves,
            curves,
        };
        let wanted = self.text.wanted(shares, curves::SEQUENCE);
        self.text.write(engine, wanted, events)
    }

    pub fn text(&self) -> &CalibrationText {
        &self.text
    }

    /// What it took, where so many of its tokens were used.
    pub fn report(&self, tokens: usize) -> CalibrationReport {
        CalibrationReport {
            source: self.text.name().to_owned(),
            tokens,
            resumed: 0,
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
    /// `mix` is the share of the mixture.
    fn read(
        engine: &Engine,
        options: &CalibrationOptions,
        mix: f64,
        most: Most,
        cached: bool,
        notices: &mut Vec<Notice>,
    ) -> Result<Self, EngineError> {
        let source = &options.source;
        let bos = engine.bos();
        let is_made = matches!(source, TextSource::Own(_)) || mix > 0.0;
        let limit = match source {
            TextSource::Own(written) => {
                options.tokens.map_or(*written, |limit| limit.min(*written))
            }
            _ => options.tokens.unwrap_or(most.tokens),
        };
        let limit = if is_made { limit.min(MOST_MADE) } else { limit };
        // Tokens of the text that was named.
        let most_given = match source {
            TextSource::Mixture | TextSource::Own(_) => 0,
            _ if mix > 0.0 => ((1.0 - mix) * limit as f64).ceil() as usize,
            _ => limit,
        };
        let tokenizer = engine.tokenizer.as_deref();
        let all = match most_given {
            0 => 0,
            given => given.saturating_add(most.effect),
        };
        let mut given = source.first_tokens(tokenizer, options.field.as_deref(), all)?;
        let read = given.len();
        let beyond = given.split_off(most_given.min(given.len()));
        let name = match is_made && mix < 1.0 && mix > 0.0 {
            true => format!("{source} and the mixture"),
            false => source.to_string(),
        };
        let tokens = match source {
            TextSource::Mixture | TextSource::Own(_) => limit,
            // The shares stay where the text is short.
            _ if mix > 0.0 => limit.min((given.len() as f64 / (1.0 - mix)) as usize),
            _ => given.len(),
        };
        notices.extend(fewer_tokens(&name, tokens, options.tokens));
        if options.tokens.is_none() && most_given > 0 && given.len() == most_given {
            notices.push(Notice::FirstTokens {
                source: source.to_string(),
                tokens: most_given,
            });
        }
        let mut text = Self {
            name,
            mixture: None,
            mix,
            tokens: Vec::new(),
            is_there: !is_made,
            beyond,
            read,
            effect: most.effect,
            held_back: Vec::new(),
            bos,
            hash: String::new(),
            cached,
        };
        if !is_made {
            text.hash = store::hash_tokens(&given, bos);
            text.tokens = given;
            return Ok(text);
        }
        // What is made is known by how it is made, so that it need not be made to find its profile.
        let mixture = match source {
            TextSource::Own(_) => Mixture::own(engine)?,
            _ => Mixture::with_text(engine, given, 1.0 - mix)?,
        };
        text.hash = mixture.hash(tokens);
        text.mixture = Some(mixture);
        text.tokens = vec![0; tokens];
        Ok(text)
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of the source that are not in the text, for measuring the effect of pruning.
    pub fn unseen(&self) -> &[u32] {
        &self.beyond
    }

    /// Tokens that were read of the source: those in the text, and [`CalibrationText::unseen`] behind them.
    pub fn read_tokens(&self) -> usize {
        self.read
    }

    /// The share of the mixture in it, between 0 and 1.
    pub fn mix(&self) -> f64 {
        self.mix
    }

    /// Tokens of the mixture that are not in the text, for the same.
    pub fn held_back(&self) -> &[u32] {
        &self.held_back
    }

    /// How much is to be made of it, where it is shared out like this and loss curves are measured on sequences of so many tokens.
    fn wanted(&self, shares: Shares, sequence: usize) -> Wanted {
        let Shares { statistics, curves } = shares;
        Wanted {
            statistics,
            curves,
            sequence,
            judge: self.tokens.len() - statistics - curves,
            held_back: self.effect,
        }
    }

    /// Takes the text from the cache folder, if it has to be made and is there.
    fn find(&mut self, engine: &Engine, wanted: Wanted) {
        if self.is_there || !self.cached {
            return;
        }
        let Ok((model, _)) = engine.identity() else {
            return;
        };
        let key = self.key(wanted);
        if let Some(made) = engine.cache.find_text(&model, &key, self.tokens.len()) {
            self.take(made);
        }
    }

    /// Makes the text, as far as the model has not written it in an earlier run.
    fn write(
        &mut self,
        engine: &Engine,
        wanted: Wanted,
        events: &mut Events,
    ) -> Result<(), EngineError> {
        self.find(engine, wanted);
        let Some(mixture) = self.mixture.as_ref().filter(|_| !self.is_there) else {
            return Ok(());
        };
        let made = mixture.make(engine, wanted, events)?;
        if self.cached {
            let (model, _) = engine.identity()?;
            engine.cache.keep_text(&model, &self.key(wanted), &made);
        }
        self.take(made);
        Ok(())
    }

    fn take(&mut self, made: Mixed) {
        let is_mixed = self.mixture.as_ref().is_some_and(Mixture::is_mixed);
        self.tokens = made.tokens;
        match is_mixed {
            true => self.held_back = made.held_back,
            false => self.beyond = made.held_back,
        }
        self.is_there = true;
    }

    /// So many tokens, up to whole texts, that the model writes as it writes those of the mixture, and that are not among these; from the cache
    /// folder, if they were written before. Empty without a mixture.
    pub fn further(
        &self,
        engine: &Engine,
        tokens: usize,
        events: &mut Events,
    ) -> Result<Vec<u32>, EngineError> {
        let Some(mixture) = self.mixture.as_ref().filter(|_| tokens > 0) else {
            return Ok(Vec::new());
        };
        let (model, key) = (engine.identity()?.0, self.further_key(tokens));
        // It is kept in the place of what is held back, whose length nobody has to know.
        if self.cached
            && let Some(kept) = engine.cache.find_text(&model, &key, 0)
        {
            return Ok(kept.held_back);
        }
        let made = Mixed {
            tokens: Vec::new(),
            held_back: mixture.further(engine, tokens, events)?,
        };
        if self.cached {
            engine.cache.keep_text(&model, &key, &made);
        }
        Ok(made.held_back)
    }

    /// What [`CalibrationText::further`] is known by in the cache folder, beside the model.
    pub fn further_key(&self, tokens: usize) -> String {
        store::hash_making(&(&self.hash, "further", tokens))
    }

    /// What the text is known by in the cache folder, beside the model.
    fn key(&self, wanted: Wanted) -> String {
        store::hash_making(&(&self.hash, wanted))
    }

    fn calibrating(&self) -> Doing {
        let text = self.name.clone();
        Doing::Calibrating { text }
    }
}

/// The share of the mixture in a text, beside a text that was named `mix` unless the options have another.
fn mix_of(options: &CalibrationOptions, mix: f64) -> f64 {
    match options.source {
        TextSource::Mixture => 1.0,
        TextSource::Path(_) | TextSource::Reader(_) => options.mix.unwrap_or(mix),
        _ => options.mix.unwrap_or(0.0),
    }
}

/// What was asked for that bears on how much is done.
fn asked<'a>(method: &'a MethodOptions, options: &'a CalibrationOptions, mix: f64) -> Asked<'a> {
    let (tokens, written) = match options.source {
        TextSource::Own(all) => (Some(options.tokens.map_or(all, |most| most.min(all))), 1.0),
        _ => (options.tokens, mix * mixture::written(method.effort)),
    };
    Asked {
        method,
        source: &options.source,
        tokens,
        written,
    }
}

/// Whether a text is shorter than was asked for.
fn fewer_tokens(source: &str, tokens: usize, asked: Option<usize>) -> Option<Notice> {
    let asked = asked.filter(|asked| *asked > tokens)?;
    Some(Notice::FewerTokens {
        source: source.to_owned(),
        tokens,
        asked,
    })
}
