//! Weights times activations.

use super::team::SharedSlice;
use super::{
    ACTIVATION_BLOCK, Kernels, TILE_COLS, TILE_TOKENS, Team, Tile, call, sys, type_of, with_scratch,
};
use crate::quant::{BlockType, Layout};

/// A stored weight matrix W `[rows, cols]`, row-major: a view on bytes that lie elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    block_type: BlockType,
    layout: Layout,
    rows: usize,
    cols: usize,
    data: &'a [u8],
}

impl<'a> MatrixView<'a> {
    /// # Panics
    /// If `data` is not exactly the bytes of such a matrix.
    pub fn new(
        block_type: BlockType,
        layout: Layout,
        rows: usize,
        cols: usize,
        data: &'a [u8],
    ) -> Self {
        assert_eq!(
            data.len(),
            rows * block_type.row_bytes(cols),
            "a matrix of {rows} x {cols} {}",
            block_type.name()
        );
        Self {
            block_type,
            layout,
            rows,
            cols,
            data,
        }
    }

    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    fn row_bytes(&self) -> usize {
        self.block_type.row_bytes(self.cols)
    }

    fn to_sys(self) -> sys::fk_weights {
        sys::fk_weights {
            type_: type_of(self.block_type),
            layout: match self.layout {
                Layout::Native => sys::fk_layout::FK_LAYOUT_NATIVE,
                Layout::Packed => sys::fk_layout::FK_LAYOUT_PACKED,
            },
            data: self.data.as_ptr(),
            row_bytes: self.row_bytes(),
            rows: self.rows,
            cols: self.cols,
        }
    }
}

/// Activations X `[tokens, cols]`, row-major, that matrices are multiplied by, and their other forms, made when a matrix
/// asks for them.
#[derive(Debug, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    values: Vec<f32>,
    quantized: Vec<i8>,
    scales: Vec<f32>,
    block_sums: Vec<f32>,
    code_sums: Vec<i32>,
    is_quantized: bool,
    /// bfloat16, `[tokens / TILE_TOKENS, cols / TILE_COLS]`, both rounded up.
    tiles: Vec<Tile>,
    is_tiled: bool,
}

impl Activations {
    /// Takes on a new shape and gives out the values to be written, `[tokens, cols]`, whose contents are arbitrary.
    pub fn begin(&mut self, tokens: usize, cols: usize) -> &mut [f32] {
        self.tokens = tokens;
        self.cols = cols;
        self.is_quantized = false;
        self.is_tiled = false;
        grow(&mut self.values, tokens * cols, 0.0);
        &mut self.values[..tokens * cols]
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// X `[tokens, cols]`.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.tokens * self.cols]
    }

    fn quantize(&mut self, kernels: Kernels, team: &Team) {
        if self.is_quantized {
            return;
        }
        let blocks = self.cols / ACTIVATION_BLOCK;
        grow(&mut self.quantized, self.tokens * self.cols, 0);
        grow(&mut self.scales, self.tokens * blocks, 0.0);
        grow(&mut self.block_sums, self.tokens * blocks, 0.0);
        grow(&mut self.code_sums, 2 * self.tokens * blocks, 0);
        let quantized = SharedSlice::new(&mut self.quantized);
        let scales = SharedSlice::new(&mut self.scales);
        let sums = SharedSlice::new(&mut self.block_sums);
        let code_sums = SharedSlice::new(&mut self.code_sums);
        team.items(self.tokens, |_, t| {
            let row = t * self.cols..(t + 1) * self.cols;
            let row_blocks = t * blocks..(t + 1) * blocks;
            // SAFETY: every token is handed out once, and the rows of different tokens do not overlap.
            let (q, d, s, n) = unsafe {
                (
                    quantized.range(row.clone()),
                    scales.range(row_blocks.clone()),
                    sums.range(row_blocks),
                    code_sums.range(2 * t * blocks..2 * (t + 1) * blocks),
                )
            };
            kernels.quantize(&self.values[row], q, d, s, n);
        });
        self.is_quantized = true;
    }

    fn tile(&mut self, kernels: Kernels, team: &Team) {
        if self.is_tiled {
            return;
        }
        let width = self.cols.div_ceil(TILE_COLS);
        let count = self.tokens.div_ceil(TILE_TOKENS) * width;
        grow(&mut self.tiles, count, Tile::ZERO);
        let values = &self.values[..self.tokens * self.cols];
        let rows: Vec<&[f32]> = values.chunks(TILE_TOKENS * self.cols).collect();
        team.chunks_mut(&mut self.tiles[..count], width, |i, tiles| {
            kernels.fill_tiles(rows[i], self.cols, tiles);
        });
        self.is_tiled = true;
    }
}

/// Room for `len` values. Buffers never shrink: what is beyond a batch costs nothing, and growing again would.
fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
}

/// Rows that a thread takes at a time when there are many tokens; the more, the less often the activations pass through its
/// caches.
const PANEL_ROWS: usize = 128;
/// Panels are lower where each thread would get fewer of them than this.
const PANELS_PER_THREAD: usize = 6;

/// One matrix of a [`matmul`] and where its product goes.
pub struct Product<'w, 'o> {
    pub weights: MatrixView<'w>,
    /// `[tokens, rows]`
    pub out: &'o mut [f32],
}

