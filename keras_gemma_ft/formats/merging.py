"""Merges an adapter into a model's weights, one variable at a time.

A merged weight is W + s A B, added up in float32 and cast once to the dtype
in which it is wanted.
"""

import re

import numpy as np

from keras_gemma_ft.formats import low_rank
from keras_gemma_ft.formats.whole_change import WholeChange

_KERNEL = re.compile(r"decoder_block_(\d+)/(?:attention/)?(\w+)/kernel")


def key_of(path):
    """(layer, target) of a Keras variable path; None of what has no LoRA."""
    match = _KERNEL.fullmatch(path)
    return (int(match[1]), match[2]) if match else None


def merged(path, array, adapter, head_dim):
    """One variable with the adapter merged into it.

    Args:
        path: Keras path, such as `decoder_block_0/ffw_gating/kernel`.
        array: the variable of the base, with Keras's shape; any float dtype.
        adapter: `low_rank.Adapter`, `whole_change.WholeChange`, or None.
        head_dim: H of the base.

    Returns:
        Array of the same shape: float32 where the adapter changes it, else
        `array` itself.
    """
    if isinstance(adapter, WholeChange):
        return adapter.merged(path, array, head_dim)
    pair = adapter and adapter.weights.get(key_of(path))
    if not pair:
        return array
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    change = low_rank.product(adapter.style, key_of(path)[1], *pair)
    return array.astype("float32") + np.float32(factor) * change
