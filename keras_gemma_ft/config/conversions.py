"""Values as other tools write them -> values of our settings.

Each function takes the text of a value there and returns the text here, or
`setting=value`s (a list), or None where that value needs no flag here.
"""

import pathlib
import re

from keras_gemma_ft.config.tuning import TRACKERS
from keras_gemma_ft.config.words import hub_handle

# Found as parts of names, the first that fits.
_OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "adam")
SCHEDULES = {
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "polynomial": "linear",
}
EACH = {"no": "0", "epoch": "1 epochs", "steps": None}
_FALSE = ("false", "0", "no", "none", "off", "")


def on(value):
    """Whether a switch with this value (None: no value) is on."""
    return value is None or value.lower() not in _FALSE


def _number(value):
    try:
        return float(value)
    except ValueError:
        return None


def steps(value):
    """Steps, or a share of the run; -1 leaves the matter to another flag."""
    number = _number(value)
    if number is None or number >= 1:
        return value
    return percent(value) if number > 0 else None


def steps_or_never(value):
    return steps(value) or "0"


def percent(value):
    number = _number(value)
    return value if number is None else f"{100 * number:g}%"


def part_of_epoch(value):
    number = _number(value)
    return f"{1 / number:g} epochs" if number else "0"


def listed(value):
    """`name,name` of a Python or YAML list."""
    return ",".join(
        part.strip(" \"'") for part in value.strip("[]() ").split(",")
    )


def targets(value):
    names = listed(value)
    return "all-linear" if names in ("all", "all_linear") else names


def dataset(value):
    """A file stays one; owner/name is a data set of Hugging Face."""
    owned = re.fullmatch(r"[\w-]+/[\w.-]+", value)
    kinds = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
    if owned and not value.endswith(kinds) and not pathlib.Path(value).exists():
        return f"hf://{value}"
    return value


def held_out(value):
    share = _number(value)
    if share is not None:
        return f"{100 * share:g}%" if 0 < share < 1 else None
    return dataset(value)


def text_field(value):
    field = [] if value == "text" else [f"data.response_field={value}"]
    return ["data.format=text", *field]


def template(value):
    if value.lower().startswith("gemma"):
        return "gemma"
    return value if "{" in value or value.endswith(".jinja") else None


def model(value):
    handle = hub_handle(value)
    if value.endswith("-bnb-4bit") and handle != value:
        return [f"preset={handle}", "model.quantize=nf4"]
    return handle


def dtype(value):
    value = value.removeprefix("torch.").removeprefix("mixed_")
    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    short |= {"fp32": "float32", "float": "float32", "no": "float32"}
    return short.get(value, value)


def optimizer(value):
    name = value.lower().removeprefix("optimizernames.")
    if "8bit" in name and "adam" in name:
        return "adamw8bit"
    return next((n for n in _OPTIMIZERS if n in name), value)


def start(value):
    return next((n for n in ("pissa", "loftq") if n in value), "default")


def resume(value):
    """A folder of theirs is no run of ours: only yes and no have a like."""
    if value.lower() in ("true", "1", "yes"):
        return ["resume=true"]
    return None if on(value) else ["resume=false"]


def trackers(value):
    names = listed(value)
    return {"all": ",".join(TRACKERS), "none": None}.get(names, names)
