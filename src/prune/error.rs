//! Why a model was not pruned, and what has become of it.

use std::fmt;

use crate::count::count;
use crate::model::{ModelError, Module, ModuleId};
use crate::progress::Cancelled;

/// Why a model was not pruned, or not to the end. What only reads a model leaves it untouched.
#[derive(Debug)]
pub struct PruneError {
    pub kind: PruneErrorKind,
    /// The layers that are pruned already, in the order in which that happened; empty where the model is as it was. The
    /// others are still dense: such a model computes something, but nothing that anybody has asked for, and should be loaded
    /// anew.
    pub touched: Vec<usize>,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum PruneErrorKind {
    #[error("the pruning ratio {0} is out of range; it must be at least 0 and below 0.9")]
    Ratio(f64),
    #[error(
        "the text has {}, and at least {least} are needed",
        count(tokens, "token")
    )]
    TooShort { tokens: usize, least: usize },
    #[error(
        "the inputs of the {module} output in layer {layer} are not all finite numbers; the model's weights are damaged or its activations overflow"
    )]
    NotFinite { layer: usize, module: Module },
    #[error(
        "the weights of the {module} output in layer {layer} are not all finite numbers; the model file is damaged"
    )]
    DamagedWeights { layer: usize, module: Module },
    #[error("least squares need a profile with covariances, and this one has none")]
    NoCovariance,
    #[error(
        "this way of sharing out the budget needs a profile with loss curves, and this one has none"
    )]
    NoCurves,
    #[error("this way of pruning reads the calibration text itself, and there is only its profile")]
    NoText,
    #[error("the profile was made for a model of another shape: {0}")]
    OtherShape(String),
    /// By this pattern nothing would go, or everything.
    #[error(
        "single weights cannot go by {0}: it must be a share above 0 and below 1, or N:M with N at least 1 and below M, and M at most 256"
    )]
    Pattern(String),
    /// Groups of neighbouring columns do not fill the rows of a projection.
    #[error("groups of {group} columns do not fill {which}, which has {columns}")]
    Group {
        group: usize,
        which: String,
        columns: usize,
    },
    #[error("there is no memory for weights that take more bytes than before: {0}")]
    Room(std::io::Error),
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model is as it was.
    #[error("{0} has lost single weights already, so that it cannot be pruned any further")]
    Sparse(String),
    #[error("giving memory back to the system failed: {0}")]
    Release(std::io::Error),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl PruneErrorKind {
    /// [`PruneErrorKind::NotFinite`] for a module.
    pub(super) fn not_finite(module: ModuleId) -> Self {
        Self::NotFinite {
            layer: module.layer(),
            module: module.kind(),
        }
    }

    /// [`PruneErrorKind::DamagedWeights`] for a module.
    pub(super) fn damaged_weights(module: ModuleId) -> Self {
        Self::DamagedWeights {
            layer: module.layer(),
            module: module.kind(),
        }
    }
}

impl PruneError {
    /// Whether the model is as it was before pruning began.
    pub fn is_untouched(&self) -> bool {
        self.touched.is_empty()
    }

    /// Whether the work was called off, and nothing went wrong.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.kind, PruneErrorKind::Cancelled(_))
    }
}

impl fmt::Display for PruneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)?;
        match &self.touched[..] {
            [] => return Ok(()),
            [one] => write!(f, "; layer {one} is pruned already, the others are not")?,
            layers => write!(
                f,
                "; {} are pruned already, the others are not",
                in_words(layers)
            )?,
        }
        write!(f, ": the model must be loaded anew")
    }
}

impl std::error::Error for PruneError {
    /// What lies behind the kind, which is part of the message itself.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

impl From<PruneErrorKind> for PruneError {
    /// With an untouched model.
    fn from(kind: PruneErrorKind) -> Self {
        Self {
            kind,
            touched: Vec::new(),
        }
    }
}

impl From<ModelError> for PruneError {
    fn from(error: ModelError) -> Self {
        PruneErrorKind::from(error).into()
    }
}

impl From<Cancelled> for PruneError {
    fn from(cancelled: Cancelled) -> Self {
        PruneErrorKind::from(cancelled).into()
    }
}

/// "layers 0 to 2 and 7", by rising number.
fn in_words(layers: &[usize]) -> String {
    let mut layers = layers.to_vec();
    layers.sort_unstable();
    let runs = layers.chunk_by(|a, b| a + 1 == *b);
    let mut runs: Vec<String> = runs
        .map(|run| match run {
            [first, .., last] if run.len() > 2 => format!("{first} to {last}"),
            _ => {
                let numbers: Vec<String> = run.iter().map(usize::to_string).collect();
                numbers.join(", ")
            }
        })
        .collect();
    let last = runs.pop().unwrap_or_default();
    match &runs[..] {
        [] => format!("layers {last}"),
        _ => format!("layers {} and {last}", runs.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_which_layers_are_pruned() {
        let message = |touched: &[usize]| {
            let mut error = PruneError::from(Cancelled);
            error.touched = touched.to_vec();
            error.to_string()
        };
        assert_eq!(message(&[]), "cancelled");
        for (touched, words) in [
            (&[3][..], "layer 3 is pruned"),
            (&[1, 0], "layers 0, 1 are pruned"),
            (&[6, 7, 8, 3], "layers 3 and 6 to 8 are pruned"),
        ] {
            let message = message(touched);
            assert!(
                message.contains(words) && message.contains("loaded anew"),
                "{message}"
            );
        }
    }
}
