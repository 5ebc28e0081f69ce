"""Peak memory of a process: of the device where there is one, else resident.

On a CPU the kernel counts: VmHWM of /proc/self/status, which writing 5 to
/proc/self/clear_refs starts anew. Compilation is over by then.
"""

import contextlib
import ctypes
import os
import sys

from tests.benchmarks.processes import memory_line


def device(backend):
    """`backend` where it computes on a GPU, else None."""
    if backend == "torch":
        import torch

        return backend if torch.cuda.is_available() else None
    if backend == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else backend
    import tensorflow as tf

    return backend if tf.config.list_physical_devices("GPU") else None


def reset(kind):
    """The peak counts from now; JAX's on a GPU counts from its start."""
    if kind == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif kind == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")
    elif kind is None and sys.platform == "linux":
        # What was freed while compiling should not count as in use.
        trim()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def trim():
    """Gives back to the system what was freed, as far as malloc can."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def read(kind):
    """{"peak", "now", "where"}: bytes, and whose: "device" or "process"."""
    if kind == "torch":
        import torch

        now = torch.cuda.memory_allocated()
        return _found(torch.cuda.max_memory_allocated(), now, "device")
    if kind == "jax":
        import jax

        stats = jax.devices()[0].memory_stats()
        now = stats["bytes_in_use"]
        return _found(stats["peak_bytes_in_use"], now, "device")
    if kind == "tensorflow":
        import tensorflow as tf

        stats = tf.config.experimental.get_memory_info("GPU:0")
        return _found(stats["peak"], stats["current"], "device")
    if sys.platform == "linux":
        own = os.getpid()
        peak, now = (memory_line(own, key) for key in ("VmHWM", "VmRSS"))
        return _found(peak, now, "process")
    from keras_gemma_ft import runtime

    peak = runtime.peak_memory_bytes()
    return _found(peak, peak, "process")


def _found(peak, now, where):
    return {"peak": int(peak), "now": int(now), "where": where}
