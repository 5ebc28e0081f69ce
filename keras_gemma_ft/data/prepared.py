"""Tokenised examples in rows: the arrays that batches are cut from.

Arrays only, so that they can lie in a file and a large set makes no objects.
Letters: N tokens, E examples, R rows, P prompts; B rows of T tokens a batch.
"""

import collections.abc
import dataclasses
from typing import NamedTuple

import numpy as np


class Prompt(NamedTuple):
    """prompt_ids: int32 [n], ready to be completed; reference: the answer."""

    prompt_ids: np.ndarray
    reference: str


class Origin(NamedTuple):
    """How the arrays came about.

    Attributes:
        cached: whether they were read from the cache.
        seconds: how long it took, fingerprints of the sources included.
        note: what became of the cache, for the run's log; "" if as expected.
    """

    cached: bool
    seconds: float
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged(collections.abc.Sequence):
    """Arrays of different lengths: number i is flat[starts[i]:starts[i + 1]].

    Attributes:
        flat: [n].
        starts: int64 [count + 1], from 0 to n.
    """

    flat: np.ndarray
    starts: np.ndarray

    @classmethod
    def join(cls, arrays, dtype):
        """Puts a list of arrays end to end."""
        starts = np.zeros(len(arrays) + 1, "int64")
        np.cumsum([len(array) for array in arrays], out=starts[1:])
        flat = np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype)
        return cls(flat, starts)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.flat[self.starts[i] : self.starts[i + 1]]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts(collections.abc.Sequence):
    """`Prompt`s, made when asked for.

    Attributes:
        ids: `Ragged` of int32.
        answers: `Ragged` of uint8, in UTF-8.
    """

    ids: Ragged
    answers: Ragged

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        answer = self.answers[i].tobytes().decode("utf-8", "surrogatepass")
        return Prompt(self.ids[i], answer)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Tokenised examples and the rows they are packed into.

    Attributes:
        token_ids: int32 [N], the examples one after another.
        learn: float32 [N], how much each counts as a target; 0: not at all.
        starts: int64 [E + 1], where each example begins.
        records: int64 [E], the record each example is of, counted from 0 over
            all records read.
        members: int64 [E], the examples row after row.
        row_starts: int64 [R + 1], where each row begins in `members`.
        lengths: int64 [R], tokens of each row.
        learned: int64 [R], learned tokens of each row.
        weights: float64 [R], the sum of their weights.
        prompt_ids, prompt_starts: int32 and int64 [P + 1], see `prompts`.
        answers, answer_starts: uint8 and int64 [P + 1], see `prompts`.
        buckets: int64 [K], increasing: the lengths that batches may have.
        pad: the id that fills rows.
        report: dict for the run's log: sources, format, counts, rows, padding.
        origin: `Origin`.
    """

    token_ids: np.ndarray
    learn: np.ndarray
    starts: np.ndarray
    records: np.ndarray
    members: np.ndarray
    row_starts: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray
    weights: np.ndarray
    prompt_ids: np.ndarray
    prompt_starts: np.ndarray
    answers: np.ndarray
    answer_starts: np.ndarray
    buckets: np.ndarray
    pad: int
    report: dict
    origin: Origin

    @property
    def rows(self):
        """The example numbers of each row: `Ragged` of int64."""
        return Ragged(self.members, self.row_starts)

    @property
    def prompts(self):
        """`Prompts`, one per kept record; none for `text`."""
        return Prompts(
            Ragged(self.prompt_ids, self.prompt_starts),
            Ragged(self.answers, self.answer_starts),
        )

    def width(self, rows):
        """T of a batch of these rows: the shortest bucket that holds them.

        Args:
            rows: int [B] row numbers; -1 is an empty row.
        """
        rows = np.asarray(rows)
        longest = self.lengths[rows[rows >= 0]].max(initial=0)
        return int(self.buckets[np.searchsorted(self.buckets, longest)])

    def batch(self, rows, width=None):
        """Row numbers -> `(x, y, weight)`, weight float32, mostly 0 or 1.

        Args:
            rows: int [B] row numbers; -1 is an empty row.
            width: T; without it, that of `self.width(rows)`.
        """
        shape = (len(rows), width or self.width(rows))
        token_ids = np.full(shape, self.pad, "int32")
        y = np.full(shape, self.pad, "int32")
        segment_ids = np.zeros(shape, "int32")
        positions = np.zeros(shape, "int32")
        weight = np.zeros(shape, "float32")
        members = self.rows
        for b, row in enumerate(rows):
            at = 0
            for segment, e in enumerate(members[row] if row >= 0 else (), 1):
                start, stop = self.starts[e], self.starts[e + 1]
                n = stop - start - 1
                here = (b, slice(at, at + n))
                token_ids[here] = self.token_ids[start : stop - 1]
                y[here] = self.token_ids[start + 1 : stop]
                weight[here] = self.learn[start + 1 : stop]
                segment_ids[here] = segment
                positions[here] = np.arange(n)
                at += n
        x = {
            "token_ids": token_ids,
            "segment_ids": segment_ids,
            "positions": positions,
        }
        return x, y, weight

    def records_of(self, rows):
        """Row numbers -> the record numbers in each, for a log."""
        return [self.records[self.rows[r]].tolist() for r in rows]
