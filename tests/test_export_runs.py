"""Exports of runs: of the embedded model, unfinished, over codes, in each form.

What others compute of them is held to what we compute.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from keras_gemma_ft import command_line, config, embedded, export, train
from keras_gemma_ft.checking import reference, words
from keras_gemma_ft.config import UserError
from keras_gemma_ft.exporting import exports, sources
from keras_gemma_ft.formats import adapters, models, usage
from keras_gemma_ft.inference import chat
from keras_gemma_ft.model import preset_source, presets

QUICK = {
    "train.steps": 4,
    "train.checkpoint_every": "2",
    "train.log_every": "2",
    "train.learning_rate": 0.03,
    "train.warmup": "0",
    "train.exact_match": 0,
    "train.samples": 1,
    "train.eval_every": "0",
    "data.batch_size": 4,
    "data.sequence_length": 128,
    "lora.rank": 4,
    "data.cache": "none",
}


# The formats whose witness computes in float32 throughout.
EXACT = ("peft", "keras", "merged_hf", "merged_keras")


def tune(run_dir, **settings):
    values = {"run_dir": str(run_dir), **QUICK, **settings}
    train.train(config.replace(config.Config(), values))
    return run_dir


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("runs") / "mine")


def exported(formats, to, **settings):
    values = {
        "export.format": formats,
        "export.to": str(to),
        "export.probes": 2,
        **settings,
    }
    return export.export(config.replace(config.Config(), values))


def test_a_run_becomes_every_format(tuned, tmp_path):
    found = exported(
        ",".join(config.FORMATS),
        tmp_path,
        **{"run_dir": str(tuned), "export.dtype": "float32"},
    )
    assert found["kl_to_base"] > 1e-3
    assert found["loss"] < found["loss_base"]
    for told in found["exports"]:
        place = pathlib.Path(told["path"])
        assert told["verification"]["kl"] < 2e-3, told
        if told["stored_as"] == "float32" and told["format"] in EXACT:
            assert told["verification"]["max_difference"] < 1e-4, told
        assert told["bytes"] == sum(
            p.stat().st_size for p in place.rglob("*") if p.is_file()
        )
        card = (place / "README.md").read_text("utf-8")
        assert "## Verified" in card and "sha256" in card
        assert str(tuned.parent) not in card
        assert json.loads((place / exports.RECORD).read_text())["format"]
        if told["format"] != "peft":
            assert usage.read(place).told["settings"]["data.template"]
    text = (tmp_path / "ollama/Modelfile").read_text()
    assert "FROM ./model-F16.gguf" in text
    assert 'PARAMETER stop "<end_of_turn>"' in text
    assert "{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n" in text
    generation = tmp_path / "merged_hf/generation_config.json"
    assert json.loads(generation.read_text())["eos_token_id"] == [1, 107]


CHATS = [
    [("user", "Set a timer for ten minutes")],
    [("user", " spaces around \n")],
    [("user", "naïve 😊 日本語"), ("model", "ok"), ("user", "again?")],
    [("system", "Be brief."), ("user", "Hello")],
    [("user", "a\n\nb"), ("model", "c\td"), ("user", "  e")],
    [("user", "1234567890"), ("model", ""), ("user", "x")],
    [("user", "user"), ("model", "model"), ("user", "user\nmodel")],
    [("user", "<b>html</b>")],
    [("user", "x" * 50)],
    [("system", "A"), ("user", "B"), ("model", "C"), ("user", "D")],
]


@pytest.mark.once
def test_transformers_and_peft_continue_as_we_do(tuned, tmp_path):
    """32 tokens of greedy answers, and the ids of ten chats."""
    import peft
    import torch
    import transformers

    exported("merged_hf", tmp_path, run_dir=str(tuned),
             **{"export.dtype": "float32"})  # fmt: skip
    folder = tmp_path / "merged_hf"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    session = chat.load(
        config.replace(
            config.Config(),
            {"adapter": str(tuned), "generate.max_new_tokens": 32},
        )
    )
    roles = {"user": "user", "model": "assistant", "system": "system"}
    for turns in CHATS:
        said = [{"role": roles[r], "content": t} for r, t in turns]
        want = session.ids(said)
        got = theirs.apply_chat_template(
            said, add_generation_prompt=True, return_dict=False
        )
        assert list(got) == list(want), turns
        assert list(want).count(session.tokenizer.bos) == 1
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    base = tmp_path / "base"
    argv = ["--preset=gemma2_tiny_en", f"--to={base}", "--format=merged_hf"]
    argv = command_line.spelled([*argv, "--noverify"], "export")
    export.export(command_line.from_flags(argv))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        base / "merged_hf", dtype=torch.float32
    )
    adapted = peft.PeftModel.from_pretrained(plain, tuned / "adapter").eval()
    session.generator.stops = set()
    for turns in CHATS[:4]:
        ids = list(session.ids([{"role": roles[r], "content": t}
                                for r, t in turns]))  # fmt: skip
        [want] = session.generator.complete([ids], limit=32)
        for model in (merged, adapted):
            model.generation_config.eos_token_id = None
            got = model.generate(
                torch.tensor([ids]), max_new_tokens=32, do_sample=False
            )
            assert got[0, len(ids) :].tolist() == want


def test_a_checkpoint_is_exported(tuned, tmp_path):
    """In the middle of a run, and of a run that has not ended."""
    steps = sorted((tuned / "checkpoints").iterdir())
    found = exported("peft", tmp_path / "a", adapter=str(steps[0]))
    assert found["name"] == "mine"
    sizes = models.open(embedded.preset_folder()).backbone
    middle = adapters.read(tmp_path / "a/peft", sizes)
    ended = adapters.read(tuned, sizes)
    key = next(iter(middle.weights))
    assert np.abs(middle.weights[key][1] - ended.weights[key][1]).max() > 1e-4
    stopped = tmp_path / "stopped"
    shutil.copytree(tuned, stopped)
    for name in ("adapter", "adapter.lora.h5", "summary.json"):
        path = stopped / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    exported("peft", tmp_path / "b", run_dir=str(stopped))
    last = adapters.read(tmp_path / "b/peft", sizes)
    for key, pair in ended.weights.items():
        for x, y in zip(pair, last.weights[key]):
            np.testing.assert_array_equal(x, y)
    state = stopped / "checkpoints" / steps[0].name / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        adapters.read(state.parent, sizes)


def test_an_adapter_over_codes_is_verified_over_the_full_base(tmp_path):
    run = tune(tmp_path / "nf4", **{"model.quantize": "nf4"})
    found = exported("peft,merged_hf", tmp_path / "out", run_dir=str(run))
    assert found["loss"] != found["loss_quantised_base"]
    assert abs(found["loss"] - found["loss_quantised_base"]) < 0.5
    for told in found["exports"]:
        assert told["verification"]["kl"] < 1e-3
    text = (tmp_path / "out/peft/README.md").read_text("utf-8")
    assert "the same over the quantised base, as trained" in text
    # Merged, it is its own base, in full.
    told = usage.read(tmp_path / "out/merged_hf").told["settings"]
    assert told["model.quantize"] == "none" and "preset" not in told


@pytest.mark.once
def test_a_start_from_the_kernels_is_taken_off(tmp_path):
    """PiSSA: from a checkpoint too, for the base as it was."""
    run = tune(tmp_path / "pissa", **{"lora.init": "pissa"})
    sizes = models.open(embedded.preset_folder()).backbone
    newest = sorted((run / "checkpoints").iterdir())[-1]
    one_, two = adapters.read(newest, sizes), adapters.read(run, sizes)
    assert one_.rank == two.rank == 8
    for key, pair in two.weights.items():
        for x, y in zip(pair, one_.weights[key]):
            np.testing.assert_allclose(x, y, atol=1e-6)
    exported("merged_hf", tmp_path / "out", adapter=str(newest))


@pytest.mark.once
def test_a_template_of_the_users_travels(tmp_path):
    spec = "Q: {prompt}\\nA: {response}"
    run = tune(tmp_path / "run", **{"data.template": spec})
    exported("merged_hf,ollama", tmp_path / "out", run_dir=str(run))
    text = (tmp_path / "out/ollama/Modelfile").read_text()
    assert "Q: " in text and "{{ .Prompt }}" in text and "\nA: " in text
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "out/merged_hf"
    )
    session = chat.load(config.replace(config.Config(), {"adapter": str(run)}))
    asked = [{"role": "user", "content": "How many?"}]
    got = theirs.apply_chat_template(asked, add_generation_prompt=True,
                                     return_dict=False)  # fmt: skip
    assert list(got) == list(session.ids("How many?"))


# Nothing of ours is imported in it.
PLAIN = """
import sys
import keras_hub, numpy as np
preset, file, rank, targets, out = sys.argv[1:]
model = keras_hub.models.GemmaCausalLM.from_preset(
    preset, preprocessor=None, dtype="float32")
