"""Examples -> rows of a fixed capacity: best-fit decreasing.

Padding is packing with one example a row. Best fit decreasing uses at most
11/9 OPT + 6/9 rows (Dosa 2007 for first fit; the same bound holds).
"""

import bisect

import numpy as np


def pack(lengths, capacity, seed):
    """Puts each example into the fullest row that still holds it.

    Args:
        lengths: length of each example, 1 <= length <= capacity.
        capacity: length of a row.
        seed: decides the order among examples of equal length.

    Returns:
        Rows, each a list of example numbers. O(n log(capacity)).

    Raises:
        ValueError: a length lies outside 1..capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = lengths[(lengths < 1) | (lengths > capacity)]
    if wrong.size:
        raise ValueError(
            f"{wrong.size} lengths lie outside 1..{capacity}: {wrong[:5]}"
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows, open_rows, spaces = [], {}, []  # space -> rows; sorted keys
    for example, length in zip(order.tolist(), lengths[order].tolist()):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(example)
        space -= length
        if space and space not in open_rows:
            bisect.insort(spaces, space)
        if space:
            open_rows.setdefault(space, []).append(row)
    return rows
