"""Gemma 2 tensor names of GGUF <-> Keras variable paths.

One table gives both directions (llama.cpp/gguf-py/gguf/tensor_mapping.py).
Matrices lie as in Hugging Face's format, [out, in]; norms hold 1 + scale.
"""

import re

from keras_gemma_ft.formats import names

# Keras layer name of a LoRA target -> what llama.cpp calls its kernel.
TARGETS = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "ffw_gating": "ffn_gate",
    "ffw_gating_2": "ffn_up",
    "ffw_linear": "ffn_down",
}
_NORMS = {
    "pre_attention_norm": "attn_norm",
    "post_attention_norm": "post_attention_norm",
    "pre_ffw_norm": "ffn_norm",
    "post_ffw_norm": "post_ffw_norm",
}
_OUTSIDE = {
    "token_embedding/embeddings": "token_embd.weight",
    "final_normalization/scale": "output_norm.weight",
}
_PATH = re.compile(r"decoder_block_(\d+)/(?:attention/)?(\w+)/(kernel|scale)")


def gguf_name(path):
    """GGUF's name of a Keras variable path, or None."""
    match = _PATH.fullmatch(path)
    if not match:
        return _OUTSIDE.get(path)
    known = TARGETS if match[3] == "kernel" else _NORMS
    name = known.get(match[2])
    return name and f"blk.{int(match[1])}.{name}.weight"


def paths(backbone):
    """{GGUF's name: Keras path} of every variable of a model."""
    return {gguf_name(path): path for path in names.variable_shapes(backbone)}
