"""Weights get their values once: as they are read, where they belong.

Keras draws random numbers for every variable, whole on one device, before a
loader overwrites them. In `once` a variable has no value until its own comes.
"""

import hashlib
import math

import keras
import ml_dtypes  # noqa: F401  numpy then knows bfloat16
import numpy as np
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.model import lora, quantize, sharding


def once(source, make, mode="none"):
    """A model that is loaded without being initialised.

    Args:
        source: where the model comes from, for the error.
        make: function that builds a model, assigns a host array to each of
            its variables, and returns it.
        mode: how the decoder's kernels are stored; see `quantize`. They are
            encoded as they are read: no device ever holds one of them.

    Returns:
        (model, sha256 over every variable's name, shape, and up to 997 of
        its values: hashing all 18 GB of 9B would take longer than loading).

    Raises:
        UserError: a variable that was not assigned exactly once. Keras before
            3.15.0 could skip variables of a sharded file in silence.
    """
    empty, samples, encoded = {}, {}, {}
    kind = keras.Variable
    # Keras's only public way to variables without values is StatelessScope,
    # which keeps a private list of them and leaves Torch without parameters.
    assign, initialize = kind.assign, kind._initialize_with_initializer

    def leave_empty(variable, initializer):
        empty[id(variable)] = variable
        variable._value = None
        # Stands in for the value while Keras infers shapes.
        variable._initializer = keras.initializers.Zeros()
        if keras.config.backend() == "torch":
            _leave_empty_on_torch(variable, meta=stored(variable))

    def stored(variable):
        return mode != "none" and variable.path.endswith("/kernel")

    def fill(variable, value):
        if id(variable) not in empty:
            return assign(variable, value)
        value = _host_array(variable, value)
        if id(variable) not in samples and stored(variable):
            encoded[id(variable)] = quantize.encode(value, mode)
        elif id(variable) not in samples:
            _put(variable, value)
        samples.setdefault(id(variable), []).append(_sample(value))
        return value

    kind.assign, kind._initialize_with_initializer = fill, leave_empty
    try:
        model = make()
        _check(source, model, samples)
        # Of the weights as they were read, however they are stored.
        digest = hashlib.sha256()
        for v in model.variables:
            digest.update(f"{v.path} {tuple(v.shape)}".encode())
            digest.update(samples[id(v)][0])
        for dense in lora.layers(model) if encoded else ():
            values = encoded.pop(id(dense._kernel))
            quantize.attach(dense, values, mode)
    finally:
        kind.assign, kind._initialize_with_initializer = assign, initialize
    model.quantize_mode = mode
    return model, digest.hexdigest()


def _leave_empty_on_torch(variable, meta):
    """A module wants its parameters; this one's memory is untouched.

    Args:
        variable: has no value yet.
        meta: whether it never gets one, and so no memory.
    """
    if not meta:
        variable._initialize(ops.empty(variable._shape, dtype=variable._dtype))
        return
    import torch

    kind = getattr(torch, variable._dtype)
    value = torch.empty(variable._shape, dtype=kind, device="meta")
    variable._value = torch.nn.Parameter(value, requires_grad=False)


def _check(source, model, samples):
    counts = [(v.path, len(samples.get(id(v), ()))) for v in model.variables]
    wrong = [f"{path}: {n} times" for path, n in counts if n != 1]
    if wrong:
        raise config.UserError(
            f"--preset={source}: {len(wrong)} of {len(counts)} variables were "
            f"not loaded exactly once:\n"
            + "\n".join(wrong[:20])
            + "\nThe files do not hold this whole model. Fetch them again."
        )


def _host_array(variable, value):
    """`value` as a numpy array of the variable's dtype, checked."""
    if not isinstance(value, np.ndarray):
        value = ops.convert_to_numpy(value)
    if value.shape != tuple(variable.shape):
        raise ValueError(
            f"{variable.path} is {tuple(variable.shape)} in this model, but "
            f"{value.shape} in the file."
        )
    # Cast here: a device would hold both while it casts.
    return value.astype(variable._dtype, copy=False)


def _put(variable, value):
    """Gives a variable its first value, straight to where it stays."""
    if keras.config.backend() != "torch":
        variable._initialize(sharding.place(variable, value))
        variable._initializer = None
        return
    import torch

    # Torch takes bfloat16 from numpy only as bits.
    half = variable._dtype == "bfloat16"
    tensor = torch.from_numpy(value.view("int16") if half else value)
    with torch.no_grad():
        variable._value.copy_(tensor.view(torch.bfloat16) if half else tensor)


def _sample(value):
    """The bytes of up to 997 of an array's values, as float32."""
    step = max(1, math.prod(value.shape) // 997)
    return value.flat[::step].astype("float32").tobytes()
