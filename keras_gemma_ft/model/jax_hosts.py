"""How JAX's processes find each other, talk, and share arrays.

See `hosts`, which is what the others call.
"""

import keras
import numpy as np

# Seconds for the others at the end.
_LEAVE = 15
# Bytes of a broadcast at once: they exist on every device.
_PIECE = 2**26


def joined():
    """Whether this process has joined a job."""
    import jax

    return jax.distributed.is_initialized()


def join(count, index, coordinator, *, wait, silence):
    """Waits for all processes of the job, of which this is one.

    Args:
        count, index, coordinator: None where JAX is to ask the cluster.
        wait: seconds for all to come. JAX aborts the process after that.
        silence: seconds until a silent process counts as gone. JAX aborts the
            others then.

    Raises:
        RuntimeError, ValueError: no cluster, or a port that is taken.
    """
    import jax

    # JAX's would take SIGTERM away from us, who stop and save at it.
    jax.config.update("jax_enable_preemption_service", False)
    # Not keras.distribution.initialize, which calls this and knows no
    # timeouts: five minutes each, and 100 s until a lost process is seen.
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        initialization_timeout=wait,
        heartbeat_timeout_seconds=silence,
        shutdown_timeout_seconds=_LEAVE,
    )
    keras.Variable._direct_assign = _assign


def describe():
    """The job, in words."""
    import jax

    return (
        f"{jax.process_count()} processes, {jax.local_device_count()} "
        f"of {jax.device_count()} devices each"
    )


def count():
    """Processes of this job."""
    import jax

    return jax.process_count()


def index():
    """This process's number."""
    import jax

    return jax.process_index()


def broadcast(data):
    """Process 0's bytes, on every process."""
    from jax.experimental import multihost_utils

    size = len(data) if index() == 0 else 0
    # int32: JAX has no wider integer unless it is told to.
    head = np.array(divmod(size, _PIECE), "int32")
    head = multihost_utils.broadcast_one_to_all(head)
    size = int(head[0]) * _PIECE + int(head[1])
    pieces = []
    for begin in range(0, size, _PIECE):
        here = min(_PIECE, size - begin)
        piece = np.zeros(_padded(here), "uint8")
        if index() == 0:
            piece[:here] = np.frombuffer(data, "uint8", here, begin)
        piece = multihost_utils.broadcast_one_to_all(piece)
        pieces.append(piece[:here].tobytes())
    return b"".join(pieces)


def gather(data):
    """Every process's bytes, in their order; spaces may follow them."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(data, "uint8")
    longest = multihost_utils.process_allgather(np.int32(len(data))).max()
    row = np.full(_padded(int(longest)), ord(" "), "uint8")
    row[: len(data)] = data
    rows = multihost_utils.process_allgather(row)
    return [row.tobytes() for row in rows]


def _padded(size):
    """A power of two: each size is a compilation of its own."""
    return max(1024, 1 << (size - 1).bit_length())


def whole(value):
    """An array as numpy, wherever its parts are; every process must ask."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)


def _assign(variable, value):
    """`Variable._direct_assign`, without a word to the other hosts.

    Keras's ends in `jax.device_put`, which has every device hold the array as
    often as there are hosts, to compare them: 29 GB for 9B's table on 16.
    """
    import jax

    layout = variable._layout
    layout = getattr(layout, "backend_layout", layout)
    traced = isinstance(value, jax.core.Tracer)
    if layout is not None and not traced:
        if getattr(value, "is_fully_addressable", True):
            local = np.asarray(value)
            value = jax.make_array_from_callback(
                local.shape, layout, local.__getitem__
            )
    if layout is not None:
        value = keras.distribution.distribute_tensor(value, layout)
    variable._value = value
