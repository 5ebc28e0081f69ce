"""The compiled decoder block of Torch: against the one that runs op by op."""

import collections
import functools

import keras
import numpy as np
import pytest
import tiny

from keras_gemma_ft import config
from keras_gemma_ft.model import (
    compiled,
    decoder_block,
    forward,
    lora,
    presets,
    torch_attention,
)
from keras_gemma_ft.model.attention import scores, whole

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="Torch only"
)
# Two packed examples, the rest padding; and one that fills the row.
LAYOUTS = (9, 12), (tiny.T,)


@pytest.fixture
def traced(monkeypatch):
    """What Inductor would be given, run op by op: no C++ to compile.

    Tracing, autograd, and what is kept or formed again are the same.
    """
    from functorch.compile import make_boxed_func

    def inner(graph, inputs, **more):
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(
        compiled, "inductor", functools.partial(compiled.inductor, inner=inner)
    )


def tuned(folder, *, dtype="float32", **settings):
    """A backbone with a random adapter."""
    backbone = presets.load(str(folder), dtype=dtype).causal_lm.backbone
    # A scale of 2: s (x A) B.
    lora.enable(backbone, config.Lora(**{"rank": 3, "alpha": 6, **settings}))
    tiny.fill(backbone)
    return backbone


def blocks(backbone, recompute=False):
    return compiled.Blocks(
        backbone,
        query_scale=decoder_block.query_scale(backbone),
        residual=decoder_block.residual_dtype(backbone),
        recompute=recompute,
    )


def rows():
    """(token_ids, segment_ids, positions) of two rows, as tensors."""
    layouts = [tiny.layout(*lengths) for lengths in LAYOUTS]
    segments, positions = map(np.concatenate, zip(*layouts))
    batch = tiny.ids(2, tiny.T), segments, positions
    return [keras.ops.convert_to_tensor(x) for x in batch]


def gradients(backbone, through, *, seed=None, recompute=False):
    """(hidden states, flat gradient of the adapter), float64 numpy."""
    import torch

    found = forward.hidden_states(
        backbone, *rows(), blocks=through, recompute=recompute,
        seed=None if seed is None else torch.tensor(seed),
    )  # fmt: skip
    weights = np.random.default_rng(3).normal(size=found.shape)
    total = (found.float() * torch.tensor(weights).float()).sum()
    values = [
        v.value for pair in lora.variables(backbone).values() for v in pair
    ]
    got = torch.autograd.grad(total, values)
    flat = torch.cat([g.flatten() for g in got])
    return found.detach().double().numpy(), flat.double().numpy()


