"""What a user does wrong, told by the user's own command: exit 2, the cure.

Each row of a table is a command line and the words its message must have:
what came, what was expected, what to type.
"""

import errno
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import huggingface_hub
import kagglehub
import keras
import pytest
import requests
from huggingface_hub import errors
from test_run import settings, workshop  # noqa: F401

from keras_gemma_ft import config, evaluate, generate, runtime, train
from keras_gemma_ft.formats import huggingface
from keras_gemma_ft.model import presets
from keras_gemma_ft.tuning import run_folder

BACKEND = keras.config.backend()
CREDENTIALS = ["licence", "KAGGLE_USERNAME", "HF_TOKEN", "--preset=FOLDER"]
NETWORK = ["no network", "--preset=FOLDER", "--preset=gemma2_tiny_en"]


def check(status, out, err, words):
    """Exit code 2, the message on stderr and in stdout's JSON line."""
    assert status == runtime.MISTAKE, err
    assert "Traceback" not in err, err
    result = json.loads(out.splitlines()[-1])
    told = result["error"]
    assert result["status"] == "error" and f"Error: {told}" in err
    missing = [word for word in words if str(word) not in told]
    assert not missing, f"{missing} not in: {told}"
    return told


@pytest.fixture
def call(monkeypatch, capfd):
    """Function of (words, flags): the verb as a process would run it, in
    this one, whose keras is imported."""
    monkeypatch.setattr(runtime, "start", lambda cfg: BACKEND)
    # `main` takes SIGTERM over, which here is pytest's.
    monkeypatch.setattr(signal, "signal", lambda *args: None)

    def run(words, *argv, verb=train.train):
        argv = [f"--{k}={v}" for item in argv for k, v in item.items()]
        monkeypatch.setattr(sys, "argv", ["verb", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runtime.main(verb, "Doc.")
        return check(end.value.code, *capfd.readouterr(), words)

    return run


@pytest.fixture
def good(workshop, tmp_path):  # noqa: F811
    """Flags of a run that would work."""
    cfg = settings(workshop, tmp_path / "run")
    names = ("preset", "run_dir", "data.train", "data.eval")
    flat = config.flatten(cfg)
    return {**{name: flat[name] for name in names}, "train.steps": 1}


@pytest.mark.once
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--rank=8", ["--rank", "Did you mean: lora.rank?", "--help"]),
        ("--lora.targets=qury", ["qury", "Did you mean: query?", "all-linear"]),
        (
            "--lora.rank=0 --lora.targets=query",
            ["--lora.rank=0", "--lora.targets=query", "--lora.rank=8"],
        ),
        (
            "--data.batch_size=8 --data.micro_batch_size=3",
            ["micro_batch_size=3", "batch_size=8", "--data.batch_size=6"],
        ),
        (
            "--data.sequence_length=0",
            ["--data.sequence_length=0", "2 tokens", "sequence_length=512"],
        ),
        ("--config=none.py", ["--config=none.py", "no such file"]),
        ("--backend=jx", ["--backend=jx", "auto, jax, tensorflow, torch"]),
    ],
)
def test_before_any_framework_loads(tmp_path, argv, words):
    command = [sys.executable, "-m", "keras_gemma_ft.train", *argv.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    check(done.returncode, done.stdout, done.stderr, words)
    assert not any(tmp_path.iterdir()), "something was written"


@pytest.mark.once
def test_a_backend_that_is_not_installed(tmp_path):
    code = (
        "import sys\n"
        "from keras_gemma_ft import runtime, train\n"
        "from keras_gemma_ft.runtime import packages\n"
        "packages.installed = lambda name: name == 'jax'\n"
        "sys.argv = ['train', '--backend=torch']\n"
        "runtime.main(train.train, 'Doc.')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    words = ["--backend=torch is not installed", "installed: jax"]
    words += ["pip install 'keras_gemma_ft[torch]'"]
    check(done.returncode, done.stdout, done.stderr, words)


RECORD = '{"prompt": "Hi", "response": "Hello"}\n'
ODD = '{"prompt": "Hi"}\n'


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("missing.jsonl", None, ["does not exist"]),
        ("tran.jsonl", None, ["does not exist", "Did you mean", "train.jsonl"]),
        ("empty.jsonl", "", ["is empty"]),
        (
            "broken.jsonl",
            RECORD * 2 + '{"prompt": \n' + RECORD,
            ["line 3", "broken JSON", "--data.bad_rows=1"],
        ),
        ("field.jsonl", RECORD + ODD + RECORD, ["line 2", "response"]),
        ("fields.jsonl", '{"q_": "Hi", "a_": "Ho"}\n', ["q_", "a_"]),
        (
            "long.jsonl",
            RECORD.replace("Hi", "Hi " * 999),
            ["answer begins after", "--data.sequence_length=64"],
        ),
        ("data.xlsx", "x", [".xlsx", ".jsonl", ".parquet"]),
    ],
)
def test_training_records(call, good, tmp_path, name, text, words):
    (tmp_path / "train.jsonl").write_text(RECORD)
    if text is not None:
        (tmp_path / name).write_text(text)
    file = str(tmp_path / name)
    if name not in ("fields.jsonl", "long.jsonl"):
        words = [*words, file]
    call(words, good, {"data.train": file, "data.sequence_length": 64})
    # A run that never began leaves nothing that a later one would trip on.
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("setting", ["data.train", "data.eval"])
def test_data_is_looked_for_before_the_weights(
    call, good, monkeypatch, setting
):
    loaded = raising(lambda: AssertionError("the weights were loaded"))
    monkeypatch.setattr(presets, "open", loaded)
    call(["no.jsonl", "does not exist"], good, {setting: "no.jsonl"})


