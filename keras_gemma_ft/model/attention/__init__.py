"""Causal, soft-capped, grouped attention within segments: which way it goes.

There are three strategies, with the same results and gradients of their own:

- `whole`: the scores of a row exist at once. For short rows, and to decode.
- `blocks`: queries come in blocks, and nothing of size T x T exists.
- `fused`: one kernel of an optional library, on a few GPUs.

`looks` chooses between them. Torch's compiled block has two strategies of its
own in `torch_attention`. Shapes: B batch, T queries, S keys, n query heads, k
key/value heads, h head_dim.
"""

from keras_gemma_ft.model import kernels
from keras_gemma_ft.model.attention import blocks, fused, whole


def longest():
    """Tokens up to which a row is no faster, hardly smaller, as blocks.

    On a GPU one block: of two, a quarter of the work and half of the scores
    fall away, for a dozen kernels more.
    """
    return blocks.BLOCK if kernels.on_gpu() else 2 * blocks.BLOCK


def looks(segment_ids, windows, cap):
    """How the tokens of rows look at each other.

    Args:
        segment_ids: int [B, T]; tokens attend within equal numbers.
        windows: {kind of block: window}; see `scores.allowed`.
        cap: of the scores; None is none.

    Returns:
        {kind of block: function of (q [B, n, T, h], rotated and scaled, k and
        v [B, k, T, h]) -> [B, n, T, h], differentiable in all three}.
    """
    if segment_ids.shape[1] <= longest():
        return whole.looks(segment_ids, segment_ids, 0, windows, cap)
    starts = blocks.reach(segment_ids)

    def looking(window):
        def look(q, k, v):
            if fused.suits(q, k, v, cap):
                return fused.attend(q, k, v, segment_ids, cap, window)
            return blocks.attend(q, k, v, segment_ids, starts, cap, window)

        return look

    return {kind: looking(window) for kind, window in windows.items()}
