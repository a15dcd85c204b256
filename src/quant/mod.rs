//! The block formats of weights: their sizes, how they lie in memory, decoding and encoding.
//!
//! The formats are ggml's, so that a GGUF tensor can be used as it lies in the file. Everything here is plain scalar code.
//! It defines the formats: the vector kernels are tested against it, and pruning encodes changed columns with it.

mod bits;
mod blocks;
mod encode;
mod grid;
mod grids;
mod index;
mod iq4;
mod keep;
mod kquants;
mod narrow;
mod packed;
mod small;
mod sparse;

pub use blocks::{decode_row, encode_row, encode_row_by_importance};
pub(crate) use index::{index_entry, least_indexed_len, write_index};
pub use keep::KeepMask;
pub(crate) use keep::{is_kept, remove_from};
pub use narrow::{can_be_narrow, decode_narrow_row, encode_narrow};
pub(crate) use narrow::{
    narrow_bytes_of, narrow_group, narrow_groups, narrow_len, packed_group, widen_group,
};
pub use packed::{GROUP, decode_packed_row, pack, unpack};
pub(crate) use sparse::{
    SPARSE_VERSION, SparseType, encode_group, expected_sparse_len, sparse_to_native, told_len,
};
pub use sparse::{
    SparseError, check_sparse, decode_sparse_row, encode_sparse, sparse_groups, sparse_kept,
    sparse_len,
};

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

            /// [`ALL`](Self::ALL) as a slice that lives for ever, of which a part can be kept.
            pub(crate) const ALL_IN_ORDER: &'static [BlockType] = &Self::ALL;

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
    /// 32 values of 4 bits of floating point with a power of two as scale. 17 bytes.
    MXFP4 = 39, 32 in 17;
    /// Q8_0 with the sum of its codes, the form of activations. 36 bytes.
    Q8_1 = 9, 32 in 36;
    /// 256 values of −1, 0 and 1 with one scale, five in a byte. 54 bytes.
    TQ1_0 = 34, 256 in 54;
    /// The same with 2 bits for each. 66 bytes.
    TQ2_0 = 35, 256 in 66;
    /// 256 values in groups of 8 out of 2048, moved by an eighth of a level. 50 bytes.
    IQ1_S = 19, 256 in 50;
    /// The same with more scales. 56 bytes.
    IQ1_M = 29, 256 in 56;
    /// 256 values in groups of 8 out of 256, with signs. 66 bytes.
    IQ2_XXS = 16, 256 in 66;
    /// 256 values in groups of 8 out of 512, with signs. 74 bytes.
    IQ2_XS = 17, 256 in 74;
    /// 256 values in groups of 8 out of 1024, with signs. 82 bytes.
    IQ2_S = 22, 256 in 82;
    /// 256 values in groups of 4 out of 256, with signs. 98 bytes.
    IQ3_XXS = 18, 256 in 98;
    /// 256 values in groups of 4 out of 512, with signs. 110 bytes.
    IQ3_S = 21, 256 in 110;
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

    /// Whether there is a packed layout for this type. What has none is read, and multiplied, in native rows, which are decoded a piece at
    /// a time: a look-up for every group costs more than interleaving could spare.
    pub const fn packs(self) -> bool {
        use BlockType::{
            IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, MXFP4, Q8_1, TQ1_0, TQ2_0,
        };
        !matches!(
            self,
            MXFP4
                | Q8_1
                | TQ1_0
                | TQ2_0
                | IQ1_S
                | IQ1_M
                | IQ2_XXS
                | IQ2_XS
                | IQ2_S
                | IQ3_XXS
                | IQ3_S
        )
    }

    /// The names of all supported types, separated by commas, for error messages.
    pub(crate) fn supported_names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// What is known of a GGUF type that is not supported; `None` for numbers that stand for no type that we know.
    pub fn unsupported(id: u32) -> Option<UnsupportedType> {
        UNSUPPORTED.iter().find(|t| t.id == id).copied()
    }
}

/// A type of GGUF files whose blocks are not read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsupportedType {
    /// The number of the type in GGUF files.
    pub id: u32,
    pub name: &'static str,
    /// Whether ggml has given the type up, so that no recent program reads it either.
    pub removed: bool,
    /// A supported type, as `llama-quantize` names it, that holds the same weights about as well; `None` if the type is not one
    /// for weights.
    pub instead: Option<&'static str>,
}

const fn known(id: u32, name: &'static str, instead: &'static str) -> UnsupportedType {
    UnsupportedType {
        id,
        name,
        removed: false,
        instead: Some(instead),
    }
}

const fn removed(id: u32, name: &'static str, instead: &'static str) -> UnsupportedType {
    UnsupportedType {
        removed: true,
        ..known(id, name, instead)
    }
}

const fn not_for_weights(id: u32, name: &'static str) -> UnsupportedType {
    UnsupportedType {
        instead: None,
        ..known(id, name, "")
    }
}

/// All other numbers that ggml has given to types (`ggml_type`), those that it has given up among them.
const UNSUPPORTED: &[UnsupportedType] = &[
    removed(4, "Q4_2", "Q4_0"),
    removed(5, "Q4_3", "Q4_1"),
    known(15, "Q8_K", "Q8_0"),
    not_for_weights(24, "I8"),
    not_for_weights(25, "I16"),
    not_for_weights(26, "I32"),
    not_for_weights(27, "I64"),
    known(28, "F64", "F32"),
    // The weights of Q4_0 and IQ4_NL with rows interleaved for some processors.
    removed(31, "Q4_0_4_4", "Q4_0"),
    removed(32, "Q4_0_4_8", "Q4_0"),
    removed(33, "Q4_0_8_8", "Q4_0"),
    removed(36, "IQ4_NL_4_4", "IQ4_NL"),
    removed(37, "IQ4_NL_4_8", "IQ4_NL"),
    removed(38, "IQ4_NL_8_8", "IQ4_NL"),
    known(40, "NVFP4", "Q4_0"),
    known(41, "Q1_0", "Q2_K"),
    known(42, "Q2_0", "Q2_K"),
];

/// The order in which the bytes of a weight matrix lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// One row after the other, as in a GGUF file.
    #[default]
    Native,
    /// Groups of [`GROUP`] rows, interleaved block by block; see [`pack`].
    Packed,
    /// The same without the weights that were removed; see [`encode_sparse`].
    Sparse,
    /// Packed 16-bit floats in 12 bits; see [`encode_narrow`]. It is in memory only, and in no file.
    Narrow,
}
