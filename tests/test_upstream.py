"""Canaries: what Keras and KerasHub do wrong, and this package works around.

A failure here is good news: an upstream release has changed. See whether the
workaround that the docstring names can go.
"""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma_ft.model import lora


@pytest.fixture
def backbone(folder):
    return keras_hub.models.GemmaBackbone.from_preset(
        str(folder), dtype="float32"
    )


def numpy(value):
    return ops.convert_to_numpy(value)


def test_load_weights_folds_lora_into_the_base(backbone, tmp_path):
    """Hence our own checkpoints (`tuning/checkpoint.py`)."""
    backbone.enable_lora(2)
    dense = backbone.transformer_layers[0].attention.query_dense
    rng = np.random.default_rng(0)
    dense.lora_kernel_b.assign(rng.normal(size=dense.lora_kernel_b.shape))
    base, whole = numpy(dense._kernel), numpy(dense.kernel)
    assert np.abs(whole - base).max() > 0.1
    backbone.save_weights(tmp_path / "model.weights.h5")
    backbone.load_weights(tmp_path / "model.weights.h5")
    # The frozen kernel has moved by A B, and the adapter is gone.
    np.testing.assert_allclose(numpy(dense._kernel), whole, atol=1e-6)
    assert not numpy(dense.lora_kernel_b).any()


def test_unknown_lora_targets_train_nothing_in_silence(backbone):
    """Hence `config.targets`."""
    backbone.enable_lora(2, target_layer_names=["qurey"])
    assert backbone.trainable_variables == []


def test_lora_of_a_query_has_an_a_for_each_head(backbone):
    """Hence --lora.style=standard, and `formats/low_rank.py`."""
    backbone.enable_lora(3, target_layer_names=["query"])
    dense = lora.layer(backbone.transformer_layers[0], "query")
    assert tuple(dense.lora_kernel_a.shape) == (4, 40, 3)
    assert tuple(dense.lora_kernel_b.shape) == (3, 16)


def test_bfloat16_floatx_rounds_labels():
    """Hence `presets.load` refuses it. Word 4101 becomes 4096."""
    perfect = np.full((1, 4200), -20.0, "float32")
    perfect[0, 4101] = 20.0
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert float(numpy(loss(np.array([4101]), perfect))) < 1e-6
    keras.config.set_floatx("bfloat16")
    try:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        value = loss(np.array([4101]), perfect)
        assert float(numpy(ops.cast(value, "float32"))) > 30.0
    finally:
        keras.config.set_floatx("float32")


def test_stock_layout_shards_heads_that_do_not_divide():
    """Hence our own layout map. 2B has 4 key/value heads, a host 8 chips."""
    devices = np.array([f"cpu:{i}" for i in range(8)])
    mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"), devices)
    layouts = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    axes = layouts["decoder_block_0/attention/key/kernel"].axes
    assert axes[0] == "model"
