"""Adapters of other tools that are more than LoRA pairs: PEFT as the witness.

PEFT itself makes each of them over the tiny Gemma 2, with random values, saves
it, and computes the logits that ours must have.
"""

import json
import shutil

import keras
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
from keras import ops
from test_forward import ours

from keras_gemma_ft import config
from keras_gemma_ft.formats import adapters, merging, names, shards
from keras_gemma_ft.model import lora, preset_source, presets, quantize, tables

peft = pytest.importorskip("peft")
BACKEND = keras.config.backend()
IDS = tiny.ids(2, tiny.T)

# What is given to `LoraConfig`, and the words of a table that is resized.
KINDS = {
    "DoRA of two": dict(target_modules=["q_proj", "v_proj"], use_dora=True),
    "DoRA of all": dict(
        target_modules="all-linear",
        use_dora=True,
        use_rslora=True,
        rank_pattern={"o_proj": 5},
        alpha_pattern={"up_proj": 1},
    ),
    "DoRA of tables": dict(
        target_modules=["k_proj", "embed_tokens", "lm_head"], use_dora=True
    ),
    "lora_bias": dict(
        target_modules=["q_proj", "o_proj", "down_proj", "gate_proj"],
        lora_bias=True,
        use_rslora=True,
    ),
    "table": dict(target_modules=["q_proj", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "both": dict(target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "both, tied": dict(
        target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    ),
    "saved both": dict(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "saved table": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved, tied": dict(
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "norms": dict(
        target_modules=["up_proj"],
        modules_to_save=["input_layernorm", "norm", "k_proj", "o_proj"],
    ),
    "words": dict(target_modules=["q_proj"], trainable_token_indices=[9, 5]),
    "words of each": dict(
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [9, 5], "lm_head": [7]},
    ),
    "words, tied": dict(
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [9, 5], "lm_head": [9, 5]},
    ),
    "resized": dict(words=355, target_modules=["q_proj"]),
    "resized, saved": dict(
        words=355,
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
    ),
    "resized, words": dict(
        words=355,
        target_modules=["q_proj"],
        trainable_token_indices=[350, 354, 9],
    ),
    "resized, table": dict(words=355, target_modules=["embed_tokens"]),
    "some layers": dict(
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0, 2],
        use_dora=True,
    ),
}
# Whether a head that was the table is another matrix afterwards.
UNTIED = {
    "DoRA of tables", "table", "head", "both", "saved both", "saved table",
    "saved head", "words of each", "resized, saved", "resized, table",
}  # fmt: skip
# The others are arithmetic of numpy: Torch, which compiles nothing, is enough.
EVERYWHERE = ("lora_bias", "both", "resized, saved")
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason="runs under Torch")
every = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in EVERYWHERE else ON_TORCH)
        for kind in KINDS
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(model):
    """Logits of rows, in float64: what ours are off is our rounding alone."""
    with torch.no_grad():
        found = model.double().eval()(torch.tensor(IDS).long())
    return found.logits.numpy()


def base_of(folder, words=None):
    model = tiny.witness(folder)
    if words:
        torch.manual_seed(3)
        model.resize_token_embeddings(words)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model with blocks that magnify rounding less."""
    return tiny.save(tmp_path_factory.mktemp("base"), gain=1.0)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """kind -> (folder of an adapter, the logits of PEFT's model of it)."""
    root, known = tmp_path_factory.mktemp("peft"), {}

    def make(kind):
        if kind in known:
            return known[kind]
        settings = dict(KINDS[kind])
        words = settings.pop("words", None)
        torch.manual_seed(1)
        model = peft.get_peft_model(
            base_of(folder, words),
            peft.LoraConfig(
                task_type="CAUSAL_LM", r=3, lora_alpha=7,
                init_lora_weights=False, **settings,
            ),
        )  # fmt: skip
        for name, value in model.named_parameters():
            if value.requires_grad:
                if "magnitude" in name:
                    value.data *= 1 + 0.2 * torch.rand_like(value)
                else:
                    value.data += 0.1 * torch.randn_like(value)
        place = root / kind.replace(" ", "_")
        model.save_pretrained(place)
        # What PEFT makes of the folder, not what it has in memory.
        model = peft.PeftModel.from_pretrained(base_of(folder, words), place)
        known[kind] = place, theirs(model)
        return known[kind]

    return make


def load(preset, adapter, **settings):
    """Our backbone of a preset with the adapter of a folder in it."""
    settings = config.Model(**settings)
    found = adapters.read(adapter, preset_source.sizes(str(preset)))
    if isinstance(found, adapters.WholeChange):
        loaded = presets.load(str(preset), model=settings, change=found)
        return loaded.causal_lm.backbone
    backbone = presets.load(str(preset), model=settings).causal_lm.backbone
    lora.put(backbone, found)
    return backbone


def logits(backbone):
    return ours(backbone, IDS)[1]


@every
def test_our_logits_are_pefts(folder, made, kind):
    place, want = made(kind)
    backbone = load(folder, place)
    assert tables.has_head(backbone) == (kind in UNTIED)
    tiny.close(kind, logits(backbone), want, atol=1e-4)
    base = theirs(base_of(folder))
    width = min(base.shape[-1], want.shape[-1])
    assert np.abs(want[..., :width] - base[..., :width]).max() > 0.1


@pytest.mark.parametrize("kind", ["both", "resized, saved"])
def test_over_a_keras_preset(folder, made, tmp_path, kind):
    """KerasHub's own loader; a head of its own and words that are added."""
    loaded = presets.load(str(folder))
    preset = tmp_path / "preset"
    presets.save(preset, loaded.causal_lm.backbone, loaded.tokenizer)
    place, want = made(kind)
    tiny.close(kind, logits(load(preset, place)), want, atol=1e-4)


def test_what_is_merged_is_quantised_then(folder, made):
    """Codes of the merged weights, not merged codes; and no cache of them."""
    place, _ = made("both")
    backbone = load(folder, place)
    quantize.apply(backbone, lora.layers(backbone), "int8", "int8")
    stored = load(folder, place, quantize="int8", quantize_embedding="int8")
    assert stored.token_embedding._embeddings is None
    want, got = (
        {v.path: ops.convert_to_numpy(v.value) for v in x.variables}
        for x in (backbone, stored)
    )
    assert want.keys() == got.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, path)


