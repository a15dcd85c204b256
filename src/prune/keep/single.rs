//! What became of a model's projections when single weights were removed, for doing the same again.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::kernels::Runtime;
use crate::model::Model;
use crate::progress::Progress;
use crate::prune::apply::tallied;
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::sparse::LayerProjection;
use crate::quant::{Layout, check_sparse, pack, unpack};

/// How single weights were shared out, and what came of it; the bytes are with whoever has this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SingleRecord {
    /// Tokens that scores were taken from.
    pub tokens: usize,
    /// The share of each module that was to go.
    pub shares: Vec<f64>,
    /// How many weights of each layer went.
    pub removed: Vec<usize>,
    /// Tokens of loss curves; `None` where shares were even.
    pub curves: Option<usize>,
}

/// Projections of a model in the order of its layers, and where in a file their bytes are.
#[derive(Debug, Clone, PartialEq)]
pub struct Single {
    pub record: SingleRecord,
    /// Whether it is sparse, and its bytes in `file`: sparse ones, or those of the native layout.
    projections: Vec<(bool, Range<usize>)>,
    file: Vec<u8>,
}

/// What a file says of one projection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredSingle {
    sparse: bool,
    bytes: usize,
}

/// All projections of a model.
fn projections(model: &Model) -> impl Iterator<Item = LayerProjection> {
    (0..model.layers.len()).flat_map(LayerProjection::all)
}

/// What is to be kept of a model's projections.
pub(super) fn stored(model: &Model) -> Vec<StoredSingle> {
    let of = |which: LayerProjection| StoredSingle {
        sparse: which.weight(model).is_sparse(),
        bytes: which.weight(model).bytes(),
    };
    projections(model).map(of).collect()
}

/// Bytes of all; `None` if there is no such number.
pub(super) fn bytes(stored: &[StoredSingle]) -> Option<usize> {
    let each = stored.iter().map(|one| one.bytes);
    each.into_iter().try_fold(0usize, usize::checked_add)
}

/// Shows the bytes of each projection to `put`, in order.
pub(super) fn each<E>(model: &Model, mut put: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    for which in projections(model) {
        let weight = which.weight(model);
        let bytes = &model.map.bytes()[weight.range.clone()];
        if weight.layout == Layout::Packed {
            let mut native = bytes.to_vec();
            unpack(weight.block_type, weight.cols, &mut native);
            put(&native)?;
        } else {
            put(bytes)?;
        }
    }
    Ok(())
}

impl Single {
    /// From what a file says, and its bytes from `at` on; `None` if they do not fit each other.
    pub(super) fn new(
        record: SingleRecord,
        stored: &[StoredSingle],
        file: Vec<u8>,
        mut at: usize,
    ) -> Option<Self> {
        let mut projections = Vec::with_capacity(stored.len());
        for one in stored {
            let end = at.checked_add(one.bytes).filter(|end| *end <= file.len())?;
            projections.push((one.sparse, at..end));
            at = end;
        }
        Some(Self {
            record,
            projections,
            file,
        })
    }

    /// Puts the projections in their place, in a model that has the widths that it had then.
    ///
    /// # Errors
    /// [`PruneErrorKind::OtherShape`] if they are not this model's, before anything has changed; if `progress` breaks, with the layers
    /// that are changed by then.
    pub fn apply(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        progress: &mut Progress,
    ) -> Result<(), PruneError> {
        self.check(model)?;
        tallied(model.layers.len(), progress, |tally| {
            let mut each = self.projections.iter();
            for l in 0..model.layers.len() {
                tally.touch(l);
                for (place, (sparse, range)) in each.by_ref().take(7).enumerate() {
                    let bytes = &self.file[range.clone()];
                    match sparse {
                        true => model.put_sparse(l, place, bytes),
                        false => put_native(model, runtime, l, place, bytes),
                    }
                }
                tally.report()?;
            }
            Ok(())
        })
    }

    /// Checks everything that applying takes for granted.
    fn check(&self, model: &Model) -> Result<(), PruneErrorKind> {
        let layers = model.layers.len();
        let record = &self.record;
        let counts = (
            self.projections.len(),
            record.shares.len(),
            record.removed.len(),
        );
        if counts != (7 * layers, 2 * layers, layers) {
            return Err(PruneErrorKind::OtherShape(
                "it has another number of layers".to_owned(),
            ));
        }
        for (which, (sparse, range)) in projections(model).zip(&self.projections) {
            let weight = which.weight(model);
            let bytes = &self.file[range.clone()];
            let fits = match sparse {
                true => {
                    !weight.is_sparse()
                        && model.room_for_sparse(weight) >= bytes.len()
                        && check_sparse(weight.block_type, weight.rows, weight.cols, bytes).is_ok()
                }
                false => bytes.len() == weight.rows * weight.block_type.row_bytes(weight.cols),
            };
            if !fits {
                return Err(PruneErrorKind::OtherShape(format!(
                    "{which} has other widths"
                )));
            }
        }
        Ok(())
    }
}

/// Puts the bytes of a projection in the native layout in its place, in the layout that it has.
fn put_native(model: &mut Model, runtime: &Runtime, l: usize, place: usize, bytes: &[u8]) {
    let weight = model.layers[l].linears()[place].weight.clone();
    let to = &mut model.map.bytes_mut()[weight.range.clone()];
    to.copy_from_slice(bytes);
    if weight.layout == Layout::Packed {
        let group = crate::quant::GROUP * weight.block_type.row_bytes(weight.cols);
        runtime.region(|team| {
            team.chunks_mut(to, group.max(1), |_, rows| {
                pack(weight.block_type, weight.cols, rows);
            });
        });
    }
}
