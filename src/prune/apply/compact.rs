//! Compaction of one layer in place: rows and columns that stay move forward inside their tensor's bytes of the map, and the
//! pages behind them go back to the system.

use super::projection::EncodedProjection;
use crate::kernels::{Runtime, Team};
use crate::model::{Layer, Linear, Model, Weight};
use crate::prune::choose::LayerPlan;
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::features::features;
use crate::prune::restore::{LayerRestoration, Restoration};
use crate::quant::{
    BlockType, Layout, decode_row, encode_row, encode_row_by_importance, pack, unpack,
};

/// Carries out the plan of one layer. Scratch memory is one projection at its new size.
///
/// # Errors
/// If weights are sparse. If the system does not take memory back; the layer is pruned then, as the error says.
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
    apply_columns(model, runtime, l, kept, Columns::restored(restored)).map_err(|error| {
        let touched = match error.kind {
            PruneErrorKind::Sparse(_) => error.touched,
            _ => vec![l],
        };
        PruneError { touched, ..error }
    })
}

/// What becomes of a projection that loses columns.
#[derive(Debug, Clone, Copy)]
pub enum Columns<'a> {
    /// What stays of it is taken, with what restoration changes.
    Restored(&'a Restoration),
    /// It becomes what it has become before.
    Encoded(&'a EncodedProjection),
}

impl<'a> Columns<'a> {
    /// Both projections of a layer, restored.
    pub fn restored(layer: &'a LayerRestoration) -> [Self; 2] {
        [&layer.attention, &layer.mlp].map(Self::Restored)
    }
}

/// Carries out the plan of one layer; `columns` are for the attention output and for MLP down.
///
/// # Errors
/// If weights are sparse; the layer is as it was then. If the system does not take memory back; the layer is pruned then, which the
/// error leaves to the caller to say.
pub fn apply_columns(
    model: &mut Model,
    runtime: &Runtime,
    l: usize,
    kept: &LayerPlan,
    columns: [Columns; 2],
) -> Result<(), PruneError> {
    let sparse = model.sparse_weights().next();
    if let Some(weight) = sparse {
        return Err(PruneErrorKind::Sparse(weight.name.clone()).into());
    }
    let cut = Cut::new(&model.layers[l], kept, model.config.head_dim);
    let weights = model.layers[l]
        .linears()
        .map(|linear| linear.weight.clone());
    let old_ranges = weights.each_ref().map(|w| w.range.clone());
    let mut pieces = model.map.disjoint_mut(&old_ranges);
    runtime.region(|team| {
        let axes = cut.axes();
        team.chunks_mut(&mut pieces, 1, |i, piece| {
            if let (Axis::Rows, kept) = axes[i] {
                keep_rows(&weights[i], kept, piece[0]);
            }
        });
        let places = [ATTENTION_OUTPUT, DOWN].into_iter().zip(kept.types);
        for ((i, new_type), columns) in places.zip(columns) {
            let bytes = &mut *pieces[i];
            match columns {
                Columns::Restored(restored) => {
                    let block_type = new_type.unwrap_or(weights[i].block_type);
                    let (weight, kept) = (&weights[i], axes[i].1);
                    keep_columns(team, weight, kept, block_type, restored, bytes);
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
            .map_err(PruneErrorKind::Release)?;
    }
    Ok(())
}

/// The dimension of a matrix that loses entries.
#[derive(Debug, Clone, Copy)]
enum Axis {
    Rows,
    Columns,
}

/// How many projections a layer has.
const LINEARS: usize = 7;
/// The places of those projections that lose columns.
const ATTENTION_OUTPUT: usize = 3;
const DOWN: usize = 6;

/// What stays of a layer, in features of each of its projections.
struct Cut {
    /// How many query heads stay in each KV group that stays.
    group_sizes: Vec<usize>,
    /// The rows of q and the columns of o that stay, `[heads · head_dim]`.
    queries: Vec<usize>,
    /// The rows of k and v that stay, `[kv_heads · head_dim]`.
    keys: Vec<usize>,
    /// The rows of gate and up and the columns of down that stay.
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

    /// What each projection loses entries of, and which stay, in the order of [`Layer::linears`].
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
        // A row that is where it should be is not written, so that its pages stay shared with the file.
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
    /// The source of the columns `kept` of a matrix in `block_type`, whose blocks can be moved only where it stays of the
    /// `same_type`.
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

    /// Puts what stays of a row into `out`, given the bytes of the whole row before; `encode` encodes values.
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

/// The numbers of the blocks that the columns `kept` consist of; `None` if they do not consist of whole blocks.
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

/// Gives a projection the shape that its bytes now have.
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

/// Adds to the bias of a projection, which gets one if it has none. Where there is nothing to add, none appears.
fn add_bias(linear: &mut Linear, addition: &[f32]) {
    if addition.iter().all(|v| *v == 0.0) {
        return;
    }
    match &mut linear.bias {
        Some(bias) => bias.iter_mut().zip(addition).for_each(|(b, a)| *b += a),
        none => *none = Some(addition.to_vec()),
    }
}
