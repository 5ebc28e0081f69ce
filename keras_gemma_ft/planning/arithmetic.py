"""Bytes, FLOPs and seconds of a training step, from sizes alone.

An estimate, for machines whose compiler cannot be asked and for choosing what
to ask it: `memory` has the bytes, `speed` the seconds.
"""

import dataclasses
import math

from keras_gemma_ft import config
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.planning import devices, memory, speed

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Triton, and so Torch's compiler, runs from the first on; kernels of attention
# whose tiles hold 256-wide heads, as they are, from the second.
_COMPILES, _FUSES = 7.0, 8.0
# `--model.scan=auto` is a loop from so many blocks on.
_LOOP = 16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes.

    Attributes:
        bytes: {part: bytes a device}, see `memory.parts`.
        flops_per_token: computed for a token, recomputation included.
        tokens: of an optimizer step, all devices.
        seconds: {what: the least seconds of an optimizer step}: "compute",
            "memory", "links"; 0 where the device's rate is unknown.
        expected: seconds of an optimizer step; 0 where nothing comparable was
            measured.
        rests_on: what `expected` rests on, in words.
    """

    bytes: dict
    flops_per_token: float
    tokens: int
    seconds: dict
    expected: float = 0.0
    rests_on: str = ""

    @property
    def total(self):
        """Bytes a device."""
        return sum(self.bytes.values())

    @property
    def bound(self):
        """The least seconds of a step: its parts may overlap perfectly."""
        return max(self.seconds.values())

    @property
    def allocated(self):
        """Bytes a device that tensors take, the framework's own left out."""
        return self.total - self.bytes["framework"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One micro-batch on a mesh, and how a backend computes it.

    Attributes:
        cfg: `config.Config`.
        settings: of `GemmaBackbone`.
        device: `devices.Device`.
        mesh: (batch, model).
        dtype: of weights and matmuls.
        recompute: whether blocks are recomputed.
        backend: Keras's.
    """

    cfg: config.Config
    settings: dict
    device: devices.Device
    mesh: tuple
    dtype: str
    recompute: bool
    backend: str

    @property
    def size(self):
        """Bytes of a number in the compute dtype."""
        return _BYTES[self.dtype]

    @property
    def residual(self):
        """Bytes of a number of the residual stream; float16 cannot hold it."""
        return 4 if self.dtype == "float16" else self.size

    @property
    def rows(self):
        """Of a micro-batch, all devices."""
        data = self.cfg.data
        return pipeline.micro_batches(data.batch_size, data.micro_batch_size)[0]

    @property
    def accumulation(self):
        """Micro-batches of an optimizer step."""
        data = self.cfg.data
        return pipeline.micro_batches(data.batch_size, data.micro_batch_size)[1]

    @property
    def length(self):
        """Tokens of a row."""
        return self.cfg.data.sequence_length

    @property
    def tokens(self):
        """Of an optimizer step, all devices."""
        return self.cfg.data.batch_size * self.length

    @property
    def here(self):
        """t: tokens of a micro-batch on a device."""
        return math.ceil(self.rows / self.mesh[0]) * self.length

    @property
    def split(self):
        """(batch, model) over which weights are split; Torch keeps them whole."""
        return (1, 1) if self.backend == "torch" else self.mesh

    @property
    def compiled(self):
        """Whether it is Torch's compiler that makes a block."""
        asked = self.cfg.model.compile
        if self.backend != "torch" or asked != "auto":
            return self.backend == "torch" and asked == "on"
        return self.device.capability >= _COMPILES

    @property
    def fused(self):
        """Whether attention forms no scores."""
        return self.compiled and self.device.capability >= _FUSES

    @property
    def looped(self):
        """Whether JAX compiles one loop over the blocks."""
        scan, layers = self.cfg.model.scan, self.settings["num_layers"]
        if self.backend != "jax" or scan != "auto":
            return self.backend == "jax" and scan == "on"
        # As `trainer.scan`.
        return layers >= _LOOP and (self.recompute or self.device.kind != "gpu")

    @property
    def chosen(self):
        """Whether a block keeps what it is told, not what autograd would."""
        named = self.backend == "jax" and self.device.kind == "gpu"
        named = named or self.looped or self.split != (1, 1)
        return self.compiled or named


def estimate(cfg, settings, device, mesh, *, dtype, recompute, backend="jax"):
    """`Estimate` of a step of `cfg`; arguments as the attributes of `Step`."""
    step = Step(cfg, settings, device, mesh, dtype, recompute, backend)
    expected, rests_on = speed.expected(step)
    return Estimate(
        memory.parts(step), speed.flops_per_token(step), step.tokens,
        speed.least(step), expected, rests_on,
    )  # fmt: skip
