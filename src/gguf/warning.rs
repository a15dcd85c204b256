//! What is passed over in metadata, or assumed, though a model can run.

use serde::Serialize;

/// Something about the metadata of a file that does not keep a model from running, but may keep it from running as it was meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MetadataWarning {
    /// The value of a key is of no use, and is passed over as if the file did not have it.
    Ignored { key: String, problem: String },
    /// The file does not have a key, and something else is assumed that may be wrong for this model.
    Missing { key: String, assumed: String },
}

impl MetadataWarning {
    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Ignored { key, .. } | Self::Missing { key, .. } => key,
        }
    }

    pub(crate) fn ignored(key: &str, problem: impl Into<String>) -> Self {
        Self::Ignored {
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn missing(key: &str, assumed: impl ToString) -> Self {
        Self::Missing {
            key: key.to_owned(),
            assumed: assumed.to_string(),
        }
    }
}
