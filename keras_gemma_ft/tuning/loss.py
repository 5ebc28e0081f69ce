"""Soft-capped cross-entropy in chunks: [B, T, V] logits never exist.

z = cap tanh(h E' / cap), loss = logsumexp(z) - z[y]. With E frozen (LoRA) only
dh is wanted, d loss / dh = ((softmax(z) - onehot(y)) (1 - (z / cap)^2)) E, so
each chunk leaves its dh and drops its logits, the idea of Cut Cross-Entropy
(arXiv 2411.09009). With E trained, each chunk is recomputed instead.

Shapes: N = B * T tokens, C tokens of a chunk, d hidden, V words.
"""

import keras
from keras import ops

from keras_gemma_ft.model import forward

_CHUNK_BYTES = 128 * 2**20


def chunk_size(tokens, vocabulary_size, requested=0):
    """Tokens whose float32 logits exist at once: about 128 MB of them."""
    size = requested or max(1, _CHUNK_BYTES // (4 * vocabulary_size))
    return min(size, tokens)


def token_loss(hidden, table, y, *, cap=None, chunk=0, table_trained=False):
    """Cross-entropy of every token.

    Args:
        hidden: [B, T, d], any float dtype.
        table: [V, d], the tied embedding.
        y: int [B, T], the right words.
        cap: soft cap of the logits; None is none.
        chunk: tokens a chunk; 0 picks by memory.
        table_trained: whether a gradient for `table` is wanted too.

    Returns:
        float32 [B, T], in nats.
    """
    d = hidden.shape[-1]
    flat = ops.reshape(hidden, (-1, d))
    labels = ops.cast(ops.reshape(y, (-1,)), "int32")
    n, words = y.shape[0] * y.shape[1], table.shape[0]
    size = chunk_size(n, words, chunk)
    # Equal chunks, for one compiled body: the tail is padding, cut at the end.
    chunks = -(-n // size)
    extra = chunks * size - n
    if extra:
        flat = ops.pad(flat, [[0, extra], [0, 0]])
        labels = ops.pad(labels, [[0, extra]])
    flat = ops.reshape(flat, (chunks, size, d))
    labels = ops.reshape(labels, (chunks, size))
    run = _recomputed if table_trained else _frozen
    losses = ops.reshape(run(flat, table, labels, cap), (-1,))
    return ops.reshape(losses[:n], y.shape)


def _logits(h, table, cap):
    """(z, float32 [C, V]) of h [C, d]."""
    z = ops.matmul(h, ops.transpose(ops.cast(table, h.dtype)))
    return forward.soft_cap(ops.cast(z, "float32"), cap)


def _chunk_loss(h, table, labels, cap):
    """[C] losses of one chunk, and its (z, logsumexp [C, 1])."""
    z = _logits(h, table, cap)
    total = ops.logsumexp(z, axis=-1, keepdims=True)
    right = ops.take_along_axis(z, labels[:, None], axis=-1)
    return (total - right)[:, 0], z, total


def _recomputed(flat, table, labels, cap):
    """Losses [chunks, C]; the backward pass forms each chunk's z again."""
    table = ops.convert_to_tensor(table)

    def chunk(i):
        # The labels closed over: TensorFlow differentiates every argument.
        def run(h, table):
            return _chunk_loss(h, table, labels[i], cap)[0]

        many = flat.shape[0] > 1
        return (keras.remat(run) if many else run)(flat[i], table)

    return ops.stack([chunk(i) for i in range(flat.shape[0])])


def _frozen(flat, table, labels, cap):
    """Losses [chunks, C]; dh is formed in the forward pass of a chunk."""
    table = ops.stop_gradient(ops.convert_to_tensor(table))

    def loss_and_dh(pair):
        h, y = pair
        losses, z, total = _chunk_loss(h, table, y, cap)
        dz = ops.exp(z - total) - ops.one_hot(y, z.shape[-1], dtype="float32")
        if cap is not None:
            dz = dz * (1.0 - ops.square(z / cap))
        dz = ops.cast(dz, h.dtype)
        return losses, ops.matmul(dz, ops.cast(table, h.dtype))

    def over_chunks(flat):
        if flat.shape[0] == 1:
            losses, dh = loss_and_dh((flat[0], labels[0]))
            return losses[None], dh[None]
        return ops.map(loss_and_dh, (flat, labels))

    @ops.custom_gradient
    def run(flat):
        losses, dh = over_chunks(flat)

        def grad(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            return ops.cast(upstream, dh.dtype)[..., None] * dh

        return losses, grad

    return run(flat)
