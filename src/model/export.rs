//! From a model back to a GGUF file that other programs run too.
//!
//! A file says less than a [`Model`]: in a layer every KV head has as many query heads as the next, and llama.cpp's graph of
//! architecture `deci` (`src/models/deci.cpp`) leaves out what it finds no heads or channels for, with the biases that
//! belong to it. [`Export::new`] finds a form that computes the same and that a file can tell:
//!
//! - uneven KV groups become even: a KV head is repeated, or query heads are added whose weights are zero;
//! - a layer without heads has no attention tensors, and its bias goes into the MLP before it, to which it is added anyway;
//!   the first layer, which has nothing before it, gets a head of zeros;
//! - a layer without channels gets one block of channels of zeros, since llama.cpp drops the attention of a layer whose
//!   feed-forward width is 0.
//!
//! Where all layers are alike the file stays a `llama` file. So it is with models of other families that are LLaMA's but for the order of
//! the rows of queries and keys (`qwen2`, `phi3`): these rows are put in LLaMA's order where the family's own form has no place for what
//! pruning leaves, different widths or biases.
//!
//! Models of all other families stay in their own architecture, with an array for each width that differs from layer to layer, and with
//! biases. llama.cpp's graphs of these families have neither, so that only flapjack runs such files. The same holds of weights that are
//! sparse (`docs/format.md`).

use std::ops::Range;

use super::{Architecture, Layer, Linear, Model, ROTATION_KEY, Rotation, Weight};
use crate::gguf::{ALIGNMENT_KEY, GgufError, GgufFile, Value, ValueType, Writer};
use crate::quant::{
    BlockType, KeepMask, Layout, decode_row, encode_row, encode_sparse, sparse_to_native,
};

/// How a model goes into a file.
#[derive(Debug)]
pub struct Export<'m> {
    model: &'m Model,
    layers: Vec<LayerForm>,
    architecture: Architecture,
}

/// What a layer looks like in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerForm {
    /// The model's query head for each of the file's; `None` for one of zeros.
    pub heads: Vec<Option<usize>>,
    /// The model's KV head for each of the file's, which may occur again; `None` for one of zeros.
    pub kv_heads: Vec<Option<usize>>,
    /// MLP channels; those behind the model's are of zeros.
    pub channels: usize,
    /// The attention bias is added to that of the MLP of the layer before.
    pub bias_moved: bool,
}

impl LayerForm {
    /// `as_deci`: a layer may be without attention.
    fn new(l: usize, layer: &Layer, head_dim: usize, as_deci: bool) -> Self {
        let (heads, kv_heads) = match layer.heads() {
            0 if l > 0 && as_deci => (Vec::new(), Vec::new()),
            0 => {
                let least = least_units(layer.o.weight.block_type, head_dim);
                (vec![None; least], vec![None])
            }
            _ => even_heads(layer, head_dim),
        };
        Self {
            bias_moved: heads.is_empty(),
            heads,
            kv_heads,
            channels: match layer.channels() {
                0 => least_units(layer.down.weight.block_type, 1),
                some => some,
            },
        }
    }

    /// Query heads of zeros.
    pub fn added_heads(&self) -> usize {
        self.heads.iter().filter(|h| h.is_none()).count()
    }

    /// KV heads that are there already.
    pub fn repeated_kv_heads(&self) -> usize {
        self.kv_heads.windows(2).filter(|w| w[0] == w[1]).count()
    }

    fn widths(&self) -> [usize; 3] {
        [self.heads.len(), self.kv_heads.len(), self.channels]
    }
}

/// The least number of units of `features` columns each that fill whole blocks.
fn least_units(block_type: BlockType, features: usize) -> usize {
    (1..)
        .find(|n| (n * features).is_multiple_of(block_type.block_len()))
        .expect("as many as a block has values")
}

/// Query and KV heads such that every KV head has as many query heads.
fn even_heads(layer: &Layer, head_dim: usize) -> (Vec<Option<usize>>, Vec<Option<usize>>) {
    // Columns of zeros are put between others, which must not cut blocks in two.
    let may_add = head_dim.is_multiple_of(layer.o.weight.block_type.block_len());
    let group = even_group(&layer.group_sizes, may_add);
    let (mut heads, mut kv_heads) = (Vec::new(), Vec::new());
    let mut first = 0;
    for (kv, &size) in layer.group_sizes.iter().enumerate() {
        let copies = size.div_ceil(group);
        heads.extend((first..first + size).map(Some));
        heads.extend(std::iter::repeat_n(None, copies * group - size));
        kv_heads.extend(std::iter::repeat_n(Some(kv), copies));
        first += size;
    }
    (heads, kv_heads)
}

