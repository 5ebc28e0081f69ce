"""The arithmetic of one tile: some queries by some keys, both ways.

A tile's products have the dtype of their operands; between them everything is
float32. On a GPU it stays in registers: see `_names`. Shapes: B batch, T
queries, S keys, n query heads, k key/value heads, g = n/k, h head_dim.
"""

import keras
from keras import ops

from keras_gemma_ft.model import kernels

# exp(-1e30) is 0 in float32, and unlike -inf it never makes a NaN.
_MASKED = -1e30


def allowed(query_segments, key_segments, first_query, first_key, window):
    """Boolean [B, 1, 1, T, S]: which keys a query attends to.

    Args:
        query_segments: int [B, T].
        key_segments: int [B, S].
        first_query: the first query's place in the row.
        first_key: the first key's place in the row.
        window: places a query looks back, itself included; None is all.
    """
    t, s = query_segments.shape[1], key_segments.shape[1]
    q = first_query + ops.arange(t, dtype="int32")[:, None]
    k = first_key + ops.arange(s, dtype="int32")[None, :]
    mask = ops.equal(query_segments[:, :, None], key_segments[:, None, :])
    mask = ops.logical_and(mask, k <= q)
    if window is not None:
        mask = ops.logical_and(mask, q - k < window)
    return mask[:, None, None]


def weigh(q, k, v, mask, cap):
    """(out [B, n, T, h], logsumexp float32 [B, k, g, T, 1])."""
    _, n, t, h = q.shape
    _, heads, s, _ = k.shape
    shape = (-1, heads, n // heads, t, s)
    product, again = _names(_product(q, k), shape)
    z = _capped(product, shape, cap)
    top = None
    if cap is None or cap > kernels.SAFE_CAP:
        top = ops.max(ops.where(mask, z, _MASKED), -1, keepdims=True)
        top = top if cap is None else cap * top
    weights = summed = _weights(z, mask, cap, top)
    if again is not None:
        summed = _weights(_capped(again, shape, cap), mask, cap, top)
    # A row without a key gives 0, not NaN.
    total = ops.maximum(ops.sum(summed, -1, keepdims=True), 1e-30)
    lse = ops.log(total) if top is None else ops.log(total) + top
    half = keras.backend.standardize_dtype(v.dtype) == "float16"
    if half:  # exp(50) is more than float16 holds.
        weights = weights / total
    weights = ops.cast(weights, v.dtype)
    out = ops.matmul(ops.reshape(weights, (-1, heads, n // heads * t, s)), v)
    if not half:
        out = ops.reshape(out, (-1, heads, n // heads, t, h))
        out = ops.cast(ops.cast(out, "float32") / total, v.dtype)
    return ops.reshape(out, (-1, n, t, h)), lse


def gradients(q, k, v, mask, out, lse, upstream, cap):
    """(dq, dk, dv) of `weigh`."""
    _, n, t, h = q.shape
    _, heads, s, _ = k.shape
    rows = (-1, heads, n // heads * t, h)
    flat = (-1, heads, n // heads * t, s)
    shape = (-1, heads, n // heads, t, s)
    product, again = _names(_product(q, k), shape)
    z = _capped(product, shape, cap)
    p = _weights(z, mask, cap, lse)
    upstream = ops.cast(upstream, v.dtype)
    dout = ops.reshape(upstream, rows)
    turned = ops.reshape(ops.cast(p, v.dtype), flat)
    dv = ops.matmul(ops.transpose(turned, (0, 1, 3, 2)), dout)
    dp = ops.matmul(dout, ops.transpose(v, (0, 1, 3, 2)))
    dp = ops.reshape(ops.cast(dp, "float32"), (-1, heads, n // heads, t, s))
    mean = ops.cast(upstream, "float32") * ops.cast(out, "float32")
    mean = ops.reshape(ops.sum(mean, -1), (-1, heads, n // heads, t, 1))
    if again is not None:
        z = _capped(again, shape, cap)
        p = _weights(z, mask, cap, lse)
    ds = _score_gradient(dp, p, mean, z, cap)
    ds = ops.reshape(ops.cast(ds, q.dtype), flat)
    dq = ops.reshape(ops.matmul(ds, k), (-1, n, t, h))
    dk = ops.matmul(ops.transpose(ds, (0, 1, 3, 2)), ops.reshape(q, rows))
    return dq, dk, dv


def _product(q, k):
    """q k' as [B, k, g T, S], of q's dtype."""
    _, n, t, h = q.shape
    heads = k.shape[1]
    rows = ops.reshape(q, (-1, heads, n // heads * t, h))
    return ops.matmul(rows, ops.transpose(k, (0, 1, 3, 2)))


def _names(product, shape):
    """q k' under two names on a GPU; else under one, and None.

    Of a tanh with two uses XLA:GPU makes an array, [T, S] in float32. Of two
    names it makes one kernel that reads the 16-bit product: forward 2 arrays
    pass through memory, not 6 (as 16 bits); backward 4, not 8.
    """
    if not kernels.on_gpu():
        return product, None
    import jax

    # Before the tanh: a bitcast behind it would keep it from being fused.
    product = ops.reshape(product, shape)
    return product, jax.lax.optimization_barrier(product)


def _capped(product, shape, cap):
    """float32 [B, k, g, T, S]: tanh(q k' / cap); q k' without a cap."""
    z = ops.reshape(ops.cast(product, "float32"), shape)
    if cap is None:
        return z
    if _torch():
        return z.mul_(1.0 / cap).tanh_()
    return kernels.capped(z, cap)


def _torch():
    """Whether arrays are worked on in place, which XLA does by itself."""
    return keras.config.backend() == "torch"


def _weights(z, mask, cap, shift):
    """exp(scores - shift) where allowed, else 0; z as `_capped` gives it."""
    if _torch():
        weights = z * (1.0 if cap is None else cap)
        weights = weights if shift is None else weights.sub_(shift)
        return weights.exp_().masked_fill_(~mask, 0.0)
    z = z if cap is None else cap * z
    weights = ops.exp(z if shift is None else z - shift)
    return ops.where(mask, weights, 0.0)


def _score_gradient(dp, p, mean, z, cap):
    """p (dp - mean), and through the cap: times 1 - tanh^2."""
    if not _torch():
        ds = p * (dp - mean)
        return ds if cap is None else ds * (1.0 - z * z)
    import torch

    ds = dp.sub_(mean).mul_(p)
    if cap is None:
        return ds
    return torch.ops.aten.tanh_backward.grad_input(ds, z, grad_input=ds)
