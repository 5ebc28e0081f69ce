"""Which processes a job has, and how many of them a machine starts."""

import json
import signal
import subprocess
import sys

import pytest

from keras_gemma_ft import command_line, config, family, runtime, workers
from keras_gemma_ft.runtime import devices, packages


def asked(count=0, index=-1, coordinator="", **environment):
    variables = {
        f"KERAS_DISTRIBUTION_{k}": str(v) for k, v in environment.items()
    }
    return workers.settings(
        config.Hosts(count=count, index=index, coordinator=coordinator),
        variables,
    )


def test_what_the_settings_mean():
    assert asked() is None
    assert asked(1) is None
    assert asked(-1) == (None, None, None)
    assert asked(2, 1, "a:1") == (2, 1, "a:1")
    address = {"JOB_ADDRESSES": "a:1,b:2", "PROCESS_ID": 1}
    assert asked(NUM_PROCESSES=2, **address) == (2, 1, "a:1")
    assert asked(2, 0, **address) == (2, 0, "a:1")
    assert asked(2, 0, "c:3", **address) == (2, 0, "c:3")


@pytest.mark.parametrize(
    "given, told",
    [
        ({"count": 2, "index": 2}, ["numbered 0 to 1", "10.0.0.1:1234"]),
        ({"count": 2, "coordinator": "a"}, ["index=-1", "coordinator=a:"]),
        ({"count": -1, "index": 0}, ["asks the cluster"]),
        ({"index": 1}, ["--hosts.count=2"]),
        ({"JOB_ADDRESSES": "a:1"}, ["--hosts.count=2"]),
        ({"NUM_PROCESSES": "x"}, ["KERAS_DISTRIBUTION_NUM_PROCESSES=x"]),
    ],
)
def test_settings_that_do_not_fit(given, told):
    with pytest.raises(config.UserError) as caught:
        asked(**given)
    for part in told:
        assert part in str(caught.value)


@pytest.fixture
def machine(monkeypatch):
    """Function that gives this process GPUs."""
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.delitem(sys.modules, "keras", raising=False)

    def fake(count):
        told = ",".join(map(str, range(count)))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        monkeypatch.setattr(devices, "cuda", lambda: count > 0)
        monkeypatch.setattr(packages, "built_for_cuda", lambda name: True)
        monkeypatch.setattr(packages, "installed", lambda name: True)

    return fake


def wanted(backend="torch", batch=16, micro=0, **hosts):
    return workers.wanted(
        config.Config(
            backend=backend,
            data=config.Data(batch_size=batch, micro_batch_size=micro),
            hosts=config.Hosts(**hosts),
        )
    )


def test_torch_takes_every_gpu_that_the_rows_divide_over(machine, capsys):
    machine(0)
    assert wanted() == 1
    assert wanted(local="2") == 2
    machine(2)
    assert wanted() == wanted(micro=4) == wanted(local="2") == 2
    assert wanted(local="1") == 1
    assert capsys.readouterr().err == ""
    machine(4)
    # 6 rows over 3 of 4.
    assert wanted(batch=12, micro=6) == 3
    assert "6 rows do not divide over 4 GPUs; of 4 here 3" in (
        capsys.readouterr().err
    )
    job = {"count": 2, "index": 0, "coordinator": "a:1"}
    assert wanted(**job) == 4
    assert wanted(batch=4, **job) == 2


