"""Every setting, declared once; flags and `--config` files come from here.

A setting is a field of a frozen dataclass, made with `setting(default, help)`.
Its flag is its path: `Config.lora.rank` is `--lora.rank=16`. Precedence:
default < the embedded model's recipe < `--config` file < command line.
"""

import dataclasses
import difflib
import math
import pathlib
import re
import runpy
import traceback

from absl import flags

EMBEDDED_PRESET = "gemma2_tiny_en"
BACKENDS = ("jax", "tensorflow", "torch")
# KerasHub's layer names, in the order in which a decoder block uses them.
TARGETS = (
    "query",
    "key",
    "value",
    "attention_output",
    "ffw_gating",
    "ffw_gating_2",
    "ffw_linear",
)
TARGET_GROUPS = {"attention": TARGETS[:4], "all-linear": TARGETS}
OPTIMIZERS = ("adamw", "adam", "adafactor", "lion", "sgd")


class UserError(Exception):
    """A mistake that the user can mend: the message says how. Exit 2."""


def setting(default, help, choices=None):
    """A field with its flag's help text and, if closed, its choices."""
    metadata = {"help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Data:
    train: str = setting(
        "demo",
        "training records: 'demo', or path[,path...] with globs "
        "(.jsonl .json .csv .tsv .parquet .txt), or hf://dataset[:split]",
    )
    eval: str = setting(
        "auto",
        "held-out records: like --data.train, or a share of it ('5%'), or "
        "'none'; 'auto' is the demo's own held-out rows, else none",
    )
    format: str = setting(
        "auto",
        "what a record looks like; 'auto' tells from the first records",
        (
            "auto",
            "text",
            "prompt_response",
            "instruction",
            "messages",
            "preference",
        ),
    )
    template: str = setting(
        "gemma",
        "'gemma' (Gemma's turns), a Python format string, or a .jinja file",
    )
    prompt_field: str = setting("", "the records' field that holds the prompt")
    response_field: str = setting(
        "", "the records' field that holds the response"
    )
    sequence_length: int = setting(512, "tokens in a row")
    batch_size: int = setting(8, "rows per optimizer step, all devices")
    micro_batch_size: int = setting(
        0, "rows in memory at once; 0 is batch_size (no accumulation)"
    )
    pack: bool = setting(True, "put several examples into one row")
    bad_rows: int = setting(
        0, "how many unusable records may be skipped before stopping"
    )


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = setting(8, "rank of the adapters; 0 trains every weight")
    alpha: float = setting(
        0.0, "the adapters are scaled by alpha/rank; 0 means alpha = rank"
    )
    rslora: bool = setting(
        False, "scale by alpha/sqrt(rank) (arXiv 2312.03732) instead"
    )
    dropout: float = setting(0.0, "dropout on the adapters' input")
    targets: str = setting(
        "",
        "layers to adapt: 'all-linear' (what '' means), 'attention', or names: "
        + ",".join(TARGETS),
    )
    style: str = setting(
        "keras",
        "query/key/value adapters: 'keras' as enable_lora makes them (A for "
        "each head, B shared), 'standard' one pair as in the LoRA paper",
        ("keras", "standard"),
    )


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = setting(0, "optimizer steps; 0 takes --train.epochs")
    epochs: float = setting(1.0, "passes over the training rows")
    learning_rate: float = setting(2e-4, "peak learning rate")
    schedule: str = setting(
        "cosine",
        "learning rate after warm-up: stays, or falls to zero",
        ("constant", "linear", "cosine"),
    )
    warmup: str = setting("3 %", "duration of the linear warm-up")
    optimizer: str = setting("adamw", "a Keras optimizer", OPTIMIZERS)
    weight_decay: float = setting(0.0, "decoupled weight decay")
    clip_norm: float = setting(1.0, "clip the global gradient norm; 0 is off")
    log_every: str = setting("10 steps", "duration between metrics lines")
    eval_every: str = setting(
        "25 %", "duration between evaluations on --data.eval; '0' is off"
    )
    checkpoint_every: str = setting(
        "25 %", "duration between checkpoints; '0' writes only the last"
    )
    keep_checkpoints: int = setting(2, "complete checkpoints that stay")
    patience: int = setting(
        0, "stop after this many evaluations without a better one; 0 is off"
    )
    loss_chunk: int = setting(
        0, "tokens whose logits exist at once; 0 picks about 128 MB"
    )
    samples: int = setting(4, "prompts completed before and after")
    exact_match: int = setting(
        -1,
        "held-out prompts answered before and after and compared with their "
        "references; -1 takes up to 200 if the answers are short, else none",
    )
    time_budget: str = setting(
        "", "checkpoint and exit 75 after this long, e.g. 8.5h or 30m"
    )


@dataclasses.dataclass(frozen=True)
class Model:
    dtype: str = setting(
        "auto",
        "dtype of the frozen weights and of the matmuls",
        ("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = setting(
        "none",
        "storage of the frozen decoder kernels",
        ("none", "int8", "int4", "nf4"),
    )
    remat: str = setting(
        "auto",
        "recompute each decoder block in the backward pass",
        ("auto", "none", "block"),
    )


@dataclasses.dataclass(frozen=True)
class Generate:
    prompt: str = setting("", "one prompt; without it, chat at the terminal")
    prompt_file: str = setting(
        "", "a text file, one prompt a line, or .jsonl with 'prompt'"
    )
    max_new_tokens: int = setting(256, "longest completion, in tokens")
    sampler: str = setting(
        "greedy", "how the next token is chosen", ("greedy", "top_k", "top_p")
    )
    temperature: float = setting(1.0, "divides the logits before sampling")
    top_k: int = setting(40, "words that top_k chooses among")
    top_p: float = setting(0.95, "probability mass that top_p chooses among")
    raw: bool = setting(False, "complete the text as it is, without turns")


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = setting(
        EMBEDDED_PRESET,
        "a KerasHub preset (gemma2_2b_en, gemma2_9b_en, ...), a folder in Keras "
        "preset or Hugging Face format, hf://owner/name or kaggle://...",
    )
    backend: str = setting(
        "auto", "Keras backend", ("auto",) + BACKENDS
    )
    run_dir: str = setting("runs/default", "folder of everything a run writes")
    seed: int = setting(0, "of the adapters, the order of the data, sampling")
    resume: bool = setting(True, "continue an interrupted run_dir")
    mesh: str = setting("auto", "devices as BATCHxMODEL, e.g. 8x1 (JAX)")
    adapter: str = setting(
        "", "adapter to load: a run folder, a PEFT folder or a .lora.h5 file"
    )
    data: Data = dataclasses.field(default_factory=Data)
    lora: Lora = dataclasses.field(default_factory=Lora)
    train: Train = dataclasses.field(default_factory=Train)
    model: Model = dataclasses.field(default_factory=Model)
    generate: Generate = dataclasses.field(default_factory=Generate)


def walk(config, prefix=""):
    """Yields (path, field, value) of every setting, depth first."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{field.name}.")
        else:
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


def did_you_mean(word, known):
    """' Did you mean: x, y?' for near misses of `word`, else ''."""
    # Compared without the section too: --rank is near to lora.rank.
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(word, known, 3, 0.6)
    near += [
        last[name]
        for name in difflib.get_close_matches(word, last, 2, 0.75)
        if last[name] not in near
    ]
    return f" Did you mean: {', '.join(near)}?" if near else ""


def _checked(path, field, value):
    """`value` as the field's type, or `UserError`."""
    kind = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(_expected(path, field, value))
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(
            f"--{path}={value} is not one of: {', '.join(choices)}."
            + did_you_mean(str(value), choices)
        )
    return value


def _expected(path, field, value):
    """What a setting of a wrong type is told."""
    default = field.default
    shown = str(default).lower() if type(default) is bool else repr(default)
    return (
        f"--{path} takes a value like {shown} "
        f"({type(default).__name__}), got {value!r}."
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
        lines += [f"  --{path}={shown}", f"      {field.metadata['help']}{more}"]
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
            return _expected(path, field, value.partition(": ")[0])
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


def targets(lora):
    """The KerasHub layer names that a `Lora` section adapts, in order."""
    names = TARGET_GROUPS.get(lora.targets or "all-linear")
    if names:
        return names
    asked = [name.strip() for name in lora.targets.split(",")]
    unknown = [name for name in asked if name not in TARGETS]
    if unknown:
        raise UserError(
            f"--lora.targets: unknown {', '.join(unknown)}."
            f"{did_you_mean(unknown[0], TARGETS)} Known: "
            f"{', '.join(TARGETS)}, or the groups {', '.join(TARGET_GROUPS)}."
        )
    return tuple(name for name in TARGETS if name in asked)


_DURATION = re.compile(
    r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(steps?|epochs?|%|)\s*$"
)


def duration(text, *, total, steps_per_epoch):
    """Optimizer steps that `500`, `500 steps`, `0.25 epochs`, `10 %` mean.

    Args:
        text: the duration.
        total: steps of the whole run, what `%` refers to.
        steps_per_epoch: steps of one pass over the training rows.
    """
    match = _DURATION.match(text)
    if not match:
        raise UserError(
            f"{text!r} is not a duration: write 500, '500 steps', "
            f"'0.25 epochs' or '10 %'."
        )
    number, unit = float(match[1]), match[2].rstrip("s")
    each = {"": 1, "step": 1, "epoch": steps_per_epoch, "%": total / 100}[unit]
    return int(round(number * each)) or (1 if number else 0)


_SECONDS = {"h": 3600, "m": 60, "s": 1, "": 1}


def seconds(text):
    """Seconds that `8.5h`, `30m`, `90s` mean; None for ''."""
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([hms]?)\s*", text)
    if not match:
        raise UserError(f"{text!r} is not a time: write 8.5h, 30m or 90s.")
    return float(match[1]) * _SECONDS[match[2]]


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
    refuse(config.seed < 0, f"--seed={config.seed}: expected 0 or more.")
    refuse(
        not config.run_dir.strip(),
        "--run_dir is empty; name a folder: --run_dir=runs/mine.",
    )
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
