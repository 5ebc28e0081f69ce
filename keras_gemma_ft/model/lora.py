"""LoRA (arXiv 2106.09685) over KerasHub's layers: enable, apply, read, write.

`enable` makes the variables through KerasHub's own `enable_lora(rank)`;
`project` computes y = x W + s (x A) B without ever forming W + s A B, which
would cost a full dW in the backward pass and, in bfloat16, round small updates
away. A and B stay float32.

Shapes: B batch, T tokens, d hidden, n heads, h head_dim, f ffw, r rank.
"""

import keras
import numpy as np
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.formats import adapters
from keras_gemma_ft.model import kernels, quantize

_HEADS = ("query", "key", "value")


def layer(block, target):
    """The EinsumDense of a decoder block that KerasHub names `target`."""
    attention = block.attention
    return {
        "query": attention.query_dense,
        "key": attention.key_dense,
        "value": attention.value_dense,
        "attention_output": attention.output_dense,
        "ffw_gating": block.gating_ffw,
        "ffw_gating_2": block.gating_ffw_2,
        "ffw_linear": block.ffw_linear,
    }[target]


def layers(backbone):
    """Every EinsumDense of the decoder, in order."""
    return [
        layer(block, target)
        for block in backbone.transformer_layers
        for target in config.TARGETS
    ]


def enable(backbone, settings, *, seed=0):
    """Freezes the backbone and adds adapters to `settings.targets`.

    Args:
        backbone: a built `GemmaBackbone`.
        settings: `config.Lora` with rank > 0.
        seed: of A; B starts at zero, so that nothing changes at first. The
            values are the same on every backend.
    """
    names = config.targets(settings)
    stock = [
        name
        for name in names
        if settings.style == "keras" or name not in _HEADS
    ]
    with quantize.shown(layers(backbone)):
        backbone.enable_lora(settings.rank, target_layer_names=stock)
        if settings.style == "standard":
            for block in backbone.transformer_layers:
                for name in names:
                    if name in _HEADS:
                        _add_standard(layer(block, name), settings.rank)
    backbone.lora = settings
    write(backbone, initial(backbone, seed=seed))


def _add_standard(dense, rank):
    """One (d, r) and (r, n, h) pair on a q/k/v layer, tracked by the layer.

    The layer's own `lora_enabled` stays False: stock `kernel` cannot form
    A B of this shape, and nothing here calls the stock path.
    """
    n, d, h = dense._kernel.shape
    dense.trainable = True
    dense._kernel.trainable = False
    dense._tracker.unlock()
    dense.lora_kernel_a = dense.add_weight(
        name="lora_kernel_a", shape=(d, rank), dtype="float32"
    )
    dense.lora_kernel_b = dense.add_weight(
        name="lora_kernel_b", shape=(rank, n, h), dtype="float32"
    )
    dense._tracker.lock()


