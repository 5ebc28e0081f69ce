"""The one import of Keras that `runtime.start` makes: quick, and quiet.

Each rule here was timed on the embedded model's `generate`; the commands are
in tests/benchmarks/start_up.py.
"""

import contextlib
import gc
import os
import re
import sys
import tempfile

from absl import logging

from keras_gemma_ft.runtime import packages

# What C++ libraries write through Abseil's log: I0000 00:00:17... file.cc:1]
_LOGGED = re.compile(r"[IWE]\d{4} [\d:.]+ +\d+ \S+:\d+\] |WARNING: All log me")


def keras_with(backend):
    """Imports Keras and KerasHub; Keras's backend must be chosen already."""
    # TensorFlow imports JAX where it can, for its converters: 0.5 s.
    hidden = ["jax"] if backend == "tensorflow" else []
    if packages.is_verb():
        # Keras's galleries and its data frames, which no verb uses: 1.1 s. A
        # notebook may want them.
        hidden += ["matplotlib", "matplotlib.pyplot", "pandas"]
    with _no_collections(), _hide(hidden), without_logs():
        logging.set_verbosity(logging.ERROR)
        import keras_hub  # noqa: F401
    logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def _no_collections():
    """Python's search for cycles takes 1.4 of 6.6 s and would free nothing.

    Later searches pass over what was imported, too: it stays to the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _hide(names):
    """Has modules that are not imported yet look as if not installed."""
    new = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]


@contextlib.contextmanager
def without_logs():
    """Drops what C++ libraries log to stderr; passes on every other line.

    TensorFlow says while it is imported, whatever TF_CPP_MIN_LOG_LEVEL is,
    that oneDNN is on and that there is no GPU. All of it is passed on if the
    import fails, or if the user asked for logs (TF_CPP_MIN_LOG_LEVEL=0).
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            keep = failed or os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0"
            for line in file.read().decode("utf-8", "replace").splitlines(True):
                if keep or not _LOGGED.match(line):
                    sys.stderr.write(line)
