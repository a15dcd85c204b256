//! Stop strings in streamed text.

/// Passes text on until one of the stop strings appears, and holds back what may be the beginning of one.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty strings stop nothing.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes new text; returns what can be shown, and whether a stop string has appeared (it is not shown, nor is anything
    /// behind it).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|s| self.held.find(s.as_str()))
            .min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let kept = self.held.len() - self.possible_beginning();
        let rest = self.held.split_off(kept);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when no more text comes.
    pub fn finish(self) -> String {
        self.held
    }

    /// The length of the longest end of the held text that a stop string begins with.
    fn possible_beginning(&self) -> usize {
        self.held
            .char_indices()
            .map(|(at, _)| &self.held[at..])
            .find(|end| self.stops.iter().any(|s| s.starts_with(end)))
            .map_or(0, str::len)
    }
}
