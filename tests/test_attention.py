"""Attention in blocks, and the gradients of our own functions.

Witness: torch's autograd in float64 over the definition. What JAX does on a
GPU is run here on a CPU; what a GPU's compiler makes of it, nothing here sees.
"""

import importlib.util
import itertools
import sys
import types

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import ops

from keras_gemma_ft.model import attention, kernels
from keras_gemma_ft.model.attention import (
    blocks,
    fused,
    loops,
    scores,
    whole,
)
from keras_gemma_ft.tuning import trainer

# Rows, query heads, key/value heads, head size; T is no multiple of a block.
B, N, K, H, T = 2, 4, 2, 6, 43


@pytest.fixture(scope="module")
def data():
    """q, k, v, segments, upstream gradient."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(B, heads, T, H), scale=2.0).astype("float32")
        for heads in (N, K, K, N)
    ]
    first = np.repeat([1, 2, 3, 0], [9, 21, 5, 8])
    segments = np.stack([first, np.repeat([1, 0], [40, 3])]).astype("int32")
    return *arrays[:3], segments, arrays[3]


def by_torch(q, k, v, segments, upstream, cap, window):
    """(out, dq, dk, dv) of attention as it is defined, in float64."""
    q, k, v = (torch.tensor(a).double().requires_grad_() for a in (q, k, v))
    wide = [x.repeat_interleave(N // K, 1) for x in (k, v)]
    z = q @ wide[0].mT
    z = z if cap is None else cap * torch.tanh(z / cap)
    place = np.arange(T)
    mask = segments[:, :, None] == segments[:, None, :]
    mask = mask & (place[:, None] >= place[None])
    if window is not None:
        mask = mask & (place[:, None] - place[None] < window)
    z = z.masked_fill(~torch.tensor(mask)[:, None], -torch.inf)
    out = torch.softmax(z, -1) @ wide[1]
    (out * torch.tensor(upstream)).sum().backward()
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


def out_and_gradients(data, run):
    """(out, dq, dk, dv) of run(q, k, v, segments)."""
    *arrays, segments, upstream = data
    variables = [keras.Variable(a) for a in arrays]
    out = tiny.compute(
        lambda *args: run(*args, ops.convert_to_tensor(segments)), *arrays
    )

    def total():
        values = [v.value for v in variables]
        out = run(*values, ops.convert_to_tensor(segments))
        return ops.sum(out * ops.convert_to_tensor(upstream))

    _, gradients = tiny.differentiate(total, variables)()
    return out, *gradients


CASES = pytest.mark.parametrize(
    "cap,window", [(50.0, None), (5.0, 11), (None, None), (None, 3)]
)


def same(gots, wants):
    for name, got, want in zip(("out", "dq", "dk", "dv"), gots, wants):
        scale = np.abs(want).max()
        tiny.close(name, got / scale, want / scale, atol=4e-6)


@CASES
def test_whole_rows(data, cap, window):
    def run(q, k, v, segments):
        mask = scores.allowed(segments, segments, 0, 0, window)
        return whole.attend(q, k, v, mask, cap)

    same(out_and_gradients(data, run), by_torch(*data, cap, window))


def in_blocks(cap, window):
    """A function of (q, k, v, segments) for `out_and_gradients`."""

    def run(q, k, v, segments):
        starts = blocks.reach(segments)
        return blocks.attend(q, k, v, segments, starts, cap, window)

    return run


@CASES
@pytest.mark.parametrize("block", [4, 8])
def test_blocks_are_the_whole(data, cap, window, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    gots = out_and_gradients(data, in_blocks(cap, window))
    same(gots, by_torch(*data, cap, window))


def test_a_block_starts_where_its_first_segment_does(data, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    segments = data[3][:1]  # of 9, 21, 5 and 8 tokens
    starts = tiny.compute(blocks.reach, segments)
    np.testing.assert_array_equal(starts, [0, 0, 9, 9, 30, 35])
    both = tiny.compute(blocks.reach, data[3])
    np.testing.assert_array_equal(both, [0, 0, 0, 0, 0, 35])


def test_a_row_without_keys_is_zero(data):
    q, k, v, *_ = data
    mask = np.zeros((B, 1, 1, T, T), bool)

    def run(q, k, v, mask):
        return whole.attend(q, k, v, mask, 50.0)

    np.testing.assert_array_equal(tiny.compute(run, q, k, v, mask), 0.0)


def test_norm_and_gate(data):
    """Values and gradients of the small functions, against torch."""
    x, up = data[0].reshape(-1, H), data[4].reshape(-1, H)
    scale = keras.Variable(np.linspace(-0.5, 0.5, H).astype("float32"))
    variables = [keras.Variable(x), keras.Variable(up), scale]

    def total():
        a, b = (v.value for v in variables[:2])
        normed = kernels.norm(a, scale, 1e-6, "float32")
        return ops.sum(kernels.gated(normed, b) * b)

    value, gots = tiny.differentiate(total, variables)()
    a, b, s = (
        torch.tensor(ops.convert_to_numpy(v.value)).double().requires_grad_()
        for v in variables
    )
    normed = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6)
    gate = torch.nn.functional.gelu(normed * (1 + s), approximate="tanh")
    want = (gate * b * b).sum()
    want.backward()
    tiny.close("value", value, want.item(), rtol=1e-6)
    for got, w in zip(gots, (a.grad, b.grad, s.grad)):
        top = w.abs().max().item()
        tiny.close("gradient", got / top, w.numpy() / top, atol=2e-6)


# --- JAX on a GPU -------------------------------------------------------------

jax_only = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="JAX on a GPU"
)


@pytest.fixture
def gpu(monkeypatch):
    """JAX's code for a GPU; no optional library suits."""
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(fused, "suits", lambda *_: False)


