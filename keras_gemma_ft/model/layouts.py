"""How weights and rows are split over the devices of a mesh, by sizes alone.

A mesh BATCHxMODEL: rows of a batch are split over "batch"; weights over both,
so that 8x1 is fully sharded data parallelism and 1x8 tensor parallelism.
Adapters and norms are small and stay whole on every device.
"""

import math
import re

from keras_gemma_ft import config

BATCH, MODEL = "batch", "model"
_KINDS = {
    "adapters": r"/lora_kernel_",
    "embedding": r"token_embedding/",
    "norms": r"/scale$",
    "attention": r"/attention/",
    "feed-forward": r"/ffw_",
}


def layout(path, shape, mesh):
    """The axis name or None of every dimension of a variable.

    Args:
        path: the variable's path; its role is its layer's name.
        shape: of the variable.
        mesh: (batch, model) sizes.
    """
    size = dict(zip((BATCH, MODEL), mesh))
    wanted = [None] * len(shape)
    # A quantised kernel is codes and, a block of its last axis each, absmax.
    kernel = re.search(r"(\w+)/(?:kernel|codes|absmax)$", path)
    role = kernel[1] if kernel else ""
    # Stored in 8 bits: codes, and a step of each word.
    if re.search(r"token_embedding/(?:embeddings|head|codes|step)$", path):
        # Words over the axis that is there: fewest bytes moved at the head.
        wanted = [MODEL, BATCH] if size[MODEL] > 1 else [BATCH, None]
    elif role in ("query", "key", "value"):
        wanted = [MODEL, BATCH, None]
        if shape[0] % size[MODEL]:
            wanted = [None, MODEL, BATCH]
    elif role == "attention_output":
        wanted = [MODEL, None, BATCH]
    elif role in ("ffw_gating", "ffw_gating_2"):
        wanted = [BATCH, MODEL]
    elif role == "ffw_linear":
        wanted = [MODEL, BATCH]
    return [
        axis if axis and size[axis] > 1 and n % size[axis] == 0 else None
        for axis, n in zip(wanted, shape)
    ]


def bytes_per_device(items, mesh):
    """{kind: bytes} of what a device holds, kinds as in the printed line.

    Args:
        items: iterable of (path, shape, bytes of a number).
        mesh: (batch, model) sizes; (1, 1) where weights stay whole.
    """
    size = dict(zip((BATCH, MODEL), mesh))
    found = dict.fromkeys(_KINDS, 0)
    for path, shape, width in items:
        kinds = (k for k, part in _KINDS.items() if re.search(part, path))
        kind = next(kinds, "others")
        parts = math.prod(size[a] for a in layout(path, shape, mesh) if a)
        held = math.prod(shape) // parts * width
        found[kind] = found.get(kind, 0) + held
    return found


def share_of(process, held):
    """(index, parts) of a process.

    Args:
        process: its number.
        held: {process: set of the places on the batch axis it has devices in}.
    """
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    rows = sum(map(len, parts))
    if rows != len(set().union(*parts)) or len({*map(len, parts)}) > 1:
        raise config.UserError(
            f"--mesh: its {len(set().union(*parts))} parts of a batch "
            f"do not divide over {len(held)} processes. Use a mesh BATCHxMODEL "
            f"whose MODEL divides the devices of a process, or is a multiple."
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)
