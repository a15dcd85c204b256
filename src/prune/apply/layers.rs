//! Carrying out the plan of a whole model, layer by layer.

use std::ops::Range;

use super::compact::Columns;
use super::tally::{Tally, tallied};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::progress::Progress;
use crate::prune::choose::Plan;
use crate::prune::collect::{Evidence, LayerProfile, Reread};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::recipe::Restore;
use crate::prune::restore::{LayerRestoration, restore, sequential::Streams};

/// Carries out a plan with restorations that are known already. Tensors keep their types but for those that the plan changes.
/// Rows are moved as they are; columns too where whole blocks stay together (as they do for heads of a multiple of 32 values)
/// and restoration left their weights alone, and are encoded anew where not.
///
/// `progress` counts layers. It is called before the first of them too, where a break leaves the model as it was.
///
/// # Errors
/// If the system does not take memory back, or `progress` breaks. The error says which layers are pruned by then.
///
/// # Panics
/// If plan or restorations were not made for this model.
pub fn apply(
    model: &mut Model,
    runtime: &Runtime,
    plan: &Plan,
    restorations: &[LayerRestoration],
    progress: &mut Progress,
) -> Result<(), PruneError> {
    assert!(plan.layers.len() == model.layers.len() && restorations.len() == plan.layers.len());
    tallied(plan.layers.len(), progress, |tally| {
        for (l, (kept, restored)) in plan.layers.iter().zip(restorations).enumerate() {
            tally.apply_layer(model, runtime, l, kept, Columns::restored(restored))?;
        }
        Ok(())
    })
}

/// Carries out a plan: makes up for what goes as `how` says, and applies that. Only as many layers as there are threads are
/// restored at a time, so that restored weights are never all held at once.
///
/// Where covariances are collected in groups, the groups are pruned from the last to the first, else all layers from the first
/// to the last. [`Restore::Sequential`] holds the covariance of one projection at a time in any case, and takes only the text
/// from the evidence.
///
/// `progress` counts layers. It is called before the first of them too, where a break leaves the model as it was.
///
/// # Errors
/// If the profile does not fit the model or lacks covariances; if the text is missing, too short, or drives activations out of
/// range; if a weight is not a number, the system does not take memory back, or `progress` breaks, or that of a group of layers
/// does. The error says which layers are pruned by then.
///
/// # Panics
/// If the plan was not made for this model.
pub fn restore_and_apply(
    model: &mut Model,
    runtime: &Runtime,
    mut evidence: Evidence,
    plan: &Plan,
    how: Restore,
    progress: &mut Progress,
) -> Result<(), PruneError> {
    assert_eq!(plan.layers.len(), model.layers.len(), "layers of the plan");
    evidence.profile.check_shape(model)?;
    if let (Restore::Sequential, Reread::InGroups { groups, .. }) = (how, &mut evidence.reread) {
        groups.clear();
    }
    let layers = plan.layers.len();
    tallied(layers, progress, |tally| {
        let mut work = Work {
            model,
            runtime,
            plan,
            tally,
        };
        match (how, &mut evidence.reread) {
            (Restore::Sequential, _) => work.in_sequence(&evidence),
            (_, Reread::InGroups { groups, passes }) => {
                for range in groups.ranges().to_vec().into_iter().rev() {
                    let stats = groups.take(work.model, runtime, &range, passes)?;
                    work.side_by_side(&stats, range, how)?;
                }
                Ok(())
            }
            _ if how == Restore::Lsq && !evidence.profile.has_covariance() => {
                Err(PruneErrorKind::NoCovariance.into())
            }
            _ => work.side_by_side(&evidence.profile.layers, 0..layers, how),
        }
    })
}

/// A plan that is being carried out.
struct Work<'a, 'p> {
    model: &'a mut Model,
    runtime: &'a Runtime,
    plan: &'a Plan,
    tally: &'a mut Tally<'p>,
}

impl Work<'_, '_> {
    /// Restores some layers, each by its own statistics, as many at a time as there are threads.
    fn side_by_side(
        &mut self,
        stats: &[LayerProfile],
        layers: Range<usize>,
        how: Restore,
    ) -> Result<(), PruneError> {
        let threads = self.runtime.pool.threads();
        let stats = stats.chunks(threads);
        for (first, stats) in layers.step_by(threads).zip(stats) {
            let (dense, plan) = (&*self.model, self.plan);
            let restored = self.runtime.region(|team| {
                team.map(stats.len(), |i| {
                    let l = first + i;
                    restore(dense, &stats[i], l, &plan.layers[l], how)
                })
            });
            let restored: Vec<LayerRestoration> = restored.into_iter().collect::<Result<_, _>>()?;
            for (i, restored) in restored.iter().enumerate() {
                self.apply_layer(first + i, restored)?;
            }
        }
        Ok(())
    }

    /// Restores each layer by what it sees behind those that are pruned already.
    fn in_sequence(&mut self, evidence: &Evidence) -> Result<(), PruneError> {
        let mut streams = Streams::new(self.model, self.runtime, evidence.text()?)?;
        for (l, kept) in self.plan.layers.iter().enumerate() {
            let restored = streams.restore_layer(self.model, self.runtime, l, kept)?;
            self.apply_layer(l, &restored)?;
        }
        Ok(())
    }

    /// Prunes one layer more.
    fn apply_layer(&mut self, l: usize, restored: &LayerRestoration) -> Result<(), PruneError> {
        let (kept, columns) = (&self.plan.layers[l], Columns::restored(restored));
        self.tally
            .apply_layer(self.model, self.runtime, l, kept, columns)
    }
}
