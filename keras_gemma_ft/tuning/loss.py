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
import functools

import keras
from keras import ops

from keras_gemma_ft.model import kernels, sharding, tables

CHUNK_BYTES = 24 * 2**20
# Fewer tokens take longer to read the table than to multiply by it.
_LEAST, _MOST = 256, 1024
# Compiled, a chunk has logits in 16 bits alone: twice as many tokens fit.
_COMPILED = 512
# float16 rounds below 6e-5 and ends at 6e-8; one of 256,000 words may have a
# share of less. So dz and dh are kept 1024 times as large: dh is at most twice
# the largest number of the table (0.5 to 1 in Gemma 2), and 65,504 / 2048 is 32.
_LIFT = 2.0**10


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
        size = max(least, CHUNK_BYTES // (4 * vocabulary_size))
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
    chunks = -(-t // columns)
    spread = ops.pad(order, [[0, 0], [0, chunks * columns - t]])
    most = ops.max(ops.sum(learned, 1))
    y = ops.cast(ops.take_along_axis(y, spread, axis=1), "int32")
    run = _recomputed
    if not table_trained:
        run = _frozen
    gradient = training and not table_trained
    one = _Chunk(cap, columns, chunks, gradient, by_words, compiled)
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
        by_words: whether the table is taken in blocks; see `_in_blocks`.
        compiled: whether Torch's compiler fuses what is element-wise.
    """

    cap: float | None
    columns: int
    count: int
    gradient: bool
    by_words: bool
    compiled: bool = False

    def inputs(self, j, hidden, y, spread):
        """Chunk j: (h [C, d], y [C])."""
        c = self.columns
        here = _columns(spread, j * c, c)
        h = ops.take_along_axis(hidden, here[..., None], axis=1)
        # The table stays split by words: its devices see every row of a chunk.
        h = sharding.everywhere(ops.reshape(h, (-1, hidden.shape[-1])))
        return h, ops.reshape(_columns(y, j * c, c), (-1,))

    def losses(self, h, table, y):
        """float32 [C]; differentiable in h and table."""
        z = tables.logits(h, table, self.cap)
        right = ops.take_along_axis(z, y[:, None], axis=-1)[:, 0]
        return ops.logsumexp(z, axis=-1) - right

    def losses_and_dh(self, h, table, y):
        """(float32 [C], [C, d] times `lift`), not differentiable."""
        if self.compiled:
            z = tables.times(h, table)
            losses, dz = _compiled()(z, y, self.cap, lift(h))
            return losses, tables.back(dz, table)
        z = tables.logits(h, table, self.cap)
        total = ops.logsumexp(z, axis=-1, keepdims=True)
        right = ops.take_along_axis(z, y[:, None], axis=-1)
        dz = ops.exp(z - total) - ops.one_hot(y, z.shape[-1], dtype=z.dtype)
        if self.cap is not None:
            dz = dz * (1.0 - ops.square(z * (1.0 / self.cap)))
        dh = tables.back(ops.cast(dz * lift(h), h.dtype), table)
        return (total - right)[:, 0], dh


@functools.cache
def _compiled():
    import torch

    return torch.compile(losses_and_dz, dynamic=False, fullgraph=True)


def lift(h):
    """The factor by which gradients in h's dtype are kept: a power of two."""
    kind = keras.backend.standardize_dtype(h.dtype)
    return _LIFT if kind == "float16" else 1.0


def losses_and_dz(z, y, cap, factor):
    """Of Torch tensors: losses float32 [C], dz times factor as z [C, V].

    z [C, V] is not capped yet, y [C] the right words.
    """
    import torch

    t = None if cap is None else torch.tanh(z.float() * (1.0 / cap))
    z, kind = z.float() if cap is None else cap * t, z.dtype
    total = torch.logsumexp(z, -1, keepdim=True)
    right = z.gather(-1, y[:, None].long())
    word = torch.arange(z.shape[-1], device=z.device)
    dz = torch.exp(z - total) - (word == y[:, None]).float()
    if cap is not None:
        dz = dz * (1.0 - t * t)
    return (total - right)[:, 0], (dz * factor).to(kind)


def _columns(x, first, size):
    """x[:, first : first + size], where first may be a tensor."""
    return ops.slice(x, (0, first), (x.shape[0], size))


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


def _in_blocks(one, h, table, y):
    """float32 (losses [C], dh [C, d]), one pass over blocks of words.

    The soft cap keeps exp(z) below exp(cap), so that the sum of exp(z) and
    that of exp(z) (1 - tanh^2) E need no maximum and are divided at the end.
    A matmul rearranges the block it multiplies by: whole tables, chunk after
    chunk, would cost more than the products (V = 256,000, 64 tokens).
    """
    words, d = tables.words(table), h.shape[-1]
    # Neither the logits of a block nor its rows of the table take more.
    size = min(words, max(1, CHUNK_BYTES // (4 * max(h.shape[0], d))))
    blocks, rest = divmod(words, size)

    def add(first, size, sums):
        part = tables.part(table, first, size, h.dtype)
        return _add(h, part, one.cap, one.gradient, *sums)

    sums = ops.zeros((h.shape[0], 1)), ops.zeros(h.shape)
    if blocks == 1:
        sums = add(0, size, sums)
    else:
        sums = ops.fori_loop(
            0, blocks, lambda i, sums: add(i * size, size, sums), sums
        )
    if rest:
        sums = add(blocks * size, rest, sums)
    total, dh = sums
    right = ops.cast(tables.rows(table, y), h.dtype)
    t = kernels.capped(ops.sum(h * right, -1, keepdims=True), one.cap)
    dh = dh / total - (1.0 - t * t) * right
    return (ops.log(total) - one.cap * t)[:, 0], dh


def _add(h, part, cap, gradient, total, dh):
    """The sums of `_in_blocks` with the words of `part` [W, d]."""
    if keras.config.backend() == "torch":
        import torch

        t = kernels.product(h, part.T).mul_(1.0 / cap).tanh_()
        e = (t * cap).exp_()
        total = total + e.sum(-1, keepdim=True)
        if gradient:
            torch.ops.aten.tanh_backward.grad_input(e, t, grad_input=e)
            dh = dh + kernels.product(e, part)
        return total, dh
    t = kernels.capped(ops.matmul(h, ops.transpose(part)), cap)
    e = ops.exp(cap * t)
    total = total + ops.sum(e, -1, keepdims=True)
    if gradient:
        dh = dh + ops.matmul(e * (1.0 - t * t), part)
    return total, dh


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
                losses, dh = _in_blocks(one, whole, table, labels)
                dh = ops.cast(dh * lift(h), h.dtype)
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
        upstream = ops.cast(upstream, "float32") * (1.0 / lift(dh))
        found = upstream[..., None] * ops.cast(dh, "float32")
        dh = ops.cast(found, dh.dtype)
        dh = ops.take_along_axis(dh, back[..., None], axis=1)
        return dh, *[None] * (3 + len(tensors))

    run = kernels.own_gradient(forward, backward)
    return run(hidden, y, spread, most, *tensors)
