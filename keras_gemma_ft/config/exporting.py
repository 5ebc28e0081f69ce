"""Settings of what is made of a tuned model for others to load."""

import dataclasses
import re

from keras_gemma_ft.config.fields import (
    UserError,
    at_least,
    setting,
    understood,
)

# What --export.format takes, and whether the base's weights go into it.
FORMATS = {
    "peft": False,
    "keras": False,
    "gguf_adapter": False,
    "merged_hf": True,
    "merged_keras": True,
    "gguf": True,
    "ollama": True,
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def formats(text):
    """The formats that `--export.format` names, without repeats.

    Raises:
        UserError: one of them is unknown, or there is none.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in FORMATS]
    if unknown or not asked:
        raise UserError(
            f"--export.format={text}: expected names out of "
            f"{', '.join(FORMATS)}, with commas between."
        )
    return tuple(dict.fromkeys(asked))


def size(text):
    """Bytes that `5GB`, `500MB` or `2GiB` mean.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.I)
    try:
        number = float(match[1])
    except (TypeError, ValueError):
        number = 0
    if not number > 0:
        raise UserError(
            f"--export.max_shard_size={text}: expected a size such as 5GB."
        )
    unit = _UNITS[match[2].upper()]
    if match[3]:
        unit = 2 ** (10 * list(_UNITS).index(match[2].upper()))
    return int(number * unit)


def weights(text):
    """The numbers that `--export.weights` lists; () of none.

    Raises:
        UserError: one of them is no number.
    """
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise UserError(
            f"--export.weights={text}: expected numbers with commas between, "
            f"one for each adapter: 0.7,0.3."
        ) from None


@dataclasses.dataclass(frozen=True)
class Export:
    """Export: what a tuned model is turned into, and how that is proven."""

    format: str = setting(
        "peft,keras",
        "name[,name...]: peft, keras (.lora.h5), gguf_adapter; with the base "
        "in it: merged_hf, merged_keras, gguf, ollama",
        expect=understood(formats),
    )
    to: str = setting(
        "",
        "folder that gets a folder for each format; by default export/ in the "
        "run folder",
    )
    dtype: str = setting(
        "auto",
        "of merged weights; 'auto' is what the base is stored in. Adapters "
        "are float32 unless one is named",
        ("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = setting(
        "f16",
        "how a GGUF stores its matrices: f32, f16, bf16, q8_0, or what the "
        "gguf package can quantise to",
    )
    max_shard_size: str = setting(
        "5GB", "the most that a file of weights takes", expect=understood(size)
    )
    verify: bool = setting(
        True, "open what was written again and compare what it computes"
    )
    probes: int = setting(
        8, "held-out prompts that are compared", expect=at_least(1)
    )
    weights: str = setting(
        "",
        "of several adapters (--adapter=a,b): merge them into one by this "
        "weighted sum, 0.7,0.3",
        expect=understood(weights),
    )
    rank: int = setting(
        0,
        "cut the adapter to this rank by SVD, the error is stated; 0 keeps it",
        expect=at_least(0),
    )
    push_to: str = setting(
        "",
        "upload what was written: hf://owner/name, or kaggle://owner/model/"
        "framework/variation; credentials come from the environment",
    )
