"""Records -> batches. The order is a pure function of (seed, step).

A batch is Keras's `(x, y, sample_weight)`, for every objective:

    x["token_ids"]    int32   [B, T]
    x["segment_ids"]  int32   [B, T]  0 is padding; equal numbers attend
    x["positions"]    int32   [B, T]  restarts at 0 in each segment
    y                 int32   [B, T]  the next token of the same segment
    sample_weight     float32 [B, T]  0 where nothing is to be learned

B rows of T tokens: `sequence_length` where rows are packed, else the shortest
of a few lengths (`buckets`) that holds the micro-batch, over all hosts.
Normalisation is decided here: where the weights of an optimizer step of k
micro-batches sum to N over all hosts (its learned tokens, each of weight 1 but
where records say otherwise), they are multiplied by k / N. So the mean over its
micro-batches of sum(loss * sample_weight) is the weighted mean over its learned
tokens. A step that learns nothing has weight 0 throughout.
"""

import functools
import math

import numpy as np

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import buckets, cache, examples, packing, sources
from keras_gemma_ft.data.prepared import Prepared, Ragged

# Batches made ahead of the device.
AHEAD = 4


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
    spec = examples.spec(data, split)
    if spec is None:
        return None
    found = sources.find(spec, data)
    root = cache.folder(data.cache)
    arrays, facts, origin = cache.through(
        root and root / cache.key(found, data, tokenizer, split, seed),
        lambda: _make(found, data, tokenizer, split, seed),
        lambda: any(source.changed() for source in found),
    )
    lengths = arrays["lengths"]
    widths = np.array([data.sequence_length])
    if not data.pack:
        widths = buckets.choose(lengths, data.buckets, data.sequence_length)
    places = widths[np.searchsorted(widths, lengths)].sum()
    return Prepared(
        **arrays,
        buckets=widths,
        pad=tokenizer.pad,
        report={**facts, "padding": float(1 - lengths.sum() / places)},
        origin=origin,
    )


