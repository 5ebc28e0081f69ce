"""Exports: each is opened again by another library, or refused."""

import json
import shutil

import numpy as np
import pytest
import tiny

from keras_gemma_ft import config, export
from keras_gemma_ft.checking import compare, probes, reference
from keras_gemma_ft.config import TARGETS, UserError
from keras_gemma_ft.exporting import exports, sources, writers
from keras_gemma_ft.formats import adapters, models, names

# Of a logit of 10. The weights are so large that both caps bite, and enlarge
# float32's rounding: transformers itself is 1e-4 off its own float64 there. Of
# the embedded model it is 1e-5.
CLOSE = 3e-4
BOTH = [
    ("keras", TARGETS, 3, 6.0, False),
    ("standard", TARGETS, 3, 5.0, True),
    ("keras", ("query", "value"), 2, 2.0, True),
    ("standard", ("query", "value"), 4, 1.0, False),
]


def make(folder, backbone, style, targets, rank, alpha, rslora, *, seed=0):
    """Writes a PEFT folder of random numbers; B is not zero."""
    rng, kernels = np.random.default_rng(seed), names.kernel_shapes(backbone)
    weights = {
        (layer, target): tuple(
            rng.normal(0, 0.15, shape).astype("float32")
            for shape in adapters.pair_shapes(
                style, target, kernels[target], rank
            )
        )
        for layer in range(backbone["num_layers"])
        for target in targets
    }
    adapter = adapters.Adapter(
        style, rank, alpha, rslora, 0.0, tuple(targets), weights, "tiny"
    )
    adapters.write_peft(folder, adapter)
    return adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As conftest's, but calmer: it enlarges float32's rounding less."""
    return tiny.save(tmp_path_factory.mktemp("calm"), gain=1.0)


@pytest.fixture(scope="module")
def backbone(folder):
    return models.open(folder).backbone


@pytest.fixture(scope="module")
def adapter(folder, backbone, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters") / "mine"
    make(place, backbone, *BOTH[0])
    return place


def run(folder, to, *, formats, adapter="", **settings):
    values = {
        "preset": str(folder),
        "adapter": str(adapter),
        "export.format": formats,
        "export.to": str(to),
        "data.cache": "none",
        "export.probes": 2,
    }
    values |= {f"export.{name}": value for name, value in settings.items()}
    cfg = config.replace(config.Config(), values)
    config.check(cfg)
    return export.export(cfg)


def verified(found, format):
    [one] = [e for e in found["exports"] if e["format"] == format]
    return one["verification"]


@pytest.mark.parametrize("style,targets,rank,alpha,rslora", BOTH)
def test_others_compute_what_was_trained(
    folder, backbone, tmp_path, style, targets, rank, alpha, rslora
):
    make(tmp_path / "a", backbone, style, targets, rank, alpha, rslora)
    witnesses = {
        "peft": "peft",
        "keras": "keras-hub",
        "merged_hf": "transformers",
        "merged_keras": "keras-hub",
    }
    found = run(
        folder,
        tmp_path / "out",
        formats=",".join(witnesses),
        adapter=tmp_path / "a",
    )
    assert found["kl_to_base"] > 0.01
    for format, witness in witnesses.items():
        told = verified(found, format)
        assert told["witness"].startswith(witness), told
        assert told["positions"] == 64
        assert told["max_difference"] < CLOSE, format
        assert told["top1"] == 1.0
        card = (tmp_path / "out" / format / "README.md").read_text()
        assert f"{told['max_difference']:.3g}" in card
        assert str(tmp_path) not in card


def test_the_numpy_reader_tells_the_same(
    folder, adapter, tmp_path, monkeypatch
):
    """Without any witness, and without room for the model."""
    monkeypatch.setattr("keras_gemma_ft.runtime.available_bytes", lambda: 1000)
    found = run(
        folder,
        tmp_path,
        formats="peft,keras,merged_hf,merged_keras",
        adapter=adapter,
    )
    for one in found["exports"]:
        told = one["verification"]
        assert "NumPy" in told["witness"] and "NumPy" in told["against"]
        assert told["max_difference"] < CLOSE


def test_the_reference_is_transformers(folder):
    model, ids = models.open(folder), tiny.ids(2, tiny.T)
    import torch

    with torch.no_grad():
        want = tiny.witness(folder).double()(torch.tensor(ids)).logits
    got = reference.logits(model, ids, dtype="float64")
    # transformers keeps its rotary table and its root of D in float32.
    tiny.close("logits", np.stack(got), want.numpy(), atol=2e-5)
    single = reference.logits(model, ids)
    assert single[0].dtype == np.float32
    tiny.close("float32", np.stack(single), want.numpy(), atol=2e-4)


def test_each_broken_export_is_refused(folder, adapter, tmp_path, monkeypatch):
    """A swapped pair of tensors, and nothing is left under the name."""

    class Swapped(models.Merged):
        def read(self, path):
            other = {"gating_2/": "gating/", "gating/": "gating_2/"}
            for one, two in other.items():
                if f"ffw_{one}" in path:
                    return super().read(path.replace(one, two))
            return super().read(path)

    monkeypatch.setattr(writers.models, "Merged", Swapped)
    for format in ("merged_hf", "merged_keras"):
        with pytest.raises(UserError, match="did not verify"):
            run(folder, tmp_path, formats=format, adapter=adapter)
        assert not (tmp_path / format).exists()
        assert not [p for p in tmp_path.iterdir() if p.suffix != ".partial"]
    monkeypatch.undo()
    write = adapters.write_peft

    def doubled(place, held, **more):
        write(place, adapters.scaled(held, 2.0), **more)

    monkeypatch.setattr(adapters, "scaled", _scaled, raising=False)
    monkeypatch.setattr(writers.adapters, "write_peft", doubled)
    with pytest.raises(UserError, match="as peft did not verify"):
        run(folder, tmp_path, formats="peft", adapter=adapter)
    assert not (tmp_path / "peft").exists()
    found = run(folder, tmp_path, formats="peft", adapter=adapter, verify=False)
    assert "verification" not in found["exports"][0]
    assert "Not verified" in (tmp_path / "peft/README.md").read_text()


def _scaled(adapter, factor):
    import dataclasses

    return dataclasses.replace(adapter, alpha=adapter.alpha * factor)


def test_an_adapter_that_changes_nothing_is_told(folder, backbone, tmp_path):
    held = make(tmp_path / "a", backbone, *BOTH[0])
    nothing = {key: (a, 0 * b) for key, (a, b) in held.weights.items()}
    import dataclasses

    adapters.write_peft(
        tmp_path / "a", dataclasses.replace(held, weights=nothing)
    )
    with pytest.raises(UserError, match="changes nothing"):
        run(folder, tmp_path / "out", formats="peft", adapter=tmp_path / "a")


SHAPES = {
    "2b": dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=40),
    "9b": dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=72),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_untouched_model_comes_back_equal(tmp_path, shape, dtype):
    """Hugging Face -> here -> Hugging Face, and through Keras's format."""
    import torch
    import transformers

    there = tmp_path / "there"
    there.mkdir()
    tiny.save(there, **SHAPES[shape])
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        there, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(there)
    run(
        there,
        tmp_path / "out",
        formats="merged_hf,merged_keras",
        max_shard_size="20KB",
    )
    run(tmp_path / "out/merged_keras", tmp_path / "two", formats="merged_hf")
    want = model.state_dict()
    for place in ("out/merged_hf", "two/merged_hf"):
        back = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / place)
        assert back.dtype == getattr(torch, dtype)
        got = back.state_dict()
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(value, got[name]), name
    assert len([*(tmp_path / "out/merged_hf").glob("*.safetensors")]) > 3
    assert len([*(tmp_path / "out/merged_keras").glob("*.h5")]) > 3