def initial(backbone, *, seed):
    """Adapter whose A is uniform in +-1/sqrt(fan_in), B zero.

    This is PEFT's start (Kaiming uniform, a = sqrt(5)). Keras's `he_uniform`
    takes the whole (n, d) as fan-in of a per-head A; here fan-in is what one
    output sums over, so that the step size does not depend on the style.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for key, (a, b) in variables(backbone).items():
        fan_in = a.shape[-2]
        if key[1] == "attention_output":
            fan_in = a.shape[0] * a.shape[1]
        limit = fan_in**-0.5
        weights[key] = (
            rng.uniform(-limit, limit, a.shape).astype("float32"),
            np.zeros(b.shape, "float32"),
        )
    return _adapter(backbone, weights)


def variables(backbone):
    """{(layer, target): (A, B)} as Keras variables; {} without LoRA."""
    settings = getattr(backbone, "lora", None)
    if settings is None:
        return {}
    pairs = {}
    for i, block in enumerate(backbone.transformer_layers):
        for name in config.targets(settings):
            dense = layer(block, name)
            pairs[i, name] = (dense.lora_kernel_a, dense.lora_kernel_b)
    return pairs


def _adapter(backbone, weights):
    settings = backbone.lora
    return adapters.Adapter(
        style=settings.style,
        rank=settings.rank,
        alpha=settings.alpha or float(settings.rank),
        rslora=settings.rslora,
        dropout=settings.dropout,
        targets=config.targets(settings),
        weights=weights,
        base=getattr(backbone, "preset", ""),
        init=settings.init,
    )


def read(backbone):
    """The backbone's adapter as float32 numpy: `formats.adapters.Adapter`.

    It is for the base as it was loaded: where A and B started from the
    kernels (`lora_init.apply`), the difference to that start.
    """
    adapter = _adapter(
        backbone,
        {
            key: tuple(ops.convert_to_numpy(v.value) for v in pair)
            for key, pair in variables(backbone).items()
        },
    )
    start = getattr(backbone, "lora_start", None)
    return adapters.difference(adapter, start) if start else adapter


def write(backbone, adapter):
    """Puts an adapter's arrays into the backbone's variables.

    A foreign adapter may leave layers out: theirs become zero.
    """
    for key, pair in variables(backbone).items():
        values = adapter.weights.get(key)
        for i, variable in enumerate(pair):
            value = np.zeros(variable.shape) if values is None else values[i]
            variable.assign(value)


def load(backbone, path):
    """Turns LoRA on with the adapter at `path`; see `formats.adapters.read`.

    Returns:
        The `formats.adapters.Adapter`.
    """
    adapter = adapters.read(path, backbone.get_config())
    put(backbone, adapter)
    return adapter


def put(backbone, adapter):
    """Turns LoRA on with an adapter that has been read."""
    enable(backbone, settings_of(adapter))
    write(backbone, adapter)


def settings_of(adapter):
    """The `config.Lora` under which `adapter` was made."""
    return config.Lora(
        rank=adapter.rank,
        alpha=float(adapter.alpha),
        rslora=adapter.rslora,
        dropout=adapter.dropout,
        targets=",".join(adapter.targets),
        style=adapter.style,
    )


def scale(backbone):
    """s of y = x W + s (x A) B."""
    settings = backbone.lora
    return adapters.scale(
        settings.rank, settings.alpha or settings.rank, settings.rslora
    )


class _Seed(keras.random.SeedGenerator):
    """A seed that is a tensor, so that recomputation draws the same mask."""

    def __init__(self, value):
        self.value = value

    def next(self, ordered=True):
        return self.value


def kernels_of(backbone, block, targets, dtype):
    """{target: the frozen kernel as a matrix [in, out], ready to use}."""
    return {
        name: _flat(name, quantize.kernel(backbone, layer(block, name), dtype))
        for name in targets
    }


def project(backbone, block, frozen, x, *, seed=None):
    """x W, plus the adapter's s (x A) B, for targets that read the same x.

    Their A stand side by side in one product: a rank-8 product costs a pass
    over x, however narrow it is.

    Args:
        backbone: the model; tells scale, style, dropout and compute dtype.
        block: the decoder block.
        frozen: `kernels_of` the targets.
        x: [B, T, d] or [B, T, f] or, for `attention_output`, [B, T, n * h].
        seed: uint32 [2], the step's and block's seed; None is no dropout.

    Returns:
        A list: [B, T, n * h] for query, key and value, else [B, T, d] or
        [B, T, f].
    """
    settings = getattr(backbone, "lora", None)
    names = config.targets(settings) if settings else ()
    # Flat matrices: einsum would transpose the weights for each product.
    shape = (-1, *x.shape[1:-1])
    x = kernels.barrier(ops.reshape(x, (-1, x.shape[-1])))
    adapted = [name for name in frozen if name in names]
    low = dict(zip(adapted, _low(backbone, block, adapted, x, seed)))
    outputs = []
    for name, kernel in frozen.items():
        y = kernels.matmul(x, kernel)
        if name in low:
            b = ops.cast(layer(block, name).lora_kernel_b, x.dtype)
            b = ops.reshape(b, (b.shape[0], -1))
            # [B T, r] or, with an A for each head, [B T n, r].
            u = ops.reshape(low[name], (-1, b.shape[0]))
            delta = kernels.matmul(u, ops.cast(scale(backbone), b.dtype) * b)
            y = y + ops.reshape(delta, (-1, y.shape[-1]))
        bias = getattr(layer(block, name), "added_bias", None)
        if bias is not None:
            y = y + ops.cast(bias, y.dtype)
        outputs.append(ops.reshape(kernels.barrier(y), (*shape, y.shape[-1])))
    return outputs


def _flat(target, kernel):
    """A kernel, or an A, as the matrix [in, out] that x is multiplied by."""
    if target in _HEADS and len(kernel.shape) == 3:  # [n, d, h]
        kernel = ops.transpose(kernel, (1, 0, 2))
        return ops.reshape(kernel, (kernel.shape[0], -1))
    return ops.reshape(kernel, (-1, kernel.shape[-1]))


def _low(backbone, block, targets, x, seed):
    """x A of every target: each [B T, r] or [B T, n r]."""
    matrices = [
        _flat(name, ops.cast(layer(block, name).lora_kernel_a, x.dtype))
        for name in targets
    ]
    if seed is not None and backbone.lora.dropout:
        # Each target its own mask, as PEFT has.
        for name, matrix in zip(targets, matrices):
            own = seed + ops.convert_to_tensor(
                [0, config.TARGETS.index(name)], seed.dtype
            )
            rate = backbone.lora.dropout
            if keras.config.backend() == "torch":
                dropped = kernels.dropout(x, rate, own[0], own[1])
            else:
                dropped = keras.random.dropout(x, rate, seed=_Seed(own))
            yield kernels.matmul(dropped, matrix)
    elif len(targets) > 1:
        together = kernels.matmul(x, ops.concatenate(matrices, -1))
        at = 0
        for matrix in matrices:
            yield together[:, at : at + matrix.shape[-1]]
            at += matrix.shape[-1]
    elif targets:
        yield kernels.matmul(x, matrices[0])