def apart(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("style", ["keras", "standard"])
def test_equal_to_op_by_op(folder, traced, style, recompute):
    backbone = tuned(folder, style=style)
    got = gradients(backbone, blocks(backbone, recompute))
    want = gradients(backbone, None, recompute=recompute)
    tiny.close("hidden states", got[0], want[0], atol=1e-4)
    assert apart(got[1], want[1]) < 1e-4


def test_equal_when_inductor_compiles(folder):
    # A window as long as the row: one kind of block, one compilation.
    backbone = tuned(folder)
    backbone.sliding_window_size = tiny.T
    got = gradients(backbone, blocks(backbone))
    want = gradients(backbone, None)
    tiny.close("hidden states", got[0], want[0], atol=1e-4)
    assert apart(got[1], want[1]) < 1e-4
    # Its own passes once took out all that was marked to be kept.
    assert kept(backbone, recompute=False)[48, 56] == 2 * backbone.num_layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_no_further_from_float32(folder, traced, dtype):
    exact = tuned(folder)
    true = gradients(exact, None)
    half = tuned(folder, dtype=dtype)
    got, plain = gradients(half, blocks(half)), gradients(half, None)
    for ours, theirs, want in zip(got, plain, true):
        # The tiny model amplifies rounding: both are off, neither more.
        assert apart(ours, want) < 1.5 * apart(theirs, want) + 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_draws_the_same_mask_again(folder, traced, recompute):
    backbone = tuned(folder, dropout=0.4)
    seed = [7, 11]
    got = gradients(backbone, blocks(backbone, recompute), seed=seed)
    want = gradients(backbone, None, seed=seed)
    other = gradients(backbone, None, seed=[7, 99])
    tiny.close("hidden states", got[0], want[0], atol=1e-4)
    assert apart(got[1], want[1]) < 1e-4
    assert apart(other[1], want[1]) > 0.1


def test_dropout_is_fair():
    import torch

    from keras_gemma_ft.model import kernels

    x = torch.ones(400, 500)
    seeds = [torch.tensor(n) for n in (0, 1, 2**31, 12)]
    masks = [kernels.dropout(x, 0.3, a, b) for a in seeds for b in seeds]
    for mask in masks:
        kept = mask > 0
        assert abs(kept.float().mean() - 0.7) < 0.005
        torch.testing.assert_close(mask[kept][0].item(), 1 / 0.7)
        # Neighbours in both directions know nothing of each other.
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            pair = torch.stack([a.flatten(), b.flatten()])
            assert abs(torch.corrcoef(pair)[0, 1]) < 0.01
    flat = torch.stack([mask.flatten() for mask in masks])
    between = torch.corrcoef(flat) - torch.eye(len(masks))
    assert between.abs().max() < 0.02


def kept(backbone, recompute):
    """{shape: tensors kept for the backward pass}, parameters aside."""
    import torch

    known = {v.value.data_ptr() for v in backbone.variables}
    counts, alive = collections.Counter(), []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            known.add(tensor.data_ptr())
            alive.append(tensor)  # Its memory is not given to another.
            counts[tuple(sorted(tensor.shape))] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        through = blocks(backbone, recompute)
        forward.hidden_states(backbone, *rows(), blocks=through)
    return counts


def test_what_a_block_keeps(folder, traced):
    backbone = tuned(folder, dtype="bfloat16", style="standard")
    layers, t = backbone.num_layers, tiny.T
    found = kept(backbone, recompute=False)
    assert found[48, 56] == 2 * layers  # gate and up, of 2 x 24 tokens
    assert found[tuple(sorted((2, t, 4, 16)))] == layers  # q
    assert found[tuple(sorted((2, t, 2, 16)))] == layers  # k
    assert found[32, 48] == layers  # v
    assert found[4, 16, 48] == layers  # what attention gives, grouped
    # x between; each block's, and the last.
    assert found[2, t, 40] == 2 * layers + 1
    assert found[40, 48] == 2 * layers  # both results before their norms
    found = kept(backbone, recompute=True)
    assert found[2, t, 40] == layers + 1
    assert not any(t in shape for shape in found if len(shape) == 4
                   and shape[-1] > t)  # fmt: skip
    assert found[2, t, 56] == 0


def test_one_compilation_a_length_and_kind(folder, traced):
    import torch

    backbone = tuned(folder)
    through = blocks(backbone)

    def run(ids, segments, positions):
        found = forward.hidden_states(
            backbone, ids, segments, positions, blocks=through
        )
        found.sum().backward()

    ids, segments, positions = rows()
    run(ids, segments, positions)
    assert through.compilations == {(2, tiny.T): 2}
    run(ids + 1, torch.ones_like(segments), positions)
    assert through.compilations == {(2, tiny.T): 2}
    run(ids[:, :16], segments[:, :16], positions[:, :16])
    assert through.compilations == {(2, tiny.T): 2, (2, 16): 2}
    # No window cuts 6 tokens: both kinds are one.
    run(ids[:, :6], segments[:, :6], positions[:, :6])
    assert through.compilations[2, 6] == 1


def heads(t):
    """(q, k, v, segments), grouped heads, packed rows, padding at an end."""
    import torch

    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, t, 16, generator=draw).mul(3).requires_grad_()
        for n in (4, 2, 2)
    )
    segments = torch.ones(2, t, dtype=torch.int32)
    segments[0, t // 3 :], segments[0, t - 40 :], segments[1, 37:] = 2, 0, 2
    return q, k, v, segments


@pytest.fixture
def dense(monkeypatch):
    """FlexAttention by its definition, which a CPU can differentiate."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(
        flex_attention, "_validate_device", lambda *tensors: None
    )
    monkeypatch.setattr(
        torch_attention, "_masks", lambda: flex_attention.create_block_mask
    )


@pytest.mark.parametrize("kind", ["Flex", "Tiles"])
@pytest.mark.parametrize("t,window,cap", [
    (300, None, 5.0), (300, 64, 5.0), (300, 64, None), (1100, 600, 5.0),
    (1100, None, 5.0),
])  # fmt: skip
def test_attention_is_ours(dense, kind, t, window, cap):
    import torch
    from torch._dynamo.backends import debugging

    q, k, v, segments = heads(t)
    own = getattr(torch_attention, kind)(cap)
    run = torch.compile(
        own.attend, fullgraph=True, dynamic=False,
        backend=debugging.aot_eager_decomp_partition,
    )  # fmt: skip
    out = run(q, k, v, own.looks(segments, window)[True])
    mask = scores.allowed(segments, segments, 0, 0, window)
    want = whole.attend(q, k, v, mask, cap)
    tiny.close("out", out.detach(), want.detach(), atol=2e-5)
    pairs = [
        torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, want)
    ]
    for got, true in zip(*pairs):
        assert apart(got.double().numpy(), true.double().numpy()) < 2e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_the_block_with_flex_attention(
    folder, traced, dense, monkeypatch, recompute
):
    backbone = tuned(folder)
    monkeypatch.setattr(
        torch_attention, "choose",
        lambda backbone, dtype, cap: torch_attention.Flex(cap),
    )  # fmt: skip
    through = blocks(backbone, recompute)
    got = gradients(backbone, through)
    want = gradients(backbone, None)
    tiny.close("hidden states", got[0], want[0], atol=1e-4)
    assert apart(got[1], want[1]) < 1e-4
    assert through.compilations == {(2, tiny.T): 2}
    if not recompute:
        # Fused attention's results are kept, no second copy of them.
        found = kept(backbone, recompute=False)
        want = 2 * backbone.num_layers
        assert found[tuple(sorted((2, tiny.T, 4, 16)))] == want


def trained(folder, compile, **settings):
    """(losses of four optimizer steps, the values that they trained)."""
    import torch

    from keras_gemma_ft.tuning import trainer

    cfg = config.replace(config.Config(), {
        "model.compile": compile, "data.batch_size": 4,
        "data.micro_batch_size": 2, "train.learning_rate": 1e-2, **settings,
    })  # fmt: skip
    loaded = presets.load(str(folder))
    tuner = trainer.build(cfg, loaded, steps=4, warmup=0)
    ids, segments, positions = rows()
    losses = []
    for step in range(8):
        x = {
            "token_ids": (ids + 3 * step) % tiny.V,
            "segment_ids": segments,
            "positions": positions,
        }
        y = (x["token_ids"] * 7 + 1) % tiny.V
        weight = (segments > 0).float() / 45
        tuner.reset_metrics()
        losses.append(float(tuner.train_step((x, y, weight))["loss"]))
    values = [v.value.flatten() for v in tuner.trainable_variables]
    assert (tuner.blocks is not None) == (compile == "on")
    return np.array(losses), torch.cat(values).detach().double().numpy()


@pytest.mark.parametrize("settings", [
    {"lora.rank": 2, "lora.dropout": 0.2, "model.remat": "block"},
    {"lora.rank": 0, "train.learning_rate": 1e-3},
])  # fmt: skip
def test_four_steps_of_training(folder, traced, settings):
    got = trained(folder, "on", **settings)
    want = trained(folder, "off", **settings)
    tiny.close("losses", got[0], want[0], rtol=1e-5)
    assert np.ptp(want[0]) > 0.1
    assert apart(got[1], want[1]) < 1e-3
