"""A Gemma 2 folder in Hugging Face's format: settings and tensors.

Names, shapes and transposes are in `names.py`; here are `config.json`, both
ways, and a reader that streams safetensors shards one tensor at a time.
"""

import json
import pathlib
import re

import ml_dtypes  # noqa: F401  safetensors asks numpy for its bfloat16
import numpy as np
import safetensors

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import tensors
from keras_gemma_ft.formats.names import (
    to_huggingface,
    to_keras,
    variable_shapes,
)

# Tied to the embedding, or recomputed by the model: nothing to load.
_IGNORED = re.compile(r"lm_head\.weight|.*rotary_emb\.inv_freq")
# A file name and nothing else: no separators, no leading dot.
_SHARD_NAME = re.compile(r"\w[\w.\-]*\.safetensors")
FLOATS = ("BF16", "F16", "F32", "F64")

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
    scalar = backbone.get("query_pre_attn_scalar") or (
        backbone["head_dim"]
        if backbone["query_head_dim_normalize"]
        else backbone["hidden_dim"] // backbone["num_query_heads"]
    )
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


def read_tensors(folder):
    """Stream the weights of a Gemma 2 folder as Keras variables.

    Names, shapes and dtypes of all shards are checked before this returns, so
    that a bad folder is refused whole and before anything is loaded; after
    that one tensor is in memory at a time.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with
            `model.safetensors.index.json`.

    Returns:
        iterator of (Keras path, array) over every variable exactly once;
        float16, float32 or `ml_dtypes.bfloat16` as stored.

    Raises:
        UserError: a shard, tensor or shape that is missing, unexpected,
            truncated or wrong (all are listed), or a pickle-only folder.
    """
    folder = pathlib.Path(folder)
    backbone = backbone_config(read_json(folder / "config.json"))
    shards, listed = _shards(folder)
    wrong = []
    found = {}  # tensor name -> shard that holds it
    expected = {
        name: shape
        for path, shape in variable_shapes(backbone).items()
        for name, shape in [_stored(path, shape, backbone["head_dim"])]
    }
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, "numpy") as file:
                wrong += _check_shard(shard, file, expected, listed, found)
        except (OSError, safetensors.SafetensorError) as error:
            wrong.append(f"{shard}: missing, truncated or damaged ({error})")
    wrong += [f"{n}: missing" for n in expected if n not in found]
    if wrong:
        raise UserError(
            f"{folder} is not a whole Gemma 2 model:\n  "
            + "\n  ".join(wrong)
            + "\nFetch these files again, or check config.json."
        )
    return _stream(folder, found, backbone["head_dim"])


def _stored(path, shape, head_dim):
    # All strides are zero, so the reshapes in there copy nothing.
    name, array = to_huggingface(path, np.broadcast_to(np.int8(0), shape))
    return name, array.shape


def _check_shard(shard, file, expected, listed, found):
    """Complaints about one shard's header; notes its tensors in `found`."""
    for name in file.keys():
        if _IGNORED.fullmatch(name):
            continue
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if name not in expected:
            yield f"{name}: unexpected in {shard}"
        elif name in found:
            yield f"{name}: in both {found[name]} and {shard}"
        elif shape != expected[name]:
            yield f"{name}: shape {shape}, expected {expected[name]}"
        elif dtype not in FLOATS:
            yield f"{name}: dtype {dtype}, expected {' '.join(FLOATS)}"
        elif listed.get(name, shard) != shard:
            yield f"{name}: in {shard}, the index says {listed[name]}"
        found.setdefault(name, shard)


def _shards(folder):
    """Shard file names, and the index's {tensor: shard} ({} without index)."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{folder} holds only pickled weights ({', '.join(pickles)}), "
                "which can run code when opened. Convert them with "
                "transformers: AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder, safe_serialization=True)"
            )
        raise UserError(
            f"{folder} has neither model.safetensors nor "
            "model.safetensors.index.json. Fetch the weights again."
        )
    listed = read_json(index).get("weight_map")
    if type(listed) is not dict or not listed:
        raise UserError(f"{index} has no weight_map. Fetch the file again.")
    shards = sorted({str(shard) for shard in listed.values()})
    outside = [s for s in shards if not _SHARD_NAME.fullmatch(s)]
    if outside:
        raise UserError(
            f"{index} names shards that are not plain .safetensors file "
            f"names: {', '.join(map(repr, outside))}. The file was tampered "
            "with or damaged: fetch it again from a source you trust."
        )
    return shards, listed


def _stream(folder, found, head_dim):
    headers = {
        shard: tensors.header(folder / shard)[0] for shard in {*found.values()}
    }
    for name, shard in found.items():
        array = tensors.read(folder / shard, headers[shard][name])
        yield to_keras(name, array, head_dim=head_dim)
