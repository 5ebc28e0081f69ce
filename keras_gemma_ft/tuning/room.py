"""A full disk: the run stops, says what it wants and where, and can go on."""

import contextlib
import math

import keras
import numpy as np

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import atomic
from keras_gemma_ft.model import hosts
from keras_gemma_ft.tuning import checkpoint


@contextlib.contextmanager
def needed(run_dir):
    """A block that writes to a run folder; a full disk is no bug there.

    Raises:
        runtime.Stopped: there was no room. Everything that was complete before
            is still complete, and the message says what that is.
    """
    try:
        yield
    except OSError as error:
        if not atomic.is_full(error):
            raise
        raise _stopped(run_dir, error) from error


def _stopped(run_dir, error):
    """What is said about an error of a full disk: `runtime.Stopped`."""
    found = checkpoint.latest(run_dir)
    step = found[1]["step"] if found else 0
    kept = "There is no checkpoint yet, so the same command begins again"
    if found:
        kept = (
            f"The last complete checkpoint is of step {step}, and it stays "
            f"({found[0]}). The same command goes on from it"
        )
    message = f"no room to write. {error.strerror or error}. {kept}, once "
    message += "there is room."
    facts = {"status": "stopped", "error": message, "steps": step}
    if isinstance(error, atomic.NoRoom):
        facts |= {"wanted_bytes": error.wanted, "free_bytes": error.free}
    return runtime.Stopped(message, facts)


def check(run_dir, tuner):
    """Stops a run at its start whose first checkpoint would find no room."""
    if hosts.first():
        folder = run_dir / "checkpoints"
        atomic.check_room(folder, size(checkpoint.variables(tuner).values()))


def size(variables):
    """Bytes of Keras variables as they are stored."""
    return sum(
        math.prod(variable.shape)
        * np.dtype(keras.backend.standardize_dtype(variable.dtype)).itemsize
        for variable in variables
    )
