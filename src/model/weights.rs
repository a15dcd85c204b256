//! Weights as typed views on the map.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Config, Module, ModuleId, Rope};
use crate::gguf::{Map, MetadataWarning};
use crate::kernels::MatrixView;
use crate::quant::{
    BlockType, Layout, decode_narrow_row, decode_packed_row, decode_row, decode_sparse_row,
    sparse_kept,
};

/// A weight matrix `[rows, cols]` = `[out_features, in_features]`: where and how it lies in the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// The tensor's name in the file, for messages.
    pub name: String,
    pub block_type: BlockType,
    pub layout: Layout,
    pub rows: usize,
    pub cols: usize,
    /// The bytes of the map that it takes, exactly.
    pub range: Range<usize>,
}

impl Weight {
    pub fn view<'m>(&self, map: &'m Map) -> MatrixView<'m> {
        MatrixView::new(
            self.block_type,
            self.layout,
            self.rows,
            self.cols,
            &map.bytes()[self.range.clone()],
        )
    }

    /// Bytes of a row.
    ///
    /// # Panics
    /// If the weight is sparse or narrow, since its rows differ.
    pub fn row_bytes(&self) -> usize {
        let rows_differ = matches!(self.layout, Layout::Sparse | Layout::Narrow);
        assert!(!rows_differ, "{} is {:?}", self.name, self.layout);
        self.block_type.row_bytes(self.cols)
    }

    pub fn is_sparse(&self) -> bool {
        self.layout == Layout::Sparse
    }

    /// Decodes one row into `out`, `[cols]`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn decode_row(&self, map: &Map, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "row {row} of {}",
            self.name
        );
        let bytes = &map.bytes()[self.range.clone()];
        match self.layout {
            Layout::Native => decode_row(
                self.block_type,
                &bytes[row * self.row_bytes()..][..self.row_bytes()],
                out,
            ),
            Layout::Packed => decode_packed_row(self.block_type, bytes, row, out),
            Layout::Sparse => decode_sparse_row(self.block_type, self.rows, bytes, row, out),
            Layout::Narrow => decode_narrow_row(self.block_type, bytes, row, out),
        }
    }

    /// Decodes the whole matrix, `[rows, cols]`.
    pub fn decode(&self, map: &Map) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        if self.cols > 0 {
            for (i, row) in values.chunks_exact_mut(self.cols).enumerate() {
                self.decode_row(map, i, row);
            }
        }
        values
    }

    /// Its values, those that were removed included.
    pub fn parameters(&self) -> usize {
        self.rows * self.cols
    }

    /// The values that there are: all, unless it is sparse.
    pub fn kept(&self, map: &Map) -> usize {
        match self.layout {
            Layout::Native | Layout::Packed | Layout::Narrow => self.parameters(),
            Layout::Sparse => {
                let bytes = &map.bytes()[self.range.clone()];
                sparse_kept(self.block_type, self.rows, self.cols, bytes)
            }
        }
    }

    /// The bytes that it takes: of a narrow weight those that it takes in files.
    pub fn bytes(&self) -> usize {
        match self.layout {
            Layout::Narrow => self.rows * self.block_type.row_bytes(self.cols),
            Layout::Native | Layout::Packed | Layout::Sparse => self.range.len(),
        }
    }

    /// The bytes that a product with it reads.
    pub fn bytes_read(&self) -> usize {
        self.range.len()
    }
}

/// y = W x + bias.
#[derive(Debug, Clone)]
pub struct Linear {
    pub weight: Weight,
    /// `[rows]`. Biases and norms are vectors of a few KiB a layer; they are decoded once.
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    /// A projection `[rows, cols]` that nothing is left of: one of the two is 0.
    pub(super) fn empty(name: String, rows: usize, cols: usize) -> Self {
        debug_assert!(rows == 0 || cols == 0);
        Self {
            weight: Weight {
                name,
                block_type: BlockType::F32,
                layout: Layout::Native,
                rows,
                cols,
                range: 0..0,
            },
            bias: None,
        }
    }
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    pub attention_norm: Vec<f32>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// The norms of every head of queries and of keys, `[head_dim]`; `None` where they have none.
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    /// The norm of what `o` leaves, before it is added to the residual stream; `None` where there is none.
    pub attention_post_norm: Option<Vec<f32>>,
    /// How queries and keys are turned; `None` where they are not.
    pub rope: Option<Arc<Rope>>,
    /// The last positions that attention sees; `None` where it sees all.
    pub window: Option<usize>,
    /// Query heads that read each KV head; query heads lie in the order of their KV heads.
    pub group_sizes: Vec<usize>,
    pub mlp_norm: Vec<f32>,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    /// The norm of what `down` leaves, as that of `o`.
    pub mlp_post_norm: Option<Vec<f32>>,
}

