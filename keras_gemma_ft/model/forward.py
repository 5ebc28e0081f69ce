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

from keras_gemma_ft.model import lora, quantize

# exp(-1e30) is 0 in float32, and unlike -inf it never makes a NaN.
_MASKED = -1e30


def hidden_states(
    backbone,
    token_ids,
    segment_ids,
    positions,
    *,
    recompute=False,
    seed=None,
    cache=None,
):
    """Final, normalised hidden states.

    Args:
        backbone: `GemmaBackbone`, with or without LoRA.
        token_ids: int [B, T].
        segment_ids: int [B, T]; tokens attend within equal numbers. Padding
            is segment 0 and attends to itself, so that no row is empty.
        positions: int [B, T], for the rotary embedding.
        recompute: keep only each block's input for the backward pass.
        seed: uint32 [2] for dropout; None is no dropout.
        cache: `new_cache(...)` when decoding.

    Returns:
        [B, T, d] in the compute dtype; with a cache, (that, the new cache).
    """
    table = quantize.embedding(backbone)
    x = ops.take(table, token_ids, axis=0)
    residual = residual_dtype(backbone)
    # Gemma rounds sqrt(d) in the compute dtype; so do its weights expect it.
    root = ops.cast(np.sqrt(backbone.hidden_dim), backbone.compute_dtype)
    x = ops.cast(x, residual) * ops.cast(root, residual)
    rope = _rotary(positions, backbone.head_dim)
    if cache is None:
        masks = _masks(backbone, segment_ids, segment_ids, 0)
        for i, block in enumerate(backbone.transformer_layers):
            run = functools.partial(
                _block, backbone, block, masks, rope, _fold(backbone, seed, i)
            )
            x = keras.remat(run)(x) if recompute else run(x)
    else:
        cache, masks = _extend(backbone, cache, segment_ids)
        layers = []
        for i, block in enumerate(backbone.transformer_layers):
            x, pair = _block(
                backbone, block, masks, rope, None, x, cache["layers"][i],
                cache["index"],
            )
            layers.append(pair)
        cache["layers"] = layers
        cache["index"] = cache["index"] + token_ids.shape[1]
    x = _norm(x, backbone.layer_norm, backbone.compute_dtype)
    return x if cache is None else (x, cache)


def logits(backbone, hidden):
    """Soft-capped float32 logits [..., V] of hidden states [..., d]."""
    table = ops.cast(quantize.embedding(backbone), hidden.dtype)
    z = ops.cast(ops.matmul(hidden, ops.transpose(table)), "float32")
    return soft_cap(z, backbone.final_logit_soft_cap)


def soft_cap(x, cap):
    """cap * tanh(x / cap); x where there is no cap."""
    return x if cap is None else cap * ops.tanh(x / cap)


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
        slots,
        backbone.num_key_value_heads,
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
    """The cache with the new tokens' segments, and the masks over it."""
    index = cache["index"]
    segments = ops.slice_update(
        cache["segment_ids"], (0, index), ops.cast(segment_ids, "int32")
    )
    masks = _masks(backbone, segment_ids, segments, index)
    return {**cache, "segment_ids": segments}, masks


def _fold(backbone, seed, i):
    """The seed of block i, which no other block, target or step has."""
    if seed is None:
        return None
    # A step adds 1 to the second word, a target 0..6, so blocks go by 8.
    room = ops.convert_to_tensor([1, 8 * backbone.num_layers], seed.dtype)
    return seed * room + ops.convert_to_tensor([0, 8 * i], seed.dtype)


def _masks(backbone, query_segments, key_segments, index):
    """Boolean [B, 1, 1, T, S]: (window layers', global layers')."""
    t, s = query_segments.shape[1], key_segments.shape[1]
    q = index + ops.arange(t, dtype="int32")[:, None]
    k = ops.arange(s, dtype="int32")[None, :]
    same = ops.equal(query_segments[:, :, None], key_segments[:, None, :])
    mask = ops.logical_and(same, k <= q)
    window = mask
    if backbone.use_sliding_window_attention:
        near = q - k < backbone.sliding_window_size
        window = ops.logical_and(mask, near)
    return window[:, None, None], mask[:, None, None]


def _rotary(positions, head_dim):
    """float32 (cos, sin), each [B, T, 1, h/2] (arXiv 2104.09864)."""
    fraction = np.arange(0, head_dim, 2, dtype="float32") / head_dim
    wavelength = ops.convert_to_tensor(10_000.0**fraction, "float32")
    angle = ops.cast(positions, "float32")[..., None] / wavelength
    angle = angle[:, :, None, :]
    return ops.cos(angle), ops.sin(angle)


def _rotate(x, rope):
    """x [B, T, heads, h] turned by its position, in float32, x's dtype."""
    cos, sin = rope
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    turned = ops.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return ops.cast(turned, x.dtype)


def _norm(x, norm, dtype):
    """RMSNorm times (1 + scale) in float32, cast to `dtype`."""
    x = ops.cast(x, "float32")
    variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
    x = x * ops.rsqrt(variance + norm.epsilon)
    return ops.cast(x * (1.0 + ops.cast(norm.scale, "float32")), dtype)


def _block(backbone, block, masks, rope, seed, x, cache=None, index=None):
    """One decoder block: x [B, T, d] -> x, or (x, (keys, values))."""
    compute, residual = backbone.compute_dtype, residual_dtype(backbone)

    def project(target, inputs):
        kernel = quantize.kernel(
            backbone, lora.layer(block, target), compute
        )
        inputs = ops.cast(inputs, compute)
        return lora.project(
            backbone, block, target, inputs, kernel=kernel, seed=seed
        )

    def post(norm, value):
        name = f"use_{norm}"
        if getattr(block, name):
            return _norm(value, getattr(block, norm), residual)
        return ops.cast(value, residual)

    normed = _norm(x, block.pre_attention_norm, compute)
    q = _rotate(project("query", normed), rope)
    k = _rotate(project("key", normed), rope)
    v = project("value", normed)
    if cache is not None:
        k = ops.slice_update(cache[0], (0, index, 0, 0), k)
        v = ops.slice_update(cache[1], (0, index, 0, 0), v)
    mask = masks[0 if block.use_sliding_window_attention else 1]
    attended = _attention(backbone, q, k, v, mask)
    attended = project("attention_output", attended)
    x = x + post("post_attention_norm", attended)
    normed = _norm(x, block.pre_ffw_norm, compute)
    gate = keras.activations.gelu(
        project("ffw_gating", normed), approximate=True
    )
    up = project("ffw_gating_2", normed)
    x = x + post("post_ffw_norm", project("ffw_linear", gate * up))
    return x if cache is None else (x, (k, v))


def _attention(backbone, q, k, v, mask):
    """Soft-capped grouped attention: q [B, T, n, h] -> [B, T, n, h].

    The cap comes before the mask, the softmax is float32.
    """
    batch, t, n, h = q.shape
    kv = k.shape[2]
    q = q * ops.cast(query_scale(backbone), q.dtype)
    q = ops.reshape(q, (-1, t, kv, n // kv, h))
    scores = ops.cast(ops.einsum("btkgh,bskh->bkgts", q, k), "float32")
    scores = soft_cap(scores, backbone.attention_logit_soft_cap)
    scores = ops.where(mask, scores, _MASKED)
    weights = ops.cast(ops.softmax(scores, axis=-1), v.dtype)
    out = ops.einsum("bkgts,bskh->btkgh", weights, v)
    return ops.reshape(out, (-1, t, n, h))


