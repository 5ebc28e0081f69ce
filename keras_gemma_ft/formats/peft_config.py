"""`adapter_config.json` of a PEFT LoRA: written, and read with care.

PEFT scales each module by alpha/r with its own alpha and r (peft/tuners/lora/
model.py, `_create_and_replace`), looked up in `rank_pattern` and
`alpha_pattern` by the end of the module's name (`get_pattern_key`). A stock
Keras query has rank heads*r there and a feed-forward kernel r; the patterns
give both the same scale. The folder's `r` is the largest rank and `lora_alpha
/ r` the scale, so that servers that ignore the patterns are right too.
"""

import re

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import low_rank
from keras_gemma_ft.formats.huggingface import read_json
from keras_gemma_ft.formats.model_card import base_model_id
from keras_gemma_ft.formats.names import MODULES

CONFIG = "adapter_config.json"
# The settings that decide each module's scale.
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def peft_config(adapter, ranks):
    """`adapter_config.json` as a dict.

    Args:
        adapter: the adapter.
        ranks: module name -> rank in the PEFT file.
    """
    rank = max(ranks.values())
    rank_pattern = {m: r for m, r in ranks.items() if r != rank}
    factor = low_rank.scale(adapter.rank, adapter.alpha, adapter.rslora)
    # PEFT multiplies by alpha / r, so with one rank the user's own numbers
    # stand; patterns and rsLoRA do not mix (PEFT warns).
    plain = rank == adapter.rank and not rank_pattern
    layers = {int(name.split(".")[2]) for name in ranks}
    everywhere = {
        f"model.layers.{layer}.{MODULES[target]}"
        for layer in range(max(layers) + 1)
        for target in adapter.targets
    } == set(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_id(adapter.base),
        "revision": None,
        "r": rank,
        "lora_alpha": _number(adapter.alpha if plain else factor * rank),
        "lora_dropout": adapter.dropout,
        "target_modules": [MODULES[t].split(".")[1] for t in adapter.targets]
        if everywhere
        else list(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": adapter.rslora and plain,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": _pattern(rank_pattern, lambda r: r, everywhere),
        "alpha_pattern": _pattern(
            rank_pattern, lambda r: _number(factor * r), everywhere
        ),
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_version": "0.21.2",
    }


def _pattern(ranks, value, everywhere):
    # All layers of a target have one rank, so the module's last name will do.
    short = (lambda m: m.rpartition(".")[2]) if everywhere else str
    return {short(module): value(rank) for module, rank in ranks.items()}


def _number(alpha):
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def is_number(value):
    """Is it a JSON number that float32 can hold? (bool and NaN are not.)"""
    return type(value) in (int, float) and abs(value) < 1e38


def _is_pattern(value):
    return not value or (
        type(value) is dict and all(map(is_number, value.values()))
    )


def _names(value):
    return type(value) is list and all(type(v) is str for v in value)


def _is_tokens(value):
    lists = [value or []]
    if type(value) is dict:
        lists = value.values()
    return all(
        type(held) is list and all(type(v) is int for v in held)
        for held in lists
    )


_FLAGS = (bool, type(None))
_HARMLESS = ("gaussian", "eva", "orthogonal", "mica")
_NONE = ("none", lambda v: not v)
# name -> (what is expected, test). Settings not named here do not change
# what a trained adapter computes.
_SETTINGS = {
    "peft_type": ("'LORA'", lambda v: v == "LORA"),
    "r": ("a whole number > 0", lambda v: type(v) is int and v > 0),
    "lora_alpha": ("a number", is_number),
    "lora_dropout": ("a number", is_number),
    "use_rslora": ("true or false", lambda v: type(v) is bool),
    "rank_pattern": ("names with numbers", _is_pattern),
    "alpha_pattern": ("names with numbers", _is_pattern),
    # Of biases that a base has and Gemma 2 has not.
    "bias": (
        "'none', 'all' or 'lora_only'",
        lambda v: v in ("none", "all", "lora_only", None),
    ),
    "use_dora": ("true or false", lambda v: type(v) in _FLAGS),
    "lora_bias": ("true or false", lambda v: type(v) in _FLAGS),
    "modules_to_save": ("a list of names", lambda v: v is None or _names(v)),
    "trainable_token_indices": (
        "a list of whole numbers, or names with such lists",
        lambda v: _is_tokens(v),
    ),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base weights.
    "init_lora_weights": (
        "true (this method changes the base weights)",
        lambda v: v in (True, False, None, *_HARMLESS),
    ),
} | dict.fromkeys(
    (
        "use_qalora",
        "use_bdlora",
        "target_parameters",
        "layer_replication",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
    ),
    _NONE,
)


def read_config(folder):
    """`adapter_config.json` of a LoRA that can be followed.

    Raises:
        UserError: another kind of adapter; every such setting is listed.
    """
    config = read_json(folder / CONFIG)
    wrong = [
        f"{name}={config[name]!r}: expected {expected}"
        for name, (expected, allowed) in _SETTINGS.items()
        if name in config and not allowed(config[name])
    ]
    if "peft_type" not in config:
        wrong.append("peft_type is missing: expected 'LORA'")
    if wrong:
        raise UserError(
            f"{folder / CONFIG} asks for what is not supported:\n  "
            + "\n  ".join(wrong)
            + "\nMerge that adapter into its model with peft's "
            "merge_and_unload() and pass the merged folder as --preset."
        )
    return config


def _fitting(folder, config, setting, module):
    """The values of a pattern's keys that fit a module's name, in order."""
    for pattern, value in (config.get(setting) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                yield pattern, value
        except re.error as error:
            raise UserError(
                f"{folder / CONFIG}: {setting} {pattern!r} is not a "
                f"regular expression ({error}). Export the adapter again."
            ) from error


def scales(folder, config, ranks):
    """{module: s of its pair}.

    Args:
        folder: for the error.
        config: `adapter_config.json`.
        ranks: {module: rank of its tensors}.

    Raises:
        UserError: a pattern is not a regular expression.
    """
    alpha = config.get("lora_alpha", 8)
    found = {}
    for module, rank in ranks.items():
        first = next(_fitting(folder, config, "alpha_pattern", module), None)
        found[module] = low_rank.scale(
            rank, first[1] if first else alpha, config.get("use_rslora", False)
        )
    return found


def doubts(folder, config, ranks):
    """Sentences: where the file may say other than what was trained.

    PEFT takes the first key that fits, and saves the keys sorted: if several
    fit one module, another may have been first while it was trained.

    Args, errors: as of `scales`.
    """
    said = []
    unsure, moved = {}, {}
    for module, rank in ranks.items():
        alphas = [*_fitting(folder, config, "alpha_pattern", module)]
        if len({value for _, value in alphas}) > 1:
            unsure.setdefault(tuple(alphas), []).append(module)
        found = [*_fitting(folder, config, "rank_pattern", module)]
        if found and found[0][1] != rank and rank in [v for _, v in found]:
            moved.setdefault(tuple(found), []).append(module)
    for alphas, modules in unsure.items():
        keys = ", ".join(f"{key!r}: {value}" for key, value in alphas)
        said.append(
            f"alpha_pattern has several keys for {modules[0]} and "
            f"{len(modules) - 1} more ({keys}). The first one counts, and PEFT "
            f"saves them sorted: while it was trained another may have been "
            f"first. Compare the scores with those of the training."
        )
    for found, modules in moved.items():
        keys = ", ".join(f"{key!r}: {value}" for key, value in found)
        said.append(
            f"rank_pattern has several keys for {modules[0]} ({keys}), and its "
            f"tensors are not of the first one's rank: PEFT has sorted the "
            f"keys since, and those of alpha_pattern with them."
        )
    return tuple(said)
