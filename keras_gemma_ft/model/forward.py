"""ids, segments, positions -> hidden states, over KerasHub's own variables.

The stock layers cannot be used for training: on TPU they drop the attention
soft cap, they know no segments, and 27B gets a wrong query scale. The equations
are those of Gemma 2 (arXiv 2408.00118) as in transformers' modeling_gemma2.

Shapes: B batch, T tokens, S key slots, d hidden, n query heads, k key/value
heads, g = n/k, h head_dim, f ffw, V words.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_gemma_ft.model import attention, kernels, lora, sharding, tables
from keras_gemma_ft.model import scan as scanned

# Numbers of a feed-forward layer's output on a device at once, where blocks
# are recomputed: 2048 tokens of 2B or 9B, 512 of 27B.
PART = 2**25


def hidden_states(
    backbone,
    token_ids,
    segment_ids,
    positions,
    *,
    recompute=False,
    scan=False,
    blocks=None,
    seed=None,
    cache=None,
    finite=None,
):
    """Final, normalised hidden states.

    Args:
        backbone: `GemmaBackbone`, with or without LoRA.
        token_ids: int [B, T].
        segment_ids: int [B, T]; tokens attend within equal numbers. Padding
            is segment 0 and attends to itself, so that no row is empty.
        positions: int [B, T], for the rotary embedding.
        recompute: keep only each block's input for the backward pass.
        scan: JAX only: one loop over the blocks; see `scan.py`.
        blocks: Torch only: `compiled.Blocks`, which recompute by themselves.
        seed: uint32 [2] for dropout; None is no dropout.
        cache: `new_cache(...)` when decoding.
        finite: function that is given bool [blocks, B], where a block gave
            finite numbers only; not when decoding.

    Returns:
        [B, T, d] in the compute dtype; with a cache, (that, the new cache).
    """
    x = sharding.by_rows(tables.rows(tables.of(backbone), token_ids))
    residual = residual_dtype(backbone)
    # Gemma rounds sqrt(d) in the compute dtype; so do its weights expect it.
    root = ops.cast(np.sqrt(backbone.hidden_dim), backbone.compute_dtype)
    x = ops.cast(x, residual) * ops.cast(root, residual)
    rope = _rotary(positions, backbone.head_dim)
    if blocks is not None:
        x, fine = blocks(x, segment_ids, rope, _seeds(backbone, seed))
    elif cache is None:
        look = _look(backbone, segment_ids)

        def run(block, seed, x):
            # Profilers, and the count of soft caps, tell blocks by it.
            with keras.name_scope(block.name):
                return _block(backbone, look, rope, recompute, block, seed, x)

        loop = scan and keras.config.backend() == "jax"
        through = scanned.blocks if loop else scanned.unrolled
        seeds = _seeds(backbone, seed)
        x, fine = through(run, backbone.transformer_layers, seeds, x, recompute)
    else:
        cache, look = _extend(backbone, cache, segment_ids)
        layers = []
        for i, block in enumerate(backbone.transformer_layers):
            x, pair = _block(
                backbone,
                look,
                rope,
                False,
                block,
                None,
                x,
                cache["layers"][i],
                cache["index"],
            )
            layers.append(pair)
        cache["layers"] = layers
        cache["index"] = cache["index"] + token_ids.shape[1]
    if finite is not None and cache is None and fine is not None:
        finite(fine)
    x = _norm(x, backbone.layer_norm, backbone.compute_dtype)
    return x if cache is None else (x, cache)


def logits(backbone, hidden):
    """Soft-capped float32 logits [..., V] of hidden states [..., d]."""
    table = tables.of(backbone)
    return tables.logits(hidden, table, backbone.final_logit_soft_cap)


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


def new_cache(backbone, batch_size, slots):
    """An empty key/value cache for `slots` tokens a row."""
    shape = (
        batch_size,
        backbone.num_key_value_heads,
        slots,
        backbone.head_dim,
    )
    dtype = backbone.compute_dtype
    return {
        "layers": [
            (ops.zeros(shape, dtype), ops.zeros(shape, dtype))
            for _ in backbone.transformer_layers
        ],
        "segment_ids": ops.zeros((batch_size, slots), "int32"),
        "index": ops.zeros((), "int32"),
    }


def _extend(backbone, cache, segment_ids):
    """The cache with the new tokens' segments, and how to look at it."""
    index = cache["index"]
    segments = ops.slice_update(
        cache["segment_ids"], (0, index), ops.cast(segment_ids, "int32")
    )
    look = _masked(backbone, segment_ids, segments, index)
    return {**cache, "segment_ids": segments}, look


