//! The block formats of weights as types: sizes, layout, decoding and encoding.
//!
//! Layouts are ggml's, so that a GGUF tensor is used as it lies in the file. Everything here is plain scalar code: it is
//! the definition that the vector kernels are tested against, and what pruning uses to re-encode columns.

mod bits;
mod blocks;
mod encode;
mod iq4;
mod kquants;
mod packed;

pub use blocks::{decode_row, encode_row, encode_row_by_importance};
pub use packed::{GROUP, decode_packed_row, pack, unpack};

/// Makes [`BlockType`] from its table, so that what there is to know of a type stands in one place.
macro_rules! block_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $len:literal in $bytes:literal;)*) => {
        /// The element type of a stored tensor. The discriminants are GGUF's type numbers (`ggml_type`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(non_camel_case_types)] // the names by which everybody knows them
        pub enum BlockType {
            $($(#[$doc])* $name = $id,)*
        }

        impl BlockType {
            pub const ALL: [BlockType; [$($id),*].len()] = [$(BlockType::$name),*];

            pub const fn name(self) -> &'static str {
                match self {
                    $(BlockType::$name => stringify!($name),)*
                }
            }

            /// Values per block.
            pub const fn block_len(self) -> usize {
                match self {
                    $(BlockType::$name => $len,)*
                }
            }

            /// Bytes per block.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(BlockType::$name => $bytes,)*
                }
            }
        }
    };
}

// Each type: its GGUF number, and how many values a block holds in how many bytes.
block_types! {
    /// IEEE single precision.
    F32 = 0, 1 in 4;
    /// IEEE half precision.
    F16 = 1, 1 in 2;
    /// The upper half of single precision.
    BF16 = 30, 1 in 2;
    /// 32 values of 8 bits with one scale: w = d q. 34 bytes: d f16, 32 signed bytes.
    Q8_0 = 8, 32 in 34;
    /// 32 values of 4 bits with one scale: w = d (q − 8). 18 bytes: d f16, 16 bytes of nibbles.
    Q4_0 = 2, 32 in 18;
    /// 32 values of 4 bits with scale and minimum: w = d q + m. 20 bytes: d f16, m f16, 16 bytes of nibbles.
    Q4_1 = 3, 32 in 20;
    /// 32 values of 5 bits with one scale: w = d (q − 16). 22 bytes: d f16, 4 bytes of fifth bits, 16 bytes of nibbles.
    Q5_0 = 6, 32 in 22;
    /// 32 values of 5 bits with scale and minimum: w = d q + m. 24 bytes: d f16, m f16, fifth bits, nibbles.
    Q5_1 = 7, 32 in 24;
    /// 256 values of 2 bits; every 16 have a 4-bit scale and minimum. 84 bytes.
    Q2_K = 10, 256 in 84;
    /// 256 values of 3 bits; every 16 have a 6-bit scale. 110 bytes.
    Q3_K = 11, 256 in 110;
    /// 256 values of 4 bits; every 32 have a 6-bit scale and minimum. 144 bytes.
    Q4_K = 12, 256 in 144;
    /// 256 values of 5 bits; every 32 have a 6-bit scale and minimum. 176 bytes.
    Q5_K = 13, 256 in 176;
    /// 256 values of 6 bits; every 16 have an 8-bit scale. 210 bytes.
    Q6_K = 14, 256 in 210;
    /// 32 values of 4 bits that stand for 16 unevenly spaced levels, with one scale. 18 bytes.
    IQ4_NL = 20, 32 in 18;
    /// 256 values of 4 bits with the same levels; every 32 have a 6-bit scale. 136 bytes.
    IQ4_XS = 23, 256 in 136;
}

impl BlockType {
    /// The type with this GGUF number, if it is supported.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// The GGUF number.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Bytes of a row of `columns` values; `None` if that is not a whole number of blocks or too large.
    pub const fn checked_row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block_len()) {
            return None;
        }
        (columns / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bytes of a row of `columns` values.
    ///
    /// # Panics
    /// If `columns` is not a whole number of blocks.
    pub const fn row_bytes(self, columns: usize) -> usize {
        match self.checked_row_bytes(columns) {
            Some(bytes) => bytes,
            None => panic!("a row must be a whole number of blocks"),
        }
    }

    /// Whether values are stored one by one, as floating-point numbers.
    pub const fn is_float(self) -> bool {
        self.block_len() == 1
    }

    pub(crate) fn supported_names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The names of GGUF types that exist but that we cannot read yet, for error messages.
    pub(crate) fn name_of_unsupported(id: u32) -> Option<&'static str> {
        Some(match id {
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            21 => "IQ3_S",
            22 => "IQ2_S",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return None,
        })
    }
}

/// How a weight matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// Row after row, as GGUF stores it.
    #[default]
    Native,
    /// Groups of [`GROUP`] rows interleaved block by block; see [`pack`].
    Packed,
}
