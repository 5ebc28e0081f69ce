"""AdamW whose two moments are kept in 8 bits (arXiv 2110.02861).

A moment is stored in blocks of 256 numbers: each block's largest magnitude
in float32, and for each number the nearest code of the paper's dynamic tree.
A step decodes, moves as Keras's AdamW does, and encodes again: 2.03 bytes a
trained number instead of 8. Variables of fewer than 4096 numbers keep float32.

A tree of 8 bits has seven decades, 10^-6 to 1 of the block's largest. The
i-th, from below, is cut into `first` * 2^i bins, and a code is the middle of
one; `first` is 1 with a sign and 2 without. 0 and 1 are codes of their own.
"""

import math

import keras
import numpy as np
from keras import ops

BLOCK = 256
# Below, a variable's moments are small and its numbers often sensitive.
SMALL = 4096
_DECADES = 7
# Numbers that Torch, op by op, has decoded at once: 64 MiB in float32.
_PART = 2**24


def tree(signed):
    """The 256 codes' values, ascending: float32 numpy."""
    positive = []
    for i in range(_DECADES):
        bins = (1 if signed else 2) * 2**i
        middles = 0.1 + 0.9 * (np.arange(bins) + 0.5) / bins
        positive += list(10.0 ** (i - _DECADES + 1) * middles)
    negative = [-value for value in positive] if signed else []
    return np.array(sorted([*negative, 0.0, *positive, 1.0]), "float32")


def encode(x, signed):
    """Blocks as codes.

    Args:
        x: float32 tensor [..., 256].
        signed: whether it may be negative.

    Returns:
        (uint8 codes [..., 256], float32 largest magnitudes [...]). Without a
        sign the code of 0 is not given: a root of it would divide the first
        moment, in one step by up to 4000 learning rates (measured).
    """
    largest = ops.max(ops.abs(x), -1)
    unit = x / ops.maximum(largest, 1e-38)[..., None]
    if keras.config.backend() == "torch":
        values = tree(signed)
        middles = ops.convert_to_tensor((values[1:] + values[:-1]) / 2)
        code = ops.searchsorted(middles, unit)
    else:
        code = _nearest(unit, signed)
    if not signed:
        code = ops.maximum(code, 1)
    return ops.cast(code, "uint8"), largest


def decode(codes, largest, signed):
    """What `encode` stored, as float32 [..., 256]."""
    if keras.config.backend() == "torch":
        values = ops.convert_to_tensor(tree(signed))
        unit = ops.take(values, ops.cast(codes, "int32"))
    else:
        unit = _value(ops.cast(codes, "float32"), signed)
    return unit * largest[..., None]


# Without tables, for XLA: it fuses arithmetic, and a TPU gathers slowly.


def _decade(thresholds, x, first):
    """(bins, 10^6 / the decade's top) of x's decade, exact in float32."""
    bins, tens = first, 10.0 ** (_DECADES - 1)
    for i, threshold in enumerate(thresholds):
        above = ops.cast(x >= threshold, "float32")
        bins = bins + above * (first * 2.0**i)
        tens = tens - above * (9.0 * 10.0 ** (_DECADES - 2 - i))
    return bins, tens


def _nearest(unit, signed):
    """The codes nearest to `unit`, as float32."""
    first = 1.0 if signed else 2.0
    zero = 127.0 if signed else 0.0
    values = tree(signed)[int(zero) :].astype("float64")
    # Where the nearer of two codes changes from one decade to the next.
    starts = [int(first * (2**i - 1)) + 1 for i in range(_DECADES)]
    edges = [float(values[i - 1] + values[i]) / 2 for i in starts]
    x = ops.abs(unit)
    bins, tens = _decade(edges[1:], x, first)
    place = ops.floor((x * tens - 0.1) * (bins / 0.9))
    place = ops.clip(place, 0.0, bins - 1.0)
    code = ops.where(x < edges[0], 0.0, bins - first + 1.0 + place)
    last = len(values) - 1.0
    top = float(values[-1] + values[-2]) / 2
    if not signed:
        return ops.where(x >= top, last, code)
    # 1 is a code, -1 is none.
    return zero + ops.where(unit >= top, last, ops.sign(unit) * code)


def _value(code, signed):
    """The value of float32 codes."""
    first = 1.0 if signed else 2.0
    number = ops.abs(code - 127.0) if signed else code
    starts = [first * (2**i - 1) + 1 for i in range(1, _DECADES)]
    bins, tens = _decade(starts, number, first)
    place = number - (bins - first + 1.0)
    value = (0.1 + 0.9 * ((place + 0.5) / bins)) / tens
    last = first * (2**_DECADES - 1) + 1.0
    value = ops.where(number >= last, 1.0, value)
    value = ops.where(number < 0.5, 0.0, value)
    return ops.sign(code - 127.0) * value if signed else value


