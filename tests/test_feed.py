"""Batches of several lengths, through `fit` of each backend."""

import inspect
import json
import types

import keras
import numpy as np
import pytest
import test_training_step
import tiny
from test_checkpoint import hashes
from test_run import metrics, settings, workshop  # noqa: F401
from test_training_step import Steps

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.model import presets
from keras_gemma_ft.tuning import callbacks, feed, run_folder, trainer

BACKEND = keras.config.backend()
WORDS = test_training_step.WORDS
T, ROWS, MICRO, STEPS = 160, 4, 2, 6
DATA = {
    "pack": False, "eval": "none", "sequence_length": T, "batch_size": ROWS,
    "micro_batch_size": MICRO, "buckets": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A JSONL file of 24 examples of very different lengths."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(path, "w") as file:
        for i in range(24):
            answer = " ".join(rng.choice(WORDS, 2 + i % 4 * 13))
            record = {"prompt": f"{i}", "response": answer}
            print(json.dumps(record), file=file)
    return path


def lengthened(batch, width):
    """The batch with empty places at the end of each row."""
    return keras.tree.map_structure(
        lambda a: np.pad(a, [[0, 0], [0, width - a.shape[1]]]), batch
    )


def train(folder, records, change):
    """(Steps, tuner, batches) of steps on `change(batches)`."""
    loaded = presets.load(str(folder))
    cfg = config.Config(
        data=config.Data(train=str(records), **DATA),
        lora=config.Lora(rank=3),
        train=config.Train(learning_rate=0.01, optimizer="sgd"),
    )
    rows = pipeline.prepare(cfg.data, loaded.tokenizer, "train", cfg.seed)
    tuner = trainer.build(cfg, loaded, steps=STEPS, warmup=0)
    tiny.fill(tuner.backbone)
    batches = change(
        pipeline.train_batches(
            rows,
            batch_size=ROWS,
            micro_batch_size=MICRO,
            seed=cfg.seed,
            steps=STEPS,
        )
    )
    steps = Steps()
    tuner.fit(
        feed.Feed(batches, tuner.meter),
        epochs=STEPS,
        steps_per_epoch=tuner.accumulation,
        callbacks=[steps],
        shuffle=False,
        verbose=0,
    )
    return steps, tuner, rows


@pytest.fixture(scope="module")
def bucketed(folder, records):
    return train(folder, records, lambda batches: batches)


@pytest.fixture(scope="module")
def padded(folder, records):
    """The same rows, all of one length."""
    return train(
        folder, records, lambda batches: [lengthened(b, T) for b in batches]
    )


def shapes_of(rows):
    """The shapes of all the training batches, a set."""
    batches = pipeline.train_batches(
        rows, batch_size=ROWS, micro_batch_size=MICRO, seed=0, steps=STEPS
    )
    return {y.shape for _, y, _ in batches}


def test_short_batches_teach_what_long_ones_teach(bucketed, padded):
    rows = bucketed[2]
    assert len(shapes_of(rows)) == len(rows.buckets) == 4
    (losses, norms, states), want = bucketed[0].arrays(), padded[0].arrays()
    np.testing.assert_array_equal(states[0], want[2][0])
    tiny.close("losses", losses, want[0], rtol=1e-6)
    tiny.close("gradient norms", norms, want[1], rtol=1e-5)
    tiny.close("adapters", states, want[2], atol=1e-6)
    way = np.linalg.norm(want[2][-1] - want[2][0])
    apart = np.linalg.norm(states[-1] - want[2][-1])
    tiny.close("apart, of the way", apart / way, 0.0, atol=1e-4)


def test_losses_are_token_means_of_the_whole_step(bucketed):
    """Of the first step, whose weights are known: by `evaluate`, which has
    another normalisation and other batches."""
    steps, tuner, rows = bucketed
    numbers = pipeline.rows_of_step(
        rows, 0, batch_size=ROWS, micro_batch_size=MICRO, seed=0
    )
    x, y, learn = rows.batch(numbers, T)
    for v in tuner.trainable_variables:
        v.assign(steps.states[0][v.path])
    mean = tuner.held_out_loss([(x, y, learn / learn.sum())], 1)
    tiny.close("first loss", steps.losses[0], mean, rtol=1e-5)


def compiled(function):
    """Compilations, by the backend's own count, of a train or test function."""
    inner = inspect.getclosurevars(function).nonlocals
    if BACKEND == "jax":
        return inner["step_function"]._cache_size()
    # `feed.make_function`: Keras's functions, each with one tf.function.
    counts = [
        inspect.getclosurevars(made)
        .nonlocals["one_step_on_data"]
        .__wrapped__.experimental_get_tracing_count()
        for made in inner["functions"].values()
    ]
    return sum(counts)


def test_no_more_compilations_than_buckets(bucketed, padded):
    _, tuner, rows = bucketed
    found = tuner.meter.compilations("train")
    assert found == dict.fromkeys(sorted(shapes_of(rows)), 1)
    assert len(found) == 4
    assert padded[1].meter.compilations("train") == {(MICRO, T): 1}
    if BACKEND != "torch":
        assert compiled(tuner.train_function) == 4
        assert compiled(padded[1].train_function) == 1


def test_held_out_batches_too(bucketed):
    _, tuner, rows = bucketed
    tuner.meter.traces.clear()
    tuner.make_test_function(force=True)
    batches = pipeline.eval_batches(rows, batch_size=MICRO)
    shapes = {y.shape for _, y, _ in batches}
    first, second = (
        tuner.held_out_loss(batches, pipeline.steps(rows, MICRO))
        for _ in range(2)
    )
    assert first == second
    assert tuner.meter.compilations("test") == dict.fromkeys(sorted(shapes), 1)
    assert tuner.meter.compilations("train") == {}
    if BACKEND != "torch":
        assert compiled(tuner.test_function) == len(shapes) == 4
    long = [lengthened(batch, T) for batch in batches]
    tiny.close(
        "held-out loss", tuner.held_out_loss(long, len(long)), first, rtol=1e-6
    )


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):  # noqa: F811
    """(settings, summary) of a run with buckets, and the same interrupted."""
    lines = (workshop / "train.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    folder = tmp_path_factory.mktemp("buckets")
    with open(folder / "train.jsonl", "w") as file:
        for i, line in enumerate(lines):
            text = " ".join(other["prompt"] for other in lines[: i % 5 + 1])
            print(json.dumps({**line, "prompt": text}), file=file)
    changes = {
        "data__train": str(folder / "train.jsonl"),
        "data__pack": False,
        "data__buckets": 3,
        "data__sequence_length": 256,
        "data__micro_batch_size": 2,
        "lora__dropout": 0.2,
        "train__log_every": "2",
        "train__eval_every": "2",
        "train__checkpoint_every": "2",
        "train__keep_checkpoints": 3,
    }
    whole = settings(workshop, folder / "whole", **changes)
    summary = trainer.run(whole, BACKEND)
    parts = settings(
        workshop, folder / "parts", train__time_budget="0.001s", **changes
    )
    with pytest.raises(runtime.Stopped, match="step 2"):
        trainer.run(parts, BACKEND)
    parts = config.replace(parts, {"train.time_budget": ""})
    trainer.run(parts, BACKEND)
    return whole, summary, parts


def test_an_interrupted_run_ends_where_the_other_does(runs):
    whole, _, parts = runs
    assert hashes(parts.run_dir) == hashes(whole.run_dir)
    assert metrics(parts.run_dir) == metrics(whole.run_dir)


def test_the_summary_counts_the_shapes(runs, capfd):
    cfg, summary, _ = runs
    tokenizer = presets.open(cfg, full=False).tokenizer
    rows = pipeline.prepare(cfg.data, tokenizer, "train", cfg.seed)
    batches = pipeline.train_batches(
        rows, batch_size=4, micro_batch_size=2, seed=cfg.seed, steps=8
    )
    widths = {y.shape[1] for _, y, _ in batches}
    assert rows.origin.cached and 1 < len(widths) <= 3
    assert summary["compiled_shapes"] == len(widths)


# --- waiting for batches ------------------------------------------------------


def test_only_waiting_counts_as_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(feed.time, "perf_counter", lambda: now[0])

    def slow(seconds):
        for wait in seconds:
            now[0] += wait
            yield wait

    meter = feed.Meter()
    batches = feed.Feed(slow([3.0, 1.0, 0.5]), meter)
    seen = []
    for batch in batches.get_numpy_iterator():
        seen.append(batch)
        now[0] += 10.0
    assert seen == [3.0, 1.0, 0.5] and meter.seconds == 4.5
    for get in ("get_jax_iterator", "get_tf_dataset", "get_torch_dataloader"):
        assert getattr(batches, get)() is batches


def test_the_share_is_of_the_windows_own_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    meter = types.SimpleNamespace(seconds=7.0)
    norm = types.SimpleNamespace(value=np.float32(1.0))
    model = types.SimpleNamespace(
        accumulation=1,
        meter=meter,
        step=0,
        optimizer=types.SimpleNamespace(gradient_norm=norm),
        learning_rate=lambda step: 0.1,
    )
    clock = callbacks.Clock(
        run_folder.RunFolder(tmp_path), lambda n: (9 * n, n), steps=4, start=0
    )
    monkeypatch.setattr(callbacks.Clock, "model", model)
    clock.params = {"steps": 2}
    clock.on_train_begin()
    for waited, took in ((1.0, 4.0), (0.5, 5.0)):
        clock.on_epoch_begin(0)
        meter.seconds += waited
        now[0] += took
        clock.on_epoch_end(0, {"loss": 1.0})
        # Evaluations and checkpoints come between: nobody's window.
        meter.seconds += 50.0
        now[0] += 99.0
    lines = clock.folder.metrics()
    assert [line["input_wait"] for line in lines] == [0.25, 0.1]
    assert [line["tokens_per_s"] for line in lines] == [4.5, 3.6]
    assert (clock.waited, clock.seconds) == (1.5, 9.0)
