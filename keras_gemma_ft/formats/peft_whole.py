"""A PEFT folder that holds more than plain LoRA -> a change of whole weights."""

import re

import numpy as np

from keras_gemma_ft.formats import names
from keras_gemma_ft.formats.whole_change import HEAD, TABLE, WholeChange

# What may stand behind a module's name, and what it is.
_ENDINGS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
    "modules_to_save.weight": "whole",
    "base_layer.weight": "base",
    "original_module.weight": "original",
    "weight": "whole",
}
_KIND = {
    "magnitude": "DoRA",
    "bias": "biases of lora_B",
    "rows": "rows of the token table",
    "whole": "whole tensors",
}
_PROJECTIONS = {f"{module}.weight" for module in names.MODULES.values()}


def is_plain(name):
    """Whether a tensor is an A or a B of a projection, and nothing else."""
    module, kind = _split(name)
    inner = re.sub(r"^model\.layers\.\d+\.", "", f"{module}.weight")
    return kind in ("A", "B") and inner in _PROJECTIONS


def _split(name):
    """(module's name, what its tensor is), or (name, None)."""
    for ending, kind in _ENDINGS.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), kind
    return name, None


def missing(config, tensors):
    """What the settings promise and the tensors do not hold, as complaints.

    Args:
        config: dict, `adapter_config.json`.
        tensors: names of the tensors, without PEFT's prefixes.
    """
    held = {}
    for name in tensors:
        module, kind = _split(name)
        held.setdefault(kind, set()).add(module)
    for module in sorted(held.get("A", ())):
        if config.get("use_dora") and module not in held.get("magnitude", ()):
            yield f"use_dora is true: {module} has no lora_magnitude_vector"
    whole = held.get("whole", set())
    for wanted in config.get("modules_to_save") or ():
        ends = re.compile(rf"(.*\.)?{re.escape(str(wanted))}")
        if not any(map(ends.fullmatch, whole)):
            yield f"modules_to_save: there is no {wanted}"
    if config.get("trainable_token_indices") and not held.get("rows"):
        yield "trainable_token_indices: there are no rows of tokens"


def read_whole(tensors, config, backbone, scale_of):
    """The change that a folder's tensors make.

    Args:
        tensors: {name without PEFT's prefixes: float32 array}.
        config: dict, `adapter_config.json`.
        backbone: dict as of `GemmaBackbone.get_config()`.
        scale_of: function of (module's name, rank) -> scale.

    Returns:
        (`WholeChange` or None, complaints).
    """
    parts, wrong = {}, []
    for name, value in tensors.items():
        module, kind = _split(name)
        path = names.keras_path(f"{module}.weight")
        if kind is None or path is None:
            wrong.append(f"{name}: not a tensor of a Gemma 2, or of no adapter")
            continue
        if not np.isfinite(value).all():
            wrong.append(f"{name}: holds NaN or infinity")
        parts.setdefault(path, {}).setdefault(kind, (name, value))
    shapes = _shapes(backbone, parts)
    for path, held in parts.items():
        wrong += _misfits(path, held, shapes)
    if wrong:
        return None, wrong
    pairs = {
        path: (held["A"][1], held["B"][1])
        for path, held in parts.items()
        if "A" in held
    }
    found = WholeChange(
        pairs={
            path: (a, b, scale_of(_module(path), len(a)))
            for path, (a, b) in pairs.items()
        },
        magnitudes=_of(parts, "magnitude"),
        biases=_biases(parts, scale_of),
        tensors=_tensors(parts, backbone),
        rows=_rows(parts, config, wrong),
        tied=_tied(parts, config),
        kinds=_kinds(parts),
        base=str(config.get("base_model_name_or_path") or ""),
    )
    return (None, wrong) if wrong else (found, [])


def _module(path):
    return names.huggingface_name(path).removesuffix(".weight")


def _of(parts, kind):
    return {p: held[kind][1] for p, held in parts.items() if kind in held}


def _kinds(parts):
    held = {kind for some in parts.values() for kind in some}
    told = [words for kind, words in _KIND.items() if kind in held]
    for path, words in ((TABLE, "the token table"), (HEAD, "the head")):
        if "A" in parts.get(path, {}):
            told.append(f"an adapter on {words}")
    return tuple(told)


