"""A and B that start from the kernel W: PiSSA and LoftQ.

PiSSA (arXiv 2404.02948): s A B is the best approximation of W of its rank, and
W - s A B is frozen, or quantised, in W's place. LoftQ (arXiv 2310.08659, one
round): W is quantised to Q, and s A B is the best approximation of W - Q.

Best is by Frobenius norm: a truncated SVD of the matrix that
`low_rank.matrix` makes of a kernel, for both styles. Everything is computed
with NumPy, so that every backend starts from the same numbers.

What a run exports is the change from this start (`low_rank.difference`), for
the base as it was.
"""

import dataclasses
import pathlib
import time

import numpy as np
from keras import ops
from safetensors import numpy as safetensors

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import adapters, atomic, checkpoints
from keras_gemma_ft.model import codes, hosts, lora, quantize

# Columns beyond the rank, and products with the matrix and its transpose:
# of a 2304 x 9216 matrix of noise, whose singular values hardly fall, rank 8
# then holds 99.6 % of what the exact SVD holds, after 0.5 s on two cores.
_EXTRA, _ROUNDS = 8, 12


def principal(matrix, rank, seed):
    """(A [m, rank], B [rank, n]): the best A B, |A| and |B| balanced.

    By a randomised block Krylov method (arXiv 1504.05477, algorithm 2).

    Args:
        matrix: float32 numpy [m, n].
        rank: at most m and n, or what is left of A and B is zero.
        seed: int, or sequence of ints, of the random start.
    """
    m, n = matrix.shape
    if m > n:
        b, a = principal(matrix.T, rank, seed)
        return a.T, b.T
    width = min(rank + _EXTRA, m)
    rng = np.random.default_rng(seed)
    block = rng.standard_normal((m, width), "float32")
    blocks = []
    for i in range(min(_ROUNDS, -(-m // width))):
        if i:
            block = matrix @ (matrix.T @ block)
        block, _ = np.linalg.qr(block)
        blocks.append(block)
    basis, _ = np.linalg.qr(np.concatenate(blocks, 1))
    inside = basis.T @ matrix
    # float64: the squares of singular values need twice their digits.
    squares, turn = np.linalg.eigh((inside @ inside.T).astype("float64"))
    kept = slice(None, -min(rank, m) - 1, -1)
    root = np.maximum(squares[kept], 1e-30) ** 0.25
    turn = turn[:, kept]
    a = basis @ (turn * root).astype("float32")
    b = (turn / root).T.astype("float32") @ inside
    short = rank - len(b)
    return np.pad(a, [(0, 0), (0, short)]), np.pad(b, [(0, short), (0, 0)])


def init(kernel, target, settings, mode, *, seed, known=None):
    """Where one layer starts.

    Args:
        kernel: float numpy array with KerasHub's shape.
        target: the layer's name, of `config.TARGETS`.
        settings: `config.Lora` whose init is "pissa" or "loftq".
        mode: how the base is quantised, or "none".
        seed: int, or sequence of ints.
        known: the (A, B) of an earlier call, not sought again.

    Returns:
        (A, B, rest), float32 numpy: A and B of `low_rank.pair_shapes`, and
        what is frozen in the kernel's place, quantised if the base is.
    """
    kernel = np.asarray(kernel, "float32")
    style, rank = settings.style, settings.rank
    factor = np.float32(
        adapters.scale(rank, settings.alpha or rank, settings.rslora)
    )
    if known is None:
        goal = kernel
        if settings.init == "loftq":
            stored = codes.encode(kernel, mode)
            back = quantize.decode(stored, mode, "float32")
            goal = kernel - ops.convert_to_numpy(back)
        flat = adapters.matrix(style, target, goal)
        shapes = adapters.pair_shapes(style, target, kernel.shape, rank)
        # Contiguous: safetensors would write a transposed array as it lies.
        known = [
            np.ascontiguousarray(part / np.sqrt(factor)).reshape(shape)
            for part, shape in zip(principal(flat, rank, seed), shapes)
        ]
    a, b = known
    if settings.init == "loftq":
        return a, b, kernel
    return a, b, kernel - factor * adapters.product(style, target, a, b)


def apply(backbone, mode, *, seed, kept=None):
    """Gives adapters and kernels of a backbone their start, if LoRA has one.

    Before the kernels are quantised, after `lora.enable`.

    Args:
        backbone: with LoRA; remembers the start, for `lora.read`.
        mode: how the base will be quantised, or "none".
        seed: of the randomised SVD.
        kept: a path: the pairs are read from it, or written to it, so that a
            run that goes on starts from the very same ones.
    """
    settings = getattr(backbone, "lora", None)
    if settings is None or settings.init == "default":
        return
    began = time.monotonic()
    held, weights = _read(kept), {}
    for (i, name), pair in lora.variables(backbone).items():
        frozen = lora.layer(backbone.transformer_layers[i], name)._kernel
        # The planner's model has shapes and no values.
        if frozen._value is None:
            return
        kernel = hosts.whole(frozen.value)

        def start(known):
            own = [seed, i, config.TARGETS.index(name)]
            return init(kernel, name, settings, mode, seed=own, known=known)

        *found, rest = _agreed(start, held.get((i, name)))
        weights[i, name] = tuple(found)
        for variable, value in zip([*pair, frozen], [*found, rest]):
            variable.assign(value)
    adapter = lora.read(backbone)
    backbone.lora_start = dataclasses.replace(adapter, weights=weights)
    if not held:
        _write(kept, weights)
    runtime.say(
        f"{settings.init}: {len(weights)} kernels "
        f"{'as this run started them' if held else 'decomposed'} in "
        f"{time.monotonic() - began:.1f} s"
    )


def _agreed(start, known):
    """`start(known)`, its A and B those of process 0 on every process.

    Computers of another kind would round a decomposition differently.
    """
    if not hosts.many():
        return start(known)
    data = b""
    if hosts.first():
        a, b, _ = start(known)
        data = safetensors.save({"a": a, "b": b})
    told = safetensors.load(hosts.broadcast(data))
    return start((told["a"], told["b"]))


def _read(path):
    """{(layer, target): (A, B)} of `_write`; {} where there is none."""
    if path is None or not hosts.first() or not pathlib.Path(path).exists():
        return {}
    return checkpoints.read_start(safetensors.load_file(path))


def _write(path, weights):
    if path is None or not hosts.first():
        return
    arrays = {
        f"{layer}/{target}/{letter}": value
        for (layer, target), pair in weights.items()
        for letter, value in zip("ab", pair)
    }
    with atomic.replacing(pathlib.Path(path)) as partial:
        partial.write_bytes(safetensors.save(arrays))
