"""Two processes over loopback make one run: its numbers, its one folder.

On JAX each has 4 devices, and process 1 is given a run folder of its own, which
must stay absent: what it resumes from comes from process 0. On Torch one
command starts both.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from safetensors import numpy as safetensors
from test_run import lines_of, metrics, settings, workshop  # noqa: F401

from keras_gemma_ft import config, runtime
from keras_gemma_ft.model import hosts, layouts
from keras_gemma_ft.tuning import trainer

BACKEND = keras.config.backend()
pytestmark = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="many processes are for JAX and Torch"
)
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="of JAX's meshes")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="of Torch")
ROOT = pathlib.Path(__file__).parents[1]
TRAIN = ("-m", "keras_gemma_ft.train")
# Seconds that any one process may take; all are killed then.
LIMIT = 200
# Makes process {who} of a run send itself a signal at a window's end.
DYING = """
import os
from keras_gemma_ft import runtime, train
start = runtime.start
def patched(cfg):
    backend = start(cfg)
    from keras_gemma_ft.tuning import callbacks
    on_epoch_end = callbacks.StopOnNaN.on_epoch_end
    def dying(self, epoch, logs=None):
        if (cfg.hosts.index, self.model.step) == ({who}, {step}):
            os.kill(os.getpid(), {number})
        on_epoch_end(self, epoch, logs)
    callbacks.StopOnNaN.on_epoch_end = dying
    return backend