def test_adapters_come_back_to_the_byte(folder, backbone, adapter, tmp_path):
    """PEFT -> here -> PEFT, and .lora.h5 -> here -> .lora.h5."""
    weights = "adapter_model.safetensors"
    run(folder, tmp_path / "one", formats="peft,keras", adapter=adapter)
    one = (tmp_path / "one/peft" / weights).read_bytes()
    assert one == (adapter / weights).read_bytes()
    stock = tmp_path / "one/keras/adapter.lora.h5"
    run(folder, tmp_path / "two", formats="peft,keras", adapter=stock)
    again = tmp_path / "two/keras/adapter.lora.h5"
    first = adapters.read_keras(stock, backbone)
    second = adapters.read_keras(again, backbone)
    for key, pair in first.weights.items():
        for x, y in zip(pair, second.weights[key]):
            np.testing.assert_array_equal(x, y)
    assert stock.read_bytes() == again.read_bytes()


def test_what_is_not_ours_is_not_replaced(folder, adapter, tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no export of ours"):
        run(folder, tmp_path, formats="peft", adapter=adapter)
    assert (tmp_path / "peft/thesis.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "peft")
    for _ in range(2):
        run(folder, tmp_path, formats="peft", adapter=adapter, verify=False)
    assert json.loads((tmp_path / "peft" / exports.RECORD).read_text())


def test_what_cannot_be_exported_is_told(folder, adapter, tmp_path):
    for format, said in (
        ("peft,gguff", "expected names out of"),
        ("", "expected names out of"),
    ):
        with pytest.raises(UserError, match=said):
            run(folder, tmp_path, formats=format, adapter=adapter)
    with pytest.raises(UserError, match="whole model, without an adapter"):
        run(folder, tmp_path, formats="peft")
    with pytest.raises(UserError, match="a size such as 5GB"):
        run(folder, tmp_path, formats="peft", max_shard_size="many")
    with pytest.raises(UserError, match="--weights=0.5,0.5"):
        both = f"{adapter},{adapter}x"
        run(folder, tmp_path, formats="peft", adapter=both)
    cfg = config.replace(config.Config(), {"run_dir": str(tmp_path / "no")})
    with pytest.raises(UserError, match="there is no such run"):
        sources.find(cfg)
    assert not any(tmp_path.iterdir())


def test_two_adapters_are_merged_into_one(folder, backbone, tmp_path):
    one = make(tmp_path / "one", backbone, *BOTH[0])
    two = make(tmp_path / "two", backbone, *BOTH[3], seed=1)
    both = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    run(
        folder,
        tmp_path / "sum",
        formats="peft,merged_hf",
        adapter=both,
        weights="0.5,-2",
    )
    found = run(
        folder,
        tmp_path / "cut",
        formats="peft",
        adapter=both,
        weights="0.5,-2",
        rank=3,
    )["merged"]
    assert (found["rank_before"], found["rank"]) == (16, 3)
    assert 0.1 < found["lost"] <= found["lost_in_worst_layer"] < 1
    base = models.open(folder)
    got = models.open(tmp_path / "sum/merged_hf")
    for path in base.paths:
        want = base.read(path).astype("float64")
        for adapter, weight in ((one, 0.5), (two, -2.0)):
            change = models.Merged(base, adapter).read(path)
            want += weight * (change - base.read(path).astype("float64"))
        tiny.close(path, got.read(path), want, atol=3e-6)


def test_differences_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 5, 7))
    p = np.exp(ours) / np.exp(ours).sum(-1, keepdims=True)
    q = np.exp(theirs) / np.exp(theirs).sum(-1, keepdims=True)
    found = compare.differences([ours], [theirs])
    np.testing.assert_allclose(
        found["kl"], np.mean(np.sum(p * np.log(p / q), -1))
    )
    assert found["max_difference"] == np.abs(ours - theirs).max()
    same = np.mean(ours.argmax(-1) == theirs.argmax(-1))
    assert found["top1"] == same and found["positions"] == 5
    with pytest.raises(UserError, match="did not verify"):
        compare.check("peft", {**found, "kl": float("nan")}, "float32")


def test_the_loss_is_of_the_answers_alone():
    """By hand: of ids 4..7, of which the last two tokens are the answer."""
    rng = np.random.default_rng(0)
    scores, ids = rng.normal(size=(3, 9)), [2, 4, 5, 6, 7]
    asked = probes.Probes([ids], [3], "one")
    # The last three tokens' logits: those of 5 tell 6, those of 6 tell 7.
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = -(np.log(p[0, 6]) + np.log(p[1, 7])) / 2
    np.testing.assert_allclose(probes.loss([scores], asked), want)
    cut = probes.Probes([ids], [1], "an answer that began before the logits")
    np.testing.assert_allclose(probes.loss([scores], cut), want)
    assert probes.loss([scores], probes.Probes([ids], [5], "none")) is None
