"""An interrupted run ends where an uninterrupted one does, bit for bit."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import time
import types

import keras
import numpy as np
import pytest
from keras import ops
from safetensors import numpy as safetensors
from test_room import limited
from test_run import metrics, settings, workshop  # noqa: F401

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import adapters, atomic
from keras_gemma_ft.tuning import checkpoint, run_folder, trainer

BACKEND = keras.config.backend()
NUMBERS = (signal.SIGTERM, signal.SIGINT)


def tuned(workshop, run_dir, **changes):
    """Settings with everything on that keeps a state: dropout, two
    micro-batches a step, and an optimizer with two slots."""
    return settings(
        workshop,
        run_dir,
        lora__dropout=0.2,
        data__micro_batch_size=2,
        train__learning_rate=0.3,
        train__log_every="2",
        train__eval_every="2",
        train__checkpoint_every="2",
        train__keep_checkpoints=3,
        **changes,
    )


def hashes(run_dir):
    """sha256 of every tensor of a finished run: all that must be equal."""
    run_dir = pathlib.Path(run_dir)
    found = {}
    for file in (
        "checkpoints/00000008/state.safetensors",
        "best.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        for name, array in safetensors.load_file(run_dir / file).items():
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            found[f"{file}: {name}"] = digest
    return found


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):  # noqa: F811
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.run(tuned(workshop, folder), BACKEND)
    return folder


@pytest.fixture(scope="module")
def stopped(workshop, tmp_path_factory):  # noqa: F811
    """The folder of the same run: time is up at 2, signals come at 6."""
    folder = tmp_path_factory.mktemp("stopped")
    cfg = tuned(workshop, folder, train__time_budget="0.001s")
    handlers = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(runtime.Stopped) as stop:
        trainer.run(cfg, BACKEND)
    told = "time is up at step 2. The same command goes on."
    assert (str(stop.value), stop.value.result["steps"]) == (told, 2)
    assert stop.value.result["status"] == "stopped"
    append = run_folder.RunFolder.append

    def interrupt(self, line):
        append(self, line)
        if line["step"] == 6 and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)
            # The second Ctrl-C would not wait for the checkpoint.
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "append", interrupt)
        with pytest.raises(runtime.Stopped, match="SIGTERM at step 6"):
            trainer.run(tuned(workshop, folder), BACKEND)
    assert [signal.getsignal(number) for number in NUMBERS] == handlers
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 6)
    return folder


class Tuner:
    """What `checkpoint` looks at."""

    def __init__(self, trainable, slots, states=()):
        self.trainable_variables, self.states = trainable, states
        self.optimizer = types.SimpleNamespace(variables=slots)


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


def test_what_a_checkpoint_holds(whole):
    last = whole / "checkpoints/00000008"
    state = json.loads((last / "state.json").read_text())
    data = (last / "state.safetensors").read_bytes()
    assert state["bytes"] == len(data)
    own = {key: state.pop(key) for key in ("bytes", "sha256")}
    told = json.dumps(state, sort_keys=True).encode()
    assert own["sha256"] == hashlib.sha256(told + data).hexdigest()
    evals = metrics(whole, "eval_loss")
    best = min(evals, key=lambda line: line["eval_loss"])
    assert state["step"] == 8
    assert state["best"]["step"] == best["step"]
    assert state["best"]["eval_loss"] == best["eval_loss"]
    groups = {name.split("/")[0] for name in safetensors.load(data)}
    assert groups == {"trainable", "optimizer", "state"}


def test_only_the_newest_checkpoints_stay(whole, stopped):
    assert names(whole) == ["00000004", "00000006", "00000008"]
    assert names(stopped) == ["00000002", "00000004", "00000006"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(share):
    def damage(file):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return damage


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage",
    [flip, *map(truncate, (0, 0.01, 0.5, 0.99)), pathlib.Path.unlink],
    ids=["bit", "0", "1 %", "50 %", "99 %", "absent"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    stopped, tmp_path, capfd, name, damage
):
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints/00000006" / name)
    folder, facts = checkpoint.latest(tmp_path)
    assert (folder.name, facts["step"]) == ("00000004", 4)
    told = capfd.readouterr().err
    assert "checkpoint 00000006 is damaged" in told
    assert "looking for an older one" in told


def test_any_flipped_bit_of_the_facts_is_seen(tmp_path):
    for step in (1, 2):
        tuner = Tuner([keras.Variable([3.0])], [])
        checkpoint.save(tmp_path, tuner, {"step": step, "best": {"x": 0.1}})
    file = tmp_path / "checkpoints/00000002/state.json"
    whole = file.read_bytes()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        file.write_bytes(damaged)
        folder, facts = checkpoint.latest(tmp_path)
        # White space that becomes other white space is no damage.
        told = {key: facts[key] for key in ("step", "best")}
        assert told == {"step": int(folder.name), "best": {"x": 0.1}}, i


def test_all_checkpoints_damaged_is_none(stopped, tmp_path):
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    for path in tmp_path.glob("checkpoints/*/state.safetensors"):
        flip(path)
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


def test_other_data_is_refused(workshop, stopped, tmp_path):  # noqa: F811
    file = tmp_path / "train.jsonl"
    text = (workshop / "train.jsonl").read_text("utf-8")
    file.write_text(text.replace("timer", "tamer"), "utf-8")
    shutil.copytree(stopped, tmp_path / "run")
    cfg = tuned(workshop, tmp_path / "run", data__train=str(file))
    with pytest.raises(config.UserError) as caught:
        trainer.run(cfg, BACKEND)
    told = str(caught.value)
    assert "--data.train: " in told and "data: its content has changed" in told
    assert "--noresume" in told
    # The same name, other content.
    described = json.loads((stopped / "config.json").read_text())
    described["data"]["train"][0]["sha256"] = "0" * 64
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    with pytest.raises(config.UserError) as caught:
        trainer.run(tuned(workshop, tmp_path / "run"), BACKEND)
    assert "data: its content has changed" in str(caught.value)
    assert "--data.train: " not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(stopped, tmp_path):
    file = "checkpoints/00000006/state.safetensors"
    arrays = safetensors.load_file(stopped / file)
    changed = sorted(arrays)[-1]
    arrays[changed] = np.zeros((7, 7), "float32")
    arrays["optimizer/99/foreign"] = np.zeros(1, "float32")
    safetensors.save_file(arrays, tmp_path / "state.safetensors")

    groups = {"trainable": {}, "optimizer": {}, "state": {}}
    for name, array in safetensors.load_file(stopped / file).items():
        group, index, path = name.split("/", 2)
        variable = keras.Variable(array, trainable=False)
        variable._path = path
        groups[group][int(index)] = variable
    trainable, slots, states = (
        [rows[i] for i in sorted(rows)] for rows in groups.values()
    )
    tuner = Tuner(trainable, slots, states)
    before = [float(ops.sum(v)) for v in trainable + slots]
    with pytest.raises(config.UserError) as caught:
        checkpoint.restore(tmp_path, tuner)
    told = str(caught.value)
    assert f"{changed}: (7, 7) in the checkpoint, " in told
    assert "optimizer/99/foreign: not in this run" in told
    assert "--noresume" in told
    assert [float(ops.sum(v)) for v in trainable + slots] == before


def test_a_resumed_run_ends_bit_for_bit_where_a_whole_one_does(
    workshop,
    stopped,
    whole,
    capfd,  # noqa: F811
):
    # The newest checkpoint is damaged too: steps 5 and 6 are done twice.
    flip(stopped / "checkpoints/00000006/state.safetensors")
    (stopped / "checkpoints/.00000008.partial").mkdir()
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    result = trainer.run(tuned(workshop, stopped), BACKEND)
    told = capfd.readouterr().err
    assert "checkpoint 00000006 is damaged" in told
    assert "continuing at step 4 of 8" in told
    assert result["status"] == "done"
    assert metrics(stopped) == metrics(whole)
    assert hashes(stopped) == hashes(whole)
    expected = json.loads((whole / "summary.json").read_text())
    for key in ("steps", "tokens", "train_loss", "eval_loss", "best_step"):
        assert result[key] == expected[key], key
    assert result["eval_loss_before"] == expected["eval_loss_before"]
    assert not (stopped / "checkpoints/.00000008.partial").exists()


def test_a_run_killed_after_its_last_step_is_finished(
    workshop,
    whole,
    tmp_path,  # noqa: F811
):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "adapter")
    summary = trainer.run(tuned(workshop, folder), BACKEND)
    assert hashes(folder) == hashes(whole)
    assert metrics(folder) == metrics(whole)
    expected = json.loads((whole / "summary.json").read_text())
    for key in ("status", "steps", "tokens", "eval_loss", "best_step"):
        assert summary[key] == expected[key], key


@pytest.mark.skipif(BACKEND != "torch", reason="Torch compiles nothing")
def test_a_full_disk_stops_a_run_that_can_go_on(
    workshop,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
):
    """In a checkpoint, and in the export: what was complete before stays."""

    def stopped(owner, name, folder):
        """(the result, the message) of a run that has no room in `name`."""
        real = getattr(owner, name)

        def write(*args, **kwargs):
            # One write only: pytest keeps what is printed in a file, too.
            last = args[-1] if name == "save" else {"step": 4}
            with limited(2000 if last["step"] == 4 else 10**9):
                return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, write)
            with pytest.raises(runtime.Stopped) as stop:
                trainer.run(tuned(workshop, folder), BACKEND)
        assert not [*folder.rglob("*.partial")]
        assert stop.value.result["status"] == "stopped"
        return stop.value.result, str(stop.value)

    run = tmp_path / "run"
    result, told = stopped(checkpoint, "save", run)
    assert (result["steps"], names(run)) == (2, ["00000002"])
    assert checkpoint.latest(run)[1]["step"] == 2
    for words in (
        f"checkpoints/00000004 takes {result['wanted_bytes']:,} bytes",
        f"bytes are free in {run}/checkpoints",
        "The last complete checkpoint is of step 2, and it stays",
        "The same command goes on from it, once there is room.",
    ):
        assert words in told, told
    # The test above holds that another run writes exports that are missing.
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "adapter")
    result, told = stopped(adapters, "write_peft", copy)
    assert result["steps"] == 8 and f"{copy}/adapter takes" in told
    assert not (copy / "adapter").exists()
    assert not (copy / "summary.json").exists()


@pytest.mark.parametrize("where", ["tensors", "facts", "rename"])
def test_a_save_that_fails_leaves_nothing_half(tmp_path, monkeypatch, where):
    weight = keras.Variable([3.0])
    tuner = Tuner([weight], [keras.Variable([1.0, 2.0])])
    checkpoint.save(tmp_path, tuner, {"step": 4})
    before = sorted(tmp_path.rglob("*"))
    weight.assign([5.0])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    patch = {
        "tensors": (pathlib.Path, "write_bytes"),
        "facts": (pathlib.Path, "write_text"),
        "rename": (os, "replace"),
    }[where]
    for step in (4, 8):  # over an old one, and a new one
        with monkeypatch.context() as broken:
            broken.setattr(*patch, full)
            broken.setattr(os, "rename", full)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save(tmp_path, tuner, {"step": step})
        assert sorted(tmp_path.rglob("*")) == before
    folder, facts = checkpoint.latest(tmp_path)
    arrays = safetensors.load_file(folder / "state.safetensors")
    assert facts["step"] == 4
    assert sorted(float(a.sum()) for a in arrays.values()) == [3.0, 3.0]


def test_killed_between_any_two_calls_something_whole_is_there(
    tmp_path, monkeypatch
):
    """A kill cannot clean up, so here nothing does."""
    file = tmp_path / "value.json"
    for count in range(1, 30):
        file.write_text("old")
        calls = []

        def dying(function, calls=calls, count=count):
            def call(*args, **kwargs):
                calls.append(function)
                if len(calls) >= count:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as killed:
            for name in ("replace", "fsync", "open", "close", "unlink"):
                killed.setattr(os, name, dying(getattr(os, name)))
            try:
                with atomic.replacing(file) as partial:
                    partial.write_text("new")
            except KeyboardInterrupt:
                pass
        assert file.read_text() in ("old", "new"), count
        if len(calls) < count:
            break
    assert file.read_text() == "new"
    assert count > 3
