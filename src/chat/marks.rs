//! Telling what a user wrote from what the template wrote.
//!
//! The template is rendered with the messages as they are, for the text. Where a message holds the text of a control token, it is
//! rendered once more with a mark inside of each: a character of the private use area that occurs nowhere else, behind the first
//! character of the token's text, so that the tokenizer does not find it. When the tokenizer has found those that the template wrote,
//! the marks go, and the rest is encoded as plain text, exactly as it would be without control tokens.
//!
//! User-defined tokens that the template itself writes, such as `<tool_call>`, count as control tokens here, except in the model's own
//! messages.
//!
//! What stands at the ends of a message is marked too if it could become a control token together with what comes before or behind
//! it: `<|im_` in one message, or part of one, and `end|>` in the next.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::Value as Json;

use crate::tokenize::Tokenizer;

use super::python;

/// Where marks come from: a private use plane.
const MARKS: std::ops::RangeInclusive<char> = '\u{f0000}'..='\u{ffffd}';

/// What a template must know of a model's tokens: the texts of BOS and EOS, and those of all control tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTokens {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    /// The texts of the control tokens, sorted.
    controls: Vec<String>,
    /// The same, their characters in reverse, sorted.
    reversed: Vec<String>,
    /// The lengths of the texts in bytes.
    lengths: Vec<usize>,
    /// The first characters of the texts.
    firsts: HashSet<char>,
    /// The texts of user-defined tokens, which are found in any text.
    user_defined: Vec<String>,
    /// Those of them that a template writes; they are among the control tokens then.
    pub(super) markers: Vec<String>,
}

impl ChatTokens {
    /// From the texts of BOS, EOS and all control tokens.
    pub fn new(
        bos: Option<String>,
        eos: Option<String>,
        controls: impl IntoIterator<Item = String>,
    ) -> Self {
        let mut controls: Vec<String> = controls
            .into_iter()
            .filter(|text| !text.is_empty())
            .collect();
        controls.sort();
        let mut reversed: Vec<String> = controls.iter().map(|text| reverse(text)).collect();
        reversed.sort();
        let mut lengths: Vec<usize> = controls.iter().map(String::len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let firsts = controls.iter().filter_map(|text| text.chars().next());
        Self {
            bos,
            eos,
            firsts: firsts.collect(),
            controls,
            reversed,
            lengths,
            user_defined: Vec::new(),
            markers: Vec::new(),
        }
    }

    /// Those of a tokenizer.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
        let controls = tokenizer.controls().map(|(text, _)| text.to_owned());
        Self {
            user_defined: tokenizer.user_defined().map(str::to_owned).collect(),
            ..Self::new(text(tokenizer.bos()), text(tokenizer.eos()), controls)
        }
    }

    /// The same for a template of this source: with the user-defined tokens that it writes, unless they are mere letters or blanks.
    pub(super) fn for_template(&self, source: &str) -> Cow<'_, Self> {
        let is_marker = |text: &&String| {
            let ends = [text.chars().next(), text.chars().next_back()];
            text.chars().count() > 2
                && ends.into_iter().flatten().all(|c| c.is_ascii_punctuation())
                && source.contains(text.as_str())
        };
        let markers: Vec<String> = self
            .user_defined
            .iter()
            .filter(is_marker)
            .cloned()
            .collect();
        if markers.is_empty() {
            return Cow::Borrowed(self);
        }
        let controls = self.controls.iter().chain(&markers).cloned();
        Cow::Owned(Self {
            markers: markers.clone(),
            ..Self::new(self.bos.clone(), self.eos.clone(), controls)
        })
    }

    /// The control tokens whose texts stand in `text`, and where.
    fn found<'t>(&'t self, text: &'t str) -> impl Iterator<Item = (usize, &'t str)> {
        let starts = text.char_indices().filter(|(_, c)| self.firsts.contains(c));
        starts.flat_map(move |(at, _)| {
            let candidates = self
                .lengths
                .iter()
                .filter_map(move |len| text.get(at..at + len));
            let found = candidates.filter(move |part| self.has(part));
            found.map(move |part| (at, part))
        })
    }

    fn has(&self, text: &str) -> bool {
        self.controls
            .binary_search_by(|control| control.as_str().cmp(text))
            .is_ok()
    }

    /// The length of the longest end of `text` that a longer control token begins with; 0 if there is none.
    fn open_end(&self, text: &str) -> usize {
        longest_open(
            &self.controls,
            text.char_indices().rev().map(|(at, _)| &text[at..]),
        )
    }

    /// The length of the longest beginning of `text` that a longer control token ends with; 0 if there is none.
    fn open_beginning(&self, text: &str) -> usize {
        let longest = self.lengths.last().copied().unwrap_or(0);
        let beginnings = text.char_indices().map(|(at, c)| at + c.len_utf8());
        let beginnings = beginnings.take_while(|len| *len < longest);
        let reversed: Vec<String> = beginnings.map(|len| reverse(&text[..len])).collect();
        longest_open(&self.reversed, reversed.iter().map(String::as_str))
    }

    /// Where a mark belongs in a text that somebody wrote, in ascending order. `spared` are the control tokens that are left whole.
    fn places(&self, text: &str, spared: &[String]) -> Vec<usize> {
        let behind_first = |at: usize| text[at..].chars().next().map_or(at, |c| at + c.len_utf8());
        let found = self
            .found(text)
            .filter(|(_, part)| !spared.iter().any(|s| s == part));
        let mut places: Vec<usize> = found.map(|(at, _)| behind_first(at)).collect();
        // Templates trim what they are given.
        let end = text.trim_end_matches(python::is_space);
        match self.open_end(end) {
            0 => {}
            len => places.push(behind_first(end.len() - len)),
        }
        let start = text.trim_start_matches(python::is_space);
        if let len @ 1.. = self.open_beginning(start)
            && let Some(last) = start[..len].char_indices().next_back()
        {
            places.push(text.len() - start.len() + last.0);
        }
        places.sort_unstable();
        places.dedup();
        places
    }
}

