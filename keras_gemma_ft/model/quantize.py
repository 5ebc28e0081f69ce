"""Layers whose weights are stored as codes, and those weights as they are used.

Weight-only: what `codes` makes of a kernel or of the token table takes the
place of the layer's own variable, and is dequantised where it is used. A float
table is the default: activations are never rounded, but in 8 bits its rows are
off by half a percent, which the head sees in every logit.
"""

import contextlib
import types

import keras
from keras import ops

from keras_gemma_ft.model import hosts, sharding
from keras_gemma_ft.model.codes import (
    PAIRS,
    encode,
    encode_table,
    stored_as,
    table_as,
)


def decode(stored, mode, dtype, pairs=None):
    """The kernel that `encode` stored, as a tensor of `dtype`.

    Multiplied in float32 and rounded once.

    Args:
        stored: {name: array or tensor}.
        mode: as of `encode`.
        dtype: Keras's name; or Torch's, of Torch tensors.
        pairs: `PAIRS[mode]` as a tensor, for a compiled function, to which
            it must be an argument.
    """
    stored = {name: _tensor(x) for name, x in stored.items()}
    codes, absmax, low, step = (
        stored[name] for name in ("codes", "absmax", "low", "step")
    )
    shape = absmax.shape
    if mode == "int8":
        unit = _cast(codes, "float32") * (1.0 / 127)
    else:
        unit = _taken(_tensor(PAIRS[mode]) if pairs is None else pairs, codes)
    absmax = _shaped(_cast(absmax, "float32"), (*low.shape, -1))
    absmax = absmax * step[..., None] + low[..., None]
    last = codes.shape[-1] * (1 if mode == "int8" else 2)
    blocks = _shaped(unit, (*shape, last // shape[-1]))
    kernel = blocks * _shaped(absmax, (*shape, 1))
    return _cast(_shaped(kernel, (*shape[:-1], last)), dtype)


# Torch's own words: its compiler cannot look through Keras's.


def _tensor(x):
    if keras.config.backend() == "torch":
        import torch

        if isinstance(x, torch.Tensor):
            return x
    return ops.convert_to_tensor(x)


def _cast(x, dtype):
    if keras.config.backend() == "torch":
        import torch

        return x.to(getattr(torch, dtype) if type(dtype) is str else dtype)
    return ops.cast(x, dtype)


def _shaped(x, shape):
    if keras.config.backend() == "torch":
        return x.reshape(shape)
    return ops.reshape(x, shape)


def _taken(pairs, codes):
    """Both numbers of each byte: [..., n] -> [..., n, 2]."""
    if keras.config.backend() == "torch":
        from torch.nn import functional

        return functional.embedding(codes.int(), pairs)
    return ops.take(pairs, ops.cast(codes, "int32"), axis=0)


def apply(backbone, denses, mode, embedding="none"):
    """Replaces float weights of a model that is there by their stored form.

    `weights.once` encodes weights as they are read, so that the float model
    never exists; what it has stored stays as it is.

    Args:
        backbone: remembers the modes.
        denses: the decoder's EinsumDense layers.
        mode: "int8", "int4", "nf4" or "none".
        embedding: "int8" or "none".
    """
    layer = backbone.token_embedding
    table = embedding != "none" and layer._embeddings is not None
    denses = [x for x in denses if mode != "none" and x._kernel is not None]
    for dense in denses:
        kinds = stored_as(dense._kernel.shape, mode)
        _apply(dense, kinds, lambda x: encode(x, mode))
    if table:
        _apply(layer, table_as(layer._embeddings.shape), encode_table)
    if table or denses:
        settle(backbone, mode, embedding)


def _apply(layer, kinds, make):
    old = getattr(layer, own(layer))
    # The planner's model has shapes and no values.
    values = {}
    if old._value is not None:
        values = make(hosts.whole(old.value))
    attach(layer, kinds)
    for name, value in values.items():
        layer.stored[name].assign(value)
    if keras.config.backend() == "torch":
        # Whoever else holds the parameter: its memory is given back.
        old.value.data = old.value.data.new_empty(0)


def own(layer):
    """Name of the attribute that is the float variable."""
    return "_kernel" if hasattr(layer, "_kernel") else "_embeddings"


def attach(layer, kinds):
    """Makes `layer.stored`, {name: variable}, in the place of its weight.

    Args:
        layer: an EinsumDense or a ReversibleEmbedding.
        kinds: {name: (shape, dtype)}.
    """
    name = own(layer)
    layer._tracker.unlock()
    layer._untrack_variable(getattr(layer, name))
    if keras.config.backend() == "tensorflow":
        # What TensorFlow would write of the layer is a list of its own.
        layer._delete_tracking(name)
    setattr(layer, name, None)
    layer.stored = {
        name: layer.add_weight(
            name=name,
            shape=shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )
        for name, (shape, dtype) in kinds.items()
    }
    layer._tracker.lock()


def settle(backbone, mode, embedding):
    """Notes how weights are stored; Torch's modules forget the old ones."""
    backbone.quantize_mode, backbone.quantize_embedding = mode, embedding
    if keras.config.backend() != "torch":
        return
    # Every layer around has a list of its own.
    for layer in backbone._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


@contextlib.contextmanager
def shown(denses):
    """A block in which layers with stored kernels show their shapes.

    KerasHub's `enable_lora` asks a layer for its kernel's shape, and tells
    the kernel that it is not trained.
    """
    hidden = [dense for dense in denses if dense._kernel is None]
    for dense in hidden:
        codes, absmax = dense.stored["codes"], dense.stored["absmax"]
        width = 1 if codes.dtype == "int8" else 2
        shape = (*absmax.shape[:-1], codes.shape[-1] * width)
        dense._kernel = types.SimpleNamespace(shape=shape, trainable=False)
    try:
        yield
    finally:
        for dense in hidden:
            dense._kernel = None


def kernel(backbone, dense, dtype):
    """The frozen kernel of an EinsumDense, in `dtype`.

    Not `dense.kernel`, which adds A B to it when LoRA is on.
    """
    if dense._kernel is None:
        whole = {k: sharding.gathered(v) for k, v in dense.stored.items()}
        return decode(whole, backbone.quantize_mode, dtype)
    return ops.cast(sharding.gathered(dense._kernel), dtype)