runtime.start = patched
runtime.main(train.train, "")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(commands, devices):
    """[(exit code, last line of stdout, stderr)] of processes run together."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    found = []
    try:
        for process in running:
            out, err = process.communicate(timeout=LIMIT)
            last = (out.splitlines() or ["null"])[-1]
            found.append((process.returncode, last, err))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return found


def flags_of(cfg):
    default = config.flatten(config.Config())
    return [
        f"--{path}={str(value).lower() if type(value) is bool else value}"
        for path, value in config.flatten(cfg).items()
        if value != default[path]
    ]


# Rows for 8 devices; four windows of two steps, a checkpoint each.
QUICK = {"data__batch_size": 8, "train__checkpoint_every": "2"}
FULL = {"train__samples": 1, "train__exact_match": 2}
if BACKEND == "jax":
    FULL["mesh"] = "8x1"
else:
    # Steps of two micro-batches: gradients are summed once, not twice.
    QUICK["data__micro_batch_size"] = 4


def run(
    workshop,
    folder,
    *,
    program=TRAIN,
    other=None,
    **changes,  # noqa: F811
):
    """What two processes x 4 devices said; `other` is for process 1 alone."""
    coordinator = f"127.0.0.1:{free_port()}"
    commands = []
    for index, name in enumerate(("run", "other")):
        cfg = settings(
            workshop,
            folder / name,
            hosts__count=2,
            hosts__index=index,
            hosts__coordinator=coordinator,
            **{**QUICK, **changes, **(other or {} if index else {})},
        )
        commands.append([*program, *flags_of(cfg)])
    return launch(commands, 4)


def run_one_command(
    workshop,
    folder,
    *,
    program=TRAIN,
    **changes,  # noqa: F811
):
    """What the one command said that starts both processes itself: Torch."""
    changes = {"hosts__local": "2", **QUICK, **changes}
    cfg = settings(workshop, folder / "run", **changes)
    (said,) = launch([[*program, *flags_of(cfg)]], 1)
    return said


def arrays(folder):
    return safetensors.load_file(folder / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def one(workshop, tmp_path_factory):  # noqa: F811
    """The folder of one process x 8 devices."""
    folder = tmp_path_factory.mktemp("one")
    cfg = settings(workshop, folder, **QUICK, **FULL)
    if BACKEND == "torch":
        trainer.run(cfg, BACKEND)
        return folder
    ((code, _, err),) = launch([[*TRAIN, *flags_of(cfg)]], 8)
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def two(workshop, tmp_path_factory):  # noqa: F811
    """(folder, what both processes said) of a run with everything on."""
    folder = tmp_path_factory.mktemp("two")
    if BACKEND == "torch":
        said = [run_one_command(workshop, folder, **FULL)]
        assert said[0][0] == 0, said[0][2]
        return folder, said
    said = run(workshop, folder, **FULL)
    assert [code for code, *_ in said] == [0, 0], said[0][2] + said[1][2]
    return folder, said


# AdamW's first steps take a gradient's sign, whatever its size.
TOLERANCE = 1e-4 if BACKEND == "jax" else 1e-5


def same(folder, reference):
    """Metrics and adapters of two run folders agree."""
    for key in ("loss", "eval_loss", "grad_norm"):
        found, wanted = (
            [line[key] for line in metrics(path, key)]
            for path in (folder, reference)
        )
        assert len(found) == (2 if key == "eval_loss" else 4)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    found, wanted = arrays(folder), arrays(reference)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=TOLERANCE)


def test_rows_over_hosts_give_the_numbers_of_one(one, two):
    same(two[0] / "run", one)
    found, wanted = (
        json.loads((folder / "summary.json").read_text())
        for folder in (two[0] / "run", one)
    )
    for key in ("tokens", "best_step", "exact_match_before", "exact_match"):
        assert found[key] == wanted[key], key
    # Each process generated; the text is that of one.
    assert lines_of(two[0] / "run/samples.jsonl") == lines_of(
        one / "samples.jsonl"
    )


@jax_only
def test_weights_over_hosts_give_the_numbers_of_one(
    workshop,
    one,
    tmp_path,  # noqa: F811
):
    said = run(workshop, tmp_path, mesh="1x8")
    assert [code for code, *_ in said] == [0, 0], said[0][2] + said[1][2]
    same(tmp_path / "run", one)


@jax_only
def test_process_0_writes_and_speaks_both_end_with_the_result(two):
    folder, ((_, first, told), (_, second, quiet)) = two
    assert json.loads(first) == json.loads(second)
    summary = json.loads((folder / "run/summary.json").read_text())
    assert json.loads(first) == summary
    assert (summary["status"], summary["hosts"]) == ("done", 2)
    assert {"adapter", "adapter.lora.h5", "curves.png"} < {
        path.name for path in (folder / "run").iterdir()
    }
    assert [path.name for path in folder.iterdir()] == ["run"]
    assert "2 processes, 4 of 8 devices each" in told
    assert "exact_match" in told and "exact_match" not in quiet
    assert "loss" not in quiet


@torch_only
def test_one_command_says_one_result(two):
    folder, ((_, last, told),) = two
    summary = json.loads((folder / "run/summary.json").read_text())
    assert json.loads(last) == summary
    assert (summary["status"], summary["hosts"]) == ("done", 2)
    assert "hosts: starting 2 processes" in told
    assert told.count("this one speaks") == told.count("exact_match") // 2 == 1


def dying(who, step, number):
    return ("-c", DYING.format(who=who, step=step, number=int(number)))


@jax_only
def test_whatever_ends_a_process_the_same_command_goes_on(
    workshop,
    two,
    tmp_path,  # noqa: F811
):
    # SIGTERM came to one of them: both stop at that window, having saved.
    program = dying(1, 2, signal.SIGTERM)
    for code, last, err in run(workshop, tmp_path, program=program, mesh="8x1"):
        assert code == 75, err
        last = json.loads(last)
        assert (last["status"], last["steps"]) == ("stopped", 2)
    # Either is killed: the other says so, in the middle of a step.
    for who, step in ((0, 4), (1, 6)):
        program = dying(who, step, signal.SIGKILL)
        said = run(workshop, tmp_path, program=program, mesh="8x1")
        assert said[who][0] == -signal.SIGKILL
        code, last, err = said[1 - who]
        assert code == 75, err
        assert "another process of this job is gone" in err
        last = json.loads(last)
        assert last["status"] == "stopped" and "same command" in last["error"]
    said = run(workshop, tmp_path, mesh="8x1")
    assert [code for code, *_ in said] == [0, 0], said[0][2] + said[1][2]
    assert "continuing at step 4 of 8" in said[0][2]
    assert metrics(tmp_path / "run") == metrics(two[0] / "run")
    for name, array in arrays(two[0] / "run").items():
        assert np.array_equal(arrays(tmp_path / "run")[name], array), name
    assert not (tmp_path / "other").exists()


# Starts two processes of the module `dying`.
PARENT = """
from keras_gemma_ft import runtime, workers
runtime.main(lambda cfg: workers.run(cfg, 2, "dying"), "")
"""


@torch_only
def test_a_process_is_killed_and_the_one_command_goes_on(
    workshop,
    two,
    tmp_path,
    monkeypatch,  # noqa: F811
):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    (tmp_path / "dying.py").write_text(dying(1, 6, signal.SIGKILL)[1])
    code, last, err = run_one_command(
        workshop, tmp_path, program=("-c", PARENT), **FULL
    )
    assert code == 75, err
    last = json.loads(last)
    assert last["status"] == "stopped"
    assert "process 1 was ended by SIGKILL. The same command" in last["error"]
    # The other one knows too, in the middle of a step.
    assert "another process of this job is gone" in err
    code, _, err = run_one_command(workshop, tmp_path, **FULL)
    assert code == 0, err
    assert "continuing at step 4 of 8" in err
    assert metrics(tmp_path / "run") == metrics(two[0] / "run")
    for name, array in arrays(two[0] / "run").items():
        assert np.array_equal(arrays(tmp_path / "run")[name], array), name


# Process 1 stops, its connections stay open: as of a machine without power.
SILENT = """
import os, signal, sys
from keras_gemma_ft import runtime
from keras_gemma_ft.model import torch_hosts
who, where = int(sys.argv[1]), sys.argv[2]
runtime.on_abort("another process is gone", 75)
torch_hosts.join(2, who, where, wait=60, silence=2)
assert torch_hosts.gather(b"%d" % who) == [b"0", b"1"]
if who:
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
torch_hosts.gather(b"")
"""


@torch_only
def test_a_silent_process_counts_as_gone():
    where = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SILENT, str(who), where],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for who in range(2)
    ]  # fmt: skip
    try:
        out, _ = running[0].communicate(timeout=60)
        assert running[1].poll() is None
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert running[0].returncode == 75
    told = {"status": "stopped", "error": "another process is gone"}
    assert json.loads(out) == told


@torch_only
def test_no_process_outlives_the_one_that_started_it(
    workshop,
    tmp_path,  # noqa: F811
):
    cfg = settings(workshop, tmp_path, hosts__local="2", **QUICK)
    parent = subprocess.Popen(
        [sys.executable, *TRAIN, *flags_of(cfg)],
        cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def children():
        found = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        return found.read_text().split()

    started = wait_for(lambda: len(children()) == 2 and children())
    parent.kill()
    parent.wait()
    try:
        wait_for(lambda: not any(map(alive, started)))
    finally:
        for pid in filter(alive, started):
            os.kill(int(pid), signal.SIGKILL)


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False
    return state != "Z"


def wait_for(told, seconds=30):
    limit = time.monotonic() + seconds
    while not (found := told()):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return found


# Two processes with gradients of their own, two micro-batches a step.
SUMS = """
import json, sys
sys.modules["tensorflow"] = None
import keras
import numpy as np
from torch import distributed
from keras_gemma_ft import config
from keras_gemma_ft.model import hosts, torch_hosts
from keras_gemma_ft.tuning import optimizer
who, where = int(sys.argv[1]), sys.argv[2]
hosts.start(config.Config(hosts=config.Hosts(2, who, where)))
torch_hosts._BUCKET = 4 * 8
reduced, reduce = [], distributed.all_reduce
def counted(tensor, *args, **kwargs):
    reduced.append(tensor.numel())
    return reduce(tensor, *args, **kwargs)
