//! What became of a model's projections when single weights were removed, for doing the same again.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::kernels::Runtime;
use crate::model::{Model, Weight};
use crate::progress::Progress;
use crate::prune::apply::tallied;
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::exact;
use crate::prune::sparse::{Behind, LayerProjection, Projection};
use crate::quant::{BlockType, Layout, check_sparse, pack, unpack};

/// How single weights were shared out, and what came of it; the bytes are with whoever has this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SingleRecord {
    /// Tokens that scores were taken from.
    pub tokens: usize,
    /// The share of each module that was to go.
    #[serde(with = "exact::list")]
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
    projections: Vec<KeptProjection>,
    file: Vec<u8>,
}

/// What a projection has become.
#[derive(Debug, Clone, PartialEq)]
struct KeptProjection {
    /// Another one than it had, where that has no place for what is gone.
    block_type: BlockType,
    sparse: bool,
    /// Its bytes in the file: sparse ones, or those of the native layout.
    range: Range<usize>,
}

impl KeptProjection {
    /// Bytes of all weights of a projection in this type; `None` if they do not fill blocks.
    fn dense_bytes(&self, weight: &Weight) -> Option<usize> {
        let row = self.block_type.checked_row_bytes(weight.cols)?;
        row.checked_mul(weight.rows)
    }
}

/// What a file says of one projection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredSingle {
    /// The number of its type.
    block_type: u32,
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
        block_type: which.weight(model).block_type.id(),
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
            projections.push(KeptProjection {
                block_type: BlockType::from_id(one.block_type)?,
                sparse: one.sparse,
                range: at..end,
            });
            at = end;
        }
        Some(Self {
            record,
            projections,
            file,
        })
    }

    /// Puts the projections in their place, in a model that has the widths that it had then. Those of other types than they had get a new
    /// one, behind everything else in the map.
    ///
    /// # Errors
    /// [`PruneErrorKind::OtherShape`] if they are not this model's, and [`PruneErrorKind::Room`] if there is no memory for more bytes than
    /// before, both before anything has changed; if `progress` breaks, with the layers that are changed by then.
    pub fn apply(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        progress: &mut Progress,
    ) -> Result<(), PruneError> {
        self.check(model)?;
        let all = projections(model).zip(&self.projections);
        let changed = all.filter(|(which, kept)| kept.block_type != which.weight(model).block_type);
        let sizes: Vec<usize> = changed
            .filter_map(|(which, kept)| kept.dense_bytes(which.weight(model)))
            .collect();
        let mut behind = Behind::new(model, sizes.into_iter())?;
        tallied(model.layers.len(), progress, |tally| {
            let mut each = self.projections.iter();
            for l in 0..model.layers.len() {
                tally.touch(l);
                let seven = each.by_ref().take(Projection::ALL.len());
                for (which, kept) in LayerProjection::all(l).zip(seven) {
                    if kept.block_type != which.weight(model).block_type {
                        behind.change_type(model, which, kept.block_type);
                    }
                    let place = which.projection.index();
                    let bytes = &self.file[kept.range.clone()];
                    match kept.sparse {
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
        for (which, kept) in projections(model).zip(&self.projections) {
            let weight = which.weight(model);
            let bytes = &self.file[kept.range.clone()];
            let dense = kept.dense_bytes(weight);
            let block_type = kept.block_type;
            let room = match block_type == weight.block_type {
                true => Some(model.room_for_sparse(weight)),
                false => dense,
            };
            let fits = !weight.is_sparse()
                && match kept.sparse {
                    true => {
                        block_type.has_sparse()
                            && room.is_some_and(|room| room >= bytes.len())
                            && check_sparse(block_type, weight.rows, weight.cols, bytes).is_ok()
                    }
                    false => dense == Some(bytes.len()),
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
