"""Frozen kernels as they are stored, and as a matmul wants them.

Weight-only: a kernel is stored as codes in blocks along its last axis, each
block with its largest magnitude (absmax), and is dequantised where it is used.
The token table stays as it is: quantising it too ruins LoRA's gradients.

int8, int4: code * absmax / 127 or 7. nf4: 16 quantiles of the normal
distribution times absmax (QLoRA, arXiv 2305.14314, appendix E). The absmax
itself is stored in 8 bits over groups of up to 256 blocks ("double
quantisation", section 3 there): linear between a group's least and largest,
which centres it as the paper's subtracted mean does and wastes no code. With
blocks of 64 that is 4.13 or 8.13 bits a weight.

A kernel is encoded on the host, by NumPy: 16 levels by a table and one
comparison take 8 ns a weight on one core, where Torch's bucketize takes 80 and
XLA's comparisons 11 on two; and the codes are the same on every backend.
"""

import concurrent.futures
import contextlib
import os
import types

import keras
import numpy as np
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.model import hosts, sharding

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
    along a kernel's first axis."""
    blocks = int(np.prod(shape[1:], dtype="int64")) // block_size(shape[-1])
    return max(n for n in range(1, _GROUP + 1) if blocks % n == 0)


# A number in [-1, 1] falls into one of these cells; none is as wide as the
# least gap of the 16 levels, so it has one of two codes.
_CELLS = 4096
_MIDDLES = (NF4[1:] + NF4[:-1]) / 2
# Two of a byte's numbers, times absmax: [256, 2].
_LEVELS = {"nf4": NF4, "int4": (np.arange(16, dtype="float32") - 8) / 7}
PAIRS = {
    mode: np.stack([np.repeat(x, 16), np.tile(x, 16)], 1)
    for mode, x in _LEVELS.items()
}
# Weights that one thread works on at once: they stay in its cache.
_AT_ONCE = 2**16


