"""Trackers get what metrics.jsonl gets, under its names, once, over resumes."""

import importlib.util
import json
from typing import ClassVar

import pytest

from keras_gemma_ft import config, runtime
from keras_gemma_ft.tuning import run_folder, trackers

pytestmark = pytest.mark.once

FIRST = [
    {"step": 2, "loss": 3.0, "overflows": {"b": 1}},
    {"step": 4, "loss": 2.0},
    {"step": 4, "eval_loss": 2.5},
    {"step": 6, "loss": 1.5},
]
SECOND = [
    {"step": 6, "loss": 1.5},
    {"step": 6, "eval_loss": 1.75},
    {"step": 8, "loss": 1},
]
WANTED = {
    "loss": {2: 3.0, 4: 2.0, 6: 1.5, 8: 1.0},
    "eval_loss": {4: 2.5, 6: 1.75},
    "overflows.b": {2: 1.0},
}


def process(path, name, lines, kept, end=None):
    """One process of a run: goes on after step `kept`, writes `lines`."""
    cfg = config.Config(train=config.Train(trackers=name), seed=5)
    folder = run_folder.RunFolder(path)
    with trackers.following(cfg, folder):
        folder.rewind(kept)
        for line in lines:
            folder.append(line)
        folder.write("summary.json", {"steps": kept})
        if end:
            raise end
    return folder


class Memory:
    """A tracker that writes down what it is told."""

    told: ClassVar = []

    def __init__(self, path, settings, id):
        self.id = id or "seven"
        self.told.append(("open", id, settings["seed"]))

    def log(self, step, values):
        self.told.append((step, values))

    def close(self, facts, ended):
        self.told.append((ended, facts))


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Memory)
    monkeypatch.setitem(trackers.MODULES, "wandb", "json")
    monkeypatch.setattr(Memory, "told", [])
    return Memory.told


def test_a_run_that_goes_on_goes_on_there(tmp_path, memory):
    with pytest.raises(runtime.Stopped):
        stop = runtime.Stopped("time is up", {})
        process(tmp_path, "wandb", FIRST, 0, stop)
    assert memory == [
        ("open", None, 5),
        (2, {"loss": 3.0, "overflows.b": 1.0}),
        (4, {"loss": 2.0}),
        (4, {"eval_loss": 2.5}),
        (6, {"loss": 1.5}),
        ("stopped", {"steps": 0}),
    ]
    memory.clear()
    folder = process(tmp_path, "wandb", SECOND, 4)
    # Step 6 was sent already; its evaluation was not.
    assert memory == [
        ("open", "seven", 5),
        (6, {"eval_loss": 1.75}),
        (8, {"loss": 1.0}),
        ("done", {"steps": 4}),
    ]
    assert folder.metrics() == [*FIRST[:3], *SECOND]


def test_a_tracker_that_comes_late_gets_all_lines(tmp_path, memory):
    process(tmp_path, "", FIRST, 0)
    with pytest.raises(ZeroDivisionError):
        process(tmp_path, "wandb", SECOND, 4, ZeroDivisionError())
    steps = [told[0] for told in memory]
    assert steps == ["open", 2, 4, 4, 6, 6, 8, "failed"]
    assert memory[-1] == ("failed", {})


def test_only_the_first_process_tracks(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(trackers.hosts, "first", lambda: False)
    process(tmp_path, "wandb", FIRST, 0)
    assert memory == []


def test_trackers_may_differ_when_a_run_goes_on(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    for names in ("", "wandb"):
        settings = config.flatten(
            config.Config(train=config.Train(trackers=names))
        )
        resumed = folder.open({"settings": settings}, resume=True)
    assert resumed
    (tmp_path / "tensorboard").mkdir()
    folder.write("trackers.json", {})
    folder.clear()
    assert not {"tensorboard", "trackers.json"} & {
        path.name for path in tmp_path.iterdir()
    }


def test_what_is_not_installed_is_said_with_its_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.UserError) as told:
        trackers.named("tensorboard, mlflow,")
    assert str(told.value) == (
        "--train.trackers=tensorboard, mlflow,: tensorboardX and mlflow are "
        "not installed. Type: pip install tensorboardX mlflow"
    )
    assert trackers.named("") == []


def scalars_of_tensorboard(path):
    """{tag: {step: value}} of all event files, in their order."""
    from tensorboardX.proto import event_pb2

    found = {}
    for file in sorted(path.glob("events.*"), key=lambda f: f.name):
        data = file.read_bytes()
        while data:
            # TFRecord: length, its checksum, the event, its checksum.
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points = found.setdefault(value.tag, {})
                    assert event.step not in points
                    points[event.step] = value.simple_value
    return found


def twice(path, name):
    """A run of two processes; what the tracker `name` calls it."""
    process(path, name, FIRST, 0)
    process(path, name, SECOND, 4)
    return json.loads((path / "trackers.json").read_text())[name]


def test_tensorboard_reads_it_back(tmp_path):
    pytest.importorskip("tensorboardX")
    twice(tmp_path, "tensorboard")
    found = scalars_of_tensorboard(tmp_path / "tensorboard")
    assert {name: found[name] for name in WANTED} == WANTED
    assert found["summary/steps"] == {6: 0.0, 8: 4.0}


def test_mlflow_reads_it_back(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    id = twice(tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    run = client.get_run(id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "5"
    assert run.data.tags["summary.steps"] == "4"
    for name, points in WANTED.items():
        history = client.get_metric_history(id, name)
        assert [(m.step, m.value) for m in history] == [*points.items()]


def records_of_wandb(data):
    """Yields the bytes of each record of a .wandb file: LevelDB's log."""
    place, whole = 7, b""  # After ":W&B", a magic number, a version.
    while place < len(data):
        if 32768 - place % 32768 < 7:
            # What is left of a block holds no header.
            place += 32768 - place % 32768
            continue
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or a last part
            yield whole
            whole = b""


def test_wandb_reads_it_back(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    id = twice(tmp_path, "wandb")
    # W&B reads these files in Go alone.
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{id}.wandb"))
    assert len(runs) == 2
    found = {}
    for data in (file.read_bytes() for file in runs):
        for record in records_of_wandb(data):
            history = wandb_internal_pb2.Record.FromString(record).history
            for item in history.item:
                name = item.key or ".".join(item.nested_key)
                points = found.setdefault(name, {})
                step = history.step.num
                points[step] = json.loads(item.value_json)
    assert {name: found[name] for name in WANTED} == WANTED