/// The number of query heads per KV head that takes the fewest heads more. A KV head more (its rows of k and v) is as large
/// as a query head more (its rows of q and columns of o); of equals the largest group is best for the KV cache.
fn even_group(sizes: &[usize], may_add: bool) -> usize {
    let most = sizes.iter().copied().max().unwrap_or(1);
    let cost = |group: usize| -> usize {
        let copies = |size: usize| size.div_ceil(group);
        sizes
            .iter()
            .map(|&s| (copies(s) - 1) + (copies(s) * group - s))
            .sum()
    };
    (1..=most)
        .rev()
        .filter(|g| may_add || sizes.iter().all(|s| s.is_multiple_of(*g)))
        .min_by_key(|g| cost(*g))
        .unwrap_or(1)
}

/// Metadata of a layer's widths, and of the size of heads, which no longer follows from them.
const HEADS: &str = "attention.head_count";
const KV_HEADS: &str = "attention.head_count_kv";
const CHANNELS: &str = "feed_forward_length";
const KEY_LENGTH: &str = "attention.key_length";
const VALUE_LENGTH: &str = "attention.value_length";

const ROPE_SCALING: &str = "rope.scaling.type";

const OUTPUT_NORM: &str = "output_norm.weight";
const ARCHITECTURE: &str = "general.architecture";

/// The least alignment of a file with sparse weights.
const SPARSE_ALIGNMENT: u32 = 64;

impl<'m> Export<'m> {
    /// Finds the form.
    ///
    /// # Panics
    /// If weights of layers are packed; [`Model::unpack`] brings them back.
    pub fn new(model: &'m Model) -> Self {
        let mut linears = model.layers.iter().flat_map(Layer::linears);
        assert!(
            linears.all(|l| l.weight.layout != Layout::Packed),
            "a file holds weights in their native layout"
        );
        let head_dim = model.config.head_dim;
        let as_llama = model.config.family().is_llama_in_another_order();
        let layers = model.layers.iter().enumerate();
        let layers: Vec<LayerForm> = layers
            .map(|(l, layer)| LayerForm::new(l, layer, head_dim, as_llama))
            .collect();
        let alike = layers.windows(2).all(|w| w[0].widths() == w[1].widths());
        let own = model.config.architecture;
        let architecture = match own {
            own if !as_llama => own,
            _ if !alike => Architecture::Deci,
            Architecture::Llama | Architecture::Deci => own,
            // What pruning adds to.
            own if own.family().fused || has_biases(model, 3..7) => Architecture::Llama,
            own => own,
        };
        Self {
            model,
            layers,
            architecture,
        }
    }

    /// The form of each layer.
    pub fn layers(&self) -> &[LayerForm] {
        &self.layers
    }

    /// The architecture of the file.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Whether llama.cpp has no form for this model, so that only flapjack runs the file.
    pub fn is_own_form(&self) -> bool {
        let config = &self.model.config;
        let alike = self
            .layers
            .windows(2)
            .all(|w| w[0].widths() == w[1].widths());
        let sparse = self.model.sparse_weights().next().is_some();
        let family = match self.architecture.family().is_llama_in_another_order() {
            // LLaMA's graphs there turn whole heads.
            true => self.reorders().is_some() && config.rope_dim != config.head_dim,
            false => !alike || has_biases(self.model, 0..7),
        };
        sparse || family
    }

    /// For each row of a head of queries or keys in the file the number of the model's, where the two orders differ.
    fn reorders(&self) -> Option<Vec<usize>> {
        let config = &self.model.config;
        let (from, to) = (
            config.family().rotation,
            self.architecture.family().rotation,
        );
        let half = config.rope_dim / 2;
        (from == Rotation::Halves && to == Rotation::Pairs).then(|| {
            (0..config.head_dim)
                .map(|row| match row < config.rope_dim {
                    true => row % 2 * half + row / 2,
                    false => row,
                })
                .collect()
        })
    }

