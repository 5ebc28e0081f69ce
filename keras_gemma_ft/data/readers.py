"""Files -> records: JSON lines, JSON, CSV, TSV, Parquet, plain text.

A reader yields (number, record, reason); reason is None when the record can be
used. Files are split at b"\\n" alone: U+0085, U+2028 and the like are ordinary
characters inside a line. CSV goes through Python's own reader, which keeps each
cell as the text it is ("007", "NA"); guessing column types would change it.
"""

import csv
import json
import pathlib
import re

from keras_gemma_ft.config import UserError

# A longer line is a missing newline far more often than a record.
MAX_LINE_BYTES = 16 * 2**20


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
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number, size, rest = number + 1, len(line), line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
                size += len(rest)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line if size <= MAX_LINE_BYTES else None, size


def _long(size):
    return f"a line of {size / 1e6:.1f} MB (limit {MAX_LINE_BYTES / 1e6:.1f})"


def _jsonl(path):
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


def _json(path):
    """An array of objects, or one object; lines of objects also pass."""
    data = pathlib.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        records = json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
        elif data.strip():
            where = f"line {error.lineno}, column {error.colno}"
            raise UserError(
                f"{path}, {where}: broken JSON: {error.msg}"
            ) from error
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    records = records if isinstance(records, list) else [records]
    for number, record in enumerate(records, start=1):
        yield number, record, flaw(record)


def _csv(path, delimiter=","):
    # Its own limit is 128 Kbyte a cell, less than one long document.
    csv.field_size_limit(MAX_LINE_BYTES)
    # A strict reader sees a quote that is never closed.
    rows = csv.reader(_cells(path), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            reason = None
            if len(row) != len(header):
                reason = f"{len(row)} cells, but the header has {len(header)}"
            record = dict(zip(header, row))
            if row:
                yield rows.line_num, record, reason or flaw(record)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error


def _cells(path):
    """Lines as text; a byte that is no UTF-8 becomes half a surrogate."""
    for number, line, size in _lines(path):
        if line is None:
            raise UserError(f"{path}, line {number}: {_long(size)}")
        yield line.decode("utf-8", "surrogateescape")


def _tsv(path):
    return _csv(path, delimiter="\t")


def _txt(path):
    data = pathlib.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        return
    record = {"text": data.decode("utf-8", "surrogateescape")}
    yield 1, record, flaw(record)


def _parquet(path):
    # pyarrow takes a second to import and most runs read JSON lines.
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for number, record in enumerate(batch.to_pylist(), number + 1):
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
