"""The Gemma 2 name table; KerasHub's import and transformers as witnesses."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import huggingface, names, shards

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCABULARY = "shared/data/gemma_tiny_vocabs/gemma_export_vocab.spm"
# heads*head_dim != hidden_dim, and a query scale that is not head_dim's.
BACKBONE = dict(
    vocabulary_size=97,
    num_layers=3,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=40,
    intermediate_dim=112,
    head_dim=16,
    query_head_dim_normalize=False,
    query_pre_attn_scalar=10,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    attention_logit_soft_cap=50.0,
    final_logit_soft_cap=30.0,
    use_sliding_window_attention=True,
    sliding_window_size=8,
)
CONFIG = huggingface.huggingface_config(BACKBONE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that transformers wrote: whole, and in shards."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**CONFIG))
    for name, value in model.named_parameters():
        if "norm" in name:  # Zero at the start, so unfit to show a mix-up.
            torch.nn.init.normal_(value)
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "many", max_shard_size="20KB")
    model.bfloat16().save_pretrained(root / "bfloat16")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved / "many", tmp_path / "model")
    return tmp_path / "model"


def refusal(folder):
    with pytest.raises(UserError) as caught:
        shards.read_tensors(folder)
    print(caught.value)
    return str(caught.value)


def test_table_goes_both_ways():
    rng = np.random.default_rng(0)
    seen = set()
    for path, shape in names.variable_shapes(BACKBONE).items():
        array = rng.normal(size=shape)
        name, stored = names.to_huggingface(path, array)
        back, again = names.to_keras(name, stored, head_dim=16)
        assert (back, name) == (path, names.huggingface_name(path))
        np.testing.assert_array_equal(again, array)
        seen.add(name)
    assert len(seen) == 2 + 3 * 11
    for unknown in ("model.layers.0.mlp.x_proj.weight", "head.weight", ""):
        assert names.keras_path(unknown) is None
        with pytest.raises(UserError, match="not the name"):
            names.to_keras(unknown, array, head_dim=16)
        with pytest.raises(UserError, match="not a variable"):
            names.to_huggingface(unknown, array)


@pytest.mark.parametrize("form", ["one", "many", "bfloat16"])
def test_tensors_are_those_of_transformers(saved, form):
    import torch
    import transformers

    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        saved / form, dtype=dtype
    )
    want = {k: v.float().numpy() for k, v in model.state_dict().items()}
    want.pop("lm_head.weight", None)
    shapes = names.variable_shapes(BACKBONE)
    for path, array in shards.read_tensors(saved / form):
        assert array.shape == shapes.pop(path)
        assert str(array.dtype) == ("bfloat16" if "b" in form else "float32")
        name, stored = names.to_huggingface(path, array)
        np.testing.assert_array_equal(
            stored.astype("float32"), want.pop(name), path
        )
    assert not shapes and not want


def test_keras_hub_imports_the_same_arrays(saved, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    from keras import ops

    vocabularies = [p / VOCABULARY for p in (ROOT, ROOT.parent)]
    vocabulary = next((p for p in vocabularies if p.is_file()), None)
    if vocabulary is None:
        pytest.skip("no SentencePiece vocabulary at hand")
    shutil.copytree(saved / "one", tmp_path / "model")
    shutil.copy(vocabulary, tmp_path / "model" / "tokenizer.model")
    backbone = keras_hub.models.GemmaBackbone.from_preset(
        str(tmp_path / "model"), dtype="float32"
    )
    want = {v.path: ops.convert_to_numpy(v) for v in backbone.weights}
    for path, array in shards.read_tensors(tmp_path / "model"):
        np.testing.assert_array_equal(array, want.pop(path), path)
    assert not want
    # Its settings are ours too.
    ours = huggingface.backbone_config(CONFIG)
    ours.pop("query_pre_attn_scalar")
    theirs = backbone.get_config()
    assert ours == {name: theirs[name] for name in ours}


def test_config_goes_both_ways(saved):
    assert huggingface.backbone_config(CONFIG) == BACKBONE
    written = json.loads((saved / "one" / "config.json").read_text())
    assert huggingface.backbone_config(written) == BACKBONE
    assert written["layer_types"] == CONFIG["layer_types"]
    assert written["rope_parameters"]["rope_theta"] == 10000.0
    assert written["eos_token_id"] == [1, 107]
    assert CONFIG["layer_types"][:2] == ["sliding_attention", "full_attention"]
    # As the 2024 files of google/gemma-2-27b have it: no layer_types, flat.
    old = {k: v for k, v in CONFIG.items() if k[:5] not in ("rope_", "layer")}
    assert huggingface.backbone_config(old | {"rope_theta": 1e4}) == BACKBONE


@pytest.mark.parametrize(
    "normalize,scalar,want",
    [(True, None, 16), (False, None, 10), (False, 144, 144)],
)
def test_query_scale(normalize, scalar, want):
    backbone = BACKBONE | dict(
        query_head_dim_normalize=normalize, query_pre_attn_scalar=scalar
    )
    config = huggingface.huggingface_config(backbone)
    assert config["query_pre_attn_scalar"] == want


def test_config_of_another_architecture():
    for kind in ("gemma", "llama", None):
        with pytest.raises(UserError, match="expected 'gemma2'"):
            huggingface.backbone_config(CONFIG | {"model_type": kind})
    with pytest.raises(UserError, match="use_post_ffw_norm not set"):
        huggingface.huggingface_config(BACKBONE | {"use_post_ffw_norm": False})


def test_config_lists_every_complaint():
    bad = dict(
        hidden_size=-1,
        head_dim="16",
        sliding_window=None,
        hidden_activation="silu",
        rms_norm_eps=1e-5,
        tie_word_embeddings="no",
        attention_bias=True,
        rope_parameters={"rope_theta": 1e6, "rope_type": "yarn"},
        quantization_config={"bits": 4},
        layer_types=["full_attention"] * 3,
    )
    config = CONFIG | bad
    del config["attn_logit_softcapping"], config["num_key_value_heads"]
    with pytest.raises(UserError) as caught:
        huggingface.backbone_config(config)
    print(caught.value)
    for name in (*bad, "attn_logit_softcapping is missing", "num_key_value_"):
        part = {"rope_parameters": "rope_type='yarn'"}.get(name, name)
        assert part in str(caught.value)
    assert "rope_theta=1000000.0" in str(caught.value)


def test_is_huggingface(saved, tmp_path):
    assert huggingface.is_huggingface(saved / "one")
    assert not huggingface.is_huggingface(tmp_path)
    for text in ('{"registered_name": "GemmaBackbone"}', "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        assert not huggingface.is_huggingface(tmp_path)


# --- what is refused, and that the message lists every offender ------------


def rewrite(shard, change):
    tensors = dict(safetensors.numpy.load_file(shard))
    change(tensors)
    safetensors.numpy.save_file(tensors, shard, {"format": "pt"})


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def test_missing_and_truncated_shards(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    message = refusal(folder)
    assert f"{first.name}: missing" in message
    assert f"{second.name}: missing, truncated or damaged" in message
    for name, _array in safetensors_names(folder):
        assert f"{name}: missing" not in message


def safetensors_names(folder):
    for shard in sorted(folder.glob("*.safetensors"))[1:]:
        yield from safetensors.numpy.load_file(shard).items()


def test_wrong_tensors_are_all_named(folder):
    query = "model.layers.0.self_attn.q_proj.weight"
    key = "model.layers.1.self_attn.k_proj.weight"
    norm = "model.layers.2.input_layernorm.weight"

    rewrite(shard_of(folder, query), lambda t: t.pop(query))
    rewrite(
        shard_of(folder, key),
        lambda t: t.update({key: t[key].T.copy(), "surplus": np.ones(1)}),
    )
    rewrite(
        shard_of(folder, norm),
        lambda t: t.update({norm: t[norm].astype("int8")}),
    )
    message = refusal(folder)
    assert f"{query}: missing" in message
    assert f"{key}: shape (40, 32), expected (32, 40)" in message
    assert "surplus: unexpected" in message
    assert f"{norm}: dtype I8" in message


def test_a_tensor_in_two_shards(folder):
    name = "model.norm.weight"
    home = shard_of(folder, name)
    other = next(p for p in sorted(folder.glob("*.safetensors")) if p != home)
    rewrite(other, lambda t: t.update({name: np.ones(40, "float32")}))
    message = refusal(folder)
    assert name in message and home.name in message and other.name in message


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tied_head_and_rotary_tables_are_ignored(folder, dtype):
    """A head that equals the table is the table, in whatever dtype."""
    table = dict(shards.read_tensors(folder))[names.TABLE]
    shard = shard_of(folder, "model.norm.weight")
    rewrite(
        shard,
        lambda t: t.update(
            {
                "lm_head.weight": table.astype(dtype),
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8),
            }
        ),
    )
    assert len(list(shards.read_tensors(folder))) == 35
    assert "lm_head.weight" not in shards.find(folder)[1]


@pytest.mark.parametrize("row", [0, 50, 96])
def test_a_head_of_its_own_is_read(folder, row, monkeypatch):
    """It was dropped in silence; one number of its last row tells it."""
    # Three rows a piece.
    monkeypatch.setattr(shards, "_COMPARED", 480)
    head = dict(shards.read_tensors(folder))[names.TABLE].copy()
    head[row, -1] += 1
    shard = shard_of(folder, "model.norm.weight")
    rewrite(shard, lambda t: t.update({"lm_head.weight": head}))
    assert "lm_head.weight" in shards.find(folder)[1]
    found = dict(shards.read_tensors(folder))
    assert len(found) == 36
    np.testing.assert_array_equal(found[names.HEAD], head)


def test_a_head_of_another_shape(folder):
    shard = shard_of(folder, "model.norm.weight")
    rewrite(shard, lambda t: t.update({"lm_head.weight": np.ones((97, 39))}))
    assert "lm_head.weight: shape (97, 39), expected" in refusal(folder)


WRAPPED = {
    "no model.": lambda name: name.removeprefix("model."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP of compiled": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(
        ".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_as_other_savers_leave_them(folder, kind):
    want = dict(shards.read_tensors(folder))
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    listed = {WRAPPED[kind](name): shard for name, shard in listed.items()}
    index.write_text(json.dumps({"weight_map": listed}))
    for path in folder.glob("*.safetensors"):
        held = safetensors.numpy.load_file(path)
        held = {WRAPPED[kind](name): x for name, x in held.items()}
        safetensors.numpy.save_file(held, path)
    found = dict(shards.read_tensors(folder))
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(found[name], array)
    # Under both names it is told, not chosen.
    again = WRAPPED[kind]("model.norm.weight"), np.ones(40, "float32")
    rewrite(path, lambda t: t.update([("model.norm.weight", again[1]), again]))
    assert "there twice" in refusal(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "weights.bin",
        ".safetensors",
        "",
        7,
        None,
    ],
)
def test_shard_names_cannot_leave_the_folder(folder, shard):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert "not plain .safetensors file names" in message
    assert repr(str(shard)) in message


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": []}', "[1]"])
def test_broken_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "Fetch the file again" in refusal(folder) or text == "[1]"


def test_pickle_only_folder(folder):
    for path in folder.glob("model*"):
        path.unlink()
    assert "neither" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "safe_serialization" in message


# --- what other tools and other years have written -------------------------


def the_9b(**changes):
    nine = {"hidden_size": 3584, "num_hidden_layers": 42, "head_dim": 256}
    config = CONFIG | nine | {"query_pre_attn_scalar": 224} | changes
    return {k: v for k, v in config.items() if k != "layer_types"}


def test_query_scale_of_the_first_9b():
    found = huggingface.backbone_config(the_9b())
    assert found["query_pre_attn_scalar"] == 256
    assert found["query_head_dim_normalize"] is True
    [said] = huggingface.doubts(the_9b())
    assert "query_pre_attn_scalar=224" in said and "256 is used" in said
    # Google's own since, and another size that means what it says.
    for other in (the_9b(query_pre_attn_scalar=256), the_9b(head_dim=128)):
        found = huggingface.backbone_config(other)
        scalar = other["query_pre_attn_scalar"]
        assert found["query_pre_attn_scalar"] == scalar
        assert not list(huggingface.doubts(other))


def test_missing_caps_are_said():
    assert not list(huggingface.doubts(CONFIG))
    config = CONFIG | {"attn_logit_softcapping": None}
    found = huggingface.backbone_config(config)
    assert found["attention_logit_soft_cap"] is None
    [said] = huggingface.doubts(config)
    assert "attn_logit_softcapping=null" in said
    config["final_logit_softcapping"] = None
    assert len(list(huggingface.doubts(config))) == 2


def test_activation_of_old_configs():
    old = CONFIG | {"hidden_activation": None}
    assert huggingface.backbone_config(old) == BACKBONE
    assert not list(huggingface.doubts(old))
    old["hidden_act"] = "gelu"
    assert huggingface.backbone_config(old) == BACKBONE
    [said] = huggingface.doubts(old)
    assert "hidden_act='gelu'" in said
    with pytest.raises(UserError, match="hidden_activation='gelu'"):
        huggingface.backbone_config(CONFIG | {"hidden_activation": "gelu"})


@pytest.mark.parametrize(
    "name,original",
    [
        ("unsloth/gemma-2-9b-bnb-4bit", "hf://unsloth/gemma-2-9b "),
        ("someone/my-tune", "hf://someone/my-tune "),
        ("/home/me/tune-4bit", "hf://google/gemma-2-9b "),
        (None, "hf://google/gemma-2-9b "),
    ],
)
def test_codes_of_another_library(name, original):
    codes = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = CONFIG | {"quantization_config": codes, "_name_or_path": name}
    with pytest.raises(UserError, match="bitsandbytes") as caught:
        huggingface.backbone_config(config)
    assert f"--preset={original}--model.quantize=nf4" in str(caught.value)


@pytest.mark.parametrize("kind", ["Gemma2ForSequenceClassification", 7])
def test_a_head_that_does_not_write(kind):
    with pytest.raises(UserError, match="expected 'Gemma2ForCausalLM'"):
        huggingface.backbone_config(CONFIG | {"architectures": [kind]})
    for kinds in (None, [], ["Gemma2Model"], ["Gemma2ForCausalLM"]):
        huggingface.backbone_config(CONFIG | {"architectures": kinds})
