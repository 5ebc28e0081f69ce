"""The weights of a Gemma 2 folder in Hugging Face's format, as Keras variables.

Safetensors shards, all of them checked before any is read, and then streamed
one tensor at a time. Names, shapes and transposes are in `names.py`.
"""

import functools
import pathlib
import re

import ml_dtypes  # noqa: F401  safetensors asks numpy for its bfloat16
import numpy as np
import safetensors

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import tensors
from keras_gemma_ft.formats.huggingface import backbone_config, read_json
from keras_gemma_ft.formats.names import (
    HEAD,
    TABLE,
    huggingface_name,
    huggingface_shapes,
    plain,
    to_keras,
)

# Recomputed by the model: nothing to load.
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")
_TABLE, _HEAD = huggingface_name(TABLE), huggingface_name(HEAD)
# Bytes of the table and the head that are compared at once.
_COMPARED = 2**25
# A file name and nothing else: no separators, no leading dot.
_SHARD_NAME = re.compile(r"\w[\w.\-]*\.safetensors")
FLOATS = ("BF16", "F16", "F32", "F64")


def read_tensors(folder):
    """Stream the weights of a Gemma 2 folder as Keras variables.

    Names, shapes and dtypes of all shards are checked before this returns, so
    that a bad folder is refused whole and before anything is loaded; after
    that one tensor is in memory at a time.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with
            `model.safetensors.index.json`.

    Returns:
        iterator of (Keras path, array) over every variable exactly once;
        float16, float32 or `ml_dtypes.bfloat16` as stored.

    Raises:
        UserError: a shard, tensor or shape that is missing, unexpected,
            truncated or wrong (all are listed), or a pickle-only folder.
    """
    backbone, found = find(folder)
    return _stream(pathlib.Path(folder), found, backbone["head_dim"])


def find(folder):
    """(backbone's sizes, {tensor's name: (shard, its name there)}), checked.

    Names are those of `names.py`, whatever wrappers have put into them. The
    head is among them only where it differs from the token table.

    Arguments and errors as of `read_tensors`.
    """
    folder = pathlib.Path(folder)
    backbone = backbone_config(read_json(folder / "config.json"))
    shards, listed = _shards(folder)
    wrong = []
    found = {}  # plain name -> (shard that holds it, name in the shard)
    expected = huggingface_shapes(backbone)
    optional = {_HEAD: expected[_TABLE]}
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, "numpy") as file:
                wrong += _check_shard(
                    shard, file, expected | optional, listed, found
                )
        except (OSError, safetensors.SafetensorError) as error:
            wrong.append(f"{shard}: missing, truncated or damaged ({error})")
    wrong += [f"{n}: missing" for n in expected if n not in found]
    if wrong:
        raise UserError(
            f"{folder} is not a whole Gemma 2 model:\n  "
            + "\n  ".join(wrong)
            + "\nFetch these files again, or check config.json."
        )
    if _HEAD in found and _equal(folder, found):
        del found[_HEAD]
    return backbone, found


def _equal(folder, found):
    """Whether the head is the token table; a part of each in memory."""
    (one, left), (two, right) = (
        (folder / shard, tensors.header(folder / shard)[0][name])
        for shard, name in (found[_TABLE], found[_HEAD])
    )
    stamps = one.stat().st_mtime_ns, two.stat().st_mtime_ns
    return _alike(one, left, two, right, stamps)


@functools.lru_cache(maxsize=8)
def _alike(one, left, two, right, stamps):
    # Kept: reading 2B's twice takes seconds, and several ask.
    for x, y in zip(
        tensors.parts(one, left, _COMPARED),
        tensors.parts(two, right, _COMPARED),
        strict=True,
    ):
        if not np.array_equal(x.astype("float32"), y.astype("float32")):
            return False
    return True


def _check_shard(shard, file, expected, listed, found):
    """Complaints about one shard's header; notes its tensors in `found`."""
    for raw in file.keys():
        name = plain(raw)
        if _IGNORED.fullmatch(name):
            continue
        part = file.get_slice(raw)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if name not in expected:
            yield f"{name}: unexpected in {shard}"
        elif name in found:
            both = " and ".join(
                f"{n} in {s}" for s, n in (found[name], (shard, raw))
            )
            yield f"{name}: there twice, as {both}"
        elif shape != expected[name]:
            yield f"{name}: shape {shape}, expected {expected[name]}"
        elif dtype not in FLOATS:
            yield f"{name}: dtype {dtype}, expected {' '.join(FLOATS)}"
        elif listed.get(raw, shard) != shard:
            yield f"{name}: in {shard}, the index says {listed[raw]}"
        found.setdefault(name, (shard, raw))


def _shards(folder):
    """Shard file names, and the index's {tensor: shard} ({} without index)."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{folder} holds only pickled weights ({', '.join(pickles)}), "
                "which can run code when opened. Convert them with "
                "transformers: AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder, safe_serialization=True)"
            )
        raise UserError(
            f"{folder} has neither model.safetensors nor "
            "model.safetensors.index.json. Fetch the weights again."
        )
    listed = read_json(index).get("weight_map")
    if type(listed) is not dict or not listed:
        raise UserError(f"{index} has no weight_map. Fetch the file again.")
    shards = sorted({str(shard) for shard in listed.values()})
    outside = [s for s in shards if not _SHARD_NAME.fullmatch(s)]
    if outside:
        raise UserError(
            f"{index} names shards that are not plain .safetensors file "
            f"names: {', '.join(map(repr, outside))}. The file was tampered "
            "with or damaged: fetch it again from a source you trust."
        )
    return shards, listed


def headers(folder, found):
    """{shard: {name in it: entry}} of what `find` has found."""
    return {
        shard: tensors.header(folder / shard)[0]
        for shard in {shard for shard, _ in found.values()}
    }


def _stream(folder, found, head_dim):
    held = headers(folder, found)
    for name, (shard, raw) in found.items():
        array = tensors.read(folder / shard, held[shard][raw])
        yield to_keras(name, array, head_dim=head_dim)
