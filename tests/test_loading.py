"""Loading: no random numbers, every value once, no copy more than is needed."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import h5py
import keras
import keras_hub
import numpy as np
import pytest
import safetensors
import tiny
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.formats import shards, tensors
from keras_gemma_ft.inference import chat
from keras_gemma_ft.model import codes, decoder_block, lora, presets, weights

BACKEND = keras.config.backend()


@pytest.fixture(scope="module")
def forms(folder, tmp_path_factory):
    """The tiny model in each form that a local preset has: {form: folder}."""
    root = tmp_path_factory.mktemp("forms")
    loaded = presets.load(str(folder))
    backbone = loaded.causal_lm.backbone
    presets.save(root / "one", backbone, loaded.tokenizer)
    presets.save(root / "shards", backbone, loaded.tokenizer)
    (root / "shards" / "model.weights.h5").unlink()
    # 63 KB a shard.
    backbone.save_to_preset(str(root / "shards"), max_shard_size=6e-5)
    assert len(list((root / "shards").glob("*.weights.h5"))) > 2
    return {"huggingface": folder, **{p.name: p for p in root.iterdir()}}


FORMS = pytest.mark.parametrize("form", ["huggingface", "one", "shards"])


@FORMS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_float16"])
def test_values_without_random_numbers(forms, folder, form, dtype, monkeypatch):
    def draw(*args, **kwargs):
        raise AssertionError("a random initialiser ran")

    for kind in ("RandomNormal", "RandomUniform", "VarianceScaling"):
        initializer = getattr(keras.initializers, kind)
        monkeypatch.setattr(initializer, "__call__", draw)
    loaded = presets.load(str(forms[form]), dtype=dtype)
    monkeypatch.undo()
    backbone = loaded.causal_lm.backbone
    want = dict(shards.read_tensors(folder))
    kept = "float32" if dtype.startswith("mixed") else dtype
    for v in backbone.variables:
        array = want.pop(v.path.removeprefix(f"{backbone.name}/"))
        assert keras.backend.standardize_dtype(v.value.dtype) == kept
        got = ops.convert_to_numpy(v.value)
        assert got.dtype == kept
        np.testing.assert_array_equal(got, array.astype(kept), v.path)
    assert not want
    # What is in the optimizer and in callbacks' hands is whole as well.
    assert len(loaded.causal_lm.trainable_variables) == len(backbone.variables)


def test_the_fingerprint_is_of_the_weights(forms):
    found = {presets.load(str(folder)).fingerprint for folder in forms.values()}
    assert len(found) == 1
    half = presets.load(str(forms["one"]), dtype="bfloat16").fingerprint
    assert half not in found


def test_keras_is_left_as_it_was(folder):
    before = keras.Variable.assign, keras.Variable._initialize_with_initializer
    presets.load(str(folder))
    with pytest.raises(ZeroDivisionError):
        weights.once("it", lambda: 1 / 0)
    assert before == (
        keras.Variable.assign,
        keras.Variable._initialize_with_initializer,
    )
    with keras.StatelessScope():
        deferred = keras.Variable("ones", shape=(3,))
    assert ops.convert_to_numpy(deferred.value).sum() == 3
    dense = keras.layers.Dense(5)
    dense.build((None, 4))
    assert np.abs(ops.convert_to_numpy(dense.kernel)).min() > 0


@pytest.mark.parametrize("times", [0, 2])
def test_a_variable_not_loaded_once(folder, monkeypatch, times):
    read = shards.read_tensors
    path = "decoder_block_1/attention/key/kernel"

    def wrong(folder):
        for name, array in read(folder):
            for _ in range(times if name == path else 1):
                yield name, array

    monkeypatch.setattr(shards, "read_tensors", wrong)
    with pytest.raises(config.UserError) as caught:
        presets.load(str(folder))
    assert "1 of 35 variables were not loaded exactly" in str(caught.value)
    assert f"{path}: {times} times" in str(caught.value)


def test_a_weight_of_another_shape(forms, tmp_path):
    preset = tmp_path / "preset"
    preset.mkdir()
    for path in forms["one"].iterdir():
        (preset / path.name).symlink_to(path)
    stored = preset / "model.weights.h5"
    stored.unlink()
    stored.write_bytes((forms["one"] / stored.name).read_bytes())
    with h5py.File(stored, "r+") as file:
        group = file["layers/reversible_embedding/vars"]
        array = np.array(group["0"])[:-1]
        del group["0"]
        group["0"] = array
    with pytest.raises(config.UserError, match="token_embedding"):
        presets.load(str(preset))


def test_bytes_are_told_before_loading(forms, folder):
    count = presets.load(str(folder)).causal_lm.backbone.count_params()
    for path in forms.values():
        assert presets._bytes(str(path), "bfloat16") == 2 * count
        assert presets._bytes(str(path), "mixed_bfloat16") == 4 * count
    for name in keras_hub.models.GemmaBackbone.presets:
        if "gemma2_2b" in name:
            assert presets._bytes(name, "float16") == 2 * 2_614_341_888
    assert presets._bytes("kaggle://a/b/keras/c", "float16") is None


# --- weights that were kept ---------------------------------------------------


@pytest.fixture
def kept(forms, tmp_path, capsys):
    """A function that loads a form quantised: (loaded, what was said)."""

    def load(form, folder=None, **settings):
        settings = {"quantize": "nf4", "quantize_embedding": "int8"} | settings
        where = str(tmp_path / "kept" if folder is None else folder)
        settings = config.Model(**{"quantize_cache": where} | settings)
        loaded = presets.load(str(forms.get(form, form)), model=settings)
        return loaded, capsys.readouterr().err

    load.folder = tmp_path / "kept"
    return load


def _values(loaded):
    variables = loaded.causal_lm.backbone.variables
    return {
        v.path.partition("/")[2] or v.path: ops.convert_to_numpy(v.value)
        for v in variables
    }


def _same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        np.testing.assert_array_equal(value, other[name], name)


@FORMS
def test_the_second_load_is_from_the_cache(kept, forms, form, monkeypatch):
    plain = presets.load(str(forms[form]))
    first, said = kept(form)
    assert "are kept for the next run" in said
    (file,) = kept.folder.iterdir()

    def read(*args, **kwargs):
        raise AssertionError("the source was read")

    for target in ("encode", "encode_table"):
        monkeypatch.setattr(codes, target, read)
    monkeypatch.setattr(shards, "read_tensors", read)
    second, said = kept(form)
    assert f"from the cache, {file}" in said
    _same(_values(first), _values(second))
    # Of the float weights, so that a run that was stopped goes on.
    assert first.fingerprint == second.fingerprint == plain.fingerprint
    scalars = {
        decoder_block.query_scale(x.causal_lm.backbone)
        for x in (plain, first, second)
    }
    assert len(scalars) == 1
    # And it is a file that others read.
    with safetensors.safe_open(file, "numpy") as opened:
        assert "token_embedding/codes" in {*opened.keys()}


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _scribble(file):
    file.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("harm", [_flip, _cut, _scribble])
def test_what_is_damaged_is_made_anew(kept, harm):
    first, _ = kept("huggingface")
    (file,) = kept.folder.iterdir()
    whole = file.read_bytes()
    harm(file)
    second, said = kept("huggingface")
    assert f"{file} is damaged" in said and "are kept for" in said
    _same(_values(first), _values(second))
    assert [*kept.folder.iterdir()] == [file] and file.read_bytes() == whole


def test_what_is_not_the_same_is_another_file(kept, forms, tmp_path):
    preset = shutil.copytree(forms["huggingface"], tmp_path / "preset")
    kept(preset)
    kept(preset, quantize="int8")
    kept(preset, quantize_embedding="none")
    os.utime(preset / "model.safetensors", (1, 1))
    _, said = kept(preset)
    assert "from the cache" not in said
    assert len([*kept.folder.iterdir()]) == 4


def test_nothing_is_kept_of_what_needs_it_not(kept, tmp_path):
    for settings in (
        {"quantize_cache": "none"},
        # A small model, in the place for all.
        {"quantize_cache": "auto"},
        {"quantize": "none", "quantize_embedding": "none"},
    ):
        _, said = kept("huggingface", **settings)
        assert "kept" not in said
    assert not kept.folder.exists()
    assert not (config.cache_folder("quantized") or tmp_path / "x").exists()


def test_a_cache_that_cannot_be_written_is_told(kept, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    loaded, said = kept("huggingface", tmp_path / "file")
    assert "are not kept in" in said and loaded.fingerprint
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=1000)
    )
    _, said = kept("huggingface")
    assert "0.0 GiB are free" in said
    monkeypatch.undo()

    def full(writer, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.Writer, "put", full)
    _, said = kept("huggingface")
    assert said.count("No space left on device") == 1
    assert not [*kept.folder.iterdir()]


def test_what_a_killed_process_left_goes_in_a_day(kept):
    kept.folder.mkdir()
    old, new = (kept.folder / f".{i}.{i}.partial" for i in range(2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    kept("huggingface")
    assert not old.exists() and new.exists()


def test_a_source_that_changes_is_not_kept(kept, forms, tmp_path, monkeypatch):
    preset = shutil.copytree(forms["huggingface"], tmp_path / "preset")
    read = shards.read_tensors

    def touching(folder):
        yield from read(folder)
        os.utime(preset / "model.safetensors", (1, 1))

    monkeypatch.setattr(shards, "read_tensors", touching)
    _, said = kept(preset)
    assert "not kept" in said and not [*kept.folder.iterdir()]


def test_verbs_store_what_they_load(folder):
    """`presets.open` is what train, evaluate and generate call."""
    cfg = config.Config(preset=str(folder), model=config.Model(quantize="int4"))
    backbone = presets.open(cfg).causal_lm.backbone
    assert all(x._kernel is None for x in lora.layers(backbone))
    session = chat.load(cfg)
    assert session.generator.backbone.quantize_mode == "int4"


# In a process of its own, whose peak is the loading's. Linux counts it anew.
_PROBE = """
import gc, json, math, sys
import keras
from keras_gemma_ft import config
from keras_gemma_ft.model import layouts, presets, sharding
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(name))
folder, mesh = sys.argv[1:]
presets.load("gemma2_tiny_en")
gc.collect()
largest = 0
if keras.config.backend() == "jax":
    import jax
    place = sharding.place
    def spied(variable, value):
        global largest
        alone = [x.nbytes for x in jax.live_arrays() if len(x.devices()) == 1]
        largest = max([largest, *alone])
        return place(variable, value)
    sharding.place = spied
