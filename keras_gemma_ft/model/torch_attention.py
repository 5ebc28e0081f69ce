"""Attention inside the compiled block of Torch: nothing of size T x T.

On a GPU FlexAttention (arXiv 2412.05496), one fused kernel with the soft cap as
a change of scores and causality, window and segments as a mask whose empty
blocks are skipped. Where that does not run, plain attention over blocks of
queries, whose scores the backward pass forms again.

Shapes as in `attention`: B batch, T tokens, n query heads, k key/value heads,
h head_dim.
"""

import dataclasses
import functools

from keras_gemma_ft import runtime
from keras_gemma_ft.model.attention import blocks

_MASKED = -1e30
# Bytes of shared memory a block from which on the options run, largest first.
# The 256-wide heads of 2B in 16 bits: a tile of 64 keys or values takes 32 KiB.
# An H100 or H200 has 227 KiB. On an H200, 2 x 4096, a layer's attention takes
# 0.80 ms forward and 2.87 backward with these options, by Torch's own choice
# 1.06 and 3.66. That choice is for the A100 (163 KiB) and larger; L4, A10G and
# RTX cards have 99 KiB, a T4 64.
_OPTIONS = (
    (220 * 1024, {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 2,
        "fwd_num_warps": 8,
        "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64, "bwd_num_stages": 2, "bwd_num_warps": 8,
    }),
    (160 * 1024, {}),
    (96 * 1024, {
        "fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 2,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32,
        "bwd_BLOCK_N2": 32, "bwd_num_stages": 1,
    }),
    (0, {
        "fwd_BLOCK_M": 16, "fwd_BLOCK_N": 16, "fwd_num_stages": 1,
        "bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 16, "bwd_BLOCK_M2": 16,
        "bwd_BLOCK_N2": 16, "bwd_num_stages": 1,
    }),
)  # fmt: skip
# FlexAttention's masks say for blocks of so many queries by so many keys
# whether they are needed.
_MASK_BLOCK = 128


def choose(backbone, dtype, cap):
    """The attention that runs here: `Flex` or `Tiles`; says which.

    Args:
        backbone: gives heads and head_dim.
        dtype: `torch.dtype` of q, k and v.
        cap: soft cap of the scores, or None.
    """
    import torch

    if not torch.cuda.is_available():
        return Tiles(cap)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    room = getattr(properties, "shared_memory_per_block_optin", 0)
    reasons = []
    for least, options in _OPTIONS:
        if room >= least:
            flex = Flex(cap, options)
            reason = _fails(flex, backbone, dtype)
            if reason is None:
                runtime.say(f"attention: FlexAttention, {options or 'as is'}")
                return flex
            reasons.append(reason)
    runtime.say(f"attention: blocks of queries; FlexAttention: {reasons[-1]}")
    return Tiles(cap)


def _fails(flex, backbone, dtype):
    """Why FlexAttention does not run here, both ways; None if it does."""
    import torch

    def tensor(heads):
        shape = (1, heads, 2 * _MASK_BLOCK, backbone.head_dim)
        x = torch.zeros(shape, dtype=dtype, device="cuda")
        return x.requires_grad_()

    q = tensor(backbone.num_query_heads)
    k, v = (tensor(backbone.num_key_value_heads) for _ in range(2))
    segments = torch.ones(1, q.shape[2], dtype=torch.int32, device="cuda")
    run = torch.compile(flex.attend, dynamic=False, fullgraph=True)
    try:
        with torch.enable_grad():
            look = flex.looks(segments, None)[False]
            run(q, k, v, look).sum().backward()
        torch.cuda.synchronize()
    # Whatever the compiler, Triton or the driver raises: it does not run.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:120]}"
    return None


