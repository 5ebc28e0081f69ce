"""Many processes, one run: JAX's distributed runtime, or torch.distributed.

Process 0 writes and speaks. What one process finds out and all must act on goes
through `gather`, `broadcast`, `once` or `agreed`: a process that decided alone
would leave the others waiting in a step that it never takes.

On JAX the processes' devices make one mesh, and a step's numbers are those of
the whole batch. On Torch each process computes on its rows: `summed`, `total`
and `every` make one batch of them.
"""

import contextlib
import json
import os

import keras

from keras_gemma_ft import config, runtime, workers
from keras_gemma_ft.model import jax_hosts, torch_hosts

# Seconds: for all processes to come, and until a silent one counts as gone.
JOIN, SILENCE = 300, 60


def _means():
    """What the backend has for several processes; None on TensorFlow."""
    found = {"jax": jax_hosts, "torch": torch_hosts}
    return found.get(keras.config.backend())


def start(cfg):
    """Joins the processes that `--hosts` names; before any device is touched.

    Does nothing where there is one process, and the second time.

    Raises:
        UserError: settings that do not fit together, or no cluster is found.
            On JAX a coordinator that does not answer ends the process: exit 2.
    """
    job, means = workers.settings(cfg.hosts, os.environ), _means()
    if job is None:
        return
    if means is None:
        raise config.UserError(
            f"--hosts: many processes need JAX or Torch, the backend is "
            f"{keras.config.backend()}. Use --backend=jax or --backend=torch, "
            f"or drop --hosts."
        )
    if means.joined():
        return
    _join(means, *job)
    runtime.on_abort(
        "another process of this job is gone; its own output says why. The "
        "same command, on every host, goes on from the last checkpoint.",
        runtime.RESUMABLE,
    )
    # Keras draws some values that are then overwritten: not differing ones.
    keras.utils.set_random_seed(cfg.seed)
    runtime.say.quiet = not first()
    runtime.say(f"hosts: {means.describe()}; this one speaks")


def _join(means, count, index, coordinator):
    """Waits for all processes of the job, of which this is one."""
    who = f"{count} processes at {coordinator}"
    if count is None:
        who = "the cluster's other processes"
    absent = (
        f"{who} did not all answer within {JOIN} s. Start every one of them, "
        f"with the same --hosts.coordinator, which all of them can reach."
    )
    runtime.on_abort(absent, runtime.MISTAKE)
    runtime.say(f"hosts: waiting for {who}")
    try:
        means.join(count, index, coordinator, wait=JOIN, silence=SILENCE)
    except TimeoutError:
        raise config.UserError(absent) from None
    except (RuntimeError, ValueError) as error:
        raise config.UserError(
            f"--hosts: {who} could not be joined ({error}). Without a cluster "
            f"that JAX knows, give --hosts.count=2 --hosts.index=0 "
            f"--hosts.coordinator=ADDRESS:PORT; the port must be free, and "
            f"on Torch each process needs a GPU of its own."
        ) from None


def many():
    """Whether this process is one of several."""
    means = _means()
    return means is not None and means.joined() and means.count() > 1


def count():
    """Processes of this job."""
    return _means().count() if many() else 1


def index():
    """This process's number, from 0."""
    return _means().index() if many() else 0


def first():
    """Whether this is the process that writes and speaks."""
    return index() == 0


def broadcast(data):
    """Process 0's bytes, on every process; the others' count for nothing."""
    return _means().broadcast(data) if many() else data


def gather(value):
    """Every process's value, in their order; JSON must be able to hold it."""
    if not many():
        return [value]
    found = _means().gather(json.dumps(value).encode())
    return [json.loads(data) for data in found]


def once(function):
    """What `function()` gives on process 0, where alone it is called.

    JSON must be able to hold it. A UserError is raised on every process.
    """
    if not many():
        return function()
    told = {}
    if first():
        try:
            told["value"] = function()
        except config.UserError as error:
            told["mistake"] = str(error)
    told = json.loads(broadcast(json.dumps(told).encode()))
    if "mistake" in told:
        raise config.UserError(told["mistake"])
    return told["value"]


@contextlib.contextmanager
def agreed():
    """A block without steps in common; a UserError in one is everybody's."""
    mistake = ""
    try:
        yield
    except config.UserError as error:
        if not many():
            raise
        mistake = str(error)
    told = gather(mistake)
    if len(set(told)) == 1 and mistake:
        raise config.UserError(mistake)
    if any(told):
        raise config.UserError(
            "\n".join(f"process {i}: {x}" for i, x in enumerate(told) if x)
        )


def whole(value):
    """A tensor as numpy, wherever its parts are; every process must ask."""
    if many() and _means() is jax_hosts:
        return jax_hosts.whole(value)
    return keras.ops.convert_to_numpy(value)


def fetch(variables):
    """Moves values that no process has alone to the memory of every host.

    For Keras's own writers, at the end: nothing can compute with them then.
    """
    for variable in variables if many() and _means() is jax_hosts else ():
        variable._value = whole(variable.value)


# --- rows of one batch on several processes: Torch ----------------------------


def apart():
    """Whether each process computes on its rows alone, as on Torch."""
    return many() and _means() is torch_hosts


def summed(gradients):
    """Gradients of the whole batch, from those of each process's rows."""
    return torch_hosts.summed(gradients) if apart() else gradients


def total(loss):
    """The whole batch's loss, a number, from that of each process's rows."""
    return sum(gather(loss)) if apart() else loss


def every(flag):
    """Whether `flag`, a boolean tensor, is true for every process's rows."""
    return torch_hosts.every(flag) if apart() else flag
