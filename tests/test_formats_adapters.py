"""Adapters on disk: round trips, and PEFT and stock Keras as witnesses."""

import json
import os
import pathlib
import warnings

import h5py
import numpy as np
import pytest
import safetensors.numpy

from keras_gemma_ft.config import TARGETS, Config, UserError
from keras_gemma_ft.formats import adapters, huggingface, low_rank, names, usage

# Heads*head_dim differs from hidden_dim, and heads from key/value heads.
BACKBONE = dict(
    vocabulary_size=97,
    num_layers=3,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=40,
    intermediate_dim=112,
    head_dim=16,
    query_head_dim_normalize=True,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    attention_logit_soft_cap=50.0,
    final_logit_soft_cap=30.0,
    use_sliding_window_attention=True,
    sliding_window_size=8,
)
KERNELS = names.kernel_shapes(BACKBONE)
INDEX = adapters.layer_index(3)


def make(style, rank=3, alpha=6.0, rslora=False, targets=TARGETS, seed=0):
    rng = np.random.default_rng(seed)
    weights = {
        (layer, target): tuple(
            rng.normal(0, 0.3, shape).astype("float32")
            for shape in adapters.pair_shapes(
                style, target, KERNELS[target], rank
            )
        )
        for layer in range(3)
        for target in targets
    }
    return adapters.Adapter(
        style, rank, alpha, rslora, 0.05, tuple(targets), weights, "tiny"
    )


def delta(adapter, key):
    """s A B in float64 with the kernel's shape: written out, no package."""
    a, b = (x.astype("float64") for x in adapter.weights[key])
    root = adapter.rank**0.5 if adapter.rslora else adapter.rank
    equation = "...r,rz->...z"
    if adapter.style == "standard" and key[1] in ("query", "key", "value"):
        equation = "dr,rnh->ndh"
    return adapter.alpha / root * np.einsum(equation, a, b)


def as_linear(target, kernel):
    """A Keras kernel as torch's [out, in]."""
    if target in ("query", "key", "value"):
        return kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1])
    return kernel.reshape(-1, kernel.shape[-1]).T


