"""Attention as one kernel, forward and backward, of an optional library.

tokamax (Google DeepMind, Apache 2.0, https://github.com/openxla/tokamax) alone
has the soft cap in the backward pass on JAX, and on Hopper and data centre
Blackwell alone: its Mosaic kernels. Its Triton kernels refuse the cap there,
cuDNN and `jax.nn.dot_product_attention` know none, Splash attention is TPU's.

The mask is an integer a query, the first key that it sees: nothing of T x T is
made, and the forward kernel skips what no query of a tile sees. Behind its
public function tokamax takes only boolean masks [T, S], hence its own modules,
and one exact version in `setup.cfg`.
"""

import concurrent.futures
import functools
import importlib.util

import keras
import numpy as np

from keras_gemma_ft import runtime
from keras_gemma_ft.model import kernels, sharding
from keras_gemma_ft.model.attention import scores

_CAPABILITIES = ("9", "10")
# Tokens up to which our blocks are as fast: 4 x 1024 on an H200, a layer of 2B
# takes 3.4 ms with them and 3.9 with tokamax.
_SHORT = 1024
# Of the largest number: float32 against 16-bit products.
_TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2}


def suits(q, k, v, cap):
    """Whether `attend` works here; tried once for each kind of heads."""
    if not kernels.on_gpu() or q.shape[2] <= _SHORT:
        return False
    dtype = keras.backend.standardize_dtype(q.dtype)
    return _tried(q.shape[1], k.shape[1], q.shape[3], dtype, cap)


def attend(q, k, v, segments, cap, window, *, kernel=None):
    """As `blocks.attend`, by tokamax.

    Args:
        q: [B, n, T, h], rotated and scaled, 16 bits.
        k, v: [B, k, T, h].
        segments: int [B, T]; equal numbers stand side by side.
        cap: of the scores; None is none.
        window: see `scores.allowed`.
        kernel: a tokamax attention with a `vjp`; None is Mosaic's.

    Returns:
        [B, n, T, h]. Differentiable in q, k and v.
    """
    from tokamax._src.ops.attention import base

    kernel = kernel or mosaic(keras.backend.standardize_dtype(q.dtype))

    def bound(q, k, v, first):
        mask = base.Mask(k_start=first, is_causal=True)
        found = kernel.bind(
            q, k, v, mask=mask, logits_scale=1.0, logits_soft_cap=cap
        )
        return {**found.kwargs, "return_residuals": True}

    def forward(q, k, v, first):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out, sums = kernel(q, k, v, **bound(q, k, v, first))
        # Else a recomputed block would run the kernel again.
        out, *sums = map(kernels.keep, (out, *sums))
        return out.swapaxes(1, 2), (q, k, v, first, out, *sums)

    def backward(kept, upstream):
        q, k, v, first, out, *sums = kept
        rest = {**bound(q, k, v, first), "return_residuals": False}
        upstream = upstream.astype(out.dtype).swapaxes(1, 2)
        found = kernel.vjp(tuple(sums), out, upstream, q, k, v, **rest)
        return *(found[x].swapaxes(1, 2) for x in "qkv"), None

    return kernels.own_gradient(forward, backward)(
        q, k, v, first_keys(segments, window)
    )


def mosaic(dtype):
    """tokamax's kernel for `dtype`."""
    from tokamax._src.ops.attention import pallas_mosaic_gpu

    # exp(50) is more than float16 holds; tokamax looks at the cap alone.
    stable = {"use_stable_softmax": True} if dtype == "float16" else {}
    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(**stable)


def first_keys(segments, window):
    """int32 [B, 1, T]: the first key that each query sees."""
    import jax

    places = jax.numpy.arange(segments.shape[1], dtype="int32")
    new = segments[:, 1:] != segments[:, :-1]
    new = jax.numpy.pad(new, [[0, 0], [1, 0]])
    first = jax.lax.cummax(jax.numpy.where(new, places, 0), axis=1)
    if window is not None:
        first = jax.numpy.maximum(first, places - window + 1)
    return first[:, None]


@functools.cache
def _tried(heads, groups, size, dtype, cap):
    why = _lacking(dtype)
    if not why:
        try:
            why = _wrong(heads, groups, size, dtype, cap)
        except Exception as error:  # A compiler's errors share no class.
            why = f"tokamax: {str(error).strip().partition(chr(10))[0][:200]}"
    runtime.say(f"attention: {'blocks, ' + why if why else 'tokamax'}")
    return not why


def _lacking(dtype):
    """What keeps tokamax from being tried; "" is nothing."""
    import jax

    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    if found.partition(".")[0] not in _CAPABILITIES:
        return f"compute capability {found or 'unknown'} has no such kernel"
    if dtype not in _TOLERANCE:
        return f"{dtype} is no 16-bit type"
    if sharding.parts() > 1 or sharding.split():
        return "the rows are split over devices"
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed: pip install 'keras_gemma_ft[fused]'"
    return ""


def _wrong(heads, groups, size, dtype, cap, kernel=None):
    """How far tokamax is from ours in float32, in words; "" is near enough.

    One row of two packed examples, forward and backward, scores up to 40.
    """
    import jax

    t, window = 200, 90
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(0, scale, (1, n, t, size)).astype("float32")
        for n, scale in (
            (heads, 10 / size**0.5), (groups, 1), (groups, 1), (heads, 1)
        )
    ]  # fmt: skip
    segments = np.repeat([[1, 2]], [70, t - 70], 1).astype("int32")

    def both(run, *arrays):
        out, back = jax.vjp(run, *arrays[:3])
        return out, *back(arrays[3])

    def ours(q, k, v):
        mask = scores.allowed(segments, segments, 0, 0, window)
        return scores.weigh(q, k, v, mask, cap)[0]

    def theirs(q, k, v):
        return attend(q, k, v, segments, cap, window, kernel=kernel)

    def run():
        rounded = [jax.numpy.asarray(x, dtype) for x in arrays]
        exact = [x.astype("float32") for x in rounded]
        want = jax.jit(functools.partial(both, ours))(*exact)
        got = jax.jit(functools.partial(both, theirs))(*rounded)
        return [[np.asarray(x, "float32") for x in y] for y in (want, got)]

    # Called while a step is traced, of which a thread of its own knows nothing.
    # In `jax.ensure_compile_time_eval` Mosaic finds its axes unbound.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        want, got = pool.submit(run).result()
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        apart = np.max(np.abs(a - b)) / np.max(np.abs(b))
        if not apart <= _TOLERANCE[dtype]:
            return f"tokamax's {name} is {apart:.2g} of its size away"
    return ""