def test_gpus_are_those_that_cuda_shows(machine, monkeypatch):
    machine(3)
    assert runtime.gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f,-1,0")
    assert runtime.gpus() == ["2", "GPU-5f"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    files = ["/dev/nvidia3", "/dev/nvidia7"]
    with monkeypatch.context() as patch:
        patch.setattr(devices.pathlib.Path, "glob", lambda *_: iter(files))
        assert runtime.gpus() == ["0", "1"]
    machine(0)
    assert runtime.gpus() == []


def test_other_backends_compute_in_one_process(machine, capsys):
    machine(2)
    assert wanted("jax") == 1
    assert capsys.readouterr().err == ""
    assert wanted("tensorflow") == 1
    assert runtime.gpus() == ["0"]
    told = capsys.readouterr().err
    assert "TensorFlow uses one GPU of 2" in told
    assert "--backend=torch" in told


@pytest.mark.parametrize(
    "given, told",
    [
        ({"backend": "jax", "local": "2"}, "uses all devices of a machine"),
        ({"backend": "tensorflow", "local": "2"}, "or --backend=torch"),
        ({"local": "3"}, "2 can be seen. Use --hosts.local=2"),
        ({"local": "2", "micro": 1}, "--data.micro_batch_size=2."),
        (
            {"local": "2", "batch": 3},
            "--data.micro_batch_size=4 --data.batch_size=4.",
        ),
        (
            {"count": 3, "index": 0, "coordinator": "a:1", "batch": 4},
            "4 rows does not divide over 3",
        ),
        ({"count": -1}, "asks the cluster, which JAX does"),
    ],
)
def test_what_cannot_be_split_is_refused(machine, given, told):
    machine(2)
    with pytest.raises(config.UserError) as caught:
        wanted(**given)
    assert told in str(caught.value)


@pytest.mark.parametrize("local", ["0", "two", "-1", ""])
def test_a_number_of_processes(local):
    cfg = config.Config(hosts=config.Hosts(local=local))
    with pytest.raises(config.UserError, match="--hosts.local=2"):
        command_line.check(cfg)


# A verb whose processes end as each of them is told: see `ends`.
ENDS = """
import os, signal, sys, time
from keras_gemma_ft import config, family, runtime
def verb(cfg):
    assert cfg.train.optimizer == "sgd" and cfg.hosts.local == "1"
    assert cfg.resume is False
    family.watch()
    how = {ways}[cfg.hosts.index]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == str(cfg.hosts.index)
    if how == "done":
        return {{"index": cfg.hosts.index, "count": cfg.hosts.count}}
    if how == "wait":
        def stop(number, frame):
            raise runtime.Stopped("SIGTERM", {{"status": "stopped"}})
        signal.signal(signal.SIGTERM, stop)
        if cfg.hosts.index == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    if how == "hang":
        time.sleep(60)
    if how == "mistake":
        raise config.UserError("no such thing")
    if how == "stop":
        raise runtime.Stopped("time is up", {{"status": "stopped"}})
    if how == "bug":
        raise ZeroDivisionError("here")
    os.kill(os.getpid(), signal.SIGKILL)
runtime.main(verb, "")
"""


@pytest.mark.parametrize(
    "ways, code, result, told",
    [
        (["done", "done"], 0, {"index": 0, "count": 2}, ""),
        (["mistake", "mistake"], 2, {"status": "error"}, "no such thing"),
        (["stop", "mistake"], 2, {"status": "error"}, "no such thing"),
        (["stop", "stop"], 75, {"status": "stopped"}, "time is up"),
        (["wait", "wait"], 75, {"status": "stopped"}, "Stopped: SIGTERM"),
        (["hang", "bug"], 1, {"status": "bug"}, "ZeroDivisionError"),
        (["hang", "killed"], 75, {"status": "stopped"}, "ended by SIGKILL"),
        (["killed", "stop"], 75, {"status": "stopped"}, "ended by SIGKILL"),
    ],
)
def test_a_parent_ends_as_its_processes_do(
    tmp_path, machine, monkeypatch, capfd, ways, code, result, told
):
    machine(2)
    monkeypatch.setattr(family, "GRACE", 0.5)
    (tmp_path / "ending.py").write_text(ENDS.format(ways=ways))
    monkeypatch.setenv("PYTHONPATH", f"{':'.join(sys.path)}:{tmp_path}")
    cfg = config.replace(
        config.Config(), {"train.optimizer": "sgd", "resume": False}
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        found, status = workers.run(cfg, 2, "ending"), 0
    except runtime.Ended as end:
        found, status = end.result, end.status
    except runtime.Stopped as stop:
        found, status = stop.result, 75
        print(stop, file=sys.stderr)
    assert status == code
    assert result.items() <= found.items()
    assert capfd.readouterr().err.count(told) >= 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_mistake_of_all_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{':'.join(sys.path)}:{tmp_path}")
    program = """
from keras_gemma_ft import config, runtime, workers
runtime.main(lambda cfg: workers.run(cfg, 2, "ending"), "")
"""
    (tmp_path / "ending.py").write_text(
        "from keras_gemma_ft import config, runtime\n"
        "def verb(cfg):\n    raise config.UserError('no such thing')\n"
        "runtime.main(verb, '')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--seed=3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("no such thing") == 1
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == {"status": "error", "error": "no such thing"}
