//! Which block type each matrix of a file takes: the rules by which `llama-quantize` mixes types, so that a file of a type is here what it
//! is there. They give more bits to what errors cost most in: values and MLP down, above all in the first and last layers, and the head.
//!
//! What is said there of mixtures of experts, and of architectures that do not run here, is left out.

use super::FileType;
use crate::quant::BlockType;

/// What of a model the rules ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traits {
    pub layers: usize,
    /// Matrices of values, fused ones included.
    pub values: usize,
    /// Query heads for each KV head of the first layer; 0 without KV heads.
    pub group: usize,
    /// The output head is the embedding.
    pub tied: bool,
    /// It is known how much the inputs of matrices matter.
    pub by_importance: bool,
    /// A LLaMA of 80 layers whose KV heads are shared, whose values have fewer rows than queries by so much that more bits cost nothing.
    pub is_70b: bool,
}

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Head,
    Embedding,
    Query,
    Key,
    Value,
    /// Queries, keys and values in one.
    Fused,
    Output,
    Gate,
    Up,
    Down,
    Other,
}

impl Role {
    /// By the name of a tensor.
    pub fn of(name: &str) -> Self {
        let has = |part: &str| name.contains(part);
        match name {
            "output.weight" => Role::Head,
            "token_embd.weight" => Role::Embedding,
            _ if has("attn_qkv.weight") => Role::Fused,
            _ if has("attn_v.weight") => Role::Value,
            _ if has("attn_k.weight") => Role::Key,
            _ if has("attn_q.weight") => Role::Query,
            _ if has("attn_output.weight") => Role::Output,
            _ if has("ffn_up") => Role::Up,
            _ if has("ffn_gate") => Role::Gate,
            _ if has("ffn_down") => Role::Down,
            _ => Role::Other,
        }
    }

    /// Whether it is as sensitive as values are.
    pub fn has_values(self) -> bool {
        matches!(self, Role::Value | Role::Fused)
    }
}

/// Whether a tensor may be encoded in blocks: a matrix that is no norm.
pub(super) fn may_change(name: &str, shape: &[usize]) -> bool {
    // What has one row is a vector in ggml's eyes.
    let rows: usize = shape[..shape.len() - 1].iter().product();
    rows > 1 && name.ends_with("weight") && !name.contains("_norm.weight")
}

/// Gives types to the matrices of a file, layer by layer.
pub(super) struct Rules {
    file_type: FileType,
    traits: Traits,
    /// How many of a role were there before.
    values: usize,
    downs: usize,
    gates: usize,
    ups: usize,
}

impl Rules {
    pub fn new(file_type: FileType, traits: Traits) -> Self {
        Self {
            file_type,
            traits,
            values: 0,
            downs: 0,
            gates: 0,
            ups: 0,
        }
    }

