"""Reads and writes LoRA adapters, in whichever format they are on disk.

An adapter in memory is `Adapter` (`low_rank.py`, with all shapes). On disk it
is a PEFT folder (`peft_write.py`, `peft_read.py`,
`peft_config.py`), a stock Keras `.lora.h5` (`keras_file.py`) or a GGUF for
llama.cpp (`gguf_adapter.py`).

    adapter = adapters.read("runs/first", backbone_config)
    adapters.write_peft("out/adapter", adapter)
    index = adapters.layer_index(backbone_config["num_layers"])
    adapters.write_keras("out/adapter.lora.h5", adapter, index)
"""

import pathlib

from keras_gemma_ft.config import UserError, did_you_mean
from keras_gemma_ft.formats import checkpoints
from keras_gemma_ft.formats.gguf_adapter import read_gguf_adapter
from keras_gemma_ft.formats.keras_file import (
    layer_index,
    read_keras,
    write_keras,
)
from keras_gemma_ft.formats.low_rank import (
    Adapter,
    difference,
    matrix,
    pair_shapes,
    product,
    scale,
    stock_rank,
)
from keras_gemma_ft.formats.peft_config import CONFIG
from keras_gemma_ft.formats.peft_read import read_peft, weights_file
from keras_gemma_ft.formats.peft_write import write_peft
from keras_gemma_ft.formats.whole_change import WholeChange

__all__ = [
    "Adapter",
    "WholeChange",
    "difference",
    "layer_index",
    "matrix",
    "pair_shapes",
    "place",
    "product",
    "read",
    "read_keras",
    "read_peft",
    "scale",
    "stock_rank",
    "weights_of",
    "write_keras",
    "write_peft",
]


def read(path, backbone, *, base=""):
    """Read an adapter, whatever its form.

    Args:
        path: a PEFT folder, a `.lora.h5` or `.gguf` file, a checkpoint of a
            run, or a run folder that holds `adapter/` (taken first) or
            `adapter.lora.h5`.
        backbone: dict as of `GemmaBackbone.get_config()` of the model that
            the adapter is for.
        base: preset name to note where the file does not say it.

    Returns:
        `Adapter`, fitting `backbone`.

    Raises:
        UserError: no such path, or an adapter that is damaged, of another
            kind or for another model; every offending entry is listed.
    """
    found = place(path)
    if checkpoints.is_checkpoint(found):
        return checkpoints.read_checkpoint(found)
    if found.is_dir():
        return read_peft(found, backbone)
    if found.suffix == ".gguf":
        return read_gguf_adapter(found, backbone, base=base)
    return read_keras(found, backbone, base=base)


def place(path):
    """Where the adapter at `path` is: its PEFT folder, or its `.lora.h5` file.

    Arguments and errors as of `read`, which looks inside.
    """
    path = pathlib.Path(path)
    if path.is_file():
        if path.suffix in (".h5", ".gguf"):
            return path
        raise UserError(
            f"{path} is a file, expected a .lora.h5 or .gguf file or a folder. "
            "Name the folder that holds adapter_config.json."
        )
    if not path.is_dir():
        raise UserError(f"There is no adapter at {path}.{_near(path)}")
    if checkpoints.is_checkpoint(path):
        return path
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    for name in ("adapter.lora.h5", "adapter.gguf"):
        if (path / name).is_file():
            return path / name
    held = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    model = (path / "config.json").is_file()
    raise UserError(
        f"{path} holds no adapter; expected {CONFIG}, adapter/ or "
        f"adapter.lora.h5, found {held}."
        + (" If it is a model, name it with --preset." if model else "")
    )


def weights_of(path):
    """The file that holds the weights of the adapter at `path`."""
    found = place(path)
    if checkpoints.is_checkpoint(found):
        return found / checkpoints.WEIGHTS
    return weights_file(found) if found.is_dir() else found


def _near(path):
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    known = [str(parent / name) for name in names if name[0] != "."]
    return did_you_mean(str(path), known) or (
        f" {parent} holds: {', '.join(sorted(names)) or 'nothing'}."
        if parent.is_dir()
        else f" {parent} does not exist either."
    )