    /// Bytes of weights that the file has more than the model.
    pub fn added_bytes(&self) -> usize {
        let head_dim = self.model.config.head_dim;
        let layers = self.model.layers.iter().zip(&self.layers);
        layers
            .map(|(layer, form)| {
                let [q, kv, channels] = form.widths();
                // More than it is where weights are sparse.
                let rows = |linear: &Linear, rows: usize| {
                    let weight = &linear.weight;
                    (rows - weight.rows) * weight.block_type.row_bytes(weight.cols)
                };
                let columns = |linear: &Linear, columns| {
                    let (weight, bytes) =
                        (&linear.weight, |n| linear.weight.block_type.row_bytes(n));
                    weight.rows * (bytes(columns) - bytes(weight.cols))
                };
                rows(&layer.q, q * head_dim)
                    + rows(&layer.k, kv * head_dim)
                    + rows(&layer.v, kv * head_dim)
                    + columns(&layer.o, q * head_dim)
                    + rows(&layer.gate, channels)
                    + rows(&layer.up, channels)
                    + columns(&layer.down, channels)
            })
            .sum()
    }

    /// The file, ready to be written. `source` is the file that the model was loaded from: what is not a projection of a
    /// layer is taken from it byte for byte, in its order, metadata too. Keys that begin with `replace` are left out, and
    /// `more` is added.
    ///
    /// # Errors
    /// If `source` lacks a tensor that the model has.
    pub fn writer<'a>(
        &'a self,
        source: &'a GgufFile,
        replace: &str,
        more: impl IntoIterator<Item = (String, Value)>,
    ) -> Result<Writer<'a>, GgufError> {
        let mut writer = Writer::new();
        self.put_metadata(&mut writer, source, replace);
        for (key, value) in more {
            writer.metadata(key, value);
        }
        let mut written = vec![false; self.layers.len()];
        for tensor in source.tensors() {
            match layer_of(&tensor.name) {
                Some(l) => {
                    // A layer's tensors stand where its first one stood.
                    if let Some(done @ false) = written.get_mut(l) {
                        *done = true;
                        self.put_layer(&mut writer, source, l)?;
                    }
                }
                None if tensor.name == OUTPUT_NORM => {
                    self.put_norm(&mut writer, source, OUTPUT_NORM, &self.model.output_norm)?;
                }
                None => match self.retyped(&tensor.name, tensor.block_type) {
                    Some(weight) => {
                        let bytes = &self.model.map.bytes()[weight.range.clone()];
                        writer.tensor(&tensor.name, &tensor.shape, weight.block_type, bytes);
                    }
                    None => {
                        let bytes = source.bytes(tensor);
                        writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
                    }
                },
            }
        }
        for (l, _) in written.iter().enumerate().filter(|(_, done)| !**done) {
            self.put_layer(&mut writer, source, l)?;
        }
        Ok(writer)
    }

    /// The matrix of the vocabulary of this name, if its type is another one than this.
    fn retyped(&self, name: &str, before: BlockType) -> Option<&Weight> {
        let matrices = [Some(&self.model.embedding), self.model.output.as_ref()];
        let mut matrices = matrices.into_iter().flatten();
        matrices.find(|weight| weight.name == name && weight.block_type != before)
    }

    fn put_metadata(&self, writer: &mut Writer, source: &GgufFile, replace: &str) {
        let to = self.architecture().name();
        let from = format!("{}.", self.model.config.architecture.name());
        let of_layers = |width: fn(&LayerForm) -> usize| {
            let widths: Vec<usize> = self.layers.iter().map(width).collect();
            if widths.windows(2).all(|w| w[0] == w[1]) {
                return Value::U32(widths[0] as u32);
            }
            let items = widths.into_iter().map(|w| Value::U32(w as u32));
            Value::Array(ValueType::U32, items.collect())
        };
        let head_dim = Value::U32(self.model.config.head_dim as u32);
        let mut ours = vec![
            (HEADS, of_layers(|f| f.heads.len())),
            (KV_HEADS, of_layers(|f| f.kv_heads.len())),
            (CHANNELS, of_layers(|f| f.channels)),
            (KEY_LENGTH, head_dim.clone()),
            (VALUE_LENGTH, head_dim),
        ];
        // Groups of sparse weights lie on lines of the cache.
        let sparse = self.model.sparse_weights().next().is_some();
        if sparse {
            let own = source.get::<u32>(ALIGNMENT_KEY).ok().flatten();
            let alignment = own.unwrap_or(0).max(SPARSE_ALIGNMENT);
            writer.metadata(ALIGNMENT_KEY, Value::U32(alignment));
        }
        for (key, value) in source.entries() {
            if sparse && key == ALIGNMENT_KEY {
                continue;
            }
            match key.strip_prefix(&from) {
                Some(rest) => {
                    let place = ours.iter().position(|(name, _)| *name == rest);
                    let value = place.map_or_else(|| value.clone(), |i| ours.remove(i).1);
                    writer.metadata(format!("{to}.{rest}"), value);
                }
                None if key == ARCHITECTURE => {
                    writer.metadata(key, Value::String(to.into()));
                }
                // Rows are in the architecture's order.
                None if key == ROTATION_KEY || key.starts_with(replace) => {}
                None => {
                    writer.metadata(key, value.clone());
                }
            }
        }
        // Phi's files say so by having the factors.
        let by_context = source.tensor("rope_factors_long.weight").is_some();
        if by_context
            && source
                .metadata()
                .get(&format!("{from}{ROPE_SCALING}"))
                .is_none()
        {
            ours.push((ROPE_SCALING, Value::String("longrope".into())));
        }
        for (name, value) in ours {
            writer.metadata(format!("{to}.{name}"), value);
        }
    }

    fn put_layer<'a>(
        &'a self,
        writer: &mut Writer<'a>,
        source: &'a GgufFile,
        l: usize,
    ) -> Result<(), GgufError> {
        let (layer, form) = (&self.model.layers[l], &self.layers[l]);
        let head_dim = self.model.config.head_dim;
        if !form.heads.is_empty() {
            let heads = units(&form.heads, head_dim);
            let kv_heads = units(&form.kv_heads, head_dim);
            let (queries, keys) = match self.reorders() {
                Some(order) => (
                    ordered(&form.heads, &order),
                    ordered(&form.kv_heads, &order),
                ),
                None => (heads.clone(), kv_heads.clone()),
            };
            self.put_norm(
                writer,
                source,
                &format!("blk.{l}.attn_norm.weight"),
                &layer.attention_norm,
            )?;
            self.put_rows(writer, l, "attn_q", &layer.q, &queries);
            self.put_rows(writer, l, "attn_k", &layer.k, &keys);
            self.put_rows(writer, l, "attn_v", &layer.v, &kv_heads);
            let bias = layer.o.bias.clone();
            self.put_columns(writer, l, "attn_output", &layer.o.weight, bias, &heads);
            for (name, norm) in [
                ("attn_q_norm", &layer.q_norm),
                ("attn_k_norm", &layer.k_norm),
                ("post_attention_norm", &layer.attention_post_norm),
            ] {
                if let Some(norm) = norm {
                    self.put_norm(writer, source, &format!("blk.{l}.{name}.weight"), norm)?;
                }
            }
        }
        let mut bias = layer.down.bias.clone();
        // What the next layer's attention adds without looking at anything.
        if let (Some(next), Some(true)) = (
            self.model.layers.get(l + 1),
            self.layers.get(l + 1).map(|f| f.bias_moved),
        ) && let Some(moved) = &next.o.bias
        {
            let sum = bias.get_or_insert_with(|| vec![0.0; moved.len()]);
            sum.iter_mut().zip(moved).for_each(|(b, m)| *b += m);
        }
        let channels: Vec<Option<usize>> = (0..form.channels)
            .map(|c| Some(c).filter(|c| *c < layer.channels()))
            .collect();
        let channels = units(&channels, 1);
        self.put_norm(
            writer,
            source,
            &format!("blk.{l}.ffn_norm.weight"),
            &layer.mlp_norm,
        )?;
        self.put_rows(writer, l, "ffn_gate", &layer.gate, &channels);
        self.put_rows(writer, l, "ffn_up", &layer.up, &channels);
        self.put_columns(writer, l, "ffn_down", &layer.down.weight, bias, &channels);
        if let Some(norm) = &layer.mlp_post_norm {
            let name = format!("blk.{l}.post_ffw_norm.weight");
            self.put_norm(writer, source, &name, norm)?;
        }
        Ok(())
    }

    /// A norm as the file has it, or as it has become since.
    fn put_norm<'a>(
        &self,
        writer: &mut Writer<'a>,
        source: &'a GgufFile,
        name: &str,
        values: &[f32],
    ) -> Result<(), GgufError> {
        match source.tensor(name) {
            Some(tensor) => {
                let bytes = source.bytes(tensor);
                let mut before = vec![0.0; values.len()];
                decode_row(tensor.block_type, bytes, &mut before);
                if before == values {
                    writer.tensor(name, &tensor.shape, tensor.block_type, bytes);
                } else {
                    put_vector(writer, name, values);
                }
            }
            // A `deci` layer without heads or channels has no norm, and gets any with its zeros.
            None if self.model.config.architecture == Architecture::Deci => {
                let ones = vec![1.0; self.model.config.embedding_length];
                put_vector(writer, name, &ones);
            }
            None => return Err(source.tensor_error(name, "is missing from the file")),
        }
        Ok(())
    }

    /// A projection whose rows are `pieces` of the model's.
    fn put_rows<'a>(
        &'a self,
        writer: &mut Writer<'a>,
        l: usize,
        name: &str,
        linear: &'a Linear,
        pieces: &[Piece],
    ) {
        let weight = &linear.weight;
        let rows: usize = pieces.iter().map(Piece::len).sum();
        let name = format!("blk.{l}.{name}");
        let whole = [Piece::Kept(0..weight.cols)];
        self.put_weight(writer, format!("{name}.weight"), weight, pieces, &whole);
        if let Some(bias) = &linear.bias {
            let mut data = Vec::with_capacity(rows);
            for piece in pieces {
                match piece {
                    Piece::Kept(range) => data.extend_from_slice(&bias[range.clone()]),
                    Piece::Zeros(n) => data.extend(std::iter::repeat_n(0.0, *n)),
                }
            }
            put_vector(writer, &format!("{name}.bias"), &data);
        }
    }

    /// A projection whose columns are `pieces` of the model's, whole blocks each.
    fn put_columns<'a>(
        &'a self,
        writer: &mut Writer<'a>,
        l: usize,
        name: &str,
        weight: &'a Weight,
        bias: Option<Vec<f32>>,
        pieces: &[Piece],
    ) {
        let name = format!("blk.{l}.{name}");
        let whole = [Piece::Kept(0..weight.rows)];
        self.put_weight(writer, format!("{name}.weight"), weight, &whole, pieces);
        if let Some(bias) = bias {
            put_vector(writer, &format!("{name}.bias"), &bias);
        }
    }

    /// A weight whose rows and columns are pieces of the model's; columns are whole blocks.
    fn put_weight<'a>(
        &'a self,
        writer: &mut Writer<'a>,
        name: String,
        weight: &'a Weight,
        rows: &[Piece],
        cols: &[Piece],
    ) {
        let len = |pieces: &[Piece]| pieces.iter().map(Piece::len).sum::<usize>();
        let (shape, block_type) = ([len(rows), len(cols)], weight.block_type);
        let bytes = &self.model.map.bytes()[weight.range.clone()];
        match (
            is_all(rows, weight.rows) && is_all(cols, weight.cols),
            weight.is_sparse(),
        ) {
            (true, true) => writer.sparse(name, shape, block_type, bytes),
            (true, false) => writer.tensor(name, &shape, block_type, bytes),
            (false, false) => {
                let data = cut(block_type, weight.cols, bytes, rows, cols);
                writer.tensor(name, &shape, block_type, data)
            }
            (false, true) => {
                let (native, keep) = sparse_to_native(block_type, weight.rows, weight.cols, bytes);
                let data = cut(block_type, weight.cols, &native, rows, cols);
                let (rows, cols) = (numbers(rows), numbers(cols));
                let keep = KeepMask::from_fn(rows.len(), cols.len(), |row, col| {
                    let both = rows[row].zip(cols[col]);
                    both.is_some_and(|(row, col)| keep.keep(row, col))
                });
                writer.sparse(
                    name,
                    shape,
                    block_type,
                    encode_sparse(block_type, &data, &keep),
                )
            }
        };
    }
}

