"""Writes a Hugging Face folder with the weights of a GGUF file, as Python's own packages read and write them.

usage: checkpoint.py MODEL.gguf FOLDER

Matrices are dequantised to half precision, in two files with an index; vectors stay in single precision. For llama and qwen2.
"""

import json
import os
import sys

import numpy as np
from gguf import GGUFReader, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What separates words, by the name that GGUF has for it.
DIGITS = {"type": "Digits", "individual_digits": True}
PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CONTROL, USER_DEFINED = 3, 4


def own_name(name):
    if name in WHOLE:
        return WHOLE[name]
    _, layer, part, end = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{end}"


def in_halves(values, heads):
    """Rows of heads that are turned in pairs, in the order in which they are turned in halves."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def main(source, folder):
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    key = lambda name, *otherwise: fields.get(f"{architecture}.{name}", *otherwise)
    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")

    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            values = np.array(tensor.data)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
        if architecture == "llama" and ".attn_q." in tensor.name:
            values = in_halves(values, heads)
        if architecture == "llama" and ".attn_k." in tensor.name:
            values = in_halves(values, kv_heads)
        tensors[own_name(tensor.name)] = values.astype(np.float16 if values.ndim > 1 else np.float32)
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate([names[:half], names[half:]], 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, f"{folder}/{file}")
        weight_map |= {name: file for name in part}
    size = sum(values.nbytes for values in tensors.values())
    write(folder, "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})

    write(folder, "config.json", {
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": key("embedding_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": key("feed_forward_length"),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    })

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    pre = fields["tokenizer.ggml.pre"]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre not in PATTERNS}
    if pre in PATTERNS:
        before = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    else:
        assert pre == "smollm", pre
        before = DIGITS
    write(folder, "tokenizer.json", {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": types[i] == CONTROL, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [before, words]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] not in (CONTROL, USER_DEFINED)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    })
    write(folder, "tokenizer_config.json", {
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        "chat_template": fields.get("tokenizer.chat_template"),
    })


def write(folder, name, content):
    with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
        json.dump(content, file)


main(*sys.argv[1:])
