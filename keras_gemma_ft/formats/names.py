"""Gemma 2 tensor names of Hugging Face <-> KerasHub variable paths, shapes.

One table (`_BLOCK`, `_OUTSIDE`) gives both directions. Letters: D hidden_dim,
N heads (query or key/value), H head_dim, F feed-forward width, V words.
Kernels differ only by reshape and transpose; no RoPE permutation is needed
and norm weights are stored alike (both multiply by 1 + scale).
"""

import re

import numpy as np

from keras_gemma_ft.config import PEFT_NAMES, TARGET_GROUPS, UserError

TABLE = "token_embedding/embeddings"
# Of a head that is not the table: KerasHub's Gemma has no such variable.
HEAD = "lm_head/embeddings"
_ATTENTION = TARGET_GROUPS["attention"]
# Keras layer name of a LoRA target -> module inside `model.layers.{i}`.
MODULES = {
    name: f"{'self_attn' if name in _ATTENTION else 'mlp'}.{peft}"
    for name, peft in PEFT_NAMES.items()
}
NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = {f"{k}/scale": f"{v}.weight" for k, v in NORMS.items()} | {
    f"{'attention/' if k in _ATTENTION else ''}{k}/kernel": f"{v}.weight"
    for k, v in MODULES.items()
}
_OUTSIDE = {
    TABLE: "model.embed_tokens.weight",
    "final_normalization/scale": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_BLOCK_BACK = {v: k for k, v in _BLOCK.items()}
_OUTSIDE_BACK = {v: k for k, v in _OUTSIDE.items()}
_KERAS_PATH = re.compile(r"decoder_block_(\d+)/(.+)")
_HF_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
# What wraps a module while it is trained: torch.compile, FSDP, activation
# checkpointing, DDP. No module of Gemma 2 has such a name.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|"
    r"_checkpoint_wrapped_module|module)\."
)


def unwrapped(name):
    """A tensor's name without the wrappers that training put around modules."""
    return _WRAPPERS.sub("", name)


def plain(name):
    """A tensor's name as a Gemma2ForCausalLM has it.

    Without wrappers; with the `model.` that a saved Gemma2Model lacks.
    """
    name = unwrapped(name)
    if re.match(r"(?:layers|embed_tokens|norm)\.", name):
        return f"model.{name}"
    return name


def huggingface_name(path):
    """Hugging Face tensor name of a Keras variable path, or None."""
    match = _KERAS_PATH.fullmatch(path)
    if match and match[2] in _BLOCK:
        return f"model.layers.{int(match[1])}.{_BLOCK[match[2]]}"
    return _OUTSIDE.get(path)


def keras_path(name):
    """Keras variable path of a Hugging Face tensor name, or None."""
    match = _HF_NAME.fullmatch(name)
    if match and match[2] in _BLOCK_BACK:
        return f"decoder_block_{int(match[1])}/{_BLOCK_BACK[match[2]]}"
    return _OUTSIDE_BACK.get(name)


def to_keras(name, array, *, head_dim):
    """Turn one Hugging Face tensor into the Keras variable.

    Args:
        name: tensor name, such as `model.layers.0.self_attn.q_proj.weight`.
        array: `q, k, v [N*H, D]`, `o [D, N*H]`, `gate, up [F, D]`,
            `down [D, F]`, embedding `[V, D]` or norm `[D]`; any dtype.
        head_dim: H.

    Returns:
        (path, array): `query, key, value [N, D, H]`,
        `attention_output [N, H, D]`, `ffw_gating* [D, F]`,
        `ffw_linear [F, D]`; a view of `array`, same dtype.

    Raises:
        UserError: `name` is not a Gemma 2 tensor.
    """
    path = keras_path(name)
    if path is None:
        raise UserError(f"{name!r} is not the name of a Gemma 2 tensor.")
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        heads = array.reshape(-1, head_dim, array.shape[-1])  # [N, H, D]
        return path, heads.transpose(0, 2, 1)
    if path.endswith("attention_output/kernel"):
        heads = array.reshape(array.shape[0], -1, head_dim)  # [D, N, H]
        return path, heads.transpose(1, 2, 0)
    return path, array.T if path.endswith("/kernel") else array


def to_huggingface(path, array):
    """Turn one Keras variable into the Hugging Face tensor.

    The inverse of `to_keras`; shapes as there.

    Args:
        path: variable path, such as `decoder_block_0/ffw_gating/kernel`.
        array: its value.

    Returns:
        (name, array).

    Raises:
        UserError: `path` is not a variable of a Gemma 2 backbone.
    """
    name = huggingface_name(path)
    if name is None:
        raise UserError(f"{path!r} is not a variable of a Gemma 2 backbone.")
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        heads = array.transpose(0, 2, 1)  # [N, H, D]
        return name, heads.reshape(-1, array.shape[1])
    if path.endswith("attention_output/kernel"):
        heads = array.transpose(2, 0, 1)  # [D, N, H]
        return name, heads.reshape(array.shape[2], -1)
    return name, array.T if path.endswith("/kernel") else array


def kernel_shapes(backbone):
    """Kernel shape of each LoRA target.

    Args:
        backbone: dict as of `GemmaBackbone.get_config()`.

    Returns:
        dict: target -> shape, in the order of `MODULES`.
    """
    hidden, head = backbone["hidden_dim"], backbone["head_dim"]
    heads, kv_heads = (
        backbone["num_query_heads"],
        backbone["num_key_value_heads"],
    )
    # KerasHub's intermediate_dim counts gate and up together.
    width = backbone["intermediate_dim"] // 2
    return {
        "query": (heads, hidden, head),
        "key": (kv_heads, hidden, head),
        "value": (kv_heads, hidden, head),
        "attention_output": (heads, head, hidden),
        "ffw_gating": (hidden, width),
        "ffw_gating_2": (hidden, width),
        "ffw_linear": (width, hidden),
    }


def variable_shapes(backbone):
    """Keras path -> shape of every variable, in the model's order.

    Args:
        backbone: dict as of `GemmaBackbone.get_config()`.
    """
    hidden = backbone["hidden_dim"]
    kernels = kernel_shapes(backbone)
    shapes = {TABLE: (backbone["vocabulary_size"], hidden)}
    for layer in range(backbone["num_layers"]):
        for end in _BLOCK:
            shape = kernels.get(end.split("/")[-2], (hidden,))
            shapes[f"decoder_block_{layer}/{end}"] = shape
    return shapes | {"final_normalization/scale": (hidden,)}


def huggingface_shapes(backbone):
    """Hugging Face name -> shape of every tensor, in the model's order.

    Args:
        backbone: dict as of `GemmaBackbone.get_config()`.
    """
    # All strides are zero, so the reshapes in there copy nothing.
    zero = np.int8(0)
    pairs = (
        to_huggingface(path, np.broadcast_to(zero, shape))
        for path, shape in variable_shapes(backbone).items()
    )
    return {name: array.shape for name, array in pairs}
