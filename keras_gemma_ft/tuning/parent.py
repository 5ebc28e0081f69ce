"""The adapter that a run goes on from: `train --adapter=FOLDER`.

Its values are where the new run starts. Rank, scale, targets and style are the
adapter's own; the optimizer, the schedule and the data are the run's.
"""

import hashlib
import itertools
import pathlib
from typing import NamedTuple

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import adapters, usage
from keras_gemma_ft.model import lora


class Parent(NamedTuple):
    """What a run goes on from; without an adapter, nothing.

    Attributes:
        adapter: `formats.adapters.Adapter`, or None.
        sha256: of the file that holds its weights.
        chain: {"name", "sha256", "base", "when"} of it and of the adapters
            that it descends from, oldest first.
    """

    adapter: object = None
    sha256: str | None = None
    chain: tuple = ()


def settle(cfg, backbone):
    """`cfg` with the LoRA settings of the adapter that it names.

    Args:
        cfg: `config.Config`; without an adapter it comes back as it is.
        backbone: dict as of `GemmaBackbone.get_config()`.

    Raises:
        UserError: the adapter cannot be read or cannot be gone on from, or
            flags contradict it; every such flag is in the message.
    """
    if not cfg.adapter:
        return cfg
    adapter = adapters.read(cfg.adapter, backbone)
    if not isinstance(adapter, adapters.Adapter):
        raise config.UserError(
            f"--adapter={cfg.adapter} holds {', '.join(adapter.kinds)}, which "
            f"is not trained here. Merge it, and tune what comes out: export "
            f"--adapter={cfg.adapter} --format=merged_hf --to=FOLDER, then "
            f"train --preset=FOLDER/merged_hf."
        )
    typed = config.typed(cfg)
    wrong = [*_contradictions(cfg, adapter, typed)]
    if adapter.folded:
        wrong.append(
            "its layers have different scales (alpha_pattern, rank_pattern), "
            "and a run trains all layers with one scale. Merge the adapter "
            "into its model with peft's merge_and_unload() and tune the "
            "merged folder: --preset=FOLDER without --adapter."
        )
    if wrong:
        raise config.UserError(
            f"--adapter={cfg.adapter} cannot be gone on from like this:\n  "
            + "\n  ".join(wrong)
        )
    own = lora.settings_of(adapter)
    if "lora.dropout" in typed:
        own = config.replace(own, {"dropout": cfg.lora.dropout})
    values = {f"lora.{k}": v for k, v in config.flatten(own).items()}
    return config.replace(cfg, values)


def stay_apart(cfg):
    """Refuses an adapter that the run would write over."""
    if not cfg.adapter:
        return
    run, path = (pathlib.Path(p).resolve() for p in (cfg.run_dir, cfg.adapter))
    if run != path and run not in path.parents:
        return
    names = (f"{cfg.run_dir.rstrip('/')}-{i}" for i in itertools.count(2))
    free = next(name for name in names if not pathlib.Path(name).exists())
    raise config.UserError(
        f"--adapter={cfg.adapter} lies in --run_dir={cfg.run_dir}, which the "
        f"new run would write over. Name another folder: --run_dir={free}."
    )


def _contradictions(cfg, adapter, typed):
    """A line for each typed flag that the adapter does not allow."""
    asked, cure = cfg.lora, "Leave the flag out, or leave out --adapter"
    pairs = {
        "rank": (asked.rank, adapter.rank),
        "alpha": (asked.alpha or float(adapter.rank), float(adapter.alpha)),
        "rslora": (asked.rslora, adapter.rslora),
        "style": (asked.style, adapter.style),
    }
    for name, (flag, own) in pairs.items():
        if f"lora.{name}" in typed and flag != own:
            yield f"--lora.{name}={flag}: the adapter has {own}. {cure}."
    if "lora.targets" in typed and config.targets(asked) != adapter.targets:
        yield (
            f"--lora.targets={asked.targets}: the adapter is of "
            f"{','.join(adapter.targets)}. {cure}."
        )
    if "lora.init" in typed and asked.init != "default":
        yield (
            f"--lora.init={asked.init} starts adapters from the kernels, and "
            f"--adapter starts them from a file. Leave out one of the two."
        )


def read(cfg, backbone):
    """The `Parent` that `cfg` names; `cfg` is what `settle` gave.

    Args:
        cfg, backbone: as of `settle`.
    """
    if not cfg.adapter:
        return Parent()
    adapter = adapters.read(cfg.adapter, backbone)
    file = adapters.weights_of(cfg.adapter)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    _, found = usage.find(cfg.adapter)
    told = found.told if found else {}
    place = file.resolve().parent
    name = place.parent.name if place.name == "adapter" else place.name
    own = {"name": name, "sha256": digest, "base": adapter.base}
    if "when" in told:
        own["when"] = str(told["when"])
    missing = [*_missing(adapter, backbone["num_layers"])]
    if missing:
        runtime.say(
            f"--adapter={cfg.adapter} leaves out {len(missing)} layers "
            f"({missing[0]}, ...), which stay as they are"
        )
    return Parent(adapter, digest, (*told.get("parents", ()), own))


def _missing(adapter, layers):
    for layer, target in itertools.product(range(layers), adapter.targets):
        if (layer, target) not in adapter.weights:
            yield f"{target} of layer {layer}"
