"""A whole run of a few steps; its claims checked with stock KerasHub."""

import hashlib
import json
import pathlib
import shutil
import types

import keras
import keras_hub
import matplotlib.image
import numpy as np
import pytest
import sentencepiece
from keras import ops

from keras_gemma_ft import (
    command_line,
    config,
    embedded,
    evaluate,
    runtime,
    train,
)
from keras_gemma_ft.data import pipeline, tokens
from keras_gemma_ft.embedded import model
from keras_gemma_ft.formats import usage
from keras_gemma_ft.model import presets
from keras_gemma_ft.tuning import callbacks, run_folder, trainer

BACKEND = keras.config.backend()
# The embedded model's features and vocabulary; heads * head_dim != hidden.
SIZES = {
    **model.SIZES,
    "num_layers": 2,
    "hidden_dim": 32,
    "intermediate_dim": 96,
    "head_dim": 16,
    "sliding_window_size": 16,
}
VOCABULARY = embedded.preset_folder() / "assets/tokenizer/vocabulary.spm"
BASE = config.Config(
    seed=3,
    data=config.Data(sequence_length=96, batch_size=4),
    lora=config.Lora(rank=2, alpha=3.0),
    train=config.Train(
        steps=8,
        learning_rate=3e-2,
        warmup="2 steps",
        log_every="2 steps",
        eval_every="4 steps",
        checkpoint_every="4 steps",
        samples=0,
        exact_match=0,
    ),
)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with preset/, train.jsonl (40 rows) and eval.jsonl (12)."""
    folder = tmp_path_factory.getbasetemp() / "workshop"
    if folder.exists():
        return folder
    backbone = keras_hub.models.GemmaBackbone(**SIZES, dtype="float32")
    rng = np.random.default_rng(0)
    for v in backbone.variables:
        # Post-norms of 3: what the blocks say outweighs the embedding.
        mean = 3.0 if "post_" in v.path else 0.0
        value = rng.normal(mean, 0.3, v.shape)
        v.assign(value.astype("float32"))
    folder.mkdir()
    tokenizer = tokens.Tokenizer(VOCABULARY.read_bytes())
    presets.save(folder / "preset", backbone, tokenizer)
    for split, rows in (("train", 40), ("eval", 12)):
        lines = embedded.demo_file(split).read_text("utf-8").splitlines()
        text = "\n".join(lines[:rows]) + "\n"
        (folder / f"{split}.jsonl").write_text(text, "utf-8")
    return folder


def settings(workshop, run_dir, **changes):
    """`BASE` on the workshop's files; `lora__rank=4` is `--lora.rank=4`."""
    values = {
        "preset": str(workshop / "preset"),
        "run_dir": str(run_dir),
        "data.train": str(workshop / "train.jsonl"),
        "data.eval": str(workshop / "eval.jsonl"),
    }
    values |= {k.replace("__", "."): v for k, v in changes.items()}
    found = config.replace(BASE, values)
    command_line.check(found)
    return found


def lines_of(path):
    text = pathlib.Path(path).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def metrics(run_dir, key=None):
    """The metrics' lines that have `key`, without what the clock decides."""
    lines = lines_of(pathlib.Path(run_dir) / "metrics.jsonl")
    for line in lines:
        line.pop("tokens_per_s", None)
        line.pop("input_wait", None)
    return [line for line in lines if key is None or key in line]


def stock_logits(backbone, ids):
    """float64 [B, T, V] logits of KerasHub's own layers; padding at the end."""
    hidden = backbone.predict(
        {"token_ids": ids, "padding_mask": np.ones_like(ids)},
        batch_size=len(ids),
        verbose=0,
    )
    table = ops.convert_to_numpy(backbone.token_embedding.embeddings.value)
    return 30.0 * np.tanh(hidden @ table.T.astype("float64") / 30.0)


