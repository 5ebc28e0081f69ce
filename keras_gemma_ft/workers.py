"""The processes of a job: which `--hosts` names, and starting a machine's own.

Torch computes on one GPU a process. On a machine with several, `train` starts
a process for each, as a `family`, waits for them and ends as they do.
Nothing here imports a framework.
"""

import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import threading

from keras_gemma_ft import config, family, runtime
from keras_gemma_ft.data import pipeline

_ENVIRONMENT = "KERAS_DISTRIBUTION_"


def settings(hosts, environment):
    """(count, index, coordinator) of the job, None where it is one process.

    All three are None where JAX is to ask the cluster.

    Args:
        hosts: `config.Hosts`.
        environment: `os.environ`, for Keras's own variables.

    Raises:
        UserError: they do not fit together; every offence in one message.
    """
    told = {
        name: environment.get(_ENVIRONMENT + name, "").strip()
        for name in ("NUM_PROCESSES", "PROCESS_ID", "JOB_ADDRESSES")
    }
    wrong = [
        f"${_ENVIRONMENT}{name}={told[name]}: expected a number."
        for name in ("NUM_PROCESSES", "PROCESS_ID")
        if not re.fullmatch(r"\d*", told[name])
    ]
    if wrong:
        raise config.UserError("\n".join(wrong))
    count = hosts.count or int(told["NUM_PROCESSES"] or 0)
    index, coordinator = hosts.index, hosts.coordinator
    if count == -1 and index == -1 and not coordinator:
        return None, None, None
    if count > 0 and index == -1 and told["PROCESS_ID"]:
        index = int(told["PROCESS_ID"])
    if count > 0 and not coordinator:
        coordinator = told["JOB_ADDRESSES"].split(",")[0]
    if count in (0, 1) and index in (-1, 0):
        if count == 1 or not (coordinator or any(told.values())):
            return None
    wrong = _offences(count, index, coordinator)
    if wrong:
        raise config.UserError("\n".join(wrong))
    return count, index, coordinator


def _offences(count, index, coordinator):
    """What is wrong with a job of one's own, a line each."""
    if count == -1:
        return [
            "--hosts.count=-1 asks the cluster; drop --hosts.index and "
            "--hosts.coordinator, or give the count."
        ]
    if count < 1:
        return [
            f"--hosts.count={count}: expected the number of processes, as in "
            f"--hosts.count=2, since an index or a coordinator is given."
        ]
    wrong = []
    if not 0 <= index < count:
        wrong.append(
            f"--hosts.index={index}: {count} processes are numbered 0 to "
            f"{count - 1}, each its own."
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        wrong.append(
            f"--hosts.coordinator={coordinator}: expected process 0's "
            f"address and a free port, as in 10.0.0.1:1234."
        )
    return wrong


def wanted(cfg):
    """Processes that `train` must start on this machine; 1 is itself.

    Says so where a GPU stays unused.

    Raises:
        UserError: `--hosts.local` does not suit the backend, the GPUs or the
            batch; the message says what to type.
    """
    backend, _ = runtime.choose_backend(cfg.backend)
    here = runtime.gpus() if runtime.uses_cuda(backend) else []
    asked = cfg.hosts.local
    if backend != "torch":
        return _one(backend, here, asked)
    job = settings(cfg.hosts, os.environ)
    if job and job[0] is None:
        raise config.UserError(
            "--hosts.count=-1 asks the cluster, which JAX does. With Torch "
            "give every machine --hosts.count, --hosts.index and "
            "--hosts.coordinator, or use --backend=jax."
        )
    machines = job[0] if job else 1
    rows = cfg.data.micro_batch_size or cfg.data.batch_size
    if asked == "auto":
        most = max(1, len(here))
        parts = range(most, 0, -1)
        count = next((n for n in parts if rows % (n * machines) == 0), 1)
        if count < most:
            runtime.say(
                f"hosts: {rows} rows do not divide over {most * machines} "
                f"GPUs; of {most} here {count} works"
            )
    else:
        count = int(asked)
    if here and count > len(here):
        raise config.UserError(
            f"--hosts.local={count}: a process needs a GPU of its own, "
            f"{len(here)} can be seen. Use --hosts.local={len(here)}."
        )
    pipeline.micro_batches(
        cfg.data.batch_size, cfg.data.micro_batch_size, count * machines
    )
    return count


def _one(backend, here, asked):
    """1: what is not Torch computes in one process a machine."""
    cure = {
        "jax": "JAX uses all devices of a machine from one process (--mesh)",
        "tensorflow": "several GPUs are for JAX (--mesh) or --backend=torch",
    }[backend]
    if asked not in ("auto", "1"):
        raise config.UserError(
            f"--hosts.local={asked} is for --backend=torch, the backend is "
            f"{backend}. Drop it: {cure}."
        )
    if backend == "tensorflow" and len(here) > 1:
        # It would take the memory of all.
        os.environ["CUDA_VISIBLE_DEVICES"] = here[0]
        runtime.say(f"hosts: TensorFlow uses one GPU of {len(here)}; {cure}")
    return 1


def say_one(cfg, backend):
    """Says what a verb leaves unused that starts no processes."""
    here = runtime.gpus() if runtime.uses_cuda(backend) else []
    if backend == "torch" and len(here) > 1:
        runtime.say(f"hosts: one GPU of {len(here)} is used; train uses all")
    elif cfg.hosts.local not in ("auto", "1"):
        runtime.say(
            f"hosts: --hosts.local={cfg.hosts.local} is for train; this is one "
            f"process"
        )


def run(cfg, count, module="keras_gemma_ft.train"):
    """Runs `cfg` as `count` processes of this machine; waits for them.

    Args:
        cfg: `config.Config`.
        count: processes; where there are GPUs, one for each of the first.
        module: the verb.

    Returns:
        The result of process 0.

    Raises:
        runtime.Ended: a process ended with another exit code, and said why.
        runtime.Stopped: a process was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        members = family.Family(pathlib.Path(folder))
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {
                number: signal.signal(number, members.note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        try:
            for command, environment in _commands(cfg, count, module):
                members.start(command, environment)
            members.wait()
        finally:
            members.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return members.result()


def _commands(cfg, count, module):
    """Yields (command, environment) of each process."""
    job = settings(cfg.hosts, os.environ)
    machines, index, coordinator = job or (1, 0, f"127.0.0.1:{_free_port()}")
    names = runtime.gpus() if runtime.uses_cuda("torch") else []
    threads = max(1, (os.cpu_count() or 1) // count)
    runtime.say(
        f"hosts: starting {count} processes"
        + (f", GPUs {', '.join(names[:count])}" if names else "")
    )
    for local in range(count):
        own = config.replace(
            cfg,
            {
                "hosts.count": machines * count,
                "hosts.index": index * count + local,
                "hosts.coordinator": coordinator,
                "hosts.local": "1",
            },
        )
        flags = [f"--{k}={v}" for k, v in _said(own).items()]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment[family.STARTED] = "1"
        if names:
            environment["CUDA_VISIBLE_DEVICES"] = names[local]
        yield [sys.executable, "-m", module, *flags], environment


def _said(cfg):
    """{path: value} of what a started process is told.

    What the user has not typed of LoRA is left to the adapter that a run goes
    on from: typed flags must agree with it.
    """
    return {
        path: value
        for path, value in config.flatten(cfg).items()
        if path in config.typed(cfg)
        or not (cfg.adapter and path.startswith("lora."))
    }


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
