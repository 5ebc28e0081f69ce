"""Loops over blocks of queries, forward and backward.

Torch, TensorFlow and JAX on a GPU write the blocks out, each with the keys
that it needs: `_listed`. JAX on a CPU or a TPU has one loop, whose turns pick
from a few sizes: `_scan`. Written out, 8 blocks have 36 of 64 squares of
scores; the sizes of a loop are powers of two, 43. Shapes as in `scores`.
"""

import keras
from keras import ops

from keras_gemma_ft.model import kernels
from keras_gemma_ft.model.attention import scores

# Blocks of a row that are written out on a GPU; more would take XLA minutes.
_WRITTEN = 16


def pair():
    """(forward, backward) for this backend and device.

    forward: function of (q, k, v, segments, starts, block, cap, window) ->
        (out, logsumexp); backward: of (q, k, v, segments, starts, out,
        logsumexp, upstream, block, cap, window) -> (dq, dk, dv).
    """
    if keras.config.backend() != "jax":
        return _listed, _listed_back
    if kernels.on_gpu():
        return _banded(_listed, _scan), _banded(_listed_back, _scan_back)
    return _scan, _scan_back


# --- blocks one after another ------------------------------------------------


def _bounds(t, starts, block, window, band):
    """(first query, its end, first key) of every block, as ints.

    Args:
        band: blocks, its own included, that a block looks back at most; None
            is all.
    """
    known = [0] * -(-t // block)
    if keras.config.backend() == "torch":
        known = starts.tolist()
    for i, low in enumerate(known):
        first = i * block
        if window is not None:
            low = max(low, first - window + 1)
        if band is not None:
            low = max(low, (i + 1 - band) * block)
        # From a block's edge on, so that gradients add up block by block.
        yield first, min(first + block, t), low // block * block


def _listed(q, k, v, segments, starts, block, cap, window, band=None):
    outs, sums = [], []
    t = q.shape[2]
    for first, end, low in _bounds(t, starts, block, window, band):
        mask = scores.allowed(
            segments[:, first:end], segments[:, low:end], first, low, window
        )
        out, lse = scores.weigh(
            q[:, :, first:end], k[:, :, low:end], v[:, :, low:end], mask, cap
        )
        outs.append(out)
        sums.append(lse)
    return ops.concatenate(outs, 2), ops.concatenate(sums, 3)


def _listed_back(
    q, k, v, segments, starts, out, lse, upstream, block, cap, window,
    band=None,
):  # fmt: skip
    dqs, parts = [], {}
    t = q.shape[2]
    for first, end, low in _bounds(t, starts, block, window, band):
        mask = scores.allowed(
            segments[:, first:end], segments[:, low:end], first, low, window
        )
        here = (slice(None), slice(None), slice(first, end))
        keys = (slice(None), slice(None), slice(low, end))
        sums = lse[:, :, :, first:end]
        dq, *pair = scores.gradients(
            q[here],
            k[keys],
            v[keys],
            mask,
            out[here],
            sums,
            upstream[here],
            cap,
        )
        dqs.append(dq)
        if kernels.on_gpu():
            # XLA fuses the sums: float32 costs nothing there.
            pair = [ops.cast(part, "float32") for part in pair]
        for at in range(low, end, block):
            cut = slice(at - low, at - low + block)
            new = [part[:, :, cut] for part in pair]
            old = parts.get(at)
            parts[at] = (
                new if old is None else [a + b for a, b in zip(old, new)]
            )
    dk, dv = (
        ops.concatenate([parts[at][i] for at in sorted(parts)], 2)
        for i in range(2)
    )
    dk, dv = ops.cast(dk, k.dtype), ops.cast(dv, v.dtype)
    return ops.concatenate(dqs, 2), dk, dv


def _banded(written, loop):
    """`written` or, for very long rows, `loop`, on a GPU.

    A packed row's blocks look back as far as its longest example: one `switch`
    for all blocks picks a quarter of them or all. (XLA:GPU waits for the host
    at each, and compiles each of its branches: 16 s more for each at 4096.)
    """

    def run(q, k, v, segments, starts, *rest):
        import jax

        *tensors, block, cap, window = (q, k, v, segments, starts, *rest)
        count = -(-q.shape[2] // block)
        if count > _WRITTEN:
            return loop(*tensors, block, cap, window)

        def within(band):
            return lambda *tensors: written(*tensors, block, cap, window, band)

        if count < 4:
            return within(None)(*tensors)
        band = max(2, count // 4)
        needed = ops.arange(1, count + 1) - starts // block
        return jax.lax.cond(
            ops.all(needed <= band), within(band), within(None), *tensors
        )

    return run


# --- blocks under one loop ---------------------------------------------------


def _padded(t, block, *arrays):
    """Arrays padded along axis 2 (segments [B, T]: 1) to whole blocks."""
    extra = -t % block
    for x in arrays:
        width = [[0, 0]] * x.ndim
        # Padding is a segment of its own, which attends to itself.
        axis, value = (1, -1) if x.ndim == 2 else (2, 0)
        if x.ndim == 5:
            axis = 3
        width[axis] = [0, extra]
        yield ops.pad(x, width, constant_values=value) if extra else x


def _switch(i, blocks, block, starts, window, run):
    """run(keys) with the least power of two of blocks that covers block i.

    Args:
        run: function of a static number of keys.
    """
    import jax

    sizes = [2**j for j in range(blocks.bit_length()) if 2**j < blocks]
    sizes.append(blocks)
    low = starts[i]
    if window is not None:
        low = ops.maximum(low, i * block - window + 1)
    needed = i + 1 - low // block
    branch = sum((needed > size).astype("int32") for size in sizes[:-1])
    runs = [lambda size=size: run(size * block) for size in sizes]
    return jax.lax.switch(branch, runs) if len(runs) > 1 else runs[0]()


def _cut(x, first, size, axis=2):
    import jax

    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def _scan(q, k, v, segments, starts, block, cap, window):
    import jax

    t = q.shape[2]
    q, k, v, segments = _padded(t, block, q, k, v, segments)
    blocks = q.shape[2] // block

    def one(i):
        first = i * block
        queries = _cut(segments, first, block, 1)

        def run(size):
            low = jax.numpy.clip(first + block - size, 0)
            mask = scores.allowed(
                queries, _cut(segments, low, size, 1), first, low, window
            )
            return scores.weigh(
                _cut(q, first, block),
                _cut(k, low, size),
                _cut(v, low, size),
                mask,
                cap,
            )

        return _switch(i, blocks, block, starts, window, run)

    out, lse = jax.lax.map(one, ops.arange(blocks))
    return _joined(out)[:, :, :t], _joined(lse, 3)[:, :, :, :t]


def _joined(x, axis=2):
    """[blocks, ...] -> blocks side by side along `axis`."""
    x = ops.moveaxis(x, 0, axis)
    shape = (*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return ops.reshape(x, shape)


def _scan_back(
    q, k, v, segments, starts, out, lse, upstream, block, cap, window
):
    import jax

    t = q.shape[2]
    q, k, v, segments, out, lse, upstream = _padded(
        t, block, q, k, v, segments, out, lse, upstream
    )
    blocks = q.shape[2] // block

    def one(sums, i):
        first = i * block
        queries = _cut(segments, first, block, 1)
        here = [_cut(x, first, block) for x in (q, out, upstream)]
        total = _cut(lse, first, block, 3)

        def run(size):
            low = jax.numpy.clip(first + block - size, 0)
            mask = scores.allowed(
                queries, _cut(segments, low, size, 1), first, low, window
            )
            dq, *pair = scores.gradients(
                here[0],
                _cut(k, low, size),
                _cut(v, low, size),
                mask,
                here[1],
                total,
                here[2],
                cap,
            )
            return dq, [
                jax.lax.dynamic_update_slice_in_dim(
                    x, _cut(x, low, size) + new, low, 2
                )
                for x, new in zip(sums, pair)
            ]

        dq, sums = _switch(i, blocks, block, starts, window, run)
        return sums, dq

    zeros = [ops.zeros(k.shape, "float32"), ops.zeros(v.shape, "float32")]
    (dk, dv), dq = jax.lax.scan(one, zeros, ops.arange(blocks))
    dk, dv = ops.cast(dk, k.dtype), ops.cast(dv, v.dtype)
    return _joined(dq)[:, :, :t], dk[:, :, :t], dv[:, :, :t]