def stock_loss(folder, file, lora=None):
    """Mean loss of the learned tokens of `file`, by KerasHub's own layers.

    Args:
        folder: a preset.
        file: prompt/response records, one a row here, without packing.
        lora: (an adapter.lora.h5, its `config.Lora`), for stock KerasHub.
    """
    backbone = keras_hub.models.GemmaBackbone.from_preset(
        str(folder), dtype="float32"
    )
    if lora:
        backbone.enable_lora(lora[1].rank, target_layer_names=config.TARGETS)
        backbone.load_lora_weights(str(lora[0]))
    spm = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
    bos, start, end = 2, 106, 107
    rows = []
    for record in lines_of(file):
        question = [bos, start, *spm.encode(f"user\n{record['prompt']}"), end]
        question += [*spm.encode("\n"), start, *spm.encode("model\n")]
        answer = [*spm.encode(record["response"]), end]
        rows.append((question + answer, len(question)))
    width = max(len(ids) for ids, _ in rows)
    ids = np.zeros((len(rows), width), "int32")
    learned = np.zeros((len(rows), width), bool)
    for i, (row, begin) in enumerate(rows):
        ids[i, : len(row)] = row
        learned[i, begin : len(row)] = True
    z = stock_logits(backbone, ids)
    total = np.log(np.exp(z).sum(-1))
    right = np.take_along_axis(z[:, :-1], ids[:, 1:, None], -1)[..., 0]
    losses = (total[:, :-1] - right)[learned[:, 1:]]
    return losses.mean()


@pytest.fixture(scope="module")
def first(workshop, tmp_path_factory):
    """(settings, summary) of a run with everything on."""
    cfg = settings(
        workshop,
        tmp_path_factory.mktemp("runs") / "first",
        train__samples=2,
        train__exact_match=3,
    )
    return cfg, trainer.run(cfg, BACKEND)


def test_the_run_folder_holds_what_the_contract_says(first, workshop):
    cfg, summary = first
    folder = pathlib.Path(cfg.run_dir)
    found = {path.name for path in folder.iterdir()}
    expected = {
        "config.json", "metrics.jsonl", "summary.json", "samples.jsonl",
        "curves.png", "adapter", "adapter.lora.h5", "checkpoints",
    }  # fmt: skip
    assert not expected - found, expected - found
    assert not [p for p in folder.rglob("*") if p.name.endswith(".partial")]
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "keras_gemma_ft.json",
        "README.md",
    }
    described = json.loads((folder / "config.json").read_text())
    assert described["settings"] == config.flatten(cfg)
    assert described["backend"] == BACKEND
    assert described["versions"]["keras"] == keras.__version__
    assert (
        described["tokenizer"]
        == hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    )
    assert len(described["preset"]) == 64
    for split, rows in (("train", 40), ("eval", 12)):
        data = (workshop / f"{split}.jsonl").read_bytes()
        (file,) = described["data"][split]
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert (file["bytes"], file["rows"]) == (len(data), rows)
    picture = matplotlib.image.imread(folder / "curves.png", format="png")
    # Some of it is neither white nor black nor grey: there are curves.
    assert np.ptp(picture[..., :3], axis=-1).max() > 0.3


def test_metrics_lines_and_summary_have_the_contracts_keys(first):
    cfg, summary = first
    folder = pathlib.Path(cfg.run_dir)
    assert json.loads((folder / "summary.json").read_text()) == summary
    steps = [x for x in lines_of(folder / "metrics.jsonl") if "loss" in x]
    assert [x["step"] for x in steps] == [2, 4, 6, 8]
    for line in steps:
        assert set(line) == {
            "step", "tokens", "loss", "grad_norm", "learning_rate",
            "tokens_per_s", "input_wait",
        }  # fmt: skip
        assert 0 <= line.pop("input_wait") < 1
        assert min(line.values()) > 0
    evals = metrics(folder, "eval_loss")
    assert [x["step"] for x in evals] == [4, 8]
    np.testing.assert_allclose(
        [x["perplexity"] for x in evals],
        np.exp([x["eval_loss"] for x in evals]),
    )
    assert {
        "status", "backend", "device", "steps", "tokens", "train_loss",
        "eval_loss_before", "eval_loss", "exact_match_before", "exact_match",
        "tokens_per_s", "seconds", "peak_memory_bytes",
        "trainable_parameters", "input_wait", "compiled_shapes",
    } <= set(summary)  # fmt: skip
    assert (summary["status"], summary["steps"]) == ("done", 8)
    # Packed: one shape, compiled once.
    assert summary["compiled_shapes"] == 1
    assert 0 <= summary["input_wait"] < 1
    assert summary["tokens"] == steps[-1]["tokens"]
    assert summary["train_loss"] == steps[-1]["loss"]
    # Per layer: q, k, v (per-head A, shared B), output, two gates, linear.
    d, n, kv, h, f, r = 32, 4, 2, 16, 48, 2
    heads = sum((k * d + h) * r for k in (n, kv, kv))
    rest = (n * h + d) * r + 3 * (d + f) * r
    assert summary["trainable_parameters"] == SIZES["num_layers"] * (
        heads + rest
    )


