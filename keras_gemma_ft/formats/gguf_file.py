"""A GGUF file, read with care: metadata, and where each tensor lies.

The layout is that of ggml/docs/gguf.md: magic, version, counts, key-value
pairs, tensor descriptions, and data at multiples of an alignment. Files are
untrusted. Every length is checked against what is left of the file before it
is used, so that one that lies costs neither memory nor time.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from keras_gemma_ft.config import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Value types of metadata that have a fixed size: number -> struct's letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
            10: "Q", 11: "q", 12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


class Entry(NamedTuple):
    """One tensor: its kind (a number of ggml's), numpy shape and place."""

    kind: int
    shape: tuple
    offset: int
    bytes: int


class File(NamedTuple):
    """metadata: {key: value}; tensors: {name: `Entry`}."""

    path: Any
    metadata: dict
    tensors: dict

    def array(self, name):
        """One tensor as float32, dequantised where it is stored in codes."""
        import gguf

        kind, shape, offset, size = self.tensors[name]
        data = np.fromfile(self.path, "uint8", size, offset=offset)
        if len(data) != size:
            raise UserError(f"{self.path}: {name} is not all there.")
        kind = gguf.GGMLQuantizationType(kind)
        if kind.name in ("F32", "F16", "F64"):
            kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
            found = data.view(kinds[kind.name]).astype("float32")
        else:
            rows = data.reshape(*shape[:-1], -1) if len(shape) > 1 else data
            found = gguf.quants.dequantize(rows, kind)
        return found.reshape(shape)


def read(path):
    """The header of a GGUF file.

    Returns:
        `File`.

    Raises:
        UserError: it is none, or a length or place in it cannot be true.
    """
    try:
        with open(path, "rb") as file:
            return _read(path, _Bytes(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except _Lie as lie:
        raise UserError(
            f"{path} is no whole GGUF file: {lie}. Fetch or export it again."
        ) from None


class _Lie(Exception):
    """What is wrong with a file."""


class _Bytes:
    """A file's bytes in order, none beyond its end."""

    def __init__(self, file):
        self.file = file
        file.seek(0, 2)
        self.size, self.at = file.tell(), 0
        file.seek(0)

    def take(self, count):
        if count > self.size - self.at:
            raise _Lie(
                f"{count:,} bytes are said to follow byte {self.at:,} of "
                f"{self.size:,}"
            )
        self.at += count
        return self.file.read(count)

    def number(self, letter):
        width = struct.calcsize(f"<{letter}")
        return struct.unpack(f"<{letter}", self.take(width))[0]

    def count(self, what, least):
        """How many of `what` follow, each of which takes `least` bytes."""
        found = self.number("Q")
        if found > (self.size - self.at) // least:
            raise _Lie(f"{found:,} {what} do not fit into it")
        return found

    def text(self):
        raw = self.take(self.count("bytes of a text", 1))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")


def _read(path, source):
    if source.take(4) != _MAGIC:
        raise _Lie("it does not begin with GGUF")
    version = source.number("I")
    if version not in _VERSIONS:
        raise _Lie(f"its version is {version}, expected 2 or 3")
    tensors = source.count("tensors", 24)
    pairs = source.count("keys", 13)
    metadata = {}
    for _ in range(pairs):
        key = source.text()
        if key in metadata:
            raise _Lie(f"the key {key!r} is there twice")
        metadata[key] = _value(source, source.number("I"))
    found = [_description(source) for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align not in {2**n for n in range(3, 17)}:
        raise _Lie(f"general.alignment is {align!r}")
    start = -(-source.at // align) * align
    entries = {}
    for name, kind, shape, offset in found:
        size = _bytes(name, kind, shape)
        if name in entries:
            raise _Lie(f"the tensor {name!r} is there twice")
        if offset % align or start + offset + size > source.size:
            raise _Lie(f"the data of {name!r} lies beyond its end")
        entries[name] = Entry(kind, shape, start + offset, size)
    return File(path, metadata, entries)


def _value(source, kind, nested=True):
    if kind in _SCALARS:
        return source.number(_SCALARS[kind])
    if kind == _STRING:
        return source.text()
    if kind != _ARRAY or not nested:
        raise _Lie(f"a value has the unknown type {kind}")
    inner = source.number("I")
    if inner in _SCALARS:
        letter = _SCALARS[inner]
        width = struct.calcsize(f"<{letter}")
        count = source.count("numbers of an array", width)
        dtype = np.dtype("?" if letter == "?" else f"<{_NUMPY[letter]}")
        return np.frombuffer(source.take(count * width), dtype)
    count = source.count("texts of an array", 8)
    return [_value(source, inner, nested=False) for _ in range(count)]


_NUMPY = {"B": "u1", "b": "i1", "H": "u2", "h": "i2", "I": "u4", "i": "i4",
          "f": "f4", "Q": "u8", "q": "i8", "d": "f8"}  # fmt: skip


def _description(source):
    name, count = source.text(), source.number("I")
    if not 1 <= count <= _MOST_DIMENSIONS:
        raise _Lie(f"the tensor {name!r} has {count} dimensions")
    # ggml lists the dimension first that numpy lists last.
    shape = tuple(source.number("Q") for _ in range(count))[::-1]
    return name, source.number("I"), shape, source.number("Q")


def _bytes(name, kind, shape):
    """Bytes of a tensor."""
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _Lie(f"{name!r} is stored in the unknown kind {kind}") from None
    if not all(shape) or shape[-1] % block:
        raise _Lie(f"the shape of {name!r} is {shape}")
    return math.prod(shape) // block * size