class AdamW8bit(keras.optimizers.Adam):
    """Keras's Adam, its decay decoupled, with moments in 8 bits."""

    def build(self, variables):
        if self.built:
            return
        # Not Adam's own, which makes both moments in float32.
        keras.optimizers.Optimizer.build(self, variables)
        self._momentums, self._velocities = (
            [self._slot(variable, name) for variable in variables]
            for name in ("momentum", "velocity")
        )

    def _slot(self, variable, name):
        """A float32 variable, or (codes, largest magnitude of each block)."""
        if not _is_large(variable):
            return self.add_variable_from_reference(variable, name=name)
        blocks = _blocks(variable.shape)
        # Blocks along the last axis lie as the variable does on a mesh.
        along = variable.shape[-1] % BLOCK == 0
        name = f"{variable.path.replace('/', '_')}_{name}"
        codes = self.add_variable(
            variable.shape if along else (*blocks, BLOCK),
            dtype="uint8",
            layout=getattr(variable, "_layout", None) if along else None,
            name=f"{name}_codes",
        )
        largest = self.add_variable(
            blocks, dtype="float32", name=f"{name}_largest"
        )
        return codes, largest

    def update_step(self, gradient, variable, learning_rate):
        """Moves one variable by its gradient."""
        if not _is_large(variable):
            return super().update_step(gradient, variable, learning_rate)
        index = self._get_variable_index(variable)
        slots = self._momentums[index], self._velocities[index]
        gradient = ops.cast(ops.convert_to_tensor(gradient), "float32")
        if keras.config.backend() == "torch":
            return self._move_parts(gradient, variable, slots, learning_rate)
        shape = (*_blocks(variable.shape), BLOCK)
        pairs = [(ops.reshape(codes, shape), top) for codes, top in slots]
        if variable.shape[-1] % BLOCK:
            gradient = _filled(ops.reshape(gradient, (-1,)))
        gradient = ops.reshape(gradient, shape)
        move, *moments = self._moved(gradient, *pairs, learning_rate)
        if variable.shape[-1] % BLOCK:
            move = ops.reshape(move, (-1,))[: math.prod(variable.shape)]
        move = ops.reshape(move, variable.shape)
        self.assign_sub(variable, ops.cast(move, variable.dtype))
        for slot, moment in zip(slots, moments):
            self.assign(slot[0], ops.reshape(moment[0], slot[0].shape))
            self.assign(slot[1], moment[1])

    def _moved(self, gradient, momentum, velocity, learning_rate):
        """(what to subtract, new momentum, new velocity) of blocks."""
        step = ops.cast(self.iterations + 1, "float32")
        rate = ops.cast(learning_rate, "float32")
        rate = rate * ops.sqrt(1.0 - ops.power(self.beta_2, step))
        rate = rate / (1.0 - ops.power(self.beta_1, step))
        m = decode(*momentum, True)
        m = m + (gradient - m) * (1.0 - self.beta_1)
        v = decode(*velocity, False)
        v = v + (ops.square(gradient) - v) * (1.0 - self.beta_2)
        move = m * rate / (ops.sqrt(v) + self.epsilon)
        return move, encode(m, True), encode(v, False)

    def _move_parts(self, gradient, variable, slots, learning_rate):
        """`update_step` on Torch: in place, a part of a variable at a time."""
        value, gradient = variable.value.view(-1), gradient.reshape(-1)
        pairs = [
            (codes.value.view(-1, BLOCK), top.value.view(-1))
            for codes, top in slots
        ]
        for begin in range(0, len(value), _PART):
            here = slice(begin, begin + _PART)
            rows = slice(begin // BLOCK, (begin + _PART) // BLOCK)
            part = _filled(gradient[here])
            held = [(codes[rows], top[rows]) for codes, top in pairs]
            move, *moments = self._moved(
                part.reshape(-1, BLOCK), *held, learning_rate
            )
            for old, new in zip(held, moments):
                old[0].copy_(new[0])
                old[1].copy_(new[1])
            value[here] -= move.reshape(-1)[: len(value[here])]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Keras's; on Torch, small variables move all at once."""
        step = super()._backend_update_step
        if keras.config.backend() != "torch":
            return step(grads, trainable_variables, learning_rate)
        import torch

        pairs = list(zip(grads, trainable_variables))
        with torch.no_grad():
            large = [pair for pair in pairs if _is_large(pair[1])]
            if large:
                step(*zip(*large), learning_rate)
            small = [pair for pair in pairs if not _is_large(pair[1])]
            if small:
                # Keras's fused form, which it keeps for its own class.
                fused = type(keras.optimizers.Adam())
                fused._parallel_update_step(self, *zip(*small), learning_rate)


def _is_large(variable):
    return math.prod(variable.shape) >= SMALL


def _blocks(shape):
    """The shape of a variable's blocks: along its last axis, or flat."""
    *rest, last = shape
    if last % BLOCK == 0:
        return (*rest, last // BLOCK)
    return (-(-math.prod(shape) // BLOCK),)


def _filled(flat):
    """A flat tensor, filled up with zeros to whole blocks."""
    return ops.pad(flat, [(0, -flat.shape[0] % BLOCK)])