/// Those pieces of the rows, and of these the pieces of the columns, of a matrix in the native layout whose rows have `width` values.
fn cut(
    block_type: BlockType,
    width: usize,
    bytes: &[u8],
    rows: &[Piece],
    cols: &[Piece],
) -> Vec<u8> {
    let row_bytes = block_type.row_bytes(width);
    let new_width: usize = cols.iter().map(Piece::len).sum();
    let zeros = zeros(block_type, new_width);
    let mut data = Vec::new();
    for piece in rows {
        let range = match piece {
            Piece::Zeros(n) => {
                (0..*n).for_each(|_| data.extend_from_slice(&zeros));
                continue;
            }
            Piece::Kept(range) => range,
        };
        for row in range.clone() {
            let row = &bytes[row * row_bytes..][..row_bytes];
            for piece in cols {
                match piece {
                    Piece::Kept(range) => data.extend_from_slice(
                        &row[block_type.row_bytes(range.start)..block_type.row_bytes(range.end)],
                    ),
                    Piece::Zeros(n) => {
                        data.extend_from_slice(&zeros[..block_type.row_bytes(*n)]);
                    }
                }
            }
        }
    }
    data
}

/// The model's row or column for each of the pieces'; `None` for zeros.
fn numbers(pieces: &[Piece]) -> Vec<Option<usize>> {
    let each = |piece: &Piece| match piece {
        Piece::Kept(range) => range.clone().map(Some).collect::<Vec<_>>(),
        Piece::Zeros(n) => vec![None; *n],
    };
    pieces.iter().flat_map(each).collect()
}