def test_samples_are_the_first_held_out_prompts(first, workshop):
    cfg, _ = first
    samples = lines_of(pathlib.Path(cfg.run_dir) / "samples.jsonl")
    records = lines_of(workshop / "eval.jsonl")
    assert len(samples) == 2
    for sample, record in zip(samples, records):
        assert record["prompt"] in sample["prompt"]
        assert sample["reference"] == record["response"]
        assert {"before", "after"} < set(sample)


def test_tokens_and_learning_rate_are_recomputed(first):
    cfg, summary = first
    tokenizer = tokens.Tokenizer(VOCABULARY.read_bytes())
    rows = pipeline.prepare(cfg.data, tokenizer, "train", cfg.seed)
    batches = pipeline.train_batches(rows, batch_size=4, seed=cfg.seed, steps=8)
    learned = np.cumsum([(weight > 0).sum() for _, _, weight in batches])
    found = metrics(cfg.run_dir, "loss")
    assert [x["tokens"] for x in found] == learned[1::2].tolist()
    step = np.arange(8)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - 2) / 6))
    rate = 3e-2 * np.where(step < 2, (step + 1) / 2, cosine)
    np.testing.assert_allclose(
        [x["learning_rate"] for x in found], rate[1::2], rtol=1e-5
    )


def test_loss_falls_and_stock_keras_hub_agrees(first, workshop):
    cfg, summary = first
    folder, file = workshop / "preset", workshop / "eval.jsonl"
    before = stock_loss(folder, file)
    np.testing.assert_allclose(summary["eval_loss_before"], before, rtol=1e-5)
    adapter = pathlib.Path(cfg.run_dir) / "adapter.lora.h5"
    after = stock_loss(folder, file, (adapter, cfg.lora))
    np.testing.assert_allclose(summary["eval_loss"], after, rtol=1e-5)
    assert after < before - 0.05
    losses = [x["loss"] for x in metrics(cfg.run_dir, "loss")]
    assert losses[-1] < losses[0]


def test_the_clock_leaves_the_model_alone_during_a_step(tmp_path, monkeypatch):
    """Keras calls it from a thread; there `self.model` would sync the state
    on JAX, which the running step has donated: a crash at random."""
    clock = callbacks.Clock(
        run_folder.RunFolder(tmp_path), lambda step: (0, 0), steps=8, start=0
    )
    clock.set_model(types.SimpleNamespace(accumulation=2, meter=None))
    clock.on_train_begin()
    monkeypatch.setattr(callbacks.Clock, "model", property(lambda self: 1 / 0))
    for batch in range(6):
        clock.on_train_batch_end(batch)
    assert clock.bar.n == 3


def test_evaluate_repeats_the_runs_scores(first, monkeypatch):
    cfg, summary = first
    monkeypatch.setattr(runtime, "start", lambda cfg: BACKEND)
    result = evaluate.evaluate(config.replace(cfg, {"adapter": cfg.run_dir}))
    for found, suffix in ((result["base"], "_before"), (result["adapter"], "")):
        for key in ("eval_loss", "exact_match"):
            # Through files and another program: not bit for bit.
            np.testing.assert_allclose(
                found[key], summary[key + suffix], rtol=1e-6
            )


def test_a_finished_run_is_not_repeated(first, monkeypatch, capfd):
    cfg, summary = first
    folder = pathlib.Path(cfg.run_dir)
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.*")}
    monkeypatch.setattr(runtime, "start", lambda cfg: BACKEND)
    assert train.train(cfg) == summary
    assert "finished run; --noresume repeats" in capfd.readouterr().err
    times.pop(folder / ".lock")
    for path, time in times.items():
        assert path.stat().st_mtime_ns == time, path


def test_other_settings_on_its_folder_are_refused(first):
    cfg, _ = first
    changed = {"lora.rank": 4, "train.learning_rate": 1e-3}
    before = (pathlib.Path(cfg.run_dir) / "config.json").read_bytes()
    with pytest.raises(config.UserError) as caught:
        trainer.run(config.replace(cfg, changed), BACKEND)
    told = str(caught.value)
    assert f"--run_dir={cfg.run_dir} holds another run" in told
    assert "--lora.rank: 2 there, 4 now" in told
    assert "--train.learning_rate: 0.03 there, 0.001 now" in told
    assert "--noresume" in told and "seed" not in told
    after = (pathlib.Path(cfg.run_dir) / "config.json").read_bytes()
    assert after == before


