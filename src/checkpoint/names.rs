//! The names of tensors in files of weights, and in GGUF.

use std::collections::BTreeMap;

use super::settings::Settings;
use crate::model::Architecture;

/// The embedding, in GGUF.
pub(super) const EMBEDDING: &str = "token_embd.weight";
/// The output head, in GGUF and in files of weights.
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const OUTPUT_OWN: &str = "lm_head.weight";

/// The names that are not of a layer.
const WHOLE: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", EMBEDDING),
    ("model.norm.weight", "output_norm.weight"),
    (OUTPUT_OWN, OUTPUT),
];

/// Those of a layer, behind its number. All have a weight, and those with a `true` may have a bias.
const OF_LAYER: [(&str, &str, bool); 13] = [
    ("input_layernorm", "attn_norm", false),
    ("self_attn.q_proj", "attn_q", true),
    ("self_attn.k_proj", "attn_k", true),
    ("self_attn.v_proj", "attn_v", true),
    ("self_attn.qkv_proj", "attn_qkv", true),
    ("self_attn.o_proj", "attn_output", true),
    ("self_attn.q_norm", "attn_q_norm", false),
    ("self_attn.k_norm", "attn_k_norm", false),
    ("mlp.gate_proj", "ffn_gate", true),
    ("mlp.up_proj", "ffn_up", true),
    // Gate and up in one, which GGUF calls up.
    ("mlp.gate_up_proj", "ffn_up", true),
    ("mlp.down_proj", "ffn_down", true),
    // Of families that have no norms behind modules.
    ("post_attention_layernorm", "ffn_norm", false),
];

/// The norms of families that have norms behind modules.
const POST_NORMS: [(&str, &str); 3] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// The names that a model's tensors may have.
pub(super) struct Names {
    /// By those of files of weights.
    ours: BTreeMap<String, String>,
}

/// The names of a model's tensors.
pub(super) fn of(settings: &Settings) -> Names {
    let mut ours = BTreeMap::new();
    for (own, name) in WHOLE {
        ours.insert(own.to_owned(), name.to_owned());
    }
    let family = settings.architecture.family();
    for l in 0..settings.layers {
        let mut add = |own: &str, name: &str, end: &str| {
            ours.insert(
                format!("model.layers.{l}.{own}.{end}"),
                format!("blk.{l}.{name}.{end}"),
            );
        };
        for (own, name, may_have_bias) in OF_LAYER {
            let fused = own.ends_with("qkv_proj") || own.ends_with("gate_up_proj");
            let parted = ["q_proj", "k_proj", "v_proj", "gate_proj"]
                .iter()
                .any(|p| own.ends_with(p))
                || own == "mlp.up_proj";
            if (fused && !family.fused) || (parted && !fused && family.fused) {
                continue;
            }
            if (own.ends_with("q_norm") || own.ends_with("k_norm")) && !family.head_norms {
                continue;
            }
            if family.post_norms && own == "post_attention_layernorm" {
                continue;
            }
            add(own, name, "weight");
            if may_have_bias {
                add(own, name, "bias");
            }
        }
        if family.post_norms {
            for (own, name) in POST_NORMS {
                add(own, name, "weight");
            }
        }
    }
    Names { ours }
}

impl Names {
    /// The name in GGUF of a tensor of a file of weights; `None` if there is no such tensor.
    pub(super) fn ours(&self, own: &str) -> Option<&str> {
        self.ours.get(own).map(String::as_str)
    }

    /// The names in files of weights, by those in GGUF.
    pub(super) fn into_own(self) -> BTreeMap<String, String> {
        self.ours
            .into_iter()
            .map(|(own, name)| (name, own))
            .collect()
    }
}

/// Whether a tensor is one that programs compute anew, and old ones have written.
pub(super) fn is_buffer(own: &str) -> bool {
    own.ends_with(".rotary_emb.inv_freq") || own.ends_with(".masked_bias")
}

/// Whether a tensor is there and not read: a buffer, or a head that is the embedding once more.
pub(super) fn is_passed_over(own: &str, settings: &Settings) -> bool {
    is_buffer(own) || (own == OUTPUT_OWN && settings.tied)
}

/// Whether a tensor is a norm, by its name in GGUF.
pub(super) fn is_norm(name: &str) -> bool {
    name.ends_with("_norm.weight")
}

/// The order of tensors: the embedding, the layers by their numbers, and the rest.
pub(super) fn place(name: &str) -> (usize, usize, &str) {
    let layer = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    match layer {
        Some((number, rest)) => (1, number.parse().unwrap_or(usize::MAX), rest),
        None if name == EMBEDDING => (0, 0, name),
        None => (2, 0, name),
    }
}

/// Whether norms are stored without the 1 that belongs to them.
pub(super) fn norms_lack_one(architecture: Architecture) -> bool {
    use Architecture::{Gemma, Gemma2, Gemma3};
    matches!(architecture, Gemma | Gemma2 | Gemma3)
}
