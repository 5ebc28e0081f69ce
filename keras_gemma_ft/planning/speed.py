"""Seconds of an optimizer step: the least, and what is to be expected.

FLOPs are counted as they are computed, recomputation included. What is expected
rests on steps of 2B that were measured on one NVIDIA H200.
"""

import math

from keras_gemma_ft.model.attention import blocks as attention_blocks
from keras_gemma_ft.planning import devices, memory

# Share of the H200's sheet, over all FLOPs of a step of 2B with all-linear LoRA
# of rank 8, in bfloat16 (tests/README.md has the runs): 25,764 token/s on Torch
# and 31,621 on JAX at 4 x 1024, all kept; 19,112 and 21,675 at 2 x 4096,
# recomputed. float16 has not been timed by itself: a prototype of the step ran
# in it at 0.8 of its own rate in bfloat16.
_SHARES = {
    "torch": {"bfloat16": 0.32, "float16": 0.256},
    "jax": {"bfloat16": 0.365},
}
_H200 = "h200"


def flops_per_token(step):
    """FLOPs a token: forward, gradient, recomputation.

    A product of a weight costs 2 FLOPs a number and token, its gradient with
    respect to the input as much again; with respect to the weight where that
    is trained.

    Args:
        step: `step.Step`.
    """
    head = 2 * step.words * step.hidden
    blocks = 2 * step.layers * memory.block_weights(step)
    low = 2 * sum(math.prod(shape) for _, shape in step.adapters)
    full = 0 if step.adapters else 1
    # Query by key and weight by value: 4 FLOPs a pair of places and head
    # channel; backwards they are formed again, with four products more.
    looks = (
        4
        * step.heads
        * step.head_dim
        * sum(_reach(step, i) for i in range(step.layers))
    )
    again = 1 if step.recompute else 0
    return (
        (2 + full + again) * blocks
        + (2 + full) * head
        + (3 + again) * low
        + (3.5 + again) * looks
    )


def _reach(step, layer):
    """Places that a token looks at on average, whole rows assumed."""
    window, length = step.window, step.length
    if length <= 2 * attention_blocks.BLOCK and not step.fused:
        return length
    if window and layer % 2 == 0 and window < length:
        return window - window * window / (2 * length)
    return length / 2


def least(step):
    """{what: the least seconds of an optimizer step}, 0 where unknown.

    "compute", "memory" and "links" may overlap perfectly.
    """
    device = step.device
    return {
        "compute": _ratio(_work(step), device.flops),
        "memory": step.accumulation * _ratio(_traffic(step), device.bandwidth),
        "links": step.accumulation * _ratio(moved(step), device.link),
    }


def expected(step):
    """(seconds of an optimizer step, what that rests on); (0.0, "") unknown.

    Of a FLOP's time on the H200 the products take one part, which goes with
    the rate that products reach on a device; the rest goes with its memory's
    bandwidth. Weights are read, and formed, once a pass; links do not overlap.
    """
    shares = _SHARES.get(step.backend, {})
    device, whole = step.device, devices.device(_H200)
    fast = step.backend == "jax" or step.compiled
    if not (shares and fast and device.sustained):
        return 0.0, ""
    share = shares.get(step.dtype, shares["bfloat16"])
    products = 1 / device.sustained
    rest = 1 / (share * whole.flops) - 1 / whole.sustained
    rest *= whole.bandwidth / device.bandwidth
    seconds = _work(step) * (products + rest) + step.accumulation * (
        _weights(step) / device.bandwidth + _ratio(moved(step), device.link)
    )
    if device.name == _H200:
        return seconds, "measured on an H200"
    return seconds, "scaled from an H200: not measured on this card"


def _ratio(work, rate):
    return work / rate if rate else 0.0


def _work(step):
    """FLOPs of a device in an optimizer step."""
    parts = step.mesh[0] * step.mesh[1]
    return flops_per_token(step) * step.tokens / parts


def _weights(step):
    """Bytes of weights read in a micro-batch; what is formed is written, too."""
    passes = 3 if step.recompute else 2
    found = memory.weights(step)
    if step.quantize != "none":
        formed = step.layers * memory.block_weights(step) * step.size
        found += 2 * formed // step.mesh[1]
    return passes * found


def _traffic(step):
    """Bytes that a device reads or writes in a micro-batch, at least."""
    passes = 3 if step.recompute else 2
    return passes * memory.weights(step) + 2 * memory.kept(step)


def moved(step):
    """Bytes that a device sends in a micro-batch, at least."""
    batch, model = step.mesh
    passes = 3 if step.recompute else 2
    total = 0.0
    if step.split[0] > 1:
        whole = step.layers * memory.block_weights(step)
        total += passes * whole * step.size / model * (batch - 1) / batch
    if batch > 1:
        total += 2 * 4 * memory.trained(step) * (batch - 1) / batch
    if model > 1:
        x = step.here * step.hidden * step.size
        sums = 2 * passes * step.layers
        total += sums * 2 * x * (model - 1) / model
    return total