# --- merging alone, of numpy -------------------------------------------------


@ON_TORCH
@pytest.mark.parametrize("kind", ["DoRA of all", "both", "resized, saved"])
def test_a_folder_can_be_merged_one_variable_at_a_time(
    folder, made, tmp_path, kind
):
    """What an exporter does; transformers computes PEFT's logits of it."""
    place, want = made(kind)
    backbone = preset_source.sizes(str(folder))
    adapter = adapters.read(place, backbone)
    assert merging.refusal(adapter) is None
    told = json.loads((folder / "config.json").read_text())
    told["vocab_size"] = merging.settings(backbone, adapter)["vocabulary_size"]
    held = {}
    for path, array in shards.read_tensors(folder):
        tuned = merging.merged(path, array, adapter)
        name, value = names.to_huggingface(path, tuned)
        held[name] = np.ascontiguousarray(value)
        if path == names.TABLE and merging.unties(adapter):
            name, _ = names.to_huggingface(names.HEAD, array)
            held[name] = np.ascontiguousarray(merging.head(adapter, array))
            told["tie_word_embeddings"] = False
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text(json.dumps(told))
    file = merged / "model.safetensors"
    safetensors.numpy.save_file(held, file, {"format": "pt"})
    tiny.close(kind, theirs(tiny.witness(merged)), want, atol=1e-4)
    shutil.copy(folder / "tokenizer.model", merged)
    again = presets.load(str(merged)).causal_lm.backbone
    assert tables.has_head(again) == (kind in UNTIED)
    tiny.close(kind, logits(again), want, atol=1e-4)


@ON_TORCH
def test_biases_are_in_no_weight(folder, made):
    adapter = adapters.read(
        made("lora_bias")[0], preset_source.sizes(str(folder))
    )
    assert "train it again without lora_bias" in merging.refusal(adapter)


# --- names as other savers leave them ----------------------------------------

P = "base_model.model."
RENAMED = {
    "no base_model": lambda n: n.removeprefix(P),
    "no model": lambda n: n.replace(f"{P}model.", P),
    "neither": lambda n: n.removeprefix(f"{P}model.").removeprefix(P),
    "compiled": lambda n: n.replace(P, f"{P}_orig_mod."),
    "compiled whole": lambda n: f"_orig_mod.{n}",
    "DDP": lambda n: f"module.{n}",
    "FSDP": lambda n: n.replace(P, f"{P}_fsdp_wrapped_module.").replace(
        ".self_attn.", "._fsdp_wrapped_module.self_attn._fsdp_wrapped_module."
    ),
    "a name": lambda n: (
        n.replace("_A.weight", "_A.my-run.weight")
        .replace("_B.weight", "_B.my-run.weight")
        .replace("_vector", "_vector.my-run")
        .replace("embedding_A", "embedding_A.my-run")
        .replace("embedding_B", "embedding_B.my-run")
    ),
}


def renamed(place, new, rename):
    """A copy of an adapter's folder with other names."""
    shutil.copytree(place, new)
    file = new / "adapter_model.safetensors"
    held = safetensors.numpy.load_file(file)
    held = {rename(name): array for name, array in held.items()}
    safetensors.numpy.save_file(held, file, {"format": "pt"})
    return new


