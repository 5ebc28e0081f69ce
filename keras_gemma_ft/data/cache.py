"""Prepared data on disk: made once, then mapped into memory.

`FOLDER/<key>/` holds `<name>.npy`, `facts.json` and `sums.json`, the CRC-32 of
each of them. The key is a hash of all that decides the content, this package's
own source included, so an entry is never out of date: it is found or it is not.
Nothing here is needed: whatever goes wrong is told, and the data made anew.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys
import time
import uuid
import zlib

import numpy as np

from keras_gemma_ft import config
from keras_gemma_ft.data import examples
from keras_gemma_ft.data.prepared import Origin

# Of `config.Data`: what names the sources, which are hashed themselves, and
# what is decided when batches are made.
_FREE = (
    "train", "eval", "cache", "buckets", "batch_size", "micro_batch_size"
)  # fmt: skip
# Whose release may change a token, a record or the order of the rows.
_PACKAGES = ("numpy", "sentencepiece", "jinja2", "pyarrow", "datasets")
# What a killed process leaves, and the age at which it goes: a day, in s.
_PARTIAL, _STALE = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}"), 86400


def folder(setting):
    """The folder that `--data.cache` names; None where nothing is kept."""
    if setting == "none":
        return None
    if setting != "auto":
        return pathlib.Path(setting).expanduser()
    return config.cache_folder("data")


def key(found, data, tokenizer, split, seed):
    """Hash of all that decides what `pipeline.prepare` makes.

    A dataset of the hub has no bytes of its own here: its fingerprint is of
    every record, so that reading and hashing it is paid each time and only
    the tokenising and packing are saved. Its name alone would not do: what the
    hub holds under it changes.

    Args:
        found: what `sources.find` made of the split's sources.
        data, tokenizer, split, seed: as `pipeline.prepare`.
    """
    settings = dataclasses.asdict(data)
    share = examples.share(data)
    template = pathlib.Path(data.template)
    own = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    versions = {"python": list(sys.version_info[:2])}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    told = {
        "sources": [[source.name, source.fingerprint] for source in found],
        "settings": {k: v for k, v in settings.items() if k not in _FREE},
        "template": _digest([template] if template.is_file() else []),
        "tokenizer": tokenizer.fingerprint,
        "split": split,
        "share": share,
        "seed": seed if data.pack or share is not None else None,
        "code": _digest(own),
        "versions": versions,
    }
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def through(entry, make, changed=lambda: False):
    """What `make` gives, from the cache where it is there.

    Args:
        entry: `folder(...) / key(...)`; None makes and keeps nothing.
        make: function that gives (arrays, facts): a dict of arrays, and what
            JSON can hold.
        changed: whether the sources have changed while `make` read them: then
            what it gave is not of the key.

    Returns:
        (arrays, facts, `Origin`): equal, whether they were read or made;
        arrays that were read are mapped from the file, read-only.
    """
    began = time.perf_counter()
    notes = []
    if entry is not None:
        try:
            loaded = _load(entry)
        except (OSError, ValueError, TypeError) as error:
            notes.append(f"{entry} is damaged ({error}): made anew")
            _discard(entry)
        else:
            if loaded:
                return *loaded, Origin(True, time.perf_counter() - began)
    arrays, facts = make()
    seconds = time.perf_counter() - began
    if entry is not None:
        try:
            if changed():
                notes.append("a source changed while it was read: not cached")
            else:
                _store(entry, arrays, facts)
        except OSError as error:
            reason = error.strerror or error
            notes.append(
                f"the cache {entry.parent} cannot be written ({reason}); "
                f"--data.cache=FOLDER names another, none does without"
            )
    return arrays, facts, Origin(False, seconds, "; ".join(notes))


def _load(entry):
    """(arrays, facts); None where there is no entry; raises if damaged."""
    if not entry.exists():
        return None
    sums = dict(json.loads((entry / "sums.json").read_text()))
    for name, wanted in sums.items():
        if _sum(entry / name) != wanted:
            raise ValueError(f"{name} is not what was written")
    arrays = {
        # asarray: a slice of a memmap itself costs 1.4 us, not 0.4.
        name.removesuffix(".npy"): np.asarray(
            np.load(entry / name, mmap_mode="r")
        )
        for name in sums
        if name.endswith(".npy")
    }
    return arrays, json.loads((entry / "facts.json").read_text("utf-8"))


def _sum(path):
    return zlib.crc32(np.memmap(path, "uint8", "r"))


def _store(entry, arrays, facts):
    """Writes an entry: complete or absent, whoever else writes it too.

    `formats.atomic` has one name for what is half written, of one process;
    and nothing is synced here: after a power cut the sums tell.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    for old in filter(_PARTIAL.fullmatch, os.listdir(entry.parent)):
        with contextlib.suppress(OSError):
            if time.time() - (entry.parent / old).stat().st_mtime > _STALE:
                shutil.rmtree(entry.parent / old)
    partial = _aside(entry)
    try:
        partial.mkdir()
        for name, array in arrays.items():
            _save(partial / f"{name}.npy", array)
        (partial / "facts.json").write_text(json.dumps(facts), "utf-8")
        sums = {p.name: _sum(p) for p in sorted(partial.iterdir())}
        (partial / "sums.json").write_text(json.dumps(sums))
        try:
            os.rename(partial, entry)
        except OSError:
            # Another process may have been faster, with the same content.
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(path, array):
    """`np.save`, which on a full disk loses the end of a file in silence."""
    layout = np.lib.format
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        told = layout.header_data_from_array_1_0(array)
        layout.write_array_header_1_0(file, told)
        file.write(array.data.cast("B") if array.size else b"")


def _aside(entry):
    """A sibling of `entry` that no other process uses."""
    return entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}")


def _discard(entry):
    """Takes a damaged entry away, at once for whoever looks."""
    with contextlib.suppress(OSError):
        aside = _aside(entry)
        os.rename(entry, aside)
        shutil.rmtree(aside, ignore_errors=True)
