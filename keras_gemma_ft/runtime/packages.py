"""Which packages are installed, told without importing any of them."""

import contextlib
import importlib.metadata
import importlib.util
import platform
import sys


def installed(name):
    """Whether `import name` would find a module."""
    return importlib.util.find_spec(name) is not None


def built_for_cuda(name):
    """Whether the installed framework `name` can use CUDA."""
    if name == "torch":
        return "+cpu" not in importlib.metadata.version("torch")
    if name == "jax":
        return installed("jax_cuda12_plugin") or installed("jax_cuda13_plugin")
    return platform.system() == "Linux"


def is_verb():
    """Whether this process is `python -m keras_gemma_ft.VERB`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("keras_gemma_ft.")


def versions():
    """{package: version} of what decides a run's numbers."""
    packages = ("keras", "keras-hub", "jax", "tensorflow", "torch", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
