"""The losses of one chunk of tokens, and their gradient.

C tokens of a batch meet the whole table, [V, d]: their logits [C, V] exist
while the chunk is worked on and not after it. Shapes as in `loss.py`.
"""

import dataclasses
import functools

import keras
from keras import ops

from keras_gemma_ft.model import kernels, sharding, tables

BYTES = 24 * 2**20
# In float16 the share of one of 256,000 words could be rounded to 0 (below
# 6e-8), so dz and dh are kept 1024 times as large. That overflows only where
# the table has numbers above 32; Gemma 2's largest are 0.5 to 1.
_LIFT = 2.0**10


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What the chunks of a batch have in common.

    Attributes:
        cap: soft cap of the logits, or None.
        columns: c.
        count: chunks.
        gradient: whether dh is wanted beside the losses.
        by_words: whether the table is taken in blocks; see `in_blocks`.
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

    # tanh(z / cap) by a sigmoid, of which Triton has a short form.
    t = cap and 2.0 * torch.sigmoid(z.float() * (2.0 / cap)) - 1.0
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


def in_blocks(one, h, table, y):
    """float32 (losses [C], dh [C, d]), one pass over blocks of words.

    The soft cap keeps exp(z) below exp(cap), so that the sum of exp(z) and
    that of exp(z) (1 - tanh^2) E need no maximum and are divided at the end.
    A matmul rearranges the block it multiplies by: whole tables, chunk after
    chunk, would cost more than the products (V = 256,000, 64 tokens).
    """
    words, d = tables.words(table), h.shape[-1]
    # Neither the logits of a block nor its rows of the table take more.
    size = min(words, max(1, BYTES // (4 * max(h.shape[0], d))))
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
    """The sums of `in_blocks` with the words of `part` [W, d]."""
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
