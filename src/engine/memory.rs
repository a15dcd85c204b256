//! What fits in the memory that there is: packed weights, a model while it is pruned, and the KV cache of a context. What the
//! process may take, [`Memory`] tells.
//!
//! Weights that are as they lie in the file take no memory of the process: their pages can be dropped and read again. Weights that
//! were written to, by packing or by pruning, are the process's own.

use std::path::Path;

use super::error::EngineError;
use super::report::{Notice, Shortage};
use crate::kernels::Runtime;
use crate::memory::Memory;
use crate::model::{KvPool, Model};
use crate::prune::sparse::{self, SparseForm, SparseMethod};
use crate::prune::{Recipe, Restore, Target, calibrate, groups, sequential};

/// Positions that a sequence may have in any case; nobody means more.
const MOST_POSITIONS: usize = 1 << 31;

// ---- packed weights ----

/// What packing lacks, if anything: packed weights are the process's own, and must fit beside what else is running.
pub(super) fn packing_shortage(model: &Model) -> Option<Shortage> {
    let own = own_bytes(model);
    let needed = (model.bytes() as u64 / 4 * 5).saturating_sub(own);
    shortage(needed, Memory::now()?.available)
}

/// Bytes of weights that are the process's own already.
fn own_bytes(model: &Model) -> u64 {
    model.map.residency().map_or(0, |map| map.private)
}

fn shortage(needed: u64, allowed: u64) -> Option<Shortage> {
    let set = false;
    (allowed < needed).then_some(Shortage {
        needed,
        allowed,
        set,
    })
}

// ---- pruning ----

/// The memory that there is for pruning a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// What is available; `None` where the system does not tell.
    available: Option<u64>,
    /// Bytes of weights that are the process's own, which packing has made so.
    own: u64,
    /// Bytes of the layers' weights that stay, as far as the target tells beforehand. All of them may be moved.
    staying: u64,
    /// Whether the weights can go back to how they lie in the file.
    can_unpack: bool,
}

/// What pruning is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allotted {
    /// Bytes that covariances may take; `None` where nothing limits them.
    pub covariances: Option<u64>,
    /// Whether these were set; else they are what there is for them.
    pub set: bool,
    /// What is lacking beside packed weights, which go back to how they lie in the file then; `None` where they stay.
    pub unpack: Option<Shortage>,
}

impl Room {
    /// The room for pruning a model to a target. It can be unpacked where a file holds what it was.
    pub fn now(model: &Model, target: Option<Target>, has_file: bool) -> Self {
        let own = own_bytes(model);
        Self {
            available: Memory::now().map(|memory| memory.available),
            own,
            staying: target.map_or(0, |target| staying(model, target)),
            can_unpack: has_file && own > 0,
        }
    }

    /// What there is beside the weights at the most, once they are pruned.
    fn most(&self) -> Option<u64> {
        let available = self.available?;
        Some(match self.can_unpack {
            true => self.unpacked(available),
            false => available.saturating_sub(self.growth()),
        })
    }

    /// Bytes that pruning makes the process's own which are not yet.
    fn growth(&self) -> u64 {
        self.staying.saturating_sub(self.own)
    }

    /// The same if the weights lay as in the file.
    fn unpacked(&self, available: u64) -> u64 {
        available
            .saturating_add(self.own)
            .saturating_sub(self.staying)
    }

    /// Half of the most that there is; very much where the system does not tell.
    pub fn half(&self) -> u64 {
        self.most().map_or(u64::MAX, |most| most / 2)
    }

