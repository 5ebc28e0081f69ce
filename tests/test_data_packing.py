"""Best-fit decreasing: against brute force, its bound, and the clock."""

import functools
import time

import numpy as np
import pytest

from keras_gemma_ft.data import packing


def naive(lengths, capacity):
    """Space left in each row by the quadratic algorithm, sorted."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in spaces if space >= length]
        if fits:
            spaces.remove(min(fits))
            spaces.append(min(fits) - length)
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


def optimum(lengths, capacity):
    """The least number of rows, by trying everything."""

    @functools.cache
    def place(left, spaces):
        if not left:
            return len(spaces)
        best = place(left[1:], tuple(sorted([*spaces, capacity - left[0]])))
        for i, space in enumerate(spaces):
            if space >= left[0]:
                rest = [*spaces[:i], space - left[0], *spaces[i + 1 :]]
                best = min(best, place(left[1:], tuple(sorted(rest))))
        return best

    return place(tuple(sorted(lengths, reverse=True)), ())


def check(rows, lengths, capacity):
    assert sorted(e for row in rows for e in row) == list(range(len(lengths)))
    assert all(sum(lengths[e] for e in row) <= capacity for row in rows)


@pytest.mark.parametrize("seed", range(30))
def test_against_brute_force(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 11, size=7).tolist()
    rows = packing.pack(lengths, 10, seed)
    check(rows, lengths, 10)
    spaces = sorted(10 - sum(lengths[e] for e in row) for row in rows)
    assert spaces == naive(lengths, 10)
    assert len(rows) <= 11 / 9 * optimum(lengths, 10) + 6 / 9


def test_known_packing():
    # 7 | 7, 4 apart | 3 fills the row of 7 | 2 and 1 go to the row of 4
    assert packing.pack([4, 7, 2, 3, 1], 10, 0) == [[1, 3], [0, 2, 4]]


def test_seed_decides_ties_alone():
    lengths = [3] * 8 + [5] * 8
    first, again = packing.pack(lengths, 8, 1), packing.pack(lengths, 8, 1)
    other = packing.pack(lengths, 8, 2)
    assert first == again != other
    check(other, lengths, 8)
    assert len(first) == len(other) == 8


def test_empty_and_wrong_lengths():
    assert packing.pack([], 8, 0) == []
    with pytest.raises(ValueError, match=r"2 lengths lie outside 1\.\.8"):
        packing.pack([9, 4, 0], 8, 0)


def test_a_hundred_thousand_are_quick():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 4097, size=100_000)
    start = time.perf_counter()
    rows = packing.pack(lengths, 4096, 0)
    assert time.perf_counter() - start < 5
    check(rows, lengths.tolist(), 4096)
    assert 1 - lengths.sum() / (len(rows) * 4096) < 0.01
