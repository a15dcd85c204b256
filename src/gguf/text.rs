//! Showing names and keys from files: a file must not be able to send control sequences to a terminal.

use std::fmt::{self, Write};

/// Text from a file, for display: control characters and others that cannot be printed are escaped as in Rust.
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
        // `pad` respects the width that the format string gives.
        f.pad(&text)
    }
}
