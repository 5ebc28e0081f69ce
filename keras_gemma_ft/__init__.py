"""Fine-tune Gemma 2 with LoRA through KerasHub, on JAX, TensorFlow or Torch."""

import importlib

# The door for notebooks; see api.py.
_DOOR = ("Run", "open", "tune")


def __getattr__(name):
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)
