"""Unknown flags of a command line -> one message, and what to type instead."""

import difflib
import re
import shlex
from typing import NamedTuple

from keras_gemma_ft.config.conversions import on
from keras_gemma_ft.config.elsewhere import WORDS
from keras_gemma_ft.config.fields import near_misses, walk
from keras_gemma_ft.config.settings import Config

# Absl's own, and the one that is no setting.
_BESIDES = ("config", "flagfile", "undefok")


class _Flag(NamedTuple):
    """A flag of a command line, or a word that is none (name is None)."""

    words: tuple
    name: str | None = None
    value: str | None = None
    known: bool = True


def unknown_flags(argv):
    """What the unknown flags of `argv` are told; '' if each is known.

    Args:
        argv: the arguments after the program's name.

    Returns:
        str: a line for each unknown flag, and then the corrected arguments.
    """
    flags = _read(argv)
    rows = _rows(flags)
    lines, typed = [], []
    for flag in flags:
        if flag.known:
            typed += flag.words
            continue
        line, instead = _answer(flag, rows)
        lines.append(f"unknown flag {flag.words[0].partition('=')[0]}.{line}")
        typed += [word for word in instead if word not in typed]
    if not lines:
        return ""
    lines.append("--help lists every flag.")
    if typed:
        lines.append(f"Type: {shlex.join(typed)}")
    return "\n".join(lines)


def typed_settings(argv):
    """Paths of the settings that a command line names, in order."""
    paths = {path for path, _, _ in walk(Config())}
    names = (flag.name for flag in _read(argv) if flag.name)
    named = (n if n in paths else n.removeprefix("no") for n in names)
    return [path for path in dict.fromkeys(named) if path in paths]


def _read(argv):
    """The `_Flag`s of a command line, as absl takes it apart."""
    switches = {p for p, _, v in walk(Config()) if type(v) is bool}
    switches |= {f"no{path}" for path in switches}
    known = switches | {path for path, _, _ in walk(Config())} | {*_BESIDES}
    found, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return found + [_Flag((word,)), *map(_Flag, zip(rest))]
        if not _is_flag(word):
            found.append(_Flag((word,)))
            continue
        name, given, value = word.lstrip("-").partition("=")
        words = (word,)
        # What follows an unknown flag may be its value: --lora_r 16.
        if not given and rest and not _is_flag(rest[0]):
            if name not in switches:
                words += (rest.pop(0),)
        value = value if given else words[1] if words[1:] else None
        found.append(_Flag(words, name, value, name in known))
    return found


def _is_flag(word):
    return re.match("--?[A-Za-z]", word) is not None or word == "--"


def _answer(flag, rows):
    """(what an unknown flag is told, the words to type instead)."""
    path, positive = _own(flag.name)
    word = WORDS.get(_elsewhere(flag.name) or "")
    if path and not (word and word.here != path):
        value = flag.value if positive else str(not on(flag.value))
        return f" Did you mean: {path}?", [_flag(path, value)]
    if not word:
        near = near_misses(flag.name, [*_paths(), "config"])
        said = f" Did you mean: {', '.join(near)}?" if near else ""
        return said, [_flag(near[0], flag.value)] if len(near) == 1 else []
    instead = _instead(word, flag.value, rows)
    said = f" Here it is {shlex.join(instead)}." if instead else ""
    if word.note or not instead:
        said += f" {word.note or 'That value needs no flag here.'}"
    return said, instead


def _paths():
    return {path: type(value) for path, _, value in walk(Config())}


def _plain(name):
    return re.sub("[-.]", "_", name.lower())


def _own(name):
    """(setting, whether it is meant and not its opposite), or (None, True).

    Knows a path with other marks in it (lora_rank, Lora-Rank), its last part
    (rank), and a switch's `no` before either (no_pack, data.nopack).
    """
    spelled = {}
    for path, kind in _paths().items():
        section, _, last = path.rpartition(".")
        for word in (last, _plain(path)):
            spelled.setdefault(word, (path, True))
        if kind is bool:
            for no in ("no", "no_"):
                for word in (no + last, no + _plain(path)):
                    spelled.setdefault(word, (path, False))
                spelled.setdefault(f"{section}_{no}{last}", (path, False))
    return spelled.get(_plain(name), (None, True))


def _elsewhere(name):
    """The name in `WORDS` that is meant: lr of lr, --train.lr, train_lr."""
    plain = _plain(name)
    sections = "|".join({path.partition(".")[0] for path in _paths()})
    for guess in (
        plain,
        _plain(name.rpartition(".")[2]),
        re.sub(f"^({sections})_", "", plain),
    ):
        if guess in WORDS:
            return guess
    near = difflib.get_close_matches(plain, WORDS, 1, 0.88)
    return near[0] if near else None


def _instead(word, value, rows):
    """The words to type for a row of the table and the value it came with."""
    if word.here in _BATCH:
        return [_flag(path, number) for path, number in rows.items()]
    if "=" in word.here:
        here = word.here if on(value) else word.off
    elif value is None or not word.values:
        here = word.here and _Pair(word.here, value)
    else:
        here = word.values
        ...
