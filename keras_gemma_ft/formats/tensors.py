"""Safetensors files, a tensor at a time, in memory that is ours.

The safetensors library maps a whole file into memory, and each page that was
read counts as memory of the process until the map is closed, although its
content was copied to an array. Here a tensor is read straight into an array.
A file can also be written tensor by tensor, before all of them are known.
"""

import json
import math
import zlib

import ml_dtypes
import numpy as np

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("float16"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH = 8  # bytes: little-endian, of the JSON that follows
# Room for a header that is written last; 9B's takes 200 KB.
_ROOM = 2**20


def header(path):
    """({name: (dtype, shape, place in the file)}, metadata) of a file.

    Raises:
        ValueError: it is not such a file.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(_LENGTH), "little")
        told = json.loads(file.read(min(size, 2**27)))
    metadata = told.pop("__metadata__", {})
    found, first = {}, _LENGTH + size
    for name, part in told.items():
        dtype, shape = _DTYPES[part["dtype"]], tuple(part["shape"])
        begin, end = part["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has the wrong length")
        found[name] = dtype, shape, first + begin
    return found, metadata


def read(path, entry):
    """One tensor as an array of its own: `entry` is `header`'s of it.

    Raises:
        ValueError: the file ends before it.
    """
    dtype, shape, place = entry
    # As bytes: numpy reads no foreign dtype.
    count = math.prod(shape) * dtype.itemsize
    data = np.fromfile(path, "uint8", count, offset=place)
    if len(data) != count:
        raise ValueError(f"{path} is not all there")
    return data.view(dtype).reshape(shape)


def parts(path, entry, limit):
    """Yields a tensor's numbers in order, flat, at most `limit` bytes at once.

    Arguments and errors as of `read`.
    """
    dtype, shape, place = entry
    left, step = math.prod(shape), max(1, limit // dtype.itemsize)
    while left:
        count = min(step, left)
        yield read(path, (dtype, (count,), place))
        place, left = place + count * dtype.itemsize, left - count


def checksum(array):
    """CRC-32 of an array's bytes."""
    return zlib.crc32(_bytes(array))


def _bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view("uint8")


class Writer:
    """A file that grows by tensors and is whole after `finish`.

    Args:
        path: where to; must not exist yet.
    """

    def __init__(self, path):
        self.file, self.told, self.at = open(path, "xb"), {}, 0
        self.file.seek(_LENGTH + _ROOM)

    def put(self, name, array):
        """Appends a tensor."""
        data = _bytes(array)
        self.file.write(data)
        self.told[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [self.at, self.at + len(data)],
        }
        self.at += len(data)

    def finish(self, metadata):
        """Writes the header; `metadata` is {str: str}."""
        text = json.dumps({"__metadata__": metadata, **self.told}).encode()
        if len(text) > _ROOM:
            raise ValueError(f"a header of {len(text)} bytes: too many tensors")
        self.file.seek(0)
        self.file.write(_ROOM.to_bytes(_LENGTH, "little"))
        # The format lets a header end in spaces.
        self.file.write(text.ljust(_ROOM))
        self.close()

    def close(self):
        """Closes the file, whole or not."""
        self.file.close()
