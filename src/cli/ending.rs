//! How an answer ended, and what is odd about it: nobody should look at an empty line and wonder.

use flapjack::engine::GenerateOptions;
use flapjack::generate::{Finish, Generated};

use super::words::plural;

/// What it takes to tell how an answer ended.
pub struct Ending<'a> {
    pub generated: &'a Generated,
    /// The answer as text.
    pub text: &'a str,
    pub options: &'a GenerateOptions,
    /// Positions that there were for prompt and answer, and those that the model was trained for.
    pub context: usize,
    pub trained: usize,
}

impl Ending<'_> {
    /// Why it ended, for the report.
    pub fn reason(&self) -> String {
        match self.generated.finish {
            Finish::EndOfText => "the model ended its text".to_owned(),
            Finish::StopString => "a stop text came".to_owned(),
            Finish::Length => format!("-n {} reached", self.options.max_tokens),
            Finish::ContextFull => match self.context {
                1 => "the only position is taken".to_owned(),
                all => format!("all {all} positions are taken"),
            },
            Finish::Stopped => "interrupted".to_owned(),
        }
    }

    /// What is odd about it, and what to do.
    pub fn notices(&self) -> Vec<String> {
        let notices = [self.nothing(), self.full(), self.circle()];
        notices.into_iter().flatten().collect()
    }

    /// Why there is nothing to see.
    fn nothing(&self) -> Option<String> {
        if !self.text.trim().is_empty() {
            return None;
        }
        let tokens = self.generated.tokens.len();
        match self.generated.finish {
            Finish::EndOfText if tokens == 0 => Some(format!(
                "the model ended its text at once, without a word: to it nothing is missing behind this prompt. {}--ignore-eos makes it go on",
                self.other_ways()
            )),
            Finish::EndOfText => Some(format!(
                "the model wrote only white space and ended its text. {}--ignore-eos makes it go on",
                self.other_ways()
            )),
            Finish::StopString => Some(
                "a text of --stop came before anything else, and what comes from there on is not shown; without that --stop there is more"
                    .to_owned(),
            ),
            Finish::Length if tokens > 0 => Some(format!(
                "the model wrote nothing but white space or tokens that stand for no text, {} in all. {}",
                plural(tokens, "token"),
                self.other_ways().trim_end()
            )),
            _ => None,
        }
    }

    /// What may bring another answer.
    fn other_ways(&self) -> &'static str {
        match self.options.sampler.temperature > 0.0 {
            true => "Ask in other words, or try another --seed; ",
            false => "Ask in other words, or let chance in with --temp 0.7; ",
        }
    }

    /// What to do about a full context.
    fn full(&self) -> Option<String> {
        let Self {
            context, trained, ..
        } = *self;
        if self.generated.finish != Finish::ContextFull {
            return None;
        }
        Some(match context.cmp(&trained) {
            std::cmp::Ordering::Less => format!(
                "stopped because the context of {} is full; a larger --ctx makes room for more, up to the {trained} that the model was trained for",
                plural(context, "token")
            ),
            std::cmp::Ordering::Equal => format!(
                "stopped at the {} that the model was trained for, prompt included; a shorter prompt leaves more room. A larger --ctx goes beyond, where what it writes may be nonsense",
                plural(trained, "token")
            ),
            std::cmp::Ordering::Greater => {
                format!(
                    "stopped because the context of {} is full",
                    plural(context, "token")
                )
            }
        })
    }

    /// Whether it goes round in a circle.
    fn circle(&self) -> Option<String> {
        // One that was stopped for it needs no telling.
        if self.generated.finish == Finish::Stopped || self.text.trim().is_empty() {
            return None;
        }
        let piece = self.generated.repeats()?;
        Some(format!(
            "the text goes round in a circle: its end repeats the same {} over and over; a --repeat-penalty of 1.1 or a higher --temp may lead out of it",
            plural(piece, "token")
        ))
    }
}