@pytest.mark.parametrize(
    "preset, words",
    [
        ("gemma2_2b_em", ["gemma2_2b_em", "Did you mean: gemma2_2b_en"]),
        ("gemma2_2b", ["Did you mean: gemma2_2b_en", "hf://owner/name"]),
        ("no/such/folder", ["no such preset or folder", "gemma2_tiny_en"]),
        ("hf://google", ["hf://google"]),
    ],
)
def test_a_preset_that_is_none(call, good, monkeypatch, preset, words):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", raising(_not_found)
    )
    call(words, good, {"preset": preset})


def raising(make):
    def download(*args, **kwargs):
        raise make()

    return download


def _response(code):
    """What the hub's errors look at."""
    return types.SimpleNamespace(headers={}, request=None, status_code=code)


def _gated():
    return errors.GatedRepoError("403 Gated", response=_response(403))


def _not_found():
    return errors.RepositoryNotFoundError("404", response=_response(404))


def _too_many():
    return errors.HfHubHTTPError("429 Too Many", response=_response(429))


def _kaggle(code):
    def make():
        text = f"{code} Client Error. Consent required."
        return kagglehub.exceptions.KaggleApiHTTPError(
            text, response=requests.Response()
        )

    return make


@pytest.mark.parametrize(
    "error, words",
    [
        (_gated, ["GatedRepoError", *CREDENTIALS]),
        (errors.LocalTokenNotFoundError, CREDENTIALS),
        (_not_found, ["no such model, or it is private", *CREDENTIALS]),
        (_too_many, ["429"]),
        (lambda: errors.OfflineModeIsEnabled("offline"), NETWORK),
        (lambda: ConnectionError("no route"), NETWORK),
        (lambda: errors.LocalEntryNotFoundError("offline"), NETWORK),
    ],
    ids=["gated", "no token", "404", "429", "offline", "network", "cache"],
)
def test_a_hub_that_gives_nothing(call, good, monkeypatch, error, words):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    preset = "hf://google/gemma-2-2b"
    call([preset, *words], good, {"preset": preset})


@pytest.mark.parametrize(
    "error, words",
    [
        (_kaggle(403), CREDENTIALS),
        (_kaggle(401), CREDENTIALS),
        (_kaggle(429), ["429"]),
        (lambda: requests.ConnectionError("no route"), NETWORK),
        (lambda: TimeoutError("slow"), NETWORK),
        (
            lambda: kagglehub.exceptions.DataCorruptionError("md5 differs"),
            ["DataCorruptionError", "md5 differs", "again"],
        ),
    ],
    ids=["403", "401", "429", "network", "timeout", "corrupt"],
)
@pytest.mark.parametrize(
    "preset", ["gemma2_2b_en", "kaggle://keras/gemma2/keras/gemma2_2b_en/1"]
)
def test_a_kaggle_that_gives_nothing(
    call, good, monkeypatch, preset, error, words
):
    monkeypatch.setattr(kagglehub, "model_download", raising(error))
    call([preset, *words], good, {"preset": preset})


def full(kind=None):
    """A full disk as it is, or as the cause of another library's error."""
    error = OSError(errno.ENOSPC, "No space left on device")
    if kind is None:
        return error
    found = kind("cannot go on")
    found.__cause__ = error
    return found


