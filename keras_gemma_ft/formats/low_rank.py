"""A LoRA adapter in memory, its scale, and its form in each file format.

A LoRA pair adds `s * A B` to a frozen kernel (Hu et al., arXiv 2106.09685).
Letters: D hidden_dim, N heads, H head_dim, F feed-forward width, r rank.

target              kernel     A "keras"  B "keras"  A "standard"  B "standard"
query, key, value   (N, D, H)  (N, D, r)  (r, H)     (D, r)        (r, N, H)
attention_output    (N, H, D)  (N, H, r)  (r, D)     the same
ffw_gating, _2      (D, F)     (D, r)     (r, F)     the same
ffw_linear          (F, D)     (F, r)     (r, D)     the same

"keras" is what KerasHub's `enable_lora` makes of an EinsumDense: A per head,
B shared by the heads. It equals a PEFT adapter of rank N*r.
"""

import dataclasses
import math

import numpy as np

from keras_gemma_ft.config import TARGETS

HEADED = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        style: "keras" or "standard"; see the module's table.
        rank: r of every pair.
        alpha: numerator of the scale.
        rslora: divide by sqrt(rank) instead of rank.
        dropout: rate on the adapters' input while it was trained.
        targets: Keras layer names, in the order of `config.TARGETS`.
        weights: {(layer, target): (A, B)}, float32 numpy arrays. A foreign
            file may lack some layers of a target: those are not adapted.
        base: name of the preset that it was trained on.
        init: of `config.Lora`; other than "default": what training changed,
            of twice its rank, made by `difference`.
        folded: whether the layers of a foreign file had different scales,
            which B now holds. The numbers are the file's, but a step of an
            optimizer on B would not be a step on the file's own B.
        doubts: sentences about the file that a user should be told.
    """

    style: str
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: tuple
    weights: dict
    base: str = ""
    init: str = "default"
    folded: bool = False
    doubts: tuple = ()


def scale(rank, alpha, rslora=False):
    """s of `y = x W + s x A B`: alpha/r, with rsLoRA alpha/sqrt(r).

    Sources: arXiv 2106.09685 section 4.1; arXiv 2312.03732 equation 8.
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


def pair_shapes(style, target, kernel, rank):
    """Shapes of A and B for a kernel's shape; see the module's table."""
    if style == "standard" and target in HEADED:
        heads, hidden, head = kernel
        return (hidden, rank), (rank, heads, head)
    return (*kernel[:-1], rank), (rank, kernel[-1])


def matrix(style, target, kernel):
    """A kernel as the matrix [rows, columns] that A B, flattened, adds to.

    Style "keras" stacks the heads of query, key and value, which share B:
    [N D, H]. Style "standard" puts them side by side: [D, N H].
    """
    if style == "standard" and target in HEADED:
        kernel = kernel.transpose(1, 0, 2)
        return kernel.reshape(len(kernel), -1)
    return kernel.reshape(-1, kernel.shape[-1])


def product(style, target, a, b):
    """A B with the kernel's shape; not scaled."""
    rank = len(b)
    flat = a.reshape(-1, rank) @ b.reshape(rank, -1)
    if style == "standard" and target in HEADED:
        return flat.reshape(len(a), *b.shape[1:]).transpose(1, 0, 2)
    return flat.reshape(*a.shape[:-1], -1)


def difference(adapter, start):
    """What training changed: s (A B - A0 B0) as an adapter of twice the rank.

    Its pairs are [A, A - A0] x [B - B0; B0]. [A, A0] x [B; -B0] is equal, but
    in 16 bits would lose a small difference of large products.

    Args:
        adapter: what is there now.
        start: an adapter of the same shapes, with A0 and B0.
    """
    weights = {}
    for key, (a, b) in adapter.weights.items():
        a0, b0 = start.weights[key]
        weights[key] = (
            np.concatenate([a, a - a0], -1),
            np.concatenate([b - b0, b0], 0),
        )
    rank = 2 * adapter.rank
    alpha = 2 * adapter.alpha
    if adapter.rslora:
        alpha = rank * scale(adapter.rank, adapter.alpha, True)
    return dataclasses.replace(
        adapter, rank=rank, alpha=alpha, rslora=False, weights=weights
    )


