//! What matrices are multiplied by, in the forms in which kernels read it.

use std::ops::Range;

use super::team::SharedSlice;
use super::{
    ACTIVATION_BLOCK, Kernels, MatrixView, Moments, TILE_COLS, TILE_TOKENS, Team, Tile, call,
    moments, sys, with_scratch,
};

/// Activations X `[tokens, cols]`, row-major, that matrices are multiplied by, and their other forms: made while X is
/// written, where the matrices are known by then ([`Activations::produce`]), else when a matrix asks for them.
#[derive(Debug, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// The forms that X is there in.
    forms: Forms,
    values: Vec<f32>,
    quantized: Vec<i8>,
    scales: Vec<f32>,
    block_sums: Vec<f32>,
    code_sums: Vec<i32>,
    /// bfloat16, `[tokens / TILE_TOKENS, cols / TILE_COLS]`, both rounded up.
    tiles: Vec<Tile>,
    moments: Moments,
}

/// What is to be left of [`Activations`] besides the forms that matrices ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    #[default]
    Nothing,
    Moments,
    Values,
}

#[derive(Debug, Clone, Copy, Default)]
struct Forms {
    values: bool,
    quantized: bool,
    tiles: bool,
    moments: bool,
}

impl Forms {
    /// What these matrices ask for of so many tokens.
    fn wanted(kernels: Kernels, readers: &[MatrixView], tokens: usize) -> Self {
        let mut forms = Self::default();
        for reader in readers {
            // SAFETY: the function has no preconditions.
            match unsafe { call!(kernels, activation_form(&reader.to_sys(), tokens)) } {
                sys::fk_form::FK_FORM_FLOAT => forms.values = true,
                // Rows that fill no group are multiplied by plain values.
                sys::fk_form::FK_FORM_INT8 => (forms.values, forms.quantized) = (true, true),
                sys::fk_form::FK_FORM_BF16 => forms.tiles = true,
            }
        }
        forms
    }
}

impl Activations {
    /// Takes on a new shape and gives out the values to be written, `[tokens, cols]`, whose contents are arbitrary.
    pub fn begin(&mut self, tokens: usize, cols: usize) -> &mut [f32] {
        self.tokens = tokens;
        self.cols = cols;
        self.forms = Forms {
            values: true,
            ..Forms::default()
        };
        grow(&mut self.values, tokens * cols, 0.0);
        &mut self.values[..tokens * cols]
    }

    /// Takes on a new shape and lets `write(t, row)` write the values of every token t, `[cols]`, whose contents are arbitrary
    /// before. Some tokens at a time are brought into the forms that `readers` will ask for, while they are in the cache. Plain
    /// values stay only if a reader needs them.
    pub fn produce(
        &mut self,
        kernels: Kernels,
        team: &Team,
        tokens: usize,
        cols: usize,
        readers: &[MatrixView],
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let sink = self.sink(kernels, tokens, cols, readers, Keep::Nothing);
        let some = if sink.forms.tiles { TILE_TOKENS } else { 1 };
        team.items(tokens.div_ceil(some), |_, i| {
            let tokens = i * some..((i + 1) * some).min(tokens);
            let fill = |x: &mut [f32]| {
                for (t, row) in tokens.clone().zip(x.chunks_exact_mut(cols.max(1))) {
                    write(t, row);
                }
                // SAFETY: every item is handed out once and has its own tokens, which begin at a whole tile.
                unsafe { sink.put_forms(tokens.clone(), 0..cols, x) };
            };
            if sink.forms.values {
                // SAFETY: as above.
                fill(unsafe { sink.values.range(tokens.start * cols..tokens.end * cols) });
            } else {
                with_scratch(tokens.len() * cols, fill);
            }
        });
    }

