"""What the blocks of a decoder are made of, and gradients of our own.

A framework differentiates `gelu(gate) * up` operation by operation and keeps
an array for each. Here a function keeps its inputs and forms the rest again,
so that a step moves fewer bytes on every backend.
"""

import math

import keras
from keras import ops

# exp(64) over 2**20 terms is 6e33: up to this cap a sum of exponentials in
# float32 needs no maximum subtracted.
SAFE_CAP = 64.0
# The name under which JAX keeps what `keep` is given.
KEPT = "kept"


def own_gradient(forward, backward, *, chosen=False):
    """A differentiable function from a forward and a backward one.

    Args:
        forward: tensors -> (output, tensors to keep).
        backward: (kept tensors, gradient of the output) -> a gradient for
            each of forward's arguments; None for one that has none.
        chosen: on Torch, whether backward takes a third argument: for each of
            forward's arguments, whether its gradient is wanted.

    Returns:
        A function of tensors. What is kept is dropped and formed again where
        a block is recomputed, which `ops.custom_gradient` does not do on
        Torch.
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        run = jax.custom_vjp(lambda *args: forward(*args)[0])
        run.defvjp(forward, backward)
        return run
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def run(*args):
            out, kept = forward(*args)
            return out, lambda upstream: backward(kept, upstream)

        return run
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            out, kept = forward(*args)
            ctx.save_for_backward(*kept)
            return out

        @staticmethod
        def backward(ctx, upstream):
            more = (ctx.needs_input_grad,) if chosen else ()
            return backward(ctx.saved_tensors, upstream, *more)

    return Function.apply


def matmul(x, w):
    """x [N, in] times w [in, out], differentiable in both.

    On Torch on a CPU by oneDNN, which Torch itself uses for 16 bits only: in
    float32 on an AMD EPYC it runs at twice the rate of the MKL that
    `torch.mm` calls (370 against 165 GFLOP/s at 1024 x 512 x 2048).
    """
    if keras.config.backend() != "torch" or x.device.type != "cpu":
        return ops.matmul(x, w)

    def forward(x, w):
        return product(x, w), (x, w)

    def backward(kept, upstream, needed):
        x, w = kept
        return (
            product(upstream, w.T) if needed[0] else None,
            product(x.T, upstream) if needed[1] else None,
        )

    return own_gradient(forward, backward, chosen=True)(x, w)


def slow(x):
    """Whether Torch multiplies x's dtype, number by number, on this CPU.

    Without AVX-512 it does so with 16 bits: 0.1 GFLOP/s where float32 reaches
    14 (1024 x 2304 x 2304, two busy cores of an AMD EPYC with AVX2).
    """
    if keras.config.backend() != "torch" or x.device.type != "cpu":
        return False
    import torch

    able = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(x.dtype)
    return able is not None and not getattr(torch.ops.mkldnn, able)()


def product(x, w):
    """x [N, in] times w [in, out], Torch tensors, not differentiable."""
    if slow(x):
        return product(x.float(), w.float()).to(x.dtype)
    import torch

    fast = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if fast and x.device.type == "cpu" and x.dtype == torch.float32:
        if torch.backends.mkldnn.is_available():
            return fast(x, w.T, None, "none", [], "")
    return torch.mm(x, w)


def on_gpu():
    """Whether JAX works on a GPU. XLA compiles for it unlike for the rest."""
    if keras.config.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def barrier(x):
    """x, which XLA on JAX must have finished before it is used.

    Without it XLA:CPU recomputes norms and activations inside each of the
    skinny products that read them, a norm's root for each of its columns and
    the rotary angles for each head: 1.9 times the time of a step. XLA:GPU
    does not, and a barrier would only keep it from fusing.
    """
    if keras.config.backend() == "jax" and not on_gpu():
        import jax

        return jax.lax.optimization_barrier(x)
    return x


def keep(x):
    """x, which a loop over blocks on JAX keeps for its backward pass.

    A loop keeps what it is told: left alone it would keep, turn by turn, the
    weights it picked, which is the whole model again.
    """
    if keras.config.backend() == "jax":
        import jax

        return jax.ad_checkpoint.checkpoint_name(x, KEPT)
    return x


def finite(x):
    """bool [B]: which rows of x [B, T, d] hold finite numbers only."""
    if keras.config.backend() == "torch":
        import torch

        return torch.isfinite(x.detach().sum((1, 2), dtype=torch.float32))
    x = ops.cast(ops.stop_gradient(x), "float32")
    return ops.isfinite(ops.sum(x, axis=(1, 2)))


def capped(x, cap):
    """tanh(x / cap), under a name that a compiled program shows."""
    with keras.name_scope("soft_cap"):
        return ops.tanh(x * (1.0 / cap))


def soft_cap(x, cap):
    """cap * tanh(x / cap); x where there is no cap."""
    return x if cap is None else cap * capped(x, cap)


def norm(x, scale, epsilon, dtype):
    """RMSNorm (arXiv 1910.07467) times (1 + scale), in float32.

    Args:
        x: [..., d].
        scale: [d].
        epsilon: added to the mean square.
        dtype: of the result.
    """
    given = x.dtype

    def normed(x):
        x = ops.cast(x, "float32")
        square = ops.sum(ops.square(x), axis=-1, keepdims=True)
        root = barrier(ops.rsqrt(square * (1.0 / x.shape[-1]) + epsilon))
        return x * root, root

    def forward(x, gain):
        y, root = normed(x)
        return ops.cast(y * gain, dtype), (x, gain)

    def backward(kept, upstream):
        x, gain = kept
        y, root = normed(x)
        upstream = ops.cast(upstream, "float32")
        dy = upstream * gain
        mean = ops.sum(dy * y, -1, keepdims=True) * (1.0 / y.shape[-1])
        dx = (dy - y * mean) * root
        axes = list(range(len(x.shape) - 1))
        dgain = ops.sum(upstream * y, axes) if wanted else None
        return ops.cast(dx, given), dgain

    wanted = scale.trainable
    gain = 1.0 + ops.cast(scale, "float32")
    return own_gradient(forward, backward)(x, gain)


def dropout(x, rate, first, second):
    """Dropout on Torch, its mask a function of two integers and the place.

    Keras seeds a generator of Torch's for each mask: the host would wait for
    the seed, and a compiled block could not draw the mask again.

    Args:
        x: [N, d].
        rate: share of zeros.
        first, second: integer tensors without axes.
    """
    import torch

    place = torch.arange(x.numel(), device=x.device).view(x.shape)
    drawn = _mixed(_mixed(_mixed(first.long()) ^ place) + second.long())
    kept = drawn >= int(rate * 2**32)
    return torch.where(kept, x * (1.0 / (1.0 - rate)), torch.zeros_like(x))


def _mixed(x):
    """32 bits spread over 32 bits: C. Wellons' "lowbias32", in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    # Times 0x846CA68B, whose top bit apart: the product would pass 63 bits.
    x = x ^ (x >> 15)
    x = (x * 0x046CA68B + ((x & 1) << 31)) & 0xFFFFFFFF
    return x ^ (x >> 16)


