//! What of the surroundings decides where models come from: environment variables and the home folder.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// Environment variables and the user's home folder, of this process or put together for a test.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    home: Option<PathBuf>,
    variables: HashMap<OsString, OsString>,
}

impl Environment {
    /// Those of this process.
    pub fn of_process() -> Self {
        Self {
            home: dirs::home_dir(),
            variables: std::env::vars_os().collect(),
        }
    }

    /// A home folder and some variables.
    pub fn new<N: Into<OsString>, V: Into<OsString>>(
        home: impl Into<PathBuf>,
        variables: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        let variables = variables.into_iter();
        Self {
            home: Some(home.into()),
            variables: variables.map(|(n, v)| (n.into(), v.into())).collect(),
        }
    }

    /// The same with another value for a variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }

    /// The user's home folder; `None` where there is none.
    pub(super) fn home(&self) -> Option<PathBuf> {
        self.home.clone()
    }

    /// A variable as text without blanks around it; `None` if it is not set, empty or not UTF-8.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let text = self.variables.get(std::ffi::OsStr::new(name))?.to_str()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// The first of several variables that is set, and its value.
    pub(super) fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, String)> {
        names
            .iter()
            .find_map(|name| Some((*name, self.text(name)?)))
    }

    /// A variable as a path, in the home folder if it begins with `~/`; `None` if it is not set or empty.
    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        let value = self.variables.get(std::ffi::OsStr::new(name))?;
        if value.is_empty() {
            return None;
        }
        let path = PathBuf::from(value);
        match (path.strip_prefix("~"), &self.home) {
            (Ok(rest), Some(home)) => Some(home.join(rest)),
            _ => Some(path),
        }
    }

    /// Whether a switch is on: `1`, `true`, `yes` or `on`, in capitals too.
    pub(super) fn is_on(&self, name: &str) -> bool {
        let text = self.text(name).unwrap_or_default().to_ascii_lowercase();
        ["1", "true", "yes", "on"].contains(&&*text)
    }
}
