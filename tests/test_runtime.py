"""Backend and precision told from faked machines; a verb as a process."""

import json
import os
import re
import subprocess
import sys
import textwrap
import types

import pytest

from keras_gemma_ft import config, runtime
from keras_gemma_ft.runtime import backend as chosen
from keras_gemma_ft.runtime import devices, imports, memory, packages

ALL = ("jax", "tensorflow", "torch")


@pytest.fixture
def machine(monkeypatch):
    """Function that makes this process believe in another machine."""

    def fake(*, installed=ALL, tpu=False, cuda=False, plugin=True, wheel=""):
        found = {*installed, *(["jax_cuda12_plugin"] if plugin else [])}
        monkeypatch.delenv("KERAS_BACKEND", raising=False)
        monkeypatch.delitem(sys.modules, "keras", raising=False)
        monkeypatch.setattr(packages, "installed", lambda name: name in found)
        monkeypatch.setattr(devices, "tpu", lambda: tpu)
        monkeypatch.setattr(devices, "cuda", lambda: cuda)
        monkeypatch.setattr(
            packages.importlib.metadata, "version", lambda name: f"9.9{wheel}"
        )
        monkeypatch.setattr(packages.platform, "system", lambda: "Linux")

    return fake


@pytest.mark.parametrize(
    "here, backend, reason",
    [
        ({"tpu": True}, "jax", "TPU"),
        ({"tpu": True, "cuda": True}, "jax", "TPU"),
        ({"cuda": True}, "torch", "CUDA GPU"),
        ({"cuda": True, "wheel": "+cpu"}, "jax", "CUDA GPU"),
        (
            {"cuda": True, "wheel": "+cpu", "plugin": False},
            "tensorflow",
            "CUDA GPU",
        ),
        (
            {"cuda": True, "plugin": False, "installed": ("jax",)},
            "jax",
            "no CUDA build",
        ),
        ({"tpu": True, "installed": ("torch",)}, "torch", "first installed"),
        ({}, "jax", "no accelerator"),
        ({"installed": ("torch", "tensorflow")}, "tensorflow", "accelerator"),
    ],
)
def test_auto_takes_what_suits_the_machine(machine, here, backend, reason):
    machine(**here)
    found, why = runtime.choose_backend("auto")
    assert found == backend, (found, why)
    assert reason in why


def test_what_is_asked_for_goes_before_the_machine(machine, monkeypatch):
    machine(tpu=True)
    assert runtime.choose_backend("torch")[0] == "torch"
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert runtime.choose_backend("auto") == (
        "tensorflow",
        "KERAS_BACKEND says so",
    )
    assert runtime.choose_backend("torch")[0] == "torch"


def test_a_backend_that_is_not_there_is_told_its_cure(machine, monkeypatch):
    machine(installed=("jax", "torch"))
    with pytest.raises(config.UserError) as caught:
        runtime.choose_backend("tensorflow")
    told = str(caught.value)
    assert "--backend=tensorflow is not installed" in told
    assert "(installed: jax, torch)" in told
    assert "pip install 'keras_gemma_ft[tensorflow]'" in told
    machine(installed=())
    with pytest.raises(config.UserError, match="installed: none"):
        runtime.choose_backend("auto")
    monkeypatch.setenv("KERAS_BACKEND", "theano")
    with pytest.raises(config.UserError) as caught:
        runtime.choose_backend("auto")
    assert "KERAS_BACKEND=theano is not one of jax, tensorflow, torch" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "here, capability, dtype",
    [
        ({"cuda": True}, 7.5, "float16"),  # T4
        ({"cuda": True}, 8.0, "bfloat16"),  # A100
        ({"cuda": True}, 9.0, "bfloat16"),  # H100
        ({"cuda": True}, 0.0, "float16"),  # no nvidia-smi: the safe one
        ({"tpu": True}, 0.0, "bfloat16"),
        ({}, 0.0, "float32"),
    ],
)
def test_precision_suits_the_machine(
    machine, monkeypatch, here, capability, dtype
):
    machine(**here)
    monkeypatch.setattr(devices, "cuda_capability", lambda: capability)
    assert runtime.choose_dtype("auto")[0] == dtype
    assert runtime.choose_dtype("float32")[0] == "float32"


def test_capability_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for answer, capability in (("7.5\n8.0", 7.5), ("no device", 0.0)):
        tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        tool.chmod(0o755)
        assert runtime.cuda_capability() == capability
    monkeypatch.setenv("PATH", "")
    assert runtime.cuda_capability() == 0.0


def test_a_hidden_gpu_is_none_and_cloud_tpus_say_so(monkeypatch):
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not runtime.cuda()
    monkeypatch.setenv("TPU_NAME", "local")
    assert runtime.tpu()


