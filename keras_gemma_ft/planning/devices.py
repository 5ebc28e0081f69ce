"""Machines: what a device holds, computes and moves. No framework is imported.

TPU memory is what the compiler allows a program (libtpu 0.0.42 and 0.0.52 say
so when refusing one); a GPU's is what CUDA reports as its total, context not
yet taken off. Rates are data sheets': cloud.google.com/tpu/docs, NVIDIA's, for
dense 16-bit products with float32 accumulation. A v3 or v4 chip is two devices.
"""

import dataclasses
import difflib
import math
import os
import re
import time

import numpy as np

from keras_gemma_ft import config

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of machine.

    Attributes:
        name: as `--device` has it.
        kind: "tpu", "gpu" or "cpu".
        count: devices.
        memory: bytes that a program may use on one.
        flops: FLOP/s of one in `dtype`; 0 is unknown.
        bandwidth: bytes/s between one and its memory; 0 is unknown.
        link: bytes/s that one sends to the others; 0 is unknown.
        dtype: what it computes in by default.
        topology: libtpu's name of it, "" where there is no compiler.
        capability: CUDA's compute capability, 0 elsewhere.
        sustained: FLOP/s that large products reach, not the sheet's.
    """

    name: str
    kind: str
    count: int
    memory: float
    flops: float
    bandwidth: float
    link: float
    dtype: str
    topology: str = ""
    capability: float = 0.0
    sustained: float = 0.0


# Chips of the slices that can be had (cloud.google.com/tpu/docs/v5e, v5p ...).
_V3 = "2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32"
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBIC = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
# generation: GiB, FLOP/s, bytes/s of memory, Gbit/s of links a chip, devices a
# chip, what Google's names count of a chip (v3-8: cores, v5e-8: chips), slices
_TPUS = {
    "v3": (15.48, 61.5e12, 450e9, 2624, 2, 2, _V3),
    "v4": (15.25, 137.5e12, 600e9, 2400, 2, 2, _CUBIC),
    "v5e": (15.75, 197e12, 819e9, 1600, 1, 1, _FLAT),
    "v5p": (95.74, 459e12, 2765e9, 4800, 1, 2, _CUBIC),
    "v6e": (31.25, 918e12, 1640e9, 3584, 1, 1, _FLAT),
}
# name: as nvidia-smi has it, GiB, TFLOP/s, GB/s, compute capability.
# FLOP/s: NVIDIA's data sheets and, for GeForce (which accumulate in float32 at
# half the rate), the GA102, Ada and Blackwell white papers; A10G: its own sheet,
# not the A10's 125. A P100 has no tensor cores: its float32 rate.
_GPUS = {
    "t4": (r"\bT4\b", 14.56, 65, 320, 7.5),
    "p100": (r"\bP100\b", 15.89, 9.3, 732, 6.0),
    "v100_16": (r"\bV100", 15.77, 125, 900, 7.0),
    "v100_32": (r"\bV100", 31.73, 125, 900, 7.0),
    "l4": (r"\bL4\b", 22.0, 121, 300, 8.9),
    "a10g": (r"\bA10G\b", 22.0, 70, 600, 8.6),
    "rtx3060": (r"\bRTX 3060$", 11.6, 25.5, 360, 8.6),
    "rtx3090": (r"\bRTX 3090$", 23.6, 71, 936, 8.6),
    "rtx4090": (r"\bRTX 4090$", 23.6, 165, 1008, 8.9),
    "rtx5090": (r"\bRTX 5090$", 31.4, 209, 1792, 12.0),
    "l40s": (r"\bL40S\b", 44.4, 362, 864, 8.9),
    "a100_40": (r"\bA100\b", 39.4, 312, 1555, 8.0),
    "a100_80": (r"\bA100\b", 79.1, 312, 2039, 8.0),
    "h100": (r"\bH100\b(?!.*(PCIe|NVL))", 79.1, 989, 3350, 9.0),
    "h100_pcie": (r"\bH100 PCIe\b", 79.1, 756, 2000, 9.0),
    "h200": (r"\bH200\b", 139.8, 989, 4800, 9.0),
    "b200": (r"\bB200\b", 178.4, 2250, 8000, 10.0),
}
# TFLOP/s that large products reach where somebody measured: ours on an H200; a
# T4 at its 70 W (forums.developer.nvidia.com, 264462). Others: H200's share.
_SUSTAINED = {"h200": 790, "t4": 24}
_SHARE = 790 / 989
# Bytes/s between the GPUs of a machine: PCIe 3.0 x16, what the least have.
_PCIE = 15.75e9


def _chips(slice_):
    """Chips of a slice such as "2x4"."""
    return math.prod(map(int, slice_.split("x")))


# name: libtpu's, as in {"tpu_v5e_8": "v5e:2x4"}
_NAMED = {
    f"tpu_{generation}_{_chips(slice_) * counted}": f"{generation}:{slice_}"
    for generation, (*_, counted, slices) in _TPUS.items()
    for slice_ in slices.split()
}
NAMES = (*_NAMED, *_GPUS, "t4x2", "cpu")


def device(name):
    """The `Device` that `--device=name` means.

    Raises:
        config.UserError: no such name.
    """
    if name == "cpu":
        return cpu()
    count, card = _several(name)
    if card in _GPUS:
        return _gpu(card, count, name)
    topology = _NAMED.get(name, name)
    match = re.fullmatch(r"(v\d\w?):(\d+(?:x\d+)+)", topology)
    if not match or match[1] not in _TPUS:
        raise config.UserError(_unknown(name))
    memory, flops, bandwidth, gigabits, each, *_ = _TPUS[match[1]]
    # Half of the links' bits go out.
    link = gigabits * 1e9 / 8 / 2 / each
    return Device(
        name, "tpu", _chips(match[2]) * each, memory * GIB, flops, bandwidth,
        link, "bfloat16", topology,
    )  # fmt: skip


def _several(name):
    """(count, name of one) of "h100", "8xh100" and "h100x8"."""
    before = re.fullmatch(r"([1-9]\d*)x(\w+)", name)
    after = re.fullmatch(r"(\w+)x([1-9]\d*)", name)
    if before:
        return int(before[1]), before[2]
    if after and name not in _GPUS:
        return int(after[2]), after[1]
    return 1, name


def _unknown(name):
    """What to say of a name that is none: up to three near ones, and all."""
    plain = re.sub(r"[-\s]+", "_", name.lower()).replace("v5litepod", "v5e")
    count, card = _several(plain.replace("rtx_", "rtx"))
    tpu = re.fullmatch(r"(?:tpu_?)?(v\d[a-z]?)_?(\d+)", plain)
    if tpu and tpu[1] in _TPUS:
        near = [n for n in _NAMED if n.startswith(f"tpu_{tpu[1]}_")]
        asked = int(tpu[2])
        near.sort(key=lambda n: abs(int(n.rpartition("_")[2]) - asked))
    else:
        cards = [n for n in _GPUS if card in n and len(card) > 1]
        near = cards or difflib.get_close_matches(card, NAMES, 3, 0.6)
        if count > 1:
            near = [f"{count}x{n}" for n in near if n in _GPUS]
    told = f" Did you mean: {', '.join(near[:3])}?" if near else ""
    return f"--device={name} is not known.{told} Known: {listed()}."


def listed():
    """Every name of a device, in words: TPUs by what their number may be."""
    parts = []
    for generation in _TPUS:
        prefix = f"tpu_{generation}_"
        found = [n for n in _NAMED if n.startswith(prefix)]
        parts += [
            " ".join([found[0], *(n[len(prefix) - 1 :] for n in found[1:])])
        ]
    return (
        f"{', '.join((*parts, *_GPUS, 'cpu'))}; several GPUs as 8xh100; or a "
        f"TPU topology such as v5e:4x4"
    )


def cpu(count=1):
    """This machine without an accelerator, `count` devices of it."""
    return Device(
        "cpu", "cpu", count, host_memory() / count, _host_flops() / count,
        0, 0, "float32",
    )  # fmt: skip


def host_memory():
    """Bytes of memory that this process may have: the machine's or cgroup's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        try:
            with open(path) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # no cgroup, or "max"
            continue
    return total


