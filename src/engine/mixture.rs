//! The mixture that models are calibrated on: what the model writes itself from any beginning, what it answers in its chat format, and
//! the built-in texts, in turns. A text of the user's may stand among them.
//!
//! Whole sequences of one kind take turns so that every beginning of the mixture has about the same shares. What is held back for loss
//! curves, for judging and for the effect of pruning is made of sequences of its own.

use jiff::civil::DateTime;
use serde::Serialize;

use super::Engine;
use super::error::{Doing, EngineError};
use super::events::{Events, Stage};
use super::text::first_tokens;
use crate::chat::{ChatOptions, Message};
use crate::generate::{Answers, Texts};
use crate::prune::{Effort, calibrate, store};

/// What users ask, one prompt between empty lines, written for this purpose.
const PROMPTS: &str = include_str!("prompts.txt");
/// Goes up whenever the way changes in which texts are written and put together.
const VERSION: u32 = 3;
/// Tokens of a text that the model writes: many beginnings count for more than long texts, and the caches of 64 texts stay small.
const WRITTEN: usize = 256;
/// Tokens of a sequence that perplexities are measured on.
pub(super) const JUDGED: usize = 256;
/// The seeds of what is written beyond the mixture begin so far behind the others.
const FURTHER: u64 = 1 << 40;
/// The day of chat templates that ask for one: the text must not change with the days.
const DAY: DateTime = DateTime::constant(2025, 1, 1, 12, 0, 0, 0);

/// A kind of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Kind {
    /// The text that was named.
    Given,
    /// What the model writes from any beginning.
    Own,
    /// What the model answers to prompts.
    Answers,
    /// The built-in text.
    Prose,
    /// The built-in text of program sources.
    Code,
}

/// The shares of the mixture, chosen by measurement (`docs/pruning.md`).
const SHARES: [(Kind, f64); 4] = [
    (Kind::Own, 0.2),
    (Kind::Answers, 0.25),
    (Kind::Prose, 0.4),
    (Kind::Code, 0.15),
];

/// The share of the mixture that the model writes itself, about: at best effort the built-in texts are not long enough for theirs.
pub(super) fn written(effort: Effort) -> f64 {
    let own = SHARES.into_iter();
    let own = own.filter(|(kind, _)| matches!(kind, Kind::Own | Kind::Answers));
    match effort {
        Effort::Best => 0.8,
        _ => own.map(|(_, share)| share).sum(),
    }
}

/// A text to be made.
#[derive(Debug, Clone)]
pub(super) struct Mixture {
    /// Kinds and their shares, which come to 1.
    shares: Vec<(Kind, f64)>,
    /// The user's prompts with what the chat template puts around them; none where the model has no template.
    prompts: Vec<Vec<u32>>,
    /// Tokens of the kinds that are there: the given text, prose, code.
    given: Vec<u32>,
    prose: Vec<u32>,
    code: Vec<u32>,
    bos: Option<u32>,
    /// Positions of the model.
    context: usize,
}

/// How many tokens are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Wanted {
    pub statistics: usize,
    pub curves: usize,
    /// Tokens of a sequence that loss curves are measured on.
    pub sequence: usize,
    pub judge: usize,
    /// Tokens of the mixture that nothing is taken from, for the effect of pruning.
    pub held_back: usize,
}

/// A text that was made.
#[derive(Debug, Clone, Default)]
pub(super) struct Mixed {
    /// Statistics, curves, judge.
    pub tokens: Vec<u32>,
    pub held_back: Vec<u32>,
}

/// Some tokens of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    kind: Kind,
    /// The first token of a kind that is there, or the number of the text that the model writes.
    first: usize,
    tokens: usize,
}

impl Mixture {
    /// Of texts that the model writes from any beginning alone.
    ///
    /// # Errors
    /// If the model has no tokenizer.
    pub fn own(engine: &Engine) -> Result<Self, EngineError> {
        engine.tokenizer()?;
        Ok(Self::new(engine, vec![(Kind::Own, 1.0)]))
    }

    /// The default, with a text that was named in this share of it.
    ///
    /// # Errors
    /// If a built-in text cannot be encoded.
    pub fn with_text(
        engine: &Engine,
        given: Vec<u32>,
        share_given: f64,
    ) -> Result<Self, EngineError> {
        let prompts = prompts(engine)?;
        let mut shares = vec![(Kind::Given, share_given)];
        shares.extend(SHARES.map(|(kind, share)| (kind, share * (1.0 - share_given))));
        shares.retain(|(_, share)| *share > 0.0);
        // What cannot be answered is written.
        if prompts.is_empty() {
            let answers: f64 = shares
                .extract_if(.., |(kind, _)| *kind == Kind::Answers)
                .map(|(_, share)| share)
                .sum();
            for (_, share) in shares.iter_mut().filter(|(kind, _)| *kind == Kind::Own) {
                *share += answers;
            }
        }
        let tokens = |text| {
            first_tokens(engine.tokenizer()?, text, usize::MAX)
                .map_err(|e| EngineError::Text(e.into()))
        };
        Ok(Self {
            prompts,
            given,
            prose: tokens(calibrate::TEXT)?,
            code: tokens(calibrate::CODE)?,
            ..Self::new(engine, shares)
        })
    }

