"""Soft-capped cross-entropy in chunks: [B, T, V] logits never exist.

z = cap tanh(h E' / cap), loss = logsumexp(z) - z[y]. With E frozen (LoRA) only
dh is wanted, d loss / dh = ((softmax(z) - onehot(y)) (1 - (z / cap)^2)) E, so
each chunk leaves its dh and drops its logits, the idea of Cut Cross-Entropy
(arXiv 2411.09009). With E trained, each chunk is recomputed instead. Tokens of
weight 0 go last in their row, and chunks that hold no other are skipped.

Shapes: B rows, T tokens, c tokens a row of a chunk, C = B * c, d hidden, V
words.
"""

import dataclasses

import keras
from keras import ops

from keras_gemma_ft.model import kernels

_CHUNK_BYTES, _LEAST = 24 * 2**20, 64


def chunk_size(tokens, vocabulary_size, requested=0):
    """Tokens whose float32 logits exist at once: about 24 MB of them.

    Two to four arrays of that size live together. Larger chunks leave a CPU's
    cache; fewer than 64 tokens take longer to read the table than to multiply
    by it.
    """
    size = requested or max(_LEAST, _CHUNK_BYTES // (4 * vocabulary_size))
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
):
    """Cross-entropy of every token that has a weight.

    Args:
        hidden: [B, T, d], any float dtype.
        table: [V, d], the tied embedding.
        y: int [B, T], the right words.
        weight: [B, T]; no work is done where it is 0. None is all ones.
        cap: soft cap of the logits; None is none.
        chunk: tokens a chunk; 0 picks by memory.
        table_trained: whether a gradient for `table` is wanted too.
        training: whether any gradient is wanted.

    Returns:
        float32 [B, T], in nats; 0 where the weight is 0 (not multiplied by
        the others).
    """
    rows, t = y.shape
    size = chunk_size(rows * t, table.shape[0], chunk)
    # Chunks take the same columns of every row: a batch that is split over
    # devices stays split. Equal chunks, for one compiled body.
    columns = min(t, -(-size // rows))
    learned = ops.ones_like(y) if weight is None else weight != 0
    learned = ops.cast(learned, "int32")
    order = ops.argsort(1 - learned, axis=1)
    order = ops.cast(order, "int32")
    chunks = -(-t // columns)
    spread = ops.pad(order, [[0, 0], [0, chunks * columns - t]])
    most = ops.max(ops.sum(learned, 1))
    y = ops.cast(ops.take_along_axis(y, spread, axis=1), "int32")
    run = _recomputed
    if not table_trained:
        run, table = _frozen, ops.stop_gradient(ops.convert_to_tensor(table))
    one = _Chunk(cap, columns, chunks, training and not table_trained)
    losses = run(one, hidden, table, y, spread, most)
    back = ops.cast(ops.argsort(order, axis=1), "int32")
    losses = ops.take_along_axis(losses, back, axis=1)
    return ops.where(learned > 0, losses, 0.0)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What the chunks of a batch have in common.

    Attributes:
        cap: soft cap of the logits, or None.
        columns: c.
        count: chunks.
        gradient: whether dh is wanted beside the losses.
    """

    cap: float | None
    columns: int
    count: int
    gradient: bool

    def inputs(self, j, hidden, y, spread):
        """Chunk j: (h [C, d], y [C])."""
        c = self.columns
        here = _columns(spread, j * c, c)
        h = ops.take_along_axis(hidden, here[..., None], axis=1)
        h = ops.reshape(h, (-1, hidden.shape[-1]))
        return h, ops.reshape(_columns(y, j * c, c), (-1,))

    def losses(self, h, table, y):
        """float32 [C]; differentiable in h and table."""
        z = _logits(h, table, self.cap)
        right = ops.take_along_axis(z, y[:, None], axis=-1)[:, 0]
        return ops.logsumexp(z, axis=-1) - right

    def losses_and_dh(self, h, table, y):
        """(float32 [C], [C, d]), not differentiable."""
        if keras.config.backend() == "torch" and self.cap is not None:
            return _in_place(h, table, y, self.cap)
        table = ops.cast(table, h.dtype)
        z = _logits(h, table, self.cap)
        total = ops.logsumexp(z, axis=-1, keepdims=True)
        right = ops.take_along_axis(z, y[:, None], axis=-1)
        dz = ops.exp(z - total) - ops.one_hot(y, z.shape[-1], dtype=z.dtype)
        if self.cap is not None:
            dz = dz * (1.0 - ops.square(z * (1.0 / self.cap)))
        dh = ops.matmul(ops.cast(dz, h.dtype), table)
        return (total - right)[:, 0], dh


def _columns(x, first, size):
    """x[:, first : first + size], where first may be a tensor."""
    return ops.slice(x, (0, first), (x.shape[0], size))


def _logits(h, table, cap):
    """z, float32 [C, V], of h [C, d]."""
    z = ops.matmul(h, ops.transpose(ops.cast(table, h.dtype)))
    return kernels.soft_cap(ops.cast(z, "float32"), cap)


def _in_place(h, table, y, cap):
    """`losses_and_dh` of Torch, in two buffers of [C, V].

    The soft cap keeps exp(z) below exp(cap): no maximum is subtracted.
    """
    import torch

    table = table.to(h.dtype)
    t = kernels.product(h, table.T).float().div_(cap).tanh_()
    e = (t * cap).exp_()
    total = e.sum(-1, keepdim=True)
    y = y.long()[:, None]
    losses = total.log() - cap * t.gather(-1, y)
    e.scatter_add_(-1, y, -total)
    torch.ops.aten.tanh_backward.grad_input(e, t, grad_input=e)
    dh = kernels.product(e.div_(total).to(h.dtype), table)
    return losses[:, 0], dh


def _over_chunks(one, most, run, like):
    """run(j) of every chunk that learns: its arrays [B, c, ...] joined.

    Args:
        one: `_Chunk`.
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

    def arrays(hidden, table, y, spread, most):
        shape = (y.shape[0], one.columns)
        like = [(shape, "float32")]
        if one.gradient:
            like.append(((*shape, hidden.shape[-1]), hidden.dtype))

        def run(j):
            h, labels = one.inputs(j, hidden, y, spread)
            if not one.gradient:
                return [ops.reshape(one.losses(h, table, labels), shape)]
            losses, dh = one.losses_and_dh(h, table, labels)
            dh = ops.reshape(dh, (*shape, h.shape[-1]))
            return [ops.reshape(losses, shape), dh]

        return _over_chunks(one, most, run, like)

    if not one.gradient:
        return arrays(hidden, table, y, spread, most)[0]

    def forward(hidden, table, y, spread, most):
        losses, dh = arrays(hidden, table, y, spread, most)
        return losses, (dh, spread)

    def backward(kept, upstream):
        dh, spread = kept
        t = hidden.shape[1]
        back = ops.cast(ops.argsort(spread[:, :t], axis=1), "int32")
        dh = ops.cast(upstream, dh.dtype)[..., None] * dh
        dh = ops.take_along_axis(dh, back[..., None], axis=1)
        return dh, None, None, None, None

    run = kernels.own_gradient(forward, backward)
    return run(hidden, table, y, spread, most)
