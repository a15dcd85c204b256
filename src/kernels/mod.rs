//! The safe face of the C kernels in `vendor/flapkern`: slices in, slices out, every length checked before the call.
//!
//! [`Kernels`] is one instruction set's table of functions; [`Team`] splits work among threads; [`matmul`] and
//! [`attention`] bring the two together. Shapes are row-major, lengths count values.

mod activations;
mod attention;
mod matmul;
mod matrix;
mod moments;
mod multiply;
mod sys;
mod team;
mod waiting;

use std::fmt;
use std::sync::OnceLock;

pub use activations::{Activations, Keep, Precision};
pub use attention::{AttentionShape, KV_BLOCK, KvBlocks, KvLayout, Scores, Span, attention};
pub use matmul::{Gate, Product, matmul, matmul_add, matmul_gated, matmul_then};
pub use matrix::MatrixView;
pub use moments::{Moments, MomentsPart};
pub use multiply::{Factor, Store, add_gram, multiply};
pub use team::{Pool, Team};

use crate::quant::BlockType;

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "FLAPJACK_ISA";

/// Values per block of 8-bit activations.
pub const ACTIVATION_BLOCK: usize = sys::FK_BLOCK as usize;

/// Tokens and columns of a [`Tile`].
pub const TILE_TOKENS: usize = sys::FK_TILE_TOKENS as usize;
/// See [`TILE_TOKENS`].
pub const TILE_COLS: usize = sys::FK_TILE_COLS as usize;

/// In which arithmetic a token is computed. What comes out for a token depends on its phase, and on nothing else: neither on how
/// many tokens are computed together nor on which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Phase {
    /// Tokens of a prompt: weights are decoded once for many tokens.
    #[default]
    Prefill,
    /// Generated tokens: weights are streamed from memory.
    Decode,
}

impl Phase {
    const fn to_sys(self) -> sys::fk_phase {
        match self {
            Phase::Prefill => sys::fk_phase::FK_PHASE_PREFILL,
            Phase::Decode => sys::fk_phase::FK_PHASE_DECODE,
        }
    }
}

/// How many tokens are computed together, and in which phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    pub count: usize,
    pub phase: Phase,
}

impl Tokens {
    pub const fn prefill(count: usize) -> Self {
        Self {
            count,
            phase: Phase::Prefill,
        }
    }

    pub const fn decode(count: usize) -> Self {
        Self {
            count,
            phase: Phase::Decode,
        }
    }

    /// Whether it is a single generated token, whose products stream several matrices side by side.
    pub(super) fn is_one_generated(self) -> bool {
        self == Self::decode(1)
    }
}

/// Activations of [`TILE_TOKENS`] tokens by [`TILE_COLS`] columns in bfloat16, row-major; aligned for the matrix units.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile(pub [[half::bf16; TILE_COLS]; TILE_TOKENS]);

impl Tile {
    pub const ZERO: Self = Self([[half::bf16::ZERO; TILE_COLS]; TILE_TOKENS]);
}

/// Makes [`Isa`] from its table.
macro_rules! instruction_sets {
    ($($(#[$doc:meta])* $isa:ident = $name:literal, $number:ident;)*) => {
        /// An instruction set that kernels exist for: for each architecture from the plainest to the most capable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Isa {
            $($(#[$doc])* $isa,)*
        }

        impl Isa {
            pub const ALL: [Isa; [$($name),*].len()] = [$(Isa::$isa),*];

            /// The name that [`ISA_VARIABLE`] takes.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Isa::$isa => $name,)*
                }
            }

            const fn to_sys(self) -> sys::fk_isa {
                match self {
                    $(Isa::$isa => sys::fk_isa::$number,)*
                }
            }
        }
    };
}

// Each set with its name and its number on the C side.
instruction_sets! {
    /// Plain C.
    Generic = "generic", FK_ISA_GENERIC;
    /// AVX2, FMA and F16C.
    Avx2 = "avx2", FK_ISA_AVX2;
    /// The same with AVX-VNNI, of processors without AVX-512.
    AvxVnni = "avx-vnni", FK_ISA_AVX_VNNI;
    /// AVX-512 F, BW, DQ and VL.
    Avx512 = "avx512", FK_ISA_AVX512;
    /// The same with VNNI.
    Avx512Vnni = "avx512-vnni", FK_ISA_AVX512_VNNI;
    /// These with BF16, VBMI and VBMI2.
    Avx512Bf16 = "avx512-bf16", FK_ISA_AVX512_BF16;
    /// These with AMX's tiles of bfloat16.
    Amx = "amx", FK_ISA_AMX;
    /// NEON, of every 64-bit ARM processor.
    Neon = "neon", FK_ISA_NEON;
    /// The same with the dot product instructions.
    NeonDotprod = "neon-dotprod", FK_ISA_NEON_DOTPROD;
    /// These with the 8-bit matrix instructions.
    NeonI8mm = "neon-i8mm", FK_ISA_NEON_I8MM;
}

impl Isa {
    /// The sets that this processor has and that were compiled in.
    pub fn available() -> impl Iterator<Item = Isa> {
        Self::ALL
            .into_iter()
            .filter(|isa| Kernels::for_isa(*isa).is_some())
    }
}

/// An instruction set that was asked for but cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "{ISA_VARIABLE}={asked}: {}; this machine has {}",
    if *.known { "the processor lacks this instruction set" } else { "there is no such instruction set" },
    Isa::available().map(Isa::name).collect::<Vec<_>>().join(", ")
)]
pub struct IsaError {
    asked: String,
    known: bool,
}

