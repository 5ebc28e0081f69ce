"""Lengths of batches and the rows in them, held against definitions."""

import itertools
import json

import numpy as np
import pytest
from test_data_pipeline import flat, settings, tokenizer  # noqa: F401

from keras_gemma_ft.data import buckets, pipeline

WORDS = "the quick brown fox jumps over lazy dog two plus is four".split()
SIZE, STEP, SEED = 4, 8, 3


def places(lengths, chosen):
    """Places of the rows, each as long as the first bucket that holds it."""
    return sum(min(b for b in chosen if b >= n) for n in lengths)


def best(lengths, count, ends):
    """Fewest places with `count` of `ends`, by trying all of them."""
    return min(
        places(lengths, [*some, ends[-1]])
        for some in itertools.combinations(ends[:-1], count - 1)
    )


@pytest.mark.parametrize("limit", [320, 300])
@pytest.mark.parametrize("most", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["flat", "short", "two heaps"])
def test_no_other_lengths_leave_less_padding(kind, most, limit):
    rng = np.random.default_rng(most)
    lengths = {
        "flat": rng.integers(1, 301, 90),
        "short": np.append(rng.geometric(0.02, 90).clip(1, 299), 300),
        "two heaps": np.append(rng.integers(40, 60, 45), [300] * 45),
    }[kind]
    ends = [*range(32, 300, 32), limit]
    found = buckets.choose(lengths, most, limit)
    assert np.all(np.diff(found) > 0) and set(found) <= set(ends)
    assert found[-1] == ends[-1] and 1 <= len(found) <= most
    got = places(lengths, found)
    assert got == best(lengths, len(found), ends)
    # Fewer than allowed only where one more would save less than 2 %.
    if len(found) < most:
        assert best(lengths, len(found) + 1, ends) > 0.98 * got
    for count in range(1, len(found)):
        assert best(lengths, count + 1, ends) <= 0.98 * best(
            lengths, count, ends
        )


