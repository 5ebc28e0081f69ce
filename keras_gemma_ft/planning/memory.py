"""Bytes that a device holds during a step, part by part.

The sum of `parts` is the peak. `tests/benchmarks/plan_memory.py` holds each part
against runs; tests/test_plan.py holds the sum against peaks measured on a GPU.

Letters as in `shapes`; t tokens of a micro-batch on one device, s bytes of the
compute dtype, e of the residual stream (4 in float16).
"""

import math
import os

import ml_dtypes  # noqa: F401  numpy then knows bfloat16
import numpy as np

from keras_gemma_ft.model import decoder_block, layouts, quantize
from keras_gemma_ft.model.attention import blocks as attention_blocks
from keras_gemma_ft.planning import devices
from keras_gemma_ft.tuning import adamw8, chunks, loss

# Numbers that an optimizer keeps for each trained one.
_SLOTS = {
    "adamw": 2,
    # Two bytes, and 8 for each block.
    "adamw8bit": (2 + 8 / adamw8.BLOCK) / 4,
    "adam": 2,
    "adafactor": 0,
    "lion": 1,
    "sgd": 0,
}
# What CUDA, cuBLAS and the kernels take: 0.13 GiB beside PyTorch's on a T4, 0.34
# on a V100 in public out-of-memory reports, 0.5 allowed on newer ones.
_CONTEXT = 0.5 * devices.GIB
# Of what comes and goes, what PyTorch's allocator holds in gaps: 3 to 9 % in the
# same reports.
_GAPS = 0.08
_FIRST = "decoder_block_0/"


def parts(step):
    """{part: bytes a device}, largest at the same moment.

    Args:
        step: `step.Step`.

    weights, adapters, optimizer, gradients: what lies there; kept: what the
    forward pass keeps for the backward one; work: beside it while one block is
    differentiated; logits: beside it in the head; framework: what CUDA and the
    allocator hold for themselves.
    """
    count = trained(step)
    slots = _SLOTS[step.optimizer] + (step.accumulation > 1)
    found = {
        "weights": weights(step),
        "adapters": 4 * count if step.adapters else 0,
        "optimizer": 4 * count * slots,
        "gradients": 4 * count,
        "kept": kept(step),
        "work": work(step),
        "logits": logits(step),
    }
    if step.backend == "torch":
        # The head is done before the last block's backward pass begins; XLA's
        # plans were seen to hold both.
        less = min(("work", "logits"), key=found.get)
        found[less] = 0
    found["framework"] = _framework(step, sum(found.values()))
    return {name: int(size) for name, size in found.items()}


def _framework(step, others):
    if step.device.kind != "gpu":
        return 0
    if step.backend == "torch":
        lying = weights(step)
        return _CONTEXT + _GAPS * (others - lying)
    if step.backend == "jax":
        # JAX takes a share of the device at once and never more.
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)
        return max(_CONTEXT, (1 - float(share)) * step.device.memory)
    return _CONTEXT


def weights(step, of=""):
    """Bytes of the weights, as they are stored; of paths that begin with `of`."""
    items = []
    for path, shape in step.weights:
        if not path.startswith(of):
            continue
        layer, _, last = path.rpartition("/")
        kinds = {last: (shape, None)}
        if last == "kernel" and step.quantize != "none":
            kinds = quantize.stored_as(shape, step.quantize)
        elif last == "embeddings" and step.quantize_embedding != "none":
            # As `tables` has it: codes, and a step of each word.
            kinds = {"codes": (shape, "int8"), "step": (shape[:1], "float32")}
        for name, (part, dtype) in kinds.items():
            width = step.size if step.adapters else 4
            width = np.dtype(dtype).itemsize if dtype else width
            items.append((f"{layer}/{name}", part, width))
    return _on_device(step, items)


def trained(step):
    """Trained numbers on a device."""
    found = step.adapters or step.weights
    return _on_device(step, [(*item, 1) for item in found])


def _on_device(step, items):
    """Bytes on a device of (path, shape, bytes a number)s."""
    return sum(layouts.bytes_per_device(items, step.split).values())


