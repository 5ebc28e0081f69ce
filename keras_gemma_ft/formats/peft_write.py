"""Adapter -> PEFT folder: safetensors, `adapter_config.json`, model card.

What PEFT's config cannot say (style, rank and alpha of the Keras layers) is
in the safetensors header, which other readers skip.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import low_rank
from keras_gemma_ft.formats import usage as travelling
from keras_gemma_ft.formats.atomic import replacing
from keras_gemma_ft.formats.model_card import model_card
from keras_gemma_ft.formats.names import MODULES
from keras_gemma_ft.formats.peft_config import CONFIG, peft_config

WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"
_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# Key of our own note in the safetensors metadata.
HEADER = "keras_gemma_ft"


def write_peft(folder, adapter, *, notes="", usage=None, dtype="float32"):
    """Write a folder that `peft.PeftModel.from_pretrained` reads.

    Args:
        folder: complete or absent afterwards; replaced if it holds an older
            adapter and nothing else.
        adapter: `low_rank.Adapter`, either style.
        notes: Markdown put at the end of the model card.
        usage: `usage.Usage` that travels with it.
        dtype: name of the dtype that A and B are stored in.

    Raises:
        UserError: `folder` exists and holds other files.
    """
    folder = pathlib.Path(folder)
    _check_replaceable(folder)
    tensors, ranks = {}, {}
    for (layer, target), (a, b) in sorted(adapter.weights.items()):
        module = f"model.layers.{layer}.{MODULES[target]}"
        pair = low_rank.to_peft(adapter.style, target, a, b)
        for letter, value in zip("AB", pair):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            tensors[key] = np.ascontiguousarray(value, dtype=_DTYPES[dtype])
        ranks[module] = len(pair[0])
    config = peft_config(adapter, ranks)
    card = model_card(adapter, config, notes, usage)
    data = _serialize(tensors, adapter)
    with replacing(folder, len(data)) as partial:
        partial.mkdir()
        (partial / WEIGHTS).write_bytes(data)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (partial / _CARD).write_text(card, encoding="utf-8")
        if usage:
            travelling.write(partial, usage)


def _check_replaceable(folder):
    if not folder.exists():
        return
    known = {CONFIG, WEIGHTS, _CARD, travelling.FILE, travelling.JINJA}
    held = {p.name for p in folder.iterdir()} if folder.is_dir() else {"file"}
    if held - known:
        raise UserError(
            f"{folder} holds other files ({', '.join(sorted(held - known))}) "
            "and would be replaced. Name a new folder for the adapter."
        )


def _serialize(tensors, adapter):
    """safetensors bytes; equal adapters give equal bytes."""
    fields = {
        f.name: getattr(adapter, f.name)
        for f in dataclasses.fields(adapter)
        if f.name not in ("weights", "folded", "doubts")
    }
    # In PEFT's matrices heads cannot be told apart. They are the first axis
    # of a Keras A, the second of a standard B.
    pairs = {target: pair for (_, target), pair in adapter.weights.items()}
    fields["heads"] = {
        target: len(a) if a.ndim == 3 else b.shape[1]
        for target in low_rank.ordered(pairs)
        for a, b in [pairs[target]]
        if a.ndim == 3 or b.ndim == 3
    }
    data = safetensors.numpy.save(
        tensors, {"format": "pt", HEADER: json.dumps(fields)}
    )
    # The library writes metadata in the random order of a hash map.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size
    return data[:8] + text + data[8 + size :]
