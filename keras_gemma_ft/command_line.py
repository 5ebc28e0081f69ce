"""Command line and `--config` files -> a checked `Config`.

Precedence: default < the embedded model's recipe < `--config` file < flags.
"""

import dataclasses
import pathlib
import runpy
import traceback

from absl import flags

from keras_gemma_ft.config import (
    EMBEDDED_PRESET,
    Config,
    UserError,
    check,
    did_you_mean,
    expected,
    flatten,
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


def help_text(doc):
    """What `--help` prints: the verb's docstring and every setting."""
    lines = [doc.strip(), "", "Settings (--name=value):"]
    lines += ["  --config=FILE.py\n      a file whose get_config() -> Config"]
    for path, field, default in walk(Config()):
        shown = str(default).lower() if type(default) is bool else default
        choices = field.metadata["choices"]
        more = f" [{'|'.join(choices)}]" if choices else ""
        lines += [f"  --{path}={shown}"]
        lines += [f"      {field.metadata['help']}{more}"]
    return "\n".join(lines)


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
    except flags.UnrecognizedFlagError as error:
        known = [path for path, _, _ in walk(Config())] + ["config"]
        raise UserError(
            f"unknown flag --{error.flagname}."
            f"{did_you_mean(error.flagname, known)} --help lists every flag."
        ) from None
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