    /// Refuses what cannot be done, and shares out what there is. So many bytes were `set` for covariances; `None` for at most half.
    ///
    /// # Errors
    /// If the weights that stay do not fit; what the recipe reads of the text does not, and was asked for.
    pub fn allot(
        &self,
        model: &Model,
        runtime: &Runtime,
        recipe: Recipe,
        tokens: usize,
        set: Option<u64>,
    ) -> Result<Allotted, EngineError> {
        let Some(available) = self.available else {
            return Ok(Allotted {
                covariances: set,
                set: set.is_some(),
                unpack: None,
            });
        };
        let (growth, there) = match self.can_unpack {
            true => (self.staying, available.saturating_add(self.own)),
            false => (self.growth(), available),
        };
        if let Some(shortage) = shortage(growth, counted(there)) {
            return Err(EngineError::PruningMemory { shortage });
        }
        let streams = match recipe.restore {
            Restore::Sequential => sequential::bytes(model, tokens),
            _ => 0,
        };
        if let Some(shortage) = shortage(streams, there - growth) {
            return Err(EngineError::SequentialMemory { shortage });
        }
        let layers = model.layers.iter().map(groups::covariance_bytes);
        let one_layer = match recipe.wants_covariance() {
            true => layers.max().unwrap_or(0),
            false => 0,
        };
        let work = Work::of(model, recipe);
        let least = work.passes + streams + work.layer + one_layer;
        let packed = available.saturating_sub(self.growth());
        let unpack = shortage(least, counted(packed)).filter(|_| self.can_unpack);
        let room = match unpack {
            Some(_) => self.unpacked(available),
            None => packed,
        };
        let rest = counted(room).saturating_sub(work.passes + streams);
        // Layers are restored side by side, as many as there are threads and covariances. What is estimated is only about right:
        // a single layer is tried in any case.
        let threads = runtime.pool.threads() as u64;
        let side_by_side = |layers: u64| {
            let left = rest.checked_sub(layers * work.layer)?;
            let most = match layers == threads {
                true => u64::MAX,
                false => ((layers + 1) * one_layer).saturating_sub(1),
            };
            (left >= layers * one_layer).then_some(left.min(most))
        };
        let layers = (1..=threads).rev().find_map(side_by_side);
        let one_layer = one_layer.min(room);
        let most = layers.unwrap_or(one_layer);
        let usual = most.min(one_layer.max(room / 2));
        Ok(Allotted {
            covariances: Some(set.unwrap_or(usual).min(most)),
            set: set.is_some_and(|set| set <= most),
            unpack,
        })
    }
}

/// What of so many bytes is shared out: an eighth is left for what is not counted.
fn counted(bytes: u64) -> u64 {
    bytes - bytes / 8
}

/// Refuses to prune a model by a ratio whose remaining weights cannot be held.
///
/// # Errors
/// [`EngineError::PruningMemory`].
pub(super) fn must_hold_pruned(model: &Model, ratio: f64) -> Result<(), EngineError> {
    let needed = staying(model, Target::Ratio(ratio)).saturating_sub(own_bytes(model));
    let available = Memory::now().map_or(u64::MAX, |memory| memory.available);
    match shortage(needed, available) {
        Some(shortage) => Err(EngineError::PruningMemory { shortage }),
        None => Ok(()),
    }
}

/// Refuses to remove single weights where there is not the memory: all weights of the layers become the process's own.
///
/// # Errors
/// [`EngineError::SparseMemory`].
pub(super) fn must_hold_sparse(
    model: &Model,
    method: SparseMethod,
    form: SparseForm,
    tokens: usize,
) -> Result<(), EngineError> {
    let weights = sparse::weight_bytes(model, form).saturating_sub(own_bytes(model));
    let needed = weights + sparse::bytes(model, method, tokens);
    let available = Memory::now().map_or(u64::MAX, |memory| memory.available);
    match shortage(needed, available) {
        Some(shortage) => Err(EngineError::SparseMemory { shortage }),
        None => Ok(()),
    }
}

/// Refuses healing that takes more than there is, or than was `set`.
///
/// # Errors
/// [`EngineError::HealMemory`].
pub(super) fn must_hold_healing(needed: u64, set: Option<u64>) -> Result<(), EngineError> {
    let available = Memory::now().map_or(u64::MAX, |memory| memory.available);
    let allowed = set.unwrap_or(available).min(available);
    match shortage(needed, allowed) {
        Some(shortage) => Err(EngineError::HealMemory {
            shortage: Shortage {
                set: set.is_some_and(|set| set <= available),
                ..shortage
            },
        }),
        None => Ok(()),
    }
}