/// A run of rows or columns.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// These of the model's.
    Kept(Range<usize>),
    /// So many of zeros.
    Zeros(usize),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Piece::Kept(range) => range.len(),
            Piece::Zeros(n) => *n,
        }
    }
}

/// Units of `features` rows or columns each, in as few runs as may be.
fn units(units: &[Option<usize>], features: usize) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for unit in units {
        match (unit, pieces.last_mut()) {
            (None, Some(Piece::Zeros(n))) => *n += features,
            (None, _) => pieces.push(Piece::Zeros(features)),
            (Some(u), Some(Piece::Kept(range))) if range.end == u * features => {
                range.end += features;
            }
            (Some(u), _) => pieces.push(Piece::Kept(u * features..(u + 1) * features)),
        }
    }
    pieces
}

/// Units of rows each, in this order of the rows of each.
fn ordered(units: &[Option<usize>], order: &[usize]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for unit in units {
        match unit {
            None => pieces.push(Piece::Zeros(order.len())),
            Some(u) => pieces.extend(order.iter().map(|row| {
                let row = u * order.len() + row;
                Piece::Kept(row..row + 1)
            })),
        }
    }
    pieces
}

/// Whether some of the projections, by their places in [`Layer::linears`], have biases.
fn has_biases(model: &Model, places: Range<usize>) -> bool {
    let linears = |layer: &Layer| {
        layer.linears()[places.clone()]
            .iter()
            .any(|linear| linear.bias.is_some())
    };
    model.layers.iter().any(linears)
}

