"""Command line and `--config` files -> a checked `Config`.

Precedence: default < the embedded model's recipe < `--config` file < flags.
"""

import math
import pathlib
import re
import runpy
import traceback

from absl import flags

from keras_gemma_ft.config import (
    EMBEDDED_PRESET,
    Config,
    UserError,
    did_you_mean,
    duration,
    expected,
    flatten,
    replace,
    seconds,
    targets,
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
    config = replace(config, given)
    check(config)
    return config


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


def _check_generate(generate):
    """What the samplers cannot work with, one message each."""
    wrong = []
    if generate.max_new_tokens < 1:
        wrong.append(
            f"--generate.max_new_tokens={generate.max_new_tokens}: "
            f"expected 1 or more."
        )
    if not 0 < generate.temperature < math.inf:
        wrong.append(
            f"--generate.temperature={generate.temperature}: expected above "
            f"0. For the likeliest word use --generate.sampler=greedy."
        )
    if generate.top_k < 1:
        wrong.append(f"--generate.top_k={generate.top_k}: expected 1 or more.")
    if not 0 < generate.top_p <= 1:
        wrong.append(
            f"--generate.top_p={generate.top_p}: expected above 0, at most 1."
        )
    return wrong


def _check_init(lora, quantize):
    """What a start from the kernels cannot work with."""
    said, wrong = f"--lora.init={lora.init}", []
    if lora.init != "default" and lora.rank == 0:
        wrong.append(
            f"{said} is a start for adapters, and --lora.rank=0 has none. "
            f"Drop it, or use --lora.rank=8."
        )
    if lora.init == "loftq" and quantize == "none":
        wrong.append(
            f"{said} fits the error of a quantised base, and this one is not. "
            f"Add --model.quantize=nf4, or use --lora.init=pissa."
        )
    if lora.init == "pissa" and lora.dropout:
        wrong.append(
            f"{said} moves the kernels' principal part into the adapters, and "
            f"--lora.dropout={lora.dropout} would drop it at random. Use "
            f"--lora.dropout=0."
        )
    return wrong


def check(config):
    """Refuses settings that cannot work, every offence in one message."""
    wrong = []
    data, lora, train = config.data, config.lora, config.train

    def refuse(condition, message):
        if condition:
            wrong.append(message)

    refuse(
        data.sequence_length < 2,
        f"--data.sequence_length={data.sequence_length}: a row needs at "
        f"least 2 tokens. Try --data.sequence_length=512.",
    )
    refuse(
        data.batch_size < 1,
        f"--data.batch_size={data.batch_size}: expected 1 or more.",
    )
    micro = data.micro_batch_size
    refuse(
        micro < 0 or (micro and data.batch_size % micro),
        f"--data.micro_batch_size={micro} does not divide "
        f"--data.batch_size={data.batch_size}. Try "
        f"--data.batch_size="
        f"{max(1, data.batch_size // max(1, micro)) * max(1, micro)}"
        f" or --data.micro_batch_size=1.",
    )
    refuse(
        data.buckets < 1,
        f"--data.buckets={data.buckets}: expected 1 or more. One length for "
        f"every batch: --data.buckets=1.",
    )
    refuse(
        not data.cache.strip(),
        "--data.cache is empty; name a folder, or type --data.cache=none.",
    )
    refuse(lora.rank < 0, f"--lora.rank={lora.rank}: expected 0 or more.")
    refuse(
        lora.rank == 0 and lora.targets,
        f"--lora.rank=0 trains every weight, so --lora.targets="
        f"{lora.targets} has nothing to adapt. Drop it, or use --lora.rank=8.",
    )
    refuse(
        lora.rank == 0 and config.model.quantize != "none",
        f"--model.quantize={config.model.quantize} freezes the kernels, "
        f"--lora.rank=0 trains them. Use --lora.rank=8.",
    )
    refuse(
        lora.rank == 0 and config.model.quantize_embedding != "none",
        f"--model.quantize_embedding={config.model.quantize_embedding} "
        f"freezes the token table, --lora.rank=0 trains it. Use --lora.rank=8.",
    )
    refuse(
        not config.model.quantize_cache.strip(),
        "--model.quantize_cache is empty; name a folder, or type "
        "--model.quantize_cache=none.",
    )
    refuse(
        not 0 <= lora.dropout < 1,
        f"--lora.dropout={lora.dropout}: expected 0 or more and below 1.",
    )
    refuse(
        train.steps < 0 or not 0 <= train.epochs < math.inf,
        f"--train.steps={train.steps} --train.epochs={train.epochs}: "
        f"expected 0 or more.",
    )
    refuse(
        not 0 < train.learning_rate < math.inf,
        f"--train.learning_rate={train.learning_rate}: expected above 0.",
    )
    refuse(
        not re.fullmatch(r"auto|[1-9]\d*", config.hosts.local),
        f"--hosts.local={config.hosts.local}: expected auto or the number of "
        f"processes of this machine, as in --hosts.local=2.",
    )
    refuse(config.seed < 0, f"--seed={config.seed}: expected 0 or more.")
    refuse(
        not config.run_dir.strip(),
        "--run_dir is empty; name a folder: --run_dir=runs/mine.",
    )
    wrong += _check_init(lora, config.model.quantize)
    wrong += _check_generate(config.generate)
    for check_one in (
        lambda: targets(lora),
        lambda: seconds(train.time_budget),
        *(
            lambda text=text: duration(text, total=1, steps_per_epoch=1)
            for text in (
                train.warmup,
                train.log_every,
                train.eval_every,
                train.checkpoint_every,
            )
        ),
    ):
        try:
            check_one()
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
