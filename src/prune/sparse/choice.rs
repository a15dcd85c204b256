//! What can be asked for where single weights go, by the names that options, reports and files know it by.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::projection::LayerProjection;
use crate::model::Model;
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::names::named_choices;

named_choices! {
    /// Which single weights go, and what makes up for them.
    "method of removing single weights" SparseMethod {
        /// The lowest |W_ij| · ‖X_j‖₂ of each output row (Sun et al., ICLR 2024). Those that stay are not changed.
        Wanda = "wanda",
        /// The lowest |W_ij| of each output row; looks at no text. Those that stay are not changed.
        Magnitude = "magnitude",
        /// The lowest W_ij² / (U_jj)² of blocks of 128 columns, UᵀU = H⁻¹; those that stay make up for what goes as well as they can
        /// (Frantar and Alistarh, ICML 2023).
        SparseGpt = "sparsegpt",
    }
}

impl SparseMethod {
    /// Whether it looks at text.
    pub fn reads_text(self) -> bool {
        self != SparseMethod::Magnitude
    }
}

named_choices! {
    /// How the budget is shared out among the modules.
    #[derive(Default)]
    "way of sharing out" Allocate {
        /// The same share of every module.
        #[default]
        Even = "even",
        /// By what each module alone costs ([`allocate`](super::allocate)).
        Curves = "curves",
    }
}

named_choices! {
    /// What becomes of a projection whose single weights are removed.
    #[derive(Default)]
    "form" SparseForm {
        /// As [`SparseForm::Sparse`]; but where these kernels generate more slowly by that, and the type has a code for 0, as
        /// [`SparseForm::Zeros`] ([`stays_dense`](super::stays_dense)).
        #[default]
        Auto = "auto",
        /// It takes fewer bytes, in the sparse layout; where its type has none, or nothing would be gained, as [`SparseForm::Zeros`].
        Sparse = "sparse",
        /// What is removed is 0 in the projection's own type, and takes as many bytes as before: files of this form are for all programs.
        Zeros = "zeros",
    }
}

/// Which places the weights that stay may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// Any. This share of the weights goes: above 0 and below 1.
    Share(f64),
    /// So many stay in every group of neighbouring columns of a row.
    OfGroup { stay: usize, group: usize },
}

/// The longest group.
const LONGEST_GROUP: usize = 256;

impl Pattern {
    /// The share of the weights that goes.
    pub fn share(self) -> f64 {
        match self {
            Pattern::Share(share) => share,
            Pattern::OfGroup { stay, group } => 1.0 - stay as f64 / group as f64,
        }
    }

    /// The number of columns that a row must be a multiple of.
    pub fn group(self) -> usize {
        match self {
            Pattern::Share(_) => 1,
            Pattern::OfGroup { group, .. } => group,
        }
    }

    /// Whether something goes and something stays, as must be where it is asked for. (Of the shares of single modules some may be 0.)
    pub fn is_sound(self) -> bool {
        match self {
            Pattern::Share(share) => 0.0 < share && share < 1.0,
            Pattern::OfGroup { stay, group } => {
                (1..group).contains(&stay) && group <= LONGEST_GROUP
            }
        }
    }

    /// Refuses a pattern whose groups do not fill the rows of all projections.
    ///
    /// # Errors
    /// [`PruneErrorKind::Group`].
    pub fn check(self, model: &Model) -> Result<(), PruneError> {
        let all = (0..model.layers.len()).flat_map(LayerProjection::all);
        let columns = |which: &LayerProjection| which.weight(model).cols;
        match all
            .into_iter()
            .find(|which| !columns(which).is_multiple_of(self.group()))
        {
            None => Ok(()),
            Some(which) => Err(PruneErrorKind::Group {
                group: self.group(),
                which: which.to_string(),
                columns: columns(&which),
            }
            .into()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Share(share) => share.fmt(f),
            Pattern::OfGroup { stay, group } => write!(f, "{stay}:{group}"),
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((stay, group)) = text.split_once(':') {
            let pattern = match (stay.parse(), group.parse()) {
                (Ok(stay), Ok(group)) => Some(Pattern::OfGroup { stay, group }),
                _ => None,
            };
            return pattern.filter(|pattern| pattern.is_sound()).ok_or_else(|| {
                format!(
                    "{text:?} must be N:M, N of every M weights stay, with N at least 1 and below M, and M at most {LONGEST_GROUP}, for example 2:4"
                )
            });
        }
        let pattern = text.parse().ok().map(Pattern::Share);
        pattern.filter(|pattern| pattern.is_sound()).ok_or_else(|| {
            format!(
                "{text:?} must be a share above 0 and below 1, for example 0.5, or N:M, for example 2:4"
            )
        })
    }
}

/// A method, and the pattern that it prunes to: `wanda:0.5`, `sparsegpt:2:4`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sparsity {
    pub method: SparseMethod,
    pub pattern: Pattern,
}

impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.method, self.pattern)
    }
}

impl FromStr for Sparsity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (method, pattern) = text.split_once(':').unwrap_or((text, ""));
        let method: SparseMethod = method.parse()?;
        if pattern.is_empty() {
            return Err(format!(
                "{method} needs a share or N:M behind it, for example {method}:0.5 or {method}:2:4"
            ));
        }
        Ok(Self {
            method,
            pattern: pattern.parse()?,
        })
    }
}

impl Serialize for Sparsity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparsity_reads_as_it_was_written() {
        for text in [
            "wanda:0.5",
            "wanda:2:4",
            "magnitude:0.25",
            "sparsegpt:4:8",
            "sparsegpt:1:3",
        ] {
            let sparsity: Sparsity = text.parse().unwrap();
            assert_eq!(sparsity.to_string(), text);
        }
        let half: Sparsity = "wanda:2:4".parse().unwrap();
        assert_eq!((half.pattern.share(), half.pattern.group()), (0.5, 4));
        let most: Sparsity = "wanda:1:4".parse().unwrap();
        assert_eq!(most.pattern.share(), 0.75, "1 of 4 stays");
    }

    #[test]
    fn what_is_no_sparsity_is_told_with_what_is_one() {
        for (text, words) in [
            ("", "there are wanda, magnitude, sparsegpt"),
            ("wander:0.5", "there are wanda"),
            ("wanda", "for example wanda:0.5"),
            ("wanda:", "for example wanda:0.5"),
            ("wanda:0", "above 0 and below 1"),
            ("wanda:1", "above 0 and below 1"),
            ("wanda:50%", "above 0 and below 1"),
            ("wanda:nan", "above 0 and below 1"),
            ("wanda:4:4", "N at least 1 and below M"),
            ("wanda:0:4", "N at least 1 and below M"),
            ("wanda:2:", "N at least 1 and below M"),
            ("wanda:-1:4", "N at least 1 and below M"),
            ("wanda:2:512", "M at most 256"),
        ] {
            let error = text.parse::<Sparsity>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