/// Whether the pieces are all of `len` rows or columns as they are.
fn is_all(pieces: &[Piece], len: usize) -> bool {
    matches!(pieces, [Piece::Kept(range)] if *range == (0..len))
}

/// `values` zeros, encoded.
fn zeros(block_type: BlockType, values: usize) -> Vec<u8> {
    let mut bytes = vec![0; block_type.row_bytes(values)];
    encode_row(block_type, &vec![0.0; values], &mut bytes);
    bytes
}

fn put_vector(writer: &mut Writer, name: &str, values: &[f32]) {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    writer.tensor(name, &[values.len()], BlockType::F32, bytes);
}

/// The layer that a tensor belongs to, by its name.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_become_even_with_as_few_heads_more_as_may_be() {
        for (sizes, may_add, group) in [
            (vec![3, 3, 3], true, 3),
            (vec![3, 3, 2], true, 3),
            // One KV head more, or two query heads more.
            (vec![1, 1, 2], true, 1),
            (vec![4, 2, 2], true, 2),
            (vec![4, 2, 2], false, 2),
            (vec![3, 2, 1], true, 3),
            (vec![3, 2, 1], false, 1),
            (vec![6, 9, 3], false, 3),
            (vec![5], true, 5),
        ] {
            assert_eq!(even_group(&sizes, may_add), group, "{sizes:?} {may_add}");
        }
    }
}
