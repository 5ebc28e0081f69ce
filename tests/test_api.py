"""The door for notebooks does what the verbs do, and says it in keywords."""

import json
import pathlib
import subprocess
import sys

import datasets
import nbclient
import nbformat
import numpy as np
import pandas
import pytest

import keras_gemma_ft as kgf
from keras_gemma_ft import api, config, keywords, runtime

pytestmark = pytest.mark.once
RECORDS = [{"prompt": f"Say {i}", "response": f"{i} it is"} for i in range(24)]
SHORT = {
    "data_eval": "10%",
    "data_sequence_length": 96,
    "data_batch_size": 2,
    "train_steps": 3,
    "train_log_every": 1,
    "train_samples": 1,
    "train_exact_match": 2,
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run that was stopped after a step, and that the same call ended."""
    path = tmp_path_factory.mktemp("door") / "run"
    given = {**SHORT, "data_train": RECORDS, "run_dir": path}
    assert kgf.tune is api.tune
    first = kgf.tune(**given, train_time_budget="0.01s")
    assert first.summary["status"] == "stopped" and first.metrics
    with pytest.raises(config.UserError, match="no adapter yet"):
        first.ask("Say 3")
    return kgf.tune(**given)


def test_the_door_does_what_the_verb_does(tuned, tmp_path):
    (file,) = tuned.path.glob("data_train-*.jsonl")
    lines = file.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    paths = keywords.paths()
    flags = [f"--{paths[k]}={v}" for k, v in SHORT.items()]
    flags += [f"--data.train={file}", f"--run_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "keras_gemma_ft.train", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = json.loads(done.stdout)
    told = tuned.summary
    for name in ("status", "steps", "tokens", "exact_match", "preset"):
        assert told[name] == wanted[name]
    for name in ("train_loss", "eval_loss_before", "eval_loss"):
        np.testing.assert_allclose(told[name], wanted[name], rtol=1e-5)


def test_asking_keeps_one_model(tuned, capsys):
    answer = tuned.ask("Say 3", generate_max_new_tokens=4)
    assert capsys.readouterr().out.endswith(f"{answer}\n")
    session = tuned.session
    question = [{"role": "user", "content": "Say 3"}]
    assert tuned.ask(question, generate_max_new_tokens=4) == answer
    assert tuned.session is session
    other = kgf.Run(tuned.path)
    other.ask("Say 3", generate_max_new_tokens=2)
    assert tuned.session is None and other.session


def test_evaluating_and_exporting(tuned, tmp_path):
    found = tuned.evaluate()
    told = tuned.summary
    for part, name in (
        ("base", "eval_loss_before"),
        ("adapter", "eval_loss"),
    ):
        np.testing.assert_allclose(found[part]["eval_loss"], told[name], 1e-5)
    found = tuned.export(tmp_path / "mine", export_probes=2)
    for one in found["exports"]:
        assert one["verification"]["top1"] == 1.0
    names = {path.name for path in (tmp_path / "mine").rglob("*")}
    assert {"adapter_model.safetensors", "adapter.lora.h5"} < names
    with pytest.raises(config.UserError, match="export_format=gguff: exp"):
        tuned.export(tmp_path / "mine", format="gguff")


def test_in_a_notebook(tuned, tmp_path):
    cells = [
        "import keras_gemma_ft as kgf",
        "kgf.tune(lora_rnak=3)",
        f"kgf.open({str(tuned.path)!r})",
    ]
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells]
    )
    client = nbclient.NotebookClient(
        book,
        timeout=60,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    (error,) = book.cells[1].outputs
    # No frame, neither ours nor the cell's.
    (told,) = error.traceback
    assert told.startswith("Error: unknown setting lora_rnak. Did you mean: ")
    (shown,) = book.cells[2].outputs
    page = shown.data["text/html"]
    assert '<img src="data:image/png;base64,iVBOR' in page
    assert "<td>eval_loss</td>" in page
    assert f"<td>{tuned.samples[0]['reference']}</td>" in page


def test_a_folder_without_a_run_is_not_opened(tmp_path):
    with pytest.raises(config.UserError, match="holds no run"):
        kgf.open(tmp_path)


def test_keywords_are_the_flags():
    paths = keywords.paths()
    known = [path for path, _, _ in config.walk(config.Config())]
    assert sorted(paths.values()) == sorted([*known, "config"])
    cfg = keywords.configure(
        {"lora_rank": 16, "resume": False, "lora_targets": ["q_proj", "query"]}
    )
    assert (cfg.lora.rank, cfg.resume) == (16, False)
    assert cfg.lora.targets == "q_proj,query"
    # The embedded model's recipe lies under it, as under flags.
    assert cfg.train.learning_rate != config.Config().train.learning_rate
    assert cfg.given == {"lora.rank", "resume", "lora.targets"}


@pytest.mark.parametrize(
    "given, words",
    [
        ({"load_in_4bit": True}, ["model_quantize=nf4"]),
        ({"lora_r": 4, "bogus_x": 1}, ["lora_rank=4", "bogus_x"]),
        ({"data_batch_size": 0}, ["data_batch_size=0: expected 1 or more"]),
        ({"data_train": [{"a": 1}, 2]}, ["data_train, record 1:", "not 2"]),
        ({"data_train": [{"a": {1}}]}, ["data_train, record 0:", "set"]),
        ({"data_train": {"train": []}}, ["data_train=data['train']"]),
        ({"backend": "torch"}, ["backend=torch was", "Restart the process"]),
    ],
)
def test_mistakes_are_told_in_keywords(given, words, tmp_path):
    import keras  # noqa: F401  Its backend cannot be changed any more.

    with pytest.raises(config.UserError) as told:
        kgf.tune(run_dir=tmp_path, **given)
    assert all(word in str(told.value) for word in words), told.value
    assert "--" not in str(told.value)


def test_frames_hold_the_records_of_lists(tmp_path):
    table = pandas.DataFrame({"prompt": ["ä", "b"], "response": ["1", None]})
    file = pathlib.Path(keywords.write(tmp_path, "data_eval", table))
    lines = [json.loads(x) for x in file.read_text("utf-8").splitlines()]
    assert lines == [
        {"prompt": "ä", "response": "1"},
        {"prompt": "b", "response": None},
    ]


def test_a_dataset_holds_the_records_of_lists(tmp_path):
    rows = [{"prompt": "ä", "response": "1"}, {"prompt": "b", "response": "2"}]
    one = keywords.write(
        tmp_path, "data_train", datasets.Dataset.from_list(rows)
    )
    assert one == keywords.write(tmp_path, "data_train", rows)
    with pytest.raises(config.UserError, match="one set of training records"):
        kgf.tune(rows, data_train=rows)


def test_a_job_of_many_processes_reports_its_mistake(monkeypatch):
    def ended(cfg):
        raise runtime.Ended({"error": "--lora.rank=0 x; --noresume"}, 2)

    monkeypatch.setattr("keras_gemma_ft.train.train", ended)
    with pytest.raises(config.UserError, match="^lora_rank=0 x; resume=False"):
        kgf.tune()


def test_the_package_imports_nothing():
    code = (
        "import sys, keras_gemma_ft as k\n"
        "print([n for n in sys.modules if n.startswith('keras')])\n"
        "k.tune\nprint('keras' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['keras_gemma_ft']", "False"]
