"""A PEFT folder -> an adapter: as we wrote it, or as the style "standard".

PEFT's rules are followed. A module's scale is alpha/r, or alpha/sqrt(r) with
rsLoRA. Its r is that of its tensors. Its alpha stands under the first key of
`alpha_pattern` that fits the end of the module's name, else it is `lora_alpha`
(peft/utils/other.py, `get_pattern_key`).
"""

import dataclasses
import pathlib
import re

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import low_rank, peft_files, peft_whole
from keras_gemma_ft.formats.names import MODULES, kernel_shapes
from keras_gemma_ft.formats.peft_config import (
    CONFIG,
    SCALING,
    is_number,
    peft_config,
)
from keras_gemma_ft.formats.peft_write import HEADER, WEIGHTS

_TARGETS = {module: target for target, module in MODULES.items()}
_KEY = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight")


def read_peft(folder, backbone=None):
    """Read a PEFT LoRA adapter for Gemma 2.

    A folder of `write_peft` comes back as it was. Any other becomes style
    "standard", its rank the largest of its modules (smaller ones are padded
    with zeros), its `alpha_pattern` folded into B.

    Args:
        folder: holds `adapter_config.json`, `adapter_model.safetensors`.
        backbone: dict as of `GemmaBackbone.get_config()`; needed for foreign
            adapters (their files do not tell heads), else only to check.

    Returns:
        `low_rank.Adapter`; of a folder that holds more than plain LoRA, a
        `whole_change.WholeChange`.

    Raises:
        UserError: not such a folder, an adapter of another kind or for
            another model; every offending setting or tensor is listed.
    """
    folder = pathlib.Path(folder)
    files = peft_files.read(folder)
    config, tensors, own = files.config, files.tensors, files.own
    wrong = [*files.wrong, *peft_whole.missing(config, tensors)]
    if not all(map(peft_whole.is_plain, tensors)):
        return _whole(folder, config, tensors, backbone, wrong)
    pairs, more = _pairs(tensors)
    wrong += more
    if backbone:
        wrong += _misfits(pairs, backbone)
    if wrong:
        raise _not_for_this_model(folder, wrong)
    if own:
        adapter = _own(folder, own, pairs, backbone)
        ranks = {_module(key): len(a) for key, (a, _) in pairs.items()}
        ours = peft_config(adapter, ranks)
        # Where config was edited since, it is right: PEFT sees only that.
        if all(config.get(name) == ours[name] for name in SCALING):
            return adapter
    if backbone is None:
        raise UserError(
            f"{folder} does not say how many heads its model has. "
            "Name the model it was trained on with --preset."
        )
    return _foreign(folder, config, pairs, backbone)


def is_whole(folder):
    """Whether a folder holds more than plain LoRA: it is used merged only."""
    files = peft_files.read(pathlib.Path(folder))
    return not all(map(peft_whole.is_plain, files.tensors))


def _not_for_this_model(folder, wrong):
    return UserError(
        f"{folder} is not an adapter for this model:\n  "
        + "\n  ".join(wrong)
        + "\nCheck --preset, or export the adapter again."
    )


def _whole(folder, config, tensors, backbone, wrong):
    """What is more than plain LoRA, as a change of whole weights."""
    if backbone is None:
        raise UserError(
            f"{folder} holds more than plain LoRA. Name the model it was "
            "trained on with --preset."
        )
    doubts = []

    def scale_of(module, rank):
        if "mlx_scale" in config:
            return config["mlx_scale"]
        alpha = _alpha(folder, config, module, doubts)
        return low_rank.scale(rank, alpha, config.get("use_rslora", False))

    found, more = peft_whole.read_whole(tensors, config, backbone, scale_of)
    if wrong or more:
        raise _not_for_this_model(folder, wrong + more)
    return dataclasses.replace(found, doubts=tuple(dict.fromkeys(doubts)))


def _module(key):
    layer, target = key
    return f"model.layers.{layer}.{MODULES[target]}"


def _pairs(tensors):
    """{(layer, target): (lora_A [R, in], lora_B [out, R])}, complaints."""
    halves, wrong = {}, []
    for name, value in tensors.items():
        match = _KEY.fullmatch(name)
        if not match or match[2] not in _TARGETS:
            wrong.append(f"{name}: not a LoRA tensor of a Gemma 2 projection")
            continue
        half = halves.setdefault((int(match[1]), _TARGETS[match[2]]), {})
        half[match[3]] = value
        if value.ndim != 2 or not value.size:
            wrong.append(f"{name}: shape {value.shape}, expected a matrix")
        elif not np.isfinite(value).all():
            wrong.append(f"{name}: holds NaN or infinity")
    for key, half in halves.items():
        for letter in {"A", "B"} - set(half):
            wrong.append(f"{_module(key)}.lora_{letter}.weight: missing")
        shapes = [half[letter].shape for letter in sorted(half)]
        if len(shapes) == 2 and shapes[0][:1] != shapes[1][1:]:
            wrong.append(
                f"{_module(key)}: lora_A {shapes[0]} and lora_B {shapes[1]} "
                "differ in rank"
            )
    if not tensors:
        wrong.append("no tensors")
    if wrong:
        return {}, wrong
    return {k: (halves[k]["A"], halves[k]["B"]) for k in sorted(halves)}, []


