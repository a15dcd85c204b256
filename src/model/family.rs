//! The model families that run, and what each computes: [`Family`] describes it, and the table below has an entry for each.
//!
//! All are LLaMA's layers with differences. Where a file states a number (a window, a base, a cap), it is read from there; here is
//! what no key of a file says. Adding a family is an entry in the table, as long as all that it does has a name in [`Family`].
//!
//! Sources: the papers (Llama 2, arXiv 2307.09288; Mistral 7B, 2310.06825; Gemma 2, 2408.00118; Gemma 3, 2503.19786; Qwen2, 2407.10671;
//! Qwen3, 2505.09388; Phi-3, 2404.14219), the models' code in Hugging Face's transformers, and for names of keys and tensors llama.cpp.

pub use crate::kernels::Gate;

/// Which values of a head are turned together by rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// Neighbours: values 2 i and 2 i + 1.
    Pairs,
    /// Value i of the first half of those that are turned with value i of the second.
    Halves,
}

/// Which layers look back no further than the window that a file states.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Windows {
    /// Every so manyth layer sees everything; `None` where no layer does.
    pub global_every: Option<usize>,
    /// The window where the file states none; `None` if there is then none.
    pub default: Option<usize>,
    /// The rotation base of the layers with a window, which rotate without scaling then, where the file has none for them; `None` if it
    /// is that of the others.
    pub base: Option<f32>,
}

/// What a family computes, as far as it is not the same in all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    pub rotation: Rotation,
    /// What is applied to the gate of an MLP.
    pub gate: Gate,
    /// Every head of queries and keys is normalised before it is turned.
    pub head_norms: bool,
    /// What a module's output projection leaves is normalised before it is added to the residual stream.
    pub post_norms: bool,
    /// Embeddings are multiplied by the root of their width.
    pub scaled_embedding: bool,
    /// Scores of attention and logits are capped where the file says by what.
    pub caps: bool,
    /// Queries, keys and values are one tensor, and so are gate and up.
    pub fused: bool,
    pub windows: Windows,
    /// Every so manyth layer rotates nothing; `None` where all do.
    pub unrotated_every: Option<usize>,
    /// With so many layers, scores are divided by the root of embedding length / heads and not of the size of heads.
    pub scale_by_width_with: Option<usize>,
}

const LLAMA: Family = Family {
    rotation: Rotation::Pairs,
    gate: Gate::Silu,
    head_norms: false,
    post_norms: false,
    scaled_embedding: false,
    caps: false,
    fused: false,
    windows: Windows {
        global_every: None,
        default: None,
        base: None,
    },
    unrotated_every: None,
    scale_by_width_with: None,
};

const QWEN2: Family = Family {
    rotation: Rotation::Halves,
    ..LLAMA
};

const GEMMA: Family = Family {
    rotation: Rotation::Halves,
    gate: Gate::Gelu,
    scaled_embedding: true,
    ..LLAMA
};

impl Family {
    /// Whether a model is one of LLaMA's once the rows of its queries and keys lie in LLaMA's order.
    pub fn is_llama_in_another_order(&self) -> bool {
        let reordered = Self {
            rotation: Rotation::Pairs,
            fused: false,
            ..*self
        };
        reordered == LLAMA
    }
}

/// Makes [`Architecture`] from the table of families.
macro_rules! families {
    ($($(#[$doc:meta])* $architecture:ident = $name:literal, $family:expr;)*) => {
        /// The architectures that run, by what `general.architecture` names them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Architecture {
            $($(#[$doc])* $architecture,)*
        }

        impl Architecture {
            pub const ALL: [Architecture; [$($name),*].len()] = [$(Architecture::$architecture),*];

            /// As `general.architecture` names it; its keys begin with the same word.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Architecture::$architecture => $name,)*
                }
            }

            /// What it computes.
            pub const fn family(self) -> Family {
                match self {
                    $(Architecture::$architecture => $family,)*
                }
            }
        }
    };
}

families! {
    /// Llama 1 to 3, Mistral, SmolLM2.
    Llama = "llama", LLAMA;
    /// DeciLM and the Nemotron models that NVIDIA cut out of Llama 3: widths differ from layer to layer, and a layer without heads or
    /// channels has no tensors for them, not even the norm.
    Deci = "deci", LLAMA;
    /// Qwen2 and Qwen2.5.
    Qwen2 = "qwen2", QWEN2;
    Qwen3 = "qwen3", Family { head_norms: true, ..QWEN2 };
    Gemma = "gemma", GEMMA;
    Gemma2 = "gemma2", Family {
        post_norms: true,
        caps: true,
        windows: Windows { global_every: Some(2), default: Some(4096), base: None },
        scale_by_width_with: Some(46),
        ..GEMMA
    };
    Gemma3 = "gemma3", Family {
        head_norms: true,
        post_norms: true,
        caps: true,
        windows: Windows { global_every: Some(6), default: None, base: Some(10_000.0) },
        scale_by_width_with: Some(62),
        ..GEMMA
    };
    SmolLm3 = "smollm3", Family { unrotated_every: Some(4), ..LLAMA };
    /// Phi-3, Phi-3.5 and Phi-4.
    Phi3 = "phi3", Family { fused: true, ..QWEN2 };
}

impl Architecture {
    /// The architecture of this name; `None` if it does not run.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    /// The names of all, for messages.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}
