"""Adapters -> one: their weighted sum, exactly, and a lower rank of it.

Nothing of a kernel's size is ever formed: a sum keeps the factors side by
side, and a rank is lowered through QR of both factors and an SVD of the small
matrix between them. Everything is computed in float64.

Letters: r rank, m and n rows and columns of `low_rank.matrix`.
"""

from typing import NamedTuple

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import low_rank


class Lost(NamedTuple):
    """What an adapter of lower rank lacks, as shares of Frobenius norms.

    Attributes:
        whole: |lost| / |all|, over all layers together.
        worst: the same of the layer that loses most; 0 where none loses.
        layer: its (layer, target); None where none loses.
    """

    whole: float
    worst: float
    layer: tuple | None


def weighted_sum(parts):
    """The adapter whose change of each kernel is sum(weight * s A B).

    Exact but for the rounding to float32: A side by side, weight * s * B
    below each other. The ranks add up; what a part lacks of the targets or
    layers of the others adds nothing.

    Args:
        parts: list of (`low_rank.Adapter`, weight), at least one.

    Returns:
        `low_rank.Adapter` with a scale of 1; of style "keras" if all are,
        else "standard", where an A per head makes the rank N r.

    Raises:
        UserError: the adapters are for models of different sizes, or a weight
            is not finite; every offence is listed.
    """
    _check(parts)
    style = common_style([adapter for adapter, _ in parts])
    weights = {}
    for key in _keys(parts):
        pairs = [
            _scaled(adapter, weight, key, style)
            for adapter, weight in parts
            if key in adapter.weights
        ]
        a = np.concatenate([a for a, _ in pairs], -1)
        weights[key] = a, np.concatenate([b for _, b in pairs], 0)
    rank = max(len(b) for _, b in weights.values())
    targets = [name for adapter, _ in parts for name in adapter.targets]
    bases = {adapter.base for adapter, _ in parts} - {""}
    return low_rank.Adapter(
        style=style,
        rank=rank,
        alpha=float(rank),
        rslora=False,
        dropout=0.0,
        targets=low_rank.ordered(targets),
        weights={key: _wide(pair, rank) for key, pair in weights.items()},
        base=bases.pop() if len(bases) == 1 else "",
    )


def truncated(adapter, rank):
    """The nearest adapter of a rank (Eckart and Young, 1936), and what is lost.

    Nearest in each layer, by the Frobenius norm of s A B as the matrix that
    the style makes of a kernel; "keras" keeps its B shared by the heads.

    Args:
        adapter: `low_rank.Adapter`.
        rank: of the result, at least 1. Above what there is, A and B are
            filled up with zeros and nothing is lost.

    Returns:
        (`low_rank.Adapter` with a scale of 1, `Lost`).
    """
    if rank < 1:
        raise UserError(f"an adapter's rank is 1 or more, got {rank}.")
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    weights, norms = {}, {}
    for key, (a, b) in adapter.weights.items():
        flat = np.asarray(a, "float64").reshape(-1, a.shape[-1])
        low = factor * np.asarray(b, "float64").reshape(len(b), -1)
        flat, low, lost, norm = _nearest(flat, low, rank)
        pair = (
            flat.reshape(*a.shape[:-1], -1),
            low.reshape(-1, *b.shape[1:]),
        )
        weights[key] = _wide(pair, rank)
        norms[key] = lost, norm
    made = low_rank.Adapter(
        style=adapter.style,
        rank=rank,
        alpha=float(rank),
        rslora=False,
        dropout=0.0,
        targets=adapter.targets,
        weights=weights,
        base=adapter.base,
    )
    return made, _lost(norms)


def padded(adapter, *, style, rank, factor):
    """The same adapter in another form, exactly but for rounding.

    Args:
        adapter: `low_rank.Adapter`.
        style: its own, or "standard".
        rank: of the result, at least `rank_in` that style.
        factor: the scale of the result; B takes what differs.

    Returns:
        {(layer, target): (A, B)}, float32.
    """
    return {
        key: _wide(_scaled(adapter, 1 / factor, key, style), rank)
        for key in adapter.weights
    }


