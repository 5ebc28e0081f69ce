"""What words in a setting's value mean: durations, times, meshes, layers."""

import os
import pathlib
import re

from keras_gemma_ft.config.fields import UserError, did_you_mean

# KerasHub's layer names, in the order in which a decoder block uses them,
# and what PEFT and Hugging Face call them.
PEFT_NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "attention_output": "o_proj",
    "ffw_gating": "gate_proj",
    "ffw_gating_2": "up_proj",
    "ffw_linear": "down_proj",
}
TARGETS = tuple(PEFT_NAMES)
TARGET_GROUPS = {"attention": TARGETS[:4], "all-linear": TARGETS}
# What --lora.targets takes -> the layers that each word stands for.
_LAYERS = TARGET_GROUPS | {
    name: (target,)
    for target, peft in PEFT_NAMES.items()
    for name in (target, peft)
}


def targets(lora):
    """The KerasHub layer names that a `Lora` section adapts, in order."""
    asked = [name.strip() for name in (lora.targets or "all-linear").split(",")]
    unknown = [name for name in asked if name not in _LAYERS]
    if unknown:
        both = (f"{name} ({peft})" for name, peft in PEFT_NAMES.items())
        raise UserError(
            f"--lora.targets: unknown {', '.join(unknown)}."
            f"{did_you_mean(unknown[0], _LAYERS)} Known: "
            f"{', '.join(both)}, or the groups {', '.join(TARGET_GROUPS)}."
        )
    chosen = {layer for name in asked for layer in _LAYERS[name]}
    return tuple(name for name in TARGETS if name in chosen)


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


_ROLES = ("user", "assistant", "model", "system", "tool")


def roles(text):
    """{speaker: role} of `NAME=ROLE,NAME=ROLE`, the names in small letters."""
    found = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, _, role = map(str.strip, entry.partition("="))
        if not name or role not in _ROLES:
            raise UserError(
                f"{entry!r} is not NAME=ROLE, where a role is user, assistant, "
                f"system or tool, as in --data.roles=narrator=assistant."
            )
        found[name.lower()] = role
    return found


_SECONDS = {"h": 3600, "m": 60, "s": 1, "": 1}


def seconds(text):
    """Seconds that `8.5h`, `30m`, `90s` mean; None for ''."""
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([hms]?)\s*", text)
    if not match:
        raise UserError(f"{text!r} is not a time: write 8.5h, 30m or 90s.")
    return float(match[1]) * _SECONDS[match[2]]


_GEMMA = re.compile(r"(?i)([\w.-]+/)?(gemma-2-(2b|9b|27b)(-it)?)(-bnb-4bit)?")


def preset(text):
    """Refuses a Gemma 2 that is named as Hugging Face names it.

    Raises:
        UserError: `text` is such a name, and no folder of that name is here.
    """
    if _GEMMA.fullmatch(text) and not pathlib.Path(text).exists():
        raise UserError(f"no such preset or folder.{preset_hint(text)}")


def preset_hint(text, known=()):
    """' Did you mean: ...?' for a preset that is not there, else ''.

    Args:
        text: what was typed, such as google/gemma-2-2b-it.
        known: presets that it may be a misspelling of.
    """
    gemma = _GEMMA.fullmatch(text)
    if gemma:
        _, _, size, tuned, four_bits = gemma.groups()
        instruct = "instruct_" if tuned else ""
        near = [hub_handle(text), f"gemma2_{instruct}{size.lower()}_en"]
        # Their codes are of a library that we do not use; ours are made.
        more = " --model.quantize=nf4" if four_bits else ""
        near = [f"--preset={name}{more}" for name in near]
        return f" Did you mean: {' or '.join(near)}?"
    if (handle := hub_handle(text)) != text:
        return f" Did you mean the model on Hugging Face: {handle}?"
    return did_you_mean(text, known)


def hub_handle(text):
    """hf://owner/name of what seems to be a model there; else `text`."""
    gemma = _GEMMA.fullmatch(text)
    if gemma:
        return f"hf://{gemma[1] or 'google/'}{gemma[2]}"
    owned = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)
    if owned and not pathlib.Path(text).exists():
        return f"hf://{text}"
    return text


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
