"""How a setting is declared, found by its path, changed and checked."""

import dataclasses
import difflib
import math
import re


class UserError(Exception):
    """A mistake that the user can mend: the message says how. Exit 2."""

    def _render_traceback_(self):
        """What IPython shows of it: no frames."""
        return [f"Error: {self}"]


def setting(default, help, choices=None, expect=None):
    """A field with its flag's help text and what it takes.

    Args:
        default: its type is the setting's type.
        help: what `--help` says of it.
        choices: every value that it takes, if they can be listed.
        expect: function of a value of the right type that returns what was
            expected instead, as a sentence, or None if the value is good.
    """
    metadata = {"help": help, "choices": choices, "expect": expect}
    return dataclasses.field(default=default, metadata=metadata)


def that(good, sentence):
    """An `expect` of `setting`: `sentence`, unless `good(value)`."""
    return lambda value: None if good(value) else sentence


def at_least(least, more=""):
    """An `expect` of `setting`: finite numbers from `least` on."""
    return that(
        lambda value: least <= value < math.inf,
        f"expected {least} or more.{more}",
    )


def names(pattern, sentence):
    """An `expect` of `setting`: `name,name`, each of which the pattern fits."""
    fits = re.compile(rf"(\s*({pattern})\s*(,|$))*").fullmatch
    return that(fits, sentence)


def understood(read):
    """An `expect` of `setting`: what `read` takes without a `UserError`."""

    def expect(value):
        try:
            read(value)
        except UserError as error:
            return str(error)

    return expect


def walk(config, prefix=""):
    """Yields (path, field, value) of every setting, depth first."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{field.name}.")
        elif field.metadata:
            yield prefix + field.name, field, value


def replace(config, values):
    """A copy of `config` with `{"lora.rank": 16, ...}` set, checked by type.

    Raises `UserError` for an unknown path or a value of a wrong type.
    """
    known = {path: field for path, field, _ in walk(config)}
    sections = {}
    for path, value in values.items():
        if path not in known:
            raise UserError(
                f"unknown setting {path!r}.{did_you_mean(path, known)}"
            )
        value = _checked(path, known[path], value)
        section, _, name = path.rpartition(".")
        sections.setdefault(section, {})[name] = value
    top = sections.pop("", {})
    for section, fields in sections.items():
        top[section] = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **top)


def flatten(config):
    """{path: value} of every setting, as it goes into config.json."""
    return {path: value for path, _, value in walk(config)}


def typed(config):
    """Paths of the settings that the user has set himself.

    Flags and a --config file tell (`config.given`). Of a Config that was made
    in Python they are those that differ from their defaults.
    """
    if config.given is not None:
        return config.given
    default = flatten(type(config)())
    values = flatten(config).items()
    return frozenset(path for path, value in values if value != default[path])


def refusals(config):
    """What each setting's `expect` says of its value, as messages."""
    for path, field, value in walk(config):
        expect = field.metadata["expect"]
        said = expect(value) if expect else None
        if said:
            # Some say which setting they mean, since others call them too.
            known = said.startswith("--")
            yield said if known else f"--{path}={value}: {said}"


def did_you_mean(word, known):
    """' Did you mean: x, y?' for near misses of `word`, else ''."""
    near = near_misses(word, known)
    return f" Did you mean: {', '.join(near)}?" if near else ""


def near_misses(word, known):
    """Those of `known` that `word` may be a misspelling of, likeliest first."""
    # Compared without the section too: --rank is near to lora.rank.
    # The first of a name: rank is lora.rank rather than export.rank.
    last = {name.rpartition(".")[2]: name for name in reversed([*known])}
    near = difflib.get_close_matches(word, known, 3, 0.6)
    return near + [
        last[name]
        for name in difflib.get_close_matches(word, last, 2, 0.75)
        if last[name] not in near
    ]


def _checked(path, field, value):
    """`value` as the field's type, or `UserError`."""
    kind = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(expected(path, field, value))
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(
            f"--{path}={value} is not one of: {', '.join(choices)}."
            + did_you_mean(str(value), choices)
        )
    return value


def expected(path, field, value):
    """What a setting of a wrong type is told."""
    default = field.default
    shown = str(default).lower() if type(default) is bool else repr(default)
    return (
        f"--{path} takes a value like {shown} "
        f"({type(default).__name__}), got {value!r}."
    )
