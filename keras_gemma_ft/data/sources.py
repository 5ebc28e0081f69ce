"""Where records come from: files, folders of the Hugging Face hub, the demo.

A record is a dict with string keys.
"""

import dataclasses
import difflib
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from keras_gemma_ft.config import Data, UserError
from keras_gemma_ft.data.readers import BROKEN, OPENERS, READERS, flaw, kind

SHOWN = 5
EMBEDDED = pathlib.Path(__file__).parents[1] / "embedded"
DEMO = {
    "demo": EMBEDDED / "demo_train.jsonl",
    "demo:train": EMBEDDED / "demo_train.jsonl",
    "demo:eval": EMBEDDED / "demo_eval.jsonl",
}


class Source(NamedTuple):
    """One source, found and fingerprinted, not read yet.

    Attributes:
        name: as it was typed, a glob expanded.
        path: of its file; None for a dataset of the hub.
        unit: "line" or "record", what `rows` counts.
        rows: yields (number, record, reason), as `readers` do.
        fingerprint: {"bytes", "sha256"} of its content.
    """

    name: str
    path: str | None
    unit: str
    rows: Iterable
    fingerprint: dict

    def changed(self):
        """Whether the file has changed since; a hub's dataset does not."""
        if self.path is None:
            return False
        try:
            return fingerprint(self.path) != self.fingerprint
        except OSError:
            return True


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What was read.

    Attributes:
        files: one dict per source: name, bytes, sha256, rows (usable records).
        bad: what was skipped, as "file, line 3: reason".
        places: per source, its unit ("line" or "record") and the number of
            each usable record in it.
    """

    files: tuple
    bad: tuple
    places: tuple

    def place(self, record):
        """Where record number `record` (from 0) stands: "a.jsonl, line 3"."""
        for file, (unit, numbers) in zip(self.files, self.places):
            if record < len(numbers):
                return f"{file['name']}, {unit} {numbers[record]}"
            record -= len(numbers)
        raise IndexError("no such record")


def read(spec, *, bad_rows=0):
    """Reads every record that `spec` names, in order.

    Args:
        spec: comma-separated paths, globs, `hf://dataset[:split]`,
            `hf://folder[:split]` (from `save_to_disk`), `demo`, `demo:eval`;
            or what `find` made of them, which can be read once.
        bad_rows: how many unusable records may be skipped.

    Returns:
        `(records, report)`: a list of dicts and a `SourceReport`.

    Raises:
        UserError: a source is missing, empty or unreadable, or there are more
            than `bad_rows` unusable records; the message lists them.
    """
    records, files, bad, places = [], [], [], []
    found = find(spec) if isinstance(spec, str) else spec
    for name, _, unit, rows, mark in found:
        numbers, start, before = [], len(records), len(bad)
        for number, record, reason in rows:
            if reason:
                bad.append(f"{name}, {unit} {number}: {reason}")
            else:
                records.append(record)
                numbers.append(number)
        if len(records) == start and len(bad) == before:
            raise UserError(f"{name} is empty: it holds no record.")
        files.append({"name": name, **mark, "rows": len(numbers)})
        places.append((unit, numbers))
    stop_if_bad(bad, bad_rows)
    if not records:
        told = ", ".join(source.name for source in found)
        raise UserError(f"{told}: none of its records is usable.")
    return records, SourceReport(tuple(files), tuple(bad), tuple(places))


def stop_if_bad(bad, allowed):
    """Raises UserError when more than `allowed` offenders are in `bad`."""
    if len(bad) <= allowed:
        return
    lines = [f"  {line}" for line in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    raise UserError(
        f"Unusable records: {len(bad)} (may be skipped: {allowed}).\n"
        + "\n".join(lines)
        + f"\nMend them, or skip them with --data.bad_rows={len(bad)}."
    )


def names(spec):
    """The single sources that `spec` names, globs expanded; see `read`."""
    parts = [spec] if os.path.exists(spec) else spec.split(",")
    single = []
    for part in filter(None, map(str.strip, parts)):
        path = os.path.expanduser(part)
        if part in DEMO or part.startswith("hf://") or os.path.isfile(path):
            single.append(path)
        elif glob.has_magic(path):
            found = sorted(glob.glob(path, recursive=True))
            found = [name for name in found if os.path.isfile(name)]
            if not found:
                raise UserError(f"No file matches the pattern {part}.")
            single += found
        else:
            raise UserError(_missing(path))
    if not single:
        raise UserError(
            f"data source {spec!r} names nothing. Type --data.train=demo, or "
            "a path such as --data.train=my.jsonl."
        )
    return single


def _missing(path):
    """Says why `path` is no source and what is near it."""
    kinds = " ".join(READERS)
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "state.json")):
            return f"{path} is a saved dataset: type hf://{path}."
        return (
            f"{path} is a folder. Name its files: {path.rstrip('/')}/*.jsonl "
            f"(known: {kinds}), or hf://{path} if `save_to_disk` wrote it."
        )
    if "://" in path:
        # Not the whole address: it may hold a password.
        return (
            f"{path.partition('://')[0]}://...: only files, "
            "hf://dataset[:split] and demo can be read. Download it first."
        )
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return f"{path} does not exist: there is no folder {folder}."
    near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    near = [os.path.join(folder, other) for other in near]
    hint = f" Did you mean: {', '.join(near)}?" if near else ""
    return f"{path} does not exist.{hint}"


def find(spec, data=Data()):
    """The list of `Source` that `spec` names; raises as `read` does.

    Args:
        spec: as of `read`.
        data: `config.Data`; says how a CSV is written.
    """
    return [_open(name, data) for name in names(spec)]


def fingerprint(path):
    """{"bytes", "sha256"} of a file's content."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _open(name, data):
    """`Source` of one name."""
    if name.startswith("hf://"):
        return _hub(name)
    path = DEMO.get(name, name)
    extension, compressed = kind(path)
    if extension not in READERS or (compressed and extension == ".parquet"):
        raise UserError(
            f"{name}: unknown extension "
            f"{''.join(pathlib.Path(path).suffixes[-2:])!r}. "
            f"Known: {' '.join(READERS)}, and all but Parquet compressed: "
            f"{' '.join(OPENERS)}, as in .jsonl.gz."
        )
    unit, reader = READERS[extension]
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        mark = fingerprint(path)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(
            f"{name} is UTF-16, expected UTF-8. Type: "
            f"iconv -f UTF-16 -t UTF-8 {name} > new{extension}"
        )
    return Source(name, path, unit, _whole(name, reader(path, data)), mark)