    /// Takes on a new shape, to be filled piece by piece.
    pub(super) fn sink(
        &mut self,
        kernels: Kernels,
        tokens: usize,
        cols: usize,
        readers: &[MatrixView],
        keep: Keep,
    ) -> Sink<'_> {
        let mut forms = Forms::wanted(kernels, readers, tokens);
        forms.values |= keep == Keep::Values || readers.is_empty();
        forms.moments = keep == Keep::Moments;
        self.tokens = tokens;
        self.cols = cols;
        self.forms = forms;
        self.fit(forms);
        Sink {
            kernels,
            tokens,
            cols,
            forms,
            values: SharedSlice::new(&mut self.values),
            quantized: SharedSlice::new(&mut self.quantized),
            scales: SharedSlice::new(&mut self.scales),
            block_sums: SharedSlice::new(&mut self.block_sums),
            code_sums: SharedSlice::new(&mut self.code_sums),
            tiles: SharedSlice::new(&mut self.tiles),
            moments: forms
                .moments
                .then(|| self.moments.begin(kernels, tokens, cols)),
        }
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// X `[tokens, cols]`.
    ///
    /// # Panics
    /// If plain values were not kept.
    pub fn values(&self) -> &[f32] {
        assert!(self.forms.values, "plain values were not kept");
        &self.values[..self.tokens * self.cols]
    }

    /// Those of X, if they were kept.
    pub fn moments(&self) -> Option<&Moments> {
        self.forms.moments.then_some(&self.moments)
    }

    /// X in the forms that these matrices ask for; what is not there yet is made of the plain values.
    ///
    /// # Panics
    /// If these are needed and were not kept.
    pub(super) fn for_readers(
        &mut self,
        kernels: Kernels,
        team: &Team,
        readers: &[MatrixView],
    ) -> sys::fk_activations {
        let wanted = Forms::wanted(kernels, readers, self.tokens);
        let missing = Forms {
            quantized: wanted.quantized && !self.forms.quantized,
            tiles: wanted.tiles && !self.forms.tiles,
            ..Forms::default()
        };
        assert!(
            self.forms.values || !(wanted.values || missing.quantized || missing.tiles),
            "plain values were not kept"
        );
        if missing.quantized || missing.tiles {
            self.make(kernels, team, missing);
        }
        sys::fk_activations {
            tokens: self.tokens,
            cols: self.cols,
            values: self.values.as_ptr(),
            quantized: self.quantized.as_ptr(),
            scales: self.scales.as_ptr(),
            block_sums: self.block_sums.as_ptr(),
            code_sums: self.code_sums.as_ptr(),
            tiles: self.tiles.as_ptr().cast(),
        }
    }

    /// Makes forms of the plain values.
    fn make(&mut self, kernels: Kernels, team: &Team, missing: Forms) {
        let (tokens, cols) = (self.tokens, self.cols);
        self.fit(missing);
        let values = std::mem::take(&mut self.values);
        let sink = Sink {
            kernels,
            tokens,
            cols,
            forms: missing,
            values: SharedSlice::new(&mut []),
            quantized: SharedSlice::new(&mut self.quantized),
            scales: SharedSlice::new(&mut self.scales),
            block_sums: SharedSlice::new(&mut self.block_sums),
            code_sums: SharedSlice::new(&mut self.code_sums),
            tiles: SharedSlice::new(&mut self.tiles),
            moments: None,
        };
        let some = if missing.tiles { TILE_TOKENS } else { 1 };
        team.items(tokens.div_ceil(some), |_, i| {
            let tokens = i * some..((i + 1) * some).min(tokens);
            let x = &values[tokens.start * cols..tokens.end * cols];
            // SAFETY: every item is handed out once and has its own tokens, which begin at a whole tile.
            unsafe { sink.put_forms(tokens, 0..cols, x) };
        });
        self.values = values;
        self.forms.quantized |= missing.quantized;
        self.forms.tiles |= missing.tiles;
    }

