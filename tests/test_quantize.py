"""Stored weights: against the paper's construction and float gradients."""

import functools
import gc
import math

import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
import tiny
from keras import ops
from scipy import stats

from keras_gemma_ft import config
from keras_gemma_ft.embedded import model
from keras_gemma_ft.model import (
    codes,
    forward,
    lora,
    presets,
    quantize,
    tables,
)
from keras_gemma_ft.tuning import feed, objectives, trainer

MODES = {"int8": 0.007, "int4": 0.12, "nf4": 0.1}
BACKEND = keras.config.backend()


def test_nf4_is_the_papers_sixteen_quantiles():
    # QLoRA, appendix E, as bitsandbytes' create_normal_map computes it.
    offset = 0.9677083
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    levels /= np.abs(levels).max()
    np.testing.assert_allclose(codes.NF4, levels, atol=1e-6)


def _plainly(kernel, mode):
    """What `encode` must make: the same rule, number by number."""
    kernel = np.array(kernel, "float32")
    block = codes.block_size(kernel.shape[-1])
    blocks = kernel.reshape(-1, block)
    absmax = np.abs(blocks).max(-1)
    size = codes.group_size(kernel.shape)
    one = np.float32(1)
    stored, read, low, step = [], [], [], []
    for group in absmax.reshape(-1, size):
        low.append(group.min())
        step.append(max((group.max() - low[-1]) / np.float32(255), 1e-12 * one))
        stored.append(np.round((group - low[-1]) / step[-1]))
        read.append(stored[-1] * step[-1] + low[-1])
    unit = blocks / np.maximum(np.concatenate(read), 1e-30 * one)[:, None]
    if mode == "nf4":
        # The first of the nearest, as distances are in float64.
        levels = codes.NF4.astype("float64")
        middles = ((codes.NF4[1:] + codes.NF4[:-1]) / 2).astype("float64")
        found = (unit.astype("float64")[..., None] > middles).sum(-1)
        assert len(levels) == 16
    else:
        top = {"int8": 127, "int4": 7}[mode]
        found = np.clip(np.round(unit * np.float32(top)), -top, top)
        found += 8 * (mode == "int4")
    found = found.astype("int8" if mode == "int8" else "uint8")
    found = found.reshape(kernel.shape)
    if mode != "int8":
        found = found[..., 0::2] * 16 + found[..., 1::2]
    groups = kernel.shape[0], -1
    return {
        "codes": found,
        "absmax": np.concatenate(stored)
        .astype("uint8")
        .reshape(*kernel.shape[:-1], -1),
        "low": np.array(low, "float32").reshape(groups),
        "step": np.array(step, "float32").reshape(groups),
    }


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape,axes,dtype",
    [
        ((40, 56), (0, 1), "float32"),
        ((2, 128, 256), (0, 1, 2), "float16"),
        # As Hugging Face's lie: feed-forward, query, attention's output.
        ((2176, 96), (1, 0), "bfloat16"),
        ((3, 64, 1040), (0, 2, 1), "bfloat16"),
        ((128, 4, 64), (1, 2, 0), "bfloat16"),
    ],
)
def test_codes_are_the_plain_ones_however_a_kernel_lies(
    mode, shape, axes, dtype
):
    kernel = np.random.default_rng(0).normal(size=shape)
    kernel = kernel.astype(np.dtype(dtype)).transpose(axes)
    if dtype == "float32":
        kernel[3] = 0.0
    got, want = codes.encode(kernel, mode), _plainly(kernel, mode)
    kinds = codes.stored_as(kernel.shape, mode)
    for name, array in want.items():
        assert (got[name].shape, str(got[name].dtype)) == kinds[name]
        np.testing.assert_array_equal(got[name], array, name)


@pytest.mark.once
def test_groups_of_256_blocks_cost_an_absmax_little():
    """Against 32 bits of absmax: 0.1 % more error, an eighth of a bit less."""
    kernel = np.random.default_rng(0).standard_normal((64, 4096), "float32")
    stored = codes.encode(kernel, "nf4")
    assert codes.group_size((8, 2304, 256)) == 256
    absmax = np.abs(kernel.reshape(64, -1, 64)).max(-1)
    read = stored["absmax"].reshape(*stored["low"].shape, -1)
    read = read * stored["step"][..., None] + stored["low"][..., None]
    off = read.reshape(absmax.shape) / absmax - 1
    assert np.sqrt(np.mean(off**2)) < 0.0015


