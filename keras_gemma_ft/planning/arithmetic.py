"""An estimate of a training step: its bytes, its FLOPs and its seconds.

It is for machines whose compiler cannot be asked, and for choosing what
to ask it: `memory` has the bytes, `speed` the seconds.
"""

import dataclasses

from keras_gemma_ft.planning import memory, speed, step


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


def estimate(cfg, settings, device, mesh, *, dtype, recompute, backend="jax"):
    """`Estimate` of an optimizer step.

    Args:
        cfg: `config.Config`.
        settings: of `GemmaBackbone`.
        device, mesh, dtype, recompute, backend: as of `step.Step`.
    """
    one = step.of(
        cfg, settings, device, mesh,
        dtype=dtype, recompute=recompute, backend=backend,
    )  # fmt: skip
    expected, rests_on = speed.expected(one)
    return Estimate(
        memory.parts(one), speed.flops_per_token(one), one.tokens,
        speed.least(one), expected, rests_on,
    )  # fmt: skip
