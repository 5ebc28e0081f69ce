"""How Torch's processes find each other, talk, and add up gradients.

See `hosts`, which is what the others call. Each process has one device and all
of the weights. Gloo carries what lies in the host's memory, NCCL what lies on
GPUs.
"""

import atexit
import contextlib
import datetime
import os
import socket
import sys
import threading
import time

# Bytes of gradients that are summed at once; they are copied for that.
_BUCKET = 2**26
# Seconds between two signs of life.
_BEAT = 2
# A process may wait for another as long as that one is alive.
_FOREVER = datetime.timedelta(days=30)


def joined():
    """Whether this process has joined a job."""
    import torch.distributed

    return (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )


def join(count, index, coordinator, *, wait, silence):
    """Waits for all processes of the job, of which this is one.

    Args:
        count, index, coordinator: as `workers.settings` gives them.
        wait: seconds for all to come.
        silence: seconds until a silent process counts as gone; this one is
            aborted then.

    Raises:
        TimeoutError: they did not all come.
        RuntimeError, ValueError: a port that is taken, or a GPU that is.
    """
    import torch
    from torch import distributed

    deadline = time.monotonic() + wait
    store = _meet(count, index, coordinator, deadline)
    on_gpu = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=distributed.PrefixStore("job", store),
        rank=index,
        world_size=count,
        timeout=_FOREVER,
    )
    if on_gpu:
        # Two processes on one GPU are refused here, not in the first step.
        distributed.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
    _watch(count, index, coordinator, silence)


def _meet(count, index, coordinator, deadline):
    """The job's store, once all processes have come to it.

    In short waits: Python sees to a signal between two of them.
    """
    from torch import distributed

    host, _, port = coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    while index and not _answers(address):
        _in_time(deadline)
    store = distributed.TCPStore(
        *address,
        is_master=index == 0,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=max(1, deadline - time.monotonic())),
    )
    store.add("came", 1)
    while store.add("came", 0) < count:
        _in_time(deadline)
    return store


def _answers(address):
    with contextlib.suppress(OSError):
        socket.create_connection(address, timeout=1).close()
        return True
    return False


def _in_time(deadline):
    if time.monotonic() > deadline:
        raise TimeoutError
    time.sleep(0.1)


def _watch(count, index, coordinator, silence):
    """Shows that this process lives, and aborts it if another one does not.

    Gloo sees a closed connection at once. NCCL waits for ever, and either does
    for a machine that has lost its power.
    """
    from torch import distributed

    host, _, port = coordinator.rpartition(":")
    # One of its own: the job's may be in use by a thread that waits.
    store = distributed.TCPStore(
        host.strip("[]"), int(port), is_master=False, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=5 * _BEAT),
    )  # fmt: skip
    keys = [f"alive/{i}" for i in range(count)]
    store.set(keys[index], "0")
    store.wait(keys, datetime.timedelta(seconds=silence))
    # Counted, not read from a clock: one that was itself suspended must not
    # take the others for gone.
    silent, over = [0], threading.Event()

    def beat():
        number, seen = 0, {}
        while not over.wait(_BEAT):
            number += 1
            with contextlib.suppress(RuntimeError):
                store.set(keys[index], str(number))
                found = dict(zip(keys, store.multi_get(keys)))
                if all(found[key] != seen.get(key) for key in keys):
                    silent[0], seen = 0, found

    def check():
        while not over.wait(1):
            silent[0] += 1
            if silent[0] > silence:
                os.abort()

    threads = [threading.Thread(target=f, daemon=True) for f in (beat, check)]
    for thread in threads:
        thread.start()

    def leave():
        over.set()
        # C++ must not be left in the middle by a thread that Python drops.
        for thread in threads:
            thread.join(timeout=2 * _BEAT)
        distributed.destroy_process_group()

    atexit.register(leave)


@contextlib.contextmanager
def _together():
    """What needs all processes: if one is gone, this one is aborted.

    See `runtime.on_abort`, which says how that ends.
    """
    try:
        yield
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"hosts: {first[:200]}", file=sys.stderr, flush=True)
        os.abort()


def describe():
    """The job, in words."""
    import torch

    where = "a CPU each"
    if torch.cuda.is_available():
        where = f"a {torch.cuda.get_device_name()} each"
    return f"{count()} processes, {where}"


def count():
    """Processes of this job."""
    from torch import distributed

    return distributed.get_world_size()


def index():
    """This process's number."""
    from torch import distributed

    return distributed.get_rank()


def broadcast(data):
    """Process 0's bytes, on every process."""
    from torch import distributed

    told = [data]
    with _together():
        distributed.broadcast_object_list(told, src=0)
    return told[0]


def gather(data):
    """Every process's bytes, in their order."""
    from torch import distributed

    found = [None] * count()
    with _together():
        distributed.all_gather_object(found, data)
    return found


def summed(tensors):
    """Each tensor's sum over the processes; equal to the last bit on all.

    Added in float32, in flat pieces of about 64 MiB.
    """
    import torch
    from torch import distributed

    found, bucket = [], []
    for i, tensor in enumerate(tensors, 1):
        bucket.append(tensor)
        size = 4 * sum(t.numel() for t in bucket)
        if size < _BUCKET and i < len(tensors):
            continue
        flat = torch.cat([t.reshape(-1).float() for t in bucket])
        with _together():
            distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in bucket])
        found += [p.view_as(t).to(t.dtype) for p, t in zip(parts, bucket)]
        bucket = []
    return found


def every(flag):
    """Whether a boolean tensor is true on all processes, as a tensor."""
    from torch import distributed

    least = flag.float()
    with _together():
        distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    return least > 0
