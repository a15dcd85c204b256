//! Covariances of a few layers at a time, where those of all layers do not fit in memory.
//!
//! The profile has means and variances only. Whoever needs the covariances of a layer gets them from a pass over the text
//! that collects those of its whole group, and goes no further than to the group's last layer; those of the group before are
//! dropped first. Loss curves go through the groups in ascending order. Layers are restored and pruned from the last group to
//! the first: removing something from a layer changes nothing of what the layers before it see, so that every group is
//! collected from a model that is still dense up to there. The outcome is the same as with all covariances at once.

use std::ops::Range;

use super::calibrate::calibrate_layers;
use super::{
    Calibration, Covariance, CurveOptions, Curves, LayerProfile, Plan, Planner, Profile,
    PruneError, Recipe, Restore, carry_out_layers, curves, sequential,
};
use crate::kernels::Runtime;
use crate::model::{Layer, Model};

/// The layers in groups, the text that their covariances are taken from, and those of one group at most.
pub struct Groups {
    ranges: Vec<Range<usize>>,
    tokens: Vec<u32>,
    bos: Option<u32>,
    held: Option<Held>,
    progress: Progress,
}

struct Held {
    range: Range<usize>,
    layers: Vec<LayerProfile>,
}

/// Called during a pass with the number of tokens done and their total.
type Progress = Box<dyn FnMut(usize, usize) + Send>;

/// Bytes that the covariances of a layer take.
pub fn layer_bytes(layer: &Layer) -> u64 {
    (Covariance::bytes(layer.o.weight.cols) + Covariance::bytes(layer.channels())) as u64
}

/// Groups of adjacent layers, each of as many as have covariances of at most `bytes` bytes together; `None` if one layer alone
/// has more.
pub fn partition(model: &Model, bytes: u64) -> Option<Vec<Range<usize>>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut left = 0;
    for (l, layer) in model.layers.iter().enumerate() {
        let needed = layer_bytes(layer);
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
    /// Nothing is collected yet. `progress` is called during each pass with the number of tokens done and their total.
    pub fn new(
        ranges: Vec<Range<usize>>,
        text: Calibration,
        progress: impl FnMut(usize, usize) + Send + 'static,
    ) -> Self {
        Self {
            ranges,
            tokens: text.tokens.to_vec(),
            bos: text.bos,
            held: None,
            progress: Box::new(progress),
        }
    }

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

    /// The statistics of a group's layers, which are dropped where they were held.
    fn take(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        range: &Range<usize>,
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
                calibrate_layers(model, runtime, text, range.clone(), &mut self.progress)
            }
        }
    }

    /// The statistics of a layer, whose group is then held.
    fn layer(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
    ) -> Result<&LayerProfile, PruneError> {
        let range = self.ranges.iter().find(|range| range.contains(&l));
        let range = range
            .cloned()
            .ok_or_else(|| PruneError::OtherShape(format!("it has no layer {l}")))?;
        let layers = self.take(model, runtime, &range)?;
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

/// How many times the text goes through the whole model, in passes of which some end early, for curves (if they are measured)
/// and for restoration. The last group of the curves is the first to be restored, and is not collected twice.
pub fn passes(ranges: &[Range<usize>], curves: bool) -> f64 {
    let layers = ranges.last().map_or(0, |range| range.end).max(1);
    let once: usize = ranges.iter().map(|range| range.end).sum();
    let all = match curves {
        true => 2 * once - layers,
        false => once,
    };
    all as f64 / layers as f64
}

/// Where the statistics come from that a layer is restored by.
pub(super) enum Source<'a> {
    All(&'a Profile),
    Groups(&'a mut Groups),
}

impl Source<'_> {
    pub fn layer(
        &mut self,
        model: &Model,
        runtime: &Runtime,
        l: usize,
    ) -> Result<&LayerProfile, PruneError> {
        match self {
            Source::All(profile) => Ok(&profile.layers[l]),
            Source::Groups(groups) => groups.layer(model, runtime, l),
        }
    }
}

/// [`curves::measure`] with covariances from `groups`.
///
/// # Errors
/// Those of [`curves::measure`].
pub fn measure(
    model: &Model,
    runtime: &Runtime,
    profile: &Profile,
    groups: &mut Groups,
    text: Calibration,
    options: CurveOptions,
    progress: &mut (dyn FnMut(usize, usize) + Send),
) -> Result<Curves, PruneError> {
    let mut source = Source::Groups(groups);
    curves::measure_with(
        model,
        runtime,
        profile,
        &mut source,
        text,
        options,
        progress,
    )
}

/// [`prune`](super::prune()) with covariances from `groups`, and the same outcome. [`Restore::Sequential`] holds no more than
/// one projection's anyway, and takes only the text from there.
///
/// # Errors
/// Those of [`prune`](super::prune()). [`Metric::Obs`](super::Metric::Obs) needs all covariances at once and is refused for
/// the lack of them. If activations are not numbers, the layers behind them are pruned then.
pub fn prune(
    model: &mut Model,
    runtime: &Runtime,
    profile: &Profile,
    groups: &mut Groups,
    recipe: Recipe,
    ratio: f64,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Plan, PruneError> {
    let plan = Planner::new(model, runtime, profile, recipe)?.plan(ratio)?;
    if recipe.restore == Restore::Sequential {
        groups.held = None;
        sequential::carry_out(model, runtime, groups.text(), &plan, progress)?;
        return Ok(plan);
    }
    let layers = plan.layers.len();
    for range in groups.ranges.clone().into_iter().rev() {
        let stats = groups.take(model, runtime, &range)?;
        let behind = layers - range.end;
        let how = recipe.restore;
        carry_out_layers(
            model,
            runtime,
            &stats,
            range.start,
            &plan,
            how,
            &|done, _| {
                progress(behind + done, layers);
            },
        )?;
    }
    Ok(plan)
}
