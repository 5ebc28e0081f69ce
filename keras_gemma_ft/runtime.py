"""All that must precede `import keras`, and what every verb shares.

Nothing here imports keras: the backend is decided first, by looking at the
devices and at what is installed, never by importing a framework.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import signal
import sys
import time
import traceback

from absl import logging

from keras_gemma_ft import command_line, config

DONE, BUG, MISTAKE, RESUMABLE = 0, 1, 2, 75
_EXTRAS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}


class Stopped(Exception):
    """The run stopped before its end and can be continued. Exit 75."""

    def __init__(self, message, result):
        super().__init__(message)
        self.result = result


class Ended(Exception):
    """A process that did our work ended with `status`, and has said why."""

    def __init__(self, result, status):
        super().__init__(f"exit code {status}")
        self.result, self.status = result, status


def main(verb, doc):
    """Runs a verb as a process: flags in, one JSON line out, an exit code.

    Args:
        verb: function of a `Config` that returns the result as a dict.
        doc: the verb's docstring, for `--help`.

    Everything that is printed on the way goes to stderr, so that the JSON
    object is stdout's last line.
    """
    if {"--help", "-help", "-h", "--helpfull"} & set(sys.argv[1:]):
        print(command_line.help_text(doc))
        sys.exit(DONE)
    _restart(allocator())
    signal.signal(signal.SIGTERM, _terminate)
    status, result = BUG, None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            cfg = command_line.from_flags(sys.argv[1:])
            result, status = verb(cfg), DONE
        except config.UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            result, status = {"status": "error", "error": str(error)}, MISTAKE
        except Stopped as stop:
            print(f"Stopped: {stop}", file=sys.stderr)
            result, status = stop.result, RESUMABLE
        except Ended as end:
            result, status = end.result, end.status
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            result, status = {"status": "interrupted"}, RESUMABLE
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            result = {"status": "bug", "error": what}
            if _ABORT and re.search("Gloo|NCCL|oordination ?[Ss]ervice", what):
                # JAX's runtime does not outlive it.
                _aborted()
    print(json.dumps(result, ensure_ascii=False), flush=True)
    _ABORT["ended"] = status
    if "handler" in _ABORT and status != DONE:
        # What JAX has to say of the others would bury the reason.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(status)


_ABORT = {}


def on_abort(message, status):
    """Has abort() end the process with a message, a JSON line and `status`.

    JAX aborts, from a thread of its own, a process whose fellows are gone or
    do not come; no `except` sees that.
    """
    if "handler" not in _ABORT:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
        _ABORT["handler"] = handler  # Kept: C knows its address only.
        # Not signal.signal, whose handlers wait for the main thread.
        ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    _ABORT.update(message=message, status=status)


def _aborted(number=None):
    if "ended" not in _ABORT:
        message, status = _ABORT["message"], _ABORT["status"]
        word = "error" if status == MISTAKE else "stopped"
        line = json.dumps({"status": word, "error": message})
        os.write(2, f"{word.capitalize()}: {message}\n".encode())
        os.write(1, f"{line}\n".encode())
    os._exit(_ABORT.get("ended", _ABORT["status"]))


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
    if not glibc or tpu() or cuda() or "GLIBC_TUNABLES" in os.environ:
        return {}
    settings = [f"glibc.malloc.{k}={v}" for k, v in _ALLOCATOR.items()]
    return {"GLIBC_TUNABLES": ":".join(settings)}


def _restart(environment):
    """The same command again: glibc reads its settings at a process's start.

    Only for `python -m keras_gemma_ft.VERB`, whose start costs 0.1 s.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if environment and spec and spec.name.startswith("keras_gemma_ft."):
        sys.stdout.flush()
        os.environ.update(environment)
        os.execv(sys.executable, sys.orig_argv)


def _terminate(number, frame):
    """SIGTERM outside of training, where there is nothing to save.

    No exception: what is being imported may swallow it and go on.
    """
    os.write(2, b"Interrupted.\n")
    os.write(1, b'{"status": "interrupted"}\n')
    os._exit(RESUMABLE)


def start(cfg):
    """Sets Keras's backend and quiets the frameworks; says what and why.

    Returns:
        The backend's name.

    Raises:
        UserError: the backend that was asked for is not installed.
    """
    if "keras" in sys.modules:
        raise AssertionError("runtime.start must come before `import keras`")
    backend, why = choose_backend(cfg.backend)
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
    if backend == "torch" and (folder := config.cache_folder("torch")):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    logging.set_verbosity(logging.WARNING)
    say(f"backend: {backend} ({why})")
    return backend


def choose_backend(asked):
    """(backend, reason) for `--backend=asked`, before keras is imported."""
    installed = [name for name in config.BACKENDS if _found(name)]
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
    elif tpu() and "jax" in installed:
        asked, why = "jax", "a TPU is here"
    elif cuda() and installed:
        order = ("torch", "jax", "tensorflow")
        able = [name for name in order if name in installed and _cuda(name)]
        asked = (able or installed)[0]
        why = "a CUDA GPU is here" + ("" if able else ", but no CUDA build")
    else:
        asked = (installed or ["jax"])[0]
        why = "no accelerator; first installed of jax, tensorflow, torch"
    if asked not in installed:
        raise config.UserError(
            f"--backend={asked} is not installed "
            f"(installed: {', '.join(installed) or 'none'}). "
            f"Try: pip install 'keras_gemma_ft[{_EXTRAS[asked]}]'"
        )
    return asked, why


def _found(name):
    return importlib.util.find_spec(name) is not None


def tpu():
    """Is a TPU attached? Looks at device files and Cloud TPU's environment."""
    device = any(pathlib.Path("/dev").glob("accel[0-9]*"))
    vfio = any(pathlib.Path("/dev/vfio").glob("[0-9]*")) and _found("libtpu")
    return device or vfio or "TPU_NAME" in os.environ


def cuda():
    """Is an NVIDIA GPU attached and visible?"""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    # A container may be lent the fourth GPU alone, which is nvidia3.
    return any(pathlib.Path("/dev").glob("nvidia[0-9]*"))


def _cuda(name):
    """Can the installed framework use CUDA? Told from its packages."""
    if name == "torch":
        return "+cpu" not in importlib.metadata.version("torch")
    if name == "jax":
        return _found("jax_cuda12_plugin") or _found("jax_cuda13_plugin")
    return platform.system() == "Linux"


def uses_cuda(backend):
    """Whether `backend` can compute on the GPU that is here."""
    return cuda() and _cuda(backend)


def choose_dtype(asked):
    """(dtype, reason) for `--model.dtype`, after keras chose its backend."""
    if asked != "auto":
        return asked, "--model.dtype says so"
    if tpu():
        return "bfloat16", "TPUs compute in bfloat16"
    if cuda():
        # is_bf16_supported() is True on a T4, which only emulates it.
        if cuda_capability() >= 8.0:
            return "bfloat16", "the GPU has bfloat16"
        return "float16", "the GPU has no bfloat16"
    return "float32", "CPUs are fastest and exact in float32"


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


def versions():
    """{package: version} of what decides a run's numbers."""
    packages = ("keras", "keras-hub", "jax", "tensorflow", "torch", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory_bytes():
    """The process's largest resident set so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_START = time.monotonic()


def say(text):
    """One line for the person who watches, on stderr, with the time."""
    if not say.quiet:
        print(f"[{time.monotonic() - _START:6.1f}s] {text}", file=sys.stderr)


say.quiet = False  # Of many processes, one speaks.
