"""The choice of Keras's backend and of the precision, and what comes with it.

The choice must be made before keras is imported: keras reads it once.
"""

import os
import sys

from keras_gemma_ft import config
from keras_gemma_ft.runtime import devices, imports, output, packages

_said = {"backend": None}  # what `start` said last


def start(cfg):
    """Imports Keras with the backend that suits; says which one and why.

    It may be called again: once Keras is imported, nothing changes.

    Returns:
        The backend's name.

    Raises:
        UserError: the backend that was asked for is not installed, or keras
            is already imported with another one.
    """
    backend, why = choose_backend(cfg.backend)
    if backend != _said["backend"]:
        output.say(f"backend: {backend} ({why})")
        _said["backend"] = backend
    if _imported():
        return backend
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if backend != "tensorflow":
        # keras_hub imports TensorFlow where it can: 3 s and 600 MB for code
        # that only its own backend runs.
        sys.modules.setdefault("tensorflow", None)
        sys.modules.setdefault("tensorflow_text", None)
    if backend == "jax" and (folder := config.cache_folder("jax")):
        # Programs of an earlier run: a first step without the compiler.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault(
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2"
        )
    if backend == "jax":
        for name, value in jax_platforms().items():
            os.environ.setdefault(name, value)
    if backend == "torch" and (folder := config.cache_folder("torch")):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    imports.keras_with(backend)
    return backend


def jax_platforms():
    """Environment in which JAX does not look for a TPU that is not here.

    Where libtpu is installed, JAX loads it first, and without a TPU that
    writes an error of seven lines about TPU_WORKER_HOSTNAMES.
    """
    if devices.tpu() or not packages.installed("libtpu"):
        return {}
    return {"JAX_PLATFORMS": "cuda,cpu" if uses_cuda("jax") else "cpu"}


def _imported():
    """The backend of the keras that this process has imported, or ""."""
    keras = sys.modules.get("keras")
    return keras.config.backend() if keras else ""


def choose_backend(asked):
    """(backend, reason) for `--backend=asked`; keras need not be imported.

    Raises:
        UserError: it is not installed, or keras is imported with another one.
    """
    if loaded := _imported():
        if asked not in ("auto", loaded):
            raise config.UserError(
                f"--backend={asked} was asked for, but keras is already "
                f"imported with the backend {loaded}, which a process cannot "
                f"change. Restart the process (in a notebook: the kernel), or "
                f"ask for --backend={loaded}."
            )
        return loaded, "keras is already imported with it"
    installed = [name for name in config.BACKENDS if packages.installed(name)]
    if asked == "auto" and os.environ.get("KERAS_BACKEND"):
        asked = os.environ["KERAS_BACKEND"]
        if asked not in config.BACKENDS:
            raise config.UserError(
                f"KERAS_BACKEND={asked} is not one of "
                f"{', '.join(config.BACKENDS)}. Unset it or use --backend."
            )
        why = "KERAS_BACKEND says so"
    elif asked != "auto":
        why = "--backend says so"
    elif devices.tpu() and "jax" in installed:
        asked, why = "jax", "a TPU is here"
    elif devices.cuda() and installed:
        order = ("torch", "jax", "tensorflow")
        able = [
            name
            for name in order
            if name in installed and packages.built_for_cuda(name)
        ]
        asked = (able or installed)[0]
        why = "a CUDA GPU is here" + ("" if able else ", but no CUDA build")
    else:
        asked = (installed or ["jax"])[0]
        why = "no accelerator; first installed of jax, tensorflow, torch"
    if asked not in installed:
        raise config.UserError(
            f"--backend={asked} is not installed "
            f"(installed: {', '.join(installed) or 'none'}). "
            f"Try: pip install 'keras_gemma_ft[{asked}]'"
        )
    return asked, why


def uses_cuda(backend):
    """Whether `backend` can compute on the GPU that is here."""
    return devices.cuda() and packages.built_for_cuda(backend)


def choose_dtype(asked):
    """(dtype, reason) for `--model.dtype`, after keras chose its backend."""
    if asked != "auto":
        return asked, "--model.dtype says so"
    if devices.tpu():
        return "bfloat16", "TPUs compute in bfloat16"
    if devices.cuda():
        # is_bf16_supported() is True on a T4, which only emulates it.
        if devices.cuda_capability() >= 8.0:
            return "bfloat16", "the GPU has bfloat16"
        return "float16", "the GPU has no bfloat16"
    return "float32", "CPUs are fastest and exact in float32"