_ROOT = math.sqrt(2 / math.pi)


def room(dtype):
    """What `gated`, and so all of a feed-forward layer, is multiplied by.

    In float16 a sixteenth: a gate and an up of 300 each would pass 65,504. The
    norm behind the layer does not see a factor, if its epsilon has the square.
    """
    return 1 / 16 if dtype == "float16" else 1.0


def gated(gate, up):
    """gelu(gate) * up * room, the tanh form of GELU (arXiv 1606.08415)."""
    kind = keras.backend.standardize_dtype(gate.dtype)
    factor = room(kind)
    if keras.config.backend() == "torch":
        # Torch has a kernel for GELU's gradient: three passes, not twelve.
        out = keras.activations.gelu(gate, approximate=True)
        return (out if factor == 1.0 else out * factor) * up

    def wide(*arrays):
        # The square of a gate of 256 would be infinite, too.
        if kind != "float16":
            return arrays
        return [ops.cast(x, "float32") for x in arrays]

    def forward(gate, up):
        kept = gate, up
        gate, up = wide(gate, up)
        out = keras.activations.gelu(gate, approximate=True) * up
        return ops.cast(out if factor == 1.0 else out * factor, kind), kept

    def backward(kept, upstream):
        gate, up, upstream = wide(*kept, upstream)
        upstream = upstream if factor == 1.0 else upstream * factor
        square = gate * gate
        t = ops.tanh(_ROOT * gate * (1.0 + 0.044715 * square))
        half = 0.5 * (1.0 + t)
        slope = half + 0.5 * gate * (1.0 - t * t) * _ROOT * (
            1.0 + 3 * 0.044715 * square
        )
        found = upstream * up * slope, upstream * gate * half
        return tuple(ops.cast(x, kind) for x in found)

    return own_gradient(forward, backward)(gate, up)
