"""The sizes of one training step, from which bytes and seconds are told.

Settings and presets end here: `of` reads them once, and `memory` and `speed`
are functions of a `Step` alone.
"""

import dataclasses
import math

from keras_gemma_ft.data import pipeline
from keras_gemma_ft.planning import devices, shapes

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Triton, and so Torch's compiler, runs from the first on; kernels of attention
# whose tiles hold 256-wide heads, as they are, from the second.
_COMPILES, _FUSES = 7.0, 8.0
# `--model.scan=auto` is a loop from so many blocks on.
_LOOP = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """One micro-batch on a mesh, and how a backend computes it.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, ffw, words: of the model;
            ffw is the width of gate and of up.
        window: places a query of every other block looks back; None is all.
        weights: (path, shape) of every frozen variable.
        adapters: (path, shape) of every A and B; () where all is trained.
        rows: of a micro-batch, all devices.
        accumulation: micro-batches of an optimizer step.
        length: tokens of a row.
        optimizer, quantize, quantize_embedding, compile, scan: as the settings
            of that name say it.
        chunk: tokens whose logits exist at once; 0 leaves it to `loss`.
        device: `devices.Device`.
        mesh: (batch, model).
        dtype: of weights and matmuls.
        recompute: whether blocks are recomputed.
        backend: Keras's.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffw: int
    words: int
    window: int | None
    weights: tuple
    adapters: tuple
    rows: int
    accumulation: int
    length: int
    optimizer: str
    quantize: str
    quantize_embedding: str
    compile: str
    scan: str
    chunk: int
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
    def tokens(self):
        """Tokens of an optimizer step, on all devices."""
        return self.rows * self.accumulation * self.length

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
        asked = self.compile
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
        if self.backend != "jax" or self.scan != "auto":
            return self.backend == "jax" and self.scan == "on"
        # As `trainer.scan`.
        return self.layers >= _LOOP and (
            self.recompute or self.device.kind != "gpu"
        )

    @property
    def chosen(self):
        """Whether a block keeps what it is told, not what autograd would."""
        named = self.backend == "jax" and self.device.kind == "gpu"
        named = named or self.looped or self.split != (1, 1)
        return self.compiled or named


def of(cfg, settings, device, mesh, *, dtype, recompute, backend="jax"):
    """The `Step` of a `config.Config` and the settings of a `GemmaBackbone`."""
    s, data = settings, cfg.data
    rows, accumulation = pipeline.micro_batches(
        data.batch_size, data.micro_batch_size
    )
    windowed = s["use_sliding_window_attention"]
    return Step(
        layers=s["num_layers"],
        hidden=s["hidden_dim"],
        heads=s["num_query_heads"],
        kv_heads=s["num_key_value_heads"],
        head_dim=s["head_dim"],
        ffw=s["intermediate_dim"] // 2,
        words=s["vocabulary_size"],
        window=s["sliding_window_size"] if windowed else None,
        weights=tuple(shapes.weights(s)),
        adapters=tuple(shapes.adapters(s, cfg.lora)),
        rows=rows,
        accumulation=accumulation,
        length=data.sequence_length,
        optimizer=cfg.train.optimizer,
        quantize=cfg.model.quantize,
        quantize_embedding=cfg.model.quantize_embedding,
        compile=cfg.model.compile,
        scan=cfg.model.scan,
        chunk=cfg.train.loss_chunk,
        device=device,
        mesh=mesh,
        dtype=dtype,
        recompute=recompute,
        backend=backend,
    )
