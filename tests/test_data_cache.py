"""The cache of prepared data: found, made anew, done without; never wrong."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from test_data_pipeline import batches, flat, settings
from test_data_tokens import train_vocabulary

from keras_gemma_ft import config, embedded
from keras_gemma_ft.data import cache, examples, pipeline, sources, tokens

RECORDS = [
    {"prompt": f"{i} the fox", "response": "four " * (i % 7 + 1) + "é\u2028"}
    for i in range(30)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.Tokenizer(train_vocabulary())


@pytest.fixture
def train(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def prepare(train, folder, tokenizer):
    """Function of settings: `Prepared`, through the cache in `folder`."""

    def run(path=train, split="train", seed=0, tokenizer=tokenizer, **kwargs):
        data = settings(path, **{"cache": str(folder), **kwargs})
        return pipeline.prepare(data, tokenizer, split, seed)

    return run


def arrays(prepared):
    return {
        field.name: getattr(prepared, field.name)
        for field in dataclasses.fields(prepared)
        if isinstance(getattr(prepared, field.name), np.ndarray)
    }


def assert_same(one, other):
    """Everything but how it came about, to the bit and the type."""
    mine, theirs = arrays(one), arrays(other)
    assert mine.keys() == theirs.keys() and len(mine) == 14
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert one.report == other.report
    assert (one.pad, list(one.rows[0])) == (other.pad, list(other.rows[0]))
    for a, b in zip(one.prompts, other.prompts, strict=True):
        np.testing.assert_array_equal(a.prompt_ids, b.prompt_ids)
        assert a.reference == b.reference
    for a, b in zip(batches(one), batches(other), strict=True):
        np.testing.assert_array_equal(flat(a), flat(b))


def entries(folder):
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "kwargs", [{}, {"pack": False}, {"eval": "20%"}, {"bad_rows": 3}]
)
def test_what_is_read_is_what_was_made(prepare, train, folder, kwargs):
    with open(train, "a") as file:
        file.write('{"prompt": "no answer", "response": ""}\n')
        file.write("{broken\n" * (kwargs.get("bad_rows", 0) // 2))
    plain = prepare(cache="none", **kwargs)
    assert not plain.origin.cached and not folder.exists()
    made = prepare(**kwargs)
    [entry] = entries(folder)
    read = prepare(**kwargs)
    assert [p.origin.cached for p in (made, read)] == [False, True]
    assert made.origin.note == read.origin.note == ""
    assert read.origin.seconds > 0
    assert_same(made, plain)
    assert_same(read, plain)
    assert len(read.report["skipped"]) == kwargs.get("bad_rows", 0) // 2
    # Its own words, through bytes and back.
    wanted = {record["response"].strip() for record in RECORDS}
    assert {p.reference for p in read.prompts} == wanted
    # Mapped from the file, not read into memory, and not to be written.
    for name in ("token_ids", "learn", "members", "prompt_ids", "answers"):
        array = getattr(read, name)
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
        assert pathlib.Path(array.base.filename) == entry / f"{name}.npy"


def test_text_has_no_prompts(tmp_path, prepare):
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox " * 40)
    made, read = prepare(path), prepare(path)
    assert read.origin.cached and len(read.prompts) == 0
    assert_same(read, made)


def test_a_saved_dataset_is_kept_by_its_records(tmp_path, prepare):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "saved"
    spec = f"hf://{path}"
    datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    made, read = prepare(spec), prepare(spec)
    assert (made.origin.cached, read.origin.cached) == (False, True)
    assert_same(read, made)
    other = datasets.Dataset.from_list(RECORDS[1:])
    other.save_to_disk(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "gone")
    path.rename(tmp_path / "old")
    (tmp_path / "gone").rename(path)
    changed = prepare(spec)
    assert not changed.origin.cached and changed.report["records"] == 29


@pytest.mark.parametrize(
    "change",
    [
        {"format": "prompt_response"},
        {"sequence_length": 95},
        {"pack": False},
        {"bad_rows": 1},
        {"template": "{prompt} -> {response}"},
        {"eval": "10%"},
        {"seed": 1},
        {"prompt_field": "response", "response_field": "prompt"},
    ],
)
def test_what_matters_is_part_of_the_key(prepare, folder, change):
    prepare()
    assert not prepare(**change).origin.cached
    assert len(entries(folder)) == 2
    assert prepare(**change).origin.cached and prepare().origin.cached


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 8, "micro_batch_size": 2},
        {"buckets": 2, "pack": False},
        {"seed": 1, "pack": False},
    ],
)
def test_what_does_not_matter_is_not(prepare, change):
    prepare(pack=change.get("pack", True))
    assert prepare(**change).origin.cached


def test_both_splits_of_one_file(prepare, folder):
    made = [prepare(split=s, eval="20%") for s in ("train", "eval")]
    read = [prepare(split=s, eval="20%") for s in ("train", "eval")]
    assert len(entries(folder)) == 2
    for one, other in zip(made, read):
        assert other.origin.cached and other.report == one.report
    assert [p.report["kept"] for p in read] == [24, 6]


def test_content_is_part_of_the_key(prepare, train, tmp_path):
    template = tmp_path / "chat.jinja"
    body = "{%% for m in messages %%}%s{{ m.content }}{%% endfor %%}"
    template.write_text(body % "")
    first = prepare(template=str(template))
    assert prepare(template=str(template)).origin.cached
    template.write_text(body % "x")
    again = prepare(template=str(template))
    assert not again.origin.cached
    assert again.report["tokens"] > first.report["tokens"]
    prepare()
    stamp = train.stat()
    text = train.read_text("utf-8")
    # Same length, same time: only the content tells.
    train.write_text(text.replace("four", "five"), "utf-8")
    os.utime(train, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert not prepare().origin.cached
    train.write_text(text, "utf-8")
    assert prepare().origin.cached
    vocabulary = embedded.preset_folder() / "assets/tokenizer/vocabulary.spm"
    other = tokens.Tokenizer(vocabulary.read_bytes())
    assert not prepare(tokenizer=other).origin.cached


def test_code_is_part_of_the_key(prepare, tmp_path, monkeypatch):
    prepare()
    own = pathlib.Path(cache.__file__).parent
    assert {p.name for p in own.glob("*.py")} > {"tokens.py", "packing.py"}
    copy = tmp_path / "data"
    copy.mkdir()
    for path in own.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cache, "__file__", str(copy / "cache.py"))
    assert prepare().origin.cached
    with open(copy / "packing.py", "a") as file:
        file.write("# changed\n")
    assert not prepare().origin.cached
    version = cache.importlib.metadata.version
    monkeypatch.setattr(
        cache.importlib.metadata,
        "version",
        lambda name: "0" if name == "sentencepiece" else version(name),
    )
    assert not prepare().origin.cached


FILES = (
    "token_ids.npy", "starts.npy", "answers.npy", "facts.json", "sums.json"
)  # fmt: skip
DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-3]
        + bytes([path.read_bytes()[-3] ^ 4])
        + path.read_bytes()[-2:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_entry_is_made_anew(prepare, folder, name, damage):
    whole = prepare()
    [entry] = entries(folder)
    DAMAGE[damage](entry / name)
    again = prepare()
    assert not again.origin.cached
    assert f"{entry} is damaged (" in again.origin.note
    assert_same(again, whole)
    assert entries(folder) == [entry]
    mended = prepare()
    assert mended.origin.cached and not mended.origin.note
    assert_same(mended, whole)


def test_what_a_killed_process_left_is_no_entry(prepare, folder):
    whole = prepare()
    [entry] = entries(folder)
    stale, fresh = (folder / f".{entry.name}.{mark * 8}" for mark in ("a", "b"))
    for path in (stale, fresh):
        path.mkdir()
        (path / "token_ids.npy").write_bytes(b"half")
    os.utime(stale, (0, 0))
    # Nobody else's: whatever the folder holds besides stays.
    (folder / ".ssh").mkdir()
    os.utime(folder / ".ssh", (0, 0))
    assert_same(prepare(), whole)
    prepare(seed=1)
    assert not stale.exists() and fresh.exists() and (folder / ".ssh").exists()


@pytest.mark.parametrize("kind", ["a file", "under a file", "read-only"])
def test_without_a_place_there_is_no_cache(prepare, tmp_path, kind):
    path = tmp_path / "place"
    path.write_text("mine")
    where = {
        "a file": path,
        "under a file": path / "below",
        # There not even root makes a folder.
        "read-only": pathlib.Path("/proc/kept"),
    }[kind]
    found = prepare(cache=str(where))
    assert_same(found, prepare(cache="none"))
    assert f"the cache {where} cannot be written (" in found.origin.note
    assert "--data.cache=FOLDER" in found.origin.note
    assert path.read_text() == "mine"


@pytest.mark.parametrize("at", [0, 3, 11])
def test_a_full_disk_costs_only_the_cache(prepare, folder, monkeypatch, at):
    saved, count = cache._save, iter(range(99))

    def save(path, array):
        if next(count) == at:
            pathlib.Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(path, array)

    monkeypatch.setattr(cache, "_save", save)
    found = prepare()
    assert "(No space left on device)" in found.origin.note
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    assert_same(found, prepare(cache="none"))


def test_a_source_that_changes_while_it_is_read_is_not_kept(
    prepare, train, folder, monkeypatch
):
    build = examples.build

    def meanwhile(*args):
        found = build(*args)
        with open(train, "a") as file:
            file.write(json.dumps(RECORDS[0]) + "\n")
        return found

    monkeypatch.setattr(examples, "build", meanwhile)
    found = prepare()
    assert found.report["records"] == 30 and not folder.exists()
    assert "changed while it was read" in found.origin.note
    monkeypatch.setattr(sources.Source, "changed", lambda self: False)
    train.unlink()
    with pytest.raises(config.UserError, match="does not exist"):
        prepare()


def test_two_processes_write_at_once(prepare, folder, train, tmp_path):
    """Both get their data, and one whole entry is left."""
    vocabulary = tmp_path / "vocabulary.spm"
    vocabulary.write_bytes(train_vocabulary())
    script = (
        "import os, pathlib, sys, time\n"
        "from keras_gemma_ft.config import Data\n"
        "from keras_gemma_ft.data import cache, pipeline, tokens\n"
        "path, folder, vocabulary, go = sys.argv[1:]\n"
        "tokenizer = tokens.Tokenizer(pathlib.Path(vocabulary).read_bytes())\n"
        "store = cache._store\n"
        "def late(*args):\n"
        "    print('ready', flush=True)\n"
        "    while not os.path.exists(go): time.sleep(0.005)\n"
        "    store(*args)\n"
        "cache._store = late\n"
        "data = Data(path, eval='none', sequence_length=96, cache=folder)\n"
        "found = pipeline.prepare(data, tokenizer, 'train', 0)\n"
        "assert not found.origin.cached and not found.origin.note\n"
        "print(int(found.token_ids.sum()))\n"
    )
    go = tmp_path / "go"
    argv = [sys.executable, "-c", script, train, folder, vocabulary, go]
    running = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    told = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert len(entries(folder)) == 1
    found = prepare(batch_size=8)
    assert found.origin.cached
    assert told == [f"{found.token_ids.sum()}\n"] * 2


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder("auto") == tmp_path / "keras_gemma_ft" / "data"
    for nothing in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        want = tmp_path / "home/.cache/keras_gemma_ft/data"
        assert cache.folder("auto") == want
    assert cache.folder("none") is None
    assert cache.folder("~/mine") == tmp_path / "home/mine"
    assert cache.folder("here") == pathlib.Path("here")
