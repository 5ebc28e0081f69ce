"""Attention with all scores of a row at once.

The backward pass forms the probabilities again from their logsumexp. Shapes as
in the package.
"""

from keras_gemma_ft.model import kernels
from keras_gemma_ft.model.attention import scores


def attend(q, k, v, mask, cap):
    """Attention with a mask.

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


def looks(query_segments, key_segments, index, windows, cap):
    """{kind of block: function of (q, k, v)}, as the package's `looks`.

    Args:
        query_segments: int [B, T].
        key_segments: int [B, S].
        index: the place of the first query among the keys.
        windows, cap: as of the package's `looks`.
    """
    masks = {
        kind: scores.allowed(query_segments, key_segments, index, 0, window)
        for kind, window in windows.items()
    }
    return {
        kind: lambda q, k, v, mask=mask: attend(q, k, v, mask, cap)
        for kind, mask in masks.items()
    }
