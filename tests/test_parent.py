"""A run that goes on from an adapter starts where that one ended."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors
from test_checkpoint import BACKEND
from test_formats_adapters import BACKBONE, edit_config, make
from test_run import metrics, settings, workshop  # noqa: F401

from keras_gemma_ft import (
    command_line,
    config,
    evaluate,
    runtime,
    train,
    workers,
)
from keras_gemma_ft.formats import adapters, usage
from keras_gemma_ft.inference import chat
from keras_gemma_ft.tuning import parent

# What is read, refused and written does not depend on the backend; that every
# backend starts from the values is held in test_training_step.py.
once = pytest.mark.once
# Torch compiles nothing: a run of a few steps takes a second.
runs = pytest.mark.skipif(BACKEND != "torch", reason="runs under Torch alone")
TEMPLATE = "ask: {prompt}\\nsay: {response}"


@pytest.fixture
def adapter(tmp_path):
    """A PEFT folder of ours: rank 3, alpha 6, queries and values."""
    found = make("standard", targets=("query", "value"))
    adapters.write_peft(tmp_path / "old", found)
    return tmp_path / "old"


def settled(adapter, *argv):
    cfg = command_line.from_flags([f"--adapter={adapter}", *argv])
    return parent.settle(cfg, BACKBONE)


def refused(adapter, *argv):
    with pytest.raises(config.UserError) as caught:
        settled(adapter, *argv)
    return str(caught.value)


@once
def test_the_adapter_decides_what_is_not_typed(adapter):
    # The embedded model's recipe has rank 16, which nobody has typed.
    lora = settled(adapter).lora
    assert (lora.rank, lora.alpha, lora.style) == (3, 6.0, "standard")
    assert (lora.dropout, lora.init) == (0.05, "default")
    assert config.targets(lora) == ("query", "value")
    argv = ["--lora.dropout=0.25", "--lora.rank=3", "--lora.targets=q_proj"]
    assert settled(adapter, *argv[:2]).lora.dropout == 0.25
    same = settled(adapter, "--lora.targets=v_proj,q_proj", "--lora.alpha=6")
    assert dataclasses.replace(same.lora, targets="") == dataclasses.replace(
        lora, targets=""
    )


@once
def test_flags_that_contradict_it_are_refused_together(adapter):
    told = refused(
        adapter, "--lora.rank=4", "--lora.alpha=1", "--lora.rslora",
        "--lora.style=keras", "--lora.targets=q_proj", "--lora.init=pissa",
    )  # fmt: skip
    for words in (
        f"--adapter={adapter} cannot be gone on from",
        "--lora.rank=4: the adapter has 3. Leave the flag out",
        "--lora.alpha=1.0: the adapter has 6.0",
        "--lora.rslora=True: the adapter has False",
        "--lora.style=keras: the adapter has standard",
        "--lora.targets=q_proj: the adapter is of query,value",
        "--lora.init=pissa starts adapters from the kernels",
    ):
        assert words in told, told
    assert "--lora.rank=0: the adapter has 3" in refused(
        adapter, "--lora.rank=0"
    )


@once
def test_a_run_does_not_write_over_its_parent(adapter, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    (tmp_path / "run-2").mkdir()
    asked = config.Config(run_dir=str(run))
    for path in (run, run / "adapter"):
        with pytest.raises(config.UserError) as caught:
            parent.stay_apart(dataclasses.replace(asked, adapter=str(path)))
        told = f"Name another folder: --run_dir={run}-3."
        assert told in str(caught.value)
    for path in ("", str(adapter)):
        parent.stay_apart(dataclasses.replace(asked, adapter=path))


@once
def test_an_adapter_of_several_scales_is_refused(tmp_path):
    """B would hold the scales: a step on it is not a step on the file's B."""
    folder = tmp_path / "foreign"
    adapters.write_peft(folder, make("standard"))
    file = folder / "adapter_model.safetensors"
    # Without our header, as another tool writes it.
    safetensors.save_file(safetensors.load_file(file), file, {"format": "pt"})
    assert settled(folder).lora.alpha == 6.0
    edit_config(folder, alpha_pattern={"q_proj": 12})
    assert adapters.read(folder, BACKBONE).folded
    assert "different scales" in refused(folder)
    # Ranks of which one scale makes nothing differ are no matter.
    edit_config(folder, alpha_pattern={})
    arrays = safetensors.load_file(file)
    for name in arrays:
        if "layers.0" in name and "k_proj" in name:
            cut = arrays[name][:2] if "_A" in name else arrays[name][:, :2]
            arrays[name] = np.ascontiguousarray(cut)
    safetensors.save_file(arrays, file, {"format": "pt"})
    edit_config(folder, alpha_pattern={"layers.0.self_attn.k_proj": 4})
    found = settled(folder).lora
    assert (found.rank, found.alpha) == (3, 6.0)


@once
def test_started_processes_leave_lora_to_the_adapter(adapter, monkeypatch):
    """All that they are told counts as typed."""
    cfg = command_line.from_flags([f"--adapter={adapter}", "--lora.rank=3"])
    commands = [command for command, _ in workers._commands(cfg, 2, "module")]
    for command in commands:
        told = [flag for flag in command if flag.startswith("--lora.")]
        assert told == ["--lora.rank=3"]
        found = command_line.from_flags(command[3:])
        assert parent.settle(found, BACKBONE).lora.rank == 3
    cfg = command_line.from_flags([])
    ((command, _),) = workers._commands(cfg, 1, "module")
    assert "--lora.rank=16" in command


