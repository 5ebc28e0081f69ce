"""`config.json` of a Gemma 2 in Hugging Face's format, read and written.

The weights beside it are read by `shards.py`.
"""

import json
import pathlib

from keras_gemma_ft.config import UserError

# config.json -> GemmaBackbone, where the value is the same.
_FIELDS = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "head_dim": "head_dim",
    "final_logit_softcapping": "final_logit_soft_cap",
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "sliding_window": "sliding_window_size",
}
# What the Keras model cannot vary; absent means this value.
_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
# Features that change the arithmetic and that the Keras model lacks.
_REFUSED = (
    "rope_scaling",
    "quantization_config",
    "use_bidirectional_attention",
)


def backbone_config(hf_config):
    """Settings of KerasHub's GemmaBackbone from a Gemma 2 `config.json`.

    Args:
        hf_config: dict, the parsed `config.json`.

    Returns:
        dict: the constructor's arguments, and `query_pre_attn_scalar`, which
        the constructor does not take (query scale = that ** -0.5).

    Raises:
        UserError: another architecture, a setting that is missing, or one
            that the Keras model cannot follow; all are listed.
    """
    if hf_config.get("model_type") != "gemma2":
        raise UserError(
            f"model_type={hf_config.get('model_type')!r} is not supported; "
            "expected 'gemma2'. Use --preset=hf://google/gemma-2-2b or "
            "another Gemma 2 model."
        )
    wrong = list(_complaints(hf_config))
    if wrong:
        raise UserError(
            "This Gemma 2 config.json cannot be followed:\n  "
            + "\n  ".join(wrong)
            + "\nUse the config.json of an unmodified Gemma 2 model."
        )
    scalar = hf_config["query_pre_attn_scalar"]
    return {ours: hf_config[theirs] for theirs, ours in _FIELDS.items()} | {
        "intermediate_dim": 2 * hf_config["intermediate_size"],
        "query_head_dim_normalize": hf_config["head_dim"] == scalar,
        "query_pre_attn_scalar": scalar,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": True,
    }


def _complaints(hf_config):
    needed = (*_FIELDS, "intermediate_size", "query_pre_attn_scalar")
    sizes = [n for n in needed if not n.endswith("softcapping")]
    for name in needed:
        if name not in hf_config:
            yield f"{name} is missing"
    for name in sizes:
        value = hf_config.get(name, 1)
        if type(value) not in (int, float) or value <= 0:
            yield f"{name}={value!r}: expected a positive number"
    rope = hf_config.get("rope_parameters") or {}
    flat = {**hf_config, **{k: rope[k] for k in rope if k == "rope_theta"}}
    for name, value in _FIXED.items():
        if flat.get(name, value) != value:
            yield f"{name}={flat[name]!r}: expected {value!r}"
    if rope.get("rope_type", "default") != "default":
        yield f"rope_type={rope['rope_type']!r}: expected 'default'"
    for name in _REFUSED:
        if hf_config.get(name):
            yield f"{name}={hf_config[name]!r}: expected none"
    layers = hf_config.get("num_hidden_layers")
    kinds = hf_config.get("layer_types")
    if kinds and type(layers) is int and kinds != _layer_types(layers):
        yield f"layer_types={kinds!r}: expected sliding, full, sliding, ..."


def _layer_types(layers):
    kinds = ("sliding_attention", "full_attention")
    return [kinds[i % 2] for i in range(layers)]


def huggingface_config(backbone, *, dtype="float32"):
    """The `config.json` of a Gemma 2 model, as a dict.

    Args:
        backbone: dict as of `GemmaBackbone.get_config()`, with or without
            `query_pre_attn_scalar`.
        dtype: dtype name of the weights that lie beside it.

    Returns:
        dict that transformers, vLLM and llama.cpp read.

    Raises:
        UserError: the backbone is not a Gemma 2 (post-norms or sliding
            window missing).
    """
    flags = (
        "use_post_ffw_norm",
        "use_post_attention_norm",
        "use_sliding_window_attention",
    )
    missing = [name for name in flags if not backbone.get(name)]
    if missing:
        raise UserError(
            f"Not a Gemma 2 backbone: {', '.join(missing)} not set. "
            "Only Gemma 2 models can be written in Hugging Face format."
        )
    scalar = query_scalar(backbone)
    rope = {"rope_theta": _FIXED["rope_theta"], "rope_type": "default"}
    return (
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
        | {theirs: backbone[ours] for theirs, ours in _FIELDS.items()}
        | _FIXED
        | {
            "intermediate_size": backbone["intermediate_dim"] // 2,
            "query_pre_attn_scalar": scalar,
            "layer_types": _layer_types(backbone["num_layers"]),
            # Once flat (llama.cpp, vLLM), once nested (transformers 5).
            "rope_parameters": rope,
            "hidden_act": _FIXED["hidden_activation"],
            "attention_dropout": 0.0,
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
            "bos_token_id": 2,
            # <eos> and <end_of_turn>: Gemma ends its turns with the latter.
            "eos_token_id": [1, 107],
            "pad_token_id": 0,
            "use_cache": True,
            "torch_dtype": dtype,
        }
    )


def query_scalar(backbone):
    """`query_pre_attn_scalar` of a backbone: query scale = that ** -0.5.

    Args:
        backbone: dict as of `GemmaBackbone.get_config()`, with or without it.
    """
    return backbone.get("query_pre_attn_scalar") or (
        backbone["head_dim"]
        if backbone["query_head_dim_normalize"]
        else backbone["hidden_dim"] // backbone["num_query_heads"]
    )


def is_huggingface(folder):
    """Is this a model folder in Hugging Face's format?

    A Keras preset has a `config.json` too, but without `model_type`.
    """
    config = pathlib.Path(folder) / "config.json"
    if not config.is_file():
        return False
    try:
        return "model_type" in read_json(config)
    except UserError:
        return False


def read_json(path):
    """Parse a JSON file that holds one object.

    Raises:
        UserError: it is not there, not JSON, or not an object.
    """
    try:
        value = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Fetch the file again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Fetch the file again."
        ) from error
    if type(value) is not dict:
        raise UserError(
            f"{path} holds a {type(value).__name__}, expected an object."
        )
    return value
