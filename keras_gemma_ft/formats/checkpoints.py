"""The adapter in a checkpoint of a run, which need not have ended.

`checkpoints/<step>/` holds `state.safetensors`, whose tensors of A and B are
named `trainable/<number>/<Keras path>`, and `state.json` with their sha256.
What they mean, style, scale and base, is in the run's config.json.
"""

import dataclasses
import hashlib
import json
import pathlib
import re

import safetensors
from safetensors import numpy as safetensors_numpy

from keras_gemma_ft import config
from keras_gemma_ft.formats import low_rank
from keras_gemma_ft.formats.huggingface import read_json

STATE, WEIGHTS = "state.json", "state.safetensors"
# Where A and B started, if they started from the kernels.
START = "start.safetensors"
_NAME = re.compile(
    r"trainable/\d+/decoder_block_(\d+)/(?:attention/)?(\w+)/lora_kernel_([ab])"
)


def digest(facts, data):
    """sha256 over what state.json says of the run, and the tensors' bytes."""
    own = ("bytes", "sha256")
    told = {key: value for key, value in facts.items() if key not in own}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    found.update(data)
    return found.hexdigest()


def verified(folder):
    """(facts, bytes of the tensors) of a checkpoint that is whole.

    Raises:
        ValueError: it is not, and why.
        OSError: a file is missing.
    """
    try:
        facts = json.loads((folder / STATE).read_text())
        data = (folder / WEIGHTS).read_bytes()
        if len(data) != facts["bytes"]:
            raise ValueError(f"{len(data)} bytes, not {facts['bytes']}")
        if digest(facts, data) != facts["sha256"]:
            raise ValueError("its sha256 differs")
    except (KeyError, TypeError) as error:
        raise ValueError(f"state.json does not hold {error}") from error
    return facts, data


def is_checkpoint(folder):
    """Whether a folder looks like a checkpoint of a run."""
    return (pathlib.Path(folder) / STATE).is_file()


def run_of(folder):
    """The run folder of a checkpoint."""
    return pathlib.Path(folder).absolute().parent.parent


def newest(run_dir):
    """The newest checkpoint of a run that is whole, or None."""
    found = pathlib.Path(run_dir).glob("checkpoints/[0-9]*")
    for folder in sorted(found, reverse=True):
        try:
            verified(folder)
        except (OSError, ValueError):
            continue
        return folder
    return None


def settings_of(folder):
    """The settings of a checkpoint's run, {path: value}.

    Raises:
        UserError: the run's config.json is missing or damaged.
    """
    settings = read_json(run_of(folder) / "config.json").get("settings")
    if type(settings) is not dict:
        raise config.UserError(
            f"{run_of(folder) / 'config.json'} has no settings. A checkpoint "
            f"is read in the run folder that it was written to."
        )
    return settings


def read_checkpoint(folder):
    """The adapter that a run had at a checkpoint, for the base as it was.

    Args:
        folder: `<run folder>/checkpoints/<step>`.

    Returns:
        `low_rank.Adapter`.

    Raises:
        UserError: it is damaged, or the run trains every weight.
    """
    folder = pathlib.Path(folder)
    try:
        _, data = verified(folder)
        tensors = safetensors_numpy.load(data)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise config.UserError(
            f"the checkpoint {folder} is damaged ({error}). Name another one."
        ) from error
    known = config.flatten(config.Config())
    told = {p: v for p, v in settings_of(folder).items() if p in known}
    lora = config.replace(config.Config(), told).lora
    halves = {}
    for name, value in tensors.items():
        if match := _NAME.fullmatch(name):
            half = halves.setdefault((int(match[1]), match[2]), {})
            half[match[3]] = value.astype("float32")
    if not halves:
        raise config.UserError(
            f"the checkpoint {folder} holds no adapter: its run trains every "
            f"weight. When it has ended, its model is in "
            f"{run_of(folder) / 'model'}."
        )
    adapter = low_rank.Adapter(
        style=lora.style,
        rank=lora.rank,
        alpha=lora.alpha or float(lora.rank),
        rslora=lora.rslora,
        dropout=lora.dropout,
        targets=low_rank.ordered(target for _, target in halves),
        weights={k: (h["a"], h["b"]) for k, h in sorted(halves.items())},
        base=str(told["preset"]),
        init=lora.init,
    )
    if lora.init == "default":
        return adapter
    start = dataclasses.replace(adapter, weights=_start(run_of(folder)))
    return low_rank.difference(adapter, start)


def _start(run_dir):
    """{(layer, target): (A0, B0)} of a run whose adapters began so."""
    try:
        arrays = safetensors_numpy.load((run_dir / START).read_bytes())
        return read_start(arrays)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise config.UserError(
            f"{run_dir / START}, where the adapters of this run started, "
            f"cannot be read ({error})."
        ) from error


def read_start(arrays):
    """{(layer, target): (A0, B0)} of the tensors of `START`."""
    weights = {}
    for name in arrays:
        layer, target, letter = name.split("/")
        if letter == "a":
            pair = arrays[name], arrays[f"{layer}/{target}/b"]
            weights[int(layer), target] = pair
    return weights
