"""Layouts that divide, and the same losses on any mesh of virtual devices."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_gemma_ft import config
from keras_gemma_ft.model import sharding

# Gemma 2 2B: 8 query heads, 4 key/value heads, hidden 2304, ffw 9216.
_2B = {
    "token_embedding/embeddings": (256000, 2304),
    "decoder_block_0/attention/query/kernel": (8, 2304, 256),
    "decoder_block_0/attention/key/kernel": (4, 2304, 256),
    "decoder_block_0/attention/attention_output/kernel": (8, 256, 2304),
    "decoder_block_0/ffw_gating/kernel": (2304, 9216),
    "decoder_block_0/ffw_linear/kernel": (9216, 2304),
}


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("path", _2B)
def test_every_large_weight_is_split_over_all_devices(path, mesh):
    shape = _2B[path]
    axes = sharding.layout(path, shape, mesh)
    size = dict(batch=mesh[0], model=mesh[1])
    parts = [size[a] if a else 1 for a in axes]
    assert np.prod(parts) == 8
    assert all(n % p == 0 for n, p in zip(shape, parts))


@pytest.mark.parametrize(
    "path", ["decoder_block_0/attention/query/lora_kernel_a", "norm/scale"]
)
def test_small_variables_stay_whole(path):
    assert sharding.layout(path, (8, 2304, 16), (2, 4)) == [None] * 3


def test_what_does_not_divide_is_whole_and_never_an_error():
    axes = sharding.layout("x/ffw_gating/kernel", (30, 50), (4, 2))
    assert axes == [None, "model"]


def _config(mesh, rows=8):
    return config.Config(mesh=mesh, data=config.Data(batch_size=rows))


@pytest.mark.parametrize(
    "mesh,rows,message",
    [
        ("8", 8, "BATCHxMODEL"),
        ("4x4", 8, "needs 16 devices"),
        ("8x1", 6, "--data.batch_size=8"),
    ],
)
def test_meshes_that_cannot_be(mesh, rows, message):
    with pytest.raises(config.UserError, match=message):
        sharding.mesh_shape(_config(mesh, rows), 8)


def test_auto_splits_rows_where_they_divide():
    assert sharding.mesh_shape(_config("auto", 16), 8)[0] == (8, 1)
    assert sharding.mesh_shape(_config("auto", 6), 8)[0] == (1, 8)
    assert sharding.mesh_shape(_config("auto"), 1)[0] == (1, 1)


def _losses(folder, devices, *flags):
    command = [sys.executable, "-m", "keras_gemma_ft.train"]
    command += [f"--run_dir={folder}", "--data.sequence_length=64"]
    command += ["--train.steps=3", "--train.log_every=1", "--data.eval=none"]
    command += ["--train.samples=1", "--lora.rank=4", *flags]
    device_flag = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": device_flag}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="keras.distribution is JAX only"
)
def test_meshes_give_the_losses_of_one_device(tmp_path):
    one = _losses(tmp_path / "one", 1)
    assert len(one) == 3
    for mesh in ("8x1", "2x4"):
        got = _losses(tmp_path / mesh, 8, f"--mesh={mesh}")
        np.testing.assert_allclose(got, one, rtol=1e-5)
