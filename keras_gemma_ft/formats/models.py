"""A whole Gemma 2 on disk, whatever its format: its sizes and its variables.

A reader of a format is an object with

    backbone    dict: the arguments of KerasHub's `GemmaBackbone`, and
                `query_pre_attn_scalar` (query scale = that ** -0.5)
    paths       list of the Keras paths of its variables, in the model's order
    read(path)  one variable as an array with Keras's shape, float16, bfloat16
                or float32 as stored (float32 where it is stored in codes)

Nothing but one variable is in memory at a time.
"""

import collections
import math
import pathlib

import ml_dtypes
import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import (
    huggingface,
    keras_preset,
    merging,
    names,
    shards,
    tensors,
)
from keras_gemma_ft.formats.names import HEAD, TABLE


def open(folder):
    """The reader of a model's folder: Hugging Face's format, or Keras's.

    Raises:
        UserError: it is not a whole Gemma 2; all that is wrong is listed.
    """
    if huggingface.is_huggingface(folder):
        return HuggingFace(folder)
    return keras_preset.KerasPreset(folder)


class HuggingFace:
    """A folder of safetensors as a reader.

    Args:
        folder: holds `config.json` and the shards.

    Raises:
        UserError: see `shards.read_tensors`.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.backbone, found = shards.find(folder)
        held = shards.headers(self.folder, found)
        self.entries = {
            names.keras_path(name): (name, shard, held[shard][raw])
            for name, (shard, raw) in found.items()
        }
        order = [*names.variable_shapes(self.backbone), HEAD]
        self.paths = [path for path in order if path in self.entries]

    def read(self, path):
        """One variable, with Keras's shape and the dtype it is stored in."""
        name, shard, entry = self.entries[path]
        array = tensors.read(self.folder / shard, entry)
        head = self.backbone["head_dim"]
        return names.to_keras(name, array, head_dim=head)[1]


class Merged:
    """A reader of a base with an adapter merged into it.

    Args:
        base: a reader.
        adapter: `low_rank.Adapter`, `WholeChange`, or None.
    """

    def __init__(self, base, adapter):
        self.base, self.adapter = base, adapter
        self.backbone = merging.settings(base.backbone, adapter)
        self.paths = list(base.paths)
        self.tied = HEAD not in base.paths
        if self.tied and merging.unties(adapter):
            self.paths.append(HEAD)

    def read(self, path):
        """One variable: float32 where the adapter changes it, else the base's."""
        if path == HEAD and self.tied:
            array = merging.head(self.adapter, self.base.read(TABLE))
        else:
            array = merging.merged(path, self.base.read(path), self.adapter)
        rows = self.backbone["vocabulary_size"]
        if path in (TABLE, HEAD) and len(array) != rows:
            raise UserError(
                f"the adapter's table has {rows} rows, and {path} "
                f"{len(array)}: the adapter holds none for it. It is for "
                f"another model: check --preset."
            )
        return array


def shapes(model):
    """{Keras path: shape} of a model's variables."""
    found = names.variable_shapes(model.backbone)
    if HEAD in model.paths:
        found[HEAD] = found[TABLE]
    return found


def dtype_of(model):
    """Name of the dtype that most of a model's numbers are stored in."""
    counts, told = collections.Counter(), shapes(model)
    # A block is like the others: reading all of 9B to look would take minutes.
    for path in model.paths:
        if path.startswith("decoder_block_0/"):
            kind = model.read(path).dtype.name
            counts[kind] += math.prod(told[path])
    return counts.most_common(1)[0][0]


def parameters(model):
    """Numbers in a model's variables."""
    told = shapes(model)
    return sum(math.prod(told[path]) for path in model.paths)


def split(model, dtype, limit):
    """Paths of a model's variables in groups, each for one file.

    Args:
        model: a reader.
        dtype: name of the dtype in which they are stored.
        limit: bytes of a file at most; a variable that is larger has its own.

    Returns:
        List of lists of paths, in the model's order.
    """
    told = shapes(model)
    width = 4 if dtype == "float32" else 2
    groups, room = [], 0
    for path in model.paths:
        size = width * math.prod(told[path])
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(path)
        room -= size
    return groups


def cast(array, dtype):
    """An array in the dtype of a name, bfloat16 too; contiguous."""
    if dtype == "bfloat16":
        dtype = ml_dtypes.bfloat16
    return np.ascontiguousarray(array, dtype)
