"""Stored kernels: against the paper's construction and float gradients."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from scipy import stats

import tiny
from keras_gemma_ft import config
from keras_gemma_ft.embedded import model
from keras_gemma_ft.model import codes, forward, lora, quantize

MODES = {"int8": 0.007, "int4": 0.12, "nf4": 0.1}


def test_nf4_is_the_papers_sixteen_quantiles():
    # QLoRA, appendix E, as bitsandbytes' create_normal_map computes it.
    offset = 0.9677083
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    levels /= np.abs(levels).max()
    np.testing.assert_allclose(codes.NF4, levels, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 40, 16), (40, 56), (2, 128, 256)])
def test_round_trip(mode, shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    stored = quantize.encode(kernel, mode)
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
    stored = quantize.encode(kernel, mode)
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


def test_kernels_are_gone_and_the_table_is_not():
    backbone = _tuned("nf4")
    names = [v.path for v in backbone.variables]
    assert not any(name.endswith("/kernel") for name in names)
    table = backbone.token_embedding.embeddings
    assert keras.backend.standardize_dtype(table.dtype) == "float32"
    trained = {v.path.rpartition("/")[2] for v in backbone.trainable_variables}
    assert trained == {"lora_kernel_a", "lora_kernel_b"}
