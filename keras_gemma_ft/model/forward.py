"""The forward pass: token ids -> hidden states, over KerasHub's variables.

The stock layers cannot be used for training: on TPU they drop the attention
soft cap, they know no segments, and 27B gets a wrong query scale. A block's
equations are in `decoder_block`, and in `compiled_block` for Torch's compiler.

Shapes: B batch, T tokens, S key slots, d hidden, n query heads, k key/value
heads, g = n/k, h head_dim, f ffw, V words.
"""

import keras
import numpy as np
from keras import ops

from keras_gemma_ft.model import (
    attention,
    decoder_block,
    kernels,
    sharding,
    tables,
)
from keras_gemma_ft.model import scan as scanned


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
    residual = decoder_block.residual_dtype(backbone)
    # Gemma rounds sqrt(d) in the compute dtype; so do its weights expect it.
    root = ops.cast(np.sqrt(backbone.hidden_dim), backbone.compute_dtype)
    x = ops.cast(x, residual) * ops.cast(root, residual)
    rope = _rotary(positions, backbone.head_dim)
    if blocks is not None:
        x, fine = blocks(x, segment_ids, rope, _seeds(backbone, seed))
    elif cache is None:
        look = attention.looks(
            segment_ids, _windows(backbone), backbone.attention_logit_soft_cap
        )

        def run(block, seed, x):
            # Profilers, and the count of soft caps, tell blocks by it.
            with keras.name_scope(block.name):
                return decoder_block.forward(
                    backbone, look, rope, recompute, block, seed, x
                )

        loop = scan and keras.config.backend() == "jax"
        through = scanned.blocks if loop else scanned.unrolled
        seeds = _seeds(backbone, seed)
        x, fine = through(run, backbone.transformer_layers, seeds, x, recompute)
    else:
        cache, look = _extend(backbone, cache, segment_ids)
        layers = []
        for i, block in enumerate(backbone.transformer_layers):
            x, pair = decoder_block.forward(
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
    x = decoder_block.normalised(x, backbone.layer_norm, backbone.compute_dtype)
    return x if cache is None else (x, cache)


def logits(backbone, hidden):
    """Soft-capped float32 logits [..., V] of hidden states [..., d]."""
    table = tables.head(backbone)
    return tables.logits(hidden, table, backbone.final_logit_soft_cap)


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
    look = attention.whole.looks(
        segment_ids, segments, index, _windows(backbone),
        backbone.attention_logit_soft_cap,
    )  # fmt: skip
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


def _windows(backbone):
    """{block.use_sliding_window_attention: window}; None is none."""
    window = backbone.sliding_window_size
    window = window if backbone.use_sliding_window_attention else None
    return {True: window, False: None}


def _rotary(positions, head_dim):
    """float32 (cos, sin), each [B, 1, T, h/2] (arXiv 2104.09864)."""
    fraction = np.arange(0, head_dim, 2, dtype="float32") / head_dim
    wavelength = ops.convert_to_tensor(10_000.0**fraction, "float32")
    angle = ops.cast(positions, "float32")[..., None] / wavelength
    angle = angle[:, None]
    return kernels.barrier(ops.cos(angle)), kernels.barrier(ops.sin(angle))