def rank_in(adapter, style):
    """The rank that an adapter has in a style: N r where A is per head."""
    if style == adapter.style:
        return adapter.rank
    heads = [
        len(a)
        for (_, target), (a, _) in adapter.weights.items()
        if target in low_rank.HEADED
    ]
    return adapter.rank * max([1, *heads])


def common_style(adapters):
    """The style in which all of the adapters can be told."""
    styles = {adapter.style for adapter in adapters}
    return styles.pop() if len(styles) == 1 else "standard"


def _keys(parts):
    """The (layer, target) of all, those of a layer together."""
    return sorted({key for adapter, _ in parts for key in adapter.weights})


def _scaled(adapter, weight, key, style):
    """(A, weight * s * B) of one layer in a style, float64."""
    a, b = (np.asarray(part, "float64") for part in adapter.weights[key])
    b = b * weight * low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    target = key[1]
    if style == adapter.style or target not in low_rank.HEADED:
        return a, b
    heads, _, _ = a.shape
    lora_a, lora_b = low_rank.to_peft(adapter.style, target, a, b)
    return low_rank.from_peft(style, target, lora_a, lora_b, heads, b.shape[-1])


def _wide(pair, rank):
    """(A, B) filled up with zeros to a rank, as float32."""
    a, b = pair
    more = rank - len(b)
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
    b = np.pad(b, [(0, more)] + [(0, 0)] * (b.ndim - 1))
    return tuple(np.ascontiguousarray(part, "float32") for part in (a, b))


def _nearest(a, b, rank):
    """The best A B of a rank: (A, B, |what is lost|, |what there was|).

    With A = Q R and B^T = P S, the singular values of A B are those of the
    small R S^T, since Q and P are orthogonal.

    Args:
        a, b: float64 [m, r] and [r, n].
    """
    left, upper = np.linalg.qr(a)
    right, lower = np.linalg.qr(b.T)
    turn, values, other = np.linalg.svd(upper @ lower.T)
    kept = values[:rank]
    root = np.sqrt(kept)
    a = left @ (turn[:, : len(kept)] * root)
    b = (root[:, None] * other[: len(kept)]) @ right.T
    return a, b, np.linalg.norm(values[rank:]), np.linalg.norm(values)


def _lost(norms):
    """`Lost` of {key: (norm of what is lost, norm of what there was)}."""
    shares = {
        key: lost / norm if norm else 0.0 for key, (lost, norm) in norms.items()
    }
    lost, norm = np.linalg.norm([*norms.values()] or [[0.0, 0.0]], axis=0)
    whole = float(lost / norm) if norm else 0.0
    worst = max(shares, key=shares.get, default=None)
    if worst is None or not shares[worst]:
        return Lost(whole, 0.0, None)
    return Lost(whole, float(shares[worst]), worst)


def _check(parts):
    """Refuses weights that are no numbers, and adapters of other models."""
    if not parts:
        raise UserError("nothing to combine: name at least one adapter.")
    check_plain(adapter for adapter, _ in parts)
    wrong = [
        f"weight {weight} of adapter {number}: expected a finite number."
        for number, (_, weight) in enumerate(parts, 1)
        if not np.isfinite(weight)
    ]
    for key in _keys(parts):
        sizes = {
            number: _kernel(adapter.style, key[1], *adapter.weights[key])
            for number, (adapter, _) in enumerate(parts, 1)
            if key in adapter.weights
        }
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{s} in adapter {n}" for n, s in sizes.items())
            wrong.append(f"layer {key[0]} {key[1]}: the kernel is {told}.")
    if wrong:
        raise UserError(
            "These adapters cannot be added up:\n  " + "\n  ".join(wrong)
        )


def check_plain(adapters):
    """UserError if one of the adapters is more than LoRA: merged only."""
    for adapter in adapters:
        if not isinstance(adapter, low_rank.Adapter):
            raise UserError(
                f"an adapter for {adapter.base or 'its base'} holds "
                f"{', '.join(adapter.kinds)}, and can be merged into its base "
                f"only: export --adapter=FOLDER --format=merged_hf."
            )


def _kernel(style, target, a, b):
    """The shape of the kernel that a pair is for."""
    if style == "standard" and target in low_rank.HEADED:
        return b.shape[1], len(a), b.shape[2]
    return (*a.shape[:-1], b.shape[-1])
