"""Optimizer steps of the real trainer, and who else takes the same steps.

Witnesses: PEFT over transformers with torch's AdamW, one example at a time;
the other two backends; other layouts of the same batch.
"""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import peft
import pytest
import safetensors.numpy
import tiny
import torch
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.formats import adapters, names
from keras_gemma_ft.model import forward, lora, presets
from keras_gemma_ft.tuning import loss, parent, trainer

ROWS, T, STEPS, PEAK, DECAY = 4, 72, 4, 0.01, 0.1
# Between the gradient norms of the four steps: some are clipped.
CLIP = 12.8
# Of --train.schedule=linear with 2 steps of warm-up, by hand.
RATES = [PEAK / 2, PEAK, PEAK, PEAK / 2]
WORDS = "the quick brown fox jumps over lazy dog two plus is four".split()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A JSONL file of examples of very different lengths."""
    rng = np.random.default_rng(0)

    def words(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(path, "w") as file:
        for _ in range(24):
            record = {"prompt": words(5), "response": words(9)}
            print(json.dumps(record), file=file)
    return path


def settings(records, *, micro=0, remat="none", lora=(), **train):
    """`config.Config` of all the runs here."""
    standard = {"rank": 3, "alpha": 6.0, "style": "standard"}
    return config.Config(
        data=config.Data(
            train=str(records),
            eval="none",
            sequence_length=T,
            batch_size=ROWS,
            micro_batch_size=micro,
        ),
        lora=config.Lora(**{**standard, **dict(lora)}),
        train=config.Train(
            learning_rate=PEAK,
            schedule="linear",
            weight_decay=DECAY,
            clip_norm=CLIP,
            **train,
        ),
        model=config.Model(remat=remat),
    )


class Steps(keras.callbacks.Callback):
    """Notes what there is after each optimizer step.

    Attributes:
        losses, norms: a number a step.
        states: {path: array} of what is trained, first before step 0.
        adapters: `formats.adapters.Adapter`s likewise; none without LoRA.
    """

    def __init__(self):
        super().__init__()
        self.losses, self.norms = [], []
        self.states, self.adapters = [], []

    def on_train_begin(self, logs=None):
        self.states.append(
            {
                v.path: ops.convert_to_numpy(v.value).copy()
                for v in self.model.trainable_variables
            }
        )
        if lora.variables(self.model.backbone):
            self.adapters.append(lora.read(self.model.backbone))

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(float(logs["loss"]))
        norm = self.model.optimizer.gradient_norm.value
        self.norms.append(float(ops.convert_to_numpy(norm)))
        self.on_train_begin()

    def arrays(self):
        """(losses, norms, all that is trained as one row a step)."""
        return self.losses, self.norms, flat(self.states, self.states[0])


def flat(states, order):
    """Dicts of arrays -> a row each, [len(states), n]."""
    return np.array(
        [np.concatenate([s[key].ravel() for key in order]) for s in states]
    )


def train(folder, cfg):
    """(Steps, tuner) of STEPS optimizer steps as `trainer.run` takes them."""
    loaded = presets.load(str(folder))
    rows = pipeline.prepare(cfg.data, loaded.tokenizer, "train", cfg.seed)
    tuner = trainer.build(cfg, loaded, steps=STEPS, warmup=2)
    if cfg.lora.rank:
        tiny.fill(tuner.backbone)
    batches = pipeline.train_batches(
        rows,
        batch_size=ROWS,
        micro_batch_size=cfg.data.micro_batch_size,
        seed=cfg.seed,
        steps=STEPS,
    )
    steps = Steps()
    tuner.fit(
        batches,
        epochs=STEPS,
        steps_per_epoch=tuner.accumulation,
        callbacks=[steps],
        shuffle=False,
        verbose=0,
    )
    return steps, tuner


def same_steps(got, want, *, rtol=1e-5):
    """Compares two `Steps.arrays()`.

    Where a gradient is nearly zero, Adam makes a whole step of its rounding
    error: so weights are compared by the length of their way, and what comes
    after the first step less strictly.
    """
    (losses, norms, rows), (their_losses, their_norms, their_rows) = got, want
    np.testing.assert_array_equal(rows[0], their_rows[0])
    tiny.close("first loss", losses[0], their_losses[0], rtol=rtol)
    tiny.close("losses", losses, their_losses, rtol=1e-3)
    tiny.close("first gradient norm", norms[0], their_norms[0], rtol=rtol)
    tiny.close("gradient norms", norms, their_norms, rtol=5e-3)
    for i in range(1, STEPS + 1):
        way = np.linalg.norm(their_rows[i] - their_rows[0])
        apart = np.linalg.norm(rows[i] - their_rows[i]) / way
        tiny.close(f"way after step {i}", apart, 0.0, atol=5e-3)


@pytest.fixture(scope="module")
def plain(folder, records):
    return train(folder, settings(records))


def test_only_the_adapters_move(folder, plain):
    steps, tuner = plain
    fresh = presets.load(str(folder)).causal_lm.backbone
    frozen = {v.path: v for v in tuner.backbone.non_trainable_variables}
    assert len(frozen) == len(fresh.variables) == 2 + 3 * 11
    for v in fresh.variables:
        got = ops.convert_to_numpy(frozen[v.path].value)
        np.testing.assert_array_equal(got, ops.convert_to_numpy(v.value))
    first, second = steps.states[:2]
    for path in first:
        assert np.abs(second[path] - first[path]).max() > RATES[0] / 2, path


def test_learning_rate_counts_optimizer_steps(plain, accumulated):
    for _, tuner in (plain, accumulated):
        got = [tuner.learning_rate(step) for step in range(STEPS)]
        tiny.close("learning rate", got, RATES, rtol=1e-6)


def prepare(folder, records, pack=True):
    """`prepared.Prepared` of the records."""
    data = config.Data(
        train=str(records), eval="none", sequence_length=T, pack=pack
    )
    tokenizer = presets.load(str(folder)).tokenizer
    return pipeline.prepare(data, tokenizer, "train", 0)


# --- against PEFT over transformers ------------------------------------------


def examples_of(rows, step, seed=0):
    """(ids, learn) of the examples of a step, one by one, unpadded."""
    for row in pipeline.rows_of_step(rows, step, batch_size=ROWS, seed=seed):
        for e in rows.rows[row]:
            here = slice(rows.starts[e], rows.starts[e + 1])
            yield rows.token_ids[here], rows.learn[here]


def batch_loss(model, rows, step):
    """Mean cross-entropy of the learned tokens of a step, a scalar."""
    total, count = 0.0, 0
    for token_ids, learn in examples_of(rows, step):
        token_ids = torch.tensor(token_ids).long()
        logits = model(token_ids[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits, token_ids[1:], reduction="none"
        )
        total = total + (losses * torch.tensor(learn[1:])).sum()
        count += float(learn[1:].sum())
    return total / count


def torch_steps(model, rows, trained, kind):
    """(losses, norms, states) of a torch optimizer.

    Args:
        model: transformers' or PEFT's.
        rows: `prepared.Prepared`.
        trained: function that gives {name: parameter}.
        kind: class of `torch.optim`.
    """
    optimizer = kind(trained().values(), lr=PEAK, weight_decay=DECAY)
    losses, norms, states = [], [], []

    def note():
        states.append(
            {k: v.detach().numpy().copy() for k, v in trained().items()}
        )

    note()
    for step, rate in enumerate(RATES):
        optimizer.zero_grad()
        found = batch_loss(model, rows, step)
        found.backward()
        losses.append(found.item())
        norm = torch.nn.utils.clip_grad_norm_(trained().values(), CLIP)
        norms.append(norm.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
            # Keras adds its epsilon before v is corrected, torch after.
            group["eps"] = 1e-7 / (1 - 0.999 ** (step + 1)) ** 0.5
        optimizer.step()
        note()
    return losses, norms, states


def test_lora_steps_are_those_of_peft(folder, records, plain, tmp_path):
    steps, _ = plain
    ours = []
    for i, adapter in enumerate(steps.adapters):
        adapters.write_peft(tmp_path / str(i), adapter)
        file = tmp_path / str(i) / "adapter_model.safetensors"
        ours.append(safetensors.numpy.load_file(file))
    model = peft.PeftModel.from_pretrained(
        tiny.witness(folder), tmp_path / "0", is_trainable=True
    )

    def trained():
        return {
            name.replace(".default", ""): value
            for name, value in model.named_parameters()
            if value.requires_grad
        }

    assert trained().keys() == ours[0].keys()
    losses, norms, theirs = torch_steps(
        model, prepare(folder, records), trained, torch.optim.AdamW
    )
    assert min(norms) < CLIP < max(norms)
    same_steps(
        (steps.losses, steps.norms, flat(ours, ours[0])),
        (losses, norms, flat(theirs, ours[0])),
        rtol=1e-4,
    )


def test_a_run_goes_on_from_what_peft_has_written(folder, plain, tmp_path):
    """Its first state; the steps from there are those of the tests above."""
    steps, _ = plain
    adapters.write_peft(tmp_path / "a", steps.adapters[0])
    model = peft.PeftModel.from_pretrained(
        tiny.witness(folder), tmp_path / "a", is_trainable=True
    )
    model.save_pretrained(tmp_path / "b")
    loaded = presets.load(str(folder))
    shapes = loaded.causal_lm.backbone.get_config()
    cfg = config.Config(adapter=str(tmp_path / "b"), run_dir="elsewhere")
    cfg = parent.settle(cfg, shapes)
    found = parent.read(cfg, shapes)
    tuner = trainer.build(
        cfg, loaded, steps=STEPS, warmup=2, adapter=found.adapter
    )
    state = {v.path: v for v in tuner.trainable_variables}
    assert state.keys() == steps.states[0].keys()
    for path, want in steps.states[0].items():
        got = ops.convert_to_numpy(state[path].value)
        np.testing.assert_array_equal(got, want)
    assert int(ops.convert_to_numpy(tuner.optimizer.iterations.value)) == 0
    ours, theirs = lora.read(tuner.backbone), steps.adapters[0]
    assert (ours.rank, ours.alpha) == (theirs.rank, theirs.alpha) == (3, 6.0)


def test_full_steps_are_those_of_transformers(folder, records):
    """--lora.rank=0: every weight, the tied embedding included.

    By gradient descent: words that never occur have gradients so small that
    AdamW's first steps would be all rounding error.
    """
    cfg = settings(records, lora={"rank": 0}, optimizer="sgd", loss_chunk=100)
    steps, tuner = train(folder, cfg)
    ours = [
        dict(names.to_huggingface(*item) for item in state.items())
        for state in steps.states
    ]
    model = tiny.witness(folder)
    assert len(tuner.trainable_variables) == 2 + 3 * 11

    def trained():
        return dict(model.named_parameters())

    assert trained().keys() == ours[0].keys()
    losses, norms, theirs = torch_steps(
        model, prepare(folder, records), trained, torch.optim.SGD
    )
    same_steps(
        (steps.losses, steps.norms, flat(ours, ours[0])),
        (losses, norms, flat(theirs, ours[0])),
        rtol=1e-4,
    )


# --- other layouts of the same batch -----------------------------------------


@pytest.fixture(scope="module")
def accumulated(folder, records):
    """A row at a time, recomputed, in chunks that do not divide its tokens."""
    cfg = settings(records, micro=1, remat="block", loss_chunk=50)
    return train(folder, cfg)


def recomputed_blocks(tuner, training):
    """How many blocks a call of the tuner gives to `keras.remat`."""
    remat, blocks = keras.remat, []

    def counted(block):
        blocks.append(block)
        return remat(block)

    x = {
        name: np.ones((ROWS, T), "int32")
        for name in ("token_ids", "segment_ids", "positions")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras, "remat", counted)
        tiny.compute(lambda x: tuner(x, training=training), x)
    return len(blocks)


def test_small_memory_is_the_same_step(folder, records, plain, accumulated):
    """Accumulation, although rows differ in learned tokens; recomputation."""
    rows = prepare(folder, records)
    numbers = pipeline.rows_of_step(rows, 0, batch_size=ROWS, seed=0)
    learned = rows.learned[numbers]
    assert max(learned) > 1.3 * min(learned)
    assert accumulated[1].accumulation == ROWS > plain[1].accumulation == 1
    assert recomputed_blocks(accumulated[1], True) == 3
    assert recomputed_blocks(accumulated[1], False) == 0
    assert recomputed_blocks(plain[1], True) == 0
    same_steps(accumulated[0].arrays(), plain[0].arrays())


def test_packed_rows_teach_what_separate_rows_teach(folder, records):
    loaded = presets.load(str(folder))
    backbone = loaded.causal_lm.backbone
    lora.enable(backbone, settings(records, lora={"style": "keras"}).lora)
    tiny.fill(backbone)
    packed, separate = (
        prepare(folder, records, pack=pack) for pack in (True, False)
    )
    assert len(packed.rows) < 0.7 * len(separate.rows)

    def token_losses(token_ids, segment_ids, positions, y):
        hidden = forward.hidden_states(
            backbone, token_ids, segment_ids, positions
        )
        return loss.token_loss(
            hidden,
            backbone.token_embedding.embeddings,
            y,
            cap=backbone.final_logit_soft_cap,
        )

    def total(*batch):
        *batch, weight = batch
        return ops.sum(token_losses(*batch) * weight)

    differentiated = tiny.differentiate(total, backbone.trainable_variables)
    results = []
    for rows in (packed, separate):
        # Empty rows, so that both have one shape and compile once.
        numbers = np.full(len(separate.rows), -1)
        numbers[: len(rows.rows)] = np.arange(len(rows.rows))
        x, y, weight = rows.batch(numbers)
        batch = (*x.values(), y)
        losses = tiny.compute(token_losses, *batch)
        by_place = {
            (int(rows.records[e]), int(place)): losses[b, at]
            for b, members in enumerate(rows.rows)
            for segment, e in enumerate(members, 1)
            for at in np.flatnonzero(x["segment_ids"][b] == segment)
            for place in [x["positions"][b, at]]
        }
        value, gradients = differentiated(*batch, weight / weight.sum())
        results.append((by_place, value, gradients))
    (one, value, gradients), (other, wanted, wanted_gradients) = results
    assert one.keys() == other.keys() and len(one) == packed.report["tokens"]
    keys = list(one)
    tiny.close(
        "token losses",
        [one[k] for k in keys],
        [other[k] for k in keys],
        rtol=1e-5,
    )
    tiny.close("mean", value, wanted, rtol=1e-6)
    scale = max(np.abs(g).max() for g in wanted_gradients)
    for variable, got, want in zip(
        backbone.trainable_variables, gradients, wanted_gradients
    ):
        assert np.abs(want).max() > 1e-4 * scale, variable.path
        tiny.close(variable.path, got / scale, want / scale, atol=2e-5)


# --- the three backends ------------------------------------------------------


def record(folder, records, path):
    """Trains, and writes what the backends are compared by."""
    steps, _ = train(folder, settings(records, lora={"style": "keras"}))
    np.savez(path, *steps.arrays())


@pytest.mark.once
def test_backends_take_the_same_steps(folder, records, tmp_path):
    """The default style, from the same adapter, each in its own process."""
    script = "import sys, conftest, test_training_step as t\n"
    script += "t.record(*sys.argv[1:])"
    files = {b: tmp_path / f"{b}.npz" for b in config.BACKENDS}
    running = {
        backend: subprocess.Popen(
            [sys.executable, "-c", script, folder, records, files[backend]],
            cwd=pathlib.Path(__file__).parent,
            env={**os.environ, "KERAS_BACKEND": backend},
            stderr=subprocess.PIPE,
            text=True,
        )
        for backend in config.BACKENDS
        if backend != "jax"
    }
    record(folder, records, files["jax"])
    want = np.load(files["jax"])
    for backend, process in running.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        got = np.load(files[backend])
        print(backend)
        same_steps(list(got.values()), list(want.values()), rtol=1e-4)