impl Layer {
    pub fn heads(&self) -> usize {
        self.group_sizes.iter().sum()
    }

    pub fn kv_heads(&self) -> usize {
        self.group_sizes.len()
    }

    pub fn channels(&self) -> usize {
        self.down.weight.cols
    }

    /// The seven projections: q, k, v, o, gate, up, down.
    pub fn linears(&self) -> [&Linear; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
    }

    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.o,
            &mut self.gate,
            &mut self.up,
            &mut self.down,
        ]
    }

    /// Its norms.
    pub fn norms(&self) -> impl Iterator<Item = &Vec<f32>> {
        let some = [
            &self.q_norm,
            &self.k_norm,
            &self.attention_post_norm,
            &self.mlp_post_norm,
        ];
        let some = some.into_iter().flatten();
        [&self.attention_norm, &self.mlp_norm]
            .into_iter()
            .chain(some)
    }

    /// Parameters of the attention and MLP weights, without norms and biases.
    pub fn parameters(&self) -> usize {
        self.linears().iter().map(|l| l.weight.parameters()).sum()
    }

    /// Bytes of the attention and MLP weights.
    pub fn bytes(&self) -> usize {
        self.linears().iter().map(|l| l.weight.bytes()).sum()
    }
}

/// A model: its shape, and its weights on the map that it owns.
#[derive(Debug)]
pub struct Model {
    pub path: PathBuf,
    pub config: Config,
    pub map: Map,
    pub embedding: Weight,
    pub layers: Vec<Layer>,
    pub output_norm: Vec<f32>,
    /// The output head; `None` when it is tied to the embedding.
    pub output: Option<Weight>,
    /// What of the file's metadata was passed over, or assumed.
    pub warnings: Vec<MetadataWarning>,
}

impl Model {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The output head, `[vocabulary, embedding_length]`.
    pub fn head(&self) -> &Weight {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// The norm of what a module leaves, before it is added to the residual stream; `None` where there is none.
    pub fn post_norm(&self, module: ModuleId) -> Option<&[f32]> {
        let layer = &self.layers[module.layer()];
        let norm = match module.kind() {
            Module::Attention => &layer.attention_post_norm,
            Module::Mlp => &layer.mlp_post_norm,
        };
        norm.as_deref()
    }

    /// Parameters of all weight matrices and vectors.
    pub fn parameters(&self) -> usize {
        let bias = |l: &Linear| l.bias.as_ref().map_or(0, Vec::len);
        let layers: usize = self
            .layers
            .iter()
            .map(|l| {
                l.parameters()
                    + l.linears().into_iter().map(bias).sum::<usize>()
                    + l.norms().map(Vec::len).sum::<usize>()
            })
            .sum();
        layers
            + self.embedding.parameters()
            + self.output.as_ref().map_or(0, Weight::parameters)
            + self.output_norm.len()
    }

    /// Parameters of the layers' attention and MLP weights: what a pruning ratio counts.
    pub fn layer_parameters(&self) -> usize {
        self.layers.iter().map(Layer::parameters).sum()
    }

    /// Bytes of all weight matrices.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>()
            + self.embedding.bytes()
            + self.output.as_ref().map_or(0, Weight::bytes)
    }

    /// Bytes of weights that generating one token reads.
    pub fn bytes_per_token(&self) -> usize {
        let linears = self.layers.iter().flat_map(Layer::linears);
        let layers: usize = linears.map(|l| l.weight.bytes_read()).sum();
        layers + self.head().bytes_read()
    }
}
