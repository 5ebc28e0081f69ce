"""A full disk: nothing is half written, and the run goes on from what is there.

The tests make no small disk. The system's limit on the size of files
(RLIMIT_FSIZE) fails a write in its middle just as a full disk does.
"""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys

import matplotlib
import pytest
from test_run import workshop  # noqa: F401

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import atomic

# What is written here does not depend on the backend.
pytestmark = pytest.mark.once


@contextlib.contextmanager
def limited(size):
    """A block in which no file can be written beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def partials(folder):
    return list(pathlib.Path(folder).rglob("*.partial"))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file, folder = tmp_path / "a.json", tmp_path / "adapter"
    file.write_bytes(b"old")
    folder.mkdir()
    (folder / "x").write_bytes(b"old")
    with limited(100):
        with pytest.raises(atomic.NoRoom) as caught:
            with atomic.replacing(file, 5000) as partial:
                partial.write_bytes(bytes(5000))
        with pytest.raises(atomic.NoRoom) as unknown:
            with atomic.replacing(folder) as partial:
                partial.mkdir()
                (partial / "x").write_bytes(bytes(5000))
    assert (caught.value.wanted, unknown.value.wanted) == (5000, 0)
    assert f"{file} takes 5,000 bytes" in str(caught.value)
    assert f"free in {tmp_path}" in str(caught.value)
    assert file.read_bytes() == (folder / "x").read_bytes() == b"old"
    assert not partials(tmp_path)


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    atomic.append(file, b"one\n")
    with limited(10), pytest.raises(atomic.NoRoom) as caught:
        atomic.append(file, b"a longer line\n")
    assert (caught.value.wanted, file.read_bytes()) == (14, b"one\n")
    atomic.append(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"


def test_a_disk_is_asked_before_it_is_written_to(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: Usage)
    far = tmp_path / "not/yet/there"
    atomic.check_room(far, 1000)
    with pytest.raises(atomic.NoRoom, match="takes 1,001 bytes; 1,000 bytes"):
        atomic.check_room(far, 1001)
    with pytest.raises(atomic.NoRoom):
        with atomic.replacing(tmp_path / "a", 1001):
            raise AssertionError("begun")


def test_hdf5s_error_is_seen_for_what_it_is():
    text = "Can't write (errno = 28, error message = 'No space left on device')"
    assert atomic.is_full(OSError(text))
    assert not atomic.is_full(OSError(13, "Permission denied"))


def test_a_process_on_a_full_disk_says_so(workshop, tmp_path):  # noqa: F811
    """Caches only warn; a checkpoint stops the run, resumable."""
    command = [
        sys.executable, "-m", "keras_gemma_ft.train",
        f"--preset={workshop / 'preset'}", f"--run_dir={tmp_path / 'run'}",
        f"--data.train={workshop / 'train.jsonl'}", "--data.eval=none",
        f"--data.cache={tmp_path / 'data'}", "--model.quantize=nf4",
        f"--model.quantize_cache={tmp_path / 'codes'}", "--train.samples=0",
        "--train.steps=1", "--data.sequence_length=96", "--lora.rank=8",
    ]  # fmt: skip
    # 10 blocks of 512 bytes: less than a checkpoint, more than config.json.
    limited = ["sh", "-c", 'ulimit -f 10 && exec "$@"', "sh", *command]
    done = subprocess.run(
        limited,
        env={
            **os.environ,
            # It compiles nothing.
            "KERAS_BACKEND": "torch",
            # Keras imports matplotlib, which would look for fonts, 4 s.
            "MPLCONFIGDIR": matplotlib.get_cachedir(),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == runtime.RESUMABLE, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["status"], result["steps"]) == ("stopped", 0)
    assert f"Stopped: {result['error']}" in done.stderr
    assert "There is no checkpoint yet" in result["error"]
    assert "Traceback" not in done.stderr
    assert f"the cache {tmp_path / 'data'} cannot be written" in done.stderr
    assert f"not kept in {tmp_path / 'codes'}" in done.stderr
    for folder in ("run/checkpoints", "data", "codes"):
        assert not [*(tmp_path / folder).iterdir()], folder
