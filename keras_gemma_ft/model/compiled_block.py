"""The equations of one decoder block, in plain Torch, for its compiler.

They are those of `decoder_block`. What a block keeps for its backward pass is said,
not left to the compiler, which would keep the inputs of all products too: x,
q, k, v, what attention gives, both halves' results before their norms, gate
and up. All else is formed again inside a region (`torch.utils.checkpoint`);
dequantised kernels with it.

Shapes: B batch, T tokens, d hidden, n query heads, k key/value heads, h
head_dim, f ffw, r rank.
"""

import dataclasses
import functools

from keras_gemma_ft import config
from keras_gemma_ft.model import kernels, quantize, torch_attention

# Targets that read the same input.
_ATTENTION = ("query", "key", "value")
_OUTPUT, _DOWN = ("attention_output",), ("ffw_linear",)
_GATES = ("ffw_gating", "ffw_gating_2")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What of a backbone is constant in the compiled function.

    Attributes:
        heads: {target of attention's inputs: heads}.
        scale: of the queries.
        cap: soft cap of attention's scores, or None.
        epsilon: of the norms.
        compute, residual: `torch.dtype`s.
        quantized: mode of the kernels, or None.
        dropout: rate on the adapters' input.
    """

    heads: dict
    scale: float
    cap: float | None
    epsilon: float
    compute: object
    residual: object
    quantized: str | None
    dropout: float


def block(attention, facts, weights, look, rope, seed, x, recompute):
    """One decoder block: x [B, T, d] -> x."""
    from torch.utils import checkpoint

    # Dropout needs no random state: its masks are functions of a seed.
    run = functools.partial(
        checkpoint.checkpoint, _halves, use_reentrant=False,
        preserve_rng_state=False,
    )  # fmt: skip
    if not recompute:
        run = functools.partial(run, context_fn=_contexts)
    return run(attention, facts, weights, look, rope, seed, x)


def _contexts():
    from torch.utils import checkpoint

    return checkpoint.create_selective_checkpoint_contexts(_policy)


def _policy(context, op, *args, **kwargs):
    """What is kept without recomputation: what `keep` made, and fused
    attention's results."""
    import torch
    from torch.utils.checkpoint import CheckpointPolicy

    marked = kwargs.get("memory_format") is torch.preserve_format
    kept = marked and op is torch.ops.aten.clone.default
    kept = kept or "flex_attention" in str(op)
    return (
        CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE
    )


def _halves(attention, facts, weights, look, rope, seed, x):
    normed = _norm(facts, x, weights["pre_attention_norm"], facts.compute)
    q, k, v = (
        y.unflatten(-1, (facts.heads[target], -1))
        for target, y in zip(
            _ATTENTION, _project(facts, weights, _ATTENTION, seed, normed)
        )
    )
    q, k = _rotated(q, rope, facts.scale), _rotated(k, rope, 1.0)
    # Heads before tokens by strides alone: nothing is moved.
    q, k, v = (torch_attention.keep(y).transpose(1, 2) for y in (q, k, v))
    out = attention.attend(q, k, v, look).transpose(1, 2).flatten(2)
    (attended,) = _project(facts, weights, _OUTPUT, seed, out)
    x = x + _post(
        facts, weights, "post_attention_norm", torch_attention.keep(attended)
    )
    x = torch_attention.keep(x)
    normed = _norm(facts, x, weights["pre_ffw_norm"], facts.compute)
    gate, up = _project(facts, weights, _GATES, seed, normed)
    out = _gated(torch_attention.keep(gate), torch_attention.keep(up))
    (down,) = _project(facts, weights, _DOWN, seed, out)
    down = torch_attention.keep(down)
    return x + _post(facts, weights, "post_ffw_norm", down, _room(down))


def _gated(gate, up):
    from torch.nn import functional

    return functional.gelu(gate, approximate="tanh") * _room(up) * up


def _room(x):
    return kernels.room(str(x.dtype).removeprefix("torch."))


def _rotated(y, rope, scale):
    """y [B, T, heads, h], turned by its position in float32."""
    import torch

    cos, sin = (angle.transpose(1, 2) for angle in rope)
    first, second = y.float().chunk(2, -1)
    turned = torch.cat(
        [first * cos - second * sin, second * cos + first * sin], -1
    )
    return (turned * scale).to(y.dtype)


def _norm(facts, x, scale, dtype, factor=1.0):
    """RMSNorm of x / factor times (1 + scale), in float32."""
    import torch

    x = x.float()
    epsilon = facts.epsilon * factor**2
    root = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return (x * root * (1.0 + scale.float())).to(dtype)


def _post(facts, weights, name, value, factor=1.0):
    """A half's result, value / factor, normalised where there is a norm."""
    if name in weights:
        return _norm(facts, value, weights[name], facts.residual, factor)
    return value.to(facts.residual) * (1.0 / factor)


def _project(facts, weights, targets, seed, x):
    """x W + s (x A) B of targets that read the same x; see `lora.project`."""
    import torch

    shape, x = x.shape[:-1], x.flatten(0, -2)
    adapted = [name for name in targets if f"{name}/a" in weights]
    matrices = [_matrix(name, weights[f"{name}/a"]) for name in adapted]
    if facts.dropout and seed is not None:
        low = [
            _dropped(facts, seed, name, x) @ matrix
            for name, matrix in zip(adapted, matrices)
        ]
    elif matrices:
        low = (x @ torch.cat(matrices, -1)).split(
            [matrix.shape[-1] for matrix in matrices], -1
        )
    else:
        low = []
    low = dict(zip(adapted, low))
    found = []
    for name in targets:
        y = x @ _kernel(facts, name, weights[name], x.dtype)
        if name in low:
            b = weights[f"{name}/b"].flatten(1)
            # [B T, r] or, with an A for each head, [B T n, r].
            u = low[name].reshape(-1, b.shape[0])
            y = y + (u @ b).reshape(y.shape)
        found.append(y.unflatten(0, shape))
    return found


def _dropped(facts, seed, name, x):
    """Each target has its own mask, as in PEFT."""
    return kernels.dropout(
        x, facts.dropout, seed[0], seed[1] + config.TARGETS.index(name)
    )


def _kernel(facts, name, stored, dtype):
    """A frozen or trained kernel as the matrix [in, out]."""
    if isinstance(stored, dict):
        pairs = stored.get("pairs")
        stored = {k: v for k, v in stored.items() if k != "pairs"}
        stored = quantize.decode(stored, facts.quantized, dtype, pairs)
    return _matrix(name, stored.to(dtype))


def _matrix(target, kernel):
    """As `lora.project` takes a kernel, or an A: [in, out]."""
    if target in _ATTENTION and kernel.ndim == 3:  # [n, d, h]
        return kernel.transpose(0, 1).flatten(1)
    return kernel.flatten(0, -2)
