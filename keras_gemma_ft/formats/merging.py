"""Merges an adapter into a model's weights, one variable at a time.

A merged weight is W + s A B, or what a `whole_change.WholeChange` makes of W,
in float32 and cast once to the dtype in which it is wanted.
"""

import re

import numpy as np

from keras_gemma_ft.formats import low_rank
from keras_gemma_ft.formats.names import HEAD, to_huggingface, to_keras
from keras_gemma_ft.formats.whole_change import WholeChange

_KERNEL = re.compile(r"decoder_block_(\d+)/(?:attention/)?(\w+)/kernel")


def key_of(path):
    """(layer, target) of a Keras variable path; None of what has no LoRA."""
    match = _KERNEL.fullmatch(path)
    return (int(match[1]), match[2]) if match else None


def merged(path, array, adapter):
    """One variable with the adapter merged into it.

    Args:
        path: Keras path, such as `decoder_block_0/ffw_gating/kernel`; of a
            head that the base has of its own, `names.HEAD`.
        array: the variable of the base, with Keras's shape; any float dtype.
        adapter: `low_rank.Adapter` or `whole_change.WholeChange`, or None.

    Returns:
        Array of the same shape (a table may gain rows): float32 where the
        adapter changes it, else `array` itself.
    """
    if isinstance(adapter, WholeChange):
        return _changed(path, array, adapter)
    pair = adapter and adapter.weights.get(key_of(path))
    if not pair:
        return array
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    change = low_rank.product(adapter.style, key_of(path)[1], *pair)
    return array.astype("float32") + np.float32(factor) * change


def _changed(path, array, adapter):
    change = adapter.changes.get(path)
    if change is None:
        return array
    name, weight = to_huggingface(path, array)
    output = path.endswith("attention_output/kernel")
    head_dim = array.shape[1] if output else array.shape[-1]
    return to_keras(name, change.apply(weight), head_dim=head_dim)[1]


def unties(adapter, tied=True):
    """Whether the tuned model has a head that is not its table.

    Args:
        adapter: as of `merged`.
        tied: whether the base's head is its table.
    """
    return not tied or (
        isinstance(adapter, WholeChange) and not adapter.follows
    )


def head(adapter, table, own=None):
    """The tuned head where `unties`: [V, D].

    Args:
        adapter: as of `merged`.
        table: the base's table, not merged.
        own: the base's head, where that is not its table.
    """
    if own is None:
        own = table
        if isinstance(adapter, WholeChange) and adapter.lent is not None:
            own = adapter.lent
    return merged(HEAD, own, adapter)


def words(adapter, count):
    """Rows of the tuned table, of `count` rows of the base's."""
    if isinstance(adapter, WholeChange):
        return adapter.words or count
    return count


def settings(backbone, adapter):
    """`backbone` (dict as of `GemmaBackbone.get_config()`) of the tuned model.

    Only its `vocabulary_size` can differ.
    """
    size = words(adapter, backbone["vocabulary_size"])
    return backbone | {"vocabulary_size": size}


def refusal(adapter):
    """Why no file of weights can hold what this adapter does; None: one can."""
    if not isinstance(adapter, WholeChange) or not adapter.biases:
        return None
    return (
        f"it adds biases to {len(adapter.biases)} projections (lora_bias), and "
        f"the weights of a Gemma 2 have none. generate and evaluate follow it; "
        f"to merge it, train it again without lora_bias."
    )