def _host_flops():
    """FLOP/s of NumPy's float32 product here: the best of six, 0.2 s."""
    a = np.ones((1024, 1024), "float32")
    best = 1e9
    for _ in range(6):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


# What libtpu must be told where there is no TPU to ask.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


# What JAX calls them (`jax.Device.device_kind`).
_KINDS = {
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def tpu_of(kind, count):
    """The `Device` for JAX's name of a TPU, or None where it is unknown."""
    short = _KINDS.get(kind)
    if short is None:
        return None
    each = _TPUS[short][4]
    found = device(f"{short}:1x{-(-count // each)}")
    return dataclasses.replace(found, name=f"{count} x {kind}", count=count)


def _gpu(name, count, said=""):
    _, memory, flops, bandwidth, capability = _GPUS[name]
    return Device(
        said or (name if count == 1 else f"{count}x{name}"), "gpu", count,
        memory * GIB,
        flops * 1e12, bandwidth * 1e9, _PCIE if count > 1 else 0,
        # A T4 only emulates bfloat16.
        "bfloat16" if capability >= 8.0 else "float16",
        capability=capability,
        sustained=_SUSTAINED.get(name, _SHARE * flops) * 1e12,
    )  # fmt: skip


def gpu_of(title, memory, capability=0.0, count=1):
    """The `Device` that is here: by its name, by its memory if that is unknown.

    Args:
        title: as nvidia-smi names it, such as "NVIDIA A100-SXM4-40GB".
        memory: bytes of one, as nvidia-smi tells them.
        capability: compute capability; 0 is unknown.
        count: how many.
    """

    def far(name):
        return abs(_GPUS[name][1] * GIB - memory)

    named = [name for name, row in _GPUS.items() if re.search(row[0], title)]
    # A slice of a card (MIG, vGPU) has its name, not its rates.
    named = [name for name in named if far(name) < 0.2 * memory]
    name = min(named or _GPUS, key=far)
    found = _gpu(name, count)
    if named:
        return dataclasses.replace(found, memory=min(found.memory, memory))
    capability = capability or found.capability
    return dataclasses.replace(
        found, name=f"{title or 'a GPU'}, taken for {name}",
        memory=0.97 * memory, capability=capability,
        dtype="bfloat16" if capability >= 8.0 else "float16",
    )  # fmt: skip
