"""Command line and `--config` files -> a checked `Config`.

Precedence: default < the embedded model's recipe < `--config` file < flags.
"""

import dataclasses
import pathlib
import re
import runpy
import traceback

from absl import flags

from keras_gemma_ft.config import (
    EMBEDDED_PRESET,
    VERBS,
    Config,
    UserError,
    check,
    did_you_mean,
    expected,
    flatten,
    hints,
    replace,
    typed,
    walk,
)


def _define_flags():
    """A FlagValues with one flag for each setting, all unset (None)."""
    values = flags.FlagValues()
    for path, field, default in walk(Config()):
        define = {
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
        }[type(default)]
        define(path, None, field.metadata["help"], flag_values=values)
    flags.DEFINE_string("config", None, "a Python file", flag_values=values)
    return values


def help_text(doc, verb=None):
    """What `--help` prints: a docstring, and settings by what they are about.

    Args:
        doc: the verb's docstring.
        verb: name of the verb whose settings are shown, the dozen that matter
            first; without one every setting of every verb is shown.
    """
    name, verb = verb, VERBS.get(verb)
    first = verb.first if verb else ()
    groups = {"What matters most": dict.fromkeys(first, "")}
    groups["The run"] = {
        "config": "  --config=FILE.py\n      a file whose get_config() -> Config"
    }
    for path, field, default in walk(Config()):
        section = getattr(Config(), path.partition(".")[0])
        title = (section if "." in path else Config()).__doc__
        if path in first:
            title = "What matters most"
        elif verb and not verb.reads(path):
            continue
        title = title.partition(":")[0]
        groups.setdefault(title, {})[path] = _help_of(path, field, default)
    lines = [doc.strip(), "", "Settings are typed as --name=value."]
    own = [path for path in first if path.startswith(f"{name}.")]
    if own:
        short = own[0].removeprefix(f"{name}.")
        lines.append(f"{name}. may be left out: --{short} is --{own[0]}.")
    for title, settings in groups.items():
        lines += ["", f"{title}:", *settings.values()] if settings else []
    if verb:
        lines += ["", "--helpfull lists the settings of every verb."]
    return "\n".join(lines)


def _help_of(path, field, default):
    shown = str(default).lower() if type(default) is bool else default
    choices = field.metadata["choices"]
    more = f" [{'|'.join(choices)}]" if choices else ""
    return f"  --{path}={shown}\n      {field.metadata['help']}{more}"


def spelled(argv, verb):
    """`argv` with the section put before flags of the verb's own section.

    `export --format=gguf` is `export --export.format=gguf`, and `--noverify`
    is `--noexport.verify`.
    """
    paths = {path for path, _, _ in walk(Config())}

    def whole(word):
        dashes, name, rest = re.fullmatch(
            r"(--?)([A-Za-z_]\w*)(=.*|)", word, re.DOTALL
        ).groups()
        no = "" if f"{verb}.{name}" in paths else "no"
        path = f"{verb}.{name.removeprefix(no)}"
        if name in paths or path not in paths or not name.startswith(no):
            return word
        return f"{dashes}{no}{path}{rest}"

    flag = re.compile(r"--?[A-Za-z_]\w*(=.*|)", re.DOTALL).fullmatch
    return [whole(word) if flag(word) else word for word in argv]


def unread(argv, verb):
    """What is said of the flags of `argv` that a verb does not read, or ""."""
    if verb not in VERBS:
        return ""
    named = hints.named(hints.flags(argv))
    left = [path for path in named if not VERBS[verb].reads(path)]
    if not left:
        return ""
    return f"{verb} does not read --{', --'.join(left)}"


def from_flags(argv):
    """The `Config` that a command line asks for.

    Args:
        argv: the arguments after the program's name.

    Raises:
        UserError: unknown flag, wrong type, or a word that is no flag.
    """
    values = _define_flags()
    try:
        rest = values(["program", *argv])
    except flags.UnrecognizedFlagError:
        raise UserError(hints.unknown_flags(argv)) from None
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_type(str(error))) from None
    except (flags.Error, ValueError) as error:
        # ValueError: --noresume=3 "does not take an argument".
        raise UserError(f"{error}. --help lists every flag.") from None
    if len(rest) > 1:
        raise UserError(
            f"expected only --flags, got {' '.join(rest[1:])!r}. "
            f"Write settings as --name=value."
        )
    given = {
        path: values[path].value
        for path, _, _ in walk(Config())
        if values[path].present
    }
    config = _base(values["config"].value, given.get("preset"))
    said = typed(config) if values["config"].value else frozenset()
    config = replace(config, given)
    check(config)
    return dataclasses.replace(config, given=said | given.keys())


def _wrong_type(text):
    """absl's "flag --lora.rank=x: invalid literal..." in our words."""
    path, _, value = text.removeprefix("flag --").partition("=")
    for known, field, _ in walk(Config()):
        if known == path:
            return expected(path, field, value.partition(": ")[0])
    return text


def _base(path, preset):
    """What the command line is laid over: a file's Config, or defaults."""
    if path:
        return load_file(path)
    if preset in (None, EMBEDDED_PRESET):
        # A 3 M parameter model wants a far larger step than a 2 B one.
        return load_file(pathlib.Path(__file__).parent / "embedded/recipe.py")
    return Config()


def load_file(path):
    """The `Config` that a Python file's `get_config()` returns."""
    path = pathlib.Path(path)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")]
        raise UserError(
            f"--config={path}: no such file.{did_you_mean(str(path), near)}"
        )
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError("expected a function get_config() in it.")
        config = get_config()
        if not isinstance(config, Config):
            raise UserError(
                f"get_config() returned a {type(config).__name__}, "
                f"expected keras_gemma_ft.config.Config."
            )
        # Nothing has checked the types that the file gave to dataclasses.
        return replace(config, flatten(config))
    except UserError as error:
        raise UserError(f"--config={path}: {error}") from None
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(
            f"--config={path}{where}: {type(error).__name__}: {error}"
        ) from error
