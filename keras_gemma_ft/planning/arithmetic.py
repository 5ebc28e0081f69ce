"""Bytes, FLOPs and seconds of a training step, from sizes alone.

An estimate, for machines whose compiler cannot be asked and for choosing what
to ask it. `tests/benchmarks/plan_memory.py` holds it against the compiler and
against what runs take. Letters as in `shapes`; T tokens a row, t tokens of a
micro-batch on one device, s bytes of the compute dtype.
"""

import dataclasses
import math

from keras_gemma_ft import config
from keras_gemma_ft.data import pipeline
from keras_gemma_ft.model import attention, forward, quantize, sharding
from keras_gemma_ft.planning import shapes
from keras_gemma_ft.tuning import adamw8, loss

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes.

    Attributes:
        bytes: {kind: bytes a device}.
        flops_per_token: computed for a token, recomputation included.
        tokens: of an optimizer step, all devices.
        seconds: {what: the least seconds of an optimizer step}: "compute",
            "memory", "links"; 0 where the device's rate is unknown.
    """

    bytes: dict
    flops_per_token: float
    tokens: int
    seconds: dict

    @property
    def total(self):
        """Bytes a device."""
        return sum(self.bytes.values())

    @property
    def bound(self):
        """The least seconds of a step: its parts may overlap perfectly."""
        return max(self.seconds.values())


def estimate(cfg, settings, device, mesh, *, dtype, recompute):
    """`Estimate` of a step of `cfg` on a mesh of `device`.

    Args:
        cfg: `config.Config`.
        settings: of `GemmaBackbone`.
        device: `devices.Device`.
        mesh: (batch, model).
        dtype: of weights and matmuls.
        recompute: whether blocks are recomputed.
    """
    rows, accumulation = pipeline.micro_batches(
        cfg.data.batch_size, cfg.data.micro_batch_size
    )
    step = _Step(
        cfg, settings, mesh, _BYTES[dtype], recompute, rows,
        cfg.data.sequence_length,
    )  # fmt: skip
    tokens = cfg.data.batch_size * cfg.data.sequence_length
    flops = step.flops_per_token()
    found = step.bytes()
    parts = mesh[0] * mesh[1]
    seconds = {
        "compute": _ratio(flops * tokens / parts, device.flops),
        "memory": accumulation * _ratio(step.traffic(), device.bandwidth),
        "links": accumulation * _ratio(step.moved(), device.link),
    }
    return Estimate(found, flops, tokens, seconds)


def _ratio(work, rate):
    return work / rate if rate else 0.0


@dataclasses.dataclass(frozen=True)
class _Step:
    """One micro-batch on a mesh."""

    cfg: config.Config
    settings: dict
    mesh: tuple
    size: int
    recompute: bool
    rows: int
    length: int

    @property
    def here(self):
        """t: tokens on a device."""
        return math.ceil(self.rows / self.mesh[0]) * self.length

    def stored(self):
        """Bytes a device of the weights, as they are stored."""
        mode, lora = self.cfg.model.quantize, self.cfg.lora.rank
        items = []
        for path, shape in shapes.weights(self.settings):
            if path.endswith("/kernel") and mode != "none":
                layer = path.removesuffix("/kernel")
                kinds = quantize.stored_as(shape, mode)
                for name, (part, dtype) in kinds.items():
                    width = 4 if dtype == "float32" else 1
                    items.append((f"{layer}/{name}", part, width))
            else:
                items.append((path, shape, self.size if lora else 4))
        return self.of_device(items)

    def of_device(self, items):
        """Bytes a device of (path, shape, bytes a number)s."""
        return sum(sharding.bytes_per_device(items, self.mesh).values())

    def trained(self):
        """Trained numbers on a device."""
        if not self.cfg.lora.rank:
            items = [(*item, 1) for item in shapes.weights(self.settings)]
        else:
            found = shapes.adapters(self.settings, self.cfg.lora)
            items = [(*item, 1) for item in found]
        return self.of_device(items)

    def bytes(self):
        """{kind: bytes a device}."""
        trained = self.trained()
        slots = _SLOTS[self.cfg.train.optimizer]
        if self.cfg.data.micro_batch_size not in (0, self.cfg.data.batch_size):
            slots += 1
        return {
            "weights": self.stored(),
            "adapters": 4 * trained if self.cfg.lora.rank else 0,
            "optimizer": int(4 * trained * slots),
            "gradients": 4 * trained,
            "kept": self.kept(),
            "work": self.work(),
            "logits": self.logits(),
        }

    def kept(self):
        """Bytes that the forward pass keeps for the backward one."""
        s, t = self.settings, self.here
        d, layers = s["hidden_dim"], s["num_layers"]
        # Inputs of the blocks, and what comes before and after all of them.
        inputs = t * d * self.size * (layers + 3)
        return inputs if self.recompute else inputs + layers * self._block()

    def _block(self):
        """Bytes that one block keeps: what its products and norms read."""
        s, t, m = self.settings, self.here, self.mesh[1]
        d, f = s["hidden_dim"], s["intermediate_dim"] // 2
        heads = s["num_query_heads"], s["num_key_value_heads"]
        wide = (2 * heads[0] + 2 * heads[1]) * s["head_dim"]
        return t * self.size * (5 * d + wide // m + 3 * f // m)

    def work(self):
        """Bytes that live while one block is worked on."""
        s, t, m = self.settings, self.here, self.mesh[1]
        f = s["intermediate_dim"] // 2
        heads = s["num_query_heads"] / m
        part = t
        size = forward.part_size(f // m)
        if self.recompute and t >= 2 * size:
            part = size
        ffw = part * f // m * (4 * self.size + 8)
        if self.length <= 2 * attention.BLOCK:
            scores = t * self.length
        else:
            rows = math.ceil(self.rows / self.mesh[0])
            scores = rows * attention.BLOCK * self.length
        wide = t * heads * s["head_dim"]
        looked = heads * scores * 12 + 6 * wide * self.size
        block = self._block() if self.recompute else 0
        return int(max(ffw, looked) + block + self._brought())

    def _brought(self):
        """Bytes of the weights that a device forms for use: whole blocks."""
        per_block = self._block_weights() * self.size // self.mesh[1]
        if self.mesh[0] > 1:
            return 2 * per_block
        quantised = self.cfg.model.quantize != "none"
        return per_block if quantised else 0

    def _block_weights(self):
        return sum(
            math.prod(shape)
            for path, shape in shapes.weights(self.settings)
            if path.startswith("decoder_block_0/")
        )

    def logits(self):
        """Bytes of the head: a chunk's logits, its words' rows, dh."""
        words, d = self.settings["vocabulary_size"], self.settings["hidden_dim"]
        by_words = self.size == 4 and bool(self.cfg.lora.rank)
        tokens = loss.chunk_size(
            self.rows * self.length, words, self.cfg.train.loss_chunk,
            by_words=by_words,
        )
        if by_words:
            words = min(words, loss.CHUNK_BYTES // (4 * max(tokens, d)))
        elif self.mesh != (1, 1):
            words //= self.mesh[1] if self.mesh[1] > 1 else self.mesh[0]
        return tokens * words * 12 + words * d * 4 * by_words + (
            3 * tokens * d * 4
        )

    def flops_per_token(self):
        """FLOPs a token: forward, gradient, recomputation.

        A product of a weight costs 2 FLOPs a number and token, its gradient
        with respect to the input as much again; with respect to the weight
        where that is trained.
        """
        s = self.settings
        head = 2 * s["vocabulary_size"] * s["hidden_dim"]
        blocks = 2 * s["num_layers"] * self._block_weights()
        found = shapes.adapters(s, self.cfg.lora)
        low = 2 * sum(math.prod(shape) for _, shape in found)
        full = 0 if self.cfg.lora.rank else 1
        # Query by key and weight by value: 4 FLOPs a pair of places and head
        # channel; backwards they are formed again, with four products more.
        looks = 4 * s["num_query_heads"] * s["head_dim"] * sum(
            self._reach(i) for i in range(s["num_layers"])
        )
        again = 1 if self.recompute else 0
        return (
            (2 + full + again) * blocks
            + (2 + full) * head
            + (3 + again) * low
            + (3.5 + again) * looks
        )

    def _reach(self, layer):
        """Places that a token looks at on average, whole rows assumed."""
        windowed = self.settings["use_sliding_window_attention"]
        window = self.settings["sliding_window_size"]
        if self.length <= 2 * attention.BLOCK:
            return self.length
        if windowed and layer % 2 == 0 and window < self.length:
            return window - window * window / (2 * self.length)
        return self.length / 2

    def traffic(self):
        """Bytes that a device reads or writes in a micro-batch, at least."""
        passes = 3 if self.recompute else 2
        return passes * self.stored() + 2 * self.kept()

    def moved(self):
        """Bytes that a device sends in a micro-batch, at least."""
        batch, model = self.mesh
        passes = 3 if self.recompute else 2
        total = 0.0
        if batch > 1:
            whole = self.settings["num_layers"] * self._block_weights()
            share = whole * self.size / model
            total += passes * share * (batch - 1) / batch
            total += 2 * 4 * self.trained() * (batch - 1) / batch
        if model > 1:
            x = self.here * self.settings["hidden_dim"] * self.size
            sums = 2 * passes * self.settings["num_layers"]
            total += sums * 2 * x * (model - 1) / model
        return total
