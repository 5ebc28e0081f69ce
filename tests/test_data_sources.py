"""Reading records: good files, every fault, and what is said about it."""

import csv
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from keras_gemma_ft.config import UserError
from keras_gemma_ft.data import sources

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
GOOD = {"prompt": "p", "response": "r"}


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip("shared data is absent")
    return path


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def lines(*records):
    """Records as JSON lines; bytes stand for themselves."""
    return b"".join(
        record
        if isinstance(record, bytes)
        else json.dumps(record).encode() + b"\n"
        for record in records
    )


def refusal(spec, **kwargs):
    with pytest.raises(UserError) as caught:
        sources.read(spec, **kwargs)
    return str(caught.value)


def test_jsonl_and_its_fingerprint(write):
    content = b"\xef\xbb\xbf" + lines(GOOD, b"\r\n", b"\n", {"a": 1})
    path = write("a.jsonl", content)
    records, report = sources.read(path)
    assert records == [GOOD, {"a": 1}]
    assert report.files == (
        {
            "name": path,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "rows": 2,
        },
    )
    assert report.place(1) == f"{path}, line 4"


@pytest.mark.parametrize("odd", ["\u0085", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_only_newlines_end_a_line(write, odd):
    record = {"prompt": f"a{odd}b", "response": "c"}
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    if odd < " ":  # JSON wants these escaped; a raw one is a broken row.
        line = lines(record)
    records, _ = sources.read(write("a.jsonl", line + lines(GOOD)))
    assert records == [record, GOOD]


BAD_LINES = {
    "truncated": (b'{"prompt": "a", "resp\n', "broken JSON: Unterminated"),
    "comma": (b'{"a": "b" "c": 1}\n', "Expecting ',' delimiter at column 11"),
    "list": (b"[1, 2]\n", "expected an object {...}, got a list"),
    "number": (b"3\n", "expected an object {...}, got a number"),
    "null": (b"null\n", "expected an object {...}, got null"),
    "empty": (b"{}\n", "the record is empty"),
    "latin1": (b'{"a": "caf\xe9"}\n', "invalid UTF-8: byte 0xe9 at 11"),
    "nul": (b'{"a": "b\\u0000"}\n', "field 'a' holds a NUL"),
    "raw nul": (b'{"a": "b\x00"}\n', "broken JSON: Invalid control char"),
    "surrogate": (b'{"a": ["\\ud83d"]}\n', "field 'a' holds invalid UTF-8"),
    "deep": (b"[" * 100_000 + b"\n", "broken JSON: "),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line(write, kind):
    line, reason = BAD_LINES[kind]
    path = write("a.jsonl", lines(GOOD, GOOD, line, GOOD))
    message = refusal(path)
    assert f"{path}, line 3: " in message and reason in message
    assert "--data.bad_rows=1" in message
    records, report = sources.read(path, bad_rows=1)
    assert records == [GOOD] * 3
    assert report.bad == (message.splitlines()[1].strip(),)
    assert report.place(2) == f"{path}, line 4"


def test_line_of_50_megabytes(write):
    long = b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n'
    path = write("a.jsonl", lines(GOOD, long, GOOD))
    assert f"{path}, line 2: a line of 50.0 MB (limit 16.8)" in refusal(path)
    records, report = sources.read(path, bad_rows=1)
    assert records == [GOOD, GOOD] and report.place(1) == f"{path}, line 3"


def test_all_offenders_are_counted_and_five_shown(write):
    broken = write("a.jsonl", b"{\n}\n")
    assert "Rename it to end in .json" in refusal(broken)
    first = write("a.jsonl", lines(GOOD, *[b"x\n"] * 3))
    second = write("b.jsonl", lines(GOOD, *[b"y\n"] * 4))
    message = refusal(f"{first},{second}", bad_rows=6)
    assert message.startswith("Unusable records: 7 (may be skipped: 6).")
    assert message.count("broken JSON") == 5 and "and 2 more" in message
    assert f"{second}, line 3" in message
    records, report = sources.read(f"{first},{second}", bad_rows=7)
    assert records == [GOOD, GOOD] and len(report.bad) == 7
    assert report.place(1) == f"{second}, line 1"


def test_json_array_object_and_lines(write):
    array = write("a.json", json.dumps([GOOD, {"a": 1}], indent=2))
    assert sources.read(array)[0] == [GOOD, {"a": 1}]
    one = write("b.json", json.dumps(GOOD, indent=1))
    assert sources.read(one)[0] == [GOOD]
    assert sources.read(write("c.json", lines(GOOD, GOOD)))[0] == [GOOD, GOOD]
    bad = write("d.json", json.dumps([GOOD, "text", GOOD]))
    assert f"{bad}, record 2: expected an object" in refusal(bad)


def test_json_cut_off(write):
    path = write("a.json", json.dumps([GOOD] * 9, indent=2)[:100])
    message = refusal(path)
    assert message.startswith(f"{path}, line ") and "broken JSON" in message


def test_csv_cells_stay_as_they_are(write):
    path = write("a.csv", 'Q,A\r\n007,NA\r\n"a,\n""b""",null\r\n\u0085 c,\r\n')
    records, report = sources.read(path)
    assert records == [
        {"Q": "007", "A": "NA"},
        {"Q": 'a,\n"b"', "A": "null"},
        {"Q": "\u0085 c", "A": ""},
    ]
    assert [report.place(i)[-6:] for i in range(3)] == [
        "line 2", "line 4", "line 5"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row, reason",
    [
        (b"a\n", "1 cells, but the header has 2"),
        (b"a,b,c\n", "3 cells, but the header has 2"),
        (b"a,\xff\n", "field 'A' holds invalid UTF-8"),
        (b"a,\0\n", "field 'A' holds a NUL"),
    ],
)
def test_csv_bad_row(write, row, reason):
    path = write("a.csv", b"Q,A\nx,y\n" + row + b"z,w\n")
    assert f"{path}, line 3: {reason}" in refusal(path)
    assert len(sources.read(path, bad_rows=1)[0]) == 2


def test_csv_quote_never_closed(write):
    path = write("a.csv", 'Q,A\nx,"y\nz,w\n')
    assert f"{path}, line 3: unexpected end of data" in refusal(path)


def test_tsv_and_txt(write):
    tsv = write("a.tsv", "Q\tA\nx, y\tz\n")
    assert sources.read(tsv)[0] == [{"Q": "x, y", "A": "z"}]
    txt = write("a.txt", "one\n\ntwo\u0085\n")
    assert sources.read(txt)[0] == [{"text": "one\n\ntwo\u0085\n"}]
    assert "invalid UTF-8" in refusal(write("b.txt", b"caf\xe9"))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    rows = [GOOD, {"prompt": "q\u0085", "response": "s"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert sources.read(path)[0] == rows
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no PAR1")
    assert "no Parquet" in refusal(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_file(write, name):
    path = write(name, b" \n" if name != "a.csv" else b"Q,A\n")
    assert refusal(path) == f"{path} is empty: it holds no record."
    assert "is empty" in refusal(write(name, b""))


def test_utf16(write):
    path = write("a.csv", "Q,A\nx,y\n".encode("utf-16"))
    assert "iconv -f UTF-16" in refusal(path)


def test_missing_file(write, tmp_path):
    path = write("train.jsonl", lines(GOOD))
    wrong = str(tmp_path / "trian.jsonl")
    assert f"{wrong} does not exist. Did you mean: {path}?" in refusal(wrong)
    assert "there is no folder" in refusal(str(tmp_path / "no" / "a.jsonl"))


def test_pattern(write, tmp_path):
    write("a.jsonl", lines({"n": 2}))
    write("b.jsonl", lines({"n": 3}))
    write("[c].jsonl", lines({"n": 1}))
    found, report = sources.read(f"{tmp_path}/*.jsonl")
    assert [record["n"] for record in found] == [1, 2, 3]
    assert [file["rows"] for file in report.files] == [1, 1, 1]
    assert sources.read(f"{tmp_path}/[c].jsonl")[0] == [{"n": 1}]
    assert "No file matches the pattern" in refusal(f"{tmp_path}/*.csv")


def test_unknown_extension_folder_address(write, tmp_path):
    message = refusal(write("a.docx", b"x"))
    assert "unknown extension '.docx'" in message and ".jsonl" in message
    assert "is a folder" in refusal(str(tmp_path))
    message = refusal("https://user:secret@host/a.jsonl")
    assert "Download it first" in message and "secret" not in message
    assert "--data.train=demo" in refusal(" , ")


def test_demo_has_two_disjoint_halves():
    if not sources.DEMO["demo"].exists():
        pytest.skip("the embedded demo is not there")
    train, report = sources.read("demo")
    held_out, _ = sources.read("demo:eval")
    assert report.files[0]["name"] == "demo"
    texts = {json.dumps(record) for record in train}
    assert not texts & {json.dumps(record) for record in held_out}


def test_folder_of_save_to_disk(tmp_path):
    import datasets

    rows = [{"prompt": "p\u0085", "response": str(i)} for i in range(3)]
    splits = {"train": datasets.Dataset.from_list(rows)}
    splits["test"] = datasets.Dataset.from_list(rows[:1])
    folder = str(tmp_path / "saved")
    datasets.DatasetDict(splits).save_to_disk(folder)
    records, report = sources.read(f"hf://{folder}")
    assert records == rows and report.files[0]["rows"] == 3
    assert sources.read(f"hf://{folder}:test")[0] == rows[:1]
    assert f"hf://{folder}:test" in refusal(f"hf://{folder}:dev")
    splits["train"].save_to_disk(str(tmp_path / "one"))
    assert sources.read(f"hf://{tmp_path / 'one'}")[0] == rows
    assert "type hf://" in refusal(str(tmp_path / "one"))


def test_hub_offline():
    # A process of its own: the library reads the variable when imported.
    code = (
        "from keras_gemma_ft.data import sources\n"
        "try: sources.read('hf://nobody/nothing:train')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.perf_counter() - start < 30
    assert done.stdout.startswith("UserError hf://nobody/nothing:train cannot")
    assert "Offline mode is on (HF_HUB_OFFLINE)" in done.stdout


@pytest.mark.parametrize(
    "text, cure",
    [
        ("Dataset 'a/b' is a gated dataset on the Hub.", "hf auth login"),
        ("Dataset 'a/b' doesn't exist on the Hub", "Check the name"),
        ("Config name is missing. Pick one", "hf://a/b/CONFIG:train"),
    ],
)
def test_hub_refuses(monkeypatch, text, cure):
    import datasets

    def load_dataset(*_):
        raise datasets.exceptions.DatasetNotFoundError(text)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("hf://a/b")
    assert text in message and cure in message


@pytest.mark.parametrize(
    "name, rows",
    [
        ("gsm8k/train.jsonl", 7473),
        ("rasbt_instruct/instruction-data.json", 1100),
        ("oasst1_en/chat_all.jsonl", 899),
        ("korean_chatbot/ChatbotData.csv", 11823),
        ("gemma_cookbook/emoji_translation.csv", 2529),
        ("llamafactory_demos/glaive_toolcall_en_demo.json", 300),
    ],
)
def test_real_file(name, rows):
    path = shared(name)
    records, report = sources.read(str(path))
    assert len(records) == report.files[0]["rows"] == rows
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            assert records == list(csv.DictReader(file))
    elif path.suffix == ".json":
        assert records == json.loads(path.read_text(encoding="utf-8"))