model.backbone.enable_lora(int(rank), target_layer_names=targets.split(","))
model.backbone.load_lora_weights(file)
ids = np.arange(8, 40, dtype="int32")[None]
logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
assert not any(name.startswith("keras_gemma_ft") for name in sys.modules)
np.save(out, np.asarray(logits))
"""


@pytest.mark.once
def test_a_plain_keras_script_loads_it(tuned, tmp_path):
    base = models.open(embedded.preset_folder())
    adapter = adapters.read(tuned, base.backbone)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PLAIN,
            str(embedded.preset_folder()),
            str(tuned / "adapter.lora.h5"),
            str(adapter.rank),
            ",".join(adapter.targets),
            str(tmp_path / "logits.npy"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(tmp_path / "logits.npy")[0]
    [want] = reference.logits(
        models.Merged(base, adapter), [list(range(8, 40))]
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_preset_by_name_is_fetched_as_keras_hub_does(monkeypatch, tmp_path):
    """File by file, so that what KerasHub has fetched is found again."""
    import kagglehub

    asked, here = [], embedded.preset_folder()

    def download(handle, path):
        asked.append((handle, path))
        if not (here / path).is_file():
            raise ValueError(f"404: there is no {path}")
        return str(here / path)

    monkeypatch.setattr(kagglehub, "model_download", download)
    assert preset_source.folder("gemma2_2b_en") == here
    handles = {handle for handle, _ in asked}
    assert handles == {"keras/gemma2/keras/gemma2_2b_en/" + one.split("/")[-1]
                       for one in handles}  # fmt: skip
    assert [path for _, path in asked] == [
        "config.json",
        "assets/tokenizer/vocabulary.spm",
        "model.weights.json",
        "model.weights.h5",
    ]
    loaded = presets.load(config.EMBEDDED_PRESET).causal_lm.backbone
    base, memory = models.open(here), sources.InMemory(loaded)
    assert memory.paths == base.paths
    for path in base.paths:
        np.testing.assert_array_equal(
            memory.read(path), base.read(path).astype("float32")
        )
    [one] = reference.logits(memory, [[2, 5, 9]])
    [two] = reference.logits(base, [[2, 5, 9]])
    np.testing.assert_array_equal(one, two)


@pytest.mark.once
def test_words_that_are_others_are_refused(tuned, tmp_path):
    exported("merged_hf,gguf", tmp_path, run_dir=str(tuned))
    ours = presets.tokenizer(embedded.preset_folder())
    words.check("merged_hf", tmp_path / "merged_hf", ours)
    words.check("gguf", tmp_path / "gguf", ours)
    file = tmp_path / "merged_hf/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1]}))
    with pytest.raises(UserError, match=r"would not end at the ids \[107\]"):
        words.check("merged_hf", tmp_path / "merged_hf", ours)
    template = tmp_path / "merged_hf/chat_template.jinja"
    template.write_text("{{ bos_token + bos_token }}")
    with pytest.raises(UserError, match="<bos> more than once"):
        words.check("merged_hf", tmp_path / "merged_hf", ours)
    ours.stops = frozenset({3})
    with pytest.raises(UserError, match="no end of an answer"):
        words.check("gguf", tmp_path / "gguf", ours)


@pytest.mark.once
def test_a_killed_export_leaves_nothing_under_its_name(tuned, tmp_path):
    """The benchmark kill_export does this fifty times."""
    from tests.benchmarks import kill_export

    told = kill_export.kill(tuned, tmp_path, 3, seed=1)
    assert told["kills"] == 3 and told["half"] == 0