def kept(step):
    """What the forward pass keeps: the blocks' inputs, or all of `_block`."""
    d, t = step.hidden, step.here
    # Each block's input; beyond them the last one's output, the final norm's
    # result, and the gradient that the head leaves for it.
    outside = t * d * (step.residual * (step.layers + 1) + 2 * step.size)
    return outside + (0 if step.recompute else step.layers * _block(step))


def _block(step):
    """What one block keeps beside its input for its backward pass."""
    t, m = step.here, step.mesh[1]
    d, f, h = step.hidden, step.ffw, step.head_dim
    n, k = step.heads, step.kv_heads
    # Both halves' results before their norms; between the halves, the residual.
    found = t * d * (2 * step.size + step.residual)
    # Queries, keys, values and what attention gives of them; gate and up.
    found += t * step.size * ((2 * n + 2 * k) * h + 2 * f) // m
    if not step.chosen:
        # Every product's input, too: two norms' results, attention's with the
        # heads last, gelu(gate) times up; on Torch gelu(gate) itself.
        each = 2 if step.backend == "torch" else 1
        found += t * step.size * (2 * d + (n * h + each * f) // m)
    return found


def work(step):
    """What lives beside `kept` while one block is differentiated."""
    t, m = step.here, step.mesh[1]
    f, h = step.ffw, step.head_dim
    n, k = step.heads, step.kv_heads
    part, size = t, decoder_block.part_size(f // m)
    if step.recompute and not step.compiled and t >= 2 * size:
        part = size
    ffw = part * f // m * (4 * step.size + (0 if step.compiled else 8))
    # q, k, v and their gradients; scores and theirs where they are formed. By
    # then gate, up and down are gone.
    looked = t * (2 * n + 4 * k) * h // m * step.size
    looked += 0 if step.fused else 12 * n // m * _scores(step)
    looked -= t * step.size * (step.hidden + 2 * f // m)
    block = _block(step) if step.recompute else 0
    return max(ffw, looked) + block + _brought(step)


def _scores(step):
    """Pairs of places whose scores of one head exist at once."""
    rows = math.ceil(step.rows / step.mesh[0])
    if step.length <= 2 * attention_blocks.BLOCK:
        return rows * step.length * step.length
    return rows * attention_blocks.BLOCK * step.length


def _brought(step):
    """Weights that are copied or formed for use: a block's, or two blocks'."""
    one = block_weights(step) * step.size // step.mesh[1]
    formed = one if step.quantize != "none" else 0
    if step.split[0] > 1:
        # Those of the next are there before the last ones are gone.
        return 2 * one
    if step.looped:
        # A turn of the loop picks those of two blocks.
        return 2 * (formed + weights(step, _FIRST))
    return formed


def block_weights(step):
    """Numbers in a decoder block's frozen weights."""
    return sum(
        math.prod(shape)
        for path, shape in step.weights
        if path.startswith(_FIRST)
    )


def _by_words(step):
    """As `loss` decides: with float32 logits only, and the table frozen."""
    return step.size == 4 and bool(step.adapters)


def logits(step):
    """The head's: a chunk's logits and theirs, the table's rows, dh."""
    words, d = step.words, step.hidden
    tokens = step.rows * step.length
    by_words = _by_words(step)
    compiled = step.compiled and not by_words
    tokens = loss.chunk_size(
        tokens, words, step.chunk, by_words=by_words,
        compiled=compiled,
    )  # fmt: skip
    if by_words:
        words = min(words, chunks.BYTES // (4 * max(tokens, d)))
    elif step.split != (1, 1):
        batch, model = step.split
        words //= model if model > 1 else batch
    # Three in float32; compiled the logits and their gradient in 16 bits; op by
    # op on Torch the right words as int64 besides.
    each = 12
    if step.backend == "torch" and not by_words:
        each = 2 * step.size if compiled else 24
    return tokens * words * each + words * d * 4 * by_words + 12 * tokens * d
