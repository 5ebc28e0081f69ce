"""Biases that a foreign adapter adds to projections, which Gemma 2 has not."""

from keras_gemma_ft import config
from keras_gemma_ft.model import lora


def add(backbone, biases):
    """Has projections add a bias, as foreign adapters may have trained one.

    Args:
        backbone: without LoRA.
        biases: {(layer, target): float32 [out]}, scaled already.

    Raises:
        UserError: float16, in which what a projection gives is not its y.
    """
    if biases and backbone.compute_dtype == "float16":
        raise config.UserError(
            "this adapter adds biases to projections, which float16 leaves "
            "no room for. Type --model.dtype=float32 or bfloat16."
        )
    for (i, target), bias in biases.items():
        dense = lora.layer(backbone.transformer_layers[i], target)
        dense._tracker.unlock()
        dense.added_bias = dense.add_weight(
            name="added_bias",
            shape=bias.shape,
            dtype="float32",
            trainable=False,
        )
        dense._tracker.lock()
        dense.added_bias.assign(bias)
