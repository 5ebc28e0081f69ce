"""A LoRA adapter <-> GGUF, as llama.cpp reads it (src/llama-adapter.cpp).

Tensors `blk.N.attn_q.weight.lora_a` [r, in] and `.lora_b` [out, r]. llama.cpp
adds `alpha / r * B A`, with the one `adapter.lora.alpha` of the file and each
tensor's own r; where alpha is 0, it adds `B A`. Tensors that are named
otherwise it passes over or refuses, so that none is written.
"""

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import gguf_file, gguf_names, low_rank
from keras_gemma_ft.formats.atomic import replacing
from keras_gemma_ft.formats.names import (
    MODULES,
    huggingface_shapes,
    kernel_shapes,
)

ARCHITECTURE = "gemma2"
_LAYERS = {name: target for target, name in gguf_names.TARGETS.items()}


def write_gguf_adapter(path, adapter, *, name="", base=""):
    """Writes an adapter for llama.cpp.

    A "keras" query has rank heads * r there, and a feed-forward kernel r; no
    alpha is right for both, so B then holds the scale, and alpha is 0.

    Args:
        path: complete or absent afterwards.
        adapter: `low_rank.Adapter`, either style.
        name: what the adapter is called.
        base: what its base is called.
    """
    import gguf

    pairs = {
        key: low_rank.to_peft(adapter.style, key[1], a, b)
        for key, (a, b) in sorted(adapter.weights.items())
    }
    ranks = {len(a) for a, _ in pairs.values()}
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    alpha = factor * ranks.pop() if len(ranks) == 1 else 0.0
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        if name:
            writer.add_name(name)
        if base:
            writer.add_string("general.base_model.0.name", base)
            writer.add_uint32("general.base_model.count", 1)
        for (layer, target), (a, b) in pairs.items():
            tensor = f"blk.{layer}.{gguf_names.TARGETS[target]}.weight"
            b = b if alpha else b * np.float32(factor)
            for letter, value in (("a", a), ("b", b)):
                value = np.ascontiguousarray(value, "float32")
                writer.add_tensor(f"{tensor}.lora_{letter}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf_adapter(path, backbone, *, base=""):
    """Reads an adapter that llama.cpp applies.

    Args:
        path: a .gguf file.
        backbone: dict as of `GemmaBackbone.get_config()` of its base.
        base: preset name to note in the adapter.

    Returns:
        `low_rank.Adapter` of style "standard": smaller ranks padded with
        zeros, scales that differ in B.

    Raises:
        UserError: another kind of file, or an adapter for another model;
            everything that is wrong is listed.
    """
    file = gguf_file.read(path)
    wrong = [*_of_another_kind(file.metadata)]
    pairs = _pairs(file, wrong)
    wrong += [] if wrong else _misfits(pairs, backbone)
    if wrong:
        raise UserError(
            f"{path} is not a LoRA adapter for this model:\n  "
            + "\n  ".join(wrong)
            + "\nCheck --preset, or export the adapter again."
        )
    alpha = float(file.metadata.get("adapter.lora.alpha", 0.0))
    ranks = {key: len(a) for key, (a, _) in pairs.items()}
    rank = max(ranks.values())
    kernels, weights = kernel_shapes(backbone), {}
    # One alpha over several ranks: several scales, which B takes.
    fold = alpha and len({*ranks.values()}) > 1
    for key, (a, b) in pairs.items():
        if fold:
            b = b * np.float32(alpha / ranks[key])
        extra = rank - ranks[key]
        weights[key] = low_rank.from_peft(
            "standard",
            key[1],
            np.pad(a, [(0, extra), (0, 0)]),
            np.pad(b, [(0, 0), (0, extra)]),
            kernels[key[1]][0],
            backbone["head_dim"],
        )
    return low_rank.Adapter(
        style="standard",
        rank=rank,
        alpha=float(rank) if fold or not alpha else alpha,
        rslora=False,
        dropout=0.0,
        targets=low_rank.ordered(target for _, target in weights),
        weights=weights,
        base=base,
        folded=bool(fold),
    )


def _of_another_kind(metadata):
    expected = {
        "general.type": "adapter",
        "general.architecture": ARCHITECTURE,
        "adapter.type": "lora",
    }
    for key, value in expected.items():
        if metadata.get(key) != value:
            yield f"{key} is {metadata.get(key)!r}, expected {value!r}"
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float) or not abs(alpha) < 1e38:
        yield f"adapter.lora.alpha is {alpha!r}, expected a number"


def _pairs(file, wrong):
    """{(layer, target): (A [r, in], B [out, r])} of the file's tensors."""
    halves = {}
    for name, entry in file.tensors.items():
        stem, _, letter = name.rpartition(".lora_")
        key = _key(stem)
        if letter not in ("a", "b") or key is None:
            wrong.append(f"{name}: {_unknown(stem)}")
        elif len(entry.shape) != 2:
            wrong.append(f"{name}: shape {entry.shape}, expected a matrix")
        else:
            halves.setdefault(key, {})[letter] = name
    for (layer, target), half in halves.items():
        where = f"blk.{layer}.{gguf_names.TARGETS[target]}"
        for letter in {"a", "b"} - half.keys():
            wrong.append(f"{where}.lora_{letter}: missing")
        if len(half) == 2:
            a, b = (file.tensors[half[letter]].shape for letter in "ab")
            if a[0] != b[1]:
                wrong.append(f"{where}: lora_a {a} and lora_b {b} do not fit")
    if not file.tensors:
        wrong.append("it holds no tensors")
    if wrong:
        return {}
    pairs = {
        key: tuple(file.array(halves[key][letter]) for letter in "ab")
        for key in sorted(halves)
    }
    for (layer, target), pair in pairs.items():
        if not all(np.isfinite(part).all() for part in pair):
            wrong.append(f"blk.{layer}.{target}: holds NaN or infinity")
    return pairs


def _key(stem):
    match stem.split("."):
        case ["blk", number, layer, "weight"] if number.isdecimal():
            target = _LAYERS.get(layer)
            return target and (int(number), target)
    return None


def _unknown(stem):
    if stem.startswith(("output.", "token_embd.")):
        return (
            "an adapter on the head or the token table, which llama.cpp "
            "passes over for Gemma 2"
        )
    return "not a LoRA tensor of a Gemma 2 projection"


def _misfits(pairs, backbone):
    shapes = huggingface_shapes(backbone)
    for (layer, target), (a, b) in pairs.items():
        where = f"blk.{layer}.{gguf_names.TARGETS[target]}"
        if layer >= backbone["num_layers"]:
            yield f"{where}: the model has {backbone['num_layers']} layers"
            continue
        module = f"model.layers.{layer}.{MODULES[target]}.weight"
        outside, inside = shapes[module]
        if (a.shape[1], len(b)) != (inside, outside):
            yield (
                f"{where}: {a.shape[1]} -> {len(b)}, expected {inside} -> "
                f"{outside}"
            )
