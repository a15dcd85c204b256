//! What matrices are multiplied by, in the forms in which kernels read it.

use std::ops::Range;

use super::team::SharedSlice;
use super::{
    ACTIVATION_BLOCK, Kernels, MatrixView, Moments, Phase, TILE_COLS, TILE_TOKENS, Team, Tile,
    Tokens, call, moments, sys, with_scratch,
};

/// Activations X `[tokens, cols]`, row-major, that matrices are multiplied by, and their other forms: made while X is
/// written, where the matrices are known by then ([`Activations::produce`]), else when a matrix asks for them.
#[derive(Debug, Default)]
pub struct Activations {
    tokens: Tokens,
    cols: usize,
    /// The forms that X is there in.
    forms: Forms,
    values: Vec<f32>,
    quantized: Plane,
    /// bfloat16, `[tokens / TILE_TOKENS, cols / TILE_COLS]`, both rounded up.
    tiles: Vec<Tile>,
    moments: Moments,
}

/// What is to be left of [`Activations`] besides the forms that matrices ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// See [`Activations::moments`].
    Moments,
    /// Plain values; see [`Activations::values`].
    Values,
}

#[derive(Debug, Clone, Copy, Default)]
struct Forms {
    values: bool,
    quantized: bool,
    /// Whether `quantized` has a scale for each half of a block.
    halves: bool,
    tiles: bool,
    moments: bool,
}

/// How close 8-bit forms come to [`Activations`] in prefill; generated tokens are always as with `Normal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// A scale for each block of [`ACTIVATION_BLOCK`].
    Normal,
    /// One for each half of it.
    High,
}

/// Values in 8 bits; see [`Kernels::quantize`].
#[derive(Debug, Default)]
struct Plane {
    codes: Vec<i8>,
    scales: Vec<f32>,
    scaled_sums: Vec<f32>,
    code_sums: Vec<i32>,
}

impl Plane {
    fn fit(&mut self, values: usize) {
        let blocks = values / ACTIVATION_BLOCK;
        grow(&mut self.codes, values, 0);
        grow(&mut self.scales, 2 * blocks, 0.0);
        grow(&mut self.scaled_sums, 2 * blocks, 0.0);
        grow(&mut self.code_sums, 2 * blocks, 0);
    }

    fn share(&mut self) -> SharedPlane<'_> {
        SharedPlane {
            codes: SharedSlice::new(&mut self.codes),
            scales: SharedSlice::new(&mut self.scales),
            scaled_sums: SharedSlice::new(&mut self.scaled_sums),
            code_sums: SharedSlice::new(&mut self.code_sums),
        }
    }
}

struct SharedPlane<'a> {
    codes: SharedSlice<'a, i8>,
    scales: SharedSlice<'a, f32>,
    scaled_sums: SharedSlice<'a, f32>,
    code_sums: SharedSlice<'a, i32>,
}

impl SharedPlane<'_> {
    /// The places of whole blocks from value `first` on, of which `len` values are to be written, with a scale for each block or
    /// for each half.
    fn at(&self, first: usize, len: usize, halves: bool) -> sys::fk_plane {
        assert!(first.is_multiple_of(ACTIVATION_BLOCK) && first + len <= self.codes.len());
        let block = first / ACTIVATION_BLOCK;
        let scale = if halves { 2 * block } else { block };
        // SAFETY: there are as many places as values, and for each block two of everything else.
        unsafe {
            sys::fk_plane {
                quantized: self.codes.as_mut_ptr().add(first),
                scales: self.scales.as_mut_ptr().add(scale),
                scaled_sums: self.scaled_sums.as_mut_ptr().add(scale),
                code_sums: self.code_sums.as_mut_ptr().add(2 * block),
            }
        }
    }
}

impl Forms {
    /// What these matrices ask for in a phase.
    fn wanted(kernels: Kernels, readers: &[MatrixView], phase: Phase) -> Self {
        let mut forms = Self::default();
        for reader in readers {
            // SAFETY: the function has no preconditions.
            match unsafe { call!(kernels, activation_form(&reader.to_sys(), phase.to_sys())) } {
                sys::fk_form::FK_FORM_FLOAT => forms.values = true,
                sys::fk_form::FK_FORM_INT8 => {
                    forms.quantized = true;
                    // Rows that fill no group are multiplied by plain values.
                    forms.values |= !reader.is_grouped_whole();
                }
                sys::fk_form::FK_FORM_BF16 => forms.tiles = true,
            }
        }
        forms
    }
}

impl Activations {
    /// Takes on a new shape and gives out the values to be written, `[tokens, cols]`, whose contents are arbitrary.
    pub fn begin(&mut self, tokens: Tokens, cols: usize) -> &mut [f32] {
        self.tokens = tokens;
        self.cols = cols;
        self.forms = Forms {
            values: true,
            ..Forms::default()
        };
        grow(&mut self.values, tokens.count * cols, 0.0);
        &mut self.values[..tokens.count * cols]
    }

