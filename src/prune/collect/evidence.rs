//! What a model is pruned by: a profile, and the text that it was taken from where that can be read again.

use super::calibrate::Calibration;
use super::groups::Groups;
use super::profile::{LayerProfile, Profile};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::progress::Progress;
use crate::prune::error::{PruneError, PruneErrorKind};

/// What a model is pruned by.
pub struct Evidence<'a> {
    /// The statistics of the model as it is before it is pruned.
    pub profile: &'a Profile,
    pub reread: Reread<'a>,
}

/// Whether, and how, the text that the profile was taken from is read again.
pub enum Reread<'a> {
    /// The text is not at hand.
    Never,
    /// The text itself, which only [`Restore::Sequential`](crate::prune::Restore::Sequential) reads.
    Text(Calibration<'a>),
    /// Covariances, which the profile does not have, are collected from the text for a group of layers at a time.
    InGroups {
        groups: &'a mut Groups,
        /// Counts the tokens of each pass over the text, from 0 again for every pass.
        passes: &'a mut Progress<'a>,
    },
}

impl<'a> Evidence<'a> {
    /// A profile alone.
    pub fn profile(profile: &'a Profile) -> Self {
        Self {
            profile,
            reread: Reread::Never,
        }
    }

    /// A profile and the text that it was taken from.
    pub fn with_text(profile: &'a Profile, text: Calibration<'a>) -> Self {
        Self {
            profile,
            reread: Reread::Text(text),
        }
    }

    /// A profile of means and variances, and covariances in groups of layers; `passes` counts the tokens of each pass over the
    /// text.
    pub fn in_groups(
        profile: &'a Profile,
        groups: &'a mut Groups,
        passes: &'a mut Progress<'a>,
    ) -> Self {
        Self {
            profile,
            reread: Reread::InGroups { groups, passes },
        }
    }

    /// The statistics of a layer of the model, which must be dense up to there.
    ///
    /// # Errors
    /// Those of the pass that collects a group of layers.
    pub(in crate::prune) fn layer(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
    ) -> Result<&LayerProfile, PruneError> {
        match &mut self.reread {
            Reread::InGroups { groups, passes } => groups.layer(model, runtime, l, passes),
            Reread::Never | Reread::Text(_) => Ok(&self.profile.layers[l]),
        }
    }

    /// The text.
    ///
    /// # Errors
    /// [`PruneErrorKind::NoText`].
    pub(in crate::prune) fn text(&self) -> Result<Calibration<'_>, PruneErrorKind> {
        match &self.reread {
            Reread::Never => Err(PruneErrorKind::NoText),
            Reread::Text(text) => Ok(*text),
            Reread::InGroups { groups, .. } => Ok(groups.text()),
        }
    }
}
