"""A PEFT folder -> an adapter: as we wrote it, or as the style "standard".

PEFT's rules are followed. A module's scale is alpha/r, or alpha/sqrt(r) with
rsLoRA. Its r is that of its tensors. Its alpha stands under the first key of
`alpha_pattern` that fits the end of the module's name, else it is `lora_alpha`
(peft/utils/other.py, `get_pattern_key`).
"""

import pathlib

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import (
    low_rank,
    mlx_read,
    peft_config,
    peft_tensors,
    peft_whole,
)
from keras_gemma_ft.formats.names import MODULES, kernel_shapes
from keras_gemma_ft.formats.peft_write import HEADER, WEIGHTS


def read_peft(folder, backbone=None):
    """Read a PEFT LoRA adapter for Gemma 2, or MLX's.

    A folder of `write_peft` comes back as it was. Any other of pairs alone
    becomes style "standard", its rank the largest of its modules (smaller ones
    are padded with zeros), its `alpha_pattern` folded into B.

    Args:
        folder: holds `adapter_config.json`, `adapter_model.safetensors` (or
            MLX's `adapters.safetensors`).
        backbone: dict as of `GemmaBackbone.get_config()`; needed for foreign
            adapters (their files do not tell heads), else only to check.

    Returns:
        `low_rank.Adapter`; or `whole_change.WholeChange`, where there is more
        than pairs of projections.

    Raises:
        UserError: not such a folder, an adapter of another kind or for
            another model; every offending setting or tensor is listed.
    """
    folder = pathlib.Path(folder)
    file, own = weights_file(folder), None
    if file.name == mlx_read.WEIGHTS:
        config, tensors = mlx_read.read(folder)
    else:
        config = peft_config.read_config(folder)
        tensors, own = peft_tensors.read(file)
    found, sound, wrong = peft_tensors.sort(tensors)
    found, parts = (
        peft_whole.without_twin(config, some) for some in (found, sound)
    )
    wrong += peft_whole.contradictions(config, found)
    if backbone:
        wrong += peft_whole.misfits(parts, config, backbone)
    if wrong:
        raise UserError(
            f"{file} is not an adapter for this model:\n  "
            + "\n  ".join(wrong)
            + "\nCheck --preset, or export the adapter again."
        )
    if own and peft_whole.is_plain(parts):
        pairs = _pairs(parts)
        adapter = _own(folder, own, pairs, backbone)
        ranks = {_module(key): len(a) for key, (a, _) in pairs.items()}
        ours = peft_config.peft_config(adapter, ranks)
        # Where config was edited since, it is right: PEFT sees only that.
        if all(config.get(name) == ours[name] for name in peft_config.SCALING):
            return adapter
    if backbone is None:
        raise UserError(
            f"{folder} does not say how many heads its model has. "
            "Name the model it was trained on with --preset."
        )
    return _foreign(folder, config, parts, backbone)


def weights_file(folder):
    """The file of a folder that holds the adapter's tensors.

    Raises:
        UserError: there is none that is no pickle.
    """
    for name in (WEIGHTS, mlx_read.WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} has only adapter_model.bin, a pickle, which can run "
            "code when opened. Convert it: peft.PeftModel.from_pretrained("
            "base, folder).save_pretrained(new, safe_serialization=True)"
        )
    raise UserError(f"{folder} has no {WEIGHTS}. Export the adapter again.")


def _module(key):
    layer, target = key
    return f"model.layers.{layer}.{MODULES[target]}"


def _pairs(parts):
    """{(layer, target): (lora_A [R, in], lora_B [out, R])} of plain parts."""
    found = {
        peft_whole.target_of(module): (own["A"], own["B"])
        for module, own in parts.items()
    }
    return {key: found[key] for key in sorted(found)}


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
    if not all(map(peft_config.is_number, (adapter.alpha, adapter.dropout))):
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


def _foreign(folder, config, parts, backbone):
    """Any LoRA as style "standard"; ranks padded, odd scales folded.

    Or, if it is more than pairs, as a `WholeChange`.
    """
    ranks = {
        module: len(own["A"] if "A" in own else own["embedding_A"])
        for module, own in parts.items()
        if "A" in own or "embedding_A" in own
    }
    scales = peft_config.scales(folder, config, ranks)
    said = {
        "base": str(config.get("base_model_name_or_path") or ""),
        "doubts": peft_config.doubts(folder, config, ranks),
    }
    if not peft_whole.is_plain(parts):
        tied = config["peft_type"] == mlx_read.KIND
        return peft_whole.build(config, parts, scales, tied_table=tied, **said)
    pairs, kernels = _pairs(parts), kernel_shapes(backbone)
    rank = max(ranks.values())
    alpha = float(config.get("lora_alpha", 8))
    rslora = config.get("use_rslora", False)
    common = low_rank.scale(rank, alpha, rslora)
    fold = any(factor != common for factor in scales.values())
    weights = {}
    for key, (lora_a, lora_b) in pairs.items():
        heads = kernels[key[1]][0]
        lora_a = np.pad(lora_a, [(0, rank - len(lora_a)), (0, 0)])
        lora_b = np.pad(lora_b, [(0, 0), (0, rank - lora_b.shape[1])])
        a, b = low_rank.from_peft(
            "standard", key[1], lora_a, lora_b, heads, backbone["head_dim"]
        )
        weights[key] = a, b * np.float32(scales[_module(key)]) if fold else b
    return low_rank.Adapter(
        style="standard",
        rank=rank,
        alpha=float(rank) if fold else alpha,
        rslora=rslora and not fold,
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=low_rank.ordered(target for _, target in pairs),
        weights=weights,
        folded=fold,
        **said,
    )