    /// Makes room for some forms.
    fn fit(&mut self, forms: Forms) {
        let (tokens, cols) = (self.tokens, self.cols);
        if forms.values {
            grow(&mut self.values, tokens * cols, 0.0);
        }
        if forms.quantized {
            let blocks = tokens * cols / ACTIVATION_BLOCK;
            grow(&mut self.quantized, tokens * cols, 0);
            grow(&mut self.scales, blocks, 0.0);
            grow(&mut self.block_sums, blocks, 0.0);
            grow(&mut self.code_sums, 2 * blocks, 0);
        }
        if forms.tiles {
            let count = tokens.div_ceil(TILE_TOKENS) * cols.div_ceil(TILE_COLS);
            grow(&mut self.tiles, count, Tile::ZERO);
        }
    }
}

/// Room for `len` values. Buffers never shrink: what is beyond a batch costs nothing, and growing again would.
fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
}

/// Where several threads put pieces of [`Activations`].
pub(super) struct Sink<'a> {
    kernels: Kernels,
    tokens: usize,
    cols: usize,
    forms: Forms,
    values: SharedSlice<'a, f32>,
    quantized: SharedSlice<'a, i8>,
    scales: SharedSlice<'a, f32>,
    block_sums: SharedSlice<'a, f32>,
    code_sums: SharedSlice<'a, i32>,
    tiles: SharedSlice<'a, Tile>,
    moments: Option<moments::Writer<'a>>,
}

impl Sink<'_> {
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Puts x `[tokens.len(), cols.len()]` in its place. Tokens must begin at a multiple of [`TILE_TOKENS`], for moments at one of
    /// the kernels' `attend_tokens`, and columns at one of [`TILE_COLS`].
    ///
    /// # Safety
    /// No other thread may hold any of these values, nor others of the same tile or block.
    pub(super) unsafe fn put(&self, tokens: Range<usize>, cols: Range<usize>, x: &[f32]) {
        if self.forms.values {
            for (t, row) in tokens.clone().zip(x.chunks_exact(cols.len().max(1))) {
                let first = t * self.cols;
                // SAFETY: the caller vouches for it.
                let to = unsafe { self.values.range(first + cols.start..first + cols.end) };
                to.copy_from_slice(row);
            }
        }
        if let Some(moments) = &self.moments {
            // SAFETY: the caller vouches for it.
            unsafe { moments.put(tokens.clone(), cols.clone(), x) };
        }
        // SAFETY: the caller vouches for it.
        unsafe { self.put_forms(tokens, cols, x) };
    }

    /// As [`Sink::put`], in the forms for matrices alone.
    ///
    /// # Safety
    /// As there.
    unsafe fn put_forms(&self, tokens: Range<usize>, cols: Range<usize>, x: &[f32]) {
        let width = cols.len();
        if width == 0 {
            return;
        }
        if self.forms.quantized {
            let per_token = self.cols / ACTIVATION_BLOCK;
            let blocks = cols.start / ACTIVATION_BLOCK..cols.end / ACTIVATION_BLOCK;
            for (t, row) in tokens.clone().zip(x.chunks_exact(width)) {
                let at = |r: &Range<usize>, n: usize| t * n + r.start..t * n + r.end;
                let blocks_of_row = at(&blocks, per_token);
                // SAFETY: the caller vouches for it.
                let (q, d, s, n) = unsafe {
                    (
                        self.quantized.range(at(&cols, self.cols)),
                        self.scales.range(blocks_of_row.clone()),
                        self.block_sums.range(blocks_of_row.clone()),
                        self.code_sums
                            .range(2 * blocks_of_row.start..2 * blocks_of_row.end),
                    )
                };
                self.kernels.quantize(row, q, d, s, n);
            }
        }
        if self.forms.tiles {
            debug_assert!(tokens.start.is_multiple_of(TILE_TOKENS), "whole tiles");
            let per_row = self.cols.div_ceil(TILE_COLS);
            let (first, count) = (cols.start / TILE_COLS, width.div_ceil(TILE_COLS));
            for (i, x) in x.chunks(TILE_TOKENS * width).enumerate() {
                let row = (tokens.start / TILE_TOKENS + i) * per_row + first;
                // SAFETY: the caller vouches for it.
                let tiles = unsafe { self.tiles.range(row..row + count) };
                self.kernels.fill_tiles(x, width, tiles);
            }
        }
    }
}
