"""What travels with an adapter: written, found again, and laid under flags."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from test_formats_adapters import BACKBONE, make

from keras_gemma_ft import command_line, config
from keras_gemma_ft.formats import adapters, usage

TEMPLATE = "### Instruction: {instruction}\\n### Response: {output}"
BASE = {"preset": "gemma2_2b_en", "sha256": "a" * 64, "dtype": "bfloat16"}
TRAINED = {
    "layout": {"format": "instruction", "fields": {"prompt": "instruction"}},
    "quantize": "nf4",
    "quantize_embedding": "none",
}


def taught(**settings):
    """The `config.Config` of a run whose adapter travels."""
    values = {
        "preset": "gemma2_2b_en",
        "data.template": TEMPLATE,
        "data.system": "Be brief.",
        "data.sequence_length": 300,
        "model.quantize": "nf4",
    }
    values |= {key.replace("__", "."): v for key, v in settings.items()}
    return config.replace(config.Config(), values)


def described(cfg, parents=()):
    return usage.describe(
        cfg, base=BASE, trained=TRAINED, when="2026-01-02", parents=parents
    )


@pytest.fixture
def run(tmp_path):
    """Function of a Config: a run folder with its adapter in both forms."""

    def write(cfg, name="run"):
        folder = tmp_path / name
        adapter = make("keras")
        adapters.write_peft(folder / "adapter", adapter, usage=described(cfg))
        index = adapters.layer_index(BACKBONE["num_layers"])
        adapters.write_keras(folder / "adapter.lora.h5", adapter, index)
        told = {"settings": config.flatten(cfg)}
        (folder / "config.json").write_text(json.dumps(told))
        return folder

    return write


def settled(*argv, **options):
    """(the settled Config of a command line, the lines that were said)."""
    said = []
    cfg = command_line.from_flags(list(argv))
    return usage.settle(cfg, said.append, **options), said


def test_every_form_of_an_adapter_brings_its_use(run, tmp_path):
    cfg = taught()
    folder = run(cfg)
    alone = shutil.copytree(folder / "adapter", tmp_path / "elsewhere")
    for path in (folder, folder / "adapter", folder / "adapter.lora.h5", alone):
        found, said = settled(f"--adapter={path}")
        for name in usage.TRAVELS:
            got, want = config.flatten(found)[name], config.flatten(cfg)[name]
            assert got == want, (path, name)
        assert len(said) == 1 and "--model.quantize=nf4" in said[0]
        assert f"--data.template='{TEMPLATE}'" in said[0]
        # What is left out: records, folders, the machine's affairs.
        assert found.data.train == "demo" and found.run_dir == "runs/default"
    assert settled("--adapter=nowhere")[0].preset == config.EMBEDDED_PRESET


def test_the_embedded_recipe_goes_with_the_embedded_model(run):
    """A base that the adapter names is no 3 M parameter model."""
    path = run(taught())
    found, _ = settled(f"--adapter={path}", "--seed=7")
    assert (found.seed, found.lora, found.train) == (
        7, config.Lora(), config.Train(),
    )  # fmt: skip
    path = run(taught(preset=config.EMBEDDED_PRESET), "tiny")
    found, _ = settled(f"--adapter={path}")
    assert found.train.learning_rate == 1e-2


def test_a_typed_flag_wins_and_is_told(run, tmp_path):
    path = run(taught())
    argv = ["--data.template=gemma", "--model.quantize=int8"]
    found, said = settled(f"--adapter={path}", *argv, "--data.system=Be brief.")
    assert (found.data.template, found.model.quantize) == ("gemma", "int8")
    told = [line for line in said if "was typed" in line]
    assert len(told) == 2
    assert told[0].startswith("--data.template=gemma was typed and is used; ")
    assert f"taught with --data.template='{TEMPLATE}'" in told[0]
    assert told[1].endswith("taught with --model.quantize=nf4")
    # A --config file's values are typed if they are not the defaults.
    file = tmp_path / "mine.py"
    file.write_text(
        "from keras_gemma_ft.config import *\n"
        "def get_config():\n"
        "    data = Data(template='gemma', sequence_length=99)\n"
        "    return Config(data=data)\n"
    )
    found, said = settled(f"--adapter={path}", f"--config={file}")
    assert found.data.sequence_length == 99
    assert found.data.template == TEMPLATE
    # So are those of a Config that is made in Python.
    made = config.Config(adapter=str(path), data=config.Data(system="Rhyme."))
    found = usage.settle(made, said.append)
    assert (found.data.system, found.data.template) == ("Rhyme.", TEMPLATE)


def test_a_contradiction_that_cannot_be_is_refused(run):
    path = run(taught())
    with pytest.raises(config.UserError, match="--lora.rank=0 trains them"):
        settled(f"--adapter={path}", "--lora.rank=0")


def test_a_jinja_template_travels_as_its_source(run, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }} é", "utf-8")
    path = run(taught(data__template=str(file)))
    file.unlink()
    moved = shutil.move(path / "adapter", tmp_path / "moved")
    found, _ = settled(f"--adapter={moved}")
    source = pathlib.Path(found.data.template)
    assert source.parent == tmp_path / "moved"
    assert source.read_text("utf-8") == "{{ messages }} é"
    source.unlink()
    with pytest.raises(config.UserError, match="--data.template=FILE"):
        settled(f"--adapter={moved}")


def test_an_adapter_that_started_from_the_kernels_wants_them_whole():
    """See `model_card`: it is exported for the base as it was."""
    cfg = taught(lora__init="loftq", model__quantize_embedding="int8")
    settings = described(cfg).told["settings"]
    assert settings["model.quantize"] == "none"
    assert settings["model.quantize_embedding"] == "int8"


def test_a_runs_own_records_are_evaluated_if_none_are_named(run):
    records = {"data.train": "mine.jsonl", "data.eval": "5%", "seed": 3}
    path = run(taught(**{k.replace(".", "__"): v for k, v in records.items()}))
    every, _ = settled(f"--adapter={path}", records=True)
    every = config.flatten(every)
    assert {key: every[key] for key in records} == records
    named, _ = settled(f"--adapter={path}", "--data.eval=x.jsonl", records=True)
    assert (named.data.train, named.data.eval) == ("demo", "x.jsonl")
    assert settled(f"--adapter={path}")[0].seed == 0


def test_of_a_foreign_adapter_the_base_is_known(tmp_path):
    file = tmp_path / usage.PEFT
    for name, preset in (
        ("google/gemma-2-2b-it", "hf://google/gemma-2-2b-it"),
        (str(tmp_path), str(tmp_path)),
        (None, config.EMBEDDED_PRESET),
    ):
        file.write_text(json.dumps({"base_model_name_or_path": name}))
        found, _ = settled(f"--adapter={tmp_path}")
        assert found.preset == preset


def test_a_model_that_was_tuned_whole_is_its_own_base(tmp_path):
    usage.write(tmp_path, described(taught(model__quantize="none")))
    found, _ = settled(f"--preset={tmp_path}")
    assert found.preset == str(tmp_path)
    assert found.data.template == TEMPLATE


@pytest.mark.parametrize(
    "settings, words",
    [
        (None, ["cannot be followed", "settings"]),
        ([], ["cannot be followed"]),
        ({"data.sequence_length": "long"}, ["--data.sequence_length"]),
        ({"data.sequence_length": -3}, ["at least 2 tokens"]),
        ({"model.quantize": "int2"}, ["--model.quantize=int2"]),
        ({"data.template": "/etc/x.jinja"}, ["expected template.jinja"]),
        ({"data.template": "../template.jinja"}, ["expected template.jinja"]),
    ],
)
def test_a_file_that_lies_is_refused(run, settings, words):
    path = run(taught())
    file = path / "adapter" / usage.FILE
    told = json.loads(file.read_text())
    # Not even with such a file beside it is another one read.
    (path / "adapter" / usage.JINJA).write_text("{{ messages }}")
    told["settings"] = settings
    if settings is None:
        del told["settings"]
    file.write_text(json.dumps(told))
    with pytest.raises(config.UserError) as caught:
        settled(f"--adapter={path}")
    for word in (usage.FILE, *words):
        assert word in str(caught.value)


def test_a_strange_file_hands_on_nothing_strange(run):
    path = run(taught())
    file = path / "adapter" / usage.FILE
    told = json.loads(file.read_text())
    told["settings"] |= {"run_dir": "/etc", "later.setting": 1}
    told["base"] = {"sha256": 3, "preset": "x"}
    told["parents"] = [{"name": "p" * 999, "run": "rm"}]
    file.write_text(json.dumps(told))
    found, said = settled(f"--adapter={path}")
    assert found.run_dir == "runs/default" and "/etc" not in said[0]
    _, read = usage.find(path)
    assert read.told["parents"] == [{"name": "p" * 200}]
    assert read.told["base"] == {"preset": "x"}


def test_another_base_is_told(run):
    cfg = config.replace(taught(), {"adapter": str(run(taught()))})
    assert usage.doubt(cfg, sha256="a" * 64, dtype="bfloat16") == ""
    # Read in another dtype, the same weights have another sha256.
    assert usage.doubt(cfg, sha256="b" * 64, dtype="float32") == ""
    told = usage.doubt(cfg, sha256="b" * 64, dtype="bfloat16")
    assert "gemma2_2b_en" in told and "bbbb" in told and "aaaa" in told
    no_adapter = config.replace(cfg, {"adapter": ""})
    assert usage.doubt(no_adapter, sha256="b", dtype="bfloat16") == ""


def test_the_card_says_it_in_words(run, tmp_path):
    parent = {"name": "last-week", "sha256": "c" * 64, "base": "gemma2_2b_en"}
    adapters.write_peft(
        tmp_path / "a", make("keras"),
        usage=described(taught(), [parent]),
    )  # fmt: skip
    card = (tmp_path / "a/README.md").read_text("utf-8")
    for words in (
        "which is not Gemma's turns",
        "      ### Instruction: {instruction}\n      ### Response: {output}\n",
        "      Be brief.\n",
        "format `instruction`",
        "rows of 300 tokens",
        "with the kernels in nf4",
        "`last-week`",
        "c" * 64,
    ):
        assert words in card, words
    cfg = taught(data__template="gemma", data__system="")
    adapters.write_peft(tmp_path / "b", make("keras"), usage=described(cfg))
    card = (tmp_path / "b/README.md").read_text("utf-8")
    assert "Prompts are written in Gemma's turns" in card
    assert "system text" not in card


def test_an_adapter_is_rewritten_with_its_use(run, tmp_path):
    """The files that travel are ours: they do not block a second export."""
    folder = run(taught()) / "adapter"
    cfg = taught(data__system="Other.")
    adapters.write_peft(folder, make("keras"), usage=described(cfg))
    assert usage.read(folder).told["settings"]["data.system"] == "Other."
    read = adapters.read(folder, BACKBONE)
    for key, pair in make("keras").weights.items():
        for got, want in zip(read.weights[key], pair):
            np.testing.assert_array_equal(got, want)
