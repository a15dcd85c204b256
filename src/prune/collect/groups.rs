//! Covariances of a few layers at a time, where those of all layers do not fit in memory.
//!
//! The profile has means and variances only. Whoever needs the covariances of a layer gets them from a pass over the text
//! that collects those of its whole group, and goes no further than to the group's last layer; those of the group before are
//! dropped first. Loss curves go through the groups in ascending order. Layers are restored and pruned from the last group to
//! the first: removing something from a layer changes nothing of what the layers before it see, so that every group is
//! collected from a model that is still dense up to there. The outcome is the same as with all covariances at once.

use std::ops::Range;

use super::calibrate::{Calibration, calibrate_layers};
use super::covariance::Covariance;
use super::profile::LayerProfile;
use crate::kernels::Runtime;
use crate::model::{Layer, Model};
use crate::progress::Progress;
use crate::prune::error::{PruneError, PruneErrorKind};

/// The layers in groups, the text that their covariances are taken from, and those of one group at most.
pub struct Groups {
    ranges: Vec<Range<usize>>,
    /// The text.
    tokens: Vec<u32>,
    /// The token that begins each sequence of the text; `None` where there is none.
    bos: Option<u32>,
    /// The group that was asked for last; `None` where nothing is collected.
    held: Option<Held>,
}

/// The statistics of a group's layers.
struct Held {
    range: Range<usize>,
    layers: Vec<LayerProfile>,
}

/// Bytes that the covariances of a layer take.
pub fn covariance_bytes(layer: &Layer) -> u64 {
    (Covariance::bytes(layer.o.weight.cols) + Covariance::bytes(layer.channels())) as u64
}

/// Groups of adjacent layers, each of as many as have covariances of at most `bytes` bytes together; `None` if one layer alone
/// has more.
pub fn partition(model: &Model, bytes: u64) -> Option<Vec<Range<usize>>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut left = 0;
    for (l, layer) in model.layers.iter().enumerate() {
        let needed = covariance_bytes(layer);
        match ranges.last_mut() {
            Some(range) if needed <= left => range.end = l + 1,
            _ if needed <= bytes => {
                ranges.push(l..l + 1);
                left = bytes;
            }
            _ => return None,
        }
        left -= needed;
    }
    Some(ranges)
}

impl Groups {
    /// Groups of which nothing is collected yet.
    pub fn new(ranges: Vec<Range<usize>>, text: Calibration) -> Self {
        Self {
            ranges,
            tokens: text.tokens.to_vec(),
            bos: text.bos,
            held: None,
        }
    }

    /// The layers of each group.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// The text, with covariances asked for.
    pub fn text(&self) -> Calibration<'_> {
        Calibration {
            tokens: &self.tokens,
            bos: self.bos,
            covariance: true,
        }
    }

    /// Drops what is held of a group.
    pub(in crate::prune) fn clear(&mut self) {
        self.held = None;
    }

    /// The statistics of a group's layers, which are no longer held then. `progress` counts tokens.
    ///
    /// # Errors
    /// Those of [`calibrate_layers`].
    pub(in crate::prune) fn take(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        range: &Range<usize>,
        progress: &mut Progress,
    ) -> Result<Vec<LayerProfile>, PruneError> {
        match self.held.take() {
            Some(held) if held.range == *range => Ok(held.layers),
            other => {
                drop(other);
                let text = Calibration {
                    tokens: &self.tokens,
                    bos: self.bos,
                    covariance: true,
                };
                calibrate_layers(model, runtime, text, range.clone(), progress)
            }
        }
    }

    /// The statistics of a layer, whose group is then held. `progress` counts tokens.
    ///
    /// # Errors
    /// Those of [`calibrate_layers`]; also if no group has the layer.
    pub(in crate::prune) fn layer(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
        progress: &mut Progress,
    ) -> Result<&LayerProfile, PruneError> {
        let range = self.ranges.iter().find(|range| range.contains(&l));
        let range = range
            .cloned()
            .ok_or_else(|| PruneErrorKind::OtherShape(format!("it has no layer {l}")))?;
        let layers = self.take(model, runtime, &range, progress)?;
        let held = self.held.insert(Held { range, layers });
        Ok(&held.layers[l - held.range.start])
    }
}

impl std::fmt::Debug for Groups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Groups")
            .field("ranges", &self.ranges)
            .field("tokens", &self.tokens.len())
            .field("held", &self.held.as_ref().map(|held| &held.range))
            .finish_non_exhaustive()
    }
}

/// How many passes over the text through the whole model it takes to collect these groups, for restoration and, if `curves`, for
/// loss curves too. A pass that ends early counts as the share of the layers that it goes through. The last group of the curves
/// is the first to be restored, and is not collected twice.
pub fn passes(ranges: &[Range<usize>], curves: bool) -> f64 {
    let layers = ranges.last().map_or(0, |range| range.end).max(1);
    let once: usize = ranges.iter().map(|range| range.end).sum();
    let all = match curves {
        true => 2 * once - layers,
        false => once,
    };
    all as f64 / layers as f64
}
