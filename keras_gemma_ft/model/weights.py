"""Gives each weight its value once, as it is read, where it belongs.

Keras draws random numbers for every variable, whole on one device, before a
loader overwrites them. In `once` a variable has no value until its own comes,
and what is to be quantised has none ever: its codes come in its place.
"""

import contextlib
import hashlib
import math
import types

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.model import codes, lora, quantize, sharding


def once(source, make, mode="none", embedding="none", note=None):
    """A model that is loaded without being initialised.

    Args:
        source: where the model comes from, for the error.
        make: function that builds a model, assigns a host array to each of
            its variables, or a dict of what is stored, and returns it.
        mode: how the decoder's kernels are stored; see `quantize`.
        embedding: how the token table is.
        note: function of (path, array or dict) that is told of each.

    Returns:
        (model, sha256 over every variable's name, shape, and up to 997 of
        its values as they were read: hashing all 18 GB of 9B would take
        longer than loading). None where stored arrays were assigned.

    Raises:
        UserError: a variable that was not assigned exactly once. Keras before
            3.15.0 could skip variables of a sharded file in silence.
    """
    arrivals = _Arrivals(mode, embedding, note)
    assign = keras.Variable.assign

    def fill(variable, value):
        if id(variable) not in arrivals.empty:
            return assign(variable, value)
        return arrivals.take(variable, value)

    with _instead(arrivals.leave_empty, fill):
        model = make()
        _check(source, model, arrivals.counts)
        digest = _digest(model, arrivals.samples)
        for layer in (*lora.layers(model), model.token_embedding):
            arrivals.settle(layer)
        quantize.settle(model, mode, embedding)
    return model, digest


def never(make):
    """What `make` builds, on JAX; its variables have shapes and no values."""
    with _instead(_left_empty, keras.Variable.assign):
        return make()


@contextlib.contextmanager
def _instead(initialize, assign):
    """A block in which variables are initialised and assigned to otherwise.

    Keras's only public way to variables without values is StatelessScope, which
    keeps a private list of them and leaves Torch without parameters.
    """
    kind = keras.Variable
    before = kind.assign, kind._initialize_with_initializer
    kind.assign = assign
    kind._initialize_with_initializer = lambda v, initializer: initialize(v)
    try:
        yield
    finally:
        kind.assign, kind._initialize_with_initializer = before


def _left_empty(variable):
    variable._value = None
    # Stands in for the value while Keras infers shapes.
    variable._initializer = keras.initializers.Zeros()


class _Arrivals:
    """Variables that wait for their values, and what has come."""

    def __init__(self, mode, embedding, note):
        self.mode, self.embedding, self.note = mode, embedding, note
        # All by id: a variable is compared by its value.
        self.empty, self.counts, self.samples, self.stored = {}, {}, {}, {}

    def kinds(self, variable):
        """{name: (shape, dtype)} of what is stored in a variable's place."""
        end = variable.path.rpartition("/")[2]
        if end == "kernel" and self.mode != "none":
            return codes.stored_as(variable._shape, self.mode)
        if end == "embeddings" and self.embedding != "none":
            return codes.table_as(variable._shape)
        return None

    def leave_empty(self, variable):
        """A variable would draw its first value: it waits for it."""
        self.empty[id(variable)] = variable
        _left_empty(variable)
        if keras.config.backend() != "torch":
            return
        import torch

        # A module wants its parameters: this one's memory is untouched, and
        # one that never gets a value has none.
        if self.kinds(variable):
            kind = getattr(torch, variable._dtype)
            value = torch.empty(variable._shape, dtype=kind, device="meta")
            variable._value = torch.nn.Parameter(value, requires_grad=False)
        else:
            value = ops.empty(variable._shape, dtype=variable._dtype)
            variable._initialize(value)

    def take(self, variable, value):
        """A value has come for `variable`: an array, or what is stored."""
        key, kinds = id(variable), self.kinds(variable)
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.counts[key] > 1:
            return value
        if not isinstance(value, dict):
            value = _host_array(variable, value)
            self.samples[key] = _sample(value, variable._dtype)
            if kinds:
                value = self._encode(variable, value)
            else:
                # Here: a device would hold both while it casts.
                value = value.astype(variable._dtype, copy=False)
        if self.note:
            self.note(variable.path, value)
        if kinds:
            self.stored[key] = {
                name: _placed(variable, name, value[name]) for name in kinds
            }
        else:
            _put(variable, value)
        return value

    def _encode(self, variable, value):
        if variable.path.endswith("/kernel"):
            return codes.encode(value, self.mode)
        return codes.encode_table(value)

    def settle(self, layer):
        """Gives a layer what has come for it to be stored."""
        old = getattr(layer, quantize.own(layer))
        if id(old) not in self.stored:
            return
        tensors = self.stored.pop(id(old))
        quantize.attach(layer, self.kinds(old))
        for name, variable in layer.stored.items():
            variable._initialize(tensors.pop(name))
            variable._initializer = None


def _digest(model, samples):
    digest = hashlib.sha256()
    for v in model.variables:
        if id(v) not in samples:
            return None
        digest.update(f"{v.path} {tuple(v.shape)}".encode())
        digest.update(samples[id(v)])
    return digest.hexdigest()


def _check(source, model, counts):
    counts = [(v.path, counts.get(id(v), 0)) for v in model.variables]
    wrong = [f"{path}: {n} times" for path, n in counts if n != 1]
    if wrong:
        raise config.UserError(
            f"--preset={source}: {len(wrong)} of {len(counts)} variables were "
            f"not loaded exactly once:\n"
            + "\n".join(wrong[:20])
            + "\nThe files do not hold this whole model. Fetch them again."
        )


def _host_array(variable, value):
    """`value` as a numpy array, its shape checked."""
    if not isinstance(value, np.ndarray):
        value = ops.convert_to_numpy(value)
    if value.shape != tuple(variable.shape):
        raise ValueError(
            f"{variable.path} is {tuple(variable.shape)} in this model, but "
            f"{value.shape} in the file."
        )
    return value


def _placed(variable, name, value):
    """A stored array as a tensor, where its variable will want it."""
    if keras.config.backend() == "torch":
        return _torch(value).to(ops.empty(()).device)
    path = f"{variable.path.rpartition('/')[0]}/{name}"
    stand_in = types.SimpleNamespace(path=path, shape=value.shape)
    return sharding.place(stand_in, value)


def _put(variable, value):
    """Gives a variable its first value, straight to where it stays."""
    if keras.config.backend() != "torch":
        variable._initialize(sharding.place(variable, value))
        variable._initializer = None
        return
    import torch

    own, tensor = variable._value, _torch(value)
    flags = value.flags
    if own.device.type == "cpu" and flags.writeable and flags.c_contiguous:
        # What was read becomes the parameter: 2B's table is 1.2 GB.
        own.data = tensor
        return
    with torch.no_grad():
        own.copy_(tensor)


def _torch(value):
    """A numpy array as a Torch tensor on the host, of the same memory."""
    import torch

    # Torch takes bfloat16 from numpy only as bits.
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(value)


def _sample(value, dtype):
    """The bytes of up to 997 of an array's values in `dtype`, as float32."""
    step = max(1, math.prod(value.shape) // 997)
    return value.flat[::step].astype(dtype).astype("float32").tobytes()
