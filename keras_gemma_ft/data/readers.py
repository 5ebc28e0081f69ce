"""Files -> records: JSON lines, JSON, CSV, TSV, Parquet, plain text.

A reader yields (number, record, reason); reason is None when the record can be
used. Files are split at b"\\n" alone: U+0085, U+2028 and the like are ordinary
characters inside a line. CSV goes through Python's own reader, which keeps each
cell as the text it is ("007", "NA"); guessing column types would change it.
A file may be compressed: `.jsonl.gz`, `.csv.zst`, `.json.xz`, ...
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import pathlib
import re
import zlib

from keras_gemma_ft.config import Data, UserError
from keras_gemma_ft.data import shapes

# A longer line is a missing newline far more often than a record.
MAX_LINE_BYTES = 16 * 2**20


def _zst(path):
    # The one library that is here for Parquet anyway; it takes a second.
    import pyarrow

    # Alone, it reads no lines.
    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zst}
# Of a broken or cut file; gzip and pyarrow raise OSError.
BROKEN = (EOFError, lzma.LZMAError, zlib.error)


def kind(path):
    """`(extension, opener)` of a path: ".jsonl" for a.jsonl and a.jsonl.gz."""
    path = pathlib.Path(path)
    opener = OPENERS.get(path.suffix.lower())
    if opener:
        path = path.with_suffix("")
    return path.suffix.lower(), opener


def open_bytes(path):
    """A file for reading bytes, which are what it held before compression."""
    _, opener = kind(path)
    return opener(path) if opener else open(path, "rb")


def read_bytes(path):
    """All of a file, without a byte order mark."""
    with open_bytes(path) as file:
        return file.read().removeprefix(b"\xef\xbb\xbf")


def flaw(record):
    """Why `record` cannot be used, or None."""
    if not isinstance(record, dict):
        return f"expected an object {{...}}, got {_kind(record)}"
    if not record:
        return "the record is empty"
    for field, value in record.items():
        reason = _text_flaw(value)
        if reason:
            return f"field {field!r} {reason}"
    return None


def _text_flaw(value):
    if isinstance(value, str):
        if "\0" in value:
            return "holds a NUL character"
        if re.search("[\ud800-\udfff]", value):
            return "holds invalid UTF-8 (or half of a surrogate pair)"
    elif isinstance(value, (list, tuple)):
        return next(filter(None, map(_text_flaw, value)), None)
    elif isinstance(value, dict):
        return _text_flaw(list(value.values()))
    return None


def _kind(value):
    names = {dict: "an object", list: "a list", str: "a string"}
    names |= {int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a value")


def _parse(line):
    """One line of JSON: `(record, reason)`."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
        return record, flaw(record)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return None, f"invalid UTF-8: byte 0x{byte:02x} at {error.start + 1}"
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        return None, f"broken JSON: {what} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return None, f"broken JSON: {error}"


def _lines(path):
    """Yields `(number, line, size)`; line is None when it is too long."""
    with open_bytes(path) as file:
        number = 0
        while line := _line(file):
            number, size, rest = number + 1, len(line), line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = _line(file)
                size += len(rest)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line if size <= MAX_LINE_BYTES else None, size


def _line(file):
    return file.readline(MAX_LINE_BYTES + 1)


def _long(size):
    return f"a line of {size / 1e6:.1f} MB (limit {MAX_LINE_BYTES / 1e6:.1f})"


def _jsonl(path, data=Data()):
    for number, line, size in _lines(path):
        if line is None:
            yield number, None, _long(size)
        elif number == 1 and line.strip() in (b"[", b"{"):
            raise UserError(
                f"{path} is one JSON document over many lines, expected one "
                "record per line. Rename it to end in .json."
            )
        elif line.strip():
            yield number, *_parse(line)


def _json(path, data=Data()):
    """One document, see `shapes.records`; lines of objects also pass."""
    text = read_bytes(path)
    try:
        document = json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
        elif text.strip():
            where = f"line {error.lineno}, column {error.colno}"
            raise UserError(
                f"{path}, {where}: broken JSON: {error.msg}"
            ) from error
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    records = shapes.records(document, path)
    for number, record in enumerate(records, start=1):
        yield number, record, flaw(record)


def _csv(path, data=Data(), auto=""):
    # Its own limit is 128 Kbyte a cell, less than one long document.
    csv.field_size_limit(MAX_LINE_BYTES)
    known = {"tab": "\t", "auto": auto}
    delimiter = known.get(data.delimiter, data.delimiter) or _delimiter(path)
    # A strict reader sees a quote that is never closed.
    rows = csv.reader(_cells(path), delimiter=delimiter, strict=True)
    named = [name.strip() for name in filter(None, data.columns.split(","))]
    try:
        header = named or next(rows, [])
        _check_header(header, path)
        for row in rows:
            reason = None
            if len(row) != len(header):
                reason = f"{len(row)} cells, but the header has {len(header)}"
            record = dict(zip(header, row))
            if row:
                yield rows.line_num, record, reason or flaw(record)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error


def _check_header(header, path):
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: two columns are called {twice[0]!r}, and one would hide "
            "the other. Rename one, or name them all: --data.columns=..."
        )


# What separates cells, the likeliest first.
_DELIMITERS = ",;\t|"
_SNIFFED = 20


def _delimiter(path):
    """The first that parts all of the first lines into as many cells.

    A comma where none parts them into two or more.
    """
    lines = list(itertools.islice(_cells(path), _SNIFFED))
    for delimiter in _DELIMITERS:
        rows = csv.reader(lines, delimiter=delimiter)
        try:
            counts = {len(row) for row in rows if row}
        except csv.Error:
            continue
        if len(counts) == 1 and counts != {1}:
            return delimiter
    # Rows differ, which will be told: by the header's own delimiter.
    header = lines[0] if lines else ""
    return max(_DELIMITERS, key=lambda each: (header.count(each), each == ","))


def _cells(path):
    """Lines as text; a byte that is no UTF-8 becomes half a surrogate."""
    for number, line, size in _lines(path):
        if line is None:
            raise UserError(f"{path}, line {number}: {_long(size)}")
        yield line.decode("utf-8", "surrogateescape")


def _tsv(path, data=Data()):
    return _csv(path, data, auto="\t")


def _txt(path, data=Data()):
    text = read_bytes(path)
    if not text.strip():
        return
    record = {"text": text.decode("utf-8", "surrogateescape")}
    yield 1, record, flaw(record)


def _parquet(path, data=Data()):
    # pyarrow takes a second to import and most runs read JSON lines.
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            rows = batch.to_pylist()
            for number, record in enumerate(rows, number + 1):  # noqa: B020
                yield number, record, flaw(record)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file: {error}") from error


READERS = {
    ".jsonl": ("line", _jsonl),
    ".json": ("record", _json),
    ".csv": ("line", _csv),
    ".tsv": ("line", _tsv),
    ".parquet": ("record", _parquet),
    ".txt": ("record", _txt),
}