def test_noresume_starts_afresh_and_repeats_bit_for_bit(first, tmp_path):
    cfg, summary = first
    folder = tmp_path / "copy"
    shutil.copytree(cfg.run_dir, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter/adapter_model.safetensors").write_text("torn")
    changes = {"train.samples": 0, "train.exact_match": 0, "resume": False}
    again = config.replace(cfg, {"run_dir": str(folder), **changes})
    assert trainer.run(again, BACKEND)["eval_loss"] == summary["eval_loss"]
    assert metrics(folder) == metrics(cfg.run_dir)
    name = "adapter/adapter_model.safetensors"
    there = (folder / name).read_bytes()
    assert there == (pathlib.Path(cfg.run_dir) / name).read_bytes()
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    (tmp_path / "model").mkdir()
    folder = run_folder.RunFolder(tmp_path)
    for resume in (True, False):
        with pytest.raises(config.UserError) as caught:
            folder.open({"settings": {"seed": 0}}, resume=resume)
        assert "a config.json that no run wrote" in str(caught.value)
    (tmp_path / "config.json").unlink()
    assert not folder.open({"settings": {"seed": 0}}, resume=False)
    assert (tmp_path / "model").exists()


def test_the_best_adapter_is_kept_and_patience_ends_the_run(workshop, tmp_path):
    # The warm-up never ends: the learning rate grows until the loss does.
    cfg = settings(
        workshop,
        tmp_path,
        train__steps=40,
        train__learning_rate=4.0,
        train__warmup="40 steps",
        train__log_every="1 step",
        train__eval_every="1 step",
        train__patience=3,
        train__checkpoint_every="0",
    )
    summary = trainer.run(cfg, BACKEND)
    losses = [x["eval_loss"] for x in metrics(tmp_path, "eval_loss")]
    best = int(np.argmin(losses))
    assert best > 0 and losses[best] < summary["eval_loss_before"]
    assert losses[-1] > losses[best] + 0.01, losses
    assert summary["best_step"] == best + 1
    # Three evaluations in a row that were not better, and no earlier three.
    assert summary["steps"] == len(losses) == best + 1 + 3 < 40
    np.testing.assert_allclose(summary["eval_loss"], losses[best], rtol=1e-6)
    exported = stock_loss(
        workshop / "preset",
        workshop / "eval.jsonl",
        (tmp_path / "adapter.lora.h5", cfg.lora),
    )
    np.testing.assert_allclose(exported, losses[best], rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(workshop, tmp_path):
    cfg = settings(
        workshop,
        tmp_path,
        train__learning_rate=1e38,
        train__warmup="0",
        train__log_every="1",
        train__eval_every="0",
        train__checkpoint_every="1",
    )
    with pytest.raises(config.UserError) as caught:
        trainer.run(cfg, BACKEND)
    told = str(caught.value)
    assert "not finite near step 2; not finite at first: the " in told
    assert "--train.learning_rate" in told and str(tmp_path) in told
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "checkpoints/00000002").exists()


@pytest.mark.parametrize(
    "loss, norm, stops",
    [(1.0, 2.0, False), (np.nan, 2.0, True), (1.0, np.inf, True)],
)
def test_a_spoilt_gradient_stops_before_it_is_saved(loss, norm, stops):
    tuner = types.SimpleNamespace(
        optimizer=types.SimpleNamespace(gradient_norm=keras.Variable(norm)),
        stop_training=False,
    )
    stop = callbacks.StopOnNaN()
    stop.set_model(tuner)
    stop.on_epoch_end(0, {"loss": loss})
    assert tuner.stop_training == stops
    # What `Checkpoint` looks at.
    assert np.isfinite(tuner.last_loss) != stops


def test_rank_zero_writes_a_whole_model(workshop, tmp_path):
    cfg = settings(
        workshop,
        tmp_path,
        lora__rank=0,
        lora__alpha=0.0,
        train__steps=3,
        train__learning_rate=1e-2,
        train__log_every="1",
    )
    summary = trainer.run(cfg, BACKEND)
    assert not (tmp_path / "adapter").exists()
    loaded = presets.load(str(tmp_path / "model"))
    backbone = loaded.causal_lm.backbone
    assert summary["trainable_parameters"] == backbone.count_params()
    assert loaded.tokenizer.proto == VOCABULARY.read_bytes()
    found = stock_loss(tmp_path / "model", workshop / "eval.jsonl")
    np.testing.assert_allclose(found, summary["eval_loss"], rtol=1e-5)
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.05
    _, travels = usage.find(tmp_path / "model")
    assert travels.told["settings"]["data.sequence_length"] == 96