open("/proc/self/clear_refs", "w").write("5")
base = status("VmRSS")
cfg = config.Config(preset=folder, mesh=mesh)
backbone = presets.open(cfg).causal_lm.backbone
peak = status("VmHWM") - base
items = [(v.path, v.shape, 4) for v in backbone.variables]
shape = tuple(map(int, mesh.split("x"))) if "x" in mesh else (1, 1)
told = sum(layouts.bytes_per_device(items, shape).values())
held = told
if shape != (1, 1):
    parts = [v.value.addressable_shards[0] for v in backbone.variables]
    held = sum(part.data.nbytes for part in parts)
weights = sum(4 * math.prod(v.shape) for v in backbone.variables)
print(json.dumps([peak, weights, largest, told, held]))
"""


def _probe(folder, mesh):
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags}
    code = _PROBE
    if BACKEND != "tensorflow":
        code = "import sys; sys.modules['tensorflow'] = None\n" + code
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), mesh],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux"
)
def test_memory_holds_one_copy(tmp_path):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "vocab_size": 16384,
    }
    tiny.save(tmp_path, **sizes)
    mesh = "8x1" if BACKEND == "jax" else "auto"
    peak, weights, largest, told, held = _probe(tmp_path, mesh)
    print(f"{peak / weights:.2f} times the {weights / 2**20:.0f} MiB")
    # One more of the largest, the table, on its way; and what Keras builds.
    table = 4 * 16384 * 512
    assert peak < weights + 2 * table + 2**24
    assert told == held
    if BACKEND == "jax":
        assert largest < 2**20 and held < weights / 7.9
