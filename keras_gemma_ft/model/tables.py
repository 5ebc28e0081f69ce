"""The token table, used twice: its rows as input, all of it by the head.

A table is a tensor [V, d], or, stored in 8 bits, a dict of tensors: `codes`
int8 [V, d] and `step` float32 [V, 1], a row being codes * step. No more than a
part of its words is ever dequantised at once.

Shapes: V words, d hidden, C tokens.
"""

from keras import ops

from keras_gemma_ft.model import kernels, sharding

# Numbers of a part: 32 MB in 16 bits, 7281 words of 2B.
_PART = 2**24


def of(backbone):
    """The table of a backbone, in its own dtype or stored."""
    layer = backbone.token_embedding
    if layer._embeddings is None:
        return {k: ops.convert_to_tensor(v) for k, v in layer.stored.items()}
    return ops.convert_to_tensor(layer.embeddings)


def head(backbone):
    """The matrix that the head multiplies by: the table, or its own [V, d]."""
    if not has_head(backbone):
        return of(backbone)
    return ops.convert_to_tensor(backbone.token_embedding.head)


def has_head(backbone):
    """Whether the head is a matrix of its own."""
    return getattr(backbone.token_embedding, "head", None) is not None


def add_head(backbone):
    """Gives a backbone a head of its own, frozen; returns its variable.

    KerasHub's Gemma has none. The token table's layer holds it, so that it is
    among the backbone's variables.
    """
    layer = backbone.token_embedding
    layer._tracker.unlock()
    layer.head = layer.add_weight(
        name="head", shape=layer.embeddings.shape, trainable=False
    )
    layer._tracker.lock()
    return layer.head


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
    if isinstance(table, dict):
        found = ops.cast(_some(table["codes"], first, size), "float32")
        found = found * _some(table["step"], first, size)
    else:
        found = _some(table, first, size)
    return ops.cast(found, dtype)


def _some(x, first, size):
    """Rows of a tensor; where they are all of them, the tensor itself."""
    if size == x.shape[0]:
        return x
    return ops.slice(x, (first, 0), (size, x.shape[1]))


def _parts(table, x):
    """Yields (first, last, rows [size, d]), one part after the other.

    In x's dtype, or in that in which x is multiplied here.
    """
    slow = kernels.slow(x)
    numbers, dtype = _numbers(table), "float32" if slow else x.dtype
    count, d = numbers.shape
    size = count
    # Words that are split over devices: each has its own part of them all.
    if (slow or isinstance(table, dict)) and not sharding.split():
        size = max(1, min(count, _PART // d))
    for first in range(0, count, size):
        last = min(first + size, count)
        yield first, last, part(table, first, last - first, dtype)


def times(h, table):
    """h [..., d] by every word: [..., V], in h's dtype."""
    found = [
        ops.cast(ops.matmul(ops.cast(h, rows.dtype), ops.transpose(rows)),
                 h.dtype)
        for _, _, rows in _parts(table, h)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else ops.concatenate(found, -1)


def back(dz, table):
    """dz [C, V] by the table: [C, d], in dz's dtype; summed in float32."""
    total = None
    for first, last, rows in _parts(table, dz):
        some = ops.matmul(ops.cast(dz[:, first:last], rows.dtype), rows)
        if last - first < words(table):
            some = ops.cast(some, "float32")
        total = some if total is None else total + some
    return ops.cast(total, dz.dtype)


def logits(hidden, table, cap):
    """Soft-capped float32 logits [..., V] of hidden [..., d]."""
    z = ops.cast(times(hidden, table), "float32")
    return kernels.soft_cap(z, cap)