/// Bytes of the layers' weights that stay under a target; 0 where only pruning tells.
fn staying(model: &Model, target: Target) -> u64 {
    let layers: u64 = model.layers.iter().map(|layer| layer.bytes() as u64).sum();
    let others = model.bytes() as u64 - layers;
    match target {
        // Nothing is touched.
        Target::Ratio(0.0) => 0,
        Target::Ratio(ratio) => (layers as f64 * (1.0 - ratio)) as u64,
        Target::Bytes(bytes) if bytes >= layers + others => 0,
        Target::Bytes(bytes) => bytes.saturating_sub(others),
        Target::Speedup(_) | Target::PerplexityRise(_) => 0,
    }
}

/// About as many bytes as pruning works with, covariances aside.
struct Work {
    /// Passes of calibration text through the model, and the predictions that loss curves compare.
    passes: u64,
    /// Restoring a layer: the matrices of least squares.
    layer: u64,
}

impl Work {
    fn of(model: &Model, recipe: Recipe) -> Self {
        let d = model.config.embedding_length as u64;
        let layers = model.layers.iter();
        let inputs = layers.map(|layer| layer.o.weight.cols.max(layer.channels()));
        let c = inputs.max().unwrap_or(0) as u64;
        let activations = calibrate::SEQUENCE as u64 * 4 * 6 * (d + c);
        let predictions = match recipe.wants_curves() {
            true => 64 * 4 * model.config.vocabulary as u64,
            false => 0,
        };
        Self {
            passes: activations + predictions,
            layer: match recipe.wants_covariance() {
                true => 8 * c * c + 12 * c * d,
                false => 4 * c * d,
            },
        }
    }
}

/// Refuses a profile whose covariances do not fit.
///
/// # Errors
/// [`EngineError::ProfileMemory`].
pub(super) fn must_hold_profile(path: &Path) -> Result<(), EngineError> {
    // Loading says what is wrong with a file that is not there.
    let file = std::fs::metadata(path).map_or(0, |file| file.len());
    // Nearly all of it is covariances, of which a file has one half: they are symmetric.
    let available = Memory::now().map_or(u64::MAX, |memory| memory.for_new());
    match shortage(file.saturating_mul(2), available) {
        Some(shortage) => Err(EngineError::ProfileMemory {
            path: path.to_owned(),
            shortage,
        }),
        None => Ok(()),
    }
}

// ---- contexts ----

/// What there is to know about a context of so many positions, before it is used.
///
/// # Errors
/// [`EngineError::Context`], if the model was not trained for so many and no memory of this process could hold them.
pub(super) fn check_context(
    model: &Model,
    pool: &KvPool,
    positions: usize,
) -> Result<Option<Notice>, EngineError> {
    let trained = model.config.context_length;
    let (bytes, memory) = (pool.bytes_of(positions, 1), Memory::now());
    let total = memory.map(|memory| memory.total);
    let never = total.is_some_and(|total| bytes > total as f64);
    if positions > trained && (never || positions > MOST_POSITIONS) {
        return Err(EngineError::Context {
            positions,
            bytes,
            total,
        });
    }
    let notice = |shortage| Notice::ContextMemory {
        positions,
        shortage,
    };
    // The greatest number, where it is more than that.
    Ok(memory.and_then(|memory| shortage(bytes as u64, memory.for_new()).map(notice)))
}

