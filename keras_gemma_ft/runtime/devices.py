"""Which accelerators are attached, told without importing a framework."""

import itertools
import os
import pathlib

from keras_gemma_ft.runtime import packages


def tpu():
    """Is a TPU attached? Looks at device files and Cloud TPU's environment."""
    device = any(pathlib.Path("/dev").glob("accel[0-9]*"))
    vfio = any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    if vfio and packages.installed("libtpu"):
        return True
    return device or "TPU_NAME" in os.environ


def cuda():
    """Is an NVIDIA GPU attached and visible?"""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    # A container may be lent the fourth GPU alone, which is nvidia3.
    return any(pathlib.Path("/dev").glob("nvidia[0-9]*"))


def gpus():
    """The visible NVIDIA GPUs, each as CUDA_VISIBLE_DEVICES would name it."""
    if not cuda():
        return []
    told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if told:
        names = (name.strip() for name in told.split(","))
        # CUDA, too, stops at the first that is none.
        return list(itertools.takewhile(lambda x: x not in ("", "-1"), names))
    found = pathlib.Path("/dev").glob("nvidia[0-9]*")
    return [str(i) for i, _ in enumerate(found)]


def cuda_capability():
    """Compute capability of the first GPU (T4 7.5, A100 8.0, H100 9.0)."""
    return _number(_nvidia("compute_cap"))


def cuda_memory():
    """Bytes of the first GPU; 0 where there is none to ask."""
    return int(_number(_nvidia("memory.total")) * 2**20)


def cuda_name():
    """The first GPU's name, such as "Tesla T4"; "" where there is none."""
    return _nvidia("name")


def _number(text):
    try:
        return float(text)
    except ValueError:  # such as "No devices were found"
        return 0.0


def _nvidia(what):
    """What nvidia-smi tells of the first GPU, as text; else ""."""
    import subprocess

    command = [
        "nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits",
    ]  # fmt: skip
    try:
        text = subprocess.run(
            command, capture_output=True, text=True, timeout=20
        ).stdout
        return text.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return ""
