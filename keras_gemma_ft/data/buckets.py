"""Lengths of batches: a few, chosen from the rows' lengths.

A batch is as long as the shortest bucket that holds its longest row, and each
bucket is one more compilation of the training step.
"""

import numpy as np

# Lengths are multiples of STEP, or of more where that would be too many.
STEP, CANDIDATES = 32, 128
# A bucket that saves a smaller share of the places is not worth compiling.
WORTH = 0.02


def choose(lengths, most, limit):
    """The lengths that leave least padding; optimal, by dynamic programming.

    Args:
        lengths: int [R], tokens of each row, 1 <= length <= limit.
        most: how many lengths there may be; fewer where one more would save
            less than `WORTH` of the places.
        limit: the longest length there may be.

    Returns:
        int64 [K], increasing, K <= most; the last holds the longest row.
    """
    longest = int(np.max(lengths))
    step = STEP * -(-longest // (STEP * CANDIDATES))
    ends = np.arange(step, longest + step, step)
    ends[-1] = min(ends[-1], limit)
    # rows[j]: how many rows are no longer than the j-th end; 0 for none.
    rows = np.searchsorted(np.sort(lengths), [0, *ends], side="right")
    ends = np.array([0, *ends])
    # places[i, j]: of one bucket for all rows longer than ends[i], to ends[j].
    places = ((rows - rows[:, None]) * ends).astype("float64")
    places[np.tril_indices(len(ends), -1)] = np.inf
    cost, origins = places[0], []
    while len(origins) < most - 1:
        whole = cost[:, None] + places
        if whole[:, -1].min() > (1 - WORTH) * cost[-1]:
            break
        origins.append(whole.argmin(axis=0))
        cost = whole.min(axis=0)
    chosen = [len(ends) - 1]
    for origin in reversed(origins):
        chosen.append(origin[chosen[-1]])
    # An origin of 0 is no bucket.
    return np.unique(ends[chosen][np.array(chosen) > 0])


def arrange(order, groups, size, offset, generator):
    """Puts rows of one group beside each other in micro-batches.

    Args:
        order: int [R], every row once.
        groups: int [R], the bucket of each row of `order`.
        size: rows of a micro-batch.
        offset: how many rows come first to fill up a micro-batch that was
            begun before; below `size`.
        generator: `numpy.random.Generator`; decides the micro-batches' order.

    Returns:
        `order` rearranged. From `offset` on, each `size` rows are of one group
        but where a group ends: for K groups K - 1 micro-batches are mixed. The
        rows before, and what is left at the end, are of the last groups: they
        share a micro-batch with their like of the next epoch.
    """
    order = order[np.argsort(groups, kind="stable")]
    offset = min(offset, len(order))
    whole = (len(order) - offset) // size * size
    batches = generator.permutation(order[:whole].reshape(-1, size))
    rest = order[whole:]
    return np.concatenate([rest[:offset], batches.ravel(), rest[offset:]])
