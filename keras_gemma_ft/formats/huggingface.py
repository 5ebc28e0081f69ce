"""`config.json` of a Gemma 2 in Hugging Face's format, read and written.

The weights beside it are read by `shards.py`.
"""

import json
import pathlib

from keras_gemma_ft.config import UserError
from keras_gemma_ft.config.words import hub_handle

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
_ACTIVATION = "gelu_pytorch_tanh"
# What the Keras model cannot vary; absent means this value.
_FIXED = {
    "hidden_activation": _ACTIVATION,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
# Features that change the arithmetic and that the Keras model lacks.
_REFUSED = ("rope_scaling", "use_bidirectional_attention")
# A bare backbone, too, has all that a language model of tied words needs.
_KINDS = ("Gemma2ForCausalLM", "Gemma2Model")
# Until July 2024 google/gemma-2-9b said 224, the 27B's way to count; it was
# trained with its head_dim .
_9B = {"hidden_size": 3584, "num_hidden_layers": 42, "head_dim": 256}
_9B_WRONG, _9B_RIGHT = 224, 256


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
            + "\nUse the folder of an unmodified Gemma 2 model."
        )
    scalar = _query_scalar(hf_config)
    return {ours: hf_config[theirs] for theirs, ours in _FIELDS.items()} | {
        "intermediate_dim": 2 * hf_config["intermediate_size"],
        "query_head_dim_normalize": hf_config["head_dim"] == scalar,
        "query_pre_attn_scalar": scalar,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": True,
    }


def _query_scalar(hf_config):
    scalar = hf_config.get("query_pre_attn_scalar")
    is_9b = all(hf_config.get(name) == _9B[name] for name in _9B)
    return _9B_RIGHT if is_9b and scalar == _9B_WRONG else scalar


def doubts(hf_config):
    """Lines that a user should be told about a config that is followed.

    Args:
        hf_config: dict that `backbone_config` takes.
    """
    told = hf_config.get("query_pre_attn_scalar")
    if (used := _query_scalar(hf_config)) != told:
        yield (
            f"config.json: query_pre_attn_scalar={told} is what the 9B's had "
            f"until July 2024; {used} is used, as Google has corrected it"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if hf_config.get(name, 1) is None:
            yield (
                f"config.json: {name}=null, and no cap is used; Google's have "
                "50.0 for attention's scores and 30.0 for the logits"
            )
    act = hf_config.get("hidden_act")
    if hf_config.get("hidden_activation", "") is None:
        if act not in (None, _ACTIVATION):
            yield (
                f"config.json: hidden_act={act!r} beside hidden_activation="
                f"null; {_ACTIVATION} is used, as transformers does"
            )


def _codes(hf_config):
    """What to do about weights that are stored as another library's codes."""
    codes = hf_config["quantization_config"]
    kind = codes.get("quant_method") if type(codes) is dict else codes
    name = hf_config.get("_name_or_path")
    handle = hub_handle(name) if type(name) is str else ""
    known = handle.startswith("hf://") and "bit" not in handle
    original = handle if known else "hf://google/gemma-2-9b"
    return (
        f"quantization_config: the weights are codes ({kind}), which the "
        "library that made them reads alone. Take the model that they were "
        f"made of, to be quantised here: --preset={original} "
        "--model.quantize=nf4" + ("" if known else " (in its size)")
    )


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
    if flat.get("hidden_activation", "") is None:
        # As transformers has it; see `doubts`.
        flat["hidden_activation"] = _ACTIVATION
    kinds = hf_config.get("architectures") or []
    if type(kinds) is not list or not {*map(str, kinds)} <= {*_KINDS}:
        yield (
            f"architectures={kinds!r}: expected {_KINDS[0]!r}, a model that "
            "writes. Of one with a head of its own, take its base, such as "
            "--preset=hf://google/gemma-2-2b"
        )
    for name, value in _FIXED.items():
        # A head of its own is found by its numbers; see `shards.find`.
        told = flat.get(name, value)
        if name == "tie_word_embeddings" and type(told) is bool:
            continue
        if told != value:
            yield f"{name}={flat[name]!r}: expected {value!r}"
    if rope.get("rope_type", "default") != "default":
        yield f"rope_type={rope['rope_type']!r}: expected 'default'"
    if hf_config.get("quantization_config"):
        yield _codes(hf_config)
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
            "hidden_act": _ACTIVATION,
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
