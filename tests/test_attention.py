"""Attention in blocks, and the gradients of our own functions.

Witness: torch's autograd in float64 over the definition.
"""

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import ops

from keras_gemma_ft.model import attention, kernels

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
        tiny.close(name, got / scale, want / scale, atol=3e-6)


@CASES
def test_whole_rows(data, cap, window):
    def run(q, k, v, segments):
        mask = attention.allowed(segments, segments, 0, 0, window)
        return attention.attend(q, k, v, mask, cap)

    same(out_and_gradients(data, run), by_torch(*data, cap, window))


@CASES
@pytest.mark.parametrize("block", [4, 8])
def test_blocks_are_the_whole(data, cap, window, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)

    def run(q, k, v, segments):
        starts = attention.reach(segments)
        return attention.attend_in_blocks(
            q, k, v, segments, starts, cap, window
        )

    same(out_and_gradients(data, run), by_torch(*data, cap, window))


def test_a_block_starts_where_its_first_segment_does(data, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    segments = data[3][:1]  # of 9, 21, 5 and 8 tokens
    starts = tiny.compute(attention.reach, segments)
    np.testing.assert_array_equal(starts, [0, 0, 9, 9, 30, 35])
    both = tiny.compute(attention.reach, data[3])
    np.testing.assert_array_equal(both, [0, 0, 0, 0, 0, 35])


def test_a_row_without_keys_is_zero(data):
    q, k, v, *_ = data
    mask = np.zeros((B, 1, 1, T, T), bool)

    def run(q, k, v, mask):
        return attention.attend(q, k, v, mask, 50.0)

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