def _biases(parts, scale_of):
    """Scaled as `lora_B`'s output is; those of zeros are none."""
    found = {}
    for path, bias in _of(parts, "bias").items():
        if bias.any():
            rank = len(parts[path]["A"][1])
            scale = np.float32(scale_of(_module(path), rank))
            found[path] = scale * bias
    return found


def _tensors(parts, backbone):
    """What stands in the base's place; `base_layer` only if it was resized."""
    found = _of(parts, "whole")
    for path, value in _of(parts, "base").items():
        if path in (TABLE, HEAD) and len(value) != backbone["vocabulary_size"]:
            found.setdefault(path, value)
    return {
        path: names.to_keras(
            names.huggingface_name(path), value, head_dim=backbone["head_dim"]
        )[1]
        for path, value in found.items()
    }


def _rows(parts, config, wrong):
    held = parts.get(TABLE, {})
    if "rows" not in held:
        return None
    told = config.get("trainable_token_indices")
    if type(told) is dict:
        told = told.get("embed_tokens") or next(iter(told.values()), None)
    name, values = held["rows"]
    good = type(told) is list and all(type(i) is int and i >= 0 for i in told)
    if not good or len(told) != len(values):
        wrong.append(
            f"{name}: {len(values)} rows, and trainable_token_indices is "
            f"{told!r:.60}"
        )
        return None
    return np.array(told), values


def _tied(parts, config):
    """Whether the head stays the table.

    PEFT leaves the head as it was when the table alone is adapted, unless
    `ensure_weight_tying` is set; rows of new tokens it ties.
    """
    head, table = parts.get(HEAD, {}), parts.get(TABLE, {})
    if {"A", "B"} & head.keys():
        return False
    if "whole" in head:
        same = table.get("whole")
        return (
            "A" not in table
            and same is not None
            and np.array_equal(head["whole"][1], same[1])
        )
    if "rows" in table and {"A", "whole"}.isdisjoint(table):
        return True
    return bool(config.get("ensure_weight_tying")) or not table


def _shapes(backbone, parts):
    """{Keras path: [out, in] or [D]} of the base after the change."""
    told = {}
    for path, shape in names.variable_shapes(backbone).items():
        empty = np.broadcast_to(np.float32(0), shape)
        told[path] = names.to_huggingface(path, empty)[1].shape
    for path in (TABLE, HEAD):
        for kind in ("whole", "base"):
            if kind in parts.get(path, {}):
                value = parts[path][kind][1]
                if value.ndim == 2 and value.shape[1] == told[TABLE][1]:
                    told[TABLE] = value.shape
    return told | {HEAD: told[TABLE]}


def _misfits(path, held, shapes):
    """Complaints about the tensors of one module."""
    shape = shapes.get(path)
    if shape is None:
        yield f"{next(iter(held.values()))[0]}: the model has no such layer"
        return
    halves = {"A", "B"} & held.keys()
    for letter in {"A", "B"} - halves if halves else ():
        yield f"{_module(path)}.lora_{letter}.weight: missing"
    if len(halves) == 1:
        return
    if "A" in held:
        (first, a), (_, b) = held["A"], held["B"]
        inside, outside = shape[::-1] if path != TABLE else shape
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            yield f"{first}: {a.shape} and lora_B {b.shape} do not fit"
        elif (a.shape[1], len(b)) != (inside, outside):
            yield (
                f"{first}: {a.shape[1]} -> {len(b)}, expected {inside} -> "
                f"{outside}"
            )
    for kind, size in (("magnitude", shape[:1]), ("bias", shape[:1])):
        if kind in held and held[kind][1].shape != size:
            yield f"{held[kind][0]}: {held[kind][1].shape}, expected {size}"
    if "magnitude" in held and path in (TABLE, HEAD):
        yield f"{held['magnitude'][0]}: DoRA of the table or head"
    for kind in ("whole", "base"):
        if kind in held and held[kind][1].shape != shape:
            yield f"{held[kind][0]}: {held[kind][1].shape}, expected {shape}"
    if "rows" in held and held["rows"][1].shape[1:] != shape[1:]:
        yield f"{held['rows'][0]}: {held['rows'][1].shape}"