    fn new(engine: &Engine, shares: Vec<(Kind, f64)>) -> Self {
        Self {
            shares,
            prompts: Vec::new(),
            given: Vec::new(),
            prose: Vec::new(),
            code: Vec::new(),
            bos: engine.bos(),
            context: engine.model.config.context_length,
        }
    }

    /// Whether there are several kinds in it.
    pub fn is_mixed(&self) -> bool {
        self.shares.len() > 1
    }

    /// The SHA-256 of how it is made.
    pub fn hash(&self, tokens: usize) -> String {
        let shares: Vec<(Kind, u64)> = self.shares.iter().map(|(k, s)| (*k, s.to_bits())).collect();
        let there = [&self.given, &self.prose, &self.code];
        let there = there.map(|tokens| store::hash_tokens(tokens, self.bos));
        let prompts: Vec<String> = self
            .prompts
            .iter()
            .map(|p| store::hash_tokens(p, None))
            .collect();
        store::hash_making(&("mixture", VERSION, shares, there, prompts, tokens))
    }

    /// Makes the text, as far as it is wanted. The model writes what is its own.
    ///
    /// # Errors
    /// If a text cannot be written, or `events` cancel.
    pub fn make(
        &self,
        engine: &Engine,
        wanted: Wanted,
        events: &mut Events,
    ) -> Result<Mixed, EngineError> {
        let mut plan = Plan::new(self);
        let skip = usize::from(self.bos.is_some());
        let sequence = |length: usize| (length.min(self.context) - skip).max(1);
        // What is held back comes out the same, however much else there is.
        let held_back = plan.lay_out(wanted.held_back, JUDGED.min(self.context), false);
        let curves = plan.lay_out(wanted.curves, sequence(wanted.sequence), true);
        let judge = plan.lay_out(wanted.judge, JUDGED.min(self.context), true);
        let statistics = plan.lay_out(wanted.statistics, sequence(calibrate::SEQUENCE), true);
        let written = self.write(engine, [plan.own, plan.answers], 0, events)?;
        let tokens = |parts: &[Part]| {
            let tokens = parts.iter().flat_map(|part| written.of(self, part));
            tokens.copied().collect::<Vec<u32>>()
        };
        Ok(Mixed {
            tokens: [tokens(&statistics), tokens(&curves), tokens(&judge)].concat(),
            held_back: tokens(&held_back),
        })
    }

    /// So many tokens, up to whole texts, that the model writes and answers, none of which the mixture has. Empty where it writes nothing.
    ///
    /// # Errors
    /// Those of [`Mixture::make`].
    pub fn further(
        &self,
        engine: &Engine,
        tokens: usize,
        events: &mut Events,
    ) -> Result<Vec<u32>, EngineError> {
        let share_of = |wanted: Kind| -> f64 {
            let shares = self.shares.iter().filter(|(kind, _)| *kind == wanted);
            shares.map(|(_, share)| share).sum()
        };
        let (own, answers) = (share_of(Kind::Own), share_of(Kind::Answers));
        if own + answers == 0.0 {
            return Ok(Vec::new());
        }
        let texts = tokens / self.written();
        let answers = (texts as f64 * answers / (own + answers)).round() as usize;
        let counts = [texts - answers, answers];
        let Written { own, answers } = self.write(engine, counts, FURTHER, events)?;
        Ok([own.concat(), answers.concat()].concat())
    }

    /// Tokens of a text that the model writes, without the one that stands in front.
    fn written(&self) -> usize {
        let skip = usize::from(self.bos.is_some());
        WRITTEN.min(self.context - skip).max(1)
    }

