"""Unknown flags of a command line -> one message, and what to type instead."""

import re
import shlex
from typing import NamedTuple

from keras_gemma_ft.config.conversions import on
from keras_gemma_ft.config.elsewhere import WORDS
from keras_gemma_ft.config.fields import near_misses, walk
from keras_gemma_ft.config.settings import Config

# Flags that are no settings; the last two are absl's.
_BESIDES = {"config", "flagfile", "undefok"}


class Flag(NamedTuple):
    """A flag as it was typed: its name and its value, if it has one."""

    name: str
    value: str | None

    def __str__(self):
        return _flag(self.name, self.value)


def flags(argv):
    """The `Flag`s of a command line, taken apart as absl does it."""
    switches = {p for p, value in _settings().items() if type(value) is bool}
    switches |= {f"no{path}" for path in switches}
    found, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            break
        if not _is_flag(word):  # Refused once the flags are right.
            continue
        name, given, value = word.lstrip("-").partition("=")
        # What follows an unknown flag may be its value: --lora_r 16.
        if not given and name not in switches and rest:
            if not _is_flag(rest[0]):
                given, value = True, rest.pop(0)
        found.append(Flag(name, value if given else None))
    return found


def named(found):
    """The paths of the settings that some `Flag`s name, in their order."""
    paths = _settings()
    names = [flag.name for flag in found]
    names = [n if n in paths else n.removeprefix("no") for n in names]
    return [name for name in dict.fromkeys(names) if name in paths]


def unknown_flags(argv):
    """What the unknown flags of `argv` are told, a line each.

    The last line is the corrected command, if there is anything to type. A
    flag that has no like here is left out of it.
    """
    found = flags(argv)
    paths, batch = _settings(), _batch(found)
    lines, typed = [], []
    for flag in found:
        instead = [str(flag)]
        if flag.name == "preset":  # Known, but perhaps not what it is given.
            instead = _instead(WORDS["model"], flag.value)
        if flag.name not in _BESIDES and not named([flag]):
            said, instead = _answer(flag, paths, batch)
            lines.append(f"unknown flag --{flag.name}.{said}")
        typed += [word for word in instead if word not in typed]
    lines.append("--help lists every flag.")
    if typed:
        lines.append(f"Type: {shlex.join(typed)}")
    return "\n".join(lines)


def _settings():
    return {path: value for path, _, value in walk(Config())}


def _is_flag(word):
    return re.match("--$|--?[A-Za-z]", word) is not None


def _flag(path, value):
    return f"--{path}" if value is None else f"--{path}={value}"


def _plain(name):
    return re.sub("[-.]", "_", name.lower())


def _answer(flag, paths, batch):
    """(what an unknown flag is told, the words to type instead)."""
    path, value = _own(flag, paths)
    word, theirs = _elsewhere(flag, paths)
    if path and not (word and word.values):
        return f" Did you mean: {path}?", [_flag(path, value)]
    if word:
        rows = flag.name in _BATCH
        instead = rows and batch or _instead(word, theirs)
        if not instead:
            return f" {word.note or 'That value needs no flag here.'}", []
        if choices := _choices(instead[0]):
            return f" Here it is one of {', '.join(choices)}.", []
        note = f" {word.note}" if rows else ""
        return f" Here it is {shlex.join(instead)}.{note}", instead
    if near := near_misses(flag.name, [*paths, "config"]):
        # A setting that takes a value is not typed without one.
        sure = flag.value is not None or type(paths.get(near[0])) is bool
        instead = [_flag(near[0], flag.value)] if sure and not near[1:] else []
        return f" Did you mean: {', '.join(near)}?", instead
    if near := near_misses(flag.name, WORDS):
        return f" Did you mean: {', '.join(near)}?", []
    return " Nothing like it is known here.", []


def _choices(typed):
    """--path=choice of the setting of a `typed` flag, if it is none of them."""
    name, _, value = typed.removeprefix("--").partition("=")
    fields = {path: field for path, field, _ in walk(Config())}
    choices = fields[name].metadata["choices"] or (value,)
    return [] if value in choices else [f"--{name}={c}" for c in choices]


def _own(flag, paths):
    """(setting, value) that a flag means if it is nearly a path of ours.

    A path with other marks (lora_rank, Lora-Rank), its last part (rank), and
    a switch's `no` before either (no_pack, data.nopack). Else (None, None).
    """
    spelled, opposite = {}, {}
    for path, default in paths.items():
        section, _, last = path.rpartition(".")
        whole = _plain(path)
        spelled |= {whole: path, last: spelled.get(last, path)}
        if type(default) is bool:
            parts = (last, whole)
            parts = [f"{no}{part}" for no in ("no", "no_") for part in parts]
            parts += [f"{section}_no{last}", f"{section}_no_{last}"]
            opposite |= dict.fromkeys(parts, path)
    name = _plain(flag.name)
    if name in spelled:
        return spelled[name], flag.value
    if name in opposite:
        return opposite[name], str(not on(flag.value)).lower()
    return None, None


def _elsewhere(flag, paths):
    """(row of the table, value) that a flag means, or (None, None).

    The row of lr is found by lr, --train.lr, train_lr; that of packing by
    no_packing too, as a switch that is off.
    """
    sections = "|".join({path.partition(".")[0] for path in paths})
    off = str(not on(flag.value)).lower()
    bare = re.sub("^no[-_]?", "", flag.name)
    for name, value in ((flag.name, flag.value), (bare, off)):
        plain, last = _plain(name), _plain(name.rpartition(".")[2])
        for guess in (plain, last, re.sub(f"^({sections})_", "", plain)):
            if guess in WORDS:
                return WORDS[guess], value
    return None, None


def _instead(word, value):
    """The words to type for a row of the table and the value it came with."""
    if "=" in word.here:
        here = word.here if on(value) else word.off
        return [f"--{here}"] if here else []
    if value is not None and word.values:
        same = word.values.get if isinstance(word.values, dict) else None
        value = same(value, value) if same else word.values(value)
        if value is None:
            return []
        if isinstance(value, list):
            return [f"--{pair}" for pair in value]
    return [_flag(word.here, value)] if word.here else []


_ROWS = ("per_device_train_batch_size", "micro_batch_size")
_TIMES = "gradient_accumulation_steps"
_BATCH = (*_ROWS, _TIMES)


def _batch(found):
    """The words for a micro-batch and how many of them make a step.

    Elsewhere one multiplies them, here the product is typed. Empty if
    nothing accumulates.
    """
    typed = {
        flag.name: int(flag.value)
        for flag in found
        if flag.value and flag.value.isdecimal()
    }
    micro, step = "data.micro_batch_size", typed.get("data.batch_size")
    rows = next((typed[n] for n in (micro, *_ROWS) if n in typed), None)
    times = typed.get(_TIMES)
    if step:  # What is typed in our words stays.
        rows = rows or step // (times or step)
        return [_flag(micro, rows)] if micro not in typed else []
    if not times:
        return []
    rows = rows or 8  # What transformers takes without a flag.
    return [_flag(micro, rows), _flag("data.batch_size", rows * times)]
