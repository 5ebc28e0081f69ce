"""Causal, soft-capped, grouped attention within segments.

Up to `whole()` tokens the scores of a row exist at once. Beyond, queries come
in blocks and nothing of size T x T exists, forward or backward; keys that no
query of a block can reach (later ones, those before the window, on JAX and
Torch other segments) are not read. The backward pass forms the probabilities
again from their logsumexp, the idea of FlashAttention (arXiv 2205.14135).

Shapes: B batch, T queries, S keys, n query heads, k key/value heads, g = n/k,
h head_dim.
"""

from keras import ops

from keras_gemma_ft.model import kernels
from keras_gemma_ft.model.attention import blocks, fused, scores
from keras_gemma_ft.model.attention.scores import allowed  # noqa: F401

BLOCK = 512


def whole():
    """Tokens up to which a row is no faster, hardly smaller, as blocks.

    On a GPU one block: of two, a quarter of the work and half of the scores
    fall away, for a dozen kernels more.
    """
    return BLOCK if kernels.on_gpu() else 2 * BLOCK


def attend(q, k, v, mask, cap):
    """Attention with a mask, all scores at once.

    Args:
        q: [B, n, T, h], rotated and scaled.
        k: [B, k, S, h], rotated.
        v: [B, k, S, h].
        mask: boolean [B, 1, 1, T, S].
        cap: soft cap of the scores, before the mask; None is none.

    Returns:
        [B, n, T, h]. Differentiable in q, k and v.
    """

    def forward(q, k, v, mask):
        out, lse = map(kernels.keep, scores.weigh(q, k, v, mask, cap))
        return out, (q, k, v, mask, out, lse)

    def backward(kept, upstream):
        return *scores.gradients(*kept, upstream, cap), None

    return kernels.own_gradient(forward, backward)(q, k, v, mask)


def attend_in_blocks(q, k, v, segments, starts, cap, window):
    """Attention over blocks of queries: as `attend`, for S = T.

    Args:
        q, k, v, cap: as in `attend`.
        segments: int [B, T]; equal numbers stand side by side.
        starts: `reach(segments)`.
        window: see `allowed`.

    Returns:
        [B, n, T, h].
    """
    if fused.suits(q, k, v, cap):
        return fused.attend(q, k, v, segments, cap, window)
    ahead, back = blocks.loops()

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