def _seeds(backbone, seed):
    """Integers [layers, 2]: a seed that no other block, target or step has."""
    if seed is None:
        return None
    layers = backbone.num_layers
    # A step adds 1 to the second word, a target 0..6, so blocks go by 8.
    room = ops.convert_to_tensor([1, 8 * layers], seed.dtype)
    own = np.stack([np.zeros(layers), 8 * np.arange(layers)], 1)
    return seed * room + ops.convert_to_tensor(own, seed.dtype)


def _look(backbone, segment_ids):
    """{block.use_sliding_window_attention: function of (q, k, v)}."""
    windows = _windows(backbone)
    cap = backbone.attention_logit_soft_cap
    if segment_ids.shape[1] > attention.whole():
        starts = attention.reach(segment_ids)
        return {
            kind: lambda q, k, v, window=window: attention.attend_in_blocks(
                q, k, v, segment_ids, starts, cap, window
            )
            for kind, window in windows.items()
        }
    return _masked(backbone, segment_ids, segment_ids, 0)


def _windows(backbone):
    """{block.use_sliding_window_attention: window}; None is none."""
    window = backbone.sliding_window_size
    window = window if backbone.use_sliding_window_attention else None
    return {True: window, False: None}


def _masked(backbone, query_segments, key_segments, index):
    """As `_look`, all scores at once."""
    cap = backbone.attention_logit_soft_cap
    masks = {
        kind: attention.allowed(query_segments, key_segments, index, 0, window)
        for kind, window in _windows(backbone).items()
    }
    return {
        kind: lambda q, k, v, mask=mask: attention.attend(q, k, v, mask, cap)
        for kind, mask in masks.items()
    }


def _rotary(positions, head_dim):
    """float32 (cos, sin), each [B, 1, T, h/2] (arXiv 2104.09864)."""
    fraction = np.arange(0, head_dim, 2, dtype="float32") / head_dim
    wavelength = ops.convert_to_tensor(10_000.0**fraction, "float32")
    angle = ops.cast(positions, "float32")[..., None] / wavelength
    angle = angle[:, None]
    return kernels.barrier(ops.cos(angle)), kernels.barrier(ops.sin(angle))


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


def _norm(x, norm, dtype, factor=1.0):
    """The norm of x / factor."""
    return kernels.norm(x, norm.scale, norm.epsilon * factor**2, dtype)


def _block(
    backbone, look, rope, recompute, block, seed, x, cache=None, index=None
):
    """One decoder block: x [B, T, d] -> x, or (x, (keys, values))."""
    x = sharding.by_rows(x)
    normed = _norm(x, block.pre_attention_norm, backbone.compute_dtype)
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


_ATTENTION = ("query", "key", "value", "attention_output")
_FFW = ("ffw_gating", "ffw_gating_2", "ffw_linear")


def _ffw(backbone, block, weights, x, seed):
    """The feed-forward half of a block: x [B, T, d] -> x."""
    frozen = dict(zip(_FFW, weights))
    first = {name: frozen[name] for name in _FFW[:2]}
    normed = _norm(x, block.pre_ffw_norm, backbone.compute_dtype)
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
        return _norm(value, getattr(block, norm), residual, factor)
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