def test_long_rows_have_few_candidates():
    lengths = np.random.default_rng(0).integers(1, 100_001, 2000)
    found = buckets.choose(lengths, 6, 131_072)
    assert len(found) == 6 and found[-1] >= lengths.max()
    # 128 candidates: multiples of 800.
    assert not (found % 800).any()
    assert buckets.choose([5], 6, 512).tolist() == [32]
    assert buckets.choose([5, 20], 6, 20).tolist() == [20]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """150 records: most of them short, some long."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(path, "w") as out:
        for i in range(150):
            count = int(rng.integers(1, 8) if i % 3 else rng.integers(20, 50))
            answer = " ".join(rng.choice(WORDS, count))
            record = {"prompt": f"{i}", "response": answer}
            print(json.dumps(record), file=out)
    return path


@pytest.fixture(scope="module")
def prepared(file, tokenizer):  # noqa: F811
    data = settings(file, pack=False, sequence_length=400)
    found = pipeline.prepare(data, tokenizer, "train", 0)
    assert len(found.buckets) >= 3
    return found


def order(prepared, steps, start=0, **sizes):
    """Row numbers of some steps, one after another."""
    sizes = {"batch_size": STEP, "micro_batch_size": SIZE} | sizes
    return np.concatenate(
        [
            pipeline.rows_of_step(prepared, step, seed=SEED, **sizes)
            for step in range(start, start + steps)
        ]
    )


def test_rows_are_as_long_as_their_examples(prepared):
    sizes = np.diff(prepared.starts) - 1
    assert prepared.lengths.tolist() == sizes.tolist()
    report, used = prepared.report, places(sizes, prepared.buckets)
    assert report["tokens"] == sizes.sum()
    assert report["padding"] == pytest.approx(1 - sizes.sum() / used)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_every_epoch_holds_every_row_once(prepared, size):
    count = len(prepared.lengths)
    batch = 2 * size
    rows = order(
        prepared, count, batch_size=batch, micro_batch_size=size
    ).reshape(-1, count)
    assert len(rows) == batch
    for epoch in rows:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in rows}) == batch
    # From anywhere: the same.
    later = order(
        prepared, 9, start=31, batch_size=batch, micro_batch_size=size
    )
    np.testing.assert_array_equal(later, rows.ravel()[31 * batch : 40 * batch])


def test_micro_batches_are_of_one_bucket(prepared):
    count = len(prepared.lengths)
    epochs = 8
    rows = order(prepared, epochs * count // STEP)
    group = np.searchsorted(prepared.buckets, prepared.lengths)[rows]
    group = group.reshape(-1, SIZE)
    mixed = (group.min(1) != group.max(1)).sum()
    # Of each epoch one where each bucket but the last ends.
    assert 0 < mixed <= epochs * (len(prepared.buckets) - 1)
    # Their order is left to chance: neighbours are not of one length.
    same = np.mean(group[1:, 0] == group[:-1, 0])
    share = np.bincount(group[:, 0]) / len(group)
    assert abs(same - (share**2).sum()) < 0.1
    # And so is who is in it: no two epochs pair the rows alike.
    pairs = rows.reshape(epochs, -1)[:2]
    first, second = (
        {frozenset(e[i : i + SIZE]) for i in range(0, 100, SIZE)} for e in pairs
    )
    assert len(first & second) < 3


def test_one_bucket_is_as_packed_rows(file, tokenizer):  # noqa: F811
    for kwargs in ({"buckets": 1}, {"pack": True}):
        data = settings(file, sequence_length=400, **{"pack": False, **kwargs})
        found = pipeline.prepare(data, tokenizer, "train", 0)
        assert len(found.buckets) == 1
        count = len(found.rows)
        want = np.random.default_rng([SEED, 0]).permutation(count)
        steps = count // STEP
        np.testing.assert_array_equal(order(found, steps), want[: steps * STEP])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batches_are_as_long_as_their_bucket(prepared, hosts):
    """And their weights make a step's loss its token mean."""
    parts, steps = STEP // SIZE, 12
    by_host = [
        list(
            pipeline.train_batches(
                prepared,
                batch_size=STEP,
                micro_batch_size=SIZE,
                seed=SEED,
                start_step=2,
                steps=steps,
                shard=(host, hosts),
            )
        )
        for host in range(hosts)
    ]
    rows = order(prepared, steps, start=2).reshape(steps, parts, SIZE)
    widths = set()
    for step in range(steps):
        total = prepared.learned[rows[step]].sum()
        losses = []
        for part in range(parts):
            chosen = rows[step, part]
            longest = prepared.lengths[chosen].max()
            width = min(b for b in prepared.buckets if b >= longest)
            shares = [host[step * parts + part] for host in by_host]
            shape = (SIZE // hosts, width)
            for x, y, weight in shares:
                arrays = (*x.values(), y, weight)
                assert {a.shape for a in arrays} == {shape}
            joined = np.concatenate([flat(s) for s in shares], axis=1)
            want = flat(prepared.batch(chosen, prepared.buckets[-1]))
            np.testing.assert_array_equal(joined[:-1], want[:-1, :, :width])
            assert not want[1, :, width:].any()
            np.testing.assert_allclose(
                joined[-1], want[-1, :, :width] * parts / total, rtol=1e-6
            )
            losses.append((np.sin(joined[-2]) * joined[-1]).sum())
            widths.add(width)
        _, y, learn = prepared.batch(rows[step].ravel())
        mean = (np.sin(y) * learn).sum() / learn.sum()
        np.testing.assert_allclose(np.mean(losses), mean, rtol=1e-5)
    assert len(widths) > 2 and widths <= set(prepared.buckets.tolist())


@pytest.mark.parametrize("size, hosts", [(4, 1), (4, 2), (7, 1)])
def test_held_out_batches_hold_every_row_once(prepared, size, hosts):
    count = len(prepared.lengths)
    _, y, learn = prepared.batch(range(count))
    want = (np.sin(y) * learn).sum() / learn.sum()
    seen, total, widths = [], 0.0, []
    by_host = [
        list(
            pipeline.eval_batches(
                prepared, batch_size=size, shard=(host, hosts)
            )
        )
        for host in range(hosts)
    ]
    for shares in zip(*by_host, strict=True):
        (width,) = {y.shape[1] for _, y, _ in shares}
        widths.append(width)
        for x, y, weight in shares:
            assert y.shape == (size // hosts, width)
            total += (np.sin(y) * weight).sum()
            for ids, segments in zip(x["token_ids"], x["segment_ids"]):
                if segments.any():
                    seen.append(tuple(ids[segments > 0]))
    examples = [
        tuple(prepared.token_ids[a : b - 1])
        for a, b in itertools.pairwise(prepared.starts)
    ]
    assert sorted(seen) == sorted(examples)
    np.testing.assert_allclose(total / len(widths), want, rtol=1e-5)
    assert widths == sorted(widths)
    assert len(set(widths)) > 2 and {*widths} <= {*prepared.buckets.tolist()}


def test_fewer_rows_than_a_micro_batch(tmp_path, tokenizer):  # noqa: F811
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "two", "response": "four"}\n'
        + '{{"prompt": "two", "response": "{}"}}\n'.format(" ".join(WORDS * 3))
    )
    data = settings(path, pack=False, sequence_length=200)
    found = pipeline.prepare(data, tokenizer, "train", 0)
    assert len(found.buckets) == 2
    rows = order(found, 4).reshape(-1, 2)
    for epoch in rows:
        assert sorted(epoch) == [0, 1]
