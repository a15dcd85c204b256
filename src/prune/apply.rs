//! Compaction in place: rows and columns that stay move forward inside their tensor's bytes of the map, and the pages
//! behind them go back to the system.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::restore::LayerBiases;
use super::{LayerPlan, Plan, PruneError};
use crate::kernels::Runtime;
use crate::model::{Layer, Linear, Model, Weight};
use crate::quant::{BlockType, Layout, decode_row, encode_row, pack, unpack};

/// Carries out a plan. Every tensor keeps its type. Rows are moved as they are; columns too where whole blocks stay
/// together (as they do for heads of a multiple of 32 values), and are decoded and encoded anew where they do not.
///
/// `progress` is called with the number of layers done and their total.
///
/// # Errors
/// If the system does not take memory back; the model is whole and pruned then.
///
/// # Panics
/// If plan or biases were not made for this model.
pub fn apply(
    model: &mut Model,
    runtime: &Runtime,
    plan: &Plan,
    biases: Vec<LayerBiases>,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), PruneError> {
    assert!(plan.layers.len() == model.layers.len() && biases.len() == plan.layers.len());
    let head_dim = model.config.head_dim;
    let old_ranges: Vec<Range<usize>> = weights(&model.layers).map(|w| w.range.clone()).collect();

    let cuts: Vec<Cut> = model
        .layers
        .iter()
        .zip(&plan.layers)
        .map(|(layer, kept)| Cut::new(layer, kept, head_dim))
        .collect();
    // Every tensor with what it keeps, in the order of `old_ranges`.
    let moves: Vec<(Weight, Axis, &[usize])> = model
        .layers
        .iter()
        .zip(&cuts)
        .flat_map(|(layer, cut)| {
            let weights = layer.linears().map(|l| l.weight.clone());
            weights
                .into_iter()
                .zip(cut.axes())
                .map(|(weight, (axis, kept))| (weight, axis, kept))
        })
        .collect();

    let pieces = model.map.disjoint_mut(&old_ranges);
    let pieces: Vec<Mutex<&mut [u8]>> = pieces.into_iter().map(Mutex::new).collect();
    let left: Vec<AtomicUsize> = plan
        .layers
        .iter()
        .map(|_| AtomicUsize::new(LINEARS))
        .collect();
    let done = AtomicUsize::new(0);
    runtime.pool.region(|team| {
        team.items(moves.len(), |_, i| {
            let (weight, axis, kept) = &moves[i];
            let mut bytes = pieces[i].lock().expect("each piece has one user");
            compact(weight, *axis, kept, &mut bytes);
            if left[i / LINEARS].fetch_sub(1, Ordering::Relaxed) == 1 {
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, plan.layers.len());
            }
        });
    });
    drop(pieces);

    drop(moves);

    for ((layer, cut), biases) in model.layers.iter_mut().zip(cuts).zip(biases) {
        for (linear, (axis, kept)) in layer.linears_mut().into_iter().zip(cut.axes()) {
            shrink(linear, axis, kept);
        }
        layer.group_sizes = cut.group_sizes;
        add_bias(&mut layer.o, &biases.attention);
        add_bias(&mut layer.down, &biases.mlp);
    }
    let freed: Vec<Range<usize>> = weights(&model.layers)
        .zip(old_ranges)
        .map(|(now, before)| now.range.end..before.end)
        .collect();
    for range in freed {
        model.map.release(range).map_err(PruneError::Release)?;
    }
    Ok(())
}

/// The dimension of a matrix that loses entries.
#[derive(Debug, Clone, Copy)]
enum Axis {
    Rows,
    Columns,
}

/// Projections of a layer.
const LINEARS: usize = 7;

/// What stays of a layer, in features of each of its projections.
struct Cut {
    /// Query heads left in each KV group that is left.
    group_sizes: Vec<usize>,
    /// `[heads · head_dim]`
    queries: Vec<usize>,
    /// `[kv_heads · head_dim]`
    keys: Vec<usize>,
    channels: Vec<usize>,
}

impl Cut {
    fn new(layer: &Layer, kept: &LayerPlan, head_dim: usize) -> Self {
        let groups = kept_groups(&layer.group_sizes, &kept.heads);
        let kv_heads: Vec<usize> = (0..groups.len()).filter(|g| groups[*g] > 0).collect();
        Self {
            queries: features(&kept.heads, head_dim),
            keys: features(&kv_heads, head_dim),
            channels: kept.channels.clone(),
            group_sizes: groups.into_iter().filter(|size| *size > 0).collect(),
        }
    }

    /// In the order of [`Layer::linears`].
    fn axes(&self) -> [(Axis, &[usize]); LINEARS] {
        [
            (Axis::Rows, &self.queries),
            (Axis::Rows, &self.keys),
            (Axis::Rows, &self.keys),
            (Axis::Columns, &self.queries),
            (Axis::Rows, &self.channels),
            (Axis::Rows, &self.channels),
            (Axis::Columns, &self.channels),
        ]
    }
}