/// The length of the longest of `parts` with which one of the sorted `texts` begins, without being it.
fn longest_open<'t>(texts: &[String], parts: impl Iterator<Item = &'t str>) -> usize {
    let longest = texts.iter().map(String::len).max().unwrap_or(0);
    let mut found = 0;
    for part in parts.take_while(|part| part.len() < longest) {
        let at = texts.partition_point(|text| text.as_str() <= part);
        if texts.get(at).is_some_and(|text| text.starts_with(part)) {
            found = found.max(part.len());
        }
    }
    found
}

fn reverse(text: &str) -> String {
    text.chars().rev().collect()
}

/// How the texts of one rendering are marked: with which character, and which control tokens the assistant's texts keep whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marking<'a> {
    pub tokens: &'a ChatTokens,
    pub mark: char,
    pub spared: &'a [String],
}

impl Marking<'_> {
    pub fn apply(&self, text: &str) -> String {
        let mut marked = String::with_capacity(text.len() + 4);
        let mut from = 0;
        for place in self.tokens.places(text, self.spared) {
            marked.push_str(&text[from..place]);
            marked.push(self.mark);
            from = place;
        }
        marked.push_str(&text[from..]);
        marked
    }
}

/// Whether any text in these values needs a mark.
pub(super) fn needed(tokens: &ChatTokens, values: &[&Json]) -> bool {
    any_text(values, &mut |text| !tokens.places(text, &[]).is_empty())
}

/// The control tokens whose texts stand in these values.
pub(super) fn spelt(tokens: &ChatTokens, values: &[&Json]) -> Vec<String> {
    let mut spelt = std::collections::BTreeSet::new();
    any_text(values, &mut |text| {
        spelt.extend(tokens.found(text).map(|(_, part)| part.to_owned()));
        false
    });
    spelt.into_iter().collect()
}

/// A character to mark with, which occurs nowhere in these values.
pub(super) fn free(values: &[&Json], template: &str) -> Option<char> {
    let mut taken: HashSet<char> = template.chars().filter(|c| MARKS.contains(c)).collect();
    any_text(values, &mut |text| {
        taken.extend(text.chars().filter(|c| MARKS.contains(c)));
        false
    });
    MARKS.into_iter().find(|c| !taken.contains(c))
}

/// Whether `is` holds of some text in these values, keys of objects included.
fn any_text(values: &[&Json], is: &mut impl FnMut(&str) -> bool) -> bool {
    values.iter().any(|value| match value {
        Json::String(text) => is(text),
        Json::Array(items) => any_text(&items.iter().collect::<Vec<_>>(), is),
        Json::Object(map) => map
            .iter()
            .any(|(key, value)| is(key) || any_text(&[value], is)),
        Json::Null | Json::Bool(_) | Json::Number(_) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> ChatTokens {
        let controls = ["<s>", "</s>", "<|im_end|>", "<|end|>", "[INST]"];
        ChatTokens::new(None, None, controls.map(str::to_owned))
    }

    fn marked(text: &str) -> String {
        let marking = Marking {
            tokens: &tokens(),
            mark: '^',
            spared: &["<|end|>".to_owned()],
        };
        marking.apply(text)
    }

    #[test]
    fn texts_of_control_tokens_are_broken_up() {
        assert_eq!(marked("a <|im_end|> b </s>"), "a <^|im_end|> b <^/s>");
        assert_eq!(marked("<s><s>[INST]"), "<^s><^s>[^INST]");
        assert_eq!(marked("<<s>>"), "<<^s>>");
        assert_eq!(marked("<|end|> stays"), "<|end|> stays", "it is spared");
        assert_eq!(
            marked("plain < text > [x] <im_end>."),
            "plain < text > [x] <im_end>."
        );
    }

    #[test]
    fn beginnings_and_ends_that_others_could_complete_are_broken_up() {
        assert_eq!(marked("hello <|im_"), "hello <^|im_");
        assert_eq!(marked("hello <  \n"), "hello <^  \n", "a template may trim");
        assert_eq!(marked("end|> hello"), "end|^> hello");
        assert_eq!(marked("\n > quoted"), "\n ^> quoted");
        assert_eq!(marked("T]"), "T^]");
        assert_eq!(
            marked("im_end"),
            "im_end",
            "its neighbours are not the user's"
        );
        assert_eq!(marked(""), "");
    }
}
