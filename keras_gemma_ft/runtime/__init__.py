"""All that must precede `import keras`, and what every verb shares.

Nothing here imports keras: the backend is decided first, by looking at the
devices and at what is installed, never by importing a framework. Callers use
the names below, as in `runtime.say`; tests replace them where they are defined.
"""

from keras_gemma_ft.runtime.backend import (
    choose_backend,
    choose_dtype,
    start,
    uses_cuda,
)
from keras_gemma_ft.runtime.devices import (
    cuda,
    cuda_capability,
    cuda_memory,
    cuda_name,
    gpus,
    tpu,
)
from keras_gemma_ft.runtime.memory import (
    allocator,
    available_bytes,
    peak_memory_bytes,
)
from keras_gemma_ft.runtime.output import say
from keras_gemma_ft.runtime.packages import versions
from keras_gemma_ft.runtime.process import (
    BUG,
    DONE,
    MISTAKE,
    RESUMABLE,
    Ended,
    Stopped,
    main,
    on_abort,
)

__all__ = [
    "BUG", "DONE", "MISTAKE", "RESUMABLE", "Ended", "Stopped", "allocator",
    "available_bytes", "choose_backend", "choose_dtype", "cuda",
    "cuda_capability", "cuda_memory", "cuda_name", "gpus", "main",
    "on_abort", "peak_memory_bytes", "say", "start", "tpu", "uses_cuda",
    "versions",
]  # fmt: skip