@ON_TORCH
@pytest.mark.parametrize("how", RENAMED)
@pytest.mark.parametrize("kind", ["both", "DoRA of two"])
def test_names_of_other_savers(folder, made, tmp_path, how, kind):
    place, _ = made(kind)
    backbone = preset_source.sizes(str(folder))
    want = adapters.read(place, backbone)
    got = adapters.read(renamed(place, tmp_path / "x", RENAMED[how]), backbone)
    assert got.changes.keys() == want.changes.keys()
    assert all(got.changes[k].equals(want.changes[k]) for k in want.changes)
    assert (got.follows, got.kinds) == (want.follows, want.kinds)


# --- MLX ---------------------------------------------------------------------


def mlx(folder, new, kind, modules, *, rank=4, scale=2.5):
    """(a folder as mlx-lm writes it, the model that mlx_lm.fuse makes).

    Its equations are written out here: mlx_lm/tuner/lora.py and dora.py.
    """
    model, rng = tiny.witness(folder).double(), np.random.default_rng(4)
    held = {}
    for name in modules:
        weight = model.get_submodule(name).weight
        out, inside = weight.shape
        if kind == "full":
            held[f"{name}.weight"] = rng.normal(0, 0.3, weight.shape)
            weight.data = torch.tensor(held[f"{name}.weight"])
            continue
        if name.endswith("embed_tokens"):
            a, b = (
                rng.normal(0, 0.3, (out, rank)),
                rng.normal(0, 0.3, (rank, inside)),
            )
            change = a @ b
        else:
            a, b = (
                rng.normal(0, 0.3, (inside, rank)),
                rng.normal(0, 0.3, (rank, out)),
            )
            change = b.T @ a.T
        held |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        weight.data += scale * torch.tensor(change)
        if kind == "dora":
            m = held[f"{name}.m"] = rng.uniform(1, 3, out)
            norm = torch.linalg.norm(weight.data, dim=1)
            weight.data *= (torch.tensor(m) / norm)[:, None]
    new.mkdir()
    told = {
        "model": "mlx-community/gemma-2-2b",
        "fine_tune_type": kind,
        "num_layers": 2,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.1},
    }
    (new / "adapter_config.json").write_text(json.dumps(told))
    safetensors.numpy.save_file(
        {n: np.ascontiguousarray(x, "float32") for n, x in held.items()},
        new / "adapters.safetensors",
    )
    return new, model


MLX_MODULES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.2.self_attn.v_proj",
    "model.layers.2.self_attn.o_proj",
    "model.layers.2.mlp.down_proj",
]


@ON_TORCH
@pytest.mark.parametrize("tables_too", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_mlx(folder, tmp_path, kind, tables_too):
    modules = MLX_MODULES + ["model.embed_tokens"] * tables_too
    place, model = mlx(folder, tmp_path / "mlx", kind, modules)
    backbone = load(folder, place)
    assert not tables.has_head(backbone)
    tiny.close(kind, logits(backbone), theirs(model), atol=1e-4)
    found = adapters.read(place, preset_source.sizes(str(folder)))
    plain = kind == "lora" and not tables_too
    # Pairs of projections alone can be trained on.
    assert isinstance(found, adapters.Adapter) == plain
    assert found.base == "mlx-community/gemma-2-2b"
    if plain:
        assert (found.rank, found.alpha, found.dropout) == (4, 10.0, 0.1)


@ON_TORCH
def test_mlx_that_cannot_be_followed(folder, tmp_path):
    backbone = preset_source.sizes(str(folder))
    place, _ = mlx(folder, tmp_path / "mlx", "lora", MLX_MODULES)
    file = place / "adapter_config.json"
    told = json.loads(file.read_text())

    def refused(**changes):
        file.write_text(json.dumps(told | changes))
        with pytest.raises(config.UserError) as caught:
            adapters.read(place, backbone)
        return str(caught.value)

    said = refused(
        fine_tune_type="ia3", lora_parameters={"rank": 0, "scale": "2"}
    )
    for part in ("fine_tune_type='ia3'", "rank=0", "scale='2'", "mlx_lm.fuse"):
        assert part in said
    said = refused(lora_parameters={"rank": 5, "scale": 2.0})
    assert said.count("expected rank 5") == len(MLX_MODULES)
    held = safetensors.numpy.load_file(place / "adapters.safetensors")
    held[f"{MLX_MODULES[0]}.scales"] = np.ones(3, "float32")
    safetensors.numpy.save_file(held, place / "adapters.safetensors")
    assert "quantized weights" in refused()
    # One that has another model's layers is told whole.
    other = backbone | {"num_layers": 1}
    del held[f"{MLX_MODULES[0]}.scales"]
    safetensors.numpy.save_file(held, place / "adapters.safetensors")
    file.write_text(json.dumps(told))
    with pytest.raises(config.UserError) as caught:
        adapters.read(place, other)
    assert str(caught.value).count("the model has 1 layers") == 4
