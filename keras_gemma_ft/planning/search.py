"""Which mesh, recomputation and micro-batch: what fits, what is fastest."""

import dataclasses
import itertools

from keras_gemma_ft import config
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.model import sharding
from keras_gemma_ft.planning import arithmetic

# The estimate was seen from 8 % under to 22 % over what runs take: above the
# first share of a device a plan does not count on it, above the second it
# refuses.
SURE, REFUSED = 0.9, 1.15


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run a step.

    Attributes:
        cfg: `config.Config` with mesh, remat and micro-batch said.
        mesh: (batch, model).
        estimate: `arithmetic.Estimate`.
    """

    cfg: config.Config
    mesh: tuple
    estimate: arithmetic.Estimate

    @property
    def name(self):
        """For a table."""
        data = self.cfg.data
        rows, times = pipeline.micro_batches(
            data.batch_size, data.micro_batch_size
        )
        chunk = self.cfg.train.loss_chunk
        return (
            f"mesh {self.mesh[0]}x{self.mesh[1]}, remat "
            f"{self.cfg.model.remat}, {times} x {rows} x "
            f"{data.sequence_length} tokens"
            + (f", chunks of {chunk}" if chunk else "")
        )

    @property
    def speed(self):
        """Token/s, "at most" where nothing was measured."""
        found = self.estimate
        seconds = found.expected or found.bound
        if not seconds:
            return "at unknown speed"
        word = "about" if found.expected else "at most"
        return f"{word} {found.tokens / seconds:,.0f} token/s"

    def flags(self, given):
        """What to type besides the settings `given`, as a list."""
        asked = config.flatten(given)
        return [
            f"--{path}={value}"
            for path, value in config.flatten(self.cfg).items()
            if value != asked[path] and (path != "mesh" or self.mesh != (1, 1))
        ]


def options(cfg, settings, device, *, backend="jax", dtype=None):
    """Every `Option` that `cfg` leaves open, the fastest bound first.

    Args:
        cfg: `config.Config`; what it says is kept, `auto` and 0 are tried.
        settings: of `GemmaBackbone`.
        device: `devices.Device`.
        backend: Keras's. Only JAX splits weights; Torch splits rows, and
            TensorFlow uses one device.
        dtype: of weights and matmuls; None is the device's.
    """
    dtype = dtype or dtype_of(cfg, device)
    found = []
    for mesh in _meshes(cfg, device, backend):
        for remat in ("none", "block"):
            if cfg.model.remat not in ("auto", remat):
                continue
            for rows, chunk in itertools.product(
                _micro_batches(cfg, mesh), _chunks(cfg)
            ):
                said = {
                    "model.remat": remat,
                    "data.micro_batch_size": rows,
                    "train.loss_chunk": chunk,
                }
                if backend == "jax":
                    said["mesh"] = f"{mesh[0]}x{mesh[1]}"
                one = config.replace(cfg, said)
                found.append(
                    Option(one, mesh, arithmetic.estimate(
                        one, settings, device, mesh, dtype=dtype,
                        recompute=remat == "block", backend=backend,
                    ))
                )  # fmt: skip
    if not found:
        raise config.UserError(
            f"--data.batch_size={cfg.data.batch_size} "
            f"--data.micro_batch_size={cfg.data.micro_batch_size} "
            f"--mesh={cfg.mesh}: no batch of that size can be split over "
            f"{device.count} devices. Try --mesh=auto "
            f"--data.micro_batch_size=0."
        )
    return sorted(found, key=_order)


def _order(option):
    """Fastest first; then fewer parts, the batch's axis, fewer bytes."""
    rows, times = pipeline.micro_batches(
        option.cfg.data.batch_size, option.cfg.data.micro_batch_size
    )
    found = option.estimate
    slow = option.cfg.model.remat == "block", option.cfg.train.loss_chunk > 0
    seconds = found.expected or found.bound
    return seconds, times, *slow, -option.mesh[0], found.total


def _meshes(cfg, device, backend):
    if backend == "torch":
        return [(n, 1) for n in sorted({device.count, 1}, reverse=True)]
    if backend != "jax" or device.count == 1:
        return [(1, 1)]
    if cfg.mesh != "auto":
        return [sharding.mesh_shape(cfg, device.count)[0]]
    batches = [n for n in range(1, device.count + 1) if device.count % n == 0]
    return [(n, device.count // n) for n in reversed(batches)]


def _micro_batches(cfg, mesh):
    """Rows of a micro-batch that divide; 0 is all at once."""
    total, asked = cfg.data.batch_size, cfg.data.micro_batch_size
    sizes = [n for n in range(total, 0, -1) if total % n == 0]
    if asked:
        sizes = [asked]
    return [n if n != total else 0 for n in sizes if n % mesh[0] == 0]


def _chunks(cfg):
    """Tokens whose logits exist at once; 0 picks about 24 MB of them."""
    asked = cfg.train.loss_chunk
    return (0, 64) if cfg.search and not asked else (asked,)


def dtype_of(cfg, device):
    """The dtype in which `cfg` computes on `device`."""
    return device.dtype if cfg.model.dtype == "auto" else cfg.model.dtype


def best(found, device):
    """The fastest option that surely fits, else the smallest of all."""
    for option in found:
        if option.estimate.total <= SURE * device.memory:
            return option
    return min(found, key=lambda option: option.estimate.total)


def nearest(cfg, settings, device, *, backend="jax"):
    """An `Option` that fits where `cfg` does not, or None.

    In the order of what is lost least: a free mesh and micro-batch, then
    quantised kernels, then half the length, again and again.
    """
    free = {"mesh": "auto", "model.remat": "auto", "data.micro_batch_size": 0}
    cfg = config.replace(cfg, free)
    whole = [cfg]
    if device.kind != "tpu" and cfg.lora.rank:
        whole.append(config.replace(cfg, {"model.quantize": "nf4"}))
    tries, length = list(whole), cfg.data.sequence_length
    while length > 128:
        length //= 2
        shorter = {"data.sequence_length": length}
        tries += [config.replace(one, shorter) for one in whole]
    for one in tries:
        option = best(options(one, settings, device, backend=backend), device)
        if option.estimate.total <= SURE * device.memory:
            return option
    return None