def _make(found, data, tokenizer, split, seed):
    """(arrays of `Prepared`, its report without the padding)."""
    built = examples.build(found, data, tokenizer, split, seed)
    ids = Ragged.join([e.token_ids for e in built.examples], "int32")
    learn = np.concatenate([e.learn for e in built.examples])
    # The first token of an example is no target, and learned by none.
    lengths = np.diff(ids.starts) - 1
    learned = np.add.reduceat(learn > 0, ids.starts[:-1], dtype="int64")
    weights = np.add.reduceat(learn, ids.starts[:-1], dtype="float64")
    rows = [[e] for e in range(len(lengths))]
    if data.pack:
        rows = packing.pack(lengths, data.sequence_length, seed)
    rows = Ragged.join(rows, "int64")
    prompts = Ragged.join([p.prompt_ids for p in built.prompts], "int32")
    answers = Ragged.join(
        [
            np.frombuffer(p.reference.encode("utf-8", "surrogatepass"), "uint8")
            for p in built.prompts
        ],
        "uint8",
    )
    arrays = {
        "token_ids": ids.flat,
        "learn": learn,
        "starts": ids.starts,
        "records": np.array(built.records, "int64"),
        "members": rows.flat,
        "row_starts": rows.starts,
        "lengths": np.add.reduceat(lengths[rows.flat], rows.starts[:-1]),
        "learned": np.add.reduceat(learned[rows.flat], rows.starts[:-1]),
        "weights": np.add.reduceat(weights[rows.flat], rows.starts[:-1]),
        "prompt_ids": prompts.flat,
        "prompt_starts": prompts.starts,
        "answers": answers.flat,
        "answer_starts": answers.starts,
    }
    return arrays, {**built.report, "rows": len(rows)}


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
        rows_then = -(-rows // hosts) * hosts
        cure = f"--data.micro_batch_size={rows_then}"
        if batch_size % rows_then:
            batch = -(-batch_size // rows_then) * rows_then
            cure += f" --data.batch_size={batch}"
        raise UserError(
            f"A micro-batch of {rows} rows does not divide over {hosts} "
            f"processes. Type {cure}."
        )
    return rows, batch_size // rows


def steps(prepared, batch_size, epochs=1):
    """Optimizer steps that see every row `epochs` times; at least 1."""
    return max(1, math.ceil(epochs * len(prepared.lengths) / batch_size))


@functools.lru_cache(maxsize=4)
def _epoch(prepared, size, seed, epoch):
    # Grain's own shuffle walks 2**16 places to order a small set: 2 ms a row
    # for 7 rows. A permutation per epoch is as pure and costs nothing.
    generator = np.random.default_rng([seed, epoch])
    count = len(prepared.lengths)
    order = generator.permutation(count)
    if len(prepared.buckets) == 1:
        return order
    groups = np.searchsorted(prepared.buckets, prepared.lengths[order])
    begun = -epoch * count % size
    return buckets.arrange(order, groups, size, begun, generator)


def rows_of_step(prepared, step, *, batch_size, micro_batch_size=0, seed):
    """The row numbers [batch_size] of optimizer step `step` (from 0).

    Rows come in epochs, each in a new order; a step may straddle two. Where
    there are several buckets, the rows of a micro-batch are of one, but where
    a bucket's rows end; which micro-batches make a step is left to chance.
    """
    size, _ = micro_batches(batch_size, micro_batch_size)
    count = len(prepared.lengths)
    first, last = step * batch_size, (step + 1) * batch_size
    return np.concatenate(
        [
            _epoch(prepared, size, seed, epoch)[
                max(0, first - epoch * count) : last - epoch * count
            ]
            for epoch in range(first // count, (last - 1) // count + 1)
        ]
    )


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
        [micro_batch_size / hosts, T], for `tuning.feed.Feed`.

    Raises:
        UserError: the sizes do not divide.
    """
    size, parts = micro_batches(batch_size, micro_batch_size, shard[1])

    def micro_batch(i):
        step, part = divmod(i, parts)
        rows = rows_of_step(
            prepared,
            step,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
        )
        scale = _scale(parts, prepared.weights[rows].sum())
        rows = rows[part * size : (part + 1) * size]
        x, y, weight = _share(prepared, rows, shard)
        return x, y, weight * scale

    first, last = start_step * parts, (start_step + steps) * parts
    return _dataset(first, last, micro_batch)


def eval_batches(prepared, *, batch_size, shard=(0, 1)):
    """All rows once; the last batch is filled with empty rows.

    In order, the rows of one bucket after those of the shorter ones. The
    weights make the mean over batches of sum(loss * sample_weight) the mean
    over all learned tokens. Arguments and result as in `train_batches`.
    """
    size, _ = micro_batches(batch_size, 0, shard[1])
    count = len(prepared.lengths)
    parts = -(-count // size)
    rows = np.full(parts * size, -1)
    groups = np.searchsorted(prepared.buckets, prepared.lengths)
    rows[:count] = np.argsort(groups, kind="stable")
    scale = _scale(parts, prepared.weights.sum())

    def batch(i):
        chosen = rows[i * size : (i + 1) * size]
        x, y, weight = _share(prepared, chosen, shard)
        return x, y, weight * scale

    return _dataset(0, parts, batch)


def _scale(parts, total):
    """What weights that sum to `total` are multiplied by; 0 stays 0."""
    return np.float32(parts / total if total else 0.0)


def _share(prepared, rows, shard):
    """A host's part of a micro-batch; its width is that of the whole."""
    host, hosts = shard
    size = len(rows) // hosts
    own = rows[host * size : (host + 1) * size]
    return prepared.batch(own, prepared.width(rows))


def _dataset(first, last, make):
    # grain imports jax, which only those who iterate should pay for.
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    batches = grain.MapDataset.range(first, last).map(make)
    return batches.to_iter_dataset(options)
