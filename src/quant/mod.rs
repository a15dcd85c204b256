//! The block formats of weights: their sizes, how they lie in memory, decoding and encoding.
//!
//! The formats are ggml's, so that a GGUF tensor can be used as it lies in the file. Everything here is plain scalar code.
//! It defines the formats: the vector kernels are tested against it, and pruning encodes changed columns with it.

mod bits;
mod blocks;
mod encode;
mod iq4;
mod kquants;
mod packed;

pub use blocks::{decode_row, encode_row, encode_row_by_importance};
pub use packed::{GROUP, decode_packed_row, pack, unpack};

/// Makes [`BlockType`] from the table below, so that everything about a type is in one place.
macro_rules! block_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $len:literal in $bytes:literal;)*) => {
        /// The element type of a stored tensor. The discriminants are GGUF's type numbers (`ggml_type`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(non_camel_case_types)] // these are the formats' usual names
        pub enum BlockType {
            $($(#[$doc])* $name = $id,)*
        }

        impl BlockType {
            /// All supported types, plain floats first.
            pub const ALL: [BlockType; [$($id),*].len()] = [$(BlockType::$name),*];

            /// The usual name of this type, for example "Q4_K".
            pub const fn name(self) -> &'static str {
                match self {
                    $(BlockType::$name => stringify!($name),)*
                }
            }

            /// The number of values in a block; 1 for plain floats.
            pub const fn block_len(self) -> usize {
                match self {
                    $(BlockType::$name => $len,)*
                }
            }

            /// The size of a block in bytes.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(BlockType::$name => $bytes,)*
                }
            }
        }
    };
}

// The supported types: the number in GGUF files, the values in a block, and the bytes of a block.
block_types! {
    /// IEEE single precision.
    F32 = 0, 1 in 4;
    /// IEEE half precision.
    F16 = 1, 1 in 2;
    /// bfloat16, the upper 16 bits of single precision.
    BF16 = 30, 1 in 2;
    /// 32 values of 8 bits with one scale: w = d q. 34 bytes: d f16, 32 signed bytes.
    Q8_0 = 8, 32 in 34;
    /// 32 values of 4 bits with one scale: w = d (q − 8). 18 bytes: d f16, 16 bytes of nibbles.
    Q4_0 = 2, 32 in 18;
    /// 32 values of 4 bits with scale and minimum: w = d q + m. 20 bytes: d f16, m f16, 16 bytes of nibbles.
    Q4_1 = 3, 32 in 20;
    /// 32 values of 5 bits with one scale: w = d (q − 16). 22 bytes: d f16, 4 bytes of fifth bits, 16 bytes of nibbles.
    Q5_0 = 6, 32 in 22;
    /// 32 values of 5 bits with scale and minimum: w = d q + m. 24 bytes: d f16, m f16, 4 bytes of fifth bits, 16 bytes of
    /// nibbles.
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
    /// The type with this GGUF number; `None` if it is not supported.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// The number of this type in GGUF files.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The size in bytes of a row of `columns` values; `None` if `columns` is not a whole number of blocks or the size does
    /// not fit in a `usize`.
    pub const fn checked_row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block_len()) {
            return None;
        }
        (columns / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The size in bytes of a row of `columns` values.
    ///
    /// # Panics
    /// If `columns` is not a whole number of blocks, or if the size does not fit in a `usize`.
    pub const fn row_bytes(self, columns: usize) -> usize {
        match self.checked_row_bytes(columns) {
            Some(bytes) => bytes,
            None => panic!("a row must be a whole number of blocks"),
        }
    }

    /// Whether values are stored one by one as floating-point numbers (F32, F16, BF16).
    pub const fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// The names of all supported types, separated by commas, for error messages.
    pub(crate) fn supported_names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The name of a GGUF type that exists but is not supported, for error messages; `None` for any other number.
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

/// The order in which the bytes of a weight matrix lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// One row after the other, as in a GGUF file.
    #[default]
    Native,
    /// Groups of [`GROUP`] rows, interleaved block by block; see [`pack`].
    Packed,
}
