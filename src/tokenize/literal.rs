//! User-defined tokens. They are searched for in the text, exactly as they are written, before it is split into words.

/// A piece of a text that has been cut at user-defined tokens.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// Text that is still to be encoded.
    Text(&'t str),
    /// The id of a user-defined token.
    Token(u32),
}

/// The user-defined tokens of a vocabulary.
#[derive(Debug)]
pub(super) struct Literals {
    /// Text and id of each token, the longest text first.
    tokens: Vec<(String, u32)>,
}

impl Literals {
    pub(super) fn new(mut tokens: Vec<(String, u32)>) -> Self {
        tokens.retain(|(text, _)| !text.is_empty());
        tokens.sort_by_key(|(text, id)| (std::cmp::Reverse(text.len()), *id));
        Self { tokens }
    }

    /// None at all.
    pub(super) const NONE: Self = Self { tokens: Vec::new() };

    /// The texts of the tokens.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().map(|(text, _)| text.as_str())
    }

    /// Whether a token is user-defined.
    pub(super) fn contains(&self, id: u32) -> bool {
        self.tokens.iter().any(|(_, literal)| *literal == id)
    }

    /// The bytes of the longest user-defined token; 0 if there is none.
    pub(super) fn longest(&self) -> usize {
        self.tokens.first().map_or(0, |(text, _)| text.len())
    }

    /// Whether a user-defined token is found in `text` that reaches over the byte `at`, ends in front of it, or begins with it or
    /// right behind it. At least [`longest`](Self::longest) bytes must follow that one.
    pub(super) fn touch(&self, text: &[u8], at: usize) -> bool {
        self.tokens.iter().any(|(literal, _)| {
            let len = literal.len();
            let around = &text[at.saturating_sub(len)..(at + 1 + len).min(text.len())];
            around.windows(len).any(|found| found == literal.as_bytes())
        })
    }

    /// The fragments of `text`, cut at all user-defined tokens in it. If two overlap, the longer one wins, even if it begins
    /// later. This is llama.cpp's rule.
    pub(super) fn cut<'t>(&self, text: &'t str) -> Vec<Fragment<'t>> {
        let mut fragments = vec![Fragment::Text(text)];
        for (literal, id) in &self.tokens {
            if !text.contains(literal.as_str()) {
                continue;
            }
            let mut finer = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                let Fragment::Text(stretch) = fragment else {
                    finer.push(fragment);
                    continue;
                };
                for (i, between) in stretch.split(literal.as_str()).enumerate() {
                    if i > 0 {
                        finer.push(Fragment::Token(*id));
                    }
                    finer.push(Fragment::Text(between));
                }
            }
            fragments = finer;
        }
        fragments.retain(|fragment| *fragment != Fragment::Text(""));
        fragments
    }
}

#[cfg(test)]
mod tests {
    use super::Fragment::{Text, Token};
    use super::*;

    fn literals(texts: &[&str]) -> Literals {
        Literals::new(
            (0..)
                .zip(texts)
                .map(|(id, text)| (text.to_string(), id))
                .collect(),
        )
    }

    #[test]
    fn text_without_literals_stays_whole() {
        assert_eq!(literals(&[]).cut("abc"), [Text("abc")]);
        assert_eq!(literals(&["<x>", ""]).cut("abc"), [Text("abc")]);
        assert_eq!(literals(&["<x>"]).cut(""), []);
    }

    #[test]
    fn literals_are_found_wherever_they_are() {
        let tags = literals(&["<x>", "<y>"]);
        assert_eq!(
            tags.cut("<x>a<y><x>"),
            [Token(0), Text("a"), Token(1), Token(0)]
        );
        assert_eq!(tags.cut("b<x"), [Text("b<x")]);
    }

    #[test]
    fn the_longest_literal_wins_even_over_an_earlier_one() {
        assert_eq!(literals(&["ab", "bcd"]).cut("abcd"), [Text("a"), Token(1)]);
        assert_eq!(
            literals(&["  ", "    "]).cut("     x"),
            [Token(1), Text(" x")]
        );
    }
}
