//! Compaction in place: rows and columns that stay move forward inside their tensor's bytes of the map, and the pages
//! behind them go back to the system.

use std::sync::Mutex;

use super::outcome::Projection;
use super::restore::features;
use super::{LayerPlan, LayerRestoration, Plan, PruneError, Restoration};
use crate::kernels::{Runtime, Team};
use crate::model::{Layer, Linear, Model, Weight};
use crate::quant::{
    BlockType, Layout, decode_row, encode_row, encode_row_by_importance, pack, unpack,
};

/// Carries out a plan. Tensors keep their types but for those that the plan changes. Rows are moved as they are; columns too where whole blocks stay
/// together (as they do for heads of a multiple of 32 values) and restoration left their weights alone, and are encoded anew
/// where not.
///
/// `progress` is called with the number of layers done and their total.
///
/// # Errors
/// If the system does not take memory back; the model is whole and the layers so far are pruned then.
///
/// # Panics
/// If plan or restorations were not made for this model.
pub fn apply(
    model: &mut Model,
    runtime: &Runtime,
    plan: &Plan,
    restorations: &[LayerRestoration],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), PruneError> {
    assert!(plan.layers.len() == model.layers.len() && restorations.len() == plan.layers.len());
    for (l, (kept, restored)) in plan.layers.iter().zip(restorations).enumerate() {
        apply_layer(model, runtime, l, kept, restored)?;
        progress(l + 1, plan.layers.len());
    }
    Ok(())
}

/// Carries out the plan of one layer. Scratch memory is one projection at its new size.
///
/// # Errors
/// If the system does not take memory back; the model is whole and the layer pruned then.
///
/// # Panics
/// If plan or restoration were not made for this layer.
pub fn apply_layer(
    model: &mut Model,
    runtime: &Runtime,
    l: usize,
    kept: &LayerPlan,
    restored: &LayerRestoration,
) -> Result<(), PruneError> {
    let columns = [&restored.attention, &restored.mlp].map(Columns::Restored);
    apply_columns(model, runtime, l, kept, columns)
}

