"""Soft-capped cross-entropy in chunks: [B, T, V] logits never exist.

z = cap tanh(h E' / cap), loss = logsumexp(z) - z[y]. If the table E is frozen,
as with LoRA, only dh is wanted: ((softmax(z) - onehot(y)) (1 - (z / cap)^2)) E.
So each chunk keeps its dh and drops its logits, which is the idea of Cut
Cross-Entropy (arXiv 2411.09009). If E is trained, the backward pass computes
each chunk again. Tokens of weight 0 are moved to the end of their row, and a
chunk that holds no others is skipped.

Shapes: B rows, T tokens, c tokens a row of a chunk, C = B * c, d hidden, V
words.
"""

import keras
from keras import ops

from keras_gemma_ft.model import kernels, sharding, tables
from keras_gemma_ft.tuning import chunks

# Fewer tokens take longer to read the table than to multiply by it.
_LEAST, _MOST = 256, 1024
# Compiled, a chunk has logits in 16 bits alone: twice as many tokens fit.
_COMPILED = 512


def chunk_size(
    tokens, vocabulary_size, requested=0, *, by_words=False, compiled=False
):
    """Tokens whose float32 logits exist at once: about 24 MB of them.

    Two to four arrays of that size live together; larger ones leave a CPU's
    cache. `by_words` takes up to 1024 tokens, and some words at a time.
    """
    size = requested
    if not size and by_words:
        size = _MOST
    if not size:
        least = _COMPILED if compiled else _LEAST
        size = max(least, chunks.BYTES // (4 * vocabulary_size))
    return min(size, tokens)


def token_loss(
    hidden,
    table,
    y,
    weight=None,
    *,
    cap=None,
    chunk=0,
    table_trained=False,
    training=True,
    compiled=False,
):
    """Cross-entropy of every token that has a weight.

    Args:
        hidden: [B, T, d], any float dtype.
        table: [V, d], the tied embedding, or stored as `tables` has it.
        y: int [B, T], the right words.
        weight: [B, T]; no work is done where it is 0. None is all ones.
        cap: soft cap of the logits; None is none.
        chunk: tokens a chunk; 0 picks by memory.
        table_trained: whether a gradient for `table` is wanted too.
        training: whether any gradient is wanted.
        compiled: on Torch, whether a chunk's element-wise work is compiled.

    Returns:
        float32 [B, T], in nats; 0 where the weight is 0 (not multiplied by
        the others).
    """
    rows, t = y.shape
    by_words = not table_trained and _by_words(hidden, cap)
    compiled = compiled and not by_words
    size = chunk_size(
        rows * t, tables.words(table), chunk, by_words=by_words,
        compiled=compiled,
    )  # fmt: skip
    # Chunks take the same columns of every row: a batch that is split over
    # devices stays split. Equal chunks, for one compiled body.
    columns = min(t, -(-size // rows))
    learned = ops.ones_like(y) if weight is None else weight != 0
    learned = ops.cast(learned, "int32")
    order = ops.argsort(1 - learned, axis=1)
    order = ops.cast(order, "int32")
    count = -(-t // columns)
    spread = ops.pad(order, [[0, 0], [0, count * columns - t]])
    most = ops.max(ops.sum(learned, 1))
    y = ops.cast(ops.take_along_axis(y, spread, axis=1), "int32")
    run = _recomputed
    if not table_trained:
        run = _frozen
    gradient = training and not table_trained
    one = chunks.Chunk(cap, columns, count, gradient, by_words, compiled)
    losses = run(one, hidden, table, y, spread, most)
    back = ops.cast(ops.argsort(order, axis=1), "int32")
    losses = ops.take_along_axis(losses, back, axis=1)
    return ops.where(learned > 0, losses, 0.0)


def _by_words(hidden, cap):
    """Whether the losses of a chunk are summed over blocks of words.

    In float32, which is what a CPU computes in: with 16 bits exp(z) E of the
    right word and E itself would each be rounded before they cancel. Not where
    words are split over devices: a block would be fetched from one of them.
    """
    if sharding.split():
        return False
    kind = keras.backend.standardize_dtype(hidden.dtype)
    if cap is None or cap > kernels.SAFE_CAP:
        return False
    # Where 16 bits are slow they are multiplied as float32.
    return kind == "float32" or kernels.slow(hidden)


def _over_chunks(one, most, run, like):
    """run(j) of every chunk that learns: its arrays [B, c, ...] joined.

    Args:
        one: `chunks.Chunk`.
        most: int tensor, the most tokens that a row learns.
        run: j -> arrays [B, c, ...].
        like: (shape, dtype) of those arrays.
    """
    if keras.config.backend() == "torch":
        used = max(1, -(-int(most) // one.columns))
        parts = [run(j) for j in range(used)]
        rest = [ops.zeros(*kind) for kind in like]
        parts += [rest] * (one.count - used)
        return [ops.concatenate(x, 1) for x in zip(*parts)]
    if one.count == 1:
        return run(0)

    def maybe(j):
        return ops.cond(
            j * one.columns < most,
            lambda: run(j),
            lambda: [ops.zeros(*kind) for kind in like],
        )

    parts = ops.map(maybe, ops.arange(one.count, dtype="int32"))
    return [_joined(x) for x in parts]


def _joined(x):
    """[chunks, B, c, ...] -> [B, chunks * c, ...]."""
    x = ops.moveaxis(x, 0, 1)
    return ops.reshape(x, (x.shape[0], -1, *x.shape[3:]))


def _recomputed(one, hidden, table, y, spread, most):
    """Losses [B, chunks * c]; the backward pass forms each chunk again."""

    def chunk(j):
        # The labels closed over: TensorFlow differentiates every argument.
        h, labels = one.inputs(j, hidden, y, spread)

        def losses(h, table):
            return one.losses(h, table, labels)

        run = keras.remat(losses) if one.count > 1 else losses
        return ops.reshape(run(h, table), (-1, one.columns))

    table = ops.convert_to_tensor(table)
    if keras.config.backend() == "jax" and one.count > 1:
        return _joined(ops.map(chunk, ops.arange(one.count)))
    return ops.concatenate([chunk(j) for j in range(one.count)], 1)


def _frozen(one, hidden, table, y, spread, most):
    """Losses [B, chunks * c]; dh is formed in a chunk's forward pass."""
    # A stored table is two tensors; each is an argument of its own.
    kind = keras.tree.map_structure(lambda x: 0, table)
    tensors = [
        ops.stop_gradient(ops.convert_to_tensor(x))
        for x in keras.tree.flatten(table)
    ]

    def arrays(hidden, y, spread, most, *tensors):
        table = keras.tree.pack_sequence_as(kind, tensors)
        shape = (y.shape[0], one.columns)
        like = [(shape, "float32")]
        if one.gradient:
            like.append(((*shape, hidden.shape[-1]), hidden.dtype))

        def run(j):
            h, labels = one.inputs(j, hidden, y, spread)
            if one.by_words:
                whole = ops.cast(h, "float32")
                losses, dh = chunks.in_blocks(one, whole, table, labels)
                dh = ops.cast(dh * chunks.lift(h), h.dtype)
            elif one.gradient:
                losses, dh = one.losses_and_dh(h, table, labels)
            else:
                losses = one.losses(h, table, labels)
            if not one.gradient:
                return [ops.reshape(losses, shape)]
            dh = ops.reshape(dh, (*shape, h.shape[-1]))
            dh = sharding.by_rows(dh)
            return [ops.reshape(losses, shape), dh]

        return _over_chunks(one, most, run, like)

    if not one.gradient:
        return arrays(hidden, y, spread, most, *tensors)[0]

    def forward(hidden, y, spread, most, *tensors):
        losses, dh = arrays(hidden, y, spread, most, *tensors)
        return losses, (dh, spread)

    def backward(kept, upstream):
        dh, spread = kept
        t = hidden.shape[1]
        back = ops.cast(ops.argsort(spread[:, :t], axis=1), "int32")
        # In float32: a loss scale may be more than float16 holds.
        upstream = ops.cast(upstream, "float32") * (1.0 / chunks.lift(dh))
        found = upstream[..., None] * ops.cast(dh, "float32")
        dh = ops.cast(found, dh.dtype)
        dh = ops.take_along_axis(dh, back[..., None], axis=1)
        return dh, *[None] * (3 + len(tensors))

    run = kernels.own_gradient(forward, backward)
    return run(hidden, y, spread, most, *tensors)