    fn write(
        &self,
        engine: &Engine,
        [own, answers]: [usize; 2],
        seed: u64,
        events: &mut Events,
    ) -> Result<Written, EngineError> {
        if own + answers == 0 {
            return Ok(Written::default());
        }
        let tokenizer = engine.tokenizer()?;
        let all = 0..tokenizer.vocab_size() as u32;
        // A control token says nothing by itself.
        let starts = all
            .clone()
            .filter(|t| !tokenizer.token_bytes(*t).is_empty());
        let starts: Vec<u32> = starts.collect();
        let ends: Vec<u32> = all.filter(|t| tokenizer.is_end_of_generation(*t)).collect();
        let skip = usize::from(self.bos.is_some());
        let texts = Texts {
            count: own,
            answers: Answers {
                count: answers,
                prompts: &self.prompts,
                ends: &ends,
            },
            tokens: self.written() + skip,
            bos: self.bos,
            starts: &starts,
            vocabulary: tokenizer.vocab_size(),
            seed,
        };
        let progress = &mut Stage::Writing.progress(events);
        let mut texts = texts
            .write(&engine.model, &engine.runtime, progress)
            .map_err(EngineError::from)
            .map_err(EngineError::at(Doing::OwnText))?;
        texts.iter_mut().for_each(|text| {
            text.drain(..skip);
        });
        for text in texts.iter().take(1).chain(texts.get(own)) {
            tracing::debug!("the model wrote: {:?}", tokenizer.decode_special(text));
        }
        let answers = texts.split_off(own);
        Ok(Written {
            own: texts,
            answers,
        })
    }
}

/// The user's prompts by the model's chat template; none where there is no template that can be used.
fn prompts(engine: &Engine) -> Result<Vec<Vec<u32>>, EngineError> {
    let tokenizer = engine.tokenizer()?;
    let options = ChatOptions {
        now: Some(DAY),
        ..ChatOptions::default()
    };
    let mut prompts = Vec::new();
    if engine.shared_chat_template().is_none() {
        return Ok(prompts);
    }
    for prompt in PROMPTS.split("\n\n") {
        let message = Message::user(prompt.trim_end());
        let rendered = match engine.chat_text(&[message], &options) {
            Ok(rendered) => rendered,
            Err(error) => {
                tracing::debug!("no answers to prompts in the mixture: {error}");
                return Ok(Vec::new());
            }
        };
        let mut tokens = rendered.encode(tokenizer).map_err(EngineError::from)?;
        // It stands in front of every sequence already.
        if engine.bos().is_some() && tokens.first() == engine.bos().as_ref() {
            tokens.remove(0);
        }
        prompts.push(tokens);
    }
    Ok(prompts)
}

/// What the model has written.
#[derive(Debug, Default)]
struct Written {
    own: Vec<Vec<u32>>,
    answers: Vec<Vec<u32>>,
}

impl Written {
    fn of<'a>(&'a self, mixture: &'a Mixture, part: &Part) -> &'a [u32] {
        let there = |tokens: &'a [u32]| &tokens[part.first..part.first + part.tokens];
        match part.kind {
            Kind::Given => there(&mixture.given),
            Kind::Prose => there(&mixture.prose),
            Kind::Code => there(&mixture.code),
            Kind::Own => &self.own[part.first][..part.tokens],
            Kind::Answers => &self.answers[part.first][..part.tokens],
        }
    }
}

/// Which kinds come after which.
struct Plan {
    turns: Vec<Turn>,
    /// Tokens of a text that the model writes.
    written: usize,
    /// Texts that the model is to write.
    own: usize,
    answers: usize,
}

struct Turn {
    kind: Kind,
    share: f64,
    /// Tokens that were taken, of all regions.
    used: usize,
    /// Tokens that are there; `None` where the model writes them.
    there: Option<usize>,
}

impl Plan {
    fn new(mixture: &Mixture) -> Self {
        let there = |kind| match kind {
            Kind::Given => Some(mixture.given.len()),
            Kind::Prose => Some(mixture.prose.len()),
            Kind::Code => Some(mixture.code.len()),
            Kind::Own | Kind::Answers => None,
        };
        let turns = mixture.shares.iter().map(|&(kind, share)| Turn {
            kind,
            share,
            used: 0,
            there: there(kind),
        });
        Self {
            turns: turns.collect(),
            written: mixture.written(),
            own: 0,
            answers: 0,
        }
    }

