//! Counting the layers that are pruned already, so that whoever stops in between knows what has become of the model.

use super::compact::{Columns, apply_columns};
use crate::kernels::Runtime;
use crate::model::Model;
use crate::progress::{self, Cancelled, Progress};
use crate::prune::choose::LayerPlan;
use crate::prune::error::PruneError;

/// Does `work`, which prunes some of the `layers` layers of a model through the [`Tally`] that it is given. `progress` counts
/// layers, and is called before the first of them too.
///
/// # Errors
/// Those of `work`, with the layers that are pruned by then; if `progress` breaks.
pub fn tallied(
    layers: usize,
    progress: &mut Progress,
    work: impl FnOnce(&mut Tally) -> Result<(), PruneError>,
) -> Result<(), PruneError> {
    let mut tally = Tally {
        touched: Vec::new(),
        layers,
        progress,
    };
    let begun = tally.report().map_err(PruneError::from);
    let result = begun.and_then(|()| work(&mut tally));
    let touched = tally.touched;
    result.map_err(|error| PruneError { touched, ..error })
}

/// The layers of a model that are pruned already.
pub struct Tally<'a> {
    touched: Vec<usize>,
    /// How many layers will be pruned in the end.
    layers: usize,
    progress: &'a mut Progress<'a>,
}

impl Tally<'_> {
    /// Prunes one layer more; `columns` are for the attention output and MLP down.
    ///
    /// # Errors
    /// If the system does not take memory back (the layer is pruned then), or the progress breaks.
    pub fn apply_layer(
        &mut self,
        model: &mut Model,
        runtime: &Runtime,
        l: usize,
        kept: &LayerPlan,
        columns: [Columns; 2],
    ) -> Result<(), PruneError> {
        self.touch(l);
        apply_columns(model, runtime, l, kept, columns)?;
        self.report()?;
        Ok(())
    }

    /// Takes down that a layer, the same as before or another one, is no longer as it was.
    pub fn touch(&mut self, l: usize) {
        if self.touched.last() != Some(&l) {
            self.touched.push(l);
        }
    }

    /// Tells how many layers are pruned.
    ///
    /// # Errors
    /// If the progress breaks.
    pub fn report(&mut self) -> Result<(), Cancelled> {
        progress::report(self.progress, self.touched.len(), self.layers)
    }
}