@pytest.mark.parametrize("kind", [None, RuntimeError, ConnectionError])
def test_a_download_that_fills_the_disk(call, good, monkeypatch, kind):
    """What is wanted, what is free, and where; not what broke by it."""

    def snapshot(*args, dry_run=False, **kwargs):
        if dry_run:
            file = types.SimpleNamespace
            return [
                file(file_size=5_000, will_download=left) for left in (1, 0)
            ]
        raise full(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    preset = "hf://google/gemma-2-2b"
    words = [preset, "the disk is full", "takes 5,000 bytes", "free", "HF_HOME"]
    told = call(words, good, {"preset": preset})
    assert "no network" not in told
    failing = raising(lambda: full(kind))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    call(["the disk is full", "does not fit"], good, {"preset": preset})
    monkeypatch.setattr(kagglehub, "model_download", failing)
    words = ["the disk is full", "takes 5,228,683,776 bytes", "KAGGLEHUB_CACHE"]
    told = call(words, good, {"preset": "gemma2_2b_en"})
    assert "no network" not in told and "Fetch it again" not in told


def test_the_real_hub_in_offline_mode(call, good, monkeypatch, tmp_path):
    hub = huggingface_hub.constants
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    call(NETWORK, good, {"preset": "hf://google/gemma-2-2b"})


@pytest.fixture
def folder(workshop, tmp_path):  # noqa: F811
    """A copy of the preset, to be damaged."""
    return shutil.copytree(workshop / "preset", tmp_path / "preset")


def truncated(folder):
    file = folder / "model.weights.h5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, value):
    return lambda folder: (folder / name).write_text(value)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            without("config.json"),
            ["preset has no config.json", "It holds: assets"],
        ),
        (
            text("config.json", "{"),
            ["preset/config.json is not valid JSON", "Fetch the file again"],
        ),
        (text("config.json", "{}"), ["preset is not a Gemma 2", "config.json"]),
        (
            text("config.json", '{"model_type": "llama"}'),
            ["'llama'", "'gemma2'", "hf://google/gemma-2-2b"],
        ),
        (
            without("assets/tokenizer/vocabulary.spm"),
            ["no tokenizer", "tokenizer.model", "vocabulary.spm"],
        ),
        (
            text("assets/tokenizer/vocabulary.spm", "no model"),
            ["no SentencePiece model", "8 bytes"],
        ),
        (truncated, ["preset: a file", "truncated", "Fetch it again"]),
        (without("model.weights.h5"), ["preset: ", "model.weights.h5"]),
    ],
    ids=[
        "no config", "broken config", "empty config", "llama", "no tokenizer",
        "broken tokenizer", "truncated weights", "no weights",
    ],
)  # fmt: skip
def test_a_damaged_preset_folder(call, good, folder, damage, words):
    damage(folder)
    call(words, good, {"preset": folder})


def test_a_shard_that_is_missing(call, good, folder):
    described = json.loads((folder / "config.json").read_text())
    settings = huggingface.huggingface_config(described["config"])
    for path in folder.glob("*.*"):
        path.unlink()
    (folder / "config.json").write_text(json.dumps(settings))
    words = ["neither model.safetensors nor model.safetensors.index.json"]
    call([str(folder), *words], good, {"preset": folder})
    shards = ["model-00001-of-00002.safetensors", "missing"]
    names = {"model.norm.weight": shards[0]}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    told = call([str(folder), *shards], good, {"preset": folder})
    # Every tensor that is missing, not the first.
    assert told.count("model.layers.1.") > 5


@pytest.mark.parametrize(
    "verb", [generate.generate, evaluate.evaluate, train.train]
)
def test_an_adapter_that_is_none(call, good, tmp_path, verb):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/mine").mkdir()
    prompt = {"generate.prompt": "Hi"}

    def told(path, words):
        call(words, good, prompt, {"adapter": path}, verb=verb)

    told(tmp_path / "adapters/mime", ["no adapter at", "Did you mean", "mine"])
    told(tmp_path / "adapters/mine", ["holds no adapter", "found nothing"])
    told(good["preset"], ["holds no adapter", "name it with --preset"])
    told(good["data.train"], ["is a file", ".lora.h5"])


def test_a_run_folder_that_cannot_be_written(call, good, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file/run"
    words = [f"--run_dir={path}", "cannot be written", "--run_dir=runs/mine"]
    call(words, good, {"run_dir": path})


def test_a_run_folder_that_another_process_uses(call, good):
    with run_folder.RunFolder(good["run_dir"]).locked():
        words = [f"--run_dir={good['run_dir']}", "another process"]
        call(words, good)
    assert not (pathlib.Path(good["run_dir"]) / "config.json").exists()


@pytest.mark.once
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from keras_gemma_ft.tuning import run_folder\n"
        f"with run_folder.RunFolder({str(tmp_path)!r}).locked():\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(config.UserError, match="another process"):
            with run_folder.RunFolder(tmp_path).locked():
                pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with run_folder.RunFolder(tmp_path).locked():
        pass