def to_peft(style, target, a, b):
    """One pair as torch Linear weights.

    Args:
        style, target: select the row of the module's table.
        a, b: arrays of its shapes, any float dtype.

    Returns:
        (lora_A [R, in], lora_B [out, R]); R = N*r for query, key, value of
        style "keras": A's heads stacked, B block diagonal; else R = r.
    """
    if style == "standard" or target not in HEADED:
        rank = a.shape[-1]
        return a.reshape(-1, rank).T, b.reshape(rank, -1).T
    heads, hidden, rank = a.shape
    head = b.shape[1]
    blocks = np.zeros((heads, head, heads, rank), b.dtype)
    blocks[np.arange(heads), :, np.arange(heads), :] = b.T
    lora_a = a.transpose(0, 2, 1).reshape(heads * rank, hidden)
    return lora_a, blocks.reshape(heads * head, heads * rank)


def from_peft(style, target, lora_a, lora_b, heads, head_dim):
    """The inverse of `to_peft`.

    Args:
        style, target: the row of the module's table that is wanted.
        lora_a, lora_b: `[R, in]` and `[out, R]`.
        heads: N of this target; read for attention targets only.
        head_dim: H; likewise.

    Returns:
        (A, B), float dtype as given.

    Raises:
        ValueError: the sizes do not divide, or style is "keras" and lora_B is
            not block diagonal with equal blocks.
    """
    rank = len(lora_a)
    if style == "standard" or target not in HEADED:
        a, b = lora_a.T, lora_b.T
        if target in HEADED:
            b = b.reshape(rank, heads, head_dim)
        if target == "attention_output":
            a = a.reshape(heads, head_dim, rank)
        return a, b
    rank //= heads
    a = lora_a.reshape(heads, rank, -1).transpose(0, 2, 1)
    b = lora_b.reshape(heads, head_dim, heads, rank)[0, :, 0, :].T
    if not np.array_equal(to_peft(style, target, a, b)[1], lora_b):
        raise ValueError(f"{target}: lora_B is not block diagonal")
    return a, b


def stock_rank(adapter):
    """Rank of the stock Keras adapter that equals this one.

    A "standard" query/key/value pair needs min(H, N*r): its B differs by
    head, where the stock B is shared. A stock file has one rank for all.
    """
    ranks = [
        min(b.shape[2], b.shape[1] * adapter.rank)
        for (_, target), (_, b) in adapter.weights.items()
        if adapter.style == "standard" and target in HEADED
    ]
    return max([adapter.rank, *ranks])


def to_stock(style, target, a, b, rank):
    """One pair as stock Keras makes them, at a rank that is large enough.

    A "standard" query/key/value pair either keeps A in block n of head n and
    stacks B's heads (rank N*r), or, where H is smaller, multiplies A by each
    head's B and takes B' = 1 (rank H). What is left of `rank` is zero.

    Args:
        style, target: the row of the module's table.
        a, b: arrays of its shapes, any float dtype.
        rank: of the result, at least `stock_rank`.

    Returns:
        (A', B') of style "keras" with A' B' = A B.
    """
    if style == "standard" and target in HEADED:
        r, heads, head = b.shape
        if heads * r > head:
            a = np.einsum("dr,rnh->ndh", a, b)
            b = np.eye(head, dtype=b.dtype)
        else:
            blocks = np.zeros((heads, len(a), heads, r), a.dtype)
            blocks[np.arange(heads), :, np.arange(heads), :] = a
            a = blocks.reshape(heads, len(a), heads * r)
            b = b.transpose(1, 0, 2).reshape(heads * r, head)
    extra = rank - len(b)
    assert extra >= 0, (target, rank, len(b))
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, extra)])
    return a, np.pad(b, [(0, extra), (0, 0)])


def ordered(targets):
    """Target names without repeats, in the order of `config.TARGETS`."""
    held = set(targets)
    return tuple(name for name in TARGETS if name in held)
