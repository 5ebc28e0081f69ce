"""How a CPU run keeps its memory, and how much a process has taken."""

import os
import platform
import sys

from keras_gemma_ft.runtime import devices, packages

# On a CPU every step takes and gives back over a GB. By default glibc returns
# it to the kernel, which zeroes each page again: 280,000 page faults and 0.5
# of the 2.5 CPU seconds of a step of tests/benchmarks/step.py on JAX.
_ALLOCATOR = {
    "hugetlb": 1,  # huge pages
    "mmap_max": 0,  # large arrays from the heap too,
    "trim_threshold": 2**40,  # which keeps what it has
    "top_pad": 2**26,
    "arena_max": 1,  # and is one
}


def allocator():
    """Environment in which glibc keeps a CPU run's memory; {} elsewhere."""
    glibc = platform.libc_ver()[0] == "glibc"
    accelerated = devices.tpu() or devices.cuda()
    if not glibc or accelerated or "GLIBC_TUNABLES" in os.environ:
        return {}
    settings = [f"glibc.malloc.{k}={v}" for k, v in _ALLOCATOR.items()]
    return {"GLIBC_TUNABLES": ":".join(settings)}


def restart(environment):
    """The same command again: glibc reads its settings at a process's start.

    Only for `python -m keras_gemma_ft.VERB`, whose start costs 0.1 s.
    """
    if environment and packages.is_verb():
        sys.stdout.flush()
        os.environ.update(environment)
        os.execv(sys.executable, sys.orig_argv)


def available_bytes():
    """Bytes of memory that a process may still take; None if it is unknown."""
    try:
        with open("/proc/meminfo") as file:
            told = dict(line.split(":", 1) for line in file)
        free = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit = _cgroup("memory.max"), _cgroup("memory.current")
    return free if None in limit else min(free, limit[0] - limit[1])


def _cgroup(name):
    """A number of this process's container, or None."""
    try:
        with open(f"/sys/fs/cgroup/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def peak_memory_bytes():
    """The process's largest resident set so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