/// How the weights of a generated token are read. What is fastest is a matter of the processor; results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Groups of rows that are read side by side, 1 to 6; half as many where blocks have 256 values.
    pub streams: u32,
    /// Whether weights are asked for ahead of their use.
    pub fetches: bool,
}

impl Reading {
    /// What is fastest on processors of this one's maker, as far as is known.
    pub fn usual() -> Self {
        // SAFETY: the function has no preconditions.
        let sys::fk_reading { streams, fetches } = unsafe { sys::fk_usual_reading() };
        Self {
            streams,
            fetches: fetches != 0,
        }
    }

    fn to_sys(self) -> sys::fk_reading {
        sys::fk_reading {
            streams: self.streams,
            fetches: self.fetches.into(),
        }
    }
}

/// The kernels of one instruction set, and how they read weights.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    table: &'static sys::fk_kernels,
    reading: Reading,
}

// SAFETY: the table is a constant of functions without state, and its only pointer is to a constant string.
unsafe impl Sync for Kernels {}
// SAFETY: as for Sync.
unsafe impl Send for Kernels {}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernels({})", self.isa.name())
    }
}

/// Calls an entry of the table; the C side fills every one.
macro_rules! call {
    ($kernels:expr, $name:ident($($argument:expr),* $(,)?)) => {
        ($kernels.table().$name.expect("every table is complete"))($($argument),*)
    };
}
pub(in crate::kernels) use call;

impl Kernels {
    /// The kernels of an instruction set, if the processor has it.
    pub fn for_isa(isa: Isa) -> Option<Self> {
        // SAFETY: the function has no preconditions and returns null or a pointer to a constant table.
        let table = unsafe { sys::fk_kernels_for(isa.to_sys()).as_ref() }?;
        Some(Self {
            isa,
            table,
            reading: Reading::usual(),
        })
    }

    /// The same kernels, reading weights in another way.
    pub fn reading(self, reading: Reading) -> Self {
        Self { reading, ..self }
    }

    /// How they read weights.
    pub fn reads(&self) -> Reading {
        self.reading
    }

    /// The nearest kernels that do not round the inputs of floating-point weights to bfloat16: these, if they do not.
    pub fn single_precision(self) -> Self {
        match self.isa {
            Isa::Avx512Bf16 | Isa::Amx => {
                Self::for_isa(Isa::Avx512).map_or(self, |kernels| kernels.reading(self.reading))
            }
            _ => self,
        }
    }