    /// Takes on a new shape and lets `write(t, row)` write the values of every token t, `[cols]`, whose contents are arbitrary
    /// before. Some tokens at a time are brought into the forms that `readers` will ask for, while they are in the cache. Plain
    /// values stay only if a reader needs them.
    #[allow(clippy::too_many_arguments)] // a shape, what is to come of it, and who computes
    pub fn produce(
        &mut self,
        team: &Team,
        tokens: Tokens,
        cols: usize,
        readers: &[MatrixView],
        precision: Precision,
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let kernels = team.kernels();
        let sink = self.sink(kernels, tokens, cols, readers, Keep::Nothing, precision);
        let some = if sink.forms.tiles { TILE_TOKENS } else { 1 };
        team.items(tokens.count.div_ceil(some), |i| {
            let tokens = i * some..((i + 1) * some).min(tokens.count);
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
        tokens: Tokens,
        cols: usize,
        readers: &[MatrixView],
        keep: Keep,
        precision: Precision,
    ) -> Sink<'_> {
        let mut forms = Forms::wanted(kernels, readers, tokens.phase);
        forms.values |= keep == Keep::Values || readers.is_empty();
        forms.moments = keep == Keep::Moments;
        forms.halves =
            forms.quantized && tokens.phase == Phase::Prefill && precision == Precision::High;
        self.tokens = tokens;
        self.cols = cols;
        self.forms = forms;
        self.fit(forms);
        Sink {
            kernels,
            tokens: tokens.count,
            cols,
            forms,
            values: SharedSlice::new(&mut self.values),
            quantized: self.quantized.share(),
            tiles: SharedSlice::new(&mut self.tiles),
            moments: forms
                .moments
                .then(|| self.moments.begin(kernels, tokens.count, cols)),
        }
    }

    pub fn tokens(&self) -> Tokens {
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
        &self.values[..self.tokens.count * self.cols]
    }

    /// The moments of X; `None` where they were not kept.
    pub fn moments(&self) -> Option<&Moments> {
        self.forms.moments.then_some(&self.moments)
    }

    /// X in the forms that these matrices ask for; what is not there yet is made of the plain values.
    ///
    /// # Panics
    /// If these are needed and were not kept.
    pub(super) fn for_readers(
        &mut self,
        team: &Team,
        readers: &[MatrixView],
    ) -> sys::fk_activations {
        let kernels = team.kernels();
        let wanted = Forms::wanted(kernels, readers, self.tokens.phase);
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
            self.make(team, missing);
        }
        sys::fk_activations {
            phase: self.tokens.phase.to_sys(),
            tokens: self.tokens.count,
            cols: self.cols,
            values: self.values.as_ptr(),
            quantized: self.quantized.codes.as_ptr(),
            halves: self.forms.halves.into(),
            scales: self.quantized.scales.as_ptr(),
            scaled_sums: self.quantized.scaled_sums.as_ptr(),
            code_sums: self.quantized.code_sums.as_ptr(),
            tiles: self.tiles.as_ptr().cast(),
        }
    }

    /// Makes forms of the plain values.
    fn make(&mut self, team: &Team, missing: Forms) {
        let kernels = team.kernels();
        let (tokens, cols) = (self.tokens.count, self.cols);
        self.fit(missing);
        let values = std::mem::take(&mut self.values);
        let sink = Sink {
            kernels,
            tokens,
            cols,
            forms: missing,
            values: SharedSlice::new(&mut []),
            quantized: self.quantized.share(),
            tiles: SharedSlice::new(&mut self.tiles),
            moments: None,
        };
        let some = if missing.tiles { TILE_TOKENS } else { 1 };
        team.items(tokens.div_ceil(some), |i| {
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
        let (tokens, cols) = (self.tokens.count, self.cols);
        if forms.values {
            grow(&mut self.values, tokens * cols, 0.0);
        }
        if forms.quantized {
            self.quantized.fit(tokens * cols);
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
    quantized: SharedPlane<'a>,
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

    /// Puts x in its place as [`Sink::put`] does, in the forms for matrices alone.
    ///
    /// # Safety
    /// The same as of [`Sink::put`].
    unsafe fn put_forms(&self, tokens: Range<usize>, cols: Range<usize>, x: &[f32]) {
        let width = cols.len();
        if width == 0 {
            return;
        }
        if self.forms.quantized {
            debug_assert!(width.is_multiple_of(ACTIVATION_BLOCK), "whole blocks");
            let first = tokens.start * self.cols + cols.start;
            let len = (tokens.len().max(1) - 1) * self.cols + width;
            let halves = self.forms.halves;
            let to = self.quantized.at(first, len, halves);
            // SAFETY: the plane has room for so many rows at this distance, which nobody else holds, as the caller vouches.
            unsafe {
                call!(
                    self.kernels,
                    quantize(
                        x.as_ptr(),
                        tokens.len(),
                        width,
                        self.cols,
                        halves.into(),
                        &to
                    )
                );
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