def test_versions_and_memory_are_this_process(machine):
    import keras
    import numpy as np

    found = runtime.versions()
    assert found["python"] == sys.version.split()[0]
    assert found["keras"] == keras.__version__
    assert found["numpy"] == np.__version__
    before = runtime.peak_memory_bytes()
    np.ones(25_000_000)
    # 200 MB more, if nothing before took more and gave it back.
    assert 50e6 < before <= runtime.peak_memory_bytes() < 1e12


VERB = '''
"""A verb for the test."""
import os, signal
from keras_gemma_ft import config, runtime

def verb(cfg):
    print("for people")
    what = cfg.generate.prompt
    if what == "mistake":
        raise config.UserError("no such thing. Type another.")
    if what == "stopped":
        raise runtime.Stopped("time is up", {"status": "stopped", "steps": 4})
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "bug":
        raise ZeroDivisionError("by zero")
    return {"status": "done", "said": what}

runtime.main(verb, __doc__)
'''


def call(tmp_path, *argv):
    """(exit code, stdout, stderr) of the verb above."""
    file = tmp_path / "verb.py"
    file.write_text(VERB)
    done = subprocess.run(
        [sys.executable, file, *argv], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "what, code, result, told",
    [
        ("é", 0, {"status": "done", "said": "é"}, ""),
        (
            "mistake",
            2,
            {"status": "error", "error": "no such thing. Type another."},
            "Error: no such thing. Type another.",
        ),
        (
            "stopped",
            75,
            {"status": "stopped", "steps": 4},
            "Stopped: time is up",
        ),
        ("interrupt", 75, {"status": "interrupted"}, "Interrupted."),
        ("terminate", 75, {"status": "interrupted"}, "Interrupted."),
        (
            "bug",
            1,
            {"status": "bug", "error": "ZeroDivisionError: by zero"},
            "line 18, in verb",
        ),
    ],
)
def test_a_verb_ends_in_a_code_and_one_json_line(
    tmp_path, what, code, result, told
):
    status, out, err = call(tmp_path, f"--generate.prompt={what}")
    assert status == code, err
    assert out.count("\n") == 1
    assert json.loads(out) == result
    assert "for people" in err and told in err
    assert ("Traceback" in err) == (what == "bug")


def test_a_verb_refuses_an_unknown_flag_and_gives_help(tmp_path):
    status, out, err = call(tmp_path, "--rank=8")
    assert status == 2 and "Did you mean: lora.rank?" in err
    assert "Did you mean" in json.loads(out)["error"]
    status, out, err = call(tmp_path, "--rank=8", "--help")
    assert status == 0 and out.startswith("A verb for the test.")


def test_start_decides_before_keras_and_only_then():
    code = """
        from keras_gemma_ft import config, runtime
        assert runtime.start(config.Config(backend="jax")) == "jax"
        import keras, sys
        assert keras.backend.backend() == "jax"
        # keras_hub would import it, and take 3 s and 600 MB.
        assert sys.modules["tensorflow"] is None
        # Again, as a notebook's second cell: nothing changes, nothing is said.
        assert runtime.start(config.Config(backend="jax")) == "jax"
        assert runtime.start(config.Config()) == "jax"
        runtime.start(config.Config(backend="torch"))
    """
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = done.stderr.splitlines()
    assert "backend: jax (--backend says so)" in lines[0]
    assert done.stderr.count("backend: ") == 1, done.stderr
    assert lines[-1].endswith(
        "UserError: --backend=torch was asked for, but "
        "keras is already imported with the backend jax, which a process "
        "cannot change. Restart the process (in a notebook: the kernel), or "
        "ask for --backend=jax."
    )


def test_a_keras_that_was_there_first_is_taken(monkeypatch, capsys):
    there = types.SimpleNamespace(backend=lambda: "torch")
    there = types.SimpleNamespace(config=there)
    monkeypatch.setitem(sys.modules, "keras", there)
    monkeypatch.setitem(chosen._said, "backend", None)
    before = dict(os.environ)
    for asked in ("auto", "torch"):
        assert runtime.choose_backend(asked)[0] == "torch"
        assert runtime.start(config.Config(backend=asked)) == "torch"
    told = capsys.readouterr().err
    assert "backend: torch (keras is already imported with it)" in told
    assert told.count("backend: ") == 1
    assert dict(os.environ) == before
    with pytest.raises(config.UserError, match="or ask for --backend=torch"):
        runtime.start(config.Config(backend="jax"))


def test_every_name_of_the_door_is_there():
    assert all(hasattr(runtime, name) for name in runtime.__all__)