/// What becomes of a projection that loses columns.
#[derive(Debug, Clone, Copy)]
pub(super) enum Columns<'a> {
    Restored(&'a Restoration),
    /// What it became before.
    Encoded(&'a Projection),
}

/// [`apply_layer`] for either, given for the attention output and for MLP down.
pub(super) fn apply_columns(
    model: &mut Model,
    runtime: &Runtime,
    l: usize,
    kept: &LayerPlan,
    columns: [Columns; 2],
) -> Result<(), PruneError> {
    let cut = Cut::new(&model.layers[l], kept, model.config.head_dim);
    let weights = model.layers[l]
        .linears()
        .map(|linear| linear.weight.clone());
    let old_ranges = weights.each_ref().map(|w| w.range.clone());
    let pieces: Vec<Mutex<&mut [u8]>> = model
        .map
        .disjoint_mut(&old_ranges)
        .into_iter()
        .map(Mutex::new)
        .collect();
    runtime.region(|team| {
        let axes = cut.axes();
        team.items(LINEARS, |_, i| {
            if let (Axis::Rows, kept) = axes[i] {
                let mut bytes = pieces[i].lock().expect("each piece has one user");
                keep_rows(&weights[i], kept, &mut bytes);
            }
        });
        let places = [ATTENTION_OUTPUT, DOWN].into_iter().zip(kept.types);
        for ((i, new_type), columns) in places.zip(columns) {
            let mut bytes = pieces[i].lock().expect("each piece has one user");
            match columns {
                Columns::Restored(restored) => {
                    let block_type = new_type.unwrap_or(weights[i].block_type);
                    let (weight, kept) = (&weights[i], axes[i].1);
                    keep_columns(team, weight, kept, block_type, restored, &mut bytes);
                }
                Columns::Encoded(new) => {
                    let bytes = &mut bytes[..new.bytes.len()];
                    bytes.copy_from_slice(&new.bytes);
                    if weights[i].layout == Layout::Packed {
                        pack(new.block_type, axes[i].1.len(), bytes);
                    }
                }
            }
        }
    });
    drop(pieces);

    let layer = &mut model.layers[l];
    let changed = [&mut layer.o, &mut layer.down].into_iter().zip(kept.types);
    for ((linear, new_type), columns) in changed.zip(columns) {
        let weight = &mut linear.weight;
        weight.block_type = match columns {
            Columns::Restored(_) => new_type.unwrap_or(weight.block_type),
            Columns::Encoded(new) => new.block_type,
        };
    }
    for (linear, (axis, kept)) in layer.linears_mut().into_iter().zip(cut.axes()) {
        shrink(linear, axis, kept);
    }
    layer.group_sizes = cut.group_sizes;
    for (linear, columns) in [&mut layer.o, &mut layer.down].into_iter().zip(columns) {
        match columns {
            Columns::Restored(restored) => add_bias(linear, &restored.bias),
            Columns::Encoded(new) => linear.bias.clone_from(&new.bias),
        }
    }
    let ends = layer.linears().map(|linear| linear.weight.range.end);
    for (end, before) in ends.into_iter().zip(old_ranges) {
        model
            .map
            .release(end..before.end)
            .map_err(PruneError::Release)?;
    }
    Ok(())
}

/// The dimension of a matrix that loses entries.
#[derive(Debug, Clone, Copy)]
enum Axis {
    Rows,
    Columns,
}

/// Projections of a layer, and the places among them of those that lose columns.
const LINEARS: usize = 7;
const ATTENTION_OUTPUT: usize = 3;
const DOWN: usize = 6;

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
        let groups = kept.group_sizes(layer);
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

/// Moves the rows that stay forward. A packed matrix is unpacked on the way, group by group in place, and packed again.
fn keep_rows(weight: &Weight, kept: &[usize], bytes: &mut [u8]) {
    if kept.len() == weight.rows {
        return;
    }
    let packed = weight.layout == Layout::Packed;
    if packed {
        unpack(weight.block_type, weight.cols, bytes);
    }
    let row_bytes = weight.row_bytes();
    for (to, &from) in kept.iter().enumerate() {
        // Rows that are where they should be stay clean, and their pages shared with the file.
        if from != to {
            bytes.copy_within(from * row_bytes..(from + 1) * row_bytes, to * row_bytes);
        }
    }
    if packed {
        let kept_bytes = &mut bytes[..kept.len() * row_bytes];
        pack(weight.block_type, weight.cols, kept_bytes);
    }
}

/// Puts the matrix of the columns that stay, or of what restoration made of them, in the place of the whole, in `new_type`.
fn keep_columns(
    team: &Team,
    weight: &Weight,
    kept: &[usize],
    new_type: BlockType,
    restored: &Restoration,
    bytes: &mut [u8],
) {
    let same_type = new_type == weight.block_type;
    if kept.len() == weight.cols && restored.weights.is_none() && same_type {
        return;
    }
    let packed = weight.layout == Layout::Packed;
    if packed {
        unpack(weight.block_type, weight.cols, bytes);
    }
    let old_bytes = weight.row_bytes();
    let new_bytes = new_type.row_bytes(kept.len());
    assert!(new_bytes <= old_bytes, "a new type fits in the old bytes");
    if new_bytes > 0 {
        let mut encoded = vec![0u8; weight.rows * new_bytes];
        let source = ColumnSource::new(weight.block_type, kept, same_type, restored);
        let encode = |values: &[f32], out: &mut [u8]| match &restored.importance[..] {
            [] => encode_row(new_type, values, out),
            all => encode_row_by_importance(new_type, values, all, out),
        };
        team.chunks_mut(&mut encoded, ROWS * new_bytes, |chunk, rows| {
            for (i, out) in rows.chunks_exact_mut(new_bytes).enumerate() {
                let row = chunk * ROWS + i;
                source.encode(row, &bytes[row * old_bytes..][..old_bytes], out, encode);
            }
        });
        if packed {
            pack(new_type, kept.len(), &mut encoded);
        }
        bytes[..encoded.len()].copy_from_slice(&encoded);
    }
}

/// Rows that a thread encodes at a time.
const ROWS: usize = 16;

/// Where the values of the columns that stay come from.
enum ColumnSource<'a> {
    /// Whole blocks, by number, moved as they are.
    Blocks(BlockType, Vec<usize>),
    /// Columns, by number, decoded and encoded anew.
    Columns(BlockType, &'a [usize]),
    /// New values, `[rows, kept]`.
    Restored(usize, &'a [f32]),
}

impl<'a> ColumnSource<'a> {
    /// `block_type` is the one before; blocks can move only where it stays.
    fn new(
        block_type: BlockType,
        kept: &'a [usize],
        same_type: bool,
        restored: &'a Restoration,
    ) -> Self {
        let blocks = whole_blocks(kept, block_type).filter(|_| same_type);
        match (&restored.weights, blocks) {
            (Some(values), _) => Self::Restored(kept.len(), values),
            (None, Some(blocks)) => Self::Blocks(block_type, blocks),
            (None, None) => Self::Columns(block_type, kept),
        }
    }

    /// Encodes a row, of which `old` are the bytes before; `encode` is for values.
    fn encode(&self, row: usize, old: &[u8], out: &mut [u8], encode: impl Fn(&[f32], &mut [u8])) {
        match self {
            Self::Blocks(block_type, blocks) => {
                let size = block_type.block_bytes();
                for (to, from) in out.chunks_exact_mut(size).zip(blocks) {
                    to.copy_from_slice(&old[from * size..][..size]);
                }
            }
            Self::Columns(block_type, kept) => {
                let columns = old.len() / block_type.block_bytes() * block_type.block_len();
                let mut values = vec![0.0f32; columns];
                decode_row(*block_type, old, &mut values);
                let gathered: Vec<f32> = kept.iter().map(|j| values[*j]).collect();
                encode(&gathered, out);
            }
            Self::Restored(width, values) => encode(&values[row * width..][..*width], out),
        }
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
