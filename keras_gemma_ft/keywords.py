"""A call's keywords and records -> the `Config` that flags would make.

A keyword is a flag with an underscore for the dot: lora_rank is --lora.rank.
"""

import hashlib
import json
import pathlib
import re

from keras_gemma_ft import command_line, config
from keras_gemma_ft.config import hints
from keras_gemma_ft.formats import atomic


def configure(settings):
    """The `config.Config` of {keyword: value}, made as the flags' is.

    Raises:
        config.UserError: a keyword is unknown, or a value cannot be.
    """
    known = paths()
    given, records, flags = dict(settings), {}, []
    for name in ("data_train", "data_eval"):
        if not isinstance(given.get(name, ""), (str, pathlib.Path, type(None))):
            records[name] = given.pop(name)
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        text = str(value).lower() if type(value) is bool else str(value)
        flags.append(f"--{known.get(name, name)}={text}")
    if given.keys() - known:
        raise config.UserError(_unknown(flags))
    cfg = command_line.from_flags(flags)
    if not records:
        return cfg
    written = {
        known[name]: write(pathlib.Path(cfg.run_dir), name, value)
        for name, value in records.items()
    }
    return command_line.from_flags(
        flags + [f"--{path}={file}" for path, file in written.items()]
    )


def _unknown(flags):
    """What unknown keywords are told: what flags are, in keywords."""
    told = hints.unknown_flags(flags)
    told = told.replace("unknown flag --", "unknown setting ")
    lines = [x for x in told.splitlines() if not x.startswith("--help")]
    for word, path in paths().items():
        lines = [re.sub(rf"(?<=[ ,]){path}\b", word, x) for x in lines]
    return "\n".join(lines)


def paths():
    """{keyword: the flag's path}."""
    found = {p.replace(".", "_"): p for p, _, _ in config.walk(config.Config())}
    return {**found, "config": "config"}


def write(folder, name, records):
    """Writes records as JSON lines into the run folder; returns the file.

    Its name is made from its content: a run that goes on finds the same file,
    and other records do not write over those of a run that is there.
    """
    data = "".join(f"{line}\n" for line in _lines(name, records)).encode()
    digest = hashlib.sha256(data).hexdigest()[:12]
    file = folder.expanduser() / f"{name}-{digest}.jsonl"
    if not file.exists():
        with atomic.replacing(file, len(data)) as partial:
            partial.write_bytes(data)
    return file


def _lines(name, records):
    """Yields the records as lines of JSON."""
    if hasattr(records, "to_json") and hasattr(records, "columns"):
        text = records.to_json(
            orient="records", lines=True, force_ascii=False, date_format="iso"
        )
        yield from text.splitlines()
        return
    if isinstance(records, dict):
        some = next(iter(records), "train")
        raise config.UserError(
            f"{name} is a dict of {', '.join(map(str, records))}. Expected a "
            f"list of dicts; of a datasets.DatasetDict one split, as in "
            f"{name}=data[{some!r}]; of columns, pandas.DataFrame(data)."
        )
    for number, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise TypeError(f"a record is a dict, not {record!r:.60}")
            yield json.dumps(record, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise config.UserError(
                f"{name}, record {number}: {error}. Expected a path, a list "
                f"of dicts, a pandas.DataFrame or a datasets.Dataset."
            ) from None


def in_keywords(message):
    """A message about flags as one about keywords.

    --lora.rank=8 becomes lora_rank=8, --noresume resume=False.
    """
    words = {path: word for word, path in paths().items()}

    def word(match):
        path = match[1]
        if path in words:
            return words[path]
        opposite = path.removeprefix("no")
        return f"{words[opposite]}=False" if opposite in words else match[0]

    return re.sub(r"--([a-z]\w*(?:\.[a-z]\w*)*)", word, message)
