"""Rows, order and normalisation, recomputed here from the definitions."""

import json
import pathlib

import numpy as np
import pytest
from test_data_tokens import train_vocabulary

from keras_gemma_ft.config import Data, UserError
from keras_gemma_ft.data import pipeline, proof, templates, tokens

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
WORDS = "the quick brown fox jumps over lazy dog two plus is four".split()


def settings(train, **kwargs):
    kwargs = {"eval": "none", "sequence_length": 96, "batch_size": 4} | kwargs
    return Data(train=str(train), **kwargs)


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.Tokenizer(train_vocabulary())


@pytest.fixture
def records():
    generator = np.random.default_rng(0)

    def words(most):
        return " ".join(generator.choice(WORDS, generator.integers(1, most)))

    return [
        {"prompt": f"{i} {words(6)}", "response": words(12)} for i in range(50)
    ]


@pytest.fixture
def train(tmp_path, records):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids_and_learn(record, tokenizer):
    """One example, written out from the contract."""
    asked = tokenizer.encode(f"user\n{record['prompt']}")
    answer = tokenizer.encode(record["response"])
    newline = tokenizer.encode("\n")
    model = tokenizer.encode("model\n")
    ids = [2, 6, *asked, 7, *newline, 6, *model]
    learn = [0] * len(ids) + [1] * (len(answer) + 1) + [0] * len(newline)
    return [*ids, *answer, 7, *newline], learn


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_the_examples(train, records, tokenizer, pack):
    data = settings(train, pack=pack, buckets=1)
    prepared = pipeline.prepare(data, tokenizer, "train", 0)
    count = len(prepared.rows)
    assert count < 25 if pack else count == 50
    # One length: the longest row's, rounded up to a multiple of 32.
    longest = max(len(ids_and_learn(r, tokenizer)[0]) - 1 for r in records)
    width = 96 if pack else -(-longest // 32) * 32
    assert width == 96 or longest < 64
    x, y, weight = prepared.batch(range(count))
    assert {a.dtype.name for a in (*x.values(), y)} == {"int32"}
    assert {a.shape for a in (*x.values(), y, weight)} == {(count, width)}
    seen = []
    for r, numbers in enumerate(prepared.records_of(range(count))):
        segments = x["segment_ids"][r]
        for segment, number in enumerate(numbers, 1):
            here = segments == segment
            ids, learn = ids_and_learn(records[number], tokenizer)
            assert x["token_ids"][r][here].tolist() == ids[:-1]
            assert y[r][here].tolist() == ids[1:]
            assert weight[r][here].tolist() == learn[1:]
            places = np.arange(len(ids) - 1)
            assert x["positions"][r][here].tolist() == places.tolist()
        empty = segments == 0
        for array in (x["token_ids"], x["positions"], y, weight):
            assert not array[r][empty].any()
        assert segments.max() == len(numbers)
        seen += numbers
    assert sorted(seen) == list(range(50))
    used = (x["segment_ids"] > 0).sum()
    report = prepared.report
    assert report["tokens"] == used
    assert report["learned_tokens"] == weight.sum() == prepared.learned.sum()
    assert report["padding"] == pytest.approx(1 - used / weight.size)
    json.dumps(report)


def test_prompts(train, records, tokenizer):
    prepared = pipeline.prepare(settings(train), tokenizer, "train", 0)
    assert len(prepared.prompts) == 50
    for prompt, record in zip(prepared.prompts, records):
        segments = templates.prompt(record["prompt"])
        [asked] = tokens.encode([segments], tokenizer)
        np.testing.assert_array_equal(prompt.prompt_ids, asked.token_ids)
        assert prompt.reference == record["response"]


def test_reference_is_the_last_answer(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    turns = ["the fox", "the dog", "two?", "four <eos>"]
    chat = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, turns)
    ]
    path.write_text(json.dumps({"messages": chat}))
    prepared = pipeline.prepare(settings(path), tokenizer, "train", 0)
    [(prompt_ids, reference)] = prepared.prompts
    assert reference == "four <eos>"
    text = tokenizer.decode(prompt_ids, skip_control=False)
    assert text.endswith("two?<end_of_turn>\n<start_of_turn>model\n")
    assert text.count("<bos>") == 1