distributed.all_reduce = counted
train = config.Train(
    optimizer="sgd", learning_rate=1.0, schedule="constant", clip_norm=4.0
)
def run(given, float16):
    variables = [
        keras.Variable(np.zeros_like(g, "float32")) for g in given[0]
    ]
    made = optimizer.build(
        train, variables, steps=3, warmup=0, accumulation=2, float16=float16
    )
    norms = []
    for part in given:
        scale = float(made.dynamic_scale.numpy()) if float16 else 1.0
        grads = [np.array(g, "float32") * np.float32(scale) for g in part]
        made.apply([keras.ops.convert_to_tensor(g) for g in grads], variables)
        norms.append(float(made.gradient_norm.numpy()))
    found = [v.numpy().tolist() for v in variables], norms, list(reduced)
    reduced.clear()
    return found
cases = json.loads(sys.argv[3])
told = [run(given[who], i == 1) for i, given in enumerate(cases)]
told.append(hosts.broadcast(b"%d" % who).decode())
told.append(hosts.once(lambda: who))
told.append(hosts.total(who + 1.5))
try:
    with hosts.agreed():
        if who:
            raise config.UserError("not mine")
except config.UserError as error:
    told.append(str(error))
print(json.dumps(told))
"""


@torch_only
def test_two_processes_sum_gradients_and_agree():
    rng = np.random.default_rng(0)
    shapes = ((3, 2), (4,), (5, 1))
    # [process][micro-batch][variable]
    given = [
        [[rng.normal(0, 3, s) for s in shapes] for _ in range(4)]
        for _ in range(2)
    ]
    want, norms = [np.zeros(s) for s in shapes], []
    for step in range(2):
        parts = [p for one in given for p in one[2 * step : 2 * step + 2]]
        grads = [sum(g) / 2 for g in zip(*parts)]
        norms.append(np.sqrt(sum((g**2).sum() for g in grads)))
        factor = min(1.0, 4.0 / norms[-1])
        want = [w - factor * g for w, g in zip(want, grads)]
    plain = [[[g.tolist() for g in p] for p in one] for one in given]
    # Float16: process 1 alone overflows once; neither takes that micro-batch.
    scaled = [
        [one[0], [np.full(s, value).tolist() for s in shapes], *one[1:]]
        for one, value in zip(plain, (7.0, float("inf")))
    ]
    where = f"127.0.0.1:{free_port()}"
    sent = json.dumps([plain, scaled])
    said = launch([["-c", SUMS, str(i), where, sent] for i in range(2)], 1)
    for code, last, err in said:
        assert code == 0, err
        *sums, told, once, total, mistake = json.loads(last)
        for (found, measured, reduced), micro in zip(sums, (4, 5)):
            for a, b in zip(found, want):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            at = [1, 3] if micro == 4 else [2, 4]
            np.testing.assert_allclose(np.take(measured, at), norms, rtol=1e-6)
            # Buckets of 10 and 5 numbers a step; a word a micro-batch.
            words = [1] * (5 if micro == 5 else 0)
            assert sorted(reduced) == sorted([10, 5] * 2 + words)
        assert (told, once, total) == ("0", 0, 4.0)
        assert mistake == "process 1: not mine"
    # To the last bit.
    assert said[0][1] == said[1][1]


@jax_only
def test_processes_given_different_runs_all_refuse(
    workshop,
    tmp_path,  # noqa: F811
):
    said = run(workshop, tmp_path, other={"seed": 4})
    for code, last, err in said:
        assert code == 2, err
        told = json.loads(last)["error"]
        assert "process 1: " in told
        assert "--seed: 3 there, 4 now" in told


@torch_only
def test_processes_that_do_not_come(monkeypatch):
    monkeypatch.setattr(hosts, "JOIN", 1)
    monkeypatch.setattr(runtime, "on_abort", lambda *words: None)
    where = f"127.0.0.1:{free_port()}"
    for index in range(2):
        cfg = config.Config(hosts=config.Hosts(2, index, where))
        with pytest.raises(config.UserError, match="within 1 s. Start every"):
            hosts.start(cfg)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        cfg = config.Config(hosts=config.Hosts(2, 0, where))
        with pytest.raises(config.UserError, match="the port must be free"):
            hosts.start(cfg)


@jax_only
def test_a_coordinator_that_does_not_answer():
    program = """if True:
        from keras_gemma_ft import runtime
        def verb(cfg):
            runtime.start(cfg)
            from keras_gemma_ft.model import hosts
            hosts.JOIN = 2
            hosts.start(cfg)
        runtime.main(verb, "")
    """
    flags = ["--hosts.count=2", "--hosts.index=1"]
    flags += [f"--hosts.coordinator=127.0.0.1:{free_port()}"]
    ((code, last, err),) = launch([["-c", program, *flags]], 1)
    assert code == 2, err
    told = json.loads(last)
    assert told["status"] == "error"
    assert "did not all answer within 2 s" in told["error"]
    assert told["error"] in err


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    cfg = config.Config(hosts=config.Hosts(2, 0, "127.0.0.1:1"))
    with pytest.raises(config.UserError, match="--backend=torch"):
        hosts.start(cfg)


@pytest.mark.parametrize(
    "held, expected",
    [
        ({0: {0, 1}, 1: {2, 3}}, [(0, 2), (1, 2)]),  # rows over hosts
        ({0: {0}, 1: {0}}, [(0, 1), (0, 1)]),  # 1xN: each gives all
        ({0: {0}, 1: {0}, 2: {1}, 3: {1}}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({0: {2, 3}, 1: {0, 1}}, [(1, 2), (0, 2)]),
        ({0: {0, 2}, 1: {1, 3}}, [(0, 2), (1, 2)]),  # as on a 4x4 TPU
    ],
)
def test_which_part_of_a_batch_a_process_gives(held, expected):
    assert [layouts.share_of(p, held) for p in held] == expected


@pytest.mark.parametrize("held", [{0: {0, 1}, 1: {1, 2}}, {0: {0}, 1: {1, 2}}])
def test_rows_that_two_processes_share_are_refused(held):
    with pytest.raises(config.UserError, match="do not divide over 2"):
        layouts.share_of(0, held)
