"""Attention over blocks of queries: nothing of size T x T exists.

Keys that no query of a block can reach (later ones, those before the window, on
JAX and Torch other segments) are not read. The backward pass forms the
probabilities again from their logsumexp, the idea of FlashAttention (arXiv
2205.14135). The loops themselves are in `loops`. Shapes as in the package.
"""

from keras import ops

from keras_gemma_ft.model import kernels
from keras_gemma_ft.model.attention import loops

BLOCK = 512


def attend(q, k, v, segments, starts, cap, window):
    """Attention of T tokens to each other.

    Args:
        q, k, v, cap: as in `whole.attend`, for S = T.
        segments: int [B, T]; equal numbers stand side by side.
        starts: `reach(segments)`.
        window: see `scores.allowed`.

    Returns:
        [B, n, T, h]. Differentiable in q, k and v.
    """
    ahead, back = loops.pair()

    def forward(q, k, v, segments, starts):
        out, lse = ahead(q, k, v, segments, starts, BLOCK, cap, window)
        out, lse = kernels.keep(out), kernels.keep(lse)
        return out, (q, k, v, segments, starts, out, lse)

    def backward(kept, upstream):
        return *back(*kept, upstream, BLOCK, cap, window), None, None

    return kernels.own_gradient(forward, backward)(q, k, v, segments, starts)


def reach(segments):
    """int32 [blocks]: the first key that the queries of a block may need.

    That is where the segment of the block's first query begins, in whichever
    row it begins first.
    """
    t = segments.shape[1]
    places = ops.arange(t, dtype="int32")
    new = ops.not_equal(segments[:, 1:], segments[:, :-1])
    new = ops.pad(new, [[0, 0], [1, 0]])
    # A block's first query: the last beginning at or before it.
    firsts = ops.arange(0, t, BLOCK, dtype="int32")
    begun = ops.where(new, places, 0)[:, None, :]
    before = places[None, :] <= firsts[:, None]
    return ops.min(ops.max(ops.where(before[None], begun, 0), -1), 0)
