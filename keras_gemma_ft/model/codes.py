"""Weights as codes of 8 or 4 bits: the format in which kernels are stored.

A kernel is cut into blocks along its last axis; a block is its largest
magnitude (absmax) and a code for each weight. int8, int4: code * absmax / 127
or 7. nf4: 16 quantiles of the normal distribution times absmax (QLoRA, arXiv
2305.14314, appendix E).

The absmax themselves are stored in 8 bits over groups of up to 256 blocks
("double quantisation", section 3 there): low + step * code, where low and step
span a group's least and largest. That centres it as the paper's subtracted
mean does. An absmax of normal weights is then off by 0.11 % (root mean square),
of weights with heavy tails (Student's t, 5 degrees) by 0.4 %; by bitsandbytes'
dynamic code, whose fine codes are near the mean, by 0.21 and 0.7 %. With blocks
of 64 that is 4.13 or 8.13 bits a weight.

NumPy on the host makes the codes, which are so the same on every backend:
about 8 ns a weight on one core, where Torch's bucketize takes 80. A token table
is stored as int8 with one float a row.
"""

import concurrent.futures
import os

import numpy as np

from keras_gemma_ft import config

_BLOCK, _GROUP = 64, 256
# Appendix E of the paper; bitsandbytes' `nf4` holds the same sixteen numbers.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    "float32",
)
# A number above the i-th middle has a code above i.
_MIDDLES = (NF4[1:] + NF4[:-1]) / 2
_TOP = {"int8": 127, "int4": 7}
# What the two codes of a byte stand for, times absmax: [256, 2].
_LEVELS = {"nf4": NF4, "int4": (np.arange(16, dtype="float32") - 8) / 7}
PAIRS = {
    mode: np.stack([np.repeat(x, 16), np.tile(x, 16)], 1)
    for mode, x in _LEVELS.items()
}
# Weights that a thread works on at once: they stay in its cache. Of a kernel
# that lies transposed, as Hugging Face has them, 1024 rows at once.
_AT_ONCE, _ROWS = 2**15, 1024


def block_size(last):
    """The largest even divisor of the last axis up to 64."""
    sizes = [n for n in range(2, _BLOCK + 1, 2) if last % n == 0]
    if not sizes:
        raise config.UserError(
            f"a kernel's last axis of {last} is odd and cannot be quantised. "
            f"Use --model.quantize=none."
        )
    return sizes[-1]


def group_size(shape):
    """Blocks of a group: the largest divisor up to 256 of those of a slice
    along a kernel's first axis. So no group is cut where that axis is split."""
    blocks = int(np.prod(shape[1:], dtype="int64")) // block_size(shape[-1])
    return max(n for n in range(1, _GROUP + 1) if blocks % n == 0)


