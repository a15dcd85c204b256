//! Counts in words.

use std::fmt::Display;

/// A number and its noun, which is given in the singular: 1 token, 2 tokens.
pub(crate) fn count(number: impl Display, noun: &str) -> String {
    let number = number.to_string();
    match number.as_str() {
        "1" => format!("1 {noun}"),
        _ => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_not_many() {
        assert_eq!(count(0, "token"), "0 tokens");
        assert_eq!(count(1, "token"), "1 token");
        assert_eq!(count(21_u64, "KV head"), "21 KV heads");
    }
}