fn weights(layers: &[Layer]) -> impl Iterator<Item = &Weight> {
    layers.iter().flat_map(Layer::linears).map(|l| &l.weight)
}

/// Query heads that stay in each KV group.
fn kept_groups(group_sizes: &[usize], heads: &[usize]) -> Vec<usize> {
    let mut first = 0;
    group_sizes
        .iter()
        .map(|size| {
            let group = first..first + size;
            first += size;
            heads.iter().filter(|h| group.contains(h)).count()
        })
        .collect()
}

/// The features of some heads.
fn features(heads: &[usize], head_dim: usize) -> Vec<usize> {
    heads
        .iter()
        .flat_map(|h| h * head_dim..(h + 1) * head_dim)
        .collect()
}

/// Moves what stays of one tensor forward. A packed one is unpacked on the way, group by group in place, and packed again.
fn compact(weight: &Weight, axis: Axis, kept: &[usize], bytes: &mut [u8]) {
    let (whole, cols) = match axis {
        Axis::Rows => (weight.rows, weight.cols),
        Axis::Columns => (weight.cols, kept.len()),
    };
    if kept.len() == whole {
        return;
    }
    let packed = weight.layout == Layout::Packed;
    if packed {
        unpack(weight.block_type, weight.cols, bytes);
    }
    let rows = match axis {
        Axis::Rows => {
            keep_rows(weight, kept, bytes);
            kept.len()
        }
        Axis::Columns => {
            keep_columns(weight, kept, bytes);
            weight.rows
        }
    };
    if packed {
        pack(
            weight.block_type,
            cols,
            &mut bytes[..rows * weight.block_type.row_bytes(cols)],
        );
    }
}

fn keep_rows(weight: &Weight, kept: &[usize], bytes: &mut [u8]) {
    let row_bytes = weight.row_bytes();
    for (to, &from) in kept.iter().enumerate() {
        // Rows that are where they should be stay clean, and their pages shared with the file.
        if from != to {
            bytes.copy_within(from * row_bytes..(from + 1) * row_bytes, to * row_bytes);
        }
    }
}

fn keep_columns(weight: &Weight, kept: &[usize], bytes: &mut [u8]) {
    let block_type = weight.block_type;
    let old_bytes = weight.row_bytes();
    let new_bytes = block_type.row_bytes(kept.len());
    let blocks = whole_blocks(kept, block_type);
    let mut values = vec![0.0f32; weight.cols];
    let mut gathered = vec![0.0f32; kept.len()];
    let mut encoded = vec![0u8; new_bytes];
    for row in 0..weight.rows {
        let old = &bytes[row * old_bytes..][..old_bytes];
        match &blocks {
            Some(blocks) => {
                let size = block_type.block_bytes();
                for (to, from) in encoded.chunks_exact_mut(size).zip(blocks) {
                    to.copy_from_slice(&old[from * size..][..size]);
                }
            }
            None => {
                decode_row(block_type, old, &mut values);
                for (to, from) in gathered.iter_mut().zip(kept) {
                    *to = values[*from];
                }
                encode_row(block_type, &gathered, &mut encoded);
            }
        }
        // The new row ends before the old next one begins.
        bytes[row * new_bytes..][..new_bytes].copy_from_slice(&encoded);
    }
}

/// The blocks that `kept` consists of, if it consists of whole blocks.
fn whole_blocks(kept: &[usize], block_type: BlockType) -> Option<Vec<usize>> {
    let len = block_type.block_len();
    kept.chunks(len)
        .map(|chunk| {
            let first = chunk[0];
            let whole = first.is_multiple_of(len)
                && chunk.len() == len
                && chunk.iter().enumerate().all(|(i, c)| *c == first + i);
            whole.then_some(first / len)
        })
        .collect()
}

/// Takes on the shape that the bytes now have.
fn shrink(linear: &mut Linear, axis: Axis, kept: &[usize]) {
    let weight = &mut linear.weight;
    match axis {
        Axis::Rows => {
            weight.rows = kept.len();
            if let Some(bias) = &mut linear.bias {
                *bias = kept.iter().map(|i| bias[*i]).collect();
            }
        }
        Axis::Columns => weight.cols = kept.len(),
    }
    weight.range.end = weight.range.start + weight.rows * weight.row_bytes();
}

/// Where nothing was removed there is nothing to add, and no bias appears.
fn add_bias(linear: &mut Linear, addition: &[f32]) {
    if addition.iter().all(|v| *v == 0.0) {
        return;
    }
    match &mut linear.bias {
        Some(bias) => bias.iter_mut().zip(addition).for_each(|(b, a)| *b += a),
        none => *none = Some(addition.to_vec()),
    }
}
