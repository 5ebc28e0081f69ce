"""What a run asks the planner: what to choose, and what to do without room.

`settle` chooses what the settings leave open for the machine that is here, and
refuses a run that cannot fit; `advice` is for one that ran out of memory.
"""

import dataclasses

from keras_gemma_ft import config, runtime
from keras_gemma_ft.model import sharding
from keras_gemma_ft.planning import devices, search


def here(backend):
    """The `devices.Device` that `backend` computes on, on this machine."""
    if backend == "jax":
        import jax

        found = jax.devices()
        count, kind = len(found), found[0].device_kind
        if found[0].platform == "tpu":
            known = devices.tpu_of(kind, count)
            if known is None:
                raise config.UserError(
                    f"--device=auto: JAX names this TPU {kind!r}, which has "
                    f"no figures yet. Name one: {devices.listed()}."
                )
            return known
        if found[0].platform == "cpu":
            return devices.cpu(count)
    memory = runtime.cuda_memory() if runtime.cuda() else 0
    count = len(found) if backend == "jax" else 1
    if backend == "torch":
        count = _processes()
    if memory and runtime.uses_cuda(backend):
        capability = runtime.cuda_capability()
        return devices.gpu_of(runtime.cuda_name(), memory, capability, count)
    return devices.cpu()


def _processes():
    """Processes of Torch that share a batch's rows, each with a device."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def settle(cfg, settings, backend):
    """`cfg` with its `auto` settings chosen for this machine; says what.

    Raises:
        config.UserError: it cannot fit; the message says what would.
    """
    device = here(backend)
    dtype = runtime.choose_dtype(cfg.model.dtype)[0]
    found = search.options(cfg, settings, device, backend=backend, dtype=dtype)
    option = search.best(found, device)
    share = option.estimate.total / device.memory
    if share > search.REFUSED:
        raise config.UserError(refusal(cfg, settings, device, option, backend))
    chosen = option.cfg
    if backend == "jax" and cfg.mesh == "auto":
        auto, _ = sharding.mesh_shape(cfg, device.count)
        whole = option.estimate.bytes["weights"] * (option.mesh[0] - 1)
        room = search.SURE * device.memory - option.estimate.total
        if auto == option.mesh and whole <= room:
            # Then `sharding` decides, too, whether to split weights at all.
            chosen = config.replace(chosen, {"mesh": "auto"})
    runtime.say(
        f"plan: {option.name}: about {option.estimate.total / devices.GIB:.2f}"
        f" of {device.memory / devices.GIB:.1f} GiB a device ({device.name})"
        + ("" if share <= search.SURE else "; that is close")
        + (f"; {option.speed}" if option.estimate.expected else "")
    )
    return chosen


def refusal(cfg, settings, device, option, backend="jax"):
    """The message that a step does not fit, and what would."""
    gib = devices.GIB
    text = (
        f"{cfg.preset} does not fit on {device.name}: {option.name} takes "
        f"about {option.estimate.total / gib:.2f} GiB a device, which has "
        f"{device.memory / gib:.2f}. "
    )
    other = search.nearest(cfg, settings, device, backend=backend)
    if other is None:
        return text + "Nothing near it fits: take a smaller model."
    return text + (
        f"This fits ({other.estimate.total / gib:.2f} GiB): "
        f"{' '.join(other.flags(cfg))}"
    )


def advice(cfg, settings, backend, error):
    """What to type after `error`, which says that memory ran out."""
    device = here(backend)
    dtype = runtime.choose_dtype(cfg.model.dtype)[0]
    found = search.options(cfg, settings, device, backend=backend, dtype=dtype)
    option = search.best(found, device)
    # What tensors may take, where they take too much now; JAX's share of a
    # device comes on top.
    held = option.estimate.bytes["framework"] / device.memory
    least = 0.6 * search.SURE * option.estimate.allocated / (search.SURE - held)
    tight = dataclasses.replace(device, memory=least)
    other = search.nearest(cfg, settings, tight, backend=backend)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = (
        f"memory ran out: {first[:200]}\nThe plan was {option.name}: about "
        f"{option.estimate.total / devices.GIB:.2f} GiB a device of "
        f"{device.memory / devices.GIB:.2f}. "
    )
    if other is None:
        return text + "Take a smaller model, or shorter rows."
    return text + (
        f"Try what takes less ({other.estimate.total / devices.GIB:.2f} GiB): "
        f"{' '.join(other.flags(cfg))}. The run folder's last checkpoint "
        f"stays; other settings want another --run_dir."
    )


def out_of_memory(error):
    """Whether an exception says that memory ran out, on any backend."""
    kind, text = type(error).__name__, str(error)
    return kind in ("OutOfMemoryError", "ResourceExhaustedError") or (
        "RESOURCE_EXHAUSTED" in text
        or "Out of memory" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
        or kind == "MemoryError"
    )