@pytest.mark.once
def test_a_table_is_rounded_row_by_row():
    table = np.random.default_rng(0).normal(size=(3000, 64))
    table = table.astype(ml_dtypes.bfloat16)
    table[7] = 0
    stored = codes.encode_table(table)
    kinds = {k: (v.shape, str(v.dtype)) for k, v in stored.items()}
    assert kinds == codes.table_as(table.shape)
    want = table.astype("float64")
    step = np.abs(want).max(1, keepdims=True) / 127
    np.testing.assert_allclose(stored["step"], step, rtol=1e-6, atol=1e-29)
    assert {*np.abs(stored["codes"]).max(1)} == {0, 127}
    off = np.abs(stored["codes"] * stored["step"] - want)
    assert np.all(off <= step * 0.5001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_decoding_rounds_once(mode, dtype):
    kernel = np.random.default_rng(0).normal(size=(4, 40, 16))
    stored = codes.encode(kernel, mode)
    packed = stored["codes"].astype("int64")
    if mode != "int8":
        packed = np.stack([packed // 16, packed % 16], -1).reshape(4, 40, 16)
    unit = {
        "nf4": lambda: codes.NF4.astype("float64")[packed],
        "int4": lambda: (packed - 8) / 7,
        "int8": lambda: packed / 127,
    }[mode]()
    low, step = (stored[k].astype("float64") for k in ("low", "step"))
    absmax = stored["absmax"].reshape(*low.shape, -1)
    absmax = absmax * step[..., None] + low[..., None]
    want = unit.reshape(-1, 16) * absmax.reshape(-1, 1)

    def decode(*arrays):
        return quantize.decode(dict(zip(stored, arrays)), mode, dtype)

    got = tiny.compute(decode, *stored.values())
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_allclose(
        got.astype("float64").ravel(), want.ravel(),
        rtol={"float32": 5e-7, "bfloat16": 0.0041, "float16": 5e-4}[dtype],
        atol=1e-7,
    )  # fmt: skip


@pytest.mark.skipif(BACKEND != "torch", reason="Torch's compiler")
@pytest.mark.parametrize("mode", MODES)
def test_torchs_compiler_sees_through_decoding(mode):
    import torch

    kernel = np.random.default_rng(0).normal(size=(4, 40, 16))
    stored = codes.encode(kernel, mode)
    tensors = {name: torch.from_numpy(x) for name, x in stored.items()}
    pairs = codes.PAIRS.get(mode)
    pairs = None if pairs is None else torch.from_numpy(pairs)

    def decode(tensors, pairs):
        return quantize.decode(tensors, mode, torch.bfloat16, pairs)

    run = torch.compile(decode, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        run(tensors, pairs), decode(tensors, pairs), rtol=0, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 40, 16), (40, 56), (2, 128, 256)])
def test_round_trip(mode, shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    stored = codes.encode(kernel, mode)
    back = ops.convert_to_numpy(quantize.decode(stored, mode, "float32"))
    error = np.sqrt(np.mean((back - kernel) ** 2))
    assert back.shape == shape
    assert error < MODES[mode]
    # No element is further than half the widest gap of its block's levels.
    block = codes.block_size(shape[-1])
    absmax = np.abs(kernel.reshape(-1, block)).max(-1, keepdims=True)
    gap = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.3039}[mode]
    distance = np.abs(back - kernel).reshape(-1, block)
    assert np.all(distance <= absmax * (gap / 2 + 0.03))


@pytest.mark.parametrize("mode,bits", [("int8", 8.2), ("nf4", 4.2)])
def test_bits_a_weight(mode, bits):
    # The shape of 2B's query kernel, an eighth of its hidden size.
    kernel = np.random.default_rng(0).normal(size=(8, 288, 256))
    stored = codes.encode(kernel, mode)
    size = sum(array.nbytes for array in stored.values())
    assert 8 * size / kernel.size < bits


def test_an_odd_axis_is_refused():
    with pytest.raises(config.UserError, match="odd"):
        codes.block_size(7)


def _tuned(mode):
    """A backbone with a random adapter, its kernels stored in `mode`.

    Weights as KerasHub draws them: with `tiny.py`'s, which drive the soft caps
    hard, half a percent of noise already turns the attention around.
    """
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GemmaBackbone(**model.SIZES)
    lora.enable(backbone, config.Lora(rank=4), seed=1)
    tiny.fill(backbone, seed=2, deviation=0.05)
    if mode:
        quantize.apply(backbone, lora.layers(backbone), mode)
    return backbone


@functools.cache
def _gradient(mode):
    """LoRA gradients of a random projection of the hidden states, flat."""
    backbone = _tuned(mode)
    weights = np.random.default_rng(3).normal(size=(1, tiny.T, 192))

    def total(*batch):
        hidden = forward.hidden_states(backbone, *batch)
        return ops.sum(hidden * ops.convert_to_tensor(weights, "float32"))

    pairs = lora.variables(backbone).values()
    variables = [variable for pair in pairs for variable in pair]
    batch = (tiny.ids(1, tiny.T), *tiny.layout(tiny.T))
    _, found = tiny.differentiate(total, variables)(*batch)
    return np.concatenate([g.ravel() for g in found]).astype("float64")


@pytest.mark.parametrize("mode,least", [("int8", 0.998), ("nf4", 0.8)])
def test_gradients_point_where_the_float_models_do(mode, least):
    exact, got = _gradient(None), _gradient(mode)
    cosine = exact @ got / np.linalg.norm(exact) / np.linalg.norm(got)
    assert cosine > least


# --- a model that is loaded so ------------------------------------------------

STORED = [("nf4", "none"), ("int8", "int8"), ("int4", "none")]
EVERY = pytest.mark.parametrize("mode,embedding", STORED)


def _loaded(folder, mode="none", embedding="none"):
    settings = config.Model(quantize=mode, quantize_embedding=embedding)
    return presets.load(str(folder), model=settings)


def _copy(folder, mode, embedding):
    """A float model that holds what a stored one is read as."""
    loaded = _loaded(folder)
    backbone = loaded.causal_lm.backbone
    for dense in lora.layers(backbone) if mode != "none" else ():
        kernel = ops.convert_to_numpy(dense._kernel.value)
        stored = codes.encode(kernel, mode)
        dense._kernel.assign(quantize.decode(stored, mode, "float32"))
    if embedding != "none":
        table = backbone.token_embedding._embeddings
        stored = codes.encode_table(ops.convert_to_numpy(table.value))
        table.assign(stored["codes"] * stored["step"])
    return loaded


def _loss_and_gradient(loaded, chunk=0):
    """Of adapters, by `objectives.sft`: a float, and one flat array."""
    backbone = loaded.causal_lm.backbone
    lora.enable(backbone, config.Lora(rank=4), seed=1)
    tiny.fill(backbone, seed=2, deviation=0.05)
    pairs = lora.variables(backbone).values()
    row = tiny.ids(2, tiny.T + 1)
    layout = [np.tile(x, (2, 1)) for x in tiny.layout(tiny.T)]
    weight = np.full((2, tiny.T), 1 / 48, "float32")

    def total(ids, y, segments, positions, weight):
        hidden = forward.hidden_states(backbone, ids, segments, positions)
        return objectives.sft(
            backbone, hidden, y, weight, chunk=chunk,
            table_trained=tables.trained(backbone),
        )  # fmt: skip

    run = tiny.differentiate(total, [v for pair in pairs for v in pair])
    loss, found = run(row[:, :-1], row[:, 1:], *layout, weight)
    return loss, np.concatenate([g.ravel() for g in found]).astype("float64")


@EVERY
def test_gradients_are_those_of_the_dequantised_copy(
    folder, mode, embedding, monkeypatch
):
    # Several parts of the table, the last one smaller.
    monkeypatch.setattr(tables, "_PART", 40 * 100)
    want, exact = _loss_and_gradient(_copy(folder, mode, embedding))
    loss, got = _loss_and_gradient(_loaded(folder, mode, embedding))
    tiny.close("loss", loss, want, rtol=1e-5)
    cosine = exact @ got / np.linalg.norm(exact) / np.linalg.norm(got)
    assert cosine > 1 - 1e-6
    tiny.close("norm", np.linalg.norm(got), np.linalg.norm(exact), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_table_is_multiplied_as_its_rows_are(dtype, monkeypatch):
    monkeypatch.setattr(tables, "_PART", 40 * 100)
    rng = np.random.default_rng(0)
    stored = codes.encode_table(rng.normal(size=(347, 40)))
    rows = (stored["codes"] * stored["step"]).astype(np.dtype(dtype))
    h, dz = rng.normal(size=(5, 40)), rng.normal(size=(5, 347))
    h, dz = (x.astype(np.dtype(dtype)) for x in (h, dz))

    def run(h, dz, codes, step):
        table = {"codes": codes, "step": step}
        h, dz = ops.cast(h, dtype), ops.cast(dz, dtype)
        return tables.times(h, table), tables.back(dz, table)

    z, dh = tiny.compute(run, h, dz, stored["codes"], stored["step"])
    h, dz, rows = (x.astype("float64") for x in (h, dz, rows))
    near = {"float32": 1e-6, "bfloat16": 0.005}[dtype]
    tiny.close("z", z, h @ rows.T, rtol=near, atol=20 * near)
    tiny.close("dh", dh, dz @ rows, rtol=near, atol=40 * near)


def test_sixty_steps_are_those_of_the_dequantised_copy(folder):
    rng = np.random.default_rng(0)
    row = rng.integers(8, tiny.V, (4, tiny.T + 1)).astype("int32")
    segments, positions = (np.tile(x, (4, 1)) for x in tiny.layout(tiny.T))
    x = {"token_ids": row[:, :-1], "segment_ids": segments}
    weight = np.full((4, tiny.T), 1 / (4 * tiny.T), "float32")
    batch = {**x, "positions": positions}, row[:, 1:], weight
    cfg = config.replace(
        config.Config(), {"lora.rank": 4, "train.learning_rate": 3e-3}
    )

    def curve(loaded):
        tuner = trainer.build(cfg, loaded, steps=60, warmup=3)
        logs = tuner.fit(
            feed.Feed([batch] * 60, tuner.meter),
            epochs=60, steps_per_epoch=1, verbose=0, shuffle=False,
        )  # fmt: skip
        return logs.history["loss"]

    want = curve(_copy(folder, "nf4", "none"))
    assert want[-1] < 0.7 * want[0]
    got = curve(_loaded(folder, "nf4"))
    tiny.close("losses", got, want, rtol=0.02)


def _alive(meta=True):
    """(shape, dtype) of every tensor that somebody holds.

    Args:
        meta: whether those count which have no memory.
    """
    gc.collect()
    if BACKEND == "jax":
        import jax

        found = jax.live_arrays()
    elif BACKEND == "torch":
        import torch

        # Not what stands in for one while Torch compiles.
        kinds = (torch.Tensor, torch.nn.Parameter)
        found = [x for x in gc.get_objects() if type(x) in kinds]
        found = [x for x in found if meta or not x.is_meta]
    else:
        import tensorflow as tf

        found = [x for x in gc.get_objects() if isinstance(x, tf.Variable)]
    kind = keras.backend.standardize_dtype
    return [(tuple(x.shape), kind(x.dtype)) for x in found]


# A model of sizes that no other test's tensors have.
_OWN = {"hidden_size": 44, "intermediate_size": 52, "vocab_size": 353,
        "head_dim": 22}  # fmt: skip
_FLOATS = {(44, 52), (52, 44), (4, 44, 22), (2, 44, 22), (4, 22, 44), (353, 44)}


@pytest.mark.parametrize("late", [False, True])
def test_float_kernels_are_gone(tmp_path, late):
    folder = tiny.save(tmp_path, **_OWN)
    loaded = _loaded(folder, *([] if late else ["nf4", "int8"]))
    backbone = loaded.causal_lm.backbone
    if late:
        before = [kind for kind in _alive() if kind[0] in _FLOATS]
        assert len({shape for shape, _ in before}) == 6
    lora.enable(backbone, config.Lora(rank=4, style="standard"))
    quantize.apply(backbone, lora.layers(backbone), "nf4", "int8")
    alive = _alive()
    assert not [x for x in alive if x[0] in _FLOATS and "float" in x[1]]
    assert ((353, 44), "int8") in alive
    names = [v.path for v in backbone.variables]
    assert not [n for n in names if n.endswith(("/kernel", "/embeddings"))]
    trained = {v.path.rpartition("/")[2] for v in backbone.trainable_variables}
    assert trained == {"lora_kernel_a", "lora_kernel_b"}
    if BACKEND == "torch":
        names = [*backbone.state_dict(), *dict(backbone.named_parameters())]
        assert [n for n in names if n.endswith("/codes")]
        assert not [n for n in names if n.endswith(("/kernel", "/embeddings"))]
    held = sum(
        math.prod(v.shape) * np.dtype(v.dtype).itemsize
        for v in backbone.non_trainable_variables
    )
    assert held < 0.4 * 4 * presets.parameters(backbone)


def test_no_float_kernel_ever_has_memory(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path, **_OWN)
    encode, seen = codes.encode, []

    def spied(kernel, mode):
        seen.extend(x for x in _alive(meta=False) if x[0] in _FLOATS)
        return encode(kernel, mode)

    monkeypatch.setattr(codes, "encode", spied)
    _loaded(folder, "nf4")
    # The table alone, which has come first or has not come yet.
    assert set(seen) <= {((353, 44), "float32")}


def test_the_table_stays_as_it_is():
    table = _tuned("nf4").token_embedding.embeddings
    assert keras.backend.standardize_dtype(table.dtype) == "float32"
