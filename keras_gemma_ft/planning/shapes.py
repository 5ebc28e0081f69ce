"""What a preset is made of, without its weights: sizes, and each variable.

Letters: L layers, d hidden, n query heads, k key/value heads, h head_dim,
f width of gate and of up, V words, r rank.
"""

import json

from keras_gemma_ft import config
from keras_gemma_ft.formats import huggingface
from keras_gemma_ft.model import preset_source

# arXiv 2408.00118, table 1: L, d, n, k, h, f.
_SIZES = {
    "2b": (26, 2304, 8, 4, 256, 9216),
    "9b": (42, 3584, 16, 8, 256, 14336),
    "27b": (46, 4608, 32, 16, 128, 36864),
}
_WORDS = 256_000


def known(size):
    """The `GemmaBackbone` settings of "2b", "9b" or "27b"."""
    layers, hidden, heads, kv_heads, head_dim, ffw = _SIZES[size]
    return {
        "vocabulary_size": _WORDS,
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_dim": hidden,
        "intermediate_dim": 2 * ffw,
        "head_dim": head_dim,
        # 27B divides queries by sqrt(d / n), the others by sqrt(h).
        "query_head_dim_normalize": size != "27b",
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "attention_logit_soft_cap": 50,
        "final_logit_soft_cap": 30,
        "use_sliding_window_attention": True,
        "sliding_window_size": 4096,
    }


def of_preset(preset):
    """The `GemmaBackbone` settings of a preset; reads no weights.

    Args:
        preset: as `--preset`.

    Raises:
        config.UserError: not a Gemma 2, unknown, or no access.
    """
    if preset.startswith("hf://"):
        source = preset_source.download(preset, ["config.json"])
    else:
        source = preset_source.resolve(preset)
    if isinstance(source, str):
        for size in _SIZES:
            if (
                f"gemma2_{size}_" in source
                or f"gemma2_instruct_{size}" in source
            ):
                return known(size)
        return _downloaded(source)
    settings = huggingface.read_json(source / "config.json")
    if huggingface.is_huggingface(source):
        return huggingface.backbone_config(settings)
    return _checked(preset, settings.get("config", {}))


def _downloaded(handle):
    """Of a kaggle:// handle: its config.json alone."""
    from keras_hub.src.utils import preset_utils

    try:
        path = preset_utils.get_file(handle, "config.json")
    except Exception as error:
        raise config.UserError(
            f"--preset={handle}: its config.json cannot be had "
            f"({type(error).__name__}). Name a known size, such as "
            f"gemma2_9b_en, or a folder."
        ) from None
    with open(path) as file:
        return _checked(handle, json.load(file).get("config", {}))


def _checked(preset, settings):
    if settings.get("attention_logit_soft_cap") is None:
        raise config.UserError(
            f"--preset={preset} is not a Gemma 2 (its config.json has no "
            f"attention_logit_soft_cap). Try --preset=gemma2_2b_en."
        )
    return settings


def weights(settings):
    """(path, shape) of every frozen variable, paths as KerasHub ends them."""
    s = settings
    d, h, f = s["hidden_dim"], s["head_dim"], s["intermediate_dim"] // 2
    n, k = s["num_query_heads"], s["num_key_value_heads"]
    yield "token_embedding/embeddings", (s["vocabulary_size"], d)
    kernels = {
        "attention/query": (n, d, h),
        "attention/key": (k, d, h),
        "attention/value": (k, d, h),
        "attention/attention_output": (n, h, d),
        "ffw_gating": (d, f),
        "ffw_gating_2": (d, f),
        "ffw_linear": (f, d),
    }
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    norms += ["post_attention_norm"] * bool(s["use_post_attention_norm"])
    norms += ["post_ffw_norm"] * bool(s["use_post_ffw_norm"])
    for i in range(s["num_layers"]):
        for name, shape in kernels.items():
            yield f"decoder_block_{i}/{name}/kernel", shape
        for name in norms:
            yield f"decoder_block_{i}/{name}/scale", (d,)
    yield "final_normalization/scale", (d,)


def adapters(settings, lora):
    """(path, shape) of every A and B that `lora` (a `config.Lora`) makes."""
    if not lora.rank:
        return
    r, names = lora.rank, config.targets(lora)
    for path, shape in weights(settings):
        layer, _, kind = path.rpartition("/")
        target = layer.rpartition("/")[2]
        if kind != "kernel" or target not in names:
            continue
        if target in ("query", "key", "value"):
            n, d, h = shape
            pair = [(n, d, r), (r, h)]
            if lora.style == "standard":
                pair = [(d, r), (r, n, h)]
        else:
            pair = [(*shape[:-1], r), (r, shape[-1])]
        for letter, part in zip("ab", pair):
            yield f"{layer}/lora_kernel_{letter}", part