/// out = X Wᵀ for several matrices that share their input, in one step of the team; work is split by bytes.
///
/// # Panics
/// If a shape does not fit.
pub fn matmul(kernels: Kernels, team: &Team, x: &mut Activations, products: &mut [Product]) {
    let tokens = x.tokens;
    if tokens == 0 {
        return;
    }
    if x.cols == 0 {
        // A layer that lost all of its heads or channels: the sum over nothing.
        products.iter_mut().for_each(|p| p.out.fill(0.0));
        return;
    }
    for product in products.iter() {
        assert_eq!(product.weights.cols, x.cols, "columns of a matrix");
        assert_eq!(
            product.out.len(),
            tokens * product.weights.rows,
            "room for a product"
        );
        let weights = product.weights.to_sys();
        // SAFETY: the function has no preconditions.
        match unsafe { call!(kernels, activation_form(&weights, tokens)) } {
            sys::fk_form::FK_FORM_FLOAT => {}
            sys::fk_form::FK_FORM_INT8 => x.quantize(kernels, team),
            sys::fk_form::FK_FORM_BF16 => x.tile(kernels, team),
        }
    }
    let activations = sys::fk_activations {
        tokens,
        cols: x.cols,
        values: x.values.as_ptr(),
        quantized: x.quantized.as_ptr(),
        scales: x.scales.as_ptr(),
        block_sums: x.block_sums.as_ptr(),
        code_sums: x.code_sums.as_ptr(),
        tiles: x.tiles.as_ptr().cast(),
    };
    let x = SharedActivations(&activations);
    let jobs: Vec<Job> = products
        .iter_mut()
        .map(|p| Job {
            weights: p.weights,
            stride: p.weights.rows,
            out: SharedSlice::new(p.out),
        })
        .collect();

    let granule = kernels.table().row_granule;
    // A prompt has enough work in a panel of rows to share panels out one by one, which evens out threads of unequal speed.
    // A single token has not, and streams memory best in one long run per thread.
    if tokens > 1 {
        let rows: usize = jobs.iter().map(|job| job.stride).sum();
        let fair = rows / (team.threads() * PANELS_PER_THREAD);
        let height = (fair / granule * granule).clamp(granule, PANEL_ROWS);
        let panels: Vec<(usize, usize)> = jobs
            .iter()
            .enumerate()
            .flat_map(|(j, job)| (0..job.stride).step_by(height).map(move |row| (j, row)))
            .collect();
        team.items(panels.len(), |_, i| {
            let (j, row) = panels[i];
            let end = (row + height).min(jobs[j].stride);
            // SAFETY: every panel is handed out once.
            unsafe { jobs[j].run(kernels, row, end, &x) };
        });
    } else {
        let total: usize = jobs.iter().map(|job| job.weights.data.len()).sum();
        let threads = team.threads();
        team.each(|worker| {
            let begin = total * worker / threads;
            let end = total * (worker + 1) / threads;
            let mut base = 0;
            for job in &jobs {
                let rows = job.row_at(begin, base, granule)..job.row_at(end, base, granule);
                base += job.weights.data.len();
                if !rows.is_empty() {
                    // SAFETY: one worker's end is the next one's beginning, so that no row has two workers.
                    unsafe { job.run(kernels, rows.start, rows.end, &x) };
                }
            }
        });
    }
}

struct SharedActivations<'a>(&'a sys::fk_activations);

// SAFETY: the activations are only read while they are shared.
unsafe impl Sync for SharedActivations<'_> {}

impl SharedActivations<'_> {
    fn get(&self) -> &sys::fk_activations {
        self.0
    }
}

struct Job<'w, 'o> {
    weights: MatrixView<'w>,
    stride: usize,
    out: SharedSlice<'o, f32>,
}

impl Job<'_, '_> {
    /// The row where byte `position` of all matrices in a sequence falls, if this one begins at byte `base`; rounded to
    /// the granule, and 0 or `rows` outside.
    fn row_at(&self, position: usize, base: usize, granule: usize) -> usize {
        let rows = self.weights.rows;
        let size = self.weights.data.len();
        if position <= base || rows == 0 || size == 0 {
            return if position > base { rows } else { 0 };
        }
        if position >= base + size {
            return rows;
        }
        let row = (position - base) / (size / rows);
        ((row + granule / 2) / granule * granule).min(rows)
    }

    /// # Safety
    /// No other thread may compute any of these rows at the same time.
    unsafe fn run(&self, kernels: Kernels, begin: usize, end: usize, x: &SharedActivations) {
        let weights = self.weights.to_sys();
        let x = x.get();
        // SAFETY: the function has no preconditions.
        let scratch_len = unsafe { call!(kernels, matmul_scratch(&weights, x.tokens)) };
        with_scratch(scratch_len, |scratch| {
            // SAFETY: the weights' bytes, the activations (in the form that was asked for) and the output were checked
            // against the shape by `matmul` and `MatrixView::new`; the scratch is as long as asked for; rows
            // [begin, end) of the output are ours, as the caller vouches.
            unsafe {
                call!(
                    kernels,
                    matmul(
                        &weights,
                        begin,
                        end,
                        x,
                        self.out.as_mut_ptr(),
                        self.stride,
                        scratch.as_mut_ptr()
                    )
                );
            }
        });
    }
}
