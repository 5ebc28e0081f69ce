"""Every setting, declared once, as a field of a frozen dataclass.

A field is made with `setting(default, help)`; `command_line` makes its flag
from its path: `Config.lora.rank` is `--lora.rank=16`.
"""

import dataclasses
import difflib
import os
import pathlib
import re

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
OPTIMIZERS = ("adamw", "adamw8bit", "adam", "adafactor", "lion", "sgd")


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
    system: str = setting(
        "",
        "a system text for every conversation that has none of its own; it "
        "stands before the first user text",
    )
    ignore: str = setting(
        "",
        "fields (name,name) that may be left unread although they look as if "
        "they changed what a record means, such as label, score or tools",
    )
    roles: str = setting(
        "",
        "speakers of a conversation by other names: NAME=user,NAME=assistant,"
        "NAME=system",
    )
    text_marks: str = setting(
        "stop",
        "a text record that spells a control token such as <end_of_turn>: "
        "stop the run, parse it as the token, or take it literally as text",
        ("stop", "parse", "literal"),
    )
    learn: str = setting(
        "all",
        "what a text record teaches: all of it, or, with "
        "--data.text_marks=parse, only the model's turns",
        ("all", "answers"),
    )
    columns: str = setting(
        "", "names of the columns (name,name) of a CSV that has no header line"
    )
    delimiter: str = setting(
        "auto",
        "what separates the cells of a CSV: one character, or tab; 'auto' "
        "tells from the first lines",
    )
    sequence_length: int = setting(512, "tokens in a row")
    batch_size: int = setting(8, "rows per optimizer step, all devices")
    micro_batch_size: int = setting(
        0, "rows in memory at once; 0 is batch_size (no accumulation)"
    )
    pack: bool = setting(True, "put several examples into one row")
    buckets: int = setting(
        6,
        "without packing: lengths that batches may have, at most; each is a "
        "compilation of its own; 1 pads every row to the longest",
    )
    cache: str = setting(
        "auto",
        "folder that keeps tokenised, packed data; 'auto' is keras_gemma_ft/"
        "data in $XDG_CACHE_HOME or ~/.cache, 'none' keeps nothing",
    )
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
    init: str = setting(
        "default",
        "where A and B start: B at zero; 'pissa' at the kernel's principal "
        "directions (arXiv 2404.02948), 'loftq' at the best fit of the "
        "quantised base's error (arXiv 2310.08659)",
        ("default", "loftq", "pissa"),
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
    optimizer: str = setting(
        "adamw",
        "a Keras optimizer; adamw8bit keeps AdamW's state in 8 bits (arXiv "
        "2110.02861): 2 bytes a trained number, not 8",
        OPTIMIZERS,
    )
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
        0, "tokens whose logits exist at once; 0 picks about 24 MB"
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
    trackers: str = setting(
        "",
        "also log to these (name,name): tensorboard, wandb, mlflow",
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
    quantize_embedding: str = setting(
        "none",
        "storage of the frozen token table: int8 halves it, and is a little "
        "less exact",
        ("none", "int8"),
    )
    quantize_cache: str = setting(
        "auto",
        "folder that keeps quantised weights for the next run; 'auto' is "
        "keras_gemma_ft/quantized in $XDG_CACHE_HOME or ~/.cache for models "
        "from 256 MB on, 'none' keeps nothing",
    )
    remat: str = setting(
        "auto",
        "recompute each decoder block in the backward pass",
        ("auto", "none", "block"),
    )
    scan: str = setting(
        "auto",
        "JAX: compile one loop over the decoder blocks, not every block; auto "
        "does so from 16 blocks on (on a GPU where blocks are recomputed)",
        ("auto", "on", "off"),
    )
    compile: str = setting(
        "auto",
        "Torch: compile a decoder block for all layers (torch.compile); auto "
        "does so on a GPU",
        ("auto", "on", "off"),
    )


@dataclasses.dataclass(frozen=True)
class Hosts:
    count: int = setting(
        0,
        "processes of the job, one a host (JAX, Torch); -1 asks the cluster "
        "(JAX: TPU pod, Slurm, Kubernetes, MPI); 0 is "
        "$KERAS_DISTRIBUTION_NUM_PROCESSES, else one",
    )
    index: int = setting(
        -1,
        "this process's number, from 0; -1 is $KERAS_DISTRIBUTION_PROCESS_ID",
    )
    coordinator: str = setting(
        "",
        "address:port of process 0; '' is the first of "
        "$KERAS_DISTRIBUTION_JOB_ADDRESSES",
    )
    local: str = setting(
        "auto",
        "Torch: processes that train starts on this machine, a GPU each; "
        "'auto' is one for each GPU, as far as the batch divides, else a "
        "number",
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
        "a KerasHub preset (gemma2_2b_en, gemma2_9b_en, ...), a folder in "
        "Keras preset or Hugging Face format, hf://owner/name or kaggle://...",
    )
    backend: str = setting("auto", "Keras backend", ("auto",) + BACKENDS)
    run_dir: str = setting("runs/default", "folder of everything a run writes")
    seed: int = setting(0, "of the adapters, the order of the data, sampling")
    resume: bool = setting(True, "continue an interrupted run_dir")
    mesh: str = setting("auto", "devices as BATCHxMODEL, e.g. 8x1 (JAX)")
    device: str = setting(
        "auto",
        "plan: the machine, such as tpu_v3_8, tpu_v5e_8, t4, h100, cpu, or a "
        "TPU topology (v5e:4x4); auto is the one this runs on",
    )
    compile: bool = setting(
        False, "plan: have the step compiled for that TPU, without one"
    )
    search: bool = setting(
        False, "plan: try meshes, remat, batches and lengths"
    )
    adapter: str = setting(
        "", "adapter to load: a run folder, a PEFT folder or a .lora.h5 file"
    )
    data: Data = dataclasses.field(default_factory=Data)
    lora: Lora = dataclasses.field(default_factory=Lora)
    train: Train = dataclasses.field(default_factory=Train)
    model: Model = dataclasses.field(default_factory=Model)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
    generate: Generate = dataclasses.field(default_factory=Generate)


def cache_folder(name):
    """Where this package keeps `name` for later runs; None without a home.

    $XDG_CACHE_HOME or ~/.cache, as the XDG base directory specification has
    it: a relative path there counts for nothing.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return None
    return pathlib.Path(home) / "keras_gemma_ft" / name


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


def mesh(text):
    """(batch, model) of `--mesh=BATCHxMODEL`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(
            f"--mesh={text}: expected BATCHxMODEL, such as 8x1 or 1x8."
        )
    return int(match[1]), int(match[2])


_SECONDS = {"h": 3600, "m": 60, "s": 1, "": 1}


def seconds(text):
    """Seconds that `8.5h`, `30m`, `90s` mean; None for ''."""
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([hms]?)\s*", text)
    if not match:
        raise UserError(f"{text!r} is not a time: write 8.5h, 30m or 90s.")
    return float(match[1]) * _SECONDS[match[2]]