def stored_as(shape, mode):
    """{name: (shape, dtype)} of what `encode` makes of a kernel's shape."""
    *rest, last = shape
    blocks = int(np.prod(shape[1:], dtype="int64")) // block_size(last)
    groups = shape[0], blocks // group_size(shape)
    return {
        "codes": ((*rest, last if mode == "int8" else last // 2),
                  "int8" if mode == "int8" else "uint8"),
        "absmax": ((*rest, last // block_size(last)), "uint8"),
        "low": (groups, "float32"),
        "step": (groups, "float32"),
    }  # fmt: skip


def encode(kernel, mode):
    """A kernel as stored arrays.

    Args:
        kernel: float numpy array [..., last] of two or three axes.
        mode: "int8", "int4" or "nf4".

    Returns:
        dict: `codes` int8 [..., last] or uint8 [..., last / 2] (two codes a
        byte, the first in the high half), `absmax` uint8 [..., last / block],
        `low` and `step` float32 [first axis, groups] of the absmax.
    """
    kinds = stored_as(kernel.shape, mode)
    block = block_size(kernel.shape[-1])
    absmax = np.empty(kinds["absmax"][0], "float32")
    codes = np.empty(*kinds["codes"])
    width = codes.shape[-1] / kernel.shape[-1]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tiles = [_Tile(kernel, *at) for at in _places(kernel, block)]

        def largest(tile):
            found = np.abs(tile.blocks(block)).max(2)
            tile.put(absmax, found, 1 / block)

        # list: an exception of one is everybody's.
        list(pool.map(largest, tiles))
        stored, low, step = _in_groups(absmax, group_size(kernel.shape))
        # Codes are chosen for the absmax that will be read back.
        read = stored * step[..., None] + low[..., None]
        unit = np.maximum(read, 1e-30).reshape(absmax.shape)

        def choose(tile):
            x = tile.blocks(block)
            x /= tile.get(unit, 1 / block)
            tile.put(codes, _CHOOSE[mode](x), width)

        list(pool.map(choose, tiles))
    return {
        "codes": codes,
        "absmax": stored.astype("uint8").reshape(absmax.shape),
        "low": low,
        "step": step,
    }


def _in_groups(absmax, size):
    """(codes 0 to 255 [first axis, groups, size], low, step), all float32."""
    grouped = absmax.reshape(absmax.shape[0], -1, size)
    low = grouped.min(-1)
    step = (grouped.max(-1) - low) / np.float32(255)
    step = np.maximum(step, np.float32(1e-12))
    return np.round((grouped - low[..., None]) / step[..., None]), low, step


def _places(kernel, block):
    """Yields (slice number, rows, columns) of the tiles of a kernel."""
    slices, rows, last = _in_slices(kernel).shape
    high, wide = max(1, _AT_ONCE // last), last
    if _transposed(kernel):
        high = min(rows, _ROWS)
        wide = block * max(1, _AT_ONCE // (high * block))
    for i in range(slices):
        for row in range(0, rows, high):
            for column in range(0, last, wide):
                yield (
                    i, slice(row, min(row + high, rows)),
                    slice(column, min(column + wide, last)),
                )  # fmt: skip


def _in_slices(array):
    return array if array.ndim == 3 else array[None]


def _transposed(kernel):
    """Whether the last axis is not the one along which numbers lie."""
    return kernel.strides[-1] > kernel.strides[-2]


class _Tile:
    """Some rows and columns of a kernel, in the order in which they lie.

    An array of its blocks is [a, blocks, block, b]: [rows, ., ., 1], or, of a
    transposed kernel, [1, ., ., rows]. Nothing large is then transposed but
    the codes, which are a quarter of the bytes.
    """

    def __init__(self, kernel, number, rows, columns):
        self.kernel, self.number = kernel, number
        self.rows, self.columns = rows, columns
        count = rows.stop - rows.start
        self.a, self.b = (1, count) if _transposed(kernel) else (count, 1)

    def blocks(self, block):
        """float32 [a, blocks, block, b], a copy."""
        x = _in_slices(self.kernel)[self.number, self.rows, self.columns]
        x = x.T if self.a == 1 and self.b > 1 else x
        # Of no 16 bits anything is lost on the way to float32.
        x = np.array(x, "float32", order="C")
        return x.reshape(self.a, -1, block, self.b)

    def _of(self, array, share):
        """This tile's part [a, b, columns * share] of an array."""
        first, last = (
            round(n * share) for n in (self.columns.start, self.columns.stop)
        )
        part = _in_slices(array)[self.number, self.rows, first:last]
        return part.reshape(self.a, self.b, -1)

    def get(self, array, share):
        """This tile's part of an array as [a, columns * share, 1, b]."""
        return self._of(array, share).transpose(0, 2, 1)[:, :, None]

    def put(self, array, values, share):
        """Writes this tile's part of an array: values [a, ..., b]."""
        values = values.reshape(self.a, -1, self.b)
        self._of(array, share)[...] = values.transpose(0, 2, 1)


def _nf4(x):
    """uint8 [a, blocks, block / 2, b] of numbers in [-1, 1]."""
    codes, above = np.zeros(x.shape, "uint8"), np.empty(x.shape, "bool")
    for middle in _MIDDLES:
        np.greater(x, middle, out=above)
        codes += above.view("uint8")
    return _packed(codes)


def _rounded(x, mode):
    x *= np.float32(_TOP[mode])
    return np.clip(np.rint(x, out=x), -_TOP[mode], _TOP[mode], out=x)


def _int8(x):
    return _rounded(x, "int8").astype("int8")


def _int4(x):
    return _packed((_rounded(x, "int4") + 8).astype("uint8"))


def _packed(codes):
    """Two codes of a block in a byte: half as many."""
    a, blocks, block, b = codes.shape
    codes = codes.reshape(a, blocks, block // 2, 2, b)
    return codes[..., 0, :] << 4 | codes[..., 1, :]


_CHOOSE = {"nf4": _nf4, "int8": _int8, "int4": _int4}


def table_as(shape):
    """{name: (shape, dtype)} of what `encode_table` makes."""
    words, _ = shape
    return {"codes": (tuple(shape), "int8"), "step": ((words, 1), "float32")}


def encode_table(table):
    """A token table as stored arrays: `codes` int8 [V, d], `step` [V, 1].

    A row is codes * step, step its largest magnitude / 127.
    """
    codes, step = (np.empty(*kind) for kind in table_as(table.shape).values())

    def some(first):
        rows = slice(first, first + size)
        x = table[rows].astype("float32")
        largest = np.abs(x).max(1, keepdims=True) / np.float32(127)
        step[rows] = np.maximum(largest, np.float32(1e-30))
        x /= step[rows]
        codes[rows] = np.rint(x, out=x).astype("int8")

    size = max(1, _AT_ONCE // table.shape[1])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(0, len(table), size)))
    return {"codes": codes, "step": step}