/// Refuses contexts that are sure to be filled and do not fit: of so many sequences, of so many positions each.
///
/// # Errors
/// [`EngineError::ContextMemory`].
pub(super) fn must_hold_contexts(
    pool: &KvPool,
    positions: usize,
    sequences: usize,
) -> Result<(), EngineError> {
    let bytes = pool.bytes_of(positions, sequences);
    let available = Memory::now().map_or(u64::MAX, |memory| memory.for_new());
    match bytes > available as f64 {
        true => Err(EngineError::ContextMemory {
            positions,
            sequences,
            bytes,
            available,
        }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, OpenOptions, SyntheticType, TINY, write_synthetic};
    use crate::prune::{Effort, Method};

    fn model(runtime: &Runtime) -> Model {
        Model::synthetic(TINY, SyntheticType::Q8_0.block_type(), runtime).expect("a small model")
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn pruning_unpacks_where_it_lacks_the_memory_and_not_otherwise() {
        let runtime = Runtime::new(1).unwrap();
        let model = model(&runtime);
        let recipe = Method::Best.recipe(Effort::Normal);
        let work = Work::of(&model, recipe);
        let layer = groups::covariance_bytes(&model.layers[0]);
        let least = work.passes + work.layer + layer;
        let enough = least * 8 / 7 + 1;
        let room = |available| Room {
            available: Some(available),
            own: 10 * MIB,
            staying: 7 * MIB,
            can_unpack: true,
        };
        let allot = |room: Room| room.allot(&model, &runtime, recipe, 1000, None).unwrap();
        let packed = allot(room(enough));
        assert_eq!(packed.unpack, None);
        assert!((layer..layer + 3).contains(&packed.covariances.unwrap()));
        let short = allot(room(enough - 3));
        let lacking = short.unpack.expect("it is unpacked");
        assert!(lacking.needed == least && lacking.allowed < least);
        // What packing has taken is there again, less what stays.
        assert!(short.covariances > Some(layer));
        let stuck = Room {
            can_unpack: false,
            ..room(enough / 2)
        };
        assert_eq!(allot(stuck).unpack, None);
        assert_eq!(allot(stuck).covariances, Some(layer), "one is tried");
        let much = room(1 << 40);
        assert_eq!(allot(much).covariances, Some(1 << 39), "half of it");
        let set = |bytes| {
            let allotted = much.allot(&model, &runtime, recipe, 1000, Some(bytes));
            let allotted = allotted.unwrap();
            (allotted.covariances, allotted.set)
        };
        assert_eq!(set(5), (Some(5), true));
        assert_eq!(set(3 << 38), (Some(3 << 38), true));
        let (most, as_set) = set(u64::MAX);
        assert!(most < Some(1 << 40) && !as_set, "not more than there is");
        let unknown = Room {
            available: None,
            ..room(0)
        };
        assert_eq!(allot(unknown).covariances, None);
    }

    #[test]
    fn unpacked_weights_are_the_files_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        write_synthetic(&path, TINY, SyntheticType::Q8_0).unwrap();
        let mut engine = Engine::open(&path, OpenOptions::default()).unwrap();
        let file = std::fs::read(&path).unwrap();
        let packs = engine.runtime.kernels.prefers_packed();
        assert_eq!(engine.model.map.bytes() != file, packs);
        engine.unpack();
        assert!(engine.model.map.bytes() == file);
        assert!(cfg!(not(unix)) || own_bytes(&engine.model) == 0);
        engine.pack();
        assert_eq!(engine.model.map.bytes() != file, packs);
    }

    #[test]
    fn weights_that_stay_must_fit() {
        let runtime = Runtime::new(1).unwrap();
        let model = model(&runtime);
        let recipe = Method::Flap.recipe(Effort::Normal);
        let room = |available, own, can_unpack| Room {
            available: Some(available),
            own,
            staying: 7 * MIB,
            can_unpack,
        };
        let allot = |room: Room| room.allot(&model, &runtime, recipe, 1000, None);
        assert!(allot(room(8 * MIB, 0, false)).is_ok());
        let error = allot(room(6 * MIB, 0, false)).unwrap_err();
        let EngineError::PruningMemory { shortage } = error else {
            panic!("{error}");
        };
        assert_eq!(shortage.needed, 7 * MIB);
        assert_eq!(shortage.allowed, 6 * MIB / 8 * 7, "some is left");
        // Packed weights are pruned where they are, or give their memory back.
        assert!(allot(room(0, 10 * MIB, false)).is_ok());
        assert!(allot(room(0, 10 * MIB, true)).is_ok());
        let layers: u64 = model.layers.iter().map(|l| l.bytes() as u64).sum();
        assert_eq!(staying(&model, Target::Ratio(0.0)), 0);
        assert_eq!(staying(&model, Target::Ratio(0.5)), layers / 2);
        let others = model.bytes() as u64 - layers;
        assert_eq!(staying(&model, Target::Bytes(others + 100)), 100);
        assert_eq!(staying(&model, Target::Bytes(u64::MAX)), 0);
        assert_eq!(staying(&model, Target::Speedup(2.0)), 0);
    }
}
