//! DRY: what would go on repeating the text becomes the less likely, the longer the repetition is.
//!
//! A token that stood behind an earlier occurrence of the text's end would make the repetition longer. How long it is already is
//! the length of the longest end of the text that stands in front of that token too. Breakers such as line ends limit how far back a
//! repetition is followed, so that the form of lists and dialogues is not punished.
//!
//! Source: the proposal by its author ("DRY: A modern repetition penalty that reliably prevents looping", pull request 5677 of
//! oobabooga/text-generation-webui), with llama.cpp's window.

use std::collections::{BTreeMap, HashMap};

use super::SamplerConfig;
use super::candidates::Candidates;
use crate::tokenize::Tokenizer;

/// Stands for a token that has no part in any breaker: no breaker contains this byte, because it is in no text.
const OTHER: u8 = 0xFF;

/// Breakers, and the tokens that have to do with them.
#[derive(Debug, Clone, Default)]
pub(super) struct Breakers {
    texts: Vec<Vec<u8>>,
    /// The bytes of tokens that overlap with a breaker, and whether the token contains one.
    tokens: HashMap<u32, (Vec<u8>, bool)>,
}

impl Breakers {
    pub fn new(texts: &[String], tokenizer: &Tokenizer) -> Self {
        let texts: Vec<Vec<u8>> = texts
            .iter()
            .filter(|text| !text.is_empty())
            .map(|text| text.clone().into_bytes())
            .collect();
        let ids = 0..tokenizer.vocab_size() as u32;
        let tokens = ids
            .filter_map(|id| {
                let bytes = tokenizer.token_bytes(id);
                let contains = texts.iter().any(|text| find(bytes, text).is_some());
                let overlaps = contains || texts.iter().any(|text| may_overlap(bytes, text));
                overlaps.then(|| (id, (bytes.to_vec(), contains)))
            })
            .collect();
        Self { texts, tokens }
    }

    /// How many tokens at the end stand wholly behind the last breaker; all where there is none.
    fn behind_last(&self, tokens: &[u32]) -> usize {
        if self.texts.is_empty() {
            return tokens.len();
        }
        let mut text = Vec::new();
        let mut starts = Vec::with_capacity(tokens.len());
        for token in tokens {
            starts.push(text.len());
            match self.tokens.get(token) {
                Some((bytes, _)) => text.extend_from_slice(bytes),
                None => text.push(OTHER),
            }
        }
        let ends = self.texts.iter().filter_map(|breaker| {
            let mut places = text.windows(breaker.len());
            Some(places.rposition(|place| place == breaker)? + breaker.len())
        });
        let end = ends.max().unwrap_or(0);
        starts.len() - starts.partition_point(|start| *start < end)
    }

    fn is_breaker(&self, token: u32) -> bool {
        self.tokens
            .get(&token)
            .is_some_and(|(_, contains)| *contains)
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|place| place == part)
}

/// Whether a token could hold a part of a breaker: its end is a beginning of it, its beginning an end, or it is in the middle.
fn may_overlap(token: &[u8], breaker: &[u8]) -> bool {
    let mut parts = 1..token.len().min(breaker.len());
    let at_border = parts.any(|n| {
        token[token.len() - n..] == breaker[..n] || token[..n] == breaker[breaker.len() - n..]
    });
    let in_middle = !token.is_empty() && find(breaker, token).is_some();
    at_border || in_middle
}

pub(super) fn is_on(config: &SamplerConfig) -> bool {
    config.dry_multiplier != 0.0 && config.dry_base >= 1.0 && config.dry_window > 0
}

pub(super) fn penalise(
    candidates: &mut Candidates,
    config: &SamplerConfig,
    breakers: &Breakers,
    history: &[u32],
) {
    let window = history.len().min(config.dry_window);
    let recent = &history[history.len() - window..];
    let allowed = config.dry_allowed_length;
    let limit = breakers.behind_last(recent);
    if recent.len() <= allowed || limit < allowed {
        return;
    }
    // What would be repeated with each token, at most.
    let mut repeated: BTreeMap<u32, usize> = BTreeMap::new();
    let common = common_with_end(recent);
    for (token, common) in recent[1..].iter().zip(&common) {
        let length = (*common).min(limit);
        if length >= allowed && length > 0 && !breakers.is_breaker(*token) {
            let longest = repeated.entry(*token).or_default();
            *longest = length.max(*longest);
        }
    }
    let repeated: Vec<(u32, usize)> = repeated.into_iter().collect();
    candidates.change(&repeated, |logit, length| {
        let beyond = (length - allowed) as f32;
        let penalty = config.dry_multiplier * config.dry_base.powf(beyond);
        *logit -= penalty.clamp(f32::MIN, f32::MAX);
    });
}

/// For each place but the last: how many tokens up to it are the same as at the end of the text. The Z function of the text read
/// backwards, in time proportional to its length.
fn common_with_end(tokens: &[u32]) -> Vec<usize> {
    let n = tokens.len();
    let at = |i: usize| tokens[n - 1 - i];
    let mut common = vec![0; n];
    // The stretch that was compared furthest, and agrees with the beginning.
    let (mut start, mut end) = (0, 0);
    for i in 1..n {
        let mut length = match i < end {
            true => common[i - start].min(end - i),
            false => 0,
        };
        while i + length < n && at(length) == at(i + length) {
            length += 1;
        }
        common[i] = length;
        if i + length > end {
            (start, end) = (i, i + length);
        }
    }
    (0..n - 1).map(|place| common[n - 1 - place]).collect()
}