def _misfits(pairs, backbone):
    kernels = kernel_shapes(backbone)
    for (layer, target), (a, b) in pairs.items():
        module = _module((layer, target))
        if layer >= backbone["num_layers"]:
            yield f"{module}: the model has {backbone['num_layers']} layers"
            continue
        *before, last = kernels[target]
        wide = target == "attention_output"
        heads = before[0] if target in low_rank.HEADED else 1
        size = before[0] * before[1] if wide else before[-1], heads * last
        if (a.shape[1], len(b)) != size:
            yield (
                f"{module}: {a.shape[1]} -> {len(b)}, "
                f"expected {size[0]} -> {size[1]}"
            )


# What a header that is not as we write it can raise.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


def _own(folder, own, pairs, backbone):
    """The adapter that `write_peft` was given."""
    kernels = kernel_shapes(backbone) if backbone else None
    try:
        fields = {**own, "targets": tuple(own["targets"])}
        heads = fields.pop("heads")
        weights = {}
        for (layer, target), (a, b) in pairs.items():
            count = heads.get(target, 1)
            side = len(b) if target in low_rank.HEADED else a.shape[1]
            weights[layer, target] = low_rank.from_peft(
                own["style"], target, a, b, count, side // count
            )
        adapter = low_rank.Adapter(weights=weights, **fields)
        wrong = [*_lies(adapter, kernels)]
    except _MALFORMED as error:
        wrong = [repr(error)]
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS}: its tensors and its {HEADER!r} header "
            f"disagree ({'; '.join(wrong)}). Export the adapter again."
        )
    return adapter


def _lies(adapter, kernels):
    """What in a header of ours cannot be true of the tensors."""
    if adapter.style not in ("keras", "standard"):
        yield f"style {adapter.style!r}"
    if not (is_number(adapter.alpha) and is_number(adapter.dropout)):
        yield "alpha or dropout is no number"
    if type(adapter.rslora) is not bool or {
        type(adapter.base),
        type(adapter.init),
    } != {str}:
        yield "rslora, base or init has a wrong type"
    if adapter.targets != low_rank.ordered(t for _, t in adapter.weights):
        yield f"targets {adapter.targets}"
    for (_, target), (a, b) in adapter.weights.items():
        if a.shape[-1] != adapter.rank:
            yield f"{target}: rank {a.shape[-1]}, not {adapter.rank}"
        elif kernels:
            shapes = low_rank.pair_shapes(
                adapter.style, target, kernels[target], adapter.rank
            )
            if (a.shape, b.shape) != shapes:
                yield f"{target}: {a.shape}, {b.shape}, expected {shapes}"


def _foreign(folder, config, pairs, backbone):
    """Any LoRA as style "standard"; ranks padded, odd scales folded."""
    kernels = kernel_shapes(backbone)
    rank = max(len(a) for a, _ in pairs.values())
    alpha = float(config.get("lora_alpha", 8))
    rslora, doubts = config.get("use_rslora", False), []
    factors = {
        key: config["mlx_scale"]
        if "mlx_scale" in config
        else low_rank.scale(
            len(a), _alpha(folder, config, _module(key), doubts), rslora
        )
        for key, (a, _) in pairs.items()
    }
    common = low_rank.scale(rank, alpha, rslora)
    fold = any(factor != common for factor in factors.values())
    weights = {}
    for key, (lora_a, lora_b) in pairs.items():
        heads = kernels[key[1]][0]
        lora_a = np.pad(lora_a, [(0, rank - len(lora_a)), (0, 0)])
        lora_b = np.pad(lora_b, [(0, 0), (0, rank - lora_b.shape[1])])
        a, b = low_rank.from_peft(
            "standard", key[1], lora_a, lora_b, heads, backbone["head_dim"]
        )
        weights[key] = a, b * np.float32(factors[key]) if fold else b
    return low_rank.Adapter(
        style="standard",
        rank=rank,
        alpha=float(rank) if fold else alpha,
        rslora=rslora and not fold,
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=low_rank.ordered(target for _, target in pairs),
        weights=weights,
        base=str(config.get("base_model_name_or_path") or ""),
        folded=fold,
        doubts=tuple(dict.fromkeys(doubts)),
    )


def _alpha(folder, config, module, doubts):
    """`lora_alpha` of a module: that of the first pattern that fits."""
    fitting = {}
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                fitting[pattern] = alpha
        except re.error as error:
            raise UserError(
                f"{folder / CONFIG}: alpha_pattern {pattern!r} is not a "
                f"regular expression ({error}). Export the adapter again."
            ) from error
    if len({*fitting.values()}) > 1:
        doubts.append(
            f"{folder / CONFIG}: several keys of alpha_pattern fit one module "
            f"({', '.join(fitting)}), with different alphas. PEFT takes the "
            f"first, and saves them sorted: what was trained may have had "
            f"another order."
        )
    return next(iter(fitting.values()), config.get("lora_alpha", 8))