def batches(prepared, **kwargs):
    kwargs = {"batch_size": 4, "seed": 3, "steps": 12} | kwargs
    return list(pipeline.train_batches(prepared, **kwargs))


def flat(batch):
    x, y, weight = batch
    return np.stack([*x.values(), y, weight])


@pytest.fixture
def prepared(train, tokenizer):
    return pipeline.prepare(settings(train), tokenizer, "train", 0)


@pytest.mark.parametrize("start", [0, 1, 5, 11])
@pytest.mark.parametrize("micro", [0, 1, 2])
def test_resume_gives_the_same_batches(prepared, start, micro):
    whole = batches(prepared, micro_batch_size=micro)
    parts = 4 // (micro or 4)
    assert len(whole) == 12 * parts
    rest = batches(
        prepared, micro_batch_size=micro, start_step=start, steps=12 - start
    )
    assert len(rest) == (12 - start) * parts
    for a, b in zip(whole[start * parts :], rest):
        np.testing.assert_array_equal(flat(a), flat(b))


def test_iterating_twice_gives_the_same(prepared):
    dataset = pipeline.train_batches(prepared, batch_size=4, seed=3, steps=5)
    for a, b in zip(dataset, dataset, strict=True):
        np.testing.assert_array_equal(flat(a), flat(b))


