"""The tensors of an adapter's file, sorted by the module that they belong to.

Names are read as PEFT and others leave them: with or without
`base_model.model.`, `model.`, an adapter's name, and what torch.compile, FSDP
or DDP put around modules.
"""

import json
import re

import ml_dtypes  # noqa: F401  safetensors asks numpy for its bfloat16
import numpy as np
import safetensors

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import names
from keras_gemma_ft.formats.peft_write import HEADER
from keras_gemma_ft.formats.shards import FLOATS

# An adapter's name, which PEFT leaves in where a state dict was saved by hand.
_NAMED = r"(?:\.[\w\-]+)?"
# Part of a module -> how its tensor's name ends.
_PARTS = {
    "A": rf"lora_A{_NAMED}\.weight",
    "B": rf"lora_B{_NAMED}\.weight",
    "bias": rf"lora_B{_NAMED}\.bias",
    "embedding_A": rf"lora_embedding_A{_NAMED}",
    "embedding_B": rf"lora_embedding_B{_NAMED}",
    "magnitude": rf"lora_magnitude_vector{_NAMED}(?:\.weight)?",
    "rows": rf"token_adapter\.trainable_tokens_delta{_NAMED}",
    "base": r"(?:token_adapter\.)?base_layer\.weight",
    "original": r"original_module\.weight",
    "saved": rf"modules_to_save{_NAMED}\.weight",
    "weight": r"weight",
}
_PREFIX = re.compile(r"(?:base_model\.model\.)?")
_KNOWN = re.compile(
    r"(lm_head|model\.embed_tokens|model\.norm|"
    r"model\.layers\.\d+\.\w+(?:\.\w+_proj)?)\.(.+)"
)
# Of these the values are wanted as float32; the others may be large.
SMALL = ("A", "B", "bias", "magnitude", "rows")


def parse(name):
    """(module, part) of a tensor's name; None: not of an adapter's."""
    plain = _PREFIX.sub("", names.unwrapped(name), count=1)
    match = _KNOWN.fullmatch(names.plain(plain))
    if not match or names.keras_path(f"{match[1]}.weight") is None:
        return None
    for part, pattern in _PARTS.items():
        if re.fullmatch(pattern, match[2]):
            return match[1], part
    return None


def read(path):
    """All tensors of a file, and what `write_peft` noted of its own.

    Args:
        path: of a safetensors file.

    Returns:
        ({tensor name: array as stored}, own header or None).

    Raises:
        UserError: it is damaged, or holds other than floats.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            own = json.loads((file.metadata() or {}).get(HEADER, "null"))
            kinds = {n: file.get_slice(n).get_dtype() for n in file.keys()}
            wrong = [f"{n}: {k}" for n, k in kinds.items() if k not in FLOATS]
            tensors = {n: file.get_tensor(n) for n in kinds if not wrong}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}). "
            "Fetch or export the adapter again."
        ) from error
    if wrong:
        raise UserError(
            f"{path} holds tensors that are not {', '.join(FLOATS)}:\n  "
            + "\n  ".join(wrong)
            + "\nExport the adapter again without quantizing it."
        )
    return tensors, own


def sort(tensors):
    """Tensors by their modules, which are named as in Gemma2ForCausalLM.

    Args:
        tensors: {tensor name: array}, names as PEFT's.

    Returns:
        ({module: {part: array}}, those of them that are sound, complaints).
    """
    found, wrong, sound = {}, [], {}
    for name, value in tensors.items():
        known = parse(name)
        if known is None:
            wrong.append(f"{name}: not a tensor of an adapter of Gemma 2")
            continue
        module, part = known
        parts = found.setdefault(module, {})
        if part in parts:
            wrong.append(f"{name}: there twice, under two names")
        if not np.isfinite(value).all():
            wrong.append(f"{name}: holds NaN or infinity")
        parts[part] = value.astype("float32") if part in SMALL else value
    for module, parts in sorted(found.items()):
        told = [*_complaints(module, parts)]
        wrong += told
        if not told:
            sound[module] = parts
    if not tensors:
        wrong.append("no tensors")
    return found, sound, wrong


def _complaints(module, parts):
    """What cannot be of one module's parts, whatever the model is."""
    for one, other in (("A", "B"), ("embedding_A", "embedding_B")):
        held = [part for part in (one, other) if part in parts]
        for part in {one, other} - set(held):
            if held or (part == "A" and "bias" in parts):
                yield f"{module}.lora_{part}.weight: missing"
        flat = [p for p in held if parts[p].ndim != 2 or not parts[p].size]
        for part in flat:
            shape = parts[part].shape
            yield f"{module}.lora_{part}: shape {shape}, expected a matrix"
        if len(held) == 2 and not flat:
            a, b = parts[one].shape, parts[other].shape
            if a[0] != b[1]:
                yield f"{module}: lora_A {a} and lora_B {b} differ in rank"
    if "magnitude" in parts and not {"A", "embedding_A"} & {*parts}:
        yield f"{module}.lora_magnitude_vector: there is no lora_A to it"
    saved = parts.get("saved")
    if saved is not None and not np.array_equal(
        saved, parts.setdefault("weight", saved)
    ):
        yield f"{module}.modules_to_save.weight: differs from {module}.weight"