    /// The kernels for this process: those that [`ISA_VARIABLE`] names, else the best that the processor has. The choice
    /// is made once.
    ///
    /// # Errors
    /// [`IsaError`] if the variable names a set that is unknown or that the processor lacks.
    pub fn get() -> Result<Self, IsaError> {
        static CHOSEN: OnceLock<Result<Kernels, IsaError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| match std::env::var(ISA_VARIABLE) {
                Ok(asked) if !asked.is_empty() => {
                    let known = Isa::ALL.into_iter().find(|isa| isa.name() == asked);
                    known.and_then(Self::for_isa).ok_or(IsaError {
                        asked,
                        known: known.is_some(),
                    })
                }
                _ => {
                    let best = Isa::available().last().unwrap_or(Isa::Generic);
                    Ok(Self::for_isa(best).expect("available sets have kernels"))
                }
            })
            .clone()
    }

    fn table(&self) -> &'static sys::fk_kernels {
        self.table
    }

    /// Whether packed weights are faster than native ones: not where vectors are emulated.
    pub fn prefers_packed(&self) -> bool {
        self.isa != Isa::Generic
    }

    /// Whether a generated token takes longer with sparse weights of a type than with dense ones: spreading 4-bit codes by look-up costs
    /// AVX2 more than the bytes that it spares. Where dense weights come fast without being asked for, so do 8-bit codes there, and
    /// everywhere 4-bit types with a minimum, which multiply twice (docs/speed.md). Where nothing was measured, what has fewer bytes
    /// is taken to be faster.
    pub fn prefers_dense(&self, block_type: BlockType) -> bool {
        use BlockType::{IQ4_NL, Q4_0, Q4_1, Q4_K, Q8_0};
        let looks_up = matches!(self.isa, Isa::Avx2 | Isa::AvxVnni);
        let unasked = !Reading::usual().fetches;
        match block_type {
            Q4_0 | IQ4_NL => looks_up,
            Q4_1 | Q4_K => looks_up || unasked,
            Q8_0 => looks_up && unasked,
            _ => false,
        }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Decodes one stored row into `out`.
    ///
    /// # Panics
    /// If `bytes` is not exactly the row of `out.len()` values.
    pub fn dequantize(&self, block_type: BlockType, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), block_type.row_bytes(out.len()));
        // SAFETY: both buffers have the length that the type asks for, as checked.
        unsafe {
            call!(
                self,
                dequantize(
                    type_of(block_type),
                    bytes.as_ptr(),
                    out.len(),
                    out.as_mut_ptr()
                )
            )
        }
    }

    /// Quantises x to 8 bits in blocks of [`ACTIVATION_BLOCK`]: x = scale · q. For every block `scales` receives one value,
    /// `scaled_sums` scale · Σ q, and `code_sums` two, Σ q of each half.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub fn quantize(
        &self,
        x: &[f32],
        q: &mut [i8],
        scales: &mut [f32],
        scaled_sums: &mut [f32],
        code_sums: &mut [i32],
    ) {
        assert!(x.len().is_multiple_of(ACTIVATION_BLOCK) && q.len() == x.len());
        assert!(scales.len() == x.len() / ACTIVATION_BLOCK && scaled_sums.len() == scales.len());
        assert_eq!(code_sums.len(), 2 * scales.len());
        let to = sys::fk_plane {
            quantized: q.as_mut_ptr(),
            scales: scales.as_mut_ptr(),
            scaled_sums: scaled_sums.as_mut_ptr(),
            code_sums: code_sums.as_mut_ptr(),
        };
        // SAFETY: the lengths are as the kernel needs them, as checked.
        unsafe { call!(self, quantize(x.as_ptr(), 1, x.len(), x.len(), 0, &to)) }
    }

    /// Rounds x `[tokens, cols]` of at most [`TILE_TOKENS`] tokens to bfloat16, to nearest even, into a row of tiles; places
    /// beyond x become 0.
    ///
    /// # Panics
    /// If there are more tokens, or not as many tiles as cols take.
    pub fn fill_tiles(&self, x: &[f32], cols: usize, tiles: &mut [Tile]) {
        let tokens = x.len().checked_div(cols).unwrap_or(0);
        assert!(tokens <= TILE_TOKENS && x.len() == tokens * cols);
        assert_eq!(tiles.len(), cols.div_ceil(TILE_COLS));
        // SAFETY: x and tiles have the shapes that the kernel needs, as checked, and a tile is an array of 16-bit numbers.
        unsafe {
            call!(
                self,
                fill_tiles(x.as_ptr(), tokens, cols, tiles.as_mut_ptr().cast())
            )
        }
    }

    /// Sums over the tokens of x `[tokens, cols]`, at least one: near, a token of x; sums, Σ (x − near); squares,
    /// Σ (x − near)²; `[cols]` each.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub fn moments(
        &self,
        x: &[f32],
        cols: usize,
        near: &mut [f32],
        sums: &mut [f32],
        squares: &mut [f32],
    ) {
        let tokens = x.len() / cols;
        assert!(tokens > 0 && x.len() == tokens * cols);
        assert!(near.len() == cols && sums.len() == cols && squares.len() == cols);
        // SAFETY: the lengths are as the kernel needs them, as checked.
        unsafe {
            call!(
                self,
                moments(
                    x.as_ptr(),
                    tokens,
                    cols,
                    near.as_mut_ptr(),
                    sums.as_mut_ptr(),
                    squares.as_mut_ptr()
                )
            )
        }
    }

    /// Root-mean-square normalisation: out = x / √(mean(x²) + eps) · weight, all of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(weight.len() == x.len() && out.len() == x.len());
        // SAFETY: all three have x.len() values.
        unsafe {
            call!(
                self,
                rms_norm(x.as_ptr(), weight.as_ptr(), x.len(), eps, out.as_mut_ptr())
            )
        }
    }

    /// [`Kernels::rms_norm`] of x in its place.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        assert_eq!(weight.len(), x.len());
        let out = x.as_mut_ptr();
        // SAFETY: both have x.len() values, and the output may be the input.
        unsafe { call!(self, rms_norm(out, weight.as_ptr(), x.len(), eps, out)) }
    }

    /// Rotates the pairs (x\[2i\], x\[2i + 1\]) by the angles whose cosines and sines are given; values of x beyond the last
    /// pair stay.
    ///
    /// # Panics
    /// If there are more angles than pairs, or not as many sines as cosines.
    pub fn rope(&self, x: &mut [f32], cosines: &[f32], sines: &[f32]) {
        assert!(cosines.len() == sines.len() && 2 * cosines.len() <= x.len());
        // SAFETY: x has at least two values for each angle.
        unsafe {
            call!(
                self,
                rope(
                    x.as_mut_ptr(),
                    cosines.as_ptr(),
                    sines.as_ptr(),
                    cosines.len()
                )
            )
        }
    }

    /// Rotates the pairs (x\[i\], x\[i + n\]), of n angles, as [`Kernels::rope`] does its own.
    ///
    /// # Panics
    /// If there are more angles than pairs, or not as many sines as cosines.
    pub fn rope_halves(&self, x: &mut [f32], cosines: &[f32], sines: &[f32]) {
        assert!(cosines.len() == sines.len() && 2 * cosines.len() <= x.len());
        // SAFETY: x has at least two values for each angle.
        unsafe {
            call!(
                self,
                rope_halves(
                    x.as_mut_ptr(),
                    cosines.as_ptr(),
                    sines.as_ptr(),
                    cosines.len()
                )
            )
        }
    }

    /// gate = silu(gate) · up.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        let out = gate.as_mut_ptr();
        // SAFETY: both have gate.len() values, and the output may be the gate.
        unsafe { call!(self, silu_mul(out, up.as_ptr(), gate.len(), out)) }
    }

    /// gate = gelu(gate) · up, with gelu in the form with tanh.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gelu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        let out = gate.as_mut_ptr();
        // SAFETY: both have gate.len() values, and the output may be the gate.
        unsafe { call!(self, gelu_mul(out, up.as_ptr(), gate.len(), out)) }
    }

    /// x += y.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len());
        // SAFETY: both have x.len() values.
        unsafe { call!(self, add(x.as_mut_ptr(), y.as_ptr(), x.len())) }
    }

    /// Rounds to half precision.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn to_half(&self, x: &[f32], out: &mut [half::f16]) {
        assert_eq!(x.len(), out.len());
        // SAFETY: both have x.len() values, and f16 is a transparent u16.
        unsafe { call!(self, to_half(x.as_ptr(), x.len(), out.as_mut_ptr().cast())) }
    }
}

/// Kernels and threads: what running a model takes besides the model.
#[derive(Debug)]
pub struct Runtime {
    pub kernels: Kernels,
    pub pool: Pool,
}

impl Runtime {
    /// Runs `lead` with a team of all threads; see [`Pool::region`].
    pub fn region<R>(&self, lead: impl FnOnce(&Team) -> R) -> R {
        self.pool.region(self.kernels, lead)
    }

    /// The process's kernels and `threads` threads.
    ///
    /// # Errors
    /// If [`ISA_VARIABLE`] asks for what the processor lacks, or the system gives no threads.
    pub fn new(threads: usize) -> Result<Self, RuntimeError> {
        Ok(Self {
            kernels: Kernels::get()?,
            pool: Pool::new(threads)?,
        })
    }
}

/// Why there is no [`Runtime`].
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error(transparent)]
    Isa(#[from] IsaError),
    #[error("no threads to compute with: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// The kernels' name for a type; both sides number types as GGUF does.
fn type_of(block_type: BlockType) -> sys::fk_type {
    sys::fk_type(block_type.id())
}

/// Runs `body` with `len` floats of this thread's scratch memory, whose contents are arbitrary.
fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        body(&mut scratch[..len])
    })
}