@pytest.fixture(scope="module")
def family(workshop, tmp_path_factory):  # noqa: F811
    """(parent's folder, child's folder, child's settings): two runs."""
    home = tmp_path_factory.mktemp("family")
    changes = {
        "train__steps": 4, "train__log_every": "2", "train__eval_every": "4",
        "train__checkpoint_every": "2", "lora__rank": 3,
    }  # fmt: skip
    cfg = settings(
        workshop, home / "old", data__template=TEMPLATE, model__quantize="nf4",
        data__sequence_length=80, **changes,
    )  # fmt: skip
    # As a user would: all but the adapter, the data and the steps is left out.
    argv = [
        f"--adapter={home / 'old'}", f"--run_dir={home / 'new'}", "--seed=5",
        f"--data.train={cfg.data.train}", f"--data.eval={cfg.data.eval}",
        "--data.batch_size=4", "--train.steps=4", "--train.log_every=2",
        "--train.eval_every=4", "--train.checkpoint_every=2",
        "--train.samples=0", "--train.exact_match=0",
        "--train.learning_rate=0.02",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "start", lambda cfg: BACKEND)
        patch.setenv("KERAS_BACKEND", BACKEND)
        train.train(cfg)
        child = command_line.from_flags(argv)
        train.train(child)
    return home / "old", home / "new", child


def summary(run):
    return json.loads((run / "summary.json").read_text())


def weights(run):
    return (run / "adapter/adapter_model.safetensors").read_bytes()


@runs
def test_a_child_starts_where_its_parent_ended(family):
    old, new, _ = family
    was, now = summary(old), summary(new)
    np.testing.assert_allclose(
        now["eval_loss_before"], was["eval_loss"], rtol=1e-6
    )
    assert now["eval_loss"] < was["eval_loss"] < was["eval_loss_before"]
    used = json.loads((new / "config.json").read_text())["settings"]
    taught = json.loads((old / "config.json").read_text())["settings"]
    for path in (*usage.TRAVELS, "lora.rank", "lora.alpha", "lora.style"):
        assert used[path] == taught[path], path
    assert used["model.quantize"] == "nf4" and used["lora.rank"] == 3
    # A fresh schedule: the warm-up and the peak are the child's.
    assert max(x["learning_rate"] for x in metrics(new, "loss")) <= 0.02


@runs
def test_the_chain_of_parents_travels(family):
    old, new, _ = family
    _, was = usage.find(old)
    _, now = usage.find(new)
    (told,) = now.told["parents"]
    assert told == {
        "name": "old",
        "sha256": hashlib.sha256(weights(old)).hexdigest(),
        "base": was.told["settings"]["preset"],
        "when": was.told["when"],
    }
    assert was.told["parents"] == []
    assert told["sha256"] in (new / "adapter/README.md").read_text()
    _, _, child = family
    cfg = config.replace(child, {"adapter": str(new), "run_dir": "third"})
    backbone = json.loads(
        (pathlib.Path(told["base"]) / "config.json").read_text()
    )["config"]
    chain = parent.read(cfg, backbone).chain
    assert [link["name"] for link in chain] == ["old", "new"]
    assert chain[0] == told


@runs
def test_a_child_that_resumes_does_not_start_over(
    family, tmp_path, monkeypatch, capfd
):
    old, new, child = family
    run = shutil.copytree(new, tmp_path / "run")
    for gone in ("adapter", "checkpoints/00000004"):
        shutil.rmtree(run / gone)
    (run / "summary.json").unlink()
    monkeypatch.setattr(runtime, "start", lambda cfg: BACKEND)
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    cfg = config.replace(child, {"run_dir": str(run)})
    train.train(cfg)
    assert "continuing at step 2 of 4" in capfd.readouterr().err
    assert weights(run) == weights(new) != weights(old)
    # Where the parent lies is no matter, what it holds is.
    moved = shutil.copytree(old, tmp_path / "moved")
    there = config.replace(cfg, {"adapter": str(moved)})
    assert train.train(there)["status"] == "done"
    shutil.copy(new / "adapter/adapter_model.safetensors", moved / "adapter")
    with pytest.raises(config.UserError, match="adapter: its content has"):
        train.train(there)
    with pytest.raises(config.UserError, match="adapter: only there"):
        train.train(config.replace(cfg, {"adapter": ""}))


@runs
def test_the_child_is_scored_as_it_was_taught(family, monkeypatch, capfd):
    """On its own held-out records, in its template, over nf4."""
    _, new, _ = family
    monkeypatch.setattr(runtime, "start", lambda cfg: BACKEND)
    argv = [f"--adapter={new}", "--train.samples=0", "--train.exact_match=0"]
    found = evaluate.evaluate(command_line.from_flags(argv))
    told = capfd.readouterr().err
    assert f"as {new / 'adapter'} was taught: --preset=" in told
    assert "--model.quantize=nf4" in told and "warning" not in told
    np.testing.assert_allclose(
        found["adapter"]["eval_loss"], summary(new)["eval_loss"], rtol=1e-6
    )
    assert found["base"]["eval_loss"] > found["adapter"]["eval_loss"]


@runs
def test_the_child_is_asked_in_its_template(family):
    old, new, _ = family
    cfg = command_line.from_flags([f"--adapter={new / 'adapter.lora.h5'}"])
    session = chat.load(cfg)
    asked = session.tokenizer.decode(session.ids("Lights off"))
    assert asked == "ask: Lights off\nsay: "
    # Over the base as it was: its kernels in nf4.
    assert session.generator.backbone.quantize_mode == "nf4"
