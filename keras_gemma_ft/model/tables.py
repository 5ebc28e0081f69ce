"""The token table: rows for the input, words for the head.

A table is a tensor or variable [V, d], or, stored in 8 bits, a dict: `codes`
int8 [V, d] and `step` float32 [V, 1], a row being codes * step. Stored, no
more than a part of its words is ever dequantised at once.

Shapes: V words, d hidden, C tokens.
"""

from keras import ops

from keras_gemma_ft.model import sharding

# Numbers of a part: 32 MB in 16 bits, 7281 words of 2B.
_PART = 2**24


def of(backbone):
    """The table of a backbone, in its own dtype or stored."""
    layer = backbone.token_embedding
    if layer._embeddings is None:
        return {k: ops.convert_to_tensor(v) for k, v in layer.stored.items()}
    return layer.embeddings


def trained(backbone):
    """Whether the table is trained."""
    own = backbone.token_embedding._embeddings
    return own is not None and own.trainable


def words(table):
    """V."""
    return _numbers(table).shape[0]


def _numbers(table):
    return table["codes"] if isinstance(table, dict) else table


def rows(table, ids):
    """The rows of `ids`: [..., d], float32 if the table is stored."""
    if not isinstance(table, dict):
        return ops.take(table, ids, axis=0)
    codes, step = (ops.take(table[k], ids, axis=0) for k in ("codes", "step"))
    return ops.cast(codes, "float32") * step


def part(table, first, size, dtype):
    """Rows [size, d] from `first` on, which may be a tensor, in `dtype`."""
    numbers = _numbers(table)
    found = ops.slice(numbers, (first, 0), (size, numbers.shape[1]))
    if isinstance(table, dict):
        step = ops.slice(table["step"], (first, 0), (size, 1))
        found = ops.cast(found, "float32") * step
    return ops.cast(found, dtype)


def _parts(table):
    """(first, size) of the parts that exist one after the other."""
    count, d = _numbers(table).shape
    # Words that are split over devices: each has its own part of them all.
    whole = not isinstance(table, dict) or sharding.split()
    size = count if whole else max(1, min(count, _PART // d))
    return [(i, min(size, count - i)) for i in range(0, count, size)]


def times(h, table):
    """h [..., d] by every word: [..., V], in h's dtype."""
    if not isinstance(table, dict):
        return ops.matmul(h, ops.transpose(ops.cast(table, h.dtype)))
    found = [
        ops.matmul(h, ops.transpose(part(table, *at, h.dtype)))
        for at in _parts(table)
    ]
    return found[0] if len(found) == 1 else ops.concatenate(found, -1)


def back(dz, table):
    """dz [C, V] by the table: [C, d], in dz's dtype; summed in float32."""
    if not isinstance(table, dict):
        return ops.matmul(dz, ops.cast(table, dz.dtype))
    total = 0.0
    for first, size in _parts(table):
        some = ops.matmul(
            dz[:, first : first + size], part(table, first, size, dz.dtype)
        )
        total = total + ops.cast(some, "float32")
    return ops.cast(total, dz.dtype)