    /// The parts of so many tokens in sequences of this length, each of one kind as long as that lasts: the kind that is furthest behind
    /// its share. Where a given text takes no part, or a kind is used up, the others keep their shares among each other.
    fn lay_out(&mut self, tokens: usize, sequence: usize, with_given: bool) -> Vec<Part> {
        let mut taken = vec![0usize; self.turns.len()];
        let mut parts = Vec::new();
        let mut done = 0;
        while done < tokens {
            let end = tokens.min((done / sequence + 1) * sequence);
            while done < end {
                let able = |i: &usize| {
                    let Turn {
                        kind, there, used, ..
                    } = self.turns[*i];
                    (with_given || kind != Kind::Given) && there.is_none_or(|there| used < there)
                };
                let able: Vec<usize> = (0..self.turns.len()).filter(able).collect();
                let shares: f64 = able.iter().map(|i| self.turns[*i].share).sum();
                let theirs: usize = able.iter().map(|i| taken[*i]).sum();
                let due = (theirs + end - done) as f64 / shares;
                let behind = |i: usize| self.turns[i].share * due - taken[i] as f64;
                // Of equals the first.
                let next = able.into_iter().rev();
                let next = next.max_by(|a, b| behind(*a).total_cmp(&behind(*b)));
                let i = next.expect("the model writes as much as is wanted");
                let part = self.take(i, end - done);
                taken[i] += part.tokens;
                done += part.tokens;
                parts.push(part);
            }
        }
        parts
    }

    /// The next tokens of a kind, at most so many.
    fn take(&mut self, i: usize, most: usize) -> Part {
        let turn = &mut self.turns[i];
        let texts = match turn.kind {
            Kind::Own => &mut self.own,
            Kind::Answers => &mut self.answers,
            _ => &mut turn.used,
        };
        let first = *texts;
        let tokens = match turn.there {
            None => {
                *texts += 1;
                most.min(self.written)
            }
            Some(there) => {
                let tokens = most.min(there - first);
                *texts += tokens;
                tokens
            }
        };
        Part {
            kind: turn.kind,
            first,
            tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixture(shares: &[(Kind, f64)], there: usize) -> Mixture {
        Mixture {
            shares: shares.to_vec(),
            prompts: Vec::new(),
            given: vec![1; there],
            prose: vec![2; there],
            code: vec![3; there],
            bos: None,
            context: 2048,
        }
    }

    fn share(parts: &[Part], kind: Kind) -> f64 {
        let tokens =
            |parts: &mut dyn Iterator<Item = &Part>| parts.map(|p| p.tokens).sum::<usize>();
        let all = tokens(&mut parts.iter());
        tokens(&mut parts.iter().filter(|p| p.kind == kind)) as f64 / all as f64
    }

    #[test]
    fn every_beginning_has_the_shares_as_nearly_as_whole_sequences_can() {
        let mixture = mixture(&SHARES, 100_000);
        for tokens in [4096, 10_000, 32_768, 98_304] {
            let parts = Plan::new(&mixture).lay_out(tokens, 512, true);
            assert_eq!(parts.iter().map(|p| p.tokens).sum::<usize>(), tokens);
            for (kind, wanted) in SHARES {
                let found = share(&parts, kind);
                let off = (found - wanted).abs() * tokens as f64;
                assert!(off <= 512.0, "{kind:?}: {found} of {tokens} tokens");
            }
        }
    }

    #[test]
    fn loss_curves_see_prose_by_half() {
        let parts = Plan::new(&mixture(&SHARES, 100_000)).lay_out(1024, 256, true);
        let kinds: Vec<Kind> = parts.iter().map(|part| part.kind).collect();
        assert_eq!(kinds, [Kind::Prose, Kind::Answers, Kind::Own, Kind::Prose]);
    }

    #[test]
    fn nothing_comes_twice_and_what_is_used_up_is_made_up_for() {
        let mixture = mixture(&SHARES, 700);
        let mut plan = Plan::new(&mixture);
        let mut parts = plan.lay_out(1024, 256, false);
        parts.extend(plan.lay_out(8192, 512, true));
        assert_eq!(parts.iter().map(|p| p.tokens).sum::<usize>(), 9216);
        let prose: Vec<&Part> = parts.iter().filter(|p| p.kind == Kind::Prose).collect();
        assert_eq!(prose.iter().map(|p| p.tokens).sum::<usize>(), 700);
        assert!(
            prose
                .windows(2)
                .all(|p| p[0].first + p[0].tokens == p[1].first)
        );
        let own = parts.iter().filter(|p| p.kind == Kind::Own);
        assert_eq!(own.clone().count(), plan.own);
        assert!(
            own.enumerate()
                .all(|(i, part)| part.first == i && part.tokens <= WRITTEN)
        );
    }

    #[test]
    fn a_given_text_has_its_share_and_none_of_what_is_held_back() {
        let mut shares = vec![(Kind::Given, 0.75)];
        shares.extend(SHARES.map(|(kind, share)| (kind, share / 4.0)));
        let mixture = mixture(&shares, 100_000);
        let mut plan = Plan::new(&mixture);
        assert_eq!(share(&plan.lay_out(1024, 256, false), Kind::Given), 0.0);
        let parts = plan.lay_out(32_768, 512, true);
        assert!((share(&parts, Kind::Given) - 0.75).abs() < 0.02);
    }
}