def same(left, right):
    for name in ("style", "rank", "alpha", "rslora", "dropout", "targets"):
        assert getattr(left, name) == getattr(right, name), name
    assert left.weights.keys() == right.weights.keys()
    for key, pair in left.weights.items():
        for x, y in zip(pair, right.weights[key]):
            assert x.dtype == y.dtype == np.float32
            np.testing.assert_array_equal(x, y, str(key))


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    """Rewrite the tensors without the package's own header: foreign."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(change(dict(tensors)), path, {"format": "pt"})


STYLES = [(s, r) for s in ("keras", "standard") for r in (False, True)]


@pytest.fixture(scope="module")
def torch_model():
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = huggingface.huggingface_config(BACKBONE)
    torch.manual_seed(0)
    return lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**config, attn_implementation="eager")
    ).double()


@pytest.mark.parametrize("style,rslora", STYLES)
@pytest.mark.parametrize(
    "targets", [TARGETS, ("query", "value"), ("key", "ffw_linear")]
)
def test_peft_computes_our_delta(tmp_path, torch_model, style, rslora, targets):
    import peft
    import torch

    adapter = make(style, rslora=rslora, targets=targets)
    # What travels lies beside it, which PEFT passes over.
    travels = usage.describe(
        Config(),
        base={"preset": "any", "dtype": "float32"},
        trained=dict.fromkeys(("layout", "quantize", "quantize_embedding")),
        when="",
    )._replace(jinja="{{ messages }}")
    adapters.write_peft(tmp_path / "adapter", adapter, usage=travels)
    assert len([*(tmp_path / "adapter").iterdir()]) == 5
    base = torch_model()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    ids = torch.arange(1, 15)[None]
    plain = base(ids).logits
    with warnings.catch_warnings():
        # PEFT warns of unknown settings and of missing or surplus tensors.
        warnings.simplefilter("error", UserWarning)
        tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tuned = tuned.double()
    adapted = tuned(ids).logits
    seen = 0
    for name, module in tuned.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        layer = int(name.split(".")[2])
        target = {v: k for k, v in names.MODULES.items()}[
            ".".join(name.split(".")[3:])
        ]
        want = as_linear(target, delta(adapter, (layer, target)))
        got = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)
        before[f"{name}.weight"] += torch.from_numpy(want)
        seen += 1
    assert seen == len(adapter.weights)
    # The same model with the delta added by hand.
    merged = torch_model()
    merged.load_state_dict(before)
    np.testing.assert_allclose(
        adapted.detach(), merged(ids).logits.detach(), atol=1e-6
    )
    assert (adapted - plain).abs().max() > 1e-3


def test_peft_writes_and_we_read(tmp_path, torch_model):
    """A foreign adapter with patterns, rsLoRA, bfloat16, some layers only."""
    import peft
    import torch

    tuned = peft.get_peft_model(
        torch_model(),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=10,
            target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
            layers_to_transform=[0, 2],
            use_rslora=True,
            rank_pattern={"v_proj": 2, r"layers\.2\.self_attn.q_proj": 5},
            alpha_pattern={"o_proj": 7},
            init_lora_weights=False,
        ),
    ).bfloat16()
    tuned.save_pretrained(tmp_path)
    got = adapters.read(tmp_path, BACKBONE)
    assert (got.style, got.rank) == ("standard", 5)
    assert got.targets == ("query", "value", "attention_output", "ffw_gating_2")
    assert {layer for layer, _ in got.weights} == {0, 2}
    tuned = tuned.double()
    for layer, target in got.weights:
        module = tuned.base_model.model.get_submodule(
            f"model.layers.{layer}.{names.MODULES[target]}"
        )
        want = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(
            as_linear(target, delta(got, (layer, target))), want, atol=2e-6
        )
    # And out again, although layer 1 is not adapted.
    adapters.write_peft(tmp_path / "again", got)
    again = peft.PeftModel.from_pretrained(torch_model(), tmp_path / "again")
    assert (
        torch.tensor(
            [
                hasattr(m, "lora_A")
                for n, m in again.named_modules()
                if n.endswith("layers.1.self_attn.q_proj")
            ]
        ).sum()
        == 0
    )
    same(adapters.read_peft(tmp_path / "again"), got)


@pytest.mark.parametrize("style,rslora", STYLES)
def test_peft_round_trip(tmp_path, style, rslora):
    adapter = make(style, rslora=rslora, alpha=5.5)
    adapters.write_peft(tmp_path / "a", adapter)
    adapters.write_peft(tmp_path / "b", adapter)
    same(adapters.read_peft(tmp_path / "a"), adapter)
    same(adapters.read(tmp_path / "a", BACKBONE), adapter)
    for name in os.listdir(tmp_path / "a"):
        first, second = (tmp_path / x / name for x in "ab")
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize("style,rslora", STYLES)
def test_peft_without_our_header_is_the_same_function(tmp_path, style, rslora):
    adapter = make(style, rslora=rslora)
    adapters.write_peft(tmp_path, adapter)
    edit_tensors(tmp_path, lambda tensors: tensors)
    got = adapters.read(tmp_path, BACKBONE)
    assert got.style == "standard"
    for key in adapter.weights:
        np.testing.assert_allclose(
            delta(got, key), delta(adapter, key), atol=1e-6
        )
    with pytest.raises(UserError, match="how many heads.*--preset"):
        adapters.read_peft(tmp_path)


def test_an_edited_config_is_followed_as_peft_would(tmp_path):
    adapter = make("standard")
    adapters.write_peft(tmp_path, adapter)
    edit_config(tmp_path, lora_alpha=12)
    got = adapters.read(tmp_path, BACKBONE)
    key = (1, "key")
    np.testing.assert_allclose(delta(got, key), 2 * delta(adapter, key))


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8, 20])
def test_stock_form_is_exact(rank):
    """float64, below and above the rank where head_dim is the smaller."""
    adapter = make("standard", rank=rank)
    stock = adapters.stock_rank(adapter)
    assert stock == max(rank, min(16, 4 * rank))
    for (layer, target), pair in adapter.weights.items():
        a, b = (x.astype("float64") for x in pair)
        new_a, new_b = low_rank.to_stock("standard", target, a, b, stock)
        shapes = adapters.pair_shapes("keras", target, KERNELS[target], stock)
        assert (new_a.shape, new_b.shape) == shapes
        np.testing.assert_allclose(
            np.einsum("...r,rz->...z", new_a, new_b) * 6.0 / rank,
            delta(adapter, (layer, target)),
            atol=1e-14,
        )


@pytest.mark.parametrize("style,rslora", STYLES)
def test_keras_file_round_trip(tmp_path, style, rslora):
    adapter = make(style, rslora=rslora)
    path = tmp_path / "x.lora.h5"
    adapters.write_keras(path, adapter, INDEX)
    got = adapters.read(path, BACKBONE)
    assert got.rank == got.alpha == adapters.stock_rank(adapter)
    assert (got.style, got.targets) == ("keras", TARGETS)
    for key in adapter.weights:
        np.testing.assert_allclose(
            delta(got, key), delta(adapter, key), atol=1e-6
        )
    same(adapters.read_keras(path, BACKBONE, targets=TARGETS), got)


@pytest.fixture(scope="module")
def backbones():
    keras_hub = pytest.importorskip("keras_hub")
    return lambda: keras_hub.models.GemmaBackbone(**BACKBONE)


def stock_kernels(backbone):
    found = {}
    for i, block in enumerate(backbone.transformer_layers):
        attention = block.attention
        for layer in (
            attention.query_dense,
            attention.key_dense,
            attention.value_dense,
            attention.output_dense,
            block.gating_ffw,
            block.gating_ffw_2,
            block.ffw_linear,
        ):
            found[i, layer.name] = layer
    return found


def to_numpy(value):
    from keras import ops

    return ops.convert_to_numpy(value)


def test_layer_index_is_keras_hubs(backbones):
    listed = backbones()._flatten_layers(include_self=False)
    listed = [layer for layer in listed if layer.weights]
    for (i, target), layer in stock_kernels(backbones()).items():
        assert listed[INDEX[i, target]].path == layer.path


@pytest.mark.parametrize("style,rslora", STYLES)
@pytest.mark.parametrize("targets", [TARGETS, ("query", "ffw_linear")])
def test_stock_keras_loads_our_file(
    tmp_path, backbones, style, rslora, targets
):
    adapter = make(style, rslora=rslora, targets=targets)
    path = tmp_path / "x.lora.h5"
    adapters.write_keras(path, adapter, INDEX)
    backbone = backbones()
    layers = stock_kernels(backbone)
    before = {key: to_numpy(layer.kernel) for key, layer in layers.items()}
    backbone.enable_lora(adapters.stock_rank(adapter), list(targets))
    backbone.load_lora_weights(str(path))
    for key, layer in layers.items():
        got = to_numpy(layer.kernel) - before[key]
        want = delta(adapter, key) if key in adapter.weights else 0 * got
        np.testing.assert_allclose(got, want, atol=2e-6, err_msg=str(key))


def test_we_read_what_stock_keras_saves(tmp_path, backbones):
    backbone = backbones()
    layers = stock_kernels(backbone)
    before = {key: to_numpy(layer.kernel) for key, layer in layers.items()}
    backbone.enable_lora(3, ["key", "ffw_gating"])
    rng = np.random.default_rng(1)
    for layer in layers.values():
        if layer.lora_enabled:
            shape = layer.lora_kernel_b.shape
            layer.lora_kernel_b.assign(rng.normal(size=shape))
    path = tmp_path / "stock.lora.h5"
    backbone.save_lora_weights(str(path))
    got = adapters.read(path, BACKBONE, base="tiny")
    assert (got.targets, got.base) == (("key", "ffw_gating"), "tiny")
    assert len(got.weights) == 6
    for key in got.weights:
        change = to_numpy(layers[key].kernel) - before[key]
        np.testing.assert_allclose(delta(got, key), change, atol=1e-5)


def test_run_folder_and_card(tmp_path):
    adapter = make("keras", rank=8)
    adapters.write_peft(tmp_path / "adapter", adapter, notes="Loss 1.25.")
    adapters.write_keras(tmp_path / "adapter.lora.h5", adapter, INDEX)
    same(adapters.read(tmp_path, BACKBONE), adapter)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "--max-lora-rank 32" in card and "Loss 1.25." in card
    for path in (tmp_path / "adapter").iterdir():
        path.unlink()
    (tmp_path / "adapter").rmdir()
    assert adapters.read(tmp_path, BACKBONE).alpha == 8


# --- what is refused, and that the message lists every offender ------------


def refusal(path, **kwargs):
    with pytest.raises(UserError) as caught:
        adapters.read(path, BACKBONE, **kwargs)
    print(caught.value)
    return str(caught.value)


def test_no_such_path(tmp_path):
    adapters.write_peft(tmp_path / "adapter", make("keras"))
    assert "Did you mean: " in refusal(tmp_path / "adaptor")
    assert "does not exist either" in refusal(tmp_path / "no" / "adapter")
    (tmp_path / "notes.txt").write_text("")
    assert "expected a .lora.h5" in refusal(tmp_path / "notes.txt")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert "--preset" in refusal(tmp_path / "m")


def test_unsupported_peft_settings_are_all_named(tmp_path):
    adapters.write_peft(tmp_path, make("standard"))
    bad = dict(
        peft_type="LOHA",
        use_qalora=True,
        bias="some",
        init_lora_weights="pissa",
        alpha_pattern={"q_proj": "7"},
    )
    edit_config(tmp_path, **bad)
    message = refusal(tmp_path)
    for name in bad:
        assert name in message
    assert "merge_and_unload" in message


def test_pickle_only_adapter_is_refused(tmp_path):
    adapters.write_peft(tmp_path, make("standard"))
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(tmp_path / "adapter_model.bin")
    message = refusal(tmp_path)
    assert "pickle" in message and "safe_serialization" in message


def test_bad_tensors_are_all_named(tmp_path):
    adapters.write_peft(tmp_path, make("standard"))
    prefix = "base_model.model.model.layers."

    def spoil(tensors):
        del tensors[prefix + "0.mlp.up_proj.lora_B.weight"]
        tensors[prefix + "1.mlp.up_proj.lora_A.weight"][0, 0] = np.nan
        tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((2, 2))
        key = prefix + "2.self_attn.k_proj.lora_magnitude_vector"
        tensors[key] = np.ones(3, "float32")
        norm = "0.self_attn.o_proj.lora_A"
        tensors[f"{prefix}{norm}.default.weight"] = np.ones((3, 64))
        return tensors

    edit_tensors(tmp_path, spoil)
    message = refusal(tmp_path)
    for part in ("0.mlp.up_proj.lora_B", "1.mlp.up_proj.lora_A", "lm_head",
                 "lora_magnitude_vector", "there twice"):  # fmt: skip
        assert part in message
    assert message.count("1.mlp.up_proj") == 1


def test_adapter_of_another_model(tmp_path):
    adapters.write_peft(tmp_path, make("keras"))
    other = BACKBONE | dict(num_layers=2, hidden_dim=48)
    with pytest.raises(UserError) as caught:
        adapters.read(tmp_path, other)
    message = str(caught.value)
    assert "model.layers.2.mlp.up_proj: the model has 2 layers" in message
    assert "self_attn.q_proj: 40 -> 64, expected 48 -> 64" in message
    assert message.count("\n") > 20


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["peft", "keras"])
def test_truncated_files(tmp_path, share, kind):
    if kind == "peft":
        adapters.write_peft(tmp_path / "x", make("keras"))
        path = tmp_path / "x" / "adapter_model.safetensors"
    else:
        path = tmp_path / "x.lora.h5"
        adapters.write_keras(path, make("keras"), INDEX)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refusal(path.parent if kind == "peft" else path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "\0", '{"peft_type": "LORA", "r": "8"}', "{}", "[" * 10**5],
)
def test_broken_config(tmp_path, text):
    adapters.write_peft(tmp_path, make("keras"))
    config = tmp_path / "adapter_config.json"
    config.write_text(text)
    refusal(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        adapters.read_peft(tmp_path)


@pytest.mark.parametrize(
    "field",
    ["style", "rank", "alpha", "rslora", "dropout", "base", "heads", "targets"],
)
def test_header_that_lies(tmp_path, field):
    adapters.write_peft(tmp_path, make("keras"))
    path = tmp_path / "adapter_model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        own = json.loads(file.metadata()["keras_gemma_ft"])
    tensors = safetensors.numpy.load_file(path)
    for value in (None, {}, [], {"query": 0, "key": 1}, "x", 7):
        if (field, value) in [("alpha", 7), ("dropout", 7), ("base", "x")]:
            continue  # Could be true.
        text = json.dumps({**own, field: value})
        safetensors.numpy.save_file(tensors, path, {"keras_gemma_ft": text})
        assert "header disagree" in refusal(tmp_path)
    del own[field]
    text = json.dumps(own)
    safetensors.numpy.save_file(tensors, path, {"keras_gemma_ft": text})
    if field != "base":
        assert "header disagree" in refusal(tmp_path)


def hostile(path, spoil):
    adapters.write_keras(path, make("keras", targets=["query"]), INDEX)
    with h5py.File(path, "a") as file:
        spoil(file)
    return refusal(path)


def test_hostile_keras_files(tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((4, 40, 3), "float32")
    path = tmp_path / "x.lora.h5"
    place = "lora/11/vars/lora_kernel_a"

    def external_link(file):
        del file[place]
        file[place] = h5py.ExternalLink("secret.h5", "x")
        del file["lora/24"]
        file["lora/24"] = h5py.SoftLink("/lora/11")

    message = hostile(path, external_link)
    assert place in message and "lora/24: a link" in message

    def external_bytes(file):
        del file[place]
        file.create_dataset(
            place, (4, 40, 3), "float32", external=[(str(secret), 0, 1920)]
        )
        del file["lora/24/vars/lora_kernel_a"]
        layout = h5py.VirtualLayout((4, 40, 3), "float32")
        layout[:] = h5py.VirtualSource(str(secret), "x", (4, 40, 3))
        file["lora/24/vars"].create_virtual_dataset("lora_kernel_a", layout)

    message = hostile(path, external_bytes)
    assert message.count("its bytes lie in another file") == 2

    def strange(file):
        file["lora/12/vars/lora_kernel_a"] = np.ones(2)
        file["lora/../x"] = 1
        file["other"] = 1
        del file["lora/11/vars/lora_kernel_b"]
        file["lora/11/vars/lora_kernel_b"] = np.ones((3, 17))
        file["lora/24/vars/lora_kernel_b"][0, 0] = np.inf
        del file["lora/37"]

    message = hostile(path, strange)
    for part in ("lora/12:", "lora/..:", "other:", "(3, 17)", "infinity",
                 "lora/37 (query of layer 2): missing"):  # fmt: skip
        assert part in message, part


@pytest.mark.parametrize("rank", [0, -1, 2.5, 10**9, np.nan, [3], b"x"])
def test_hostile_rank(tmp_path, rank):
    def spoil(file):
        del file["lora/vars/rank"]
        file["lora/vars/rank"] = rank

    assert "lora/vars/rank" in hostile(tmp_path / "x.lora.h5", spoil)


def test_not_a_lora_file(tmp_path):
    path = tmp_path / "x.lora.h5"
    with h5py.File(path, "w") as file:
        file["lora"] = 1
    assert "lora: expected a Group" in refusal(path)


def test_missing_targets_are_named(tmp_path):
    path = tmp_path / "x.lora.h5"
    adapters.write_keras(path, make("keras", targets=["query"]), INDEX)
    with pytest.raises(UserError) as caught:
        adapters.read_keras(path, BACKBONE, targets=["key"])
    assert "query: in the file" in str(caught.value)
    assert str(caught.value).count("key of layer") == 3


# --- writing is all or nothing ---------------------------------------------


def test_interrupted_writes_leave_nothing(tmp_path, monkeypatch):
    folder, path = tmp_path / "adapter", tmp_path / "adapter.lora.h5"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            adapters.write_peft(folder, make("keras"))
    with monkeypatch.context() as patch:
        patch.setattr(low_rank, "to_stock", stop)
        with pytest.raises(KeyboardInterrupt):
            adapters.write_keras(path, make("keras"), INDEX)
    assert list(tmp_path.iterdir()) == []


def test_rewriting_keeps_the_old_one_until_the_new_is_whole(
    tmp_path, monkeypatch
):
    folder = tmp_path / "adapter"
    old, new = make("keras"), make("standard", seed=1)
    adapters.write_peft(folder, old)
    real, calls = os.rename, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_second)
        with pytest.raises(OSError, match="disk"):
            adapters.write_peft(folder, new)
    same(adapters.read_peft(folder), old)
    adapters.write_peft(folder, new)
    same(adapters.read_peft(folder), new)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="thesis.tex"):
        adapters.write_peft(tmp_path, make("keras"))
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_keras_file_name(tmp_path):
    with pytest.raises(UserError, match="must end in .lora.h5"):
        adapters.write_keras(tmp_path / "x.h5", make("keras"), INDEX)
