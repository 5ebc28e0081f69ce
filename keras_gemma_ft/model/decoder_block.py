"""One decoder block of Gemma 2, op by op, over KerasHub's own variables.

The equations are those of Gemma 2 (arXiv 2408.00118) as in transformers'
modeling_gemma2. Shapes: B batch, T tokens, d hidden, h head_dim, f ffw.
"""

import functools

from keras import ops

from keras_gemma_ft.model import kernels, lora, sharding
from keras_gemma_ft.model import scan as scanned

# Numbers of a feed-forward layer's output on a device at once, where blocks
# are recomputed: 2048 tokens of 2B or 9B, 512 of 27B.
PART = 2**25
_ATTENTION = ("query", "key", "value", "attention_output")
_FFW = ("ffw_gating", "ffw_gating_2", "ffw_linear")


def residual_dtype(backbone):
    """float16 cannot hold Gemma 2's residual stream, which passes 65504."""
    compute = backbone.compute_dtype
    return "float32" if compute == "float16" else compute


def query_scale(backbone):
    """1 / sqrt(query_pre_attn_scalar): h for 2B and 9B, d // n for 27B.

    A Keras preset knows only these two; a Hugging Face folder any number.
    """
    scalar = getattr(backbone, "query_pre_attn_scalar", None)
    if scalar is None and backbone.query_head_dim_normalize:
        scalar = backbone.head_dim
    return (scalar or backbone.hidden_dim // backbone.num_query_heads) ** -0.5


def normalised(x, norm, dtype, factor=1.0):
    """The norm of x / factor."""
    return kernels.norm(x, norm.scale, norm.epsilon * factor**2, dtype)


def forward(
    backbone, look, rope, recompute, block, seed, x, cache=None, index=None
):
    """One decoder block: x [B, T, d] -> x, or (x, (keys, values))."""
    x = sharding.by_rows(x)
    normed = normalised(x, block.pre_attention_norm, backbone.compute_dtype)
    frozen = lora.kernels_of(
        backbone, block, _ATTENTION, backbone.compute_dtype
    )
    last = {_ATTENTION[3]: frozen.pop(_ATTENTION[3])}
    q, k, v = _project(backbone, block, seed, normed, frozen)
    heads = backbone.num_key_value_heads
    q = _heads(q, backbone.num_query_heads, rope, query_scale(backbone))
    k, v = _heads(k, heads, rope), _heads(v, heads)
    if cache is not None:
        k = ops.slice_update(cache[0], (0, 0, index, 0), k)
        v = ops.slice_update(cache[1], (0, 0, index, 0), v)
    q, k, v = map(kernels.keep, (q, k, v))
    out = look[block.use_sliding_window_attention](q, k, v)
    out = ops.transpose(out, (0, 2, 1, 3))
    out = ops.reshape(out, (-1, x.shape[1], out.shape[2] * out.shape[3]))
    (attended,) = _project(backbone, block, seed, out, last)
    attended = kernels.keep(attended)
    x = kernels.keep(
        x + _post(backbone, block, "post_attention_norm", attended)
    )
    # Outside of the parts: a mesh brings them together once.
    frozen = lora.kernels_of(backbone, block, _FFW, backbone.compute_dtype)
    weights = tuple(frozen.values())
    ffw = functools.partial(_ffw, backbone, block)
    if not recompute:
        x = ffw(weights, x, seed)
    elif getattr(backbone, "lora", None):
        ffw = functools.partial(ffw, weights)
        x = in_parts(ffw, x, seed, weights[0].shape[-1])
    else:
        # TensorFlow has a gradient for what is given to a recomputed
        # function, wanted or not, and none for tensors that it merely sees.
        x = in_parts(
            lambda x, seed, *weights: ffw(weights, x, seed),
            x, seed, weights[0].shape[-1], weights,
        )  # fmt: skip
    return x if cache is None else (x, (k, v))


def _heads(x, heads, rope=None, scale=1.0):
    """x [B, T, heads * h] -> [B, heads, T, h], turned by its position.

    The rotation is float32, the result of x's dtype.
    """
    x = ops.reshape(x, (-1, x.shape[1], heads, x.shape[-1] // heads))
    x = ops.transpose(x, (0, 2, 1, 3))
    if rope is None:
        return x
    cos, sin = rope
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    turned = ops.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return ops.cast(turned if scale == 1.0 else turned * scale, x.dtype)


def _ffw(backbone, block, weights, x, seed):
    """The feed-forward half of a block: x [B, T, d] -> x."""
    frozen = dict(zip(_FFW, weights))
    first = {name: frozen[name] for name in _FFW[:2]}
    normed = normalised(x, block.pre_ffw_norm, backbone.compute_dtype)
    gate, up = _project(backbone, block, seed, normed, first)
    gate, up = kernels.keep(gate), kernels.keep(up)
    out = kernels.gated(gate, up)
    last = {_FFW[2]: frozen[_FFW[2]]}
    (down,) = _project(backbone, block, seed, out, last)
    down = kernels.keep(down)
    room = kernels.room(backbone.compute_dtype)
    return x + _post(backbone, block, "post_ffw_norm", down, room)


def _project(backbone, block, seed, x, frozen):
    x = ops.cast(x, backbone.compute_dtype)
    outputs = lora.project(backbone, block, frozen, x, seed=seed)
    return [sharding.by_rows(y) for y in outputs]


def _post(backbone, block, norm, value, factor=1.0):
    """A half's result, value / factor, normalised where there is a norm."""
    residual = residual_dtype(backbone)
    if getattr(block, f"use_{norm}"):
        return normalised(value, getattr(block, norm), residual, factor)
    value = ops.cast(value, residual)
    return value if factor == 1.0 else value * (1.0 / factor)


def part_size(width):
    """Tokens of a part, for feed-forward layers `width` wide."""
    return max(1, 2 ** ((PART // width).bit_length() - 1))


def in_parts(run, x, seed, width, weights=()):
    """run(x, seed, *weights), a part of the tokens at a time, recomputed.

    Of 8192 tokens of 2B one float32 [T, f] array takes 300 MB, and the
    backward pass holds six; in parts, a quarter of that.

    Args:
        run: function of (x [B, t, d], seed, *weights) -> the same shape, that
            looks at one token at a time.
        x: [B, T, d].
        seed: uint32 [2] of dropout, or None; each part gets its own.
        width: f.
        weights: tensors that are trained.
    """
    rows, t, _ = x.shape
    size = max(1, part_size(width) * sharding.parts() // rows)
    if t < 2 * size:
        return run(x, seed, *weights)

    def part(x, number, *weights):
        own = seed
        if seed is not None:
            # Far from those of blocks and steps.
            far = ops.convert_to_tensor([2**24, 0], seed.dtype)
            own = seed + ops.cast(number, seed.dtype) * far
        return run(x, own, *weights)

    return scanned.parts(part, x, size, weights)