@jax_only
@pytest.mark.parametrize(
    "cap,window,written", [(50.0, None, 16), (None, 12, 16), (50.0, 12, 2)]
)
def test_a_gpus_blocks_are_the_whole(
    gpu, data, cap, window, written, monkeypatch
):
    """Written out, whole rows and packed ones, and as a loop beyond."""
    monkeypatch.setattr(blocks, "BLOCK", 11)
    monkeypatch.setattr(loops, "_WRITTEN", written)
    gots = out_and_gradients(data, in_blocks(cap, window))
    same(gots, by_torch(*data, cap, window))
    # No example is longer than a block: two blocks of the four are enough.
    short = np.repeat(np.arange(1, 6), [7, 11, 10, 9, 6])[None]
    short = np.repeat(short, B, 0).astype("int32")
    packed = (*data[:3], short, data[4])
    gots = out_and_gradients(packed, in_blocks(cap, window))
    same(gots, by_torch(*packed, cap, window))


@jax_only
@pytest.mark.parametrize("dtype,apart", [("bfloat16", 5e-2), ("float16", 5e-3)])
@pytest.mark.parametrize("cap,window", [(50.0, None), (None, 11)])
def test_a_gpus_blocks_in_16_bits(
    gpu, data, dtype, apart, cap, window, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    rounded = [
        ops.convert_to_numpy(ops.cast(ops.cast(x, dtype), "float32"))
        for x in (data[0] / 4, *data[1:3], data[4])  # Scores of up to 10.
    ]
    rounded.insert(3, data[3])

    def run(q, k, v, segments):
        q, k, v = (ops.cast(x, dtype) for x in (q, k, v))
        return ops.cast(in_blocks(cap, window)(q, k, v, segments), "float32")

    gots = out_and_gradients(rounded, run)
    for name, got, want in zip(
        ("out", "dq", "dk", "dv"), gots, by_torch(*rounded, cap, window)
    ):
        top = np.abs(want).max()
        tiny.close(name, got / top, want / top, atol=apart)


def equations(jaxpr):
    """Every equation of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def looked(t):
    """Equations of attention over [1, 6, t, 8] as a block calls it, 16 bits.

    Forward, and backward.
    """
    import jax

    def total(q, k, v, segments):
        look = attention.looks(segments, {True: t // 2, False: None}, 50.0)
        return sum(look[kind](q, k, v).sum() for kind in look)

    q, k = (
        jax.ShapeDtypeStruct((1, heads, t, 8), "bfloat16") for heads in (6, 2)
    )
    segments = jax.ShapeDtypeStruct((1, t), "int32")
    run = jax.value_and_grad(total, (0, 1, 2))
    return list(equations(jax.make_jaxpr(run)(q, k, k, segments).jaxpr))


@jax_only
@pytest.mark.parametrize("t", [1024, 4096])
def test_a_gpu_has_no_float32_scores_in_memory(gpu, t):
    """Its products read and write 16 bits; no array is as long as it is wide.

    What lies between two products a compiler can keep in registers, if no
    tanh has two uses: each has a product of its own name.
    """
    found = looked(t)
    scores = [
        (e, v.aval)
        for e in found
        for v in (*e.invars, *e.outvars)
        if hasattr(v.aval, "shape") and v.aval.shape[-1:] >= (512,)
    ]
    assert len(scores) > 100
    for equation, aval in scores:
        assert aval.shape[-2:] != (t, t), equation
        if equation.primitive.name == "dot_general":
            assert aval.dtype == "bfloat16", equation
    products = [
        e.outvars[0]
        for e in found
        if e.primitive.name == "dot_general"
        and e.outvars[0].aval.shape[-1] >= 512
    ]
    tanhs = [e for e in found if e.primitive.name == "tanh"]
    barriers = [e for e in found if e.primitive.name == "optimization_barrier"]
    # Forward 1 product and 2 tanhs, backward 2 and 2; a barrier for each.
    assert 3 * len(tanhs) == 4 * len(products) > 0
    assert 2 * len(barriers) == len(tanhs)
    assert {str(e.outvars[0].aval.dtype) for e in barriers} == {"bfloat16"}
    assert len([e for e in found if e.primitive.name == "while"]) == 0


@jax_only
def test_only_a_gpu_has_no_barriers(gpu, monkeypatch):
    import jax

    scale = keras.Variable(np.zeros(H, "float32"), trainable=False)

    def barriers():
        jaxpr = jax.make_jaxpr(
            lambda x: kernels.norm(x, scale, 1e-6, "float32")
        )(np.ones((2, H), "float32"))
        names = [e.primitive.name for e in equations(jaxpr.jaxpr)]
        return names.count("optimization_barrier")

    assert barriers() == 0
    monkeypatch.setattr(kernels, "on_gpu", lambda: False)
    assert barriers() == 1


@pytest.mark.parametrize(
    "on_gpu,remat,layers,loop",
    [
        (False, "none", 26, True),
        (False, "none", 15, False),
        (True, "block", 26, True),
        (True, "none", 26, False),
    ],
)
def test_a_gpu_loops_over_recomputed_blocks_only(
    on_gpu, remat, layers, loop, monkeypatch
):
    monkeypatch.setattr(kernels, "on_gpu", lambda: on_gpu)
    model = types.SimpleNamespace(remat=remat, scan="auto")
    backbone = types.SimpleNamespace(num_layers=layers)
    cfg = types.SimpleNamespace(model=model)
    assert trainer.scan(cfg, backbone) == loop


# --- tokamax ------------------------------------------------------------------


@jax_only
def test_first_keys():
    segments = np.array([[1, 1, 1, 2, 2, 0], [3, 0, 0, 0, 0, 0]])
    found = tiny.compute(lambda s: fused.first_keys(s, None), segments)
    want = [[[0, 0, 0, 3, 3, 5]], [[0, 1, 1, 1, 1, 1]]]
    np.testing.assert_array_equal(found, want)
    found = tiny.compute(lambda s: fused.first_keys(s, 2), segments)
    want = [[[0, 0, 1, 3, 3, 5]], [[0, 1, 1, 2, 3, 4]]]
    np.testing.assert_array_equal(found, want)


@jax_only
def test_a_device_that_does_not_suit_is_told(monkeypatch, capsys):
    import jax

    heads = itertools.count(1000)  # Never asked about before.

    def asked(capability, dtype="bfloat16", length=2048):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        q = np.zeros((1, next(heads), length, 8), dtype)
        assert not fused.suits(q, q, q, 50.0)
        return capsys.readouterr().err

    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "blocks, compute capability 7.5 has no" in asked("7.5")
    assert "float32 is no 16-bit type" in asked("9.0", "float32")
    assert "pip install 'keras_gemma_ft[fused]'" in asked("9.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    # Where it cannot be imported, or its compiler refuses: what that says.
    monkeypatch.setitem(sys.modules, "tokamax", None)
    assert "blocks, tokamax: " in asked("10.0")
    assert not asked("9.0", length=1024)  # As fast by ours: not even tried.
    monkeypatch.setattr(kernels, "on_gpu", lambda: False)
    assert not fused.suits(*[np.zeros((1, 1, 1, 8), "float16")] * 3, 50.0)


def by_tokamax():
    """tokamax's own attention for any device, forward and backward."""
    from tokamax._src.ops.attention import base

    return base.DotProductAttention(vjp=base.DotProductAttentionVjp())


@jax_only
@CASES
def test_tokamax_is_ours(data, cap, window):
    pytest.importorskip("tokamax")
    kernel = by_tokamax()

    def run(q, k, v, segments):
        return fused.attend(q, k, v, segments, cap, window, kernel=kernel)

    # Its logits of float32 inputs are TF32's where a device has them.
    same(out_and_gradients(data, run), by_torch(*data, cap, window))


@jax_only
def test_the_trial_of_tokamax(monkeypatch):
    """Inside of a traced step; and it refuses what has another cap."""
    pytest.importorskip("tokamax")
    import jax

    kernel, found = by_tokamax(), []

    def step(x):
        found.append(fused._wrong(4, 2, 32, "bfloat16", 50.0, kernel))
        return x

    jax.jit(step)(1.0)
    assert found == [""]
    attend = fused.attend

    def uncapped(q, k, v, segments, cap, window, *, kernel):
        return attend(q, k, v, segments, None, window, kernel=kernel)

    monkeypatch.setattr(fused, "attend", uncapped)
    assert "tokamax's out is" in fused._wrong(
        4, 2, 32, "bfloat16", 50.0, kernel
    )