# --- start-up: what is imported, and what is not said -------------------------


def imported(*argv):
    """(exit code, packages that are not Python's own) of a Python process."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv],
        capture_output=True,
        text=True,
    )
    names = {*re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.M)}
    names -= sys.stdlib_module_names
    return done.returncode, {n for n in names if packages.installed(n)}


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate", "plan"])
@pytest.mark.parametrize("flag, code", [("--help", 0), ("--nosuch=1", 2)])
def test_help_and_a_refusal_import_next_to_nothing(verb, flag, code):
    status, found = imported("-m", f"keras_gemma_ft.{verb}", flag)
    assert status == code
    # The environment's own: hooks of editable installs and the like.
    _, bare = imported("-c", "")
    assert found - bare == {"absl", "keras_gemma_ft"}


@pytest.mark.parametrize(
    "here, expected",
    [
        ({}, {"JAX_PLATFORMS": "cpu"}),
        ({"cuda": True}, {"JAX_PLATFORMS": "cuda,cpu"}),
        ({"cuda": True, "plugin": False}, {"JAX_PLATFORMS": "cpu"}),
        ({"tpu": True}, {}),
    ],
)
def test_jax_looks_for_no_tpu_where_none_is(machine, here, expected):
    machine(installed=(*ALL, "libtpu"), **here)
    assert chosen.jax_platforms() == expected
    machine(**here)
    assert chosen.jax_platforms() == {}


def test_what_cpp_libraries_log_is_dropped_and_nothing_else(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    logged = (
        b"WARNING: All log messages before absl::InitializeLog() is called\n"
        b"I0000 00:00:1795747885.473955   14277 port.cc:153] oneDNN is on.\n"
        b"E0000 00:00:1795747668.850479 12053 common_lib.cc:906] no host\n"
    )

    def run():
        with imports.without_logs():
            os.write(2, logged)
            os.write(2, b"UserWarning: numpy is too old\n")

    run()
    assert capfd.readouterr().err == "UserWarning: numpy is too old\n"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    run()
    assert logged.decode() in capfd.readouterr().err
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    with pytest.raises(ImportError), imports.without_logs():
        os.write(2, logged)
        raise ImportError
    assert logged.decode() in capfd.readouterr().err


def test_what_keras_must_not_import_is_there_again_afterwards():
    code = """
        import sys
        from keras_gemma_ft.runtime import imports, packages
        packages.is_verb = lambda: True
        imports.keras_with("jax")
        import keras
        assert keras.src.visualization.plot_image_gallery.plt is None
        assert "matplotlib" not in sys.modules, "not hidden"
        import matplotlib.pyplot, pandas, gc
        assert gc.isenabled() and gc.get_freeze_count() > 10_000
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    assert done.returncode == 0, done.stderr


# --- memory of a CPU run ------------------------------------------------------


@pytest.fixture
def cpu(monkeypatch):
    """A machine with glibc and no accelerator, nothing set by the user."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(devices, "tpu", lambda: False)
    monkeypatch.setattr(devices, "cuda", lambda: False)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    return monkeypatch


def test_glibc_keeps_the_memory_of_a_cpu_run(cpu):
    settings = runtime.allocator()["GLIBC_TUNABLES"].split(":")
    assert "glibc.malloc.mmap_max=0" in settings
    assert "glibc.malloc.hugetlb=1" in settings


def test_the_allocator_is_left_alone_elsewhere(cpu):
    cpu.setattr(devices, "cuda", lambda: True)
    assert runtime.allocator() == {}
    cpu.setattr(devices, "cuda", lambda: False)
    cpu.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert runtime.allocator() == {}
    cpu.delenv("GLIBC_TUNABLES")
    cpu.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert runtime.allocator() == {}


@pytest.mark.parametrize(
    "spec,again", [("keras_gemma_ft.train", True), ("pytest", False)]
)
def test_only_a_verb_is_started_again(cpu, spec, again):
    started = []
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name=spec))
    cpu.setitem(sys.modules, "__main__", main)
    cpu.setattr(memory.os, "execv", lambda *args: started.append(args))
    cpu.setattr(memory.os, "environ", {})
    memory.restart(runtime.allocator())
    assert started == ([(sys.executable, sys.orig_argv)] if again else [])
    assert ("GLIBC_TUNABLES" in memory.os.environ) == again


def test_jax_keeps_its_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # What a verb that ran in this process has set.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code = (
        "import os\n"
        "from keras_gemma_ft import config, runtime\n"
        "runtime.start(config.Config(backend='jax'))\n"
        "print(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert found.stdout.strip() == str(tmp_path / "keras_gemma_ft" / "jax")