def _whole(name, rows):
    """The same rows; says what is wrong where the file cannot be read on."""
    try:
        yield from rows
    except (OSError, *BROKEN) as error:
        raise UserError(
            f"{name} cannot be read to its end: {error}. Is it complete?"
        ) from error


def _hub(name):
    """A dataset of the hub, or a local folder that `save_to_disk` wrote."""
    # datasets takes a second to import and only this source needs it.
    import datasets

    path, _, split = name.removeprefix("hf://").partition(":")
    split = split or "train"
    try:
        if os.path.isdir(path):
            dataset = datasets.load_from_disk(path)
        else:
            owner, _, rest = path.partition("/")
            repo, _, config = rest.partition("/")
            dataset = datasets.load_dataset(
                f"{owner}/{repo}" if repo else owner, config or None
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_hub_message(name, path, error)) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            known = ", ".join(f"hf://{path}:{key}" for key in dataset)
            raise UserError(f"{name}: no split {split!r}. Type one of {known}.")
        dataset = dataset[split]
    digest, size = hashlib.sha256(), 0
    for record in dataset:
        line = json.dumps(record, sort_keys=True, default=str).encode()
        digest.update(line)
        size += len(line)
    rows = ((i, record, flaw(record)) for i, record in enumerate(dataset, 1))
    mark = {"bytes": size, "sha256": digest.hexdigest()}
    return Source(name, None, "record", rows, mark)


def _hub_message(name, path, error):
    """What happened at the hub, and the cure."""
    text = f"{type(error).__name__}: {error}"
    if os.path.isdir(path):
        cure = "It must be a folder that `Dataset.save_to_disk` wrote."
    elif "gated" in text.lower():
        cure = (
            f"Accept its terms at https://huggingface.co/datasets/{path}, "
            "then type: hf auth login"
        )
    elif "Config name is missing" in text:
        cure = f"Name one of its configurations: hf://{path}/CONFIG:train"
    elif "Offline" in text:
        cure = (
            "Offline mode is on (HF_HUB_OFFLINE) and no copy is in the "
            "cache. Unset it, or name a folder that `save_to_disk` wrote."
        )
    elif isinstance(error, ConnectionError):
        cure = (
            "The hub cannot be reached. Check the network, or name a local "
            "file or a folder that `save_to_disk` wrote: hf://FOLDER"
        )
    else:
        cure = "Check the name (hf://owner/dataset[:split]) and your login."
    return f"{name} cannot be read. {text}\n{cure}"
