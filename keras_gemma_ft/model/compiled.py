"""A decoder block of Torch as one compiled function that all layers use.

Op by op, the host of a GPU launches thousands of small kernels a step and the
GPU waits for it: 448 ms on the clock for 253 ms of kernels, 67 of them
products (2B, 4 x 1024, H200). `torch.compile` fuses what is element-wise; the
function takes a block's tensors as arguments, so that 26 layers are compiled
once or, where a window cuts, twice. Its equations are in `compiled_block`.

Shapes: B batch, T tokens, d hidden, h head_dim.
"""

import collections
import functools
import logging

import keras

from keras_gemma_ft import config, runtime
from keras_gemma_ft.model import (
    compiled_block,
    kernels,
    lora,
    quantize,
    torch_attention,
)

_NORMS = (
    "pre_attention_norm",
    "post_attention_norm",
    "pre_ffw_norm",
    "post_ffw_norm",
)
# Lengths that a run may meet, two kinds of block, training and evaluation:
# Dynamo would stop at 8 and go on uncompiled.
_VERSIONS = 64


def wanted(asked):
    """(whether `--model.compile=asked` compiles here, reason).

    On a CPU compiled blocks are about 1.6 times as fast (the embedded demo, two
    cores), but their C++ takes one to two minutes to compile.
    """
    if keras.config.backend() != "torch":
        return False, "the backend compiles by itself or not at all"
    import torch

    if asked != "auto":
        return asked == "on", "--model.compile says so"
    if not torch.cuda.is_available():
        return False, "no GPU"
    if torch.cuda.get_device_capability() < (7, 0):
        return False, "Triton needs compute capability 7.0"
    return True, "a GPU"


class Blocks:
    """The decoder's blocks, compiled.

    Args:
        backbone: `GemmaBackbone`, its adapters and stored kernels in place.
        query_scale: `decoder_block.query_scale(backbone)`.
        residual: dtype of the residual stream.
        recompute: keep only the blocks' inputs for the backward pass.

    Attributes:
        compilations: {(rows, tokens): graphs compiled for it}.
    """

    def __init__(self, backbone, *, query_scale, residual, recompute=False):
        import torch

        # Not a context: it holds for compilations in the backward pass too.
        torch._dynamo.config.recompile_limit = max(
            _VERSIONS, torch._dynamo.config.recompile_limit
        )
        # It warns of operations in place; there are none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel("ERROR")
        self.backbone, self.recompute = backbone, recompute
        settings = getattr(backbone, "lora", None)
        n, k = backbone.num_query_heads, backbone.num_key_value_heads
        self.facts = compiled_block.Facts(
            heads={"query": n, "key": k, "value": k},
            scale=query_scale,
            cap=backbone.attention_logit_soft_cap,
            epsilon=backbone.transformer_layers[0].pre_attention_norm.epsilon,
            compute=getattr(torch, backbone.compute_dtype),
            residual=getattr(torch, residual),
            quantized=getattr(backbone, "quantize_mode", None),
            dropout=settings.dropout if settings else 0.0,
        )
        # s of s (x A) B; None without LoRA.
        self.low = lora.scale(backbone) if settings else None
        self.attention = torch_attention.choose(
            backbone, self.facts.compute, self.facts.cap
        )
        self.compilations = collections.Counter()
        self._shape = None
        attention, facts = self.attention, self.facts

        def run(*args):
            return compiled_block.block(attention, facts, *args)

        self._run = torch.compile(
            run, dynamic=False, fullgraph=True, backend=self._compile
        )

    def _compile(self, graph, inputs):
        """Inductor, counted."""
        if not self.compilations:
            runtime.say(
                "compiling the decoder's block for this GPU and this shape: "
                "half a minute to a minute, seconds from the cache; once more "
                "for each kind of block and length"
            )
        self.compilations[self._shape] += 1
        return inductor(graph, inputs)

    def __call__(self, x, segment_ids, rope, seeds):
        """x [B, T, d] through every block.

        Args:
            x: the scaled embeddings.
            segment_ids: int [B, T].
            rope: (cos, sin), float32 [B, 1, T, h/2].
            seeds: integers [layers, 2] of dropout, or None.

        Returns:
            (x, bool [blocks, B]: where a block gave finite numbers only).
        """
        import torch

        if x.is_meta:  # Keras infers shapes, which stay the same.
            return x, None
        backbone, self._shape = self.backbone, tuple(x.shape[:2])
        window = None
        if backbone.use_sliding_window_attention:
            window = backbone.sliding_window_size
        pairs = quantize.PAIRS.get(self.facts.quantized)
        if pairs is not None:
            pairs = torch.as_tensor(pairs, device=x.device)
        looks = self.attention.looks(segment_ids, window)
        trained = torch.is_grad_enabled()
        if not x.requires_grad:
            # As in every other block, which so is the same function.
            x = x.detach().requires_grad_(trained)
        finite, adapters = [], self._adapters()
        for i, block in enumerate(backbone.transformer_layers):
            look = looks[bool(block.use_sliding_window_attention)]
            seed = None if seeds is None else seeds[i]
            x = self._run(
                {**tensors(backbone, block, pairs), **adapters[i]},
                look, rope, seed, x, self.recompute and trained,
            )  # fmt: skip
            finite.append(kernels.finite(x))
        return x, torch.stack(finite)

    def _adapters(self):
        """For each block {"target/a": A, "target/b": s B}, in `facts.compute`.

        For all blocks at once: in the compiled function they were 34 of a
        block's 136 operations, small ones, for which a GPU waits for its host.
        """
        blocks = self.backbone.transformer_layers
        if self.low is None:
            return [{} for _ in blocks]
        names = config.targets(self.backbone.lora)
        layers = [[lora.layer(block, n) for n in names] for block in blocks]
        pairs = [
            [getattr(dense, kind).value for row in layers for dense in row]
            for kind in ("lora_kernel_a", "lora_kernel_b")
        ]
        a, b = _rounded(self.facts.compute, self.low, *pairs)
        rows = range(0, len(a), len(names))
        return [
            {
                **{f"{n}/a": v for n, v in zip(names, a[i:])},
                **{f"{n}/b": v for n, v in zip(names, b[i:])},
            }
            for i in rows
        ]


