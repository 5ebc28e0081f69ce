"""What other tools train beside plain LoRA, computed as PEFT computes it."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tiny
import transformers
from keras import ops
from test_export import make, run

from keras_gemma_ft import config, evaluate
from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import (
    adapters,
    models,
    tokenizer_files,
)
from keras_gemma_ft.inference import taught
from keras_gemma_ft.model import forward, presets

peft = pytest.importorskip("peft")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj",
       "gate_proj", "up_proj", "down_proj"]  # fmt: skip
KINDS = {
    "dora": dict(target_modules=["q_proj", "v_proj"], use_dora=True),
    "dora, all": dict(target_modules=ALL, use_dora=True, use_rslora=True),
    "bias": dict(target_modules=["q_proj", "down_proj"], lora_bias=True),
    "table": dict(target_modules=["q_proj", "embed_tokens"]),
    "table, tied": dict(
        target_modules=["embed_tokens"], ensure_weight_tying=True
    ),
    "head": dict(target_modules=["o_proj", "lm_head"]),
    "table and head": dict(target_modules=["embed_tokens", "lm_head"]),
    "words": dict(
        target_modules=["up_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "more words": dict(
        target_modules=["up_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        resized=351,
    ),
    "resized": dict(target_modules=["up_proj"], resized=351),
    "norms": dict(
        target_modules=["k_proj"],
        modules_to_save=["input_layernorm", "post_feedforward_layernorm"],
    ),
    "tokens": dict(
        target_modules=["gate_proj"], trainable_token_indices=[5, 9, 311]
    ),
    "some layers": dict(
        target_modules=["q_proj"], layers_to_transform=[1], use_dora=True
    ),
}
# All of them can be merged but biases, which Gemma 2's projections have not.
MERGED = [kind for kind in KINDS if kind != "bias"]
CLOSE = 2e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"), gain=1.0)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """function of a kind -> (folder, PEFT's model, its logits of IDS)."""
    import torch

    held, root = {}, tmp_path_factory.mktemp("made")

    def make(kind):
        if kind not in held:
            settings = dict(KINDS[kind])
            model = tiny.witness(base)
            if words := settings.pop("resized", 0):
                torch.manual_seed(0)
                model.resize_token_embeddings(words, mean_resizing=False)
            model = peft.get_peft_model(
                model,
                peft.LoraConfig(
                    task_type="CAUSAL_LM", r=3, lora_alpha=5, **settings
                ),
            )
            torch.manual_seed(1)
            for name, value in model.named_parameters():
                if value.requires_grad and "magnitude" not in name:
                    value.data += 0.1 * torch.randn_like(value)
                elif value.requires_grad:
                    value.data *= 1 + 0.2 * torch.rand_like(value)
            place = root / kind.replace(", ", "-").replace(" ", "-")
            model.eval().save_pretrained(place)
            with torch.no_grad():
                logits = model(torch.tensor(IDS)).logits.numpy()
            held[kind] = place, model, logits
        return held[kind]

    return make


IDS = tiny.ids(2, 20)


def logits(cfg):
    _, loaded = taught.load(cfg)
    backbone = loaded.causal_lm.backbone
    ones = np.ones_like(IDS)
    positions = np.broadcast_to(np.arange(20, dtype="int32"), IDS.shape)

    def compute(ids, segments, positions):
        hidden = forward.hidden_states(backbone, ids, segments, positions)
        return forward.logits(backbone, hidden)

    return ops.convert_to_numpy(compute(IDS, ones, positions))


def settings(base, adapter, **more):
    values = {"preset": str(base), "adapter": str(adapter)}
    values |= {"data.cache": "none", **more}
    return config.replace(config.Config(), values)


# The others are in test_foreign_adapters.py; these go through `taught.load`.
@pytest.mark.parametrize("kind", ["dora", "bias", "head", "more words"])
def test_we_compute_what_peft_does(base, made, kind, capsys):
    folder, _, want = made(kind)
    got = logits(settings(base, folder))
    tiny.close(kind, got, want, atol=CLOSE)
    said = capsys.readouterr().err
    assert "merged into the base" in said
    plain = logits(settings(base, ""))
    assert np.abs(got[..., :347] - plain).max() > 0.01


@pytest.mark.once
@pytest.mark.parametrize("kind", MERGED)
def test_merged_folders_compute_it_too(base, made, kind, tmp_path):
    import torch

    folder, _, want = made(kind)
    found = run(base, tmp_path, formats="merged_hf", adapter=folder)
    [one] = found["exports"]
    assert one["verification"]["max_difference"] < CLOSE
    again = tiny.witness(tmp_path / "merged_hf")
    with torch.no_grad():
        got = again(torch.tensor(IDS)).logits.numpy()
    tiny.close(kind, got, want, atol=CLOSE)
    headed = "lm_head/embeddings" in models.open(tmp_path / "merged_hf").paths
    assert headed == (kind in ("table", "head", "table and head", "words",
                               "more words"))  # fmt: skip


@pytest.mark.parametrize("told", [False, True])
def test_a_head_that_is_not_the_table_is_read(base, tmp_path, told, capsys):
    """Whatever tie_word_embeddings says: its numbers are there."""
    import torch

    model = tiny.witness(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(
        0.5 * torch.randn_like(model.lm_head.weight)
    )
    model.save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.model", tmp_path)
    with torch.no_grad():
        want = model(torch.tensor(IDS)).logits.numpy()
    file = tmp_path / "config.json"
    config_ = json.loads(file.read_text()) | {"tie_word_embeddings": told}
    file.write_text(json.dumps(config_))
    got = logits(settings(tmp_path, ""))
    tiny.close("head", got, want, atol=CLOSE)
    assert "a head of its own" in capsys.readouterr().err


def test_a_head_of_its_own_is_trained_over(base, made, tmp_path):
    """The loss of LoRA over it is that of its own logits."""
    folder, _, _ = made("head")
    run(base, tmp_path, formats="merged_hf", adapter=folder, verify=False)
    cfg = settings(
        tmp_path / "merged_hf",
        "",
        **{"data.train": "demo", "data.sequence_length": 40},
    )
    found = evaluate.evaluate(cfg)["base"]["eval_loss"]
    over = evaluate.evaluate(settings(base, folder, **{
        "data.train": "demo", "data.sequence_length": 40}))  # fmt: skip
    np.testing.assert_allclose(over["adapter"]["eval_loss"], found, rtol=1e-5)
    assert abs(over["base"]["eval_loss"] - found) > 0.05


@pytest.mark.once
def test_what_cannot_be_is_told_whole(base, made, tmp_path):
    folder, _, _ = made("bias")
    for formats in ("merged_hf", "gguf"):
        with pytest.raises(UserError, match="biases"):
            run(base, tmp_path / "x", formats=formats, adapter=folder)
    with pytest.raises(UserError, match="merged only"):
        run(base, tmp_path / "x", formats="peft", adapter=made("dora")[0])
    with pytest.raises(UserError, match="merged_hf"):
        run(base, tmp_path / "x", formats="merged_keras",
            adapter=made("head")[0])  # fmt: skip
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())
    place = tmp_path / "spoiled"
    shutil.copytree(made("dora")[0], place)
    weights = place / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    del tensors[f"{prefix}lora_magnitude_vector"]
    tensors["base_model.model.model.norm.weight"] = np.ones(7, "float32")
    tensors["base_model.model.model.layers.9.mlp.up_proj.weight"] = np.ones(2)
    safetensors.numpy.save_file(tensors, weights)
    with pytest.raises(UserError) as told:
        adapters.read(place, models.open(base).backbone)
    for said in (
        "q_proj.lora_magnitude_vector: missing, but use_dora=True",
        "model.norm: weight has shape (7,), expected (40,)",
        "model has 3 layers",
    ):
        assert said in str(told.value)


@pytest.mark.once
def test_overlapping_patterns_are_doubted(base, made, tmp_path):
    shutil.copytree(made("dora")[0], tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    told = json.loads(file.read_text())
    told["alpha_pattern"] = {"q_proj": 3, "self_attn.q_proj": 9}
    file.write_text(json.dumps(told))
    found = adapters.read(tmp_path / "a", models.open(base).backbone)
    assert len(found.doubts) == 1 and "saves them sorted" in found.doubts[0]
    scales = {c.scale for p, c in found.changes.items() if "query" in p}
    assert scales == {1.0}


@pytest.mark.once
def test_training_from_one_is_refused_with_the_cure(base, made, tmp_path):
    from keras_gemma_ft import train

    cfg = settings(base, made("dora")[0], run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="--format=merged_hf"):
        train.train(cfg)


@pytest.mark.once
def test_new_tokens_of_an_adapter_are_tokens(base, made, tmp_path):
    """Its tokenizer, saved beside it, has them; the base's has not."""
    folder = tmp_path / "a"
    shutil.copytree(made("more words")[0], folder)
    words = presets.tokenizer(base)
    tokenizer_files.write_tokenizer(
        folder, words.proto, chat_template="{{ messages[0]['content'] }}"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<tool>", "zyx"] + [f"n{i}" for i in range(8)])
    theirs.save_pretrained(folder)
    cfg, loaded = taught.load(settings(base, folder))
    tokenizer = loaded.tokenizer
    assert tokenizer.vocabulary_size == len(theirs) == 350
    for text in ("a zyx b", "<tool>", "plain"):
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == want
    assert cfg.data.template.endswith(("chat_template.jinja", "config.json"))
    run(base, tmp_path / "out", formats="merged_hf", adapter=folder)
    back = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "out/merged_hf"
    )
    assert back("a zyx b")["input_ids"] == theirs("a zyx b")["input_ids"]


@pytest.mark.once
def test_adapters_over_a_head_of_its_own_are_verified(base, made, tmp_path):
    run(base, tmp_path, formats="merged_hf", adapter=made("head")[0],
        verify=False)  # fmt: skip
    headed = tmp_path / "merged_hf"
    make(tmp_path / "a", models.open(headed).backbone, "keras",
         ("query",), 2, 2.0, False)  # fmt: skip
    found = run(headed, tmp_path / "out", formats="peft,keras",
                adapter=tmp_path / "a")  # fmt: skip
    for one in found["exports"]:
        assert one["verification"]["max_difference"] < CLOSE