@dataclasses.dataclass(frozen=True)
class Flex:
    """FlexAttention with the cap, on CUDA.

    Attributes:
        cap: soft cap of the scores, before the mask; None is none.
        options: `kernel_options` of flex_attention.
    """

    cap: float | None
    options: dict = dataclasses.field(default_factory=dict)

    def looks(self, segments, window):
        """{block.use_sliding_window_attention: `BlockMask`}.

        Args:
            segments: int [B, T].
            window: places a query looks back, itself included; None is all.
        """
        rows, t = segments.shape
        make = functools.partial(
            _masks(), B=rows, H=None, Q_LEN=t, KV_LEN=t,
            device=segments.device, BLOCK_SIZE=_MASK_BLOCK,
        )  # fmt: skip

        def near(b, h, q, k):
            return (
                (k <= q) & (q - k < window) & (segments[b, q] == segments[b, k])
            )

        def before(b, h, q, k):
            return (k <= q) & (segments[b, q] == segments[b, k])

        whole = make(before)
        # Where no window cuts, all blocks are one compiled function.
        cut = window is not None and window < t
        return {False: whole, True: make(near) if cut else whole}

    def attend(self, q, k, v, look):
        """[B, n, T, h] of q [B, n, T, h], scaled, and k, v [B, k, T, h]."""
        import torch
        from torch.nn.attention import flex_attention

        def capped(score, b, h, q, k):
            # tanh, which Triton takes 15 % longer for in all.
            share = torch.sigmoid(score * (2.0 / self.cap))
            return (2.0 * self.cap) * share - self.cap

        return flex_attention.flex_attention(
            q, k, v,
            score_mod=None if self.cap is None else capped,
            block_mask=look, scale=1.0, enable_gqa=True,
            kernel_options=dict(self.options) or None,
        )  # fmt: skip


@functools.cache
def _masks():
    """`create_block_mask`, compiled: op by op it would form [B, T, T]."""
    import torch
    from torch.nn.attention import flex_attention

    return torch.compile(flex_attention.create_block_mask, dynamic=False)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Plain attention, a block of queries at a time.

    Attributes:
        cap: as of `Flex`.
    """

    cap: float | None

    def looks(self, segments, window):
        """{block.use_sliding_window_attention: (segments, window)}."""
        cut = window is not None and window < segments.shape[1]
        return {
            False: (segments, None),
            True: (segments, window if cut else None),
        }

    def attend(self, q, k, v, look):
        """As `Flex.attend`; the scores are not for keeping."""
        import torch

        segments, window = look
        t = q.shape[2]
        size = t if t <= 2 * blocks.BLOCK else blocks.BLOCK
        # Tokens before heads, as the next product reads them.
        outs = []
        for first in range(0, t, size):
            low = 0 if window is None else max(0, first - window + 1)
            bounds = low // size * size, first, min(first + size, t)
            out = _tile(self.cap, q, k, v, segments, window, bounds)
            outs.append(out.transpose(1, 2))
        # The compiler would take a join of one out, and what is marked with it.
        out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
        return keep(out).transpose(1, 2)


def keep(x):
    """x, kept for the backward pass. The compiler makes no copy of it: what
    comes before is element-wise and writes here."""
    import torch

    # Copies that a change of layout needs have another memory format.
    return torch.clone(x, memory_format=torch.preserve_format)


def _tile(cap, q, k, v, segments, window, bounds):
    """[B, n, end - first, h]: what the queries from `first` to `end` get.

    Args:
        bounds: (first key, first query, end of both).
    """
    import torch

    low, first, end = bounds
    q, k, v = q[:, :, first:end], k[:, :, low:end], v[:, :, low:end]
    rows, n, t, h = q.shape
    heads, s = k.shape[1:3]
    z = q.reshape(rows, heads, -1, h) @ k.transpose(-1, -2)
    z = z.float().view(rows, heads, n // heads, t, s)
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    at = torch.arange(first, end, device=q.device)[:, None]
    to = torch.arange(low, end, device=q.device)
    mask = (segments[:, first:end, None] == segments[:, None, low:end]) & (
        to <= at
    )
    if window is not None:
        mask = mask & (at - to < window)
    z = torch.where(mask[:, None, None], z, _MASKED)
    p = torch.softmax(z, -1).to(v.dtype)
    out = p.view(rows, heads, -1, s) @ v
    return out.reshape(rows, n, t, h)