def encode(kernel, mode):
    """A kernel as stored arrays.

    Args:
        kernel: float numpy array [..., last].
        mode: "int8", "int4" or "nf4".

    Returns:
        dict: `codes` int8 [..., last] or uint8 [..., last / 2] (two codes a
        byte, the first in the high half), `absmax` uint8 [..., last / block],
        `low` and `step` float32 [first axis, groups] of the absmax.
    """
    last = kernel.shape[-1]
    block = block_size(last)
    rows = kernel.reshape(-1, last)
    absmax = np.empty((len(rows), last // block), "float32")
    # Of a magnitude no 16 bits are lost on the way to float32.
    _by_rows(rows, lambda i, x: _largest(x, block, out=absmax[i]))
    grouped = absmax.reshape(kernel.shape[0], -1, group_size(kernel.shape))
    low = grouped.min(-1)
    step = np.maximum((grouped.max(-1) - low) / np.float32(255), 1e-12)
    stored = np.round((grouped - low[..., None]) / step[..., None])
    # Codes are chosen for the absmax that will be read back, not the true one.
    unit = stored * step[..., None] + low[..., None]
    unit = np.maximum(unit, 1e-30).reshape(absmax.shape)
    width, kind = (last, "int8") if mode == "int8" else (last // 2, "uint8")
    codes = np.empty((len(rows), width), kind)
    _by_rows(rows, lambda i, x: _codes(x, unit[i], mode, out=codes[i]))
    return {
        "codes": codes.reshape(*kernel.shape[:-1], width),
        "absmax": stored.astype("uint8").reshape(*kernel.shape[:-1], -1),
        "low": low,
        "step": step.astype("float32"),
    }


def _by_rows(rows, work):
    """work(slice, rows[slice]) for all of them, on every core."""
    size = max(1, _AT_ONCE // rows.shape[1])
    parts = [slice(i, i + size) for i in range(0, len(rows), size)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # list: an exception of one is everybody's.
        list(pool.map(lambda part: work(part, rows[part]), parts))


def _largest(x, block, out):
    x = np.abs(x.astype("float32").reshape(len(x), -1, block))
    np.max(x, -1, out=out)


def _codes(x, absmax, mode, out):
    x = x.astype("float32").reshape(*absmax.shape, -1) / absmax[..., None]
    x = x.reshape(len(x), -1)
    if mode == "nf4":
        cell = ((x + 1.0) * (_CELLS / 2)).astype("int16")
        cell = np.clip(cell, 0, _CELLS - 1)
        codes = _FIRST.take(cell)
        codes += x > _NEXT.take(cell)
    else:
        top = {"int8": 127, "int4": 7}[mode]
        codes = np.clip(np.round(x * np.float32(top)), -top, top)
        codes = codes.astype("int8")
        if mode == "int8":
            out[...] = codes
            return
        codes = (codes + 8).astype("uint8")
    out[...] = codes[:, 0::2] * 16 + codes[:, 1::2]


# The lower code of each cell, and the number above which it is the next one.
# A hair below the cell's edge: where x + 1 was rounded up into it.
_FIRST = np.searchsorted(
    _MIDDLES, np.arange(_CELLS) * (2 / _CELLS) - 1 - 1e-6
).astype("uint8")
_NEXT = np.append(_MIDDLES, np.float32(2)).astype("float32")[_FIRST]


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


def decode(stored, mode, dtype, pairs=None):
    """The kernel that `encode` stored, as a tensor of `dtype`.

    Multiplied in float32 and rounded once.

    Args:
        stored: {name: array or tensor}.
        mode: as of `encode`.
        dtype: Keras's name; or Torch's, of Torch tensors.
        pairs: `PAIRS[mode]` as a tensor, for a compiled function, to which
            it must be an argument.
    """
    stored = {name: _tensor(x) for name, x in stored.items()}
    codes, absmax, low, step = (
        stored[name] for name in ("codes", "absmax", "low", "step")
    )
    shape = absmax.shape
    if mode == "int8":
        unit = _cast(codes, "float32") * (1.0 / 127)
    else:
        unit = _taken(_tensor(PAIRS[mode]) if pairs is None else pairs, codes)
    absmax = _shaped(_cast(absmax, "float32"), (*low.shape, -1))
    absmax = absmax * step[..., None] + low[..., None]
    last = codes.shape[-1] * (1 if mode == "int8" else 2)
    blocks = _shaped(unit, (*shape, last // shape[-1]))
    kernel = blocks * _shaped(absmax, (*shape, 1))
    return _cast(_shaped(kernel, (*shape[:-1], last)), dtype)


# Torch's own words: its compiler cannot look through Keras's.


def _tensor(x):
    if keras.config.backend() == "torch":
        import torch

        if isinstance(x, torch.Tensor):
            return x
    return ops.convert_to_tensor(x)


def _cast(x, dtype):
    if keras.config.backend() == "torch":
        import torch

        return x.to(getattr(torch, dtype) if type(dtype) is str else dtype)
    return ops.cast(x, dtype)


def _shaped(x, shape):
    if keras.config.backend() == "torch":
        return x.reshape(shape)
    return ops.reshape(x, shape)


def _taken(pairs, codes):
    """Both numbers of each byte: [..., n] -> [..., n, 2]."""
    if keras.config.backend() == "torch":
        from torch.nn import functional

        return functional.embedding(codes.int(), pairs)
    return ops.take(pairs, ops.cast(codes, "int32"), axis=0)


def apply(backbone, denses, mode):
    """Replaces the kernels of `denses` by their stored form.

    For a model that is there already; `weights.once` encodes kernels as they
    are read, so that the float model never exists.

    Args:
        backbone: remembers the mode.
        denses: the decoder's EinsumDense layers.
        mode: "int8", "int4" or "nf4".
    """
    for dense in denses:
        values = None
        # The planner's model has shapes and no values.
        if dense._kernel._value is not None:
            values = encode(hosts.whole(dense._kernel.value), mode)
        attach(dense, values, mode)
    backbone.quantize_mode = mode


def attach(dense, values, mode):
    """Gives an EinsumDense stored arrays in the place of its kernel.

    Args:
        dense: the layer.
        values: what `encode` gives; None leaves zeros.
        mode: of `encode`.
    """
    kernel = dense._kernel
    dense._tracker.unlock()
    dense._untrack_variable(kernel)
    dense._kernel, dense.stored = None, {}
    for name, (shape, dtype) in stored_as(kernel.shape, mode).items():
        dense.stored[name] = dense.add_weight(
            name=name,
            shape=shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )
        if values:
            dense.stored[name].assign(values[name])
    dense._tracker.lock()
    if keras.config.backend() == "torch" and not kernel.value.is_meta:
        # Whoever else holds the parameter: its memory is given back.
        kernel.value.data = kernel.value.data.new_empty(0)


@contextlib.contextmanager
def shown(denses):
    """A block in which layers with stored kernels show their shapes.

    KerasHub's `enable_lora` asks a layer for its kernel's shape, and tells
    the kernel that it is not trained.
    """
    hidden = [dense for dense in denses if dense._kernel is None]
    for dense in hidden:
        codes, absmax = dense.stored["codes"], dense.stored["absmax"]
        width = 1 if codes.dtype == "int8" else 2
        shape = (*absmax.shape[:-1], codes.shape[-1] * width)
        dense._kernel = types.SimpleNamespace(shape=shape, trainable=False)
    try:
        yield
    finally:
        for dense in hidden:
            dense._kernel = None


def kernel(backbone, dense, dtype):
    """The frozen kernel of an EinsumDense, in `dtype`.

    Not `dense.kernel`, which adds A B to it when LoRA is on.
    """
    if dense._kernel is None:
        whole = {k: sharding.gathered(v) for k, v in dense.stored.items()}
        return decode(whole, backbone.quantize_mode, dtype)
    return ops.cast(sharding.gathered(dense._kernel), dtype)


def embedding(backbone):
    """The token table [V, d], in its own dtype; never quantised."""
    return backbone.token_embedding.embeddings
