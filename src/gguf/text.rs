//! Names and keys of a file, fit to be shown: a file must not be able to send control sequences to a terminal.

use std::fmt::{self, Write};

/// Shows text with control characters, and others that do not print, escaped as Rust does.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(self.0.len());
        for character in self.0.chars() {
            match character {
                '"' | '\'' => text.push(character),
                _ => write!(text, "{}", character.escape_debug())?,
            }
        }
        // With the width that a table asks for.
        f.pad(&text)
    }
}
