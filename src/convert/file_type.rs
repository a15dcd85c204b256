//! The types of files: which mixture of block types a file has, and the names and numbers that llama.cpp gives these.

use crate::quant::BlockType;

/// Makes [`FileType`] from the table below.
macro_rules! file_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $text:literal, $block:ident;)*) => {
        /// What `llama-quantize` calls a type of files: a block type for most matrices, and rules for the others. The discriminants are those of
        /// `general.file_type`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(non_camel_case_types)] // these are the types' usual names
        pub enum FileType {
            $($(#[$doc])* $name = $id,)*
        }

        impl FileType {
            pub const ALL: &[FileType] = &[$(FileType::$name),*];

            /// The name, for example "q4_k_m".
            pub const fn name(self) -> &'static str {
                match self {
                    $(FileType::$name => $text,)*
                }
            }

            /// The type of matrices of which no rule says anything else.
            pub const fn block_type(self) -> BlockType {
                match self {
                    $(FileType::$name => BlockType::$block,)*
                }
            }
        }
    };
}

file_types! {
    F32 = 0, "f32", F32;
    F16 = 1, "f16", F16;
    BF16 = 32, "bf16", BF16;
    Q8_0 = 7, "q8_0", Q8_0;
    Q6_K = 18, "q6_k", Q6_K;
    Q5_K_M = 17, "q5_k_m", Q5_K;
    Q5_K_S = 16, "q5_k_s", Q5_K;
    Q5_1 = 9, "q5_1", Q5_1;
    Q5_0 = 8, "q5_0", Q5_0;
    Q4_K_M = 15, "q4_k_m", Q4_K;
    Q4_K_S = 14, "q4_k_s", Q4_K;
    Q4_1 = 3, "q4_1", Q4_1;
    Q4_0 = 2, "q4_0", Q4_0;
    IQ4_NL = 25, "iq4_nl", IQ4_NL;
    IQ4_XS = 30, "iq4_xs", IQ4_XS;
    Q3_K_L = 13, "q3_k_l", Q3_K;
    Q3_K_M = 12, "q3_k_m", Q3_K;
    Q3_K_S = 11, "q3_k_s", Q3_K;
    IQ3_M = 27, "iq3_m", IQ3_S;
    IQ3_S = 26, "iq3_s", IQ3_S;
    IQ3_XS = 22, "iq3_xs", IQ3_S;
    IQ3_XXS = 23, "iq3_xxs", IQ3_XXS;
    Q2_K = 10, "q2_k", Q2_K;
    Q2_K_S = 21, "q2_k_s", Q2_K;
    IQ2_M = 29, "iq2_m", IQ2_S;
    IQ2_S = 28, "iq2_s", IQ2_XS;
    IQ2_XS = 20, "iq2_xs", IQ2_XS;
    IQ2_XXS = 19, "iq2_xxs", IQ2_XXS;
    TQ2_0 = 37, "tq2_0", TQ2_0;
    TQ1_0 = 36, "tq1_0", TQ1_0;
    IQ1_M = 31, "iq1_m", IQ1_M;
    IQ1_S = 24, "iq1_s", IQ1_S;
}

/// Names that stand for others.
const ALIASES: [(&str, FileType); 3] = [
    ("q5_k", FileType::Q5_K_M),
    ("q4_k", FileType::Q4_K_M),
    ("q3_k", FileType::Q3_K_M),
];

impl FileType {
    /// The number in `general.file_type`.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The type of a file whose matrices are mostly of this block type; `None` if there is none.
    pub(super) fn mostly(block_type: BlockType) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|t| t.block_type() == block_type)
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for FileType {
    type Err = String;

    /// By its name, in large or small letters; `q4_k` stands for `q4_k_m`, and so on.
    fn from_str(text: &str) -> Result<Self, String> {
        let named = text.to_ascii_lowercase();
        let alias = ALIASES.iter().find(|(name, _)| *name == named);
        let own = Self::ALL.iter().find(|t| t.name() == named);
        alias.map(|(_, t)| *t).or(own.copied()).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|t| t.name()).collect();
            format!("must be one of {}", names.join(", "))
        })
    }
}
