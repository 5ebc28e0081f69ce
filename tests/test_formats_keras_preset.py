"""Keras presets without keras: files that lie, and what stock KerasHub reads."""

import json
import shutil

import h5py
import numpy as np
import pytest

from keras_gemma_ft import embedded
from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import keras_preset, models, names

VERSIONS = {"keras": "3.15.1", "keras-hub": "0.32.0"}


@pytest.fixture
def folder(tmp_path):
    """The embedded model, in five files."""
    base = models.open(embedded.preset_folder())
    place = tmp_path / "preset"
    keras_preset.write_preset(
        place,
        base,
        base.vocabulary(),
        dtype="bfloat16",
        shards=models.split(base, "bfloat16", 2**20),
        versions=VERSIONS,
    )
    assert len([*place.glob("*.weights.h5")]) > 3
    return place


def refusal(folder):
    with pytest.raises(UserError) as told:
        models.open(folder)
    return str(told.value)


def test_a_preset_comes_back_equal(folder):
    base, back = models.open(embedded.preset_folder()), models.open(folder)
    assert base.paths == back.paths == [*names.variable_shapes(base.backbone)]
    assert base.backbone == back.backbone
    for path in base.paths:
        one, two = base.read(path), back.read(path)
        assert one.dtype == two.dtype == "bfloat16"
        np.testing.assert_array_equal(one.view("u2"), two.view("u2"))
    assert base.vocabulary() == back.vocabulary()


def test_stock_keras_loads_our_file(folder):
    """Every variable, and the tokenizer."""
    import keras_hub

    stock = keras_hub.models.GemmaBackbone.from_preset(
        str(folder), dtype="float32"
    )
    base = models.open(folder)
    for variable in stock.variables:
        path = variable.path.removeprefix(f"{stock.name}/")
        want = base.read(path).astype("float32")
        np.testing.assert_array_equal(np.asarray(variable.numpy()), want)
    assert stock.attention_logit_soft_cap == 50.0
    words = keras_hub.models.GemmaTokenizer.from_preset(str(folder))
    assert words.vocabulary_size() == 4096


def test_a_map_that_leads_outside_is_refused(folder):
    file = folder / keras_preset.MAP
    told = json.loads(file.read_text())
    group = next(iter(told["weight_map"]))
    for name in ("../secret.weights.h5", "/etc/passwd", ".x.weights.h5", 7):
        told["weight_map"][group] = name
        file.write_text(json.dumps(told))
        assert "is no file of weights" in refusal(folder)
    file.write_text(json.dumps({"weight_map": []}))
    assert "token_embedding/embeddings: None is no file" in refusal(folder)


def test_links_and_foreign_data_are_refused(folder, tmp_path):
    secret = tmp_path / "secret.h5"
    group = keras_preset.group_of("final_normalization/scale")
    with h5py.File(secret, "w") as file:
        file[f"{group}/0"] = np.ones(192, "float32")
    weights = (
        folder
        / json.loads((folder / keras_preset.MAP).read_text())["weight_map"][
            f"/{group}"
        ]
    )
    whole = weights.read_bytes()
    for make, said in (
        (lambda f: h5py.ExternalLink(str(secret), f"/{group}/0"), "a link"),
        (lambda f: h5py.SoftLink("/layers"), "a link"),
        (lambda f: np.ones(191, "float32"), "(191,), expected (192,)"),
        (lambda f: np.ones(192, "int8"), "expected a float"),
    ):
        weights.write_bytes(whole)
        with h5py.File(weights, "a") as file:
            del file[f"{group}/0"]
            file[f"{group}/0"] = make(file)
        assert said in refusal(folder)
    with h5py.File(weights, "a") as file:
        del file[f"{group}/0"]
        file.create_dataset(
            f"{group}/0",
            (192,),
            "float32",
            external=[(str(secret), 0, 768)],
        )
    assert "its bytes lie in another file" in refusal(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    assert "missing, truncated or damaged" in refusal(folder)
    weights.unlink()
    assert "missing, truncated or damaged" in refusal(folder)


def test_another_kind_of_preset_is_refused(folder):
    file = folder / "config.json"
    told = json.loads(file.read_text())
    del told["config"]["sliding_window_size"]
    file.write_text(json.dumps(told))
    assert "has no sliding_window_size" in refusal(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError):
        models.open(folder)
