"""The rows of the table, who stands in them, and in which order.

A row is a step; a contender is a way of taking it.
"""

import dataclasses
import importlib.util

from keras_gemma_ft import runtime
from tests.benchmarks import model


@dataclasses.dataclass(frozen=True)
class Row:
    """A training step: `rows` x `tokens` of a Gemma 2 of `size`."""

    title: str
    rows: int
    tokens: int
    remat: str
    size: str = "2b"


ROWS = {
    "4x1024": Row("4 x 1024, nothing recomputed", 4, 1024, "none"),
    "2x4096": Row("2 x 4096, blocks recomputed", 2, 4096, "block"),
    "small": Row("4 x 1024, blocks recomputed", 4, 1024, "block"),
    "1x8192": Row("1 x 8192, blocks recomputed", 1, 8192, "block"),
    "9b-nf4": Row("9B, 1 x 2048, blocks recomputed", 1, 2048, "block", "9b"),
    "9b": Row("9B, 4 x 1024, blocks recomputed", 4, 1024, "block", "9b"),
}

_OURS = {
    f"ours-{backend}": {"kind": "ours", "backend": backend}
    for backend in ("torch", "jax")
}
_PEFT = {"kind": "peft", "backend": "torch"}
CONTENDERS = {
    **_OURS,
    **{
        f"{name}-{mode}": {**spec, "quantize": mode}
        for name, spec in _OURS.items()
        for mode in ("nf4", "int8")
    },
    **{
        f"{name}-float16": {**spec, "dtype": "float16"}
        for name, spec in _OURS.items()
    },
    "ours-torch-eager": {**_OURS["ours-torch"], "compile": "off"},
    "stock-jax": {"kind": "stock", "backend": "jax"},
    "stock-torch": {"kind": "stock", "backend": "torch"},
    "peft": _PEFT,
    "peft-liger": {**_PEFT, "liger": True},
    "peft-4bit": {**_PEFT, "in_4_bits": True},
}
WHO = {
    "ours-torch": "ours, Torch",
    "ours-jax": "ours, JAX",
    "ours-torch-eager": "ours, Torch, --model.compile=off",
    "stock-jax": "stock KerasHub `fit`, JAX",
    "stock-torch": "stock KerasHub `fit`, Torch",
    "peft": "transformers + PEFT, eager",
    "peft-liger": "transformers + PEFT + Liger",
    "peft-4bit": "transformers + PEFT + bitsandbytes NF4",
}

# (row, contender, GiB that it takes of an H200, or would take there), the most
# important first: what the budget does not reach is left out.
ORDER = (
    ("4x1024", "ours-torch", 19), ("4x1024", "ours-jax", 14),
    ("4x1024", "peft", 45), ("4x1024", "stock-jax", 28),
    ("2x4096", "ours-torch", 8), ("2x4096", "ours-jax", 8),
    ("2x4096", "peft-liger", 11), ("2x4096", "peft", 34),
    ("small", "ours-torch-nf4", 5), ("small", "ours-jax-nf4", 5),
    ("small", "ours-torch", 7), ("small", "peft-4bit", 24),
    ("1x8192", "ours-torch", 8), ("1x8192", "ours-jax", 8),
    ("9b-nf4", "ours-torch-nf4", 12), ("9b-nf4", "ours-jax-nf4", 12),
    ("9b", "ours-torch", 25), ("9b", "ours-jax", 25),
    ("small", "ours-torch-float16", 8), ("small", "ours-torch-int8", 7),
    ("small", "ours-jax-int8", 7), ("small", "ours-jax-float16", 8),
    ("small", "peft", 25), ("9b-nf4", "peft-4bit", 22),
    ("9b", "peft", 45), ("1x8192", "peft-liger", 11),
    ("4x1024", "peft-liger", 25), ("4x1024", "ours-torch-eager", 19),
    ("4x1024", "stock-torch", 40), ("small", "ours-jax", 8),
)  # fmt: skip


def who(name):
    """A contender in words."""
    for mode in ("nf4", "int8", "float16"):
        if name.endswith(f"-{mode}"):
            return f"{WHO[name.removesuffix(f'-{mode}')]}, {mode}"
    return WHO[name]


def missing(name, on_gpu):
    """Why a contender cannot run here; None if it can."""
    spec = CONTENDERS[name]
    wanted = [spec["backend"]]
    if spec["kind"] == "peft":
        wanted += ["transformers", "peft"]
    if spec.get("liger"):
        wanted += ["liger_kernel"]
    if spec.get("in_4_bits"):
        wanted += ["bitsandbytes"]
    absent = [n for n in wanted if importlib.util.find_spec(n) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if on_gpu and not runtime.uses_cuda(spec["backend"]):
        return f"{spec['backend']} is installed without CUDA"
    if spec.get("liger") and not on_gpu:
        return "Triton needs a GPU"
    return None


def sizes(row, quick):
    """(`model.Sizes`, rows, tokens): a 16th of the tokens where it is quick."""
    if not quick:
        return model.Sizes(*model.PRESETS[row.size]), row.rows, row.tokens
    layers = 2 if row.size == "2b" else 3
    tiny = model.Sizes(layers, 64, 4, 2, 16, 128, 4096, window=32)
    return tiny, row.rows, row.tokens // 16
