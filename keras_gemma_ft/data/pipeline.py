"""Records -> batches. The order is a pure function of (seed, step).

A batch is Keras's `(x, y, sample_weight)`, for every objective:

    x["token_ids"]    int32   [B, T]
    x["segment_ids"]  int32   [B, T]  0 is padding; equal numbers attend
    x["positions"]    int32   [B, T]  restarts at 0 in each segment
    y                 int32   [B, T]  the next token of the same segment
    sample_weight     float32 [B, T]  0 where nothing is to be learned

B rows of T tokens. Normalisation is decided here: an optimizer step of k
micro-batches holds N learned tokens over all hosts, and its weights are k / N,
so that the mean over its micro-batches of sum(loss * sample_weight) is the mean
over its learned tokens. A step that learns nothing has weight 0 throughout.
"""

import dataclasses
import functools
import math

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import examples, packing

# Batches made ahead of the device.
AHEAD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Tokenised examples and the rows they are packed into.

    Letters: N tokens and E examples in all, R rows of T.

    Attributes:
        token_ids: int32 [N], the examples one after another.
        learn: bool [N], which of them are targets.
        starts: int64 [E + 1], where each example begins.
        records: int64 [E], the record each example is of, counted from 0 over
            all records read.
        rows: R lists of example numbers.
        learned: int64 [R], learned tokens of each row.
        sequence_length: T.
        pad: the id that fills rows.
        prompts: list of `examples.Prompt`, one per kept record; none for
            `text`.
        report: dict for the run's log: sources, format, counts, rows, padding.
    """

    token_ids: np.ndarray
    learn: np.ndarray
    starts: np.ndarray
    records: np.ndarray
    rows: list
    learned: np.ndarray
    sequence_length: int
    pad: int
    prompts: list
    report: dict

    def batch(self, rows):
        """Row numbers -> `(x, y, weight)`, weight float32 0 or 1.

        Args:
            rows: [B] row numbers; -1 is an empty row.
        """
        shape = (len(rows), self.sequence_length)
        token_ids = np.full(shape, self.pad, "int32")
        y = np.full(shape, self.pad, "int32")
        segment_ids = np.zeros(shape, "int32")
        positions = np.zeros(shape, "int32")
        weight = np.zeros(shape, "float32")
        for b, row in enumerate(rows):
            at = 0
            for segment, e in enumerate(self.rows[row] if row >= 0 else (), 1):
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
        return [[int(self.records[e]) for e in self.rows[r]] for r in rows]


def prepare(data, tokenizer, split, seed):
    """Reads, renders, tokenises and packs one split.

    Args:
        data: `config.Data`.
        tokenizer: `tokens.Tokenizer`.
        split: "train" or "eval".
        seed: decides a held-out share and the packing.

    Returns:
        `Prepared`; None when `data.eval` names nothing to evaluate on.

    Raises:
        UserError: a setting, a source, a record or a template is wrong, or
            nothing is left to learn.
    """
    if data.sequence_length < 2:
        raise UserError(
            f"data.sequence_length={data.sequence_length}: a row needs at "
            "least 2 tokens. Type --data.sequence_length=512."
        )
    if seed < 0:
        raise UserError(f"seed={seed}: expected 0 or more. Type --seed=0.")
    micro_batches(data.batch_size, data.micro_batch_size)
    built = examples.build(data, tokenizer, split, seed)
    if built is None:
        return None
    lengths = np.array([len(e.token_ids) - 1 for e in built.examples])
    learned = np.array([e.learn[1:].sum() for e in built.examples])
    rows = [[e] for e in range(len(lengths))]
    if data.pack:
        rows = packing.pack(lengths, data.sequence_length, seed)
    padding = 1 - lengths.sum() / (len(rows) * data.sequence_length)
    return Prepared(
        token_ids=np.concatenate([e.token_ids for e in built.examples]),
        learn=np.concatenate([e.learn for e in built.examples]),
        starts=np.concatenate([[0], np.cumsum(lengths + 1)]),
        records=np.array(built.records),
        rows=rows,
        learned=np.array([learned[row].sum() for row in rows]),
        sequence_length=data.sequence_length,
        pad=tokenizer.pad,
        prompts=built.prompts,
        report={**built.report, "rows": len(rows), "padding": float(padding)},
    )


def micro_batches(batch_size, micro_batch_size, hosts=1):
    """`(rows of a micro-batch, micro-batches of a step)`.

    Raises:
        UserError: they do not divide; the message names sizes that do.
    """
    rows = micro_batch_size or batch_size
    if batch_size < 1 or rows < 1 or batch_size % rows:
        below = max(1, batch_size // max(rows, 1)) * max(rows, 1)
        raise UserError(
            f"data.batch_size={batch_size} is not a multiple of "
            f"data.micro_batch_size={micro_batch_size}. "
            f"Type --data.batch_size={below} --data.micro_batch_size={rows}."
        )
    if rows % hosts:
        raise UserError(
            f"A micro-batch of {rows} rows does not divide over {hosts} "
            f"hosts. Type --data.micro_batch_size={-(-rows // hosts) * hosts}."
        )
    return rows, batch_size // rows


def steps(prepared, batch_size, epochs=1):
    """Optimizer steps that see every row `epochs` times; at least 1."""
    return max(1, math.ceil(epochs * len(prepared.rows) / batch_size))


@functools.lru_cache(maxsize=4)
def _epoch(count, seed, epoch):
    # Grain's own shuffle walks 2**16 places to order a small set: 2 ms a row
    # for 7 rows. A permutation per epoch is as pure and costs nothing.
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_of_step(prepared, step, *, batch_size, seed):
    """The row numbers [batch_size] of optimizer step `step` (from 0).

    Rows come in epochs, each in a new order; a step may straddle two.
    """
    count = len(prepared.rows)
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    rows = np.concatenate([_epoch(count, seed, epoch) for epoch in epochs])
    offset = first - epochs[0] * count
    return rows[offset : offset + batch_size]


def train_batches(
    prepared,
    *,
    batch_size,
    micro_batch_size=0,
    seed,
    start_step=0,
    steps,
    shard=(0, 1),
):
    """The micro-batches of steps start_step .. start_step + steps - 1.

    Args:
        prepared: `Prepared`.
        batch_size: rows per optimizer step over all hosts.
        micro_batch_size: rows per micro-batch over all hosts; 0 is batch_size.
        seed: with the step, decides the rows.
        start_step: the first step, counted from 0 over the whole run.
        steps: how many optimizer steps.
        shard: `(host, hosts)`; each host gets a contiguous share of every
            micro-batch.

    Returns:
        A `grain.IterDataset` of `(x, y, sample_weight)`, each
        [micro_batch_size / hosts, T], for `keras.Model.fit`.

    Raises:
        UserError: the sizes do not divide.
    """
    host, hosts = shard
    size, parts = micro_batches(batch_size, micro_batch_size, hosts)

    def micro_batch(i):
        step, part = divmod(i, parts)
        rows = rows_of_step(prepared, step, batch_size=batch_size, seed=seed)
        total = prepared.learned[rows].sum()
        first = part * size + host * size // hosts
        x, y, weight = prepared.batch(rows[first : first + size // hosts])
        return x, y, weight * np.float32(parts / max(total, 1))

    first, last = start_step * parts, (start_step + steps) * parts
    return _dataset(first, last, micro_batch)


def eval_batches(prepared, *, batch_size, shard=(0, 1)):
    """All rows once, in order; the last batch is filled with empty rows.

    The weights make the mean over batches of sum(loss * sample_weight) the
    mean over all learned tokens. Arguments and result as in `train_batches`.
    """
    host, hosts = shard
    size, _ = micro_batches(batch_size, 0, hosts)
    count = len(prepared.rows)
    parts = -(-count // size)
    rows = np.full(parts * size, -1)
    rows[:count] = np.arange(count)
    total = prepared.learned.sum()

    def batch(i):
        first = i * size + host * size // hosts
        x, y, weight = prepared.batch(rows[first : first + size // hosts])
        return x, y, weight * np.float32(parts / max(total, 1))

    return _dataset(0, parts, batch)


def _dataset(first, last, make):
    # grain imports jax, which only those who iterate should pay for.
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    batches = grain.MapDataset.range(first, last).map(make)
    return batches.to_iter_dataset(options)


def proof(batch, tokenizer, *, marks=("⟦", "⟧")):
    """What the model is taught: the first example of a batch, in words.

    Args:
        batch: `(x, y, sample_weight)`.
        tokenizer: `tokens.Tokenizer`.
        marks: what stands before and after each learned part.

    Returns:
        Text of several lines.
    """
    x, y, weight = batch
    here = x["segment_ids"][0] == 1
    ids = [x["token_ids"][0][here][0], *y[0][here]]
    learned = [False, *(weight[0][here] > 0)]
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or learned[i] != learned[start]:
            run = tokenizer.decode(ids[start:i], skip_control=False)
            text += f"{marks[0]}{run}{marks[1]}" if learned[start] else run
            start = i
    ends = [w for i, w in zip(ids, learned) if i in _ends(tokenizer)]
    used = x["segment_ids"] > 0
    return (
        f"{text}\n"
        f"<bos> in it: {ids.count(tokenizer.bos)}; "
        f"ends of turn: {len(ends)}, learned: {sum(ends)}; "
        f"batch: {(weight > 0).sum() / max(used.sum(), 1):.1%} of the tokens "
        f"learned, {1 - used.mean():.1%} padding"
    )


def _ends(tokenizer):
    try:
        return tokenizer.end_of_turn, tokenizer.eos
    except UserError:
        return (tokenizer.eos,)