    /// The type of the next matrix. Matrices must come by their layers. Its rows may not be whole blocks of it; see [`fitting`].
    pub fn next(&mut self, role: Role, columns: usize) -> BlockType {
        use BlockType::{IQ2_S, IQ2_XXS, IQ3_S, IQ3_XXS, Q2_K, Q3_K, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K};
        use FileType as F;
        let (file_type, traits) = (self.file_type, self.traits);
        let own = file_type.block_type();
        let shares = traits.group >= 4;
        // The least bits, of about two.
        let few = matches!(
            file_type,
            F::IQ2_XXS | F::IQ2_XS | F::IQ2_S | F::IQ2_M | F::IQ1_S | F::IQ1_M
        );
        let two_and_more = matches!(file_type, F::IQ2_S | F::IQ2_M);
        let place = |counter: &mut usize| {
            *counter += 1;
            *counter - 1
        };
        match role {
            Role::Head => self.head(columns),
            Role::Embedding if traits.tied => self.head(columns),
            Role::Embedding => match file_type {
                F::IQ2_XXS | F::IQ2_XS | F::IQ1_S | F::IQ1_M => Q2_K,
                F::IQ2_S | F::IQ2_M | F::IQ3_XXS => IQ3_S,
                F::TQ1_0 | F::TQ2_0 => Q4_K,
                _ => own,
            },
            _ if few => match role {
                Role::Value | Role::Fused if shares => Q4_K,
                Role::Value | Role::Fused if two_and_more => IQ3_S,
                Role::Value | Role::Fused => Q2_K,
                Role::Down if place(&mut self.downs) < traits.layers / 8 => match two_and_more {
                    true => IQ3_S,
                    false => Q2_K,
                },
                Role::Output if matches!(file_type, F::IQ1_S | F::IQ1_M) => IQ2_XXS,
                Role::Output if two_and_more => IQ3_S,
                _ => own,
            },
            Role::Value | Role::Fused => {
                let i = place(&mut self.values);
                let chosen = match file_type {
                    F::Q2_K if shares => Q4_K,
                    F::Q2_K => Q3_K,
                    F::Q2_K_S | F::IQ3_XXS | F::IQ3_XS | F::IQ3_S if shares => Q4_K,
                    F::IQ3_XXS if traits.by_importance => IQ3_XXS,
                    F::IQ3_XXS => IQ3_S,
                    F::IQ3_M => Q4_K,
                    F::Q3_K_M if i < 2 => Q5_K,
                    F::Q3_K_M => Q4_K,
                    F::Q3_K_L => Q5_K,
                    F::IQ4_NL | F::IQ4_XS if shares => Q5_K,
                    F::Q4_K_M | F::Q5_K_M if needs_more(i, traits.values) => Q6_K,
                    F::Q4_K_S if i < 4 => Q5_K,
                    _ => own,
                };
                match traits.is_70b && matches!(chosen, Q3_K | Q4_K) {
                    true => Q5_K,
                    false => chosen,
                }
            }
            Role::Query | Role::Key => match file_type {
                F::IQ3_XS => IQ3_XXS,
                F::IQ3_XXS => IQ2_S,
                _ => own,
            },
            Role::Down => {
                let (i, layers) = (place(&mut self.downs), traits.layers);
                let first = i < layers / 8;
                match file_type {
                    F::Q2_K => Q3_K,
                    F::Q2_K_S if first => Q4_K,
                    F::IQ3_XXS if !traits.by_importance && first => Q4_K,
                    F::IQ3_XXS if !traits.by_importance => Q3_K,
                    F::Q3_K_M if i < layers / 16 => Q5_K,
                    F::Q3_K_M => Q4_K,
                    F::IQ3_M if first => Q4_K,
                    F::Q3_K_L => Q5_K,
                    F::Q4_K_M | F::Q5_K_M if needs_more(i, layers) => Q6_K,
                    F::IQ4_NL | F::IQ4_XS if first && !traits.by_importance => Q5_K,
                    F::Q4_K_S if first => Q5_K,
                    F::Q4_0 if first && traits.by_importance => Q4_1,
                    F::Q5_0 if first && traits.by_importance => Q5_1,
                    _ => own,
                }
            }
            Role::Output => match file_type {
                F::Q2_K => Q3_K,
                F::IQ3_XXS => IQ3_S,
                F::Q3_K_M | F::IQ3_M => Q4_K,
                F::Q3_K_L => Q5_K,
                _ => own,
            },
            Role::Gate | Role::Up => {
                let counter = match role {
                    Role::Gate => &mut self.gates,
                    _ => &mut self.ups,
                };
                let (i, layers) = (place(counter), traits.layers);
                match file_type {
                    F::IQ3_XS if (layers / 8..7 * layers / 8).contains(&i) => IQ3_XXS,
                    _ => own,
                }
            }
            Role::Other => own,
        }
    }

    fn head(&self, columns: usize) -> BlockType {
        use FileType as F;
        let own = self.file_type.block_type();
        match self.file_type {
            _ if !columns.is_multiple_of(own.block_len()) => BlockType::Q8_0,
            F::IQ2_XXS | F::IQ2_XS | F::IQ3_XXS | F::IQ1_S | F::IQ2_S | F::IQ2_M | F::IQ1_M => {
                BlockType::Q5_K
            }
            F::Q8_0 => BlockType::Q8_0,
            _ => BlockType::Q6_K,
        }
    }
}

/// The layers that get more bits: the first and the last eighth, and every third between.
fn needs_more(i: usize, all: usize) -> bool {
    i < all / 8 || i >= 7 * all / 8 || (i - all / 8) % 3 == 2
}

/// The type, or the one that takes its place where rows are no whole blocks of it.
pub(super) fn fitting(block_type: BlockType, columns: usize) -> BlockType {
    use BlockType::{F16, IQ4_NL, Q4_0, Q5_0, Q5_1, Q8_0};
    let fits = |t: BlockType| columns.is_multiple_of(t.block_len());
    if fits(block_type) {
        return block_type;
    }
    let instead = match block_type {
        BlockType::Q2_K | BlockType::Q3_K | BlockType::TQ1_0 | BlockType::TQ2_0 => Q4_0,
        BlockType::Q4_K => Q5_0,
        BlockType::Q5_K => Q5_1,
        BlockType::Q6_K => Q8_0,
        other if other.block_len() == 256 => IQ4_NL,
        other => other,
    };
    if fits(instead) { instead } else { F16 }
}

/// Whether a matrix of this role would be of no use in the type without knowing how much its inputs matter.
pub(super) fn needs_importance(
    role: Role,
    block_type: BlockType,
    file_type: Option<FileType>,
) -> bool {
    use BlockType::{IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_XXS, Q2_K};
    if matches!(role, Role::Head | Role::Embedding) {
        return false;
    }
    match block_type {
        IQ3_XXS | IQ2_XXS | IQ2_XS | IQ2_S | IQ1_M | IQ1_S => true,
        Q2_K => file_type == Some(FileType::Q2_K_S),
        _ => false,
    }
}
