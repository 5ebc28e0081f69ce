"""Counts, for each layer, how often numbers stopped being finite there.

One pass takes a micro-batch forward and backward. A pass that overflows counts
for one layer in each direction, the layer where it began: the layers behind
that one have their bad numbers from it. The device counts within the step, and
the host reads the counts when it logs, so that nothing waits.

A record is int32 [2, L]: passes that began to overflow in each of L layers, and
for how many passes in a row it has gone on, at the layer where it began.
Layers: the token table, the blocks, the final norm.
"""

import keras
import numpy as np
from keras import ops

from keras_gemma_ft.model import hosts

FORWARD, BACKWARD = "forward", "backward"
# What a loss scale may fall to. It starts at 2^15: this is 16 passes in a row.
LEAST_SCALE = 1.0


def layers(backbone):
    """Names of the layers that a record tells apart."""
    blocks = [block.name for block in backbone.transformer_layers]
    return [backbone.token_embedding.name, *blocks, backbone.layer_norm.name]


def record(names):
    """A variable for a record of `layers`."""
    return keras.Variable(
        np.zeros((2, len(names)), "int32"), trainable=False, dtype="int32",
        name="not_finite",
    )  # fmt: skip


def counted(kept, bad, direction):
    """The record after one more pass.

    Args:
        kept: int32 [2, L].
        bad: bool [L], layers where something is not finite.
        direction: FORWARD or BACKWARD.
    """
    bad = ops.cast(bad, "int32")
    before = ops.cumsum(bad)
    if direction == BACKWARD:
        before = ops.flip(ops.cumsum(ops.flip(bad)))
    began = bad * ops.cast(before == 1, "int32")
    row = kept[1]
    longer = row + ops.cast(row > 0, "int32")
    row = ops.where(ops.sum(row) > 0, longer, began) * ops.sum(began)
    return ops.stack([kept[0] + began, row])


def blocks(found):
    """bool [L] of `forward.hidden_states`' flags [blocks, B]."""
    bad = ops.logical_not(ops.all(found, axis=1))
    return ops.pad(bad, [[1, 1]])


def gradients(grads, columns, names):
    """bool [L]: which layers have a gradient that is not finite.

    Args:
        grads: of the trained variables, or None.
        columns: int, for each, of its layer; see `columns`.
        names: of the layers.
    """
    given = [(g, c) for g, c in zip(grads, columns) if g is not None]
    if keras.config.backend() == "torch":
        import torch

        # As many launches for all as for one.
        sums = torch.stack(torch._foreach_norm([g for g, _ in given]))
    else:
        sums = ops.stack(
            [ops.sum(ops.abs(ops.cast(g, "float32"))) for g, _ in given]
        )
    places = np.zeros((len(given), len(names)), "float32")
    places[np.arange(len(given)), [c for _, c in given]] = 1.0
    bad = ops.cast(ops.logical_not(ops.isfinite(sums)), "float32")
    return ops.matmul(bad, ops.convert_to_tensor(places)) > 0


def columns(variables, names):
    """Of each variable, the number of its layer in `names`."""
    found = []
    for variable in variables:
        parts = variable.path.split("/")
        found.append(next(i for i, n in enumerate(names) if n in parts))
    return found


class Record:
    """The records of both directions, read from the device, of all processes.

    Args:
        names: of the layers.
        forward, backward: the variables.
    """

    def __init__(self, names, forward, backward):
        self.names = names
        self.kept = {}
        for direction, variable in (FORWARD, forward), (BACKWARD, backward):
            kept = ops.convert_to_numpy(variable.value)
            if hosts.apart():
                kept = _joined(hosts.gather(kept.tolist()))
            self.kept[direction] = kept

    def counts(self):
        """{direction: {layer: passes that began to overflow there}}."""
        return {
            direction: {
                name: int(n) for name, n in zip(self.names, kept[0]) if n
            }
            for direction, kept in self.kept.items()
            if kept[0].any()
        }

    def first(self):
        """Where what is not finite now began, in words; "" is nowhere."""
        where = {
            d: (kept[1].max(), kept[1].argmax())
            for d, kept in self.kept.items()
        }
        (ahead, output), (back, gradient) = where[FORWARD], where[BACKWARD]
        if ahead and ahead >= back:
            return f"the output of {self.names[output]}"
        return f"the gradient of {self.names[gradient]}" if back else ""


def _joined(records):
    """One record of many: the counts summed, and the longest row of passes."""
    records = np.array(records, "int32")
    longest = records[:, 1].max(-1).argmax()
    return np.stack([records[:, 0].sum(0), records[longest, 1]])