def test_every_epoch_holds_every_row_once_in_a_new_order(prepared):
    count = len(prepared.rows)
    rows = np.concatenate(
        [
            pipeline.rows_of_step(prepared, step, batch_size=4, seed=3)
            for step in range(count)
        ]
    )
    epochs = rows.reshape(4, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = pipeline.rows_of_step(prepared, 0, batch_size=4, seed=4)
    assert other.tolist() != rows[:4].tolist()
    assert pipeline.steps(prepared, 4) == -(-count // 4)
    assert pipeline.steps(prepared, 4, 0.01) == 1


def test_no_record_is_skipped_or_replayed(prepared):
    count = len(prepared.rows)
    seen = []
    for step in range(count):  # `count` steps of 4 rows are 4 epochs.
        rows = pipeline.rows_of_step(prepared, step, batch_size=4, seed=3)
        seen += sum(prepared.records_of(rows), [])
    assert np.bincount(seen).tolist() == [4] * 50


@pytest.mark.parametrize(
    "micro, hosts", [(0, 1), (2, 1), (1, 1), (2, 2), (4, 4)]
)
def test_step_loss_is_its_token_mean(prepared, micro, hosts):
    size = micro or 4
    parts = 4 // size
    steps = 6
    by_host = [
        batches(prepared, micro_batch_size=micro, steps=steps, shard=(h, hosts))
        for h in range(hosts)
    ]
    for step in range(steps):
        rows = pipeline.rows_of_step(prepared, step, batch_size=4, seed=3)
        x, y, learn = prepared.batch(rows)
        loss = np.sin(y + 0.1 * x["positions"])  # Any function of a place.
        expected = (loss * learn).sum() / learn.sum()
        means, joined = [], []
        for part in range(step * parts, (step + 1) * parts):
            shares = [host[part] for host in by_host]
            assert {len(share[1]) for share in shares} == {size // hosts}
            x, y, weight = (
                {k: np.concatenate([s[0][k] for s in shares]) for k in x},
                np.concatenate([s[1] for s in shares]),
                np.concatenate([s[2] for s in shares]),
            )
            joined.append(x["token_ids"])
            means.append((np.sin(y + 0.1 * x["positions"]) * weight).sum())
        np.testing.assert_allclose(np.mean(means), expected, rtol=1e-5)
        np.testing.assert_array_equal(
            np.concatenate(joined), prepared.batch(rows)[0]["token_ids"]
        )


@pytest.mark.parametrize("batch_size, hosts", [(1, 1), (4, 1), (4, 2), (64, 1)])
def test_eval_loss_is_the_token_mean(prepared, batch_size, hosts):
    count = len(prepared.rows)
    _, y, learn = prepared.batch(range(count))
    expected = (np.sin(y) * learn).sum() / learn.sum()
    total, number = 0, 0
    for host in range(hosts):
        found = list(
            pipeline.eval_batches(
                prepared, batch_size=batch_size, shard=(host, hosts)
            )
        )
        total += sum((np.sin(y) * weight).sum() for _, y, weight in found)
        number = len(found)
        assert all(len(y) == batch_size // hosts for _, y, _ in found)
    assert number == -(-count // batch_size)
    np.testing.assert_allclose(total / number, expected, rtol=1e-5)


def test_eval_keeps_the_order_and_fills_up(prepared):
    found = list(pipeline.eval_batches(prepared, batch_size=7))
    x = np.concatenate([x["token_ids"] for x, _, _ in found])
    segments = np.concatenate([x["segment_ids"] for x, _, _ in found])
    count = len(prepared.rows)
    expected = prepared.batch(range(count))[0]
    np.testing.assert_array_equal(x[:count], expected["token_ids"])
    assert len(x) % 7 == 0 and not segments[count:].any()


def test_a_step_that_learns_nothing_has_no_nan(prepared):
    object.__setattr__(prepared, "learn", np.zeros_like(prepared.learn))
    object.__setattr__(prepared, "learned", np.zeros_like(prepared.learned))
    for _, _, weight in batches(prepared, micro_batch_size=2, steps=2):
        assert not weight.any()


def test_tiny_set_repeats(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "two", "response": "four"}\n')
    data = settings(path, batch_size=8)
    prepared = pipeline.prepare(data, tokenizer, "train", 0)
    [(x, _, weight)] = batches(prepared, batch_size=8, steps=1)
    assert (x["token_ids"] == x["token_ids"][0]).all()
    assert weight.sum() == pytest.approx(1)


def test_truncation_and_drops_are_reported(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [("hi", "ok"), ("hi", ""), ("hi", "fox " * 90), ("fox " * 90, "ok")]
    path.write_text(
        "\n".join(json.dumps({"prompt": p, "response": r}) for p, r in rows)
    )
    report = pipeline.prepare(settings(path), tokenizer, "train", 0).report
    assert (report["records"], report["kept"], report["truncated"]) == (4, 2, 1)
    assert report["dropped"] == {tokens.EMPTY: 1, tokens.TOO_LONG: 1}
    path.write_text('{"prompt": "hi", "response": ""}\n')
    with pytest.raises(UserError, match=f"none is left .* 1 x {tokens.EMPTY}"):
        pipeline.prepare(settings(path), tokenizer, "train", 0)
    path.write_text(json.dumps({"prompt": "fox " * 90, "response": "ok"}))
    with pytest.raises(UserError, match="try --data.sequence_length=") as told:
        pipeline.prepare(settings(path), tokenizer, "train", 0)
    longer = int(str(told.value).rpartition("=")[2].partition(",")[0])
    again = settings(path, sequence_length=longer)
    assert pipeline.prepare(again, tokenizer, "train", 0).report["kept"] == 1


def test_bad_records_share_one_budget(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "two", "response": "four"}\n'
    path.write_text(good + "{\n" + good + '{"prompt": "two"}\n')
    with pytest.raises(UserError) as caught:
        data = settings(path, bad_rows=1)
        pipeline.prepare(data, tokenizer, "train", 0)
    assert f"{path}, line 2: broken JSON" in str(caught.value)
    assert f"{path}, line 4: field 'response' is missing" in str(caught.value)
    data = settings(path, bad_rows=2)
    report = pipeline.prepare(data, tokenizer, "train", 0).report
    assert report["kept"] == 2 and len(report["skipped"]) == 2


def test_text_becomes_windows(tmp_path, tokenizer):
    text = " ".join(WORDS * 20)
    path = tmp_path / "a.txt"
    path.write_text(text)
    prepared = pipeline.prepare(settings(path), tokenizer, "train", 0)
    assert len(prepared.rows) > 3 and len(prepared.prompts) == 0
    parts = np.split(prepared.token_ids, prepared.starts[1:-1])
    assert all(part[0] == tokenizer.bos for part in parts)
    ids = np.concatenate([part[1:] for part in parts])
    assert ids[-1] == tokenizer.eos and tokenizer.decode(ids) == text
    assert prepared.learn.sum() == len(ids)


@pytest.mark.parametrize("share, held", [("20%", 10), (" 5 % ", 2)])
def test_held_out_share(train, records, tokenizer, share, held):
    data = settings(train, eval=share)
    parts = {
        split: pipeline.prepare(data, tokenizer, split, 1)
        for split in ("train", "eval")
    }
    numbers = {split: set(p.records.tolist()) for split, p in parts.items()}
    assert len(numbers["eval"]) == held
    assert not numbers["eval"] & numbers["train"]
    assert numbers["eval"] | numbers["train"] == set(range(50))
    again = pipeline.prepare(data, tokenizer, "eval", 1)
    assert set(again.records.tolist()) == numbers["eval"]
    for prompt, number in zip(parts["eval"].prompts, sorted(numbers["eval"])):
        assert prompt.reference == records[number]["response"]


def test_eval_spec(train, tokenizer):
    def held_out(**kwargs):
        data = settings(train, **kwargs)
        return pipeline.prepare(data, tokenizer, "eval", 0)

    assert held_out(eval="none") is None and held_out(eval="auto") is None
    assert held_out(eval=str(train)).report["records"] == 50
    with pytest.raises(UserError, match="hold 0 out"):
        held_out(eval="0.1%")


def test_wrong_sizes(train, tokenizer):
    for kwargs, cure in [
        ({"sequence_length": 1}, "--data.sequence_length=512"),
        (
            {"batch_size": 10, "micro_batch_size": 4},
            "--data.batch_size=8 --data.micro_batch_size=4",
        ),
    ]:
        with pytest.raises(UserError, match=cure):
            pipeline.prepare(settings(train, **kwargs), tokenizer, "train", 0)
    with pytest.raises(UserError, match="Type --seed=0"):
        pipeline.prepare(settings(train), tokenizer, "train", -1)
    with pytest.raises(UserError, match="--data.micro_batch_size=9"):
        pipeline.micro_batches(8, 0, hosts=3)


def test_proof(train, records, tokenizer):
    prepared = pipeline.prepare(
        settings(train, pack=False), tokenizer, "train", 0
    )
    x, y, weight = prepared.batch([0, 1])
    text = proof.proof((x, y, weight), tokenizer)
    first = records[0]
    assert text.startswith(
        f"<bos><start_of_turn>user\n{first['prompt']}<end_of_turn>\n"
        f"<start_of_turn>model\n⟦{first['response']}<end_of_turn>⟧\n"
    )
    assert (
        "<bos>: 1; <end_of_turn>: 2, 1 learned; <eos>: 0, 0 learned; "
        "names of control tokens typed as text: 0; batch: "
    ) in text
    used = x["segment_ids"] > 0
    assert f"{(weight > 0).sum() / used.sum():.1%} of the tokens" in text
    assert f"{1 - used.mean():.1%} padding" in text


@pytest.mark.parametrize(
    "name, kwargs, kept",
    [
        ("rasbt_instruct/instruction-data.json", {}, 1100),
        ("korean_chatbot/ChatbotData.csv", {"ignore": "label"}, 11823),
        (
            "gemma_cookbook/emoji_translation.csv",
            {"prompt_field": "text", "response_field": "emoji"},
            2529,
        ),
    ],
)
def test_real_data(tokenizer, name, kwargs, kept):
    if not (SHARED / name).parent.exists():
        pytest.skip("shared data is absent")
    data = settings(SHARED / name, sequence_length=512, **kwargs)
    prepared = pipeline.prepare(data, tokenizer, "train", 0)
    assert prepared.report["kept"] == prepared.report["records"] == kept
    assert prepared.report["padding"] < 0.05
    starts = prepared.token_ids[prepared.starts[:-1]]
    assert (starts == tokenizer.bos).all()
    assert (prepared.token_ids == tokenizer.bos).sum() == kept
    ends = prepared.token_ids == tokenizer.end_of_turn
    assert (ends & (prepared.learn > 0)).sum() == kept