def _rounded(dtype, factor, first, second):
    """(first, factor times second), lists of tensors, in dtype."""
    half = len(first)
    found = _rounding().apply(dtype, factor, half, *first, *second)
    return found[:half], found[half:]


@functools.cache
def _rounding():
    import torch

    def copied(values, dtype, factor, half):
        found = [torch.empty_like(v, dtype=dtype) for v in values]
        torch._foreach_copy_(found, list(values))
        torch._foreach_mul_(found[half:], factor)
        return found

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, dtype, factor, half, *values):
            ctx.settings = values[0].dtype, factor, half
            return tuple(copied(values, dtype, factor, half))

        @staticmethod
        def backward(ctx, *upstream):
            return None, None, None, *copied(upstream, *ctx.settings)

    return Rounding


def inductor(graph, inputs, inner=None):
    """Torch's own compiler.

    Args:
        graph, inputs: as Dynamo gives them to a backend.
        inner: what compiles each of its two graphs; None is its own.
    """
    from torch._inductor import compile_fx

    return compile_fx.compile_fx(
        graph, inputs, inner or compile_fx.compile_fx_inner,
        {"joint_custom_pre_pass": _marks()},
    )  # fmt: skip


@functools.cache
def _marks():
    """Hands on the mark of a clone to what it copies, and takes it out.

    Inductor takes clones out before it divides the graph into forward and
    backward: with them the marks would go, and nothing would be kept. Of a
    view, what it shows is kept.
    """
    import torch
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    def viewing(node):
        unsafe = torch.ops.aten._unsafe_view.default
        return node.target is unsafe or getattr(node.target, "is_view", False)

    class Marks(CustomGraphPass):
        def __call__(self, graph):
            clones = graph.find_nodes(
                op="call_function", target=torch.ops.aten.clone.default
            )
            for node in clones:
                mark, kept = node.meta.get("recompute"), node.args[0]
                if mark != CheckpointPolicy.MUST_SAVE:
                    continue
                node.replace_all_uses_with(kept)
                graph.erase_node(node)
                while viewing(kept):
                    kept = kept.args[0]
                kept.meta["recompute"] = mark

        def uuid(self):
            return "keras_gemma_ft: marks of clones, 1"

    return Marks()


def tensors(backbone, block, pairs=None):
    """{name: tensor} of a block: norms, and kernels or what is stored.

    Args:
        backbone: the model.
        block: one of its decoder blocks.
        pairs: `quantize.PAIRS` of the mode in which kernels are stored.
    """
    found = {
        name: getattr(block, name).scale.value
        for name in _NORMS
        if getattr(block, f"use_{name}", True)
    }
    for target in config.TARGETS:
        dense = lora.layer(block, target)
        if dense._kernel is None:
            found[target] = {k: v.value for k, v in dense.stored.items()}
            if pairs is not None:
                found[target]["pairs"] = pairs
        else:
            found[target] = dense._kernel.value
    return found
